"""What students are made of, one alone or several together: weights to begin with, text, and what they are to minimise."""

import time
from functools import cache

from kdlib import models
from kdlib.data import text
from kdlib.losses.features import FeatureLoss
from kdlib.models import initialisation
from kdlib.runs import artefacts
from kdlib.study.divergences import as_pair
from kdlib.study.store import Run
from kdlib.study.work import entry
from kdlib.training import Coupling, Distillation, FeatureTerm, Objective


def load_teacher(inputs: dict[str, Run]):
    """The teacher in the loop, or that weights are taken from; None if there is neither."""
    if "teacher" not in inputs:
        return None
    artefacts.require_same_vocabulary(inputs["teacher"], inputs["corpus"])
    return artefacts.load_model(inputs["teacher"])


def initial(values, inputs: dict[str, Run], tokenizer, block_length: int, teacher):
    """The student as it begins."""
    model = untrained(values, tokenizer, block_length)
    if "start" in inputs:
        artefacts.require_same_vocabulary(inputs["start"], inputs["corpus"])
        model = initialisation.continued(model, artefacts.load_model(inputs["start"]))
    if teacher is not None:
        model = initialisation.initialise(model, teacher, values.initialisation)
    return initialisation.perturb(model, values.noise, values.seed) if values.noise else model


def beside(values, inputs: dict[str, Run]):
    """What the student is pooled with, loaded; None if it stands alone."""
    if values.beside is None:
        return None
    others = [run for name, run in inputs.items() if name.startswith("beside ")]
    for run in others:
        artefacts.require_same_vocabulary(run, inputs["corpus"])
    return Coupling(values.beside.coupling, values.beside.pool, tuple(map(artefacts.load_model, others)))


def chosen_text(values, inputs: dict[str, Run], train, tokenizer, block_length: int):
    """What it trains on, and the work of writing it."""
    started, load = time.perf_counter(), cache(artefacts.load_model)
    chosen = text.way(values.text).take(text.Given(train, tokenizer, block_length, values.seed, inputs, load))
    if "writer" not in inputs:
        return chosen, {}
    # With the keys and values of the tokens before kept, each token passes once; what a batch goes on with after a
    # document's end is not counted.
    flops = models.operations(load(inputs["writer"])).forward(*models.extent(chosen.windows(block_length)[:, 1]))
    return chosen, {"generation": entry(flops, time.perf_counter() - started)}


def untrained(values, tokenizer, block_length: int):
    """The student as its seed initialises it."""
    shape = models.Shape(
        layers=values.layers, hidden_size=values.hidden_size, heads=values.heads, architecture=values.architecture
    )
    maps = values.features is not None and values.features.of == "attention_mse"
    return models.build(shape, tokenizer, block_length, values.seed, "eager" if maps else None).to(artefacts.device())


def objective_of(values, inputs: dict[str, Run], train, model, teacher, coupling=None):
    """The terms of the loss and the signal they compare with."""
    if values.objective == "ce":
        return Objective((), None, coupling)
    name, options = as_pair(values.divergence)
    terms = [Distillation(values.kd_weight, values.temperature, name, options)]
    if values.objective == "kd":
        cache = artefacts.open_targets(inputs["targets"], inputs["corpus"], train, values.temperature)
        return Objective(terms, cache, coupling)
    if asked := values.features:
        loss = FeatureLoss(model, teacher, asked.of, asked.layers, asked.last_k, asked.relations, seed=values.seed)
        terms.append(FeatureTerm(loss, asked.weight, asked.balance))
    return Objective(terms, teacher, coupling)
