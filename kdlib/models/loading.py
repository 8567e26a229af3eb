"""Models on disk, read: from a folder of any of three kinds, and teachers also from a GGUF file or the Hugging Face hub."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdlib.data.vocabulary import slice_model
from kdlib.errors import KdlibError
from kdlib.models import dcp


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
            f"The pre-tokenizer of the GGUF file {path.name} must be gpt-2, llama-bpe, qwen2 or smollm, got {name!r}. Load this teacher "
            "from its safetensors."
        )
    if name == "smollm":
        # Where transformers does not know a splitter it takes GPT-2's; SmolLM's also cuts between digits.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def load(folder: str | Path, dtype: torch.dtype = torch.float32, attention: str | None = None) -> PreTrainedModel:
    """The model in a folder, in evaluation mode: every tensor that its configuration asks for is there, and no other.

    Args:
        folder: ``config.json`` beside ``model.safetensors``, its shards and their index, or a checkpoint of
            ``torch.distributed.checkpoint`` (see :mod:`kdlib.models.dcp`).
        dtype: of the weights.
        attention: implementation, None for the model's default.

    Raises:
        KdlibError: nothing loadable there; a tensor that is missing, left over or of another shape, or a file that is damaged,
            by name.
    """
    folder = Path(folder)
    options = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    if not dcp.is_dcp(folder) or any(folder.glob("*.safetensors")):
        safetensors_of(folder)
        with _loading(folder):
            return _complete(folder, AutoModelForCausalLM, str(folder), use_safetensors=True, **options)
    empty = outline(folder)
    state = dcp.state_dict(folder, {name: value.shape for name, value in empty.state_dict().items()})
    model = with_tensors(folder, empty, state, dtype, attention)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def outline(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a folder's configuration without its tensors, which are on the meta device.

    Raises:
        KdlibError: no configuration there that transformers knows.
    """
    with _loading(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def with_tensors(
    source: str | Path, empty: PreTrainedModel, state: dict[str, torch.Tensor], dtype: torch.dtype, attention: str | None = None
) -> PreTrainedModel:
    """A model like ``empty`` (see :func:`outline`) of these tensors, in evaluation mode.

    Args:
        source: where they are from, for messages; dtype, attention: as for :func:`load`.

    Raises:
        KdlibError: a tensor that is missing, left over or of another shape.
    """
    with _loading(source):
        return _complete(
            source, type(empty), None, config=empty.config, state_dict=state, dtype=dtype, attn_implementation=attention
        )


def load_teacher(
    source: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A pre-trained causal language model, dense and in evaluation mode, with an embedding row for each of its tokens.

    Some embeddings are padded beyond the tokenizer (152 064 rows for 151 936 tokens). Those rows are cut off: they
    would take probability from real tokens.

    Args:
        source: a ``.gguf`` file, a folder as for :func:`load`, or a Hugging Face id.
        revision: of the Hugging Face id.
        dtype: of the weights. Quantised GGUF blocks are unpacked to it.

    Raises:
        KdlibError: nothing loadable there, or the hub is out of reach; more tokens than embedding rows.
    """
    tokenizer = load_tokenizer(source, revision)
    model = load(source, dtype) if Path(source).is_dir() else _from_file_or_hub(source, revision, dtype)
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, len(model.get_input_embeddings().weight)
    if tokens > rows:
        raise KdlibError(
            f"The embedding of {source} must have a row for each of the tokenizer's {tokens} tokens, got {rows}. Use the model's own "
            "tokenizer."
        )
    if tokens < rows:
        slice_model(model, np.arange(tokens))
    return model.eval()


def _from_file_or_hub(source: str | Path, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    path, options = Path(source), {"revision": revision, "dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    with _loading(source):
        if path.suffix != ".gguf":
            return _complete(source, AutoModelForCausalLM, str(source), **options)
        # Without dequantisation the blocks stay packed: several times slower, and not trainable.
        packed = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        return AutoModelForCausalLM.from_pretrained(path.parent, **packed, **options)


def _complete(source: str | Path, kind: type, place: str | None, **options: Any) -> PreTrainedModel:
    """What ``kind.from_pretrained`` gives, without what it would make up for a tensor that is missing or does not fit."""
    model, told = kind.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    unfit = [f"{name} of shape {list(found)}, not {list(wanted)}" for name, found, wanted in told["mismatched_keys"]]
    for fault, names in (("missing", told["missing_keys"]), ("left over", told["unexpected_keys"]), ("unfit", unfit)):
        if names:
            first, more = sorted(names)[0], f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise KdlibError(f"Tensors in {source} must be those of its config.json, got {fault}: {first}{more}. Save the model anew.")
    return model


def safetensors_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that its index names; none where there are none.

    Raises:
        KdlibError: one is missing or damaged, by name: transformers would not say which.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        found = list(folder.glob("model.safetensors"))
    else:
        try:
            found = [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError) as error:
            raise KdlibError(f"{index} must say which file holds which tensor, got {type(error).__name__}. Copy it again.") from error
    for path in found:
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise KdlibError(f"{path} must be a whole safetensors file, got {str(error)[:100]}. Copy it again.") from error
    return found


@contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    try:
        yield
    except KdlibError:
        raise
    except (OSError, ValueError) as error:
        raise KdlibError(
            f"{source} must be a .gguf file, a folder of save_pretrained with safetensors or of torch.distributed.checkpoint, or a "
            f"Hugging Face id without own code, got {' '.join(str(error).split())[:300]}."
        ) from error
