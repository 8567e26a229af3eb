"""What a student is pulled towards at each token: a sparse or a dense teacher distribution."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from kdlib.losses.logits import Streamed, head_logits


@dataclass(frozen=True)
class SparseTargets:
    """Target mass on a few ids per token, and optionally on "any other id" as one further outcome.

    Unbiased draws (Anshumann et al. 2025, arXiv 2503.16870) have weights count/N and no tail. The k largest
    probabilities have their own values as weights and the exact left-over mass as tail. The loss does not care which.

    Attributes:
        ids: [T, M] int64, distinct within a row except where the weight is 0.
        weights: [T, M] float32, 0 at padding.
        tail: [T] float32 mass of all ids not listed, or None.
        entropy: [T] float32, nats: subtracted from the cross-entropy to the target so that the value reported estimates
            a KL. It has no gradient. For draws it is the entropy of the distribution drawn from, which makes the
            estimate unbiased.
        temperature: temperature of the distribution the weights describe.
    """

    ids: Tensor
    weights: Tensor
    tail: Tensor | None
    entropy: Tensor
    temperature: float

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows) -> "SparseTargets":
        tail = None if self.tail is None else self.tail[rows]
        return SparseTargets(self.ids[rows], self.weights[rows], tail, self.entropy[rows], self.temperature)

    def to(self, device: torch.device) -> "SparseTargets":
        """The same targets on ``device``."""
        tail = None if self.tail is None else self.tail.to(device)
        ids, weights, entropy = self.ids.to(device), self.weights.to(device), self.entropy.to(device)
        return SparseTargets(ids, weights, tail, entropy, self.temperature)


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's whole distribution, as what its output layer reads, so that its logits exist only chunk by chunk.

    Attributes:
        hidden: [T, D_T], the teacher's last hidden states (after the final norm), without gradient.
        weight: [V, D_T], the teacher's output layer.
        bias: [V] or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows) -> "DenseTargets":
        return DenseTargets(self.hidden[rows], self.weight, self.bias)

    def logits(self) -> Tensor:
        """The teacher's logits [T, V], see :func:`kdlib.losses.logits.head_logits`."""
        return head_logits(self.hidden, self.weight, self.bias)

    def to(self, device: torch.device) -> "DenseTargets":
        """The same targets on ``device``."""
        return DenseTargets(*(None if x is None else x.to(device) for x in (self.hidden, self.weight, self.bias)))


@dataclass(frozen=True)
class PooledTargets:
    """The distribution of an ensemble: its members' whole distributions, pooled chunk by chunk, and member by member.

    Attributes:
        members: whole distributions [T] of each member.
        pool: log-probabilities [T, V] of each member, streamed -> those of the pool [T, V]; see :mod:`kdlib.ensemble.pooling`.
        temperature: of the pool itself, fitted after pooling; 1 for none.
    """

    members: tuple[DenseTargets, ...]
    pool: Callable[[Streamed], Tensor]
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.members[0])

    def __getitem__(self, rows) -> "PooledTargets":
        return PooledTargets(tuple(one[rows] for one in self.members), self.pool, self.temperature)

    def logits(self) -> Tensor:
        """The pool's log-probabilities [T, V], which are logits of it, in float32 (float64 for float64 members).

        One member's logits exist at a time, beside the pool of those before it.
        """
        found = self.pool(Streamed(self.members, _log_probs))
        return found if self.temperature == 1 else found / self.temperature

    def to(self, device: torch.device) -> "PooledTargets":
        """The same targets on ``device``."""
        return PooledTargets(tuple(one.to(device) for one in self.members), self.pool, self.temperature)


def _log_probs(member: DenseTargets) -> Tensor:
    return log_softmax(member.logits().to(torch.promote_types(member.hidden.dtype, torch.float32)), dim=-1)
