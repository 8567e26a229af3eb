"""Cached targets: unbiased draws, exact tails, every byte guarded, and a killed writer that leaves no trace.

Statistics are compared at a false-alarm rate of 1e-6 a test; seeds are fixed, so a test that passes stays passing.
"""

import itertools
import json
import re
import shutil
import signal
from collections import namedtuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy import stats
from tiny import BLOCK, VOCABULARY, contents, dense_log_probs, die_at, exit_code, make_model, make_split, predicting

from kdlib.cache import TargetCache, kinds, write_targets
from kdlib.cache.reader import guard
from kdlib.cache.shards import write_record
from kdlib.cache.writer import _uniforms
from kdlib.errors import KdlibError
from kdlib.losses import DenseTargets, SparseTargets, linear_distillation_loss

FALSE_ALARM = 1e-6
SIZES = {"sampled": 50, "topk": 7}
Z = stats.norm.isf(FALSE_ALARM / 2)


def guard_of(split, teacher="teacher-1", block_length=BLOCK):
    return guard(split, "tokenizer-1", VOCABULARY, block_length, teacher)


def write(folder, kind="sampled", model=None, split=None, **changes):
    """Targets of a tiny split in several shards."""
    split = split or make_split()
    settings = {"guard": guard_of(split), "size": SIZES[kind], "block_length": BLOCK, "shard_tokens": 60} | changes
    return write_targets(folder, model or make_model(0), split, kind=kind, **settings)


def read(folder, split=None, temperature=1.0):
    return TargetCache(folder, guard_of(split or make_split()), temperature)


def dense(targets):
    """[T, V] float64 of what the targets hold, without the tail."""
    out = torch.zeros(len(targets), VOCABULARY, dtype=torch.float64)
    return out.scatter_add_(1, targets.ids, targets.weights.double())


def read_with_safetensors_alone(folder):
    """Position -> {id: count or log-probability}, tail, entropy, nll."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard, first = load_file(path), json.loads(path.with_suffix(".json").read_text())["first"]
        for row, (entropy, nll) in enumerate(zip(shard["entropy"], shard["nll"], strict=True)):
            part = slice(*shard["offsets"][row : row + 2]) if "offsets" in shard else row
            values = shard["counts" if "counts" in shard else "log_probabilities"][part]
            entry = dict(zip(shard["ids"][part].tolist(), values.tolist(), strict=True))
            found[first + row] = entry, shard["log_tail"][row] if "log_tail" in shard else None, entropy, nll
    return found


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
    model, split, writes = make_model(0), make_split(documents=8, longest=12), 24
    where = predicting(split)
    counts = np.zeros((len(where), VOCABULARY))
    for seed in range(writes):
        write(tmp_path / str(seed), "sampled", model, split, size=255, seed=seed, temperature=temperature)
        counts += dense(read(tmp_path / str(seed), split, temperature).read(where)).numpy() * 255
    t = dense_log_probs(model, split, temperature)[where].exp().numpy()
    found = np.array([pooled_chi_square(*row) for row in zip(counts, t * 255 * writes, strict=True)])
    statistic, freedom = found.sum(0)
    assert freedom > 500
    assert stats.chi2.ppf(FALSE_ALARM / 2, freedom) < statistic < stats.chi2.isf(FALSE_ALARM / 2, freedom)


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


def toy(rows, seed=0):
    """Hidden states [rows, 5], output weights [V, 5] and one teacher distribution t of eighths, in float64."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.tensor([1, 0, 3, 0, 2, 2], dtype=torch.float64) / 8
    hidden = torch.randn(1, 5, generator=generator, dtype=torch.float64).expand(rows, 5).clone().requires_grad_()
    return hidden, torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_(), t


def sampled(t, uniforms):
    """Targets of draws from ``t``, row for row of ``uniforms`` [T, N]."""
    drawn = kinds.draw(t.log().expand(len(uniforms), -1), uniforms)
    offsets = np.r_[0, np.cumsum(drawn["lengths"])]
    ids, weights, _ = kinds.read_sampled(drawn | {"offsets": offsets}, np.arange(len(uniforms)), uniforms.shape[1])
    entropy = -torch.xlogy(t, t).sum().expand(len(uniforms))
    return SparseTargets(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(weights).double(), None, entropy, 1.0)


def kd_gradients(hidden, weight, targets, kd_weight=0.9):
    labels = torch.zeros(len(hidden), dtype=torch.int64)
    parts = linear_distillation_loss(hidden, weight, None, labels, targets, kd_weight, normaliser=len(hidden))
    return parts, torch.autograd.grad(parts.loss, [hidden, weight])


def full_targets(t, rows):
    """The same t as a dense teacher: a hidden state of one that reads log t off its output layer."""
    ones = torch.ones(rows, 1, dtype=torch.float64)
    return DenseTargets(ones, t.log()[:, None])


def test_over_all_outcomes_of_the_draws_the_mean_gradient_is_that_of_full_distillation():
    # t is made of eighths: one uniform in the middle of each eighth, for each of two draws, is every outcome once.
    middles = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    uniforms = torch.cartesian_prod(middles, middles)
    hidden, weight, t = toy(len(uniforms))
    parts, found = kd_gradients(hidden, weight, sampled(t, uniforms))
    exact, expected = kd_gradients(hidden, weight, full_targets(t, len(uniforms)))
    assert torch.allclose(parts.kd, exact.kd, rtol=1e-12)
    assert torch.allclose(found[0].sum(0), expected[0].sum(0), atol=1e-14)
    assert torch.allclose(found[1], expected[1], atol=1e-14)
    assert (found[0] - expected[0]).abs().max() > 1e-3  # a single outcome is not the mean


def test_the_gradients_error_falls_as_one_over_the_square_root_of_the_draws():
    rows = 4000
    hidden, weight, t = toy(rows)
    exact = kd_gradients(hidden, weight, full_targets(t, rows), kd_weight=1.0)[1][0]
    # Covariance of one draw's gradient: E|W_i|^2 - |E W_i|^2.
    one = t @ weight.square().sum(1) - (t @ weight).square().sum()
    for draws in (1, 4, 16, 64, 255):
        uniforms = torch.rand(rows, draws, generator=torch.Generator().manual_seed(draws), dtype=torch.float64)
        found = kd_gradients(hidden, weight, sampled(t, uniforms), kd_weight=1.0)[1][0]
        errors = ((found - exact) * rows).square().sum(1) * draws
        assert abs(errors.mean() - one) < Z * errors.std() / rows**0.5


def test_many_draws_come_to_the_teachers_distribution_and_one_sure_id_takes_them_all():
    hidden, weight, t = toy(1)
    grid = (torch.arange(255, dtype=torch.float64)[None] + 0.5) / 255
    assert (dense_of(sampled(t, grid), 6) - t).abs().max() <= 1 / 255
    grid[0, 0] = 0.0  # an id without mass must not take even the smallest number
    drawn = kinds.draw(torch.tensor([0.0, 1.0, 0.0]).log()[None], grid)
    assert drawn["ids"].tolist() == [1] and drawn["counts"].tolist() == [255]


def dense_of(targets, vocabulary):
    return torch.zeros(len(targets), vocabulary, dtype=torch.float64).scatter_add_(1, targets.ids, targets.weights)


def test_draws_follow_the_cumulative_distribution_beyond_float32():
    """In float32 the sum over a large vocabulary is off by more than the mass of a rare id."""
    vocabulary = 50_000
    log_t = torch.log_softmax(3 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0)), -1)
    edges = np.exp(log_t[0].numpy().astype(np.longdouble)).cumsum()
    edges = (edges / edges[-1]).astype(np.float64)
    rare = np.random.default_rng(0).choice(vocabulary - 1, 200, replace=False)
    for beside, ids in ((-1e-12, rare), (1e-12, rare + 1)):
        drawn = kinds.draw(log_t, torch.from_numpy(edges[rare] + beside)[None])
        assert np.array_equal(np.repeat(drawn["ids"], drawn["counts"]), np.sort(ids))


# The k largest


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_topk_keeps_the_largest_probabilities_and_all_that_is_left(tmp_path, temperature):
    model, split = make_model(0), make_split()
    write(tmp_path, "topk", model, split, temperature=temperature)
    where = predicting(split)
    found = read(tmp_path, split, temperature).read(where)
    t = dense_log_probs(model, split, temperature)[where].exp()
    largest, ids = t.topk(SIZES["topk"])
    assert torch.equal(found.ids, ids)
    # Half precision keeps 11 bits of a log-probability.
    relative = (found.weights - largest).abs() / largest
    assert (relative <= 2.0**-10 * largest.log().abs().clamp(min=1)).all()
    assert torch.allclose(found.tail.double(), t.scatter(1, ids, 0).sum(1), rtol=1e-4)
    assert torch.allclose(found.weights.sum(1) + found.tail, torch.ones(len(where)), atol=1e-6)
    outcomes = torch.cat([found.weights, found.tail[:, None]], 1).double()
    assert torch.allclose(found.entropy.double(), -torch.xlogy(outcomes, outcomes).sum(1), atol=1e-6)


def test_the_tail_is_exact_where_the_kept_mass_is_one_but_for_rounding():
    logits = torch.zeros(4, 40)
    logits[:, 0] = torch.tensor([15.0, 20.0, 30.0, 60.0])
    logits[:, 1] = logits[:, 0] - 1
    log_t = torch.log_softmax(logits, -1)
    kept = kinds.top_k(log_t, 2)
    exact = torch.log_softmax(logits.double(), -1)[:, 2:].logsumexp(1)
    assert (1 - exact.exp()[0] > 1 - 1e-4) and (exact.exp()[1:] < 1e-6).all()
    assert np.abs(kept["log_tail"] - exact.numpy()).max() < 1e-5
    _, weights, tail = kinds.read_top_k(kept, np.arange(4))
    assert np.allclose(tail, exact.exp(), rtol=1e-5) and (tail > 0).all()
    assert np.allclose(weights.sum(1) + tail, 1, atol=1e-6)


# What is written is what is read


@pytest.mark.parametrize("kind", SIZES)
def test_every_field_comes_back_in_any_order_and_across_shards(tmp_path, kind):
    split = make_split()
    about = write(tmp_path, kind, split=split)
    entries = read_with_safetensors_alone(tmp_path)
    assert sorted(entries) == list(range(len(split.tokens)))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    order = np.random.default_rng(0).permutation(np.r_[np.arange(len(split.tokens)), [-1] * 20])
    found = read(tmp_path, split).read(order.reshape(-1, 1))
    ends = set((split.offsets[1:] - 1).tolist())
    for row, position in enumerate(order.tolist()):
        weights, tail = found.weights[row], 0 if found.tail is None else found.tail[row]
        if position < 0 or position in ends:
            assert weights.sum() == 0 and tail == 0 and found.entropy[row] == 0
            continue
        entry, log_tail, entropy, _ = entries[position]
        mine = dict(zip(found.ids[row][weights > 0].tolist(), weights[weights > 0].tolist(), strict=True))
        assert set(mine) == set(entry)
        if kind == "sampled":
            assert sum(entry.values()) == SIZES[kind] and found.entropy[row] == np.float32(entropy)
            assert all(mine[one] == np.float32(count) / np.float32(SIZES[kind]) for one, count in entry.items())
        else:
            assert all(mine[one] == pytest.approx(np.exp(value), rel=2e-3) for one, value in entry.items())
            assert tail == np.exp(log_tail)
    tokens = len(predicting(split))
    assert about["tokens"] == tokens
    assert about["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert about["bytes_per_token"] == about["bytes"] / tokens
    kept = sum(len(entry) for position, (entry, *_) in entries.items() if position not in ends)
    assert about["distinct_ids_per_token"] == kept / tokens


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_and_loss_on_the_text_equal_a_direct_computation(tmp_path, kind, temperature):
    model, split = make_model(0), make_split()
    about = write(tmp_path, kind, model, split, temperature=temperature)
    where = predicting(split)
    log_t = dense_log_probs(model, split, temperature)[where]
    entropy = -(log_t.exp() * log_t).sum(1)
    nll = -log_t.gather(1, torch.from_numpy(split.tokens[where + 1].astype(np.int64))[:, None])[:, 0]
    shuffled = np.random.default_rng(1).permutation(len(where))
    kept = read(tmp_path, split, temperature).statistics(where[shuffled])
    assert np.allclose(kept["entropy"], entropy[shuffled], rtol=2.0**-10, atol=1e-4)
    assert np.allclose(kept["nll"], nll[shuffled], rtol=2.0**-10, atol=1e-4)
    assert about["teacher_entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert about["teacher_nll"] == pytest.approx(nll.mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", SIZES)
def test_targets_depend_neither_on_batches_nor_on_shards_nor_on_packing(tmp_path, kind):
    # In float64 another order of additions cannot move a draw across the edge of a float32 probability.
    model, split = make_model(0).double(), make_split()
    found = []
    for number, (batch_rows, shard_tokens) in enumerate([(1, 10), (3, 40), (8, 10**6)]):
        write(tmp_path / str(number), kind, model, split, batch_rows=batch_rows, shard_tokens=shard_tokens)
        found.append(read(tmp_path / str(number), split).read(predicting(split)))
    assert len(list((tmp_path / "0").glob("*.safetensors"))) > len(list((tmp_path / "1").glob("*.safetensors"))) > 1
    for other in found[1:]:
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


def test_the_writer_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(0)
    model, before = make_model(0), torch.get_rng_state()
    write(tmp_path, model=model)
    assert torch.equal(torch.get_rng_state(), before)


# What is refused


@pytest.mark.parametrize("key", guard_of(make_split()))
def test_a_guard_that_differs_is_named_with_what_was_expected_and_found(tmp_path, key):
    write(tmp_path)
    expected = guard_of(make_split()) | {key: "another"}
    with pytest.raises(KdlibError) as caught:
        TargetCache(tmp_path, expected, 1.0)
    kept = guard_of(make_split())[key]
    assert f"({key}: expected 'another', found {kept!r})" in str(caught.value)


def test_the_guard_sees_other_documents_another_order_and_one_other_token():
    split = make_split()
    other = make_split()
    other.tokens[5] += 1
    renamed = make_split(name="test")
    assert len({guard_of(one)["documents"] for one in (split, other, renamed)}) == 3
    assert guard_of(split) == guard_of(make_split())


def test_another_temperature_than_the_one_kept_is_refused(tmp_path):
    write(tmp_path, temperature=2.0)
    read(tmp_path, temperature=2.0)
    with pytest.raises(KdlibError, match=r"at temperature 2\.0 and cannot serve 1\.0"):
        read(tmp_path)


@pytest.mark.parametrize("kind", SIZES)
def test_a_position_past_the_end_is_refused(tmp_path, kind):
    split = make_split()
    write(tmp_path, kind)
    cache, end = read(tmp_path), len(split.tokens)
    cache.read(np.array([end - 1]))
    for ask in (cache.read, cache.statistics):
        with pytest.raises(KdlibError, match=f"Position {end} lies past"):
            ask(np.array([0, end]))


def test_another_format_version_is_refused(tmp_path):
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["checksum"]
    write_record(tmp_path / "manifest.json", manifest | {"version": 99})
    with pytest.raises(KdlibError, match="format version 99"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "00001.json", "00002.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(KdlibError, match=re.escape(name)):
        read(tmp_path)


@pytest.mark.parametrize("kind", SIZES)
def test_every_flipped_byte_and_every_truncation_is_detected_and_named(tmp_path, kind):
    write(tmp_path, kind)
    rng = np.random.default_rng(0)
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
                write(tmp_path, kind) if path.name == "writing.json" else read(tmp_path)
        path.write_bytes(whole)
    read(tmp_path)


OTHER = {
    "kind": {"kind": "topk", "size": 50 % VOCABULARY},
    "size": {"size": 49},
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
    with pytest.raises(KdlibError, match=f"they differ in {key}"):
        write(tmp_path, **OTHER[key])
    assert contents(tmp_path) == before


def test_a_damaged_shard_stops_a_writer_that_goes_on_and_a_deleted_one_is_redone(tmp_path):
    write(tmp_path)
    before = contents(tmp_path)
    shard = tmp_path / "00001.safetensors"
    shard.write_bytes(b"?" * shard.stat().st_size)
    with pytest.raises(KdlibError, match="00001.safetensors is damaged"):
        write(tmp_path)
    shard.unlink()
    shard.with_suffix(".json").unlink()
    write(tmp_path)
    assert contents(tmp_path) == before


def refuse_to_think(model):
    def stop(*_):
        raise AssertionError("the teacher was run")

    model.register_forward_pre_hook(stop)
    model.model.register_forward_pre_hook(stop)
    return model


BAD = {
    "draws above a byte": (dict(size=256), "draws must lie in 1..255"),
    "no draws": (dict(size=0), "draws must lie in 1..255"),
    "k of the whole vocabulary": (dict(kind="topk", size=VOCABULARY), f"top_k must lie in 1..{VOCABULARY - 1}"),
    "k of zero": (dict(kind="topk", size=0), "top_k must lie"),
    "unknown kind": (dict(kind="dense", size=5), "Unknown kind of targets 'dense'"),
    "temperature": (dict(temperature=0.0), "above 0"),
    "vocabulary": (dict(guard=guard_of(make_split()) | {"vocabulary": 30}), "predicts 29 tokens .* vocabulary of 30"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_before_the_teacher_runs(tmp_path, case):
    changes, message = BAD[case]
    settings = {"kind": "sampled", "size": 50, "guard": guard_of(make_split()), "block_length": BLOCK} | changes
    with pytest.raises(KdlibError, match=message):
        write_targets(tmp_path / "targets", refuse_to_think(make_model(0)), make_split(), **settings)
    assert not (tmp_path / "targets").exists()


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("kind", SIZES)
def test_a_disk_too_small_is_refused_before_the_teacher_runs(tmp_path, kind, monkeypatch):
    needed = kinds.bytes_per_token(kind, SIZES[kind], VOCABULARY) * len(make_split().tokens)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - needed + 1, needed - 1))
    with pytest.raises(KdlibError, match=r"may take up to .* GB free"):
        write(tmp_path, kind, refuse_to_think(make_model(0)))
    # What was refused leaves the folder free for fewer draws, and exactly enough is enough.
    write(tmp_path, kind, size=SIZES[kind] - 1)
    shutil.rmtree(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - needed, needed))
    write(tmp_path, kind)


@pytest.mark.parametrize("kind", SIZES)
def test_the_disk_estimate_bounds_what_is_written(tmp_path, kind):
    # A flat teacher and as many ids as draws: hardly two draws coincide.
    write(tmp_path, kind, make_model(0, scale=1e-6), size=4, shard_tokens=10**6)
    arrays = load_file(tmp_path / "00000.safetensors")
    bound = kinds.bytes_per_token(kind, 4, VOCABULARY) * len(make_split().tokens)
    extra = 4  # one more offset than positions
    assert 0.8 * bound < sum(array.nbytes for array in arrays.values()) <= bound + extra


# A killed writer


def _write_and_die(folder, kind, event):
    if event:
        die_at(event, folder)
    write(folder, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
def test_a_writer_killed_at_random_moments_ends_with_the_files_of_one_that_was_not(tmp_path, kind):
    assert exit_code(_write_and_die, tmp_path / "whole", kind, 0) == 0
    events = np.random.default_rng(len(kind)).integers(1, 10, 50)
    codes = (exit_code(_write_and_die, tmp_path / "killed", kind, event) for event in events)
    kills = list(itertools.takewhile(lambda code: code == -signal.SIGKILL, codes))
    assert 3 <= len(kills) < 50
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
