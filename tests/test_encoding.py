"""Codes of a few bits: what is packed comes back, and what is rounded keeps its expectation exactly."""

import itertools
import math
from bisect import bisect_right

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlib.cache.encoding import (
    LARGEST_NATS,
    LOG_WEIGHTS,
    code_nats,
    decode_nats,
    pack_ids,
    round_weights,
    unpack_ids,
)

LARGEST_UNIFORM = 1 - 2.0**-53
TABLE = LOG_WEIGHTS.astype(np.float64)


def between(low, high, count=2000, seed=0):
    """Weights spread evenly in their logarithm."""
    return np.exp(np.random.default_rng(seed).uniform(np.log(low), np.log(high), count))


def neighbours(weight):
    """The table's values around a weight below the largest."""
    upper = bisect_right(TABLE.tolist(), weight)
    return TABLE[upper - 1], TABLE[upper]


# Ids

rows_of_ids = st.lists(st.sets(st.integers(0, 2**25 - 1), max_size=9).map(sorted), max_size=30)


def packed(rows):
    lengths = np.array([len(row) for row in rows], np.int64)
    return pack_ids(np.array([i for row in rows for i in row], np.int64), lengths), lengths


@given(rows_of_ids)
def test_packed_ids_are_gaps_told_by_their_octaves_and_the_bits_below(rows):
    (octaves, remainders), _ = packed(rows)
    gaps = [after - before for row in rows for before, after in itertools.pairwise([-1, *row])]
    assert octaves.dtype == remainders.dtype == np.uint8 and octaves.tolist() == [gap.bit_length() - 1 for gap in gaps]
    # One integer, lowest bit first, is all there is to the layout of the remainders.
    whole = int.from_bytes(remainders.tobytes(), "little")
    for gap, octave in zip(gaps, octaves.tolist(), strict=True):
        assert whole & 2**octave - 1 == gap - 2**octave
        whole >>= octave
    assert whole == 0 and len(remainders) == -(-int(octaves.sum(dtype=np.int64)) // 8)


@given(st.data())
def test_packed_ids_come_back_row_by_row_in_any_order(data):
    rows = data.draw(rows_of_ids)
    (octaves, remainders), lengths = packed(rows)
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=40)) if rows else []
    ends = np.cumsum(lengths)
    entries = np.array([i for row in order for i in range(ends[row] - lengths[row], ends[row])], np.int64)
    starts = (np.cumsum(octaves, dtype=np.uint32) - octaves)[entries]
    found = unpack_ids(octaves[entries], np.r_[remainders, [255] * 4].astype(np.uint8), starts, lengths[order])
    assert found.tolist() == [i for row in order for i in rows[row]]


def test_ids_far_apart_do_not_spill_into_their_neighbours_and_their_sums_may_pass_32_bits():
    rows = [[2**25 - 2 - i % 2] for i in range(2000)]
    (octaves, remainders), lengths = packed(rows)
    starts = np.cumsum(octaves, dtype=np.uint32) - octaves
    found = unpack_ids(octaves, np.r_[remainders, np.zeros(4, np.uint8)], starts, lengths)
    assert sum(map(sum, rows)) > 2**32 and found.tolist() == [row[0] for row in rows]


def test_a_set_of_ids_takes_fewer_bits_than_the_ids_in_some_order():
    # 30 of 4096 ids, all sets as likely: log2 of their number is the least that any code can take on average.
    rng, sets = np.random.default_rng(0), 2000
    rows = np.sort(rng.permuted(np.tile(np.arange(4096), (sets, 1)), axis=1)[:, :30])
    octaves, remainders = pack_ids(rows.reshape(-1), np.full(sets, 30))
    shares = np.bincount(octaves) / octaves.size
    bits = (8 * len(remainders) - octaves.size * (shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum()) / sets
    least = math.log2(math.comb(4096, 30))
    assert least < bits < 1.03 * least < 0.75 * 30 * 12


# Weights


def test_the_table_rises_by_a_tenth_at_a_time_between_its_ends():
    assert TABLE[0] == 0 and len(TABLE) == 256
    assert TABLE[1] == pytest.approx(math.exp(-20)) and TABLE[255] == pytest.approx(math.exp(4))
    ratios = TABLE[2:] / TABLE[1:-1]
    assert ratios.min() > 1.099 and ratios.max() < 1.1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_weight_is_rounded_up_by_just_the_uniforms_below_its_share_so_its_expectation_is_exact(dtype):
    for weight in np.r_[between(1e-12, 54.5), 1e-30].astype(dtype):
        low, high = neighbours(float(weight))
        share = (float(weight) - low) / (high - low)
        # All uniforms below the threshold take the upper value, all others the lower, so P(up) is the threshold.
        precision = np.finfo(dtype).eps
        below, above = max(0.0, share * (1 - precision) - 1e-300), min(share * (1 + precision) + 1e-300, 1.0)
        uniforms = np.array([0, below / 2, np.nextafter(below, 0), above, (1 + above) / 2, LARGEST_UNIFORM])
        found = TABLE[round_weights(np.full(6, weight), uniforms)]
        assert found.tolist() == [high] * 3 + [low] * 3
        assert low + share * (high - low) == pytest.approx(float(weight), rel=1e-14)


def test_over_a_fine_grid_of_uniforms_the_mean_is_the_weight_to_the_grids_resolution():
    grid = (np.arange(4096) + 0.5) / 4096
    for weight in between(1e-10, 54.0, 300):
        low, high = neighbours(weight)
        mean = TABLE[round_weights(np.full(len(grid), weight), grid)].mean()
        assert abs(mean - weight) <= (high - low) / 4096 / 2 * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_uniforms_a_weight_takes_the_nearer_value(dtype):
    weights = np.r_[between(1e-12, 54.5), (TABLE[1:] + TABLE[:-1]) / 2 * (1 + 1e-6)].astype(dtype)
    found = TABLE[round_weights(weights)]
    assert (np.abs(found - weights) <= np.abs(TABLE[:, None] - weights).min(0) * (1 + 1e-6)).all()


def test_rounding_keeps_the_order_of_weights():
    weights = np.sort(np.r_[0, between(1e-12, 100.0), TABLE])
    for uniform in (None, 0.0, 0.3, LARGEST_UNIFORM):
        codes = round_weights(weights, None if uniform is None else np.full(len(weights), uniform))
        assert (np.diff(codes.astype(int)) >= 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_tables_own_values_and_all_beyond_its_end_are_never_moved_by_chance(dtype):
    ends = np.array([np.nextafter(LOG_WEIGHTS[-1], np.float32(np.inf)), 1e6, np.inf])
    weights = np.r_[TABLE, ends].astype(dtype)
    codes = [*range(256), 255, 255, 255]
    for uniforms in (None, np.zeros(len(weights)), np.full(len(weights), LARGEST_UNIFORM)):
        assert round_weights(weights, uniforms).tolist() == codes
    just_below = np.nextafter(LOG_WEIGHTS[1:], np.float32(0)).astype(dtype)
    assert round_weights(just_below).tolist() == list(range(1, 256))
    assert round_weights(just_below, np.full(255, LARGEST_UNIFORM)).tolist() == list(range(255))


# Nats


def test_nats_are_off_by_no_more_than_is_documented():
    nats = np.r_[np.linspace(0, LARGEST_NATS, 200_001), np.geomspace(1e-9, 1, 20_001)]
    error = np.abs(decode_nats(code_nats(nats)) - nats)
    assert (error <= np.sqrt(nats) / 31 + 0.0003).all()
    # The bound is no looser than it must be.
    assert (error / (np.sqrt(nats) / 31 + 0.0003)).max() > 0.95
    assert (np.diff(code_nats(np.sort(nats)).astype(int)) >= 0).all()


def test_every_code_of_nats_is_its_own_and_the_ends_are_exact():
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(code_nats(decode_nats(codes)), codes)
    ends = decode_nats(code_nats(np.array([0, 1e-9, LARGEST_NATS, 1e3, np.inf])))
    assert ends.tolist() == [0, 0, LARGEST_NATS, LARGEST_NATS, LARGEST_NATS]
