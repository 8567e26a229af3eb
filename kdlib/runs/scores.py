"""Scores: one number at every position of the train split, made once and read by every selection of text."""

import time
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from kdlib.study import parameters
from kdlib.study.plan import Planner, Step
from kdlib.study.refs import Ref
from kdlib.study.store import Run
from kdlib.study.work import entry

NOTEBOOK, LEAVES = "07_scores", "scores"
ON_TARGETS = "targets"


class Parameters(parameters.Parameters):
    """``07_scores``."""

    UNREAD: ClassVar = parameters.Parameters.UNREAD | {"scorer"}

    scorer: Ref = Field(
        {"targets": {}},
        description="the run that scores: {targets: {…}} reads what was kept beside them, at no cost; a teacher, student, "
        "ensemble or a list of them is evaluated on the train split"
    )
    measure: Literal["nll", "entropy"] = Field(
        "nll", description="nll: of the token that comes next; entropy: of the distribution over it; both nats"
    )
    precision: parameters.Precision = Field("auto", description="autocast of the scorer's forward pass")


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """The corpus and the scorer."""
    return {"corpus": plan.corpus(), "scorer": plan.resolve(values.scorer, ("model", ON_TARGETS))}


def downloads(values: Parameters) -> dict[str, str]:
    """Nothing."""
    return {}


def label(values: Parameters) -> str:
    """What is measured."""
    return f"scores by {values.measure}"


def produce(step: Step, inputs: dict[str, Run], folder: Path) -> dict:
    """Score every predicting position; ``scores/scores.npy`` is float32 [positions], 0 where nothing is predicted."""
    import numpy as np

    from kdlib.data import corpus
    from kdlib.runs import artefacts

    values, text, scorer = step.parameters, inputs["corpus"], inputs["scorer"]
    train = corpus.load_split(text.path / "data", "train")
    predicts = corpus.predicting_positions(train)
    scores, work = np.zeros(len(train.tokens), dtype=np.float32), {}
    if scorer.kind == ON_TARGETS:
        kept = scorer.settings["parameters"].get("temperature", 1.0)
        cache = artefacts.open_targets(scorer, text, train, kept)
        scores[predicts] = cache.statistics(predicts)[values.measure]
    else:
        artefacts.require_same_vocabulary(scorer, text)
        scores[predicts], work = _measured(values, scorer, train, artefacts.block_length(text))
    (folder / "scores").mkdir(exist_ok=True)
    np.save(folder / "scores" / "scores.npy", scores)
    found = scores[predicts].astype(np.float64)
    quantiles = dict(zip(("low", "median", "high"), np.quantile(found, [0.05, 0.5, 0.95]).tolist(), strict=True))
    return {"tokens": len(found), "mean": float(found.mean()), **quantiles, "work": work}


def _measured(values: Parameters, scorer: Run, train, block_length: int):
    from kdlib import models
    from kdlib.evaluation.metrics import position_scores
    from kdlib.runs import artefacts

    started, model = time.perf_counter(), artefacts.load_model(scorer)
    scores = position_scores(model, train, block_length, values.measure, autocast=models.precision(values.precision))
    flops = models.operations(model).forward(*models.extent(train.windows(block_length)[:, 1]))
    return scores, {"scoring": entry(flops, time.perf_counter() - started)}
