"""Clusters of documents by what they are about, all of one size: tf-idf, truncated SVD and balanced k-means.

As in c-BTM (Gururangan et al. 2023, arXiv 2303.14177, section 3.1), but on token ids instead of words: each token has a vector,
and a text's is the normalised sum of its tokens'. A model can so place a prefix by a running sum, without decoding it.
"""

import string
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from kdlib.data.corpus import Split
from kdlib.errors import KdlibError

SWEEPS, ITERATIONS = 20, 50


def token_classes(pieces: Sequence[str]) -> np.ndarray:
    """What each token counts as, int64 [V]: itself, the first number for every number, or -1 for nothing.

    Nothing is said by stop words, single letters, punctuation and space.

    Args:
        pieces: the text of each token, "" for a special one.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    words = [piece.lower().strip(string.punctuation + string.whitespace + "’“”–—…") for piece in pieces]
    found = np.arange(len(words))
    numbers = [place for place, word in enumerate(words) if word.isdigit()]
    found[numbers] = numbers[0] if numbers else -1
    empty = [not any(map(str.isalnum, word)) or word in ENGLISH_STOP_WORDS or (len(word) == 1 and word.isalpha()) for word in words]
    found[empty] = -1
    return found


def counts(split: Split, vocabulary: int) -> sparse.csr_array:
    """How often each document holds each token: float64 [documents, V]."""
    document = np.repeat(np.arange(len(split.documents)), np.diff(split.offsets))
    ones = np.ones(len(split.tokens))
    return sparse.coo_array((ones, (document, split.tokens)), (len(split.documents), vocabulary)).tocsr()


def token_vectors(found: sparse.csr_array, classes: np.ndarray, dimensions: int, seed: int) -> np.ndarray:
    """The vector of each token, float32 [V, D]: idf times its row of the right singular vectors of the tf-idf matrix.

    With f the documents that hold a token and n all, idf = ln((1 + n) / (1 + f)) + 1; rows of the matrix have length 1. D is
    ``dimensions``, or as many as documents and tokens allow.

    Args:
        found: :func:`counts`; classes: :func:`token_classes`, whose -1 get rows of zeros.

    Raises:
        KdlibError: no token that says anything.
    """
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd

    used = np.flatnonzero(classes >= 0)
    folded = sparse.coo_array((np.ones(len(used)), (used, classes[used])), (len(classes), len(classes)))
    tf = sparse.csr_array(found @ folded.tocsr())
    holding = np.bincount(tf.indices, minlength=len(classes))
    if not holding.any():
        raise KdlibError("Documents to cluster must have words, got stop words, single letters and punctuation alone.")
    idf = np.log((1 + tf.shape[0]) / (1 + holding)) + 1
    most = min(dimensions, tf.shape[0], np.count_nonzero(holding))
    _, _, components = randomized_svd(normalize(tf.multiply(idf).tocsr()), most, random_state=seed)
    of_classes = (components * idf).T
    return np.where(classes[:, None] >= 0, of_classes[classes], 0).astype(np.float32)


def document_vectors(found: sparse.csr_array, vectors: np.ndarray) -> np.ndarray:
    """The vector of each document, float64 [documents, D]: the sum of its tokens', of length 1; 0 where that sum is."""
    summed = found @ vectors.astype(np.float64)
    return summed / np.maximum(np.linalg.norm(summed, axis=1, keepdims=True), 1e-30)


def equal_sizes(points: int, clusters: int) -> np.ndarray:
    """Sizes of clusters that differ by at most one, int64 [K], the larger ones first.

    Raises:
        KdlibError: more clusters than points.
    """
    if not 1 <= clusters <= points:
        raise KdlibError(f"`clusters` must be 1 to {points}, the number of documents, got {clusters}.")
    return points // clusters + (np.arange(clusters) < points % clusters)


def balanced_kmeans(points: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """k-means whose clusters all have the same size, to within one point.

    Begins with k-means++ (Arthur & Vassilvitskii 2007). Then, in turn, points are assigned to centres at the least total squared
    distance that the sizes allow, and centres move to the means of their points, until nothing moves: neither can raise the total.

    Args:
        points: [n, D].

    Returns:
        Each point's cluster, int64 [n]; the centres [K, D]; and how often points were assigned.
    """
    from sklearn.cluster import kmeans_plusplus

    sizes = equal_sizes(len(points), clusters)
    centres, prices = kmeans_plusplus(points, clusters, random_state=seed)[0], np.zeros(clusters)
    labels, rounds = np.full(len(points), -1), 0
    for _ in range(ITERATIONS):
        rounds += 1
        before, (labels, prices) = labels, assign(squared_distances(points, centres), sizes, prices)
        if (labels == before).all():
            break
        centres = means(points, labels, clusters)
    return labels, centres, rounds


def squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[n, K], none negative."""
    square = (points**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * points @ centres.T
    return np.maximum(square, 0)


def means(points: np.ndarray, labels: np.ndarray, clusters: int) -> np.ndarray:
    """The mean of each cluster's points, [K, D]."""
    member = sparse.csr_array((np.ones(len(points)), (labels, np.arange(len(points)))), (clusters, len(points)))
    return member @ points / member.sum(1)[:, None]


def assign(costs: np.ndarray, sizes: np.ndarray, prices: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The assignment of points to clusters of given sizes at the least total cost: a transportation problem, solved exactly.

    Each cluster asks a price, and each point goes where cost and price are least, which is optimal for the sizes that result
    (linear programming duality; Bertsekas 1988, "The auction algorithm"). Prices are raised and lowered one at a time until the
    sizes are nearly right. What is still too many moves along cheapest chains of exchanges, which keep the assignment optimal
    (successive shortest paths).

    Args:
        costs: [n, K]; sizes: [K], which sum to n; prices: [K] to begin with, such as those of similar costs.

    Returns:
        Each point's cluster, int64 [n], and the prices.
    """
    costs = np.asarray(costs, dtype=np.float64)
    prices = np.zeros(len(sizes)) if prices is None else prices.copy()
    best, chosen = np.inf, prices
    for _ in range(SWEEPS):
        labels = (costs + prices).argmin(1)
        missed = np.abs(np.bincount(labels, minlength=len(sizes)) - sizes).sum()
        if missed < best:
            best, chosen = missed, prices.copy()
        if missed <= len(sizes) or len(sizes) == 1:
            break
        for cluster, size in enumerate(sizes):
            elsewhere = np.delete(costs + prices, cluster, axis=1).min(1)
            # The price at which just `size` points come.
            worth = -np.partition(costs[:, cluster] - elsewhere, (size - 1, size))[size - 1 : size + 1]
            prices[cluster] = worth.mean()
    labels = (costs + chosen).argmin(1)
    _exchange(costs, labels, sizes)
    return labels, chosen


def _exchange(costs: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> None:
    """Move points in place, one chain of moves from a cluster that has too many to one that has too few at a time."""
    clusters, smallest = np.arange(len(sizes)), 1e-12 * np.abs(costs).max()
    change, mover = np.full((len(sizes), len(sizes)), np.inf), np.zeros((len(sizes), len(sizes)), np.int64)

    def refresh(cluster: int) -> None:
        # The cheapest move from this cluster to each, and who makes it.
        change[cluster] = np.inf
        if len(own := np.flatnonzero(labels == cluster)):
            differences = costs[own] - costs[own, cluster][:, None]
            first = differences.argmin(0)
            change[cluster], mover[cluster] = differences[first, clusters], own[first]

    for cluster in clusters:
        refresh(cluster)
    while (excess := np.bincount(labels, minlength=len(sizes)) - sizes).any():
        # Bellman and Ford's shortest paths from any cluster with too many.
        distance, before = np.where(excess > 0, 0.0, np.inf), np.full(len(sizes), -1)
        for _ in clusters:
            through = distance[:, None] + change
            via = through.argmin(0)
            shorter = through[via, clusters] < distance - smallest
            distance[shorter], before[shorter] = through[via, clusters][shorter], via[shorter]
        path = [int(np.where(excess < 0, distance, np.inf).argmin())]
        while before[path[-1]] >= 0:
            path.append(int(before[path[-1]]))
        for end, start in zip(path, path[1:], strict=False):
            labels[mover[start, end]] = end
        for cluster in path:
            refresh(cluster)
