"""The loss of every subset of a pool against the pool itself, subset by subset."""

import itertools
import math

import numpy as np
import pytest
import torch

from kdlib.ensemble import subsets
from kdlib.ensemble.pooling import probability_pool
from kdlib.ensemble.subsets import mean_by_size, oracle_nll, subset_nll
from kdlib.errors import KdlibError


def some_log_probs(members, tokens=301, seed=0):
    rng = np.random.default_rng(seed)
    return np.minimum(rng.normal(-3, 2, (members, tokens)), -1e-3)


@pytest.mark.parametrize("members", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("tokens", [1, 5, 301])
def test_every_subset_has_the_loss_of_its_pool(members, tokens):
    log_probs = some_log_probs(members, tokens)
    found = subset_nll(log_probs)
    assert len(found) == 2**members and math.isnan(found[0])
    for size in range(1, members + 1):
        for subset in itertools.combinations(range(members), size):
            direct = -probability_pool(torch.from_numpy(log_probs[list(subset)])).mean().item()
            assert found[sum(1 << k for k in subset)] == pytest.approx(direct, abs=1e-12)


def test_the_subsets_of_twelve_members_are_all_there():
    log_probs = some_log_probs(12, 20).astype(np.float16)
    found = subset_nll(log_probs)
    assert found.shape == (4096,) and np.isfinite(found[1:]).all()
    direct = -probability_pool(torch.from_numpy(log_probs[[0, 5, 11]].astype(np.float64))).mean().item()
    assert found[0b100000100001] == pytest.approx(direct, abs=1e-12)


@pytest.mark.parametrize("size", [1, 3])
def test_nothing_depends_on_how_many_tokens_are_taken_at_a_time(monkeypatch, size):
    log_probs = some_log_probs(5)
    expected = subset_nll(log_probs)
    monkeypatch.setattr(subsets, "TOKENS", size)
    assert np.allclose(subset_nll(log_probs)[1:], expected[1:], rtol=0, atol=1e-12)


def test_a_token_that_a_member_finds_impossible_leaves_all_losses_finite():
    log_probs = some_log_probs(4, 40)
    log_probs[1, 3] = np.finfo(np.float16).min  # the lowest that is stored
    found, rest = subset_nll(log_probs), subset_nll(np.delete(log_probs, 3, axis=1))
    assert np.isfinite(found[1:]).all()
    assert found[0b0010] == pytest.approx((39 * rest[0b0010] + 160 - log_probs[:, 3].max()) / 40)
    direct = -probability_pool(torch.from_numpy(log_probs[[1, 2]])).mean().item()
    assert found[0b0110] == pytest.approx(direct, abs=1e-12)


def test_the_mean_by_size_is_over_all_subsets_of_a_size_and_falls():
    log_probs = some_log_probs(5)
    found = mean_by_size(subset_nll(log_probs))
    for size, mean in enumerate(found, 1):
        pools = [log_probs[list(one)] for one in itertools.combinations(range(5), size)]
        expected = [-(np.logaddexp.reduce(one) - math.log(size)).mean() for one in pools]
        assert mean == pytest.approx(np.mean(expected), abs=1e-12)
    assert (np.diff(found) < 0).all() and len(found) == 5


def test_copies_of_one_member_gain_nothing():
    found = mean_by_size(subset_nll(np.repeat(some_log_probs(1), 4, axis=0)))
    assert np.allclose(found, found[0], rtol=0, atol=1e-12)


def test_no_pool_and_no_weights_beat_the_oracle():
    log_probs = some_log_probs(6)
    assert oracle_nll(log_probs) < np.nanmin(subset_nll(log_probs))
    assert oracle_nll(log_probs[:1]) == pytest.approx(subset_nll(log_probs[:1])[1])
    assert oracle_nll(np.array([[-1.0, -5.0], [-3.0, -2.0]])) == 1.5


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        (np.zeros((17, 3)), "1 to 16 members"),
        (np.zeros(3), r"got \(3,\)"),
        (np.zeros((2, 0)), "tokens"),
        (np.full((2, 3), -np.inf), "finite"),
        (np.array([[np.nan], [0.0]]), "finite"),
    ],
)
def test_what_is_no_table_of_log_probabilities_is_refused(log_probs, message):
    with pytest.raises(KdlibError, match=message):
        subset_nll(log_probs)
