"""Snapshots: the members are one student at the end of each cycle of its learning rate."""

from typing import Any, Literal

from pydantic import Field, model_validator

from kdlib.errors import KdlibError
from kdlib.methods.chain import Chain
from kdlib.study.plan import Planner, Step
from kdlib.study.schedules import Schedule


class Snapshot(Chain):
    """Snapshot ensembles (Huang et al. 2017, arXiv 1704.00109): K members for about the steps of one student.

    Each cycle is a run with the student's warm-up, cosine and 1 / K of its ``epochs``, which are those of the whole trajectory: K
    independent members at equal compute need 1 / K of them each. It begins with the weights of the cycle before, but with new
    moments of the optimiser, and its seed orders the rows. Initialisation and noise are the first cycle's, and so is what
    ``first`` says, its epochs included.
    """

    taught: Literal["profile", "previous"] = Field(
        "profile", description="who teaches: the student's own teacher, or from the second cycle on the snapshot before (kd_weight)"
    )
    anti_phase: bool = Field(
        False,
        description="weight decay from 0 to twice the student's, along a cosine in each cycle: low while the rate is high, and the "
        "same on average (after q0, arXiv 2606.03938)",
    )

    @model_validator(mode="after")
    def _no_idle_weight(self):
        if self.taught == "profile" and self.kd_weight is not None:
            raise ValueError(f"kd_weight must be left out with taught=profile, got {self.kd_weight}")
        return self

    def after(self, before: list[Step]) -> dict[str, Any]:
        """The weights of the member before, and its teaching if asked for."""
        taught = super().after(before) if self.taught == "previous" else {}
        return taught | {"start": before[-1], "initialisation": "random", "noise": 0.0}

    def members(self, plan: Planner) -> list[Step]:
        """A cycle a seed, each from the weights of the one before.

        Raises:
            KdlibError: an objective ce to be taught by a snapshot, or no constant weight decay to move in anti-phase.
        """
        whole = plan.student(**self.student | {"seed": self.seeds[0]}).parameters
        cycle, decay = {"epochs": whole.epochs / len(self.seeds)}, whole.weight_decay
        if self.anti_phase:
            if isinstance(decay, Schedule) or not decay:
                raise KdlibError(f"weight_decay of student must be a number above 0 with anti_phase, got {decay}.")
            cycle["weight_decay"] = {"shape": "cosine", "start": 0.0, "end": 2 * decay}
        return self.linked(plan, self.student | cycle)
