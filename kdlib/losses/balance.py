"""Gradient balancing: keep an auxiliary loss from opposing or dominating the main one.

A balance is a function of two lists of gradients, of the main and the auxiliary loss with respect to shared parameters. It
returns the auxiliary gradients to add to the main ones. Use :func:`project` (gradient projection), or :func:`norm` with its
ratio bound by ``functools.partial``.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, distributed, nn

from kdlib.errors import KdlibError

Gradients = Sequence[Tensor]


def project(main: Gradients, auxiliary: Gradients) -> list[Tensor]:
    """Project the auxiliary gradient onto the normal plane of the main one if their dot product is negative.

    a - min(0, a·m) / (m·m) m, which is orthogonal to m if a·m < 0 and is a otherwise. To first order, a descent step along it
    cannot increase the main loss. Yu et al. 2020, "Gradient surgery for multi-task learning" (PCGrad, algorithm 1), applied to the
    auxiliary gradient only: the main one has priority and is not changed. All tensors together count as one vector.
    """
    # One dot product over all tensors: projecting tensor by tensor would also remove conflicts that cancel in the sum.
    overlap = _dot(main, auxiliary)
    share = overlap.clamp(max=0) / _positive(_dot(main, main))
    return [a - share.to(a.dtype) * m for m, a in zip(main, auxiliary, strict=True)]


def norm(main: Gradients, auxiliary: Gradients, ratio: float) -> list[Tensor]:
    """The auxiliary gradient, scaled down where needed so that its norm is at most ``ratio`` times the main one's.

    All tensors together count as one vector.

    Raises:
        KdlibError: a ratio that is not above 0.
    """
    if not ratio > 0:
        raise KdlibError(f"`ratio` of gradient norms must be above 0, got {ratio}.")
    largest = ratio * _dot(main, main).sqrt()
    scale = (largest / _positive(_dot(auxiliary, auxiliary).sqrt())).clamp(max=1)
    return [a * scale.to(a.dtype) for a in auxiliary]


def backward(
    main: Tensor,
    auxiliary: Tensor,
    parameters: Iterable[nn.Parameter],
    balance: Callable[[Gradients, Gradients], Gradients] = project,
) -> None:
    """Add the gradient of ``main`` and the balanced gradient of ``auxiliary`` to ``.grad``, instead of ``backward()``.

    Only gradients of parameters that both losses depend on are balanced. A parameter of one loss only (a projector, an
    output head) gets that gradient unchanged. With gradient accumulation, call it once per micro-batch with losses already
    divided by the tokens of the whole step; each micro-batch is balanced separately. It costs a second backward pass through
    the shared part of the graph.

    Args:
        main, auxiliary: scalar losses, the auxiliary one already weighted.
        parameters: of the student and of the auxiliary loss; frozen ones are ignored.
        balance: applied to the shared gradients.

    Raises:
        KdlibError: no parameter in common; several processes, whose gradients this would not average.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise KdlibError(
            f"Gradient balancing must run in one process, got {distributed.get_world_size()}. Train on one device, or add the auxiliary "
            "loss with a fixed weight."
        )
    parameters = [one for one in parameters if one.requires_grad]
    of_main, of_auxiliary = [], []
    if parameters and main.requires_grad and auxiliary.requires_grad:
        # Two passes, because one would add the gradients where the graphs meet. The first keeps the shared graph for the second.
        of_main = torch.autograd.grad(main, parameters, retain_graph=True, allow_unused=True)
        of_auxiliary = list(torch.autograd.grad(auxiliary, parameters, allow_unused=True))
    shared = [i for i, (m, a) in enumerate(zip(of_main, of_auxiliary, strict=True)) if m is not None and a is not None]
    if not shared:
        raise KdlibError(
            f"Both losses must depend on a common trainable parameter, got none among {len(parameters)}. Pass the student's "
            "parameters, and losses computed with gradients."
        )
    balanced = balance([of_main[i] for i in shared], [of_auxiliary[i] for i in shared])
    for i, gradient in zip(shared, balanced, strict=True):
        of_auxiliary[i] = gradient
    for parameter, *gradients in zip(parameters, of_main, of_auxiliary, strict=True):
        found = [gradient for gradient in (parameter.grad, *gradients) if gradient is not None]
        if found:
            # Sum instead of adding in place: autograd may return one tensor for several parameters.
            parameter.grad = sum(found)


def _dot(left: Gradients, right: Gradients) -> Tensor:
    # A float32 sum over a hundred million products could lose the sign of a small overlap.
    return torch.stack([(l * r).sum(dtype=torch.float64) for l, r in zip(left, right, strict=True)]).sum()


def _positive(value: Tensor) -> Tensor:
    return value.clamp(min=torch.finfo(value.dtype).tiny)
