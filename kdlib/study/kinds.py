"""The kinds of run there are, by name. Each is one module of :mod:`kdlib.runs`, whose docstring says what it holds."""

from functools import cache
from importlib import import_module
from types import ModuleType

# Upstream first. They are named here and not among the runs, whose code is behind every run's id.
KINDS = (
    "corpus",
    "teacher",
    "targets",
    "scores",
    "clusters",
    "student",
    "joint",
    "member",
    "ensemble",
    "fidelity",
)


@cache
def kinds() -> dict[str, ModuleType]:
    """Every kind of run, upstream first."""
    return {name: import_module(f"kdlib.runs.{name}") for name in KINDS}


def of_notebook(notebook: str) -> str | None:
    """The kind of run that a notebook makes; None for an analysis."""
    return next((name for name, kind in kinds().items() if notebook == kind.NOTEBOOK), None)


def of_parameters(values) -> str | None:
    """The kind of run that these parameters describe; None for those of an analysis."""
    return next((name for name, kind in kinds().items() if type(values) is kind.Parameters), None)
