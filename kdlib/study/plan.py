"""From parameters to runs: what each run is made of, and which runs a profile's study needs.

Ids follow from settings alone, so the whole plan of a study is known before anything is computed, and without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, get_args

from kdlib.errors import KdlibError
from kdlib.study import profiles, refs, store
from kdlib.study.kinds import kinds, of_parameters
from kdlib.study.parameters import Adaptation, Parameters
from kdlib.study.revisions import code_version


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
            "sources": kinds()[self.kind].downloads(self.parameters),
            "code": code_version(self.kind),
        }

    @cached_property
    def id(self) -> str:
        """``<kind>-<12 hex digits>``."""
        return f"{self.kind}-{store.digest(self.settings)}"

    def upstream(self) -> list["Step"]:
        """Every run that it reads, directly or not, and itself last; none twice."""
        return with_upstream([self])

    def run(self) -> store.Run:
        """The finished run.

        Raises:
            KdlibError: it has not been made yet; the message holds the command that makes it.
        """
        profile = self.parameters.profile
        if found := store.find(profile, self.id):
            return found
        raise KdlibError(f"{self.id} ({self.label}) has not been made yet. Make it with: kdlib make {self.id} --profile {profile}")


class Planner:
    """Plans runs of one profile. What a run is not told comes from the profile's section of its kind.

    ::

        plan = Planner("quick")
        first = plan.student(seed=1)
        second = plan.student(seed=2, teacher=first)
        both = plan.ensemble([first, second])
    """

    def __init__(self, profile: str):
        self.profile = profile
        self._known: dict[str, Step] = {}
        self._under_way: list[Parameters] = []

    def run(self, kind: str, /, **settings: Any) -> Step:
        """A run of any kind. A :class:`Step` among the settings stands for the run itself."""
        settings = {name: self._named(value) for name, value in settings.items()}
        return self.step(profiles.parameters(kinds()[kind].NOTEBOOK, self.profile, **settings))

    def step(self, values: Parameters, label: str = "") -> Step:
        """The run that these parameters describe.

        Raises:
            KdlibError: it reads itself, as where a profile's student section names such a student as its teacher.
        """
        kind = of_parameters(values)
        if kind is None:
            raise KdlibError(f"parameters must be of a run ({', '.join(kinds())}), got {type(values).__name__}.")
        described = kinds()[kind]
        label = label or described.label(values)
        if values in self._under_way:
            raise KdlibError(
                f"A run must not lead back to itself, got {label}. End the chain of runs with a teacher, or with a student of objective ce."
            )
        self._under_way.append(values)
        try:
            found = Step(kind, values, described.inputs(values, self), label)
        finally:
            self._under_way.pop()
        self._known[found.id] = found
        return found

    def corpus(self) -> Step:
        """The profile's corpus."""
        return self.run("corpus")

    def teacher(self, **settings: Any) -> Step:
        """A teacher of the profile."""
        return self.run("teacher", **settings)

    def targets(self, **settings: Any) -> Step:
        """Cached targets."""
        return self.run("targets", **settings)

    def scores(self, **settings: Any) -> Step:
        """Scores of the train split."""
        return self.run("scores", **settings)

    def student(self, **settings: Any) -> Step:
        """A student."""
        return self.run("student", **settings)

    def ensemble(self, members: Sequence[Any], pool: str = "probability") -> Step:
        """The pool of these runs."""
        return self.run("ensemble", members=list(members), pool=pool)

    def members(self, method: str, seeds: Sequence[int], student: dict | None = None, **options: Any) -> list[Step]:
        """The runs that an ensemble-forming method pools, one a seed, in its order."""
        # By name: methods plan with this class.
        methods = import_module("kdlib.methods")
        return methods.load(method, seeds=list(seeds), student=student or {}, **options).members(self)

    def resolve(self, ref: Any, leaves: Sequence[str] = ("model",)) -> Step:
        """The run that a reference names, see :mod:`kdlib.study.refs`.

        Args:
            leaves: what is read of it: it leaves one of these.

        Raises:
            KdlibError: no run of this profile has that id, or it leaves something else.
        """
        found = self._resolved(ref)
        left = kinds()[found.kind].LEAVES
        if left not in leaves:
            raise KdlibError(
                f"A run that is named here must leave {' or '.join(leaves)}, got {found.label} ({found.id}), which leaves "
                f"{left or 'results alone'}."
            )
        return found

    def _resolved(self, ref: Any) -> Step:
        if isinstance(ref, Step):
            return ref
        if isinstance(ref, list):
            return self.ensemble(ref)
        if isinstance(ref, dict):
            ((kind, settings),) = ref.items()
            return self.run(kind, **settings)
        if ref in get_args(Adaptation):
            return self.teacher(adaptation=ref)
        if refs.RUN_ID.fullmatch(ref):
            return self._known.get(ref) or import_module("kdlib.study.design").find(self.profile, ref)
        return self.teacher(source=ref, adaptation="frozen")

    def _named(self, value: Any) -> Any:
        if isinstance(value, Step):
            self._known |= {one.id: one for one in value.upstream()}
            return value.id
        if isinstance(value, list):
            return [self._named(one) for one in value]
        return {name: self._named(one) for name, one in value.items()} if isinstance(value, dict) else value


def step(values: Parameters, label: str = "") -> Step:
    """The run that these parameters describe; what it reads comes from the profile they name."""
    return Planner(values.profile).step(values, label)


def with_upstream(steps: Sequence[Step]) -> list[Step]:
    """Every run that is needed for these, upstream first; none twice."""
    ordered: dict[str, Step] = {}

    def visit(one: Step) -> None:
        if one.id not in ordered:
            for upstream in one.inputs.values():
                visit(upstream)
            ordered[one.id] = one

    for one in steps:
        visit(one)
    return list(ordered.values())
