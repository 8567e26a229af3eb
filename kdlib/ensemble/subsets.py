"""The loss of every subset of a probability pool, from the members' stored log-probabilities of the observed tokens."""

import numpy as np

from kdlib.errors import KdlibError

MOST = 16  # members: the work doubles with each
FACTORS = 4  # sums multiplied before one logarithm is taken of them
LOWEST = np.exp(-160.0)  # of a probability, relative to the best member's: four of them still have a product in float64
TOKENS = 64  # of every factor at a time: the sums of 4 096 subsets then stay within a core's cache


def subset_nll(log_probs: np.ndarray) -> np.ndarray:
    """NLL of the pool of every subset of M members, nats a token: float64 [2^M], the subset's bits as index, NaN for none.

    Bit k of the index says whether member k is in: entry 0b101 is the pool of members 0 and 2. A sum over a subset is one over
    its lower members and one over its upper ones, and the logarithms of several tokens are one logarithm of their product.

    Args:
        log_probs: [M, tokens], M at most 16, any float type; computed in float64. Members count as no more than 160 nats below the
            best one at a token.

    Raises:
        KdlibError: another shape, more members, NaN, or a token that no member finds possible.
    """
    log_probs = np.asarray(log_probs)
    if log_probs.ndim != 2 or not 1 <= len(log_probs) <= MOST or not log_probs.shape[1]:
        raise KdlibError(f"`log_probs` must have shape [members, tokens] with 1 to {MOST} members, got {log_probs.shape}.")
    members, tokens = log_probs.shape
    best, lower = log_probs.max(axis=0).astype(np.float64), members // 2
    if not np.isfinite(best).all():
        raise KdlibError("`log_probs` must be finite for one member at each token, got NaN or a token where none is. Leave these out.")
    total = np.zeros((2 ** (members - lower), 2**lower))
    for start in range(0, tokens, FACTORS * TOKENS):
        part = slice(start, start + FACTORS * TOKENS)
        p = np.maximum(np.exp(log_probs[:, part] - best[part]), LOWEST)
        total += _log_sums(p[:lower], p[lower:])
    sizes = np.array([index.bit_count() for index in range(2**members)])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sizes > 0, np.log(sizes) - total.reshape(-1) / tokens - best.mean(), np.nan)


def mean_by_size(nll: np.ndarray) -> np.ndarray:
    """Mean of :func:`subset_nll` over the subsets of each size, [M], from 1 member to all.

    This is what a pool of K can be expected to reach if members are exchangeable, as independent ones are; those of a chain or of
    boosting are not.
    """
    sizes = np.array([index.bit_count() for index in range(len(nll))])
    return np.bincount(sizes[1:], nll[1:])[1:] / np.bincount(sizes[1:])[1:]


def oracle_nll(log_probs: np.ndarray) -> float:
    """NLL of a router that knew the next token and took the member that gives it most, nats a token: no router is better.

    Args:
        log_probs: [members, tokens] log-probabilities of the observed tokens.
    """
    return float(-np.asarray(log_probs).max(axis=0).mean(dtype=np.float64))


def _log_sums(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Σ_t log Σ_k p_k(t) of every subset, [2^upper, 2^lower], from probabilities [members, tokens] above 0."""
    low, high = _sums(lower), _sums(upper)
    product = None
    for first in range(FACTORS):
        here = slice(first, None, FACTORS)
        sums = high[:, None, here] + low[None, :, here]
        sums[0, 0] = 1.0  # no member
        if product is None:
            product = sums
        else:
            product[..., : sums.shape[-1]] *= sums
    return np.log(product, out=product).sum(axis=-1)


def _sums(p: np.ndarray) -> np.ndarray:
    """Sums over every subset of the rows [n, tokens]: [2^n, tokens], by bits."""
    found = np.zeros((1, p.shape[1]))
    for row in p:
        found = np.concatenate([found, found + row])
    return found
