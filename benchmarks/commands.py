"""How long a newcomer's commands take, and how much memory: on a fresh clone, with nothing downloaded.

python benchmarks/commands.py           # about three quarters of an hour; updates benchmarks/results.csv
"""

import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from record import record

from kdlib.study import store
from kdlib.study.profiles import REPOSITORY

COMMANDS = [
    ("make paper (quick) on a fresh machine, downloads included", ["make", "paper"], "<= 1500"),
    ("second make paper", ["make", "paper"], "<= 5"),
    ("make figures (laptop), environment in place", ["make", "figures"], "<= 45"),
    ("make test", ["make", "test"], "<= 600"),
]


def timed(command: list[str], folder: Path, environment: dict) -> tuple[float, int]:
    """Wall seconds of a command that must succeed, and the largest resident set among it and its children so far, bytes."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
        environment = {**os.environ, "KDLIB_CACHE": f"{folder}/cache"}
        for what, command, target in COMMANDS:
            seconds, memory = timed(command, clone, environment)
            detail = f"largest process so far {memory / 2**30:.1f} GiB"
            row = {
                "what": what,
                "target": target,
                "measured": round(seconds),
                "unit": "s",
                "detail": detail,
                "device": store.device(),
            }
            print(row, flush=True)
            record([row])
