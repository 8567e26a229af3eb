"""The logit losses against their formulas, limits, bounds, brute force, SciPy, TRL and Liger: values and gradients."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from kdlib.errors import KdlibError
from kdlib.losses import SparseTargets
from kdlib.losses.divergences import (
    DENSE_ONLY,
    DIVERGENCES,
    coarse,
    divergence_loss,
    forward_kl,
    jeffreys,
    jsd,
    logit_mse,
    mutual_information,
    reverse_kl,
    sinkhorn,
    skewed_kl,
    skewed_reverse_kl,
    tvd,
)
from kdlib.losses.reference import sparse_kl
from kdlib.study.divergences import ON_OUTCOMES

TOKENS, VOCABULARY = 7, 11
# Groups of 3 leave a last group of one token.
CASES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {},
    "jsd": {"beta": 0.3},
    "skewed_kl": {"alpha": 0.2},
    "skewed_reverse_kl": {"alpha": 0.2},
    "tvd": {},
    "logit_mse": {},
    "sinkhorn": {"group": 3, "regularisation": 0.5, "iterations": 8},
    "mutual_information": {"group": 3, "critic_temperature": 0.3},
}
OF_OUTCOMES = ["forward_kl", *ON_OUTCOMES]
OF_ROWS = [loss.__name__ for loss in DENSE_ONLY]
TRUE_DIVERGENCES = [*OF_OUTCOMES, "logit_mse"]
KL_LIKE = [name for name in OF_OUTCOMES if name != "tvd"]
# The loss over tau^2 tends to this times the mean square of the centred logit difference, over tau^2, as tau grows.
CURVATURE = {
    "forward_kl": 1 / 2,
    "reverse_kl": 1 / 2,
    "jeffreys": 1,
    "jsd": 0.3 * 0.7 / 2,
    "skewed_kl": 0.8**2 / 2,
    "skewed_reverse_kl": 0.8**2 / 2,
    "logit_mse": 1,
}
# Unit roundoff of bfloat16's 8-bit significand: no single rounding is further off.
BF16_ROUNDING = 2.0**-8


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def logits(dtype=torch.float64, tokens=TOKENS, scale=1.5):
    """Student (with gradient) and teacher."""
    student, teacher = (scale * normal(tokens, VOCABULARY, seed=seed) for seed in (0, 1))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def loss_of(name, student, teacher, temperature=1.0):
    return divergence_loss(name, student, teacher, temperature, **CASES[name])


def value_and_gradient(name, student, teacher, temperature=1.0):
    """Losses, and the gradient of their sum with respect to the student."""
    losses = loss_of(name, student, teacher, temperature)
    return losses.detach(), torch.autograd.grad(losses.sum(), student)[0]


def probabilities(logits, temperature=1.0):
    e = (logits / temperature).exp()
    return e / e.sum(-1, keepdim=True)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def tokenwise_by_hand(name, s, t, temperature):
    """The losses of outcomes from probabilities [T, any number of outcomes]."""
    if name == "tvd":
        return 1 - torch.minimum(s, t).sum(-1)
    b, a = 0.3, 0.2
    return (
        temperature**2
        * {
            "forward_kl": lambda: kl(t, s),
            "reverse_kl": lambda: kl(s, t),
            "jeffreys": lambda: ((t - s) * (t.log() - s.log())).sum(-1),
            "jsd": lambda: b * kl(t, b * t + (1 - b) * s) + (1 - b) * kl(s, b * t + (1 - b) * s),
            "skewed_kl": lambda: kl(t, a * t + (1 - a) * s),
            "skewed_reverse_kl": lambda: kl(s, (1 - a) * t + a * s),
        }[name]()
    )


def transport_plan(cost, regularisation, iterations):
    """Sinkhorn's matrix scaling, diag(u) exp(-cost / regularisation) diag(v), with rows and columns of sum one."""
    kernel = (-cost / regularisation).exp()
    u = torch.ones_like(cost[:, 0])
    for _ in range(iterations):
        v = 1 / (kernel.T @ u)
        u = 1 / (kernel @ v)
    return u[:, None] * kernel * v


def by_hand(name, student, teacher, temperature):
    s, t = probabilities(student, temperature), probabilities(teacher, temperature)
    if name in OF_OUTCOMES:
        return tokenwise_by_hand(name, s, t, temperature)
    if name == "logit_mse":
        return (student - teacher).var(-1, correction=0)
    losses = []
    for a, b in zip(s.split(3), t.split(3), strict=True):
        if name == "sinkhorn":
            cost = torch.stack([torch.stack([(x - y).abs().sum() for y in b]) for x in a])
            losses += list((transport_plan(cost, 0.5, 8) * cost).sum(1))
        else:
            score = torch.stack([torch.stack([(x * y).sqrt().sum() / 0.3 for y in b]) for x in a])
            losses += [score[i].exp().sum().log() - score[i, i] for i in range(len(a))]
    return torch.stack(losses)


def top_k(t, k, temperature=1.0):
    """The k largest of t and the rest as a tail, padded with two columns that repeat listed ids with weight 0."""
    weights, ids = t.topk(k)
    tail = t.scatter(1, ids, 0).sum(1)
    entropy = -torch.xlogy(weights, weights).sum(1) - torch.xlogy(tail, tail)
    return SparseTargets(
        torch.cat([ids, ids[:, :1].repeat(1, 2)], 1), F.pad(weights, (0, 2)), tail, entropy, temperature
    )


def assert_close(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def relative_error(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


# The formulas


@pytest.mark.parametrize(("name", "temperature"), [*product(DIVERGENCES, [1.0, 2.0])])
def test_every_loss_equals_its_formula_in_value_and_gradient(name, temperature):
    student, teacher = logits()
    expected = by_hand(name, student, teacher, temperature)
    assert expected.shape == (TOKENS,)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    losses, found = value_and_gradient(name, student, teacher, temperature)
    assert_close(losses, expected.detach())
    assert_close(found, gradient)
    assert_close(DIVERGENCES[name](student, teacher, temperature, **CASES[name]), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_pass_gradcheck_for_the_student_and_the_teacher(name):
    student, teacher = logits()

    def loss(student, teacher):
        return loss_of(name, student, teacher, 1.5)

    assert torch.autograd.gradcheck(loss, (student, teacher.requires_grad_()))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_stays_within_1e_5_of_float64(name):
    expected, gradient = value_and_gradient(name, *logits(), 2.0)
    losses, found = value_and_gradient(name, *logits(torch.float32), 2.0)
    assert losses.dtype == found.dtype == torch.float32
    assert_close(losses.double(), expected, 1e-5)
    assert_close(found.double(), gradient, 1e-5)


# Identities


@pytest.mark.parametrize(("name", "temperature", "dtype"), [*product(TRUE_DIVERGENCES, [1.0, 2.0], [32, 64])])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name, temperature, dtype):
    dtype, tolerance = {32: (torch.float32, 1e-6), 64: (torch.float64, 1e-14)}[dtype]
    teacher = logits(dtype)[1]
    losses, gradient = value_and_gradient(name, teacher.clone().requires_grad_(), teacher, temperature)
    assert_close(losses, torch.zeros_like(losses), tolerance)
    assert_close(gradient, torch.zeros_like(gradient), tolerance)
    assert (loss_of(name, *logits(dtype), temperature) > 1e-3).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_adding_a_constant_to_the_logits_of_a_token_changes_nothing(name):
    student, teacher = logits()
    expected, gradient = value_and_gradient(name, student, teacher, 2.0)
    shifts = 20 * normal(2, TOKENS, 1, seed=9)
    shifted = (student.detach() + shifts[0]).requires_grad_()
    losses, found = value_and_gradient(name, shifted, teacher - shifts[1], 2.0)
    assert_close(losses, expected)
    assert_close(found, gradient)
    # So the gradient has no component along the constant.
    assert_close(gradient.sum(1), torch.zeros(TOKENS, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_exchanging_student_and_teacher_exchanges_the_directions(temperature):
    student, teacher = logits()
    pair, swapped = (student, teacher, temperature), (teacher, student, temperature)
    assert_close(reverse_kl(*pair), forward_kl(*swapped))
    assert_close(skewed_reverse_kl(*pair), skewed_kl(*swapped))
    assert_close(jsd(*pair, beta=0.3), jsd(*swapped, beta=0.7))
    assert_close(jsd(*pair), jsd(*swapped))
    for symmetric in (jeffreys, tvd, logit_mse):
        assert_close(symmetric(*pair), symmetric(*swapped))
    assert_close(jeffreys(*pair), forward_kl(*pair) + reverse_kl(*pair))
    for directed in (forward_kl, skewed_kl):
        assert relative_error(directed(*pair), directed(*swapped)) > 0.05


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jsd_and_skewed_kl_tend_to_forward_and_reverse_kl_at_the_ends_of_their_range(temperature):
    student, teacher = logits()
    pair = student, teacher, temperature
    end = 1e-6
    for loss, limit in (
        (jsd(*pair, beta=end) / end, forward_kl(*pair)),
        (jsd(*pair, beta=1 - end) / end, reverse_kl(*pair)),
        (skewed_kl(*pair, alpha=end), forward_kl(*pair)),
        (skewed_reverse_kl(*pair, alpha=end), reverse_kl(*pair)),
    ):
        torch.testing.assert_close(loss, limit, rtol=1e-4, atol=0)
        gradient, expected = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (loss, limit))
        assert relative_error(gradient, expected) < 1e-4


@pytest.mark.parametrize("name", CURVATURE)
def test_high_temperature_tends_to_a_multiple_of_the_mean_square_of_the_centred_logit_difference(name):
    student, teacher = logits()
    difference = student - teacher
    limit = CURVATURE[name] * (difference - difference.mean(1, keepdim=True)).square().mean(1)
    (expected,) = torch.autograd.grad(limit.sum(), student)
    losses, gradient = value_and_gradient(name, student, teacher, 1e4)
    torch.testing.assert_close(losses, limit.detach(), rtol=2e-3, atol=0)
    assert relative_error(gradient, expected) < 2e-3


def test_logit_mse_is_the_same_at_every_temperature_and_not_the_uncentred_mean_square():
    student, teacher = logits()
    assert torch.equal(logit_mse(student, teacher, 3.0), logit_mse(student, teacher))
    scaled = logit_mse(student / 3, teacher / 3)
    assert_close(9 * scaled, logit_mse(student, teacher))
    uncentred = (student + 5 - teacher).square().mean(1)
    assert_close(uncentred - (student + 5 - teacher).mean(1) ** 2, logit_mse(student + 5, teacher))


def test_tvd_is_the_largest_difference_in_the_probability_of_any_event():
    student, teacher = logits()
    s, t = probabilities(student), probabilities(teacher)
    events = torch.tensor([*product([0.0, 1.0], repeat=VOCABULARY)], dtype=torch.float64)
    assert_close(tvd(student, teacher), ((t - s) @ events.T).max(1).values)


# Bounds


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(2, 40),
    scale=st.floats(0.01, 30),
    share=st.floats(0.01, 0.99),
)
def test_divergences_keep_within_their_bounds(seed, vocabulary, scale, share):
    student, teacher = scale * normal(2, 5, vocabulary, seed=seed)
    pair = student, teacher
    distance, slack = tvd(*pair), 1e-12
    for loss in (forward_kl, reverse_kl, jeffreys, jsd, skewed_kl, skewed_reverse_kl, tvd, logit_mse):
        assert loss(*pair).min() >= -slack
    assert distance.max() <= 1 + slack
    # Pinsker's inequality, in both directions.
    assert (distance**2 <= forward_kl(*pair) / 2 + slack).all()
    assert (distance**2 <= reverse_kl(*pair) / 2 + slack).all()
    assert (jsd(*pair) <= math.log(2) * distance + slack).all()
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert jsd(*pair, beta=share).max() <= entropy + slack
    # Convexity of KL in its second argument, and the share of the mixture that is t itself.
    skewed = skewed_kl(*pair, alpha=share)
    assert (skewed <= (1 - share) * forward_kl(*pair) + slack).all()
    assert skewed.max() <= -math.log(share) + slack


# Groups: transport and mutual information


@pytest.mark.parametrize(("name", "tokens"), [*product(["sinkhorn", "mutual_information"], [1, 2, 3, 6, 7, 8])])
def test_chunks_of_whole_groups_give_what_the_whole_gives(name, tokens):
    student, teacher = logits(tokens=tokens)
    expected, gradient = value_and_gradient(name, student, teacher)
    assert expected.shape == (tokens,)
    for chunk in (3, 6):
        pieces = [loss_of(name, *pair) for pair in zip(student.split(chunk), teacher.split(chunk), strict=True)]
        assert_close(torch.cat(pieces).detach(), expected)
        assert_close(torch.autograd.grad(torch.cat(pieces).sum(), student)[0], gradient)
    # Groups do not see one another.
    if tokens > 3:
        other = teacher.clone()
        other[3:] = normal(tokens - 3, VOCABULARY, seed=5)
        assert torch.equal(loss_of(name, student, other)[:3].detach(), expected[:3])


def test_sinkhorn_in_groups_of_one_is_twice_the_total_variation_distance():
    student, teacher = logits()
    losses = sinkhorn(student, teacher, 2.0, group=1)
    assert_close(losses, 2 * tvd(student, teacher, 2.0))


@pytest.mark.parametrize("seed", range(5))
def test_sinkhorn_with_little_regularisation_is_the_optimal_assignment(seed):
    # A teacher row for each student row, in another order, moved a little: what is best is not to match equal indices.
    student = 2 * normal(6, VOCABULARY, seed=seed)
    teacher = student.roll(2, 0) + normal(6, VOCABULARY, seed=seed + 100)
    cost = torch.cdist(probabilities(student), probabilities(teacher), p=1)
    rows, columns = linear_sum_assignment(cost.numpy())
    best = cost[rows, columns]
    assert best.mean() < 0.9 * cost.diagonal().mean()
    errors = []
    for regularisation in (0.3, 0.03, 0.003):
        losses = sinkhorn(student, teacher, group=6, regularisation=regularisation, iterations=3000)
        errors.append(float(losses.mean() - best.mean()))
    # A plan with both marginals can only cost more.
    assert errors[0] > errors[1] > errors[2] > -1e-9
    assert errors[2] < 1e-3
    assert_close(losses, best, 0.02)


def test_sinkhorn_with_heavy_regularisation_is_the_mean_distance_to_all_rows_of_the_group():
    student, teacher = logits(tokens=6)
    cost = torch.cdist(probabilities(student), probabilities(teacher), p=1)
    expected = torch.cat([cost[:3, :3].mean(1), cost[3:, 3:].mean(1)])
    assert_close(sinkhorn(student, teacher, group=3, regularisation=1e8), expected, 1e-6)


def test_sinkhorn_leaves_identical_rows_the_cost_of_its_blur_which_regularisation_controls():
    teacher = logits(tokens=6)[1]
    blurred, sharp = (sinkhorn(teacher, teacher, group=6, regularisation=r) for r in (0.5, 0.05))
    assert blurred.min() > 0.01
    assert sharp.max() < 1e-6


def test_sinkhorn_does_not_underflow_where_the_plain_kernel_does():
    student, teacher = logits(torch.float32, scale=10.0)
    cost = torch.cdist(probabilities(student), probabilities(teacher), p=1)
    assert transport_plan(cost, 1e-3, 20).isnan().any()
    losses = sinkhorn(student, teacher, group=7, regularisation=1e-3)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert losses.isfinite().all() and gradient.isfinite().all()
    assert losses.max() <= 2 + 1e-5


def test_the_information_bound_never_exceeds_log_group_and_reaches_it_for_distinct_identical_pairs():
    group, distinct = 8, 30 * torch.eye(8, VOCABULARY, dtype=torch.float64)
    bound = math.log(group) - mutual_information(distinct, distinct, group=group).mean()
    assert bound <= math.log(group)
    assert bound > math.log(group) - 1e-4
    assert_close(
        mutual_information(distinct, distinct, group=group, critic_temperature=0.01),
        torch.zeros(8, dtype=torch.float64),
    )
    # The critic tells which row it is; a teacher in another order says nothing of its own row.
    assert (mutual_information(distinct, distinct.roll(1, 0), group=group) > math.log(group)).all()
    # Rows that are all alike carry no information.
    alike = distinct[:1].expand(group, -1)
    assert_close(
        mutual_information(alike, alike, group=group), torch.full((group,), math.log(group), dtype=torch.float64)
    )
    for seed in range(20):
        student, teacher = 3 * normal(2, group, VOCABULARY, seed=seed)
        assert mutual_information(student, teacher, group=group).min() >= 0


def test_the_information_bound_is_below_the_mutual_information_of_a_known_joint_distribution():
    # Student and teacher rows are each one of four; they agree with probability 0.7 and else are drawn apart.
    rows, draws, agree = 4, 4096, 0.7
    generator = torch.Generator().manual_seed(0)
    state = torch.randint(rows, (draws,), generator=generator)
    redrawn = torch.randint(rows, (draws,), generator=generator)
    other = torch.where(torch.rand(draws, generator=generator) < agree, state, redrawn)
    same = agree / rows + (1 - agree) / rows**2
    different = (1 - agree) / rows**2
    information = rows * same * math.log(same * rows**2) + rows * (rows - 1) * different * math.log(different * rows**2)
    table = 30 * torch.eye(rows, VOCABULARY, dtype=torch.float64)
    # The best critic is the log of the density ratio: here score 1 / temperature against 0.
    best = 1 / math.log(same / different)
    bounds = [
        math.log(64) - float(mutual_information(table[state], table[other], group=64, critic_temperature=c).mean())
        for c in (best, 3 * best, best / 3)
    ]
    assert max(bounds) == bounds[0] < information + 0.02
    assert bounds[0] > information - 0.05


# Ids that are ruled out


@pytest.mark.parametrize(("name", "temperature"), [*product(DIVERGENCES, [1.0, 2.0])])
def test_padding_both_vocabularies_with_minus_infinity_changes_nothing(name, temperature):
    student, teacher = logits()
    expected, gradient = value_and_gradient(name, student, teacher, temperature)
    wide = F.pad(student.detach(), (0, 3), value=-torch.inf).requires_grad_()
    losses, found = value_and_gradient(name, wide, F.pad(teacher, (0, 3), value=-torch.inf), temperature)
    assert_close(losses, expected)
    assert_close(found[:, :VOCABULARY], gradient)
    assert torch.equal(found[:, VOCABULARY:], torch.zeros(TOKENS, 3, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
@pytest.mark.parametrize("name", OF_OUTCOMES)
def test_padding_both_vocabularies_changes_nothing_for_sparse_targets(name, k):
    student, teacher = logits()
    expected, gradient = value_and_gradient(name, student, top_k(probabilities(teacher, 2.0), k, 2.0), 2.0)
    wide = F.pad(student.detach(), (0, 3), value=-torch.inf).requires_grad_()
    targets = top_k(F.pad(probabilities(teacher, 2.0), (0, 3)), k, 2.0)
    if name == "forward_kl":
        # As outcomes, because sparse_kl is another module's.
        losses = 4 * forward_kl(*coarse(wide, targets))
        found = torch.autograd.grad(losses.sum(), wide)[0]
    else:
        losses, found = value_and_gradient(name, wide, targets, 2.0)
    assert_close(losses.detach(), expected)
    assert_close(found[:, :VOCABULARY], gradient)
    assert torch.equal(found[:, VOCABULARY:], torch.zeros(TOKENS, 3, dtype=torch.float64))


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", ["jsd", "skewed_kl", "skewed_reverse_kl", "tvd", "sinkhorn", "mutual_information"])
def test_an_id_only_one_side_rules_out_leaves_bounded_losses_finite_and_equal_to_their_limit(name, side):
    student, teacher = logits()
    values = []
    for ruled_out in (-torch.inf, -500.0):
        s, t = student.detach().clone(), teacher.clone()
        (s if side == "student" else t)[:, -2:] = ruled_out
        losses, gradient = value_and_gradient(name, s.requires_grad_(), t)
        values += [losses, gradient]
    assert values[0].isfinite().all() and values[1].isfinite().all()
    assert_close(values[0], values[2])
    assert_close(values[1], values[3])


def test_a_kl_towards_a_side_that_rules_out_an_id_is_infinite():
    student, teacher = logits()
    narrow = teacher.clone()
    narrow[:, -2:] = -torch.inf
    assert reverse_kl(student, narrow).isposinf().all()
    assert forward_kl(student, narrow).isfinite().all()
    assert forward_kl(narrow, teacher).isposinf().all()
    assert reverse_kl(narrow, teacher).isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_that_has_diverged_is_not_hidden(name):
    student, teacher = logits()
    with torch.no_grad():
        student[1, 2] = torch.nan
    assert loss_of(name, student, teacher)[1].isnan()


# Precision


@pytest.mark.parametrize("name", DIVERGENCES)
def test_bf16_logits_give_the_loss_of_float32_and_its_gradient_rounded_once(name):
    student, teacher = (x.detach().bfloat16() for x in logits(tokens=32, scale=4.0))
    exact = student.float().requires_grad_()
    expected, gradient = value_and_gradient(name, exact, teacher.float(), 2.0)
    losses, found = value_and_gradient(name, student.clone().requires_grad_(), teacher, 2.0)
    assert losses.isfinite().all() and found.isfinite().all()
    assert losses.dtype == torch.float32 and torch.equal(losses, expected)
    assert found.dtype == torch.bfloat16 and torch.equal(found, gradient.bfloat16())


def test_the_distances_of_sinkhorn_have_no_half_precision_of_their_own():
    student, teacher = (x.detach().bfloat16() for x in logits())
    with pytest.raises(RuntimeError, match="BFloat16"):
        torch.cdist(student.softmax(-1), teacher.softmax(-1), p=1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_autocast_around_a_loss_does_not_reach_inside(name):
    student, teacher = logits(torch.float32)
    expected, gradient = value_and_gradient(name, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss_of(name, student, teacher)
    assert torch.equal(losses.detach(), expected)
    assert torch.equal(torch.autograd.grad(losses.sum(), student)[0], gradient)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_far_apart_stay_finite_in_float32(name):
    student, teacher = (1000 * x.detach() for x in logits(torch.float32))
    losses, gradient = value_and_gradient(name, student.requires_grad_(), teacher)
    assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", TRUE_DIVERGENCES)
def test_float32_gradients_hold_where_the_student_is_near_its_teacher(name):
    teacher = 3 * normal(16, 1000, seed=0)
    student = teacher + 0.1 * normal(16, 1000, seed=1)
    single = student.float().requires_grad_()
    exact = single.detach().double().requires_grad_()
    _, expected = value_and_gradient(name, exact, teacher.float().double())
    _, found = value_and_gradient(name, single, teacher.float())
    assert relative_error(found, expected) < 1e-4


# Sparse targets


@pytest.mark.parametrize(
    ("name", "k", "temperature"), [*product(OF_OUTCOMES, [1, 4, VOCABULARY - 1, VOCABULARY], [1.0, 2.0])]
)
def test_on_top_k_with_tail_a_loss_is_its_formula_on_merged_outcomes_and_at_most_the_full_one(name, k, temperature):
    student, teacher = logits()
    s, t = probabilities(student, temperature), probabilities(teacher, temperature)
    # Sorted by the teacher, the outcomes are the first k ids and all the others together.
    order = t.argsort(1, descending=True)
    merged = [x.gather(1, order) for x in (s, t)]
    if k < VOCABULARY:
        merged = [torch.cat([x[:, :k], x[:, k:].sum(1, keepdim=True)], 1) for x in merged]
    expected = tokenwise_by_hand(name, *merged, temperature)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    losses, found = value_and_gradient(name, student, top_k(t, k, temperature), temperature)
    assert_close(losses, expected.detach())
    assert_close(found, gradient)
    # The data-processing inequality, and equality where nothing is merged.
    full, full_gradient = value_and_gradient(name, student, teacher, temperature)
    assert (losses <= full + 1e-12).all()
    if k >= VOCABULARY - 1:
        assert_close(losses, full)
        assert_close(found, full_gradient)
    else:
        assert (losses < full).any()


@pytest.mark.parametrize(("k", "temperature"), [*product([1, 4, VOCABULARY], [1.0, 2.0])])
def test_coarse_gives_two_distributions_on_which_forward_kl_is_sparse_kl(k, temperature):
    student, teacher = logits()
    targets = top_k(probabilities(teacher, temperature), k, temperature)
    log_s, log_t = coarse(student, targets)
    assert log_s.shape == log_t.shape == (TOKENS, k + 3)
    for log_p in (log_s, log_t):
        assert_close(log_p.logsumexp(1), torch.zeros(TOKENS, dtype=torch.float64))
    assert torch.equal(log_s.isneginf(), log_t.isneginf())
    expected = sparse_kl(student, targets)
    losses = temperature**2 * forward_kl(log_s, log_t)
    assert_close(losses, expected)
    gradients = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (losses, expected)]
    assert_close(*gradients)
    assert torch.equal(divergence_loss("forward_kl", student, targets, temperature), expected)


@pytest.mark.parametrize(("name", "dtype"), [*product(OF_OUTCOMES, [torch.bfloat16, torch.float64])])
def test_float32_targets_serve_logits_of_another_precision(name, dtype):
    student, teacher = (x.detach().bfloat16() for x in logits())
    t = probabilities(teacher.double())
    losses, gradient = value_and_gradient(name, student.to(dtype).requires_grad_(), top_k(t.float(), 4))
    expected, exact = value_and_gradient(name, student.double().requires_grad_(), top_k(t, 4))
    assert gradient.dtype == dtype
    assert_close(losses.double(), expected, 1e-5)
    assert relative_error(gradient, exact) < (BF16_ROUNDING if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", OF_OUTCOMES)
def test_a_tail_that_underflowed_to_0_leaves_the_loss_finite(name):
    student, teacher = (x.detach().float() for x in logits())
    weights, ids = probabilities(teacher)[:, :4].softmax(1), torch.arange(4).expand(TOKENS, 4)
    entropy = -torch.xlogy(weights, weights).sum(1)
    targets = SparseTargets(ids, weights, torch.zeros(TOKENS), entropy, 1.0)
    losses, gradient = value_and_gradient(name, student.requires_grad_(), targets)
    assert losses.isfinite().all() and gradient.isfinite().all()
    assert (losses > 0).all()
    # Mass on ids that the teacher does not list is driven out.
    assert (gradient[:, 4:].sum(1) > 0).all()


def test_unbiased_draws_serve_forward_kl_and_would_bias_any_loss_that_is_not_linear_in_the_teacher():
    student = torch.tensor([[0.4, 0.0, -0.5]], dtype=torch.float64)
    t = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    s, entropy = probabilities(student)[0], -(t * t.log()).sum()[None]
    expectation = {"forward_kl": 0.0, "tvd": 0.0}
    for i, j in product(range(3), repeat=2):
        drawn = (F.one_hot(torch.tensor([i, j]), 3).double().mean(0))[None]
        targets = SparseTargets(torch.arange(3)[None], drawn, None, entropy, 1.0)
        expectation["forward_kl"] += t[i] * t[j] * divergence_loss("forward_kl", student, targets)
        expectation["tvd"] += t[i] * t[j] * (drawn[0] - s).abs().sum() / 2
    assert_close(expectation["forward_kl"], kl(t, s)[None])
    assert expectation["tvd"] > 2 * (t - s).abs().sum() / 2


# Independent implementations


@pytest.mark.parametrize(("beta", "temperature"), [*product([0.1, 0.5, 0.9], [1.0, 2.0])])
def test_jsd_agrees_with_the_generalised_jsd_of_trl(beta, temperature, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        student, teacher = logits(dtype)
        # TRL leaves out the factor tau^2.
        theirs = GKDTrainer.generalized_jsd_loss(
            student[None], teacher[None], beta=beta, temperature=temperature, reduction="sum"
        )
        ours = jsd(student, teacher, temperature, beta).sum()
        assert_close(ours, temperature**2 * theirs, tolerance)
        gradient, expected = (torch.autograd.grad(x, student)[0] for x in (ours, temperature**2 * theirs))
        assert_close(gradient, expected, tolerance)


@pytest.mark.parametrize(("beta", "temperature"), [*product([0.1, 0.5, 0.9], [1.0, 2.0])])
def test_jsd_agrees_with_the_fused_jsd_of_liger(beta, temperature):
    LigerFusedLinearJSDLoss = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    theirs = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False
    )
    student, teacher = logits(torch.float32)
    identity = torch.eye(VOCABULARY)
    # Liger averages over tokens and leaves out the factor tau^2.
    expected = temperature**2 * theirs(student, identity, teacher, identity, torch.zeros(TOKENS, dtype=torch.int64))
    ours = jsd(student, teacher, temperature, beta).mean()
    assert_close(ours, expected, 1e-5)
    gradient, expected_gradient = (torch.autograd.grad(x, student)[0] for x in (ours, expected))
    assert_close(gradient, expected_gradient, 1e-5)


def test_kl_losses_agree_with_kl_div_of_pytorch():
    student, teacher = logits()
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    assert_close(forward_kl(student, teacher), F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1))
    assert_close(reverse_kl(student, teacher), F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(1))


# Bad input


def test_an_unknown_loss_is_refused_with_the_names_of_all():
    with pytest.raises(KdlibError) as error:
        divergence_loss("kl", *logits())
    assert all(name in str(error.value) for name in [*DIVERGENCES, "'kl'"])
    assert set(CASES) == set(DIVERGENCES)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("jsd", {"beta": x}) for x in (0, 1, -0.1, 1.1, math.nan)),
        *((name, {"alpha": x}) for name in ("skewed_kl", "skewed_reverse_kl") for x in (0, 1, -0.1, math.nan)),
        *(("sinkhorn", {"group": x}) for x in (0, -3, 2.5)),
        *(("sinkhorn", {"regularisation": x}) for x in (0, -0.1, math.nan)),
        *(("sinkhorn", {"iterations": x}) for x in (0, 1.5)),
        *(("mutual_information", {"group": x}) for x in (0, 1, 2.5)),
        *(("mutual_information", {"critic_temperature": x}) for x in (0, -1, math.nan)),
    ],
)
def test_an_option_out_of_range_is_refused(name, options):
    (option, value) = next(iter(options.items()))
    with pytest.raises(KdlibError, match=f"{option} must .*got {value}"):
        divergence_loss(name, *logits(), **options)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_a_temperature_that_is_not_above_0_is_refused(temperature):
    with pytest.raises(KdlibError, match="`temperature` must be above 0"):
        divergence_loss("jsd", *logits(), temperature)


def test_student_and_teacher_of_different_shapes_are_refused():
    student, teacher = logits()
    targets = top_k(probabilities(teacher), 4)
    for s, t in (
        (student, teacher[:, :-1]),
        (student, teacher[:1]),
        (student, targets[:-1]),
        (student[None], teacher[None]),
    ):
        with pytest.raises(KdlibError, match="same T tokens"):
            divergence_loss("tvd", s, t)


@pytest.mark.parametrize("name", [name for name in OF_OUTCOMES if name != "forward_kl"])
def test_unbiased_draws_are_refused_by_name_outside_forward_kl(name):
    student, teacher = logits()
    targets = top_k(probabilities(teacher), 4)
    draws = SparseTargets(targets.ids, targets.weights, None, targets.entropy, 1.0)
    with pytest.raises(KdlibError, match=f"Targets for {name} must be dense or have a tail.*Use forward_kl"):
        divergence_loss(name, student, draws)
    with pytest.raises(KdlibError, match="not linear"):
        coarse(student, draws)


@pytest.mark.parametrize("name", OF_ROWS)
def test_losses_of_whole_rows_refuse_sparse_targets_by_name(name):
    student, teacher = logits()
    with pytest.raises(KdlibError, match=f"Targets for {name} must be dense.*got sparse"):
        divergence_loss(name, student, top_k(probabilities(teacher), 4))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_sparse_targets_of_another_temperature_are_refused(name):
    student, teacher = logits()
    with pytest.raises(KdlibError, match="sparse targets, 2.0, got 1.0"):
        divergence_loss(name, student, top_k(probabilities(teacher, 2.0), 4, 2.0), 1.0)
