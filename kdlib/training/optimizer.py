"""How many steps a run takes, and which parameters move in them, how fast."""

import math
import re

from torch import nn

from kdlib.errors import KdlibError
from kdlib.study.parameters import TrainingParameters


def steps(settings: TrainingParameters, rows: int) -> int:
    """Optimisation steps of a run: those of an epoch, times epochs, rounded to at least one unless epochs is 0.

    An epoch takes whole batches only; its last step takes what is left of them after whole accumulations.
    """
    batches = max(1, rows // settings.batch_size)
    total = settings.epochs * math.ceil(batches / settings.gradient_accumulation)
    return 0 if settings.epochs == 0 else max(1, round(total))


def parameter_groups(
    model: nn.Module, multipliers: dict[str, float], learning_rate: float, weight_decay: float
) -> list[dict]:
    """Optimiser groups by learning-rate multiplier and decay.

    A parameter takes the multiplier of the first regular expression found in its name (``re.search``), else 1; 0 freezes it.

    Raises:
        KdlibError: an expression is malformed or matches no parameter, or everything is frozen.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
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
            groups.setdefault((multiplier, weight_decay if parameter.ndim >= 2 else 0.0), []).append(parameter)
    if unused or not groups:
        names = ", ".join(name for name, _ in list(model.named_parameters())[:6])
        problem = f"match no parameter: {sorted(unused)}" if unused else "freeze every parameter"
        raise KdlibError(f"learning_rate_multipliers {problem}. Parameter names look like: {names} …")
    return [
        {"params": group, "lr": learning_rate * multiplier, "weight_decay": decay}
        for (multiplier, decay), group in groups.items()
    ]
