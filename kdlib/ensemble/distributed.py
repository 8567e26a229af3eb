"""An ensemble whose members are spread over processes: each holds a share of them, and one all-reduce a forward pass pools all.

What is added up over processes is what a pool adds up over members: Σ_k w_k p_k^r, or Σ_k w_k log p_k for the geometric pool. It is
added in float64, so that a probability of e^−700 is still there, and that the order of members matters little.

One process with several devices needs none of this. Members lie where they are put, and each computes there:
``EnsembleForCausalLM.from_members`` of models on several devices, or ``from_pretrained`` with a ``device_map`` such as
``{"members.0": 0, "members.1": 1}``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from kdlib import models
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.ensemble.pooling import Members, running
from kdlib.errors import KdlibError
from kdlib.models.loading import outline, safetensors_of, with_tensors

EXPONENTS = {"probability": 1.0, "logit": 0.0}


def load(
    source: str | Path | Sequence[str | Path],
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **how: Any,
) -> "SharedEnsemble":
    """This process's share of an ensemble: it gives the logits of all members, and generates, in all processes together.

    Called in every process of a group, as ``torchrun`` starts them. Member k is loaded by process k modulo their number, and by no
    other. Every process must call the ensemble with the same text; to draw the same tokens, they need the same seed.

    Args:
        source: folder of a saved ensemble, or folders of its members (see :func:`kdlib.models.load`).
        group: processes, None for all. device, dtype: of the share.
        how: for folders of members, further arguments of :meth:`EnsembleForCausalLM.from_members`.

    Raises:
        KdlibError: no process group, more processes than members, or nothing loadable there.
    """
    if not dist.is_initialized():
        raise KdlibError("A process group must exist to share an ensemble, got none. Call torch.distributed.init_process_group first.")
    if isinstance(source, str | Path):
        if how:
            raise KdlibError(f"A saved ensemble has its own settings, got also {', '.join(how)}. Leave these out, or give its members' folders.")
        ensemble, member = outline(source, dtype), lambda number: _saved_member(Path(source), ensemble, number, dtype)
    else:
        empty = [outline(folder, dtype) for folder in source]
        ensemble, member = EnsembleForCausalLM.from_members(empty, **how), lambda number: models.load(source[number], dtype)
    if not isinstance(ensemble, EnsembleForCausalLM):
        raise KdlibError(f"{source} must be a saved ensemble, got a {type(ensemble).__name__}. Give a list of folders of members.")
    rank, processes, size = dist.get_rank(group), dist.get_world_size(group), len(ensemble.members)
    if processes > size:
        raise KdlibError(f"Processes must be at most {size}, the members there are, got {processes}. Start fewer.")
    shared = SharedEnsemble.of(ensemble, range(rank, size, processes), group)
    shared.members = nn.ModuleList(member(number) for number in shared.numbers)
    if isinstance(source, str | Path):
        shared.generation_config = GenerationConfig.from_pretrained(source)
        if shared.router is not None:
            shared.router.load_state_dict(_tensors(Path(source), "router."), assign=True)
    return shared.to(device).requires_grad_(False).eval()  # no gradient would pass through the sum over processes


class SharedEnsemble(EnsembleForCausalLM):
    """An ensemble of which this process holds the members ``numbers``; made by :func:`load`.

    What needs all members, such as saving, evaluation by :mod:`kdlib.evaluation` and training, is refused.
    """

    numbers: Sequence[int] = ()
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, ensemble: EnsembleForCausalLM, numbers: Sequence[int], group: dist.ProcessGroup | None) -> "SharedEnsemble":
        """The same ensemble with these members, yet to be loaded."""
        with torch.device("meta"):
            shared = cls(ensemble.config)
        shared.router, shared.generation_config = ensemble.router, ensemble.generation_config
        shared.numbers, shared.group = tuple(numbers), group
        return shared

    @property
    def pool(self):
        """Refused, since it takes all members.

        Raises:
            KdlibError: always.
        """
        raise KdlibError("An ensemble must be whole to be evaluated, saved or learned from, got a share of it. Load it in one process.")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as :attr:`pool` is."""
        return self.pool

    def _pooled(self, log_probs: Members, input_ids: Tensor, weights: Tensor | None = None) -> Tensor:
        exponent = EXPONENTS[self.config.pool] if self.config.exponent is None else self.config.exponent
        part = running(self._weighted(log_probs, weights), exponent)
        summed = part.double() if exponent == 0 else part.double().exp()
        # One number more tells whether all processes were asked about the same text: each is then their mean.
        text = (input_ids.double().flatten() * (torch.arange(input_ids.numel(), device=input_ids.device) % 8191 + 1)).sum()
        buffer = torch.cat([summed.flatten(), text[None]])
        dist.all_reduce(buffer, group=self.group)
        if buffer[-1] != text * dist.get_world_size(self.group):
            raise KdlibError("Processes that share an ensemble must ask it about the same text, got another one here. Give all one seed.")
        total = buffer[:-1].view_as(summed)
        total = total if exponent == 0 else total.log() / exponent
        return (total if exponent == 1 else torch.log_softmax(total, dim=-1)).to(part.dtype)

    def _weighted(self, log_probs: Members, weights: Tensor | None):
        if weights is None:
            size = len(self.config.members)
            weights = torch.tensor(self.config.weights or [1 / size] * size, dtype=torch.float64)
        for number, one in zip(self.numbers, log_probs, strict=True):
            weight = weights[number].to(one)
            yield one, weight[..., None] if weight.ndim else weight


def _saved_member(folder: Path, ensemble: EnsembleForCausalLM, number: int, dtype: torch.dtype) -> nn.Module:
    return with_tensors(folder, ensemble.members[number], _tensors(folder, f"members.{number}."), dtype)


def _tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning, and no other."""
    found = {}
    for path in safetensors_of(folder):
        with safe_open(path, "pt") as file:
            found |= {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    return found
