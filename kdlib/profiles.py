"""Parameters of every notebook and the profiles that set them.

A *profile* (``profiles/<name>.yaml``) is one complete study: what text, which teacher, how targets are kept, what students
look like, and which runs make up the comparison. Each of its sections is exactly the parameter list of one producer
notebook, so a notebook run with ``--profile quick`` and one run by hand with the same values are the same run.
"""

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from kdlib.errors import KdlibError

REPOSITORY = Path(__file__).resolve().parents[1]

Share = Annotated[float, Field(ge=0, le=1)]
Adaptation = Literal["frozen", "lora", "full", "scratch"]
Pool = Literal["probability", "logit"]
Precision = Literal["auto", "float32", "bfloat16"]


class Parameters(BaseModel):
    """Parameters of one notebook: unknown names and values out of range are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: str = Field(
        description="profile whose other sections are the run's upstream: a name or a path to a .yaml file"
    )

    def identity(self) -> dict[str, Any]:
        """The values that determine the run's result, for its run id (not the profile's name, nor how fast it runs)."""
        return self.model_dump(mode="json", exclude={"profile", "compile"})


class CorpusParameters(Parameters):
    """``01_corpus``: text to splits, vocabulary and packed tokens."""

    domains: dict[str, Annotated[float, Field(gt=0)]] = Field(
        description="carrier: its share of the tokens of each split"
    )
    ood: str = Field(description="carrier held out whole as the out-of-domain test")
    train_tokens: PositiveInt = Field(description="tokens of the train split")
    heldout_tokens: PositiveInt = Field(description="tokens of each of validation, calibration, test and ood")
    block_length: int = Field(ge=8, le=8192, description="tokens in one row of the model's input")
    tokenizer: str = Field(
        description="carrier, path or hub id of the teacher whose tokenizer is pruned; 'train' trains one"
    )
    vocabulary_size: int = Field(ge=300, description="tokens kept (or trained)")

    @model_validator(mode="after")
    def _ood_is_unseen(self):
        if self.ood in self.domains:
            raise ValueError(f"ood domain {self.ood!r} is also trained on; take it out of domains")
        return self


class TrainingParameters(Parameters):
    """What every model that trains has in common."""

    epochs: float = Field(ge=0, le=1000, description="passes over the train split; 0 leaves the model as initialised")
    batch_size: PositiveInt = Field(description="rows of block_length tokens in one forward pass")
    gradient_accumulation: PositiveInt = Field(description="forward passes in one optimisation step")
    learning_rate: float = Field(gt=0, le=1, description="peak of a cosine schedule")
    warmup: Share = Field(description="share of the steps in which the learning rate rises linearly")
    weight_decay: float = Field(ge=0, le=10, description="AdamW; norms and biases are never decayed")
    seed: int = Field(ge=0, description="initialisation and data order")
    precision: Precision = Field(description="autocast; auto is bfloat16 where the hardware multiplies it natively")
    compile: bool = Field(description="torch.compile the student's body; falls back where no compiler is found")


class TeacherParameters(TrainingParameters):
    """``02_teacher``: a frozen, LoRA-adapted, fully fine-tuned or scratch-trained teacher."""

    source: str = Field(
        description="carrier, path to a .gguf or folder, or hub id[@revision]; ignored by adaptation=scratch"
    )
    adaptation: Adaptation = Field(
        description="frozen: as downloaded; lora, full: tuned on train; scratch: trained from random"
    )
    tokens: PositiveInt = Field(
        description="tokens of the train split that adaptation sees in an epoch, from its beginning"
    )
    lora_rank: PositiveInt = Field(description="rank of the LoRA update (alpha is twice the rank)")
    layers: PositiveInt = Field(description="depth of a scratch teacher")
    hidden_size: PositiveInt = Field(description="width of a scratch teacher")
    heads: PositiveInt = Field(description="attention heads of a scratch teacher")

    def identity(self) -> dict[str, Any]:
        """Leaves out what the chosen adaptation does not read."""
        values = super().identity()
        unread = {
            "frozen": set(TrainingParameters.model_fields) | {"tokens", "lora_rank", "layers", "hidden_size", "heads"},
            "lora": {"layers", "hidden_size", "heads"},
            "full": {"lora_rank", "layers", "hidden_size", "heads"},
            "scratch": {"source", "lora_rank"},
        }[self.adaptation]
        return {name: value for name, value in values.items() if name not in unread or name == "precision"}


class TargetParameters(Parameters):
    """``03_targets``: the teacher's distributions on the train split, on disk."""

    teacher: Adaptation = Field(description="which teacher of the profile writes")
    kind: Literal["sampled", "topk"] = Field(
        description="sampled: unbiased draws; topk: the k largest and the exact tail mass"
    )
    draws: int = Field(ge=1, le=255, description="draws a token (kind=sampled)")
    top_k: int = Field(ge=1, le=4096, description="ids a token (kind=topk)")
    temperature: float = Field(gt=0, le=100, description="temperature of the distribution that is kept")
    seed: int = Field(ge=0, description="of the draws")
    precision: Precision = Field(description="autocast of the teacher's forward pass")

    def identity(self) -> dict[str, Any]:
        """Leaves out the other kind's size, and the seed where nothing is drawn."""
        values = super().identity()
        unread = {"sampled": {"top_k"}, "topk": {"draws", "seed"}}[self.kind]
        return {name: value for name, value in values.items() if name not in unread}


class StudentParameters(TrainingParameters):
    """``04_student``: one student."""

    objective: Literal["ce", "kd", "online_kd"] = Field(
        description="ce: the text alone; kd: cached targets; online_kd: the teacher in the loop, its whole distribution"
    )
    kd_weight: Share = Field(description="weight of the KD term; cross-entropy has 1 - kd_weight")
    temperature: float = Field(
        gt=0, le=100, description="softens teacher and student in the KD term, which is scaled by its square"
    )
    teacher: Adaptation = Field(description="which teacher of the profile is distilled")
    architecture: Literal["llama", "gpt2", "qwen3"] = Field(description="transformers architecture of the student")
    layers: PositiveInt = Field(description="depth")
    hidden_size: PositiveInt = Field(description="width")
    heads: PositiveInt = Field(description="attention heads")
    learning_rate_multipliers: dict[str, Annotated[float, Field(ge=0)]] = Field(
        description="regular expression on parameter names: multiplier of the learning rate; 0 freezes; first match wins"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads} (rotary embeddings)"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Cross-entropy reads neither teacher, weight nor temperature."""
        values = super().identity()
        unread = {"kd_weight", "temperature", "teacher"} if self.objective == "ce" else set()
        return {name: value for name, value in values.items() if name not in unread}


class EnsembleParameters(Parameters):
    """``05_ensemble``: the profile's students with these seeds, pooled."""

    student: dict[str, Any] = Field(description="what sets the members apart from the profile's student section")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="one member a seed")
    pool: Pool = Field(description="probability: arithmetic mean of distributions; logit: geometric mean, renormalised")
    precision: Precision = Field(description="autocast of the evaluation")


class AnalysisParameters(Parameters):
    """``10`` and up: read the profile's results, write a table and a figure."""

    resamples: int = Field(ge=100, le=1_000_000, description="bootstrap resamples")


class TourParameters(Parameters):
    """``00_tour``: the whole idea on a handful of documents."""


class Study(BaseModel):
    """Which runs make up the profile's comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teachers: list[Adaptation] = Field(min_length=1, description="teachers made and evaluated")
    objectives: list[Literal["ce", "kd", "online_kd"]] = Field(min_length=1, description="objectives compared")
    pools: list[Pool] = Field(min_length=1, description="ways of pooling compared")
    members: int = Field(ge=1, description="members of one ensemble")
    repeats: int = Field(
        ge=1, description="independent ensembles of each kind; single models have members x repeats seeds"
    )


class Profile(BaseModel):
    """One study: a section per producer notebook, and the comparison they are run for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    description: str
    corpus: CorpusParameters
    teacher: TeacherParameters
    targets: TargetParameters
    student: StudentParameters
    ensemble: EnsembleParameters
    analysis: AnalysisParameters
    study: Study


# Each notebook's parameter model and the profile section that fills it.
NOTEBOOKS: dict[str, tuple[type[Parameters], str]] = {
    "00_tour": (TourParameters, "tour"),
    "01_corpus": (CorpusParameters, "corpus"),
    "02_teacher": (TeacherParameters, "teacher"),
    "03_targets": (TargetParameters, "targets"),
    "04_student": (StudentParameters, "student"),
    "05_ensemble": (EnsembleParameters, "ensemble"),
    "10_objectives": (AnalysisParameters, "analysis"),
    "12_methods": (AnalysisParameters, "analysis"),
    "15_calibration": (AnalysisParameters, "analysis"),
    "17_cost": (AnalysisParameters, "analysis"),
}


def available() -> list[str]:
    """Names of the profiles that ship with the project."""
    return sorted(path.stem for path in (REPOSITORY / "profiles").glob("*.yaml") if path.stem != "sources")


def load(name: str) -> Profile:
    """The profile called ``name`` (or in the .yaml file ``name``), checked.

    Raises:
        KdlibError: no such profile, not YAML, or a section with an unknown name or a value out of range.
    """
    given = name.endswith((".yaml", ".yml"))
    path = Path(name).resolve() if given else REPOSITORY / "profiles" / f"{name}.yaml"
    if not (path.is_file() if given else name in available()):
        raise KdlibError(
            f"Unknown profile {name!r}. Expected one of {', '.join(available())}, or the path of a .yaml file."
        )
    return _loaded(name, path, path.stat().st_mtime_ns)


@lru_cache
def _loaded(name: str, path: Path, modified: int) -> Profile:
    # Planning a study asks for its profile once a run and parameter; `modified` has an edited file read again.
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise KdlibError(f"Profile {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise KdlibError(f"Profile {path} must hold a mapping with the sections {', '.join(Profile.model_fields)}.")
    for section in ("corpus", "teacher", "targets", "student", "ensemble", "analysis"):
        if isinstance(values.get(section), dict):
            values[section] = {"profile": name, **values[section]}
    found = _validated(Profile, values, f"profile {name!r}")
    if found.name != path.stem:
        raise KdlibError(
            f"Profile {path} calls itself {found.name!r}, but its results are kept under {path.stem!r}. Give both one name."
        )
    return found


def parameters(notebook: str, profile: str, /, **changes: Any) -> Parameters:
    """The checked parameters of ``notebook``: its section of ``profile`` with ``changes`` on top.

    Raises:
        KdlibError: unknown notebook, profile or parameter, or a value out of range.
    """
    if notebook not in NOTEBOOKS:
        raise KdlibError(f"Unknown notebook {notebook!r}. Expected one of {', '.join(NOTEBOOKS)}.")
    model, section = NOTEBOOKS[notebook]
    base = getattr(load(profile), section).model_dump() if section in Profile.model_fields else {"profile": profile}
    _refuse_unknown(model, changes, notebook)
    return _validated(model, {**base, **changes}, f"notebook {notebook}")


def from_notebook(notebook: str, namespace: dict[str, Any]) -> Parameters:
    """The checked parameters found among a notebook's globals, called in the cell after the parameters cell.

    papermill adds a misspelt parameter as a new global without complaint, so plain-valued globals that the notebook does
    not declare are refused too.
    """
    model, _ = NOTEBOOKS[notebook]
    ours = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in {"In", "Out"}
        and (value is None or isinstance(value, str | bool | int | float | list | dict | tuple))
    }
    _refuse_unknown(model, ours, notebook)
    checked = _validated(model, ours, f"notebook {notebook}")
    load(checked.profile)
    return checked


def _refuse_unknown(model: type[BaseModel], values: dict, where: str) -> None:
    for name in values:
        if name not in model.model_fields:
            close = difflib.get_close_matches(name, model.model_fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise KdlibError(f"Unknown parameter {name!r} of {where}.{hint} Allowed: {', '.join(model.model_fields)}.")


def _validated(model: type[BaseModel], values: dict, where: str):
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"]) or "settings"
            found = "" if problem["type"] == "missing" else f" (found {problem['input']!r})"
            problems.append(f"{place}: {problem['msg']}{found}")
        raise KdlibError(f"Bad {where}. " + "; ".join(problems) + ".") from None
