"""Models: load a teacher, build a student, and reach the parts that training and measuring need.

Assumes transformers causal language models of the shape decoder, final norm, linear head, such as Llama, GPT-2 and
Qwen. Losses, cache and training see a model through ``body``, ``head`` and ``attention_mask`` alone.
"""

import copy
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from gguf import GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdlib.errors import KdlibError
from kdlib.vocabulary import slice_model

INNER = ("attention", "mlp", "norms", "other")  # components that are neither embedding nor output head


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher, from what ``load_teacher`` loads.

    Raises:
        KdlibError: nothing loadable there, or the hub is out of reach; a GGUF file whose way to split text is unknown.
    """
    path = Path(source)
    if path.suffix != ".gguf":
        with _loading(source):
            return AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    with _loading(source):
        splitter = GGUFReader(path).get_field("tokenizer.ggml.pre")
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    name = splitter.contents() if splitter else "none"
    if name not in ("gpt-2", "llama-bpe", "qwen2", "smollm"):
        raise KdlibError(
            f"The GGUF file {path.name} names the pre-tokenizer {name!r}. Expected gpt-2, llama-bpe, qwen2 or smollm: "
            "another would be replaced in silence by GPT-2's. Load this teacher from its safetensors."
        )
    if name == "smollm":
        # Where transformers does not know a splitter it takes GPT-2's; SmolLM's also cuts between digits.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def load_teacher(
    source: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A pre-trained causal language model, dense and in evaluation mode, with an embedding row for each of its tokens.

    Some embeddings are padded beyond the tokenizer (152 064 rows for 151 936 tokens). Those rows are cut off: they
    would take probability from real tokens.

    Args:
        source: a ``.gguf`` file, a local folder in Hugging Face format (safetensors), or a Hugging Face id.
        revision: of the Hugging Face id.
        dtype: of the weights. Quantised GGUF blocks are unpacked to it.

    Raises:
        KdlibError: nothing loadable there, or the hub is out of reach; more tokens than embedding rows.
    """
    tokenizer = load_tokenizer(source, revision)
    path = Path(source)
    # Without dequantisation the blocks stay packed: several times slower, and not trainable.
    packed = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    with _loading(source):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent if path.suffix == ".gguf" else str(source),
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **(packed if path.suffix == ".gguf" else {}),
        )
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, len(model.get_input_embeddings().weight)
    if tokens > rows:
        raise KdlibError(
            f"The tokenizer of {source} has {tokens} tokens but the model's embedding only {rows} rows. Expected at "
            "least a row a token: use the tokenizer the model was trained with."
        )
    if tokens < rows:
        slice_model(model, np.arange(tokens))
    return model.eval()


@contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise KdlibError(
            f"Cannot load {source} ({' '.join(str(error).split())[:300]}). Expected a .gguf file, a folder saved by "
            "save_pretrained with safetensors, or a Hugging Face id that is cached or within reach of the network; "
            "models that bring their own code are not run."
        ) from error


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
    with _seeded(seed):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def body(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model without its output head, adapters active; its ``last_hidden_state`` is that after the final norm."""
    return _plain(model).base_model


def head(model: PreTrainedModel | PeftModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [V, hidden] and bias [V] (or None) of the output head: logits = hidden · weightᵀ + bias.

    Raises:
        KdlibError: the model scales or caps its logits after the head.
    """
    plain = _plain(model)
    if (scaled := _scales_logits(plain)) is not None:
        raise KdlibError(
            f"{type(plain).__name__} changes its logits after the head ({scaled}); expected hidden states times a "
            "matrix. Choose a model without it, such as a Llama, GPT-2 or Qwen."
        )
    layer = plain.get_output_embeddings()
    return layer.weight, layer.bias


def has_linear_head(model: nn.Module) -> bool:
    """Whether :func:`head` gives the logits: not for an ensemble, nor for a model that scales or caps them."""
    plain = _plain(model)
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
    same = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    seen = (same & causal | itself)[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=segments.device).masked_fill(~seen, torch.finfo(dtype).min)


def lora(model: PreTrainedModel, rank: int, alpha: float, dropout: float, seed: int) -> PeftModel:
    """A copy of the model with trainable low-rank adapters on every linear layer but the output head.

    Hu et al. 2022, "LoRA: low-rank adaptation of large language models": W becomes W + (alpha/rank)·BA, B starting at
    0. The copy shares nothing with ``model``, so that training it, or ``.eval()`` on either, leaves the other alone.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear"
    )
    with _seeded(seed):
        return get_peft_model(copy.deepcopy(model), config)


def merge(model: PeftModel) -> PreTrainedModel:
    """The ordinary model with its adapters added into the weights, all trainable; ``model`` is used up."""
    return model.merge_and_unload().requires_grad_(True)


def precision(setting: Literal["auto", "float32", "bfloat16"]) -> torch.dtype | None:
    """The dtype for autocast, None for plain float32.

    ``auto`` is bfloat16 where the hardware multiplies it natively (CUDA with bf16, CPUs with AMX or AVX512-BF16);
    elsewhere it is slower than float32.
    """
    if setting not in ("auto", "float32", "bfloat16"):
        raise KdlibError(f"Unknown precision {setting!r}. Expected auto, float32 or bfloat16.")
    if setting == "auto":
        return torch.bfloat16 if _fast_bfloat16() else None
    return torch.bfloat16 if setting == "bfloat16" else None


def _fast_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private functions of torch: where they are gone, float32 is the safe answer.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check)


def parameters_by_component(model: PreTrainedModel | PeftModel) -> dict[str, int]:
    """Parameters in embedding (tokens and positions), attention, mlp, norms, head and other; non_embedding and total.

    A weight tied to the input embedding counts there and not in the head. ``non_embedding`` leaves out embedding and
    head, as N of Kaplan et al. 2020, "Scaling laws for neural language models".
    """
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head", "other"), 0)
    for component, parameter in _components(model):
        counts[component] += parameter.numel()
    inner = sum(counts[name] for name in INNER)
    return counts | {"non_embedding": inner, "total": sum(counts.values())}


def _components(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    plain = _plain(model)
    embeddings = {id(plain.get_input_embeddings().weight)}
    outputs = {id(parameter) for parameter in plain.get_output_embeddings().parameters()} - embeddings
    for name, parameter in plain.named_parameters():  # shared parameters come once
        if id(parameter) in embeddings or ".wpe." in name:
            component = "embedding"
        elif id(parameter) in outputs:
            component = "head"
        elif "norm" in name or ".ln_" in name:
            component = "norms"
        elif "attn" in name or "attention" in name:
            component = "attention"
        else:
            component = "mlp" if ".mlp." in name else "other"
        yield component, parameter


def flops_per_token(model: PreTrainedModel | PeftModel, context: int) -> int:
    """Floating-point operations of a forward pass, per token; training takes :func:`training_flops_per_token`.

    A multiply-add is two operations, so the matrices cost 2 per non-embedding parameter (Kaplan et al. 2020, §2.1), the
    head 2·V·hidden, and attention's two products with ``context`` keys 4·context·width in each layer, masked or not
    (Hoffmann et al. 2022, "Training compute-optimal large language models", appendix F).
    """
    plain = _plain(model)
    config = plain.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    matrices = parameters_by_component(model)["non_embedding"] + plain.get_output_embeddings().weight.numel()
    return 2 * matrices + 4 * config.num_hidden_layers * context * width


def training_flops_per_token(model: PreTrainedModel | PeftModel, context: int) -> int:
    """Floating-point operations of a forward and a backward pass, per token, with the model's parameters as frozen as they are.

    The backward pass costs twice the forward (Hoffmann et al. 2022, appendix F): half of it is the gradient that a layer
    hands down, half that of its weights. A frozen matrix, as under adapters (Hu et al. 2022, §4.2), needs no gradient of
    its own: 2 less per parameter. Each layer is taken to hand a gradient down, so parameters frozen below all trained ones
    cost a little less than counted.
    """
    counted = [parameter for component, parameter in _components(model) if component in INNER]
    counted.append(_plain(model).get_output_embeddings().weight)
    frozen = sum(parameter.numel() for parameter in counted if not parameter.requires_grad)
    return 3 * flops_per_token(model, context) - 2 * frozen


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, card: dict) -> None:
    """Write model (safetensors), tokenizer and model card as any transformers model, whole or not at all.

    Args:
        folder: must not exist; its parent is made.
        card: content of README.md in plain Python values: each dict (data, settings, metrics, versions, …) becomes a
            section, all else (license, base_model, …) its YAML front matter.

    Raises:
        KdlibError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise KdlibError(f"The folder {folder} exists already. Expected a new one: delete it or choose another name.")
    readme = _readme(folder.name, card)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "README.md").write_text(readme, encoding="utf-8")
        work.chmod(0o755)  # mkdtemp's folders are private
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work)
        raise


def _readme(title: str, card: dict) -> str:
    def listing(values: dict) -> str:
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {name: value for name, value in card.items() if not isinstance(value, dict)}
    sections = (
        f"\n## {name.capitalize()}\n\n```yaml\n{listing(value)}```\n"
        for name, value in card.items()
        if isinstance(value, dict)
    )
    return f"---\n{listing(front)}---\n\n# {title}\n{''.join(sections)}"
