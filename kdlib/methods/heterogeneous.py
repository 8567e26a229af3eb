"""Heterogeneous members: unlike models, and so unlike errors."""

from typing import Any

from pydantic import Field

from kdlib.errors import KdlibError
from kdlib.methods import Method
from kdlib.study.plan import Planner, Step


class Heterogeneous(Method):
    """Members that differ in architecture, size, depth, rate, or whatever else a student sets.

    Ensembles over hyper-parameters beat those over seeds at equal size (Wenzel et al. 2020, arXiv 2006.13570). Members may take
    unlike work: compare by the ledger.
    """

    variants: list[dict[str, Any]] = Field(
        [{"architecture": name} for name in ("llama", "gpt2", "qwen3")],
        min_length=2,
        description="what sets members apart from the student, one a member, from the start again after the last",
    )

    def members(self, plan: Planner) -> list[Step]:
        """The student with each seed and the variant whose turn it is.

        Raises:
            KdlibError: two variants that are the same student.
        """
        seed = {"seed": self.seeds[0]}
        alike = [plan.student(**self.student | one | seed).id for one in self.variants]
        if repeated := [one for place, one in enumerate(self.variants) if alike[place] in alike[:place]]:
            raise KdlibError(f"`variants` must be different students, got {repeated[0]}, which is one of those before it. Leave it out.")
        turns = (self.variants[place % len(self.variants)] for place in range(len(self.seeds)))
        return [plan.student(**self.student | one | {"seed": seed}) for seed, one in zip(self.seeds, turns, strict=True)]
