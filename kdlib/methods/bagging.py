"""Bagging: every member learns from another bootstrap sample of the documents."""

from pydantic import Field

from kdlib.methods import Method
from kdlib.study.plan import Planner, Step


class Bagging(Method):
    """Documents drawn with replacement (Breiman 1996, "Bagging predictors"), the mix of domains kept.

    A member goes over its sample so often that it takes as many steps as the profile's student.
    """

    share: float = Field(0.7, gt=0, le=1, description="tokens of a member's sample, as a share of the train split's")

    def members(self, plan: Planner) -> list[Step]:
        """The profile's student with each seed, on a sample drawn with that seed."""
        epochs = plan.student(**self.student).parameters.epochs / self.share
        return [plan.student(**self.student_on(self._sample(seed)) | {"seed": seed, "epochs": epochs}) for seed in self.seeds]

    def _sample(self, seed: int) -> dict:
        return {"bagged": {"share": self.share, "seed": seed}}
