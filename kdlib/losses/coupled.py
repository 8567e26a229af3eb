"""The loss of members that are trained together: their own, and that of their pool (negative correlation learning).

For n members with own losses L_k and L_q of the pool q, both w * tau^2 * KL(t || .) + (1 - w) * CE, the loss is

    sum_k (1 - lambda) * L_k + lambda * n * L_q.

lambda = 0 is n students, each for itself with the gradient that it would have alone; lambda = 1 trains their pool and nothing else.
With the geometric pool and CE or KL this is negative correlation learning (Liu & Yao 1999, "Ensemble learning via negative
correlation"; Brown et al. 2005, JMLR 6): the mean of the members' losses less lambda times their ambiguity, exactly (Heskes 1998,
"Selecting weighting factors in logarithmic opinion pools"; Webb et al. 2020, arXiv 1902.04422).

As in :mod:`kdlib.losses.fused` gradients are computed in the forward pass, from logits that exist for a chunk of tokens, here of
all members. Own loss and pool share them: the matrix products are those of n students, whatever lambda is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from kdlib.errors import KdlibError
from kdlib.losses.fused import (
    CHUNK_ELEMENTS,
    Chosen,
    LossParts,
    choose,
    cross_entropy_,
    forward_kl_,
    pull_,
    require_same_rows,
    softmax_of,
    stored_gradients,
)
from kdlib.losses.logits import Head
from kdlib.losses.targets import DenseTargets, PooledTargets, SparseTargets


class Member(NamedTuple):
    """What gives a trained member's logits: hidden states [T, D], weight [V, D] and bias [V] (or None) of its output layer."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


def coupled_distillation_loss(
    members: Sequence[Member],
    labels: Tensor,
    targets: SparseTargets | DenseTargets | PooledTargets | None = None,
    kd_weight: float = 0.0,
    temperature: float = 1.0,
    normaliser: float | Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
    compiled: bool = False,
    token_weights: Tensor | None = None,
    *,
    coupling: float,
    pool: str,
    others: Sequence[DenseTargets] = (),
) -> LossParts:
    """sum_k (1 - lambda) * L_k + lambda * n * L_q over the tokens / normaliser, n the members and the others together.

    Args:
        members: those that are trained; K = 1 without others is :func:`kdlib.losses.linear_distillation_loss`.
        others: members of the pool that stay as they are, and have neither gradient nor a loss of their own.
        coupling: lambda, 0 to 1.
        pool: probability, the members' mean distribution, each softened by the temperature first; logit, the softmax of their
            mean logits.
        labels to token_weights: as of :func:`kdlib.losses.linear_distillation_loss`.

    Returns:
        ``loss`` to call backward on; ``ce`` and ``kd``: (1 - lambda) * the mean over the members + lambda * the pool's.

    Raises:
        KdlibError: a coupling outside 0..1, an unknown pool, members whose rows or vocabularies differ, or as the other loss.
    """
    if not 0 <= coupling <= 1 or pool not in POOLS:
        raise KdlibError(f"`coupling` must be in 0..1 and `pool` one of {', '.join(POOLS)}, got {coupling} and {pool!r}.")
    every = [*members, *(Member(one.hidden, one.weight, one.bias) for one in others)]
    for one in every:
        require_same_rows(one.hidden, labels, targets, token_weights)
    sizes = {len(one.weight) for one in every}
    if not members or len(sizes) > 1:
        raise KdlibError(f"`members` must be one or more over one vocabulary, got {len(members)}, with {sorted(sizes)} tokens.")
    tokens, chosen = choose(labels, targets, kd_weight, temperature, token_weights)
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_ELEMENTS.get(labels.device.type, 2**24) // (len(every) * sizes.pop()))
    term = partial(_coupled, trained=len(members), coupling=coupling, pool=POOLS[pool], softmax_=softmax_of(compiled))
    plan = _Plan(
        chosen, kd_weight, temperature, 1.0 / (normaliser if normaliser is not None else max(1, tokens)),
        matmul_dtype or members[0].hidden.dtype, chunk_tokens, term, len(members), coupling,
    )  # fmt: skip
    flat = [one for member in every for one in member]
    if not torch.is_grad_enabled():
        flat = [None if one is None else one.detach() for one in flat]
    loss, ce, kd = _CoupledDistillation.apply(plan, *flat)
    return LossParts(loss, ce, kd if chosen.targets is not None else None, tokens)


@dataclass(frozen=True)
class _Plan:
    """What a loss needs besides its members; ``members``: how many of these are trained."""

    chosen: Chosen
    kd_weight: float
    temperature: float
    scale: float | Tensor
    dtype: torch.dtype
    chunk_tokens: int
    term: Callable
    members: int
    coupling: float


@dataclass(frozen=True)
class _Known:
    """A chunk's target logits, computed once for all members."""

    values: Tensor

    def logits(self) -> Tensor:
        return self.values


class _CoupledDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: _Plan, *flat):
        exact = torch.float64 if flat[0].dtype == torch.float64 else torch.float32
        rows, labels, targets, weights = plan.chosen
        wanted = ctx.needs_input_grad[1:]
        heads = [Head(*flat[at : at + 3], wanted[at : at + 3], plan.dtype) for at in range(0, len(flat), 3)]
        size, device = (min(plan.chunk_tokens, len(rows)), len(flat[1])), flat[0].device
        exact_buffer = torch.empty(len(heads), *size, dtype=exact, device=device)
        low_buffer = exact_buffer[0] if plan.dtype == exact else torch.empty(size, dtype=plan.dtype, device=device)
        # Rows: own, summed over members, and the pool's; columns: CE, KD.
        sums = torch.zeros(2, 2, dtype=exact, device=device)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(rows), plan.chunk_tokens):
                part = slice(start, start + plan.chunk_tokens)
                label = labels[part, None]
                low, logits = low_buffer[: len(label)], exact_buffer[:, : len(label)]
                for head, out in zip(heads, logits, strict=True):
                    head.logits(rows[part], out, low)
                target = None if targets is None else targets[part]
                if isinstance(target, DenseTargets | PooledTargets):
                    target = _Known(target.logits())
                grads, losses = plan.term(logits, label, target, plan.kd_weight, plan.temperature)
                if weights is not None:
                    each = weights[part].to(exact)
                    grads.mul_(each[:, None])
                    losses = losses * each
                sums += losses.sum(-1)
                for head, grad in zip(heads, grads, strict=False):  # others have none
                    head.add(grad, low)
        ctx.scale = plan.scale
        ctx.save_for_backward(*(one for head in heads for one in head.gradients()))
        own, pooled = (1 - plan.coupling) * sums[0], plan.coupling * sums[1]
        ce, kd = own / plan.members + pooled
        part_ce, part_kd = own + len(heads) * pooled
        loss = ((1 - plan.kd_weight) * part_ce + plan.kd_weight * part_kd if targets is not None else part_ce) * plan.scale
        ctx.mark_non_differentiable(ce, kd)
        return loss, ce, kd

    @staticmethod
    def backward(ctx, grad_loss, _ce, _kd):
        return None, *stored_gradients(ctx, grad_loss)


def _coupled(
    logits: Tensor, label: Tensor, targets, kd_weight: float, temperature: float, trained: int, coupling: float, pool, softmax_
) -> tuple[Tensor, Tensor]:
    """The gradient of each token's loss with respect to the logits [n, C, V] of those that are trained, in their memory.

    Returns:
        It, [trained, C, V]; and losses [2, 2, C]: own, summed over members, and the pool's; CE and KD.
    """
    losses, own = logits.new_zeros(2, 2, len(label)), logits[:trained]
    if coupling > 0:
        pulls, ce, kd = pool(logits, label, targets, kd_weight, temperature, trained, softmax_)
        losses[1] = torch.stack([ce, kd])
    if coupling == 1:
        return own.copy_(pulls), losses
    for one in own:
        _, ce, kd = forward_kl_(one, label, targets, kd_weight, temperature, softmax_)
        losses[0] += torch.stack([ce, kd])
    return own if coupling == 0 else own.mul_(1 - coupling).add_(pulls, alpha=coupling), losses


def _logit_pool(logits: Tensor, label: Tensor, targets, kd_weight: float, temperature: float, trained: int, softmax_):
    """n times the gradient of the pool's loss with respect to each of the first members' logits, and the pool's CE and KD [C].

    The mean of logits takes 1/n of every member's: n times the gradient is that of the mean.
    """
    grad, ce, kd = forward_kl_(logits.mean(0), label, targets, kd_weight, temperature, softmax_)
    return grad.expand(trained, -1, -1), ce, kd


def _probability_pool(logits: Tensor, label: Tensor, targets, kd_weight: float, temperature: float, trained: int, softmax_):
    """As :func:`_logit_pool`. The log of a distribution is its own logits, so the pool's loss and gradient are those of any."""
    log_p, mean = _mean(logits)
    if targets is None or temperature == 1:
        grad, ce, kd = forward_kl_(mean.clone(), label, targets, kd_weight, 1.0, softmax_)
        return _handed_down(grad, log_p[:trained], mean), ce, kd
    grad, ce = cross_entropy_(mean.clone(), label, 1 - kd_weight, softmax_)
    found = _handed_down(grad, log_p[:trained], mean)
    log_p, mean = _mean(logits / temperature)
    _, kd = pull_(grad.copy_(mean), label, targets, temperature, kd_weight * temperature, 0.0, softmax_)
    return found.add_(_handed_down(grad, log_p[:trained], mean)), ce, temperature**2 * kd


def _mean(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of members [n, C, V], and the log of their mean probability [C, V]."""
    log_p = torch.log_softmax(logits, dim=-1)
    # Member by member: on a CPU a logsumexp over the first dimension takes four times as long.
    return log_p, reduce(torch.logaddexp, log_p) - math.log(len(log_p))


def _handed_down(grad: Tensor, log_p: Tensor, mean: Tensor) -> Tensor:
    """n times the gradient with respect to each member's logits, given that with respect to the log of their mean p̄.

    d log p̄(v) / d z_k(j) = r_k(v) / n * (1[v = j] - p_k(j)) with the ratio r_k = p_k / p̄.
    """
    # A token without any probability takes no part.
    pulled = (log_p - mean).exp_().nan_to_num_(0.0).mul_(grad)
    return pulled.sub_(log_p.exp().mul_(pulled.sum(-1, keepdim=True)))


POOLS = {"probability": _probability_pool, "logit": _logit_pool}
