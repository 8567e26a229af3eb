"""Settings of a loss on what student and teacher compute inside: ``features`` in ``04_student``."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class Features(BaseModel):
    """A loss on what student and teacher compute inside, beside the others (objective=online_kd)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    of: Literal["hidden_mse", "hidden_cosine", "attention_mse", "relation"] = Field(
        description="hidden states, attention maps, or query-key-value relations"
    )
    weight: float = Field(1.0, gt=0, description="of this loss, added to the others")
    layers: Literal["last", "last_k", "all", "uniform_consecutive", "uniform_last"] = Field(
        "uniform_consecutive", description="which student layer learns from which teacher layers"
    )
    last_k: PositiveInt | None = Field(None, description="k of layers=last_k")
    relations: list[Literal["query", "key", "value"]] = Field(
        ["query", "key", "value"], min_length=1, description="vectors compared by of=relation"
    )
    balance: Literal["none", "project", "norm"] = Field(
        "none", description="project: its gradient loses what opposes the main one; norm: it is never the longer"
    )

    @model_validator(mode="after")
    def _last_k_belongs_to_its_map(self):
        if (self.layers == "last_k") != (self.last_k is not None):
            raise ValueError(f"last_k must be given with layers=last_k and only then, got {self.last_k} with {self.layers}")
        return self
