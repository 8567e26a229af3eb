"""Training with 8-bit optimiser states and 8-bit matrix products in the backward pass, both by torchao.

The optimiser keeps AdamW's two moments in blocks of 8-bit numbers with a scale each (Dettmers et al. 2022, "8-bit optimizers
via block-wise quantization", arXiv 2110.02861), a quarter of the memory; weights and arithmetic stay float32. It runs anywhere.

The backward pass rounds both factors of the gradients' products to 8-bit floating point, a scale a row (Micikevicius et al.
2022, "FP8 formats for deep learning", arXiv 2209.05433), which needs tensor cores for it. The forward pass stays as it is,
so a student computes while it trains what it will compute once saved.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from kdlib import models
from kdlib.errors import KdlibError
from kdlib.study.parameters import LowPrecision

LIBRARY = (0, 18)  # of torchao
CAPABILITY = (8, 9)  # of a CUDA device: Ada, Hopper and later multiply 8-bit floating point
MULTIPLE = 16  # what those products want the sizes of a matrix to be multiples of


def require(setting: LowPrecision) -> None:
    """Refuse what this machine cannot do, before anything is spent on it.

    Raises:
        KdlibError: an unknown setting, torchao missing or too old, or no device that multiplies 8-bit floating point.
    """
    if setting not in get_args(LowPrecision):
        raise KdlibError(f"`low_precision` must be one of {', '.join(get_args(LowPrecision))}, got {setting!r}.")
    if setting == "none":
        return
    wanted = ".".join(map(str, LIBRARY))
    if (found := _torchao()) is None or tuple(map(int, found.split(".")[:2])) < LIBRARY:
        raise KdlibError(
            f"torchao must be {wanted} or newer for low_precision={setting}, got {found or 'none'}. Install it with "
            f'`pip install "kdlib[low-precision]"` (`pip install "torchao>={wanted}"`), or choose low_precision=none.'
        )
    if setting == "optimizer_and_backward" and not has_eight_bit_products():
        raise KdlibError(
            "The device must be an NVIDIA GPU of compute capability "
            f"{'.'.join(map(str, CAPABILITY))} or higher for low_precision=optimizer_and_backward, got {_device()}. Choose "
            "low_precision=optimizer or none."
        )


def has_eight_bit_products() -> bool:
    """Whether the first CUDA device multiplies 8-bit floating point."""
    return (
        torch.version.cuda is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= CAPABILITY
    )


def adamw_8bit(
    groups: list[dict], learning_rate: float, betas: tuple[float, float], compiled: bool, moving_decay: bool = False
) -> torch.optim.Optimizer:
    """AdamW whose moments take 8 bits a parameter each; those of fewer than 4096 parameters, or no multiple of 256, stay float32.

    Its learning rates are tensors, which torch's schedulers fill in place. Its state is saved by ``torch.save`` and loaded
    with ``weights_only=True``, and continues bit for bit.

    Args:
        groups: parameter groups with an ``lr`` and ``weight_decay`` each.
        compiled: whether a step is one compiled kernel a matrix. If not, a step works in temporaries of several times the
            largest matrix, and takes longer.
        moving_decay: whether ``weight_decay`` becomes a tensor too, to be filled in place.
    """
    from torchao.optim import AdamW8bit  # not at the top: few runs need it, and it takes seconds

    class Interpreted(AdamW8bit):
        step = torch.compiler.set_stance("force_eager")(AdamW8bit.step)

    if moving_decay:
        # As a number it is a constant of the compiled step, and every value of it another one to compile.
        groups = [group | {"weight_decay": torch.tensor(float(group["weight_decay"]))} for group in groups]
    optimizer = (AdamW8bit if compiled else Interpreted)(groups, lr=learning_rate, betas=betas)
    optimizer.register_load_state_dict_post_hook(_scalars_to_cpu)
    return optimizer


def _scalars_to_cpu(optimizer: torch.optim.Optimizer) -> None:
    # Loading may put them on the GPU, where powers are rounded otherwise: a resumed run would part from one never stopped.
    for group in optimizer.param_groups:
        for name in ("lr", "weight_decay"):
            group[name] = group[name].cpu() if isinstance(group[name], torch.Tensor) else group[name]
    for state in optimizer.state.values():
        state["step"] = state["step"].cpu()


@contextmanager
def eight_bit_backward(model: PreTrainedModel, emulate: bool = False) -> Iterator[None]:
    """Within the ``with``, gradients of the body's linear layers come from 8-bit matrix products.

    Both factors of each product are rounded to e4m3 (4 bits of exponent, 3 of fraction), with a scale a row that is a power
    of two. Embeddings and output head are left alone, and so are layers whose sizes are no multiple of 16. The layers are
    replaced by others that hold the same parameters, so names in ``state_dict`` stay; afterwards the old ones are back.

    Args:
        emulate: round as the hardware does and multiply in float32, on any device; slow.

    Raises:
        KdlibError: no layer that this serves, as in GPT-2, whose weights are not in ``nn.Linear``.
    """
    body = models.body(model)
    replaced = {name: layer for name, layer in body.named_modules() if _is_served(layer)}
    if not replaced:
        raise KdlibError(
            f"An nn.Linear layer must have sizes that are multiples of {MULTIPLE}, got none in {type(body).__name__}. Choose another "
            "size, llama or qwen3, or low_precision=optimizer."
        )
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(body, module_filter_fn=lambda _, name: name in replaced, config=_backward_only(emulate))
    try:
        yield
    finally:
        for name, layer in replaced.items():
            body.set_submodule(name, layer)


def _is_served(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def _backward_only(emulate: bool):
    from torchao.float8 import CastConfig, Float8LinearConfig, ScalingGranularity, ScalingType

    eight_bit = torch.float8_e4m3fn
    exact = CastConfig(scaling_type=ScalingType.DISABLED, target_dtype=eight_bit)
    rounded = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE, target_dtype=eight_bit)
    return Float8LinearConfig(
        # hidden · weightᵀ
        cast_config_input=exact,
        cast_config_weight=exact,
        # gradient · weight
        cast_config_grad_output=rounded,
        cast_config_weight_for_grad_input=rounded,
        # gradientᵀ · hidden; it sums over tokens, whose number need not be a multiple of 16
        cast_config_grad_output_for_grad_weight=rounded,
        cast_config_input_for_grad_weight=rounded,
        pad_inner_dim=True,
        round_scales_to_power_of_2=True,
        emulate=emulate,
    )


def _torchao() -> str | None:
    try:
        return metadata.version("torchao")
    except metadata.PackageNotFoundError:
        return None


def _device() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return f"{torch.cuda.get_device_name()} (compute capability {capability})"
