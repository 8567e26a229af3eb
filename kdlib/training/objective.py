"""What a training step minimises: a list of terms, and the signal that they compare the student with.

The signal is a cache of targets (:class:`kdlib.cache.TargetCache`), a teacher in the loop (a model), or nothing. Terms are
:class:`Distillation`, which holds the cross-entropy too, and :class:`FeatureTerm`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from kdlib import models
from kdlib.cache import TargetCache
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.losses import DenseTargets, PooledTargets, balance
from kdlib.losses.features import FeatureLoss
from kdlib.study.schedules import Schedule, as_schedule

BALANCES = {"none": None, "project": balance.project, "norm": partial(balance.norm, ratio=1.0)}


@dataclass(frozen=True)
class Distillation:
    """w * tau^2 * KL(teacher || student) + (1 - w) * CE, the two fused with the output layer.

    Attributes:
        weight: w, constant or on a schedule.
        temperature: tau, constant or on a schedule.
        divergence, options: in place of the KL, see :func:`kdlib.losses.linear_distillation_loss`.
    """

    weight: float | Schedule = 0.0
    temperature: float | Schedule = 1.0
    divergence: str = "forward_kl"
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class FeatureTerm:
    """A loss on what student and teacher compute inside, added to the others.

    Attributes:
        loss: of features; its projectors train along with the student and are dropped in the end.
        weight: of the loss.
        balance: how its gradient gives way to the main one, see :mod:`kdlib.losses.balance`: none, project or norm.
    """

    loss: FeatureLoss
    weight: float = 1.0
    balance: str = "none"


@dataclass(frozen=True)
class Coupling:
    """What is trained learns as a member of a pool, see :mod:`kdlib.losses.coupled`.

    Attributes:
        weight: lambda, of the pool's loss; the members' own have 1 - lambda.
        pool: probability or logit.
        others: members of the pool that stay as they are.
    """

    weight: float
    pool: str
    others: tuple[nn.Module, ...] = ()


class Objective:
    """Terms and their signal; without any, cross-entropy on the text.

    Args:
        terms: at most one of each kind.
        signal: cached targets, a model in the loop (never trained, run without dropout), or None.
        coupling: of the distillation term, whose divergence is then forward_kl; None for a model by itself.

    Raises:
        KdlibError: two terms of a kind, a signal of another type, a weight without a signal, features without a teacher
            in the loop, an unknown balance, or a coupling with features or another divergence.
    """

    def __init__(
        self,
        terms: Sequence[Distillation | FeatureTerm] = (),
        signal: TargetCache | nn.Module | None = None,
        coupling: Coupling | None = None,
    ):
        by_kind = {type(term): term for term in terms}
        if len(by_kind) < len(terms):
            raise KdlibError(f"terms must be at most one of each kind, got {len(terms)} of {len(by_kind)} kinds.")
        self.distillation = by_kind.get(Distillation, Distillation())
        self.features: FeatureTerm | None = by_kind.get(FeatureTerm)
        self.coupling = coupling
        self.weight, self.temperature = as_schedule(self.distillation.weight), as_schedule(self.distillation.temperature)
        self.targets = signal if isinstance(signal, TargetCache) else None
        self.teacher = signal if isinstance(signal, nn.Module) else None
        if self.targets is self.teacher is None and signal is not None:
            raise KdlibError(
                f"signal must be cached targets (TargetCache) or a model, got {type(signal).__name__}. Of several models make an "
                "EnsembleForCausalLM."
            )
        if getattr(signal, "router", None) is not None:
            raise KdlibError("A teacher in the loop must have no router, got a routed ensemble. Write its targets and learn from those.")
        _ = self.teacher.pool if isinstance(self.teacher, EnsembleForCausalLM) else None  # refused by a share of an ensemble
        if signal is None and self.weight != as_schedule(0.0):
            raise KdlibError("A distillation term must have a signal, got none. Give cached targets or a teacher.")
        if self.features is not None and self.teacher is None:
            raise KdlibError("A feature term must have a teacher in the loop, got none: cached targets hold no features.")
        if self.features is not None and self.features.balance not in BALANCES:
            raise KdlibError(f"balance must be one of {', '.join(BALANCES)}, got {self.features.balance!r}.")

        if coupling is not None and (self.features is not None or self.distillation.divergence != "forward_kl"):
            found = "features" if self.features is not None else self.distillation.divergence
            raise KdlibError(f"A coupled objective must have forward_kl and no features, got {found}. Leave it out.")

    @property
    def distils(self) -> bool:
        """Whether a distillation term has any weight at any time."""
        return self.weight != as_schedule(0.0)

    def asks_teacher(self, kd_weight: float) -> bool:
        """Whether a step with this weight runs the teacher in the loop."""
        return self.teacher is not None and (kd_weight > 0 or self.features is not None)

    def vocabularies(self) -> dict[str, int]:
        """Tokens of the vocabularies of the signal and of what is pooled, by what they are."""
        pooled = () if self.coupling is None else self.coupling.others
        return self._of_signal() | {f"beside {number}": len(models.head(one)[0]) for number, one in enumerate(pooled, 1)}

    def _of_signal(self) -> dict[str, int]:
        if self.targets is not None:
            return {"targets": self.targets.guard["vocabulary"]} if "vocabulary" in self.targets.guard else {}
        if self.teacher is None:
            return {}
        # Of all members, so that one whose logits are no matrix product is refused now; they share a vocabulary.
        sizes = [len(models.head(member)[0]) for member in _members(self.teacher)]
        return {"teacher": sizes[0]}

    @torch.no_grad()
    def ask(self, run: Any, dtype: torch.dtype | None) -> DenseTargets | PooledTargets:
        """The distributions of the teacher in the loop, as what its output layers read.

        Args:
            run: called with a model's body; gives its last hidden states [B, T, D].
            dtype: of the output layer's product, None for the hidden states' own.
        """
        found = [self._whole(member, run(models.body(member)).flatten(0, 1), dtype) for member in _members(self.teacher)]
        if not isinstance(self.teacher, EnsembleForCausalLM):
            return found[0]
        return PooledTargets(tuple(found), self.teacher.pool, self.teacher.config.calibration_temperature)

    def frozen(self) -> list[nn.Module]:
        """The models in the loop that are not trained."""
        return [*([] if self.teacher is None else [self.teacher]), *(() if self.coupling is None else self.coupling.others)]

    @torch.no_grad()
    def others(self, run: Any, dtype: torch.dtype | None) -> list[DenseTargets]:
        """The distributions of what is pooled and not trained; arguments as of :meth:`ask`."""
        return [self._whole(one, run(models.body(one)).flatten(0, 1), dtype) for one in self.coupling.others]

    @staticmethod
    def _whole(member, hidden: torch.Tensor, dtype: torch.dtype | None) -> DenseTargets:
        weight, bias = models.head(member)
        dtype = dtype or hidden.dtype
        return DenseTargets(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _members(teacher) -> list:
    return list(teacher.members) if isinstance(teacher, EnsembleForCausalLM) else [teacher]
