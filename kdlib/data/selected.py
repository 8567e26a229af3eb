"""Which documents to distil on: by a score such as teacher entropy, student loss or their divergence, at equal tokens.

The functions take a table with a row for each document: ``document`` (id), ``tokens`` (predicting positions) and
``score`` (any finite number, usually nats *a token*: sums would choose long documents), and ``domain`` where they choose
by it. Windows, or any other unit with an id, do as well. Results depend on the set of rows alone, not on their order.
"""

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from kdlib.data.corpus import Split
from kdlib.data.text import Given, TrainingText, Way
from kdlib.errors import KdlibError
from kdlib.study.refs import Ref

MODES = ("highest", "lowest", "middle", "random")


class Selected(Way):
    """Part of the training text, or all of it weighted, by scores of its documents or at random."""

    UNREAD: ClassVar = frozenset({"by", "measure"})

    by: Ref | None = Field(
        None, description="the run that scores, see :class:`kdlib.runs.scores`; None: the student's own targets"
    )
    measure: Literal["nll", "entropy", "kl"] | None = Field(
        None,
        description="of the scorer, mean over a document's tokens; kl: from the student's targets to it (not mode=random)",
    )
    mode: Literal["highest", "lowest", "middle", "random", "weighted"] = Field(
        description="which documents of that order come first; weighted: all are kept, and the loss of a token has the weight "
        "of its document, proportional to exp(score / temperature), with mean 1"
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
        needs = {"measure": self.mode != "random", "share": self.mode != "weighted", "temperature": self.mode == "weighted"}
        for name, needed in needs.items():
            found = getattr(self, name)
            if needed != (found is not None):
                raise ValueError(f"{name} must be {'given' if needed else 'left out'} with mode={self.mode}, got {found}")
        if self.by is not None and self.mode == "random":
            raise ValueError("by must be left out with mode=random, which reads no scores")
        if self.measure == "kl" and self.by is None:
            raise ValueError("by must name a model with measure=kl, which compares it with the student's targets")
        if self.domains and self.mode == "weighted":
            raise ValueError("domains must be left out with mode=weighted, which keeps all documents")
        return self

    def inputs(self, student, plan) -> dict:
        """The scores, unless the choice is random."""
        if self.domains:
            _refuse_unknown(self.domains, plan.corpus().parameters.domains)
        if self.mode == "random":
            return {}
        scorer = student.targets_step(plan) if self.by is None else self.by
        against = {"targets": student.targets_step(plan)} if self.measure == "kl" else {}
        return {"scores": plan.scores(scorer=scorer, measure=self.measure, **against)}

    def take(self, given: Given) -> TrainingText:
        """The chosen documents, or all of them with weights."""
        train, table = given.train, given.train.documents
        if self.mode != "random":
            table = scores(train, np.load(given.runs["scores"].path / "scores" / "scores.npy"))
        if self.mode == "weighted":
            of_documents = weights(table, self.temperature).to_numpy()
            return TrainingText(train, weights=np.repeat(of_documents, np.diff(train.offsets)))
        budget = round(self.share * int(train.documents.tokens.sum()))
        if self.domains:
            budget = mix(train.documents, budget, self.domains)
        return TrainingText(train, choose(table, budget, self.mode, given.seed))


def _refuse_unknown(asked, known) -> None:
    if unknown := sorted(set(asked) - set(known)):
        raise KdlibError(
            f"domains of a selection must be among {', '.join(known)}, got {', '.join(unknown)}. Name those of the corpus."
        )


def scores(split: Split, values: np.ndarray) -> pd.DataFrame:
    """The table of a split's documents, each scored by the mean of ``values`` over its predicting positions.

    Args:
        values: [positions], a number at each of the split's flat positions, such as the teacher's entropy; what stands
            at the last position of a document, which predicts nothing, is not read.

    Raises:
        KdlibError: another number of values than positions.
    """
    if len(values) != len(split.tokens):
        raise KdlibError(
            f"`values` must have one number for each of the {len(split.tokens)} positions of the split {split.name!r}, got "
            f"{len(values)}. Compute them on the same corpus."
        )
    read = np.array(values, dtype=np.float64)
    read[split.offsets[1:] - 1] = 0
    totals = np.add.reduceat(read, split.offsets[:-1])
    return split.documents[["document", "domain", "tokens"]].assign(score=totals / split.documents.tokens)


def mix(table: pd.DataFrame, budget: int, shares: dict[str, float]) -> dict[str, int]:
    """``budget`` tokens divided among domains in proportion to ``shares``: what :func:`choose` takes of each.

    Raises:
        KdlibError: a domain that the table lacks, or holds too little of.
    """
    held = table.groupby("domain").tokens.sum().to_dict()
    parts = {domain: round(budget * share / sum(shares.values())) for domain, share in shares.items()}
    for domain, tokens in parts.items():
        if not 1 <= tokens <= held.get(domain, 0):
            raise KdlibError(
                f"The mix must take 1 to {held.get(domain, 0)} tokens of the domain {domain!r}, got {tokens} (there are "
                f"{', '.join(f'{name} {count}' for name, count in held.items())}). Change `share`, or that of the domain."
            )
    return parts


def choose(table: pd.DataFrame, budget: int | dict[str, int], mode: str, seed: int = 0) -> list[str]:
    """Whole documents with about ``budget`` tokens.

    Documents are ranked, and the first n are taken, n ≥ 1 such that their tokens come nearest to the budget. A budget
    no smaller than a document is thus missed by at most half of the longest, whatever the mode.

    Args:
        budget: tokens; or the tokens of each domain, which are chosen among that domain's documents.
        mode: ``highest`` or ``lowest`` score first; ``middle``: from the median outwards; ``random``: in an order that
            depends on ``seed`` and the ids alone, so that no score is needed. Documents of equal score go by their ids.

    Returns:
        Ids, in the order of the table.

    Raises:
        KdlibError: unknown mode, a table that breaks the rules above, or a budget that its documents cannot fill.
    """
    if mode not in MODES:
        raise KdlibError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
    if isinstance(budget, dict):
        of_domains = (choose(table[table.domain == name], tokens, mode, seed) for name, tokens in budget.items())
        chosen = set().union(*of_domains)
        return [name for name in table.document if name in chosen]
    _check(table, scored=mode != "random")
    if not 1 <= budget <= table.tokens.sum():
        raise KdlibError(
            f"`budget` must be 1 to {table.tokens.sum()} tokens, those of the {len(table)} documents, got {budget}. Lower it, or "
            "score more text."
        )
    order = _order(table, mode, seed)
    missed = np.abs(table.tokens.to_numpy()[order].cumsum() - budget)
    return _ids(table, order[: missed.argmin() + 1])


def weights(table: pd.DataFrame, temperature: float) -> pd.Series:
    """Weight of each document's tokens in a weighted loss, by id: w ∝ exp(score / temperature), mean 1 over tokens.

    As the temperature grows all weights become 1; as it falls to 0 the documents of the highest score take everything.
    A mean of 1 leaves the size of the gradient, and so the learning rate, as it was.

    Args:
        temperature: above 0, in the unit of the score.

    Raises:
        KdlibError: a temperature that is not positive and finite, or a table that breaks the rules above.
    """
    _check(table)
    if not 0 < temperature < math.inf:
        raise KdlibError(f"`temperature` must be above 0 and finite, in the unit of the score, got {temperature}.")
    score = table.score.to_numpy(dtype=np.float64)
    raw = np.exp((score - score.max()) / temperature)
    return pd.Series(raw / np.average(raw, weights=table.tokens), index=pd.Index(table.document), name="weight")


def _order(table: pd.DataFrame, mode: str, seed: int) -> np.ndarray:
    """Row numbers, first choice first."""
    by_id = np.argsort(table.document.to_numpy(dtype=str), kind="stable")
    if mode == "random":
        return np.random.default_rng(seed).permutation(by_id)
    score = table.score.to_numpy(dtype=np.float64)[by_id]
    if mode == "highest":
        return by_id[np.argsort(-score, kind="stable")]
    ascending = by_id[np.argsort(score, kind="stable")]
    if mode == "lowest":
        return ascending
    from_middle = np.abs(2 * np.arange(len(table)) - (len(table) - 1))
    return ascending[np.argsort(from_middle, kind="stable")]


def _ids(table: pd.DataFrame, rows: np.ndarray) -> list[str]:
    return table.document.iloc[np.sort(rows)].tolist()


def _check(table: pd.DataFrame, scored: bool = True) -> None:
    missing = {"document", "tokens", *(["score"] if scored else [])} - set(table.columns)
    if missing:
        problem = f"no columns {sorted(missing)}"
    elif table.empty:
        problem = "an empty table"
    elif table.document.duplicated().any():
        problem = f"{table.document[table.document.duplicated()].iloc[0]!r} more than once"
    elif scored and not np.isfinite(table.score.to_numpy(dtype=np.float64)).all():
        problem = f"a score that is not finite for {table.document[~np.isfinite(table.score)].iloc[0]!r}"
    elif (table.tokens < 1).any():
        problem = f"no tokens for {table.document[table.tokens < 1].iloc[0]!r}"
    else:
        return
    raise KdlibError(
        f"The table must have one row per document with `document`, `tokens` and, unless random, a finite `score`, got {problem}."
    )
