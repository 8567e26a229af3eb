"""Independent members: they differ in their seed, which sets initialisation and data order."""

from kdlib.methods import Method
from kdlib.study.plan import Planner, Step


class Independent(Method):
    """Deep ensembles (Lakshminarayanan et al. 2017, arXiv 1612.01474)."""

    def members(self, plan: Planner) -> list[Step]:
        """The profile's student with each seed."""
        return [plan.student(**self.student | {"seed": seed}) for seed in self.seeds]
