"""The design of a profile's study: which runs it has, and which part each plays in its tables.

An *entry* is a row's worth of the comparison: one run with its method, its role and its repeat. ``plan.json`` keeps the
entries beside the results; tables read them there, and infer nothing from names or settings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kdlib.errors import KdlibError
from kdlib.study import store
from kdlib.study.kinds import kinds as all_kinds
from kdlib.study.parameters import Parameters
from kdlib.study.plan import Planner, Step, with_upstream
from kdlib.study.profiles import load, parameters

OBJECTIVES = {"ce": "CE", "kd": "KD", "online_kd": "online KD"}
TEACHERS = {
    "frozen": "teacher (frozen)",
    "lora": "teacher (LoRA-adapted)",
    "full": "teacher (fine-tuned)",
    "scratch": "teacher (from scratch)",
}
UNTRAINED = "untrained"
# Runs that are being looked for: a profile may name one that its own plan is to find.
_sought: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Entry:
    """One run of a comparison and the part it plays.

    Attributes:
        method: what tables call it; the entries of one method differ in their repeat alone.
        role: teacher, single or ensemble.
        repeat: number of the independent repeat, which sets its seeds.
        step: the run.
        objective: of what trained it, or its members: ce, kd, online_kd or untrained; None for a teacher.
        formed: how members of an ensemble were formed: a module of :mod:`kdlib.methods`.
        pool: of an ensemble.
        members: of an ensemble, in the order in which they were formed.
    """

    method: str
    role: str
    repeat: int
    step: Step
    objective: str | None = None
    formed: str | None = None
    pool: str | None = None
    members: tuple[Step, ...] = ()

    def record(self) -> dict[str, Any]:
        """The entry as ``plan.json`` keeps it."""
        told = {name: getattr(self, name) for name in ("method", "role", "repeat", "objective", "formed", "pool")}
        return told | {"run": self.step.id, "members": [one.id for one in self.members]}


@cache
def comparison(profile: str) -> tuple[Entry, ...]:
    """The entries of a profile's comparison: teachers, single students, and ensembles by every method and pool."""
    wanted, plan = load(profile).study, Planner(profile)
    seeds = range(1, wanted.members * wanted.repeats + 1)
    groups = [list(seeds[start : start + wanted.members]) for start in range(0, len(seeds), wanted.members)]
    found = [Entry(TEACHERS[one], "teacher", 1, plan.teacher(adaptation=one)) for one in wanted.teachers]
    for objective in wanted.objectives:
        name, student = OBJECTIVES[objective], {"objective": objective}
        for seed in seeds:
            found.append(Entry(f"{name} student", "single", seed, plan.student(**student, seed=seed), objective))
        found += _ensembles(plan, f"{name} ensemble", objective, groups, wanted.pools, student=student)
    untrained = {"objective": "ce", "epochs": 0}
    found += _ensembles(plan, f"{UNTRAINED} ensemble", UNTRAINED, groups[:1], ["probability"], student=untrained)
    for name, options in wanted.methods.items():
        found += _ensembles(plan, name, None, groups, wanted.pools, **{"method": name, **options})
    return tuple(found)


def _ensembles(
    plan: Planner,
    name: str,
    objective: str | None,
    groups: Sequence[list[int]],
    pools: Sequence[str],
    method: str = "independent",
    student: dict | None = None,
    **options: Any,
) -> list[Entry]:
    found = []
    for repeat, seeds in enumerate(groups, 1):
        members = tuple(plan.members(method, seeds, student, **options))
        for pool in pools:
            asked = {"method": method, "options": options, "student": student or {}, "seeds": seeds, "pool": pool}
            label = f"{name} {repeat}, {pool} pool"
            step = plan.step(parameters("05_ensemble", plan.profile, **asked), label)
            shown = name if objective == UNTRAINED else f"{name} ({pool} pool)"
            # The first of a chain may learn otherwise than the rest, and a method may need another objective than the section's.
            trained = objective or _objective(members[-1])
            found.append(Entry(shown, "ensemble", repeat, step, trained, method, pool, members))
    return found


def _objective(member: Step) -> str:
    """What a member learned from, alone or with others."""
    return member.inputs.get("joint", member).parameters.objective


@cache
def cells(profile: str, name: str) -> dict[str, tuple[Step, ...]]:
    """The runs that one of the profile's grids compares: those of each cell, one a seed, or an ensemble a group of seeds.

    Raises:
        KdlibError: the profile has no such grid, or two of its cells are the same.
    """
    named = load(profile).study.grids
    if name not in named:
        raise KdlibError(f"grid must be one of profile {profile!r}'s study: grids ({', '.join(named) or 'none'}), got {name!r}.")
    plan, found, seen = Planner(profile), {}, {}
    for cell, seed, values in _cells(profile, name):
        one = plan.step(values, f"{name}: {cell}, seed {seed}")
        if one.id in seen:
            raise KdlibError(f"Cells of grid {name!r} must be different, got {cell!r} and {seen[one.id]!r} alike.")
        seen[one.id] = cell
        found.setdefault(cell, []).append(one)
    return {cell: tuple(steps) for cell, steps in found.items()}


def _cells(profile: str, name: str) -> Iterator[tuple[str, int, Parameters]]:
    asked = load(profile).study.grids[name]
    for cell, changes in asked.cells.items():
        if asked.members:
            size = changes.pop("members", asked.members)
            for start in range(0, len(asked.seeds), asked.members):
                seeds = asked.seeds[start : start + size]
                yield cell, seeds[0], parameters("05_ensemble", profile, **changes, seeds=seeds)
            continue
        for seed in asked.seeds:
            if name == "targets":
                yield cell, seed, parameters("06_fidelity", profile, student=changes, seed=seed)
            else:
                yield cell, seed, parameters("04_student", profile, **changes, seed=seed)


@cache
def study(profile: str, grids: tuple[str, ...] = ()) -> tuple[Step, ...]:
    """Every run of the profile's comparison and of the grids that are named, upstream first."""
    return tuple(with_upstream([*(one.step for one in comparison(profile)), *(one for name in grids for one in grid(profile, name))]))


def wanted(profile: str, grids: Sequence[str] = ()) -> list[str]:
    """Ids of the runs that tables are made of: those of entries and cells, and what these read but for scores.

    Scores choose text and no table tells of them, so where what they chose is finished they are not made again.
    """
    ends = [one.step for one in comparison(profile)]
    ends += [one for name in grids for steps in cells(profile, name).values() for one in steps]
    return [one.id for one in with_upstream(ends) if one.kind != "scores"]


def missing(profile: str, planned: Mapping[str, Step], wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """Ids of the runs to make, and of finished ones whose artefact these read and that is not there, upstream included.

    Args:
        planned: the study, by id; wanted: the ids that must be there in the end.
    """
    absent, lacking, waiting = set(), set(), [planned[one] for one in wanted if not store.find(profile, one)]
    while waiting:
        one = waiting.pop()
        if one.id in absent | lacking or store.find(profile, one.id, with_artefact=True):
            continue
        (lacking if store.find(profile, one.id) else absent).add(one.id)
        waiting += one.inputs.values()
    return [one for one in planned if one in absent], [one for one in planned if one in lacking]


def grid(profile: str, name: str) -> tuple[Step, ...]:
    """Every run of one of the profile's grids, upstream first."""
    return tuple(with_upstream([one for steps in cells(profile, name).values() for one in steps]))


def find(profile: str, name: str) -> Step:
    """The planned run with this id or label, in the profile's comparison or in one of its grids.

    Raises:
        KdlibError: no run has it, or several have the label.
    """
    for grids in ((), tuple(load(profile).study.grids)):
        found = [one for one in _planned(profile, grids, name) if name in (one.id, one.label)]
        if len({one.id for one in found}) == 1:
            return found[0]
        if found:
            raise KdlibError(f"{name!r} must name one run, got {', '.join(one.id for one in found)}. Give the id.")
    raise KdlibError(
        f"{name!r} must be the id or label of a run that profile {profile!r} plans. See them with: kdlib list --runs --profile {profile}"
    )


def _planned(profile: str, grids: tuple[str, ...], sought: str) -> tuple[Step, ...]:
    """The profile's study; nothing while that plan is itself looking for the same run."""
    if (profile, sought) in _sought:
        return ()
    _sought.add((profile, sought))
    try:
        return study(profile, grids)
    finally:
        _sought.discard((profile, sought))


def share(profile: str, grids: Sequence[str], kinds: Sequence[str] | None, part: str) -> list[Step]:
    """Every N-th of the profile's planned runs, from the I-th, for N processes side by side; the plan is kept beside the results.

    Args:
        grids: also the runs of these, or of "all".
        kinds: only runs of these kinds; None: of all.
        part: "I/N", such as 0/2 and 1/2.

    Raises:
        KdlibError: no such share, grid or kind of run.
    """
    first, slash, every = part.partition("/")
    if not (slash and first.isdecimal() and every.isdecimal() and int(first) < int(every)):
        raise KdlibError(f"--share must be I/N with I from 0 to N - 1, as in 0/2 and 1/2, got {part!r}.")
    if unknown := set(kinds or ()) - set(all_kinds()):
        raise KdlibError(f"--kinds must be among {', '.join(all_kinds())}, got {', '.join(sorted(unknown))}.")
    write(profile, begun(profile, grids))
    wanted = [one for one in study(profile, asked_grids(profile, grids)) if kinds is None or one.kind in kinds]
    return wanted[int(first) :: int(every)]


def begun(profile: str, asked: Sequence[str] = ()) -> tuple[str, ...]:
    """The grids that belong to the profile's study: those its results hold, and those asked for ("all": every one)."""
    wanted = {*asked_grids(profile, asked), *store.grids(profile)}
    return tuple(name for name in load(profile).study.grids if name in wanted)


def asked_grids(profile: str, asked: Sequence[str]) -> tuple[str, ...]:
    """The grids of these names, checked; "all" stands for every one of the profile."""
    names = tuple(load(profile).study.grids) if "all" in asked else tuple(asked)
    for name in names:
        cells(profile, name)
    return names


def write(profile: str, grids: Sequence[str] = ()) -> None:
    """Keep the plan beside the results, for analyses and for whoever regenerates figures later."""
    folder = store.results(profile)
    folder.mkdir(parents=True, exist_ok=True)
    entries = comparison(profile)
    found = {
        "profile": profile,
        "runs": _records(with_upstream([one.step for one in entries])),
        "entries": [one.record() for one in entries],
    }
    if grids:
        found["grids"] = {
            # Cells as a list, since JSON objects are written in the order of their names.
            name: {
                "runs": _records(grid(profile, name)),
                "cells": [[cell, [one.id for one in steps]] for cell, steps in cells(profile, name).items()],
            }
            | _formed(profile, name)
            for name in grids
        }
    if not (folder / "plan.json").is_file() or store.read_json(folder / "plan.json") != found:
        store.write_json(folder / "plan.json", found)


def _formed(profile: str, name: str) -> dict[str, dict[str, list[str]]]:
    """The members of each ensemble of a grid, in the order in which they were formed; their inputs are in that of their ids."""
    if not load(profile).study.grids[name].members:
        return {}
    found = {}
    for one in (one for steps in cells(profile, name).values() for one in steps):
        asked = one.parameters
        members = Planner(profile).members(asked.method, asked.seeds, asked.student, **asked.options)
        found[one.id] = [member.id for member in members]
    return {"members": found}


def _records(steps: Sequence[Step]) -> list[dict]:
    return [
        {"id": one.id, "label": one.label, "inputs": [upstream.id for upstream in one.inputs.values()]} for one in steps
    ]
