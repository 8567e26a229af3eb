"""Bootstrap samples of documents: with replacement, uniform, as many tokens as asked for, the mix of domains kept."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tiny import BLOCK, make_split

from kdlib.data import text
from kdlib.data.bagged import draw
from kdlib.data.corpus import Split, pack, rows


def split_of(sizes, domains="a"):
    """A train split of documents of these numbers of tokens."""
    names = [f"d/{number:03}#00" for number in range(len(sizes))]
    table = pd.DataFrame({"document": names, "source": names, "domain": domains, "bytes": 4, "tokens": sizes})
    offsets = np.cumsum([0, *(size + 1 for size in sizes)]).astype(np.int64)
    return Split("train", table, np.zeros(offsets[-1], np.int32), offsets, 0)


def sizes_of(split, drawn):
    return split.documents.set_index("document").tokens[drawn]


def given_split(split, seed=3):
    return text.Given(split, tokenizer=None, block_length=BLOCK, seed=seed)


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 10**6),
)
def test_the_share_is_missed_by_half_a_document_at_most_or_by_the_only_one(sizes, share, seed):
    split = split_of(sizes)
    taken, wanted = sizes_of(split, draw(split, share, seed)), share * sum(sizes)
    assert len(taken) >= 1
    assert abs(taken.sum() - wanted) <= max(sizes) / 2 + 1e-9 or len(taken) == 1


def test_the_mean_share_over_seeds_is_the_share_asked_for():
    rng = np.random.default_rng(0)
    split = split_of(rng.integers(1, 60, 100))
    total = split.documents.tokens.sum()
    for share in (0.3, 0.7, 1.0):
        found = [sizes_of(split, draw(split, share, seed)).sum() / total for seed in range(100)]
        # Each misses by half of the longest document, 1%, at most.
        assert np.mean(found) == pytest.approx(share, abs=3e-3) and np.ptp(found) > 0


def test_the_mix_of_domains_is_kept():
    rng = np.random.default_rng(1)
    domains = rng.choice(["a", "b", "c"], 300, p=[0.6, 0.3, 0.1])
    split = split_of(rng.integers(1, 60, 300) * np.where(domains == "c", 3, 1), domains)
    table = split.documents.set_index("document")
    held = table.groupby("domain").tokens.sum()
    for seed in range(10):
        taken = table.loc[draw(split, 0.5, seed)].groupby("domain").tokens
        longest = table.groupby("domain").tokens.max()
        assert ((taken.sum() - 0.5 * held).abs() <= longest / 2 + 1e-9).all()


def test_documents_are_drawn_uniformly_and_with_replacement():
    documents, seeds = 40, 400
    split = split_of([10] * documents)
    draws = [draw(split, 1.0, seed) for seed in range(seeds)]
    assert {len(one) for one in draws} == {documents}
    counts = Counter(name for one in draws for name in one)
    assert stats.chisquare([counts[name] for name in split.documents.document]).pvalue > 0.01
    # A document is missed by all of n draws with probability (1 - 1/n)^n, close to 1/e.
    distinct = np.array([len(set(one)) / documents for one in draws])
    expected = 1 - (1 - 1 / documents) ** documents
    assert distinct.mean() == pytest.approx(expected, abs=4 * distinct.std() / seeds**0.5)
    pairs = np.array([[one.count(split.documents.document[place]) for place in (0, 1)] for one in draws])
    # How often one document is drawn is binomial: its variance is n (1/n) (1 - 1/n).
    assert pairs.var() == pytest.approx(1 - 1 / documents, rel=0.25)


def test_the_seed_decides_and_the_global_random_state_does_not():
    split = make_split(documents=60)
    np.random.seed(1)
    first, before = draw(split, 0.7, 5), np.random.get_state()[1]
    np.random.seed(2)
    assert draw(split, 0.7, 5) == first
    np.random.seed(1)
    assert (np.random.get_state()[1] == before).all()
    assert len({tuple(draw(split, 0.7, seed)) for seed in range(20)}) == 20


def test_the_setting_draws_with_its_own_seed_or_the_students():
    split = make_split(documents=60)
    own, students = (text.way({"bagged": {"share": 0.7, **seed}}).take(given_split(split)) for seed in ({"seed": 8}, {}))
    assert own.documents == draw(split, 0.7, 8) and students.documents == draw(split, 0.7, 3)
    for found in (own, students):
        assert found.split is split and found.weights is None


def test_a_document_drawn_twice_is_read_twice():
    split = make_split(documents=12)
    found = text.way({"bagged": {"share": 1.0}}).take(given_split(split))
    times = Counter(found.documents)
    assert max(times.values()) > 1
    windows = found.windows(BLOCK)
    read = np.bincount(
        np.concatenate([np.arange(start, start + length) for start, length in windows]), minlength=len(split.tokens)
    )
    for number, name in enumerate(split.documents.document):
        begin, end = split.offsets[number], split.offsets[number + 1] - 1
        assert (read[begin:end] == times[name]).all() and read[end] == 0
    labels = rows(split, pack(windows, BLOCK))["labels"]
    assert (labels >= 0).sum() == sizes_of(split, found.documents).sum()
