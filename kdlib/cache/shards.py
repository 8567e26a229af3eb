"""Shards on disk: their layout, atomic writing, checksums, and reading by memory map.

A cache is a folder::

    writing.json            version, kind, temperature, guard and everything else the shards depend on; written first
    manifest.json           the same, and the number of positions and shards; written last
    00000.safetensors       the arrays of one contiguous range of flat positions
    00000.json              first, last (exclusive), sha256 and size of that file, and sums for the report
    head.safetensors        kind dense only: the teacher's output layer, weight [V, D] and bias [V]

Flat positions are those of :class:`kdlib.data.corpus.Split`: position i predicts token i + 1; the last position of a document
predicts nothing and has no entries. ``FORMAT.md`` next to this file describes the arrays, with a reader in ten lines. JSON
files contain a checksum of their content.
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
FRAME = 256  # about how many tokens are compressed together, and decompressed to read one of them
SHARD_BYTES = 4096  # at most, beside its positions: the weights, headers and JSON files
DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "F16": np.float16, "F32": np.float32}


def pack_entries(lengths: np.ndarray, ids: np.ndarray, codes: np.ndarray, frames: np.ndarray) -> dict[str, np.ndarray]:
    """Compress the entries of a shard's positions into the arrays that are written.

    Args:
        lengths: [n] number of entries of each position, in the type stored; ids, codes: [sum of lengths], ids ascending
            within a position.
        frames: the first position of each frame, beginning with 0.

    Returns:
        ``frames``: all frames concatenated, each with its lengths, codes and octaves as three deflate streams, then its
        remainders (see :func:`kdlib.cache.encoding.pack_ids`); ``frame_bytes`` [frames + 1]: the byte at which each begins;
        ``frame_positions``: as given.
    """
    ends = np.r_[0, np.cumsum(lengths, dtype=np.int64)]
    packed = []
    for low, high in itertools.pairwise([*frames, len(lengths)]):
        entries = slice(ends[low], ends[high])
        octaves, remainders = encoding.pack_ids(ids[entries], lengths[low:high])
        # Separate streams, so that each has a Huffman code fitted to its own distribution. Remainders are incompressible.
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
        lengths: [positions of the frame] number of entries of each.
        codes, octaves: [sum of lengths] codes of the weights, octaves of the gaps.
        remainders: bytes; the remainder of the first entry begins at the first bit.
    """

    lengths: np.ndarray
    codes: np.ndarray
    octaves: np.ndarray
    remainders: np.ndarray


def unpack_frame(shard: dict[str, np.ndarray], number: int, length_type: str) -> Frame:
    """Decompress one frame of a mapped shard whose lengths have the type ``length_type``."""
    low, high = shard["frame_bytes"][number : number + 2].tolist()
    parts, rest = [], shard["frames"][low:high]
    for kept in (length_type, np.uint8, np.uint8):
        # A deflate stream marks its own end, so no lengths are stored: what it leaves unread is where the next one begins.
        stream = zlib.decompressobj(-9)
        parts.append(np.frombuffer(stream.decompress(rest), kept))
        rest = stream.unused_data
    return Frame(*parts, np.frombuffer(rest, np.uint8))


def _deflate(values: np.ndarray) -> bytes:
    # Entropy coding only. These bytes have a skewed distribution but no repeated sequences, so back-references would cost
    # more than Huffman codes of single bytes. Negative wbits: a raw stream without header and checksum, since the shard has
    # a SHA-256; 9 is the smallest window, as none is used.
    stream = zlib.compressobj(9, wbits=-9, strategy=zlib.Z_HUFFMAN_ONLY)
    return stream.compress(values.tobytes()) + stream.flush()


def write_shard(
    folder: Path, number: int, first: int, last: int, arrays: dict[str, np.ndarray], sums: dict[str, float]
) -> None:
    """Write one shard, then, once it is on disk, its description. A shard without a description is unfinished."""
    name = f"{number:05d}"
    data = save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    replace(folder / f"{name}.safetensors", data)
    about = {"first": first, "last": last, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "sums": sums}
    write_record(folder / f"{name}.json", about)


def write_record(path: Path, record: dict) -> None:
    """Write a JSON file atomically, with the SHA-256 of its other entries as ``checksum``."""
    replace(path, _sealed(record))


def read_record(path: Path) -> dict | None:
    """Read a file of :func:`write_record`, or return None if there is none.

    Raises:
        KdlibError: any byte differs from what was written.
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
            f"{path} is damaged: its content must match its checksum. Delete it and write the targets again; undamaged shards are kept."
        )
    return record


def _sealed(record: dict) -> bytes:
    checksum = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps(record | {"checksum": checksum}, indent=1, sort_keys=True, allow_nan=False).encode()


def replace(path: Path, data: bytes) -> None:
    """Write a file atomically: it is synced to disk under another name, then renamed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # other processes may write the same file
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        # Another process finished the folder and removed this file as a leftover of a killed process.
        if not path.is_file():
            raise


def remove_leftovers(folder: Path) -> None:
    """Remove partial files of killed processes; only for a complete folder."""
    for path in [*folder.glob(".*.partial"), *folder.glob(".*.lock")]:
        path.unlink(missing_ok=True)


@contextmanager
def claimed_shard(folder: Path, number: int) -> Iterator[bool]:
    """Lock a shard for writing; yields False if another process holds the lock. A process that dies releases its lock."""
    import fcntl  # missing on some systems, which can still read targets

    with open(folder / f".{number:05d}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def describe_shard(folder: Path, number: int) -> dict | None:
    """The description of a finished shard, None if it is unfinished."""
    return read_record(folder / f"{number:05d}.json")


def check_shard(folder: Path, number: int, about: dict) -> None:
    """Compare a shard's size and SHA-256 with its description.

    Raises:
        KdlibError: missing, truncated or altered; the message names the file.
    """
    path = folder / f"{number:05d}.safetensors"
    size = path.stat().st_size if path.is_file() else None
    advice = (
        f"Delete {path.with_suffix('.json')} and {path.name} and write the targets again: only this shard is rewritten."
    )
    if size is None:
        raise KdlibError(f"Target shard {path} is missing. {advice}")
    if size != about["bytes"]:
        raise KdlibError(
            f"Target shard {path} must have {about['bytes']} bytes, got {size}. {advice}"
        )
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != about["sha256"]:
        raise KdlibError(f"Target shard {path} must have SHA-256 {about['sha256']}, got {found}. {advice}")


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
