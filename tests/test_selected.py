"""Selection: which documents each mode takes, at equal tokens, whatever the order of the table."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_split, predicting

from kdlib.data import selected
from kdlib.errors import KdlibError


def table(scores, tokens=10, domains="d"):
    names = [f"d/{number:03}#00" for number in range(len(scores))]
    return pd.DataFrame({"document": names, "domain": domains, "tokens": tokens, "score": scores})


def large(seed=0, documents=200):
    rng = np.random.default_rng(seed)
    return table(rng.normal(size=documents), rng.integers(1, 60, documents))


def numbers(ids):
    return [int(name[2:5]) for name in ids]


def test_each_mode_takes_the_documents_its_name_says():
    scored = table([0.5, 3.0, 1.0, 2.0, 2.5])
    assert numbers(selected.choose(scored, 20, "highest")) == [1, 4]
    assert numbers(selected.choose(scored, 20, "lowest")) == [0, 2]
    assert numbers(selected.choose(scored, 10, "middle")) == [3]
    assert numbers(selected.choose(scored, 30, "middle")) == [2, 3, 4]
    assert numbers(selected.choose(scored.iloc[:4], 10, "middle")) == [2], "of two in the middle the lower"


@given(
    tokens=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    share=st.floats(0, 1),
    mode=st.sampled_from(selected.MODES),
)
def test_the_budget_is_missed_by_half_a_document_at_most(tokens, share, mode):
    budget = max(max(tokens), round(share * sum(tokens)))
    scored = table(np.sin(np.arange(len(tokens))), tokens)
    chosen = selected.choose(scored, budget, mode)
    assert abs(scored.tokens[scored.document.isin(chosen)].sum() - budget) <= max(tokens) / 2
    assert len(chosen) == len(set(chosen)) >= 1


@pytest.mark.parametrize("budget", [500, 1500, 4000])
def test_all_modes_take_the_same_tokens_to_within_a_document(budget):
    scored = large()
    chosen = {mode: scored[scored.document.isin(selected.choose(scored, budget, mode))] for mode in selected.MODES}
    totals = [int(taken.tokens.sum()) for taken in chosen.values()]
    assert max(totals) - min(totals) <= scored.tokens.max()
    means = {mode: taken.score.mean() for mode, taken in chosen.items()}
    assert means["lowest"] < min(means["random"], means["middle"])
    assert means["highest"] > max(means["random"], means["middle"])
    assert chosen["middle"].score.std() < chosen["random"].score.std()


@pytest.mark.parametrize("mode", selected.MODES)
def test_the_choice_is_in_the_tables_order_and_does_not_depend_on_it(mode):
    scored = large().assign(score=np.round(large().score))  # with many ties
    shuffled = scored.sample(frac=1, random_state=3)
    chosen, again = (selected.choose(one, 1500, mode, seed=4) for one in (scored, shuffled))
    assert chosen == [name for name in scored.document if name in set(chosen)]
    assert again == [name for name in shuffled.document if name in set(chosen)]


@pytest.mark.parametrize("mode, sign", [("highest", -1), ("lowest", 1)])
def test_ties_go_by_id(mode, sign):
    scored = table(np.round(np.random.default_rng(0).normal(size=300)))
    ranked = sorted(zip(sign * scored.score, scored.document, strict=True))
    for count in (10, 150, 290):
        chosen = selected.choose(scored.sample(frac=1, random_state=0), 10 * count, mode)
        assert sorted(chosen) == sorted(name for _, name in ranked[:count])


def test_a_larger_budget_adds_documents_and_takes_none_away():
    for mode in selected.MODES:
        smaller, larger = (set(selected.choose(large(), budget, mode, seed=1)) for budget in (900, 2400))
        assert smaller < larger


def test_random_choices_depend_on_the_seed_alone_and_reach_every_document_alike():
    scored = table(np.arange(20.0))
    draws = [selected.choose(scored, 50, "random", seed) for seed in range(400)]
    assert draws[7] == selected.choose(scored.assign(score=-scored.score), 50, "random", 7)
    counts = np.bincount(np.concatenate([numbers(draw) for draw in draws]), minlength=20)
    # 400 draws of 5 in 20: 100 each, hypergeometric, so the statistic has mean 19 * 15 / 20 * 20 / 19.
    statistic = ((counts - 100) ** 2 / (100 * 0.75)).sum() * 19 / 20
    assert statistic < 36.2, "the 99th percentile of chi-square with 19 degrees"


def test_a_random_choice_needs_no_score():
    scored = large()
    assert selected.choose(scored.drop(columns="score"), 900, "random", 3) == selected.choose(
        scored, 900, "random", 3
    )


def test_a_budget_for_each_domain_is_spent_on_its_own_documents():
    scored = table([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], domains=["a", "b", "c", "b", "a", "a"])
    assert numbers(selected.choose(scored, {"b": 10, "a": 20}, "highest")) == [0, 1, 4]
    assert numbers(selected.choose(scored, {"b": 10, "a": 20}, "lowest")) == [3, 4, 5]
    assert numbers(selected.choose(scored, {"c": 10}, "random")) == [2]


@pytest.mark.parametrize("mode", selected.MODES)
def test_every_domain_is_chosen_from_as_it_would_be_alone(mode):
    scored = large().assign(domain=np.random.default_rng(1).choice(["a", "b", "c"], 200))
    budget = selected.mix(scored, 2000, {"a": 1.0, "c": 3.0})
    assert budget == {"a": 500, "c": 1500}
    chosen = selected.choose(scored, budget, mode, seed=4)
    assert chosen == [name for name in scored.document if name in set(chosen)]
    for domain, tokens in budget.items():
        own = scored[scored.domain == domain]
        alone = selected.choose(own, tokens, mode, seed=4)
        assert [name for name in chosen if name in set(own.document)] == alone
        assert abs(own.tokens[own.document.isin(alone)].sum() - tokens) <= own.tokens.max() / 2
    assert not scored.domain[scored.document.isin(chosen)].eq("b").any()


def test_a_mix_is_in_proportion_to_its_shares():
    scored = table(np.zeros(40), 25, ["a", "b"] * 20)
    for shares in ({"a": 1, "b": 3}, {"a": 0.25, "b": 0.75}, {"b": 6.0, "a": 2.0}):
        assert selected.mix(scored, 600, shares) == {"a": 150, "b": 450}
    assert selected.mix(scored, 500, {"b": 0.1}) == {"b": 500}


@pytest.mark.parametrize(
    ("budget", "shares", "message"),
    [
        (600, {"a": 1, "e": 1}, r"1 to 0 tokens of the domain 'e', got 300 \(there are a 500, b 500\)"),
        (600, {"a": 5, "b": 1}, r"1 to 499 tokens of the domain 'a', got 500 \(there are a 499, b 501\)"),
        (600, {"a": 1, "b": 9999}, "1 to 500 tokens of the domain 'a', got 0"),
    ],
)
def test_a_mix_of_text_that_is_not_there_is_refused_with_what_there_is(budget, shares, message):
    scored = table(np.zeros(40), 25, ["a", "b"] * 20)
    if "499" in message:
        scored.loc[[0, 1], "tokens"] = [24, 26]
    with pytest.raises(KdlibError, match=message):
        selected.mix(scored, budget, shares)


def test_weights_have_mean_one_over_tokens_and_ratios_by_the_score():
    scored = large()
    found = selected.weights(scored, temperature=0.7)
    assert np.average(found, weights=scored.tokens) == pytest.approx(1, abs=1e-14)
    ratio = found.iloc[3] / found.iloc[8]
    assert ratio == pytest.approx(math.exp((scored.score[3] - scored.score[8]) / 0.7), rel=1e-12)
    assert found.index.tolist() == scored.document.tolist()


def test_weights_tend_to_one_and_to_the_highest_score_alone():
    scored = table([1.0, 2.0, 2.0], [10, 20, 10])
    np.testing.assert_allclose(selected.weights(scored, 1e9), 1, atol=1e-8)
    np.testing.assert_allclose(selected.weights(scored, 1e-3), [0, 4 / 3, 4 / 3], atol=1e-12)
    np.testing.assert_allclose(selected.weights(scored.assign(score=7e4), 1e-3), 1)


def test_weights_see_tokens_not_documents():
    whole = selected.weights(table([1.0, 2.0], [10, 30]), 1.0)
    cut = selected.weights(table([1.0, 2.0, 2.0], [10, 12, 18]), 1.0)
    np.testing.assert_allclose(cut, whole.iloc[[0, 1, 1]], rtol=1e-14)


def test_scores_are_means_over_the_predicting_positions_of_each_document():
    split = make_split()
    values = np.full(len(split.tokens), np.nan)
    values[predicting(split)] = np.random.default_rng(0).normal(size=len(predicting(split)))
    found = selected.scores(split, values)
    for number, row in enumerate(found.itertuples()):
        mine = values[split.offsets[number] : split.offsets[number + 1] - 1]
        assert row.score == pytest.approx(mine.mean(), abs=1e-15)
        assert (row.document, row.domain, row.tokens) == (split.documents.document[number], "talk", len(mine))
    assert np.isnan(values[split.offsets[1:] - 1]).all(), "the values given stay as they were"
    assert sum(split.windows(16, selected.choose(found, 60, "highest"))[:, 1]) == pytest.approx(60, abs=25)
    with pytest.raises(KdlibError, match="must have one number for each"):
        selected.scores(split, values[1:])


@pytest.mark.parametrize(
    "problem, changed",
    [
        ("got an empty table", lambda good: good.iloc[:0]),
        ("got no columns", lambda good: good.drop(columns="score")),
        ("more than once", lambda good: pd.concat([good, good])),
        ("is not finite", lambda good: good.assign(score=[1.0, math.inf])),
        ("no tokens for", lambda good: good.assign(tokens=[3, 0])),
    ],
)
def test_a_table_that_is_none_is_refused_everywhere(problem, changed):
    wrong = changed(table([1.0, 2.0]))
    for use in (
        lambda: selected.choose(wrong, 1, "highest"),
        lambda: selected.weights(wrong, 1.0),
    ):
        with pytest.raises(KdlibError, match=problem):
            use()


def test_what_cannot_be_chosen_is_refused():
    good = table([1.0, 2.0])
    with pytest.raises(KdlibError, match="must be one of .* got 'best'"):
        selected.choose(good, 10, "best")
    for budget in (0, 21):
        with pytest.raises(KdlibError, match="1 to 20 tokens"):
            selected.choose(good, budget, "highest")
    for temperature in (0, -1, math.inf, math.nan):
        with pytest.raises(KdlibError, match="temperature"):
            selected.weights(good, temperature)
