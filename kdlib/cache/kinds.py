"""Kinds of target: how each is computed from teacher log-probabilities, and its size on disk.

*sampled*: N ids drawn with replacement from q ~ t^rho, t = softmax(z / tau). An id drawn c times has weight
(c / N) t / q, not renormalised: its expectation is t exactly, and so the gradient of the cross-entropy to it is unbiased
(Anshumann et al. 2025, arXiv 2503.16870). With rho = 1 the weight is c / N, kept without rounding. Others are rounded at random,
which leaves their expectation as it is (up to a largest weight, see :func:`kdlib.cache.encoding.round_weights`).

With stratified draws, the j-th comes from the j-th of N equal parts of the cumulative distribution of q. Expectations stay
the same, and no weighted sum over the vocabulary has a larger variance than with independent draws (Douc, Cappé & Moulines
2005, "Comparison of resampling schemes for particle filtering", arXiv cs/0507025, section 3.2): the count of a likely id
hardly varies.

*topk*: the k largest probabilities and the mass left over as a (k+1)-th outcome. Without that outcome the optimum of the
loss is t / a on the k ids, a being their total mass, which is biased and overconfident.

*topk_sampled*: the k largest probabilities, and N draws from the remaining ids, whose weights sum to the remaining mass.
Unbiased, and the k largest have no variance except that of rounding.

*dense*: the teacher's last hidden states. Together with its output layer, kept once, they give the whole distribution at
any temperature. They are the reference, and other kinds can be computed from them.

All kinds but dense are entries (id, weight), sorted by id within a token. Each token also has the entropy of t, which turns
a cross-entropy to the target into a KL divergence, and the teacher's loss on the text itself.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from kdlib.cache import encoding
from kdlib.errors import KdlibError

NAMES = ("sampled", "topk", "topk_sampled", "dense")
MAX_DRAWS = 255  # all may fall on one id, and a count is one byte
MAX_ENTRIES = 2**16 - 1  # of a token: their number takes at most two bytes


@dataclass(frozen=True)
class Kind:
    """A kind of target and its size.

    Attributes:
        name: one of ``NAMES``.
        draws: N, draws a token (sampled, topk_sampled).
        top_k: k (topk, topk_sampled).
        proposal: rho, exponent of the distribution drawn from (sampled, topk_sampled).
        stratified: whether each draw comes from its own part of that distribution (sampled, topk_sampled).
    """

    name: str
    draws: int = 0
    top_k: int = 0
    proposal: float = 1.0
    stratified: bool = False

    def __post_init__(self):
        if self.name not in NAMES:
            raise KdlibError(f"`kind` of targets must be one of {', '.join(NAMES)}, got {self.name!r}.")
        if self.draws_ids and not 1 <= self.draws <= MAX_DRAWS:
            raise KdlibError(
                f"`draws` must be in 1..{MAX_DRAWS}, since a count takes one byte, got {self.draws}. A few dozen are enough."
            )
        if self.keeps_top and not 1 <= self.top_k <= MAX_ENTRIES - self.draws * self.draws_ids:
            raise KdlibError(
                f"`top_k` must be at least 1, with at most {MAX_ENTRIES} entries a token, got {self.top_k}. A few dozen are enough."
            )
        if self.draws_ids and not 0 < self.proposal <= 1.5:
            raise KdlibError(
                f"`proposal` must be above 0 and at most 1.5, got {self.proposal}. 1 samples the teacher; less favours unlikely tokens."
            )

    @property
    def draws_ids(self) -> bool:
        """Whether targets depend on a seed."""
        return self.name in ("sampled", "topk_sampled")

    @property
    def keeps_top(self) -> bool:
        """Whether the k largest probabilities are always among the entries."""
        return self.name in ("topk", "topk_sampled")

    @property
    def counts(self) -> bool:
        """Whether weights are counts / draws."""
        return self.name == "sampled" and self.proposal == 1

    @property
    def weights(self) -> np.ndarray:
        """[256] float32: the weight that each code stands for."""
        return np.arange(256, dtype=np.float32) / np.float32(self.draws) if self.counts else encoding.LOG_WEIGHTS

    @property
    def most_entries(self) -> int:
        """Largest number of entries of a token."""
        return self.top_k * self.keeps_top + self.draws * self.draws_ids

    @property
    def length_type(self) -> np.dtype:
        """Integer type that holds a token's number of entries."""
        return np.dtype("<u1" if self.most_entries < 2**8 else "<u2")

    @property
    def uniforms(self) -> int:
        """Random numbers needed per token: one per draw, and one per entry whose weight is rounded stochastically."""
        return self.draws_ids * (self.draws + (0 if self.counts else self.most_entries))

    def describe(self) -> dict:
        """The fields that this kind reads, for a manifest."""
        read = {"draws": self.draws_ids, "top_k": self.keeps_top, "proposal": self.draws_ids}
        read["stratified"] = self.draws_ids and self.stratified
        return {name: value for name, value in asdict(self).items() if read.get(name, True)}


def bytes_per_token(kind: Kind, vocabulary: int, width: int) -> float:
    """Upper bound on the bytes per token on disk, without the fixed size of a shard (``shards.SHARD_BYTES``).

    An entry has a code of one byte, an octave with log2 V + 1 possible values, and a remainder. The m gaps of a token sum to
    at most V, so their remainders have at most m log2(V / m) bits together (Jensen: the logarithm is concave). The number of
    entries takes 1 or 2 bytes, entropy and loss 1 each, the remaining mass of topk 2, a hidden unit of dense 2. Deflate adds
    at most 0.1 % to incompressible bytes, and a frame has at most 128 bytes of overhead, 0.5 a token.
    """
    if kind.name == "dense":
        return 2 * width + 2
    m = kind.most_entries
    octave = math.ceil(math.log2(vocabulary.bit_length() + 1))
    # A token may have fewer than m entries, and m log2(V / m) peaks at m = V / e: the ratio counts as at least e.
    remainder = math.log2(max(vocabulary / m, math.e))
    return 2.5 + kind.length_type.itemsize + m * (1.001 + (octave + remainder) / 8) + 2 * (kind.name == "topk")


def statistics(log_t: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Entropy of t and negative log-likelihood of the text under it, nats, float64 [n].

    Args:
        log_t: [n, V] log-probabilities; labels: [n] next tokens.
    """
    entropy = torch.where(log_t.isneginf(), 0, -log_t.exp() * log_t).sum(-1)
    nll = -log_t.gather(1, labels[:, None])[:, 0]
    return {"entropy": entropy.double().cpu().numpy(), "nll": nll.double().cpu().numpy()}


def take(kind: Kind, log_t: Tensor, uniforms: Tensor | None) -> dict[str, np.ndarray]:
    """Compute the entries of n tokens: ``lengths`` [n], ``ids`` and ``codes`` [sum of lengths]; ``log_tail`` [n] for topk.

    Args:
        log_t: [n, V] log-probabilities.
        uniforms: [n, kind.uniforms] in [0, 1), float64. Targets depend on these and log_t only, not on the device or
            batch.

    Raises:
        KdlibError: top_k not below the vocabulary.
    """
    if kind.keeps_top and kind.top_k >= log_t.shape[1]:
        raise KdlibError(
            f"`top_k` must be below the vocabulary size {log_t.shape[1]}, got {kind.top_k}. For whole distributions use kind dense."
        )
    if kind.name == "topk":
        values, ids = log_t.topk(kind.top_k, dim=-1)
        return _rows(ids, encoding.round_weights(values.exp().cpu().numpy())) | {"log_tail": _rest(log_t, ids)[1]}
    drawn, rounding = uniforms[:, : kind.draws], uniforms[:, kind.draws :].numpy()
    if kind.stratified:
        drawn = (torch.arange(kind.draws) + drawn) / kind.draws
    if kind.counts:
        ids, counts, used = _draw(log_t, drawn, 1.0)
        return _entries(ids, counts.astype(np.uint8), used)
    if kind.name == "sampled":
        ids, weights, used = _weighted(log_t, drawn, kind.proposal)
        return _entries(ids, encoding.round_weights(weights, rounding), used)
    values, top = log_t.topk(kind.top_k, dim=-1)
    rest, log_mass = _rest(log_t, top)
    ids, weights, used = _weighted(rest - torch.from_numpy(log_mass).to(rest)[:, None], drawn, kind.proposal)
    weights = np.concatenate([values.double().exp().cpu().numpy(), weights * np.exp(log_mass)[:, None]], axis=1)
    ids = np.concatenate([top.cpu().numpy(), ids], axis=1)
    # Where the top k have all the mass, there was nothing to draw from.
    used = np.concatenate([np.ones(top.shape, bool), used & np.isfinite(log_mass)[:, None]], axis=1)
    return _entries(ids, encoding.round_weights(weights, rounding), used)


def take_top(
    kind: Kind, ids: np.ndarray, log_probabilities: np.ndarray, log_tail: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Compute the entries and statistics of n tokens when only the most likely next tokens are known.

    Args:
        kind: topk, with top_k at most K.
        ids, log_probabilities: [n, K], descending; log_tail: [n], log of the mass of all others; labels: [n].

    Returns:
        As :func:`take` and :func:`statistics`; the latter are of K + 1 outcomes, hence lower bounds.
    """
    k, listed = kind.top_k, np.exp(log_probabilities)
    tail = np.logaddexp(log_tail, np.logaddexp.reduce(log_probabilities[:, k:], axis=1, initial=-np.inf))
    at_label = ids == labels[:, None]
    nll = np.where(at_label.any(1), -np.where(at_label, log_probabilities, 0).sum(1), -log_tail)
    entropy = -(listed * log_probabilities).sum(1) - np.exp(log_tail) * np.where(np.isneginf(log_tail), 0, log_tail)
    kept = _entries(ids[:, :k], encoding.round_weights(listed[:, :k]), np.ones((len(ids), k), bool))
    return kept | {"log_tail": tail, "entropy": entropy, "nll": nll}


def _rest(log_t: Tensor, ids: Tensor) -> tuple[Tensor, np.ndarray]:
    # Summed directly over what is left: 1 - (sum of the kept) has no correct digit once the kept mass nears 1.
    rest = log_t.scatter(1, ids, -torch.inf)
    return rest, rest.double().logsumexp(-1).cpu().numpy()


def _weighted(log_t: Tensor, uniforms: Tensor, proposal: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As :func:`_draw`, with weights (c / N) t / q."""
    ids, counts, used = _draw(log_t, uniforms, proposal)
    log_q = torch.log_softmax(log_t.double() * proposal, dim=-1)
    at = torch.from_numpy(ids).to(log_t.device)
    ratio = (log_t.double().gather(1, at) - log_q.gather(1, at)).exp().cpu().numpy()
    return ids, np.where(used, counts * ratio, 0) / uniforms.shape[1], used


def _draw(log_t: Tensor, uniforms: Tensor, proposal: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N draws a token by inversion of the cumulative distribution of t^proposal.

    Returns:
        ids [n, N] in ascending order, counts [n, N] at an id's first place, and where those first places are.
    """
    # In float32 a cumulative sum over the vocabulary drifts by more than the smallest probabilities.
    log_t = log_t.double()
    cumulative = (log_t if proposal == 1 else torch.log_softmax(log_t * proposal, dim=-1)).exp().cumsum(-1)
    picks = uniforms.to(cumulative.device) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, picks, right=True).clamp_(max=log_t.shape[1] - 1).sort(-1).values.cpu().numpy()
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counts = np.zeros(ids.shape, np.int64)
    counts[first] = np.diff(np.flatnonzero(first), append=ids.size)
    return ids, counts, first


def _rows(ids: Tensor, codes: np.ndarray) -> dict[str, np.ndarray]:
    return _entries(ids.cpu().numpy(), codes, np.ones(codes.shape, bool))


def _entries(ids: np.ndarray, codes: np.ndarray, used: np.ndarray) -> dict[str, np.ndarray]:
    """Ragged rows sorted by id from [n, m] arrays; entries of weight 0 are left out."""
    used = used & (codes > 0)
    order = np.argsort(np.where(used, ids, np.iinfo(np.int64).max), axis=1)
    ids, codes, used = (np.take_along_axis(values, order, axis=1) for values in (ids, codes, used))
    return {"lengths": used.sum(1), "ids": ids[used], "codes": codes[used]}
