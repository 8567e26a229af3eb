"""Bootstrap samples of documents: each member of a bagged ensemble sees another mixture of the same text."""

import numpy as np
from pydantic import Field

from kdlib.data.corpus import Split
from kdlib.data.text import Given, TrainingText, Way, up_to


class Bagged(Way):
    """Documents drawn with replacement (Breiman 1996, "Bagging predictors")."""

    share: float = Field(gt=0, le=1, description="tokens drawn, as a share of the train split's")
    seed: int | None = Field(None, ge=0, description="of the draw; None: the student's")

    def take(self, given: Given) -> TrainingText:
        """The drawn documents, some of them repeatedly."""
        seed = given.seed if self.seed is None else self.seed
        return TrainingText(given.train, draw(given.train, self.share, seed))


def draw(split: Split, share: float, seed: int) -> list[str]:
    """Documents drawn with replacement within each domain, whose mix is thereby kept.

    Of each domain, documents are drawn uniformly until their tokens come nearest to ``share`` of the domain's.

    Returns:
        Ids, a document drawn twice twice.
    """
    rng, drawn = np.random.default_rng(seed), []
    for _, table in split.documents.groupby("domain", sort=True):
        tokens = table.tokens.to_numpy()
        wanted = share * tokens.sum()
        first = rng.integers(len(table), size=1)
        order = up_to(wanted, tokens, first, lambda table=table: rng.integers(len(table), size=len(table)))
        drawn += table.document.to_numpy()[order].tolist()
    return drawn
