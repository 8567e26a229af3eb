"""Pools of K distributions over one vocabulary, and the ambiguity that makes a pool better than its average member.

Every function takes log-probabilities [K, ..., V], members first, and computes in float32, or in float64 if given it.
"""

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from kdlib.errors import KdlibError


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension in float32, or float64 if given it."""
    return functional.log_softmax(_wide(logits), dim=-1)


def probability_pool(log_probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Log of the members' mean probability, log Σ_k w_k p_k; ``weights`` [K] sum to 1 (default 1/K).

    Works on any slice of the distributions too: the members' log-probabilities of one token give the pool's. Raises
    KdlibError for weights that are no distribution over the members.
    """
    log_probs = _wide(log_probs)
    members = len(log_probs)
    if weights is None:
        return _sum(log_probs) - math.log(members)
    weights = weights.to(log_probs)
    if weights.shape != (members,) or (weights < 0).any() or not torch.isclose(weights.sum(), weights.new_ones(())):
        raise KdlibError(
            f"`weights` must be {members} non-negative numbers that sum to 1, one for each member, got shape "
            f"{tuple(weights.shape)}, minimum {weights.min():.3g}, sum {weights.sum():.6g}. Normalise them."
        )
    return _sum(one + weight for one, weight in zip(log_probs, weights.log(), strict=True))


def logit_pool(log_probs: Tensor) -> Tensor:
    """Log of the normalised geometric mean, log softmax(mean_k log p_k): the same pool as the mean of the logits."""
    log_probs = _wide(log_probs)
    if len(log_probs) == 1:
        return log_probs[0]  # normalising a normalised distribution again would move its last bit
    return functional.log_softmax(log_probs.mean(dim=0), dim=-1)


POOLS = {"probability": probability_pool, "logit": logit_pool}


def logit_ambiguity(log_probs: Tensor) -> Tensor:
    """Gain of the geometric pool q over its members at each position: −log Z = mean_k KL(q‖p_k) ≥ 0, nats, [...].

    For any outcome y, −log q(y) = mean_k(−log p_k(y)) − ambiguity: it does not depend on y (Heskes, Selecting
    weighting factors in logarithmic opinion pools, 1998).
    """
    return -torch.logsumexp(_wide(log_probs).mean(dim=0), dim=-1)


def probability_ambiguity(log_probs: Tensor, target: Tensor) -> Tensor:
    """Gain of the arithmetic pool p̄ over its members under a target distribution t [..., V], nats, [...].

    mean_k KL(t‖p_k) − KL(t‖p̄) = Σ_v t_v [log p̄_v − mean_k log p_k(v)] ≥ 0. For an observed label it is
    ``label_ambiguity`` of the label's log-probabilities.
    """
    gain = label_ambiguity(log_probs)
    return torch.where(target > 0, target * gain, 0.0).sum(dim=-1)


def label_ambiguity(target_log_probs: Tensor) -> Tensor:
    """log p̄(y) − mean_k log p_k(y) ≥ 0 from the members' log-probabilities of the observed labels [K, ...]."""
    return probability_pool(target_log_probs) - _wide(target_log_probs).mean(dim=0)


def _sum(log_probs: Iterable[Tensor]) -> Tensor:
    # Member by member: on a CPU a logsumexp over the first dimension takes four times as long.
    return functools.reduce(torch.logaddexp, log_probs)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
