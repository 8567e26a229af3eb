"""Which of a run's checkpoints may be trusted: a process may have died while it wrote or removed one."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

# Without its optimiser, scheduler or random state a run would go on all the same, to other weights.
NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; those found broken on the way to it are removed."""
    for path in sorted(folder.glob("checkpoint-*"), key=_number, reverse=True):
        if _is_whole(path):
            return path
        shutil.rmtree(path)
    return None


def whole_steps(folder: Path) -> set[int]:
    """The steps that whole checkpoints were saved after; 0, the beginning, without any."""
    return {_number(path) for path in folder.glob("checkpoint-*") if _is_whole(path)} or {0}


def common_step(folders: Iterable[Path]) -> int | None:
    """The newest step from which runs with these checkpoints can all go on; None if there is none."""
    return max(set.intersection(*map(whole_steps, folders)), default=None)


def forget_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps: a run that goes on from ``step`` tells their part of the log anew."""
    for path in folder.glob("checkpoint-*"):
        if _number(path) > step:
            # Renamed first: a kill in between must leave nothing that looks like a checkpoint.
            discarded = path.with_name(f".{path.name}")
            shutil.rmtree(discarded, ignore_errors=True)
            shutil.rmtree(path.rename(discarded))


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _is_whole(checkpoint: Path) -> bool:
    names = {path.name for path in checkpoint.iterdir()}
    try:
        last_step(checkpoint)  # of a file that the Trainer writes after all others
    except (OSError, json.JSONDecodeError):
        return False
    return names.issuperset(NEEDED) and not names.isdisjoint(WEIGHTS)


def last_step(checkpoint: Path | None) -> int:
    """The step that a checkpoint was saved after; 0 without one."""
    return 0 if checkpoint is None else json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
