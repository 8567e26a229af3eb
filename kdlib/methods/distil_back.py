"""Distil-back: the pool of another method's members teaches one student, which takes the place of them all."""

from typing import Any

from pydantic import Field

from kdlib.errors import KdlibError
from kdlib.methods import Method
from kdlib.study.parameters import Pool, Seed
from kdlib.study.plan import Planner, Step


class DistilBack(Method):
    """An ensemble distilled into one model (Bucilua et al. 2006, "Model compression"; Kim et al. 2025, arXiv 2509.14786).

    Each student, one a seed, learns from cached targets of the same pool, or has it in the loop (objective online_kd).
    """

    of: str = Field("independent", description="method that forms the members that teach")
    options: dict[str, Any] = Field(
        {}, description="options of that method; with {student: {…}} its members are set apart otherwise than this student"
    )
    teachers: list[Seed] | int | None = Field(
        None, description="seeds of the members that teach, or how many, from the first seed on; None: the seeds"
    )
    pool: Pool = Field("probability", description="of the members that teach")

    def members(self, plan: Planner) -> list[Step]:
        """A student a seed, taught by the pool.

        Raises:
            KdlibError: no pool of two or more, a pool of students that were distilled back themselves, or objective ce.
        """
        seeds = self.seeds if self.teachers is None else self.teachers
        seeds = seeds if isinstance(seeds, list) else [self.seeds[0] + place for place in range(seeds)]
        if len(seeds) < 2 or self.of == "distil_back":
            raise KdlibError(f"`teachers` must be at least 2, formed by another method, got {len(seeds)} of {self.of}.")
        pool = plan.ensemble(plan.members(self.of, seeds, **{"student": self.student} | self.options), self.pool)
        found = [plan.student(**self.student | {"seed": seed, "teacher": pool}) for seed in self.seeds]
        if found[0].parameters.objective == "ce":
            raise KdlibError("objective must be kd or online_kd to be taught by a pool, got ce. Give it to the pool: options={student: …}.")
        return found
