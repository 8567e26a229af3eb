"""Teachers for writing targets: a model, or the dense targets of an earlier pass.

A teacher yields the logits of its rows one chunk of positions at a time, so [tokens, V] never exists.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdlib import models
from kdlib.data import corpus
from kdlib.errors import KdlibError
from kdlib.losses.logits import head_logits

# Logits in memory at a time: on a CPU a few dozen tokens, so that they stay in its caches.
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}


class Chunk(NamedTuple):
    """The teacher's output at some positions.

    Attributes:
        positions: [n] flat positions; labels: [n] their next tokens.
        logits: [n, V] float32.
        hidden: [n, D], input of the output layer, or None for a model whose logits are more than a matrix product.
    """

    positions: np.ndarray
    labels: Tensor
    logits: Tensor
    hidden: Tensor | None


class ModelTeacher:
    """A causal LM or an ensemble, without dropout.

    Args:
        model: put in eval mode for each pass and back afterwards.
        autocast: dtype of its matrix products, None for float32.
        batch_rows: rows of block_length tokens in one forward pass.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None, batch_rows: int = 8):
        self.model, self.autocast, self.batch_rows = model, autocast, batch_rows
        # The logits of an ensemble, or of a model with soft-capping, are not a product of one matrix and its hidden states.
        self.head = models.head(model) if models.has_linear_head(model) else None
        self.vocabulary = model.config.get_text_config().vocab_size if self.head is None else len(self.head[0])
        self.width = None if self.head is None else self.head[0].shape[1]
        self.precision = str(autocast or torch.float32)

    def fingerprint(self) -> str:
        """SHA-256 of the model's weights."""
        found = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()

    def chunks(self, split: corpus.Split, index: np.ndarray) -> Iterator[Chunk]:
        """Chunks of the packed rows ``index`` [rows, block_length], each predicting position once."""
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        rows = self.batch_rows if self.head else 1  # without a linear head, all logits of a batch are in memory at once
        try:
            for start in range(0, len(index), rows):
                positions, labels, output = self.run(split, index[start : start + rows])
                if self.head is None:
                    yield Chunk(positions, labels, output.float(), None)
                    continue
                step = max(1, CHUNK_ELEMENTS.get(output.device.type, 2**21) // self.vocabulary)
                for low in range(0, len(labels), step):
                    part = slice(low, low + step)
                    yield Chunk(positions[part], labels[part], self._logits(output[part]), output[part])
        finally:
            for module, mode in training.items():
                module.training = mode

    @torch.no_grad()
    def run(self, split: corpus.Split, at: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor]:
        """The forward pass over packed rows [rows, block_length], in the current mode of the model.

        Returns:
            Flat positions [n], their labels [n], and the last hidden states [n, D] there; logits [n, V] if they are more
            than a matrix product.
        """
        parameter = next(self.model.parameters())
        device = parameter.device
        rows = {name: torch.from_numpy(value).to(device) for name, value in corpus.rows(split, at).items()}
        used = rows["labels"] >= 0
        inputs = {
            "input_ids": rows["input_ids"],
            "position_ids": rows["position_ids"],
            "attention_mask": models.attention_mask(rows["segments"], parameter.dtype),
            "use_cache": False,
        }
        with self._precision(device):
            if self.head is None:
                output = self.model(**inputs).logits
            else:
                output = models.body(self.model)(**inputs).last_hidden_state
        return at[used.cpu().numpy()], rows["labels"][used], output[used]

    def _logits(self, hidden: Tensor) -> Tensor:
        dtype, (weight, bias) = self.autocast or hidden.dtype, self.head
        return head_logits(hidden.to(dtype), weight.to(dtype), bias)

    def _precision(self, device: torch.device):
        return torch.autocast(device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None)


class DenseTeacher:
    """The dense targets of an earlier pass as teacher: other kinds are computed from them without running a model.

    Args:
        cache: opened :class:`kdlib.cache.TargetCache` of kind dense.
        device: on which distributions are computed and sampled.

    Raises:
        KdlibError: targets of another kind.
    """

    def __init__(self, cache, device: torch.device | str = "cpu"):
        if cache.head is None:
            raise KdlibError(
                f"`cache` must be of kind dense, which has whole distributions, got {cache.kind.name}. Write dense targets first."
            )
        self.cache, self.device = cache, torch.device(device)
        self.head = tuple(None if one is None else one.to(self.device) for one in cache.head)
        self.vocabulary, self.width = self.head[0].shape
        self.precision = cache.precision

    def fingerprint(self) -> str:
        """SHA-256 of the weights of the model that wrote the dense targets."""
        return self.cache.weights_sha256

    def chunks(self, split: corpus.Split, index: np.ndarray) -> Iterator[Chunk]:
        """As :meth:`ModelTeacher.chunks`."""
        positions = index[index >= 0]
        step = max(1, CHUNK_ELEMENTS.get(self.device.type, 2**21) // self.vocabulary)
        for low in range(0, len(positions), step):
            part = positions[low : low + step]
            hidden = self.cache.read(part).hidden.to(self.device)
            labels = torch.from_numpy(split.tokens[part + 1].astype(np.int64)).to(self.device)
            yield Chunk(part, labels, head_logits(hidden, *self.head), hidden)
