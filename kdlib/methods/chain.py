"""A chain: every member learns from the one before it."""

from kdlib.methods import Method
from kdlib.study.plan import Planner, Step


class Chain(Method):
    """Born-again networks (Furlanello et al. 2018, arXiv 1805.04770): student k is taught by student k - 1.

    The first is the profile's student, taught by the profile's teacher.
    """

    def members(self, plan: Planner) -> list[Step]:
        """A student a seed, each with the one before it as its teacher."""
        found = [plan.student(**self.student | {"seed": self.seeds[0]})]
        for seed in self.seeds[1:]:
            found.append(plan.student(**self.student | {"seed": seed, "teacher": found[-1]}))
        return found
