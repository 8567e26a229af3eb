"""The loss of members and their pool, against its plain formula, its limits and the identities of ambiguity."""

import pytest
import torch
from test_losses import KINDS, TOKENS, VOCABULARY, normal, problem, targets_of, teacher_logits, weights_of_tokens
from torch.utils.flop_counter import FlopCounterMode

from kdlib.ensemble import pooling
from kdlib.errors import KdlibError
from kdlib.losses import DenseTargets, PooledTargets, coupled, linear_distillation_loss
from kdlib.losses.coupled import Member, coupled_distillation_loss
from kdlib.losses.reference import coupled_loss, distillation_loss, forward_kl, pooled_logits

POOLS = ["probability", "logit"]
WIDTHS = (5, 3, 6)


def members(dtype=torch.float64, count=3):
    """Of unequal widths, the last without a bias."""
    found = []
    for number, width in enumerate(WIDTHS[:count]):
        drawn = [normal(TOKENS, width, seed=10 + number), normal(VOCABULARY, width, seed=20 + number), normal(VOCABULARY, seed=30 + number)]
        drawn = [one.to(dtype).requires_grad_() for one in drawn]
        found.append(Member(*drawn) if number < 2 else Member(*drawn[:2]))
    return found


def logits(found):
    return torch.stack([one.hidden @ one.weight.T + (0 if one.bias is None else one.bias) for one in found])


def leaves(found):
    return [one for member in found for one in member if one is not None]


def gradients(loss, found):
    return torch.autograd.grad(loss, leaves(found), retain_graph=True)


def assert_close(found, expected, tolerance=1e-10):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance, check_dtype=False)


def signal(kind):
    """Labels, targets, and these as the dense definitions take them."""
    _, labels, teacher = problem()
    if kind == "pooled":
        return labels, PooledTargets((teacher, teacher), lambda log_p: pooling.logit_pool(log_p)), teacher_logits(teacher)
    targets = targets_of(kind, teacher, 1.0) if kind != "none" else None
    return labels, targets, teacher_logits(teacher) if kind in ("dense", "none") else targets


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("coupling", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["none", "pooled", *KINDS])
def test_values_and_gradients_are_those_of_the_formula(pool, coupling, kind):
    weight = 0.0 if kind == "none" else 0.4
    labels, targets, dense = signal(kind)
    found = members()
    expected = coupled_loss(logits(found), dense, labels, weight, 1.0, coupling, pool)
    for chunk in (4, None):
        parts = coupled_distillation_loss(found, labels, targets, weight, chunk_tokens=chunk, coupling=coupling, pool=pool)
        assert_close([parts.loss, *gradients(parts.loss, found)], [expected, *gradients(expected, found)])
        mean = (weight * parts.kd if kind != "none" else 0) + (1 - weight) * parts.ce
        # ce and kd tell of a member on average, the loss of all.
        assert_close([mean / parts.tokens], [expected.detach() / 3])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_temperature_softens_each_member_before_they_are_pooled(pool, kind):
    _, labels, teacher = problem()
    targets, found = targets_of(kind, teacher, 2.0), members()
    dense = teacher_logits(teacher) if kind == "dense" else targets
    expected = coupled_loss(logits(found), dense, labels, 0.7, 2.0, 0.6, pool)
    parts = coupled_distillation_loss(found, labels, targets, 0.7, 2.0, chunk_tokens=4, coupling=0.6, pool=pool)
    assert_close([parts.loss, *gradients(parts.loss, found)], [expected, *gradients(expected, found)])


@pytest.mark.parametrize("pool", POOLS)
def test_the_pool_of_the_definition_is_the_ensembles(pool):
    found = logits(members()).detach()
    expected = pooling.POOLS[pool](pooling.log_probs(found / 2.0))
    assert_close([(pooled_logits(found, pool, 2.0) / 2.0).log_softmax(-1)], [expected])


@pytest.mark.parametrize("kind", ["pooled", *KINDS])
def test_coupling_0_is_every_member_alone(kind):
    labels, targets, _ = signal(kind)
    found = members()
    parts = coupled_distillation_loss(found, labels, targets, 0.4, coupling=0.0, pool="logit")
    alone = [linear_distillation_loss(*one, labels, targets, 0.4) for one in found]
    assert_close([parts.loss], [sum(one.loss for one in alone)])
    assert_close(gradients(parts.loss, found), [g for one, each in zip(alone, found, strict=True) for g in gradients(one.loss, [each])])


@pytest.mark.parametrize("kind", ["pooled", *KINDS])
def test_the_logit_pool_is_one_output_layer_on_all_hidden_states(kind):
    labels, targets, _ = signal(kind)
    found = members()
    hidden = torch.cat([one.hidden for one in found], 1)
    weight = torch.cat([one.weight / 3 for one in found], 1)
    bias = sum(one.bias for one in found[:2]) / 3
    expected = linear_distillation_loss(hidden, weight, bias, labels, targets, 0.4)
    parts = coupled_distillation_loss(found, labels, targets, 0.4, coupling=1.0, pool="logit")
    assert_close([parts.loss / 3, *gradients(parts.loss / 3, found)], [expected.loss, *gradients(expected.loss, found)])
    assert_close([parts.ce, parts.kd], [expected.ce, expected.kd])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_pool_of_one_is_that_one(pool, temperature):
    _, labels, teacher = problem()
    found = members(count=1)
    expected = linear_distillation_loss(*found[0], labels, teacher, 0.4, temperature)
    for coupling in (0.0, 0.5, 1.0):
        parts = coupled_distillation_loss(found, labels, teacher, 0.4, temperature, coupling=coupling, pool=pool)
        assert_close([parts.loss, *gradients(parts.loss, found)], [expected.loss, *gradients(expected.loss, found)])
        assert_close([parts.ce, parts.kd], [expected.ce, expected.kd])


@pytest.mark.parametrize("pool", POOLS)
def test_negative_correlation_is_the_mean_loss_less_the_ambiguity(pool):
    """(1 - lambda) mean KL(t || p_k) + lambda KL(t || q) = mean KL(t || p_k) - lambda * ambiguity, in value and gradient."""
    _, labels, teacher = problem()
    found, coupling, valid = members(), 0.35, labels != -100
    log_p = pooling.log_probs(logits(found))
    t = teacher_logits(teacher).softmax(-1)
    mean = torch.stack([forward_kl(one, teacher_logits(teacher)) for one in logits(found)]).mean(0)
    ambiguity = pooling.logit_ambiguity(log_p) if pool == "logit" else pooling.probability_ambiguity(log_p, t)
    assert ambiguity.min() > 1e-3
    expected = 3 * (mean - coupling * ambiguity)[valid].mean()
    parts = coupled_distillation_loss(found, labels, teacher, 1.0, coupling=coupling, pool=pool)
    assert_close([parts.loss, *gradients(parts.loss, found)], [expected, *gradients(expected, found)])


@pytest.mark.parametrize("pool", POOLS)
def test_others_are_pooled_and_stay_as_they_are(pool):
    _, labels, teacher = problem()
    found, rest = members(count=1), [DenseTargets(*(None if x is None else x.detach() for x in one)) for one in members()[1:]]
    every = torch.stack([*logits(found), *(one.logits() for one in rest)])
    for coupling in (0.4, 1.0):
        own = distillation_loss(every[0], teacher_logits(teacher), labels, 0.4)
        q = coupled_loss(every, teacher_logits(teacher), labels, 0.4, coupling=1.0, pool=pool)  # three times the pool's loss
        expected = (1 - coupling) * own + coupling * q
        parts = coupled_distillation_loss(found, labels, teacher, 0.4, coupling=coupling, pool=pool, others=rest)
        assert_close([parts.loss, *gradients(parts.loss, found)], [expected, *gradients(expected, found)])


@pytest.mark.parametrize("pool", POOLS)
def test_token_weights_weigh_own_losses_and_the_pools(pool):
    labels, targets, _ = signal("dense")
    found, weights = members(), weights_of_tokens()
    each = [
        coupled_distillation_loss(found, torch.where(torch.arange(TOKENS) == t, labels, -100), targets, 0.4, coupling=0.6, pool=pool)
        for t in range(TOKENS)
    ]
    expected = sum(weight * one.loss for weight, one in zip(weights, each, strict=True)) / (labels != -100).sum()
    parts = coupled_distillation_loss(found, labels, targets, 0.4, token_weights=weights, chunk_tokens=4, coupling=0.6, pool=pool)
    assert_close([parts.loss, *gradients(parts.loss, found)], [expected, *gradients(expected, found)])


@pytest.mark.parametrize("pool", POOLS)
def test_a_word_that_no_member_allows_leaves_no_nan(pool):
    found = [Member(one.hidden, one.weight, (torch.arange(VOCABULARY) == 12) * -torch.inf if one.bias is not None else None) for one in members()]
    found = [Member(one.hidden, one.weight, torch.where(torch.arange(VOCABULARY) == 12, -torch.inf, 0.0).double()) for one in found]
    labels = torch.arange(TOKENS) % 12
    parts = coupled_distillation_loss(found, labels, coupling=0.5, pool=pool)
    hidden = torch.autograd.grad(parts.loss, [one.hidden for one in found])
    assert parts.loss.isfinite() and all(one.isfinite().all() for one in hidden)


@pytest.mark.parametrize("pool", POOLS)
def test_bfloat16_products_stay_near_float32(pool):
    labels, targets, _ = signal("dense")
    found = members(torch.float32)
    exact = coupled_distillation_loss(found, labels, targets, 0.4, coupling=0.6, pool=pool)
    low = coupled_distillation_loss(found, labels, targets, 0.4, coupling=0.6, pool=pool, matmul_dtype=torch.bfloat16, chunk_tokens=4)
    for one, other in zip(gradients(low.loss, found), gradients(exact.loss, found), strict=True):
        assert one.dtype == other.dtype and 0 < (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
def test_the_products_are_those_of_the_members_alone(pool, coupling):
    labels = torch.arange(TOKENS) % VOCABULARY
    found = members(torch.float32)
    rest = [DenseTargets(normal(TOKENS, 4, seed=1).float(), normal(VOCABULARY, 4, seed=2).float())]

    def addmm_(self, left, right, **_):
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        coupled_distillation_loss(found, labels, chunk_tokens=4, coupling=coupling, pool=pool, others=rest).loss.backward()
    # Three products of each member, and one of what stays as it is.
    assert counter.get_total_flops() == 2 * TOKENS * VOCABULARY * (3 * sum(WIDTHS) + 4)


def test_logits_of_all_tokens_never_exist(monkeypatch):
    tokens, vocabulary = 256, 64
    largest = []

    class Watched(coupled.Head):
        def logits(self, rows, out, low):
            largest.append(out.numel())
            return super().logits(rows, out, low)

    monkeypatch.setattr(coupled, "Head", Watched)
    monkeypatch.setitem(coupled.CHUNK_ELEMENTS, "cpu", 2 * 16 * vocabulary)
    found = [Member(normal(tokens, 4, seed=n), normal(vocabulary, 4, seed=n + 9)) for n in range(2)]
    coupled_distillation_loss(found, torch.arange(tokens) % vocabulary, coupling=1.0, pool="probability")
    assert len(largest) == 2 * tokens // 16 and max(largest) == 16 * vocabulary, "a chunk of all members at a time"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coupling": 1.5}, "`coupling` must be in 0..1"),
        ({"coupling": -0.1}, "`coupling` must be in 0..1"),
        ({"pool": "median"}, "`pool` one of probability, logit, got 0.5 and 'median'"),
        ({"others": [DenseTargets(torch.ones(TOKENS, 2), torch.ones(VOCABULARY + 1, 2))]}, r"over one vocabulary, got 3, with \[13, 14\]"),
        ({"others": [DenseTargets(torch.ones(4, 2), torch.ones(VOCABULARY, 2))]}, "must have the same rows"),
        ({"kd_weight": 0.5}, "`kd_weight` must be in 0..1, and 0 without teacher targets"),
    ],
)
def test_what_cannot_be_coupled_is_refused(changes, message):
    with pytest.raises(KdlibError, match=message):
        coupled_distillation_loss(members(), torch.arange(TOKENS), **{"coupling": 0.5, "pool": "logit"} | changes)


def test_a_second_derivative_is_refused():
    found = members()
    loss = coupled_distillation_loss(found, torch.arange(TOKENS), coupling=0.5, pool="logit").loss
    with pytest.raises(KdlibError, match="`create_graph` must be False"):
        torch.autograd.grad(loss, found[0].hidden, create_graph=True)
