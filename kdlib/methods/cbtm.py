"""c-BTM: each member learns most from one cluster of the documents."""

from pydantic import Field, PositiveInt

from kdlib.methods import Method
from kdlib.study.plan import Planner, Step


class Cbtm(Method):
    """Cluster-branch-train-merge (Gururangan et al. 2023, arXiv 2303.14177): as many clusters as members.

    Every member reads as many tokens as the profile's student, a share of them from its own cluster. With ``random`` the clusters
    are random ones of the same sizes, the control that differs in nothing else.
    """

    own: float = Field(0.8, gt=0, le=1, description="share of a member's tokens that come from its own cluster")
    dimensions: PositiveInt = Field(100, le=1024, description="of the vectors that are clustered")
    random: bool = Field(False, description="whether documents are shared out at random")

    def members(self, plan: Planner) -> list[Step]:
        """The student with each seed, on the text of the cluster whose number is its place."""
        seed, settings = self.seeds[0], {"dimensions": self.dimensions, "random": self.random}
        clusters = plan.run("clusters", clusters=len(self.seeds), seed=seed, **settings)
        return [
            plan.student(**self.student_on(self._text(clusters, place, seed)) | {"seed": seed}) for place, seed in enumerate(self.seeds)
        ]

    def _text(self, clusters: Step, cluster: int, seed: int) -> dict:
        return {"clustered": {"by": clusters, "cluster": cluster, "own": self.own, "seed": seed}}
