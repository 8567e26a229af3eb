"""The run store: one folder per result, named by everything that determines it.

``results/<profile>/runs/<kind>-<12 hex digits>/`` holds ``settings.json``, ``metrics.json``, ``provenance.json`` and whatever
the producer writes. The id is a hash of the resolved settings, the ids of the inputs and the revisions of the code used:
never of where or when the run was made. A run is written in ``results/<profile>/work/<id>`` and renamed when complete, so a
folder under ``runs`` is always whole, and a killed producer finds its partial work again under the same id.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.errors import KdlibError
from kdlib.study.profiles import REPOSITORY

# What later runs read of a run. It is large and not committed, so that a clone holds the results of runs alone.
ARTEFACTS = {"corpus": "data", "teacher": "model", "targets": "targets", "student": "model", "ensemble": "model"}
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "numpy", "pandas", "scipy")


def home() -> Path:
    """Where results, figures and the paper's generated parts go: ``$KDLIB_HOME``, else the repository."""
    return Path(os.environ.get("KDLIB_HOME") or REPOSITORY).resolve()


def results(profile: str) -> Path:
    """The results folder of a profile (its name, also when the profile was given as a path)."""
    return home() / "results" / Path(profile).stem


def digest(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of a JSON-like value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path

    @property
    def id(self) -> str:
        """``<kind>-<12 hex digits>``."""
        return self.path.name

    @property
    def kind(self) -> str:
        """corpus, teacher, targets, student, ensemble or fidelity."""
        return self.id.rsplit("-", 1)[0]

    @property
    def artefact(self) -> Path | None:
        """What later runs read of it: data, targets or a model. None for a fidelity, which nothing reads."""
        return self.path / ARTEFACTS[self.kind] if self.kind in ARTEFACTS else None

    @property
    def settings(self) -> dict:
        """Resolved settings, ids of the inputs and code revisions: what the id is a hash of."""
        return read_json(self.path / "settings.json")

    @property
    def metrics(self) -> dict:
        """What the producer measured."""
        return read_json(self.path / "metrics.json")


def read_json(path: Path) -> dict:
    """A JSON file of a run.

    Raises:
        KdlibError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise KdlibError(
            f"Run file {path} cannot be read ({error}). Delete the folder {path.parent} to have the run made again."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; NaN and infinity are refused."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
    os.replace(temporary, path)


def find(profile: str, run_id: str, with_artefact: bool = False) -> Run | None:
    """The finished run of that id, if there is one; ``with_artefact``: only with what later runs read of it."""
    run = Run(results(profile) / "runs" / run_id)
    lacks = with_artefact and run.artefact is not None and not run.artefact.is_dir()
    return run if (run.path / "metrics.json").is_file() and not lacks else None


def make(
    profile: str, run_id: str, settings: dict, produce: Callable[[Path], dict], with_artefact: bool = False
) -> Run:
    """The run ``run_id``, made by ``produce`` unless it exists. While another process makes it, this one waits.

    Args:
        settings: what ``run_id`` is a hash of; kept in the run.
        produce: called with the working folder, which holds what an interrupted attempt left; returns the metrics.
        with_artefact: a run that holds its results alone is produced again for what later runs read of it; the results that
            are there stay.
    """
    if found := find(profile, run_id, with_artefact):
        return found
    work = results(profile) / "work" / run_id
    work.parent.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        if found := find(profile, run_id, with_artefact):
            return found
        work.mkdir(exist_ok=True)
        started = time.time()
        metrics = produce(work)
        target = Run(results(profile) / "runs" / run_id)
        if find(profile, run_id):
            os.replace(work / target.artefact.name, target.artefact)
            shutil.rmtree(work)
            return target
        write_json(work / "settings.json", settings)
        write_json(work / "provenance.json", provenance(started))
        write_json(work / "metrics.json", metrics)
        if target.path.exists():  # without metrics.json, or it would have been found: somebody deleted half of it
            shutil.rmtree(target.path)
        target.path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work, target.path)
    return target


@contextmanager
def _locked(work: Path):
    # Two processes asked for one run, and both would write the same files.
    import fcntl

    path = work.with_name(f"{work.name}.lock")
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that is making {work.name} in {work}.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        # Only where the run is finished: who still waits for this file, or makes a new one, finds it so.
        path.unlink(missing_ok=True)


def provenance(started: float) -> dict:
    """Where, when and with what a run was made: for the reader, not for the id."""
    commit = _git("rev-parse", "HEAD") or None
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "kdlib", "notebooks", "profiles")
    return {
        "commit": commit,
        # A copy without its history can say neither.
        "dirty": None if commit is None else bool(changed),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "lock_sha256": hashlib.sha256((REPOSITORY / "requirements.lock").read_bytes()).hexdigest(),
        "device": device(),
    }


def side_by_side(profile: str, made: Iterable[Run]) -> float:
    """How many of the profile's runs were in progress at a time, on average over the time that the runs ``made`` took.

    1 where each had the machine to itself. Speeds of runs that shared it are below what it can do.
    """
    # The pipeline makes the folder of a run before the run.
    finished = [Run(file.parent) for file in (results(profile) / "runs").glob("*/metrics.json")]
    spans = {one.id: _span(one) for one in finished}
    own = [spans[one.id] for one in made]
    shared = sum(max(0.0, min(end, b) - max(start, a)) for start, end in own for a, b in spans.values())
    # A span that rounds to nothing still holds itself.
    return max(1.0, shared / max(sum(end - start for start, end in own), 1e-9))


def _span(run: Run) -> tuple[float, float]:
    about = read_json(run.path / "provenance.json")
    start = datetime.fromisoformat(about["started"]).timestamp()
    return start, start + about["seconds"]


def device() -> str:
    """What computed, in words: the GPU's name, else the processor's with its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    # The one unit that changes speeds by a factor; torch's check is private and may go.
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return f"{_processor()}{' with AMX' if amx else ''}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def grids(profile: str) -> list[str]:
    """Names of the grids that the profile's results hold, by ``results/<profile>/plan.json``; none if there is no plan."""
    plan = results(profile) / "plan.json"
    return list(read_json(plan).get("grids", {})) if plan.is_file() else []


def table(profile: str) -> pd.DataFrame:
    """Every run of the profile's comparison, a row each: id, kind, label and settings; index is the id.

    Reads ``results/<profile>/plan.json``, so committed results are found whatever the code has become since.

    Raises:
        KdlibError: the profile was never run here, or planned runs are missing (they are named).
    """
    labels = {entry["id"]: entry["label"] for entry in _plan(profile)["runs"]}
    rows = [
        {**run.settings["parameters"], "id": run.id, "kind": run.kind, "label": labels[run.id], "run": run}
        for run in _planned(profile, labels)
    ]
    return pd.DataFrame(rows).set_index("id", drop=False)


def cells(profile: str, grid: str) -> dict[str, list[Run]]:
    """The runs of a grid: those of each of its cells, one a seed, in the order of the profile.

    Raises:
        KdlibError: as :func:`table`; or the results hold no such grid.
    """
    plan = _plan(profile).get("grids", {})
    if grid not in plan:
        raise KdlibError(
            f"The results of profile {profile!r} hold no grid {grid!r}. If the profile names it under study: grids, make it with: "
            f"make paper PROFILE={profile} GRIDS={grid}"
        )
    found = _planned(profile, {entry["id"]: entry["label"] for entry in plan[grid]["runs"]})
    made = {run.id: run for run in found}
    return {cell: [made[one] for one in ids] for cell, ids in plan[grid]["cells"]}


def _plan(profile: str) -> dict:
    path = results(profile) / "plan.json"
    if not path.is_file():
        raise KdlibError(
            f"No results of profile {profile!r} in {path.parent}. Make them with: make paper PROFILE={profile}"
        )
    return read_json(path)


def _planned(profile: str, labels: dict[str, str]) -> list[Run]:
    """The runs with these ids, all of them finished."""
    found = {one: find(profile, one) for one in labels}
    missing = [f"{labels[one]} ({one})" for one, run in found.items() if run is None]
    if missing:
        raise KdlibError(
            f"Profile {profile!r} lacks {len(missing)} of {len(labels)} planned runs: {', '.join(missing[:8])}"
            f"{' …' if len(missing) > 8 else ''}. Finish it with: make paper PROFILE={profile}"
        )
    return list(found.values())
