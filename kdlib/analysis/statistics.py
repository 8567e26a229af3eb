"""Differences of mean loss between models: intervals, tests, claims and equivalence, from sums per document alone.

Documents of one source (a speech, a chat) resemble each other, so the source is the unit; the mix of domains is fixed by
design, so sources vary within their domain and never across; and two models err on the same text, so comparisons are
paired. Runs of one method differ in their seeds. :mod:`kdlib.analysis.variance` says what each of these adds; a t quantile
with Satterthwaite's degrees of freedom makes the interval. Nothing is resampled: three runs are too few for a bootstrap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import logsumexp, stdtr, stdtrit

from kdlib.analysis import variance
from kdlib.errors import KdlibError

LEVEL = 0.95  # of every interval that is shown
ALPHA = 0.05  # of every decision, for all comparisons of a family together
MINIMUM = 0.005  # nats per token that a claim needs
SUMS = ("nll", "tokens", "bytes", "correct")  # of a documents table


@dataclass(frozen=True)
class Comparison:
    """A difference A − B of two means, with what is known of its error.

    ``seed_standard_error`` is the part that comes from runs, NaN where a side has only one: the interval then speaks of that
    one model. The interval at ``LEVEL`` excludes 0 exactly when ``p_value`` ≤ 1 − ``LEVEL``. Fields are numbers, or arrays
    where :func:`compare_sources` was given many comparisons at once.
    """

    difference: float
    standard_error: float
    df: float
    seed_standard_error: float

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.difference - self._half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.difference + self._half

    @property
    def p_value(self) -> float:
        """Two-sided p-value of a true difference of 0; 1 for a model against itself."""
        return 2 * stdtr(self.df, -np.abs(self._t(0.0)))

    def p_below(self, bound: float) -> float:
        """One-sided p-value against a true difference of ``bound`` or more: small if it is shown to be below."""
        return stdtr(self.df, self._t(bound))

    def p_above(self, bound: float) -> float:
        """One-sided p-value against a true difference of ``bound`` or less: small if it is shown to be above."""
        return stdtr(self.df, -self._t(bound))

    def reversed(self) -> "Comparison":
        """B − A."""
        return replace(self, difference=-self.difference)

    @property
    def _half(self) -> float:
        return stdtrit(self.df, (1 + LEVEL) / 2) * self.standard_error

    def _t(self, bound: float) -> float:
        # 0/0 = 0: a difference that is exactly the bound, and never varied, is no evidence either way.
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.difference == bound, 0.0, (self.difference - bound) / self.standard_error)[()]


def compare(
    nll_a: ArrayLike,
    nll_b: ArrayLike,
    tokens: ArrayLike,
    sources: ArrayLike,
    domains: ArrayLike | None = None,
    paired: bool = True,
) -> Comparison:
    """Mean NLL of A minus that of B on the same documents, Σ(a − b)/Σ tokens, in nats per token.

    Args:
        nll_a: summed NLL of each document in nats, [documents] of one model or [runs, documents] of several.
        nll_b: the same of B.
        tokens: predicted tokens of each document, [documents].
        sources: what each document was taken from, [documents] names; those of one source resemble each other.
        domains: the domain of each, [documents] names; all one if left out.
        paired: run i of A and run i of B belong together (the same seed, an ensemble and its member). Otherwise the runs of
            either side vary by themselves.

    Raises:
        KdlibError: lengths disagree, values are not finite, fewer than two sources, or paired runs that do not match.
    """
    a, b = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (nll_a, nll_b))
    tokens, sources = np.asarray(tokens, dtype=np.float64), np.asarray(sources)
    domains = np.zeros(len(sources)) if domains is None else np.asarray(domains)
    if not a.shape[1:] == b.shape[1:] == tokens.shape == sources.shape == domains.shape:
        raise KdlibError(
            f"`nll_a`, `nll_b`, `tokens`, `sources` and `domains` must tell of the same documents, got {a.shape[1]}, {b.shape[1]}, "
            f"{tokens.size}, {sources.size} and {domains.size}. Join the tables first."
        )
    units = pd.MultiIndex.from_arrays([domains, sources])
    codes, names = units.factorize(sort=True)
    a, b, (tokens,) = (
        np.stack([np.bincount(codes, row, minlength=len(names)) for row in rows]) for rows in (a, b, tokens[None])
    )
    return compare_sources(a, b, tokens, names.get_level_values(0), paired)


def compare_sources(
    a: ArrayLike,
    b: ArrayLike,
    tokens: ArrayLike,
    domains: ArrayLike,
    paired: bool = True,
    pooled: variance.Pooled | None = None,
) -> Comparison:
    """:func:`compare` for sums by source: ``a``, ``b`` [..., runs, sources], ``tokens`` and ``domains`` [sources].

    Leading dimensions are separate comparisons. ``pooled`` is the variance of a run that the study of paired runs shares
    (:func:`kdlib.analysis.variance.pool`); without it the runs of this comparison speak for themselves.
    """
    a, b, tokens = (np.asarray(values, dtype=np.float64) for values in (a, b, tokens))
    _refuse_unusable(a, b, tokens, paired)
    sides = [a - b] if paired else [a, -b]
    return estimate([(side.sum(axis=-1) / tokens.sum(), side) for side in sides], tokens, np.asarray(domains), pooled)


def estimate(
    sides: Sequence[tuple[np.ndarray, np.ndarray]],
    tokens: np.ndarray,
    domains: np.ndarray,
    pooled: variance.Pooled | None = None,
) -> Comparison:
    """The sum of means over independent ``sides``, each (values [..., runs], sums [..., runs, sources]).

    Runs vary as the values do, and sources as the sums: those of the values themselves, or of what stands in for them.
    """
    members = variance.strata(domains)
    several = [(values, sums) for values, sums in sides if values.shape[-1] > 1]
    runs = [variance.of_runs(values) for values, _ in several]
    if pooled is not None and runs:
        runs = [variance.Variance(np.float64(2 * pooled.value / sides[0][0].shape[-1]), np.float64(pooled.df))]
    both = sum((variance.interaction(sums, tokens, members) for _, sums in several), np.float64(0))
    text = variance.of_sources(sum(sums.mean(axis=-2) for _, sums in sides), tokens, members)
    found = variance.total(runs, text, both)
    of_runs = np.sqrt(sum(one.value for one in runs)) if len(several) == len(sides) else np.nan
    difference = sum(values.mean(axis=-1) for values, _ in sides)
    return Comparison(difference[()], np.sqrt(found.value)[()], found.df[()], of_runs)


def _refuse_unusable(a: np.ndarray, b: np.ndarray, tokens: np.ndarray, paired: bool) -> None:
    if min(a.ndim, b.ndim) < 2 or not a.shape[-1:] == b.shape[-1:] == tokens.shape or not a.size or not b.size:
        raise KdlibError(f"Sums must be [runs, sources] and tokens [sources], got {a.shape}, {b.shape} and {tokens.shape}.")
    if paired and a.shape[-2] != b.shape[-2]:
        raise KdlibError(f"Paired runs must match one to one, got {a.shape[-2]} and {b.shape[-2]}. Compare them with paired=False.")
    if tokens.size < 2:
        raise KdlibError(f"A comparison needs two sources or more, got {tokens.size}. Evaluate on a split with more of them.")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(tokens).all() and (tokens > 0).all()):
        raise KdlibError("Losses must be finite and every source needs tokens. Evaluate again, or leave empty documents out.")


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values: rejecting those ≤ α keeps the family-wise error ≤ α (Scand. J. Statist. 6, 1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


@dataclass(frozen=True)
class Claim:
    """The verdict on "A has the lower loss" (yes, no or undecided), with the Holm-adjusted p-values behind it.

    ``p_value``: of no difference. ``p_no_gain``: of a gain of the minimum or more. ``reason``: why nothing is claimed, if not for p.
    """

    verdict: str
    p_value: float
    p_no_gain: float
    reason: str = ""


def claims(family: Sequence[Comparison], minimum: float = MINIMUM) -> list[Claim]:
    """Whether A is better than B by an amount that matters, for the comparisons of one family (Holm).

    yes: no difference is refuted, and the gain −difference is ``minimum`` or more.
    no: a gain of ``minimum`` is refuted by a one-sided test of non-superiority, or B is better in the sense of "yes".
    undecided: everything else, also where a side has one run.
    """
    adjusted = holm([one.p_value for one in family])
    refuted = holm([one.p_above(-minimum) for one in family])
    return [_claim(*found, minimum) for found in zip(family, adjusted, refuted, strict=True)]


def _claim(one: Comparison, p: float, p_no_gain: float, minimum: float) -> Claim:
    found, size = (float(p), float(p_no_gain)), abs(one.difference)
    if not np.isfinite(one.seed_standard_error):
        return Claim("undecided", *found, "one run cannot show how runs vary")
    if p <= ALPHA and size >= minimum:
        return Claim("yes" if one.difference < 0 else "no", *found)
    if p_no_gain <= ALPHA:
        return Claim("no", *found)
    return Claim("undecided", *found, "" if p > ALPHA else f"less than {minimum:g}")


@dataclass(frozen=True)
class Equivalence:
    """The verdict on "within the margin": equivalent, different or not shown, with Holm-adjusted p-values.

    ``p_value``: of a difference beyond the margin. ``p_different``: of one within it.
    """

    verdict: str
    p_value: float
    p_different: float


def equivalences(family: Sequence[Comparison], margin: float) -> list[Equivalence]:
    """Whether the true difference lies within ±``margin``, for the comparisons of one family (Holm).

    equivalent: two one-sided tests refute both that it is ``margin`` or more and that it is −``margin`` or less
    (Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15, 1987); the larger of their p-values counts.
    different: it is shown to lie beyond the margin, by the smaller of the two opposite tests, doubled for having a choice.
    not shown: neither, also where a side has one run.
    """
    within = holm([max(one.p_below(margin), one.p_above(-margin)) for one in family])
    beyond = holm([min(1.0, 2 * min(one.p_above(margin), one.p_below(-margin))) for one in family])
    found = []
    for one, p, p_different in zip(family, within, beyond, strict=True):
        verdict = "equivalent" if p <= ALPHA else "different" if p_different <= ALPHA else "not shown"
        known = np.isfinite(one.seed_standard_error)
        found.append(Equivalence(verdict if known else "not shown", float(p), float(p_different)))
    return found


def per_source(documents: pd.DataFrame, split: str) -> pd.DataFrame:
    """Sums of nll, tokens, bytes and correct for every source of one split of a run's documents table, by source."""
    rows = documents[documents["split"] == split]
    if rows.empty:
        raise KdlibError(
            f"The documents table has no split {split!r}; it holds {sorted(documents['split'].unique())}. Ask for "
            "one of those, or evaluate the run on this split."
        )
    sources = rows.groupby("source", sort=True)
    return sources[["domain"]].first().join(sources[list(SUMS)].sum())


def pool_target_logprobs(member_logprobs: ArrayLike) -> np.ndarray:
    """Log-probability of each observed token under the probability pool, from its members' alone: [K, n] → [n],
    float64.

    The NLL of any subset of members follows from their stored arrays, without a model. (A logit pool's does not: its
    normaliser needs whole distributions.)
    """
    logprobs = np.asarray(member_logprobs, dtype=np.float64)
    return logsumexp(logprobs, axis=0) - np.log(len(logprobs))
