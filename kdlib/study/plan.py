"""From parameters to runs: what each run is made of, and which runs a profile's study needs.

Ids follow from settings alone, so the whole plan of a study is known before anything is computed, and without torch.
"""

import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import yaml

from kdlib.data import sources
from kdlib.errors import KdlibError
from kdlib.study import store
from kdlib.study.parameters import (
    ON_LOGITS,
    ON_OUTCOMES,
    Parameters,
    StudentParameters,
    TargetParameters,
    TrainingParameters,
)
from kdlib.study.profiles import NOTEBOOKS, Profile, catalogue, load, parameters
from kdlib.study.revisions import code_versions

# The modules whose code determines a run of each kind, beyond what its inputs already carry.
CODE = {
    "corpus": ("producers", "sources", "readers", "documents", "corpus", "vocabulary"),
    "teacher": ("producers", "models", "losses", "training", "evaluation"),
    "targets": ("producers", "models", "cache"),
    "student": ("producers", "models", "losses", "cache", "training", "evaluation"),
    "ensemble": ("producers", "models", "ensemble", "evaluation"),
    "fidelity": ("producers", "models", "losses", "cache", "fidelity"),
}
NOTEBOOK = {
    "corpus": "01_corpus",
    "teacher": "02_teacher",
    "targets": "03_targets",
    "student": "04_student",
    "ensemble": "05_ensemble",
    "fidelity": "06_fidelity",
}


@dataclass(frozen=True)
class Step:
    """One run to make: its parameters and the runs it reads."""

    kind: str
    parameters: Parameters
    inputs: dict[str, "Step"] = field(default_factory=dict)
    label: str = ""

    @cached_property
    def settings(self) -> dict:
        """Everything that determines the result."""
        return {
            "kind": self.kind,
            "parameters": self.parameters.identity(),
            "inputs": {name: step.id for name, step in self.inputs.items()},
            "sources": _source_identities(self),
            "code": code_versions((*CODE[self.kind], *_further_code(self.parameters))),
        }

    @cached_property
    def id(self) -> str:
        """``<kind>-<12 hex digits>``."""
        return f"{self.kind}-{store.digest(self.settings)}"

    def run(self) -> store.Run:
        """The finished run.

        Raises:
            KdlibError: it has not been made yet; the message holds the command that makes it.
        """
        if found := store.find(self.parameters.profile, self.id):
            return found
        raise KdlibError(f"{self.id} ({self.label or self.kind}) has not been made yet. Make it with: {command(self)}")


def _further_code(values: Parameters) -> list[str]:
    """Modules that shape only those models that ask for them."""
    uses = {"low_precision": isinstance(values, TrainingParameters) and values.low_precision != "none"}
    if isinstance(values, StudentParameters):
        uses |= {
            "initialisation": values.initialisation != "random" or values.noise > 0,
            "schedules": bool(
                values.stages
                or values.temperature_schedule
                or (values.kd_weight_schedule and values.objective != "ce")
            ),
            "selection": values.selection is not None,
            "synthetic": values.text != "real",
        }
    return [module for module, used in uses.items() if used]


def _source_identities(step: Step) -> dict[str, str]:
    values = step.parameters
    if step.kind == "corpus":
        names = [*values.domains, values.ood] + ([values.tokenizer] if values.tokenizer != "train" else [])
    elif step.kind == "teacher" and values.adaptation != "scratch":
        names = [values.source]
    elif step.kind == "targets" and values.source.endswith(".h5"):
        return {"targets": _identity(values.source, values.profile)}
    else:
        names = []
    return {name: _identity(name, values.profile) for name in names}


@cache
def _identity(source: str, profile: str) -> str:
    # A study of many runs asks for the same few, each time through the whole catalogue.
    return sources.identity(sources.resolve(source, catalogue(profile)))


def step(values: Parameters, label: str = "") -> Step:
    """The step that these parameters describe; its upstream comes from the profile they name."""
    profile = values.profile
    kind = _kind(values)
    if kind == "corpus":
        return Step(kind, values, {}, label or "corpus")
    inputs = {"corpus": step(parameters("01_corpus", profile))}
    if kind == "teacher":
        return Step(kind, values, inputs, label or f"teacher {values.adaptation}")
    if kind == "targets" and values.external:
        return Step(kind, values, inputs, label or f"targets from {values.source}")
    if kind == "targets":
        inputs["teacher"] = step(parameters("02_teacher", profile, adaptation=values.teacher))
        if values.source == "dense":
            whole = {"kind": "dense", "source": "teacher", "precision": values.precision}
            inputs["dense"] = step(parameters("03_targets", profile, teacher=values.teacher, **whole))
        return Step(kind, values, inputs, label or f"targets {values.kind}")
    if kind == "fidelity":
        student = parameters("04_student", profile, **{**values.student, "seed": values.seed})
        if student.objective != "kd":
            raise KdlibError(
                f"The fidelity of targets is that of a student with objective kd; found {student.objective}."
            )
        inputs |= _student_inputs(student) | {"student": step(student)}
        # Targets from outside are compared with the profile's own teacher.
        inputs["teacher"] = step(parameters("02_teacher", profile, adaptation=student.teacher))
        return Step(kind, values, inputs, label or f"fidelity of seed {values.seed}")
    if kind == "student":
        inputs |= _student_inputs(values)
        name = values.objective if values.epochs else "untrained"
        return Step(kind, values, inputs, label or f"student {name} seed {values.seed}")
    for seed in values.seeds:
        inputs[f"member {seed}"] = step(parameters("04_student", profile, **{**values.student, "seed": seed}))
    return Step(kind, values, inputs, label or f"ensemble of {len(values.seeds)}, {values.pool} pool")


def _student_inputs(values: StudentParameters) -> dict[str, Step]:
    profile, inputs = values.profile, {}
    selects = (values.selection.by or "") if values.selection else ""
    if values.selection and values.selection.domains:
        _refuse_unknown_domains(values.selection.domains, parameters("01_corpus", profile).domains)
    if values.objective == "online_kd" or values.initialisation != "random" or values.text == "teacher":
        inputs["teacher"] = step(parameters("02_teacher", profile, adaptation=values.teacher))
    if values.objective == "kd" or selects.startswith("teacher"):
        # Sparse targets serve the temperature they were written at, and no other.
        wanted = {"teacher": values.teacher, "temperature": values.temperature, **values.targets}
        if values.fresh_draws:
            wanted["seed"] = values.seed
        targets = parameters("03_targets", profile, **wanted)
        if values.fresh_draws and (targets.source != "dense" or targets.kind not in ("sampled", "topk_sampled")):
            raise KdlibError(
                "fresh_draws need targets that are drawn from dense ones; expected targets with source dense and kind sampled or "
                f"topk_sampled, found source {targets.source} and kind {targets.kind}."
            )
        if targets.kind != "dense" and targets.temperature != values.temperature:
            raise KdlibError(
                f"The student has temperature {values.temperature}, and its targets would be kept at {targets.temperature}; a sampled or "
                "truncated distribution cannot be re-tempered. Leave temperature out of targets, since they follow the student's, "
                "or use kind dense, which serves any."
            )
        if values.objective == "kd":
            _refuse_unserved(values.divergence, targets)
        inputs["targets"] = step(targets)
    if selects == "student_nll":
        # Without a selection of its own, or it would need a scorer in turn.
        inputs["scorer"] = step(parameters("04_student", profile, objective="ce", seed=1, selection=None))
    return inputs


def _refuse_unknown_domains(asked: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(asked) - set(known)):
        raise KdlibError(
            f"The selection names the domains {', '.join(unknown)}, which the corpus does not train on; expected some of {', '.join(known)}."
        )


def _refuse_unserved(divergence: str, targets: TargetParameters) -> None:
    serve = {"topk": ("forward_kl", *ON_OUTCOMES), "dense": ("forward_kl", *ON_OUTCOMES, *ON_LOGITS)}
    if divergence not in serve.get(targets.kind, ("forward_kl",)):
        able = [kind for kind, names in serve.items() if divergence in names]
        raise KdlibError(
            f"The divergence {divergence} cannot be computed from targets of kind {targets.kind}, which do not hold what it "
            f'compares. Use targets={{"kind": "{able[0]}"}}{" or " + able[1] if able[1:] else ""}, objective online_kd, or forward_kl.'
        )


def _kind(values: Parameters) -> str:
    for kind, notebook in NOTEBOOK.items():
        if type(values) is NOTEBOOKS[notebook][0]:
            return kind
    raise KdlibError(
        f"{type(values).__name__} describes no run; expected the parameters of one of {', '.join(NOTEBOOK.values())}."
    )


@cache
def study(profile: str, grids: tuple[str, ...] = ()) -> tuple[Step, ...]:
    """Every run of the profile's comparison and of the grids that are named, upstream first."""
    return tuple(_with_upstream([*comparison(profile), *(one for name in grids for one in grid(profile, name))]))


def grid(profile: str, name: str) -> tuple[Step, ...]:
    """Every run of one of the profile's grids, upstream first."""
    return tuple(_with_upstream([one for steps in cells(profile, name).values() for one in steps]))


@cache
def cells(profile: str, name: str) -> dict[str, tuple[Step, ...]]:
    """The runs that one of the profile's grids compares: those of each cell, one a seed.

    Raises:
        KdlibError: the profile has no such grid, or two of its cells are the same student.
    """
    named = load(profile).study.grids
    if name not in named:
        raise KdlibError(f"Profile {profile!r} has no grid {name!r} under study: grids; found {', '.join(named) or 'none'}.")
    found, seen = {}, {}
    for cell, changes in named[name].cells.items():
        for seed in named[name].seeds:
            if name == "targets":
                values = parameters("06_fidelity", profile, student=changes, seed=seed)
            else:
                values = parameters("04_student", profile, **changes, seed=seed)
            one = step(values, f"{name}: {cell}, seed {seed}")
            if one.id in seen:
                raise KdlibError(f"In the grid {name!r}, {cell!r} and {seen[one.id]!r} are one and the same student.")
            seen[one.id] = cell
            found.setdefault(cell, []).append(one)
    return {cell: tuple(steps) for cell, steps in found.items()}


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


def comparison(profile: str) -> tuple[Step, ...]:
    """Every run of the profile's comparison, upstream first."""
    settings: Profile = load(profile)
    wanted = settings.study
    seeds = range(1, wanted.members * wanted.repeats + 1)
    pools = [list(seeds[start : start + wanted.members]) for start in range(0, len(seeds), wanted.members)]
    steps = [step(parameters("02_teacher", profile, adaptation=adaptation)) for adaptation in wanted.teachers]
    for objective in wanted.objectives:
        steps += [step(parameters("04_student", profile, objective=objective, seed=seed)) for seed in seeds]
        for number, members in enumerate(pools, 1):
            for pool in wanted.pools:
                values = parameters("05_ensemble", profile, student={"objective": objective}, seeds=members, pool=pool)
                steps.append(step(values, f"{objective} ensemble {number}, {pool} pool"))
    untrained = {"objective": "ce", "epochs": 0}
    values = parameters("05_ensemble", profile, student=untrained, seeds=pools[0], pool="probability")
    return tuple(_with_upstream([*steps, step(values, "untrained ensemble")]))


def _with_upstream(steps: list[Step]) -> list[Step]:
    ordered: dict[str, Step] = {}

    def visit(one: Step) -> None:
        for upstream in one.inputs.values():
            visit(upstream)
        ordered.setdefault(one.id, one)

    for one in steps:
        visit(one)
    return list(ordered.values())


def write(profile: str, grids: Sequence[str] = ()) -> None:
    """Keep the plan beside the results, for analyses and for whoever regenerates figures later."""
    folder = store.results(profile)
    folder.mkdir(parents=True, exist_ok=True)
    found = {"profile": profile, "runs": _entries(comparison(profile))}
    if grids:
        found["grids"] = {
            # Cells as a list, since JSON objects are written in the order of their names.
            name: {
                "runs": _entries(grid(profile, name)),
                "cells": [[cell, [one.id for one in steps]] for cell, steps in cells(profile, name).items()],
            }
            for name in grids
        }
    if not (folder / "plan.json").is_file() or store.read_json(folder / "plan.json") != found:
        store.write_json(folder / "plan.json", found)


def _entries(steps: Sequence[Step]) -> list[dict]:
    return [
        {"id": one.id, "label": one.label, "inputs": [upstream.id for upstream in one.inputs.values()]} for one in steps
    ]


def changes(one: Step) -> dict:
    """The parameters in which a step differs from its profile's section: what its command line has to say."""
    base = parameters(NOTEBOOK[one.kind], one.parameters.profile).model_dump()
    # As text, because the order of learning_rate_multipliers counts.
    return {name: value for name, value in one.parameters.model_dump().items() if repr(base[name]) != repr(value)}


def command(one: Step) -> str:
    """The shell command that makes a step."""
    words = ["python", "-m", "kdlib.study.runner", f"notebooks/{NOTEBOOK[one.kind]}.ipynb", "--profile", one.parameters.profile]
    for name, value in changes(one).items():
        words += ["--set", f"{name}={_yaml(value)}"]
    return shlex.join(words)


def _yaml(value: Any) -> str:
    """A value as kdlib.study.runner reads it back, in ASCII. Not as JSON, whose 5e-05 and pairs of surrogates YAML reads as other things."""
    # In a list, or a number alone would be followed by a mark of the document's end.
    return yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=math.inf)[1:-2]


if __name__ == "__main__":
    # python -m kdlib.study.plan PROFILE [GRID …]: what `make paper` is about to make.
    try:
        write(sys.argv[1], begun(sys.argv[1], sys.argv[2:]))
    except KdlibError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
