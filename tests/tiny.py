"""What the tests of targets and training share: tiny models and splits, and processes killed at a chosen moment."""

import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kdlib.data.corpus import Split

VOCABULARY, BLOCK = 29, 16
# Models this small gain nothing from threads, which on a busy machine wait for one another at every operation.
torch.set_num_threads(1)


def make_model(seed, dropout=0.0, scale=0.4, layers=1, vocabulary=VOCABULARY):
    """A Llama with tied embeddings whose distributions are far from uniform; ``scale`` sharpens them."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=vocabulary, initializer_range=scale, tie_word_embeddings=True, attention_dropout=dropout, **shape
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def make_split(name="train", seed=0, documents=9, longest=50):
    rng = np.random.default_rng(seed)
    streams = [np.r_[0, rng.integers(1, VOCABULARY, rng.integers(1, longest)), 0] for _ in range(documents)]
    table = pd.DataFrame({"document": [f"talk/{name}{i}#00" for i in range(documents)]})
    table = table.assign(source=table.document.str[:-3], domain="talk", bytes=4)
    table["tokens"] = [len(stream) - 1 for stream in streams]
    offsets = np.cumsum([0, *map(len, streams)]).astype(np.int64)
    return Split(name, table, np.concatenate(streams).astype(np.int32), offsets, 0)


def predicting(split):
    """Flat positions that predict a token: all but the last of each document."""
    return np.setdiff1d(np.arange(len(split.tokens)), split.offsets[1:] - 1)


@torch.no_grad()
def dense_log_probs(model, split, temperature=1.0, block_length=BLOCK):
    """What transformers itself computes, one forward pass a window: [positions, V], NaN where nothing is predicted."""
    out = torch.full((len(split.tokens), model.config.vocab_size), torch.nan, dtype=torch.float64)
    for start, end in itertools.pairwise(split.offsets):
        for first in range(start, end - 1, block_length):
            last = min(first + block_length, end - 1)
            ids = torch.from_numpy(split.tokens[first:last].astype(np.int64))[None]
            out[first:last] = torch.log_softmax(model(ids).logits[0].double() / temperature, -1)
    return out


def contents(folder):
    """Relative path -> bytes of every file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def exit_code(function, *arguments):
    """Exit code of a process of its own that calls ``function``; -9 if it was killed."""
    # A server that has imported everything once forks in milliseconds; this one, with its threads, could not safely.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["kdlib.training", "transformers.models.llama.modeling_llama", "scipy.stats", "pytest"]
    )
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def die_at(event, folder):
    """SIGKILL this process when it writes, renames or removes something below ``folder`` for the ``event``-th time.

    A file about to be renamed into place is cut in half first, as a kill in the middle of writing it would leave it.
    """
    seen = 0

    def hook(name, arguments):
        nonlocal seen
        changes = name in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree")
        changes = changes or name == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        # A lock is a file without content, and no part of what is written.
        path = os.fsdecode(arguments[0]) if changes else ""
        if not path.startswith(str(folder)) or path.endswith(".lock"):
            return
        seen += 1
        if seen == event:
            if name == "os.rename":
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
