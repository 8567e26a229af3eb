"""Top-k targets in plain HDF5, for exchange with other tools.

No layout is common to all tools. LLM-Distillery writes two datasets a conversation, log-probabilities ``convo_<n>`` (float16) and
``indices_<n>`` (int32), both [tokens, k] and gzipped; others pad conversations to [samples, length, k]; DistillKit packs lists into
parquet. What they share is two arrays of one shape, log-probabilities and token ids. This layout keeps both flat, without padding::

    indices    [positions, k] int32               token ids, different within a row
    logprobs   [positions, k] float16 or float32  natural logarithms, of probabilities over the whole vocabulary
    log_tail   [positions] float32                optional: the logarithm of the probability of all other tokens together
    offsets    [documents + 1] int64              optional: the position at which each document begins, and the end
    documents  [documents] UTF-8, fixed length    optional: their names

Attributes of the file: ``format`` = "top-k log-probabilities", ``version`` = 1, ``vocabulary`` and whatever the writer adds (text as
UTF-8 of fixed length, which h5py returns as bytes). Row i is the distribution of the token *after* position i; rows of positions
that predict nothing hold minus infinity throughout. Datasets are chunked, shuffled and gzipped (hence checksummed), all built into
HDF5: every reader of HDF5 1.10 opens the file.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from kdlib.errors import KdlibError

FORMAT, VERSION = "top-k log-probabilities", 1
CHUNK, BATCH = 2**16, 2**20  # entries in one chunk of the file, and in one batch in memory
STORED = {"shuffle": True, "compression": "gzip", "compression_opts": 4}


class TopK(NamedTuple):
    """Rows ``first`` to ``last`` of a file of n positions.

    Attributes:
        ids: [rows, k], of the file's integer type. log_probabilities: [rows, k], of the file's float type, descending.
        log_tail: [rows] or None.
        offsets: [documents + 1] int64 or None. documents: names or None. Both are the whole file's.
        positions: n.
        vocabulary: number of tokens.
        attributes: the file's other attributes.
    """

    ids: np.ndarray
    log_probabilities: np.ndarray
    log_tail: np.ndarray | None
    offsets: np.ndarray | None
    documents: list[str] | None
    positions: int
    vocabulary: int
    attributes: dict[str, str | int | float]


def export_top_k(
    path: Path,
    ids: np.ndarray,
    log_probabilities: np.ndarray,
    log_tail: np.ndarray | None = None,
    *,
    vocabulary: int,
    offsets: np.ndarray | None = None,
    documents: Sequence[str] | None = None,
    attributes: Mapping[str, str | int | float] | None = None,
) -> None:
    """Write top-k targets atomically.

    Args:
        path: of the file; an existing one is replaced.
        ids: [n, k] token ids. This, ``log_probabilities`` and ``log_tail`` may be anything with a shape and a dtype whose slices
            of rows are arrays: an array, a memory map, a dataset of an open HDF5 file. A few thousand rows are in memory at a time.
        log_probabilities: [n, k] float16 or float32, nats.
        log_tail: [n], the logarithm of the remaining mass, or None.
        vocabulary: number of tokens.
        offsets: [documents + 1], ascending from 0 to n. documents: their names.
        attributes: stored as attributes of the file, such as teacher, text and temperature.

    Raises:
        KdlibError: shapes or types that do not match; ids outside the vocabulary or repeated in a row; values that are not
            finite, except in rows of minus infinity only; a row with a mass above 1, or, with its tail, below 1.
    """
    where = f"{path} cannot be written:"
    _check_shapes(where, ids, log_probabilities, log_tail, vocabulary)
    positions, k = ids.shape
    if offsets is not None:
        offsets = np.asarray(offsets)
        _check_documents(where, offsets, documents, positions)
    elif documents is not None:
        raise KdlibError(f"{where} `documents` must come with `offsets`, got none. Give the position at which each begins, and the end.")
    named = {"format": FORMAT, "version": VERSION, "vocabulary": vocabulary}
    if wrong := [
        key for key, value in (attributes or {}).items() if key in named or not isinstance(value, str | int | float)
    ]:
        raise KdlibError(
            f"{where} attributes must be strings and numbers, not named {', '.join(named)}, got {', '.join(wrong)}."
        )

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        # Since HDF5 1.10 metadata has checksums, too.
        with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
            for name, value in (named | dict(attributes or {})).items():
                file.attrs[name] = _text(value) if isinstance(value, str) else value
            chunk = max(1, min(positions, CHUNK // k))
            kept = {
                "indices": (ids, file.create_dataset("indices", (positions, k), np.int32, chunks=(chunk, k), **STORED)),
                "logprobs": (
                    log_probabilities,
                    file.create_dataset(
                        "logprobs", (positions, k), log_probabilities.dtype, chunks=(chunk, k), **STORED
                    ),
                ),
            }
            if log_tail is not None:
                tail = file.create_dataset("log_tail", (positions,), np.float32, chunks=(chunk,), **STORED)
                kept["log_tail"] = (log_tail, tail)
            if offsets is not None:
                file.create_dataset("offsets", data=offsets.astype(np.int64), **STORED)
            if documents is not None:
                file.create_dataset("documents", data=_text(list(documents)), **STORED)
            for rows in _batches(0, positions, k):
                part = {name: np.asarray(values[rows]) for name, (values, _) in kept.items()}
                _check_rows(where, rows.start, part["indices"], part["logprobs"], part.get("log_tail"), vocabulary)
                for name, (_, dataset) in kept.items():
                    dataset[rows] = part[name]
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def import_top_k(
    path: Path,
    first: int = 0,
    last: int | None = None,
    *,
    vocabulary: int | None = None,
    ids: str = "indices",
    log_probabilities: str = "logprobs",
) -> TopK:
    """Read top-k targets, with the checks of :func:`export_top_k`; rows are sorted in descending order.

    Args:
        path: of a file in this layout, or in another tool's layout with the same two arrays.
        first, last: rows to read, last exclusive, by default all. Read a large file range by range; ``positions`` of an empty
            range gives the number of rows.
        vocabulary: number of tokens, compared with the file's; required if the file has none.
        ids, log_probabilities: names of the two datasets.

    Raises:
        KdlibError: no file, not HDF5, truncated or damaged (named); another version; datasets missing, stored outside the file,
            or of other shapes; another vocabulary, or none known; a range outside the file; and everything an export refuses.
    """
    path = Path(path)
    where = f"{path} cannot be used:"
    with _opened(path) as file:
        about = {key: value.item() if isinstance(value, np.generic) else value for key, value in file.attrs.items()}
        about = {key: value.decode() if isinstance(value, bytes) else value for key, value in about.items()}
        if about.get("format") == FORMAT and about.get("version") != VERSION:
            raise KdlibError(
                f"{where} its layout must have version {VERSION}, got {about.get('version')}. Export it again."
            )
        about = {key: value for key, value in about.items() if key not in ("format", "version")}
        found = about.pop("vocabulary", vocabulary)
        if found is None or vocabulary not in (None, found):
            raise KdlibError(
                f"{where} its vocabulary must have {'a known number of' if vocabulary is None else vocabulary} tokens, got "
                f"{'an unknown number' if found is None else found}. The teacher must share the student's tokenizer."
            )
        datasets = [_dataset(file, where, name) for name in (ids, log_probabilities)]
        tail = _dataset(file, where, "log_tail") if "log_tail" in file else None
        _check_shapes(where, *datasets, tail, found)
        positions, k = datasets[0].shape
        offsets = _dataset(file, where, "offsets")[:] if "offsets" in file else None
        documents = _dataset(file, where, "documents").asstr()[:].tolist() if "documents" in file else None
        if offsets is not None:
            _check_documents(where, offsets, documents, positions)
            offsets = offsets.astype(np.int64)
        last = positions if last is None else last
        if not 0 <= first <= last <= positions:
            raise KdlibError(f"{where} `first` and `last` must be within its rows 0..{positions}, got {first}..{last}.")

        out = [np.empty((last - first, *dataset.shape[1:]), dataset.dtype) for dataset in datasets]
        out_tail = None if tail is None else np.empty(last - first, tail.dtype)
        for rows in _batches(first, last, k):
            part = [dataset[rows] for dataset in datasets]
            part_tail = None if tail is None else tail[rows]
            _check_rows(where, rows.start, *part, part_tail, found)
            # Stable, so that rows in order come back as they are.
            order = np.argsort(-part[1], axis=1, kind="stable")
            at = slice(rows.start - first, rows.stop - first)
            for kept, values in zip(out, part, strict=True):
                kept[at] = np.take_along_axis(values, order, 1)
            if tail is not None:
                out_tail[at] = part_tail
    return TopK(*out, out_tail, offsets, documents, positions, found, about)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise KdlibError(f"{path} must be an HDF5 file of top-k targets, got no file. Correct the path.")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except KdlibError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        # HDF5 raises any of these, depending on which of its structures is damaged.
        raise KdlibError(
            f"{path} must be a complete HDF5 file of top-k targets, got a truncated, damaged or other file ({str(error)[:200]}). "
            "Fetch or export it again."
        ) from None


def _text(value: str | list[str]) -> np.ndarray:
    """Strings of fixed length: HDF5 stores variable-length strings outside the datasets, without checksums."""
    encoded = np.char.encode(value, "utf-8")
    return encoded.astype(h5py.string_dtype(length=max(1, encoded.dtype.itemsize)))


def _dataset(file: h5py.File, where: str, name: str) -> h5py.Dataset:
    if name not in file:
        raise KdlibError(
            f"{where} it must have a dataset {name!r}, got {', '.join(file) or 'none'}. Pass the names to import_top_k."
        )
    dataset = file[name]
    # HDF5 can point to other files: a file from elsewhere must not make this process read them.
    outside = not isinstance(file.get(name, getlink=True), h5py.HardLink)
    if outside or not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise KdlibError(f"{where} {name!r} must be a dataset stored inside the file. Export it with its data inside.")
    return dataset


def _batches(first: int, last: int, k: int) -> Iterator[slice]:
    rows = max(1, CHUNK // k) * max(1, BATCH // CHUNK)
    for start in range(first, last, rows):
        yield slice(start, min(start + rows, last))


def _check_shapes(where: str, ids, log_probabilities, log_tail, vocabulary: int) -> None:
    if len(ids.shape) != 2 or 0 in ids.shape or log_probabilities.shape != ids.shape:
        raise KdlibError(
            f"{where} ids and log-probabilities must have one shape [n, k], n and k above 0, got {ids.shape} and {log_probabilities.shape}."
        )
    if log_tail is not None and log_tail.shape != ids.shape[:1]:
        raise KdlibError(f"{where} `log_tail` must have one value for each of the {ids.shape[0]} rows, got shape {log_tail.shape}.")
    if np.dtype(ids.dtype).kind not in "iu" or np.dtype(log_probabilities.dtype) not in (np.float16, np.float32):
        raise KdlibError(
            f"{where} ids must be integers and log-probabilities float16 or float32, got {ids.dtype} and {log_probabilities.dtype}."
        )
    if log_tail is not None and np.dtype(log_tail.dtype) != np.float32:
        raise KdlibError(f"{where} `log_tail` must be float32, got {log_tail.dtype}.")
    if not ids.shape[1] <= vocabulary <= 2**31:
        raise KdlibError(
            f"{where} `vocabulary` must be at least k = {ids.shape[1]} tokens and at most 2^31, got {vocabulary}."
        )


def _check_documents(where: str, offsets: np.ndarray, documents: Sequence[str] | None, positions: int) -> None:
    whole = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 1
    if not whole or offsets[0] != 0 or offsets[-1] != positions or (np.diff(offsets.astype(np.int64)) < 0).any():
        raise KdlibError(
            f"{where} `offsets` must be integers that ascend from 0 to {positions}, one more than documents."
        )
    if documents is not None and len(documents) != len(offsets) - 1:
        raise KdlibError(f"{where} `documents` must have {len(offsets) - 1} names, one for each document, got {len(documents)}.")


def _check_rows(where: str, first: int, ids, log_probabilities, log_tail, vocabulary: int) -> None:
    def refuse(wrong: np.ndarray, problem: str) -> None:
        if wrong.any():
            row = int(wrong.argmax())
            raise KdlibError(
                f"{where} row {first + row} {problem}: ids {ids[row, :5].tolist()}, log-probabilities {log_probabilities[row, :5].tolist()}"
                f"{'' if log_tail is None else f', tail {log_tail[row].item()}'}."
            )

    refuse(((ids < 0) | (ids >= vocabulary)).any(1), f"has ids outside 0..{vocabulary - 1}")
    refuse((np.diff(np.sort(ids, axis=1), axis=1) == 0).any(1), "names a token twice")
    empty = np.isneginf(log_probabilities).all(1)
    if log_tail is not None:
        empty &= np.isneginf(log_tail)
    finite = np.isfinite(log_probabilities).all(1)
    if log_tail is not None:  # minus infinity: no mass remains
        finite &= np.isfinite(log_tail) | np.isneginf(log_tail)
    refuse(~finite & ~empty, "has values that are not finite")
    with np.errstate(over="ignore", invalid="ignore"):
        logarithms = log_probabilities.astype(np.float64)
        probabilities = np.exp(logarithms)
        mass = probabilities.sum(1)
        if log_tail is not None:
            mass += np.exp(log_tail.astype(np.float64))
        rounding = np.full(len(mass), 1e-4)
        if log_probabilities.dtype == np.float16:  # rounds a logarithm to 11 bits, hence p by up to p |log p| / 2^11
            rounding += np.where(empty[:, None], 0, -probabilities * logarithms / 2**11).sum(1)
    refuse(mass > 1 + rounding, "has a mass above 1")
    if log_tail is not None:
        refuse((mass < 1 - rounding) & ~empty, "has, with its tail, a mass below 1")
