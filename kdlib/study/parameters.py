"""What the parameters of every notebook have in common: names and types are checked, and what shapes a result is told apart.

Each kind of run has parameters of its own, in its module of :mod:`kdlib.runs`.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from kdlib.study.schedules import require_between, scheduled

Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0)]


def _differ(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be unique, got {seeds}")
    return seeds


Seeds = Annotated[list[Seed], AfterValidator(_differ)]
Adaptation = Literal["frozen", "lora", "full", "scratch"]
Pool = Literal["probability", "logit"]
Precision = Literal["auto", "float32", "bfloat16"]
LowPrecision = Literal["none", "optimizer", "optimizer_and_backward"]
Multipliers = dict[str, Annotated[float, Field(ge=0)]]


def problems(error: ValidationError, whole: str = "") -> str:
    """Each wrong value in words: its place (``whole`` for all of them together), what was expected, and what was found."""
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or whole}: {_plain(one)}" for one in error.errors())


def _plain(problem: dict) -> str:
    # Our own validators say what they found; where a value is missing, the input is all that it is missing from.
    found = "" if problem["type"] in ("missing", "value_error") else f", got {problem['input']!r}"
    return problem["msg"].removeprefix("Value error, ") + found


class Parameters(BaseModel):
    """Parameters of one notebook: unknown names and values out of range are refused.

    Attributes:
        UNREAD: fields that never shape a result, or that count by the ids of the runs they name.
        ABSENT: field: the value that its absence from a run's settings means. Such a field was added after runs had been
            made; at this value it is left out, so that their ids stay. The table is frozen: a default that changes makes
            other ids, and so it should.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    UNREAD: ClassVar[frozenset[str]] = frozenset({"profile"})
    ABSENT: ClassVar[dict[str, Any]] = {}

    profile: str = Field(
        description="profile whose other sections are the run's upstream: a name or a path to a .yaml file"
    )

    def identity(self) -> dict[str, Any]:
        """The values that determine the run's result, for its run id: not the profile's name, nor how fast it runs."""
        values = self.model_dump(mode="json", exclude=set(self.UNREAD | self.unread()))
        return {name: value for name, value in values.items() if name not in self.ABSENT or value != self.ABSENT[name]}

    def unread(self) -> set[str]:
        """Fields that a run with just these values does not read."""
        return set()

    @classmethod
    def usable(cls, section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """Of a profile's section, what can stand beside ``changes``."""
        return section


class TrainingParameters(Parameters):
    """What every model that trains has in common."""

    UNREAD: ClassVar = Parameters.UNREAD | {"compile"}
    ABSENT: ClassVar = {"low_precision": "none"}

    epochs: float = Field(ge=0, le=1000, description="passes over the train split; 0 leaves the model as initialised")
    batch_size: PositiveInt = Field(description="rows of block_length tokens in one forward pass")
    gradient_accumulation: PositiveInt = Field(description="forward passes in one optimisation step")
    learning_rate: float = Field(gt=0, le=1, description="peak of a cosine schedule")
    warmup: Share = Field(description="share of the steps in which the learning rate rises linearly")
    weight_decay: scheduled(Annotated[float, Field(ge=0, le=10)]) = Field(
        description="AdamW, constant or on a schedule; norms and biases are never decayed"
    )
    seed: Seed = Field(description="initialisation and data order")
    precision: Precision = Field(description="autocast; auto is bfloat16 where the hardware multiplies it natively")
    compile: bool = Field(description="torch.compile the student's body; falls back where no compiler is found")
    low_precision: LowPrecision = Field(
        "none",
        description="optimizer: 8-bit optimiser states; optimizer_and_backward: and 8-bit matrix products in the backward "
        "pass, on GPUs that have them; both need torchao",
    )

    @property
    def order_seed(self) -> int:
        """What the order of the training rows is drawn with: that of epoch e, from 0, with it plus e."""
        return self.seed

    @model_validator(mode="after")
    def _decay_is_in_range(self):
        require_between("weight_decay", self.weight_decay, 0, 10)
        return self


class AnalysisParameters(Parameters):
    """``10`` and up: read the profile's results, write a table and a figure."""


class GridParameters(AnalysisParameters):
    """``21_grid``: one of the profile's grids."""

    grid: str = Field(description="a grid that the profile names under study: grids (targets has a notebook of its own)")


class GrowthParameters(GridParameters):
    """``14_growth``: one of the profile's grids of ensembles."""


class TourParameters(Parameters):
    """``00_tour``: the whole idea on a handful of documents."""

    sentence: str = Field(
        "The people of the United States have a right to peace and to justice.", min_length=1, description="read by every model"
    )


def whole_path(source: Any) -> Any:
    """A path of a file as it is from any working folder: a run may be made from another than it is asked for in."""
    return str(Path(source).expanduser().resolve()) if str(source).endswith(".h5") else source


def whole_paths(settings: dict) -> dict:
    """Settings of targets, or of a student with some, with :func:`whole_path` of their source."""
    if isinstance(targets := settings.get("targets"), dict):
        return settings | {"targets": whole_paths(targets)}
    return settings | {"source": whole_path(settings["source"])} if "source" in settings else settings


Settings = Annotated[dict[str, Any], AfterValidator(whole_paths)]
