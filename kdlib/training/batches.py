"""From packed rows of flat positions to what a step needs."""

import numpy as np
import torch

from kdlib.cache import TargetCache
from kdlib.data import corpus
from kdlib.errors import KdlibError


class Rows(torch.utils.data.Dataset):
    """Packed rows of a split by number; an item is a row of flat positions, −1 at padding."""

    def __init__(self, index: np.ndarray):
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.index[number]


class Collator:
    """Rows of flat positions -> the model's inputs, the labels, and the cached targets of the same positions.

    Args:
        weights: [positions], a token weight at each of the split's flat positions; a batch then holds those of its labels.

    Raises:
        KdlibError: another number of weights than positions.
    """

    def __init__(self, split: corpus.Split, targets: TargetCache | None = None, weights: np.ndarray | None = None):
        if weights is not None and len(weights) != len(split.tokens):
            raise KdlibError(
                f"`weights` must have one number for each of the {len(split.tokens)} positions of the split {split.name!r}, got "
                f"{len(weights)}. Compute them on the same corpus."
            )
        self.split, self.targets, self.weights = split, targets, weights

    def __call__(self, rows: list[np.ndarray]) -> dict:
        index = np.stack(rows)
        batch = {name: torch.from_numpy(values) for name, values in corpus.rows(self.split, index).items()}
        if self.targets is not None:
            # Padding and targets agree row for row because both are read at the same flat positions.
            batch["targets"] = self.targets.read(index)
        if self.weights is not None:
            batch["weights"] = torch.from_numpy(np.where(index < 0, 0, self.weights[index]).astype(np.float32))
        return batch
