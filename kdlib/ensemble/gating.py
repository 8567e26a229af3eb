"""Train a gate: weights of members, from the prefix alone, that bring their probability pool near the teacher's cached targets.

The loss of a token is KL(t || p̄) over the outcomes that its targets list, and only needs the pool's probability of these:
Σ_k w_k p_k(v). So each member runs once over some rows of the train split, what it gives the listed ids is kept, and the gate is
trained on that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kdlib import models
from kdlib.cache import TargetCache
from kdlib.data import corpus
from kdlib.ensemble.pooling import log_probs
from kdlib.ensemble.routing import GateRouter
from kdlib.errors import KdlibError
from kdlib.losses import SparseTargets
from kdlib.losses.logits import head_logits

CHUNK = 2**22  # logits of a member held at once
ROWS = 8  # of block_length tokens in one forward pass
BATCH = 256  # tokens in one step of the gate
SMALLEST = 1e-12  # mass that a member leaves to ids that are not listed, where rounding says none


@dataclass(frozen=True)
class Examples:
    """Tokens that a gate is trained on.

    Attributes:
        features: [n, 2D], of :meth:`GateRouter.features`.
        mass: [n, M] target mass of the outcomes, the ids listed and, where the targets have a tail, any other id.
        members: [n, K, M] each member's log-probabilities of these outcomes.
        entropy: [n] of the targets, nats.
    """

    features: Tensor
    mass: Tensor
    members: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return len(self.features)


@torch.no_grad()
def examples(
    gate: GateRouter,
    members: Sequence[nn.Module],
    cache: TargetCache,
    split: corpus.Split,
    index: np.ndarray,
    autocast: torch.dtype | None = None,
) -> Examples:
    """One pass of every member over packed rows ``index`` [rows, block_length] of ``split``, the split of the cache.

    Raises:
        KdlibError: dense targets, which list nothing, or those of another temperature than 1.
    """
    if cache.head is not None:
        raise KdlibError("Targets that train a gate must be of kind sampled, topk or topk_sampled, got dense. Draw some from the dense ones.")
    if cache.temperature != 1:
        raise KdlibError(f"Targets that train a gate must have temperature 1, that of the pool, got {cache.temperature}. Write others.")
    device, parts = next(members[0].parameters()).device, []
    for start in range(0, len(index), ROWS):
        at = index[start : start + ROWS]
        batch = {name: torch.from_numpy(values).to(device) for name, values in corpus.rows(split, at).items()}
        used = batch["segments"] >= 0
        targets = cache.read(at[at >= 0]).to(device)
        features = gate.to(device).features(batch["input_ids"], position_ids=batch["position_ids"])[used]
        found = [_listed(member, batch, used, targets, autocast) for member in members]
        mass = targets.weights if targets.tail is None else torch.cat([targets.weights, targets.tail[:, None]], dim=1)
        parts.append((features, mass, torch.stack(found, dim=1), targets.entropy))
    most = max(mass.shape[1] for _, mass, _, _ in parts)
    # Outcomes without mass take no part, so that rows of several batches can have one length.
    return Examples(
        *(torch.cat([_widened(part[field], most if field in (1, 2) else None) for part in parts]).cpu() for field in range(4))
    )


def train(gate: GateRouter, found: Examples, epochs: int = 4, learning_rate: float = 3e-3, seed: int = 0) -> list[float]:
    """Train the gate in place with Adam; the mean loss, KL in nats a token, before and after each epoch.

    Args:
        seed: of the order of the tokens.
    """
    gate.to(found.features.device).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*gate.hidden.parameters(), *gate.output.parameters()], lr=learning_rate)
    history = [_mean_loss(gate, found)]
    for _ in range(epochs):
        for part in torch.randperm(len(found), generator=generator).split(BATCH):
            optimizer.zero_grad()
            _losses(gate, found, part).mean().backward()
            optimizer.step()
        history.append(_mean_loss(gate, found))
    gate.eval()
    return history


def rows_within(budget: float, members: Sequence[nn.Module], gate: GateRouter, block_length: int, epochs: int) -> int:
    """Rows of block_length tokens that members can read and a gate be trained on within ``budget`` operations."""
    tokens, pairs = models.extent([block_length])
    row = sum(models.operations(member).forward(tokens, pairs) for member in members) + _gate_flops(gate, tokens, epochs)
    return int(budget // row)


def flops(members: Sequence[nn.Module], gate: GateRouter, index: np.ndarray, epochs: int) -> int:
    """Operations of :func:`examples` and :func:`train` on packed rows ``index``."""
    tokens, pairs = models.extent(models.window_lengths(index))
    return sum(models.operations(member).forward(tokens, pairs) for member in members) + _gate_flops(gate, tokens, epochs)


def _gate_flops(gate: GateRouter, tokens: int, epochs: int) -> int:
    # A step takes three products of each matrix; the loss before and after each epoch takes one.
    return tokens * gate.flops_per_token() * (3 * epochs + epochs + 1)


def _losses(gate: GateRouter, found: Examples, part: Tensor) -> Tensor:
    """KL(t || pool) of some tokens, nats; for drawn targets its unbiased estimate."""
    weights = torch.log_softmax(gate.logits(found.features[part]), dim=-1)
    pooled = torch.logsumexp(weights[..., None] + found.members[part], dim=1)
    return -(found.mass[part] * pooled).sum(dim=-1) - found.entropy[part]


@torch.no_grad()
def _mean_loss(gate: GateRouter, found: Examples) -> float:
    parts = torch.arange(len(found)).split(2**14)
    return sum(_losses(gate, found, part).sum().item() for part in parts) / len(found)


def _listed(member: nn.Module, batch: dict[str, Tensor], used: Tensor, targets: SparseTargets, autocast: torch.dtype | None) -> Tensor:
    """Log-probabilities [n, M] that a member gives the ids listed, and to all others together where the targets have a tail."""
    parameter = next(member.parameters())
    with torch.autocast(parameter.device.type, autocast, enabled=autocast is not None):
        mask = models.attention_mask(batch["segments"], autocast or parameter.dtype)
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
        hidden = models.body(member)(**inputs, use_cache=False).last_hidden_state[used]
    hidden, (weight, bias) = hidden.to(autocast or parameter.dtype), models.head(member)
    size, found = max(1, CHUNK // len(weight)), []
    for ids, part in zip(targets.ids.split(size), hidden.split(size), strict=True):
        listed = log_probs(head_logits(part, weight.to(part.dtype), bias)).gather(1, ids)
        if targets.tail is not None:
            rest = (1 - listed.exp().sum(dim=1, keepdim=True)).clamp(min=SMALLEST)
            listed = torch.cat([listed, rest.log()], dim=1)
        found.append(listed)
    return torch.cat(found)


def _widened(values: Tensor, width: int | None) -> Tensor:
    return values if width is None else nn.functional.pad(values, (0, width - values.shape[-1]))
