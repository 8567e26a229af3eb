"""How much two notebooks that train at once, on the same cores, take from each other.

    python benchmarks/side_by_side.py       # a few minutes; updates benchmarks/results.csv

Each is a small student of the smoke profile, started by papermill itself with nothing of kdlib around it. At once they should
take about as long as one after the other: threads that spun while they waited would take the cores from the other notebook.
"""

import os
import subprocess
import sys
import tempfile
import time

from record import record

from kdlib.study import store
from kdlib.study.profiles import REPOSITORY

# Enough that training is most of what a notebook does.
STUDENT = {"layers": 2, "hidden_size": 64, "heads": 4, "epochs": 8}


def start(seed: int, home: str) -> subprocess.Popen:
    """A student's notebook in a process of its own, its results below ``home``."""
    parameters = [word for name, value in (STUDENT | {"seed": seed}).items() for word in ("-p", name, str(value))]
    notebooks = REPOSITORY / "notebooks"
    command = [sys.executable, "-m", "papermill", str(notebooks / "04_student.ipynb"), f"{home}/{seed}.ipynb"]
    # An own setting of the caller would hide what the package does.
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | {"KDLIB_HOME": home}
    options = ["--cwd", str(notebooks), "--no-progress-bar", "--log-level", "ERROR"]
    return subprocess.Popen([*command, *parameters, *options], env=environment)


def finish(process: subprocess.Popen) -> None:
    """Wait for a notebook, which must succeed."""
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)


def one_after_the_other(seeds: list[int], home: str) -> float:
    """Wall seconds."""
    started = time.perf_counter()
    for seed in seeds:
        finish(start(seed, home))
    return time.perf_counter() - started


def at_once(seeds: list[int], home: str) -> float:
    """Wall seconds."""
    started = time.perf_counter()
    for process in [start(seed, home) for seed in seeds]:
        finish(process)
    return time.perf_counter() - started


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        one_after_the_other([100], home)  # makes the corpus, the teacher and its targets too, for all
        # Before and after, so that a machine that becomes busier counts for neither.
        before = one_after_the_other([101, 102], home)
        together = at_once([103, 104], home)
        after = one_after_the_other([105, 106], home)
    apart = (before + after) / 2
    row = {
        "what": "two notebooks at once against one after the other, time",
        "target": "<= 1.2",
        "measured": f"{together / apart:.3g}",
        "unit": "×",
        "detail": f"{together:.0f} against {apart:.0f} s; plain papermill, small students of the smoke profile",
        "device": store.device(),
    }
    print(row, flush=True)
    record([row])
