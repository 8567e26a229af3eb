"""Threads that wait go to sleep, however Python was started: kdlib says so before torch loads its OpenMP library."""

import ast
import os
import subprocess
import sys

import nbformat
import papermill
import pytest

from kdlib.study import notebooks, profiles
from kdlib.study.profiles import REPOSITORY

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch brings another OpenMP library")
# Its own account of the settings that it has read.
REPORT = {"OMP_DISPLAY_ENV": "verbose"}


@pytest.mark.slow
@linux
def test_a_kernel_that_papermill_starts_puts_waiting_threads_to_sleep(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    path, done = tmp_path / "a.ipynb", tmp_path / "done.ipynb"
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\nimport kdlib, torch"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
    papermill.execute_notebook(path, done, kernel_name="python3", progress_bar=False)
    assert "GOMP_SPINCOUNT = '1000'" in capfd.readouterr().err  # where the kernel's own goes, under pytest


@linux
@pytest.mark.parametrize(("own", "found"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_torch_is_told_how_long_to_spin_unless_the_user_has_said_so(own, found):
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | REPORT | own
    command = [sys.executable, "-c", "import kdlib, torch"]
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{found}'" in result.stderr


@pytest.mark.parametrize("name", profiles.notebooks())
def test_no_notebook_loads_torch_before_kdlib(name):
    path = REPOSITORY / "notebooks" / f"{name}.ipynb"
    code = "\n".join(cell["source"] for cell in notebooks.cells(path) if cell["cell_type"] == "code")
    loading = ("torch", "transformers", "peft", "accelerate", "kdlib")
    assert next((one for one in imported(code) if one in loading), "kdlib") == "kdlib"


def imported(code):
    """First parts of the names of imported modules, in order."""
    for node in ast.walk(ast.parse(code)):  # statements of a module come in their order
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
