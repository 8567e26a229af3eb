"""Evaluate a model, or K members under a pool, on splits: NLL, accuracy and calibration, per document and per
position.

The decoder runs over a split once and its hidden states are kept; all else is passes of the output layer over chunks
of positions, so [positions, V] never exists, but for the calibration split's where it is small (:data:`KEPT`).
Log-probabilities are float32. Perplexity is exp(mean token NLL). Calibration is "pool first": one temperature, fitted
to the pooled distribution on the calibration split, serves all splits.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdlib.cache import TargetCache
from kdlib.data.corpus import Split, pack, predicting_positions
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.ensemble.pooling import POOLS, label_ambiguity, log_probs, logit_ambiguity, pool_of
from kdlib.errors import KdlibError
from kdlib.evaluation import TEMPERATURES, at_bound
from kdlib.evaluation.positions import hidden_states, routed_weights
from kdlib.evaluation.reliability import BINS, FIELDS, count, count_pairs, ece
from kdlib.losses.logits import head_logits
from kdlib.losses.reference import target_kl
from kdlib.models import extent, head, operations
from kdlib.study.work import Entry, entry

# Log-probabilities held at once, all members together; elsewhere 32 MiB of float32. On a CPU, larger ones leave the cache, and come
# from fresh pages.
CHUNK = {"cpu": 2**21}
KEPT = 2**29  # log-probabilities of the calibration split that are kept while its temperature is fitted: 2 GiB of float32


@dataclass(frozen=True)
class Evaluation:
    """What is stored of a model on its splits.

    ``metrics``: evaluation, temperature, domains, reliability and, for a pool, pool: for a split, the mean member's NLL, the best
    one's and the ambiguity of the two pools. Where members have weights it also has ``weights`` (of each, the mean over tokens),
    ``member_nll_weighted``, of which the pool's NLL is less by the ambiguity, and ``oracle_nll``, that of the likeliest member for
    each token, which no router can beat. ``documents``: a row per document with its summed ``nll`` (nats) and number of
    ``correct`` top-1 predictions. ``target_logprobs``: float16 [positions] a split, in split order. ``work``: FLOPs of a forward pass
    of all members over all splits (what fitting the temperature repeats of the output layer is not counted), and seconds.
    """

    metrics: dict[str, Any]
    documents: pd.DataFrame
    target_logprobs: dict[str, np.ndarray]
    work: Entry


def evaluate(
    models: nn.Module | Sequence[nn.Module],
    splits: Mapping[str, Split],
    block_length: int,
    pool: str | None = None,
    temperature: float | None = None,
    batch_size: int = 32,
    autocast: torch.dtype | None = None,
) -> Evaluation:
    """Evaluate one model, or a list of members under ``pool`` ("probability" or "logit"), on every split.

    An ``EnsembleForCausalLM`` stands for its members and its pool with its weights or router, uncalibrated. ``temperature``: None fits it on
    ``splits["calibration"]``. ``batch_size``: rows of ``block_length`` positions in one forward pass. ``autocast``:
    dtype of the matrix products, None for the models' own. Every module comes back in the mode (train or eval) it was
    in. Raises KdlibError for several models without a pool, unlike vocabularies, a missing calibration split, an
    empty split or a non-finite log-probability.
    """
    members, combined = _combined(models, pool)
    _refuse_unfit(members, splits, combined.name, temperature)
    found, started = {}, time.perf_counter()
    try:
        with torch.no_grad(), _evaluation_mode(members):
            for name in sorted(splits, key=lambda name: name != "calibration"):  # first: it sets the temperature
                split = splits[name]
                index = pack(split.windows(block_length), block_length)
                chunks = _chunks(members, split, index, batch_size, autocast, combined)
                if temperature is None:
                    temperature = fit_temperature(_passes(chunks))
                    _tell_of_bound(temperature)
                found[name] = _measure(name, chunks, temperature)
                del chunks
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    flops = sum(
        operations(member).forward(*extent(split.windows(block_length)[:, 1])) for member in members for split in splits.values()
    )
    return _report(splits, found, temperature, combined.name, entry(flops, time.perf_counter() - started))


def position_scores(
    model: nn.Module,
    split: Split,
    block_length: int,
    measure: Literal["nll", "entropy", "kl"],
    batch_size: int = 32,
    autocast: torch.dtype | None = None,
    cache: TargetCache | None = None,
) -> np.ndarray:
    """What a model or ensemble makes of every predicting position of a split, in split order: float32 [positions], nats.

    An ``EnsembleForCausalLM`` counts as the distribution p that it gives, calibrated.

    Args:
        measure: ``nll`` of the token that comes next, ``entropy`` of p, or ``kl``: KL(t || p) to the targets t in ``cache``, see
            :func:`kdlib.losses.reference.target_kl`.
        batch_size, autocast: as for :func:`evaluate`.
        cache: targets of this split (measure kl).
    """
    members, combined = _combined(model, None)
    temperature = model.config.calibration_temperature if isinstance(model, EnsembleForCausalLM) else 1.0
    _refuse_unfit(members, {split.name: split}, combined.name, 1.0)
    with torch.no_grad(), _evaluation_mode(members):
        index, found = pack(split.windows(block_length), block_length), []
        chunks = _chunks(members, split, index, batch_size, autocast, combined)
        positions = iter(torch.from_numpy(predicting_positions(split)).split(chunks.size))
        for (_, pooled, labels, _), here in zip(chunks, positions, strict=True):
            if temperature != 1:
                pooled = log_probs(pooled / temperature)
            if measure == "kl":
                found.append(target_kl(pooled, cache.read(here.numpy()).to(pooled.device), cache.temperature))
            else:
                found.append(-_at(pooled, labels) if measure == "nll" else -(pooled.exp() * pooled).sum(dim=-1))
    return torch.cat(found).float().cpu().numpy()


class _Combined(NamedTuple):
    """How members become one distribution: the pool's name, its weights and router; all None for a model alone."""

    name: str | None
    pool: Callable[..., Tensor] | None
    weights: Sequence[float] | None = None
    router: nn.Module | None = None


def _combined(models: nn.Module | Sequence[nn.Module], pool: str | None) -> tuple[list[nn.Module], _Combined]:
    """The members, and how they are pooled."""
    if isinstance(models, EnsembleForCausalLM):
        config, _ = models.config, models.pool  # which refuses a share of an ensemble
        # Weights are given with each chunk, where they are those of a router too.
        return list(models.members), _Combined(config.pool, pool_of(config.pool, config.exponent), config.weights, models.router)
    return [models] if isinstance(models, nn.Module) else list(models), _Combined(pool, POOLS.get(pool))


def _chunks(members: list[nn.Module], split: Split, index: np.ndarray, batch_size: int, autocast, combined: _Combined) -> "_Chunks":
    states = [hidden_states(member, split, index, batch_size, autocast) for member in members]
    targets = torch.from_numpy(split.tokens[predicting_positions(split) + 1].astype(np.int64))
    weights = None
    if combined.router is not None:
        weights = routed_weights(combined.router, split, index, batch_size).to(states[0].device)
    elif combined.weights is not None:
        weights = torch.tensor(combined.weights, device=states[0].device, dtype=torch.float64).expand(len(targets), -1)
    return _Chunks(states, [head(member) for member in members], targets.to(states[0].device), combined.pool, weights)


@dataclass
class _Chunks:
    """Iterates over the positions in chunks: members' log-probabilities [K, c, V], pooled [c, V], target ids [c], and weights of
    the members [K, c], or None.
    """

    states: list[Tensor]
    heads: list[tuple[Tensor, Tensor | None]]
    targets: Tensor
    pool: Callable[..., Tensor] | None
    weights: Tensor | None

    @property
    def size(self) -> int:
        """Positions in a chunk."""
        return max(1, CHUNK.get(self.targets.device.type, 2**23) // (len(self.heads) * len(self.heads[0][0])))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        layers = [
            (state, weight.to(state.dtype), bias) for state, (weight, bias) in zip(self.states, self.heads, strict=True)
        ]
        for start in range(0, len(self.targets), self.size):
            part = slice(start, start + self.size)
            members = torch.stack([log_probs(head_logits(state[part], *layer)) for state, *layer in layers])
            weights = None if self.weights is None else self.weights[part].T
            yield members, members[0] if self.pool is None else self.pool(members, weights=weights), self.targets[part], weights


def _passes(chunks: _Chunks) -> Callable[[], Iterable[tuple[Tensor, Tensor]]]:
    """What gives the pooled log-probabilities and target ids of all positions, pass by pass: kept after the first one if they fit."""
    if len(chunks.targets) * len(chunks.heads[0][0]) > KEPT:
        return lambda: ((pooled, targets) for _, pooled, targets, _ in chunks)
    kept = [(pooled, targets) for _, pooled, targets, _ in chunks]
    return lambda: kept


def fit_temperature(chunks: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> float:
    """The temperature T in [0.05, 20] that minimises the NLL of softmax(log p/T).

    ``chunks()`` gives (log-probabilities [c, V], target ids [c]) of all positions, anew for each pass. In β = 1/T the
    NLL is convex with slope Σ (E_β[log p] − log p(y)) and curvature Σ Var_β[log p], so Newton steps, kept in a
    bracket by bisection, converge in a handful of passes. (Temperature scaling: Guo et al. 2017, section 4.2.)
    """
    low, high, beta = 0.0, math.inf, 1.0
    while True:
        slope = curvature = 0.0
        for scores, targets in chunks():
            weighted = functional.softmax(beta * scores, dim=-1).mul_(scores)
            mean, square = weighted.sum(dim=-1), torch.einsum("cv,cv->c", weighted, scores)
            slope += (mean - _at(scores, targets)).sum(dtype=torch.float64).item()
            curvature += (square - mean.square()).sum(dtype=torch.float64).item()
        if not math.isfinite(slope):
            raise KdlibError(
                "Log-probabilities must be finite to fit a temperature, got NaN or infinity. Evaluate the model in float32, or train it "
                "with a lower learning rate."
            )
        if slope == 0:
            return 1 / beta
        low, high = (low, beta) if slope > 0 else (beta, high)
        newton = beta - slope / curvature if curvature > 0 else -math.copysign(math.inf, slope)
        newton = min(max(newton, 1 / TEMPERATURES[1]), 1 / TEMPERATURES[0])
        # Outside the bracket only if both its ends have been tried, or at an end of the range that was just tried.
        proposal = newton if low < newton < high or newton == beta else math.sqrt(low * high)
        if abs(proposal - beta) <= 1e-5 * beta:
            return 1 / proposal
        beta = proposal


def _tell_of_bound(temperature: float) -> None:
    if at_bound(temperature):
        low, high = TEMPERATURES
        print(f"The fitted temperature is at a bound of its range ({low:g} to {high:g}), got {temperature:.4g}: none calibrates this model.")


def _measure(name: str, chunks: _Chunks, temperature: float) -> dict[str, Any]:
    """One pass over a split, raw and calibrated from the same log-probabilities: positions, histograms, pool means."""
    device, n = chunks.targets.device, len(chunks.targets)
    histograms = {
        kind: {form: torch.zeros(3, BINS, dtype=torch.float64, device=device) for form in ("", "full_")}
        for kind in ("raw", "calibrated")
    }
    parts = {"raw": [], "calibrated": [], "correct": []}
    nll, ambiguity = (torch.zeros(size, dtype=torch.float64, device=device) for size in (len(chunks.states), 2))
    weighed = _Weighed(*torch.zeros(2, dtype=torch.float64, device=device), torch.zeros_like(nll))
    for members, pooled, targets, weights in chunks:
        hit = pooled.argmax(dim=-1) == targets
        parts["correct"].append(hit)
        for kind, scores in (("raw", pooled), ("calibrated", log_probs(pooled / temperature))):
            count(histograms[kind][""], scores.amax(dim=-1).exp(), hit)
            count_pairs(histograms[kind]["full_"], scores, targets)
            parts[kind].append(_at(scores, targets))
        if chunks.pool is not None:
            labels = members.gather(-1, targets.expand(len(members), -1)[..., None])[..., 0]
            nll -= labels.sum(dim=-1, dtype=torch.float64)
            gains = torch.stack([label_ambiguity(labels, weights), logit_ambiguity(members, weights)])
            ambiguity += gains.sum(dim=-1, dtype=torch.float64)
            if weights is not None:
                weighed.add(labels, weights)
    arrays = {kind: torch.cat(values).cpu().numpy() for kind, values in parts.items()}
    if not (np.isfinite(arrays["raw"]).all() and np.isfinite(arrays["calibrated"]).all()):
        raise KdlibError(
            f"Log-probabilities must be finite, got NaN or infinity on split {name!r}. Evaluate the model in float32, or train it with a "
            "lower learning rate."
        )
    reliability = {
        kind: {form + field: row.tolist() for form, h in forms.items() for field, row in zip(FIELDS, h, strict=True)}
        for kind, forms in histograms.items()
    }
    pool = {
        "member_nll_mean": nll.mean().item() / n,
        "member_nll_best": nll.min().item() / n,
        "ambiguity_probability": ambiguity[0].item() / n,
        "ambiguity_logit": ambiguity[1].item() / n,
    } | ({} if chunks.weights is None else weighed.means(n))
    return {**arrays, "reliability": reliability, "pool": pool}


@dataclass
class _Weighed:
    """Sums over positions where members have weights: of their weighted NLL, of the likeliest member's, and of the weights [K]."""

    nll: Tensor
    oracle: Tensor
    weights: Tensor

    def add(self, labels: Tensor, weights: Tensor) -> None:
        """Add positions: log-probabilities of the labels and weights, both [K, c]."""
        used = torch.where(weights > 0, weights * labels, 0.0)
        self.nll -= used.sum(dtype=torch.float64)
        self.oracle -= labels.amax(dim=0).sum(dtype=torch.float64)
        self.weights += weights.sum(dim=-1, dtype=torch.float64)

    def means(self, n: int) -> dict[str, float | list[float]]:
        """The means over ``n`` positions."""
        means = {"member_nll_weighted": self.nll, "oracle_nll": self.oracle, "weights": self.weights}
        return {name: (value / n).tolist() for name, value in means.items()}


def _at(scores: Tensor, targets: Tensor) -> Tensor:
    return scores.gather(-1, targets[:, None])[:, 0]


def _report(
    splits: Mapping[str, Split], found: Mapping[str, dict[str, Any]], temperature: float, pool: str | None, work: Entry
) -> Evaluation:
    """Sums by document, domain and split, in the schema that teachers, students and ensembles share."""
    tables = {name: _documents(name, split, found[name]) for name, split in splits.items()}
    metrics: dict[str, Any] = {"evaluation": {}, "temperature": temperature, "domains": {}, "reliability": {}}
    for name, table in tables.items():
        means, bins = _means(table), found[name]["reliability"]
        calibration = {"nll_calibrated": float(-found[name]["calibrated"].mean(dtype=np.float64))}
        for kind, suffix in (("raw", ""), ("calibrated", "_calibrated")):
            top, pairs = ([bins[kind][form + field] for field in FIELDS] for form in ("", "full_"))
            calibration |= {f"ece{suffix}": ece(*top), f"full_ece{suffix}": ece(*pairs, total=means["tokens"])}
        size = {"bytes": int(table["bytes"].sum()), "documents": len(table)}
        metrics["evaluation"][name] = means | {"perplexity": float(np.exp(means["nll"]))} | size | calibration
        metrics["domains"][name] = {domain: _means(part) for domain, part in table.groupby("domain", sort=True)}
        metrics["reliability"][name] = bins
    if pool is not None:
        metrics["pool"] = {name: found[name]["pool"] for name in splits}
    lowest = np.finfo(np.float16).min
    target_logprobs = {name: np.maximum(found[name]["raw"], lowest).astype(np.float16) for name in splits}
    return Evaluation(metrics, pd.concat(tables.values(), ignore_index=True), target_logprobs, work)


def _documents(name: str, split: Split, found: Mapping[str, Any]) -> pd.DataFrame:
    tokens = np.diff(split.offsets) - 1
    document = np.repeat(np.arange(len(tokens)), tokens)
    table = split.documents[["document", "source", "domain"]].reset_index(drop=True)
    table.insert(0, "split", name)
    return table.assign(
        tokens=tokens,
        bytes=split.documents["bytes"].to_numpy(),
        nll=np.bincount(document, -found["raw"].astype(np.float64), minlength=len(tokens)),
        correct=np.bincount(document, found["correct"], minlength=len(tokens)).astype(np.int64),
    )


def _means(documents: pd.DataFrame) -> dict[str, float | int]:
    """Means over the tokens of some documents; bits per byte = Σ nll/(ln 2 · Σ bytes)."""
    nll, tokens, size, correct = (documents[column].sum() for column in ("nll", "tokens", "bytes", "correct"))
    return {
        "nll": float(nll / tokens),
        "bits_per_byte": float(nll / (math.log(2) * size)),
        "accuracy": float(correct / tokens),
        "tokens": int(tokens),
    }


@contextmanager
def _evaluation_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode inside; then every module gets its own flag back, also where models share modules."""
    flags = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _refuse_unfit(
    members: list[nn.Module], splits: Mapping[str, Split], pool: str | None, temperature: float | None
) -> None:
    if not members or pool not in (None, *POOLS) or (pool is None and len(members) > 1):
        raise KdlibError(
            f"Several models must have a pool of {sorted(POOLS)}, and one model none, got {len(members)} with pool {pool!r}. Name "
            "the pool, or evaluate models one by one."
        )
    vocabularies = sorted({len(head(member)[0]) for member in members})
    if len(vocabularies) > 1:
        raise KdlibError(
            f"Members of a pool must share one vocabulary, got output layers of {vocabularies} tokens. Use members "
            "trained with one tokenizer."
        )
    if temperature is None and "calibration" not in splits:
        raise KdlibError(
            f"Splits must include calibration to fit the temperature, got {list(splits)}. Add it, or pass `temperature`."
        )
    for name, split in splits.items():
        if len(split.tokens) <= len(split.documents):
            raise KdlibError(f"Split {name!r} must have tokens to predict, got none. Give it documents, or leave it out.")
        if split.tokens.max() >= vocabularies[0]:
            raise KdlibError(
                f"Tokens of split {name!r} must be below the model's {vocabularies[0]}, got {split.tokens.max()}. Evaluate the model on "
                "its own corpus."
            )
