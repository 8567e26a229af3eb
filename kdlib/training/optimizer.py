"""How many steps a run takes, which parameters move in them, how fast, and how they decay."""

import math
import re

import torch
from torch import nn
from transformers import TrainerCallback

from kdlib.errors import KdlibError
from kdlib.study.parameters import TrainingParameters
from kdlib.study.schedules import Schedule

BETAS = (0.9, 0.95)  # of AdamW, in every training


def steps(settings: TrainingParameters, rows: int) -> int:
    """Optimisation steps of a run: those of an epoch, times epochs, rounded to at least one unless epochs is 0.

    An epoch takes whole batches only; its last step takes what is left of them after whole accumulations.
    """
    batches = max(1, rows // settings.batch_size)
    total = settings.epochs * math.ceil(batches / settings.gradient_accumulation)
    return 0 if settings.epochs == 0 else max(1, round(total))


def progress(step: int, steps: int) -> float:
    """How far a run of ``steps`` is in a step, counted from 0: 0 in the first, 1 in the last."""
    return min(1.0, step / max(1, steps - 1))


class WeightDecay(TrainerCallback):
    """Gives each step the weight decay of a schedule; what does not decay is left at 0.

    Nothing of it is in a checkpoint: a run that goes on computes its decay from the number of its step.

    Args:
        dimensions: from which a parameter decays; one more for stacked parameters than for a model's own.
    """

    def __init__(self, schedule: Schedule, steps: int, dimensions: int = 2):
        self.schedule, self.steps, self.dimensions = schedule, steps, dimensions

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        decay = self.schedule.value(progress(state.global_step, self.steps))
        for group in optimizer.param_groups:
            if group["params"][0].ndim < self.dimensions:
                continue
            if isinstance(group["weight_decay"], torch.Tensor):
                group["weight_decay"].fill_(decay)
            else:
                group["weight_decay"] = decay


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2


def parameter_groups(
    model: nn.Module, multipliers: dict[str, float], learning_rate: float, weight_decay: float
) -> list[dict]:
    """Optimiser groups by learning-rate multiplier, matrices apart from vectors, which do not decay.

    A parameter takes the multiplier of the first regular expression found in its name (``re.search``), else 1; 0 freezes it.

    Raises:
        KdlibError: an expression is malformed or matches no parameter, or everything is frozen.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    unused = set(multipliers)
    for name, parameter in model.named_parameters():
        try:
            matched = next((pattern for pattern in multipliers if re.search(pattern, name)), None)
        except re.error as error:
            raise KdlibError(f"learning_rate_multipliers holds a malformed regular expression: {error}") from error
        unused.discard(matched)
        multiplier = 1.0 if matched is None else multipliers[matched]
        if multiplier == 0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            groups.setdefault((multiplier, _decays(parameter)), []).append(parameter)
    if unused or not groups:
        names = ", ".join(name for name, _ in list(model.named_parameters())[:6])
        problem = f"match no parameter: {sorted(unused)}" if unused else "freeze every parameter"
        raise KdlibError(f"learning_rate_multipliers {problem}. Parameter names look like: {names} …")
    return [
        {"params": group, "lr": learning_rate * multiplier, "weight_decay": weight_decay if decays else 0.0}
        for (multiplier, decays), group in groups.items()
    ]
