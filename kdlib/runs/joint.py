"""Joint: several students trained together on the same rows, each for itself and for their pool."""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from kdlib.errors import KdlibError
from kdlib.runs import student
from kdlib.study import parameters, profiles
from kdlib.study.plan import Planner, Step
from kdlib.study.store import Run
from kdlib.study.work import total

NOTEBOOK, LEAVES = "09_joint", "members"


class Parameters(parameters.Parameters):
    """``09_joint``."""

    student: parameters.Settings = Field({}, description="what sets all members apart from the profile's student section")
    seeds: parameters.Seeds = Field(
        [1, 2], min_length=2, description="of the members' initialisation, one a member; all see the rows in the order of the first"
    )
    coupling: parameters.Share = Field(
        0.5, description="weight of the pool's loss; the members' own have 1 - coupling: 0 independent, 1 the pool alone"
    )
    pool: parameters.Pool = Field("logit", description="probability: arithmetic mean of distributions; logit: geometric mean, renormalised")

    @cached_property
    def members(self) -> list[parameters.TrainingParameters]:
        """The settings of each member, a student's."""
        return [profiles.parameters(student.NOTEBOOK, self.profile, **self.student | {"seed": seed}) for seed in self.seeds]

    @property
    def objective(self) -> str:
        """The members'."""
        return self.members[0].objective

    @property
    def low_precision(self) -> str:
        """The members'."""
        return self.members[0].low_precision

    def identity(self) -> dict[str, Any]:
        """With all settings of the members, whose seeds stand apart."""
        shared = self.members[0].identity()
        return super().identity() | {"student": {name: value for name, value in shared.items() if name != "seed"}}


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """What a student with these settings reads.

    Raises:
        KdlibError: settings that members trained together cannot have.
    """
    one = plan.student(**values.student | {"seed": values.seeds[0]})
    refused = {
        "stages": one.parameters.stages,
        "features": one.parameters.features,
        "beside": one.parameters.beside,
        "start": one.parameters.start,
        "divergence": one.parameters.divergence != "forward_kl",
        "low_precision": one.parameters.low_precision == "optimizer_and_backward",
    }
    if found := [name for name, asked in refused.items() if asked]:
        name = found[0]
        raise KdlibError(f"Members that are trained together must be without {name}, got {getattr(one.parameters, name)}. Leave it out.")
    return one.inputs


def downloads(values: Parameters) -> dict[str, str]:
    """Nothing."""
    return {}


def label(values: Parameters) -> str:
    """How many, and how they are coupled."""
    return f"{len(values.seeds)} students together, coupling {values.coupling:g}, {values.pool} pool"


def produce(step: Step, inputs: dict[str, Run], folder: Path) -> dict:
    """Build and train the members; leaves each in ``members``, numbered from 1 in the order of their seeds."""
    from kdlib import models
    from kdlib.ensemble.model import EnsembleForCausalLM
    from kdlib.runs import artefacts, ingredients
    from kdlib.training import Coupling, JointTrainer, discard_checkpoints, train_model

    values, corpus = step.parameters, inputs["corpus"]
    tokenizer, block_length = artefacts.load_tokenizer(corpus), artefacts.block_length(corpus)
    data, teacher, first = artefacts.splits(corpus), ingredients.load_teacher(inputs), values.members[0]
    members = [ingredients.initial(one, inputs, tokenizer, block_length, teacher) for one in values.members]
    model, coupling = EnsembleForCausalLM.from_members(members, values.pool), Coupling(values.coupling, values.pool)
    chosen, generation = ingredients.chosen_text(first, inputs, data["train"], tokenizer, block_length)
    training = train_model(
        model,
        first,
        chosen,
        data["validation"],
        block_length,
        folder,
        objective=ingredients.objective_of(first, inputs, data["train"], model, teacher, coupling),
        multipliers=first.learning_rate_multipliers,
        kind=JointTrainer,
    )
    work = training.pop("work")
    if first.objective == "online_kd":
        training["teacher_flops"] = work["teacher_forward"]["flops"]
    # What an attempt that was killed after its training left behind.
    shutil.rmtree(folder / LEAVES, ignore_errors=True)
    for number, member in enumerate(members, 1):
        models.save(member, tokenizer, folder / LEAVES / str(number), {"run": step.id, "settings": step.settings})
    discard_checkpoints(folder)
    return {"training": training, "parameters": models.parameters_by_component(model), "work": total(work, generation)}
