"""Logits are as exact as the device's products allow, of half-precision factors too."""

import pytest
import torch

from kdlib.losses import DenseTargets, linear_distillation_loss
from kdlib.losses.logits import head_logits

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def factors(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    # Logits of about 16, as a trained language model's are.
    shapes, sizes = ((24, 64), (40, 64), (40,)), (4.0, 0.5, 1.0)
    made = [size * torch.randn(*shape, generator=generator) for shape, size in zip(shapes, sizes, strict=True)]
    return [one.to(device, dtype) for one in made[:2]] + [made[2].to(device)]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_full_precision_factors_give_full_precision_logits(dtype, tolerance, device):
    hidden, weight, bias = factors(dtype, device)
    logits = head_logits(hidden, weight, bias)
    exact = hidden.double() @ weight.double().T + bias.double()
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_rounds_logits_of_half_precision_to_it_and_says_so_in_float32(dtype):
    hidden, weight, bias = factors(dtype)
    logits = head_logits(hidden, weight, bias)
    exact = hidden.double() @ weight.double().T
    assert logits.dtype == torch.float32
    # Half a unit in the last place, and the order of summation.
    bound = (0.5 * torch.finfo(dtype).eps + 1e-5) * exact.abs() + 1e-4
    assert ((logits - bias).double() - exact).abs().le(bound).all()
    buffers = torch.empty(24, 40), torch.empty(24, 40, dtype=dtype)
    assert head_logits(hidden, weight, bias, *buffers) is buffers[0] and torch.equal(buffers[0], logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_does_not_round_logits_of_half_precision(dtype):
    hidden, weight, bias = factors(dtype, "cuda")
    exact = hidden.double() @ weight.double().T + bias.double()
    buffers = torch.empty(24, 40, device="cuda"), torch.empty(24, 40, dtype=dtype, device="cuda")
    for logits in (head_logits(hidden, weight, bias), head_logits(hidden, weight, bias, *buffers)):
        torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kd_weight", [0.0, 0.9])
def test_on_a_gpu_the_loss_of_half_precision_factors_is_that_of_their_exact_product(kd_weight):
    hidden, weight, bias = factors(torch.bfloat16, "cuda")
    labels = torch.arange(24, device="cuda") % 40
    teacher = DenseTargets(hidden.flip(0), weight.flip(1), bias)
    low = linear_distillation_loss(hidden, weight, bias, labels, teacher, kd_weight, matmul_dtype=torch.bfloat16)
    wide = DenseTargets(teacher.hidden.double(), teacher.weight.double(), bias.double())
    exact = linear_distillation_loss(hidden.double(), weight.double(), bias.double(), labels, wide, kd_weight)
    torch.testing.assert_close(low.loss.double(), exact.loss, rtol=1e-5, atol=1e-5)
