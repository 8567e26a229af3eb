"""Targets for any rows of token ids: a list of lists, or a ``datasets.Dataset``.

Each row becomes one document of a :class:`kdlib.data.corpus.Split`, with no special tokens added. It is looked up by a hash
of its tokens, not by its number, so a dataset may be shuffled, filtered, concatenated or resumed between writing and
training. A row whose tokens differ has no targets and raises an error.
"""

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from kdlib.cache.external import FileTeacher, ServerTeacher
from kdlib.cache.kinds import Kind
from kdlib.cache.reader import TargetCache
from kdlib.cache.teachers import DenseTeacher, ModelTeacher
from kdlib.cache.writer import write_targets
from kdlib.data import corpus
from kdlib.errors import KdlibError

TEACHER_TOKENS = 4096  # in one forward pass of a teacher given as a model


def row_tokens(row) -> np.ndarray:
    """Token ids [n] of one row: a sequence of them, or a mapping with ``input_ids``; ``attention_mask`` 0 is left out.

    Raises:
        KdlibError: not integers in one dimension.
    """
    mask = row.get("attention_mask") if isinstance(row, Mapping) else None
    tokens = np.asarray(row["input_ids"] if isinstance(row, Mapping) else row)
    if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
        raise KdlibError(
            f"A row must be token ids, got {tokens.dtype} of shape {tokens.shape}. Tokenise the text first."
        )
    return tokens if mask is None else tokens[np.asarray(mask) != 0]


def split_from_ids(rows: Iterable, vocabulary: int, name: str = "rows") -> corpus.Split:
    """Convert rows of token ids to a split with one document per row, named by its number from 0.

    Args:
        rows: lists, arrays or tensors of token ids, or mappings with ``input_ids`` such as those of a
            ``datasets.Dataset``, which may be larger than memory: only int32 tokens are held, 4 bytes each.
        vocabulary: number of tokens.

    Raises:
        KdlibError: a row without tokens or with an id outside the vocabulary (named), no column ``input_ids``, or no row
            of two tokens.
    """
    tokens, ends = array("i"), array("q", [0])
    for number, row in enumerate(_needed_columns(rows)):
        ids = row_tokens(row)
        if not len(ids) or ids.min() < 0 or ids.max() >= vocabulary:
            found = f"{ids.min()} to {ids.max()}" if len(ids) else "none"
            raise KdlibError(
                f"Row {number} must hold token ids from 0 to {vocabulary - 1}, got {found}. Remove or re-tokenise it."
            )
        tokens.frombytes(ids.astype(np.int32).tobytes())
        ends.append(len(tokens))
    offsets = np.array(ends, np.int64)
    if len(tokens) < len(offsets):
        raise KdlibError(
            f"At least one row must have two tokens, a context and its next token, got {len(ends) - 1} rows without."
        )
    # No sources and no bytes: the text of the rows is not known.
    table = pd.DataFrame({"document": np.arange(len(offsets) - 1).astype(str), "tokens": np.diff(offsets) - 1})
    return corpus.Split(name, table, np.frombuffer(tokens, np.int32), offsets, 0)


def _needed_columns(rows: Iterable) -> Iterable:
    columns = getattr(rows, "column_names", None)
    if columns is None:
        return rows
    if "input_ids" not in columns:
        raise KdlibError(
            f"The dataset must have a column input_ids, got {', '.join(columns) or 'none'}. Tokenise it first."
        )
    return rows.select_columns([name for name in ("input_ids", "attention_mask") if name in columns])


def cache_targets(
    folder: Path | str,
    teacher: nn.Module | ModelTeacher | DenseTeacher | ServerTeacher | FileTeacher,
    rows: Iterable,
    kind: Kind,
    temperature: float = 1.0,
    seed: int = 0,
    block_length: int | None = None,
    shard_tokens: int = 65536,
) -> "DatasetTargets":
    """Write a teacher's targets for every token of ``rows``, unless they exist, and open them.

    After an interruption, the same call continues where it stopped; when everything is written, it only reads. Several
    processes, such as those of distributed training, may make the same call and share the work.

    Args:
        folder: of the cache, for these rows, this teacher and these settings only.
        teacher: a causal LM on its device, or one of :mod:`kdlib.cache`'s teachers.
        rows: as for :func:`split_from_ids`, in the same order in every call; training may use any order.
        kind: how each distribution is stored, such as ``Kind("sampled", draws=32)``.
        temperature: of the stored distribution; 1 for kind dense, which supports every temperature.
        seed: of the draws.
        block_length: longest context. Longer rows are cut into windows of this length, for the teacher and, through
            :class:`kdlib.cache.TargetCollator`, for the student. By default every row is one window.
        shard_tokens: approximate tokens in one shard; an interruption loses at most one shard.

    Raises:
        KdlibError: as :func:`split_from_ids` and :func:`kdlib.cache.write_targets`.
    """
    model = teacher if isinstance(teacher, nn.Module) else None
    teacher = teacher if model is None else ModelTeacher(model)
    split = split_from_ids(rows, teacher.vocabulary)
    if block_length is None:
        block_length = max(corpus.MIN_BLOCK_LENGTH, int(split.documents.tokens.max()))
    if model is not None:
        teacher.batch_rows = max(1, TEACHER_TOKENS // max(1, block_length))
    guard = {"documents": split.fingerprint(), "vocabulary": teacher.vocabulary, "block_length": block_length}
    write_targets(Path(folder), teacher, split, guard, kind, temperature, seed, block_length, shard_tokens)
    return DatasetTargets(folder, split, temperature)


class DatasetTargets:
    """Cached targets of rows of token ids. The rows are not kept, only 40 bytes each to look a row up by its tokens.

    Args:
        folder: written by :func:`cache_targets`.
        rows: the rows that were cached, in the same order.
        temperature: of the loss; kind dense supports any.

    Attributes:
        cache: the :class:`kdlib.cache.TargetCache`. rows: the :class:`RowIndex`.

    Raises:
        KdlibError: as :class:`kdlib.cache.TargetCache`, or rows other than the cached ones.
    """

    def __init__(self, folder: Path | str, rows: Iterable | corpus.Split, temperature: float = 1.0):
        self.cache = TargetCache(Path(folder), {}, temperature)
        about = self.cache.guard
        split = rows if isinstance(rows, corpus.Split) else split_from_ids(rows, about["vocabulary"])
        if split.fingerprint() != about["documents"]:
            raise KdlibError(
                f"`rows` must be those cached in {folder}, in their order, got {len(split.documents)} others. Cache them in a new folder."
            )
        self.rows = RowIndex(split, about["block_length"], str(folder))


class RowIndex:
    """The position of a row's targets, by its tokens. Equal rows share the targets of the first one.

    Attributes:
        block_length: longest window that a row is cut into.
    """

    def __init__(self, split: corpus.Split, block_length: int, folder: str):
        bounds = zip(split.offsets[:-1].tolist(), split.offsets[1:].tolist(), strict=True)
        hashes = np.array([_hash(split.tokens[first:end]) for first, end in bounds], "S32")
        self._hashes, first = np.unique(hashes, return_index=True)
        self._starts = split.offsets[first]
        self.block_length, self._folder = block_length, folder

    def start(self, tokens: np.ndarray, name: str) -> int:
        """The flat position of a row's first token.

        Args:
            tokens: [n] of the whole row.
            name: of the row, for the error message.

        Raises:
            KdlibError: no cached row has exactly these tokens.
        """
        mine = np.array([_hash(tokens)], "S32")
        (at,) = np.searchsorted(self._hashes, mine)
        if at == len(self._hashes) or self._hashes[at] != mine[0]:
            raise KdlibError(
                f"{name} must equal a row cached in {self._folder}, got {len(tokens)} tokens, {tokens[:8].tolist()} …. Truncate, pack and "
                "add special tokens before caching."
            )
        return int(self._starts[at])


def _hash(tokens: np.ndarray) -> bytes:
    # In hexadecimal, since NumPy strips trailing zero bytes. 128 bits: no two rows ever share one by chance.
    return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=16).hexdigest().encode()
