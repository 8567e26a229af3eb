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
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlib.errors import KdlibError
from kdlib.study.kinds import kinds
from kdlib.study.profiles import REPOSITORY

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "numpy", "pandas", "scipy")


def home() -> Path:
    """Where results, figures and the paper's generated parts go: ``$KDLIB_HOME``, else the repository."""
    return Path(os.environ.get("KDLIB_HOME") or REPOSITORY).resolve()


def results(profile: str) -> Path:
    """The results folder of a profile (its name, also when the profile was given as a path)."""
    return home() / "results" / Path(profile).stem


def figures(profile: str) -> Path:
    """The folder of a profile's figures."""
    return home() / "figures" / Path(profile).stem


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
        """A module of :mod:`kdlib.runs`, such as student."""
        return self.id.rsplit("-", 1)[0]

    @property
    def artefact(self) -> Path | None:
        """What later runs read of it, which is large and not committed: a clone holds results alone. None if nothing is read."""
        leaves = kinds()[self.kind].LEAVES
        return self.path / leaves if leaves else None

    def beside(self, run_id: str) -> "Run":
        """Another run of the same results."""
        return Run(self.path.with_name(run_id))

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
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise KdlibError(
            f"Run file {path} cannot be read ({error}). Delete the folder {path.parent} to have the run made again."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; NaN and infinity are refused."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
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
            are there stay, and how near the new ones come is recorded in ``again.json``.

    Raises:
        KdlibError: results that were made again are not those that are there, beyond :func:`tolerance`.
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
        if there := find(profile, run_id):
            _record_again(there, metrics, started)
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


def tolerance(old: str, new: str) -> float:
    """How far apart two evaluations of one run may lie, nats a token, made on these devices.

    The same kind of processor rounds differently from model to model, which a few thousand steps of training amplify;
    another kind (a GPU, another precision) may end as far off as another seed.
    """
    kinds_of = {bool(re.search("NVIDIA|AMD Instinct|CUDA", device)) for device in (old, new)}
    return 0.02 if len(kinds_of) == 1 else 0.15


def disagreements(old: dict, new: dict) -> tuple[float, list[str]]:
    """The largest difference of NLL between two evaluations of one run, and in words each difference beyond tolerance.

    Counts of tokens, documents and parameters must be equal.
    """
    allowed = tolerance(old["cost"]["device"], new["cost"]["device"])
    largest, told = 0.0, []
    for split, before in old.get("evaluation", {}).items():
        gap = abs(before["nll"] - new["evaluation"][split]["nll"])
        largest = max(largest, gap)
        if gap > allowed or before["tokens"] != new["evaluation"][split]["tokens"]:
            told.append(f"{split}: {before['nll']:.4f} nats on {before['tokens']} tokens, now {new['evaluation'][split]['nll']:.4f}")
    for name in ("vocabulary", "parameters", "tokens"):
        if name in old and old[name] != new[name]:
            told.append(f"{name}: {old[name]}, now {new[name]}")
    # Of a corpus, what it holds; how the card tells of it may change.
    for split, before in old.get("card", {}).get("splits", {}).items():
        if (now := new["card"]["splits"][split]["tokens"]) != before["tokens"]:
            told.append(f"{split}: {before['tokens']} tokens, now {now}")
    return largest, told


def _record_again(run: Run, metrics: dict, started: float) -> None:
    largest, told = disagreements(run.metrics, metrics)
    if told:
        raise KdlibError(
            f"{run.id} was made again and must agree with its results, got {'; '.join(told)[:600]}. If the old ones are wrong, delete {run.path}."
        )
    about = provenance(started)
    record = {name: about[name] for name in ("commit", "dirty", "started", "device")} | {"largest_difference": largest}
    before = read_json(run.path / "again.json") if (run.path / "again.json").is_file() else {"times": []}
    write_json(run.path / "again.json", {"times": [*before["times"], record]})


@contextmanager
def claimed(profile: str, run_id: str, with_artefact: bool = False) -> Iterator[Path | None]:
    """The working folder of a run that is still to be made, kept from other processes within the block; arguments as of :func:`find`.

    None if the run is finished or another process makes it: this one does not wait. Who makes the run finds what the block left.
    """
    import fcntl

    work = results(profile) / "work" / run_id
    work.parent.mkdir(parents=True, exist_ok=True)
    with open(work.with_name(f"{work.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        if find(profile, run_id, with_artefact):
            yield None
            return
        work.mkdir(exist_ok=True)
        # The lock's file stays, as after a kill: the run is not finished.
        yield work


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
    commit = _git("rev-parse", "HEAD") or exported_commit()
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "kdlib", "notebooks", "profiles")
    return {
        "commit": commit,
        "dirty": bool(changed),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "lock_sha256": hashlib.sha256((REPOSITORY / "requirements.lock").read_bytes()).hexdigest(),
        "device": device(),
    }


def exported_commit() -> str:
    """The commit that a tree without git history was exported from: git writes it into ``.git_archival.txt`` then.

    Raises:
        KdlibError: it holds none, so a run could not say what code made it.
    """
    found = (REPOSITORY / ".git_archival.txt").read_text(encoding="utf-8").partition("commit: ")[2].strip()
    if re.fullmatch("[0-9a-f]{40}", found):
        return found
    raise KdlibError(
        f"Runs must say which commit made them, got code without any in {REPOSITORY}. Use a git clone, or a copy exported with: git "
        "archive HEAD"
    )


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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
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


def entries(profile: str) -> list[dict]:
    """The entries of the profile's comparison, as ``plan.json`` keeps them (:class:`kdlib.study.design.Entry`).

    Raises:
        KdlibError: the profile was never run here.
    """
    return _plan(profile)["entries"]


def table(profile: str) -> "pd.DataFrame":
    """Every run of the profile's comparison, a row each: id, kind, label and settings; index is the id.

    Reads ``results/<profile>/plan.json``, so committed results are found whatever the code has become since. Runs that no
    entry is made of, such as scores, may be missing; they are made again only where something missing reads them.

    Raises:
        KdlibError: the profile was never run here, or runs of its entries are missing (they are named).
    """
    import pandas as pd  # planning does without

    plan = _plan(profile)
    needed = {one for entry in plan["entries"] for one in (entry["run"], *entry["members"])}
    found = _planned(profile, plan["runs"], needed)
    labels = {one["id"]: one["label"] for one in plan["runs"]}
    rows = [
        {**run.settings["parameters"], "id": run.id, "kind": run.kind, "label": labels[run.id], "run": run} for run in found
    ]
    return pd.DataFrame(rows).set_index("id", drop=False)


def formed(profile: str, grid: str) -> dict[str, list[str]]:
    """Members of each ensemble of a grid in the order in which they were formed, by the ensemble's id; {} for a grid of students."""
    return _plan(profile).get("grids", {}).get(grid, {}).get("members", {})


def cells(profile: str, grid: str) -> dict[str, list[Run]]:
    """The runs of a grid: those of each of its cells, one a seed or group of seeds, in the order of the profile.

    Raises:
        KdlibError: as :func:`table`; or the results hold no such grid.
    """
    plan = _plan(profile).get("grids", {})
    if grid not in plan:
        raise KdlibError(
            f"The results of profile {profile!r} hold no grid {grid!r}. If the profile names it under study: grids, make it with: "
            f"make paper PROFILE={profile} GRIDS={grid}"
        )
    needed = {one for _, ids in plan[grid]["cells"] for one in ids}
    made = {run.id: run for run in _planned(profile, plan[grid]["runs"], needed)}
    return {cell: [made[one] for one in ids] for cell, ids in plan[grid]["cells"]}


def _plan(profile: str) -> dict:
    path = results(profile) / "plan.json"
    if not path.is_file():
        raise KdlibError(
            f"No results of profile {profile!r} in {path.parent}. Make them with: make paper PROFILE={profile}"
        )
    return read_json(path)


def _planned(profile: str, runs: list[dict], needed: set[str]) -> list[Run]:
    """The finished runs among these; all of ``needed`` are."""
    found = {one["id"]: find(profile, one["id"]) for one in runs}
    missing = [f"{one['label']} ({one['id']})" for one in runs if one["id"] in needed and found[one["id"]] is None]
    if missing:
        raise KdlibError(
            f"Profile {profile!r} lacks {len(missing)} of {len(needed)} planned runs: {', '.join(missing[:8])}"
            f"{' …' if len(missing) > 8 else ''}. Finish it with: make paper PROFILE={profile}"
        )
    return [run for run in found.values() if run is not None]
