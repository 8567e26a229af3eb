"""Independent members: they differ in their seed, which sets initialisation and data order, or in one of the two alone."""

from typing import Literal

from pydantic import Field

from kdlib.errors import KdlibError
from kdlib.methods import Method
from kdlib.study.plan import Planner, Step


class Independent(Method):
    """Deep ensembles (Lakshminarayanan et al. 2017, arXiv 1612.01474), and what each of their two sources of variety gives alone.

    Parameter noise belongs to the initialisation. Text that is drawn or written, and fresh draws of targets, follow the
    student's seed, so with ``initialisation`` they differ as well, and with ``order`` they do not.
    """

    vary: Literal["both", "initialisation", "order"] = Field(
        "both",
        description="both: each member's seed sets initialisation and data order; initialisation: all have the first seed's order; "
        "order: all have the first seed's initialisation",
    )

    def members(self, plan: Planner) -> list[Step]:
        """The profile's student with each seed.

        Raises:
            KdlibError: a data seed of the student's own beside ``vary``.
        """
        if self.vary != "both" and "data_seed" in self.student:
            raise KdlibError(f"data_seed of student must be left out with vary={self.vary}, got {self.student['data_seed']}.")
        return [plan.student(**self.student | self._seeds(seed)) for seed in self.seeds]

    def _seeds(self, seed: int) -> dict[str, int]:
        first = self.seeds[0]
        return {
            "both": {"seed": seed},
            "initialisation": {"seed": seed, "data_seed": first},
            "order": {"seed": first, "data_seed": seed},
        }[self.vary]
