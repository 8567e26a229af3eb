"""Negative correlation learning: members are trained together, each for itself and for their pool."""

from pydantic import Field

from kdlib.methods import Method
from kdlib.study.parameters import Pool, Share
from kdlib.study.plan import Planner, Step


class Ncl(Method):
    """The members' mean loss, less ``coupling`` times their ambiguity.

    Liu & Yao 1999, "Ensemble learning via negative correlation"; Brown, Wyatt & Tiňo 2005, "Managing diversity in regression
    ensembles" (JMLR 6). For KL and cross-entropy the ambiguity of a geometric pool is exact (Heskes 1998, "Selecting weighting factors
    in logarithmic opinion pools"; Webb et al. 2020, arXiv 1902.04422). All members see the same rows in the order of the first seed.
    """

    coupling: Share = Field(0.5, description="0: members that learn alone; 1: the pool alone learns, as method joint")
    pool: Pool = Field("logit", description="that the members learn as")

    def members(self, plan: Planner) -> list[Step]:
        """The students of one run, one a seed."""
        joint = plan.run("joint", student=self.student, seeds=self.seeds, coupling=self.coupling, pool=self.pool)
        return [plan.run("member", of=joint, number=number) for number in range(1, len(self.seeds) + 1)]
