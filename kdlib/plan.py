"""From parameters to runs: what each run is made of, and which runs a profile's study needs.

Ids follow from settings alone, so the whole plan of a study is known before anything is computed, and without torch.
"""

import json
import shlex
import sys
from dataclasses import dataclass, field
from functools import cache, cached_property

from kdlib import runs, sources
from kdlib.errors import KdlibError
from kdlib.profiles import NOTEBOOKS, Parameters, Profile, load, parameters
from kdlib.revisions import code_versions

# The modules whose code determines a run of each kind, beyond what its inputs already carry.
CODE = {
    "corpus": ("producers", "sources", "readers", "documents", "corpus", "vocabulary"),
    "teacher": ("producers", "models", "losses", "training", "evaluation"),
    "targets": ("producers", "models", "cache"),
    "student": ("producers", "models", "losses", "cache", "training", "evaluation"),
    "ensemble": ("producers", "models", "ensemble", "evaluation"),
}
NOTEBOOK = {
    "corpus": "01_corpus",
    "teacher": "02_teacher",
    "targets": "03_targets",
    "student": "04_student",
    "ensemble": "05_ensemble",
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
            "code": code_versions(CODE[self.kind]),
        }

    @cached_property
    def id(self) -> str:
        """``<kind>-<12 hex digits>``."""
        return f"{self.kind}-{runs.digest(self.settings)}"

    def run(self) -> runs.Run:
        """The finished run.

        Raises:
            KdlibError: it has not been made yet; the message holds the command that makes it.
        """
        if found := runs.find(self.parameters.profile, self.id):
            return found
        raise KdlibError(f"{self.id} ({self.label or self.kind}) has not been made yet. Make it with: {command(self)}")


def _source_identities(step: Step) -> dict[str, str]:
    values = step.parameters
    if step.kind == "corpus":
        names = [*values.domains, values.ood] + ([values.tokenizer] if values.tokenizer != "train" else [])
    elif step.kind == "teacher" and values.adaptation != "scratch":
        names = [values.source]
    else:
        names = []
    return {name: _identity(name) for name in names}


@cache
def _identity(source: str) -> str:
    # A study of many runs asks for the same few, each time through the whole catalogue.
    return sources.identity(sources.resolve(source))


def step(values: Parameters, label: str = "") -> Step:
    """The step that these parameters describe; its upstream comes from the profile they name."""
    profile = values.profile
    kind = _kind(values)
    if kind == "corpus":
        return Step(kind, values, {}, label or "corpus")
    inputs = {"corpus": step(parameters("01_corpus", profile))}
    if kind == "teacher":
        return Step(kind, values, inputs, label or f"teacher {values.adaptation}")
    if kind == "targets":
        inputs["teacher"] = step(parameters("02_teacher", profile, adaptation=values.teacher))
        return Step(kind, values, inputs, label or f"targets {values.kind}")
    if kind == "student":
        if values.objective == "kd":
            inputs["targets"] = step(parameters("03_targets", profile, teacher=values.teacher))
        elif values.objective == "online_kd":
            inputs["teacher"] = step(parameters("02_teacher", profile, adaptation=values.teacher))
        name = values.objective if values.epochs else "untrained"
        return Step(kind, values, inputs, label or f"student {name} seed {values.seed}")
    for seed in values.seeds:
        inputs[f"member {seed}"] = step(parameters("04_student", profile, **{**values.student, "seed": seed}))
    return Step(kind, values, inputs, label or f"ensemble of {len(values.seeds)}, {values.pool} pool")


def _kind(values: Parameters) -> str:
    for kind, notebook in NOTEBOOK.items():
        if type(values) is NOTEBOOKS[notebook][0]:
            return kind
    raise KdlibError(
        f"{type(values).__name__} describes no run; expected the parameters of one of {', '.join(NOTEBOOK.values())}."
    )


@cache
def study(profile: str) -> tuple[Step, ...]:
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


def write(profile: str) -> None:
    """Keep the plan beside the results, for analyses and for whoever regenerates figures later."""
    folder = runs.results(profile)
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {"id": one.id, "label": one.label, "inputs": [upstream.id for upstream in one.inputs.values()]}
        for one in study(profile)
    ]
    if not (folder / "plan.json").is_file() or runs.read_json(folder / "plan.json")["runs"] != entries:
        runs.write_json(folder / "plan.json", {"profile": profile, "runs": entries})


def changes(one: Step) -> dict:
    """The parameters in which a step differs from its profile's section: what its command line has to say."""
    base = parameters(NOTEBOOK[one.kind], one.parameters.profile).model_dump()
    return {name: value for name, value in one.parameters.model_dump().items() if base[name] != value}


def command(one: Step) -> str:
    """The shell command that makes a step."""
    words = ["python", "-m", "kdlib.run", f"notebooks/{NOTEBOOK[one.kind]}.ipynb", "--profile", one.parameters.profile]
    for name, value in changes(one).items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    return shlex.join(words)


if __name__ == "__main__":
    try:
        for name in sys.argv[1:]:
            write(name)
    except KdlibError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
