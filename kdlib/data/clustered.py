"""Text of one cluster of documents, with some of the others: what a specialist reads."""

from typing import ClassVar

import numpy as np
import pandas as pd
from pydantic import Field

from kdlib.data.text import Given, TrainingText, Way, up_to
from kdlib.errors import KdlibError
from kdlib.study.refs import Ref


class Clustered(Way):
    """As many tokens as the train split has, most of them from one cluster, repeatedly where that holds fewer."""

    UNREAD: ClassVar = frozenset({"by"})

    by: Ref = Field({"clusters": {}}, description="the run that clusters the documents, see :mod:`kdlib.runs.clusters`")
    cluster: int = Field(ge=0, description="whose text it is, counted from 0")
    own: float = Field(0.8, gt=0, le=1, description="share of the tokens that come from this cluster; the rest come from all others")
    seed: int | None = Field(None, ge=0, description="of the draw; None: the student's")

    def inputs(self, student, plan) -> dict:
        """The clusters."""
        found = plan.resolve(self.by, ("clusters",))
        if self.cluster >= (held := found.parameters.clusters):
            raise KdlibError(f"`cluster` must be 0 to {held - 1}, one of {held} clusters, got {self.cluster}.")
        return {"clusters": found}

    def take(self, given: Given) -> TrainingText:
        """The drawn documents, some of them repeatedly."""
        table = given.train.documents
        kept = pd.read_parquet(given.runs["clusters"].path / "clusters" / "documents.parquet").set_index("document").cluster
        own = kept[table.document].to_numpy() == self.cluster
        rng = np.random.default_rng(given.seed if self.seed is None else self.seed)
        shares = ((table[own], self.own), (table[~own], 1 - self.own))
        total = int(table.tokens.sum())
        return TrainingText(given.train, [name for part, share in shares if share for name in draw(part, share * total, rng)])


def draw(table: pd.DataFrame, wanted: float, rng: np.random.Generator) -> list[str]:
    """Documents in random order, all of them before any again, until their tokens come nearest to ``wanted``.

    Returns:
        Ids, at least one; a document drawn twice twice.
    """
    first = rng.permutation(len(table))
    order = up_to(wanted, table.tokens.to_numpy(), first, lambda: rng.permutation(len(table)))
    return table.document.to_numpy()[order].tolist()
