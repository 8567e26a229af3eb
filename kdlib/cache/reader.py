"""Targets read back by flat position, in any order, after their guard and checksums have been compared."""

from pathlib import Path

import numpy as np
import torch

from kdlib.cache import kinds
from kdlib.cache.shards import VERSION, check_shard, describe_shard, map_shard, read_record
from kdlib.corpus import Split
from kdlib.errors import KdlibError
from kdlib.losses import SparseTargets


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
        temperature: of the loss that will read.

    Raises:
        KdlibError: not a finished cache, another version, a guard that differs (what, expected, found), a temperature it
            cannot serve, or a damaged shard (named).
    """

    def __init__(self, folder: Path, expected: dict, temperature: float):
        manifest = read_record(folder / "manifest.json")
        if manifest is None:
            raise KdlibError(
                f"{folder} holds no finished targets: manifest.json is missing. Write them, or let the interrupted writer finish."
            )
        if manifest.get("version") != VERSION:
            raise KdlibError(
                f"Targets in {folder} have format version {manifest.get('version')}; this code reads version {VERSION}."
            )
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
        if temperature != manifest["temperature"]:
            raise KdlibError(
                f"Targets in {folder} describe the teacher at temperature {manifest['temperature']} and cannot serve {temperature}: "
                "a sampled or truncated distribution cannot be re-tempered. Write targets at that temperature."
            )
        self.kind, self.size, self.temperature, self.positions = (
            manifest[key] for key in ("kind", "size", "temperature", "positions")
        )
        self._firsts, self._shards = [], []
        for number in range(manifest["shards"]):
            about = describe_shard(folder, number)
            if about is None:
                raise KdlibError(
                    f"Target shard {folder / f'{number:05d}.json'} is missing. Write the targets again: only this shard is redone."
                )
            check_shard(folder, number, about)
            self._firsts.append(about["first"])
            self._shards.append(map_shard(folder, number))

    def read(self, positions: np.ndarray) -> SparseTargets:
        """Targets at flat ``positions`` [T], row for row; −1 gives a row without mass.

        Raises:
            KdlibError: a position past the end, which would belong to other documents.
        """
        positions = np.asarray(positions, np.int64).reshape(-1)
        used = positions >= 0
        owner = self._owner(positions)
        pieces = []
        for number in np.unique(owner[used]):
            rows = np.flatnonzero(used & (owner == number))
            local = positions[rows] - self._firsts[number]
            shard = self._shards[number]
            kept = (
                kinds.read_sampled(shard, local, self.size)
                if self.kind == "sampled"
                else kinds.read_top_k(shard, local)
            )
            pieces.append((rows, *kept, shard["entropy"][local].astype(np.float32)))
        width = max((piece[1].shape[1] for piece in pieces), default=1)
        ids = np.zeros((len(positions), width), np.int64)
        weights = np.zeros((len(positions), width), np.float32)
        tail = np.zeros(len(positions), np.float32) if self.kind == "topk" else None
        entropy = np.zeros(len(positions), np.float32)
        for rows, piece_ids, piece_weights, piece_tail, piece_entropy in pieces:
            ids[rows, : piece_ids.shape[1]] = piece_ids
            weights[rows, : piece_ids.shape[1]] = piece_weights
            if tail is not None:
                tail[rows] = piece_tail
                # The loss sees k + 1 outcomes, so its entropy is that of k + 1 outcomes.
                piece_entropy = -_xlogx(piece_weights).sum(1) - _xlogx(piece_tail)
            entropy[rows] = piece_entropy
        return SparseTargets(
            torch.from_numpy(ids),
            torch.from_numpy(weights),
            None if tail is None else torch.from_numpy(tail),
            torch.from_numpy(entropy),
            self.temperature,
        )

    def statistics(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """The teacher's ``entropy`` and ``nll`` of the text at flat ``positions`` [T], none negative, nats, float32."""
        positions = np.asarray(positions, np.int64)
        owner = self._owner(positions)
        out = {key: np.empty(len(positions), np.float32) for key in ("entropy", "nll")}
        for number in np.unique(owner):
            rows = np.flatnonzero(owner == number)
            for key, values in out.items():
                values[rows] = self._shards[number][key][positions[rows] - self._firsts[number]]
        return out

    def _owner(self, positions: np.ndarray) -> np.ndarray:
        if len(positions) and positions.max() >= self.positions:
            raise KdlibError(
                f"Position {positions.max()} lies past the targets' end ({self.positions} positions): they belong to other documents."
            )
        return np.searchsorted(self._firsts, positions, side="right") - 1


def _xlogx(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values * np.log(np.maximum(values, 1e-45)), 0)
