"""Targets: a teacher's distributions on the train split, on disk."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from kdlib.data import catalogue
from kdlib.errors import KdlibError
from kdlib.study import parameters
from kdlib.study.plan import Planner, Step
from kdlib.study.refs import Ref
from kdlib.study.store import Run
from kdlib.study.work import entry

NOTEBOOK, LEAVES = "03_targets", "targets"
# The pattern comes first: it is of what was given.
Source = Annotated[
    str, Field(pattern=r"^(teacher|dense|https?://[^#\s]+#\S+|.+\.h5)$"), AfterValidator(parameters.whole_path)
]


class Parameters(parameters.Parameters):
    """``03_targets``."""

    UNREAD: ClassVar = parameters.Parameters.UNREAD | {"teacher"}
    ABSENT: ClassVar = {"source": "teacher", "proposal": 1.0, "stratified": False}

    teacher: Ref = Field(description="the run that writes: a teacher of the profile, a student, an ensemble, a list of them")
    kind: Literal["sampled", "topk", "topk_sampled", "dense"] = Field(
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
    seed: parameters.Seed = Field(description="of the draws")
    precision: parameters.Precision = Field(description="autocast of the teacher's forward pass")

    @model_validator(mode="after")
    def _dense_is_the_source(self):
        if self.kind == self.source == "dense":
            raise ValueError("dense targets are written by the teacher; leave out source")
        if self.external and (self.kind != "topk" or self.temperature != 1):
            raise ValueError(
                f"targets of a server or file must have kind topk and temperature 1, got {self.kind} and {self.temperature}"
            )
        return self

    @property
    def external(self) -> bool:
        """Whether the targets come from a server or a file, and not from a run."""
        return self.source not in ("teacher", "dense")

    def unread(self) -> set[str]:
        """The other kinds' sizes, and the seed where nothing is drawn."""
        unread = {
            "sampled": {"top_k"},
            "topk": {"draws", "proposal", "stratified", "seed"},
            "topk_sampled": set(),
            "dense": {"draws", "top_k", "proposal", "stratified", "seed", "temperature"},
        }[self.kind]
        return unread | ({"precision"} if self.external else set())

    def identity(self) -> dict:
        """Where a server or a file is does not matter; a file counts by its hash, among the downloads."""
        values = super().identity()
        if self.external:
            values["source"] = f"server's {self.source.split('#', 1)[1]}" if "#" in self.source else "file"
        return values


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """The corpus, and whoever is asked."""
    found = {"corpus": plan.corpus()}
    if values.external:
        return found
    found["teacher"] = plan.resolve(values.teacher)
    if values.kind == "dense" and found["teacher"].kind == "ensemble":
        raise KdlibError(
            f"kind of an ensemble's targets must not be dense, which keeps one output layer, got {found['teacher'].label}. Use "
            "kind sampled, topk or topk_sampled."
        )
    if values.source == "dense":
        whole = {"kind": "dense", "source": "teacher", "precision": values.precision}
        found["dense"] = plan.targets(teacher=values.teacher, **whole)
    return found


def downloads(values: Parameters) -> dict[str, str]:
    """The file, if they come from one."""
    if not values.source.endswith(".h5"):
        return {}
    # By another name than its path, which does not matter.
    return {"targets": catalogue.identities([values.source], values.profile)[values.source]}


def label(values: Parameters) -> str:
    """How they are kept, or where they come from."""
    return f"targets from {values.source}" if values.external else f"targets {values.kind}"


def produce(step: Step, inputs: dict[str, Run], folder: Path) -> dict:
    """One pass of the teacher over the train split."""
    from kdlib import models
    from kdlib.cache import Kind, ModelTeacher, write_targets
    from kdlib.data import corpus
    from kdlib.runs import artefacts

    values, text = step.parameters, inputs["corpus"]
    split, block_length = corpus.load_split(text.path / "data", "train"), artefacts.block_length(text)
    teacher = _teacher(values, inputs, split)
    metrics = write_targets(
        folder / "targets",
        teacher,
        split,
        artefacts.target_guard(text, split, artefacts.whose(step.settings)),
        Kind(values.kind, values.draws, values.top_k, values.proposal, values.stratified),
        1.0 if values.kind == "dense" else values.temperature,
        values.seed,
        block_length,
    )
    # A writer that was killed after its last shard has timed none.
    seconds = metrics["tokens"] / metrics["tokens_per_second"] if metrics["tokens_per_second"] else None
    taken = _pass_of(teacher).forward(*models.extent(split.windows(block_length)[:, 1]))
    ran = isinstance(teacher, ModelTeacher)
    return metrics | {"flops": taken if ran else 0, "work": {"teacher_forward": entry(taken, seconds)}}


def _pass_of(teacher):
    """Of a model, or of what is left to do with dense targets; what a server or a file's writer computed is not known."""
    from kdlib import models
    from kdlib.cache import DenseTeacher, ModelTeacher
    from kdlib.training.work import output_layer

    if isinstance(teacher, ModelTeacher):
        return models.operations(teacher.model)
    return output_layer(teacher.head[0]) if isinstance(teacher, DenseTeacher) else models.Operations()


def _teacher(values: Parameters, inputs: dict[str, Run], split):
    """Whoever is asked: the model of a run, its dense targets, a server or a file."""
    from kdlib import models
    from kdlib.cache import DenseTeacher, FileTeacher, ModelTeacher
    from kdlib.runs import artefacts

    tokenizer = artefacts.load_tokenizer(inputs["corpus"])
    if values.source == "dense":
        cache = artefacts.open_targets(inputs["dense"], inputs["corpus"], split, 1.0)
        return DenseTeacher(cache, artefacts.device())
    if values.source == "teacher":
        artefacts.require_same_vocabulary(inputs["teacher"], inputs["corpus"])
        model = artefacts.load_model(inputs["teacher"])
        rows = 8 if model.device.type == "cpu" else 64
        return ModelTeacher(model, models.precision(values.precision), rows)
    if values.source.endswith(".h5"):
        return FileTeacher(Path(values.source), split, len(tokenizer))
    return _server(*values.source.split("#", 1), values.top_k, tokenizer)


def _server(url: str, model: str, top_k: int, tokenizer):
    from kdlib.cache import ServerTeacher
    from kdlib.cache.server import CompletionServer

    server = CompletionServer(url, model, top_k, tokenizer)
    server.require_model()
    try:
        server.check()
    except KdlibError:
        # llama.cpp's server answers for one position at a time; an error of that way is the one to tell.
        server = CompletionServer(url, model, top_k, tokenizer, per_position=True)
        server.check()
    return ServerTeacher(server)
