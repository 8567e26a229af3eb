"""Weight decay on a schedule: the value of every step, and what it must leave as it was."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_training import column, interrupted, logged, make_trainer, same, trained, weights
from tiny import make_model

from kdlib.study.schedules import Schedule
from kdlib.training.optimizer import WeightDecay, parameter_groups

DECAY = {"shape": "cosine", "start": 0.0, "end": 2.0}
STILL = "model.layers.0.mlp.up_proj.weight"


def held(seed=0):
    """A model with one matrix and all vectors that never get a gradient, though they are given to the optimiser."""
    model = make_model(seed)
    for name, parameter in model.named_parameters():
        if name == STILL or parameter.ndim < 2:
            parameter.register_hook(torch.zeros_like)
    return model


def test_a_matrix_without_gradient_shrinks_by_the_rate_times_the_decay_of_each_step(tmp_path):
    model = held()
    before = weights(model)
    trainer = make_trainer(tmp_path, model, changes={"weight_decay": DECAY, "warmup": 0.25})
    trainer.fit()
    total, warm, wanted = trainer.steps, round(0.25 * trainer.steps), before[STILL].double()
    decays = [2.0 * (1 - math.cos(math.pi * step / (total - 1))) / 2 for step in range(total)]
    for step, decay in enumerate(decays):
        rate = step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        wanted = wanted * (1 - 1e-2 * rate * decay)
    after = weights(model)
    assert torch.allclose(after[STILL].double(), wanted, rtol=1e-5, atol=0)
    assert (after[STILL] / before[STILL]).max() < 0.98, "it did shrink"
    assert all(torch.equal(after[name], before[name]) for name in before if before[name].ndim < 2), "vectors never decay"
    assert np.mean(decays) == pytest.approx(1.0, rel=1e-12), "a cosine from 0 to twice a decay has its mean"
    assert np.float64(column(trainer, "weight_decay")) == pytest.approx(decays, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.3])
def test_a_schedule_that_ends_where_it_starts_is_the_number_bit_for_bit(tmp_path, value):
    number, plain = trained(tmp_path / "number", changes={"weight_decay": value})
    for shape in ("linear", "cosine"):
        schedule = {"shape": shape, "start": value, "end": value}
        assert same(number, trained(tmp_path / shape, changes={"weight_decay": schedule})[0])
    assert not same(number, trained(tmp_path / "other", changes={"weight_decay": value + 0.5})[0])
    assert column(plain, "weight_decay") == []


def test_a_run_interrupted_anywhere_goes_on_to_the_same_weights_and_log(tmp_path):
    options = {"changes": {"weight_decay": DECAY, "gradient_accumulation": 2}}
    whole, trainer = trained(tmp_path / "whole", **options)
    for step in (1, trainer.steps // 2, trainer.steps - 1):
        interrupted(tmp_path / str(step), step, **options)
        resumed, again = trained(tmp_path / str(step), **options)
        assert same(whole, resumed) and logged(tmp_path / str(step)) == logged(tmp_path / "whole")
        assert column(again, "weight_decay") == column(trainer, "weight_decay")


def test_matrices_and_vectors_are_apart_even_where_nothing_decays_yet():
    for group in parameter_groups(make_model(0), {}, 1e-2, 0.0):
        assert len({parameter.ndim >= 2 for parameter in group["params"]}) == 1


def test_a_decay_that_is_a_tensor_is_filled_in_place():
    decay = torch.tensor(0.0)
    groups = [{"params": [torch.ones(2, 2)], "weight_decay": decay}, {"params": [torch.ones(2)], "weight_decay": torch.tensor(0.0)}]
    state, optimizer = SimpleNamespace(global_step=2), SimpleNamespace(param_groups=groups)
    WeightDecay(Schedule(shape="linear", start=0.0, end=1.0), 5).on_pre_optimizer_step(None, state, None, optimizer=optimizer)
    assert groups[0]["weight_decay"] is decay and decay == 0.5
    assert groups[1]["weight_decay"] == 0
