"""torch.compile where a compiler is found, and steps that it leaves repeatable."""

import os
import shutil
from contextlib import contextmanager

import torch


@contextmanager
def repeatable():
    """Deterministic algorithms within the block, and what was set before after it."""
    # The backward pass that torch.compile makes of an embedding adds rows in whichever order the threads come. Deterministic, it
    # adds them in their own order, by one thread; everything else in a step is repeatable as it is.
    enabled, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only or not enabled)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads memory that was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def can_compile(device: torch.device) -> bool:
    """Whether a compiler is there for ``device``; where none is, a line says so."""
    # Triton builds its launchers in C, the CPU backend its kernels in C++.
    names = (
        (os.environ.get("CC", "gcc"), "clang") if device.type == "cuda" else (os.environ.get("CXX", "g++"), "clang++")
    )
    found = any(shutil.which(name) for name in names)
    if not found:
        print(
            f"kdlib: no compiler ({' or '.join(names)}) found, so torch.compile is skipped; results are equal to rounding, training is slower."
        )
    return found
