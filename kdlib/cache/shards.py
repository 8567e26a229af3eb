"""Shards on disk: what is in the files, written whole, checked by hash, read by memory map.

A cache is a folder::

    writing.json            version, kind, temperature, guard and all else that shapes the shards; written first
    manifest.json           the same, and the number of positions and shards; written last
    00000.safetensors       the arrays of one contiguous range of flat positions
    00000.json              first, last (exclusive), sha256 and size of that file, and sums for the report

Flat positions are those of :class:`kdlib.corpus.Split`: position i predicts token i + 1; the last position of a document
predicts nothing and has an empty entry. Any safetensors reader opens a shard. JSON files carry a checksum of their content.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from kdlib.errors import KdlibError

VERSION = 1
DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "F16": np.float16, "F32": np.float32}


def id_dtype(vocabulary: int) -> type:
    """Smallest unsigned integer that holds every token id."""
    return np.uint16 if vocabulary <= 2**16 else np.uint32


def write_shard(
    folder: Path, number: int, first: int, last: int, arrays: dict[str, np.ndarray], sums: dict[str, float]
) -> None:
    """Write one shard and, after it is safely on disk, its description: a shard without one does not count."""
    name = f"{number:05d}"
    data = save({key: np.ascontiguousarray(value) for key, value in arrays.items()})
    _replace(folder / f"{name}.safetensors", data)
    about = {"first": first, "last": last, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "sums": sums}
    write_record(folder / f"{name}.json", about)


def write_record(path: Path, record: dict) -> None:
    """Write a JSON file whole or not at all, with the SHA-256 of its other entries as ``checksum``."""
    _replace(path, _sealed(record))


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


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
    mapped = np.memmap(path, np.uint8, "r", offset=8 + size)
    header.pop("__metadata__", None)
    return {
        key: mapped[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for key, entry in header.items()
    }
