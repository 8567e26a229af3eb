"""What changes while a model trains: values that follow a schedule, and stages that train different parameters."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from kdlib.errors import KdlibError

# Share of the way from start to end, at a progress between 0 and 1.
SHAPES = {
    "constant": lambda progress, at: 0.0,
    "linear": lambda progress, at: progress,
    "cosine": lambda progress, at: (1 - math.cos(math.pi * progress)) / 2,
    "step": lambda progress, at: float(progress >= at),
}


class Schedule(BaseModel):
    """A value over the progress of training, such as ``kd_weight`` or a temperature.

    ``kd_weight`` from 1 to 0 goes from distillation to cross-entropy (teacher annealing: Clark et al. 2019, arXiv
    1907.04829), from 0 to 1 the other way; a falling temperature is that of annealing KD (Jafari et al. 2021, arXiv
    2104.07163). Every shape stays between ``start`` and ``end``, so limits that hold for both hold throughout.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    shape: Literal["constant", "linear", "cosine", "step"] = Field(description="way from start to end")
    start: float = Field(description="value at the first step")
    end: float = Field(description="value at the last step; that of start where the shape is constant")
    at: float = Field(0.5, gt=0, lt=1, description="progress from which a step has the value end")

    @model_validator(mode="before")
    @classmethod
    def _constant_ends_where_it_starts(cls, values):
        if isinstance(values, dict) and values.get("shape") == "constant" and "start" in values:
            return {"end": values["start"], **values}
        return values

    @model_validator(mode="after")
    def _no_idle_setting(self):
        if self.shape == "constant" and self.end != self.start:
            raise ValueError(
                f"a constant cannot go from {self.start} to {self.end}; leave out end, or choose linear, cosine or step"
            )
        if self.shape != "step" and self.at != 0.5:
            raise ValueError(f"at is where a step happens, and the shape is {self.shape}; leave out at")
        return self

    @property
    def is_constant(self) -> bool:
        """Whether the value never changes."""
        return self.start == self.end

    def value(self, progress: float) -> float:
        """The value at ``progress``: 0 at the first step, 1 at the last.

        Raises:
            KdlibError: progress outside 0 to 1.
        """
        if not 0 <= progress <= 1:
            raise KdlibError(
                f"A schedule is defined for a progress from 0 to 1; found {progress}. Give the share of the steps done."
            )
        share = SHAPES[self.shape](progress, self.at)
        # Rounding must not carry a weight beyond its limits.
        low, high = sorted((self.start, self.end))
        return min(max((1 - share) * self.start + share * self.end, low), high)


def scheduled(number: Any) -> Any:
    """The type of a setting that is a number, of type ``number``, or a :class:`Schedule`."""
    either = Annotated[number, Tag("number")] | Annotated[Schedule, Tag("schedule")]
    return Annotated[either, Discriminator(lambda value: "schedule" if isinstance(value, dict | Schedule) else "number")]


def as_schedule(value: float | Schedule) -> Schedule:
    """``value`` itself if it is a schedule, the constant schedule of a plain number."""
    return value if isinstance(value, Schedule) else Schedule(shape="constant", start=value)


def require_between(name: str, value: float | Schedule, low: float, high: float) -> None:
    """Refuse a setting whose schedule leaves its limits.

    Raises:
        ValueError: it begins or ends outside; what lies between does not then.
    """
    if isinstance(value, Schedule) and not all(low <= end <= high for end in (value.start, value.end)):
        raise ValueError(f"{name} must stay between {low:g} and {high}, got {value.start} to {value.end}")


class Stage(BaseModel):
    """One stage of staged training: which parameters it trains, and for how long.

    Each stage begins with a new optimiser, so that moments gathered under other gradients do not carry over.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    share: float = Field(gt=0, le=1, description="part of the run's steps; those of all stages add up to 1")
    learning_rate_multipliers: dict[str, Annotated[float, Field(ge=0)]] = Field(
        description="regular expression on parameter names: multiplier of the learning rate; 0 freezes; first match wins"
    )


def stage_ends(stages: Sequence[Stage], steps: int) -> list[int]:
    """The step after the last one of each stage; a run of ``steps`` steps is cut at these.

    Raises:
        KdlibError: shares that do not add up to 1, or a stage that would have no step.
    """
    shares = [stage.share for stage in stages]
    if not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise KdlibError(
            f"The shares of the stages must add up to 1, got {shares}, which add up to {sum(shares):g}. Change one."
        )
    ends = [round(steps * done) for done in accumulate(shares)]
    if any(end <= begin for begin, end in pairwise([0, *ends])):
        raise KdlibError(
            f"Every stage must have at least one step, got ends at {ends} for {steps} steps and shares {shares}. Train for more epochs, "
            "or use fewer stages."
        )
    return ends
