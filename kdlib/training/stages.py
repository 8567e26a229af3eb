"""One run of training, which may consist of stages that train different parameters."""

import shutil
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.data import corpus
from kdlib.data.text import TrainingText
from kdlib.study.schedules import Stage, stage_ends
from kdlib.study.work import total
from kdlib.training.objective import Objective
from kdlib.training.optimizer import steps
from kdlib.training.trainer import DistillationTrainer


def train_model(
    model,
    values,
    text: TrainingText,
    validation: corpus.Split,
    block_length: int,
    folder: Path,
    tokens: int | None = None,
    objective: Objective | None = None,
    stages: Sequence[Stage] = (),
    multipliers: dict | None = None,
    kind: type[DistillationTrainer] | None = None,
) -> dict:
    """Train a model on text, in one stage or several, from wherever an interrupted attempt left off.

    Args:
        model: causal LM, trained in place.
        values: schedule, batch size, precision, seed.
        text: what to train on; validation: measured along the way.
        folder: for ``log.csv`` and checkpoints. They stay, so that a call after the last step reads the weights back; once
            those are safe elsewhere, :func:`discard_checkpoints` makes room.
        tokens: train on about the first so many of an epoch's; None: on all.
        objective: terms and signal, as :class:`kdlib.training.DistillationTrainer` takes them.
        stages: parts with multipliers and an optimiser of their own; together they take the steps of a run without any.
        multipliers: regular expression on parameter names -> learning-rate multiplier.
        kind: of trainer; :class:`kdlib.training.JointTrainer` for members that are trained together, None for one model.

    Returns:
        tokens, teacher_tokens, steps, seconds, tokens_per_second, flops, peak_memory_bytes, final_loss, work.
    """
    index = _rows(text, block_length, tokens)
    parts = _staged(values, stages, len(index)) if stages else [(values, multipliers)]
    found = []
    for number, (settings, multipliers) in enumerate(parts):
        if stages:
            # What the stage before froze.
            model.requires_grad_(True)
            if objective is not None and objective.features is not None:
                objective.features.loss.requires_grad_(True)
        trainer = (kind or DistillationTrainer)(
            model,
            settings,
            text,
            index,
            folder / f"stage-{number}" if stages else folder,
            objective,
            multipliers=multipliers,
            validation=validation,
            validation_index=_rows(validation, block_length),
        )
        found.append(trainer.fit())
    if stages:
        _join_stages(folder, len(stages))
    counted = ("tokens", "teacher_tokens", "steps", "seconds", "flops")
    sums = {name: sum(one[name] for one in found) for name in counted}
    return sums | {
        "tokens_per_second": sums["tokens"] / sums["seconds"] if sums["tokens"] else None,
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in found),
        "final_loss": found[-1]["final_loss"],
        "work": total(*(one["work"] for one in found)),
    }


def trainer_of(
    model, values, text: TrainingText, validation: corpus.Split, block_length: int, folder: Path, objective: Objective, multipliers: dict
) -> DistillationTrainer:
    """The trainer with which :func:`train_model` trains a model in one stage; arguments as there."""
    options = {"multipliers": multipliers, "validation": validation, "validation_index": _rows(validation, block_length)}
    return DistillationTrainer(model, values, text, _rows(text, block_length), folder, objective, **options)


def _rows(text: TrainingText | corpus.Split, block_length: int, tokens: int | None = None) -> np.ndarray:
    windows = text.windows(block_length)
    if tokens is not None:
        windows = windows[: max(1, int(np.searchsorted(windows[:, 1].cumsum(), tokens, side="right")))]
    return corpus.pack(windows, block_length)


def discard_checkpoints(folder: Path) -> None:
    """Remove what :func:`train_model` goes on from, checkpoints and the folders of stages, and leave the log.

    A folder is renamed before it is emptied, so that a kill in between leaves nothing that looks like a checkpoint; what
    an earlier kill left goes too.
    """
    discarded = Path(tempfile.mkdtemp(prefix=".discarded-", dir=folder))
    for path in (folder / "checkpoints", *folder.glob("stage-*")):
        if path.exists():
            path.rename(discarded / path.name)
    for path in folder.glob(".discarded-*"):
        shutil.rmtree(path)


def _staged(values, stages: Sequence[Stage], rows: int) -> list[tuple]:
    """Settings and multipliers of each stage; together they take the steps of a run without stages."""
    an_epoch = steps(values.model_copy(update={"epochs": 1}), rows)
    parts = []
    for number, (begin, end) in enumerate(pairwise([0, *stage_ends(stages, steps(values, rows))])):
        # With the seed of the stage before, a stage would begin with the rows that one began with.
        seeds = {"seed": values.seed + number, "data_seed": values.order_seed + number}
        changes = {"epochs": (end - begin) / an_epoch} | seeds
        parts.append((values.model_copy(update=changes), stages[number].learning_rate_multipliers))
    return parts


def _join_stages(folder: Path, stages: int) -> None:
    """One log of a run's stages, in which steps, tokens, epochs and seconds count on."""
    logs, done = [], {}
    for number in range(stages):
        log = pd.read_csv(folder / f"stage-{number}" / "log.csv", dtype=str, keep_default_na=False)
        for name, kind in {"step": int, "epoch": float, "tokens": int, "seconds": float}.items():
            log[name] = log[name].astype(kind) + done.get(name, 0)
            done[name] = log[name].iloc[-1]
        logs.append(log)
    pd.concat(logs).to_csv(folder / "log.csv", index=False)
