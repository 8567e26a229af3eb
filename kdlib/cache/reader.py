"""Targets read back by flat position, in any order, after their guard and checksums have been compared."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load
from torch.nn import functional

from kdlib.cache import encoding
from kdlib.cache.kinds import Kind
from kdlib.cache.shards import VERSION, check_shard, describe_shard, map_shard, read_record, unpack_frame
from kdlib.data.corpus import Split
from kdlib.errors import KdlibError
from kdlib.losses import DenseTargets, SparseTargets


def guard(split: Split, tokenizer_fingerprint: str, vocabulary: int, block_length: int, teacher: str) -> dict:
    """What targets depend on and a student must share, each part under its own name so that a mismatch can be named.

    Args:
        teacher: identifies the teacher's weights and precision: the id of its run.
    """
    return {
        "documents": split.fingerprint(),
        "tokenizer": tokenizer_fingerprint,
        "vocabulary": vocabulary,
        "block_length": block_length,
        "teacher": teacher,
    }


class TargetCache:
    """Memory-mapped teacher targets of one split.

    Args:
        folder: written by :func:`kdlib.cache.write_targets`.
        expected: the guard of the data that will be trained on; every entry must agree with the cache's.
        temperature: of the loss that will read; kind dense serves any.

    Raises:
        KdlibError: not a finished cache, another version, a guard that differs (what, expected, found), a temperature it
            cannot serve, or a damaged shard (named).
    """

    def __init__(self, folder: Path, expected: dict, temperature: float):
        manifest = _manifest(folder)
        wrong = {
            key: (value, manifest["guard"].get(key))
            for key, value in expected.items()
            if manifest["guard"].get(key) != value
        }
        if wrong:
            told = "; ".join(f"{key}: expected {value!r}, found {found!r}" for key, (value, found) in wrong.items())
            raise KdlibError(
                f"Targets in {folder} belong to something else ({told}). Write targets for this setting with notebooks/03_targets.ipynb."
            )
        self.kind = Kind(**manifest["kind"])
        if temperature != manifest["temperature"] and self.kind.name != "dense":
            raise KdlibError(
                f"Targets in {folder} describe the teacher at temperature {manifest['temperature']} and cannot serve {temperature}: "
                "a sampled or truncated distribution cannot be re-tempered. Write targets at that temperature, or kind dense."
            )
        self.temperature, self.positions, self.precision = temperature, manifest["positions"], manifest["precision"]
        self.weights_sha256 = manifest.get("weights_sha256")
        self.guard, self._length_type, self._shards, firsts = manifest["guard"], manifest["length_type"], [], []
        self.head = _head(folder, manifest["head_sha256"]) if self.kind.name == "dense" else None
        for number in range(manifest["shards"]):
            about = describe_shard(folder, number)
            if about is None:
                raise KdlibError(
                    f"Target shard {folder / f'{number:05d}.json'} is missing. Write the targets again: only this shard is redone."
                )
            check_shard(folder, number, about)
            firsts.append(about["first"])
            self._shards.append(map_shard(folder, number))
        self._firsts = np.array(firsts)
        if self.kind.name != "dense":
            # Each frame's first position, and each shard's first frame.
            starts = [shard["frame_positions"].astype(np.int64) for shard in self._shards]
            self._frames = np.concatenate([first + part for first, part in zip(firsts, starts, strict=True)])
            self._first_frames = np.cumsum([0, *map(len, starts)])[:-1]

    def read(self, positions: np.ndarray) -> SparseTargets | DenseTargets:
        """Targets at flat ``positions`` [T], row for row; −1 gives a row without mass (dense: a row of zeros).

        Raises:
            KdlibError: a position past the end, which would belong to other documents.
        """
        positions = np.asarray(positions, np.int64).reshape(-1)
        if len(positions) and positions.min() < -1:
            raise KdlibError(f"Positions count from 0, and -1 stands for padding; found {positions.min()}.")
        if self.kind.name == "dense":
            return DenseTargets(torch.from_numpy(self._gather("hidden", positions)), *self.head)
        lengths, ids, codes = self._entries(positions)
        # Row-major, so the places of a padded matrix that are used come in the order of the entries.
        used = np.arange(max(1, lengths.max(initial=0)), dtype=np.uint16) < lengths.astype(np.uint16)[:, None]
        padded_ids, weights = np.zeros(used.shape, np.int64), np.zeros(used.shape, np.float32)
        padded_ids[used], weights[used] = ids, self._shards[0]["weights"].take(codes)
        entropy, tail = encoding.decode_nats(self._gather("entropy", positions)), None
        if self.kind.name == "topk":
            tail = np.exp(self._gather("log_tail", positions, -np.inf).astype(np.float32))
            # The weights are rounded; the tail fixes what they must sum to.
            weights *= ((1 - tail) / np.maximum(weights.sum(1), 1e-30))[:, None]
            # The loss sees k + 1 outcomes, so its entropy is that of k + 1 outcomes.
            entropy = -_xlogx(weights).sum(1) - _xlogx(tail)
            tail = torch.from_numpy(tail)
        return SparseTargets(
            torch.from_numpy(padded_ids), torch.from_numpy(weights), tail, torch.from_numpy(entropy), self.temperature
        )

    def document_positions(self, split: Split, document: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat positions, int64 [stop - start], of one document: what the methods that read targets take.

        Args:
            split: the one whose guard the targets were opened with; only its length is compared here.
            document: an id of ``split.documents``.
            start, stop: positions counted from 0 within the document, ``stop`` exclusive; by default all that predict. Position
                p predicts token p of the document's text, the last one the separator after it.

        Raises:
            KdlibError: a split of another length, an unknown document, a range that does not lie within the document.
        """
        if len(split.tokens) != self.positions:
            raise KdlibError(
                f"These targets have {self.positions} positions, the split {split.name!r} has {len(split.tokens)}. Give the "
                "split that they were opened for."
            )
        found = np.flatnonzero(split.documents.document == document)
        if not len(found):
            raise KdlibError(
                f"The split {split.name!r} has no document {document!r}. Take an id from its column 'document', such as "
                f"{split.documents.document.iloc[0]!r}."
            )
        first, end = split.offsets[found[0] : found[0] + 2].tolist()
        predicting = end - first - 1
        stop = predicting if stop is None else stop
        if not 0 <= start <= stop <= predicting:
            raise KdlibError(
                f"The document {document!r} has {predicting} positions: expected 0 <= start <= stop <= {predicting}, found start "
                f"{start} and stop {stop}. Positions count from its beginning; without stop they go to its end."
            )
        return first + np.arange(start, stop, dtype=np.int64)

    def likeliest(self, positions: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """What the targets hold most likely at flat ``positions`` [T]: ids and probabilities, descending, at most ``n`` a row.

        A row that holds fewer ends in probabilities of 0.
        """
        targets = self.read(positions)
        if self.kind.name == "dense":
            weight, bias = (None if one is None else one.float() for one in self.head)
            found = torch.softmax(functional.linear(targets.hidden.float(), weight, bias) / self.temperature, -1).topk(n)
            return found.indices.numpy(), found.values.numpy()
        found = targets.weights.topk(min(n, targets.weights.shape[1]))
        return targets.ids.gather(1, found.indices).numpy(), found.values.numpy()

    def statistics(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """The teacher's ``entropy`` and ``nll`` of the text at flat ``positions`` [T], none negative, nats, float32.

        Both are at the temperature of the targets (dense ones are kept at 1, whatever temperature they are read at).
        """
        positions = np.asarray(positions, np.int64)
        return {key: encoding.decode_nats(self._gather(key, positions)) for key in ("entropy", "nll")}

    def _gather(self, name: str, positions: np.ndarray, empty: float = 0) -> np.ndarray:
        """Rows of an array that has one a position; ``empty`` where the position is -1."""
        self._check(positions)
        owner = np.searchsorted(self._firsts, positions, side="right") - 1
        sample = self._shards[0][name]
        out = np.full((len(positions), *sample.shape[1:]), empty, sample.dtype)
        for number in np.unique(owner[positions >= 0]):
            rows = np.flatnonzero((positions >= 0) & (owner == number))
            out[rows] = self._shards[number][name][positions[rows] - self._firsts[number]]
        return out.astype(np.float32) if name == "hidden" else out

    def _entries(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of entries of each position [T], and the ids and codes of them all, one position after the other."""
        lengths, used = np.zeros(len(positions), np.int64), np.flatnonzero(positions >= 0)
        if not len(used):
            return lengths, np.zeros(0, np.int64), np.zeros(0, np.uint8)
        self._check(positions)
        frame = np.searchsorted(self._frames, positions[used], side="right") - 1
        # Each frame is decompressed once, whatever the order of the positions; from here on frames lie side by side.
        found, which = np.unique(frame, return_inverse=True)
        owner = np.searchsorted(self._first_frames, found, side="right") - 1
        frames = [
            unpack_frame(self._shards[shard], number, self._length_type)
            for shard, number in zip(owner.tolist(), (found - self._first_frames[owner]).tolist(), strict=True)
        ]
        remainders = np.concatenate([*(one.remainders for one in frames), np.zeros(4, np.uint8)])
        frame_lengths, codes, octaves, _ = (np.concatenate(parts) for parts in zip(*frames, strict=True))
        frame_lengths = frame_lengths.astype(np.int64)
        bits = _remainder_starts(octaves, [len(one.octaves) for one in frames])
        at = np.cumsum([0, *(len(one.lengths) for one in frames)])[which] + positions[used] - self._frames[frame]
        lengths[used] = mine = frame_lengths[at]
        entries = np.repeat((np.cumsum(frame_lengths) - frame_lengths)[at] - (np.cumsum(mine) - mine), mine)
        entries += np.arange(len(entries))
        ids = encoding.unpack_ids(octaves.take(entries), remainders, bits.take(entries), mine)
        return lengths, ids, codes.take(entries)

    def _check(self, positions: np.ndarray) -> None:
        if len(positions) and positions.max() >= self.positions:
            raise KdlibError(
                f"Position {positions.max()} lies past the targets' end ({self.positions} positions): they belong to other documents."
            )


def _remainder_starts(octaves: np.ndarray, frame_entries: list[int]) -> np.ndarray:
    """The bit at which each entry's remainder begins: one after the other, but those of a frame at a whole byte."""
    ends = np.cumsum(octaves, dtype=np.uint32)
    padding = -np.diff(np.r_[np.uint32(0), ends][np.cumsum([0, *frame_entries])]) % 8
    return ends - octaves + np.repeat(np.cumsum(padding) - padding, frame_entries)


def _manifest(folder: Path) -> dict:
    manifest = read_record(folder / "manifest.json")
    if manifest is None:
        raise KdlibError(
            f"{folder} holds no finished targets: manifest.json is missing. Write them, or let the interrupted writer finish."
        )
    if manifest.get("version") != VERSION:
        raise KdlibError(
            f"Targets in {folder} have format version {manifest.get('version')}; this code reads version {VERSION}. Delete "
            "their run, and it is made again."
        )
    return manifest


def _head(folder: Path, expected: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    path = folder / "head.safetensors"
    data = path.read_bytes() if path.is_file() else b""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise KdlibError(
            f"The teacher's output layer {path} is {'damaged' if data else 'missing'}: expected SHA-256 {expected}, found {found}. "
            "Write the targets again."
        )
    arrays = load(data)
    return torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["bias"]) if "bias" in arrays else None


def _xlogx(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values * np.log(np.maximum(values, 1e-45)), 0)
