"""The per-step log of a run, ``log.csv``, which a resumed run takes up where its checkpoint left off."""

import csv
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

LOG_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "ce",
    "kd",
    "feature",
    "kd_weight",
    "temperature",
    "learning_rate",
    "weight_decay",
    "tokens",
    "seconds",
    "memory_bytes",
    "peak_memory_bytes",
    "validation_nll",
    "validation_seconds",
    "validation_memory_bytes",
)


class StepLog:
    """Rows of steps and validations, each with the tokens and seconds of training up to there.

    Attributes:
        tokens: trained on so far; whoever writes counts them.
        sharing: how many runs are trained at once, each with its share of the seconds: summed over runs they are what passed.
    """

    def __init__(self, path: Path):
        self.path, self.tokens, self.sharing = path, 0, 1
        self._seconds, self._resumed = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._seconds + (time.perf_counter() - self._resumed) / self.sharing

    def resume(self, step: int) -> None:
        """Drop what was logged after ``step``, the last whose weights were kept, and count on from there."""
        self._resumed = time.perf_counter()
        rows = [row for row in read_log(self.path) if int(row["step"]) <= step]
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        self.tokens, self._seconds = int(rows[-1]["tokens"]), float(rows[-1]["seconds"])
        temporary = self.path.with_name(f".{self.path.name}.partial")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)

    def write(self, step: int, epoch: float, values: dict) -> None:
        """Append a row; columns that ``values`` leave out stay empty."""
        fresh = not self.path.is_file()
        shared = {"step": step, "epoch": epoch, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
        values = values | {"peak_memory_bytes": peak_memory_bytes()}
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS, restval="")
            if fresh:
                writer.writeheader()
            writer.writerow(
                shared | {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in values.items()}
            )


def read_log(path: Path) -> list[dict[str, str]]:
    """Whole rows of a per-step log; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def teacher_tokens(rows: list[dict[str, str]]) -> int:
    """Tokens of the steps in which a teacher in the loop was asked: those with a KD weight or a loss of features."""
    return _tokens(rows, lambda row: bool(row["feature"]) or float(row["kd_weight"] or 0) > 0)


def distilled_tokens(rows: list[dict[str, str]]) -> int:
    """Tokens of the steps with a KD weight."""
    return _tokens(rows, lambda row: float(row["kd_weight"] or 0) > 0)


def _tokens(rows: list[dict[str, str]], chosen: Callable[[dict[str, str]], bool]) -> int:
    taken = [row for row in rows if row["loss"]]
    return int(np.diff([0, *(int(row["tokens"]) for row in taken)]) @ np.array([chosen(row) for row in taken], int))


def memory_bytes() -> int:
    """Memory in use now: allocated on the GPU if there is one, else the process's resident set."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def peak_memory_bytes() -> int:
    """The most memory in use so far: allocated on the GPU if there is one, else the process's resident set."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The largest resident set that this process has had."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
