"""A chain: every member learns from the one before it."""

from typing import Any

from pydantic import Field

from kdlib.errors import KdlibError
from kdlib.methods import Method
from kdlib.study.parameters import Share
from kdlib.study.plan import Planner, Step
from kdlib.study.schedules import scheduled


class Chain(Method):
    """Born-again networks (Furlanello et al. 2018, arXiv 1805.04770): student k is taught by student k - 1.

    The first is the profile's student with ``first`` on top, taught by the profile's teacher with the student's own ``kd_weight``.
    Methods that differ in who teaches are subclasses with a :meth:`teacher` of their own; one that differs in more has an :meth:`after`.
    """

    kd_weight: scheduled(Share) | None = Field(
        None, description="of the members that are taught by others, constant or on a schedule; None: the student's"
    )
    first: dict[str, Any] = Field({}, description="what sets the first member apart, such as {objective: ce}: taught by text alone")

    def teacher(self, before: list[Step]) -> Step | list[Step]:
        """Who teaches the next member: the one before. A list of members stands for their probability pool."""
        return before[-1]

    def after(self, before: list[Step]) -> dict[str, Any]:
        """What sets the next member apart: its teacher, and the weight of what that says."""
        own = {} if self.kd_weight is None else {"kd_weight": self.kd_weight}
        return own | {"teacher": self.teacher(before)}

    def members(self, plan: Planner) -> list[Step]:
        """A student a seed, each but the first taught by members before it.

        Raises:
            KdlibError: objective ce, which no teacher reaches.
        """
        return self.linked(plan, self.student)

    def linked(self, plan: Planner, student: dict[str, Any]) -> list[Step]:
        """Members with these settings of the student, one after the other."""
        found = [plan.student(**student | self.first | {"seed": self.seeds[0]})]
        for seed in self.seeds[1:]:
            apart = self.after(found)
            found.append(plan.student(**student | apart | {"seed": seed}))
            if "teacher" in apart and found[-1].parameters.objective == "ce":
                raise KdlibError("objective of members must be kd or online_kd to be taught by others, got ce. Give it to `first` alone.")
        return found
