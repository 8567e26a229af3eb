"""Text without data: documents of random tokens, as a train split like any other."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pandas as pd

from kdlib.data.corpus import MIN_BLOCK_LENGTH, Split, separator_id
from kdlib.data.text import Given, TrainingText, Way
from kdlib.errors import KdlibError


class Uniform(Way):
    """As many random tokens as the train split has, all of the vocabulary equally likely."""

    CACHED: ClassVar = False

    def take(self, given: Given) -> TrainingText:
        """Documents of at most a row each."""
        tokens = int(given.train.documents.tokens.sum())
        return TrainingText(uniform(given.tokenizer, tokens, given.block_length, given.seed))


class Unigram(Way):
    """As many random tokens as the train split has, each as frequent as there."""

    CACHED: ClassVar = False

    def take(self, given: Given) -> TrainingText:
        """Documents of at most a row each."""
        tokens = int(given.train.documents.tokens.sum())
        return TrainingText(unigram(given.train, given.tokenizer, tokens, given.block_length, given.seed))


def uniform(tokenizer, tokens: int, length: int, seed: int) -> Split:
    """Documents of independent tokens, each token of the vocabulary but the separator equally likely.

    Args:
        tokens: predicting positions in all, reached exactly.
        length: most predicting positions of a document; the documents' lengths differ by one at most.

    Raises:
        KdlibError: fewer than 2 tokens, or a length below 8.
    """
    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1)
    counts[list(tokenizer.get_vocab().values())] = 1
    return _independent("uniform", counts, tokenizer, tokens, length, seed)


def unigram(split: Split, tokenizer, tokens: int, length: int, seed: int) -> Split:
    """Documents of independent tokens, as frequent as in ``split``; otherwise as :func:`uniform`."""
    size = max(tokenizer.get_vocab().values()) + 1
    return _independent("unigram", np.bincount(split.tokens, minlength=size), tokenizer, tokens, length, seed)


def _independent(
    how: str, counts: np.ndarray, tokenizer, tokens: int, length: int, seed: int
) -> Split:
    check_size(tokens, length)
    counts = counts.astype(np.float64)
    counts[separator_id(tokenizer)] = 0
    documents = -(-tokens // length)
    sizes = np.full(documents, tokens // documents)
    sizes[: tokens % documents] += 1
    # A document's last predicting position predicts the separator.
    drawn = np.random.default_rng(seed).choice(len(counts), tokens - documents, p=counts / counts.sum())
    return as_split(how, np.split(drawn, np.cumsum(sizes - 1)[:-1]), tokenizer)


def as_split(how: str, documents: Sequence[np.ndarray], tokenizer) -> Split:
    """Documents of token ids as a train split; ``how`` they were made is their domain."""
    separator = separator_id(tokenizer)
    streams = [np.array([separator, *ids, separator], dtype=np.int32) for ids in documents]
    sources = [f"synthetic-{how}/{number}" for number in range(len(documents))]
    table = pd.DataFrame(
        {
            "document": [f"{source}#00" for source in sources],
            "source": sources,
            "domain": f"synthetic-{how}",
            "bytes": [len(tokenizer.decode(ids.tolist()).encode()) for ids in documents],
            "tokens": [len(stream) - 1 for stream in streams],
        }
    )
    offsets = np.cumsum([0, *map(len, streams)], dtype=np.int64)
    return Split("train", table, np.concatenate(streams), offsets, separator)


def check_size(tokens: int, length: int) -> None:
    """Refuse too few tokens, or documents too short, to train on."""
    if tokens < 2 or length < MIN_BLOCK_LENGTH:
        raise KdlibError(
            f"`tokens` must be at least 2 and `length` at least {MIN_BLOCK_LENGTH}, got {tokens} and {length}."
        )
