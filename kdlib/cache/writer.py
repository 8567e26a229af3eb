"""One pass of the teacher over a split, kept on disk shard by shard. A killed writer goes on where it stopped."""

import shutil
import time
from pathlib import Path

import numpy as np
import torch

from kdlib import corpus, models
from kdlib.cache import kinds
from kdlib.cache.shards import VERSION, check_shard, describe_shard, read_record, write_record, write_shard
from kdlib.errors import KdlibError
from kdlib.progress import bar

# Logits held at a time: a few dozen tokens on a CPU, so that they stay in its caches.
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**28}


def write_targets(
    folder: Path,
    model: torch.nn.Module,
    split: corpus.Split,
    guard: dict,
    kind: str,
    size: int,
    temperature: float = 1.0,
    seed: int = 0,
    block_length: int = 256,
    batch_rows: int = 8,
    shard_tokens: int = 65536,
    autocast: torch.dtype | None = None,
) -> dict:
    """Write the targets of every position of ``split``.

    Args:
        folder: of the cache; finished shards in it are kept if they were written with the same arguments.
        model: causal LM, put in eval mode for the pass.
        guard: what the targets depend on (see :func:`kdlib.cache.reader.guard`), kept in the manifest.
        kind: "sampled" (size = draws a token, at most 255) or "topk" (size = k).
        temperature: of the distribution kept.
        shard_tokens: flat positions in one shard, at least (shards end at window ends).
        autocast: dtype of the teacher's matrix products, None for float32.

    Returns:
        tokens, bytes, bytes_per_token, tokens_per_second of this pass (None if nothing was left to do), distinct ids a token,
        teacher entropy and loss in nats a token.

    Raises:
        KdlibError: a value out of range, a teacher of another vocabulary than the guard's, not enough disk for the largest
            possible size, a damaged shard, or ``folder`` holds other targets.
    """
    head_weight, _ = models.head(model)
    vocabulary = head_weight.shape[0]
    _check(kind, size, temperature, vocabulary, guard)
    windows = split.windows(block_length)
    shards = _shards(windows, shard_tokens)
    description = {
        "version": VERSION,
        "kind": kind,
        "size": size,
        "temperature": temperature,
        "seed": seed,
        "guard": guard,
        "block_length": block_length,
        "shard_tokens": shard_tokens,
        "precision": str(autocast or torch.float32),
    }
    _claim(folder, description, kinds.bytes_per_token(kind, size, vocabulary) * len(split.tokens), len(shards))

    training = {module: module.training for module in model.modules()}
    model.eval()
    started, written = time.perf_counter(), 0
    try:
        with bar(None, "writing targets", total=int(windows[:, 1].sum()), unit="token", unit_scale=True) as progress:
            for number, mine in enumerate(shards):
                if describe_shard(folder, number) is None:
                    first, last = _span(shards, number, len(split.tokens))
                    positions, parts = _shard(
                        model, split, mine, kind, size, temperature, seed, block_length, batch_rows, autocast
                    )
                    arrays, sums = _arrange(positions, parts, kind, first, last)
                    write_shard(folder, number, first, last, arrays, sums)
                    written += int(mine[:, 1].sum())
                progress.update(int(mine[:, 1].sum()))
    finally:
        for module, mode in training.items():
            module.training = mode
    seconds = time.perf_counter() - started
    return _finish(folder, description, len(shards), len(split.tokens), written / seconds if written else None)


def _check(kind: str, size: int, temperature: float, vocabulary: int, guard: dict) -> None:
    if kind not in ("sampled", "topk"):
        raise KdlibError(f"Unknown kind of targets {kind!r}. Expected sampled or topk.")
    if kind == "sampled" and not 1 <= size <= kinds.MAX_DRAWS:
        raise KdlibError(
            f"draws must lie in 1..{kinds.MAX_DRAWS}, since a count takes one byte; found {size}. A few dozen are enough."
        )
    if kind == "topk" and not 1 <= size < vocabulary:
        raise KdlibError(
            f"top_k must lie in 1..{vocabulary - 1}, below the vocabulary; found {size}. For whole distributions use objective online_kd."
        )
    if not temperature > 0:
        raise KdlibError(f"The temperature must be above 0; found {temperature}.")
    if guard.get("vocabulary", vocabulary) != vocabulary:
        raise KdlibError(
            f"The teacher predicts {vocabulary} tokens but the targets are for a vocabulary of {guard['vocabulary']}. Teacher and "
            "student must share one: cut the teacher down to the corpus's tokens (kdlib.vocabulary.slice_model)."
        )


def _shards(windows: np.ndarray, shard_tokens: int) -> list[np.ndarray]:
    ends = np.cumsum(windows[:, 1])
    return [part for part in np.split(windows, np.flatnonzero(np.diff(ends // shard_tokens)) + 1) if len(part)]


def _span(shards: list[np.ndarray], number: int, positions: int) -> tuple[int, int]:
    # Ranges touch, so positions that predict nothing belong to the shard before them and every position has a shard.
    first = 0 if number == 0 else int(shards[number][0, 0])
    return first, positions if number + 1 == len(shards) else int(shards[number + 1][0, 0])


def _claim(folder: Path, description: dict, largest: int, shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = read_record(folder / "writing.json")
    if found is not None and found != description:
        different = [key for key in description if found.get(key) != description[key]]
        raise KdlibError(
            f"{folder} holds part of other targets; they differ in {', '.join(different)}: expected "
            f"{ {key: description[key] for key in different} }, found { {key: found.get(key) for key in different} }. Delete the folder first."
        )
    finished = [(number, about) for number in range(shards) if (about := describe_shard(folder, number))]
    for number, about in finished:
        check_shard(folder, number, about)
    free = shutil.disk_usage(folder).free
    needed = largest - sum(about["bytes"] for _, about in finished)
    if needed > free:
        raise KdlibError(
            f"The targets may take up to {needed / 1e9:.2f} GB in {folder}, which has {free / 1e9:.2f} GB free. Make room, point "
            "KDLIB_HOME at a larger disk, or keep fewer draws (or a smaller k) a token."
        )
    # Last, so that a refused folder can be claimed with other settings.
    write_record(folder / "writing.json", description)


def _shard(model, split, windows, kind, size, temperature, seed, block_length, batch_rows, autocast):
    """Flat positions and entries of one shard; a window's draws depend on the seed and on where it starts, on nothing else."""
    device = next(model.parameters()).device
    body = models.body(model)
    weight, bias = models.head(model)
    index = corpus.pack(windows, block_length)
    uniforms = _uniforms(windows, seed, size) if kind == "sampled" else None
    order, parts = [], []
    with torch.inference_mode():
        for start in range(0, len(index), batch_rows):
            at = index[start : start + batch_rows]
            rows = {name: torch.from_numpy(value).to(device) for name, value in corpus.rows(split, at).items()}
            mask = models.attention_mask(rows["segments"], next(model.parameters()).dtype)
            with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                hidden = body(
                    input_ids=rows["input_ids"], position_ids=rows["position_ids"], attention_mask=mask, use_cache=False
                ).last_hidden_state
            used = rows["labels"] >= 0
            hidden, labels, positions = hidden[used], rows["labels"][used], at[used.cpu().numpy()]
            step = max(1, CHUNK_ELEMENTS.get(device.type, 2**21) // len(weight))
            for low in range(0, len(labels), step):
                chunk = slice(low, low + step)
                with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                    logits = torch.nn.functional.linear(hidden[chunk], weight, bias)
                log_t = torch.log_softmax(logits.float() / temperature, dim=-1)
                if not torch.isfinite(log_t.gather(1, labels[chunk, None])).all():
                    raise KdlibError(
                        "The teacher gives a non-finite probability to the text; its weights or the precision are at fault."
                    )
                kept = kinds.draw(log_t, uniforms(positions[chunk])) if kind == "sampled" else kinds.top_k(log_t, size)
                parts.append(kept | kinds.statistics(log_t, labels[chunk]))
                order.append(positions[chunk])
    return np.concatenate(order), parts


def _uniforms(windows: np.ndarray, seed: int, draws: int):
    starts = windows[:, 0]

    def at(positions: np.ndarray) -> torch.Tensor:
        # One counter-based stream per window, advanced to the position: any batch asks for the same numbers.
        out = np.empty((len(positions), draws))
        window = np.searchsorted(starts, positions, side="right") - 1
        cuts = np.flatnonzero(np.diff(window) != 0) + 1
        for low, high in zip(np.r_[0, cuts], np.r_[cuts, len(positions)], strict=True):
            start = starts[window[low]]
            generator = np.random.Generator(
                np.random.PCG64([seed, int(start)]).advance(int(positions[low] - start) * draws)
            )
            out[low:high] = generator.random((high - low, draws))
        return torch.from_numpy(out)

    return at


def _arrange(positions: np.ndarray, parts: list[dict], kind: str, first: int, last: int) -> tuple[dict, dict]:
    """Entries in the order they were computed -> arrays in the order of flat positions, empty where nothing is predicted."""
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    entropy, nll = (joined.pop(key).astype(np.float64).sum() for key in ("entropy_exact", "nll_exact"))
    order = np.argsort(positions)
    rows = positions[order] - first
    arrays = {}
    if kind == "sampled":
        lengths = joined.pop("lengths").astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        sizes = np.zeros(last - first, np.uint32)
        sizes[rows] = lengths[order]
        arrays["offsets"] = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint32)
        entries = np.concatenate(
            [np.arange(low, low + n) for low, n in zip(starts[order], lengths[order], strict=True)]
        )
        arrays |= {key: joined.pop(key)[entries] for key in ("ids", "counts")}
    for key, values in joined.items():
        empty = -np.inf if key.startswith("log_") else 0
        arrays[key] = np.full((last - first, *values.shape[1:]), empty, values.dtype)
        arrays[key][rows] = values[order]
    distinct = len(arrays["ids"]) if kind == "sampled" else joined["ids"].size
    return arrays, {"tokens": len(positions), "distinct": int(distinct), "entropy": float(entropy), "nll": float(nll)}


def _finish(folder: Path, description: dict, shards: int, positions: int, rate: float | None) -> dict:
    about = [describe_shard(folder, number) for number in range(shards)]
    sums = {key: sum(one["sums"][key] for one in about) for key in about[0]["sums"]}
    size = sum(one["bytes"] for one in about)
    write_record(
        folder / "manifest.json", description | {"positions": positions, "shards": shards, "tokens": sums["tokens"]}
    )
    return {
        "tokens": sums["tokens"],
        "bytes": size,
        "bytes_per_token": size / sums["tokens"],
        "tokens_per_second": rate,
        "distinct_ids_per_token": sums["distinct"] / sums["tokens"],
        "teacher_entropy": sums["entropy"] / sums["tokens"],
        "teacher_nll": sums["nll"] / sums["tokens"],
    }
