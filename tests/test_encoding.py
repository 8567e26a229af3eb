"""Codes of a few bits: what is packed comes back, and what is rounded keeps its expectation exactly."""

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
    differences,
    id_bits,
    pack_ids,
    round_weights,
    sums,
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


def test_id_bits_is_the_least_number_of_bits_that_tells_all_ids_apart():
    for vocabulary in [*range(2, 5000), 2**16, 2**16 + 1, 151_936, 2**25]:
        assert 2 ** (id_bits(vocabulary) - 1) < vocabulary <= 2 ** id_bits(vocabulary)
    assert id_bits(1) == 1


@given(st.data())
def test_packed_ids_come_back_in_any_order(data):
    bits = data.draw(st.integers(1, 25))
    ids = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), np.int64)
    packed = pack_ids(ids, bits)
    assert packed.dtype == np.uint8 and len(packed) == -(-len(ids) * bits // 8) + 4
    # One integer, lowest bit first, is all there is to the layout.
    whole = int.from_bytes(packed.tobytes(), "little")
    assert [whole >> i * bits & 2**bits - 1 for i in range(len(ids))] == ids.tolist()
    assert whole >> len(ids) * bits == 0
    entries = np.array(data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=90)) if len(ids) else [], np.int64)
    assert unpack_ids(packed, entries * bits, bits).tolist() == ids[entries].tolist()


@pytest.mark.parametrize("bits", [1, 8, 13, 24, 25])
def test_ids_of_all_ones_do_not_spill_into_their_neighbours(bits):
    ids = np.where(np.arange(999) % 2, 2**bits - 1, 0)
    assert np.array_equal(unpack_ids(pack_ids(ids, bits), np.arange(999) * bits, bits), ids)


# Codes in a row


rows_of_codes = st.lists(st.lists(st.integers(0, 255), max_size=9), max_size=30)


@given(rows_of_codes)
def test_sums_undo_differences_whatever_rows_are_empty(rows):
    lengths = np.array([len(row) for row in rows], np.int64)
    codes = np.array([code for row in rows for code in row], np.uint8)
    steps = differences(codes, lengths)
    by_hand = [(code - before) % 256 for row in rows for before, code in zip([0, *row], row, strict=False)]
    assert steps.dtype == np.uint8 and steps.tolist() == by_hand
    assert sums(steps, lengths).tolist() == codes.tolist()


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
