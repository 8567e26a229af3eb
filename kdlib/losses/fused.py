"""Output layer and loss in one, chunk by chunk: [tokens, V] never exists, and gradients are formed in the forward pass.

Each chunk's logits are turned into the loss's gradient with respect to them in place, and multiplied out at once into
the gradients of hidden states and output weights. The backward pass only scales those by the incoming gradient. The
idea of a linear layer fused with its cross-entropy is that of Liger-Kernel (Hsu et al. 2024, arXiv 2410.10989) and
Wijmans et al. 2024 (arXiv 2411.09009); here it also carries sparse and dense teacher targets, and runs on any device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kdlib.errors import KdlibError
from kdlib.losses.reference import IGNORED
from kdlib.losses.targets import DenseTargets, SparseTargets

# Logits held at a time. On a CPU a chunk that fits the last-level cache is fastest; on a GPU a larger one would give back
# the memory that chunks are there to save.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**23}


class LossParts(NamedTuple):
    """A loss and what it is made of.

    Attributes:
        loss: scalar to call backward on, already divided by the normaliser.
        ce: sum over tokens of -log s(label), nats, detached.
        kd: sum over tokens of tau^2 * KL(t || s), nats, detached; None without targets.
        tokens: number of tokens with a label.
    """

    loss: Tensor
    ce: Tensor | None
    kd: Tensor | None
    tokens: int


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    targets: SparseTargets | DenseTargets | None = None,
    kd_weight: float = 0.0,
    temperature: float = 1.0,
    normaliser: float | Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
) -> LossParts:
    """w * tau^2 * KL(t || s) + (1 - w) * CE, s = softmax(hidden @ weight.T + bias), summed over tokens / normaliser.

    Args:
        hidden: [T, D], any floating dtype.
        weight: [V, D]; bias: [V] or None.
        labels: [T] int64, -100 where nothing is predicted: those tokens get a gradient of exactly zero.
        targets: rows aligned with ``labels``; None for cross-entropy alone.
        kd_weight: w, weight of the KD term.
        temperature: tau; must equal the temperature of sparse targets.
        normaliser: tokens of the whole optimisation step, so that gradient accumulation over batches of unequal size
            changes nothing; default the number of tokens here.
        matmul_dtype: dtype of the matrix products (autocast's); softmax and sums are float32, or float64 for float64
            input.
        chunk_tokens: tokens whose logits exist at a time; default a size that suits the device.

    Raises:
        KdlibError: sparse targets kept at another temperature, a weight outside 0..1, or a weight without targets.
    """
    found = {"hidden": len(hidden), "labels": len(labels)}
    if targets is not None:
        found["targets"] = len(targets)
    if hidden.ndim != 2 or len(set(found.values())) > 1:
        raise KdlibError(
            f"hidden [T, D], labels [T] and targets must describe the same T tokens, row for row; found {found} rows and "
            f"hidden of shape {tuple(hidden.shape)}. Flatten a batch [B, T, D] first."
        )
    if not temperature > 0:
        raise KdlibError(f"The temperature must be above 0; found {temperature}.")
    if not 0 <= kd_weight <= 1 or (kd_weight > 0 and targets is None):
        raise KdlibError(
            "kd_weight must lie in 0..1 and needs teacher targets when above 0; "
            f"found {kd_weight} with {type(targets).__name__}."
        )
    if isinstance(targets, SparseTargets) and kd_weight > 0 and targets.temperature != temperature:
        raise KdlibError(
            f"The targets describe the teacher at temperature {targets.temperature}, the loss asks for {temperature}. "
            f"A sampled or truncated distribution cannot be re-tempered: write targets at {temperature}, or distil at "
            f"{targets.temperature}."
        )
    rows = (labels != IGNORED).nonzero().squeeze(-1)
    if kd_weight == 0:
        targets = None
    elif targets is not None:
        targets = targets[rows]
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 2**24) // weight.shape[0])
    scale = 1.0 / (normaliser if normaliser is not None else max(1, len(rows)))
    dtype = matmul_dtype or hidden.dtype
    loss, ce, kd = _LinearDistillation.apply(
        hidden[rows], weight, bias, labels[rows], targets, kd_weight, temperature, scale, dtype, chunk_tokens
    )
    return LossParts(loss, ce, kd if targets is not None else None, len(rows))


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, targets, kd_weight, temperature, scale, dtype, chunk_tokens):
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        w = weight.to(dtype)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=exact, device=weight.device) if wants_bias else None
        ce = torch.zeros((), dtype=exact, device=hidden.device)
        kd = torch.zeros((), dtype=exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(labels), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                h = hidden[rows].to(dtype)
                logits = torch.nn.functional.linear(h, w, None if bias is None else bias.to(dtype)).to(exact)
                grad, chunk_ce, chunk_kd = _chunk(
                    logits, labels[rows], None if targets is None else targets[rows], kd_weight, temperature
                )
                ce += chunk_ce
                kd += chunk_kd
                if wants_bias:
                    grad_bias += grad.sum(0)
                g = grad.to(dtype)
                if wants_hidden:
                    grad_hidden[rows] = (g @ w).to(hidden.dtype)
                if wants_weight:
                    # addmm_ accumulates without a second [V, D] buffer; half-precision products are added in float32.
                    if dtype == exact:
                        grad_weight.addmm_(g.T, h)
                    else:
                        grad_weight += g.T @ h
        ctx.scale = scale
        ctx.save_for_backward(
            grad_hidden,
            grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
            grad_bias if grad_bias is None else grad_bias.to(bias.dtype),
        )
        loss = ((1 - kd_weight) * ce + kd_weight * kd if targets is not None else ce) * scale
        ctx.mark_non_differentiable(ce, kd)
        return loss, ce, kd

    @staticmethod
    def backward(ctx, grad_loss, _ce, _kd):
        # once_differentiable would not do: a penalty on these gradients would pass for a constant, without an error.
        if torch.is_grad_enabled():
            raise KdlibError(
                "The fused loss has no second derivative, and create_graph=True asks for one. Take it from the dense "
                "definitions in kdlib.losses.reference."
            )
        return *(None if g is None else g * (grad_loss * ctx.scale).to(g.dtype) for g in ctx.saved_tensors), *(None,) * 7


def _chunk(
    logits: Tensor, labels: Tensor, targets, kd_weight: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the summed loss with respect to ``logits`` [C, V], and the sums of CE and KD over the chunk."""
    ones = logits.new_ones((len(labels), 1))
    if targets is None:
        log_s = torch.log_softmax(logits, dim=-1)
        ce = -log_s.gather(1, labels[:, None]).sum()
        return log_s.exp_().scatter_add_(1, labels[:, None], -ones), ce, torch.zeros_like(ce)
    # d(tau^2 KL)/dz = tau * (s - t): one tau cancels against the derivative of z / tau.
    ce_weight = 1 - kd_weight
    pull = _pull_sparse if isinstance(targets, SparseTargets) else _pull_dense
    if temperature == 1:
        # Both terms pull on the same softmax, so one pass serves both.
        log_s = torch.log_softmax(logits, dim=-1)
        ce = -log_s.gather(1, labels[:, None]).sum()
        grad, kd = pull(log_s, targets, kd_weight, temperature, ce_weight)
    else:
        grad, kd = pull(torch.log_softmax(logits / temperature, dim=-1), targets, kd_weight, temperature, 0.0)
        log_s = torch.log_softmax(logits, dim=-1)
        ce = -log_s.gather(1, labels[:, None]).sum()
        grad.add_(log_s.exp_(), alpha=ce_weight)
    return grad.scatter_add_(1, labels[:, None], -ce_weight * ones), ce, temperature**2 * kd


def _pull_sparse(
    log_s: Tensor, targets: SparseTargets, kd_weight: float, temperature: float, shared: float
) -> tuple[Tensor, Tensor]:
    """(kd_weight * tau * mass + shared) * s - kd_weight * tau * target, and sum KL; overwrites ``log_s``."""
    weights = targets.weights.to(log_s.dtype)
    # Where there is no mass the student may have none either, and 0 * -inf would be NaN.
    cross = -torch.where(weights > 0, weights * log_s.gather(1, targets.ids), 0).sum()
    mass = weights.sum(1)
    step = kd_weight * temperature
    if targets.tail is None:
        rest = None
    else:
        tail = targets.tail.to(log_s.dtype)
        # Padding repeats an id with weight 0, so membership is read off the summed weights.
        kept = torch.zeros_like(log_s).scatter_add_(1, targets.ids, weights) > 0
        rest = log_s.masked_fill(kept, -torch.inf)
        log_rest = rest.logsumexp(1)
        cross = cross - torch.where(tail > 0, tail * log_rest, 0).sum()
        mass = mass + tail
        # Within the tail the target is the student's own shape: it is only told how much mass lies there.
        rest = torch.where(tail[:, None] > 0, (rest - log_rest[:, None]).exp_() * tail[:, None], 0)
    grad = log_s.exp_().mul_((step * mass + shared)[:, None])
    grad.scatter_add_(1, targets.ids, -step * weights)
    if rest is not None:
        grad.sub_(rest, alpha=step)
    return grad, cross - targets.entropy.sum().to(cross.dtype)


def _pull_dense(
    log_s: Tensor, targets: DenseTargets, kd_weight: float, temperature: float, shared: float
) -> tuple[Tensor, Tensor]:
    """(kd_weight * tau + shared) * s - kd_weight * tau * t, and sum KL; overwrites ``log_s``."""
    teacher_logits = torch.nn.functional.linear(targets.hidden, targets.weight, targets.bias).to(log_s.dtype)
    log_t = torch.log_softmax(teacher_logits / temperature, dim=-1)
    t = log_t.exp()
    kl = torch.where(log_t.isneginf(), 0, t * (log_t - log_s)).sum()
    step = kd_weight * temperature
    return log_s.exp_().mul_(step + shared).sub_(t, alpha=step), kl
