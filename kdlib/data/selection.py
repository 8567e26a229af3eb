"""Which documents to distil on: by a score such as teacher entropy, student loss or their divergence, at equal tokens.

The functions take a table with a row for each document: ``document`` (id), ``tokens`` (predicting positions) and
``score`` (any finite number, usually nats *a token*: sums would choose long documents), and ``domain`` where they choose
by it. Windows, or any other unit with an id, do as well. Results depend on the set of rows alone, not on their order.
"""

import math

import numpy as np
import pandas as pd

from kdlib.data.corpus import Split
from kdlib.errors import KdlibError

MODES = ("highest", "lowest", "middle", "random")


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
            f"Expected a value at each of the {len(split.tokens)} positions of the split {split.name!r}; found "
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
                f"This mix takes {tokens} tokens of the domain {domain!r}, and there are {held.get(domain, 0)} "
                f"({', '.join(f'{name} {count}' for name, count in held.items())}). Expected at least one token, and no "
                "more than there are: change the share of the tokens that is kept, or of the domain."
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
        raise KdlibError(f"Unknown mode {mode!r}. Expected one of {', '.join(MODES)}.")
    if isinstance(budget, dict):
        of_domains = (choose(table[table.domain == name], tokens, mode, seed) for name, tokens in budget.items())
        chosen = set().union(*of_domains)
        return [name for name in table.document if name in chosen]
    _check(table, scored=mode != "random")
    if not 1 <= budget <= table.tokens.sum():
        raise KdlibError(
            f"Cannot choose {budget} tokens from {len(table)} documents with {table.tokens.sum()} tokens. Expected a "
            "budget from 1 to that: lower it, or score more text."
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
        raise KdlibError(f"Expected a temperature above 0, in the unit of the score; found {temperature}.")
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
        problem = f"lacks the columns {sorted(missing)}"
    elif table.empty:
        problem = "is empty"
    elif table.document.duplicated().any():
        problem = f"names {table.document[table.document.duplicated()].iloc[0]!r} more than once"
    elif scored and not np.isfinite(table.score.to_numpy(dtype=np.float64)).all():
        problem = f"has a score that is no finite number, that of {table.document[~np.isfinite(table.score)].iloc[0]!r}"
    elif (table.tokens < 1).any():
        problem = f"has a document without tokens, {table.document[table.tokens < 1].iloc[0]!r}"
    else:
        return
    raise KdlibError(
        f"The table of documents {problem}. Expected a row for each document, with its id (document), its number of "
        "tokens and, unless the choice is random, a finite score."
    )
