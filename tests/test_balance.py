"""Balanced gradients on vectors whose answer is known, and inside a training step."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import BLOCK, VOCABULARY, make_model
from torch import nn

from kdlib import models
from kdlib.errors import KdlibError
from kdlib.losses import linear_distillation_loss
from kdlib.losses.balance import backward, norm, project
from kdlib.losses.features import FeatureLoss

coordinates = st.floats(-8, 8, width=32)
vectors = st.lists(coordinates, min_size=6, max_size=6)


def split(values):
    """One vector as the gradients of two parameters of different shapes."""
    values = torch.tensor(values, dtype=torch.float64)
    return [values[:2], values[2:].reshape(2, 2)]


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def equal(found, expected):
    return torch.equal(flat(found), flat(split(expected)))


def test_project_removes_exactly_the_opposing_component():
    main = split([3, 0, 0, 4, 0, 0])
    assert equal(project(main, split([-3, 1, 0, -4, 0, 2])), [0, 1, 0, 0, 0, 2])  # conflicting
    assert equal(project(main, split([0, 1, 2, 0, 3, 0])), [0, 1, 2, 0, 3, 0])  # orthogonal
    assert equal(project(main, split([6, 1, 0, 8, 0, 0])), [6, 1, 0, 8, 0, 0])  # aligned
    assert equal(project(main, split([-6, 0, 0, -8, 0, 0])), [0] * 6)  # opposite


def test_the_conflict_is_that_of_the_whole_vector_not_of_each_tensor():
    main = split([1, 0, 2, 0, 0, 0])
    auxiliary = [-1, 0, 1, 0, 0, 0]  # against the main gradient in the first tensor, with it on the whole
    assert equal(project(main, split(auxiliary)), auxiliary)


def test_norm_scales_down_to_the_ratio_and_never_up():
    main = split([3, 0, 0, 4, 0, 0])
    assert equal(norm(main, split([0, 8, 6, 0, 0, 0]), 0.5), [0, 2, 1.5, 0, 0, 0])
    assert equal(norm(main, split([0, 2, 0, 0, 0, 0]), 0.5), [0, 2, 0, 0, 0, 0])
    assert equal(norm(main, split([0] * 6), 0.5), [0] * 6)
    assert equal(norm(split([0] * 6), split([1] * 6), 0.5), [0] * 6)
    assert equal(project(split([0] * 6), split([1] * 6)), [1] * 6)


@given(vectors, vectors)
def test_a_projected_gradient_never_opposes_the_main_one(main, auxiliary):
    main, auxiliary = split(main), split(auxiliary)
    found, size = flat(project(main, auxiliary)), float(flat(main).norm() * flat(auxiliary).norm())
    assert float(flat(main) @ found) >= -1e-12 * size
    assert float(flat(main) @ (flat(main) + found)) >= (1 - 1e-12) * float(flat(main).square().sum()) - 1e-12 * size
    assert float(found.norm()) <= (1 + 1e-12) * float(flat(auxiliary).norm())


@given(vectors, vectors, st.floats(0.1, 10))
def test_a_norm_is_bounded_and_the_direction_kept(main, auxiliary, ratio):
    main, auxiliary = split(main), split(auxiliary)
    found = flat(norm(main, auxiliary, ratio))
    bound, size = ratio * float(flat(main).norm()), float(flat(auxiliary).norm())
    assert float(found.norm()) == pytest.approx(min(bound, size), rel=1e-12, abs=1e-30)
    assert float(found @ flat(auxiliary)) == pytest.approx(float(found.norm()) * size, rel=1e-12, abs=1e-30)


class Pair(nn.Module):
    """A shared layer, one that only the main loss reads and one that only the auxiliary loss reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.head, self.projector, self.unread = (nn.Linear(3, 3).double() for _ in range(4))
        self.unread.requires_grad_(False)

    def losses(self, x, pull):
        """Main and auxiliary loss; the auxiliary one pulls the shared layer with the main one, or against it (-1)."""
        h = self.shared(x)
        alike = nn.functional.linear(h, self.head.weight.detach(), self.head.bias.detach())
        auxiliary = pull / 2 * alike.square().sum() + self.projector(h[:, :1].expand(-1, 3)).square().sum() / 20
        return self.head(h).square().sum(), auxiliary


def inputs(rows=8, seed=1):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("balance", [project, partial(norm, ratio=0.3)])
@pytest.mark.parametrize("pull", [1, -1])
def test_backward_balances_shared_parameters_and_leaves_the_others_as_they_are(balance, pull):
    model = Pair()
    main, auxiliary = model.losses(inputs(), pull)
    shared = list(model.shared.parameters())
    of_main = torch.autograd.grad(main, shared, retain_graph=True)
    of_auxiliary = torch.autograd.grad(auxiliary, shared, retain_graph=True)
    assert (flat(of_main) @ flat(of_auxiliary) < 0) == (pull < 0)
    head = torch.autograd.grad(main, model.head.weight, retain_graph=True)[0]
    projector = torch.autograd.grad(auxiliary, model.projector.weight, retain_graph=True)[0]

    backward(main, auxiliary, model.parameters(), balance)
    expected = flat(of_main) + flat(balance(of_main, of_auxiliary))
    torch.testing.assert_close(flat([p.grad for p in shared]), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(model.head.weight.grad, head)
    assert torch.equal(model.projector.weight.grad, projector)
    assert model.unread.weight.grad is None


def test_losses_that_agree_are_simply_added():
    model, plain = Pair(), Pair()
    main, auxiliary = model.losses(inputs(), pull=1)
    backward(main, auxiliary, model.parameters())
    sum(plain.losses(inputs(), pull=1)).backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-13, atol=1e-13)


def test_gradients_accumulate_over_micro_batches_each_balanced_by_itself():
    whole, parts = Pair(), []
    for rows in inputs().split(3):
        backward(*whole.losses(rows, pull=-1), whole.parameters())
        part = Pair()
        backward(*part.losses(rows, pull=-1), part.parameters())
        parts.append(gradients(part))
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradient, sum(part[name] for part in parts), rtol=1e-13, atol=1e-13)


def test_no_gradient_is_written_twice_into_the_same_memory():
    left, right, shared = (nn.Parameter(torch.ones(2)) for _ in range(3))
    # Autograd hands out one tensor for left and right; clipping gradients in place would scale it twice.
    backward((left + right + shared).sum(), (shared * 2).sum(), [left, right, shared])
    left.grad.zero_()
    assert torch.equal(right.grad, torch.ones(2))


@pytest.mark.parametrize("objective", ["hidden_mse", "attention_mse", "relation"])
def test_it_balances_the_fused_loss_and_a_feature_loss_of_a_student(objective):
    teacher = make_model(1, layers=2)
    ids = torch.arange(2 * BLOCK).reshape(2, BLOCK) % VOCABULARY
    segments = torch.zeros_like(ids)
    mask = models.attention_mask(segments, torch.float32)

    def gradients_of_step(finish):
        student = make_model(0)
        features = FeatureLoss(student, teacher, objective)
        with features.recorded():
            hidden = models.body(student)(ids, attention_mask=mask, use_cache=False).last_hidden_state
            with torch.no_grad():
                models.body(teacher)(ids, attention_mask=mask, use_cache=False)
        total, tokens = features(segments)
        main = linear_distillation_loss(hidden.flatten(0, 1), *models.head(student), ids.flatten().roll(-1)).loss
        finish(main, total / tokens, [*student.parameters(), *features.parameters()])
        return gradients(student)

    plain = gradients_of_step(lambda main, auxiliary, _: (main + auxiliary).backward())
    summed = gradients_of_step(partial(backward, balance=lambda _main, auxiliary: auxiliary))
    bounded = gradients_of_step(partial(backward, balance=partial(norm, ratio=1e-9)))
    alone = gradients_of_step(lambda main, _auxiliary, _parameters: main.backward())
    for name, gradient in plain.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bounded[name], alone[name], rtol=1e-4, atol=1e-6)
    assert any((plain[name] - alone[name]).abs().max() > 1e-3 for name in alone)


def test_wrong_input_is_refused():
    model = Pair()
    main, auxiliary = model.losses(inputs(), pull=1)
    with pytest.raises(KdlibError, match="ratio"):
        norm(split([1] * 6), split([1] * 6), 0.0)
    with pytest.raises(KdlibError, match="common trainable parameter"):
        backward(main, auxiliary, model.head.parameters())
    with pytest.raises(KdlibError, match="common trainable parameter"):
        backward(main, auxiliary.detach(), model.parameters())
    with pytest.raises(KdlibError, match="got none among 0"):
        backward(main, auxiliary, model.unread.parameters())
