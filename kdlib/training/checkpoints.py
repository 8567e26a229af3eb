"""Which of a run's checkpoints may be trusted: a process may have died while it wrote or removed one."""

import json
import shutil
from pathlib import Path

# Without its optimiser, scheduler or random state a run would go on all the same, to other weights.
NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; those found broken on the way to it are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        if _is_whole(path):
            return path
        shutil.rmtree(path)
    return None


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
