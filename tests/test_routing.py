"""Routers: their limits, an independent computation of their weights, and that they see the prefix alone."""

import copy
import json

import numpy as np
import pytest
import torch
from test_ensemble_model import VOCABULARY, text, unlike_members
from test_evaluation import splits
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

from kdlib.data.corpus import pack, rows
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.ensemble.pooling import log_probs, probability_pool
from kdlib.ensemble.routing import DistanceRouter, GateRouter, PrefixVectors
from kdlib.errors import KdlibError
from kdlib.evaluation.metrics import evaluate, position_scores
from kdlib.evaluation.positions import routed_weights
from kdlib.models import attention_mask
from kdlib.training.objective import Distillation, Objective

WIDTH = 5


pytestmark = pytest.mark.usefixtures("one_thread")


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(vocabulary=VOCABULARY):
    return some(vocabulary, WIDTH)


def distance(members=3, vocabulary=VOCABULARY, **options):
    return DistanceRouter(vectors(vocabulary), 0.6 * some(members, WIDTH, seed=1), **options)


def gate(members=3, vocabulary=VOCABULARY, **options):
    """One that has learned something."""
    torch.manual_seed(2)
    found = GateRouter(vectors(vocabulary), members, 8, **options)
    torch.nn.init.normal_(found.output.weight)
    return found


ROUTERS = [distance, gate, lambda **given: distance(top_k=2, **given), lambda **given: gate(top_k=1, **given)]


def by_hand(ids, router):
    """c-BTM's formula, prefix by prefix, of one text."""
    table, centroids, found = router.prefix.token_vectors.double(), router.centroids.double(), []
    for end in range(1, len(ids) + 1):
        total = table[ids[:end]].sum(0)
        squared = torch.stack([((total / total.norm() - one) ** 2).sum() for one in centroids])
        scores = torch.exp(-squared.sqrt() ** router.exponent / router.temperature)
        found.append(scores / scores.sum())
    return torch.stack(found)


@pytest.mark.parametrize("exponent", [2, 4])
def test_distance_weights_are_those_of_the_formula(exponent):
    router, ids = distance(exponent=exponent, temperature=0.7), text()
    found = router(ids)
    for row in range(2):
        assert torch.allclose(found[row], by_hand(ids[row], router).float(), atol=1e-5)
    assert found.std(dim=1).min() > 1e-3, "they move along the text"


def test_the_largest_weights_are_kept_and_scaled():
    whole, kept = distance(temperature=1.0)(text()), distance(temperature=1.0, top_k=2)(text())
    two = whole.scatter(-1, whole.argmin(-1, keepdim=True), 0.0)
    assert torch.allclose(kept, two / two.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(distance(top_k=3)(text()), distance()(text()))


@torch.no_grad()
def test_at_a_high_temperature_it_is_the_uniform_pool_and_at_a_low_one_the_nearest_member():
    members, ids = unlike_members(), text()
    alone = torch.stack([log_probs(one(ids).logits) for one in members])
    uniform = EnsembleForCausalLM.from_members(members, router=distance(temperature=1e9))(ids).logits
    assert torch.allclose(uniform, probability_pool(alone), atol=1e-5)
    nearest = EnsembleForCausalLM.from_members(members, router=distance(temperature=1e-6))(ids).logits
    chosen = distance(temperature=1.0)(ids).argmax(-1)
    assert len(chosen.unique()) > 1
    assert torch.allclose(nearest, alone.gather(0, chosen[None, ..., None].expand(1, *alone.shape[1:]))[0], atol=1e-6)
    first = EnsembleForCausalLM.from_members(members, router=distance(top_k=1))(ids).logits
    assert torch.allclose(first, nearest, atol=1e-6)


def test_a_text_that_says_nothing_is_as_near_to_all_unit_centroids():
    centroids = torch.nn.functional.normalize(some(3, WIDTH), dim=-1)
    assert torch.allclose(DistanceRouter(torch.zeros(VOCABULARY, WIDTH), centroids)(text()), torch.full((2, 9, 3), 1 / 3))


def test_an_untrained_gate_is_the_uniform_pool():
    assert torch.allclose(GateRouter(vectors(), 3)(text()), torch.full((2, 9, 3), 1 / 3))


@pytest.mark.parametrize("make", ROUTERS)
@torch.no_grad()
def test_a_future_token_changes_no_earlier_weight_or_logit(make):
    router, ids = make(), text()
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] % (VOCABULARY - 1)) + 1
    before, after = router(ids), router(changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])
    ensemble = EnsembleForCausalLM.from_members(unlike_members(), router=router)
    before, after = ensemble(ids).logits, ensemble(changed).logits
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("make", ROUTERS)
def test_padding_on_either_side_adds_nothing(make):
    router, ids = make(), text(1, 6)
    alone, padding, mask = router(ids), torch.full((1, 3), 7), torch.tensor([[0] * 3 + [1] * 6])
    left = router(torch.cat([padding, ids], 1), attention_mask=mask)
    assert torch.equal(left[:, 3:], alone)
    numbered = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)  # as generate numbers them
    assert torch.equal(router(torch.cat([padding, ids], 1), attention_mask=mask, position_ids=numbered)[:, 3:], alone)
    right = router(torch.cat([ids, padding], 1), attention_mask=mask.flip(1))
    assert torch.equal(right[:, :6], alone)


def test_padding_at_the_end_takes_nothing_from_what_follows_it():
    """Text that is padded on the right and then goes on, as with a cache."""
    router, ids, cache = PrefixVectors(vectors()), text(1, 6), DynamicLayer()
    padded, mask = torch.cat([ids, torch.full((1, 3), 7)], 1), torch.tensor([[1] * 6 + [0] * 3 + [1]])
    router(padded, attention_mask=mask[:, :-1], position_ids=torch.tensor([[*range(6), 0, 0, 0]]), cache=cache)
    found = router(torch.tensor([[4]]), attention_mask=mask, position_ids=torch.tensor([[6]]), cache=cache)
    assert torch.allclose(found[0, 0], router(torch.cat([ids, torch.tensor([[4]])], 1))[0, -1], atol=1e-6)


@pytest.mark.parametrize("make", ROUTERS)
@torch.no_grad()
def test_texts_that_are_packed_in_a_row_have_the_weights_and_logits_they_have_alone(make):
    data = splits("test")["test"]
    router = make(vocabulary=67)
    index = pack(data.windows(16), 16)
    batch = {name: torch.from_numpy(values) for name, values in rows(data, index).items()}
    assert batch["segments"].max() > 0, "rows hold several windows"
    mask = attention_mask(batch["segments"], torch.float32)
    found = router(batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"])
    for row in range(len(index)):
        for segment in range(int(batch["segments"][row].max()) + 1):
            part = batch["segments"][row] == segment
            assert torch.allclose(found[row][part], router(batch["input_ids"][row][part][None])[0], atol=1e-5)
    weights = routed_weights(router, data, index, 3)
    shuffled = routed_weights(router, data, index[np.random.default_rng(0).permutation(len(index))], 2)
    assert torch.equal(weights, shuffled) and torch.allclose(weights.sum(-1), torch.ones(len(weights)))


@pytest.mark.parametrize("make", ROUTERS)
@pytest.mark.parametrize("search", [{"num_beams": 1}, {"num_beams": 3}])
def test_generation_with_the_caches_equals_generation_without(make, search):
    ensemble, ids = EnsembleForCausalLM.from_members(unlike_members(), router=make()), text()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "eos_token_id": -1, **search}
    cached = ensemble.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, ensemble.generate(ids, use_cache=False, **options))
    plain = EnsembleForCausalLM.from_members(unlike_members()).generate(ids, **options)
    assert not torch.equal(cached, plain), "the router is heard"


@torch.no_grad()
def test_sums_in_the_cache_are_cropped_and_reordered_with_the_rest():
    ensemble, ids = EnsembleForCausalLM.from_members(unlike_members(), router=distance()), text()
    past = ensemble(ids, use_cache=True).past_key_values
    assert len(past) == 2 + 1 + 1 + 1
    past.crop(-3)
    past.reorder_cache(torch.tensor([1, 0]))
    step = ensemble(ids[[1, 0], 6:], past_key_values=past)
    assert torch.allclose(step.logits, ensemble(ids[[1, 0]]).logits[:, 6:], atol=1e-5)


@pytest.mark.parametrize("make", ROUTERS)
@torch.no_grad()
def test_logits_of_some_positions_are_those_of_all(make):
    ensemble, ids = EnsembleForCausalLM.from_members(unlike_members(), router=make()), text()
    whole = ensemble(ids).logits
    assert torch.allclose(ensemble(ids, logits_to_keep=2).logits, whole[:, -2:], atol=1e-5)
    assert torch.allclose(ensemble(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]], atol=1e-5)


COMBINERS = [
    {"weights": [0.2, 0.0, 0.8]},
    {"weights": [0.1, 0.3, 0.6], "pool": "logit"},
    {"exponent": 0.5},
    {"exponent": 0.3, "weights": [0.1, 0.3, 0.6], "temperature": 1.3},
    {"router": distance(top_k=2), "temperature": 0.8},
    {"router": gate()},
]


@pytest.mark.parametrize("how", COMBINERS, ids=["weights", "logit", "power", "calibrated", "distance", "gate"])
@torch.no_grad()
def test_saved_and_loaded_by_the_auto_class_the_logits_are_the_same_bits(tmp_path, how):
    ensemble, ids = EnsembleForCausalLM.from_members(unlike_members(), **how), text()
    ensemble.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, ensemble(ids).logits)
    assert not torch.allclose(loaded(ids).logits, EnsembleForCausalLM.from_members(unlike_members())(ids).logits, atol=1e-3)
    assert json.loads((tmp_path / "config.json").read_text())["calibration_temperature"] == how.get("temperature", 1.0)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).logits
    assert half.dtype == torch.float32 and torch.allclose(half.exp().sum(-1), torch.ones(2, 9), atol=1e-3)


@pytest.mark.parametrize("how", COMBINERS, ids=["weights", "logit", "power", "calibrated", "distance", "gate"])
@torch.no_grad()
def test_permuting_the_members_and_what_belongs_to_them_changes_nothing(how):
    members, ids, order = unlike_members(), text(), [2, 0, 1]
    other = dict(how)
    if "weights" in how:
        other["weights"] = [how["weights"][k] for k in order]
    if "router" in how:
        other["router"] = copy.deepcopy(how["router"])
        parts = [other["router"].centroids] if hasattr(other["router"], "centroids") else [*other["router"].output.parameters()]
        for part in parts:
            part.data = part.data[order]
    one = EnsembleForCausalLM.from_members(members, **how)
    another = EnsembleForCausalLM.from_members([members[k] for k in order], **other)
    assert torch.allclose(one(ids).logits, another(ids).logits, atol=1e-5)


@pytest.mark.parametrize("how", COMBINERS, ids=["weights", "logit", "power", "calibrated", "distance", "gate"])
def test_an_evaluation_is_of_what_the_model_itself_gives(how):
    members, data = [copy.deepcopy(one) for one in unlike_members()], splits("calibration", "test")
    for part in data.values():
        part.tokens[:] %= VOCABULARY
    ensemble = EnsembleForCausalLM.from_members(members, **{**how, "temperature": 1.0})
    found = evaluate(ensemble, data, 16, batch_size=2, temperature=1.0).metrics
    for name, part in data.items():
        nll = -torch.cat([one for one in gold(ensemble, part)])
        assert found["evaluation"][name]["nll"] == pytest.approx(nll.mean().item(), abs=1e-5)
        assert np.allclose(position_scores(ensemble, part, 16, "nll"), nll, atol=1e-4)
        pool = found["pool"][name]
        if "weights" in how or "router" in how:
            assert sum(pool["weights"]) == pytest.approx(1) and pool["oracle_nll"] < pool["member_nll_best"]
            if how.get("exponent") is None:
                gap = pool["ambiguity_" + how.get("pool", "probability")]
                assert found["evaluation"][name]["nll"] == pytest.approx(pool["member_nll_weighted"] - gap, abs=1e-5)
        else:
            assert "weights" not in pool and "oracle_nll" not in pool


@torch.no_grad()
def gold(model, split):
    """Log-probabilities of the next tokens, window by window, as the model itself gives them."""
    for start, end in zip(split.offsets, split.offsets[1:], strict=False):
        for first in range(start, end - 1, 16):
            ids = torch.from_numpy(split.tokens[first : min(first + 17, end)].astype(np.int64))
            yield model(ids[None, :-1]).logits[0].gather(1, ids[1:, None])[:, 0]


def test_equal_weights_and_clones_change_nothing():
    members, ids = unlike_members(), text()
    plain = EnsembleForCausalLM.from_members(members)(ids).logits
    assert torch.allclose(EnsembleForCausalLM.from_members(members, weights=[1 / 3] * 3)(ids).logits, plain, atol=1e-5)
    clones = [members[0]] * 3
    for how in COMBINERS:
        pooled = EnsembleForCausalLM.from_members(clones, **{**how, "temperature": 1.0})(ids).logits
        assert torch.allclose(pooled, log_probs(members[0](ids).logits), atol=1e-5)


@pytest.mark.parametrize("how", COMBINERS[:4], ids=["weights", "logit", "power", "calibrated"])
@torch.no_grad()
def test_a_student_in_the_loop_learns_from_what_the_ensemble_gives(how):
    ensemble, ids = EnsembleForCausalLM.from_members(unlike_members(), **how), text()
    targets = Objective([Distillation(0.5)], ensemble).ask(lambda body: body(input_ids=ids).last_hidden_state, None)
    assert torch.allclose(log_probs(targets.logits()), ensemble(ids).logits.flatten(0, 1), atol=1e-5)


def test_a_routed_teacher_in_the_loop_is_refused():
    with pytest.raises(KdlibError, match="no router"):
        Objective([Distillation(0.5)], EnsembleForCausalLM.from_members(unlike_members(), router=gate()))


def test_training_through_a_gate_reaches_it_and_every_member():
    ensemble = EnsembleForCausalLM.from_members(unlike_members(), router=gate())
    ensemble(text(), labels=text()).loss.backward()
    assert all(torch.isfinite(one.grad).all() and one.grad.abs().sum() > 0 for one in ensemble.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distance(top_k=0), "1 to 3.*got 0"),
        (lambda: gate(top_k=4), "1 to 3.*got 4"),
        (lambda: distance(temperature=0.0), "positive"),
        (lambda: EnsembleForCausalLM.from_members(unlike_members(), weights=[0.5, 0.5]), "3 non-negative numbers"),
        (lambda: EnsembleForCausalLM.from_members(unlike_members(), weights=[0.9, 0.9, -0.8]), "minimum -0.8"),
        (lambda: EnsembleForCausalLM.from_members(unlike_members(), exponent=2.0), "at most 1"),
        (lambda: EnsembleForCausalLM.from_members(unlike_members(), router=distance(2)), "3 members.*of 2 and"),
        (lambda: EnsembleForCausalLM.from_members(unlike_members(), router=gate(vocabulary=9)), "53 tokens.* 9"),
        (
            lambda: EnsembleForCausalLM.from_members(unlike_members(), router=gate(), weights=[0.2, 0.3, 0.5]),
            "weights or a router",
        ),
    ],
)
def test_what_does_not_fit_the_members_is_refused(call, message):
    with pytest.raises(KdlibError, match=message):
        call()
