"""Intervals, tests, claims and equivalence against simulations, identities and examples by hand."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kdlib.analysis import calibration, statistics, variance
from kdlib.errors import KdlibError


def study(rng, runs, sizes, shape, seed=0.0, source=0.0, both=0.0, effect=0.0):
    """A − B of many simulated experiments, [experiments, runs, sources], with tokens and domains [sources].

    ``sizes``: sources of each domain. Domains differ by a constant; ``seed``, ``source`` and ``both``: standard deviations of what
    runs, sources, and a run on a source add to the loss of a token. Source sizes vary eightfold.
    """
    domains = np.repeat(np.arange(len(sizes)), sizes)
    tokens = np.round(np.exp(rng.uniform(5, 7, domains.size)))
    shift = rng.normal(0, 0.3, len(sizes))[domains]
    shift -= (shift * tokens).sum() / tokens.sum()
    per_token = effect + shift + seed * rng.normal(size=(shape, runs, 1)) + source * rng.normal(size=(shape, 1, domains.size))
    return (per_token + both * rng.normal(size=(shape, runs, domains.size))) * tokens, tokens, domains


def rejected(found) -> float:
    return float(np.mean(np.asarray(found.p_value) <= 0.05))


LAPTOP = (5, 15, 74, 6, 8)  # test sources of the domains of the committed study
DESIGNS = [
    # runs, sources of each domain, seed, source, both
    (3, LAPTOP, 0.03, 0.1, 0.05),
    (3, LAPTOP, 0.05, 0.02, 0.02),
    (3, LAPTOP, 0.003, 0.1, 0.02),
    (5, LAPTOP, 0.03, 0.1, 0.1),
    (12, LAPTOP, 0.03, 0.1, 0.05),
    (3, (20,) * 5, 0.03, 0.1, 0.1),
    (12, (20,) * 5, 0.05, 0.0, 0.05),
    (5, (6, 6, 6), 0.05, 0.1, 0.05),
    (3, (126,), 0.03, 0.1, 0.05),
    (8, (12,), 0.02, 0.1, 0.05),
]


# Identities


def test_a_model_against_itself_differs_by_exactly_nothing():
    rng = np.random.default_rng(0)
    sums, tokens, domains = study(rng, 3, LAPTOP, 1, 0.1, 0.1, 0.1)
    for paired in (True, False):
        found = statistics.compare_sources(sums[0], sums[0], tokens, domains, paired)
        assert (found.difference, found.p_value) == (0.0, 1.0)
    found = statistics.compare_sources(sums[0], sums[0], tokens, domains)
    assert (found.low, found.high, found.standard_error) == (0.0, 0.0, 0.0)
    (claim,) = statistics.claims([found])
    assert (claim.verdict, claim.p_value) == ("no", 1.0), "that it gains the minimum is refuted"
    assert statistics.equivalences([found], 0.01)[0].verdict == "equivalent"


def test_the_difference_is_weighted_by_tokens_and_ignores_how_sources_are_cut_into_documents():
    a, b, tokens, sources = [30.0, 10.0, 8.0], [20.0, 12.0, 4.0], [10, 2, 4], ["x", "x", "y"]
    found = statistics.compare(a, b, tokens, sources)
    assert found.difference == pytest.approx(12 / 16, abs=1e-15)
    assert found == statistics.compare([40.0, 8.0], [32.0, 4.0], [12, 4], ["x", "y"])
    shuffled = statistics.compare([8.0, 10.0, 30.0], [4.0, 12.0, 20.0], [4, 2, 10], ["y", "x", "x"])
    assert shuffled.low == pytest.approx(found.low, rel=1e-12)


def test_sources_of_one_name_in_two_domains_are_two():
    rng = np.random.default_rng(1)
    a, names = rng.normal(size=8), np.tile(["1", "2", "3", "4"], 2)
    domains = np.repeat(["p", "q"], 4)
    found = statistics.compare(a, np.zeros(8), np.ones(8), names, domains)
    assert found == statistics.compare(a, np.zeros(8), np.ones(8), [f"{d}/{n}" for d, n in zip(domains, names, strict=True)], domains)


def test_the_standard_error_is_the_textbook_one_where_sources_are_equal():
    rng = np.random.default_rng(2)
    x, ones = rng.normal(size=30), np.ones(30)
    one = stats.ttest_1samp(x, 0)
    found = statistics.compare(7 * x, np.zeros(30), 7 * ones, np.arange(30))
    assert found.standard_error == pytest.approx(x.std(ddof=1) / np.sqrt(30), rel=1e-12)
    assert found.df == pytest.approx(29) and found.p_value == pytest.approx(one.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(one.confidence_interval()), rel=1e-9)
    domains = np.repeat([0, 1], [10, 20])
    stratified = sum(x[domains == d].var(ddof=1) * n for d, n in ((0, 10), (1, 20))) / 30**2
    found = statistics.compare(x, np.zeros(30), ones, np.arange(30), domains)
    assert found.standard_error**2 == pytest.approx(stratified, rel=1e-12)


def test_what_domains_differ_by_is_no_noise():
    rng = np.random.default_rng(3)
    domains = np.repeat([0, 1], 20)
    x = 5.0 * domains + rng.normal(0, 0.1, 40)
    within, across = (statistics.compare(x, 0 * x, 1 + 0 * x, np.arange(40), d).standard_error for d in (domains, None))
    assert within < 0.1 * across


def test_runs_alone_give_students_interval_and_unpaired_ones_welchs():
    rng = np.random.default_rng(4)
    a, b = rng.normal(3, 1, 5), rng.normal(2, 3, 4)
    spread = np.ones((1, 40))  # no source differs from another
    paired = statistics.compare(a[:4, None] * spread, b[:, None] * spread, np.ones(40), np.arange(40))
    assert paired.p_value == pytest.approx(stats.ttest_rel(a[:4], b).pvalue, rel=1e-6)
    apart = statistics.compare(a[:, None] * spread, b[:, None] * spread, np.ones(40), np.arange(40), paired=False)
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert (apart.p_value, apart.df) == (pytest.approx(welch.pvalue, rel=1e-6), pytest.approx(welch.df, rel=1e-6))


def test_many_comparisons_at_once_are_those_one_by_one():
    sums, tokens, domains = study(np.random.default_rng(5), 3, (4, 9), 6, 0.1, 0.1, 0.1)
    found = statistics.compare_sources(sums, 0 * sums, tokens, domains)
    for i, one in enumerate(sums):
        alone = statistics.compare_sources(one, 0 * one, tokens, domains)
        assert (found.difference[i], found.low[i], found.p_value[i]) == pytest.approx((alone.difference, alone.low, alone.p_value))


def test_permuting_the_seeds_of_a_paired_design_changes_the_interval():
    rng = np.random.default_rng(6)
    shared = rng.normal(0, 0.1, (5, 1))
    a, b = (np.ones(30) * (4 + shared + rng.normal(0, 0.01, (5, 1))) for _ in range(2))
    right, wrong, apart = (
        statistics.compare(a, other, np.ones(30), np.arange(30), paired=paired)
        for other, paired in ((b, True), (b[[1, 2, 3, 4, 0]], True), (b, False))
    )
    assert right.difference == pytest.approx(wrong.difference) == pytest.approx(apart.difference)
    assert 4 * right.standard_error < min(wrong.standard_error, apart.standard_error)


def test_one_run_speaks_of_itself_and_is_claimed_nothing():
    rng = np.random.default_rng(7)
    many = 100 * rng.normal(4.0, 0.02, (6, 40))
    found = statistics.compare(np.full(40, 390.0), many, np.full(40, 100.0), np.arange(40), paired=False)
    assert found.high < 0 and np.isnan(found.seed_standard_error)
    (claim,) = statistics.claims([found])
    assert claim.verdict == "undecided" and "one run" in claim.reason
    assert statistics.equivalences([found], 10.0)[0].verdict == "not shown"


# Domains with one source


def test_domains_with_one_source_are_put_together():
    assert variance.strata(np.array(["a", "a", "b", "b"])).tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    alone = variance.strata(np.array(["a", "a", "b", "c", "d", "d", "d"]))
    assert alone[2].tolist() == alone[3].tolist() and alone.sum(axis=0).tolist() == [2, 2, 3]
    joined = variance.strata(np.array(["a", "b", "b", "b", "c", "c"]))
    assert joined.sum(axis=0).tolist() == [3, 3] and joined[0].tolist() == joined[4].tolist(), "joins the smallest"
    assert variance.strata(np.array(["a", "b", "c"])).tolist() == [[1], [1], [1]]


def test_a_domain_with_one_source_makes_the_interval_wider_not_shorter():
    rng, sizes = np.random.default_rng(8), (1, 10, 10)
    sums, tokens, domains = study(rng, 1, sizes, 2000, source=0.1)
    assert rejected(statistics.compare_sources(sums, 0 * sums, tokens, domains)) <= 0.07


# Nulls and power


@pytest.mark.parametrize("design", DESIGNS)
def test_a_null_is_rejected_at_the_nominal_rate(design):
    runs, sizes, *spread = design
    found = []
    for seed in range(4):  # other source sizes each
        sums, tokens, domains = study(np.random.default_rng([10, seed]), runs, sizes, 1000, *spread)
        found.append(rejected(statistics.compare_sources(sums, 0 * sums, tokens, domains)))
    assert 0.03 <= np.mean(found) <= 0.07


@pytest.mark.parametrize("design", DESIGNS)
def test_an_effect_of_five_standard_errors_is_found(design):
    # Three runs by themselves have a t quantile of 4.3, and where they make most of the error five are not enough: see pooling.
    runs, sizes, seed, source, both = design
    rng = np.random.default_rng(11)
    null, tokens, domains = study(rng, runs, sizes, 2000, seed, source, both)
    error = (null.mean(axis=1).sum(axis=1) / tokens.sum()).std()
    found = statistics.compare_sources(null + 5 * error * tokens, 0 * null, tokens, domains)
    few = runs == 3 and seed > source / 5
    assert np.mean(found.p_value <= 0.05) >= (0.7 if few else 0.95)


@pytest.mark.parametrize(("runs_a", "runs_b", "ratio"), [(5, 5, 1), (5, 12, 1), (12, 5, 3), (4, 4, 4)])
def test_runs_that_are_not_paired_may_vary_unequally(runs_a, runs_b, ratio):
    rng, n = np.random.default_rng(12), 3000
    domains, tokens = np.repeat([0, 1], 15), np.round(np.exp(rng.uniform(5, 7, 30)))
    text = rng.normal(4, 0.3, 30)
    a, b = (
        tokens * (text + rng.normal(0, spread, (n, runs, 1)) + rng.normal(0, 0.03, (n, runs, 30)))
        for runs, spread in ((runs_a, 0.02 * ratio), (runs_b, 0.02))
    )
    assert 0.03 <= rejected(statistics.compare_sources(a, b, tokens, domains, paired=False)) <= 0.07


def test_tokens_or_documents_as_units_would_reject_a_true_null_most_of_the_time():
    rng = np.random.default_rng(13)
    x = rng.normal(0, 0.1, (500, 1, 20, 1)) + rng.normal(0, 0.3, (500, 1, 20, 100))
    by_token, by_source = x.reshape(500, 1, -1), x.sum(axis=3)
    found = [statistics.compare_sources(one, 0 * one, np.full(one.shape[-1], 1.0), np.zeros(one.shape[-1])) for one in (by_token, by_source)]
    assert rejected(found[0]) > 0.5 and 0.03 <= rejected(found[1]) <= 0.07


def test_intervals_cover_a_true_difference_as_often_as_they_say():
    sums, tokens, domains = study(np.random.default_rng(14), 5, LAPTOP, 3000, 0.03, 0.1, 0.05, effect=0.07)
    found = statistics.compare_sources(sums, 0 * sums, tokens, domains)
    assert 0.93 <= np.mean((found.low <= 0.07) & (found.high >= 0.07)) <= 0.97
    assert np.array_equal((found.low > 0) | (found.high < 0), found.p_value <= 0.05)


# Pooling over a study


def test_two_cells_pooled_are_a_paired_t_test_and_more_cells_an_analysis_of_variance():
    rng = np.random.default_rng(20)
    losses = rng.normal(size=(2, 6))
    assert 2 * variance.pool(losses).value == pytest.approx((losses[0] - losses[1]).var(ddof=1), rel=1e-12)
    losses = rng.normal(size=(5, 4)) + 10 * rng.normal(size=4)
    cells, seeds = (np.eye(n)[np.indices((5, 4))[axis].ravel()] for axis, n in ((0, 5), (1, 4)))
    _, residual, rank, _ = np.linalg.lstsq(np.hstack([cells, seeds]), losses.ravel())
    left = losses.ravel() - np.hstack([cells, seeds]) @ np.linalg.lstsq(np.hstack([cells, seeds]), losses.ravel())[0]
    found = variance.pool(losses)
    assert found.df == 20 - rank == 12 and found.value == pytest.approx((left**2).sum() / 12, rel=1e-9)


def test_pooling_gives_three_seeds_the_quantile_of_many():
    assert stats.t.ppf(0.975, variance.pool(np.random.default_rng(21).normal(size=(11, 3))).df) < 2.1
    assert stats.t.ppf(0.975, 2) > 4.3


def test_one_wild_cell_is_set_apart_and_leaves_the_others_as_they_were():
    rng, values = np.random.default_rng(22), []
    for _ in range(200):
        losses = rng.normal(0, 0.03, (11, 3))
        calm = variance.pool(losses[:10])
        losses[10] = rng.permutation([-1.0, 0.1, 0.9])
        found = variance.pool(losses)
        assert not found.kept[10]
        values.append(np.allclose([found.value, found.df], [calm.value, calm.df]))
    assert all(values)
    shares = [variance.pool(rng.normal(size=(11, 3))).kept.all() for _ in range(1000)]
    assert 0.92 <= np.mean(shares) <= 0.99, "set apart by chance in one study of twenty"


@pytest.mark.parametrize(("cells", "runs", "shared"), [(11, 3, 0.0), (11, 3, 0.05), (6, 5, 0.02), (22, 3, 0.0)])
def test_a_null_of_a_pooled_study_is_rejected_at_the_nominal_rate(cells, runs, shared):
    rng, found = np.random.default_rng(23), []
    domains, tokens = np.repeat([0, 1, 2], 8), np.round(np.exp(rng.uniform(5, 7, 24)))
    for _ in range(400):
        seeds = rng.normal(0, 0.03, (cells, runs, 1)) + rng.normal(0, shared, (1, runs, 1))
        sums = tokens * (seeds + rng.normal(0, 0.02, (cells, 1, 24)) + rng.normal(0, 0.02, (cells, runs, 24)))
        pooled = variance.pool(sums.sum(axis=2) / tokens.sum())
        for held in (True, False):
            others = [i for i in range(1, cells) if (pooled.kept[0] and pooled.kept[i]) == held]
            if others:
                reference = np.broadcast_to(sums[0], sums[others].shape)
                one = statistics.compare_sources(sums[others], reference, tokens, domains, pooled=pooled if held else None)
                found.extend(one.p_value <= 0.05)
    assert 0.03 <= np.mean(found) <= 0.07


def test_an_effect_of_five_standard_errors_is_found_in_a_pooled_study_of_three_seeds():
    rng, pooled_found, own_found = np.random.default_rng(24), [], []
    for _ in range(400):
        losses = rng.normal(0, 0.03, (11, 3))
        losses[1] += 5 * 0.03 * np.sqrt(2 / 3)
        sums = losses[:, :, None] * np.ones(20)
        for found, pooled in ((pooled_found, variance.pool(losses)), (own_found, None)):
            found.append(statistics.compare_sources(sums[1], sums[0], np.ones(20), np.zeros(20), pooled=pooled).p_value <= 0.05)
    assert np.mean(pooled_found) >= 0.95 > np.mean(own_found)


# Families, claims, equivalence


def test_holm_matches_the_example_by_hand():
    # Sorted: .005·4 = .02, .01·3 = .03, .03·2 = .06, .04·1 = .04 → raised to .06.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def comparison(difference, error, df=20, seeds=0.001):
    return statistics.Comparison(difference, error, df, seeds)


@pytest.mark.parametrize(
    ("difference", "error", "verdict", "reason"),
    [
        (-0.02, 0.005, "yes", ""),
        (-0.02, 0.015, "undecided", ""),  # the interval includes 0
        (-0.004, 0.001, "undecided", "less than 0.005"),  # real, and perhaps too small to matter
        (-0.002, 0.001, "no", ""),  # a gain of 0.005 is refuted
        (0.0, 0.001, "no", ""),
        (0.0, 0.02, "undecided", ""),  # not refuted: no failure to find is a "no"
        (0.02, 0.005, "no", ""),  # worse
    ],
)
def test_a_claim_needs_a_small_p_and_a_gain_that_matters_and_a_no_refutes_the_gain(difference, error, verdict, reason):
    (found,) = statistics.claims([comparison(difference, error)])
    assert (found.verdict, found.reason) == (verdict, reason)


def test_claims_of_a_family_are_adjusted_within_it():
    family = [comparison(-0.02, 0.008), *[comparison(0.0, 0.02)] * 9]
    alone, together = statistics.claims(family[:1])[0], statistics.claims(family)[0]
    assert alone.verdict == "yes" and together.verdict == "undecided"
    assert together.p_value == pytest.approx(10 * alone.p_value)


def test_b_beats_a_exactly_when_a_beats_b_the_other_way_round():
    for difference in (0.02, -0.02):
        one = comparison(difference, 0.005)
        assert {statistics.claims([x])[0].verdict for x in (one, one.reversed())} == {"yes", "no"}
        assert one.reversed().low == -one.high


def test_equivalence_has_its_size_at_the_margin_and_is_found_within_it():
    rng, margin, error, df = np.random.default_rng(30), 0.01, 0.003, 15

    def share(true, verdict):
        spread = error * np.sqrt(rng.chisquare(df, 1500) / df)
        pairs = zip(rng.normal(true, error, 1500), spread, strict=True)
        return np.mean([statistics.equivalences([comparison(d, e, df)], margin)[0].verdict == verdict for d, e in pairs])

    assert 0.03 <= share(margin, "equivalent") <= 0.065 and 0.03 <= share(-margin, "equivalent") <= 0.065
    assert share(margin, "different") <= 0.06
    assert share(0.0, "equivalent") >= 0.8 and share(5 * error + margin, "different") >= 0.95
    assert statistics.equivalences([comparison(0.0, 0.02)], margin)[0].verdict == "not shown", "no failure to find a difference"


def test_equivalence_is_the_ninety_percent_interval_within_the_margin():
    for difference, error in [(0.002, 0.004), (0.002, 0.005), (-0.006, 0.002), (-0.006, 0.003)]:
        low, high = difference + np.array([-1, 1]) * stats.t.ppf(0.95, 20) * error
        (found,) = statistics.equivalences([comparison(difference, error)], 0.01)
        assert (found.verdict == "equivalent") == (low > -0.01 and high < 0.01)


# Calibration error


def histogram(rng, n, twist=lambda p: p):
    """Tokens whose first choice is right as often as ``twist`` of its confidence says, in fifteen bins."""
    confidence = rng.beta(1.2, 2.5, n)
    bins, hits = np.minimum((confidence * 15).astype(int), 14), rng.random(n) < twist(confidence)
    return {name: np.bincount(bins, w, 15) for name, w in (("counts", None), ("confidence_sums", confidence), ("hits", hits))}


def plain(found):
    return np.abs(found["confidence_sums"] - found["hits"]).sum() / found["counts"].sum()


@pytest.mark.parametrize("n", [1000, 10_000])
def test_a_calibrated_model_shows_its_floor_and_nothing_beyond_it(n):
    rng = np.random.default_rng(40)
    found = [histogram(rng, n) for _ in range(1500 if n == 1000 else 500)]
    beyond, floor = np.array([calibration.debiased(one) for one in found]), np.mean([calibration.floor(one) for one in found])
    assert abs(beyond.mean()) <= 3 * beyond.std() / np.sqrt(len(found)) and abs(beyond.mean()) < 0.05 * floor
    assert np.mean([plain(one) for one in found]) == pytest.approx(floor, rel=0.02)


def test_a_calibrated_models_error_vanishes_as_tokens_grow():
    rng = np.random.default_rng(41)
    errors = [plain(histogram(rng, n)) for n in (1000, 100_000, 1_000_000)]
    assert errors[0] > 5 * errors[1] > 5 * errors[2] / 0.5 and errors[2] < 0.002


def test_an_error_far_above_chance_is_left_as_it_is():
    rng = np.random.default_rng(42)
    found = [histogram(rng, 20_000, lambda p: p**1.3) for _ in range(200)]
    true = plain(histogram(rng, 3_000_000, lambda p: p**1.3))
    assert np.mean([calibration.debiased(one) for one in found]) == pytest.approx(true, abs=0.001)
    assert np.mean([plain(one) for one in found]) == pytest.approx(true, abs=0.001)


def test_splitting_tokens_into_halves_is_what_the_closed_form_averages():
    rng = np.random.default_rng(43)
    bins = {"counts": [400.0], "confidence_sums": [120.0], "hits": [111.0]}
    noise = rng.normal(0, np.sqrt(400 * 0.3 * 0.7), 400_000)
    one, other = 9 + noise, 9 - noise
    assert calibration.debiased(bins) * 400 == pytest.approx((np.sign(one) * other).mean(), abs=0.05)


def test_empty_bins_and_certain_ones_are_no_trouble():
    sure = {"counts": [0.0, 10.0], "confidence_sums": [0.0, 10.0], "hits": [0.0, 8.0]}
    assert calibration.debiased(sure) == pytest.approx(0.2) and calibration.floor(sure) == 0
    assert calibration.debiased(sure | {"hits": [0.0, 10.0]}) == 0


# Tables


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
        (lambda: statistics.compare([1.0], [1.0, 2.0], [1, 1], ["a", "b"]), "same documents, got 1, 2, 2"),
        (lambda: statistics.compare([1.0, 2.0], [1.0, 2.0], [1, 1], ["a", "a"]), "two sources or more, got 1"),
        (lambda: statistics.compare([np.nan, 2.0], [1.0, 2.0], [1, 1], ["a", "b"]), "finite"),
        (lambda: statistics.compare([1.0, 2.0], [1.0, 2.0], [1, 0], ["a", "b"]), "needs tokens"),
        (lambda: statistics.compare(np.ones((3, 2)), np.ones((2, 2)), [1, 1], ["a", "b"]), "one to one, got 3 and 2"),
        (lambda: statistics.compare_sources([1.0, 2.0], [[1.0, 2.0]], [1, 1], [0, 0]), r"\[runs, sources\]"),
    ],
)
def test_data_that_cannot_be_compared_are_refused(call, message):
    with pytest.raises(KdlibError, match=message):
        call()


def test_statistics_need_no_torch():
    program = "import sys; from kdlib.analysis import calibration, statistics, variance; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("module", [statistics, variance, calibration])
def test_statistics_need_no_runs(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("kdlib")} <= {"kdlib.errors", "kdlib.analysis"}
