"""Intervals, adjusted p-values and claims against simulations and hand examples."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kdlib.analysis import statistics
from kdlib.errors import KdlibError


def correlated_documents(rng, sources=25, effect=0.0):
    """Two models of equal quality (plus ``effect``) whose differences are alike within a source."""
    source = np.repeat(np.arange(sources), rng.geometric(0.3, sources))
    tokens = np.round(np.exp(rng.normal(5, 1, source.size))) + 1
    per_token = effect + rng.normal(0, 0.1, sources)[source] + rng.normal(0, 0.05, source.size)
    nll_b = tokens * rng.normal(4, 1, source.size)
    return nll_b + tokens * per_token, nll_b, tokens, source


def test_a_model_against_itself_differs_by_exactly_nothing():
    rng = np.random.default_rng(0)
    nll, _, tokens, source = correlated_documents(rng)
    found = statistics.paired_bootstrap(nll, nll, tokens, source, resamples=200)
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert found.n_units == 25
    seeds = statistics.seed_bootstrap([tokens, 2 * tokens], [tokens, 2 * tokens], tokens, resamples=200)
    assert seeds.difference == 0 and seeds.low < 0 < seeds.high


def test_the_difference_is_weighted_by_tokens_and_ignores_how_sources_are_cut_into_documents():
    a, b, tokens, units = [30.0, 10.0, 8.0], [20.0, 12.0, 4.0], [10, 2, 4], ["x", "x", "y"]
    found = statistics.paired_bootstrap(a, b, tokens, units, resamples=500)
    assert found.difference == pytest.approx(12 / 16, abs=1e-15)
    joined = statistics.paired_bootstrap([40.0, 8.0], [32.0, 4.0], [12, 4], ["x", "y"], resamples=500)
    assert (found.low, found.high, found.p_value) == (joined.low, joined.high, joined.p_value)


def test_a_null_of_correlated_documents_is_rejected_at_the_nominal_rate_where_naive_bootstraps_are_not():
    rng = np.random.default_rng(1)
    simulations, rejected, by_document, percentile = 1000, 0, 0, 0
    for seed in range(simulations):
        a, b, tokens, source = correlated_documents(rng)
        rejected += statistics.paired_bootstrap(a, b, tokens, source, 300, seed).p_value <= 0.05
        by_document += statistics.paired_bootstrap(a, b, tokens, np.arange(a.size), 300, seed).p_value <= 0.05
        draws = rng.multinomial(25, np.full(25, 1 / 25), size=300)
        drawn = draws @ np.bincount(source, a - b) / (draws @ np.bincount(source, tokens))
        low, high = np.quantile(drawn, [0.025, 0.975])
        percentile += low > 0 or high < 0
    assert 0.03 <= rejected / simulations <= 0.07
    assert by_document / simulations > 0.15
    assert percentile / simulations > 0.07


def test_a_bootstrap_over_tokens_would_reject_a_true_null_most_of_the_time():
    rng = np.random.default_rng(2)
    sources, tokens_each, rejected, by_token = 20, 100, 0, 0
    for seed in range(100):
        difference = rng.normal(0, 0.1, (sources, 1)) + rng.normal(0, 0.3, (sources, tokens_each))
        ones, zero = np.ones(difference.size), np.zeros(difference.size)
        source = np.repeat(np.arange(sources), tokens_each)
        rejected += statistics.paired_bootstrap(difference.ravel(), zero, ones, source, 200, seed).p_value <= 0.05
        by_token += (
            statistics.paired_bootstrap(difference.ravel(), zero, ones, np.arange(ones.size), 200, seed).p_value <= 0.05
        )
    assert rejected <= 12 and by_token >= 50


def test_intervals_cover_a_true_difference_as_often_as_they_say():
    rng, true, covered = np.random.default_rng(3), 0.07, 0
    for seed in range(600):
        found = statistics.paired_bootstrap(*correlated_documents(rng, effect=true), resamples=300, seed=seed)
        covered += found.low <= true <= found.high
    assert 0.92 <= covered / 600 <= 0.98


@pytest.mark.parametrize(("seeds_a", "seeds_b"), [(5, 5), (3, 5)])
def test_seeds_are_resampled_too_so_that_seed_noise_alone_is_no_finding(seeds_a, seeds_b):
    rng = np.random.default_rng(4)
    simulations, sources, rejected, one_pair = 400, 30, 0, 0
    for seed in range(simulations):
        tokens = np.round(np.exp(rng.normal(6, 1, sources)))
        text = rng.normal(4, 0.3, sources)
        a, b = (
            tokens * (text + rng.normal(0, 0.05, (n, 1)) + rng.normal(0, 0.03, (n, sources)))
            for n in (seeds_a, seeds_b)
        )
        rejected += statistics.seed_bootstrap(a, b, tokens, 300, seed).p_value <= 0.05
        one_pair += statistics.paired_bootstrap(a[0], b[0], tokens, np.arange(sources), 300, seed).p_value <= 0.05
    assert 0.015 <= rejected / simulations <= 0.075
    assert one_pair / simulations > 0.5


def test_the_standard_error_is_the_textbook_one_where_documents_are_equal_and_independent():
    rng = np.random.default_rng(10)
    difference, seeds = rng.normal(size=30), rng.normal(size=(4, 1)) + np.zeros((4, 30))
    found = statistics.paired_bootstrap(7 * difference, np.zeros(30), np.full(30, 7), np.arange(30), resamples=100)
    assert found.standard_error == pytest.approx(difference.std(ddof=1) / np.sqrt(30), rel=1e-12)
    found = statistics.seed_bootstrap(7 * seeds, np.zeros((1, 30)), np.full(30, 7), resamples=100)
    assert found.standard_error == pytest.approx(seeds[:, 0].std(ddof=1) / np.sqrt(4), rel=1e-12)


def test_one_seed_can_be_compared_with_many():
    rng = np.random.default_rng(5)
    tokens = np.full(40, 100.0)
    many = tokens * rng.normal(4.0, 0.02, (6, 40))
    found = statistics.seed_bootstrap(tokens[None] * 3.9, many, tokens, resamples=500)
    assert found.high < 0 and found.difference == pytest.approx(3.9 - (many / tokens).mean(), abs=1e-12)


def test_an_interval_excludes_zero_exactly_when_its_p_value_says_so():
    rng, agree = np.random.default_rng(6), []
    for seed in range(100):
        found = statistics.paired_bootstrap(*correlated_documents(rng, effect=0.04), resamples=199, seed=seed)
        for level in (0.8, 0.9, 0.95, 0.99):
            interval = found.at_level(level)
            agree.append((interval.low > 0 or interval.high < 0) == (found.p_value <= 1 - level + 1e-12))
    assert all(agree)


def test_a_level_beyond_the_resamples_gives_no_bound_instead_of_a_wrong_one():
    found = statistics.paired_bootstrap(*correlated_documents(np.random.default_rng(7)), resamples=100)
    assert found.at_level(0.9999).low == -np.inf


def test_the_result_does_not_depend_on_the_size_of_the_chunks(monkeypatch):
    documents = correlated_documents(np.random.default_rng(8))
    whole = statistics.paired_bootstrap(*documents, resamples=300)
    monkeypatch.setattr(statistics, "CHUNK", 400)
    parts = statistics.paired_bootstrap(*documents, resamples=300)
    assert parts.pivots.shape == whole.pivots.shape
    assert parts.low == pytest.approx(whole.low, rel=0.2) and parts.difference == whole.difference


def test_holm_matches_the_example_by_hand():
    # Sorted: .005·4 = .02, .01·3 = .03, .03·2 = .06, .04·1 = .04 → raised to .06.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_holm_intervals_exclude_zero_exactly_where_holm_rejects_and_are_never_narrower():
    rng = np.random.default_rng(9)
    for seed in range(20):
        effects = rng.uniform(-0.15, 0.15, 6)
        family = [
            statistics.paired_bootstrap(*correlated_documents(rng, effect=e), resamples=999, seed=seed) for e in effects
        ]
        for before, after in zip(family, statistics.holm_intervals(family), strict=True):
            assert (after.low > 0 or after.high < 0) == (after.p_value <= 0.05)
            assert after.low <= before.low and before.high <= after.high


def comparison(difference, half):
    return statistics.Comparison(
        difference, difference - half, difference + half, 0.01, half / 2, 0.95, 50, 999, np.zeros(0)
    )


@pytest.mark.parametrize(
    ("difference", "half", "seed_error", "verdict"),
    [
        (-0.02, 0.01, 0.001, "yes"),
        (-0.02, 0.03, 0.001, "undecided"),  # the interval includes 0
        (-0.02, 0.01, 0.015, "undecided"),  # within two seed standard errors
        (-0.003, 0.001, 0.0001, "no"),  # real, and too small to matter
        (0.02, 0.01, 0.001, "no"),  # worse
        (0.02, 0.01, 0.02, "undecided"),  # worse, and the seeds could have done it
        (0.0, 0.02, 0.001, "undecided"),
        (-0.02, 0.01, float("nan"), "undecided"),  # one seed
    ],
)
def test_a_claim_needs_an_interval_off_zero_and_a_gain_beyond_the_minimum_and_the_seeds(
    difference, half, seed_error, verdict
):
    found = statistics.claim(comparison(difference, half), seed_error)
    assert found.verdict == verdict and found.reason


def test_mean_over_seeds_has_students_interval():
    found = statistics.mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.standard_error == pytest.approx(1 / np.sqrt(3))
    assert found.high - 2 == pytest.approx(4.302652729911275 / np.sqrt(3))  # t(2 degrees of freedom, 97.5 %)
    assert np.isnan(statistics.mean_interval([1.0]).low)


def test_documents_are_summed_by_source_within_one_split():
    documents = pd.DataFrame(
        {
            "split": ["test", "test", "test", "ood"],
            "document": ["d/b#00", "d/a#00", "d/b#01", "d/b#00"],
            "source": ["d/b", "d/a", "d/b", "d/b"],
            "domain": ["d", "d", "d", "d"],
            "tokens": [1, 2, 4, 100],
            "bytes": [10, 20, 40, 100],
            "nll": [1.5, 2.5, 3.5, 100.0],
            "correct": [0, 1, 2, 100],
        }
    )
    found = statistics.per_source(documents, "test")
    assert list(found.index) == ["d/a", "d/b"]
    assert found.loc["d/b", ["nll", "tokens", "bytes", "correct"]].tolist() == [5.0, 5, 50, 2]
    with pytest.raises(KdlibError, match="no split 'validation'"):
        statistics.per_source(documents, "validation")


def test_pool_log_probabilities_are_those_of_the_mean_probability():
    probabilities = np.array([[0.2, 1e-3], [0.6, 3e-3]])
    assert np.exp(statistics.pool_target_logprobs(np.log(probabilities))) == pytest.approx([0.4, 2e-3], rel=1e-12)
    single = np.log(probabilities[:1])
    assert np.array_equal(statistics.pool_target_logprobs(single), single[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.paired_bootstrap([1.0], [1.0, 2.0], [1, 1], ["a", "b"]), "same documents"),
        (lambda: statistics.paired_bootstrap([1.0, 2.0], [1.0, 2.0], [1, 1], ["a", "a"]), "at least two"),
        (lambda: statistics.paired_bootstrap([np.nan, 2.0], [1.0, 2.0], [1, 1], ["a", "b"]), "finite"),
        (lambda: statistics.paired_bootstrap([1.0, 2.0], [1.0, 2.0], [1, 0], ["a", "b"]), "without tokens"),
        (lambda: statistics.seed_bootstrap([1.0, 2.0], [[1.0, 2.0]], [1, 1]), r"\[seeds, sources\]"),
        (lambda: statistics.mean_interval([]), "one number a seed"),
    ],
)
def test_data_that_cannot_be_compared_are_refused(call, message):
    with pytest.raises(KdlibError, match=message):
        call()


def test_statistics_need_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, kdlib.statistics; assert 'torch' not in sys.modules"], check=True
    )
    tree = ast.parse(Path(statistics.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("kdlib")} == {"kdlib.errors"}
