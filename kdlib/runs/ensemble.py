"""Ensemble: the models of several runs, pooled into one."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from kdlib.study import parameters
from kdlib.study.plan import Planner, Step
from kdlib.study.refs import Ref
from kdlib.study.store import Run

NOTEBOOK, LEAVES = "05_ensemble", "model"


class Parameters(parameters.Parameters):
    """``05_ensemble``: members by a method and its seeds, or by name."""

    # Members count by the ids of their runs, however they were named.
    UNREAD: ClassVar = parameters.Parameters.UNREAD | {"method", "options", "student", "seeds", "members"}

    method: str = Field("independent", description="how members are formed: a module of kdlib.methods")
    options: dict[str, Any] = Field({}, description="options of the method, such as share of bagging")
    student: parameters.Settings = Field(description="what sets all members apart from the profile's student section")
    seeds: list[parameters.Seed] = Field(min_length=1, description="one member a seed")
    members: Annotated[list[Ref], Field(min_length=1)] | None = Field(
        None, description="these runs, in place of method, options, student and seeds"
    )
    pool: parameters.Pool = Field(
        description="probability: arithmetic mean of distributions; logit: geometric mean, renormalised"
    )
    precision: parameters.Precision = Field(description="autocast of the evaluation")

    @model_validator(mode="after")
    def _members_differ(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be unique, since a member is a seed, got {self.seeds}")
        return self


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """The corpus, and the members in the order of their ids: the same members are the same ensemble."""
    if values.members is None:
        members = plan.members(values.method, values.seeds, values.student, **values.options)
    else:
        members = [plan.resolve(one) for one in values.members]
    return {"corpus": plan.corpus()} | {f"member {n}": one for n, one in enumerate(_ordered(members), 1)}


def _ordered(members: list[Step]) -> list[Step]:
    from kdlib.errors import KdlibError

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
    """Its size, method and pool."""
    size = len(values.seeds if values.members is None else values.members)
    name = f"{values.method} " if values.members is None and values.method != "independent" else ""
    return f"{name}ensemble of {size}, {values.pool} pool"


def produce(step: Step, inputs: dict[str, Run], folder: Path) -> dict:
    """Pool the members' models, evaluate and save the ensemble."""
    from kdlib.ensemble.model import EnsembleForCausalLM
    from kdlib.runs import artefacts

    values, text = step.parameters, inputs["corpus"]
    members = [run for name, run in inputs.items() if name.startswith("member ")]
    for run in members:
        artefacts.require_same_vocabulary(run, text)
    loaded = [artefacts.load_model(run) for run in members]
    model = EnsembleForCausalLM.from_members(loaded, values.pool).to(artefacts.device())
    data, block_length = artefacts.splits(text), artefacts.block_length(text)
    counted = [run.metrics["parameters"] for run in members]
    metrics = artefacts.evaluate_into(folder, model, data, block_length, values.precision) | {
        "members": [run.id for run in members],
        "parameters": {name: sum(one[name] for one in counted) for name in counted[0]},
    }
    artefacts.save_model(model, artefacts.load_tokenizer(text), folder, step, metrics)
    return metrics
