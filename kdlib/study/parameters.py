"""What every notebook takes: names, types, ranges, and which settings go together.

A run's id comes from :meth:`Parameters.identity`, so whatever cannot change a result is left out there.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator

from kdlib.study.schedules import Schedule, Stage

Share = Annotated[float, Field(ge=0, le=1)]
Adaptation = Literal["frozen", "lora", "full", "scratch"]
Pool = Literal["probability", "logit"]
Precision = Literal["auto", "float32", "bfloat16"]
LowPrecision = Literal["none", "optimizer", "optimizer_and_backward"]
TargetKind = Literal["sampled", "topk", "topk_sampled", "dense"]
Multipliers = dict[str, Annotated[float, Field(ge=0)]]
# Those that need the whole of the teacher's distribution, or all of it but the mass of a tail, and those that need nothing more
# than unbiased draws; kdlib.losses.divergences says why.
ON_OUTCOMES = ("reverse_kl", "jeffreys", "jsd", "skewed_kl", "skewed_reverse_kl", "tvd")
ON_LOGITS = ("logit_mse", "sinkhorn", "mutual_information")
# Options of a divergence: what a value must be, in words and as a test. The losses refuse the same values, but only in the run.
_INSIDE = ("between 0 and 1, both excluded", lambda value: 0 < value < 1)
_ABOVE = ("above 0", lambda value: value > 0)
_COUNT = ("a whole number, 1 or more", lambda value: isinstance(value, int) and value >= 1)
_GROUP = ("a whole number, 2 or more", lambda value: isinstance(value, int) and value >= 2)
OPTIONS = {
    "jsd": {"beta": _INSIDE},
    "skewed_kl": {"alpha": _INSIDE},
    "skewed_reverse_kl": {"alpha": _INSIDE},
    "sinkhorn": {"group": _COUNT, "regularisation": _ABOVE, "iterations": _COUNT},
    "mutual_information": {"group": _GROUP, "critic_temperature": _ABOVE},
}


class Parameters(BaseModel):
    """Parameters of one notebook: unknown names and values out of range are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    profile: str = Field(
        description="profile whose other sections are the run's upstream: a name or a path to a .yaml file"
    )

    def identity(self) -> dict[str, Any]:
        """The values that determine the run's result, for its run id (not the profile's name, nor how fast it runs).

        A field with a default is left out at that default: it was added later, and its default is what runs did before,
        so that their ids stay as they are.
        """
        return self.model_dump(mode="json", exclude={"profile", "compile"}, exclude_defaults=True)


def _whole_path(source: Any) -> Any:
    # The run may be made from another folder than the one it is asked for in.
    return str(Path(source).expanduser().resolve()) if str(source).endswith(".h5") else source


def _whole_paths(settings: dict) -> dict:
    # Of targets, or of a student with some.
    if isinstance(targets := settings.get("targets"), dict):
        return settings | {"targets": _whole_paths(targets)}
    return settings | {"source": _whole_path(settings["source"])} if "source" in settings else settings


# The pattern comes first: it is of what was given.
Source = Annotated[str, Field(pattern=r"^(teacher|dense|https?://[^#\s]+#\S+|.+\.h5)$"), AfterValidator(_whole_path)]
Settings = Annotated[dict[str, Any], AfterValidator(_whole_paths)]


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
    low_precision: LowPrecision = Field(
        "none",
        description="optimizer: 8-bit optimiser states; optimizer_and_backward: and 8-bit matrix products in the backward "
        "pass, on GPUs that have them; both need torchao",
    )


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
    kind: TargetKind = Field(
        description="sampled: unbiased draws; topk: the k largest and the exact tail mass; topk_sampled: the k largest and "
        "draws from the rest; dense: the whole distribution"
    )
    draws: int = Field(ge=1, le=255, description="draws a token (kind=sampled, topk_sampled)")
    top_k: int = Field(ge=1, le=4096, description="ids a token (kind=topk, topk_sampled)")
    source: Source = Field(
        "teacher",
        description="teacher: run it; dense: draw from the profile's dense targets, without running it again; "
        "http://host:port#model: a completion server; a path ending in .h5: top-k targets of another tool",
    )
    proposal: float = Field(
        1.0, gt=0, le=1.5, description="rho: draws come from t^rho and are weighted back (kind=sampled, topk_sampled)"
    )
    stratified: bool = Field(
        False,
        description="one draw from each of as many equal parts of the distribution: the same expectation with less variance "
        "(kind=sampled, topk_sampled)",
    )
    temperature: float = Field(gt=0, le=100, description="temperature of the distribution that is kept")
    seed: int = Field(ge=0, description="of the draws")
    precision: Precision = Field(description="autocast of the teacher's forward pass")

    @model_validator(mode="after")
    def _dense_is_the_source(self):
        if self.kind == self.source == "dense":
            raise ValueError("dense targets are written by the teacher; leave out source")
        if self.external and (self.kind != "topk" or self.temperature != 1):
            raise ValueError(
                "servers and files tell the most likely tokens at temperature 1; expected kind topk and temperature 1, found "
                f"{self.kind} and {self.temperature}"
            )
        return self

    @property
    def external(self) -> bool:
        """Whether the targets come from a server or a file, and not from the profile's teacher."""
        return self.source not in ("teacher", "dense")

    def identity(self) -> dict[str, Any]:
        """Leaves out the other kinds' sizes, and the seed where nothing is drawn."""
        values = super().identity()
        unread = {
            "sampled": {"top_k"},
            "topk": {"draws", "proposal", "stratified", "seed"},
            "topk_sampled": set(),
            "dense": {"draws", "top_k", "proposal", "stratified", "seed", "temperature"},
        }[self.kind]
        if self.external:
            unread |= {"teacher", "precision"}
            # Where a server or a file is does not matter; a file counts by its hash, among the sources.
            values["source"] = f"server's {self.source.split('#', 1)[1]}" if "#" in self.source else "file"
        return {name: value for name, value in values.items() if name not in unread}


class Selection(BaseModel):
    """Part of the training text, or all of it weighted, by what the teacher or a student makes of its documents."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    by: Literal["teacher_entropy", "teacher_nll", "student_nll"] | None = Field(
        None,
        description="mean over a document's tokens of the teacher's entropy or its loss, both at the temperature of the "
        "targets (dense: at 1), or of the loss of the profile's first cross-entropy student (not mode=random)",
    )
    mode: Literal["highest", "lowest", "middle", "random", "weighted"] = Field(
        description="which documents of that order come first; weighted: all are kept, and the loss of a token has the weight "
        "of its document, proportional to exp(by / temperature), with mean 1"
    )
    share: float | None = Field(
        None, gt=0, lt=1, description="tokens kept, as a share of the train split's (not mode=weighted)"
    )
    temperature: float | None = Field(None, gt=0, le=100, description="in nats, of mode=weighted")
    domains: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None,
        min_length=1,
        description="carrier: its share of the tokens kept, chosen by the mode within each (not mode=weighted); "
        "None: whatever the mode brings",
    )

    @model_validator(mode="after")
    def _mode_has_what_it_reads(self):
        needs = {"by": self.mode != "random", "share": self.mode != "weighted", "temperature": self.mode == "weighted"}
        for name, needed in needs.items():
            found = getattr(self, name)
            if needed != (found is not None):
                raise ValueError(f"mode={self.mode} {'needs' if needed else 'does not read'} {name}; found {found}")
        if self.domains and self.mode == "weighted":
            raise ValueError("mode=weighted keeps all documents of all domains; leave out domains")
        return self


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
    learning_rate_multipliers: Multipliers = Field(
        description="regular expression on parameter names: multiplier of the learning rate; 0 freezes; first match wins"
    )
    targets: Settings = Field(
        {}, description="what sets its targets apart from the profile's targets section (objective=kd)"
    )
    fresh_draws: bool = Field(
        False,
        description="draw the targets anew for this student, with its seed, from dense ones (targets={source: dense}): the "
        "members of an ensemble then see different draws, and the teacher runs once",
    )
    divergence: Literal[("forward_kl", *ON_OUTCOMES, *ON_LOGITS)] = Field(
        "forward_kl", description="of the KD term, from the teacher's distribution to the student's"
    )
    divergence_options: dict[str, int | float] = Field(
        {}, description="further arguments of the divergence, such as beta of jsd or alpha of skewed_kl"
    )
    kd_weight_schedule: Schedule | None = Field(None, description="kd_weight over training, in place of a constant")
    temperature_schedule: Schedule | None = Field(
        None, description="temperature over training (objective=online_kd)"
    )
    feature: Literal["none", "hidden_mse", "hidden_cosine", "attention_mse", "relation"] = Field(
        "none", description="a loss on hidden states or attention beside the others (objective=online_kd)"
    )
    feature_weight: float = Field(1.0, gt=0, description="weight of the feature loss, added to the others")
    layer_map: Literal["last", "last_k", "all", "uniform_consecutive", "uniform_last"] = Field(
        "uniform_consecutive", description="which student layer learns from which teacher layers"
    )
    last_k: PositiveInt | None = Field(None, description="k of layer_map=last_k")
    relations: list[Literal["query", "key", "value"]] = Field(
        ["query", "key", "value"], min_length=1, description="vectors compared by feature=relation"
    )
    balance: Literal["none", "project", "norm"] = Field(
        "none",
        description="project: the feature loss's gradient loses what opposes the main one; norm: it is never the longer",
    )
    initialisation: Literal["random", "embeddings", "every_nth", "identical"] = Field(
        "random", description="weights taken from the teacher: none, its embeddings, every n-th layer, all"
    )
    noise: float = Field(
        0.0, ge=0, le=10, description="parameter noise at the start, in standard deviations of each matrix"
    )
    stages: list[Stage] = Field(
        [], description="parts of the training with learning-rate multipliers and an optimiser of their own"
    )
    text: Literal["real", "uniform", "unigram", "teacher"] = Field(
        "real", description="trained on: the corpus, random tokens, or text that the teacher wrote (not objective=kd)"
    )
    selection: Selection | None = Field(
        None, description="part of the training text, or weights for it; None takes all of it alike"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads} (rotary embeddings)"
            )
        return self

    @model_validator(mode="after")
    def _multipliers_can_be_applied(self):
        for multipliers in (self.learning_rate_multipliers, *(stage.learning_rate_multipliers for stage in self.stages)):
            for pattern in multipliers:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"learning_rate_multipliers are named by regular expressions on parameter names; {pattern!r} is malformed "
                        f"({error}); put a backslash before a character that stands for itself"
                    ) from None
        return self

    @model_validator(mode="after")
    def _settings_agree(self):
        needs_teacher = {
            "feature": self.feature != "none",
            "temperature_schedule": self.temperature_schedule is not None,
        }
        for name, asked in needs_teacher.items():
            if asked and self.objective != "online_kd":
                raise ValueError(f"{name} needs the teacher in the loop, objective=online_kd; found {self.objective}")
        if self.fresh_draws and self.objective != "kd":
            raise ValueError(f"fresh_draws are of cached targets, objective=kd; found {self.objective}")
        if self.divergence != "forward_kl" and self.objective == "ce":
            raise ValueError(f"divergence {self.divergence} needs a teacher; found objective ce")
        allowed = OPTIONS.get(self.divergence, {})
        if not set(self.divergence_options) <= set(allowed):
            raise ValueError(
                f"divergence {self.divergence} takes the options {', '.join(allowed) or 'none'}; found {self.divergence_options}"
            )
        for option, value in self.divergence_options.items():
            expected, holds = allowed[option]
            if not holds(value):
                raise ValueError(f"{option} of divergence {self.divergence} must be {expected}; found {value}")
        weight, temperature = self.kd_weight_schedule, self.temperature_schedule
        if weight and not all(0 <= end <= 1 for end in (weight.start, weight.end)):
            raise ValueError(f"kd_weight_schedule must lie in 0..1; found {weight.start} to {weight.end}")
        if temperature and not all(0 < end <= 100 for end in (temperature.start, temperature.end)):
            raise ValueError(
                f"temperature_schedule must lie above 0 and not above 100; found {temperature.start} to {temperature.end}"
            )
        if self.text != "real" and (self.objective == "kd" or self.selection):
            raise ValueError(
                f"text {self.text!r} is made in the run, so cached targets and selection do not know it; use ce or online_kd"
            )
        if self.selection and self.selection.mode == "weighted":
            if self.feature != "none":
                raise ValueError(f"feature losses are not weighted; leave out selection or feature {self.feature}")
            if "group" in allowed:
                raise ValueError(
                    f"divergence {self.divergence} compares tokens in groups, so a single token has no loss to weight; leave out "
                    "selection, or choose another divergence"
                )
        if self.stages and self.learning_rate_multipliers:
            raise ValueError("with stages, each has its own learning_rate_multipliers; leave those of the run empty")
        shares = [stage.share for stage in self.stages]
        if shares and not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(
                f"the shares of the stages must add up to 1; found {shares}, which add up to {sum(shares):g}"
            )
        if self.stages and (self.kd_weight_schedule or self.temperature_schedule):
            raise ValueError(
                "a schedule would begin anew in every stage; leave out stages, or kd_weight_schedule and temperature_schedule"
            )
        unserved = self.architecture == "gpt2" or self.feature == "relation"
        if self.low_precision == "optimizer_and_backward" and unserved:
            raise ValueError(
                "low_precision=optimizer_and_backward replaces nn.Linear layers; gpt2 has none, and feature=relation reads them. "
                f"Found {self.architecture} and {self.feature}; use low_precision=optimizer"
            )
        if (self.layer_map == "last_k") != (self.last_k is not None):
            raise ValueError("last_k belongs to layer_map=last_k, which needs it")
        return self

    def identity(self) -> dict[str, Any]:
        """Cross-entropy reads neither teacher, weight nor temperature; targets count as the run that they come from."""
        values = super().identity()
        for part in (values, *values.get("stages", [])):
            # The first match wins, and an id does not see the order in which a mapping names things; that of a list it does.
            if multipliers := part["learning_rate_multipliers"]:
                part["learning_rate_multipliers"] = [list(pair) for pair in multipliers.items()]
        unread = {"targets", "fresh_draws"}
        if self.objective == "ce":
            unread |= {"kd_weight", "temperature", "kd_weight_schedule"}
            if self.initialisation == "random" and self.text != "teacher":
                unread |= {"teacher"}
        if self.kd_weight_schedule:
            unread |= {"kd_weight"}
        if self.temperature_schedule:
            unread |= {"temperature"}
        if self.feature == "none":
            unread |= {"feature_weight", "layer_map", "last_k", "balance"}
        if self.feature != "relation":
            unread |= {"relations"}
        return {name: value for name, value in values.items() if name not in unread}


class FidelityParameters(Parameters):
    """``06_fidelity``: how near a student's targets, and the student itself, come to the teacher's whole distribution."""

    student: Settings = Field(description="what sets the student apart from the profile's student section")
    seed: int = Field(ge=0, description="of the student")
    tokens: PositiveInt = Field(description="tokens of train text for the gradients, and of test text for the KL")
    precision: Precision = Field(description="autocast of the teacher's forward pass")


class EnsembleParameters(Parameters):
    """``05_ensemble``: the profile's students with these seeds, pooled."""

    student: Settings = Field(description="what sets the members apart from the profile's student section")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="one member a seed")
    pool: Pool = Field(description="probability: arithmetic mean of distributions; logit: geometric mean, renormalised")
    precision: Precision = Field(description="autocast of the evaluation")

    @model_validator(mode="after")
    def _members_differ(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"a member is a seed, and one that is there twice is one member; found seeds {self.seeds}; name each once"
            )
        return self


class AnalysisParameters(Parameters):
    """``10`` and up: read the profile's results, write a table and a figure."""


class TourParameters(Parameters):
    """``00_tour``: the whole idea on a handful of documents."""
