"""Write one pass of the teacher over a split, shard by shard. An interrupted writer continues where it stopped."""

import hashlib
import itertools
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from kdlib.cache import encoding, kinds
from kdlib.cache.external import FileTeacher, ServerTeacher, TopChunk
from kdlib.cache.shards import (
    FRAME,
    SHARD_BYTES,
    VERSION,
    check_shard,
    claimed_shard,
    describe_shard,
    pack_entries,
    read_record,
    remove_leftovers,
    replace,
    write_record,
    write_shard,
)
from kdlib.cache.teachers import DenseTeacher, ModelTeacher
from kdlib.data import corpus
from kdlib.errors import KdlibError
from kdlib.study.progress import bar


def write_targets(
    folder: Path,
    teacher: ModelTeacher | DenseTeacher | ServerTeacher | FileTeacher,
    split: corpus.Split,
    guard: dict,
    kind: kinds.Kind,
    temperature: float = 1.0,
    seed: int = 0,
    block_length: int = 256,
    shard_tokens: int = 65536,
) -> dict:
    """Write the targets of every position of ``split``.

    Several processes may write one cache on a shared disk: each skips the shards that another one is writing, and returns to
    them at the end. Shards are written atomically, and every process would write the same bytes.

    Args:
        folder: of the cache; finished shards written with the same arguments are kept.
        guard: what the targets depend on (see :func:`kdlib.cache.reader.guard`), stored in the manifest.
        temperature: of the stored distribution; 1 for kind dense, which supports every temperature.
        seed: of the draws.
        shard_tokens: approximate tokens in one shard, which ends with a whole window.

    Returns:
        format (its version), tokens, bytes, bytes_per_token, tokens_per_second of this pass (None if nothing was left to do), entries a token
        (None for dense), teacher entropy and loss in nats a token.

    Raises:
        KdlibError: a value out of range, a teacher whose vocabulary (for dense targets: guard) differs from the guard's, not
            enough disk for the largest possible size, a damaged shard, or other targets in ``folder``.
    """
    _check(teacher, kind, temperature, guard)
    windows = split.windows(block_length)
    shards = _parts(windows, shard_tokens)
    description = {
        "version": VERSION,
        "kind": kind.describe(),
        "temperature": temperature,
        "seed": seed if kind.draws_ids else None,
        "guard": guard,
        "block_length": block_length,
        "shard_tokens": shard_tokens,
        "precision": teacher.precision,
        "weights_sha256": teacher.fingerprint(),
        "length_type": kind.length_type.str,
    }
    head = None
    if kind.name == "dense":
        weight, bias = teacher.head
        head = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        head = save({name: np.ascontiguousarray(value.detach().float().cpu().numpy()) for name, value in head.items()})
        description["head_sha256"] = hashlib.sha256(head).hexdigest()
    largest = kinds.bytes_per_token(kind, teacher.vocabulary, teacher.width) * len(split.tokens)
    _claim(folder, description, largest + SHARD_BYTES * len(shards) + len(head or b""), len(shards))
    if head is not None:
        replace(folder / "head.safetensors", head)

    started, written, taken = time.perf_counter(), 0, []
    with bar(None, "writing targets", total=int(windows[:, 1].sum()), unit="token", unit_scale=True) as progress:
        # A process may have died while writing its shard, so shards that others had taken are tried again at the end.
        for number in itertools.chain(range(len(shards)), taken):
            with claimed_shard(folder, number) as free:
                if not free and number not in taken:
                    taken.append(number)
                    continue
                size = int(shards[number][:, 1].sum())
                if describe_shard(folder, number) is None:
                    first, last = _span(shards, number, len(split.tokens))
                    order, parts = _shard(teacher, split, shards[number], kind, temperature, seed, block_length)
                    frames = np.array([part[0, 0] for part in _parts(shards[number], FRAME)]) - first
                    frames[0] = 0
                    arrays, sums = _arrange(order, parts, kind, first, last, frames)
                    write_shard(folder, number, first, last, arrays, sums)
                    written += size
                progress.update(size)
    seconds = time.perf_counter() - started
    return _finish(folder, description, len(shards), len(split.tokens), written / seconds if written else None)


def _check(teacher: ModelTeacher | DenseTeacher | ServerTeacher | FileTeacher, kind: kinds.Kind, temperature: float, guard: dict) -> None:
    if kind.keeps_top and kind.top_k >= teacher.vocabulary:
        raise KdlibError(
            f"`top_k` must be in 1..{teacher.vocabulary - 1}, below the vocabulary size, got {kind.top_k}. For whole distributions use kind dense."
        )
    if not temperature > 0:
        raise KdlibError(f"`temperature` must be above 0, got {temperature}.")
    outside = isinstance(teacher, ServerTeacher | FileTeacher)
    if outside and (kind.name != "topk" or temperature != 1 or kind.top_k > teacher.top_k):
        raise KdlibError(
            f"`kind` for this teacher must be topk with top_k at most {teacher.top_k}, at temperature 1, got kind {kind.name}, "
            f"top_k {kind.top_k}, temperature {temperature}."
        )
    if kind.name == "dense" and (temperature != 1 or teacher.width is None):
        raise KdlibError(
            "Dense targets must have temperature 1 and a teacher with one output matrix, got "
            + (f"temperature {temperature}. They support any when read." if temperature != 1 else "an ensemble or others.")
        )
    if guard.get("vocabulary", teacher.vocabulary) != teacher.vocabulary:
        raise KdlibError(
            f"The teacher's vocabulary must have the corpus's {guard['vocabulary']} tokens, got {teacher.vocabulary}. Cut it down with "
            "kdlib.data.vocabulary.slice_model."
        )
    if isinstance(teacher, DenseTeacher) and teacher.cache.guard != guard:
        raise KdlibError(
            f"The dense targets must have the guard {guard}, got {teacher.cache.guard}. Write dense targets for this setting first."
        )


def _parts(windows: np.ndarray, tokens: int) -> list[np.ndarray]:
    # Of whole windows, so that a row of training text finds its targets in one shard or frame.
    ends = np.cumsum(windows[:, 1])
    return [part for part in np.split(windows, np.flatnonzero(np.diff(ends // tokens)) + 1) if len(part)]


def _span(shards: list[np.ndarray], number: int, positions: int) -> tuple[int, int]:
    # Ranges are contiguous: positions that predict nothing belong to the shard before them, so every position has a shard.
    first = 0 if number == 0 else int(shards[number][0, 0])
    return first, positions if number + 1 == len(shards) else int(shards[number + 1][0, 0])


def _claim(folder: Path, description: dict, largest: float, shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = read_record(folder / "writing.json")
    if found is not None and found != description:
        different = [key for key in description if found.get(key) != description[key]]
        raise KdlibError(
            f"{folder} must not have other targets; they differ in {', '.join(different)}: expected "
            f"{ {key: description[key] for key in different} }, got { {key: found.get(key) for key in different} }. Delete the folder first."
        )
    finished = [(number, about) for number in range(shards) if (about := describe_shard(folder, number))]
    for number, about in finished:
        check_shard(folder, number, about)
    free = shutil.disk_usage(folder).free
    needed = largest - sum(about["bytes"] for _, about in finished)
    if needed > free:
        raise KdlibError(
            f"{folder} must have up to {needed / 1e9:.2f} GB free for targets, got {free / 1e9:.2f} GB. Point KDLIB_HOME at a larger disk, "
            "or store fewer draws."
        )
    # Last, so that a refused folder can be claimed with other settings.
    write_record(folder / "writing.json", description)


def _shard(teacher, split, windows, kind, temperature, seed, block_length):
    """Flat positions and entries of one shard; a window's draws depend only on the seed and the window's start."""
    uniforms = _uniforms(windows, seed, kind.uniforms) if kind.draws_ids else None
    order, parts = [], []
    for chunk in teacher.chunks(split, corpus.pack(windows, block_length)):
        if isinstance(chunk, TopChunk):
            positions, labels, *top = chunk
            parts.append(kinds.take_top(kind, *top, labels))
            order.append(positions)
            continue
        positions, labels, logits, hidden = chunk
        log_t = torch.log_softmax(logits / temperature, dim=-1)
        if not torch.isfinite(log_t.gather(1, labels[:, None])).all():
            raise KdlibError(
                "The teacher's probabilities of the text must be finite, got non-finite ones. Check its weights and the precision."
            )
        if kind.name == "dense":
            kept = {"hidden": hidden.to(torch.float16).cpu().numpy()}
            if not np.isfinite(kept["hidden"]).all():
                raise KdlibError(
                    "The teacher's hidden states must be below 65504, the largest float16, got larger ones. Use a sparse kind."
                )
        else:
            kept = kinds.take(kind, log_t, uniforms and uniforms(positions))
        parts.append(kept | kinds.statistics(log_t, labels))
        order.append(positions)
    return np.concatenate(order), parts


def _uniforms(windows: np.ndarray, seed: int, numbers: int):
    starts = windows[:, 0]

    def at(positions: np.ndarray) -> torch.Tensor:
        # One counter-based stream per window, advanced to the position: the same numbers whatever the batch.
        out = np.empty((len(positions), numbers))
        window = np.searchsorted(starts, positions, side="right") - 1
        cuts = np.flatnonzero(np.diff(window) != 0) + 1
        for low, high in zip(np.r_[0, cuts], np.r_[cuts, len(positions)], strict=True):
            start = starts[window[low]]
            generator = np.random.Generator(
                np.random.PCG64([seed, int(start)]).advance(int(positions[low] - start) * numbers)
            )
            out[low:high] = generator.random((high - low, numbers))
        return torch.from_numpy(out)

    return at


def _arrange(
    positions: np.ndarray, parts: list[dict], kind: kinds.Kind, first: int, last: int, frames: np.ndarray
) -> tuple[dict, dict]:
    """Reorder entries from the order of computation to that of flat positions; empty where nothing is predicted."""
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    sums = {key: float(joined[key].sum()) for key in ("entropy", "nll")} | {"tokens": len(positions)}
    rows = positions - first

    def place(values: np.ndarray, empty=0) -> np.ndarray:
        placed = np.full((last - first, *values.shape[1:]), empty, values.dtype)
        placed[rows] = values
        return placed

    arrays = {key: place(encoding.code_nats(joined[key])) for key in ("entropy", "nll")}
    if kind.name == "dense":
        return arrays | {"hidden": place(joined["hidden"])}, sums
    if kind.name == "topk":
        arrays["log_tail"] = place(joined["log_tail"].astype(np.float16), -np.inf)
    lengths, starts = joined["lengths"], np.cumsum(joined["lengths"]) - joined["lengths"]
    # For each entry in the new order, its place in the old one: rows move, entries within a row keep their order.
    order = np.argsort(positions)
    shifts = np.repeat(starts[order] - (np.cumsum(lengths[order]) - lengths[order]), lengths[order])
    entries = np.arange(len(joined["ids"])) + shifts
    lengths = place(lengths.astype(kind.length_type))
    arrays |= pack_entries(lengths, joined["ids"][entries], joined["codes"][entries], frames)
    return arrays | {"weights": kind.weights}, sums | {"entries": len(entries)}


def _finish(folder: Path, description: dict, shards: int, positions: int, rate: float | None) -> dict:
    about = [describe_shard(folder, number) for number in range(shards)]
    sums = {key: sum(one["sums"][key] for one in about) for key in about[0]["sums"]}
    head = folder / "head.safetensors"
    size = sum(one["bytes"] for one in about) + (head.stat().st_size if "head_sha256" in description else 0)
    write_record(
        folder / "manifest.json", description | {"positions": positions, "shards": shards, "tokens": sums["tokens"]}
    )
    remove_leftovers(folder)
    return {
        "format": VERSION,
        "tokens": sums["tokens"],
        "bytes": size,
        "bytes_per_token": size / sums["tokens"],
        "tokens_per_second": rate,
        "distinct_ids_per_token": sums["entries"] / sums["tokens"] if "entries" in sums else None,
        "teacher_entropy": sums["entropy"] / sums["tokens"],
        "teacher_nll": sums["nll"] / sums["tokens"],
    }
