"""Teachers of which only the most likely tokens are known: a completion server, or a file of another tool.

Their targets are of kind topk at temperature 1. The entropy is that of the k + 1 outcomes, and where the text's token is not
among the k, its loss is computed from the whole remaining mass: both are lower bounds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdlib.cache.exchange import export_top_k, import_top_k
from kdlib.cache.reader import TargetCache
from kdlib.cache.server import CompletionServer
from kdlib.data.corpus import Split
from kdlib.errors import KdlibError

POSITIONS = 4096  # read or requested at a time
SMALLEST = -21.0  # log of probabilities that round to 0


class TopChunk(NamedTuple):
    """The most likely tokens after some positions.

    Attributes:
        positions: [n] flat positions; labels: [n] their next tokens.
        ids: [n, k] int64; log_probabilities: [n, k], nats, descending; log_tail: [n], log of the remaining mass.
    """

    positions: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    log_probabilities: np.ndarray
    log_tail: np.ndarray


class ServerTeacher:
    """A completion server as teacher; its answers are written shard by shard, like the targets of any teacher."""

    width = head = None

    def __init__(self, server: CompletionServer):
        self.server, self.vocabulary, self.top_k = server, server.vocabulary, server.top_k
        self.precision = "as served"

    def fingerprint(self) -> None:
        """None: the weights of a server are not known."""

    def chunks(self, split: Split, index: np.ndarray) -> Iterator[TopChunk]:
        """As :meth:`kdlib.cache.ModelTeacher.chunks`; every window is one prompt."""
        positions = index[index >= 0]
        # Windows of one document follow one another without a gap only where the first fills its row.
        cuts = np.flatnonzero((np.diff(positions) != 1) | (np.diff(np.nonzero(index >= 0)[0]) != 0)) + 1
        windows = np.split(positions, cuts)
        for group in np.array_split(np.arange(len(windows)), max(1, len(positions) // POSITIONS)):
            mine = [windows[number] for number in group]
            answers = self.server.top_log_probabilities([split.tokens[window] for window in mine])
            ids, log_probabilities = (np.concatenate(parts) for parts in zip(*answers, strict=True))
            yield _chunk(split, np.concatenate(mine), ids, log_probabilities, None)


class FileTeacher:
    """Top-k targets from HDF5 (see :mod:`kdlib.cache.exchange`), a row for each flat position of a split.

    Raises:
        KdlibError: another number of rows, other documents or another vocabulary.
    """

    width = head = None
    precision = "as imported"

    def __init__(self, path: Path, split: Split, vocabulary: int):
        about = import_top_k(path, 0, 0, vocabulary=vocabulary)
        self.path, self.vocabulary, self.top_k = path, about.vocabulary, about.ids.shape[1]
        moved = about.offsets is not None and not np.array_equal(about.offsets, split.offsets)
        if about.positions != len(split.tokens) or moved:
            raise KdlibError(
                f"{path} must have one row for each of the {len(split.tokens)} tokens of the split {split.name!r}, got "
                f"{about.positions}{' and other document offsets' if moved else ''}. Include each document's last token."
            )

    def fingerprint(self) -> None:
        """None: the weights behind a file are not known."""

    def chunks(self, split: Split, index: np.ndarray) -> Iterator[TopChunk]:
        """As :meth:`kdlib.cache.ModelTeacher.chunks`."""
        positions = np.sort(index[index >= 0])
        for part in np.array_split(positions, max(1, len(positions) // POSITIONS)):
            rows = import_top_k(self.path, int(part[0]), int(part[-1]) + 1, vocabulary=self.vocabulary)
            mine = part - part[0]
            tail = None if rows.log_tail is None else rows.log_tail[mine]
            yield _chunk(split, part, rows.ids[mine], rows.log_probabilities[mine], tail)


def _chunk(split: Split, positions, ids, log_probabilities, log_tail) -> TopChunk:
    log_probabilities = log_probabilities.astype(np.float64)
    if not np.isfinite(log_probabilities).all():
        empty = positions[~np.isfinite(log_probabilities).all(1)]
        raise KdlibError(
            f"Every position that predicts a token must have log-probabilities, got {len(empty)} without, the first {empty[0]}."
        )
    if log_tail is None:
        # Due to rounding, the k may sum to slightly more than 1.
        kept = np.minimum(np.logaddexp.reduce(log_probabilities, axis=1), -1e-9)
        log_tail = np.log(-np.expm1(kept))
    # The text's token may be among the remaining ones, however small their mass.
    log_tail = np.maximum(log_tail, SMALLEST)
    labels = split.tokens[positions + 1].astype(np.int64)
    return TopChunk(positions, labels, ids.astype(np.int64), log_probabilities, log_tail)


def export_cache(cache: TargetCache, split: Split, path: Path, attributes: dict | None = None) -> None:
    """Write a cache of kind topk as HDF5 for other tools; rows of positions that predict nothing are minus infinity.

    Raises:
        KdlibError: another kind.
    """
    if cache.kind.name != "topk":
        raise KdlibError(
            f"`cache` must be of kind topk, the k largest probabilities of every token, got {cache.kind.name}."
        )
    k, ranges = cache.kind.top_k, range(0, cache.positions, POSITIONS)
    ids = np.tile(np.arange(k, dtype=np.int32), (cache.positions, 1))
    log_probabilities = np.full(ids.shape, -np.inf, np.float32)
    log_tail = np.full(cache.positions, -np.inf, np.float32)
    for low in ranges:
        rows = slice(low, min(low + POSITIONS, cache.positions))
        part = cache.read(np.arange(rows.start, rows.stop))
        weights, order = part.weights.sort(dim=1, descending=True, stable=True)
        likeliest, weights = part.ids.gather(1, order).numpy(), weights.numpy()
        for row in np.flatnonzero((weights > 0).any(1)):
            kept = np.count_nonzero(weights[row])
            # Probabilities too small to be stored are replaced by other ids, equally unlikely.
            spare = np.setdiff1d(np.arange(k + kept), likeliest[row, :kept])[: k - kept]
            ids[low + row] = np.r_[likeliest[row, :kept], spare]
            log_probabilities[low + row] = np.r_[np.log(weights[row, :kept]), np.full(len(spare), SMALLEST)]
        with np.errstate(divide="ignore"):
            log_tail[rows] = np.log(part.tail.numpy())
    export_top_k(
        path,
        ids,
        log_probabilities,
        log_tail,
        vocabulary=cache.guard["vocabulary"],
        offsets=split.offsets,
        documents=list(split.documents.document),
        attributes=attributes,
    )
