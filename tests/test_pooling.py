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
    pool_of,
    power_pool,
    probability_ambiguity,
    probability_pool,
)
from kdlib.errors import KdlibError

EXACT = 1e-10


def some_logits(members=4, positions=7, vocabulary=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(members, positions, vocabulary, dtype=torch.float64, generator=generator)


def some_weights(*shape):
    generator = torch.Generator().manual_seed(4)
    return torch.softmax(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=0)


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
    with pytest.raises(KdlibError, match="3 non-negative numbers that sum to 1, one for each member"):
        probability_pool(log_probs(some_logits(3)), torch.tensor(weights))


@pytest.mark.parametrize("pool", POOLS.values())
def test_each_position_can_have_weights_of_its_own(pool):
    members, weights = log_probs(some_logits(3)), some_weights(3, 7)
    alone = torch.stack([pool(members[:, i], weights[:, i]) for i in range(7)])
    assert close(pool(members, weights), alone)
    assert not close(alone[0], pool(members[:, 0], weights[:, 1]))


@pytest.mark.parametrize("weights", [torch.ones(3, 6) / 3, torch.ones(3, 7, 11, 1) / 3, torch.tensor(1.0)])
def test_weights_that_do_not_fit_the_positions_are_refused(weights):
    for pool in POOLS.values():
        with pytest.raises(KdlibError, match="3 non-negative numbers"):
            pool(log_probs(some_logits(3)), weights)


def test_weights_that_sum_to_one_at_most_positions_are_refused():
    weights = some_weights(3, 7)
    weights[0, 4] += 0.1
    with pytest.raises(KdlibError, match="sums 1 to 1.1"):
        logit_pool(log_probs(some_logits(3)), weights)


@pytest.mark.parametrize("pool", [*POOLS.values(), lambda *given: power_pool(given[0], 0.5, *given[1:])])
def test_a_member_that_weighs_nothing_takes_no_part(pool):
    logits = some_logits(3)
    logits[2, :, 3] = -math.inf
    members = log_probs(logits).requires_grad_()
    weights = torch.tensor([0.3, 0.7, 0.0], dtype=torch.float64)
    pooled = pool(members, weights)
    assert torch.equal(pooled, pool(members[:2], weights[:2]))
    (gradient,) = torch.autograd.grad(pooled[:, 5].sum(), members)
    assert torch.isfinite(gradient[:2]).all() and (gradient[2].nan_to_num() == 0).all()


@pytest.mark.parametrize("pool", [*POOLS.values(), lambda *given: power_pool(given[0], 0.5, *given[1:])])
@pytest.mark.parametrize("weighted", [False, True])
def test_permuting_the_members_changes_nothing(pool, weighted):
    members, order = log_probs(some_logits(5)), torch.tensor([3, 0, 4, 1, 2])
    weights = (some_weights(5),) if weighted else ()
    assert close(pool(members, *weights), pool(members[order], *(one[order] for one in weights)))


def test_power_mean_is_the_normalised_mean_of_powers():
    members, weights = log_probs(some_logits()), some_weights(4)
    powers = torch.einsum("k,kiv->iv", weights, members.exp() ** 0.3) ** (1 / 0.3)
    assert close(power_pool(members, 0.3, weights).exp(), powers / powers.sum(-1, keepdim=True))
    assert torch.equal(pool_of("probability", 0.3, weights.tolist())(members), power_pool(members, 0.3, weights))


@pytest.mark.parametrize("weighted", [False, True])
def test_power_means_lie_between_the_two_pools(weighted):
    members = log_probs(some_logits())
    weights = (some_weights(4),) if weighted else ()
    assert torch.equal(power_pool(members, 1.0, *weights), probability_pool(members, *weights))
    near, nearer = (
        (power_pool(members, exponent, *weights) - logit_pool(members, *weights)).abs().max() for exponent in (1e-3, 1e-5)
    )
    assert near < 0.1 and nearer < 2e-2 * near  # the difference is of first order in the exponent
    # (Σ w p^r)^(1/r) grows with r at every token (Hardy, Littlewood & Pólya), and so does its mass.
    masses = [-logit_ambiguity(members, *weights)] + [
        torch.logsumexp(probability_pool(members * r, *weights) / r, -1) for r in (0.2, 0.5, 0.9)
    ]
    assert all((more > less).all() for less, more in zip(masses, masses[1:], strict=False))


@pytest.mark.parametrize("exponent", [0.0, -1.0, 1.5, math.nan])
def test_an_exponent_out_of_range_is_refused(exponent):
    with pytest.raises(KdlibError, match="above 0 and at most 1"):
        power_pool(log_probs(some_logits()), exponent)


def test_a_pool_is_known_by_its_name():
    assert pool_of("logit") is logit_pool
    weights = some_weights(4)
    assert torch.equal(pool_of("logit", None, weights.tolist())(log_probs(some_logits())), logit_pool(log_probs(some_logits()), weights))


def test_logit_pool_is_the_softmax_of_the_mean_logits_whatever_constants_they_carry():
    logits = some_logits()
    shifted = logits + 5 * torch.randn(4, 7, 1, dtype=torch.float64)
    assert close(logit_pool(log_probs(shifted)), functional.log_softmax(logits.mean(0), -1))


@pytest.mark.parametrize("pool", POOLS.values())
def test_a_pool_is_a_distribution(pool):
    assert close(pool(log_probs(some_logits())).exp().sum(-1), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("pool", [*POOLS.values(), lambda *given: power_pool(given[0], 0.5, *given[1:])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pool_of_one_is_the_member_bit_for_bit(pool, dtype):
    member = log_probs(some_logits(1, 50, 501).to(dtype))
    assert torch.equal(pool(member), member[0])
    assert torch.equal(pool(member, torch.ones(1)), member[0])


def test_half_precision_is_pooled_in_float32():
    members = log_probs(some_logits()).bfloat16()
    assert logit_pool(members).dtype == probability_pool(members).dtype == torch.float32
    assert log_probs(some_logits().bfloat16()).dtype == torch.float32


WEIGHTS = [None, some_weights(4), some_weights(4, 7), torch.tensor([0.4, 0.0, 0.6, 0.0], dtype=torch.float64)]


def weighted_mean(values, weights):
    """Of one value a member and position [K, positions, ...]."""
    if weights is None:
        return values.mean(0)
    return (weights.reshape(4, -1, *[1] * (values.ndim - 2)) * values).sum(0)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_geometric_pool_beats_its_mean_member_by_the_same_amount_at_every_outcome(weights):
    members = log_probs(some_logits())
    gain, pooled = logit_ambiguity(members, weights), logit_pool(members, weights)
    assert close(-pooled, -weighted_mean(members, weights) - gain[:, None])
    assert close(gain, weighted_mean(kl(pooled, members), weights))
    assert (gain > 0).all()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_arithmetic_pool_beats_its_mean_member_by_its_ambiguity_under_any_target(weights):
    members, target = log_probs(some_logits()), log_probs(some_logits(1, seed=1))[0]
    gain = weighted_mean(kl(target, members), weights) - kl(target, probability_pool(members, weights))
    assert close(probability_ambiguity(members, target.exp(), weights), gain)
    assert (gain > 0).all()


def test_an_observed_label_is_a_target_with_all_its_mass_on_one_token():
    members, labels = log_probs(some_logits()), torch.arange(7)
    one_hot, observed = functional.one_hot(labels, 11).double(), members[:, labels, labels]
    for weights in WEIGHTS:
        gain = label_ambiguity(observed, weights)
        assert close(gain, probability_ambiguity(members, one_hot, weights))
        assert close(gain, probability_pool(members, weights)[labels, labels] - weighted_mean(observed, weights))


def test_a_target_of_zero_takes_no_part_even_where_a_member_excludes_the_token():
    logits = some_logits()
    logits[0, :, 3] = -math.inf
    target = functional.one_hot(torch.full((7,), 5), 11).double()
    assert torch.isfinite(probability_ambiguity(log_probs(logits), target)).all()


def test_identical_members_have_no_ambiguity():
    members = log_probs(some_logits(1)).expand(5, -1, -1)
    nothing = torch.zeros(7, dtype=torch.float64)
    for weights in (None, some_weights(5), some_weights(5, 7)):
        assert close(logit_ambiguity(members, weights), nothing)
        assert close(probability_ambiguity(members, members[0].exp(), weights), nothing)


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
