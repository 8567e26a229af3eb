"""Logits in float32, of student and teacher alike, where the device can without rounding them to half precision first."""

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
