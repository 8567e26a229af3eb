"""From documents to tokens: budgets, token streams, windows, and rows of the model's input.

A document's stream is ``[separator] + tokens + [separator]``; a split's streams lie one after another in ``tokens``.
*Flat position* i predicts ``tokens[i + 1]``; the last position of a stream predicts nothing. A *window* is a run of at
most ``block_length`` predicting positions of one document; every predicting position lies in exactly one window. A row
of the model's input holds one or more whole windows that do not see each other, so a model's prediction at a position
of a document depends neither on packing nor on order.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.data.splits import ENOUGH
from kdlib.errors import KdlibError

SEPARATOR = "<|endoftext|>"
MIN_BLOCK_LENGTH = 8
# A long speech or chapter would else fill a small held-out split alone, and the bootstrap would resample one source.
HELD_OUT_PER_SOURCE = 2
_BATCH = 256


@dataclass(frozen=True)
class Split:
    """Documents of one split and their tokens.

    Attributes:
        name: train, validation, calibration, test or ood.
        documents: one row a document [document, source, domain, bytes, tokens]; ``tokens`` counts predicting positions.
        tokens: int32 [positions]: the streams, one after another.
        offsets: int64 [documents + 1]: where each stream begins, and the end.
        separator_id: id of the token around every document.
    """

    name: str
    documents: pd.DataFrame
    tokens: np.ndarray
    offsets: np.ndarray
    separator_id: int

    def windows(self, block_length: int, documents: Sequence[str] | None = None) -> np.ndarray:
        """Windows (first flat position, length), int64 [windows, 2], document after document.

        Args:
            block_length: longest window.
            documents: ids to take, in this order, a repeated id repeatedly (a bootstrap sample); by default all.

        Raises:
            KdlibError: block_length below 8, or an id that is not in this split.
        """
        _check_block_length(block_length)
        chosen = np.arange(len(self.documents))
        if documents is not None:
            chosen = pd.Index(self.documents.document).get_indexer(list(documents))
            if (chosen < 0).any():
                missing = np.asarray(documents, dtype=object)[chosen < 0]
                raise KdlibError(
                    f"`documents` must be ids of the split {self.name!r}, got {len(missing)} of {len(chosen)} others, the first "
                    f"{missing[0]!r}. Take ids from its column 'document'."
                )
        predicting = np.diff(self.offsets)[chosen] - 1
        count = -(-predicting // block_length)
        number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        start = np.repeat(self.offsets[:-1][chosen], count) + number * block_length
        length = np.minimum(block_length, np.repeat(predicting, count) - number * block_length)
        return np.stack([start, length], axis=1).astype(np.int64)

    def fingerprint(self) -> str:
        """SHA-256 of the documents' names, tokens and offsets: equal only if every position is the same."""
        digest = hashlib.sha256("\n".join(self.documents.document).encode())
        digest.update(np.ascontiguousarray(self.tokens, dtype=np.int32))
        digest.update(np.ascontiguousarray(self.offsets, dtype=np.int64))
        return digest.hexdigest()


def _check_block_length(block_length: int) -> None:
    if block_length < MIN_BLOCK_LENGTH:
        raise KdlibError(
            f"`block_length` must be at least {MIN_BLOCK_LENGTH} tokens, got {block_length}. 128 to 1024 are usual."
        )


def pack(windows: np.ndarray, block_length: int) -> np.ndarray:
    """Put windows into as few rows as first-fit decreasing finds.

    The same windows in any order give the same rows: they are sorted by length, then position.

    Args:
        windows: int [windows, 2] of (first flat position, length), cut at this ``block_length``.
        block_length: length of a row.

    Returns:
        int64 [rows, block_length]: the flat position at each place of each row, -1 at padding, which is at a row's end.

    Raises:
        KdlibError: block_length below 8, a window longer than a row, or neighbouring windows that would run together in
        a row.
    """
    _check_block_length(block_length)
    windows = np.asarray(windows, dtype=np.int64).reshape(-1, 2)
    start, length = windows[np.lexsort((windows[:, 0], -windows[:, 1]))].T
    if len(length) and (length[0] > block_length or length[-1] < 1):
        raise KdlibError(
            f"Windows must have 1 to {block_length} tokens, got {length[-1]} to {length[0]}. Cut them with the block_length of the rows."
        )
    row, column = _first_fit_decreasing(length, block_length)
    _check_apart(start, length, row, column)
    index = np.full((row.max() + 1 if len(row) else 0, block_length), -1, dtype=np.int64)
    places = index.reshape(-1)
    # Length by length: one array over all positions is slow to allocate.
    for size in np.unique(length):
        same = length == size
        step = np.arange(size)
        places[(row * block_length + column)[same, None] + step] = start[same, None] + step
    return index


def _first_fit_decreasing(length: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each item, longest first. Items of one length are placed together: each goes to the first row
    with room, so row after row takes as many as it holds.
    """
    row, column = np.empty_like(length), np.empty_like(length)
    free = np.empty(0, dtype=np.int64)
    sizes, first, counts = np.unique(-length, return_index=True, return_counts=True)
    for size, begin, count in zip(-sizes, first, counts, strict=True):
        room = free // size
        missing = count - room.sum()
        if missing > 0:
            new = -(-missing // (capacity // size))
            free = np.concatenate([free, np.full(new, capacity)])
            room = free // size
        before = np.cumsum(room) - room
        taken = np.clip(count - before, 0, room)
        used = np.flatnonzero(taken)
        item = slice(begin, begin + count)
        row[item] = np.repeat(used, taken[used])
        rank = np.arange(count) - before[row[item]]
        column[item] = capacity - free[row[item]] + rank * size
        free[used] -= taken[used] * size
    return row, column


def _check_apart(start: np.ndarray, length: np.ndarray, row: np.ndarray, column: np.ndarray) -> None:
    order = np.lexsort((column, row))
    end = (start + length)[order]
    if ((end[:-1] == start[order][1:]) & (np.diff(row[order]) == 0)).any():
        raise KdlibError(
            "Consecutive windows of a document must not share a row, which would join them. Cut them with the block_length of the rows."
        )


def rows(split: Split, index: np.ndarray) -> dict[str, np.ndarray]:
    """The model's input for rows of :func:`pack`.

    Returns:
        int64 [rows, block_length] each: ``input_ids`` (the separator at padding), ``labels`` (-100 at padding),
        ``position_ids`` (from 0 in every window) and ``segments`` (the window's number in its row, -1 at padding), from
        which attention within windows follows.
    """
    padding = index < 0
    column = np.arange(index.shape[1])
    # pack() never puts two windows side by side whose positions run on, so a jump is where a window begins.
    begins = np.ones(index.shape, dtype=bool)
    begins[:, 1:] = index[:, 1:] != index[:, :-1] + 1
    begin = np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    inputs = split.tokens[np.maximum(index, 0)].astype(np.int64)
    labels = split.tokens[np.maximum(index, 0) + 1].astype(np.int64)
    return {
        "input_ids": np.where(padding, split.separator_id, inputs),
        "labels": np.where(padding, -100, labels),
        "position_ids": np.where(padding, 0, column - begin),
        "segments": np.where(padding, -1, np.cumsum(begins, axis=1) - 1),
    }


def predicting_positions(split: Split) -> np.ndarray:
    """Flat positions that predict a token, in split order: all but the last of every document's stream."""
    predicts = np.ones(len(split.tokens), dtype=bool)
    predicts[split.offsets[1:] - 1] = False
    return np.flatnonzero(predicts)


def separator_id(tokenizer) -> int:
    """Id of ``<|endoftext|>``, or of the end-of-sequence token where the tokenizer has no such token.

    Raises:
        KdlibError: it has neither.
    """
    found = tokenizer.get_vocab().get(SEPARATOR, tokenizer.eos_token_id)
    if found is None:
        raise KdlibError(
            f"The tokenizer must have {SEPARATOR} or an eos token to separate documents, got neither. Add one."
        )
    return found


def tokenise(name: str, documents: pd.DataFrame, tokenizer) -> Split:
    """Tokenise all of ``documents`` [document, source, domain, text, bytes] as the split ``name``.

    Raises:
        KdlibError: no documents, or one without tokens.
    """
    return _split(name, documents, _streams(documents, tokenizer), separator_id(tokenizer))


def select(
    documents: pd.DataFrame,
    tokenizer,
    budgets: Mapping[str, int],
    shares: Mapping[str, float],
    per_source: int = HELD_OUT_PER_SOURCE,
    least_sources: Mapping[str, int] | None = None,
) -> dict[str, Split]:
    """Tokenise as many documents of every split as its token budget allows.

    Documents are taken in the order of the table until their domain's part of the budget is reached, so a smaller
    budget takes a subset of what a larger one takes. A domain with less text than its part is taken whole.

    Args:
        documents: the table of :func:`kdlib.data.documents.read_documents`.
        tokenizer: a Hugging Face fast tokenizer.
        budgets: predicting positions wanted in each split.
        shares: part of each domain in a split, on any positive scale; the out-of-domain split has its one domain.
        per_source: most documents of one source in a split other than train.
        least_sources: sources that a domain puts into each split other than train, if it has them, even where that takes
            more than its part of the budget; none by default.

    Raises:
        KdlibError: shares for other domains than the table's, an empty split, or a document without tokens.
    """
    inside = set(documents.domain[documents.split != "ood"])
    if inside != set(shares):
        raise KdlibError(
            f"`shares` must be given for {', '.join(sorted(inside))}, got {', '.join(sorted(shares))}."
        )
    separator = separator_id(tokenizer)
    splits = {}
    for name, budget in budgets.items():
        candidates = documents[documents.split == name]
        if name != "train":
            candidates = candidates[candidates.groupby("source").cumcount() < per_source]
        streams: dict[int, np.ndarray] = {}
        for domain, group in candidates.groupby("domain"):
            part = shares[domain] / sum(shares.values()) if name != "ood" else 1.0
            least = (least_sources or {}).get(domain, 0) if name != "train" else 0
            streams |= _streams(group, tokenizer, budget * part, least)
        splits[name] = _split(name, candidates, streams, separator)
    return splits


def _streams(documents: pd.DataFrame, tokenizer, wanted: float = np.inf, sources: int = 0) -> dict[int, np.ndarray]:
    """Streams of the first documents that reach ``wanted`` predicting positions and ``sources``, by the label of their row."""
    separator = separator_id(tokenizer)
    streams: dict[int, np.ndarray] = {}
    seen: set[str] = set()
    total = 0
    for first in range(0, len(documents), _BATCH):
        batch = documents.iloc[first : first + _BATCH]
        encoded = tokenizer(list(batch.text), add_special_tokens=False, return_attention_mask=False, verbose=False)
        for label, document, source, ids in zip(
            batch.index, batch.document, batch.source, encoded["input_ids"], strict=True
        ):
            if total >= wanted and len(seen) >= sources:
                return streams
            if not ids:
                raise KdlibError(
                    f"The document {document!r} must have tokens, got none: the tokenizer drops all of its text. Leave it out."
                )
            streams[label] = np.array([separator, *ids, separator], dtype=np.int32)
            total += len(ids) + 1
            seen.add(source)
    return streams


def _split(name: str, documents: pd.DataFrame, streams: dict[int, np.ndarray], separator: int) -> Split:
    if not streams:
        raise KdlibError(
            f"The split {name!r} must have documents, got none. Read documents that fill it first."
        )
    taken = documents[documents.index.isin(list(streams))]
    ordered = [streams[label] for label in taken.index]
    lengths = np.array([len(stream) for stream in ordered], dtype=np.int64)
    table = taken[["document", "source", "domain", "bytes"]].assign(tokens=lengths - 1).reset_index(drop=True)
    return Split(name, table, np.concatenate(ordered), np.concatenate([[0], np.cumsum(lengths)]), separator)


def save_split(split: Split, folder: Path) -> None:
    """Write a split: ``<name>.tokens.npy``, ``<name>.offsets.npy`` and ``<name>.parquet``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{split.name}.tokens.npy", split.tokens)
    np.save(folder / f"{split.name}.offsets.npy", split.offsets)
    split.documents.to_parquet(folder / f"{split.name}.parquet", index=False)


def load_split(folder: Path, name: str) -> Split:
    """Load a split of :func:`save_split`; tokens are memory-mapped.

    Raises:
        KdlibError: the folder holds no such split.
    """
    folder = Path(folder)
    if not (folder / f"{name}.parquet").is_file():
        known = sorted(file.stem for file in folder.glob("*.parquet") if (folder / f"{file.stem}.tokens.npy").is_file())
        raise KdlibError(
            f"{folder} must have the split {name!r}, got {', '.join(known) or 'none; make the corpus first'}."
        )
    tokens = np.load(folder / f"{name}.tokens.npy", mmap_mode="r")
    offsets = np.load(folder / f"{name}.offsets.npy")
    # Every stream begins with the separator.
    return Split(name, pd.read_parquet(folder / f"{name}.parquet"), tokens, offsets, int(tokens[0]))


def build(
    folder: Path,
    documents: pd.DataFrame,
    report: dict,
    tokenizer,
    *,
    budgets: Mapping[str, int],
    shares: Mapping[str, float],
    block_length: int,
) -> dict:
    """Tokenise and select, write the splits and ``documents.parquet`` into ``folder``, and return the data card.

    Args:
        folder: where the files go.
        documents, report: from :func:`kdlib.data.documents.read_documents`.
        tokenizer, budgets, shares: as for :func:`select`.
        block_length: length of a row, for the packing efficiency.

    Returns:
        ``splits``: documents, sources, bytes, tokens, budget, windows, rows and packing efficiency (predicting
        positions a place) of each split, and the first four for each of its ``domains``; ``warnings``, as
        :func:`few_sources` says them; and all of ``report``.

    Raises:
        KdlibError: block_length below 8, or as for :func:`select`.
    """
    _check_block_length(block_length)
    least = {domain: entry["division"]["least_sources"] for domain, entry in report["domains"].items()}
    splits = select(documents, tokenizer, budgets, shares, least_sources=least)
    card = {"splits": {}, "block_length": block_length, "held_out_documents_per_source": HELD_OUT_PER_SOURCE, **report}
    for name, split in splits.items():
        save_split(split, folder)
        windows = split.windows(block_length)
        packed = pack(windows, block_length)
        card["splits"][name] = {
            **_totals(split.documents),
            "budget": budgets[name],
            "windows": len(windows),
            "rows": len(packed),
            "packing_efficiency": float((packed >= 0).mean()),
            "domains": {domain: _totals(group) for domain, group in split.documents.groupby("domain")},
        }
    card["warnings"] = few_sources(card)
    counts = pd.concat([split.documents[["document", "tokens"]] for split in splits.values()])
    documents.merge(counts, on="document").to_parquet(Path(folder) / "documents.parquet", index=False)
    return card


def few_sources(card: Mapping) -> list[str]:
    """A sentence on each domain that has fewer than :data:`kdlib.data.splits.ENOUGH` sources of test or out-of-domain text.

    Args:
        card: as :func:`build` returns it.
    """
    return [
        f"{domain} has {counts['sources']} {'source' if counts['sources'] == 1 else 'sources'} in {split}, fewer than {ENOUGH}: "
        "an interval for this domain alone is rough."
        for split in ("test", "ood")
        for domain, counts in sorted(card["splits"][split]["domains"].items())
        if counts["sources"] < ENOUGH
    ]


def _totals(documents: pd.DataFrame) -> dict[str, int]:
    return {
        "documents": len(documents),
        "sources": int(documents.source.nunique()),
        "bytes": int(documents.bytes.sum()),
        "tokens": int(documents.tokens.sum()),
    }
