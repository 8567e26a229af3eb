"""Ensemble: the models of several runs, pooled into one."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from kdlib.errors import KdlibError
from kdlib.study import parameters
from kdlib.study.combining import Combine
from kdlib.study.plan import Planner, Step
from kdlib.study.refs import Ref
from kdlib.study.store import Run

NOTEBOOK, LEAVES = "05_ensemble", "model"


class Parameters(parameters.Parameters):
    """``05_ensemble``: members by a method and its seeds, or by name."""

    # Members count by the ids of their runs, however they were named.
    UNREAD: ClassVar = parameters.Parameters.UNREAD | {"method", "options", "student", "seeds", "members"}
    ABSENT: ClassVar = {"combine": None, "calibrate": False}

    method: str = Field("independent", description="how members are formed: a module of kdlib.methods")
    options: dict[str, Any] = Field({}, description="options of the method, such as share of bagging")
    student: parameters.Settings = Field(description="what sets all members apart from the profile's student section")
    seeds: parameters.Seeds = Field(min_length=1, description="one member a seed")
    members: Annotated[list[Ref], Field(min_length=1)] | None = Field(
        None, description="these runs, in place of method, options, student and seeds"
    )
    pool: parameters.Pool = Field(
        description="probability: arithmetic mean of distributions; logit: geometric mean, renormalised"
    )
    combine: Combine | None = Field(
        None,
        description="in place of equal weights: {weights: learned, keep: 4}, {power: 0.5}, {distance: {…}} or {gate: {…}}; with pool "
        "probability",
    )
    calibrate: bool = Field(
        False,
        description="whether the model that is saved is calibrated: its log-probabilities are divided by the temperature that fits "
        "calibration text best. Metrics tell of both in any case",
    )
    precision: parameters.Precision = Field(description="autocast of the evaluation")

    @model_validator(mode="after")
    def _combined_as_probabilities(self):
        size = len(self.seeds if self.members is None else self.members)
        if self.combine is not None and self.pool != "probability":
            raise ValueError(f"pool must be probability with combine, got {self.pool}")
        if self.combine is not None and (self.combine.keep or 0) > size:
            raise ValueError(f"keep must be at most {size}, the members there are, got {self.combine.keep}")
        return self

    def identity(self) -> dict[str, Any]:
        """Runs that ``combine`` names count by their ids."""
        return super().identity() | ({} if self.combine is None else {"combine": self.combine.identity()})


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """The corpus, what combining reads, and the members in the order of their ids: the same members are the same ensemble.

    Raises:
        KdlibError: members that are the same, or that know no clusters where these are needed.
    """
    if values.members is None:
        members = plan.members(values.method, values.seeds, values.student, **values.options)
    else:
        members = [plan.resolve(one) for one in values.members]
    found = {"corpus": plan.corpus()}
    how = values.combine
    if how is not None and how.gate is not None:
        found["targets"] = plan.resolve(how.gate.targets, ("targets",))
        named = how.gate.clusters
        found["clusters"] = _clusters_of(members, "gate without clusters") if named is None else plan.resolve(named, ("clusters",))
    elif how is not None and how.distance is not None:
        found["clusters"] = _clusters_of(members, "distance")
    return found | {f"member {n}": one for n, one in enumerate(_ordered(members), 1)}


def _clusters_of(members: list[Step], asked: str) -> Step:
    """The clusters that all members' texts were taken from."""
    found = {one.id: one for one in (member.inputs.get("clusters") for member in members) if one is not None}
    if len(found) != 1 or any("clusters" not in member.inputs for member in members):
        raise KdlibError(
            f"Members must have learned from the clusters of one run to be combined by {asked}, got {len(found)} such runs. Form them "
            "with method cbtm."
        )
    return next(iter(found.values()))


def _ordered(members: list[Step]) -> list[Step]:
    found = {one.id: one for one in members}
    if len(found) < len(members):
        raise KdlibError(
            f"Members of an ensemble must be different runs, got {', '.join(one.label for one in members)}. Leave out one of "
            "those that are the same."
        )
    return [found[run] for run in sorted(found)]


def downloads(values: Parameters) -> dict[str, str]:
    """Nothing."""
    return {}


def label(values: Parameters) -> str:
    """Its size, method, and how it is combined."""
    size = len(values.seeds if values.members is None else values.members)
    name = f"{values.method} " if values.members is None and values.method != "independent" else ""
    return f"{name}ensemble of {size}, {values.combine.label() if values.combine else f'{values.pool} pool'}"


def produce(step: Step, inputs: dict[str, Run], folder: Path) -> dict:
    """Combine the members' models, evaluate and save the ensemble."""
    from kdlib.ensemble.model import EnsembleForCausalLM
    from kdlib.runs import artefacts
    from kdlib.study.work import total

    values, text = step.parameters, inputs["corpus"]
    members = [run for name, run in inputs.items() if name.startswith("member ")]
    for run in members:
        artefacts.require_same_vocabulary(run, text)
    data, block_length = artefacts.splits(text), artefacts.block_length(text)
    combiner, loaded = _combiner(step, inputs, members, data)
    model = EnsembleForCausalLM.from_members(loaded, values.pool, **combiner.options).to(artefacts.device())
    counted = [run.metrics["parameters"] for run in combiner.members]
    metrics = artefacts.evaluate_into(folder, model, data, block_length, values.precision) | {
        "members": [run.id for run in combiner.members],
        "parameters": {name: sum(one[name] for one in counted) for name in counted[0]},
    }
    if values.combine is not None:
        metrics |= {"combine": combiner.metrics, "work": total(combiner.work, metrics["work"])}
    if values.calibrate:
        model.config.calibration_temperature = metrics["temperature"]
    artefacts.save_model(model, artefacts.load_tokenizer(text), folder, step, text, metrics)
    return metrics


def _combiner(step: Step, inputs: dict[str, Run], members: list[Run], data: dict):
    """How the members are combined, and the models of those that are kept."""
    from kdlib.runs import artefacts, combiners

    how = step.parameters.combine
    if how is not None and how.weights is not None:
        found = combiners.by_weights(how, members)
        return found, [artefacts.load_model(run) for run in found.members]
    loaded = [artefacts.load_model(run) for run in members]
    if how is None:
        return combiners.Combiner(members), loaded
    if how.power is not None:
        return combiners.Combiner(members, {"exponent": how.power}), loaded
    if how.distance is not None:
        return combiners.by_distance(how, step, inputs, members), loaded
    return combiners.by_gate(how, inputs, members, loaded, data["train"], step.parameters.precision), loaded
