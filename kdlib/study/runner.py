"""Runs one notebook with parameters, the way the pipeline and a person at a terminal both do.

The profile's section for the notebook, with the given values on top, is checked before anything is started. A run that
exists already is not made again. The executed notebook is kept in ``results/<profile>/executed``, also one that failed.
"""

import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from kdlib.errors import KdlibError
from kdlib.study import notebooks, profiles
from kdlib.study.kinds import kinds, of_notebook


def assignments(given: list[str]) -> dict[str, Any]:
    """``["seed=1", "seeds=[1, 2]"]`` as values.

    Raises:
        KdlibError: an assignment without a name, twice the same name, or a value that is not YAML.
    """
    values = {}
    for assignment in given:
        name, equals, text = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise KdlibError(f"--set must be NAME=VALUE, as in --set seed=1, got {assignment!r}.")
        if name == "profile":
            raise KdlibError("The profile must be chosen with --profile, not with --set.")
        if name in values:
            raise KdlibError(f"Parameter {name!r} must be set once, got it twice. Keep one --set {name}=….")
        try:
            values[name] = profiles.read_yaml(text)
        except yaml.YAMLError as error:
            raise KdlibError(f"The value in --set {assignment} must be YAML: {' '.join(str(error).split())}") from None
    return values


def whole_profile(profile: str) -> str:
    """A profile's name, or its path from any working folder: the kernel's is another."""
    return str(Path(profile).resolve()) if profile.endswith((".yaml", ".yml")) else profile


def run(notebook: str, profile: str, values: dict[str, Any], output: Path | None = None) -> int:
    """Run ``notebook`` with ``profile`` and ``values``; returns the exit status.

    Raises:
        KdlibError: notebook, profile or parameters are wrong; nothing was started.
    """
    name, profile = Path(notebook).stem, whole_profile(profile)
    checked = profiles.parameters(name, profile, **values)
    path = notebooks.find(notebook)
    from kdlib.study import plan, store  # after the checks: a mistyped parameter is answered at once

    if of_notebook(name):
        step = plan.step(checked)
        if found := store.find(profile, step.id):
            print(f"{step.id} ({step.label}) exists: {found.path}")
            return 0
        name = f"{name}-{step.id.rsplit('-', 1)[1]}"
    elif "grid" in type(checked).model_fields:
        name = f"{name}_{checked.grid}"
    output = output or store.results(profile) / "executed" / f"{name}.ipynb"
    return execute(path, output.resolve(), checked.model_dump(mode="json"))


def run_step(step, with_artefact: bool = False) -> int:
    """Make a planned run in its notebook, unless it exists; returns the exit status.

    Args:
        with_artefact: what later runs read of a run whose results exist is made too, without a notebook.
    """
    from kdlib.study import store

    profile = step.parameters.profile
    if found := store.find(profile, step.id):
        if with_artefact and not store.find(profile, step.id, with_artefact=True):
            from importlib import import_module

            import_module("kdlib.runs.make").make(step, with_artefact=True)
        else:
            print(f"{step.id} ({step.label}) exists: {found.path}")
        return 0
    notebook = kinds()[step.kind].NOTEBOOK
    output = store.results(profile) / "executed" / f"{notebook}-{step.id.rsplit('-', 1)[1]}.ipynb"
    return execute(notebooks.find(notebook), output.resolve(), step.parameters.model_dump(mode="json"))


def execute(path: Path, output: Path, values: dict[str, Any]) -> int:
    """Execute the notebook at ``path`` with papermill in a kernel of its own; returns the exit status."""
    # The kernel inherits it: bars are drawn as text on a terminal, and not at all in the log of a batch job.
    os.environ["KDLIB_TERMINAL" if sys.stderr.isatty() else "KDLIB_BATCH"] = "1"
    # A thread that waits spins for some microseconds and then sleeps. If it spun on, as it does by default, it would take the
    # core from those that it waits for wherever the machine does anything else; if it never spun, small steps would drag.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Memory that is freed stays with the process, up to half a GiB: handed back to the system, each chunk of log-probabilities
    # would be faulted in again page by page.
    for threshold in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(threshold, str(2**29))
    output.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    with _kernel(profiles.REPOSITORY) as kernel:
        # Imported while the kernel starts in its own process. The grammar of internationalised addresses would take two
        # seconds to compile, as long as all the rest, and checks nothing that a notebook holds.
        sys.modules.setdefault("rfc3987_syntax", None)
        from nbclient.exceptions import DeadKernelError
        from papermill import PapermillExecutionError, execute_notebook

        try:
            execute_notebook(
                path,
                output,
                values,
                kernel_name="python3",
                language="python",
                cwd=profiles.REPOSITORY,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                km=kernel,
            )
        except PapermillExecutionError as error:
            return _report(error, output)
        except DeadKernelError:
            print(
                f"The kernel of {path.stem} died, most often for lack of memory. What it had done is in {output}.",
                file=sys.stderr,
            )
            return 1
    print(f"Executed notebook: {output}")
    return 0


def _report(error: Exception, output: Path) -> int:
    if error.ename == KdlibError.__name__:
        print(error.evalue, file=sys.stderr)
        return 2
    traceback = "\n".join(error.traceback)
    if not sys.stderr.isatty():
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", traceback)
    print(traceback, f"\nThe notebook as far as it got: {output}", sep="\n", file=sys.stderr)
    return 1


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _kernel(cwd: Path) -> Iterator[Any]:
    """A kernel of this very interpreter, killed with all its processes on the way out.

    It talks through sockets in a private folder: TCP ports that two starting kernels pick may collide. Its path
    is kept short, since a socket's holds about 100 characters.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_core.utils import run_sync

    # No kernel folders: a "python3" that the user installed elsewhere is not this interpreter.
    specs = KernelSpecManager(kernel_dirs=[])
    with tempfile.TemporaryDirectory(
        prefix="kdlib-", dir=None if len(tempfile.gettempdir()) < 60 else "/tmp"
    ) as folder:
        kernel = AsyncKernelManager(
            kernel_name="python3", kernel_spec_manager=specs, transport="ipc", connection_file=f"{folder}/kernel.json"
        )
        try:
            run_sync(kernel.start_kernel)(cwd=str(cwd))
            yield kernel
        finally:
            if kernel.has_kernel:
                run_sync(kernel.shutdown_kernel)(now=True)
