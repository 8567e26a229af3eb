"""Learned weights of a pool against what was planted, an optimiser written by others, and the conditions of an optimum."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from kdlib.ensemble import weights as learned
from kdlib.ensemble.pooling import probability_pool
from kdlib.ensemble.weights import by_budget, fit, largest, nll
from kdlib.errors import KdlibError


def some_log_probs(members=6, tokens=3000, seed=0, dtype=np.float64):
    """Members of unlike quality that err on tokens of their own."""
    rng = np.random.default_rng(seed)
    quality = np.linspace(0.0, 0.8, members)[:, None]
    return np.minimum(-1.5 - quality + rng.normal(0, 0.8, (members, tokens)), -1e-3).astype(dtype)


def gains(log_probs, weights):
    p = np.exp(log_probs.astype(np.float64))
    return (p / (weights @ p)).mean(axis=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 1e-6), (np.float32, 1e-6), (np.float64, 1e-10)])
def test_the_conditions_of_an_optimum_hold(dtype, tolerance):
    log_probs = some_log_probs(12, dtype=dtype)
    found = fit(log_probs, tolerance)
    assert found.weights.min() >= 0 and found.weights.sum() == pytest.approx(1, abs=1e-12)
    ratio = gains(log_probs, found.weights)
    assert found.gap <= tolerance and ratio.max() <= 1 + tolerance + 1e-6 * (dtype != np.float64)
    used = found.weights > 1e-6
    assert 1 < used.sum() < 12, "some members are left out"
    assert np.allclose(ratio[used], 1, atol=1e-5)


def test_the_gap_bounds_how_much_lower_the_loss_could_be():
    log_probs = some_log_probs()
    rough, best = fit(log_probs, 0.05), fit(log_probs, 1e-12)
    assert rough.gap == pytest.approx(gains(log_probs, rough.weights).max() - 1, abs=1e-12)
    assert best.nll <= rough.nll <= best.nll + np.log1p(rough.gap)


@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_a_general_optimiser(seed):
    log_probs = some_log_probs(5, 400, seed)
    p = np.exp(log_probs)
    options = {"method": "SLSQP", "bounds": [(0, 1)] * 5, "constraints": {"type": "eq", "fun": lambda w: w.sum() - 1}}
    options["jac"], options["options"] = lambda w: -(p / (w @ p)).mean(axis=1), {"ftol": 1e-14, "maxiter": 500}
    expected = minimize(lambda w: -np.log(w @ p).mean(), np.full(5, 0.2), **options)
    found = fit(log_probs, 1e-10)
    assert np.allclose(found.weights, expected.x, atol=1e-5)
    assert found.nll == pytest.approx(expected.fun, abs=1e-9) and found.nll <= expected.fun + 1e-12


def test_planted_weights_are_found_again():
    """Tokens drawn from a mixture of known distributions."""
    rng, planted = np.random.default_rng(1), np.array([0.5, 0.3, 0.2, 0.0])
    members = np.exp(2 * rng.normal(size=(4, 30)))
    members /= members.sum(axis=1, keepdims=True)
    tokens = rng.choice(30, size=200_000, p=planted @ members)
    assert np.allclose(fit(np.log(members[:, tokens])).weights, planted, atol=0.015)


def test_the_loss_is_that_of_the_pool():
    log_probs, weights = some_log_probs(), np.array([0.1, 0.2, 0.3, 0.4, 0.0, 0.0])
    pooled = probability_pool(torch.from_numpy(log_probs), torch.from_numpy(weights))
    assert nll(log_probs, weights) == pytest.approx(-pooled.mean().item(), abs=1e-12)
    assert fit(log_probs).nll == pytest.approx(nll(log_probs, fit(log_probs).weights), abs=1e-12)


def test_permuting_the_members_permutes_their_weights():
    log_probs, order = some_log_probs(), np.array([4, 1, 5, 0, 3, 2])
    assert np.allclose(fit(log_probs[order], 1e-10).weights, fit(log_probs, 1e-10).weights[order], atol=1e-5)


def test_a_member_that_is_there_twice_shares_its_weight():
    log_probs = some_log_probs()
    alone, twice = fit(log_probs, 1e-10), fit(np.concatenate([log_probs, log_probs[:1]]), 1e-10)
    assert alone.weights[0] > 0.1
    assert twice.weights[0] == pytest.approx(twice.weights[6], abs=1e-3)
    assert twice.weights[0] + twice.weights[6] == pytest.approx(alone.weights[0], abs=1e-5)
    assert twice.nll == pytest.approx(alone.nll, abs=1e-9)


@pytest.mark.parametrize("members", [1, 4])
def test_copies_of_one_member_are_no_better_than_it(members):
    log_probs = np.repeat(some_log_probs(1), members, axis=0)
    assert fit(log_probs).nll == pytest.approx(-log_probs[0].mean(), abs=1e-9)


def test_a_member_that_is_right_where_all_others_find_the_token_impossible_is_used():
    log_probs = np.full((80, 300), -0.5)
    log_probs[:79, 7] = -np.inf
    log_probs[79] = -4.0
    found = fit(log_probs)
    # Σ_t log of two kinds of token: w and 1 − w of the last one's probability e⁻⁴ against e^−½.
    assert np.isfinite(found.nll) and 0 < found.weights[79] < 0.01 and found.gap <= 1e-6


def test_members_that_no_step_began_with_can_join(monkeypatch):
    log_probs = some_log_probs(30)
    expected = fit(log_probs, 1e-10)
    monkeypatch.setattr(learned, "JOINING", 1)
    monkeypatch.setattr(learned, "ROUNDS", 0)
    found = fit(log_probs, 1e-10)
    assert (found.weights > 1e-3).sum() > 3 and np.allclose(found.weights, expected.weights, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_nothing_depends_on_the_size_of_a_chunk(monkeypatch, chunk):
    log_probs = some_log_probs(4, 100)
    expected = fit(log_probs, 1e-10)
    monkeypatch.setattr(learned, "CHUNK", chunk)
    assert np.allclose(fit(log_probs, 1e-10).weights, expected.weights, atol=1e-8)


def test_budgets_keep_the_members_that_weigh_most():
    log_probs = some_log_probs(8)
    weights = fit(log_probs).weights
    found = by_budget(log_probs, weights, [1, 2, 8])
    assert found[0].members == [int(weights.argmax())] and found[1].members == np.argsort(-weights)[:2].tolist()
    for size, budget in zip((1, 2, 8), found, strict=True):
        kept = largest(weights, size)
        assert kept.sum() == pytest.approx(1) and np.count_nonzero(kept) <= size
        assert budget.renormalised == pytest.approx(nll(log_probs, kept), abs=1e-12)
        assert budget.fit.nll <= budget.renormalised + 1e-6, "to the tolerance of the fit"
        assert len(budget.fit.weights) == len(budget.members) == size
    losses = [budget.fit.nll for budget in found]
    assert losses[0] > losses[1] > losses[2] and losses[2] == pytest.approx(fit(log_probs).nll, abs=1e-6)


@pytest.mark.parametrize("size", [0, 7])
def test_more_members_than_there_are_cannot_be_kept(size):
    with pytest.raises(KdlibError, match=f"1 to 6.*got {size}"):
        largest(np.full(6, 1 / 6), size)


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        (np.zeros(5), r"\[members, tokens\], got \(5,\)"),
        (np.zeros((2, 0)), "tokens"),
        (np.full((2, 3), -np.inf), "3 tokens where none"),
        (np.array([[0.0, np.nan], [0.0, 0.0]]), "1 tokens"),
    ],
)
def test_log_probabilities_that_are_none_are_refused(log_probs, message):
    with pytest.raises(KdlibError, match=message):
        fit(log_probs)


def test_a_gap_that_rounding_does_not_allow_is_told(monkeypatch):
    monkeypatch.setattr(learned, "MOST", 20)
    with pytest.raises(KdlibError, match="in 20 steps"):
        fit(some_log_probs(dtype=np.float32), tolerance=-1.0)
