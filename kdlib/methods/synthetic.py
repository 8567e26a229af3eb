"""Synthetic: members learn on text that the teacher wrote, each on text of its own."""

from pydantic import Field

from kdlib.methods import Method
from kdlib.study.plan import Planner, Step


class Synthetic(Method):
    """Sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947) on samples, tempered, in place of the teacher's best guesses.

    Cached targets do not describe such text. Students whose objective would read them have the teacher in the loop instead;
    with objective ce they learn from the text alone.
    """

    temperature: float | None = Field(None, gt=0, le=100, description="of the sampling; None: 1, the teacher's own distribution")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the smallest set of tokens with this probability; None: from all")
    share: float | None = Field(None, gt=0, le=1, description="tokens written for a member, as a share of the train split's; None: 1")

    def members(self, plan: Planner) -> list[Step]:
        """The student with each seed, on text written with that seed, in as many steps whatever the share."""
        asked = plan.run("student", **self.student).parameters
        apart = {"objective": "online_kd"} if asked.objective == "kd" else {}
        if self.share is not None:
            apart["epochs"] = asked.epochs / self.share
        return [plan.student(**self.student_on(self._written(seed)) | apart | {"seed": seed}) for seed in self.seeds]

    def _written(self, seed: int) -> dict:
        asked = {"temperature": self.temperature, "top_p": self.top_p, "share": self.share}
        return {"generated": {"seed": seed} | {name: value for name, value in asked.items() if value is not None}}
