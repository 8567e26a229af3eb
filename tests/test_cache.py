"""Cached targets: unbiased draws, exact tails, every byte guarded, and a killed writer that leaves no trace.

Statistics are compared at a false-alarm rate of 1e-6 a test; seeds are fixed, so a test that passes stays passing.
"""

import ast
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from bisect import bisect_right
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy import stats
from tiny import BLOCK, VOCABULARY, contents, dense_log_probs, die_at, exit_code, make_model, make_split, predicting

from kdlib import models
from kdlib.cache import (
    DenseTeacher,
    Kind,
    ModelTeacher,
    TargetCache,
    encoding,
    kinds,
    reader,
    shards,
    write_targets,
    writer,
)
from kdlib.cache.reader import guard
from kdlib.cache.writer import _uniforms
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.losses import DenseTargets, SparseTargets, linear_distillation_loss

FALSE_ALARM = 1e-6
Z = stats.norm.isf(FALSE_ALARM / 2)
LARGEST_UNIFORM = 1 - 2.0**-53
TABLE = encoding.LOG_WEIGHTS.astype(np.float64)
SAMPLED, TOPK, DENSE = Kind("sampled", draws=50), Kind("topk", top_k=7), Kind("dense")
IMPORTANCE = Kind("sampled", draws=20, proposal=0.8)
STRATIFIED = Kind("sampled", draws=50, stratified=True)
HYBRID = Kind("topk_sampled", draws=10, top_k=4, proposal=0.9)
SPARSE = {"sampled": SAMPLED, "importance": IMPORTANCE, "stratified": STRATIFIED, "topk": TOPK, "topk_sampled": HYBRID}
KINDS = SPARSE | {"dense": DENSE}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_sparse_kind = pytest.mark.parametrize("kind", SPARSE.values(), ids=SPARSE)


@pytest.fixture
def small_frames(monkeypatch):
    """Frames of about 7 tokens: a tiny shard has some."""
    monkeypatch.setattr(writer, "FRAME", 7)


def guard_of(split, teacher="teacher-1", block_length=BLOCK):
    return guard(split, "tokenizer-1", VOCABULARY, block_length, teacher)


def write(folder, kind=SAMPLED, model=None, split=None, teacher=None, autocast=None, batch_rows=8, **changes):
    """Targets of a tiny split in several shards."""
    split = split or make_split()
    teacher = teacher or ModelTeacher(model or make_model(0), autocast, batch_rows)
    settings = {"guard": guard_of(split), "block_length": BLOCK, "shard_tokens": 60} | changes
    return write_targets(folder, teacher, split, kind=kind, **settings)


def read(folder, split=None, temperature=1.0):
    return TargetCache(folder, guard_of(split or make_split()), temperature)


def dense(targets, vocabulary=VOCABULARY):
    """[T, V] float64 of what sparse targets hold, without the tail."""
    out = torch.zeros(len(targets), vocabulary, dtype=torch.float64)
    return out.scatter_add_(1, targets.ids, targets.weights.double())


def sparse(kind, log_t, uniforms):
    """Targets as they are taken, not written, in float64: row for row of ``uniforms``, all of one distribution [V]."""
    rows = log_t.expand(len(log_t) if uniforms is None else len(uniforms), -1)
    taken = kinds.take(kind, rows, uniforms)
    used = np.arange(max(1, taken["lengths"].max())) < taken["lengths"][:, None]
    ids, weights = np.zeros(used.shape, np.int64), np.zeros(used.shape)
    ids[used], weights[used] = taken["ids"], kind.weights.astype(np.float64)[taken["codes"]]
    entropy = -torch.xlogy(rows.exp(), rows.exp()).sum(1)
    return SparseTargets(torch.from_numpy(ids), torch.from_numpy(weights), None, entropy, 1.0)


def expected(kind, log_t, split, seed=0):
    """[predicting positions, V]: what the cache of a teacher that says ``log_t`` [positions, V] must hold."""
    where = predicting(split)
    uniforms = _uniforms(split.windows(BLOCK), seed, kind.uniforms)(where) if kind.draws_ids else None
    return dense(sparse(kind, log_t[where].float(), uniforms))


def shares(weight):
    """The table's values around a weight, and the probability with which rounding at random takes the upper one."""
    upper = np.searchsorted(TABLE, weight, side="right")
    low, high = TABLE[upper - 1], TABLE[upper]
    return low, high, (weight - low) / (high - low)


def proposal_of(kind, t):
    """Where ids are drawn from: t without its head [.., V], and the distribution q of the draws."""
    rest = np.array(t)
    if kind.keeps_top:
        np.put_along_axis(rest, np.argsort(-t, axis=-1)[..., : kind.top_k], 0, axis=-1)
    q = np.where(rest > 0, np.maximum(rest, 1e-300) ** kind.proposal, 0)
    return rest, q / q.sum(-1, keepdims=True)


def variance(kind, t):
    """Exact variance of each id's weight [.., V]: counts are binomial, and rounding at random adds (high - w)(w - low)."""
    rest, q = proposal_of(kind, t)
    counts = np.arange(kind.draws + 1)
    weights = counts / kind.draws * np.where(q > 0, rest / np.maximum(q, 1e-300), 0)[..., None]

    def rounding(weight):
        low, high, _ = shares(weight)
        return 0 if kind.counts else (high - weight) * (weight - low)

    drawn = (stats.binom.pmf(counts, kind.draws, q[..., None]) * (weights**2 + rounding(weights))).sum(-1) - rest**2
    return drawn + rounding(t - rest)


# Draws


def pooled_chi_square(counts, expected):
    """Pearson's statistic and its degrees of freedom; cells that expect fewer than five are taken together."""
    rare = expected < 5
    counts = np.r_[counts[~rare], counts[rare].sum()]
    expected = np.r_[expected[~rare], expected[rare].sum()]
    used = expected > 0
    return ((counts - expected)[used] ** 2 / expected[used]).sum(), used.sum() - 1


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_draws_have_the_frequencies_of_the_teachers_distribution(tmp_path, temperature):
    # Short documents of many lengths are packed in another order than they stand in.
    model, split, writes, kind = make_model(0), make_split(documents=8, longest=12), 24, Kind("sampled", draws=255)
    where = predicting(split)
    counts = np.zeros((len(where), VOCABULARY))
    for seed in range(writes):
        write(tmp_path / str(seed), kind, model, split, seed=seed, temperature=temperature)
        counts += dense(read(tmp_path / str(seed), split, temperature).read(where)).numpy() * 255
    t = dense_log_probs(model, split, temperature)[where].exp().numpy()
    found = np.array([pooled_chi_square(*row) for row in zip(counts, t * 255 * writes, strict=True)])
    statistic, freedom = found.sum(0)
    assert freedom > 500
    assert stats.chi2.ppf(FALSE_ALARM / 2, freedom) < statistic < stats.chi2.isf(FALSE_ALARM / 2, freedom)


WEIGHTED = [
    *(Kind("sampled", draws=100, proposal=proposal) for proposal in (0.5, 0.8, 1.3)),
    *(Kind("topk_sampled", draws=60, top_k=5, proposal=proposal) for proposal in (0.8, 1.0)),
]


@pytest.mark.parametrize("kind", WEIGHTED, ids=lambda kind: f"{kind.name} {kind.proposal}")
def test_weighted_targets_have_the_teachers_distribution_as_their_mean_with_the_variance_of_theory(tmp_path, kind):
    model, split, writes = make_model(0), make_split(documents=8, longest=12), 24
    where = predicting(split)
    total = np.zeros((len(where), VOCABULARY))
    for seed in range(writes):
        write(tmp_path / str(seed), kind, model, split, seed=seed)
        total += dense(read(tmp_path / str(seed), split).read(where)).numpy()
    t = dense_log_probs(model, split)[where].exp().numpy()
    # Cells with so many draws that their sum is normal far out into its tails.
    rest, q = proposal_of(kind, t)
    often = (rest == 0) | (q * kind.draws * writes > 100)
    z = ((total / writes - t) / np.sqrt(variance(kind, t) / writes))[often]
    assert len(z) > 200
    assert np.abs(z).max() < stats.norm.isf(FALSE_ALARM / 2 / len(z))
    # Each position's cells depend on one another, positions do not.
    positions = [part for part in np.split((z**2), np.cumsum(often.sum(1))[:-1]) if len(part)]
    means = np.array([part.mean() for part in positions])
    assert abs(means.mean() - 1) < Z * means.std() / len(means) ** 0.5


def test_every_draw_of_every_position_has_a_number_of_its_own_whatever_batch_asks():
    split, draws = make_split(), 50
    windows, where = split.windows(BLOCK), predicting(split)
    whole = _uniforms(windows, 3, draws)(where).numpy()
    assert len(np.unique(whole)) == whole.size
    assert stats.kstest(whole.reshape(-1), "uniform").pvalue > FALSE_ALARM
    for part in np.array_split(np.arange(len(where)), 11):
        later = windows[windows[:, 0] + windows[:, 1] > where[part[0]]]
        assert np.array_equal(_uniforms(later, 3, draws)(where[part]).numpy(), whole[part])
    assert not np.isin(_uniforms(windows, 4, draws)(where).numpy(), whole).any()


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("proposal", [1.0, 0.7])
def test_draws_are_the_inverse_of_the_cumulative_distribution(proposal, stratified):
    generator = torch.Generator().manual_seed(0)
    log_t = torch.log_softmax(3 * torch.randn(300, 40, generator=generator), -1)
    kind = Kind("sampled", draws=30, proposal=proposal, stratified=stratified)
    uniforms = torch.rand(300, kind.uniforms, generator=generator, dtype=torch.float64)
    taken = kinds.take(kind, log_t, uniforms)
    if stratified:
        uniforms = (torch.arange(kind.uniforms) + uniforms) / 30
    ends = np.cumsum(taken["lengths"])
    for row, end in enumerate(ends):
        edges = list(itertools.accumulate(math.exp(proposal * value) for value in log_t[row].tolist()))
        by_hand = Counter(bisect_right(edges, uniform * edges[-1]) for uniform in uniforms[row, :30].tolist())
        part = slice(end - taken["lengths"][row], end)
        found = dict(zip(taken["ids"][part].tolist(), taken["codes"][part].tolist(), strict=True))
        assert found.keys() == by_hand.keys()
        assert (np.diff(taken["ids"][part]) > 0).all()  # in ascending id
        for token, count in by_hand.items():
            if kind.counts:
                assert found[token] == count and kind.weights[found[token]] == np.float32(count / 30)
            else:
                weight = count / 30 * math.exp((1 - proposal) * log_t[row, token].item()) * edges[-1]
                low, high, _ = shares(weight)
                assert TABLE[found[token]] in (low, high)


DISTRIBUTION = np.array([1, 0, 5, 0, 3, 7]) / 16
UNBIASED = [
    *(Kind("sampled", draws=2, proposal=proposal) for proposal in (0.5, 0.8, 1.0, 1.3)),
    *(Kind("topk_sampled", draws=2, top_k=2, proposal=proposal) for proposal in (0.5, 1.0, 1.3)),
    *(Kind("sampled", draws=4, proposal=proposal, stratified=True) for proposal in (0.8, 1.0)),
    Kind("topk_sampled", draws=2, top_k=2, stratified=True),
]
every_unbiased_kind = pytest.mark.parametrize(
    "kind", UNBIASED, ids=lambda kind: f"{kind.name} {kind.proposal}{' stratified' * kind.stratified}"
)


def picks_of(kind, q):
    """For each draw, what it can pick: (id, a number that picks it, its probability)."""
    edges = np.cumsum(q)
    if not kind.stratified:
        return [[(pick, edges[pick] - q[pick] / 2, q[pick]) for pick in np.flatnonzero(q)]] * kind.draws
    parts = []
    for part in range(kind.draws):
        low = np.maximum(edges - q, part / kind.draws)
        width = np.minimum(edges, (part + 1) / kind.draws) - low
        within = [pick for pick in range(len(q)) if width[pick] > 1e-12]
        at = (low + width / 2) * kind.draws - part
        parts.append([(pick, at[pick], width[pick] * kind.draws) for pick in within])
    return parts


def outcomes(kind, t):
    """Uniforms [R, kind.uniforms] that bring about every outcome of draws and rounding once, and its probability [R]."""
    rest, q = proposal_of(kind, t)
    head = np.argsort(-t)[: kind.top_k * kind.keeps_top]
    rows, probabilities = [], []
    for outcome in itertools.product(*picks_of(kind, q)):
        picks, drawn, chances = zip(*outcome, strict=True)
        chance = np.prod(chances)
        # Draws are rounded at the first place of their id among the sorted draws, after the head.
        ids, places, counts = np.unique(np.sort(picks), return_index=True, return_counts=True)
        weights = np.r_[t[head], counts / kind.draws * rest[ids] / q[ids]]
        slots = np.r_[np.arange(len(head)), len(head) + places]
        up = [() for _ in slots] if kind.counts else shares(weights)[2]
        for rounded in [()] if kind.counts else itertools.product((True, False), repeat=len(slots)):
            rounding = np.zeros(kind.uniforms - kind.draws)
            if rounded:
                rounding[slots] = np.where(rounded, 0, LARGEST_UNIFORM)
            rows.append(np.r_[drawn, rounding])
            probabilities.append(chance * (np.prod(np.where(rounded, up, 1 - up)) if rounded else 1))
    return torch.from_numpy(np.array(rows)), np.array(probabilities)


@every_unbiased_kind
def test_over_all_outcomes_of_draws_and_rounding_the_mean_target_is_the_teachers_distribution(kind):
    uniforms, probabilities = outcomes(kind, DISTRIBUTION)
    assert probabilities.sum() == pytest.approx(1, abs=1e-14)
    found = dense(sparse(kind, torch.from_numpy(DISTRIBUTION).log(), uniforms), 6).numpy()
    assert np.abs(probabilities @ found - DISTRIBUTION).max() < 1e-14
    assert np.abs(found - DISTRIBUTION).max() > 0.02  # a single outcome is not the mean


@pytest.mark.parametrize("proposal", [0.8, 1.0])
def test_stratified_draws_give_no_weighted_sum_more_variance_and_a_likely_id_far_less(proposal):
    sums = np.random.default_rng(0).normal(size=(6, 50))

    def variances(stratified, functionals):
        kind = Kind("sampled", draws=4, proposal=proposal, stratified=stratified)
        uniforms, probabilities = outcomes(kind, DISTRIBUTION)
        found = dense(sparse(kind, torch.from_numpy(DISTRIBUTION).log(), uniforms), 6).numpy() @ functionals
        return probabilities @ (found - probabilities @ found) ** 2

    # Rounding at random comes on top, and differs a little with the counts that occur.
    allowance = 0 if proposal == 1 else 0.02
    assert (variances(True, sums) <= variances(False, sums) * (1 + allowance)).all()
    likeliest = np.eye(6)[:, [5]]
    assert variances(True, likeliest) < 0.6 * variances(False, likeliest)


def toy(rows, seed=0):
    """Hidden states [rows, 5], output weights [V, 5] and one teacher distribution t of sixteenths, in float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, 5, generator=generator, dtype=torch.float64).expand(rows, 5).clone().requires_grad_()
    weight = torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    return hidden, weight, torch.from_numpy(DISTRIBUTION)


def kd_gradients(hidden, weight, targets, kd_weight=0.9):
    labels = torch.zeros(len(hidden), dtype=torch.int64)
    parts = linear_distillation_loss(hidden, weight, None, labels, targets, kd_weight, normaliser=len(hidden))
    return parts, torch.autograd.grad(parts.loss, [hidden, weight])


def full_targets(t, rows):
    """The same t as a dense teacher: a hidden state of one that reads log t off its output layer."""
    ones = torch.ones(rows, 1, dtype=torch.float64)
    return DenseTargets(ones, t.log()[:, None])


@every_unbiased_kind
def test_over_all_outcomes_the_mean_gradient_is_that_of_full_distillation(kind):
    hidden, weight, t = toy(1)
    exact, wanted = kd_gradients(hidden, weight, full_targets(t, 1))
    uniforms, probabilities = outcomes(kind, DISTRIBUTION)
    targets = sparse(kind, t.log(), uniforms)
    found = [kd_gradients(hidden, weight, targets[row : row + 1]) for row in range(len(targets))]
    assert sum(p * parts.kd for p, (parts, _) in zip(probabilities, found, strict=True)) == pytest.approx(exact.kd)
    for number, gradient in enumerate(wanted):
        mean = sum(p * gradients[number] for p, (_, gradients) in zip(probabilities, found, strict=True))
        assert (mean - gradient).abs().max() < 1e-14
        assert max((gradients[number] - gradient).abs().max() for _, gradients in found) > 1e-3


def test_the_gradients_error_falls_as_one_over_the_square_root_of_the_draws():
    rows = 4000
    hidden, weight, t = toy(rows)
    exact = kd_gradients(hidden, weight, full_targets(t, rows), kd_weight=1.0)[1][0]
    # Covariance of one draw's gradient: E|W_i|^2 - |E W_i|^2.
    one = t @ weight.square().sum(1) - (t @ weight).square().sum()
    for draws in (1, 4, 16, 64, 255):
        uniforms = torch.rand(rows, draws, generator=torch.Generator().manual_seed(draws), dtype=torch.float64)
        targets = sparse(Kind("sampled", draws=draws), t.log(), uniforms)
        found = kd_gradients(hidden, weight, targets, kd_weight=1.0)[1][0]
        errors = ((found - exact) * rows).square().sum(1) * draws
        assert abs(errors.mean() - one) < Z * errors.std() / rows**0.5


def test_many_draws_come_to_the_teachers_distribution_and_one_sure_id_takes_them_all():
    _, _, t = toy(1)
    kind, grid = Kind("sampled", draws=255), (torch.arange(255, dtype=torch.float64)[None] + 0.5) / 255
    assert (dense(sparse(kind, t.log(), grid), 6) - t).abs().max() <= 1 / 255
    grid[0, 0] = 0.0  # an id without mass must not take even the smallest number
    taken = kinds.take(kind, torch.tensor([0.0, 1.0, 0.0]).log()[None], grid)
    assert taken["ids"].tolist() == [1] and taken["codes"].tolist() == [255]


def test_draws_follow_the_cumulative_distribution_beyond_float32():
    """In float32 the sum over a large vocabulary is off by more than the mass of a rare id."""
    vocabulary = 50_000
    log_t = torch.log_softmax(3 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0)), -1)
    edges = np.exp(log_t[0].numpy().astype(np.longdouble)).cumsum()
    edges = (edges / edges[-1]).astype(np.float64)
    rare = np.random.default_rng(0).choice(vocabulary - 1, 200, replace=False)
    for beside, ids in ((-1e-12, rare), (1e-12, rare + 1)):
        taken = kinds.take(Kind("sampled", draws=200), log_t, torch.from_numpy(edges[rare] + beside)[None])
        assert np.array_equal(np.sort(np.repeat(taken["ids"], taken["codes"])), np.sort(ids))


# The k largest and draws from the rest


def test_a_head_is_always_there_and_draws_come_from_the_rest_alone():
    rows, generator = 3000, torch.Generator().manual_seed(0)
    log_t = torch.log_softmax(2 * torch.randn(rows, 40, generator=generator), -1)
    kind = Kind("topk_sampled", draws=10, top_k=6)
    taken = kinds.take(kind, log_t, torch.rand(rows, kind.uniforms, generator=generator, dtype=torch.float64))
    weights, mass, start = TABLE[taken["codes"]], [], 0
    for row, length in enumerate(taken["lengths"]):
        part = slice(start, start + length)
        start += length
        ids, head = taken["ids"][part].tolist(), log_t[row].topk(6).indices.tolist()
        assert set(head) <= set(ids) and len(set(ids)) == len(ids) <= kind.most_entries
        for token, weight in zip(ids, weights[part], strict=True):
            if token in head:
                assert weight in shares(log_t[row, token].double().exp().item())[:2]
        mass.append(weights[part].sum())
    # Without rounding every row's mass would be 1; with it, in the mean, and never off by more than a step of the table.
    assert abs(np.mean(mass) - 1) < Z * np.std(mass) / rows**0.5
    assert np.abs(np.array(mass) - 1).max() < 0.1


def test_a_head_with_all_the_mass_is_all_that_is_kept():
    log_t = torch.tensor([[0.25, 0.75, 0, 0], [0.25, 0.5, 0, 0.25]]).log()
    kind = Kind("topk_sampled", draws=3, top_k=2, proposal=0.9)
    found = dense(sparse(kind, log_t, torch.full((2, kind.uniforms), 0.4, dtype=torch.float64)), 4)
    assert (found[0, 2:] == 0).all() and found[0].sum() == pytest.approx(1, abs=0.1)
    assert (found[1] > 0).tolist() == [True, True, False, True]


def test_a_head_lowers_the_variance_at_an_equal_number_of_entries():
    rows, generator = 4000, torch.Generator().manual_seed(0)
    log_t = torch.log_softmax(3 * torch.randn(50, generator=generator, dtype=torch.float64), -1)
    t, errors, exact = log_t.exp().numpy(), {}, {}
    for kind in (Kind("sampled", draws=12), Kind("topk_sampled", draws=6, top_k=6)):
        assert kind.most_entries == 12
        uniforms = torch.rand(rows, kind.uniforms, generator=generator, dtype=torch.float64)
        found = dense(sparse(kind, log_t, uniforms), 50).numpy()
        errors[kind.name], exact[kind.name] = ((found - t) ** 2).sum(1), variance(kind, t).sum()
        assert abs(errors[kind.name].mean() - exact[kind.name]) < Z * errors[kind.name].std() / rows**0.5
    assert exact["sampled"] == pytest.approx((1 - (t**2).sum()) / 12)
    assert exact["topk_sampled"] < exact["sampled"] / 5
    difference = errors["sampled"] - errors["topk_sampled"]
    assert difference.mean() > Z * difference.std() / rows**0.5


# The k largest


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_topk_keeps_the_largest_probabilities_and_all_that_is_left(tmp_path, temperature):
    model, split = make_model(0), make_split()
    write(tmp_path, TOPK, model, split, temperature=temperature)
    where = predicting(split)
    found = read(tmp_path, split, temperature).read(where)
    t = dense_log_probs(model, split, temperature)[where].exp()
    largest, ids = t.topk(7)
    assert torch.equal(found.ids.sort().values, ids.sort().values)
    # Half precision keeps 11 bits of a log.
    tail = t.scatter(1, ids, 0).sum(1)
    assert ((found.tail.log() - tail.log()).abs() <= 2.0**-11 * tail.log().abs() + 1e-5).all()
    # A weight is rounded to the nearer of two a tenth apart, and then scaled by one factor a row.
    step = TABLE[2] / TABLE[1]
    off = (found.weights.double() / t.gather(1, found.ids)).log()
    assert (off.max(1).values - off.min(1).values <= np.log(step) + 1e-3).all()
    factor = (found.weights.double().sum(1) / t.gather(1, found.ids).sum(1)).log()
    assert (factor.abs() <= 2.0**-10 * (1 + 1 / (1 - tail))).all()
    assert torch.allclose(found.weights.sum(1) + found.tail, torch.ones(len(where)), atol=1e-6)
    outcomes = torch.cat([found.weights, found.tail[:, None]], 1).double()
    assert torch.allclose(found.entropy.double(), -torch.xlogy(outcomes, outcomes).sum(1), atol=1e-6)


def test_the_tail_is_exact_where_the_kept_mass_is_one_but_for_rounding():
    logits = torch.zeros(4, 40)
    logits[:, 0] = torch.tensor([15.0, 20.0, 30.0, 60.0])
    logits[:, 1] = logits[:, 0] - 1
    exact = torch.log_softmax(logits.double(), -1)[:, 2:].logsumexp(1)
    assert (1 - exact.exp()[0] > 1 - 1e-4) and (exact.exp()[1:] < 1e-6).all()
    taken = kinds.take(Kind("topk", top_k=2), torch.log_softmax(logits, -1), None)
    assert np.abs(taken["log_tail"] - exact.numpy()).max() < 1e-5


# What is written is what is read


def read_alone(folder):
    """Position -> {id: weight}, tail, entropy, nll, decoded byte by byte as FORMAT.md has it."""
    found, kept = {}, json.loads((folder / "manifest.json").read_text())["length_type"]
    for path in sorted(folder.glob("0*.safetensors")):
        shard, position = load_file(path), json.loads(path.with_suffix(".json").read_text())["first"]
        row = 0
        for number, (low, high) in enumerate(itertools.pairwise(shard["frame_bytes"].tolist())):
            assert shard["frame_positions"][number] == row
            parts, rest = [], shard["frames"][low:high].tobytes()
            for letter in (kept, "B", "B"):
                stream = zlib.decompressobj(-9)
                part = stream.decompress(rest)
                letter = {"|u1": "B", "<u2": "H"}.get(letter, letter)
                parts.append([number for (number,) in struct.iter_unpack(f"<{letter}", part)])
                rest = stream.unused_data
            lengths, codes, octaves = parts
            bits = "".join(f"{byte:08b}"[::-1] for byte in rest)
            assert sum(lengths) == len(codes) == len(octaves)
            for length in lengths:
                token, entry = -1, {}
                for _ in range(length):
                    octave = octaves.pop(0)
                    token += 2**octave + int("0" + bits[:octave][::-1], 2)
                    bits, entry[token] = bits[octave:], float(shard["weights"][codes.pop(0)])
                assert len(entry) == length and list(entry) == sorted(entry) and 0 not in entry.values()
                tail = float(shard["log_tail"][row]) if "log_tail" in shard else -math.inf
                nats = [64 * (int(shard[key][row]) / 255) ** 2 for key in ("entropy", "nll")]
                found[position + row] = entry, math.exp(tail), *nats
                row += 1
            assert not codes and len(bits) < 8 and "1" not in bits
        assert row == len(shard["entropy"]) and len(shard["frame_positions"]) == number + 1 > (row > 40)
    return found


@every_sparse_kind
def test_every_field_comes_back_in_any_order_and_across_shards_and_frames(tmp_path, kind, small_frames):
    split = make_split()
    about = write(tmp_path, kind, split=split)
    entries = read_alone(tmp_path)
    assert sorted(entries) == list(range(len(split.tokens)))
    assert len(list(tmp_path.glob("0*.safetensors"))) > 3
    rng, everywhere = np.random.default_rng(0), np.arange(len(split.tokens))
    order = rng.permutation(np.r_[everywhere, rng.choice(everywhere, 50), [-1] * 20])
    cache, ends = read(tmp_path, split), set((split.offsets[1:] - 1).tolist())
    found, kept = cache.read(order.reshape(-1, 1)), cache.statistics(order)
    for row, position in enumerate(order.tolist()):
        weights, tail = found.weights[row], 0 if found.tail is None else found.tail[row].item()
        if position < 0 or position in ends:
            assert weights.sum() == 0 and tail == 0 and found.entropy[row] == 0
            assert kept["entropy"][row] == kept["nll"][row] == 0
            continue
        entry, left, entropy, nll = entries[position]
        mine = dict(zip(found.ids[row][weights > 0].tolist(), weights[weights > 0].tolist(), strict=True))
        assert tail == pytest.approx(left, rel=1e-6)
        assert (kept["entropy"][row], kept["nll"][row]) == pytest.approx((entropy, nll), rel=1e-6)
        if kind is TOPK:
            scale = (1 - left) / sum(entry.values())
            assert mine == pytest.approx({token: scale * weight for token, weight in entry.items()}, rel=1e-5)
        else:
            assert mine == entry and found.entropy[row] == kept["entropy"][row]
        if kind is SAMPLED:
            assert sum(entry.values()) == pytest.approx(1, abs=1e-6)
    tokens = len(predicting(split))
    assert about["tokens"] == tokens
    assert about["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert about["bytes_per_token"] == about["bytes"] / tokens
    assert about["distinct_ids_per_token"] == sum(len(entry) for entry, *_ in entries.values()) / tokens


@every_sparse_kind
def test_a_read_in_any_order_is_the_read_of_each_position_alone_and_unpacks_each_frame_once(
    tmp_path, kind, small_frames, monkeypatch
):
    split = make_split()
    write(tmp_path, kind, split=split)
    cache, unpacked = read(tmp_path, split), []
    monkeypatch.setattr(reader, "unpack_frame", lambda *a: unpacked.append(a[1]) or shards.unpack_frame(*a))
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(split.tokens)), 3))
    together = cache.read(order)
    frames = sum(len(load_file(path)["frame_bytes"]) - 1 for path in tmp_path.glob("0*.safetensors"))
    assert len(unpacked) == frames
    alone = {position: cache.read(np.array([position])) for position in range(len(split.tokens))}
    for row, position in enumerate(order.tolist()):
        one, width = alone[position], alone[position].ids.shape[1]
        assert torch.equal(together.ids[row, :width], one.ids[0]) and (together.ids[row, width:] == 0).all()
        assert torch.equal(together.weights[row, :width], one.weights[0]) and (together.weights[row, width:] == 0).all()
        assert together.entropy[row] == one.entropy[0]
        assert together.tail is None or together.tail[row] == one.tail[0]


@every_sparse_kind
def test_what_is_read_is_what_the_teachers_own_distribution_gives(tmp_path, kind, small_frames):
    # In float64 another order of additions cannot move a draw across the edge of a float32 probability.
    model, split = make_model(0).double(), make_split()
    write(tmp_path, kind, model, split, seed=3, temperature=1.5)
    found = dense(read(tmp_path, split, 1.5).read(predicting(split)))
    wanted = expected(kind, dense_log_probs(model, split, 1.5), split, seed=3)
    if kind is TOPK:
        found, wanted = (values / values.sum(1, keepdim=True) for values in (found, wanted))
        assert (found - wanted).abs().max() < 1e-6
    else:
        assert torch.equal(found, wanted)


def test_no_positions_at_all_and_none_that_predict(tmp_path):
    write(tmp_path / "sparse", TOPK)
    write(tmp_path / "dense", DENSE)
    for folder in ("sparse", "dense"):
        cache = read(tmp_path / folder)
        assert len(cache.read(np.zeros((0, 4), np.int64))) == 0 and len(cache.read(np.full((2, 3), -1))) == 6
    assert read(tmp_path / "sparse").read(np.full(3, -1)).weights.sum() == 0


def test_the_files_own_weights_are_read_whatever_the_code_would_write_today(tmp_path, monkeypatch):
    write(tmp_path, IMPORTANCE)
    before = read(tmp_path).read(np.arange(40))
    monkeypatch.setattr(encoding, "LOG_WEIGHTS", encoding.LOG_WEIGHTS * 2)
    assert torch.equal(read(tmp_path).read(np.arange(40)).weights, before.weights)


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_and_loss_on_the_text_equal_a_direct_computation(tmp_path, kind, temperature):
    model, split = make_model(0), make_split()
    temperature = 1.0 if kind is DENSE else temperature
    about = write(tmp_path, kind, model, split, temperature=temperature)
    where = predicting(split)
    log_t = dense_log_probs(model, split, temperature)[where]
    entropy = -(log_t.exp() * log_t).sum(1).numpy()
    nll = -log_t.gather(1, torch.from_numpy(split.tokens[where + 1].astype(np.int64))[:, None])[:, 0].numpy()
    shuffled = np.random.default_rng(1).permutation(len(where))
    kept = read(tmp_path, split, temperature).statistics(where[shuffled])
    for name, exact in (("entropy", entropy[shuffled]), ("nll", nll[shuffled])):
        assert (np.abs(kept[name] - exact) <= np.sqrt(exact) / 31 + 0.0003 + 1e-5).all()
    assert about["teacher_entropy"] == pytest.approx(entropy.mean(), rel=1e-5)
    assert about["teacher_nll"] == pytest.approx(nll.mean(), rel=1e-5)


@every_kind
def test_targets_depend_neither_on_batches_nor_on_shards_nor_on_packing(tmp_path, kind, small_frames):
    # In float64 another order of additions cannot move a draw across the edge of a float32 probability.
    model, split = make_model(0).double(), make_split()
    found = []
    for number, (batch_rows, shard_tokens) in enumerate([(1, 10), (3, 40), (8, 10**6)]):
        write(tmp_path / str(number), kind, model, split, batch_rows=batch_rows, shard_tokens=shard_tokens)
        found.append(read(tmp_path / str(number), split).read(predicting(split)))
    assert len(list((tmp_path / "0").glob("0*.json"))) > len(list((tmp_path / "1").glob("0*.json"))) > 1
    for other in found[1:]:
        if kind is DENSE:
            assert torch.equal(found[0].hidden, other.hidden)
        else:
            assert torch.equal(dense(found[0]), dense(other))
            assert torch.equal(found[0].entropy, other.entropy)


def test_a_teacher_in_train_mode_writes_without_dropout_and_stays_in_train_mode(tmp_path):
    model = make_model(0, dropout=0.5)
    write(tmp_path / "eval", model=model)
    model.train()
    model.model.norm.eval()
    before = [module.training for module in model.modules()]
    write(tmp_path / "train", model=model)
    assert contents(tmp_path / "train") == contents(tmp_path / "eval")
    assert [module.training for module in model.modules()] == before
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(KdlibError, match="non-finite"):
        write(tmp_path / "broken", model=model)
    assert [module.training for module in model.modules()] == before
    assert not torch.is_inference_mode_enabled()


def test_the_writer_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(0)
    model, before = make_model(0), torch.get_rng_state()
    write(tmp_path, model=model)
    assert torch.equal(torch.get_rng_state(), before)


# Whole distributions, and what is drawn from them


def half_precision_bound(model, split):
    """[predicting positions]: by how much log-probabilities may move when hidden states are kept in half precision."""
    where, rows = predicting(split), []
    with torch.no_grad():
        for start, length in split.windows(BLOCK).tolist():
            ids = torch.from_numpy(split.tokens[start : start + length].astype(np.int64))[None]
            rows.append(models.body(model)(ids).last_hidden_state[0].double())
        hidden = torch.cat(rows)
        assert len(hidden) == len(where)
        moved = (2.0**-11 * hidden.abs() + 2.0**-25) @ models.head(model)[0].double().abs().T
    return hidden, 2 * moved.max(1).values + 1e-5


def log_probs(targets, temperature=1.0):
    logits = torch.nn.functional.linear(targets.hidden, targets.weight, targets.bias)
    return torch.log_softmax(logits / temperature, -1)


def test_dense_targets_are_the_models_distribution_to_half_precision_at_any_temperature(tmp_path):
    model, split = make_model(0), make_split()
    about = write(tmp_path, DENSE, model, split)
    where = predicting(split)
    hidden, bound = half_precision_bound(model, split)
    for temperature in (1.0, 0.5, 3.0):
        shuffled = np.random.default_rng(0).permutation(len(where))
        found = read(tmp_path, split, temperature).read(where[shuffled])
        assert ((found.hidden - hidden[shuffled]).abs() <= 2.0**-11 * hidden[shuffled].abs() + 1e-5).all()
        off = (log_probs(found, temperature) - dense_log_probs(model, split, temperature)[where[shuffled]]).abs()
        assert (off.max(1).values <= bound[shuffled] / temperature).all()
    assert torch.equal(found.weight, models.head(model)[0]) and found.bias is None
    nowhere = read(tmp_path, split).read(np.r_[-1, split.offsets[1:] - 1])
    assert (nowhere.hidden == 0).all()
    assert about["distinct_ids_per_token"] is None
    assert about["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("kind", [DENSE, TOPK, SAMPLED], ids=lambda kind: kind.name)
def test_the_likeliest_successors_are_those_of_the_targets_themselves(tmp_path, kind):
    model, split = make_model(0), make_split()
    write(tmp_path, kind, model, split)
    cache, where = read(tmp_path, split), predicting(split)[:20]
    ids, probabilities = cache.likeliest(where, 3)
    targets = cache.read(where)
    whole = dense_log_probs(model, split)[where].exp() if kind is DENSE else dense(targets)
    assert (np.diff(probabilities) <= 0).all()
    np.testing.assert_allclose(probabilities, whole.topk(3).values, atol=1e-3 if kind is DENSE else 1e-7)
    np.testing.assert_allclose(whole.gather(1, torch.from_numpy(ids)), probabilities, atol=1e-3 if kind is DENSE else 1e-7)


def test_dense_targets_keep_an_output_layers_bias(tmp_path):
    model, split = make_model(0), make_split()
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCABULARY))
    write(tmp_path, DENSE, model, split)
    found, (_, bound) = read(tmp_path, split).read(predicting(split)), half_precision_bound(model, split)
    assert torch.equal(found.bias, model.lm_head.bias)
    off = (log_probs(found) - dense_log_probs(model, split)[predicting(split)]).abs()
    assert (off.max(1).values <= bound).all()


@every_sparse_kind
def test_other_kinds_come_from_dense_targets_as_from_the_model(tmp_path, kind):
    model, split, temperature = make_model(0), make_split(), 1.5
    write(tmp_path / "dense", DENSE, model, split)
    whole = read(tmp_path / "dense", split)
    about = write(tmp_path / "drawn", kind, split=split, teacher=DenseTeacher(whole), temperature=temperature)
    write(tmp_path / "direct", kind, model, split, temperature=temperature)
    where = predicting(split)
    drawn, direct = (read(tmp_path / name, split, temperature).read(where) for name in ("drawn", "direct"))
    # Exactly what its own distribution gives, and its own statistics.
    log_t = torch.full((len(split.tokens), VOCABULARY), torch.nan)
    log_t[where] = log_probs(whole.read(where), temperature)
    exact = log_t[where].double()
    assert about["teacher_entropy"] == pytest.approx(-(exact.exp() * exact).sum(1).mean().item(), rel=1e-6)
    if kind is not TOPK:
        assert torch.equal(dense(drawn), expected(kind, log_t, split))
    # And but for half precision, what the model gives.
    other, (_, bound) = dense_log_probs(model, split, temperature)[where], half_precision_bound(model, split)
    bound = bound[:, None] / temperature
    if kind is TOPK:
        assert ((drawn.tail.log() - direct.tail.log()).abs() <= bound[:, 0] + 2.0**-10 * direct.tail.log().abs()).all()
        # Weights may fall to the other side of a rounding edge, one step of the table away; both rows are then scaled.
        both = (dense(drawn) > 0) & (dense(direct) > 0)
        off = (dense(drawn) / dense(direct)).log().abs()[both]
        assert off.max() <= 2 * np.log(TABLE[2] / TABLE[1]) and off.median() < 0.02
    elif kind is SAMPLED:
        # A draw moves where its uniform lies between the two cumulative distributions, of any id.
        gaps = (exact.exp().cumsum(1) - other.exp().cumsum(1)).abs().sum()
        moved = (dense(drawn) - dense(direct)).abs().sum() / 2 * kind.draws
        assert moved <= stats.poisson.isf(FALSE_ALARM, gaps * kind.draws)
    assert (exact - other).abs().max() < bound.max()


def redraws(folder, kind, number):
    """[number, positions, V]: targets of the seeds 0, 1, … from one cache of dense ones, and the t [positions, V] they are drawn from."""
    split = make_split(documents=20)
    write(folder / "dense", DENSE, split=split, shard_tokens=10**6)
    whole, where = read(folder / "dense", split), predicting(split)
    for seed in range(number):
        write(folder / str(seed), kind, split=split, teacher=DenseTeacher(whole), seed=seed, shard_tokens=10**6)
    found = [dense(read(folder / str(seed), split).read(where)).numpy() for seed in range(number)]
    return np.stack(found), log_probs(whole.read(where)).double().exp().numpy()


@pytest.mark.parametrize("kind", [SAMPLED, IMPORTANCE, HYBRID], ids=["sampled", "importance", "topk_sampled"])
def test_redraws_are_uncorrelated_and_their_mean_nears_the_teacher_as_one_over_the_root_of_their_number(tmp_path, kind):
    number, sizes = 64, (1, 4, 16, 64)
    drawn, t = redraws(tmp_path, kind, number)
    errors, each = drawn - t, variance(kind, t).sum(1)
    pairs = np.triu_indices(number, 1)
    z = stats.norm.isf(FALSE_ALARM / 2 / (len(sizes) + len(pairs[0])))
    for size in sizes:
        # [groups, positions], independent of one another: the squared error of the mean of `size` redraws has mean each / size.
        of_means = (errors.reshape(-1, size, *t.shape).mean(1) ** 2).sum(-1) * size - each
        assert abs(of_means.mean()) < z * of_means.std() / of_means.size**0.5
    # [redraws, redraws, positions]: a sum of independent terms of mean 0 stays within z roots of the sum of their squares.
    products = np.einsum("apv,bpv->abp", errors, errors)
    correlations = products.sum(-1) / np.sqrt((products**2).sum(-1))
    assert np.abs(correlations[pairs]).max() < z < correlations.diagonal().min()


def test_what_one_redraw_takes_says_nothing_of_what_the_next_one_takes(tmp_path):
    drawn, t = redraws(tmp_path, Kind("sampled", draws=1), 64)
    ranks = np.argsort(np.argsort(-t))[np.arange(len(t)), drawn.argmax(-1)].clip(max=3)
    likelihoods = np.sort(t)[:, ::-1]
    shares = np.c_[likelihoods[:, :3], likelihoods[:, 3:].sum(1)]
    counts, expected = np.zeros((4, 4)), len(drawn) // 2 * shares.T @ shares
    np.add.at(counts, (ranks[::2], ranks[1::2]), 1)
    # Sums over positions of unlike distributions vary less than the multinomial counts that the bound is for.
    assert expected.min() > 20
    assert ((counts - expected) ** 2 / expected).sum() < stats.chi2.isf(FALSE_ALARM, 15)


def test_dense_targets_written_from_dense_targets_are_the_same_files(tmp_path):
    split = make_split()
    write(tmp_path / "one", DENSE, split=split)
    write(tmp_path / "two", DENSE, split=split, teacher=DenseTeacher(read(tmp_path / "one", split)))
    assert contents(tmp_path / "one").keys() == contents(tmp_path / "two").keys()
    for one, two in zip(*(sorted((tmp_path / name).glob("*.safetensors")) for name in ("one", "two")), strict=True):
        first, second = load_file(one), load_file(two)
        # Statistics of the copy are those of the rounded hidden states.
        assert all(np.array_equal(first[key], second[key]) for key in first if key not in ("entropy", "nll"))


def test_other_kinds_do_not_come_from_sparse_targets_nor_for_another_setting(tmp_path):
    write(tmp_path / "sparse")
    with pytest.raises(KdlibError, match="must be of kind dense.*got sampled"):
        DenseTeacher(read(tmp_path / "sparse"))
    write(tmp_path / "dense", DENSE)
    other = guard_of(make_split(), teacher="teacher-2")
    with pytest.raises(KdlibError, match="must have the guard .*teacher-2.*got .*teacher-1"):
        write(tmp_path / "drawn", teacher=DenseTeacher(read(tmp_path / "dense")), guard=other)
    assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize("pool", ["probability", "logit"])
def test_an_ensemble_teaches_its_pooled_distribution(tmp_path, pool):
    split = make_split(documents=5)
    ensemble = EnsembleForCausalLM.from_members([make_model(0), make_model(1, layers=2), make_model(2)], pool)
    where, log_t = predicting(split), dense_log_probs(ensemble, split, 1.5)
    for name, kind in SPARSE.items():
        write(tmp_path / name, kind, ensemble, split, temperature=1.5)
        found = read(tmp_path / name, split, 1.5).read(where)
        if kind is TOPK:
            t = log_t[where].exp()
            assert torch.equal(found.ids.sort().values, t.topk(7).indices.sort().values)
            left = t.scatter(1, t.topk(7).indices, 0).sum(1).log()
            assert ((found.tail.log() - left).abs() <= 2.0**-11 * left.abs() + 1e-5).all()
        else:
            assert torch.equal(dense(found), expected(kind, log_t, split))
    with pytest.raises(KdlibError, match="got an ensemble or others"):
        write(tmp_path / "dense", DENSE, ensemble, split)
    assert not (tmp_path / "dense").exists()


def test_hidden_states_beyond_half_precision_are_refused(tmp_path):
    model = make_model(0)
    model.model.norm.weight.data.fill_(1e5)
    with pytest.raises(KdlibError, match="must be below 65504"):
        write(tmp_path, DENSE, model)


# What is refused


@pytest.mark.parametrize("key", guard_of(make_split()))
def test_a_guard_that_differs_is_named_with_what_was_expected_and_found(tmp_path, key):
    write(tmp_path)
    expected = guard_of(make_split()) | {key: "another"}
    with pytest.raises(KdlibError) as caught:
        TargetCache(tmp_path, expected, 1.0)
    kept = guard_of(make_split())[key]
    assert f"({key}: expected 'another', got {kept!r})" in str(caught.value)


def test_the_guard_sees_other_documents_another_order_and_one_other_token():
    split = make_split()
    other = make_split()
    other.tokens[5] += 1
    renamed = make_split(name="test")
    streams = np.split(split.tokens, split.offsets[1:-1])[::-1]
    table = split.documents.iloc[::-1].reset_index(drop=True)
    offsets = np.cumsum([0, *map(len, streams)])
    turned = dataclasses.replace(split, documents=table, tokens=np.concatenate(streams), offsets=offsets)
    assert len({guard_of(one)["documents"] for one in (split, other, renamed, turned)}) == 4
    assert guard_of(split) == guard_of(make_split())


@every_sparse_kind
def test_another_temperature_than_the_one_kept_is_refused(tmp_path, kind):
    write(tmp_path, kind, temperature=2.0)
    assert read(tmp_path, temperature=2.0).read(np.arange(3)).temperature == 2.0
    with pytest.raises(KdlibError, match=r"must be 2\.0, that of the targets .*got 1\.0"):
        read(tmp_path)


@every_kind
def test_a_position_that_is_neither_in_the_split_nor_padding_is_refused(tmp_path, kind):
    write(tmp_path, kind)
    with pytest.raises(KdlibError, match="or -1 for padding, got -2"):
        read(tmp_path).read(np.array([3, -2, -1]))


@every_kind
def test_a_position_past_the_end_is_refused(tmp_path, kind):
    split = make_split()
    write(tmp_path, kind)
    cache, end = read(tmp_path), len(split.tokens)
    cache.read(np.array([end - 1]))
    for ask in (cache.read, cache.statistics):
        with pytest.raises(KdlibError, match=rf"must be below \d+, the number of the targets, got {end}"):
            ask(np.array([0, end]))


def test_another_format_version_is_refused(tmp_path):
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["checksum"]
    for version in (1, 99):
        shards.write_record(tmp_path / "manifest.json", manifest | {"version": version})
        with pytest.raises(KdlibError, match=f"format version {shards.VERSION}, got {version}"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "00001.json", "00002.safetensors", "head.safetensors"])
def test_a_missing_file_is_named_and_written_again(tmp_path, name):
    write(tmp_path, DENSE)
    before = contents(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(KdlibError, match=re.escape(name)):
        read(tmp_path)
    if name == "00002.safetensors":
        (tmp_path / "00002.json").unlink()  # as the message advises
    write(tmp_path, DENSE)
    assert contents(tmp_path) == before


@every_kind
def test_every_flipped_byte_and_every_truncation_is_detected_and_named(tmp_path, kind):
    settings = {"model": make_model(0), "split": make_split(documents=4), "shard_tokens": 60}
    write(tmp_path, kind, **settings)
    rng = np.random.default_rng(0)
    assert len(contents(tmp_path)) == (7 if kind is DENSE else 6)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        damaged = [whole[:length] for length in (0, *rng.integers(1, len(whole), 4), len(whole) - 1)] + [whole + b"\0"]
        for offset in rng.permutation(len(whole))[:40]:
            flipped = bytearray(whole)
            flipped[offset] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(flipped))
        for data in damaged:
            path.write_bytes(data)
            with pytest.raises(KdlibError, match=re.escape(path.name)):
                # Only the writer reads what it claimed the folder with.
                if path.name == "writing.json":
                    write(tmp_path, kind, **settings)
                else:
                    read(tmp_path, settings["split"])
        path.write_bytes(whole)
    read(tmp_path, settings["split"])


OTHER = {
    "kind": {"kind": TOPK},
    "kind: draws": {"kind": Kind("sampled", draws=49)},
    "kind: proposal": {"kind": Kind("sampled", draws=50, proposal=0.9)},
    "temperature": {"temperature": 2.0},
    "seed": {"seed": 1},
    "guard": {"guard": guard_of(make_split(), teacher="teacher-2")},
    "block_length": {"block_length": 8},
    "shard_tokens": {"shard_tokens": 61},
    "precision": {"autocast": torch.bfloat16},
}


@pytest.mark.parametrize("key", OTHER)
def test_a_writer_does_not_go_on_with_other_settings(tmp_path, key):
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(KdlibError, match=f"they differ in {key.split(':')[0]}"):
        write(tmp_path, **OTHER[key])
    assert contents(tmp_path) == before


@every_kind
def test_a_writer_does_not_go_on_with_other_weights_of_a_teacher(tmp_path, kind):
    model = make_model(0)
    write(tmp_path, kind, model)
    before = contents(tmp_path)
    model.model.layers[0].mlp.up_proj.weight.data[3, 2] += 1e-6
    with pytest.raises(KdlibError, match="they differ in weights_sha256"):
        write(tmp_path, kind, model)
    assert contents(tmp_path) == before


def test_a_damaged_shard_stops_a_writer_that_goes_on_and_a_deleted_one_is_redone(tmp_path):
    write(tmp_path)
    before = contents(tmp_path)
    shard = tmp_path / "00001.safetensors"
    shard.write_bytes(b"?" * shard.stat().st_size)
    with pytest.raises(KdlibError, match="00001.safetensors must have SHA-256"):
        write(tmp_path)
    shard.unlink()
    shard.with_suffix(".json").unlink()
    write(tmp_path)
    assert contents(tmp_path) == before


def test_a_seed_is_a_setting_of_drawn_kinds_alone(tmp_path):
    write(tmp_path, TOPK)
    assert write(tmp_path, TOPK, seed=1)["tokens_per_second"] is None  # nothing was left to do


BAD_KINDS = {
    "draws above a byte": (dict(name="sampled", draws=256), "`draws` must be in 1..255"),
    "no draws": (dict(name="sampled"), "`draws` must be in 1..255"),
    "no draws beside a head": (dict(name="topk_sampled", top_k=5), "`draws` must be in 1..255"),
    "k of zero": (dict(name="topk"), "`top_k` must be at least 1"),
    "a negative k": (dict(name="topk_sampled", draws=5, top_k=-1), "`top_k` must be at least 1"),
    "more entries than are counted": (dict(name="topk_sampled", draws=36, top_k=65500), "at most 65535 entries"),
    "a proposal of zero": (dict(name="sampled", draws=5, proposal=0.0), "`proposal` must be above 0"),
    "a proposal above its limit": (dict(name="topk_sampled", draws=5, top_k=5, proposal=1.6), "at most 1.5, got 1.6"),
    "no number": (dict(name="sampled", draws=5, proposal=math.nan), "got nan"),
    "unknown kind": (dict(name="exact"), "`kind` of targets must be one of .*got 'exact'"),
}


@pytest.mark.parametrize("case", BAD_KINDS)
def test_kinds_out_of_range_are_refused(case):
    changes, message = BAD_KINDS[case]
    with pytest.raises(KdlibError, match=message):
        Kind(**changes)


@every_kind
def test_a_kind_comes_back_from_what_describes_it_and_ignores_nothing_that_sets_it_apart(kind):
    described = json.loads(json.dumps(kind.describe()))
    assert Kind(**described).describe() == described
    reads = {"sampled": {"draws", "proposal"}, "topk": {"top_k"}, "dense": set()}
    reads["topk_sampled"] = reads["sampled"] | reads["topk"]
    # Left out where it is not so: targets written before it was known describe themselves as before.
    assert described.keys() == reads[kind.name] | {"name"} | ({"stratified"} if kind.stratified else set())


def refuse_to_think(model):
    def stop(*_):
        raise AssertionError("the teacher was run")

    model.register_forward_pre_hook(stop)
    model.model.register_forward_pre_hook(stop)
    return model


BAD = {
    "k of the whole vocabulary": (dict(kind=Kind("topk", top_k=VOCABULARY)), f"`top_k` must be in 1..{VOCABULARY - 1}"),
    "the same beside draws": (dict(kind=Kind("topk_sampled", 5, VOCABULARY)), f"`top_k` must be in 1..{VOCABULARY - 1}"),
    "temperature": (dict(temperature=0.0), "above 0"),
    "not a number": (dict(temperature=math.nan), "above 0"),
    "tempered whole distributions": (dict(kind=DENSE, temperature=2.0), "must have temperature 1 .*got temperature 2"),
    "vocabulary": (dict(guard=guard_of(make_split()) | {"vocabulary": 30}), "must have the corpus's 30 tokens, got 29"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_before_the_teacher_runs(tmp_path, case):
    changes, message = BAD[case]
    with pytest.raises(KdlibError, match=message):
        write(tmp_path / "targets", model=refuse_to_think(make_model(0)), **changes)
    assert not (tmp_path / "targets").exists()


@pytest.mark.parametrize("kind", [Kind("topk", top_k=6), Kind("topk_sampled", draws=1, top_k=6)])
def test_a_head_as_large_as_the_vocabulary_is_refused_where_it_is_taken(kind):
    with pytest.raises(KdlibError, match="`top_k` must be below the vocabulary size 6, got 6"):
        kinds.take(kind, torch.zeros(1, 6), torch.zeros(1, kind.uniforms, dtype=torch.float64))


# Bytes


Usage = namedtuple("Usage", "total used free")


def bound(kind, split, folder):
    """Bytes that a cache may take: its tokens, its shards and the teacher's output layer."""
    head = folder / "head.safetensors"
    tokens = math.ceil(kinds.bytes_per_token(kind, VOCABULARY, 32) * len(split.tokens))
    return (
        tokens + shards.SHARD_BYTES * len(list(folder.glob("0*.json"))) + (head.stat().st_size if head.exists() else 0)
    )


@every_kind
def test_a_disk_too_small_is_refused_before_the_teacher_runs(tmp_path, kind, monkeypatch):
    write(tmp_path / "elsewhere", kind)
    needed = bound(kind, make_split(), tmp_path / "elsewhere")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - needed + 1, needed - 1))
    with pytest.raises(KdlibError, match=r"must have up to .* GB free for targets"):
        write(tmp_path / "targets", kind, refuse_to_think(make_model(0)))
    # What was refused leaves the folder free for fewer bytes, and exactly enough is enough.
    write(tmp_path / "targets", Kind("topk", top_k=1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - needed, needed))
    write(tmp_path / "again", kind)


@every_kind
@pytest.mark.parametrize("shard_tokens", [16, 10**6])
def test_the_disk_estimate_bounds_what_is_written(tmp_path, kind, shard_tokens):
    # A flat teacher, of which hardly two draws coincide.
    split = make_split(documents=30)
    write(tmp_path, kind, make_model(0, scale=1e-6), split, shard_tokens=shard_tokens)
    assert sum(len(data) for data in contents(tmp_path).values()) <= bound(kind, split, tmp_path)


@pytest.mark.parametrize(
    "kind", [SAMPLED, HYBRID, Kind("sampled", draws=255, proposal=0.5), Kind("topk", top_k=300)], ids=str
)
@pytest.mark.parametrize("full", [True, False])
def test_the_disk_estimate_bounds_codes_that_cannot_be_compressed(tmp_path, kind, full):
    rng, positions, vocabulary = np.random.default_rng(0), 3001, 49_152
    most = kind.most_entries
    lengths = np.full(positions, most) if full else rng.integers(0, most + 1, positions)
    # Evenly spread: no other ids have as long remainders.
    ids = np.concatenate([(np.arange(length) + 1) * (vocabulary // (length + 1)) for length in lengths])
    codes = rng.integers(0, 256, lengths.sum(), dtype=np.uint8)
    frames = np.arange(0, positions, shards.FRAME)
    arrays = shards.pack_entries(lengths.astype(kind.length_type), ids, codes, frames) | {"weights": kind.weights}
    arrays |= {name: np.zeros(positions, np.uint8) for name in ("entropy", "nll")}
    if kind.name == "topk":
        arrays["log_tail"] = np.zeros(positions, np.float16)
    shards.write_shard(tmp_path, 0, 0, positions, arrays, {"tokens": positions})
    tokens = kinds.bytes_per_token(kind, vocabulary, 32) * positions
    written = sum(len(data) for data in contents(tmp_path).values())
    assert written <= tokens + shards.SHARD_BYTES
    assert not full or written > 0.6 * tokens


@pytest.mark.parametrize(("top_k", "kept"), [(200, "|u1"), (255, "|u1"), (256, "<u2"), (300, "<u2")])
def test_lengths_take_two_bytes_only_where_one_is_too_few(tmp_path, top_k, kept):
    split = make_split()
    write(tmp_path, Kind("topk", top_k=top_k), make_model(0, vocabulary=400, scale=1e-6), split, guard={})
    assert json.loads((tmp_path / "manifest.json").read_text())["length_type"] == kept
    cache = TargetCache(tmp_path, {}, 1.0)
    assert ((cache.read(predicting(split)).weights > 0).sum(1) == top_k).all()


# FORMAT.md


def test_the_reader_printed_in_the_documentation_prints_what_the_cache_holds(tmp_path):
    document = Path(shards.__file__).with_name("FORMAT.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert "kdlib" not in script and script.count("\n") <= 15
    assert f"frames of about {shards.FRAME} tokens" in document and f"version {shards.VERSION}" in document
    split = make_split(documents=70)
    positions = np.arange(len(split.tokens))
    assert len(positions) > 3 * shards.FRAME
    for name, kind in SPARSE.items():
        write(tmp_path / name, kind, split=split, shard_tokens=10**6)
        run = subprocess.run(
            [sys.executable, "-I", "-c", script, tmp_path / name], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        lines = [line.split(" ", 1) for line in run.stdout.splitlines()]
        assert [int(position) for position, _ in lines] == positions.tolist()
        found = read(tmp_path / name, split).read(positions)
        for row, (_, printed) in enumerate(lines):
            entry, used = ast.literal_eval(printed), found.weights[row] > 0
            mine = dict(zip(found.ids[row][used].tolist(), found.weights[row][used].tolist(), strict=True))
            if kind is TOPK and entry:
                scale = (1 - found.tail[row].item()) / sum(entry.values())
                assert mine == pytest.approx({token: scale * weight for token, weight in entry.items()}, rel=1e-5)
            else:
                assert mine == entry


# A killed writer, and several at once


def _write_and_die(folder, kind, event):
    if event:
        die_at(event, folder)
    write(folder, kind, shard_tokens=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills"), [(SAMPLED, 20), (TOPK, 3), (HYBRID, 3), (DENSE, 3)], ids=lambda one: getattr(one, "name", one)
)
def test_a_writer_killed_at_random_moments_ends_with_the_files_of_one_that_was_not(tmp_path, kind, kills):
    assert exit_code(_write_and_die, tmp_path / "whole", kind, 0) == 0
    left = 0
    for event in np.random.default_rng(kills).integers(1, 12, kills).tolist():
        assert exit_code(_write_and_die, tmp_path / "killed", kind, event) == -signal.SIGKILL
        left = max(left, len(list((tmp_path / "killed").glob(".*.partial"))))
    assert left  # some fell into the writing of a file
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert exit_code(_write_and_die, tmp_path / "killed", kind, 0) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    # Nor does a kill at the very end, among what others left behind.
    (tmp_path / "killed" / ".00000.json.0123.partial").write_bytes(b"{")
    assert exit_code(_write_and_die, tmp_path / "killed", kind, 7 if kind is DENSE else 5) == -signal.SIGKILL
    assert exit_code(_write_and_die, tmp_path / "killed", kind, 0) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def _write_slowly(folder, log):
    one_shard = writer._shard

    def slow(*arguments):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        return one_shard(*arguments)

    writer._shard = slow
    write(folder, shard_tokens=16)


def test_processes_that_write_one_cache_share_its_shards(tmp_path):
    write(tmp_path / "alone", shard_tokens=16)
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda _: exit_code(_write_slowly, tmp_path / "shared", tmp_path / "log"), range(2)))
    passes = (tmp_path / "log").read_text().split()
    shards_written = len(list((tmp_path / "alone").glob("*.json"))) - 2  # two of them describe the whole
    assert codes == [0, 0] and contents(tmp_path / "shared") == contents(tmp_path / "alone")
    # Each takes some. Only what one is still at when the other has nothing left may be computed twice.
    assert len(set(passes)) == 2 and shards_written <= len(passes) <= shards_written + 1


def test_a_shard_that_a_process_died_at_is_written_by_those_that_are_left(tmp_path):
    write(tmp_path / "alone", shard_tokens=16)
    (tmp_path / "shared").mkdir()
    with shards.claimed_shard(tmp_path / "shared", 1) as free:
        assert free
        write(tmp_path / "shared", shard_tokens=16)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 7, 13])
def test_a_writer_overtaken_by_another_ends_with_the_files_of_one_alone(tmp_path, moment, monkeypatch):
    write(tmp_path / "alone", DENSE)
    safely, calls = os.fsync, itertools.count(1)

    def overtaken(file):
        safely(file)
        # Between the writing of a file and its renaming, another writer does all there is to do.
        if next(calls) == moment:
            write(tmp_path / "shared", DENSE)

    monkeypatch.setattr(os, "fsync", overtaken)
    write(tmp_path / "shared", DENSE)
    assert next(calls) > moment
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_two_writers_of_one_file_do_not_write_into_each_other(tmp_path, monkeypatch):
    safely, path = os.fsync, tmp_path / "00000.json"

    def meanwhile(file):
        safely(file)
        monkeypatch.setattr(os, "fsync", safely)
        shards.replace(path, b"the other's")
        assert path.read_bytes() == b"the other's"

    monkeypatch.setattr(os, "fsync", meanwhile)
    shards.replace(path, b"mine")
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]
