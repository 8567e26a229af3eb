"""How uncertain a difference of mean losses is: the part that runs add, the part that sources add, and both together.

Everything here takes further leading dimensions, for many comparisons at once.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import fdtri


class Variance(NamedTuple):
    """Estimated variances of a mean, and the degrees of freedom behind each."""

    value: np.ndarray
    df: np.ndarray


class Pooled(NamedTuple):
    """Variance of one run about its cell and its seed; ``kept`` says which cells it is of."""

    value: float
    df: int
    kept: np.ndarray


def strata(domains: np.ndarray) -> np.ndarray:
    """Which source belongs to which stratum, [sources, strata] of 0 and 1: the domains, and none with one source alone.

    One source does not show how those of its domain vary. Domains with one are put together; if there is only one such, it
    joins the smallest of the others. What the domains differ by then counts as noise, so that intervals are too wide
    rather than too short ("collapsed strata", Cochran, Sampling Techniques, 1977, section 5A.12).
    """
    _, codes, sizes = np.unique(domains, return_inverse=True, return_counts=True)
    alone = np.flatnonzero(sizes == 1)
    if len(alone) == 1 and len(sizes) > 1:
        others = np.flatnonzero(sizes > 1)
        alone = np.append(alone, others[sizes[others].argmin()])
    if len(alone):
        codes = np.where(np.isin(codes, alone), alone[0], codes)
    return (codes[:, None] == np.unique(codes)).astype(np.float64)


def of_sources(sums: np.ndarray, tokens: np.ndarray, members: np.ndarray) -> Variance:
    """Variance of Σ sums/Σ tokens when the sources of each stratum could have been others: values [..., strata].

    Each stratum's mean is a ratio of sums, so a source's residual is ``sums`` − tokens · that ratio. Its square is divided by
    1 − its share of the stratum's tokens: without bias if variance grows with tokens, and n/(n − 1) for sources of one size.
    The degrees of freedom come from the same model, and are n − 1 for sources of one size (Bell and McCaffrey, Survey
    Methodology 28(2), 2002).

    Args:
        sums: [..., sources] differences of summed losses.
        tokens: [sources].
        members: see :func:`strata`.
    """
    totals = tokens @ members
    share = tokens / (members @ totals)
    residual = sums - tokens * ((sums @ members / totals) @ members.T)
    value = (residual**2 / (1 - share)) @ members / tokens.sum() ** 2
    leverage = tokens * share / (1 - share)
    covariances = (leverage @ members) ** 2 - leverage**2 @ members
    return Variance(value, totals**2 / (tokens**2 @ members + covariances))


def interaction(sums: np.ndarray, tokens: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The part of the variance of a mean over runs that both runs and sources would count: [...] for [..., runs, sources]."""
    runs = sums.shape[-2]
    if runs == 1:
        return np.zeros(sums.shape[:-2])
    own = of_sources(sums - sums.mean(axis=-2, keepdims=True), tokens, members).value
    return own.sum(axis=(-1, -2)) / (runs * (runs - 1))


def of_runs(values: np.ndarray) -> Variance:
    """Variance of the mean over the last axis, one value an independent run; at least two of them."""
    runs = values.shape[-1]
    return Variance(values.var(axis=-1, ddof=1) / runs, np.full(values.shape[:-1], runs - 1.0))


def pool(losses: np.ndarray, level: float = 0.05) -> Pooled:
    """The variance of a run in a study whose cells share their seeds, from what is left of [cells, runs] mean losses.

    Cell means and seed means are taken off first, which is what pairing by seed does: seeds that share initialisation and
    data order go up and down together, and where they do not, only degrees of freedom are lost. A cell that varies far
    more than the rest is set apart, one after the other, for as long as Cochran's test of the largest of several
    variances rejects at ``level`` (Annals of Eugenics 11, 1941; ISO 5725-2 pools repeatability in this way).
    """
    kept = np.ones(len(losses), dtype=bool)
    while True:
        rows = losses[kept]
        residual = rows - rows.mean(axis=1, keepdims=True) - rows.mean(axis=0) + rows.mean()
        squares, (cells, runs) = (residual**2).sum(axis=1), rows.shape
        df = (cells - 1) * (runs - 1)
        if cells <= 2 or not df or squares.max() <= _largest_share(cells, runs - 1, level) * squares.sum():
            return Pooled(squares.sum() / df if df else np.nan, df, kept)
        kept[np.flatnonzero(kept)[squares.argmax()]] = False


@lru_cache
def _largest_share(cells: int, df: int, level: float) -> float:
    # Cochran's critical value, by its Bonferroni bound.
    quantile = fdtri(df, (cells - 1) * df, 1 - level / cells)
    return quantile / (quantile + cells - 1)


def total(runs: list[Variance], sources: Variance, both: np.ndarray) -> Variance:
    """Variance of a mean over runs and sources, and its degrees of freedom by Satterthwaite.

    Runs and sources are crossed. What they vary together (``both``) lies in either part and is taken off once (Cameron, Gelbach
    and Miller, J. Business & Economic Statistics 29(2), 2011), but no further than the larger of the two.
    """
    of_text, of_training = sources.value.sum(axis=-1), sum(one.value for one in runs) + 0.0 * both
    value = np.maximum(of_training + of_text - both, np.maximum(of_training, of_text))
    spread = (sources.value**2 / sources.df).sum(axis=-1) + sum(one.value**2 / one.df for one in runs)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Variance(value, np.where(spread > 0, value**2 / spread, np.inf))
