"""Teachers: a pre-trained model and its tokenizer from a GGUF file, a folder or the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdlib.data.vocabulary import slice_model
from kdlib.errors import KdlibError


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
            f"The embedding of {source} must have a row for each of the tokenizer's {tokens} tokens, got {rows}. Use the model's own "
            "tokenizer."
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
            f"{source} must be a .gguf file, a folder of save_pretrained with safetensors, or a Hugging Face id without code of its own, "
            f"got {' '.join(str(error).split())[:300]}."
        ) from error
