"""The losses against their formulas, known limits, brute force and TRL: values and gradients alike."""

import os
import shutil
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kdlib.ensemble.pooling import POOLS, pool_of
from kdlib.errors import KdlibError
from kdlib.losses import DenseTargets, PooledTargets, SparseTargets, linear_distillation_loss
from kdlib.losses.divergences import DENSE_ONLY, DIVERGENCES, divergence_loss
from kdlib.losses.logits import Streamed
from kdlib.losses.reference import cross_entropy, distillation_loss, forward_kl, sparse_kl

TOKENS, VOCABULARY, WIDTH = 11, 13, 5
MASKED = [2, 7]
KINDS = ["sampled", "top-k with tail", "dense"]
# Half the last place of bfloat16's 8-bit significand.
BF16_ROUNDING = 2.0**-9
# The largest relative error of one rounding, that of a number just above a power of two.
BF16_UNIT, FLOAT32_UNIT = 2.0**-8, 2.0**-24


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(dtype=torch.float64):
    """Student [hidden, weight, bias], labels with two masked, and a dense teacher of another width."""
    student = [normal(TOKENS, WIDTH, seed=0), normal(VOCABULARY, WIDTH, seed=1), normal(VOCABULARY, seed=2)]
    labels = torch.arange(TOKENS) * 5 % VOCABULARY
    labels[MASKED] = -100
    teacher = [normal(TOKENS, 7, seed=3), normal(VOCABULARY, 7, seed=4), normal(VOCABULARY, seed=5)]
    return (
        [x.to(dtype).requires_grad_() for x in student],
        labels,
        DenseTargets(*(x.to(dtype) for x in teacher)),
    )


def logits_of(output_layer):
    hidden, weight, bias = output_layer
    return hidden @ weight.T + bias


def teacher_logits(teacher):
    return logits_of((teacher.hidden, teacher.weight, teacher.bias))


def probabilities(logits, temperature=1.0):
    e = (logits / temperature).exp()
    return e / e.sum(-1, keepdim=True)


def top_k(t, k, temperature=1.0, tail=True):
    """The k largest of t as targets; without ``tail`` they are renormalised."""
    weights, ids = t.topk(k)
    rest = t.scatter(1, ids, 0).sum(1)
    if not tail:
        weights = weights / weights.sum(1, keepdim=True)
        rest = torch.zeros_like(rest)
    entropy = -torch.xlogy(weights, weights).sum(1) - torch.xlogy(rest, rest)
    return SparseTargets(ids, weights, rest if tail else None, entropy, temperature)


def padded(targets):
    """The same targets with two columns of padding that repeat listed ids with weight 0."""
    ids = torch.cat([targets.ids, targets.ids[:, :1], targets.ids[:, 1:2]], 1)
    return SparseTargets(ids, F.pad(targets.weights, (0, 2)), targets.tail, targets.entropy, targets.temperature)


def targets_of(kind, teacher, temperature):
    t = probabilities(teacher_logits(teacher), temperature)
    if kind == "dense":
        return teacher
    if kind == "top-k with tail":
        return padded(top_k(t, 4, temperature))
    ids = (torch.arange(len(t))[:, None] + torch.arange(5) * 3) % VOCABULARY
    # Importance weights are not renormalised: their sum is not 1.
    weights = normal(len(t), 5, seed=6).abs().to(t.dtype) / 5
    return padded(SparseTargets(ids, weights, None, -torch.xlogy(t, t).sum(1), temperature))


def kl_by_hand(kind, logits, targets, temperature):
    """tau^2 * KL per token, each outcome spelled out."""
    s = probabilities(logits, temperature)
    if kind == "dense":
        t = probabilities(teacher_logits(targets), temperature)
        return temperature**2 * (t * (t / s).log()).sum(1)
    values = []
    for row in range(len(s)):
        outcomes = [(w, s[row, i]) for i, w in zip(targets.ids[row], targets.weights[row], strict=True) if w > 0]
        if targets.tail is not None:
            listed = {int(i) for i, w in zip(targets.ids[row], targets.weights[row], strict=True) if w > 0}
            others = [i for i in range(s.shape[1]) if i not in listed]
            if targets.tail[row] > 0:
                outcomes.append((targets.tail[row], s[row, others].sum()))
        values.append(-sum(w * p.log() for w, p in outcomes) - targets.entropy[row])
    return temperature**2 * torch.stack(values)


def loss_by_hand(kind, student, targets, labels, kd_weight, temperature):
    """Sums over unmasked tokens: (total, CE, KD)."""
    logits = logits_of(student)
    valid = [i for i, label in enumerate(labels.tolist()) if label != -100]
    ce = -sum(probabilities(logits)[i, labels[i]].log() for i in valid)
    kd = kl_by_hand(kind, logits, targets, temperature)[valid].sum() if kd_weight else 0.0
    return kd_weight * kd + (1 - kd_weight) * ce, ce, kd


def fused(student, labels, *arguments, **options):
    """Loss parts and the gradients of hidden, weight and bias."""
    parts = linear_distillation_loss(*student, labels, *arguments, **options)
    return parts, torch.autograd.grad(parts.loss, student)


def assert_close(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def relative_error(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


# The formulas


@pytest.mark.parametrize(
    ("kind", "temperature", "kd_weight"),
    [("none", 1.0, 0.0), *product(KINDS, [1.0, 2.0], [0.0, 0.3, 1.0])],
)
def test_fused_and_reference_equal_the_formula_in_value_and_gradient(kind, temperature, kd_weight):
    student, labels, teacher = problem()
    targets = None if kind == "none" else targets_of(kind, teacher, temperature)
    total, ce, kd = loss_by_hand(kind, student, targets, labels, kd_weight, temperature)
    tokens = TOKENS - len(MASKED)
    gradients = torch.autograd.grad(total / tokens, student)

    dense = teacher_logits(teacher) if targets is teacher else targets
    reference = (
        cross_entropy(logits_of(student), labels)
        if targets is None
        else distillation_loss(logits_of(student), dense, labels, kd_weight, temperature)
    )
    assert_close(reference, total / tokens)
    assert_close(torch.autograd.grad(reference, student), gradients)

    for chunk in (1, 4, tokens, 100, None):
        parts, found = fused(student, labels, targets, kd_weight, temperature, chunk_tokens=chunk)
        assert_close(parts.loss, total / tokens)
        assert_close(found, gradients)
        assert parts.tokens == tokens
        if kd_weight < 1:
            assert_close(parts.ce, ce)
        if kd_weight > 0:
            assert_close(parts.kd, kd)


@pytest.mark.parametrize(("kind", "temperature"), [*product(KINDS, [1.0, 2.0])])
def test_fused_gradients_pass_gradcheck(kind, temperature):
    student, labels, teacher = problem()
    targets = targets_of(kind, teacher, temperature)

    def loss(*student):
        return linear_distillation_loss(*student, labels, targets, 0.3, temperature, chunk_tokens=4).loss

    assert torch.autograd.gradcheck(loss, student, fast_mode=True)


@pytest.mark.parametrize(("kind", "temperature"), [*product(KINDS, [1.0, 2.0])])
def test_float32_stays_within_1e_5_of_float64(kind, temperature):
    student, labels, teacher = problem()
    expected, gradients = fused(student, labels, targets_of(kind, teacher, temperature), 0.3, temperature)
    student, labels, teacher = problem(torch.float32)
    parts, found = fused(student, labels, targets_of(kind, teacher, temperature), 0.3, temperature, chunk_tokens=4)
    assert parts.loss.dtype == torch.float32
    assert_close(parts.loss.double(), expected.loss, 1e-5)
    assert_close([g.double() for g in found], list(gradients), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_products_cost_no_more_than_bf16_rounding(kind):
    student, labels, teacher = problem(torch.float32)
    # Operands that bf16 holds exactly leave three roundings: of the logits, of their gradient and of the products.
    student = [x.detach().bfloat16().float().requires_grad_() for x in student]
    targets = targets_of(kind, teacher, 1.0)
    _, expected = fused(student, labels, targets, 0.3)
    parts, found = fused(student, labels, targets, 0.3, matmul_dtype=torch.bfloat16, chunk_tokens=4)
    assert parts.loss.dtype == torch.float32
    largest = float(logits_of(student).detach().abs().max())
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert 0 < relative_error(a, e) < (largest + 2) * BF16_ROUNDING


# Identities and limits


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(temperature):
    student, labels, _ = problem()
    itself = DenseTargets(*(x.detach() for x in student))
    t = probabilities(teacher_logits(itself), temperature)
    logits = logits_of(student)
    assert_close(forward_kl(logits, logits.detach(), temperature), torch.zeros(TOKENS, dtype=torch.float64))
    for targets in (itself, top_k(t, 4, temperature), top_k(t, VOCABULARY, temperature)):
        parts, gradients = fused(student, labels, targets, 1.0, temperature)
        assert_close(parts.loss, torch.zeros_like(parts.loss))
        assert_close(gradients, tuple(torch.zeros_like(g) for g in gradients))


def test_kd_weight_0_is_cross_entropy_bit_for_bit_whatever_the_teacher_holds():
    student, labels, teacher = problem(torch.float32)
    logits = logits_of(student)
    nonsense = torch.full_like(logits, torch.nan)
    plain = F.cross_entropy(logits, labels)
    assert torch.equal(distillation_loss(logits, nonsense, labels, 0.0), plain)
    expected, gradients = fused(student, labels)
    broken = DenseTargets(teacher.hidden * torch.nan, teacher.weight)
    for targets in (teacher, broken, targets_of("top-k with tail", teacher, 1.0)):
        parts, found = fused(student, labels, targets, 0.0, 2.0)
        assert torch.equal(parts.loss, expected.loss)
        assert all(torch.equal(a, e) for a, e in zip(found, gradients, strict=True))
    assert_close(expected.loss, plain, 1e-6)
    assert_close(gradients, torch.autograd.grad(plain, student), 1e-6)


def test_high_temperature_tends_to_half_the_mean_square_of_the_centred_logit_difference():
    student, labels, teacher = problem()
    difference = logits_of(student) - teacher_logits(teacher)
    centred = difference - difference.mean(1, keepdim=True)
    limit = (centred**2).sum(1) / (2 * VOCABULARY)
    valid = labels != -100
    gradients = torch.autograd.grad(limit[valid].mean(), student)
    torch.testing.assert_close(forward_kl(logits_of(student), teacher_logits(teacher), 1e5), limit, rtol=1e-3, atol=0)
    parts, found = fused(student, labels, teacher, 1.0, 1e5)
    torch.testing.assert_close(parts.loss, limit[valid].mean(), rtol=1e-3, atol=0)
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_adding_a_constant_to_student_or_teacher_logits_changes_nothing(kind):
    student, labels, teacher = problem()
    expected, gradients = fused(student, labels, targets_of(kind, teacher, 2.0), 0.3, 2.0)
    hidden, weight, bias = student
    shifted = DenseTargets(teacher.hidden, teacher.weight, teacher.bias - 50)
    parts = linear_distillation_loss(hidden, weight, bias + 80, labels, targets_of(kind, shifted, 2.0), 0.3, 2.0)
    assert_close(parts.loss, expected.loss)
    assert_close(torch.autograd.grad(parts.loss, student), gradients)
    # In the definitions the constant may differ from token to token.
    constant = normal(TOKENS, 1, seed=9) * 20
    logits, z = logits_of(student), teacher_logits(teacher)
    assert_close(forward_kl(logits + constant, z - constant, 2.0), forward_kl(logits, z, 2.0))


# Masks and means


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_have_exactly_zero_gradient_even_where_they_hold_nan(kind):
    student, labels, teacher = problem()
    targets = targets_of(kind, teacher, 1.0)
    reference = distillation_loss(
        logits_of(student), teacher_logits(teacher) if targets is teacher else targets, labels, 0.3
    )
    assert torch.equal(torch.autograd.grad(reference, student)[0][MASKED], torch.zeros(2, WIDTH, dtype=torch.float64))
    expected, gradients = fused(student, labels, targets, 0.3)
    assert torch.equal(gradients[0][MASKED], torch.zeros(2, WIDTH, dtype=torch.float64))
    with torch.no_grad():
        student[0][MASKED] = torch.nan
    parts, found = fused(student, labels, targets, 0.3)
    assert torch.equal(parts.loss, expected.loss)
    assert all(torch.equal(a, e) for a, e in zip(found, gradients, strict=True))


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_batch_without_any_label_has_zero_loss_and_zero_gradients(kind):
    student, labels, teacher = problem()
    targets = None if kind == "none" else targets_of(kind, teacher, 1.0)
    weight = 0.0 if kind == "none" else 0.3
    parts, gradients = fused(student, torch.full_like(labels, -100), targets, weight)
    assert parts.tokens == 0
    assert parts.loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_unequal_length_add_up_to_one_batch(kind):
    student, labels, teacher = problem()
    targets = targets_of(kind, teacher, 1.0)
    expected, gradients = fused(student, labels, targets, 0.3)

    def accumulated(normaliser):
        total = [torch.zeros_like(x) for x in student]
        loss = 0.0
        for rows in (slice(0, 3), slice(3, 4), slice(4, TOKENS)):
            micro = [student[0][rows], *student[1:]]
            parts = linear_distillation_loss(*micro, labels[rows], targets[rows], 0.3, normaliser=normaliser)
            loss = loss + parts.loss
            total = [a + g for a, g in zip(total, torch.autograd.grad(parts.loss, student), strict=True)]
        return loss, tuple(total)

    for normaliser in (TOKENS - len(MASKED), torch.tensor(TOKENS - len(MASKED), dtype=torch.float64)):
        loss, found = accumulated(normaliser)
        assert_close(loss, expected.loss)
        assert_close(found, gradients)
    # The usual mistake, a mean per micro-batch, is far off.
    assert relative_error(accumulated(None)[1][1] / 3, gradients[1]) > 0.1


def test_batchmean_over_a_batch_of_sequences_would_weigh_kd_by_the_sequence_length():
    z_s, z_t = normal(3, 6, VOCABULARY, seed=0), normal(3, 6, VOCABULARY, seed=1)
    trap = F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="batchmean")
    mean = distillation_loss(z_s.flatten(0, 1), z_t.flatten(0, 1), torch.zeros(18, dtype=torch.int64), kd_weight=1.0)
    assert_close(trap, 6 * mean)


# Sparse targets


@pytest.mark.parametrize(("k", "temperature"), [*product([1, 4, VOCABULARY - 1, VOCABULARY], [1.0, 2.0])])
def test_top_k_with_tail_is_the_kl_of_the_coarse_grained_distribution_and_never_negative(k, temperature):
    student, labels, teacher = problem()
    z_t = teacher_logits(teacher)
    t = probabilities(z_t, temperature)
    for shape in (z_t, z_t + 0.01 * normal(TOKENS, VOCABULARY, seed=8), 10 * normal(TOKENS, VOCABULARY, seed=8)):
        logits = shape.clone().requires_grad_()
        s = probabilities(logits, temperature)
        # Sorted by the teacher, the outcomes are the first k ids and all the others together.
        order = t.argsort(1, descending=True)
        p, q = (
            torch.cat([x.gather(1, order)[:, :k], x.gather(1, order)[:, k:].sum(1, keepdim=True)], 1) for x in (t, s)
        )
        if k == VOCABULARY:
            p, q = p[:, :k], q[:, :k]
        expected = temperature**2 * (p * (p / q).log()).sum(1)
        found = sparse_kl(logits, top_k(t, k, temperature))
        assert_close(found, expected)
        assert found.min() > -1e-12
        assert_close(torch.autograd.grad(found.sum(), logits), torch.autograd.grad(expected.sum(), logits))
    if k >= VOCABULARY - 1:
        # The one outcome left over is a single id: nothing is lost.
        parts, gradients = fused(student, labels, top_k(t, k, temperature), 0.3, temperature)
        expected, full = fused(student, labels, teacher, 0.3, temperature)
        assert_close(parts.loss, expected.loss)
        assert_close(gradients, full)


def test_a_tail_of_exactly_0_is_the_same_as_no_tail():
    student, labels, teacher = problem()
    t = probabilities(teacher_logits(teacher))
    plain = top_k(t, 4, tail=False)
    tail = torch.zeros(TOKENS, dtype=torch.float64)
    expected, gradients = fused(student, labels, plain, 0.3)
    targets = SparseTargets(plain.ids, plain.weights, tail, plain.entropy, 1.0)
    parts, found = fused(student, labels, targets, 0.3)
    assert_close(parts.loss, expected.loss)
    assert_close(found, gradients)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_expected_value_and_gradient_over_all_draws_are_those_of_full_kd(temperature):
    # Four ids and two draws: all sixteen outcomes can be listed, so the expectation is exact.
    hidden, weight, bias = normal(1, WIDTH, seed=0), normal(4, WIDTH, seed=1), normal(4, seed=2)
    student = [x.requires_grad_() for x in (hidden, weight, bias)]
    teacher = DenseTargets(normal(1, 7, seed=3), normal(4, 7, seed=4), None)
    labels = torch.tensor([2])
    t = probabilities(teacher.hidden @ teacher.weight.T, temperature)[0]
    entropy = -(t * t.log()).sum()
    value, gradients = 0.0, [torch.zeros_like(x) for x in student]
    for i, j in product(range(4), repeat=2):
        weights = torch.tensor([[1.0, 0.0]]) if i == j else torch.tensor([[0.5, 0.5]])
        targets = SparseTargets(torch.tensor([[i, j]]), weights, None, entropy[None], temperature)
        parts, found = fused(student, labels, targets, 1.0, temperature)
        value = value + t[i] * t[j] * parts.loss
        gradients = [a + t[i] * t[j] * g for a, g in zip(gradients, found, strict=True)]
    expected, full = fused(student, labels, teacher, 1.0, temperature)
    assert_close(value, expected.loss)
    assert_close(tuple(gradients), full)


@pytest.mark.parametrize("tail", [False, True])
def test_a_converged_student_has_t_over_a_on_plain_top_k_and_t_with_the_tail(tail):
    t = probabilities(2 * normal(3, VOCABULARY, seed=0))
    targets = top_k(t, 4, tail=tail)
    # Against the identity as output layer the hidden states are the logits themselves.
    logits = torch.zeros(3, VOCABULARY, dtype=torch.float64, requires_grad=True)
    output_layer, labels = torch.eye(VOCABULARY, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    optimiser = torch.optim.Adam([logits], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 300)
    for _ in range(300):
        optimiser.zero_grad()
        linear_distillation_loss(logits, output_layer, None, labels, targets, 1.0).loss.backward()
        optimiser.step()
        schedule.step()
    reached = probabilities(logits.detach())
    kept = t.gather(1, targets.ids)
    mass = kept.sum(1, keepdim=True)
    assert mass.max() < 0.97
    expected = kept if tail else kept / mass
    torch.testing.assert_close(reached.gather(1, targets.ids), expected, rtol=1e-3, atol=0)
    rest = reached.scatter(1, targets.ids, 0)
    torch.testing.assert_close(rest.sum(1), (1 - mass[:, 0]) * tail, rtol=1e-3, atol=1e-3)


# A padded vocabulary


@pytest.mark.parametrize(("kind", "temperature"), [*product(KINDS, [1.0, 2.0])])
def test_padding_both_vocabularies_with_minus_infinity_changes_nothing(kind, temperature):
    student, labels, teacher = problem()
    expected, gradients = fused(student, labels, targets_of(kind, teacher, temperature), 0.3, temperature)

    def pad(weight, bias):
        return F.pad(weight, (0, 0, 0, 3)), F.pad(bias, (0, 3), value=-torch.inf)

    wide = [x.detach().requires_grad_() for x in (student[0], *pad(*student[1:]))]
    wide_teacher = DenseTargets(teacher.hidden, *pad(teacher.weight, teacher.bias))
    targets = targets_of(kind, wide_teacher, temperature)
    if kind != "dense":
        # Ids without mass may be listed too.
        ids = F.pad(targets.ids, (0, 3), value=VOCABULARY + 1)
        targets = SparseTargets(ids, F.pad(targets.weights, (0, 3)), targets.tail, targets.entropy, temperature)
    logits = wide[0] @ F.pad(student[1].detach(), (0, 0, 0, 3)).T + wide[2].detach()
    dense = teacher_logits(wide_teacher) if kind == "dense" else targets
    reference = distillation_loss(logits, dense, labels, 0.3, temperature)
    assert_close(reference.detach(), expected.loss.detach())
    assert_close(torch.autograd.grad(reference, wide[0])[0], gradients[0])

    parts, found = fused(wide, labels, targets, 0.3, temperature)
    assert_close(parts.loss, expected.loss)
    assert_close(found[0], gradients[0])
    for a, e in zip(found[1:], gradients[1:], strict=True):
        assert_close(a[:VOCABULARY], e)
        assert torch.equal(a[VOCABULARY:], torch.zeros_like(a[VOCABULARY:]))


@pytest.mark.parametrize("k", [None, 4, VOCABULARY])
def test_an_id_the_teacher_rules_out_is_pushed_down_without_nan(k):
    student, labels, teacher = problem()
    teacher.bias[-3:] = -torch.inf
    t = probabilities(teacher_logits(teacher))
    targets = teacher if k is None else top_k(t, k)
    parts, gradients = fused(student, labels, targets, 1.0)
    logits = logits_of(student)
    reference = distillation_loss(logits, teacher_logits(teacher) if k is None else targets, labels, 1.0)
    assert_close(reference, parts.loss)
    assert_close(torch.autograd.grad(reference, student, retain_graph=True), gradients)
    assert parts.loss.isfinite()
    assert (gradients[2][-3:] > 0).all()
    if k != 4:
        s = probabilities(logits)
        expected = (s - t)[labels != -100].mean(0)
        assert_close(gradients[2], expected)


# Precision


def test_log_softmax_in_bf16_spoils_the_gradient_where_ours_stays_within_rounding():
    z_t = 3 * normal(32, 1000, seed=0)
    # A student near its teacher: what is left to learn is small against the logits.
    z_s, z_t = (z_t + 0.1 * normal(32, 1000, seed=1)).bfloat16(), z_t.bfloat16()
    exact = z_s.double().requires_grad_()
    expected_loss = forward_kl(exact, z_t.double()).mean()
    (expected,) = torch.autograd.grad(expected_loss, exact)

    naive = z_s.clone().requires_grad_()
    naive_loss = F.kl_div(naive.log_softmax(-1), z_t.log_softmax(-1), reduction="batchmean", log_target=True)
    (naive_gradient,) = torch.autograd.grad(naive_loss, naive)
    assert relative_error(naive_gradient, expected) > 0.02

    ours = z_s.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(forward_kl(ours, z_t).mean(), ours)
    assert relative_error(gradient, expected) < BF16_ROUNDING

    # With the identity as output layer and power-of-two normaliser, rounding the gradient is all that bf16 costs.
    hidden, identity = z_s.clone().requires_grad_(), torch.eye(1000, dtype=torch.bfloat16)
    parts = linear_distillation_loss(
        hidden, identity, None, torch.zeros(32, dtype=torch.int64), DenseTargets(z_t, identity), 1.0
    )
    (gradient,) = torch.autograd.grad(parts.loss, hidden)
    assert gradient.dtype == torch.bfloat16
    assert relative_error(gradient, expected) < BF16_ROUNDING
    assert relative_error(parts.loss, expected_loss) < 1e-4


def near_teacher(kind, gap, shift, temperature):
    """A student [hidden, weight, bias] whose logits are a few ``gap`` from the teacher's, and targets, all of float32.

    Both have ``shift`` in their biases. Hidden states are multiples of 1/4 up to 1 and weights of 1/8 up to 3/2, so that the
    student's products are multiples of 1/32 below 8, which bfloat16 holds exactly, as float32 does all logits.
    """
    hidden = (2 * normal(TOKENS, WIDTH, seed=0)).round().clamp(-4, 4) / 4
    weight = (8 * normal(VOCABULARY, WIDTH, seed=1)).round().clamp(-12, 12) / 8
    student = [hidden.float(), weight.float(), torch.full((VOCABULARY,), shift)]
    further = gap * normal(TOKENS, 2, seed=3).round(), normal(VOCABULARY, 2, seed=4).round()
    factors = [torch.cat([x, y.float()], 1) for x, y in zip(student[:2], further, strict=True)]
    targets = DenseTargets(*factors, student[2].clone())
    if kind != "dense":
        t = probabilities(teacher_logits(in_dtype(targets, torch.float64)), temperature)
        targets = top_k(t, 4, temperature) if kind == "top-k with tail" else draws_of(t, temperature)
    return [x.requires_grad_() for x in student], in_dtype(targets, torch.float32)


def draws_of(t, temperature, draws=20):
    """Draws from t, all ids listed."""
    drawn = torch.multinomial(t, draws, replacement=True, generator=torch.Generator().manual_seed(0))
    weights = F.one_hot(drawn, t.shape[1]).sum(1) / draws
    ids = torch.arange(t.shape[1]).expand(len(t), -1)
    return SparseTargets(ids, weights, None, -torch.xlogy(t, t).sum(1), temperature)


def in_dtype(targets, dtype):
    floating = {name: x.to(dtype) for name, x in vars(targets).items() if name != "ids" and torch.is_tensor(x)}
    return replace(targets, **floating)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [2.0**-7, 2.0**-10])
@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_near_the_teacher_bf16_rounds_the_small_gradient_and_not_what_it_is_the_difference_of(
    kind, gap, shift, temperature
):
    student, targets = near_teacher(kind, gap, shift, temperature)
    _, found = fused(student, torch.arange(TOKENS), targets, 1.0, temperature, matmul_dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in student]
    logits = logits_of(exact)
    total = kl_by_hand(kind, logits, in_dtype(targets, torch.float64), temperature).sum() / TOKENS
    pull, *expected = torch.autograd.grad(total, [logits, *exact])

    # The gradient with respect to the logits is tau / T * (s - target), either term off by some float32 units: one for each
    # number a softmax sums, one for each nat that exponents and their logarithms span, and a few for single operations.
    logits = logits.detach()
    units = VOCABULARY + (logits.amax(1) - logits.amin(1)).max() + 16
    off = units * FLOAT32_UNIT * (2 * temperature / TOKENS * probabilities(logits, temperature) + pull.abs())
    # It is rounded to bfloat16 and multiplied out; products are summed in float32, and rounded to bfloat16 once more.
    rounded = off + (BF16_UNIT + (VOCABULARY + TOKENS) * FLOAT32_UNIT) * (pull.abs() + off)
    bounds = [rounded @ exact[1].abs(), rounded.T @ exact[0].abs()]
    bounds = [bound + BF16_UNIT * (e.abs() + bound) for bound, e in zip(bounds, expected, strict=False)]
    # Its sum over tokens, the bias's, is of float32 throughout.
    bounds.append((off + TOKENS * FLOAT32_UNIT * (pull.abs() + off)).sum(0))
    for a, e, bound in zip(found, expected, bounds, strict=True):
        assert ((a.double() - e).abs() <= bound).all()
        assert bound.norm() < 9 * BF16_UNIT * e.norm()


def test_autocast_around_the_loss_does_not_reach_inside():
    student, labels, teacher = problem(torch.float32)
    expected, gradients = fused(student, labels, teacher, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        parts, found = fused(student, labels, teacher, 0.3)
    assert torch.equal(parts.loss, expected.loss)
    assert all(torch.equal(a, e) for a, e in zip(found, gradients, strict=True))


# An independent implementation


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forward_kl_agrees_with_the_generalised_jsd_of_trl(temperature, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    batch, length = 3, 6
    labels = torch.arange(batch * length).reshape(batch, length) % VOCABULARY
    labels[0, 3:] = labels[2, 1] = -100
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        z_s = normal(batch, length, VOCABULARY, seed=0, dtype=dtype).requires_grad_()
        z_t = normal(batch, length, VOCABULARY, seed=1, dtype=dtype)
        flat = (z_s.flatten(0, 1), z_t.flatten(0, 1), labels.flatten())
        ours = distillation_loss(*flat, 1.0, temperature)
        gradient = torch.autograd.grad(ours, z_s)
        identity = torch.eye(VOCABULARY, dtype=dtype)
        chunked = linear_distillation_loss(
            flat[0], identity, None, flat[2], DenseTargets(flat[1], identity), 1.0, temperature, chunk_tokens=4
        ).loss
        # TRL leaves out the factor tau^2.
        theirs = temperature**2 * GKDTrainer.generalized_jsd_loss(z_s, z_t, labels, beta=0.0, temperature=temperature)
        expected = torch.autograd.grad(theirs, z_s)
        assert_close(ours, theirs, tolerance)
        assert_close(gradient, expected, tolerance)
        assert_close(chunked, theirs, tolerance)
        assert_close(torch.autograd.grad(chunked, z_s), expected, tolerance)
        if dtype == torch.float64:
            # JSD_beta / beta -> KL(teacher || student), not the other direction.
            jsd = GKDTrainer.generalized_jsd_loss(z_s, z_t, labels, beta=1e-5, temperature=temperature) / 1e-5
            torch.testing.assert_close(temperature**2 * jsd, ours, rtol=1e-3, atol=0)


# Memory and autograd


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("kind", "temperature"), [*product(["none", *KINDS], [1.0, 2.0])])
def test_logits_of_all_tokens_never_exist_at_once(kind, temperature):
    tokens, vocabulary, width, chunk = 512, 64, 6, 16
    student = [normal(tokens, width, seed=0), normal(vocabulary, width, seed=1), normal(vocabulary, seed=2)]
    student = [x.requires_grad_() for x in student]
    labels = torch.arange(tokens) % vocabulary
    teacher = DenseTargets(normal(tokens, width, seed=3), normal(vocabulary, width, seed=4))
    t = probabilities(teacher.hidden @ teacher.weight.T, temperature)
    targets = {
        "none": None,
        "sampled": top_k(t, 4, temperature, tail=False),
        "top-k with tail": top_k(t, 4, temperature),
        "dense": teacher,
    }[kind]
    weight = 0.0 if kind == "none" else 0.3
    for token_weights in (None, torch.ones(tokens)):
        with LargestTensor() as largest:
            fused(student, labels, targets, weight, temperature, chunk_tokens=chunk, token_weights=token_weights)
        assert largest.elements == max(tokens * width, chunk * vocabulary)
    with LargestTensor() as largest:
        cross_entropy(student[0] @ student[1].T, labels).backward()
    assert largest.elements >= tokens * vocabulary


def test_the_default_chunk_bounds_memory_too():
    tokens, vocabulary = 128, 2**16
    hidden, weight = (normal(n, 2, seed=n, dtype=torch.float32).requires_grad_() for n in (tokens, vocabulary))
    with LargestTensor() as largest:
        linear_distillation_loss(hidden, weight, None, torch.arange(tokens)).loss.backward()
    assert 2 * vocabulary < largest.elements < tokens * vocabulary


def test_inputs_need_not_be_contiguous():
    student, labels, teacher = problem()
    targets = targets_of("top-k with tail", teacher, 1.0)
    expected, gradients = fused(student, labels, targets, 0.3)

    def strided(x):
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x.detach()
        return wide[..., ::2]

    turned = [strided(student[0]), student[1].detach().T.contiguous().T, strided(student[2])]
    turned = [x.requires_grad_() for x in turned]
    assert not any(x.is_contiguous() for x in turned)
    sparse = SparseTargets(
        strided(targets.ids), strided(targets.weights), strided(targets.tail), strided(targets.entropy), 1.0
    )
    parts, found = fused(turned, strided(labels), sparse, 0.3, chunk_tokens=4)
    assert_close(parts.loss, expected.loss)
    assert_close(found, gradients)


@pytest.mark.parametrize("frozen", range(3))
def test_a_frozen_input_gets_no_gradient_and_the_others_keep_theirs(frozen):
    student, labels, teacher = problem()
    _, gradients = fused(student, labels, teacher, 0.3)
    student[frozen].requires_grad_(False)
    linear_distillation_loss(*student, labels, teacher, 0.3).loss.backward()
    for i, (x, gradient) in enumerate(zip(student, gradients, strict=True)):
        if i == frozen:
            assert x.grad is None
        else:
            assert torch.equal(x.grad, gradient)


def test_without_a_bias_and_without_gradients_the_value_is_the_same():
    student, labels, teacher = problem()
    with torch.no_grad():
        student[2].zero_()
        parts = linear_distillation_loss(*student[:2], None, labels, teacher, 0.3)
    expected = linear_distillation_loss(*student, labels, teacher, 0.3)
    assert not parts.loss.requires_grad
    assert not expected.ce.requires_grad
    assert not expected.kd.requires_grad
    assert_close(parts.loss, expected.loss.detach())


def test_an_output_layer_tied_to_the_embedding_gets_both_gradients():
    _, labels, teacher = problem()
    embedding = normal(VOCABULARY, WIDTH, seed=1).requires_grad_()
    inputs = torch.arange(TOKENS) % VOCABULARY
    tied = 0.5 * embedding
    hidden = torch.tanh(embedding[inputs])
    parts = linear_distillation_loss(hidden, tied, None, labels, teacher, 0.3)
    reference = distillation_loss(hidden @ tied.T, teacher_logits(teacher), labels, 0.3)
    expected = torch.autograd.grad(reference, embedding, retain_graph=True)
    assert_close(torch.autograd.grad(parts.loss, embedding), expected)


def test_backward_scales_with_the_incoming_gradient_and_may_be_repeated():
    student, labels, teacher = problem()
    _, gradients = fused(student, labels, teacher, 0.3)
    loss = linear_distillation_loss(*student, labels, teacher, 0.3).loss
    (2 * loss).backward(retain_graph=True)
    loss.backward()
    assert_close([x.grad for x in student], [3 * g for g in gradients])


def test_second_derivatives_are_refused_rather_than_wrong():
    student, labels, teacher = problem()
    loss = linear_distillation_loss(*student, labels, teacher, 0.3).loss
    with pytest.raises(KdlibError, match="second derivative"):
        torch.autograd.grad(loss, student[0], create_graph=True)


# Bad input


@pytest.mark.parametrize("kd_weight", [-0.1, 1.1, float("nan")])
def test_a_kd_weight_outside_0_to_1_is_refused(kd_weight):
    student, labels, teacher = problem()
    with pytest.raises(KdlibError, match=r"must be in 0\.\.1"):
        linear_distillation_loss(*student, labels, teacher, kd_weight)


def test_a_kd_weight_without_targets_is_refused():
    student, labels, _ = problem()
    with pytest.raises(KdlibError, match="and 0 without teacher targets"):
        linear_distillation_loss(*student, labels, None, 0.3)


def test_sparse_targets_of_another_temperature_are_refused():
    student, labels, teacher = problem()
    with pytest.raises(KdlibError, match="sparse targets, 2.0, got 1.0"):
        linear_distillation_loss(*student, labels, targets_of("sampled", teacher, 2.0), 0.3, 1.0)


# Other divergences

GROUP = 4
OPTIONS = {
    "jsd": {"beta": 0.3},
    "skewed_kl": {"alpha": 0.2},
    "skewed_reverse_kl": {"alpha": 0.2},
    "sinkhorn": {"group": GROUP, "regularisation": 0.5, "iterations": 5},
    "mutual_information": {"group": GROUP, "critic_temperature": 0.5},
}
UNSERVED_BY_TOP_K = {loss.__name__ for loss in DENSE_ONLY}
SERVED = [
    (name, kind)
    for name, kind in product(DIVERGENCES, ["dense", "top-k with tail"])
    if kind == "dense" or name not in UNSERVED_BY_TOP_K
]


@pytest.mark.parametrize(("name", "kind"), SERVED)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kd_weight", [0.3, 1.0])
def test_every_divergence_equals_autograd_through_dense_logits_whatever_the_chunk(name, kind, temperature, kd_weight):
    student, labels, teacher = problem()
    targets, options = targets_of(kind, teacher, temperature), OPTIONS.get(name, {})
    valid = (labels != -100).nonzero().squeeze(1)
    # Groups of tokens are those of the tokens that have a label.
    logits = logits_of(student)[valid]
    whole = teacher_logits(teacher)[valid] if kind == "dense" else targets[valid]
    kd = divergence_loss(name, logits, whole, temperature, **options).sum()
    ce = F.cross_entropy(logits, labels[valid], reduction="sum")
    total = (kd_weight * kd + (1 - kd_weight) * ce) / len(valid)
    gradients = torch.autograd.grad(total, student)
    for chunk in (1, 3, GROUP, 7, 100, None):
        parts, found = fused(
            student, labels, targets, kd_weight, temperature, chunk_tokens=chunk, divergence=name, options=options
        )
        assert_close(parts.loss, total)
        assert_close(found, gradients)
        assert_close((parts.ce, parts.kd), (ce.detach(), kd.detach()))
        assert torch.equal(found[0][MASKED], torch.zeros(2, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_kd_weight_0_is_cross_entropy_bit_for_bit_with_every_divergence(name):
    student, labels, teacher = problem(torch.float32)
    expected, gradients = fused(student, labels, chunk_tokens=3)
    broken = DenseTargets(teacher.hidden * torch.nan, teacher.weight)
    parts, found = fused(student, labels, broken, 0.0, 2.0, chunk_tokens=3, divergence=name, options=OPTIONS.get(name))
    assert parts.kd is None
    assert torch.equal(parts.loss, expected.loss)
    assert all(torch.equal(a, e) for a, e in zip(found, gradients, strict=True))


def test_forward_kl_is_the_default_divergence():
    student, labels, teacher = problem(torch.float32)
    expected, gradients = fused(student, labels, teacher, 0.3, 2.0)
    parts, found = fused(student, labels, teacher, 0.3, 2.0, divergence="forward_kl", options={})
    assert torch.equal(parts.loss, expected.loss)
    assert all(torch.equal(a, e) for a, e in zip(found, gradients, strict=True))
    _, reverse = fused(student, labels, teacher, 0.3, 2.0, divergence="reverse_kl")
    assert relative_error(reverse[0], gradients[0]) > 0.1


@pytest.mark.parametrize("name", DIVERGENCES)
def test_bf16_products_cost_every_divergence_a_few_bf16_roundings(name):
    student, labels, teacher = problem(torch.float32)
    student = [x.detach().bfloat16().float().requires_grad_() for x in student]
    teacher = DenseTargets(*(x.bfloat16().float() for x in (teacher.hidden, teacher.weight, teacher.bias)))
    options = {"divergence": name, "options": OPTIONS.get(name)}
    _, expected = fused(student, labels, teacher, 0.3, **options)
    parts, found = fused(student, labels, teacher, 0.3, matmul_dtype=torch.bfloat16, **options)
    assert parts.loss.dtype == torch.float32
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        # Of the student's logits, of their gradient and of its products.
        assert 0 < relative_error(a, e) < 3 * BF16_ROUNDING


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"forward_kl", *UNSERVED_BY_TOP_K}))
def test_unbiased_draws_serve_no_divergence_but_forward_kl(name):
    student, labels, teacher = problem()
    with pytest.raises(KdlibError, match=f"Targets for {name} must be dense or have a tail"):
        fused(student, labels, targets_of("sampled", teacher, 1.0), 0.3, divergence=name)


@pytest.mark.parametrize("name", sorted(UNSERVED_BY_TOP_K))
@pytest.mark.parametrize("kind", ["sampled", "top-k with tail"])
def test_sparse_targets_serve_no_loss_of_whole_rows(name, kind):
    student, labels, teacher = problem()
    with pytest.raises(KdlibError, match=f"Targets for {name} must be dense"):
        fused(student, labels, targets_of(kind, teacher, 1.0), 0.3, divergence=name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("forward_kl", {"beta": 0.5}, "must be among none, got beta"),
        ("jsd", {"alpha": 0.5}, "must be among beta, got alpha"),
        ("jsd", {"temperature": 2.0}, "must be among beta, got temperature"),
        ("jsd", {"beta": 1.0}, "beta must lie between"),
        ("sinkhorn", {"group": 0}, "group must be a whole number"),
        ("mutual_information", {"group": 4.0}, "group must be a whole number"),
        ("backward_kl", {}, "must be one of forward_kl, reverse_kl, .*, got 'backward_kl'"),
    ],
)
def test_an_unknown_divergence_or_option_is_refused_whatever_its_weight(name, options, message):
    student, labels, teacher = problem()
    with pytest.raises(KdlibError, match=message):
        fused(student, labels, teacher, 0.3, divergence=name, options=options)
    if "among" in message:
        with pytest.raises(KdlibError, match=message):
            fused(student, labels, divergence=name, options=options)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"forward_kl", "sinkhorn", "mutual_information"}))
def test_every_divergence_keeps_no_more_than_a_chunk_of_logits(name):
    tokens, vocabulary, width, chunk = 512, 64, 6, 16
    student = [normal(tokens, width, seed=0), normal(vocabulary, width, seed=1), normal(vocabulary, seed=2)]
    student = [x.requires_grad_() for x in student]
    teacher = DenseTargets(normal(tokens, width, seed=3), normal(vocabulary, width, seed=4))
    with LargestTensor() as largest:
        fused(student, torch.arange(tokens) % vocabulary, teacher, 0.3, chunk_tokens=chunk, divergence=name)
    assert largest.elements == max(tokens * width, chunk * vocabulary)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")), reason="needs a C++ compiler"
)
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_compiled_softmax_gives_the_same_loss_to_float32_rounding(kind):
    student, labels, teacher = problem(torch.float32)
    targets = None if kind == "none" else targets_of(kind, teacher, 2.0)
    weight = 0.0 if kind == "none" else 0.3
    for weights in (None, weights_of_tokens()):
        options = {"chunk_tokens": 4, "token_weights": weights}
        expected, gradients = fused(student, labels, targets, weight, 2.0, **options)
        parts, found = fused(student, labels, targets, weight, 2.0, compiled=True, **options)
        assert_close((parts.loss, *found), (expected.loss, *gradients), 1e-6)


# Token weights

WEIGHTLESS = 4
TOKENWISE = [(name, kind) for name, kind in SERVED if "group" not in OPTIONS.get(name, {})]


def weights_of_tokens():
    """Any numbers, at tokens without a label too, and a weight of 0 at a token with one."""
    weights = 2 * normal(TOKENS, seed=7).abs()
    weights[WEIGHTLESS] = 0
    return weights


def assert_equals_weighted(total, ce, kd, student, labels, arguments, options):
    """Loss parts and gradients of the fused loss, in chunks of any size."""
    gradients = torch.autograd.grad(total, student)
    for chunk in (1, 4, 100, None):
        parts, found = fused(
            student, labels, *arguments, **options, chunk_tokens=chunk, token_weights=weights_of_tokens()
        )
        assert_close(parts.loss, total)
        assert_close(found, gradients)
        assert_close(parts.ce, ce.detach())
        assert kd is parts.kd is None or torch.allclose(parts.kd, kd, rtol=1e-11)
        assert parts.tokens == TOKENS - len(MASKED)
        assert torch.equal(found[0][[*MASKED, WEIGHTLESS]], torch.zeros(3, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "temperature", "kd_weight"), [("none", 1.0, 0.0), *product(KINDS, [1.0, 2.0], [0.3, 1.0])]
)
def test_a_tokens_weight_multiplies_its_loss_in_value_and_gradient(kind, temperature, kd_weight):
    student, labels, teacher = problem()
    targets = None if kind == "none" else targets_of(kind, teacher, temperature)
    logits, valid = logits_of(student), (labels != -100).nonzero().squeeze(1)
    weights = weights_of_tokens()[valid]
    ce = -(weights * probabilities(logits)[valid, labels[valid]].log()).sum()
    kd = None if targets is None else (weights * kl_by_hand(kind, logits, targets, temperature)[valid]).sum()
    total = (ce if kd is None else kd_weight * kd + (1 - kd_weight) * ce) / len(valid)
    assert_equals_weighted(total, ce, kd, student, labels, (targets, kd_weight, temperature), {})


@pytest.mark.parametrize(("name", "kind"), TOKENWISE)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_divergence_of_single_tokens_is_weighted(name, kind, temperature):
    student, labels, teacher = problem()
    targets, options = targets_of(kind, teacher, temperature), OPTIONS.get(name, {})
    logits, weights, valid = logits_of(student), weights_of_tokens(), labels != -100
    whole = teacher_logits(teacher) if kind == "dense" else targets
    kd = (weights * divergence_loss(name, logits, whole, temperature, **options))[valid].sum()
    ce = (weights * F.cross_entropy(logits, labels, reduction="none"))[valid].sum()
    total = (0.3 * kd + 0.7 * ce) / valid.sum()
    given = {"divergence": name, "options": options}
    assert_equals_weighted(total, ce, kd, student, labels, (targets, 0.3, temperature), given)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("matmul_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind"), [("forward_kl", "none"), ("forward_kl", "sampled"), *TOKENWISE])
def test_weights_of_1_change_no_bit(name, kind, matmul_dtype, temperature):
    student, labels, teacher = problem(torch.float32)
    targets, weight = (None, 0.0) if kind == "none" else (targets_of(kind, teacher, temperature), 0.3)
    options = {"matmul_dtype": matmul_dtype, "divergence": name, "options": OPTIONS.get(name), "chunk_tokens": 4}
    expected, gradients = fused(student, labels, targets, weight, temperature, **options)
    for ones in (torch.ones(TOKENS), torch.ones(TOKENS, dtype=torch.float64)):
        parts, found = fused(student, labels, targets, weight, temperature, token_weights=ones, **options)
        for a, e in zip((*parts[:3], *found), (*expected[:3], *gradients), strict=True):
            assert a is e is None or (a.dtype == e.dtype and torch.equal(a, e))


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_weights_of_0_and_1_select_tokens_whatever_the_others_hold(kind):
    student, labels, teacher = problem()
    targets, weight = (None, 0.0) if kind == "none" else (targets_of(kind, teacher, 1.0), 0.3)
    chosen = torch.arange(TOKENS) % 3 > 0
    expected, gradients = fused(student, labels.where(chosen, -100), targets, weight, normaliser=7.0, chunk_tokens=4)
    with torch.no_grad():
        student[0][~chosen] = torch.inf
    options = {"normaliser": 7.0, "chunk_tokens": 4, "token_weights": chosen.double()}
    parts, found = fused(student, labels, targets, weight, **options)
    assert torch.equal(parts.loss, expected.loss)
    assert all(torch.equal(a, e) for a, e in zip(found, gradients, strict=True))
    assert (parts.tokens, expected.tokens) == ((labels != -100).sum(), ((labels != -100) & chosen).sum())


def test_without_any_weight_there_is_no_loss():
    student, labels, teacher = problem()
    parts, gradients = fused(student, labels, teacher, 0.3, token_weights=torch.zeros(TOKENS))
    assert parts[:3] == (0, 0, 0) and parts.tokens == TOKENS - len(MASKED)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -0.5])
def test_weights_that_are_no_numbers_from_0_up_are_refused(wrong):
    student, labels, teacher = problem()
    weights = weights_of_tokens()
    weights[MASKED[0]] = wrong
    with pytest.raises(KdlibError, match=rf"\[T\], finite and 0 or more.*\({TOKENS},\).*{wrong}"):
        fused(student, labels, teacher, 0.3, token_weights=weights)


def test_weights_of_other_tokens_are_refused():
    student, labels, teacher = problem()
    with pytest.raises(
        KdlibError, match=f"must have the same rows.*'token_weights': {TOKENS - 1}"
    ):
        fused(student, labels, teacher, 0.3, token_weights=weights_of_tokens()[1:])
    with pytest.raises(KdlibError, match=rf"finite and 0 or more, got shape \({TOKENS}, 1\)"):
        fused(student, labels, teacher, 0.3, token_weights=weights_of_tokens()[:, None])


@pytest.mark.parametrize("name", ["sinkhorn", "mutual_information"])
@pytest.mark.parametrize("kd_weight", [0.0, 0.3])
def test_losses_on_groups_of_tokens_take_no_weights(name, kd_weight):
    student, labels, teacher = problem()
    with pytest.raises(KdlibError, match=f"must be None with {name}.*Leave them out, or choose"):
        fused(student, labels, teacher, kd_weight, divergence=name, token_weights=torch.ones(TOKENS))


# Ensembles


def members_of(dtype=torch.float64):
    """Three members of unlike widths, one without a bias."""
    sizes = {20: 4, 30: 7, 40: 3}
    members = []
    for s, n in sizes.items():
        layer = normal(TOKENS, n, seed=s), normal(VOCABULARY, n, seed=s + 1), normal(VOCABULARY, seed=s + 2)
        members.append(DenseTargets(*(x.to(dtype) for x in layer)))
    return (replace(members[0], bias=None), *members[1:])


def pooled_by_hand(members, pool, calibration):
    """The pool [T, V]: the mean of probabilities or their normalised product, to the power 1 / calibration."""
    each = torch.stack([probabilities(x.hidden @ x.weight.T + (0 if x.bias is None else x.bias)) for x in members])
    found = each.mean(0) if pool == "probability" else each.prod(0) ** (1 / len(each))
    found = found ** (1 / calibration)
    return found / found.sum(1, keepdim=True)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("calibration", [1.0, 1.6])
@pytest.mark.parametrize(("tau", "kd_weight"), [(1.0, 0.3), (2.0, 0.3), (2.0, 1.0)])
def test_an_ensemble_teaches_its_pooled_distribution_whatever_the_chunk(pool, calibration, tau, kd_weight):
    student, labels, _ = problem()
    targets, valid = PooledTargets(members_of(), POOLS[pool], calibration), labels != -100
    t = probabilities(pooled_by_hand(members_of(), pool, calibration).log(), tau)
    logits = logits_of(student)
    kd = tau**2 * F.kl_div(F.log_softmax(logits / tau, 1), t, reduction="none").sum(1)[valid].sum()
    ce = F.cross_entropy(logits, labels, reduction="sum")
    total = (kd_weight * kd + (1 - kd_weight) * ce) / valid.sum()
    gradients = torch.autograd.grad(total, student)
    for chunk in (1, 4, TOKENS - len(MASKED), 100, None):
        parts, found = fused(student, labels, targets, kd_weight, tau, chunk_tokens=chunk)
        assert_close(parts.loss, total)
        assert_close(found, gradients)
        assert_close((parts.ce, parts.kd), (ce.detach(), kd.detach()))
        assert torch.equal(found[0][MASKED], torch.zeros(2, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_ensemble_serves_every_divergence_whatever_the_chunk(name, pool):
    student, labels, _ = problem()
    targets, options = PooledTargets(members_of(), POOLS[pool], 1.6), OPTIONS.get(name, {})
    valid, whole = (labels != -100).nonzero().squeeze(1), pooled_by_hand(members_of(), pool, 1.6).log()
    kd = divergence_loss(name, logits_of(student)[valid], whole[valid], 2.0, **options)
    gradients = torch.autograd.grad(kd.mean(), student)
    for chunk in (GROUP, 2 * GROUP, None):
        parts, found = fused(student, labels, targets, 1.0, 2.0, chunk_tokens=chunk, divergence=name, options=options)
        assert_close(parts.loss, kd.mean())
        assert_close(found, gradients)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("calibration", "temperature"), [(1.0, 1.0), (1.0, 2.0), (1.6, 2.0)])
def test_an_ensemble_of_one_is_its_member(pool, calibration, temperature):
    student, labels, teacher = problem()
    # A calibrated member has its logits divided.
    calibrated = DenseTargets(teacher.hidden, teacher.weight / calibration, teacher.bias / calibration)
    expected, gradients = fused(student, labels, calibrated, 0.3, temperature)
    parts, found = fused(student, labels, PooledTargets((teacher,), POOLS[pool], calibration), 0.3, temperature)
    assert_close(parts.loss, expected.loss)
    assert_close(found, gradients)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_towards_an_ensemble_pass_gradcheck(pool, temperature):
    student, labels, _ = problem()
    targets = PooledTargets(members_of(), POOLS[pool], 1.6)

    def loss(*student):
        return linear_distillation_loss(*student, labels, targets, 0.3, temperature, chunk_tokens=4).loss

    assert torch.autograd.gradcheck(loss, student, fast_mode=True)


def test_members_of_half_precision_are_pooled_in_float32():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        targets = PooledTargets(members_of(dtype), POOLS["probability"])
        assert targets.logits().dtype == (dtype if dtype == torch.float64 else torch.float32)
        expected = pooled_by_hand([in_dtype(one, torch.float64) for one in targets.members], "probability", 1.0)
        # A bfloat16 product is rounded on its way out, logits of up to 16 by up to 1/32.
        tolerance = 0.07 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(targets.logits().exp().double(), expected, rtol=tolerance, atol=1e-6)


def test_rows_and_moves_of_an_ensemble_reach_every_member_and_keep_its_pool():
    targets = PooledTargets(members_of(), POOLS["logit"], 1.6)
    assert len(targets) == TOKENS and len(targets[2:5]) == 3
    assert_close(targets[2:5].logits(), targets.logits()[2:5])
    moved = targets.to(torch.device("meta"))
    assert all(one.hidden.is_meta and one.weight.is_meta for one in moved.members)
    assert (moved.pool, moved.temperature) == (POOLS["logit"], 1.6) and moved.members[0].bias is None


def test_an_ensemble_keeps_no_more_than_a_chunk_of_one_members_logits():
    tokens, vocabulary, width, chunk = 512, 64, 6, 32
    student = [normal(tokens, width, seed=0), normal(vocabulary, width, seed=1), normal(vocabulary, seed=2)]
    members = [DenseTargets(normal(tokens, width, seed=s), normal(vocabulary, width, seed=s + 1)) for s in (3, 5, 7)]
    student = [x.requires_grad_() for x in student]
    targets = PooledTargets(tuple(members), POOLS["probability"])
    with LargestTensor() as largest:
        fused(student, torch.arange(tokens) % vocabulary, targets, 0.3, chunk_tokens=chunk)
    assert chunk * vocabulary < largest.elements == tokens * width < len(members) * chunk * vocabulary


class Living(TorchDispatchMode):
    """Records how many tensors of ``elements`` or more have been alive at a time, views of one counted once."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.most, self.seen = elements, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.elements:
                self.seen.append(weakref.ref(tensor))
        self.seen = [one for one in self.seen if one() is not None]
        # In units of such a tensor, so that a stack of several counts as what it holds.
        sizes = {one().untyped_storage().data_ptr(): one().untyped_storage().nbytes() // one().itemsize for one in self.seen}
        self.most = max(self.most, sum(size // self.elements for size in sizes.values()))
        return result


def many_members(count, dtype=torch.float64):
    return tuple(DenseTargets(normal(TOKENS, 5, seed=s).to(dtype), normal(VOCABULARY, 5, seed=s + 1).to(dtype)) for s in range(0, 2 * count, 2))


WEIGHTS = [0.1, 0.0, 0.3, 0.2, 0.15, 0.05, 0.2]
EVEN = {"probability": pool_of("probability"), "logit": pool_of("logit"), "power": pool_of("probability", 0.4)}
WAYS = EVEN | {
    "weighted probability": pool_of("probability", None, WEIGHTS),
    "weighted logit": pool_of("logit", None, WEIGHTS),
    "weighted power": pool_of("probability", 0.4, WEIGHTS),
}


def stacked_by_hand(members, way):
    """The pool as its formula, from one tensor of all members, in float64."""
    p = torch.stack([probabilities(one.hidden.double() @ one.weight.double().T) for one in members])
    w = torch.tensor(WEIGHTS if "weighted" in way else [1 / len(p)] * len(p), dtype=torch.float64)[:, None, None]
    r = 0.4 if "power" in way else 1
    found = (p**w).prod(0) if "logit" in way else (w * p**r).sum(0) ** (1 / r)
    return (found / found.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_members_that_are_streamed_have_the_pool_of_those_that_are_stacked(way, dtype, tolerance):
    members = many_members(7, dtype)
    found = PooledTargets(members, WAYS[way]).logits()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), stacked_by_hand(members, way), rtol=tolerance, atol=tolerance)
    stacked = torch.stack([F.log_softmax(one.logits(), -1) for one in members])
    assert torch.equal(WAYS[way](stacked), found)


@pytest.mark.parametrize("way", EVEN)
def test_a_pool_of_many_members_holds_as_many_sets_of_logits_as_one_of_few(way):
    most = {}
    for count in (3, 12):
        with Living(TOKENS * VOCABULARY) as living:
            PooledTargets(many_members(count), WAYS[way]).logits()
        most[count] = living.most
    assert most[12] == most[3] <= 5
    with Living(TOKENS * VOCABULARY) as living:  # what it must not do, and what this test would notice
        WAYS[way](torch.stack([F.log_softmax(one.logits(), -1) for one in many_members(12)]))
    assert living.most >= 24


def test_streamed_members_are_asked_once_and_must_be_as_many_as_the_weights():
    asked = []
    streamed = Streamed(many_members(3), lambda one: asked.append(one) or F.log_softmax(one.logits(), -1))
    for pool in (pool_of("probability"), pool_of("logit"), pool_of("probability", 0.5), pool_of("logit", None, [0.2, 0.3, 0.5])):
        pool(streamed)
    assert len(asked) == 4 * 3
    with pytest.raises(KdlibError, match="3 non-negative numbers that sum to 1"):
        pool_of("probability", None, [0.5, 0.5])(streamed)
