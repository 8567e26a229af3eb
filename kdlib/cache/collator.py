"""Cached targets in a training loop that is not kdlib's: a collator and a loss for any transformers ``Trainer``.

A ``Trainer`` hands its ``compute_loss_func`` the model's outputs and the labels, and nothing else of the batch. Labels are
those of a causal LM: label i is token i, predicted from position i - 1, so nothing ever reads the first one. There the
collator puts the flat position of the row's first token in the cache, as a negative number that no label can be.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib.cache.dataset import DatasetTargets, row_tokens
from kdlib.errors import KdlibError
from kdlib.losses import DenseTargets, SparseTargets
from kdlib.losses.divergences import DIVERGENCES, divergence_loss
from kdlib.losses.reference import IGNORED

FIRST = IGNORED - 1  # in the place of the first label: FIRST - flat position


class TargetCollator:
    """Rows of a cached dataset -> ``input_ids``, ``attention_mask`` and ``labels`` [B, T] for :class:`TargetLoss`.

    Rows are padded at their end. One longer than the ``block_length`` that targets were cached with becomes several, the
    windows that the teacher read. It holds no targets, so workers of a ``DataLoader`` cost little.

    Args:
        targets: of all rows it will be given. A ``Trainer`` has one collator, so with an ``eval_dataset`` cache that as well
            (``concatenate_datasets``).
        pad_token_id: any id; padding is masked and has no labels.

    Raises:
        KdlibError: when called with a row that is not cached (named by its place in the batch, and its tokens), or with
            ``labels`` of another length.
    """

    def __init__(self, targets: DatasetTargets, pad_token_id: int):
        self.rows, self.pad_token_id = targets.rows, pad_token_id

    def __call__(self, features: list[dict]) -> dict[str, Tensor]:
        """Features have ``input_ids`` and, to train on some tokens only (the answer to a prompt), ``labels``."""
        windows = [window for number, feature in enumerate(features) for window in self._windows(number, feature)]
        shape = len(windows), max(len(tokens) for tokens, _ in windows)
        input_ids, labels = np.full(shape, self.pad_token_id), np.full(shape, IGNORED)
        attention_mask = np.zeros(shape, np.int64)
        for row, (tokens, label) in enumerate(windows):
            columns = slice(len(tokens))
            input_ids[row, columns], labels[row, columns], attention_mask[row, columns] = tokens, label, 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _windows(self, number: int, feature: dict) -> list[tuple[np.ndarray, np.ndarray]]:
        tokens, given = row_tokens(feature), feature.get("labels")
        if given is not None and len(given) != len(feature["input_ids"]):
            raise KdlibError(
                f"Row {number} of the batch must have a label for each of its {len(feature['input_ids'])} tokens, got {len(given)}."
            )
        labels = tokens if given is None else row_tokens({**feature, "input_ids": given})
        start, windows = self.rows.start(tokens, f"Row {number} of the batch"), []
        for low in range(0, max(1, len(tokens) - 1), self.rows.block_length):
            part = slice(low, low + self.rows.block_length + 1)  # the last of them is only a label
            windows.append((tokens[part], np.r_[FIRST - (start + low), labels[part][1:]]))
        return windows


class TargetLoss:
    """w * tau^2 * KL(t || s) + (1 - w) * CE over a batch of :class:`TargetCollator`, as a ``compute_loss_func``.

    A sum over tokens, divided by the tokens of the whole optimisation step, which the ``Trainer`` of a causal LM counts
    without the first label of each row: the same however the step is cut into micro-batches. The logits that a
    ``Trainer`` gives exist anyway; to do without, see :func:`kdlib.losses.linear_distillation_loss`.

    Args:
        targets: those of the collator.
        kd_weight: w, weight of the KD term.
        temperature: tau, by default that of the targets; only kind dense supports others.
        divergence, options: name and further arguments of one of :data:`kdlib.losses.divergences.DIVERGENCES`, to
            use instead of tau^2 * KL(t || s).

    Raises:
        KdlibError: a weight outside 0..1, a temperature that the targets do not support, an unknown divergence; when
            called, labels of another collator, logits of another shape or vocabulary.
    """

    def __init__(
        self,
        targets: DatasetTargets,
        kd_weight: float,
        temperature: float | None = None,
        divergence: str = "forward_kl",
        **options: float,
    ):
        kept = targets.cache.temperature
        if not 0 <= kd_weight <= 1:
            raise KdlibError(f"`kd_weight` must be in 0..1, got {kd_weight}.")
        if divergence not in DIVERGENCES:
            raise KdlibError(f"`divergence` must be one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
        if temperature not in (None, kept) and targets.cache.kind.name != "dense":
            raise KdlibError(
                f"`temperature` must be that of the targets, {kept}, got {temperature}. Cache them at {temperature}, or use kind dense."
            )
        self.cache, self.kd_weight = targets.cache, kd_weight
        self.temperature = kept if temperature is None else temperature
        self.divergence, self.options = divergence, options
        self._head = self.cache.head

    def __call__(self, outputs, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of one micro-batch.

        Args:
            outputs: of the model, with ``logits`` [B, T, V]. labels: [B, T].
            num_items_in_batch: tokens of the optimisation step; None: those of this batch.
        """
        self._check(outputs.logits, labels)
        starts, labels = FIRST - labels[:, :1], labels[:, 1:]
        used = labels != IGNORED
        positions = (starts + torch.arange(labels.shape[1], device=labels.device))[used]
        logits, labels = outputs.logits[:, :-1][used], labels[used]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = (1 - self.kd_weight) * F.cross_entropy(logits, labels, reduction="sum")
        if self.kd_weight > 0:
            teacher = self._teacher(positions.cpu().numpy(), logits.device)
            each = divergence_loss(self.divergence, logits, teacher, self.temperature, **self.options)
            loss = loss + self.kd_weight * each.sum()
        return loss / (max(1, len(labels)) if num_items_in_batch is None else num_items_in_batch)

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if (labels[:, 0] > FIRST).any():
            raise KdlibError("Labels must come from TargetCollator, got others. Pass it to the Trainer as data_collator.")
        expected = (*labels.shape, self.cache.guard["vocabulary"])
        if logits.shape != expected:
            raise KdlibError(
                f"The logits must have the shape of labels and teacher, {expected}, got {tuple(logits.shape)}. Use the teacher's vocabulary."
            )

    def _teacher(self, positions: np.ndarray, device: torch.device) -> SparseTargets | Tensor:
        targets = self.cache.read(positions)
        if self._head is None:
            return targets.to(device)
        # Moved once: it is as large as the student's.
        self._head = tuple(None if one is None else one.to(device) for one in self._head)
        return DenseTargets(targets.hidden.to(device), *self._head).logits()
