"""Clusters of one size: assignments as cheap as can be, planted topics found again, texts placed by a running sum."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer

from kdlib.data import clustering
from kdlib.data.corpus import Split
from kdlib.errors import KdlibError

TOPICS, WORDS = 3, 20
# A separator, a stop word, words of each topic, and two numbers.
PIECES = ["", " the", *(f" {topic}word{number}" for topic in "abc" for number in range(WORDS)), " 12", "7"]


def split_of(streams):
    """A train split of documents of these tokens."""
    names = [f"d/{number:03}#00" for number in range(len(streams))]
    offsets = np.cumsum([0, *map(len, streams)]).astype(np.int64)
    table = pd.DataFrame({"document": names, "source": names, "domain": "d", "bytes": 4, "tokens": np.diff(offsets) - 1})
    return Split("train", table, np.concatenate(streams).astype(np.int32), offsets, 0)


def topical(documents=60, seed=0):
    """Documents of one topic each, with stop words between, and the topics."""
    rng = np.random.default_rng(seed)
    topics = rng.permutation(np.arange(documents) % TOPICS)
    streams = []
    for topic in topics:
        said = np.where(rng.random(40) < 0.5, 1, 2 + topic * WORDS + rng.integers(WORDS, size=40))
        streams.append(np.r_[0, said, 0])
    return split_of(streams), topics


def vectors(split, dimensions=5, seed=0):
    found = clustering.counts(split, len(PIECES))
    return found, clustering.token_vectors(found, clustering.token_classes(PIECES), dimensions, seed)


def total(costs, labels):
    return costs[np.arange(len(labels)), labels].sum()


# Assignment


@settings(deadline=None, max_examples=150)
@given(points=st.integers(1, 40), clusters=st.integers(1, 6), ties=st.booleans(), seed=st.integers(0, 10**6))
def test_an_assignment_costs_what_that_of_scipy_does_with_the_sizes_asked_for(points, clusters, ties, seed):
    rng, clusters = np.random.default_rng(seed), min(points, clusters)
    costs = rng.integers(0, 4, (points, clusters)).astype(float) if ties else rng.normal(size=(points, clusters))
    sizes = rng.permutation(clustering.equal_sizes(points, clusters))
    labels, _ = clustering.assign(costs, sizes, prices=rng.normal(size=clusters))
    assert np.array_equal(np.bincount(labels, minlength=clusters), sizes)
    seats = np.repeat(costs, sizes, axis=1)
    assert total(costs, labels) == pytest.approx(seats[linear_sum_assignment(seats)].sum(), abs=1e-9)


def test_chains_of_exchanges_alone_find_it_too(monkeypatch):
    monkeypatch.setattr(clustering, "SWEEPS", 1)  # prices stay as they begin
    costs = np.random.default_rng(3).random((60, 5)) ** 3
    costs[:, 0] -= 1  # everybody's first choice
    sizes = clustering.equal_sizes(60, 5)
    labels, _ = clustering.assign(costs, sizes)
    seats = np.repeat(costs, sizes, axis=1)
    assert total(costs, labels) == pytest.approx(seats[linear_sum_assignment(seats)].sum(), abs=1e-9)


@given(points=st.integers(1, 200), clusters=st.integers(1, 30))
def test_sizes_differ_by_one_at_most(points, clusters):
    if clusters > points:
        with pytest.raises(KdlibError, match=f"`clusters` must be 1 to {points}, the number of documents, got {clusters}"):
            clustering.equal_sizes(points, clusters)
    else:
        sizes = clustering.equal_sizes(points, clusters)
        assert sizes.sum() == points and np.ptp(sizes) <= 1 and len(sizes) == clusters


# k-means


def test_planted_groups_of_one_size_are_found_and_ones_of_two_sizes_are_balanced():
    rng = np.random.default_rng(1)
    centres = np.eye(4) * 10
    planted = np.repeat(np.arange(4), 25)
    points = centres[planted] + rng.normal(size=(100, 4))
    labels, found, _ = clustering.balanced_kmeans(points, 4, seed=0)
    assert len({(a, b) for a, b in zip(planted, labels, strict=True)}) == 4, "one cluster a group"
    np.testing.assert_allclose(found, clustering.means(points, labels, 4))
    uneven = centres[np.repeat([0, 1], [90, 13])] + rng.normal(size=(103, 4))
    labels, _, _ = clustering.balanced_kmeans(uneven, 2, seed=0)
    assert sorted(np.bincount(labels)) == [51, 52]


def test_no_exchange_of_two_points_would_lower_the_total_and_the_seed_decides():
    points = np.random.default_rng(2).normal(size=(80, 3))
    labels, centres, _ = clustering.balanced_kmeans(points, 5, seed=4)
    costs = clustering.squared_distances(points, centres)
    np.testing.assert_allclose(costs, ((points[:, None] - centres) ** 2).sum(-1), atol=1e-12)
    own = costs[np.arange(80), labels]
    swapped = costs[:, labels] + costs[:, labels].T  # i in the cluster of j and j in that of i
    assert (swapped - (own[:, None] + own)).min() > -1e-9
    again, _, _ = clustering.balanced_kmeans(points, 5, seed=4)
    assert np.array_equal(labels, again)


# Vectors


def test_what_says_nothing_counts_as_nothing_and_numbers_as_one():
    pieces = ["", " The", "x", ".", "\n\n", " people", "people", " 1912", "7", "’s", " 3rd", "�"]
    assert clustering.token_classes(pieces).tolist() == [-1, -1, -1, -1, -1, 5, 6, 7, 7, -1, 10, -1]
    assert clustering.token_classes(["a", "!"]).tolist() == [-1, -1]


def test_token_vectors_are_idf_times_the_components_of_scikit_learn():
    split, _ = topical()
    found, table = vectors(split, dimensions=TOPICS)
    dense = found.toarray()
    dense[:, 0] = dense[:, 1] = 0
    dense[:, -2:] = np.c_[dense[:, -2:].sum(1), np.zeros(len(dense))]
    tfidf = TfidfTransformer()
    svd = TruncatedSVD(TOPICS, algorithm="arpack", random_state=0).fit(tfidf.fit_transform(dense))
    expected = svd.components_.T * tfidf.idf_[:, None]
    expected[[0, 1]], expected[-1] = 0, expected[-2]
    # The sign of a component is arbitrary; distances do not see it.
    np.testing.assert_allclose(table @ table.T, expected @ expected.T, atol=2e-3)
    assert table.dtype == np.float32 and table.shape == (len(PIECES), TOPICS)
    assert not table[[0, 1]].any() and np.array_equal(table[-1], table[-2])


def test_a_document_lies_where_the_running_sum_of_its_tokens_does():
    split, _ = topical()
    found, table = vectors(split)
    points = clustering.document_vectors(found, table)
    for number in (0, 7):
        tokens = split.tokens[split.offsets[number] : split.offsets[number + 1]]
        running = table[tokens].astype(np.float64).cumsum(0)[-1]
        np.testing.assert_allclose(points[number], running / np.linalg.norm(running), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)


def test_planted_topics_are_found_again_through_stop_words():
    split, topics = topical(documents=90)
    found, table = vectors(split)
    labels, _, _ = clustering.balanced_kmeans(clustering.document_vectors(found, table), TOPICS, seed=1)
    assert len(set(zip(topics.tolist(), labels.tolist(), strict=True))) == TOPICS


def test_dimensions_are_as_many_as_the_text_allows_and_text_without_words_is_refused():
    split, _ = topical(documents=6)
    assert vectors(split, dimensions=100)[1].shape == (len(PIECES), 6)
    with pytest.raises(KdlibError, match="Documents to cluster must have words"):
        vectors(split_of([np.r_[0, 1, 1, 0]] * 3))
    empty = clustering.document_vectors(clustering.counts(split_of([np.r_[0, 1, 0]]), len(PIECES)), np.zeros((len(PIECES), 3)))
    assert np.array_equal(empty, np.zeros((1, 3)))
