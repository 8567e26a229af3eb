"""The parts of a model that losses, cache and training see: ``body``, ``head`` and ``attention_mask``, and nothing else.

Assumes transformers causal language models of the shape decoder, final norm, linear head, such as Llama, GPT-2 and
Qwen.
"""

from typing import Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from kdlib.errors import KdlibError


def plain_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model itself, without a wrapper of peft."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def body(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model without its output head, adapters active; its ``last_hidden_state`` is that after the final norm."""
    return plain_model(model).base_model


def head(model: PreTrainedModel | PeftModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [V, hidden] and bias [V] (or None) of the output head: logits = hidden · weightᵀ + bias.

    Raises:
        KdlibError: the model scales or caps its logits after the head.
    """
    plain = plain_model(model)
    if (scaled := _scales_logits(plain)) is not None:
        raise KdlibError(
            f"Logits must be hidden states times a matrix, got {scaled} in {type(plain).__name__}. Choose a model such as Llama, GPT-2 or "
            "Qwen."
        )
    layer = plain.get_output_embeddings()
    return layer.weight, layer.bias


def has_linear_head(model: nn.Module) -> bool:
    """Whether :func:`head` gives the logits: not for an ensemble, nor for a model that scales or caps them."""
    plain = plain_model(model)
    return isinstance(getattr(plain, "lm_head", None), nn.Linear) and _scales_logits(plain) is None


def _scales_logits(plain: PreTrainedModel) -> str | None:
    config = plain.config.get_text_config()
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    return next((name for name in names if getattr(config, name, None) not in (None, 1)), None)


def attention_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive causal mask that keeps the windows packed in a row apart: [B, 1, T, T], 0 or the dtype's lowest value.

    Eager and SDPA attention of all transformers models take a four-dimensional mask as it is. Positions of a window
    attend to themselves and to earlier ones of the same window.

    Args:
        segments: int [B, T], the number of the window in its row; −1 is padding, which attends to itself only, since
            a softmax over nothing is NaN.
    """
    length = segments.shape[1]
    # Few passes over [B, T, T], in place: it is made anew for every step. No window has the number −2.
    seen = segments[:, :, None] == segments.masked_fill(segments < 0, -2)[:, None, :]
    seen &= torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen |= torch.eye(length, dtype=torch.bool, device=segments.device)
    values = torch.tensor([0, torch.finfo(dtype).min], dtype=dtype, device=segments.device)
    return torch.where(seen[:, None], values[0], values[1])


def precision(setting: Literal["auto", "float32", "bfloat16"]) -> torch.dtype | None:
    """The dtype for autocast, None for plain float32.

    ``auto`` is bfloat16 where the hardware multiplies it natively (CUDA with bf16, CPUs with AMX or AVX512-BF16);
    elsewhere it is slower than float32.
    """
    if setting not in ("auto", "float32", "bfloat16"):
        raise KdlibError(f"`precision` must be auto, float32 or bfloat16, got {setting!r}.")
    if setting == "auto":
        return torch.bfloat16 if _fast_bfloat16() else None
    return torch.bfloat16 if setting == "bfloat16" else None


def _fast_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private functions of torch: where they are gone, float32 is the safe answer.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check)
