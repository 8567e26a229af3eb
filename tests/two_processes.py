"""A function in two processes of one gloo group, as torchrun would start them, forked from one that has imported what both need."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

FOLDER, SIZE = Path(__file__).parent, 2


def run(module: str, function: str, folder: Path) -> None:
    """Call ``function(rank, folder)`` of a test module in both, and wait for them."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER.parent), str(FOLDER)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, module, function, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr


def _main(module: str, function: str, folder: str) -> int:
    import torch.distributed as dist

    called = getattr(importlib.import_module(module), function)
    children = []
    for rank in range(SIZE):
        if child := os.fork():
            children.append(child)
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SIZE)
        called(rank, Path(folder))
        dist.destroy_process_group()
        return 0
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
