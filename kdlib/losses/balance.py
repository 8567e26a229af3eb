"""Gradient-aware weighting: an auxiliary loss may help the main one, and never fights or drowns it.

A balance is a function of two lists of gradients, of the main and of the auxiliary loss with respect to the parameters
they share, that returns the auxiliary gradients to add to the main ones: :func:`project`, or :func:`norm` with its ratio
bound by ``functools.partial``.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, distributed, nn

from kdlib.errors import KdlibError

Gradients = Sequence[Tensor]


def project(main: Gradients, auxiliary: Gradients) -> list[Tensor]:
    """The auxiliary gradient without its component against the main one, where their dot product is negative.

    Yu et al. 2020, "Gradient surgery for multi-task learning" (PCGrad, algorithm 1), for the auxiliary gradient alone: the
    main one has priority and stays as it is. All tensors together count as one vector.
    """
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
        raise KdlibError(f"The ratio of gradient norms must be above 0; found {ratio}.")
    largest = ratio * _dot(main, main).sqrt()
    scale = (largest / _positive(_dot(auxiliary, auxiliary).sqrt())).clamp(max=1)
    return [a * scale.to(a.dtype) for a in auxiliary]


def backward(
    main: Tensor,
    auxiliary: Tensor,
    parameters: Iterable[nn.Parameter],
    balance: Callable[[Gradients, Gradients], Gradients] = project,
) -> None:
    """Add the gradient of ``main`` plus the balanced gradient of ``auxiliary`` to ``.grad``, in place of ``backward()``.

    Balanced are the parameters that both losses reach. One that a single loss reaches (a projector, an output head) takes
    that gradient as it is. With gradient accumulation call it once per micro-batch, with losses already divided by the
    tokens of the whole step: each micro-batch is balanced by itself. It costs a second backward pass through what the
    losses share.

    Args:
        main, auxiliary: scalar losses, the auxiliary one already weighted.
        parameters: of the student and of the auxiliary loss; frozen ones are left alone.
        balance: what to do with the shared gradients.

    Raises:
        KdlibError: no parameter in common; several processes, whose gradients this would not average.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise KdlibError(
            f"Balanced gradients are written by one process; found {distributed.get_world_size()}, whose gradients would "
            "never be averaged. Train on one device, or add the auxiliary loss with a fixed weight."
        )
    parameters = [one for one in parameters if one.requires_grad]
    of_main, of_auxiliary = [], []
    if parameters and main.requires_grad and auxiliary.requires_grad:
        of_main = torch.autograd.grad(main, parameters, retain_graph=True, allow_unused=True)
        of_auxiliary = list(torch.autograd.grad(auxiliary, parameters, allow_unused=True))
    shared = [i for i, (m, a) in enumerate(zip(of_main, of_auxiliary, strict=True)) if m is not None and a is not None]
    if not shared:
        raise KdlibError(
            "Balancing needs two losses that reach a common parameter which is not frozen; found none among "
            f"{len(parameters)} trainable ones. Pass the student's parameters, and losses computed with gradients on."
        )
    balanced = balance([of_main[i] for i in shared], [of_auxiliary[i] for i in shared])
    for i, gradient in zip(shared, balanced, strict=True):
        of_auxiliary[i] = gradient
    for parameter, *gradients in zip(parameters, of_main, of_auxiliary, strict=True):
        found = [gradient for gradient in (parameter.grad, *gradients) if gradient is not None]
        if found:
            # A sum is a new tensor; autograd may hand out one tensor for several parameters.
            parameter.grad = sum(found)


def _dot(left: Gradients, right: Gradients) -> Tensor:
    # A float32 sum over a hundred million products could lose the sign of a small overlap.
    return torch.stack([(l * r).sum(dtype=torch.float64) for l, r in zip(left, right, strict=True)]).sum()


def _positive(value: Tensor) -> Tensor:
    return value.clamp(min=torch.finfo(value.dtype).tiny)
