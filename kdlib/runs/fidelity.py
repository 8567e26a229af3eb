"""Fidelity: how near a student's targets, and the student itself, come to the teacher's whole distribution."""

import time
from pathlib import Path
from typing import ClassVar

from pydantic import Field, PositiveInt

from kdlib.errors import KdlibError
from kdlib.study import parameters
from kdlib.study.plan import Planner, Step
from kdlib.study.store import Run
from kdlib.study.work import entry

NOTEBOOK, LEAVES = "06_fidelity", None


class Parameters(parameters.Parameters):
    """``06_fidelity``."""

    UNREAD: ClassVar = parameters.Parameters.UNREAD | {"student", "seed"}

    student: parameters.Settings = Field(description="what sets the student apart from the profile's student section")
    seed: parameters.Seed = Field(description="of the student")
    tokens: PositiveInt = Field(description="tokens of train text for the gradients, and of test text for the KL")
    precision: parameters.Precision = Field(description="autocast of the teacher's forward pass")


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """The student, what it learned from, and the teacher: for targets from outside, the profile's own."""
    student = plan.student(**values.student | {"seed": values.seed})
    if student.parameters.objective != "kd":
        raise KdlibError(
            f"objective of the student must be kd to have targets, got {student.parameters.objective}. Name another student."
        )
    teacher = plan.resolve(student.parameters.teacher)
    return {"corpus": plan.corpus(), "targets": student.inputs["targets"], "student": student, "teacher": teacher}


def downloads(values: Parameters) -> dict[str, str]:
    """Nothing."""
    return {}


def label(values: Parameters) -> str:
    """The student's seed."""
    return f"fidelity of seed {values.seed}"


def produce(step: Step, inputs: dict[str, Run], folder: Path) -> dict:
    """Compare gradients and distributions with the teacher's own."""
    import numpy as np

    from kdlib import models
    from kdlib.cache import ModelTeacher
    from kdlib.data import corpus
    from kdlib.evaluation import fidelity
    from kdlib.runs import artefacts
    from kdlib.runs.ingredients import untrained

    values, settings, text = step.parameters, step.inputs["student"].parameters, inputs["corpus"]
    data, block_length = artefacts.splits(text), artefacts.block_length(text)
    student = artefacts.load_model(inputs["student"])
    teacher = ModelTeacher(artefacts.load_model(inputs["teacher"]), models.precision(values.precision))
    cache = artefacts.open_targets(inputs["targets"], text, data["train"], settings.temperature)
    rows = max(1, values.tokens // block_length)
    # Spread over the split, the same rows for every cache and student.
    train, test = (
        np.random.default_rng(0).permutation(corpus.pack(data[name].windows(block_length), block_length))[:rows]
        for name in ("train", "test")
    )
    fresh = untrained(settings, artefacts.load_tokenizer(text), block_length)
    started = time.perf_counter()
    initial, trained = fidelity.gradient_angles([fresh, student], teacher, cache, data["train"], train)
    distance = fidelity.divergence(student, teacher, data["test"], test)
    flops = fidelity.flops(student, teacher.model, cache, train, test)
    evaluated = inputs["student"].metrics["evaluation"]["test"]
    return {
        "work": {"evaluation": entry(flops, time.perf_counter() - started)},
        "angle_initial": initial,
        "angle_trained": trained,
        "teacher_kl": distance,
        "bytes_per_token": inputs["targets"].metrics["bytes_per_token"],
        "entries_per_token": inputs["targets"].metrics["distinct_ids_per_token"],
        "test": {name: evaluated[name] for name in ("nll", "ece", "full_ece", "nll_calibrated")},
    }
