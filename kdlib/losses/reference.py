"""The losses as their formulas, on dense logits: short enough to check by eye, and what the fused forms must equal."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib.losses.targets import DenseTargets, PooledTargets, SparseTargets

IGNORED = -100


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats over tokens whose label is not -100.

    Args:
        logits: [T, V].
        labels: [T] int64.
    """
    return F.cross_entropy(_full(logits), labels, ignore_index=IGNORED)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 * KL(softmax(z_T / tau) || softmax(z_S / tau)) per token, in nats (Hinton et al. 2015).

    Args:
        student_logits, teacher_logits: [T, V].

    Returns:
        [T]. The factor tau^2 keeps the gradient's size when tau changes; as tau grows the value tends to half the mean
        square of the centred logit difference.
    """
    s = F.log_softmax(_full(student_logits) / temperature, dim=-1)
    t = F.log_softmax(_full(teacher_logits) / temperature, dim=-1)
    # xlogy-like: an id the teacher gives no mass contributes nothing, even where log t is -inf.
    return temperature**2 * torch.where(t.isneginf(), 0, t.exp() * (t - s)).sum(-1)


def sparse_kl(student_logits: Tensor, targets: SparseTargets) -> Tensor:
    """tau^2 * (cross-entropy to sparse targets - their entropy) per token, in nats; see :class:`SparseTargets`.

    Args:
        student_logits: [T, V].

    Returns:
        [T]. Exact KL over k+1 outcomes where the targets have a tail; an unbiased estimate for unbiased draws.
    """
    log_s = F.log_softmax(_full(student_logits) / targets.temperature, dim=-1)
    # Where there is no mass the student may have none either, and 0 * -inf would be NaN.
    cross = -torch.where(targets.weights > 0, targets.weights * log_s.gather(-1, targets.ids), 0).sum(-1)
    if targets.tail is not None:
        kept = torch.zeros_like(log_s).scatter_add(-1, targets.ids, targets.weights.to(log_s.dtype)) > 0
        # Ids at -inf are masked too, because the gradient of a logsumexp over nothing is NaN.
        log_rest = log_s.masked_fill(kept | log_s.isneginf(), -torch.inf).logsumexp(-1)
        cross = cross - torch.where(targets.tail > 0, targets.tail * log_rest, 0)
    return targets.temperature**2 * (cross - targets.entropy)


def target_kl(logits: Tensor, targets: SparseTargets | DenseTargets | PooledTargets, temperature: float = 1.0) -> Tensor:
    """KL(t || s) per token, in nats, of targets t and s = softmax(logits / tau), without a factor tau^2.

    Of draws it is the cross-entropy to them less the entropy that was kept with them: an estimate that may be negative, and
    that is unbiased but for the one byte of that entropy.

    Args:
        logits: [T, V]; temperature: tau, of sparse targets their own.
    """
    sparse = isinstance(targets, SparseTargets)
    loss = sparse_kl(logits, targets) if sparse else forward_kl(logits, targets.logits(), temperature)
    return loss / temperature**2


def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | SparseTargets,
    labels: Tensor,
    kd_weight: float,
    temperature: float = 1.0,
) -> Tensor:
    """w * tau^2 * KL(t || s) + (1 - w) * CE, averaged over tokens whose label is not -100.

    Args:
        student_logits: [T, V]; flatten a batch [B, T, V] first, so that a mean over rows is a mean over tokens.
        teacher: teacher logits [T, V], or sparse targets (which carry their own temperature).
        labels: [T].
        kd_weight: weight of the KD term, 0 to 1.
    """
    valid = labels != IGNORED
    if isinstance(teacher, SparseTargets):
        kd = sparse_kl(student_logits, teacher)
    else:
        kd = forward_kl(student_logits, teacher, temperature)
    ce = cross_entropy(student_logits, labels)
    # A weight of zero leaves cross-entropy bit for bit, whatever the teacher holds.
    return ce if kd_weight == 0 else kd_weight * kd[valid].mean() + (1 - kd_weight) * ce


def pooled_logits(logits: Tensor, pool: str, temperature: float = 1.0) -> Tensor:
    """z [T, V] with softmax(z / tau) the pool of the members' softmax(z_k / tau): their mean (probability), or that of logits (logit).

    Args:
        logits: of the members, [K, T, V].
    """
    logits = _full(logits)
    if pool == "logit":
        return logits.mean(0)
    log_p = F.log_softmax(logits / temperature, dim=-1)
    return temperature * (log_p.logsumexp(0) - math.log(len(logits)))


def coupled_loss(
    logits: Tensor,
    teacher: Tensor | SparseTargets,
    labels: Tensor,
    kd_weight: float,
    temperature: float = 1.0,
    coupling: float = 0.0,
    pool: str = "logit",
) -> Tensor:
    """sum_k (1 - lambda) * L_k + lambda * K * L_q for members' logits [K, T, V], see :mod:`kdlib.losses.coupled`."""
    valid, q = labels != IGNORED, pooled_logits(logits, pool, temperature)
    own = sum(distillation_loss(one, teacher, labels, kd_weight, temperature) for one in logits)
    kd = sparse_kl(q, teacher) if isinstance(teacher, SparseTargets) else forward_kl(q, teacher, temperature)
    ce = cross_entropy(pooled_logits(logits, pool), labels)
    return (1 - coupling) * own + coupling * len(logits) * (kd_weight * kd[valid].mean() + (1 - kd_weight) * ce)


def _full(logits: Tensor) -> Tensor:
    # Half-precision log-softmax can agree in value while its gradient is off by a fifth.
    return logits if logits.dtype == torch.float64 else logits.float()
