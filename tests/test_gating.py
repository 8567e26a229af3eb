"""Training a gate: what it reads, what it minimises, what was planted, and what it costs."""

import numpy as np
import pytest
import torch
from test_cache import guard_of, write
from tiny import BLOCK, VOCABULARY, dense_log_probs, make_model, make_split, predicting
from torch.nn import functional

from kdlib import models
from kdlib.cache import Kind, TargetCache
from kdlib.data.corpus import pack
from kdlib.ensemble import gating
from kdlib.ensemble.gating import Examples, examples, flops, rows_within, train
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.ensemble.routing import GateRouter
from kdlib.errors import KdlibError

WIDTH = 6
KINDS = [Kind("sampled", draws=20), Kind("topk", top_k=5), Kind("topk_sampled", draws=8, top_k=3)]


pytestmark = pytest.mark.usefixtures("one_thread")


def gate(members=2, seed=0, **options):
    torch.manual_seed(seed)
    return GateRouter(torch.randn(VOCABULARY, WIDTH), members, 16, **options)


def cached(folder, kind=KINDS[0], split=None, temperature=1.0, **changes):
    split = split or make_split()
    write(folder, kind, make_model(9), split, temperature=temperature, **changes)
    return TargetCache(folder, guard_of(split), temperature)


@pytest.mark.parametrize("chunk", [VOCABULARY, 2**22])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_examples_hold_what_members_give_the_outcomes_of_the_targets(tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(gating, "CHUNK", chunk)
    split, members = make_split(), [make_model(1), make_model(2)]
    cache, index = cached(tmp_path / "targets", kind, split), pack(split.windows(BLOCK), BLOCK)
    index = index[np.random.default_rng(0).permutation(len(index))]
    found, positions = examples(gate(), members, cache, split, index), index[index >= 0]
    assert len(found) == len(predicting(split)) and sorted(positions) == predicting(split).tolist()
    targets = cache.read(positions)
    listed = targets.weights.shape[1]
    assert torch.equal(found.mass[:, :listed], targets.weights) and torch.equal(found.entropy, targets.entropy)
    assert torch.allclose(found.mass.sum(-1), torch.ones(len(found)), atol=0.1), "rounded at random"
    for number, member in enumerate(members):
        log_p = dense_log_probs(member, split)[positions].float()
        direct = log_p.gather(1, targets.ids)
        used = targets.weights > 0
        assert torch.allclose(found.members[:, number, :listed][used], direct[used], atol=1e-4)
        if kind.name == "topk":
            rest = 1 - direct.exp().sum(-1)
            assert torch.equal(found.mass[:, listed], targets.tail)
            assert torch.allclose(found.members[:, number, listed].exp(), rest, atol=1e-5)


def test_features_are_of_the_window_alone(tmp_path):
    split, router = make_split(), gate()
    cache, index = cached(tmp_path / "targets", split=split), pack(split.windows(BLOCK), BLOCK)
    found, places = examples(router, [make_model(1)] * 2, cache, split, index), np.argsort(index[index >= 0])
    first = split.windows(BLOCK)[0]
    ids = torch.from_numpy(split.tokens[first[0] : first[0] + first[1]].astype(np.int64))
    assert torch.allclose(found.features[places[: first[1]]], router.features(ids[None])[0], atol=1e-5)


def planted(tokens=4000, members=3, outcomes=7):
    """Targets that are the members' pool, with weights that depend on the features."""
    torch.manual_seed(3)
    features = torch.randn(tokens, 2 * WIDTH)
    weights = functional.softmax(3 * features[:, :members], dim=-1)
    log_p = functional.log_softmax(2 * torch.randn(tokens, members, outcomes), dim=-1)
    mass = torch.einsum("nk,nko->no", weights, log_p.exp())
    return Examples(features, mass, log_p, torch.special.entr(mass).sum(-1)), weights


def test_the_loss_is_the_divergence_of_the_pool_from_the_targets():
    found, _ = planted(50)
    direct = (found.mass * (found.mass.log() - found.members.exp().mean(1).log())).sum(-1)
    assert torch.allclose(gating._losses(gate(3), found, torch.arange(50)), direct, atol=1e-5)


def test_planted_weights_are_found_again():
    found, weights = planted()
    router = gate(3)
    history = train(router, found, epochs=30, learning_rate=1e-2)
    assert history[-1] < 0.05 * history[0] and len(history) == 31 and not router.training
    learned = functional.softmax(router.logits(found.features), -1)
    assert (learned - weights).abs().mean() < 0.05 < (1 / 3 - weights).abs().mean()


def test_training_depends_on_the_seed_alone_and_leaves_the_random_state():
    found, _ = planted(600)
    histories = []
    for seed in (1, 1, 2):
        router = gate(3)
        torch.manual_seed(seed + 10 * len(histories))
        before = torch.get_rng_state()
        histories.append(train(router, found, epochs=2, seed=seed))
        assert torch.equal(before, torch.get_rng_state())
    assert histories[0] == histories[1] != histories[2]


def test_a_gate_learns_which_member_the_teacher_agrees_with(tmp_path):
    split, teacher, other = make_split(documents=40), make_model(9), make_model(4)
    cache, index = cached(tmp_path / "targets", KINDS[0], split), pack(split.windows(BLOCK), BLOCK)
    router = gate()
    history = train(router, examples(router, [other, teacher], cache, split, index), epochs=6, learning_rate=1e-2)
    assert history[-1] < 0.2 * history[0]
    ids = torch.from_numpy(split.tokens[:BLOCK].astype(np.int64))[None]
    assert router(ids)[..., 1].min() > 0.8
    for one in (other, teacher):
        one.config.bos_token_id = one.config.eos_token_id = one.config.pad_token_id = 0
    ensemble = EnsembleForCausalLM.from_members([other, teacher], router=router)
    assert torch.isfinite(ensemble(ids).logits).all()


def test_members_are_read_and_the_gate_is_trained_within_the_budget():
    members, router, split = [make_model(1), make_model(2, layers=2)], gate(), make_split(documents=60)
    index = pack(split.windows(BLOCK), BLOCK)
    full = index[(index >= 0).all(axis=1)]
    assert router.flops_per_token() == 2 * (2 * WIDTH * 16 + 16 * 2)
    row = flops(members, router, full[:1], 4)
    tokens, pairs = models.extent(models.window_lengths(full[:1]))
    assert row == sum(models.operations(one).forward(tokens, pairs) for one in members) + tokens * router.flops_per_token() * 17
    for budget in (0.5 * row, 3.5 * row, 1e8):
        rows = rows_within(budget, members, router, BLOCK, 4)
        assert flops(members, router, full[:rows], 4) <= budget if rows else budget < row * 1.5


def test_targets_that_list_nothing_or_of_another_temperature_are_refused(tmp_path):
    split, index = make_split(), pack(make_split().windows(BLOCK), BLOCK)
    for cache, message in (
        (cached(tmp_path / "dense", Kind("dense"), split), "got dense"),
        (cached(tmp_path / "soft", KINDS[0], split, 2.0), "temperature 1.*got 2"),
    ):
        with pytest.raises(KdlibError, match=message):
            examples(gate(), [make_model(1)] * 2, cache, split, index)
