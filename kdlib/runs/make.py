"""Runs are made here: what exists is returned, and what does not is made, with whatever it reads."""

import gc
import time
from collections.abc import Sequence
from pathlib import Path

# What the imports below leave is no garbage, but the collector would go through it again and again: a second of every job, and
# some more whenever it is called later. So it rests meanwhile, and what is there afterwards is set aside.
gc.collect()
gc.disable()

import torch
import transformers

from kdlib import models
from kdlib.models import low_precision
from kdlib.runs.packing import Packer
from kdlib.study import progress, store
from kdlib.study.kinds import kinds
from kdlib.study.plan import Step
from kdlib.study.work import total
from kdlib.training.log import peak_resident_bytes

gc.freeze()
gc.enable()

if progress.batch():
    transformers.utils.logging.disable_progress_bar()


def make(step: Step, with_artefact: bool = False) -> store.Run:
    """The run that ``step`` describes; it, and whatever it reads, is made now unless it exists.

    A clone holds the results of runs, but no data, targets or models. Where these are read they are made again, and with
    ``with_artefact`` also those of this very run; the results stay as they are, and are compared with the new ones.
    """
    profile = step.parameters.profile
    if found := store.find(profile, step.id, with_artefact):
        return found
    low_precision.require(getattr(step.parameters, "low_precision", "none"))
    inputs = made_inputs(step)
    again = " again, of which only the results are here" if store.find(profile, step.id) else ""
    print(f"making {step.label} ({step.id}){again}", flush=True)

    def produce(folder: Path) -> dict:
        started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        metrics = kinds()[step.kind].produce(step, inputs, folder)
        gc.collect()
        return metrics | {"work": total(metrics.get("work", {})), "cost": _cost(step, time.perf_counter() - started)}

    return store.make(profile, step.id, step.settings, produce, with_artefact)


def made_inputs(step: Step) -> dict[str, store.Run]:
    """The runs that ``step`` reads, by name, made now unless they exist."""
    return {name: make(upstream, with_artefact=True) for name, upstream in step.inputs.items()}


def _cost(step: Step, seconds: float) -> dict:
    cost = {"seconds": seconds, "peak_memory_bytes": peak_resident_bytes(), "device": store.device()}
    if asked := getattr(step.parameters, "precision", None):
        # What "auto" became here.
        cost["precision"] = str(models.precision(asked) or torch.float32).removeprefix("torch.")
    if torch.cuda.is_available():
        cost["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return cost


def make_all(steps: Sequence[Step], with_artefact: bool = False, pack: int | None = None) -> None:
    """Make runs in this process, which keeps what it has compiled, and tell of each.

    Args:
        pack: how many students are trained at once at most; None: as many as pay, see :func:`kdlib.runs.packing.most`.
    """
    packer = Packer(steps, made_inputs, with_artefact, pack)
    for number, step in enumerate(steps, 1):
        started = time.perf_counter()
        packer.train(step)
        run = make(step, with_artefact)
        print(f"[{number}/{len(steps)}] {step.label}: {run.id} ({time.perf_counter() - started:.0f} s)", flush=True)
