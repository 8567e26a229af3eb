"""How near a student and its cached targets come to the teacher's whole distribution: gradients and KL."""

from collections.abc import Sequence

import numpy as np
import torch

from kdlib import models
from kdlib.cache import TargetCache
from kdlib.cache.teachers import ModelTeacher
from kdlib.data import corpus
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.losses import DenseTargets, PooledTargets, linear_distillation_loss
from kdlib.study.progress import bar

ROWS = 16  # rows of block_length tokens in one batch: that of a step, since the angle depends on how much is averaged


def gradient_angles(
    students: Sequence[torch.nn.Module],
    teacher: ModelTeacher,
    cache: TargetCache,
    split: corpus.Split,
    index: np.ndarray,
) -> list[float]:
    """Each student's mean angle, in degrees, between KD gradients from cached targets and from the whole distribution.

    The gradients are those of every parameter of the student as one vector, for a batch of 16 rows. 0 means that a step
    goes where it should, 90 that it has nothing to do with it (Anshumann et al. 2025, arXiv 2503.16870, section 4).

    Args:
        index: packed rows [rows, block_length] of ``split``, the split of the cache.
    """
    angles = []
    for start in bar(range(0, len(index), ROWS), "comparing gradients"):
        at = index[start : start + ROWS]
        both = cache.read(at), _whole(teacher, split, at)
        angles.append([_angle(student, split, at, both, cache.temperature) for student in students])
    return np.mean(angles, axis=0).tolist()


def divergence(
    student: torch.nn.Module, teacher: ModelTeacher, split: corpus.Split, index: np.ndarray, temperature: float = 1.0
) -> float:
    """KL(teacher || student), nats a token, over packed rows ``index``."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for start in bar(range(0, len(index), ROWS), "comparing distributions"):
            at = index[start : start + ROWS]
            parts = _loss(student, split, at, _whole(teacher, split, at), temperature)
            total, tokens = total + parts.kd.item() / temperature**2, tokens + parts.tokens
    return total / tokens


def flops(
    student: torch.nn.Module, teacher: torch.nn.Module, cache: TargetCache, train: np.ndarray, test: np.ndarray
) -> int:
    """Operations of :func:`gradient_angles` for two students of one shape, and of :func:`divergence`, on packed rows.

    Each student takes two steps on ``train``, towards cached and towards whole targets; the teacher's output layer runs in
    either of those where the cache is dense, else in one of them.
    """
    taught, (trained, measured) = models.operations(student), (models.extent(models.window_lengths(at)) for at in (train, test))
    asked = models.operations(teacher)
    steps = 4 * (taught.forward(*trained) + taught.backward(*trained))
    # The body of the teacher once for both students; its output layer within the loss of each.
    layers = asked.head * (3 if cache.head is not None else 1)
    return steps + asked.forward(*trained) + layers * trained[0] + taught.forward(*measured) + asked.forward(*measured)


def _whole(teacher: ModelTeacher, split: corpus.Split, at: np.ndarray) -> DenseTargets | PooledTargets:
    """The teacher's distributions at every position of some rows; of no consequence where there is padding."""
    if isinstance(pool := teacher.model, EnsembleForCausalLM):
        members = tuple(_whole(ModelTeacher(one, teacher.autocast), split, at) for one in pool.members)
        if pool.router is not None:
            raise KdlibError("The teacher must have no router to compare gradients with, got a routed ensemble. Compare with one of its members.")
        return PooledTargets(members, pool.pool, pool.config.calibration_temperature)
    if teacher.head is None:
        raise KdlibError(
            "The teacher's logits must be one matrix times its hidden states to compare gradients with, got a model that caps them."
        )
    _, _, found = teacher.run(split, at)  # row by row, as the positions are
    weight, bias = teacher.head
    hidden = torch.zeros(at.size, found.shape[1], device=found.device)
    hidden[torch.from_numpy(np.flatnonzero(at.reshape(-1) >= 0)).to(found.device)] = found.float()
    return DenseTargets(hidden, weight.detach().float(), bias)


def _angle(student, split, at, both, temperature) -> float:
    found = [_gradient(student, split, at, targets, temperature) for targets in both]
    cosine = torch.dot(*found) / (found[0].norm() * found[1].norm())
    return np.degrees(np.arccos(min(1.0, cosine.item())))


def _gradient(student, split, at, targets, temperature) -> torch.Tensor:
    student.zero_grad()
    _loss(student, split, at, targets, temperature).loss.backward()
    gradient = torch.cat([one.grad.flatten().double() for one in student.parameters() if one.grad is not None])
    student.zero_grad()
    return gradient


def _loss(student, split, at, targets, temperature):
    parameter = next(student.parameters())
    batch = {name: torch.from_numpy(values).to(parameter.device) for name, values in corpus.rows(split, at).items()}
    hidden = models.body(student)(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=models.attention_mask(batch["segments"], parameter.dtype),
        use_cache=False,
    ).last_hidden_state
    weight, bias = models.head(student)
    return linear_distillation_loss(
        hidden.flatten(0, 1),
        weight,
        bias,
        batch["labels"].flatten(),
        targets.to(parameter.device),
        1.0,
        temperature,
    )
