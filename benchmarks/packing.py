"""Packed members against the loop over them: generation, short and long inputs, memory, and training.

    python benchmarks/packing.py            # some minutes; updates benchmarks/results.csv

Twelve Llamas with a vocabulary of 8 192. The two sides of a ratio take turns, and what counts is the median of the rounds.
``CROSSOVER`` in kdlib/ensemble/packing.py keeps to the sizes of the printed table where packing surely pays on a CPU.
"""

import argparse
import functools
import statistics
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import steps  # before torch, as kdlib asks for
import torch
from record import record
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from kdlib.cache import ModelTeacher, TargetCache, write_targets
from kdlib.data import corpus
from kdlib.data.text import TrainingText
from kdlib.ensemble import packing
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.runs.packing import Packer
from kdlib.study.parameters import TrainingParameters
from kdlib.training import Distillation, DistillationTrainer, Objective, PackedTrainer

MEMBERS, NEW = 12, 32
SHAPES = {64: (2, 2, 192), 128: (4, 4, 352), 256: (4, 4, 704)}  # hidden size: layers, heads, intermediate size
INPUTS = ((1, 1), (1, 16), (1, 32), (1, 64), (1, 128), (1, 256), (8, 256))


def ensemble(hidden: int, members: int = MEMBERS) -> EnsembleForCausalLM:
    """Llamas of one shape."""
    layers, heads, intermediate = SHAPES[hidden]
    built = [steps.llama(layers, hidden, heads, heads, intermediate, "sdpa").eval() for _ in range(members)]
    return EnsembleForCausalLM.from_members(built)


def forced(packed: bool, function):
    """``function``, with members packed or one by one whatever the size."""

    def call():
        with mock.patch.object(packing.Packing, "_pays", lambda *_: packed):
            function()

    return call


def sides(rounds: int, function) -> tuple[float, float]:
    """Median seconds of the loop and of packed members."""
    return tuple(steps.alternate(rounds, forced(False, function), forced(True, function)))


def generation(rounds: int) -> list[dict]:
    """Tokens a second of ``generate`` with the cache, batch 1."""
    rows = []
    for hidden in (128, 64):
        model, ids = ensemble(hidden), torch.randint(1, steps.VOCABULARY, (1, 8), device=steps.DEVICE)
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "attention_mask": torch.ones_like(ids)}
        loop, packed = sides(rounds, functools.partial(model.generate, ids, **options))
        rows.append(
            steps.row(
                f"generation with {MEMBERS} members of {SHAPES[hidden][0]} x {hidden}, packed against the loop, tokens/s",
                loop / packed,
                ">= 4" if hidden == 128 else "",
                f"{NEW / packed:,.1f} against {NEW / loop:,.1f} tokens/s",
            )
        )
    return rows


@torch.no_grad()
def inputs(rounds: int) -> list[dict]:
    """Forward passes of several sizes; what is chosen must never be slower than the loop."""
    rows, worst = [], (float("inf"), "")
    for hidden in SHAPES:
        model = ensemble(hidden)
        for shape in INPUTS:
            ids = torch.randint(1, steps.VOCABULARY, shape, device=steps.DEVICE)
            few = rounds if ids.numel() <= 256 else 2
            loop, packed = sides(few, functools.partial(model, ids))
            name = f"{shape[0]} x {shape[1]} tokens, {MEMBERS} members of {SHAPES[hidden][0]} x {hidden}"
            print(f"{name}: {loop / packed:.2f} ({1e3 * packed:.1f} against {1e3 * loop:.1f} ms)", flush=True)
            if hidden == 128 and shape in ((1, 1), (1, 16)):
                target = ">= 1.8" if shape == (1, 16) else ""
                detail = f"{1e3 * packed:.1f} against {1e3 * loop:.1f} ms"
                rows.append(steps.row(f"packed forward pass of {name} against the loop, speed", loop / packed, target, detail))
            if model.packing._pays(model.members, ids):
                worst = min(worst, (loop / packed, name))
    return [*rows, steps.row("least gain among inputs for which members are packed, speed", worst[0], ">= 0.95", worst[1])]


class Clock(TrainerCallback):
    """Seconds of each step of a trainer, with all that it does from one to the next, but for the first ones, which compile."""

    def __init__(self):
        self.ended, self.seconds = None, []

    def on_step_end(self, args, state, control, **_):
        steps.synchronise()
        now = time.perf_counter()
        if state.global_step > 5:
            self.seconds.append(now - self.ended)
        self.ended = now


def training(rounds: int, members: int = 8) -> list[dict]:
    """Steps of students of 4 x 128 from cached targets, each on text of its own, packed against one by one."""
    data = steps.split(16 * steps.LENGTH * (rounds + 2))
    with tempfile.TemporaryDirectory() as folder:
        write_targets(Path(folder) / "targets", ModelTeacher(steps.student()), data, {}, steps.SAMPLED, block_length=steps.LENGTH)
        cache = TargetCache(Path(folder) / "targets", {}, 1.0)
        trainers = [_trainer(data, cache, Path(folder) / str(seed), seed, rounds) for seed in range(members + 1)]
        alone, packed = trainers[0], PackedTrainer(trainers[1:])
        found = []
        for trainer in (alone, packed):
            trainer.add_callback(clock := Clock())
            trainer.fit()
            found.append(statistics.median(clock.seconds))
    one, together, tokens = *found, 16 * steps.LENGTH
    chosen = "packed" if Packer((), dict).most > 1 else "one by one"
    return [
        steps.row(
            f"training {members} students of 4 x 128 from cached targets, packed against one by one, tokens/s",
            members * one / together,
            ">= 6" if steps.DEVICE == "cuda" else "",
            f"{members * tokens / together:,.0f} against {tokens / one:,.0f} tokens/s; trained {chosen} unless asked otherwise",
        )
    ]


def _trainer(data: corpus.Split, cache: TargetCache, folder: Path, seed: int, rounds: int) -> DistillationTrainer:
    index = corpus.pack(data.windows(steps.LENGTH), steps.LENGTH)
    values = TrainingParameters(
        profile="benchmark", epochs=(5 + 3 * rounds) / (len(index) // 16), batch_size=16, gradient_accumulation=1, learning_rate=3e-3,
        warmup=0.05, weight_decay=0.1, seed=seed, precision="auto", compile=True,
    )  # fmt: skip
    folder.mkdir()
    model, objective = steps.student("sdpa" if steps.DEVICE == "cuda" else "eager"), Objective([Distillation(0.9)], cache)
    trainer = DistillationTrainer(model, values, TrainingText(data), index, folder, objective)
    trainer.args.save_strategy = SaveStrategy.NO  # eight times a run, however long it is
    return trainer


def memory() -> list[dict]:
    """Most memory while generate stacks the weights and runs, above what there was before the members were built."""
    if steps.DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, peak = _anonymous(), Peak()
    model, ids = ensemble(256), torch.ones((1, 8), dtype=torch.long, device=steps.DEVICE)
    model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, attention_mask=torch.ones_like(ids))
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    found = peak() - before
    detail = f"{found / 2**20:,.0f} against {weights / 2**20:,.0f} MiB; {MEMBERS} members of 4 x 256"
    return [steps.row("memory of packed generate against the members' weights", found / weights, "<= 1.2", detail)]


class Peak:
    """Largest anonymous memory of this process, looked at every two milliseconds from now until it is asked for."""

    def __init__(self):
        self.peak, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, _anonymous())

    def __call__(self) -> int:
        self.done.set()
        self.thread.join()
        return self.peak


def _anonymous() -> int:
    """Bytes of resident memory that no file backs."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    steps.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    warm, ids = ensemble(64, 2), torch.ones((1, 8), dtype=torch.long, device=steps.DEVICE)
    warm.generate(ids, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(ids))  # loads what it needs
    record(memory() + generation(options.rounds) + inputs(options.rounds) + training(options.rounds))
