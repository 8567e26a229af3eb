"""Top-k targets in plain HDF5, to give to other tools and to take from them.

No layout is common to all tools. LLM-Distillery writes two datasets a conversation, log-probabilities ``convo_<n>`` (float16) and
``indices_<n>`` (int32), both [tokens, k] and gzipped; others pad conversations to [samples, length, k]; DistillKit packs lists into
parquet. What they share is two arrays of one shape, log-probabilities and token ids; so it is here, flat, with nothing padded::

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
CHUNK, STEP = 2**16, 2**20  # entries in one chunk of the file, and handled at a time
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
    """Write top-k targets, whole or not at all.

    Args:
        path: of the file; an older one is replaced.
        ids: [n, k] token ids. This, ``log_probabilities`` and ``log_tail`` may be anything with a shape and a dtype whose slices
            of rows are arrays: an array, a memory map, a dataset of an open HDF5 file. A few thousand rows are held at a time.
        log_probabilities: [n, k] float16 or float32, nats.
        log_tail: [n], the logarithm of the mass that is left, or None.
        vocabulary: number of tokens.
        offsets: [documents + 1], ascending from 0 to n. documents: their names.
        attributes: kept as attributes of the file: whose targets these are, of which text, at which temperature.

    Raises:
        KdlibError: shapes or types that do not fit together; ids outside the vocabulary or twice in a row; values that are
            not finite (but for rows of minus infinity throughout); a row with more than all the mass, or, with its tail, less.
    """
    where = f"{path} cannot be written:"
    _check_shapes(where, ids, log_probabilities, log_tail, vocabulary)
    positions, k = ids.shape
    if offsets is not None:
        offsets = np.asarray(offsets)
        _check_documents(where, offsets, documents, positions)
    elif documents is not None:
        raise KdlibError(f"{where} documents without offsets. Give the position at which each begins, and the end.")
    named = {"format": FORMAT, "version": VERSION, "vocabulary": vocabulary}
    if wrong := [
        key for key, value in (attributes or {}).items() if key in named or not isinstance(value, str | int | float)
    ]:
        raise KdlibError(
            f"{where} attributes are strings and numbers not named {', '.join(named)}; found {', '.join(wrong)}."
        )

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        # Since HDF5 1.10 what describes the data has checksums, too.
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
            for rows in _steps(0, positions, k):
                part = {name: np.asarray(source[rows]) for name, (source, _) in kept.items()}
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
    """Read top-k targets, with the checks of :func:`export_top_k`; rows that are not in descending order are put so.

    Args:
        path: of a file in this layout, or in that of another tool with the same two arrays.
        first, last: the rows wanted, last exclusive, by default all. A large file is read range by range; ``positions`` of an
            empty range tells how many there are.
        vocabulary: number of tokens, to compare with the file's; needed for a file that does not tell.
        ids, log_probabilities: what the two datasets are called.

    Raises:
        KdlibError: no file, not HDF5, truncated or damaged (named); another version; datasets missing, kept outside the file, or
            of other shapes; another vocabulary, or none known; a range outside the file; and all that an export refuses.
    """
    path = Path(path)
    where = f"{path} cannot be used:"
    with _opened(path) as file:
        about = {key: value.item() if isinstance(value, np.generic) else value for key, value in file.attrs.items()}
        about = {key: value.decode() if isinstance(value, bytes) else value for key, value in about.items()}
        if about.get("format") == FORMAT and about.get("version") != VERSION:
            raise KdlibError(
                f"{where} its layout has version {about.get('version')}; this code reads version {VERSION}."
            )
        about = {key: value for key, value in about.items() if key not in ("format", "version")}
        found = about.pop("vocabulary", vocabulary)
        if found is None or vocabulary not in (None, found):
            raise KdlibError(
                f"{where} its vocabulary has {'an unknown number of' if found is None else found} tokens and the one expected "
                f"{'is not given' if vocabulary is None else vocabulary}. Take targets of a teacher that shares the student's tokenizer."
            )
        sources = [_dataset(file, where, name) for name in (ids, log_probabilities)]
        tail = _dataset(file, where, "log_tail") if "log_tail" in file else None
        _check_shapes(where, *sources, tail, found)
        positions, k = sources[0].shape
        offsets = _dataset(file, where, "offsets")[:] if "offsets" in file else None
        documents = _dataset(file, where, "documents").asstr()[:].tolist() if "documents" in file else None
        if offsets is not None:
            _check_documents(where, offsets, documents, positions)
            offsets = offsets.astype(np.int64)
        last = positions if last is None else last
        if not 0 <= first <= last <= positions:
            raise KdlibError(f"{where} it has rows 0..{positions}; asked for {first}..{last}.")

        out = [np.empty((last - first, *source.shape[1:]), source.dtype) for source in sources]
        out_tail = None if tail is None else np.empty(last - first, tail.dtype)
        for rows in _steps(first, last, k):
            part = [source[rows] for source in sources]
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
        raise KdlibError(f"{path} does not exist. Expected an HDF5 file of top-k targets.")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except KdlibError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        # HDF5 raises all of these, depending on which of its structures is broken.
        raise KdlibError(
            f"{path} is not a whole HDF5 file of top-k targets: it is truncated, damaged or something else ({str(error)[:200]}). "
            "Fetch or export it again."
        ) from None


def _text(value: str | list[str]) -> np.ndarray:
    """Strings of fixed length: those of variable length lie outside the datasets, where nothing guards them."""
    encoded = np.char.encode(value, "utf-8")
    return encoded.astype(h5py.string_dtype(length=max(1, encoded.dtype.itemsize)))


def _dataset(file: h5py.File, where: str, name: str) -> h5py.Dataset:
    if name not in file:
        raise KdlibError(
            f"{where} it has no dataset {name!r}, only {', '.join(file) or 'none'}. Tell import_top_k the names."
        )
    dataset = file[name]
    # HDF5 can point to other files: a file from elsewhere must not make this process read them.
    outside = not isinstance(file.get(name, getlink=True), h5py.HardLink)
    if outside or not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise KdlibError(f"{where} {name!r} is not a dataset within the file. Export it with its data inside.")
    return dataset


def _steps(first: int, last: int, k: int) -> Iterator[slice]:
    step = max(1, CHUNK // k) * max(1, STEP // CHUNK)
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


def _check_shapes(where: str, ids, log_probabilities, log_tail, vocabulary: int) -> None:
    if len(ids.shape) != 2 or 0 in ids.shape or log_probabilities.shape != ids.shape:
        raise KdlibError(
            f"{where} expected ids and log-probabilities of one shape [n, k], n and k above 0; found {ids.shape} and {log_probabilities.shape}."
        )
    if log_tail is not None and log_tail.shape != ids.shape[:1]:
        raise KdlibError(f"{where} expected a tail for each of the {ids.shape[0]} rows; found shape {log_tail.shape}.")
    if np.dtype(ids.dtype).kind not in "iu" or np.dtype(log_probabilities.dtype) not in (np.float16, np.float32):
        raise KdlibError(
            f"{where} expected integer ids and float16 or float32 log-probabilities; found {ids.dtype} and {log_probabilities.dtype}."
        )
    if log_tail is not None and np.dtype(log_tail.dtype) != np.float32:
        raise KdlibError(f"{where} expected a float32 log_tail; found {log_tail.dtype}.")
    if not ids.shape[1] <= vocabulary <= 2**31:
        raise KdlibError(
            f"{where} expected a vocabulary of at least k = {ids.shape[1]} tokens and at most 2^31; found {vocabulary}."
        )


def _check_documents(where: str, offsets: np.ndarray, documents: Sequence[str] | None, positions: int) -> None:
    whole = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) > 1
    if not whole or offsets[0] != 0 or offsets[-1] != positions or (np.diff(offsets.astype(np.int64)) < 0).any():
        raise KdlibError(
            f"{where} expected integer offsets that ascend from 0 to {positions}, one more than documents."
        )
    if documents is not None and len(documents) != len(offsets) - 1:
        raise KdlibError(f"{where} {len(documents)} document names for {len(offsets) - 1} documents.")


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
    if log_tail is not None:  # nothing at all may be left
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
