"""Students: size and architecture of a model trained from scratch, and its random initialisation."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase


class Shape(BaseModel):
    """Size and architecture of a model trained from scratch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: PositiveInt = Field(description="decoder blocks")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    heads: PositiveInt = Field(description="attention heads; an even share of the width each")
    intermediate_size: PositiveInt | None = Field(
        None,
        description="width of the MLP; by default 8/3 of hidden_size rounded up to a multiple of 32, and 4 times "
        "hidden_size for gpt2, whose MLP has two matrices instead of three",
    )
    architecture: Literal["llama", "gpt2", "qwen3"] = Field("llama", description="family of the decoder")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Shape":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}")
        return self

    @property
    def mlp_width(self) -> int:
        """The intermediate size, resolved."""
        if self.intermediate_size:
            return self.intermediate_size
        return 4 * self.hidden_size if self.architecture == "gpt2" else 32 * math.ceil(self.hidden_size / 12)


def build(
    shape: Shape,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    seed: int,
    attention: Literal["eager", "sdpa"] | None = None,
) -> PreTrainedModel:
    """A randomly initialised causal language model with tied embeddings and no dropout, in float32.

    The weights depend on ``seed`` alone, and the global random state is left as it was.

    Args:
        tokenizer: gives vocabulary size and special ids.
        block_length: longest window in tokens.
        attention: by default ``sdpa`` with CUDA and ``eager`` without, where its backward pass is faster.
    """
    sizes = {
        "llama": {"intermediate_size": shape.mlp_width, "num_key_value_heads": shape.heads},
        "qwen3": {
            "intermediate_size": shape.mlp_width,
            "num_key_value_heads": shape.heads,
            "head_dim": shape.hidden_size // shape.heads,
        },
        "gpt2": {"n_inner": shape.mlp_width, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    }
    config = AutoConfig.for_model(
        shape.architecture,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.heads,
        max_position_embeddings=block_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # A padding id here would stop the gradient of that token's embedding, and it is a real token.
        pad_token_id=None,
        **sizes[shape.architecture],
    )
    attention = attention or ("sdpa" if torch.cuda.is_available() else "eager")
    with seeded(seed):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
