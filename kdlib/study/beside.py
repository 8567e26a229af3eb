"""Models that a student is pooled with while it trains, as a setting."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kdlib.errors import KdlibError
from kdlib.study.parameters import Pool
from kdlib.study.plan import Planner, Step
from kdlib.study.refs import Ref


class Beside(BaseModel):
    """The student learns as one of a pool whose other members stay as they are, as in boosting."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    runs: list[Ref] = Field(min_length=1, description="whose models are pooled with the student in its loss")
    coupling: float = Field(1.0, gt=0, le=1, description="weight of the pool's loss; the student's own has 1 - coupling")
    pool: Pool = Field("logit", description="probability: arithmetic mean of distributions; logit: geometric mean, renormalised")

    def identity(self) -> dict[str, Any]:
        """Runs count by their ids, among the inputs."""
        return {"coupling": self.coupling, "pool": self.pool}

    def inputs(self, plan: Planner) -> dict[str, Step]:
        """The runs in the order of their ids: the same runs are the same pool.

        Raises:
            KdlibError: an ensemble, or a run that comes twice.
        """
        found = {one.id: one for one in map(plan.resolve, self.runs)}
        if pools := [one.label for one in found.values() if one.kind == "ensemble"]:
            raise KdlibError(f"`runs` of beside must be one model each, got {', '.join(pools)}. Name the members.")
        if len(found) < len(self.runs):
            raise KdlibError(f"`runs` of beside must be different runs, got {len(self.runs)}, of which {len(found)} differ. Leave out the rest.")
        return {f"beside {number}": found[run] for number, run in enumerate(sorted(found), 1)}
