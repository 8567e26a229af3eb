"""What is known of every predicting position of a split, in split order: a model's hidden state, a router's weights."""

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
    dtype, device = autocast or parameter.dtype, parameter.device
    decoder, states = body(model), None
    for start in bar(range(0, len(index), batch_size), f"evaluating {split.name}"):
        part = index[start : start + batch_size]
        batch = {name: torch.from_numpy(values).to(device) for name, values in rows(split, part).items()}
        mask = attention_mask(batch["segments"], dtype)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            output = decoder(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask, use_cache=False
            )
        hidden = output.last_hidden_state[torch.from_numpy(part >= 0).to(device)].to(dtype)
        if states is None:
            states = hidden.new_empty(len(positions), hidden.shape[-1])
        states[torch.from_numpy(np.searchsorted(positions, part[part >= 0])).to(device)] = hidden
    return states


def routed_weights(router: nn.Module, split: Split, index: np.ndarray, batch_size: int) -> Tensor:
    """A router's weights at every predicting position of a split, in split order: [positions, K].

    ``index``: packed rows with every predicting position once, of which a window sees no other.
    """
    positions, found = predicting_positions(split), None
    device = next(router.buffers()).device
    for start in range(0, len(index), batch_size):
        part = index[start : start + batch_size]
        batch = {name: torch.from_numpy(values).to(device) for name, values in rows(split, part).items()}
        weights = router(batch["input_ids"], position_ids=batch["position_ids"])[torch.from_numpy(part >= 0).to(device)]
        if found is None:
            found = weights.new_empty(len(positions), weights.shape[-1])
        found[torch.from_numpy(np.searchsorted(positions, part[part >= 0])).to(device)] = weights
    return found
