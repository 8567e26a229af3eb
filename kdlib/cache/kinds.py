"""The kinds of target: how one is taken from teacher logits, what it costs on disk, and how it is read back.

*sampled*: N ids drawn with replacement from t = softmax(z / tau), kept as distinct ids with counts. count/N has expectation
t, so the gradient of the cross-entropy to it is unbiased (Anshumann et al. 2025, arXiv 2503.16870).

*topk*: the k largest probabilities and the exact mass left over, as a (k+1)-th outcome. Without that outcome the optimum of
the loss is t / a on the k ids (a: their mass), which is biased and overconfident.

Both keep the entropy of t, which turns a cross-entropy to the target into a KL, and the teacher's loss on the text itself.
"""

import numpy as np
import torch
from torch import Tensor

from kdlib.cache.shards import id_dtype

MAX_DRAWS = 255  # all may fall on one id, and a count is one byte


def bytes_per_token(kind: str, size: int, vocabulary: int) -> int:
    """Largest number of bytes one token can take on disk (draws may coincide and then take less)."""
    id_bytes = np.dtype(id_dtype(vocabulary)).itemsize
    statistics = 2 + 2
    if kind == "sampled":
        return 4 + size * (id_bytes + 1) + statistics
    return 4 + size * (id_bytes + 2) + statistics


def statistics(log_t: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Entropy of the kept distribution and negative log-likelihood of the text under it, nats.

    Kept in half precision; their exact values are for the shard's sums only.

    Args:
        log_t: [n, V] log-probabilities; labels: [n] next tokens.
    """
    entropy = torch.where(log_t.isneginf(), 0, -log_t.exp() * log_t).sum(-1)
    nll = -log_t.gather(1, labels[:, None])[:, 0]
    exact = {"entropy_exact": entropy.cpu().numpy(), "nll_exact": nll.cpu().numpy()}
    return exact | {"entropy": exact["entropy_exact"].astype(np.float16), "nll": exact["nll_exact"].astype(np.float16)}


def draw(log_t: Tensor, uniforms: Tensor) -> dict[str, np.ndarray]:
    """Distinct ids and counts of N draws a token, by inversion of the cumulative distribution.

    Args:
        log_t: [n, V] log-probabilities.
        uniforms: [n, N] in [0, 1), float64: the draws are a function of these alone, whatever the device or batch.

    Returns:
        ``lengths`` [n] distinct ids a token, ``ids`` and ``counts`` [sum of lengths], ascending ids within a token.
    """
    # In float32 a cumulative sum over the vocabulary drifts by more than the smallest probabilities.
    cumulative = log_t.double().exp().cumsum(-1)
    picks = uniforms.to(cumulative.device) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, picks, right=True).clamp_(max=log_t.shape[1] - 1)
    ids = ids.to(torch.int32).sort(-1).values.cpu().numpy()
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(first)
    return {
        "lengths": first.sum(1).astype(np.uint32),
        "ids": ids.reshape(-1)[starts].astype(id_dtype(log_t.shape[1])),
        "counts": np.diff(starts, append=ids.size).astype(np.uint8),
    }


def top_k(log_t: Tensor, k: int) -> dict[str, np.ndarray]:
    """The k largest log-probabilities, their ids, and the log of the mass that is left.

    Args:
        log_t: [n, V] log-probabilities, k < V.

    Returns:
        ``ids`` [n, k], ``log_probabilities`` [n, k] float16 in descending order, ``log_tail`` [n] float32.
    """
    values, ids = log_t.topk(k, dim=-1)
    # Summed directly over what is left: 1 - (sum of the kept) has no correct digit once the kept mass nears 1.
    tail = log_t.scatter(1, ids, -torch.inf).logsumexp(-1)
    return {
        "ids": ids.cpu().numpy().astype(id_dtype(log_t.shape[1])),
        "log_probabilities": values.to(torch.float16).cpu().numpy(),
        "log_tail": tail.float().cpu().numpy(),
    }


def read_sampled(shard: dict[str, np.ndarray], rows: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray, None]:
    """Padded ids and weights count/N of some rows of a mapped shard."""
    starts = shard["offsets"][rows].astype(np.int64)
    lengths = shard["offsets"][rows + 1].astype(np.int64) - starts
    columns = np.arange(max(1, lengths.max(initial=0)))
    used = columns < lengths[:, None]
    # Padding points at the row's first entry with weight 0, so every id is one that the row holds.
    at = np.where(used, starts[:, None] + columns, np.minimum(starts, max(0, len(shard["ids"]) - 1))[:, None])
    ids = shard["ids"][at] if len(shard["ids"]) else np.zeros(at.shape, np.uint16)
    counts = shard["counts"][at] if len(shard["counts"]) else np.zeros(at.shape, np.uint8)
    return ids, np.where(used, counts, 0).astype(np.float32) / np.float32(draws), None


def read_top_k(shard: dict[str, np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, probabilities and tail mass of some rows of a mapped shard; each row sums to one."""
    weights = np.exp(shard["log_probabilities"][rows].astype(np.float32))
    tail = np.exp(shard["log_tail"][rows])
    # Half-precision log-probabilities miss the kept mass by up to 1e-3; the tail, kept in float32, fixes it.
    weights *= ((1 - tail) / np.maximum(weights.sum(1), 1e-30))[:, None]
    return shard["ids"][rows], weights, tail
