"""The work of training steps: the operations of the student, of its loss, and of the teacher that is asked for it.

As :mod:`kdlib.models.counting` counts them. A divergence between the distributions of one token takes none besides the
output layers: forward KL with its gradient written out and the others by autograd alike multiply hidden states and
weights three times (logits and two gradients), and all else is elementwise.
"""

from inspect import signature
from typing import NamedTuple

import numpy as np
from torch import nn

from kdlib import models
from kdlib.losses.divergences import DIVERGENCES
from kdlib.losses.features import FeatureLoss
from kdlib.losses.layers import VECTORS
from kdlib.models import Operations
from kdlib.study.work import Work, entry
from kdlib.training.log import distilled_tokens, teacher_tokens
from kdlib.training.objective import Objective


class Text(NamedTuple):
    """What was trained on.

    Attributes:
        tokens: whose successors were predicted, repeated ones repeatedly.
        pairs: of a token and a token that it sees.
        distilled: the tokens of steps with a KD term.
        asked: the tokens of steps in which a teacher ran; with cached targets 0.
    """

    tokens: int
    pairs: float
    distilled: int = 0
    asked: int = 0


class FeatureOperations(NamedTuple):
    """Operations of a loss on features, forward and backward: per token, and per pair of a token and one that it sees."""

    token: int
    pair: int


def training_work(
    student: nn.Module,
    rows: list[dict[str, str]],
    index: np.ndarray,
    validation_index: np.ndarray | None = None,
    objective: Objective | None = None,
) -> Work:
    """The work of the steps and validations that a log tells of.

    Args:
        student: the model that was trained, or members that were trained together, with parameters as frozen as they were.
        rows: of the log (:func:`kdlib.training.log.read_log`).
        index, validation_index: packed rows that were trained on and measured. Of several epochs each leaves out a few rows:
            windows are taken to be as long as they are on average over all.
        objective: that was minimised; None for cross-entropy alone.
    """
    objective = objective or Objective()
    teacher, loss, term = objective.teacher, objective.distillation, objective.features
    counted, (seen, pairs) = models.operations(student), models.extent(models.window_lengths(index))
    tokens, seconds = (int(rows[-1]["tokens"]), float(rows[-1]["seconds"])) if rows else (0, 0.0)
    asks, head = teacher is not None, getattr(objective.targets, "head", None)
    others = () if objective.coupling is None else objective.coupling.others
    flops = training_flops(
        counted,
        Text(tokens, tokens * pairs / max(1, seen), distilled_tokens(rows), teacher_tokens(rows) if asks else 0),
        len(models.head(getattr(student, "members", [student])[0])[0]),
        models.operations(teacher) if asks else output_layer(head[0]) if head else None,
        loss.divergence,
        loss.options,
        None if term is None else feature_operations(term.loss, student, teacher),
        term is not None and term.balance != "none",
        sum(map(models.operations, others), Operations()),
    )
    measured = [float(row["validation_seconds"]) for row in rows if row["validation_seconds"]]
    pass_ = counted.forward(*models.extent(models.window_lengths(validation_index))) if measured else 0
    return {
        "train": entry(flops["train"], seconds - sum(measured)),
        "teacher_forward": entry(flops["teacher_forward"]),
        "evaluation": entry(len(measured) * pass_, float(sum(measured))),
    }


def training_flops(
    student: Operations,
    text: Text,
    vocabulary: int,
    teacher: Operations | None = None,
    divergence: str = "forward_kl",
    options: dict | None = None,
    features: FeatureOperations | None = None,
    balanced: bool = False,
    others: Operations | None = None,
) -> dict[str, int]:
    """Operations of all steps: ``train`` (the student and the losses), ``teacher_forward`` (soft targets).

    Args:
        student: with its parameters as frozen as they were.
        vocabulary: V, the student's and the teacher's.
        teacher: of a model in the loop; of cached dense targets :func:`output_layer`; None for none, or sparse ones.
        divergence, options: of the KD term.
        balanced: whether the two losses' gradients are taken apart, at the price of a second backward pass through the
            student's body (from its uppermost block, wherever the features are read).
        others: of frozen models that are pooled with the student in its loss; their passes are part of ``train``.
    """
    seen = text.pairs / max(1, text.tokens)
    train = student.forward(text.tokens, text.pairs) + student.backward(text.tokens, text.pairs)
    if features is not None:
        train += text.tokens * features.token + text.pairs * features.pair
    train += text.distilled * group_flops(divergence, options, vocabulary)
    train += 0 if others is None else others.forward(text.tokens, text.pairs)
    if balanced:
        train += student.body_backward * text.tokens + student.attention_backward * text.pairs
    asked = 0 if teacher is None else text.asked * (teacher.body + teacher.attention * seen)
    head = 0 if teacher is None else text.distilled * teacher.head
    return {"train": round(train), "teacher_forward": round(asked + head)}


def output_layer(weight) -> Operations:
    """What cached dense targets take, which hold what the teacher's output layer [V, hidden] reads: that layer."""
    return Operations(head=2 * weight.shape[0] * weight.shape[1])


def group_flops(divergence: str, options: dict | None, vocabulary: int) -> int:
    """Operations per token of a divergence that compares the rows of a group of tokens, 0 for all others.

    The group's products of student and teacher rows, group · V multiply-adds a token, and as many for the student's
    gradient. Sinkhorn's sums of |s − t| are no products, but as many operations, and are counted as if they were.
    """
    arguments = signature(DIVERGENCES[divergence]).parameters
    if "group" not in arguments:
        return 0
    group = (options or {}).get("group", arguments["group"].default)
    return 4 * int(group) * vocabulary


def feature_operations(features: FeatureLoss, student: nn.Module, teacher: nn.Module) -> FeatureOperations:
    """Operations of a loss on features: its projectors' products, and the relations A·Aᵀ of both models.

    Projectors cost three products (forward, and the gradients of weights and hidden states), a student's relation three,
    a teacher's one. Distances are elementwise.
    """
    projected = sum(6 * one.weight.numel() for one in features.projectors.values())
    related = sum(
        6 * _width(student, name) + 2 * _width(teacher, name) * len(teachers)
        for _, teachers in features.pairs
        for name in features.features
        if name in VECTORS
    )
    return FeatureOperations(projected, related)


def _width(model: nn.Module, vectors: str) -> int:
    """Numbers in the queries, keys or values of a token, all heads together."""
    config = models.body(model).config.get_text_config()
    shared = None if vectors == "query" else getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (shared or config.num_attention_heads) * width
