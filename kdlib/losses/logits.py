"""Logits in float32, of student and teacher alike, where the device can without rounding them to half precision first.

:class:`Head` computes them chunk by chunk, and sums up the gradients of what they were made from; :class:`Streamed` holds those of
one member of a pool at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streamed:
    """Values of several members, of which one member's exist at a time: what a pool takes in place of a tensor [K, ...].

    Attributes:
        members: what each is computed from, K of them.
        compute: that -> its values, when its turn comes. A pool goes through them once.
    """

    members: Sequence[Any]
    compute: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.compute, self.members)

    def then(self, function: Callable[[Tensor], Tensor]) -> "Streamed":
        """``function`` of these values, streamed as well."""
        return Streamed(self.members, lambda member: function(self.compute(member)))


@torch.no_grad()
def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None, low: Tensor | None = None
) -> Tensor:
    """hidden @ weight.T + bias, [T, V], in float32 (float64 for float64 factors).

    Half-precision factors are summed in float32. CUDA returns the sums as they are. A CPU's product rounds them to the
    factors' dtype first: a bfloat16 logit of 16 to 32 can be off by 1/16, and its probability by 6 %.

    Args:
        hidden: [T, D]; weight: [V, D] of the same dtype; bias: [V] of any, or None.
        out, low: [T, V] buffers to write to: the result's, in float32 or wider, and one of the factors' dtype in between.
    """
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if out is None:
        out = torch.empty(len(hidden), len(weight), dtype=exact, device=hidden.device)
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda and out.dtype == torch.float32:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(hidden, weight.T, out=low))
    return out if bias is None else out.add_(bias)


class Head:
    """Logits of chunks of tokens, hidden @ weight.T + bias, and the gradients of these three, summed over chunks.

    Args:
        hidden: [T, D]; weight: [V, D]; bias: [V] or None.
        wanted: whether each of the three has a gradient.
        dtype: of the matrix products.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool], dtype: torch.dtype):
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.hidden, self.weight, self.bias = hidden, weight.to(dtype), bias
        self._dtypes = [None if one is None else one.dtype for one in (hidden, weight, bias)]
        self.grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if wanted[1] else None
        self.grad_bias = torch.zeros(bias.shape, dtype=exact, device=weight.device) if wanted[2] else None

    def logits(self, rows: Tensor, out: Tensor, low: Tensor) -> Tensor:
        """Logits of the tokens ``rows``, in ``out``; ``low`` as of :func:`head_logits`."""
        self._rows, self._chunk = rows, self.hidden[rows].to(self.weight.dtype)
        return head_logits(self._chunk, self.weight, self.bias, out, low)

    def add(self, grad: Tensor, low: Tensor) -> None:
        """Take in the loss's gradient with respect to the logits last given; overwrites ``low`` if it is of another dtype."""
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0)
        g = grad if grad.dtype == self.weight.dtype else low.copy_(grad)
        if self.grad_hidden is not None:
            self.grad_hidden[self._rows] = (g @ self.weight).to(self.hidden.dtype)
        if self.grad_weight is not None:
            # addmm_ accumulates without a second [V, D] buffer; half-precision products are added in float32.
            if g is grad:
                self.grad_weight.addmm_(g.T, self._chunk)
            else:
                self.grad_weight += g.T @ self._chunk

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of hidden states, weight and bias, each of its dtype; None where none was wanted."""
        found = (self.grad_hidden, self.grad_weight, self.grad_bias)
        return tuple(None if one is None else one.to(dtype) for one, dtype in zip(found, self._dtypes, strict=True))
