"""Shipped notebooks as somebody runs them who has a clean copy, opens one and runs all cells."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from jupyter_client import KernelManager
from nbclient import NotebookClient

from kdlib.study import profiles
from kdlib.study.parameters import AnalysisParameters
from kdlib.study.profiles import REPOSITORY

SHIPPED = sorted(path.stem for path in (REPOSITORY / "notebooks").glob("*.ipynb"))
# What a kernel is told between two notebooks: each finds it as if it had just been started, but for what is imported.
_FORGET = "get_ipython().reset()"


def analysis(name: str) -> bool:
    """Whether a notebook only reads results. One that is not known yet has to stand by itself."""
    known = profiles.notebooks()
    return name in known and issubclass(known[name][0], AnalysisParameters)


def listed() -> set[str] | None:
    """Names of the notebooks that git has; None where this is no checkout."""
    done = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "notebooks"], capture_output=True, text=True)
    return None if done.returncode else {Path(name).stem for name in done.stdout.split("\n") if name.endswith(".ipynb")}


def clean_copy(folder: Path) -> Path:
    """The folder ``notebooks`` as git has it, and nothing else, below ``folder``."""
    copied = folder / "notebooks"
    copied.mkdir(parents=True)
    for name in SHIPPED if (known := listed()) is None else sorted(known):
        (copied / f"{name}.ipynb").write_bytes((REPOSITORY / "notebooks" / f"{name}.ipynb").read_bytes())
    return copied


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook of a file, which a clean copy may lack."""
    assert path.is_file(), f"git does not know notebooks/{path.name}: add it, or delete it"
    return nbformat.read(path, as_version=4)


@contextmanager
def kernel(folder: Path, home: Path) -> Iterator[Callable[[nbformat.NotebookNode], nbformat.NotebookNode]]:
    """A function that runs all cells of a notebook in ``folder``; one that fails is an error that shows it.

    One kernel serves all calls, for most of a notebook's time goes into imports. It forgets every name in between. In
    the pipeline's tests each notebook of a study has a kernel of its own.
    """
    search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {"KDLIB_HOME": str(home), "KDLIB_BATCH": "1", "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=os.environ | environment, cwd=str(folder))

    def execute(notebook):
        notebook.cells.insert(0, nbformat.v4.new_code_cell(_FORGET))
        client = NotebookClient(notebook, km=manager, timeout=300)
        try:
            client.execute()
        finally:
            client.kc.stop_channels()
            del notebook.cells[0]
        return notebook

    try:
        yield execute
    finally:
        manager.shutdown_kernel(now=True)
