"""Weights of a probability pool, learned from the members' log-probabilities of the tokens of a calibration split.

What is minimised is the NLL of the pool, −mean_t log Σ_k w_k p_k(t), over the simplex. It is convex in w, so that its optimum is
known by the conditions of Karush, Kuhn and Tucker: mean_t p_k/p̄ is 1 for every member that is used and at most 1 for the others.
Only the probabilities of observed tokens are needed, no logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from kdlib.errors import KdlibError

CHUNK = 512  # tokens that lie together in memory: with hundreds of members, as much as a core's cache holds
ROUNDS = 5  # of EM, which tell most of the members that will not be used
MOST = 200  # Newton steps
JOINING = 64  # members that begin as used, and that may join at each step: second derivatives of all would take longest


@dataclass(frozen=True)
class Fit:
    """Weights of a pool and how near they are to the best ones.

    Attributes:
        weights: [K] float64, non-negative, sum 1.
        nll: of the pool with them, nats a token.
        gap: max_k mean_t p_k/p̄ − 1 ≥ 0. The NLL is above the lowest possible by at most log(1 + gap).
    """

    weights: np.ndarray
    nll: float
    gap: float


@dataclass(frozen=True)
class Budget:
    """A pool of the members that weigh most.

    Attributes:
        members: their numbers, by falling weight.
        renormalised: NLL with their weights, scaled to sum to 1.
        fit: weights fitted anew for these members alone, in that order.
    """

    members: list[int]
    renormalised: float
    fit: Fit


def fit(log_probs: np.ndarray, tolerance: float = 1e-6) -> Fit:
    """The weights with the lowest NLL, to ``tolerance`` in the gap.

    A few rounds of EM (w_k ← w_k · mean_t p_k/p̄), then sequential quadratic programming (Kim, Carbonetto, Stephens & Anitescu 2020,
    "A fast algorithm for maximum likelihood estimation of mixture proportions using sequential quadratic programming", JCGS 29).
    Each step minimises the second-order model of NLL + Σ w over w ≥ 0, whose optimum sums to 1 of itself, for the members that are
    used and those that would lower the NLL most, and is shortened until the NLL falls as it should.

    Args:
        log_probs: [K, tokens] log-probabilities of the observed tokens, any float type; one copy of them is held in float32, or in
            float64 if that is what is given. The gap cannot be less than their rounding.

    Raises:
        KdlibError: another shape, NaN or +∞, a token that no member finds possible, or no convergence.
    """
    p, shift = _scaled(log_probs)
    weights = np.full(len(p[0]), 1 / len(p[0]))
    for _ in range(ROUNDS):
        weights = weights * _gains(p, weights)
        weights /= weights.sum()
    few = largest(weights, min(JOINING, len(weights)))
    weights = few if np.isfinite(_nll(p, few)) else weights
    for _ in range(MOST):
        gains = _gains(p, weights)
        gap = max(0.0, float(gains.max()) - 1)
        if gap <= tolerance:
            return Fit(weights, _nll(p, weights) - shift, gap)
        weights = _newton(p, weights, gains)
    raise KdlibError(
        f"Weights must reach a gap of {tolerance:g}, got {gap:.2g} in {MOST} steps. Give float64 log-probabilities, or a larger `tolerance`."
    )


def nll(log_probs: np.ndarray, weights: np.ndarray) -> float:
    """NLL of the pool with these weights [K], nats a token, from log-probabilities [K, tokens]."""
    p, shift = _scaled(log_probs)
    return _nll(p, np.asarray(weights, dtype=np.float64)) - shift


def largest(weights: np.ndarray, size: int) -> np.ndarray:
    """The ``size`` largest of weights [K] scaled to sum to 1, the others 0; of equal ones the first are kept.

    Raises:
        KdlibError: fewer than one, or more than there are.
    """
    if not 1 <= size <= len(weights):
        raise KdlibError(f"`size` must be 1 to {len(weights)}, the members there are, got {size}.")
    kept = np.zeros(len(weights))
    order = np.argsort(-np.asarray(weights), kind="stable")[:size]
    kept[order] = np.asarray(weights, dtype=np.float64)[order]
    return kept / kept.sum()


def by_budget(log_probs: np.ndarray, weights: np.ndarray, sizes: Sequence[int], tolerance: float = 1e-6) -> list[Budget]:
    """For each size, the pool of the members that weigh most in ``weights`` [K].

    Args:
        log_probs, tolerance: as for :func:`fit`.
    """
    found = []
    for size in sizes:
        kept = largest(weights, size)
        order = np.argsort(-kept, kind="stable")[:size]
        part = np.asarray(log_probs)[order]
        found.append(Budget(order.tolist(), nll(part, kept[order]), fit(part, tolerance)))
    return found


def _newton(p: list[np.ndarray], weights: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """One step: the minimum of the second-order model over w ≥ 0, as far as the NLL falls."""
    joining = np.argsort(-np.where(weights > 0, 0, gains))[:JOINING]
    working = np.union1d(np.flatnonzero(weights), joining[gains[joining] > 1])
    hessian = _hessian(p, weights, working)
    # Members that are copies of one another make it singular; so little moves no optimum that there is.
    hessian[np.diag_indices(len(working))] += 1e-9 * np.trace(hessian) / len(working)
    # ½ dᵀH d + gᵀd with g = 1 − gains and d = v − w; since H w = gains, it is ½ vᵀH v − (2·gains − 1)ᵀv but for a constant.
    factor = np.linalg.cholesky(hessian).T
    aimed = np.zeros(len(weights))
    linear = hessian @ weights[working] + gains[working] - 1
    aimed[working] = nnls(factor, np.linalg.solve(factor.T, linear), maxiter=30 * len(working))[0]
    direction = aimed - weights
    slope, before, step = direction @ (1 - gains), _penalised(p, weights), 1.0
    while step > 1e-10:
        proposal = weights + step * direction
        if _penalised(p, proposal) <= before + 0.01 * step * slope + 1e-12:
            break
        step /= 2
    # A member that is left with next to nothing is left out; the conditions bring it back if it should be in.
    proposal[proposal < 1e-12] = 0
    return proposal / proposal.sum()


def _penalised(p: list[np.ndarray], weights: np.ndarray) -> float:
    return _nll(p, weights) + weights.sum()


def _scaled(log_probs: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Probabilities [K, c] by chunks of tokens, each token's largest scaled to 1, and the mean logarithm of the scale."""
    log_probs = np.asarray(log_probs)
    if log_probs.ndim != 2 or 0 in log_probs.shape:
        raise KdlibError(f"`log_probs` must have shape [members, tokens], got {log_probs.shape}.")
    best = log_probs.max(axis=0).astype(np.float64)
    if not np.isfinite(best).all():
        raise KdlibError(
            f"`log_probs` must be finite for one member at each token, got {np.count_nonzero(~np.isfinite(best))} tokens where none "
            "is, or NaN. Leave these tokens out."
        )
    dtype = np.float64 if log_probs.dtype == np.float64 else np.float32
    parts = (slice(start, start + CHUNK) for start in range(0, len(best), CHUNK))
    return [np.exp((log_probs[:, part] - best[part]).astype(dtype)) for part in parts], float(best.mean())


def _nll(p: list[np.ndarray], weights: np.ndarray) -> float:
    used = np.flatnonzero(weights)
    few, total = weights[used].astype(p[0].dtype), 0.0
    with np.errstate(divide="ignore"):
        for chunk in p:
            total -= np.log(few @ chunk[used]).sum(dtype=np.float64)
    return float(total / _tokens(p))


def _gains(p: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """mean_t p_k/p̄ [K], float64: minus the gradient of the NLL, and the factor of a round of EM."""
    total, weights = np.zeros(len(weights)), weights.astype(p[0].dtype)
    for chunk in p:
        total += chunk @ (1 / (weights @ chunk))
    return total / _tokens(p)


def _hessian(p: list[np.ndarray], weights: np.ndarray, working: np.ndarray) -> np.ndarray:
    """mean_t p_i p_j/p̄² of the working members, float64."""
    total, few = np.zeros((len(working), len(working))), weights[working].astype(p[0].dtype)
    for chunk in p:
        some = chunk[working]
        some /= few @ some
        total += some @ some.T
    return total / _tokens(p)


def _tokens(p: list[np.ndarray]) -> int:
    return sum(chunk.shape[1] for chunk in p)
