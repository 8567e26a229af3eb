"""Boosting: every member after the first learns what the members so far miss of the teacher."""

from typing import Literal

from pydantic import Field, model_validator

from kdlib.methods import Method
from kdlib.study.parameters import Pool
from kdlib.study.plan import Planner, Step


class Boosting(Method):
    """Boosting by filtering (Schapire 1990, "The strength of weak learnability"), or by weighting, with KL to the teacher as loss.

    Documents are ranked by KL(teacher || probability pool of the members so far), mean over their tokens, as each member's own
    targets tell it. A member takes as many steps as the profile's student. The passes that score are runs, and charged.

    Or by residuals (Friedman 2001, "Greedy function approximation: a gradient boosting machine"): a member learns on all text such
    that the pool of those before it and itself fits the teacher; they are in its loop, frozen.
    """

    mode: Literal["highest", "weighted", "residual"] = Field(
        "highest",
        description="highest: those documents alone; weighted: all, with a weight proportional to exp(KL / temperature), mean 1; "
        "residual: all, in one pool with the members before",
    )
    share: float = Field(0.25, gt=0, lt=1, description="tokens of those documents, as a share of the train split's (mode=highest)")
    temperature: float = Field(1.0, gt=0, le=100, description="in nats (mode=weighted)")
    pool: Pool = Field("logit", description="of the member and those before it (mode=residual)")

    @model_validator(mode="after")
    def _no_idle_option(self):
        read = {"highest": "share", "weighted": "temperature", "residual": "pool"}[self.mode]
        for idle in sorted(self.model_fields_set & ({"share", "temperature", "pool"} - {read})):
            raise ValueError(f"{idle} must be left out with mode={self.mode}, got {getattr(self, idle)}")
        return self

    def members(self, plan: Planner) -> list[Step]:
        """A student a seed, each but the first on what the pool of those before it makes of the text."""
        found = [plan.student(**self.student | {"seed": self.seeds[0]})]
        if self.mode == "residual":
            for seed in self.seeds[1:]:
                found.append(plan.student(**self.student | {"seed": seed, "beside": {"runs": list(found), "pool": self.pool}}))
            return found
        part, passes = {"temperature": self.temperature}, 1.0
        if self.mode == "highest":
            part, passes = {"share": self.share}, 1 / self.share
        epochs = found[0].parameters.epochs * passes
        for seed in self.seeds[1:]:
            pool = found if len(found) > 1 else found[0]
            text = {"selected": {"by": pool, "measure": "kl", "mode": self.mode} | part}
            found.append(plan.student(**self.student_on(text) | {"seed": seed, "epochs": epochs}))
        return found
