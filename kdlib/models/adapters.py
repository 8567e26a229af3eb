"""Low-rank adapters: a copy of a model that trains few weights, and the ordinary model that comes of it."""

import copy

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from kdlib.models.shapes import seeded


def lora(model: PreTrainedModel, rank: int, alpha: float, dropout: float, seed: int) -> PeftModel:
    """A copy of the model with trainable low-rank adapters on every linear layer but the output head.

    Hu et al. 2022, "LoRA: low-rank adaptation of large language models": W becomes W + (alpha/rank)·BA, B starting at
    0. The copy shares nothing with ``model``, so that training it, or ``.eval()`` on either, leaves the other alone.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear"
    )
    with seeded(seed):
        return get_peft_model(copy.deepcopy(model), config)


def merge(model: PeftModel) -> PreTrainedModel:
    """The ordinary model with its adapters added into the weights, all trainable; ``model`` is used up."""
    return model.merge_and_unload().requires_grad_(True)
