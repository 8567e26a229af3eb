"""What runs leave, read back and written: splits, tokenizers, models, targets and evaluations."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdlib import models
from kdlib.cache import TargetCache
from kdlib.cache.reader import guard
from kdlib.data import corpus, vocabulary
from kdlib.ensemble.model import EnsembleForCausalLM as EnsembleForCausalLM  # registered, so that ensembles load
from kdlib.errors import KdlibError
from kdlib.evaluation.metrics import evaluate
from kdlib.runs.card import card
from kdlib.runs.corpus import HELD_OUT
from kdlib.study.plan import Step
from kdlib.study.store import Run
from kdlib.training import discard_checkpoints


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def splits(run: Run) -> dict[str, corpus.Split]:
    """All splits of a corpus, by name."""
    return {name: corpus.load_split(run.path / "data", name) for name in ("train", *HELD_OUT)}


def block_length(run: Run) -> int:
    """Tokens in a row of a corpus."""
    return run.settings["parameters"]["block_length"]


def load_tokenizer(run: Run) -> PreTrainedTokenizerFast:
    """The tokenizer of a corpus, or of a saved model."""
    return AutoTokenizer.from_pretrained(run.path / ("data/tokenizer" if run.kind == "corpus" else "model"))


def load_model(run: Run, name: str = "model") -> torch.nn.Module:
    """The model a run saved, in float32 and eval mode, on the GPU if there is one.

    Args:
        name: of its folder, such as ``members/1`` of members that were trained together.

    Raises:
        KdlibError: the run holds results only; models are not committed and must be made here.
    """
    folder = run.path / name
    if not folder.is_dir():
        raise KdlibError(
            f"{run.id} holds results but no model, since models are not committed. Make it with: kdlib make {run.id} "
            f"--profile {run.path.parents[1].name} --with-artefact"
        )
    return models.load(folder, attention="eager").to(device()).eval()


def open_targets(targets: Run, text: Run, split: corpus.Split, temperature: float) -> TargetCache:
    """Cached targets, checked to be those of ``split`` of the corpus ``text``."""
    expected = target_guard(text, split, whose(targets.settings))
    return TargetCache(targets.path / "targets", expected, temperature)


def target_guard(text: Run, split: corpus.Split, teacher_id: str) -> dict:
    """The guard that targets of ``split`` by that teacher must carry."""
    tokenizer = load_tokenizer(text)
    return guard(split, vocabulary.fingerprint(tokenizer), len(tokenizer), block_length(text), teacher_id)


def whose(settings: dict) -> str:
    """The teacher of a targets run, for the guard: a run's id, or what a server or file is known by."""
    outside = [settings["parameters"].get("source", ""), *settings["sources"].values()]
    return settings["inputs"].get("teacher") or " ".join(outside)


def evaluate_into(folder: Path, model, data: Mapping[str, corpus.Split], length: int, precision: str) -> dict:
    """Evaluate a model on the held-out splits; documents and log-probabilities go to ``folder``.

    Returns:
        Metrics, with the ``work`` of measuring them.
    """
    batch_size = 16 if next(model.parameters()).device.type == "cpu" else 128
    held_out = {name: data[name] for name in HELD_OUT}
    found = evaluate(model, held_out, length, batch_size=batch_size, autocast=models.precision(precision))
    found.documents.to_parquet(folder / "documents.parquet", index=False)
    np.savez_compressed(folder / "target_logprobs.npz", **found.target_logprobs)
    return found.metrics | {"work": {"evaluation": found.work}}


def save_model(model, tokenizer, folder: Path, step: Step, text: Run, metrics: dict) -> None:
    """Write the model with its card to ``folder/model``, and let go of what its training would have resumed from.

    ``text``: the corpus; the run's evaluation lies in ``folder`` already.
    """
    # What an attempt that was killed after its training left behind.
    for rest in [folder / "model", *folder.glob(".model.*")]:
        shutil.rmtree(rest, ignore_errors=True)
    models.save(model, tokenizer, folder / "model", card(step, text, folder, metrics, model.config))
    # Not before: a run that is killed while it evaluates has trained already.
    discard_checkpoints(folder)


def require_same_vocabulary(model: Run, text: Run) -> None:
    """Refuse a model whose token ids mean other text than the corpus's.

    Raises:
        KdlibError: their tokenizers differ.
    """
    if (model.path / "model").is_dir():
        vocabulary.require_same(load_tokenizer(model), load_tokenizer(text))
