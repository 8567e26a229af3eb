"""Proof that an edit changes no result: a small study, made by the code as last declared and by the working tree, agrees.

The study is the profile ``smoke`` with all of its grids, as it was when the code was last declared: corpus, teacher, targets,
students of every objective, ensembles and their evaluations, in about a minute each.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from kdlib.errors import KdlibError
from kdlib.study.profiles import REPOSITORY

PROFILE = "smoke"
# Where, and how fast: of what computed, not of what came out.
APART = {"cost", "seconds", "tokens_per_second", "peak_memory_bytes", "members", "work"}
TOLERANCE = 1e-6  # relative; a sum in another order, not another result


def require_same_results() -> None:
    """Make the small study with both versions of the code and compare every metric.

    Raises:
        KdlibError: they differ, with the first differences; or the declared code is not in the history.
    """
    with tempfile.TemporaryDirectory(prefix="kdlib-proof-") as folder:
        commit = _export(Path(folder) / "declared")
        print(f"comparing the working tree with commit {commit[:12]}, as last declared", file=sys.stderr)
        _edit(Path(folder) / "declared", Path(folder) / "edited")
        before, after = (_results(Path(folder) / tree, Path(folder) / home) for tree, home in (("declared", "before"), ("edited", "after")))
    found = list(differences(before, after))
    if found:
        raise KdlibError(
            f"Results must agree to keep a revision, got {len(found)} differences: {'; '.join(found[:5])}. Declare them with: "
            "kdlib revisions bump KIND"
        )


def differences(before: dict[str, dict], after: dict[str, dict], tolerance: float = TOLERANCE) -> Iterator[str]:
    """Where metrics of runs with the same name differ, in words. Runs that only one side has are left out."""
    for name in sorted(before.keys() & after.keys()):
        yield from _differing(name, before[name], after[name], tolerance)


def _differing(where: str, old: Any, new: Any, tolerance: float) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() & new.keys() - APART):
            yield from _differing(f"{where}, {key}", old[key], new[key], tolerance)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _differing(f"{where} {place}", left, right, tolerance)
    elif isinstance(old, int | float) and isinstance(new, int | float):
        if not math.isclose(old, new, rel_tol=tolerance, abs_tol=1e-9):
            yield f"{where}: {old:.9g} became {new:.9g}"
    elif old != new:
        yield f"{where}: {old!r} became {new!r}"


def _export(folder: Path) -> str:
    """The newest commit whose record of revisions is the present one, as files; returns its hash.

    Its code may be newer than the record, but then it was committed undeclared, and the comparison tells.
    """
    record = "kdlib/study/revisions.json"
    commit = _git("log", "-1", "--format=%H", "--", record).decode().strip()
    if not commit:
        raise KdlibError("The code as last declared must be in the git history to compare with, got none. Use a git clone.")
    with tarfile.open(fileobj=BytesIO(_git("archive", commit))) as archive:
        archive.extractall(folder, filter="data")
    return commit


def _edit(declared: Path, folder: Path) -> None:
    """A copy of the declared tree with the package as it is now: both versions make the same study, however profiles changed."""
    shutil.copytree(declared, folder, ignore=lambda path, _: {"kdlib"} if Path(path) == declared else set())
    shutil.copytree(REPOSITORY / "kdlib", folder / "kdlib", ignore=shutil.ignore_patterns("__pycache__"))


def _git(*arguments: str) -> bytes:
    try:
        return subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise KdlibError(f"git {arguments[0]} must work here to compare with the declared code, got: {error}") from error


def _results(tree: Path, home: Path) -> dict[str, dict]:
    """Metrics of every run of the small study, made by the code in ``tree``."""
    environment = {**os.environ, "KDLIB_HOME": str(home), "PYTHONPATH": str(tree), "KDLIB_BATCH": "1"}
    command = [sys.executable, "-m", "kdlib", "make", "--all", "--profile", PROFILE, "--grids", "all"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise KdlibError(f"The small study must run to be compared, got from {tree}: {done.stderr.strip()[-2000:]}")
    results = home / "results" / PROFILE
    plan = json.loads((results / "plan.json").read_text(encoding="utf-8"))
    planned = [*plan["runs"], *(run for grid in plan.get("grids", {}).values() for run in grid["runs"])]
    return {
        name: json.loads((results / "runs" / run / "metrics.json").read_text(encoding="utf-8"))
        for name, run in _named(planned).items()
    }


def _named(planned: list[dict]) -> dict[str, str]:
    """Run ids by label, and by ``label (2)`` and so on where a further run has it, in the order of the plan.

    Ids may differ between two versions of the code; labels are shared, as by a student of a grid and one of the comparison.
    """
    names, seen = {}, Counter()
    for one in planned:
        # Grids repeat the runs that they share with one another and with the comparison.
        if one["id"] not in names.values():
            seen[one["label"]] += 1
            place = seen[one["label"]]
            names[one["label"] if place == 1 else f"{one['label']} ({place})"] = one["id"]
    return names
