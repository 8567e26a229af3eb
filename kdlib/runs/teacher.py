"""Teacher: a frozen, LoRA-adapted, fully fine-tuned or scratch-trained model on the corpus's vocabulary."""

from pathlib import Path

from pydantic import Field, PositiveInt

from kdlib.data import catalogue
from kdlib.errors import KdlibError
from kdlib.study import parameters
from kdlib.study.plan import Planner, Step
from kdlib.study.store import Run
from kdlib.study.work import Entry, total

NOTEBOOK, LEAVES = "02_teacher", "model"
SIZES = {"layers", "hidden_size", "heads"}
READS = {
    "frozen": {"source", "adaptation", "precision"},
    "lora": set(parameters.TrainingParameters.model_fields) | {"source", "adaptation", "tokens", "lora_rank"},
    "full": set(parameters.TrainingParameters.model_fields) | {"source", "adaptation", "tokens"},
    "scratch": set(parameters.TrainingParameters.model_fields) | {"adaptation", "tokens", *SIZES},
}


class Parameters(parameters.TrainingParameters):
    """``02_teacher``."""

    source: str = Field(
        description="carrier, path to a .gguf or folder, or hub id[@revision]; ignored by adaptation=scratch"
    )
    adaptation: parameters.Adaptation = Field(
        description="frozen: as downloaded; lora, full: tuned on train; scratch: trained from random"
    )
    tokens: PositiveInt = Field(
        description="tokens of the train split that adaptation sees in an epoch, from its beginning"
    )
    lora_rank: PositiveInt = Field(description="rank of the LoRA update (alpha is twice the rank)")
    layers: PositiveInt = Field(description="depth of a scratch teacher")
    hidden_size: PositiveInt = Field(description="width of a scratch teacher")
    heads: PositiveInt = Field(description="attention heads of a scratch teacher")

    def unread(self) -> set[str]:
        """What the chosen adaptation does not read."""
        return set(type(self).model_fields) - READS[self.adaptation]

    @property
    def carrier(self) -> str:
        """What settings call the source: a checkpoint counts by its content, among the downloads, wherever it lies."""
        on_disk = self.source not in catalogue.known(self.profile) and Path(self.source).expanduser().exists()
        return "checkpoint" if on_disk else self.source

    def identity(self) -> dict:
        """Without the path of a checkpoint."""
        values = super().identity()
        return values | {"source": self.carrier} if "source" in values else values


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """The corpus."""
    return {"corpus": plan.corpus()}


def downloads(values: Parameters) -> dict[str, str]:
    """The carrier of its weights."""
    if values.adaptation == "scratch":
        return {}
    return {values.carrier: catalogue.identities([values.source], values.profile)[values.source]}


def label(values: Parameters) -> str:
    """Its adaptation."""
    return f"teacher {values.adaptation}"


def produce(step: Step, inputs: dict[str, Run], folder: Path) -> dict:
    """Load or build, adapt, evaluate and save the teacher."""
    from kdlib import models
    from kdlib.data.text import TrainingText
    from kdlib.runs import artefacts
    from kdlib.training import train_model

    values, tokenizer = step.parameters, artefacts.load_tokenizer(inputs["corpus"])
    data, block_length = artefacts.splits(inputs["corpus"]), artefacts.block_length(inputs["corpus"])
    metrics, training, works = {}, None, []
    if values.adaptation == "scratch":
        shape = models.Shape(layers=values.layers, hidden_size=values.hidden_size, heads=values.heads)
        model = models.build(shape, tokenizer, block_length, values.seed).to(artefacts.device())
    else:
        model, metrics = _pretrained(values, inputs["corpus"], tokenizer)
        works.append(metrics.pop("work", {}))
    if values.adaptation != "frozen":
        if values.adaptation == "lora":
            model = models.lora(model, values.lora_rank, 2 * values.lora_rank, 0.0, values.seed)
        text = TrainingText(data["train"])
        training = train_model(model, values, text, data["validation"], block_length, folder, tokens=values.tokens)
        works.append(training.pop("work"))
        model = models.merge(model) if values.adaptation == "lora" else model
    metrics |= artefacts.evaluate_into(folder, model, data, block_length, values.precision)
    metrics |= {"training": training, "parameters": models.parameters_by_component(model)}
    metrics["work"] = total(*works, metrics["work"])
    artefacts.save_model(model, tokenizer, folder, step, inputs["corpus"], metrics)
    return metrics


def _pretrained(values: Parameters, text: Run, tokenizer) -> tuple:
    """The downloaded model on the corpus's vocabulary, and for a frozen one what that cost on test text."""
    import numpy as np

    from kdlib import models
    from kdlib.data import vocabulary
    from kdlib.runs import artefacts

    path = catalogue.model_path(values.source, values.profile)
    model, own = models.load_teacher(path).to(artefacts.device()), models.load_tokenizer(path)
    if vocabulary.fingerprint(own) == vocabulary.fingerprint(tokenizer):
        return model, {}
    kept = text.path / "data" / "kept_tokens.npy"
    if not kept.is_file():
        raise KdlibError(
            f"The teacher's vocabulary must be the corpus's, which was trained on it, got that of {values.source}. Use "
            "adaptation=scratch."
        )
    metrics = {}
    if values.adaptation == "frozen":
        unpruned, measured = _unpruned(model, own, values.precision, text)
        metrics = {"unpruned": {"test": unpruned}, "work": {"evaluation": measured}}
    return vocabulary.slice_model(model, np.load(kept)), metrics


def _unpruned(model, tokenizer, precision: str, text: Run) -> tuple[dict, Entry]:
    """The teacher with its whole vocabulary on the test documents, as a reference for what pruning costs, and the work."""
    import pandas as pd

    from kdlib import models
    from kdlib.data import corpus
    from kdlib.evaluation.metrics import evaluate
    from kdlib.runs import artefacts

    table = pd.read_parquet(text.path / "data" / "documents.parquet")
    split = corpus.tokenise("test", table[table.split == "test"], tokenizer)
    autocast = models.precision(precision)
    found = evaluate(model, {"test": split}, artefacts.block_length(text), temperature=1.0, autocast=autocast)
    shown = {key: found.metrics["evaluation"]["test"][key] for key in ("bits_per_byte", "nll", "tokens", "bytes")}
    return shown, found.work
