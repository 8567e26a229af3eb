"""Corpus: text to splits, a vocabulary and packed tokens."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from kdlib.data import catalogue
from kdlib.study import parameters
from kdlib.study.plan import Planner, Step
from kdlib.study.store import Run

NOTEBOOK, LEAVES = "01_corpus", "data"
HELD_OUT = ("validation", "calibration", "test", "ood")


class Parameters(parameters.Parameters):
    """``01_corpus``."""

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
            raise ValueError(f"ood must be a domain that is not trained on, got {self.ood!r}; take it out of domains")
        return self


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """None: everything else reads the corpus."""
    return {}


def downloads(values: Parameters) -> dict[str, str]:
    """The carriers of its text and of the tokenizer."""
    names = [*values.domains, values.ood, *([values.tokenizer] if values.tokenizer != "train" else [])]
    return catalogue.identities(names, values.profile)


def label(values: Parameters) -> str:
    """One word: a profile has one corpus."""
    return "corpus"


def produce(step: Step, inputs: dict[str, Run], folder: Path) -> dict:
    """Read, split, tokenise and pack the text; the data card is the metrics."""
    import numpy as np

    from kdlib import models
    from kdlib.data import corpus, documents, vocabulary

    values = step.parameters
    teacher = None
    if values.tokenizer != "train":
        teacher = models.load_tokenizer(catalogue.model_path(values.tokenizer, values.profile))
    table, report = documents.read_documents(
        list(values.domains), values.ood, teacher, catalogue=catalogue.known(values.profile)
    )
    # Only text that will be trained on may choose the vocabulary.
    texts = _training_texts(table, values)
    if teacher is None:
        tokenizer, kept = vocabulary.train(texts, values.vocabulary_size), None
    else:
        tokenizer, kept = vocabulary.prune(teacher, texts, values.vocabulary_size)
    card = corpus.build(
        folder / "data",
        table,
        report,
        tokenizer,
        budgets={"train": values.train_tokens} | dict.fromkeys(HELD_OUT, values.heldout_tokens),
        shares=values.domains,
        block_length=values.block_length,
    )
    tokenizer.save_pretrained(folder / "data" / "tokenizer")
    if kept is not None:
        np.save(folder / "data" / "kept_tokens.npy", kept)
    size = {"size": len(tokenizer), "teacher_size": None if teacher is None else len(teacher)}
    return {"card": card, "vocabulary": size}


def _training_texts(table, values: Parameters) -> list[str]:
    # About as much text as the train split will hold, in its order: four bytes a token, shared as the domains are.
    total = sum(values.domains.values())
    texts = []
    for domain, share in values.domains.items():
        rows = table[(table.split == "train") & (table.domain == domain)]
        texts += rows.text[rows.bytes.cumsum() <= 4 * values.train_tokens * share / total].tolist()
    return texts
