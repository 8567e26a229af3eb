"""Exact identities of the two pools and of their ambiguity, in float64."""

import math

import pytest
import torch
from torch.nn import functional

from kdlib.ensemble.pooling import (
    POOLS,
    label_ambiguity,
    log_probs,
    logit_ambiguity,
    logit_pool,
    probability_ambiguity,
    probability_pool,
)
from kdlib.errors import KdlibError

EXACT = 1e-10


def some_logits(members=4, positions=7, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(members, positions, vocabulary, dtype=torch.float64, generator=generator)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=EXACT)


def test_probability_pool_is_the_log_of_the_mean_probability():
    members = log_probs(some_logits())
    assert close(probability_pool(members).exp(), members.exp().mean(0))


def test_weights_weigh_the_members_and_equal_weights_change_nothing():
    members, weights = log_probs(some_logits(3)), torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    assert close(probability_pool(members, weights), probability_pool(members[:2]))
    assert close(probability_pool(members, torch.full((3,), 1 / 3, dtype=torch.float64)), probability_pool(members))


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.5, 0.6, 0.1], [1.5, -0.5, 0.0]])
def test_weights_that_are_no_distribution_over_the_members_are_refused(weights):
    with pytest.raises(KdlibError, match="3 non-negative numbers that sum to 1"):
        probability_pool(log_probs(some_logits(3)), torch.tensor(weights))


def test_logit_pool_is_the_softmax_of_the_mean_logits_whatever_constants_they_carry():
    logits = some_logits()
    shifted = logits + 5 * torch.randn(4, 7, 1, dtype=torch.float64)
    assert close(logit_pool(log_probs(shifted)), functional.log_softmax(logits.mean(0), -1))


@pytest.mark.parametrize("pool", POOLS.values())
def test_a_pool_is_a_distribution(pool):
    assert close(pool(log_probs(some_logits())).exp().sum(-1), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("pool", POOLS.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pool_of_one_is_the_member_bit_for_bit(pool, dtype):
    member = log_probs(some_logits(1, 50, 501).to(dtype))
    assert torch.equal(pool(member), member[0])


def test_half_precision_is_pooled_in_float32():
    members = log_probs(some_logits()).bfloat16()
    assert logit_pool(members).dtype == probability_pool(members).dtype == torch.float32
    assert log_probs(some_logits().bfloat16()).dtype == torch.float32


def test_geometric_pool_beats_its_mean_member_by_the_same_amount_at_every_outcome():
    members = log_probs(some_logits())
    gain = logit_ambiguity(members)
    assert close(-logit_pool(members), -members.mean(0) - gain[:, None])
    assert close(gain, kl(logit_pool(members), members).mean(0))
    assert (gain > 0).all()


def test_arithmetic_pool_beats_its_mean_member_by_its_ambiguity_under_any_target():
    members, target = log_probs(some_logits()), log_probs(some_logits(1, seed=1))[0]
    gain = kl(target, members).mean(0) - kl(target, probability_pool(members))
    assert close(probability_ambiguity(members, target.exp()), gain)
    assert (gain > 0).all()


def test_an_observed_label_is_a_target_with_all_its_mass_on_one_token():
    members, labels = log_probs(some_logits()), torch.arange(7)
    one_hot = functional.one_hot(labels, 11).double()
    assert close(label_ambiguity(members[:, labels, labels]), probability_ambiguity(members, one_hot))
    assert close(
        label_ambiguity(members[:, labels, labels]),
        probability_pool(members)[labels, labels] - members[:, labels, labels].mean(0),
    )


def test_a_target_of_zero_takes_no_part_even_where_a_member_excludes_the_token():
    logits = some_logits()
    logits[0, :, 3] = -math.inf
    target = functional.one_hot(torch.full((7,), 5), 11).double()
    assert torch.isfinite(probability_ambiguity(log_probs(logits), target)).all()


def test_identical_members_have_no_ambiguity():
    members = log_probs(some_logits(1)).expand(5, -1, -1)
    nothing = torch.zeros(7, dtype=torch.float64)
    assert close(logit_ambiguity(members), nothing)
    assert close(probability_ambiguity(members, members[0].exp()), nothing)


def test_excess_loss_of_exchangeable_members_falls_as_one_over_k():
    # L(K) ≈ −log μ + σ²/(2Kμ²) for i.i.d. member probabilities of the target.
    generator = torch.Generator().manual_seed(2)
    noise = torch.rand(16, 50_000, dtype=torch.float64, generator=generator) - 0.5
    p = 0.3 + 0.05 * torch.cat([noise, -noise], dim=1)  # antithetic, so that the mean is exactly μ
    variance = 0.05**2 / 12
    for k in (1, 4, 16):
        excess = -probability_pool(p[:k].log()).mean() + math.log(0.3)
        assert excess.item() == pytest.approx(variance / (2 * k * 0.3**2), rel=0.02)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_negative_correlation_is_independent_training_minus_ambiguity_and_its_gradient_pulls_on_the_pool(strength):
    logits, target = some_logits().requires_grad_(), log_probs(some_logits(1, seed=1))[0]
    members = log_probs(logits)
    q = logit_pool(members)
    loss = (1 - strength) * kl(target, members).mean(0) + strength * kl(target, q)
    assert close(loss, kl(target, members).mean(0) - strength * logit_ambiguity(members))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    expected = ((1 - strength) * (members.exp() - target.exp()) + strength * (q.exp() - target.exp())) / len(logits)
    assert close(gradient, expected)
