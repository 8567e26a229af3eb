"""Student: one small model, from text, from cached targets or from a teacher in the loop."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from kdlib.data import text
from kdlib.data.text import Text
from kdlib.errors import KdlibError
from kdlib.study import parameters
from kdlib.study.beside import Beside
from kdlib.study.divergences import GROUPED, Divergence, as_pair, refuse_unserved
from kdlib.study.features import Features
from kdlib.study.plan import Planner, Step
from kdlib.study.refs import Ref
from kdlib.study.schedules import Schedule, Stage, require_between, scheduled, stage_ends
from kdlib.study.store import Run
from kdlib.study.work import total

NOTEBOOK, LEAVES = "04_student", "model"
# Settings that an objective refuses.
UNUSED = {"ce": ("fresh_draws", "divergence", "features"), "kd": ("features",), "online_kd": ("fresh_draws",)}


class Parameters(parameters.TrainingParameters):
    """``04_student``."""

    # Runs that are named count by their ids.
    UNREAD: ClassVar = parameters.TrainingParameters.UNREAD | {"teacher", "targets", "fresh_draws", "start"}
    ABSENT: ClassVar = parameters.TrainingParameters.ABSENT | {
        "beside": None,
        "data_seed": None,
        "divergence": "forward_kl",
        "features": None,
        "initialisation": "random",
        "noise": 0.0,
        "stages": [],
        "text": "corpus",
    }

    objective: Literal["ce", "kd", "online_kd"] = Field(
        description="ce: the text alone; kd: cached targets; online_kd: the teacher in the loop, its whole distribution"
    )
    kd_weight: scheduled(parameters.Share) = Field(
        description="weight of the KD term, constant or on a schedule; cross-entropy has 1 - kd_weight"
    )
    temperature: scheduled(Annotated[float, Field(gt=0, le=100)]) = Field(
        description="softens teacher and student in the KD term, which is scaled by its square; on a schedule with "
        "objective=online_kd"
    )
    divergence: Divergence = Field(
        "forward_kl",
        description="of the KD term, from the teacher's distribution to the student's: a name, or {name: {option: value}}",
    )
    teacher: Ref = Field(
        description="the run to learn from: a teacher of the profile, {student: {…}}, {ensemble: {…}}, a run id, a folder, or a "
        "list of them"
    )
    targets: parameters.Settings = Field(
        {}, description="what sets its targets apart from the profile's targets section (objective=kd)"
    )
    fresh_draws: bool = Field(
        False,
        description="draw the targets anew for this student, with its seed, from dense ones (targets={source: dense}): the "
        "members of an ensemble then see different draws, and the teacher runs once",
    )
    features: Features | None = Field(
        None, description="{of: relation, layers: last, …}: a loss on hidden states or attention (objective=online_kd)"
    )
    architecture: Literal["llama", "gpt2", "qwen3"] = Field(description="transformers architecture of the student")
    layers: PositiveInt = Field(description="depth")
    hidden_size: PositiveInt = Field(description="width")
    heads: PositiveInt = Field(description="attention heads")
    initialisation: Literal["random", "embeddings", "every_nth", "identical"] = Field(
        "random", description="weights taken from the teacher: none, its embeddings, every n-th layer, all"
    )
    noise: float = Field(
        0.0, ge=0, le=10, description="parameter noise at the start, in standard deviations of each matrix"
    )
    start: Ref | None = Field(None, description="the run whose weights it begins with, in place of new ones; of the same shape")
    data_seed: parameters.Seed | None = Field(None, description="order of the training rows; None: the seed")
    learning_rate_multipliers: parameters.Multipliers = Field(
        description="regular expression on parameter names: multiplier of the learning rate; 0 freezes; first match wins"
    )
    stages: list[Stage] = Field(
        [], description="parts of the training with learning-rate multipliers and an optimiser of their own"
    )
    text: Text = Field(
        "corpus",
        description="trained on: corpus, uniform or unigram (random tokens), {bagged: {…}}, {selected: {…}}, {clustered: {…}}, {generated: "
        "{…}}",
    )

    beside: Beside | None = Field(
        None, description="{runs: […], pool: logit}: models that are pooled with the student in its loss, and stay as they are"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self):
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size must be an even multiple of heads ({self.heads}), got {self.hidden_size}")
        return self

    @model_validator(mode="after")
    def _multipliers_can_be_applied(self):
        parts = (self.learning_rate_multipliers, *(stage.learning_rate_multipliers for stage in self.stages))
        for pattern in (pattern for multipliers in parts for pattern in multipliers):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"learning_rate_multipliers must be named by regular expressions, got {pattern!r} ({error}); put a backslash "
                    "before a character that stands for itself"
                ) from None
        return self

    @model_validator(mode="after")
    def _schedules_are_in_range(self):
        require_between("kd_weight", self.kd_weight, 0, 1)
        require_between("temperature", self.temperature, 1e-6, 100)
        return self

    @model_validator(mode="after")
    def _weights_come_from_one_place(self):
        if self.start is not None and self.initialisation != "random":
            raise ValueError(f"initialisation must be random with start, whose weights it would replace, got {self.initialisation}")
        return self

    @model_validator(mode="after")
    def _signal_serves_the_terms(self):
        """Features and a moving temperature need the teacher itself, a divergence needs any teacher."""
        needs_loop = {"features": self.features is not None, "a temperature schedule": isinstance(self.temperature, Schedule)}
        for name, asked in needs_loop.items():
            if asked and self.objective != "online_kd":
                raise ValueError(f"objective must be online_kd for {name}, got {self.objective}")
        if self.fresh_draws and self.objective != "kd":
            raise ValueError(f"objective must be kd for fresh_draws, got {self.objective}")
        if self.objective == "ce" and self.divergence != "forward_kl":
            raise ValueError(f"objective must be kd or online_kd for a divergence, got ce with {self.divergence}")
        return self

    @model_validator(mode="after")
    def _text_serves_the_objective(self):
        way = text.way(self.text)
        if self.objective == "kd" and not way.CACHED:
            raise ValueError(f"objective must be ce or online_kd for text made in the run, got kd with text {self.text}")
        if getattr(way, "mode", None) == "weighted" and (self.features or as_pair(self.divergence)[0] in GROUPED):
            raise ValueError(
                f"text must not be weighted with features or the divergences {', '.join(GROUPED)}, whose tokens have no loss of "
                "their own; choose another"
            )
        return self

    @model_validator(mode="after")
    def _a_pool_has_a_loss_of_its_own(self):
        if self.beside is not None and (self.features or self.divergence != "forward_kl"):
            found = "features" if self.features else self.divergence
            raise ValueError(f"beside must stand without features and with divergence forward_kl, got {found}")
        return self

    @model_validator(mode="after")
    def _stages_stand_alone(self):
        if not self.stages:
            return self
        if self.learning_rate_multipliers:
            raise ValueError("learning_rate_multipliers must be empty with stages, which have their own")
        if any(isinstance(one, Schedule) for one in (self.kd_weight, self.temperature, self.weight_decay)):
            raise ValueError("kd_weight, temperature and weight_decay must be constant with stages; a schedule would begin anew in each")
        stage_ends(self.stages, 10**9)  # whether their shares add up
        return self

    @model_validator(mode="after")
    def _layers_can_be_replaced(self):
        relation = self.features is not None and self.features.of == "relation"
        if self.low_precision == "optimizer_and_backward" and (self.architecture == "gpt2" or relation):
            raise ValueError(
                "low_precision must be optimizer or none with gpt2, which has no nn.Linear layers, and with features of "
                f"relation, which read them; got {self.low_precision}"
            )
        return self

    @property
    def order_seed(self) -> int:
        """What the order of the training rows is drawn with."""
        return self.seed if self.data_seed is None else self.data_seed

    def unread(self) -> set[str]:
        """Cross-entropy reads neither weight nor temperature."""
        return {"kd_weight", "temperature", "divergence"} if self.objective == "ce" else set()

    @classmethod
    def usable(cls, section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """Where another objective is asked for, what the section sets for its own and this one refuses is left out."""
        unused = UNUSED.get(changes.get("objective"), ())
        kept = {name: value for name, value in section.items() if name not in unused}
        if "features" in unused and isinstance(kept["temperature"], dict):
            kept["temperature"] = kept["temperature"]["end"]
        return kept

    def identity(self) -> dict[str, Any]:
        """The order of multipliers counts, since the first match wins; features as they are read; no data seed that is the seed."""
        values = super().identity()
        if self.order_seed == self.seed:
            values.pop("data_seed", None)
        for part in (values, *values.get("stages", [])):
            # An id does not see the order in which a mapping names things; that of a list it does.
            if multipliers := part["learning_rate_multipliers"]:
                part["learning_rate_multipliers"] = [list(pair) for pair in multipliers.items()]
        if "text" in values:
            values["text"] = text.identity(self.text)
        if self.beside is not None:
            values["beside"] = self.beside.identity()
        if self.features and self.features.of != "relation":
            values["features"].pop("relations")
        return values

    def targets_step(self, plan: Planner) -> Step:
        """The targets that a student with these settings reads.

        Raises:
            KdlibError: they cannot serve its temperature or its divergence.
        """
        # Sparse targets serve the temperature they were written at, and no other. A moving one reads no more than their scores.
        moving = isinstance(self.temperature, Schedule)
        wanted = {"teacher": self.teacher} | ({} if moving else {"temperature": self.temperature}) | self.targets
        step = plan.targets(**wanted | ({"seed": self.seed} if self.fresh_draws else {}))
        kept = step.parameters
        if self.fresh_draws and (kept.source != "dense" or kept.kind not in ("sampled", "topk_sampled")):
            raise KdlibError(
                f"targets of fresh_draws must have source dense and kind sampled or topk_sampled, got {kept.source} and {kept.kind}."
            )
        if not moving and kept.kind != "dense" and kept.temperature != self.temperature:
            raise KdlibError(
                f"temperature of targets must be the student's ({self.temperature}), got {kept.temperature}. Leave it out, or use "
                "kind dense, which serves any."
            )
        if self.objective == "kd":
            refuse_unserved(self.divergence, kept.kind)
        return step


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """The corpus, what it begins with, the teacher or its targets, what it is pooled with, and what its text is chosen by."""
    found = {"corpus": plan.corpus()}
    if values.start is not None:
        found["start"] = _start(values, plan)
    if values.objective == "online_kd" or values.initialisation != "random":
        found["teacher"] = _teacher(values, plan)
    if values.objective == "kd":
        found["targets"] = values.targets_step(plan)
    if values.beside is not None:
        found |= values.beside.inputs(plan)
    return found | text.way(values.text).inputs(values, plan)


def _teacher(values: Parameters, plan: Planner) -> Step:
    found = plan.resolve(values.teacher)
    reads_layers = values.features is not None or values.initialisation != "random"
    if reads_layers and found.kind == "ensemble":
        raise KdlibError(f"teacher must be one model for features and initialisation, got {found.label}. Name one of its members.")
    return found


def _start(values: Parameters, plan: Planner) -> Step:
    found = plan.resolve(values.start)
    if found.kind == "ensemble":
        raise KdlibError(f"start must be one model, got {found.label}. Name one of its members.")
    # What another kind of run leaves is compared when it is read.
    if found.kind == "student" and (wanted := _shape(values)) != (there := _shape(found.parameters)):
        raise KdlibError(f"start must have the student's shape, {wanted}, got {there}. Name a run of the same shape.")
    return found


def _shape(values: Parameters) -> str:
    return f"{values.architecture} of {values.layers} x {values.hidden_size}, {values.heads} heads"


def downloads(values: Parameters) -> dict[str, str]:
    """Nothing."""
    return {}


def label(values: Parameters) -> str:
    """Objective and seeds."""
    order = f", data seed {values.order_seed}" if values.order_seed != values.seed else ""
    return f"student {values.objective if values.epochs else 'untrained'} seed {values.seed}{order}"


def produce(step: Step, inputs: dict[str, Run], folder: Path) -> dict:
    """Build, train, evaluate and save the student."""
    from kdlib import models
    from kdlib.runs import artefacts
    from kdlib.training import train_model

    values, corpus = step.parameters, inputs["corpus"]
    data, given, generation = begun(values, inputs, folder)
    training, model = train_model(**given, stages=values.stages), given["model"]
    work = training.pop("work")
    if values.objective == "online_kd":
        training["teacher_flops"] = work["teacher_forward"]["flops"]
    metrics = artefacts.evaluate_into(folder, model, data, given["block_length"], values.precision)
    metrics |= {"training": training, "parameters": models.parameters_by_component(model)}
    metrics["work"] = total(work, generation, metrics["work"])
    artefacts.save_model(model, artefacts.load_tokenizer(corpus), folder, step, corpus, metrics)
    return metrics


def begun(values: Parameters, inputs: dict[str, Run], folder: Path) -> tuple[dict, dict, dict]:
    """The splits of the corpus, what the student's training is given, by name, and the work of writing its text."""
    from kdlib.runs import artefacts, ingredients

    corpus = inputs["corpus"]
    tokenizer, block_length = artefacts.load_tokenizer(corpus), artefacts.block_length(corpus)
    data, teacher = artefacts.splits(corpus), ingredients.load_teacher(inputs)
    model = ingredients.initial(values, inputs, tokenizer, block_length, teacher)
    coupling = ingredients.beside(values, inputs)
    chosen, generation = ingredients.chosen_text(values, inputs, data["train"], tokenizer, block_length)
    given = {
        "model": model,
        "values": values,
        "text": chosen,
        "validation": data["validation"],
        "block_length": block_length,
        "folder": folder,
        "objective": ingredients.objective_of(values, inputs, data["train"], model, teacher, coupling),
        "multipliers": values.learning_rate_multipliers,
    }
    return data, given, generation
