"""Text without data: documents of random tokens, or sampled from a teacher, as a train split like any other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdlib.data.corpus import MIN_BLOCK_LENGTH, Split, separator_id
from kdlib.errors import KdlibError
from kdlib.study.progress import bar


def uniform(tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, seed: int) -> Split:
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


def unigram(split: Split, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, seed: int) -> Split:
    """Documents of independent tokens, as frequent as in ``split``; otherwise as :func:`uniform`."""
    size = max(tokenizer.get_vocab().values()) + 1
    return _independent("unigram", np.bincount(split.tokens, minlength=size), tokenizer, tokens, length, seed)


def _independent(
    how: str, counts: np.ndarray, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, seed: int
) -> Split:
    _check(tokens, length)
    counts = counts.astype(np.float64)
    counts[separator_id(tokenizer)] = 0
    documents = -(-tokens // length)
    sizes = np.full(documents, tokens // documents)
    sizes[: tokens % documents] += 1
    # A document's last predicting position predicts the separator.
    drawn = np.random.default_rng(seed).choice(len(counts), tokens - documents, p=counts / counts.sum())
    return _split(how, np.split(drawn, np.cumsum(sizes - 1)[:-1]), tokenizer)


def sampled(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    length: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float | None = None,
    batch_size: int = 32,
) -> Split:
    """Documents sampled from a teacher, from the separator to the separator, without any text given.

    A document that reaches ``length`` is ended there. None is empty: as its first token the separator is not drawn. The
    text depends on ``seed``, ``batch_size`` and the kind of device; the global random state and the teacher, its
    generation settings included, stay as they were.

    Args:
        tokens: predicting positions in all. The last document is cut to reach them exactly, or to one more where only
            a separator would be left of it.
        length: most predicting positions of a document.
        temperature: of the sampling; 1 is the teacher's own distribution.
        top_p: draw from the smallest set of tokens with this probability (Holtzman et al. 2020, "The curious case of
            neural text degeneration"); None draws from all.
        batch_size: documents sampled at a time.

    Raises:
        KdlibError: fewer than 2 tokens, a length below 8 or beyond the teacher's context, a temperature or top_p out of
            range.
    """
    _check(tokens, length)
    context = getattr(teacher.config.get_text_config(), "max_position_embeddings", None) or length
    if length > context:
        raise KdlibError(f"The teacher reads at most {context} tokens; found a document length of {length}. Lower it.")
    if not temperature > 0 or not (top_p is None or 0 < top_p <= 1):
        raise KdlibError(
            f"Sampling needs a temperature above 0, and a top_p above 0 and at most 1 (or none); found {temperature} and "
            f"{top_p}."
        )
    separator = separator_id(tokenizer)
    settings = GenerationConfig(
        do_sample=True,
        temperature=float(temperature),
        top_k=0,  # the default of transformers is 50
        top_p=1.0 if top_p is None else float(top_p),
        min_new_tokens=1,
        max_new_tokens=length - 1,
        eos_token_id=separator,
        pad_token_id=separator,
    )
    prompt = torch.full((batch_size, 1), separator, device=teacher.device)
    documents, left = [], tokens
    with _generating(teacher, settings, seed), bar(None, "sampling text", total=tokens, unit="token") as progress:
        while left > 0:
            for row in teacher.generate(prompt, attention_mask=torch.ones_like(prompt))[:, 1:].cpu().numpy():
                ended = np.append(row, separator).tolist().index(separator)
                documents.append(row[: min(ended, max(1, left - 1))])
                left -= len(documents[-1]) + 1
                progress.update(len(documents[-1]) + 1)
                if left <= 0:
                    break
    return _split("sampled", documents, tokenizer)


@contextmanager
def _generating(teacher: PreTrainedModel, settings: GenerationConfig, seed: int) -> Iterator[None]:
    """The teacher in evaluation mode with these settings alone (its own would fill the gaps), and a random state apart."""
    own, training = teacher.generation_config, teacher.training
    teacher.generation_config = settings
    teacher.eval()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            yield
    finally:
        teacher.generation_config = own
        teacher.train(training)


def _split(how: str, documents: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase) -> Split:
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


def _check(tokens: int, length: int) -> None:
    if tokens < 2 or length < MIN_BLOCK_LENGTH:
        raise KdlibError(
            f"Expected at least 2 tokens, in documents of at least {MIN_BLOCK_LENGTH}; found {tokens} tokens in documents "
            f"of {length}."
        )
