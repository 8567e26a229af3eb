"""Read targets by flat position, in any order, after their guard and checksums are verified."""

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
    """Everything that targets depend on and a student must share, by name, so that a mismatch can be named.

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
        expected: the guard of the training data; every entry must equal the cache's.
        temperature: of the loss; kind dense supports any.

    Raises:
        KdlibError: not a finished cache, another version, a guard that differs (which entry, expected, found), a
            temperature it does not support, or a damaged shard (named).
    """

    def __init__(self, folder: Path, expected: dict, temperature: float):
        manifest = _manifest(folder)
        wrong = {
            key: (value, manifest["guard"].get(key))
            for key, value in expected.items()
            if manifest["guard"].get(key) != value
        }
        if wrong:
            told = "; ".join(f"{key}: expected {value!r}, got {found!r}" for key, (value, found) in wrong.items())
            raise KdlibError(
                f"Targets in {folder} must match this setting ({told}). Write targets for it with notebooks/03_targets.ipynb."
            )
        self.kind = Kind(**manifest["kind"])
        if temperature != manifest["temperature"] and self.kind.name != "dense":
            raise KdlibError(
                f"`temperature` must be {manifest['temperature']}, that of the targets in {folder}, got {temperature}. Write targets "
                f"at {temperature}, or of kind dense, which supports any."
            )
        self.temperature, self.positions, self.precision = temperature, manifest["positions"], manifest["precision"]
        self.weights_sha256 = manifest.get("weights_sha256")
        self.guard, self._length_type, self._shards, firsts = manifest["guard"], manifest["length_type"], [], []
        self.head = _head(folder, manifest["head_sha256"]) if self.kind.name == "dense" else None
        for number in range(manifest["shards"]):
            about = describe_shard(folder, number)
            if about is None:
                raise KdlibError(
                    f"Target shard {folder / f'{number:05d}.json'} is missing. Write the targets again: only this shard is rewritten."
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
        """Targets at flat ``positions`` [T], one row each; −1 gives a row without mass (dense: a row of zeros).

        Raises:
            KdlibError: a position past the end, which would belong to other documents.
        """
        positions = np.asarray(positions, np.int64).reshape(-1)
        if len(positions) and positions.min() < -1:
            raise KdlibError(f"`positions` must be at least 0, or -1 for padding, got {positions.min()}.")
        if self.kind.name == "dense":
            return DenseTargets(torch.from_numpy(self._gather("hidden", positions)), *self.head)
        lengths, ids, codes = self._entries(positions)
        # Row-major order: the used cells of the padded matrix are in the order of the entries.
        used = np.arange(max(1, lengths.max(initial=0)), dtype=np.uint16) < lengths.astype(np.uint16)[:, None]
        padded_ids, weights = np.zeros(used.shape, np.int64), np.zeros(used.shape, np.float32)
        padded_ids[used], weights[used] = ids, self._shards[0]["weights"].take(codes)
        entropy, tail = encoding.decode_nats(self._gather("entropy", positions)), None
        if self.kind.name == "topk":
            tail = np.exp(self._gather("log_tail", positions, -np.inf).astype(np.float32))
            # The weights are rounded; rescale them so that they and the tail sum to 1.
            weights *= ((1 - tail) / np.maximum(weights.sum(1), 1e-30))[:, None]
            # The loss sees k + 1 outcomes, so its entropy is that of k + 1 outcomes.
            entropy = -_xlogx(weights).sum(1) - _xlogx(tail)
            tail = torch.from_numpy(tail)
        return SparseTargets(
            torch.from_numpy(padded_ids), torch.from_numpy(weights), tail, torch.from_numpy(entropy), self.temperature
        )

    def document_positions(self, split: Split, document: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat positions, int64 [stop - start], of one document, for :meth:`read` and the other methods.

        Args:
            split: the split that the targets were opened for; only its length is compared here.
            document: an id of ``split.documents``.
            start, stop: positions counted from 0 within the document, ``stop`` exclusive; by default all that predict. Position
                p predicts token p of the document's text; the last one predicts the separator after it.

        Raises:
            KdlibError: a split of another length, an unknown document, a range that does not lie within the document.
        """
        if len(split.tokens) != self.positions:
            raise KdlibError(
                f"The split {split.name!r} must have the targets' {self.positions} positions, got {len(split.tokens)}. Pass the split "
                "they were opened for."
            )
        found = np.flatnonzero(split.documents.document == document)
        if not len(found):
            raise KdlibError(
                f"`document` must be an id of the split {split.name!r}, got {document!r}. Take one from its column 'document', such as "
                f"{split.documents.document.iloc[0]!r}."
            )
        first, end = split.offsets[found[0] : found[0] + 2].tolist()
        predicting = end - first - 1
        stop = predicting if stop is None else stop
        if not 0 <= start <= stop <= predicting:
            raise KdlibError(
                f"`start` and `stop` must satisfy 0 <= start <= stop <= {predicting}, the positions of document {document!r}, got start "
                f"{start} and stop {stop}."
            )
        return first + np.arange(start, stop, dtype=np.int64)

    def likeliest(self, positions: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The most likely tokens at flat ``positions`` [T]: ids and probabilities, descending, at most ``n`` a row.

        A row with fewer entries is padded with probabilities of 0.
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

        Both are at the temperature of the targets (for kind dense always 1, at whatever temperature it is read).
        """
        positions = np.asarray(positions, np.int64)
        return {key: encoding.decode_nats(self._gather(key, positions)) for key in ("entropy", "nll")}

    def _gather(self, name: str, positions: np.ndarray, empty: float = 0) -> np.ndarray:
        """Rows of an array with one row per position; ``empty`` where the position is -1."""
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
        # Decompress each frame once, whatever the order of the positions, and concatenate what the frames hold. Below, `at`
        # is each position's place among the positions of these frames, `entries` the places of its entries among theirs.
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
                f"`positions` must be below {self.positions}, the number of the targets, got {positions.max()}. Pass the split they were written for."
            )


def _remainder_starts(octaves: np.ndarray, frame_entries: list[int]) -> np.ndarray:
    """The bit at which each entry's remainder begins: end to end, but each frame begins at a whole byte."""
    ends = np.cumsum(octaves, dtype=np.uint32)
    # Bits that fill up the last byte of each frame: -(bits of the frame) mod 8. Every entry is shifted by the padding of all
    # frames before its own.
    padding = -np.diff(np.r_[np.uint32(0), ends][np.cumsum([0, *frame_entries])]) % 8
    return ends - octaves + np.repeat(np.cumsum(padding) - padding, frame_entries)


def _manifest(folder: Path) -> dict:
    manifest = read_record(folder / "manifest.json")
    if manifest is None:
        raise KdlibError(
            f"{folder} must have finished targets, got no manifest.json. Write them, or let the interrupted writer finish."
        )
    if manifest.get("version") != VERSION:
        raise KdlibError(
            f"Targets in {folder} must have format version {VERSION}, got {manifest.get('version')}. Delete their run to make it again."
        )
    return manifest


def _head(folder: Path, expected: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    path = folder / "head.safetensors"
    data = path.read_bytes() if path.is_file() else b""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise KdlibError(
            f"The teacher's output layer {path} must have SHA-256 {expected}, got {found if data else 'no file'}. Write the targets again."
        )
    arrays = load(data)
    return torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["bias"]) if "bias" in arrays else None


def _xlogx(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values * np.log(np.maximum(values, 1e-45)), 0)
