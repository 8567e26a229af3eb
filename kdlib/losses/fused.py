"""Output layer and loss fused, chunk by chunk: [tokens, V] never exists, and gradients are computed in the forward pass.

The loss is a sum over tokens, and its gradient with respect to the logits z = h W^T has a closed form, G = dL/dz. So for each
chunk of tokens, the forward pass

1. computes the logits [C, V] into a buffer,
2. overwrites them by G in place (:func:`forward_kl_`, or :func:`_by_autograd` for other divergences),
3. multiplies G by W for the gradient of the hidden states, [C, D], and adds G^T h to that of W, [V, D],

and reuses the buffer for the next chunk. The loss is a scalar, so by the chain rule the backward pass only multiplies these
stored gradients by the incoming one. The fused linear layer and cross-entropy follow Liger-Kernel (Hsu et al. 2024,
arXiv 2410.10989) and Wijmans et al. 2024 (arXiv 2411.09009); this module adds sparse and dense teacher targets, on any device.
"""

from functools import cache, partial
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from kdlib.errors import KdlibError
from kdlib.losses.divergences import DIVERGENCES, divergence_loss
from kdlib.losses.logits import Head
from kdlib.losses.reference import IGNORED
from kdlib.losses.targets import DenseTargets, PooledTargets, SparseTargets

# Logits in memory at a time. On a CPU, a chunk that fits the last-level cache is fastest. On a GPU, larger chunks would use
# the memory that chunking is meant to save.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**23}


class LossParts(NamedTuple):
    """A loss and its terms.

    Attributes:
        loss: scalar to call backward on, already divided by the normaliser.
        ce: sum over tokens of -log s(label), each times the token's weight if it has one, nats, detached.
        kd: sum over tokens of tau^2 * KL(t || s), weighted likewise, nats, detached; None without targets.
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
    targets: SparseTargets | DenseTargets | PooledTargets | None = None,
    kd_weight: float = 0.0,
    temperature: float = 1.0,
    normaliser: float | Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
    compiled: bool = False,
    divergence: str = "forward_kl",
    options: dict | None = None,
    token_weights: Tensor | None = None,
) -> LossParts:
    """w * tau^2 * KL(t || s) + (1 - w) * CE, s = softmax(hidden @ weight.T + bias), summed over tokens / normaliser.

    Another ``divergence`` replaces tau^2 * KL(t || s). Forward KL has an analytic gradient here; the others are differentiated
    by autograd, one chunk at a time.

    Args:
        hidden: [T, D], any floating dtype.
        weight: [V, D]; bias: [V] or None.
        labels: [T] int64, -100 where nothing is predicted; these tokens have a gradient of exactly zero.
        targets: rows aligned with ``labels``; None for cross-entropy alone.
        kd_weight: w, weight of the KD term.
        temperature: tau; must equal the temperature of sparse targets.
        normaliser: tokens of the whole optimisation step, so that gradient accumulation over batches of unequal size
            changes nothing; default the number of tokens here.
        matmul_dtype: dtype of the matrix products (autocast's); softmax and sums are float32, or float64 for float64
            input.
        chunk_tokens: tokens whose logits exist at a time; default a size that suits the device.
        compiled: whether the softmax of a chunk is compiled; it is faster and equal to rounding.
        divergence, options: name and further arguments of one of :data:`kdlib.losses.divergences.DIVERGENCES`.
        token_weights: [T], finite, 0 or more: a token's whole loss, CE and KD, is multiplied by its weight. The normaliser
            stays a number of tokens, so weights of mean 1 leave the size of the loss as it was. They get no gradient.

    Raises:
        KdlibError: sparse targets of another temperature or that do not support the divergence, a weight outside 0..1, a
            weight without targets, an unknown divergence or option, invalid token weights, or any token weights with a
            divergence on groups of tokens, where a token's loss depends on the others in its group.
    """
    require_same_rows(hidden, labels, targets, token_weights)
    tokens, chosen = choose(labels, targets, kd_weight, temperature, token_weights, divergence)
    targets = chosen.targets
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 2**24) // weight.shape[0])
    scale = 1.0 / (normaliser if normaliser is not None else max(1, tokens))
    dtype = matmul_dtype or hidden.dtype
    options, defaults = options or {}, _defaults(divergence)
    if not options.keys() <= defaults.keys():
        raise KdlibError(
            f"`options` of {divergence} must be among {', '.join(defaults) or 'none'}, got {', '.join(options)}."
        )
    if divergence == "forward_kl" or targets is None:
        term = partial(forward_kl_, temperature=temperature, softmax_=softmax_of(compiled))
    else:
        # Chunks are whole groups, for losses on groups of tokens.
        group = max(1, int((defaults | options).get("group", 1)))
        chunk_tokens = max(group, chunk_tokens // group * group)
        term = partial(_by_autograd, temperature=temperature, divergence=divergence, options=options)
    if not torch.is_grad_enabled():
        # Otherwise parameters would still request their gradients, a third matrix product of the size of the logits.
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    loss, ce, kd = _LinearDistillation.apply(hidden, weight, bias, *chosen, kd_weight, scale, dtype, chunk_tokens, term)
    return LossParts(loss, ce, kd if targets is not None else None, tokens)


def require_same_rows(hidden: Tensor, labels: Tensor, targets, token_weights: Tensor | None) -> None:
    """Refuse hidden states that are not [T, D], or that another number of labels, targets or weights goes with."""
    found = {"hidden": len(hidden), "labels": len(labels)}
    if targets is not None:
        found["targets"] = len(targets)
    if token_weights is not None:
        found["token_weights"] = len(token_weights)
    if hidden.ndim != 2 or len(set(found.values())) > 1:
        raise KdlibError(
            f"`hidden` [T, D], `labels`, `targets` and `token_weights` must have the same rows, got "
            f"{found} and hidden of shape {tuple(hidden.shape)}. Flatten a batch [B, T, D] first."
        )


class Chosen(NamedTuple):
    """The tokens that a loss sums over: their ``rows``, ``labels``, ``targets`` and ``weights``, the last two None if there are none."""

    rows: Tensor
    labels: Tensor
    targets: SparseTargets | DenseTargets | PooledTargets | None
    weights: Tensor | None


def choose(labels, targets, kd_weight: float, temperature: float, token_weights, divergence: str = "forward_kl") -> tuple[int, Chosen]:
    """How many tokens have a label, and those that a loss is computed of; arguments as of :func:`linear_distillation_loss`."""
    if not temperature > 0:
        raise KdlibError(f"`temperature` must be above 0, got {temperature}.")
    if not 0 <= kd_weight <= 1 or (kd_weight > 0 and targets is None):
        raise KdlibError(
            "`kd_weight` must be in 0..1, and 0 without teacher targets, "
            f"got {kd_weight} with {type(targets).__name__}."
        )
    if isinstance(targets, SparseTargets) and kd_weight > 0 and targets.temperature != temperature:
        raise KdlibError(
            f"`temperature` must be that of the sparse targets, {targets.temperature}, got {temperature}. Write targets at "
            f"{temperature}, or use {targets.temperature}."
        )
    rows = (labels != IGNORED).nonzero().squeeze(-1)
    tokens = len(rows)
    if token_weights is not None:
        _check_token_weights(token_weights, divergence)
        # Tokens of weight 0 need not be computed, and 0 * inf would be NaN.
        rows = rows[token_weights[rows] > 0]
        token_weights = token_weights[rows]
    targets = None if kd_weight == 0 or targets is None else targets[rows]
    return tokens, Chosen(rows, labels[rows], targets, token_weights)


def _check_token_weights(token_weights: Tensor, divergence: str) -> None:
    if "group" in _defaults(divergence):
        raise KdlibError(
            f"`token_weights` must be None with {divergence}, which compares the tokens of a group. Leave them out, or choose another "
            "divergence."
        )
    if token_weights.ndim != 1 or not ((token_weights >= 0) & token_weights.isfinite()).all():
        raise KdlibError(
            "`token_weights` must be [T], finite and 0 or more, got shape "
            f"{tuple(token_weights.shape)} and values {token_weights.min()} to {token_weights.max()}."
        )


@cache
def _defaults(divergence: str) -> dict[str, float]:
    """The options of a divergence: its arguments after student, teacher and temperature."""
    if divergence not in DIVERGENCES:
        raise KdlibError(f"`divergence` must be one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
    return {name: one.default for name, one in [*signature(DIVERGENCES[divergence]).parameters.items()][3:]}


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, tokens, labels, targets, token_weights, kd_weight, scale, dtype, chunk_tokens, term
    ):
        # `tokens` are the rows of hidden that have a label. They are selected here rather than by the caller, where autograd
        # would scatter the gradient back with atomic additions.
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = Head(hidden, weight, bias, ctx.needs_input_grad[:3], dtype)
        ce = torch.zeros((), dtype=exact, device=hidden.device)
        kd = torch.zeros((), dtype=exact, device=hidden.device)
        # One buffer for all chunks: allocating fresh pages for each would cost as much as the exponentials. `exact` is the dtype
        # of softmax and sums, `dtype` that of the matrix products, so logits and gradient exist in both if they differ.
        size = (min(chunk_tokens, len(labels)), len(weight))
        exact_buffer = torch.empty(size, dtype=exact, device=hidden.device)
        low_buffer = exact_buffer if dtype == exact else torch.empty(size, dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(labels), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                found = labels[rows, None]
                low = low_buffer[: len(found)]
                logits = head.logits(tokens[rows], exact_buffer[: len(found)], low)
                part = None if targets is None else targets[rows]
                # From here on grad = dL/dz of this chunk, in the memory of its logits, without `scale`, which backward applies.
                grad, chunk_ce, chunk_kd = term(logits, found, part, kd_weight)
                if token_weights is not None:
                    each = token_weights[rows].to(exact)
                    grad.mul_(each[:, None])
                    chunk_ce, chunk_kd = chunk_ce * each, chunk_kd * each
                ce += chunk_ce.sum()
                kd += chunk_kd.sum()
                head.add(grad, low)
        ctx.scale = scale
        ctx.save_for_backward(*head.gradients())
        loss = ((1 - kd_weight) * ce + kd_weight * kd if targets is not None else ce) * scale
        ctx.mark_non_differentiable(ce, kd)
        return loss, ce, kd

    @staticmethod
    def backward(ctx, grad_loss, _ce, _kd):
        # None for the other 9 arguments.
        return *stored_gradients(ctx, grad_loss), *(None,) * 9


def stored_gradients(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that a fused loss stored when it was computed.

    Raises:
        KdlibError: gradients of these are asked for.
    """
    # Not once_differentiable: a penalty on these gradients would then be treated as a constant, without an error.
    if torch.is_grad_enabled():
        raise KdlibError(
            "`create_graph` must be False for the fused loss, which has no second derivative. Use the dense definitions in "
            "kdlib.losses.reference."
        )
    # L = scale * sum of token losses, so dL/dx = grad_loss * scale * (the stored sum).
    return tuple(None if g is None else g * (grad_loss * ctx.scale).to(g.dtype) for g in ctx.saved_tensors)


def _softmax_(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite ``logits`` [C, V] by scale [C, 1] * softmax(logits).

    Returns the two parts of the normaliser, [C, 1] each: log softmax(logits) = (logits - largest) - log_sum. Their sum would
    lose digits.
    """
    # A row of only -inf has no distribution; it becomes zeros.
    largest = logits.amax(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    logits.sub_(largest).exp_()
    total = logits.sum(1, keepdim=True).clamp(min=1)
    logits.mul_(scale / total)
    return largest, total.log()


@cache
def _compiled_softmax_():
    # One pass over each row while it lies in the innermost cache, instead of five over the chunk.
    return torch.compile(_softmax_, dynamic=True)


def softmax_of(compiled: bool):
    """What overwrites logits by their softmax, as the functions below take it."""
    return _compiled_softmax_() if compiled else _softmax_


def forward_kl_(
    logits: Tensor, label: Tensor, targets, kd_weight: float, temperature: float, softmax_
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite ``logits`` [C, V] by the gradient of each token's loss, and return it with each token's CE and KD [C].

    With s = softmax(z) and s_tau = softmax(z / tau): d CE / dz = s - onehot(label), d (tau^2 KL) / dz = tau * (s_tau - t).

    Args:
        label: [C, 1].
    """
    if targets is None:
        return *cross_entropy_(logits, label, 1.0, softmax_), logits.new_zeros(len(logits))
    # tau, not tau^2: the derivative of z / tau cancels one factor.
    step, ce_weight = kd_weight * temperature, 1 - kd_weight
    if temperature == 1:
        # Both terms contain the same softmax: w (s - t) + (1 - w) (s - onehot) = s - w t - (1 - w) onehot, one pass.
        log_s, kd = pull_(logits, label, targets, temperature, step, ce_weight, softmax_)
        return logits.scatter_add_(1, label, logits.new_full(label.shape, -ce_weight)), -log_s, kd
    tempered = logits / temperature
    grad, ce = cross_entropy_(logits, label, ce_weight, softmax_)
    _, kd = pull_(tempered, label, targets, temperature, step, 0.0, softmax_)
    return grad.add_(tempered), ce, temperature**2 * kd


def _by_autograd(
    logits: Tensor, label: Tensor, targets, kd_weight: float, temperature: float, divergence: str, options: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`forward_kl_`, for any divergence."""
    if isinstance(targets, DenseTargets | PooledTargets):
        targets = targets.logits()
    leaf = logits.clone().requires_grad_()
    with torch.enable_grad():
        kd = divergence_loss(divergence, leaf, targets, temperature, **options)
        (pull,) = torch.autograd.grad(kd.sum(), leaf)
    grad, ce = cross_entropy_(logits, label, 1 - kd_weight, _softmax_)
    return grad.add_(pull, alpha=kd_weight), ce, kd.detach()


def cross_entropy_(logits: Tensor, label: Tensor, weight: float, softmax_) -> tuple[Tensor, Tensor]:
    """Overwrite ``logits`` by weight * (s - onehot(label)); returns it and the cross-entropy [C]."""
    picked = logits.gather(1, label)
    largest, log_sum = softmax_(logits, logits.new_full(label.shape, weight))
    ce = -(picked - largest - log_sum).squeeze(1)
    return logits.scatter_add_(1, label, logits.new_full(label.shape, -weight)), ce


def pull_(
    logits: Tensor, label: Tensor, targets, temperature: float, step: float, shared: float, softmax_
) -> tuple[Tensor, Tensor]:
    """Overwrite ``logits``, already divided by the temperature, by (step + shared) * s - step * t; returns log s(label) and the KL, [C]."""
    pull = _pull_sparse if isinstance(targets, SparseTargets) else _pull_dense
    return pull(logits, label, targets, temperature, step, shared, softmax_)


def _pull_sparse(
    logits: Tensor, label: Tensor, targets: SparseTargets, temperature: float, step: float, shared: float, softmax_
) -> tuple[Tensor, Tensor]:
    """Overwrite ``logits`` (already divided by the temperature) by (step * mass + shared) * s - step * target.

    mass is the sum of the target's weights: 1 for a distribution, but only 1 in expectation for importance-weighted draws.
    -sum_i t_i log s_i then has the gradient mass * s - t.

    Returns log s at the labels [C], and the KL [C].
    """
    weights = targets.weights.to(logits.dtype)
    mass = weights.sum(1, keepdim=True)
    picked = logits.gather(1, torch.cat([label, targets.ids], 1))
    if targets.tail is not None:
        tail = targets.tail.to(logits.dtype)[:, None]
        mass = mass + tail
        # -inf at the listed ids. amin, because padding may repeat an id with weight 0, and +inf changes nothing.
        without = torch.where(weights > 0, -torch.inf, torch.inf).to(logits.dtype)
        rest = logits.scatter_reduce(1, targets.ids, without, "amin")
        # The tail is one outcome with the probability sum of s over the other ids. The gradient of its log is s restricted to
        # these ids and normalised, minus s: the target within the tail is the student's own distribution, scaled to `tail`.
        rest_largest, rest_log_sum = softmax_(rest, step * tail)
    largest, log_sum = softmax_(logits, step * mass + shared)
    log_s = picked - largest - log_sum
    # Where the target has no mass the student may have none either, and 0 * -inf would be NaN.
    kl = -torch.where(weights > 0, weights * log_s[:, 1:], 0).sum(1) - targets.entropy.to(logits.dtype)
    logits.scatter_add_(1, targets.ids, -step * weights)
    if targets.tail is not None:
        log_rest = (rest_largest - largest) + (rest_log_sum - log_sum)
        kl = kl - torch.where(tail > 0, tail * log_rest, 0).squeeze(1)
        logits.sub_(rest)
    return log_s[:, 0], kl


def _pull_dense(
    logits: Tensor, label: Tensor, targets: DenseTargets | PooledTargets, temperature: float, step: float, shared: float, softmax_
) -> tuple[Tensor, Tensor]:
    """As :func:`_pull_sparse`, for a target that is the whole distribution t: (step + shared) * s - step * t."""
    log_t = torch.log_softmax(targets.logits().to(logits.dtype) / temperature, dim=-1)
    log_s = torch.log_softmax(logits, dim=-1)
    picked = log_s.gather(1, label).squeeze(1)
    t = log_t.exp()
    kl = torch.where(log_t.isneginf(), 0, t * (log_t - log_s)).sum(1)
    torch.exp(log_s, out=logits).mul_(step + shared).sub_(t, alpha=step)
    return picked, kl
