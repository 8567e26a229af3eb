"""Pools of K distributions over one vocabulary, and the ambiguity that makes a pool better than its average member.

Every function takes log-probabilities [K, ..., V], members first, and computes in float32, or in float64 if given it. Pools also take
them streamed (:class:`kdlib.losses.logits.Streamed`): they then hold one member's at a time, beside what those before it add up to.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kdlib.errors import KdlibError
from kdlib.losses.logits import Streamed

Members = Tensor | Streamed


def log_probs(logits: Members) -> Members:
    """Log-softmax over the last dimension in float32, or float64 if given it."""
    if isinstance(logits, Streamed):
        return logits.then(log_probs)
    return functional.log_softmax(_wide(logits), dim=-1)


def probability_pool(log_probs: Members, weights: Tensor | None = None) -> Tensor:
    """Log of the members' mean probability, log Σ_k w_k p_k; ``weights`` sum to 1 over members (default 1/K).

    Works on any slice of the distributions too: the members' log-probabilities of one token give the pool's. Raises
    KdlibError for weights that are no distribution over the members.

    Args:
        weights: [K], or [K, ...] with a distribution over the members at each position.
    """
    if weights is None:
        return _sum(map(_wide, log_probs)) - math.log(len(log_probs))
    return running(_weighted(log_probs, weights), 1.0)


def logit_pool(log_probs: Members, weights: Tensor | None = None) -> Tensor:
    """Log of the normalised geometric mean, log softmax(Σ_k w_k log p_k): the same pool as that mean of the logits."""
    return _normalised(_mean(log_probs, weights), len(log_probs))


def power_pool(log_probs: Members, exponent: float, weights: Tensor | None = None) -> Tensor:
    """Log of the normalised power mean, (Σ_k w_k p_k^r)^(1/r) / Z with ``exponent`` r in (0, 1].

    r = 1 is the probability pool, and r → 0 the geometric one; the rounding of the logarithm is divided by r.
    (Hardy, Littlewood & Pólya, Inequalities, 1934, chapter 2.) Raises KdlibError for another exponent.
    """
    if not 0 < exponent <= 1:
        raise KdlibError(f"`exponent` of a power mean must be above 0 and at most 1, got {exponent}. For 0 take the logit pool.")
    if exponent == 1:
        return probability_pool(log_probs, weights)
    if len(log_probs) == 1:
        return _mean(log_probs, weights)
    streamed = isinstance(log_probs, Streamed)
    raised = log_probs.then(lambda one: exponent * _wide(one)) if streamed else exponent * _wide(log_probs)
    return _normalised(probability_pool(raised, weights) / exponent, len(log_probs))


def running(weighted: Iterable[tuple[Tensor, Tensor]], exponent: float) -> Tensor:
    """log Σ_k w_k p_k^r of (log p_k, w_k), or Σ_k w_k log p_k for ``exponent`` r = 0: one member at a time, on top of the others.

    The weights may be those of a part of the members, such as one process holds: the parts add up.
    """
    if exponent == 0:
        # One that weighs 0 takes no part, were it −∞.
        return functools.reduce(torch.add, (torch.where(weight > 0, weight * one, 0.0) for one, weight in weighted))
    # A finite logarithm of 0: it weighs nothing, and its gradient is no NaN where several members weigh nothing.
    return _sum((one if exponent == 1 else exponent * one) + weight.log().clamp(min=-1e4) for one, weight in weighted)


POOLS = {"probability": probability_pool, "logit": logit_pool}


def pool_of(name: str, exponent: float | None = None, weights: Sequence[float] | None = None) -> Callable[..., Tensor]:
    """The pool of that name, or the power mean with that exponent: log-probabilities of K members -> those of the pool.

    Args:
        weights: of the members; without them the pool takes weights with each call, or none.
    """
    pool = POOLS[name] if exponent is None else functools.partial(power_pool, exponent=exponent)
    return pool if weights is None else functools.partial(pool, weights=torch.tensor(weights, dtype=torch.float64))


def logit_ambiguity(log_probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Gain of the geometric pool q over its members at each position: −log Z = Σ_k w_k KL(q‖p_k) ≥ 0, nats, [...].

    For any outcome y, −log q(y) = Σ_k w_k(−log p_k(y)) − ambiguity: it does not depend on y (Heskes, Selecting
    weighting factors in logarithmic opinion pools, 1998). ``weights`` as for :func:`probability_pool`.
    """
    return -torch.logsumexp(_mean(log_probs, weights), dim=-1)


def probability_ambiguity(log_probs: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Gain of the arithmetic pool p̄ over its members under a target distribution t [..., V], nats, [...].

    Σ_k w_k KL(t‖p_k) − KL(t‖p̄) = Σ_v t_v [log p̄_v − Σ_k w_k log p_k(v)] ≥ 0. For an observed label it is
    ``label_ambiguity`` of the label's log-probabilities. ``weights`` as for :func:`probability_pool`.
    """
    gain = label_ambiguity(log_probs, weights)
    return torch.where(target > 0, target * gain, 0.0).sum(dim=-1)


def label_ambiguity(target_log_probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """log p̄(y) − Σ_k w_k log p_k(y) ≥ 0 from the members' log-probabilities of the observed labels [K, ...]."""
    return probability_pool(target_log_probs, weights) - _mean(target_log_probs, weights)


def _mean(log_probs: Members, weights: Tensor | None) -> Tensor:
    """Weighted mean of the log-probabilities over the members."""
    if weights is None:
        return functools.reduce(torch.add, map(_wide, log_probs)) / len(log_probs)
    return running(_weighted(log_probs, weights), 0)


def _weighted(log_probs: Members, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each member's log-probabilities and its weight, which are looked at as soon as it is known what they are to fit."""
    for number, one in enumerate(map(_wide, log_probs)):
        if number == 0:
            weights = _weights(weights, len(log_probs), one)
        yield one, weights[number]


def _weights(weights: Tensor, members: int, log_probs: Tensor) -> Tensor:
    """Weights [K, ..., 1] of the dtype and on the device of one member's log-probabilities, for them to be multiplied with."""
    weights, shape = weights.to(log_probs), (members, *log_probs.shape)
    if not 0 < weights.ndim <= len(shape) or weights.shape != shape[: weights.ndim]:
        raise KdlibError(
            f"`weights` must be {members} non-negative numbers that sum to 1, one for each member, got shape {tuple(weights.shape)} "
            f"for log-probabilities {shape}."
        )
    total = weights.sum(dim=0)
    if (weights < 0).any() or not torch.isclose(total, torch.ones_like(total)).all():
        raise KdlibError(
            f"`weights` must be {members} non-negative numbers that sum to 1, one for each member, got minimum {weights.min():.3g}, "
            f"sums {total.min():.6g} to {total.max():.6g}. Normalise them."
        )
    return weights.reshape(*weights.shape, *[1] * (len(shape) - weights.ndim))


def _normalised(mean: Tensor, members: int) -> Tensor:
    # To normalise a normalised distribution again would move its last bit.
    return mean if members == 1 else functional.log_softmax(mean, dim=-1)


def _sum(log_probs: Iterable[Tensor]) -> Tensor:
    # Member by member: on a CPU a logsumexp over the first dimension takes four times as long.
    return functools.reduce(torch.logaddexp, log_probs)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
