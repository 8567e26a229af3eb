"""What an ensemble is combined by: learned weights, an exponent, or a router, made from what its members left."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from kdlib import models
from kdlib.data import corpus, text
from kdlib.ensemble import gating, weights
from kdlib.ensemble.routing import DistanceRouter, GateRouter
from kdlib.errors import KdlibError
from kdlib.runs import artefacts
from kdlib.study.combining import Combine
from kdlib.study.plan import Step
from kdlib.study.store import Run
from kdlib.study.work import Work, entry

GAP = 1e-5  # of learned weights: no others are better by as many nats


@dataclass
class Combiner:
    """How members become one.

    Attributes:
        members: the runs that are kept, in order.
        options: of :meth:`EnsembleForCausalLM.from_members`.
        metrics: what is told of it; work: what making it took.
    """

    members: list[Run]
    options: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    work: Work = field(default_factory=dict)


def by_weights(how: Combine, members: Sequence[Run]) -> Combiner:
    """Weights fitted to what the members' own evaluations kept of the calibration split; no model runs.

    Members without weight are left out.
    """
    started = time.perf_counter()
    stored = np.stack([np.load(run.path / "target_logprobs.npz")["calibration"] for run in members])
    fit = weights.fit(stored, GAP)
    sizes = sorted({min(2**power, len(members)) for power in range(len(members).bit_length() + 1)} | ({how.keep} if how.keep else set()))
    budgets = weights.by_budget(stored, fit.weights, sizes, GAP)
    kept, values = np.flatnonzero(fit.weights), fit.weights
    if how.keep is not None:
        budget = next(one for one in budgets if len(one.members) == how.keep)
        order = np.argsort(budget.members)
        kept, values = np.array(budget.members)[order], np.zeros(len(members))
        values[kept] = budget.fit.weights[order]
    found = {
        "weights": {run.id: float(weight) for run, weight in zip(members, values, strict=True)},
        "gap": fit.gap,
        "calibration_nll": {"uniform": weights.nll(stored, np.full(len(members), 1 / len(members))), "learned": fit.nll},
        "budgets": [
            {"members": [members[k].id for k in one.members], "nll": one.fit.nll, "nll_renormalised": one.renormalised} for one in budgets
        ],
    }
    # Some products of a vector with what was kept: far less than one token through one member.
    work = {"scoring": entry(0, time.perf_counter() - started)}
    return Combiner([members[k] for k in kept], {"weights": values[kept].tolist()}, found, work)


def by_distance(how: Combine, step: Step, inputs: dict[str, Run], members: Sequence[Run]) -> Combiner:
    """A router to the centroid of the cluster that each member learned most from."""
    tensors = _clusters(inputs)
    numbers = {one.id: text.way(one.parameters.text).cluster for name, one in step.inputs.items() if name.startswith("member ")}
    places = [numbers[run.id] for run in members]
    router = DistanceRouter(tensors["token_vectors"], tensors["centroids"][places].contiguous(), **how.distance.model_dump())
    return Combiner(list(members), {"router": router}, {"clusters": dict(zip([run.id for run in members], places, strict=True))})


def by_gate(
    how: Combine,
    inputs: dict[str, Run],
    members: Sequence[Run],
    loaded: Sequence[torch.nn.Module],
    train: corpus.Split,
    precision: str,
) -> Combiner:
    """A gate trained on as many rows of the train split as its share of one member's training pays for.

    Raises:
        KdlibError: that is not one row.
    """
    started, asked, vectors = time.perf_counter(), how.gate, _clusters(inputs)["token_vectors"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(asked.seed)
        gate = GateRouter(vectors, len(members), asked.hidden_size, asked.top_k)
    block_length = artefacts.block_length(inputs["corpus"])
    index = np.random.default_rng(asked.seed).permutation(corpus.pack(train.windows(block_length), block_length))
    spent = min(run.metrics["work"]["train"]["flops"] for run in members)
    rows = gating.rows_within(asked.share * spent, loaded, gate, block_length, asked.epochs)
    if rows < 1:
        raise KdlibError(
            f"`share` of a gate must pay for one row of {block_length} tokens, got {asked.share} of {spent:.2g} FLOPs. Give a larger "
            "share, or train members for longer."
        )
    kept = inputs["targets"].settings["parameters"].get("temperature", 1.0)
    cache = artefacts.open_targets(inputs["targets"], inputs["corpus"], train, kept)
    found = gating.examples(gate, loaded, cache, train, index[:rows], models.precision(precision))
    history = gating.train(gate.cpu(), found, asked.epochs, asked.learning_rate, asked.seed)
    flops = gating.flops(loaded, gate, index[:rows], asked.epochs)
    told = {"tokens": len(found), "kl": history, "share_of_member": flops / spent}
    return Combiner(list(members), {"router": gate}, told, {"train": entry(flops, time.perf_counter() - started)})


def _clusters(inputs: dict[str, Run]) -> dict[str, torch.Tensor]:
    """``token_vectors`` [V, D] and ``centroids`` [K, D]."""
    return load_file(inputs["clusters"].path / "clusters" / "clusters.safetensors")
