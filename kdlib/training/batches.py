"""From packed rows of flat positions to what a step needs, of one run or of several that are trained at once."""

from collections.abc import Sequence

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


class RowsOfEach(torch.utils.data.Dataset):
    """Rows of several runs by their place in an epoch; an item is one row of each run, in its own order.

    Args:
        indexes: packed rows of each run.
        seeds: what the order of each run is drawn with.
        batch_size: rows of a run in a batch. All runs have equally many whole batches, and no item is left over.
    """

    def __init__(self, indexes: Sequence[np.ndarray], seeds: Sequence[int], batch_size: int):
        self.indexes, self.seeds = indexes, seeds
        self.rows = len(indexes[0]) // batch_size * batch_size
        self.set_epoch(0)

    def __len__(self) -> int:
        return self.rows

    def set_epoch(self, epoch: int) -> None:
        """Draw the orders of an epoch, counted from 0, as accelerate's sampler draws that of a run by itself."""
        generator = torch.Generator()
        self.orders = [
            torch.randperm(len(index), generator=generator.manual_seed(seed + epoch)).numpy()
            for index, seed in zip(self.indexes, self.seeds, strict=True)
        ]

    def __getitem__(self, place: int) -> list[np.ndarray]:
        return [index[order[place]] for index, order in zip(self.indexes, self.orders, strict=True)]


class CollatorOfEach:
    """Items of :class:`RowsOfEach` -> the inputs of each run, stacked to [K, batch, positions]; targets and weights in lists of K."""

    def __init__(self, collators: Sequence[Collator]):
        self.collators = collators

    def __call__(self, items: list[list[np.ndarray]]) -> dict:
        batches = [collate(list(rows)) for collate, rows in zip(self.collators, zip(*items, strict=True), strict=True)]
        found = {name: torch.stack([one[name] for one in batches]) for name in ("input_ids", "labels", "position_ids", "segments")}
        return found | {name: [one.get(name) for one in batches] for name in ("targets", "weights")}
