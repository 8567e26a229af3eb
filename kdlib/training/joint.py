"""Members that are trained together on the same rows, each with the gradients of its own loss and of their pool's."""

import torch

from kdlib import models
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.losses import LossParts
from kdlib.losses.coupled import Member, coupled_distillation_loss
from kdlib.training.objective import Objective
from kdlib.training.optimizer import parameter_groups
from kdlib.training.trainer import DistillationTrainer


class JointTrainer(DistillationTrainer):
    """Trains the members of an ensemble with the coupled loss of its objective (:mod:`kdlib.losses.coupled`).

    Parameters move in groups of each member, and each member's gradient is clipped by itself: without coupling, members end
    as they would alone on the same rows. Validation is of their pool, and the log's losses are those of a member on average.

    Args:
        model: holds the members; how it pools them plays no part, the objective says it.
        arguments: as of :class:`DistillationTrainer`; multipliers are matched in each member by its own names.

    Raises:
        KdlibError: an objective without a coupling, or as the other trainer.
    """

    def __init__(self, model: EnsembleForCausalLM, settings, text, index, folder, objective: Objective, **options):
        if objective.coupling is None:
            raise KdlibError("Members that are trained together must have a coupling in their objective, got none. Give Coupling(0.0, pool).")
        super().__init__(model, settings, text, index, folder, objective, **options)
        bodies = [models.body(one) for one in model.members]
        self._bodies = [torch.compile(one, dynamic=False) for one in bodies] if self._compiled else bodies

    @staticmethod
    def _check_vocabularies(model, objective: Objective) -> None:
        DistillationTrainer._check_vocabularies(model.members[0], objective)

    def _token_losses(self, inputs, kd_weight: float, temperature: float, normaliser) -> LossParts:
        found = [self._hidden(body, inputs).flatten(0, 1) for body in self._bodies]
        members = [Member(hidden, *models.head(one)) for hidden, one in zip(found, self.model.members, strict=True)]
        return self._coupled(members, inputs, self._arguments(inputs, kd_weight, temperature, normaliser))

    def _measured(self, batch) -> LossParts:
        members = [Member(self._hidden(models.body(one), batch).flatten(0, 1), *models.head(one)) for one in self.model.members]
        labels, pool = batch["labels"].flatten(), self.objective.coupling.pool
        return coupled_distillation_loss(members, labels, matmul_dtype=self.autocast, coupling=1.0, pool=pool)

    def _groups(self) -> list[dict]:
        rate, decay = self.args.learning_rate, self.args.weight_decay
        return [group for one in self.model.members for group in parameter_groups(one, self.multipliers, rate, decay)]

    def _clip_grad_norm(self, model) -> torch.Tensor:
        # The Trainer's own clips one model; the norm that is logged is that of the member with the largest.
        norms = [self.accelerator.clip_grad_norm_(one.parameters(), self.args.max_grad_norm) for one in self.model.members]
        return torch.stack(norms).max()
