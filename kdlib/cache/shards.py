"""Shards on disk: what is in the files, written whole, checked by hash, read by memory map.

A cache is a folder::

    writing.json            version, kind, temperature, guard and all else that shapes the shards; written first
    manifest.json           the same, and the number of positions and shards; written last
    00000.safetensors       the arrays of one contiguous range of flat positions
    00000.json              first, last (exclusive), sha256 and size of that file, and sums for the report
    head.safetensors        kind dense only: the teacher's output layer, weight [V, D] and bias [V]

Flat positions are those of :class:`kdlib.data.corpus.Split`: position i predicts token i + 1; the last position of a document
predicts nothing and has no entries. ``FORMAT.md`` next to this file describes the arrays, with a reader in ten lines. JSON
files carry a checksum of their content.
"""

import hashlib
import itertools
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from kdlib.cache import encoding
from kdlib.errors import KdlibError

VERSION = 3
FRAME = 256  # tokens compressed together, about: what reading one position must decompress
SHARD_BYTES = 4096  # at most, beside its positions: the weights, headers and JSON files
DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "F16": np.float16, "F32": np.float32}


def pack_entries(lengths: np.ndarray, ids: np.ndarray, codes: np.ndarray, frames: np.ndarray) -> dict[str, np.ndarray]:
    """Entries of a shard's positions, in their order, as the arrays that are written.

    Args:
        lengths: [n] entries of each position, of the type they are kept as; ids, codes: [sum of lengths], a position's ids
            ascending.
        frames: the position that each begins with, the first 0.

    Returns:
        ``frames``, one after the other: a frame's lengths, codes and octaves, each deflated on its own, then its
        remainders (see :func:`kdlib.cache.encoding.pack_ids`); ``frame_bytes`` [frames + 1]: where each begins;
        ``frame_positions``: as given.
    """
    ends = np.r_[0, np.cumsum(lengths, dtype=np.int64)]
    packed = []
    for low, high in itertools.pairwise([*frames, len(lengths)]):
        entries = slice(ends[low], ends[high])
        octaves, remainders = encoding.pack_ids(ids[entries], lengths[low:high])
        parts = [_deflate(values) for values in (lengths[low:high], codes[entries], octaves)]
        packed.append(b"".join([*parts, remainders.tobytes()]))
    return {
        "frames": np.frombuffer(b"".join(packed), np.uint8),
        "frame_bytes": np.cumsum([0, *map(len, packed)]).astype(np.uint64),
        "frame_positions": frames.astype(np.uint32),
    }


class Frame(NamedTuple):
    """One frame of a shard, decompressed.

    Attributes:
        lengths: [positions of the frame] entries of each.
        codes, octaves: [sum of lengths] of the weights and of the ids' gaps.
        remainders: bytes; the first entry's begins at the first bit.
    """

    lengths: np.ndarray
    codes: np.ndarray
    octaves: np.ndarray
    remainders: np.ndarray


def unpack_frame(shard: dict[str, np.ndarray], number: int, length_type: str) -> Frame:
    """One frame of a mapped shard whose lengths are kept as ``length_type``."""
    low, high = shard["frame_bytes"][number : number + 2].tolist()
    parts, rest = [], shard["frames"][low:high]
    for kept in (length_type, np.uint8, np.uint8):
        stream = zlib.decompressobj(-9)
        parts.append(np.frombuffer(stream.decompress(rest), kept))
        rest = stream.unused_data
    return Frame(*parts, np.frombuffer(rest, np.uint8))


def _deflate(values: np.ndarray) -> bytes:
    # Bytes do not repeat in patterns here, so codes for single bytes are shorter than references to earlier ones, and no
    # window of earlier ones is needed. Raw: a shard has its SHA-256.
    stream = zlib.compressobj(9, wbits=-9, strategy=zlib.Z_HUFFMAN_ONLY)
    return stream.compress(values.tobytes()) + stream.flush()


def write_shard(
    folder: Path, number: int, first: int, last: int, arrays: dict[str, np.ndarray], sums: dict[str, float]
) -> None:
    """Write one shard and, after it is safely on disk, its description: a shard without one does not count."""
    name = f"{number:05d}"
    data = save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    replace(folder / f"{name}.safetensors", data)
    about = {"first": first, "last": last, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "sums": sums}
    write_record(folder / f"{name}.json", about)


def write_record(path: Path, record: dict) -> None:
    """Write a JSON file whole or not at all, with the SHA-256 of its other entries as ``checksum``."""
    replace(path, _sealed(record))


def read_record(path: Path) -> dict | None:
    """What :func:`write_record` wrote, or None where there is no file.

    Raises:
        KdlibError: not a byte may differ from what was written.
    """
    if not path.is_file():
        return None
    data = path.read_bytes()
    try:
        record = json.loads(data)
        del record["checksum"]
        whole = _sealed(record) == data
    except (ValueError, LookupError, TypeError):
        whole = False
    if not whole:
        raise KdlibError(
            f"{path} is damaged: its content differs from its checksum. Delete it and write the targets again; whole shards are kept."
        )
    return record


def _sealed(record: dict) -> bytes:
    checksum = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps(record | {"checksum": checksum}, indent=1, sort_keys=True, allow_nan=False).encode()


def replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, safely on disk before it takes its name."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # other processes may write the same file
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        # Another process finished the folder and took this for what a killed one had left.
        if not path.is_file():
            raise


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had begun to write; only for a folder that lacks nothing."""
    for path in [*folder.glob(".*.partial"), *folder.glob(".*.lock")]:
        path.unlink(missing_ok=True)


@contextmanager
def claimed_shard(folder: Path, number: int) -> Iterator[bool]:
    """Whether this process may write a shard, or another one is at it. A process that dies gives its shard back."""
    import fcntl  # not on every system that can read targets

    with open(folder / f".{number:05d}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def describe_shard(folder: Path, number: int) -> dict | None:
    """The description of a finished shard, or None."""
    return read_record(folder / f"{number:05d}.json")


def check_shard(folder: Path, number: int, about: dict) -> None:
    """Compare a shard's size and SHA-256 with its description.

    Raises:
        KdlibError: missing, truncated or altered; the message names the file.
    """
    path = folder / f"{number:05d}.safetensors"
    size = path.stat().st_size if path.is_file() else None
    advice = (
        f"Delete {path.with_suffix('.json')} and {path.name}, and write the targets again: only this shard is redone."
    )
    if size is None:
        raise KdlibError(f"Target shard {path} is missing. {advice}")
    if size != about["bytes"]:
        raise KdlibError(
            f"Target shard {path} is truncated or grown: expected {about['bytes']} bytes, found {size}. {advice}"
        )
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != about["sha256"]:
        raise KdlibError(f"Target shard {path} is damaged: expected SHA-256 {about['sha256']}, found {found}. {advice}")


def map_shard(folder: Path, number: int) -> dict[str, np.ndarray]:
    """The arrays of a shard, memory-mapped read-only."""
    path = folder / f"{number:05d}.safetensors"
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    # As a plain array: slicing a memmap object takes ten times as long.
    mapped = np.memmap(path, np.uint8, "r", offset=8 + size).view(np.ndarray)
    header.pop("__metadata__", None)
    return {
        key: mapped[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for key, entry in header.items()
    }
