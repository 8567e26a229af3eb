"""Scores: one number at every position of the train split, made once and read by every selection of text."""

import time
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kdlib.errors import KdlibError
from kdlib.study import parameters
from kdlib.study.plan import Planner, Step
from kdlib.study.refs import Ref
from kdlib.study.store import Run
from kdlib.study.work import entry

NOTEBOOK, LEAVES = "07_scores", "scores"
ON_TARGETS = "targets"


class Parameters(parameters.Parameters):
    """``07_scores``."""

    UNREAD: ClassVar = parameters.Parameters.UNREAD | {"scorer", "targets"}

    scorer: Ref = Field(
        {"targets": {}},
        description="the run that scores: {targets: {…}} reads what was kept beside them, at no cost; a teacher, student, "
        "ensemble or a list of them is evaluated on the train split"
    )
    measure: Literal["nll", "entropy", "kl"] = Field(
        "nll",
        description="nll: of the token that comes next; entropy: of the distribution over it; kl: from the teacher's targets to the "
        "scorer's distribution; all nats",
    )
    targets: Ref = Field(
        {"targets": {}}, description="the targets that measure=kl compares the scorer with: {targets: {…}}, of kind dense or drawn"
    )
    precision: parameters.Precision = Field("auto", description="autocast of the scorer's forward pass")


    @model_validator(mode="after")
    def _targets_are_read(self):
        if self.measure != "kl" and self.targets != type(self).model_fields["targets"].default:
            raise ValueError(f"targets must be left out with measure={self.measure}, which compares with none, got {self.targets}")
        return self


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """The corpus, the scorer, and what it is compared with.

    Raises:
        KdlibError: KL to the k largest alone, which is biased.
    """
    if values.measure != "kl":
        return {"corpus": plan.corpus(), "scorer": plan.resolve(values.scorer, ("model", ON_TARGETS))}
    targets = plan.resolve(values.targets, (ON_TARGETS,))
    if targets.parameters.kind == "topk":
        raise KdlibError("kind of targets must be dense, sampled or topk_sampled for measure kl, got topk, which has no whole distribution.")
    return {"corpus": plan.corpus(), "scorer": plan.resolve(values.scorer), "targets": targets}


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
        cache = artefacts.open_targets(scorer, text, train, _kept_at(scorer))
        scores[predicts] = cache.statistics(predicts)[values.measure]
    else:
        artefacts.require_same_vocabulary(scorer, text)
        kept = artefacts.open_targets(inputs["targets"], text, train, _kept_at(inputs["targets"])) if "targets" in inputs else None
        scores[predicts], work = _measured(values, scorer, train, artefacts.block_length(text), kept)
    (folder / "scores").mkdir(exist_ok=True)
    np.save(folder / "scores" / "scores.npy", scores)
    found = scores[predicts].astype(np.float64)
    quantiles = dict(zip(("low", "median", "high"), np.quantile(found, [0.05, 0.5, 0.95]).tolist(), strict=True))
    return {"tokens": len(found), "mean": float(found.mean()), **quantiles, "work": work}


def _kept_at(targets: Run) -> float:
    """The temperature that targets were written at; dense ones, which serve any, are read at 1."""
    return targets.settings["parameters"].get("temperature", 1.0)


def _measured(values: Parameters, scorer: Run, train, block_length: int, cache):
    from kdlib import models
    from kdlib.evaluation.metrics import position_scores
    from kdlib.runs import artefacts
    from kdlib.training.work import output_layer

    started, model = time.perf_counter(), artefacts.load_model(scorer)
    scores = position_scores(model, train, block_length, values.measure, autocast=models.precision(values.precision), cache=cache)
    flops = models.operations(model).forward(*models.extent(train.windows(block_length)[:, 1]))
    if head := getattr(cache, "head", None):
        flops += output_layer(head[0]).head * len(scores)
    return scores, {"scoring": entry(flops, time.perf_counter() - started)}
