"""What is known of every predicting position of a split, in split order: a model's hidden state, a router's weights."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.data.corpus import Split, predicting_positions, rows
from kdlib.errors import KdlibError
from kdlib.models import attention_mask, body
from kdlib.study.progress import bar


def hidden_states(
    model: nn.Module, split: Split, index: np.ndarray, batch_size: int, autocast: torch.dtype | None = None
) -> Tensor:
    """The decoder's last hidden state at every predicting position of a split, in split order: [positions, width].

    ``index``: packed rows [rows, block_length] of flat positions (−1: padding) that hold every predicting position
    once, else KdlibError. The dtype is ``autocast``, or the model's without it; the device is the model's.
    """
    positions = predicting_positions(split)
    if not np.array_equal(np.sort(index[index >= 0]), positions):
        raise KdlibError(
            f"The packed rows must have each of the {len(positions)} predicting positions of split {split.name!r} "
            f"once, got {np.count_nonzero(index >= 0)}. Pack all windows of this split."
        )
    parameter = next(model.parameters())
    dtype, device, decoder = autocast or parameter.dtype, parameter.device, body(model)

    def states(batch: dict[str, Tensor]) -> Tensor:
        mask = attention_mask(batch["segments"], dtype)
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return decoder(**inputs, use_cache=False).last_hidden_state.to(dtype)

    return _in_split_order(states, split, index, batch_size, device, f"evaluating {split.name}")


def routed_weights(router: nn.Module, split: Split, index: np.ndarray, batch_size: int) -> Tensor:
    """A router's weights at every predicting position of a split, in split order: [positions, K].

    ``index``: packed rows with every predicting position once, of which a window sees no other.
    """
    device = next(router.buffers()).device
    return _in_split_order(
        lambda batch: router(batch["input_ids"], position_ids=batch["position_ids"]), split, index, batch_size, device, f"routing {split.name}"
    )


def _in_split_order(
    measure: Callable[[dict[str, Tensor]], Tensor], split: Split, index: np.ndarray, batch_size: int, device: torch.device, told: str
) -> Tensor:
    """What ``measure`` gives [rows, positions, width] for batches of packed rows, put in split order: [positions, width]."""
    positions, found = predicting_positions(split), None
    for start in bar(range(0, len(index), batch_size), told):
        part = index[start : start + batch_size]
        batch = {name: torch.from_numpy(values).to(device) for name, values in rows(split, part).items()}
        measured = measure(batch)[torch.from_numpy(part >= 0).to(device)]
        if found is None:
            found = measured.new_empty(len(positions), measured.shape[-1])
        found[torch.from_numpy(np.searchsorted(positions, part[part >= 0])).to(device)] = measured
    return found
