"""How the members of an ensemble are combined beyond the plain pools: the settings of ``combine`` in ``05_ensemble``.

``{weights: learned}``, ``{power: 0.5}``, ``{distance: {temperature: 0.1, top_k: 2}}`` or ``{gate: {share: 0.02}}``.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from kdlib.study.refs import Ref


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Distance(_Settings):
    """A router by the distance of the prefix to the cluster that each member learned from."""

    exponent: float = Field(4, gt=0, le=16, description="p: weights are exp(-distance^p / temperature), normalised; 2 or 4")
    temperature: float = Field(0.1, gt=0, le=1e6, description="low: the nearest member alone; high: all alike")
    top_k: PositiveInt | None = Field(None, description="members that keep a weight at a token; None: all")


class Gate(_Settings):
    """A router that learns, from the teacher's cached targets, which member to trust after which prefix."""

    clusters: Ref | None = Field(None, description="the run whose token vectors describe a prefix; None: that of the members' texts")
    targets: Ref = Field({"targets": {}}, description="what it learns from: targets of the train split, sampled, topk or topk_sampled")
    share: float = Field(0.02, gt=0, le=1, description="operations spent on it, as a share of those of one member's training")
    hidden_size: PositiveInt = Field(32, le=4096, description="units of its hidden layer")
    epochs: PositiveInt = Field(4, le=1000, description="passes over the tokens that it learns from")
    learning_rate: float = Field(3e-3, gt=0, le=1, description="of Adam")
    seed: int = Field(0, ge=0, description="of its weights, the text that it learns from and the order of the tokens")
    top_k: PositiveInt | None = Field(None, description="members that keep a weight at a token; None: all")


class Combine(_Settings):
    """One way to combine members."""

    weights: Literal["learned"] | None = Field(None, description="learned: one weight a member, fitted to the calibration split")
    keep: PositiveInt | None = Field(None, description="members that are kept, those of the largest learned weights; None: all that have one")
    power: float | None = Field(
        None, ge=0.05, le=1, description="exponent of a power mean: 1 is the probability pool, towards 0 it nears the logit pool"
    )
    distance: Distance | None = Field(None, description="weights by how near the text is to what each member learned from (method cbtm)")
    gate: Gate | None = Field(None, description="weights by a small network that is trained towards the teacher's targets")

    @model_validator(mode="after")
    def _one_way(self):
        asked = [name for name in ("weights", "power", "distance", "gate") if getattr(self, name) is not None]
        if len(asked) != 1:
            raise ValueError(f"combine must be one of weights, power, distance, gate, got {', '.join(asked) or 'none'}")
        if self.keep is not None and self.weights is None:
            raise ValueError(f"keep must be given with weights alone, got it with {asked[0]}")
        return self

    def identity(self) -> dict[str, Any]:
        """What determines a result, but for the runs that are named."""
        return self.model_dump(mode="json", exclude={"gate": {"clusters", "targets"}}, exclude_none=True)

    def label(self) -> str:
        """In a few words."""
        if self.weights is not None:
            return "learned weights" if self.keep is None else f"the {self.keep} of largest learned weight"
        if self.power is not None:
            return f"power mean {self.power:g}"
        return "routed by distance" if self.distance is not None else "gated"
