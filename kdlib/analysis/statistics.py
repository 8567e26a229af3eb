"""Intervals, tests and claims about differences of NLL, from per-document sums alone.

Documents of one source (a speech, a chat) resemble each other, and two models err on the same ones, so the unit of
every resample is the *source* and comparisons are paired. The bootstrap is studentised: each resample's difference is
divided by its own standard error, which keeps the error rate near its nominal value with a few dozen sources of
unequal size, where the plain percentile interval is too short (Hall, The Bootstrap and Edgeworth Expansion, 1992,
chapter 3; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 12).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from scipy.stats import t as student_t

from kdlib.errors import KdlibError

CHUNK = 2**21  # resampled values held at once: 16 MiB of float64


@dataclass(frozen=True)
class Comparison:
    """A difference A − B in nats per token: negative when A is better.

    ``low`` and ``high`` bound the interval at ``level`` and exclude 0 exactly when ``p_value`` ≤ 1 − ``level``. After
    ``holm_intervals``, ``p_value`` is the adjusted one and ``level`` is that of the adjusted interval. ``pivots``:
    the sorted |studentised differences| of the resamples.
    """

    difference: float
    low: float
    high: float
    p_value: float
    standard_error: float
    level: float
    n_units: int
    resamples: int
    pivots: np.ndarray = field(repr=False, compare=False)

    def at_level(self, level: float) -> "Comparison":
        """The same comparison with the interval of another confidence level (unbounded if it needs more resamples)."""
        rank = int(np.ceil(level * (self.resamples + 1) - 1e-9))
        quantile = self.pivots[rank - 1] if rank <= self.resamples else np.inf
        half = quantile * self.standard_error if self.standard_error > 0 else 0.0
        return replace(self, low=float(self.difference - half), high=float(self.difference + half), level=level)


def paired_bootstrap(
    nll_a: ArrayLike,
    nll_b: ArrayLike,
    tokens: ArrayLike,
    units: ArrayLike,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Difference of mean NLL of two models on the same documents, Σ(a − b)/Σ tokens, with sources resampled.

    ``nll_a``, ``nll_b``: summed NLL of each document, nats; ``tokens``: its predicted tokens; ``units``: its source,
    all of one length. The p-value is two-sided. A against itself gives exactly 0, the interval [0, 0] and p = 1.
    Raises KdlibError for arrays of unequal length, non-finite values or fewer than two sources.
    """
    nll_a, nll_b, tokens = (np.asarray(values, dtype=np.float64) for values in (nll_a, nll_b, tokens))
    codes, sources = pd.factorize(np.asarray(units))
    if not nll_a.shape == nll_b.shape == tokens.shape == codes.shape:
        raise KdlibError(
            "A paired comparison needs one value per document from both models, on the same documents in the same "
            f"order; found {nll_a.shape}, {nll_b.shape} NLLs, {tokens.shape} token counts and {codes.shape} "
            "sources. Join the two tables on 'document' first."
        )
    difference, tokens = (np.bincount(codes, values, minlength=len(sources)) for values in (nll_a - nll_b, tokens))
    return seed_bootstrap(difference[None], np.zeros_like(difference)[None], tokens, resamples, seed, level)


def seed_bootstrap(
    a: ArrayLike, b: ArrayLike, tokens: ArrayLike, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Comparison:
    """Difference of mean NLL of two methods, each averaged over its training seeds, with seeds × sources resampled.

    ``a``: [seeds of A, sources], ``b``: [seeds of B, sources] summed NLL, nats; ``tokens``: [sources]. The sources
    are drawn once per resample for both methods (paired), the seeds of A and of B independently (Owen, The pigeonhole
    bootstrap, 2007). A side with one seed contributes no seed variance: its interval speaks of that one model. Raises
    KdlibError as ``paired_bootstrap`` does.
    """
    a, b, tokens = (np.asarray(values, dtype=np.float64) for values in (a, b, tokens))
    if a.ndim != 2 or b.ndim != 2 or not a.shape[1:] == b.shape[1:] == tokens.shape or not len(a) or not len(b):
        raise KdlibError(
            "A comparison over seeds needs arrays [seeds, sources] of both methods over the same sources and "
            f"[sources] token counts; found {a.shape}, {b.shape} and {tokens.shape}. Build them with per_source, "
            "one row a seed."
        )
    if tokens.size < 2:
        raise KdlibError(
            f"A bootstrap over sources needs at least two of them to see how they vary; found {tokens.size}. "
            "Evaluate on a split with more sources."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (tokens > 0).all() and np.isfinite(tokens).all()):
        raise KdlibError(
            "A comparison needs finite NLL sums and a positive token count for every source; found NaN, infinity "
            "or a source without tokens. Evaluate the run again, or leave the empty documents out."
        )
    rng = np.random.default_rng(seed)
    once = [np.full((1, len(x)), 1 / len(x)) for x in (a, b)]
    (difference,), (standard_error,) = _estimate(a, b, tokens, np.ones((1, tokens.size)), *once)
    rows = max(1, CHUNK // tokens.size)
    pivots = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        draws = _counts(rng, size, tokens.size)
        shares = [_counts(rng, size, len(x)) / len(x) for x in (a, b)]
        drawn, error = _estimate(a, b, tokens, draws, *shares)
        pivots.append(_studentise(drawn - difference, error))
    pivots = np.sort(np.abs(np.concatenate(pivots)))
    reached = resamples - np.searchsorted(pivots, np.abs(_studentise(difference, standard_error)), side="left")
    return Comparison(
        difference=float(difference),
        low=np.nan,
        high=np.nan,
        p_value=float((reached + 1) / (resamples + 1)),
        standard_error=float(standard_error),
        level=level,
        n_units=tokens.size,
        resamples=resamples,
        pivots=pivots,
    ).at_level(level)


def _counts(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    """How often each of n units is drawn when n are drawn with replacement: [rows, n], each row multinomial."""
    drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _estimate(
    a: np.ndarray, b: np.ndarray, tokens: np.ndarray, draws: np.ndarray, share_a: np.ndarray, share_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Difference and standard error of each resample: source variance (linearised ratio) plus the seed variance of
    either side.

    ``draws``: [resamples, sources] counts; ``share_a``, ``share_b``: [resamples, seeds] weights that sum to 1.
    """
    total = draws @ tokens
    mean_a, mean_b = (np.einsum("rs,rs->r", share, draws @ x.T) / total for x, share in ((a, share_a), (b, share_b)))
    residual = share_a @ a - share_b @ b - (mean_a - mean_b)[:, None] * tokens
    n = tokens.size
    variance = n / (n - 1) * np.einsum("ru,ru,ru->r", draws, residual, residual) / total**2
    for x, share, mean in ((a, share_a, mean_a), (b, share_b, mean_b)):
        if len(x) > 1:
            deviation = draws @ x.T / total[:, None] - mean[:, None]
            variance += np.einsum("rs,rs,rs->r", share, deviation, deviation) / (len(x) - 1)
    return mean_a - mean_b, np.sqrt(variance)


def _studentise(difference: np.ndarray, standard_error: np.ndarray) -> np.ndarray:
    """difference/standard_error, with 0/0 = 0: a resample that equals the estimate is no evidence of spread."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / standard_error)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values: rejecting those ≤ α keeps the family-wise error ≤ α (Scand. J. Statist. 6, 1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def holm_intervals(comparisons: Sequence[Comparison], level: float = 0.95) -> list[Comparison]:
    """The comparisons of one family with Holm-adjusted p-values and the intervals that agree with them.

    Comparison i is shown at level 1 − α·p_i/p̃_i (p̃ adjusted, α = 1 − ``level``), so its interval excludes 0 exactly
    when Holm rejects. These are intervals for reading the family's decisions; joint coverage of all the true
    differences would need Bonferroni's.
    """
    p = np.array([comparison.p_value for comparison in comparisons])
    stepped = holm(p)
    # An adjusted value capped at 1 would loosen the level again; it is far from rejection either way.
    levels = 1 - (1 - level) * np.minimum(p / stepped, 1.0)
    return [
        replace(comparison.at_level(float(own)), p_value=float(adjusted))
        for comparison, own, adjusted in zip(comparisons, levels, stepped, strict=True)
    ]


@dataclass(frozen=True)
class Claim:
    """The verdict on "A has the lower NLL" (yes, no or undecided) and the sentence that justifies it."""

    verdict: str
    reason: str


def claim(comparison: Comparison, seed_standard_error: float, minimum: float = 0.005) -> Claim:
    """Whether A is better than B by an amount that matters; for the opposite claim compare B with A.

    yes: the (Holm-adjusted) interval lies below 0 and the gain −difference ≥ max(``minimum``, 2
    ``seed_standard_error``), nats per token.
    no: a gain of ``minimum`` is ruled out, both by the interval and by two seed standard errors.
    undecided: everything else, also an unknown (NaN) ``seed_standard_error``.
    """
    gain, spread = -comparison.difference, 2 * seed_standard_error
    interval = f"[{-comparison.high:.4f}, {-comparison.low:.4f}]"
    found = f"gain {gain:.4f} nats/token, interval {interval}, 2 seed standard errors {spread:.4f}"
    if not np.isfinite(spread):
        return Claim("undecided", f"{found}: one seed cannot show how seeds vary")
    threshold = max(minimum, spread)
    if comparison.high < 0 and gain >= threshold:
        return Claim("yes", f"{found}: excludes 0 and reaches {threshold:.4f}")
    if max(-comparison.low, gain + spread) < minimum:
        return Claim("no", f"{found}: rules out a gain of {minimum:.4f}")
    short = "includes 0" if comparison.high >= 0 else f"gain below {threshold:.4f}"
    return Claim("undecided", f"{found}: {short}")


@dataclass(frozen=True)
class Mean:
    """A mean over independent runs with its standard error and interval (NaN for a single run)."""

    mean: float
    standard_error: float
    low: float
    high: float
    n: int


def mean_interval(values: ArrayLike, level: float = 0.95) -> Mean:
    """Mean over seeds with Student's t interval, from one number a seed. Raises KdlibError if there is none."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise KdlibError(
            f"A mean over seeds needs a list of one number a seed; found shape {values.shape}. Check that the runs "
            "exist."
        )
    mean, n = float(values.mean()), values.size
    if n == 1:
        return Mean(mean, np.nan, np.nan, np.nan, n)
    error = float(values.std(ddof=1) / np.sqrt(n))
    half = float(student_t.ppf((1 + level) / 2, n - 1)) * error
    return Mean(mean, error, mean - half, mean + half, n)


def per_source(documents: pd.DataFrame, split: str) -> pd.DataFrame:
    """Sums of nll, tokens, bytes and correct for every source of one split of a run's documents table, by source."""
    rows = documents[documents["split"] == split]
    if rows.empty:
        raise KdlibError(
            f"The documents table has no split {split!r}; it holds {sorted(documents['split'].unique())}. Ask for "
            "one of those, or evaluate the run on this split."
        )
    return rows.groupby("source", sort=True).agg(
        domain=("domain", "first"),
        nll=("nll", "sum"),
        tokens=("tokens", "sum"),
        bytes=("bytes", "sum"),
        correct=("correct", "sum"),
    )


def pool_target_logprobs(member_logprobs: ArrayLike) -> np.ndarray:
    """Log-probability of each observed token under the probability pool, from its members' alone: [K, n] → [n],
    float64.

    The NLL of any subset of members follows from their stored arrays, without a model. (A logit pool's does not: its
    normaliser needs whole distributions.)
    """
    logprobs = np.asarray(member_logprobs, dtype=np.float64)
    return logsumexp(logprobs, axis=0) - np.log(len(logprobs))
