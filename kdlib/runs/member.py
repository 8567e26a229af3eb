"""Member: one of the students that were trained together, evaluated and kept as any other student."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field, PositiveInt

from kdlib.errors import KdlibError
from kdlib.study import parameters
from kdlib.study.plan import Planner, Step
from kdlib.study.refs import Ref
from kdlib.study.store import Run

NOTEBOOK, LEAVES = "09_member", "model"


class Parameters(parameters.Parameters):
    """``09_member``."""

    UNREAD: ClassVar = parameters.Parameters.UNREAD | {"of"}

    of: Ref = Field({"joint": {}}, description="the run in which it was trained: {joint: {…}}, or a run id")
    number: PositiveInt = Field(1, description="which of its members, in the order of their seeds")


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """The corpus, and the run in which it was trained.

    Raises:
        KdlibError: that run has fewer members.
    """
    joint = plan.resolve(values.of, ("members",))
    if values.number > len(joint.parameters.seeds):
        raise KdlibError(f"`number` must be 1 to {len(joint.parameters.seeds)}, one of the members of {joint.label}, got {values.number}.")
    return {"corpus": joint.inputs["corpus"], "joint": joint}


def downloads(values: Parameters) -> dict[str, str]:
    """Nothing."""
    return {}


def label(values: Parameters) -> str:
    """Its number."""
    return f"member {values.number} of students trained together"


def produce(step: Step, inputs: dict[str, Run], folder: Path) -> dict:
    """Evaluate the member and save it.

    ``training`` is its share: the tokens that it saw, and an equal part of the operations and the time. Its ``work`` is that of the
    evaluation alone, since the run that trained it is upstream.
    """
    from kdlib import models
    from kdlib.runs import artefacts

    values, corpus, joint = step.parameters, inputs["corpus"], inputs["joint"]
    data, block_length, together = artefacts.splits(corpus), artefacts.block_length(corpus), step.inputs["joint"].parameters
    model = artefacts.load_model(joint, f"members/{values.number}")
    metrics = artefacts.evaluate_into(folder, model, data, block_length, together.members[0].precision)
    metrics |= {"training": _share(joint.metrics["training"], len(together.seeds)), "parameters": models.parameters_by_component(model)}
    artefacts.save_model(model, artefacts.load_tokenizer(corpus), folder, step, corpus, metrics)
    return metrics


def _share(training: dict, members: int) -> dict:
    seconds, flops = training["seconds"] / members, training["flops"] // members
    speed = training["tokens"] / seconds if training["tokens"] else None
    return training | {"seconds": seconds, "flops": flops, "tokens_per_second": speed}
