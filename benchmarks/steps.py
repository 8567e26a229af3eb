"""Speed and memory of training, reading and writing, as ratios of two things timed alternately in one run.

    python benchmarks/steps.py              # updates benchmarks/results.csv

Nothing is downloaded: students have the shape of the quick profile, the teacher that of SmolLM2-135M on a vocabulary of
8 192, and text is random tokens. Every figure is the median over rounds; the two sides of a ratio take turns.
"""

import argparse
import functools
import gc
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from kdlib import models  # before torch, as kdlib asks for

import numpy as np
import pandas as pd
import torch
from record import record
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from kdlib.cache import Kind, ModelTeacher, TargetCache, write_targets
from kdlib.data import corpus
from kdlib.data.text import TrainingText
from kdlib.losses import DenseTargets, SparseTargets, fused, linear_distillation_loss
from kdlib.study import store
from kdlib.study.parameters import TrainingParameters
from kdlib.training import Collator, DistillationTrainer
from kdlib.training.compiling import repeatable

VOCABULARY, LENGTH = 8192, 256
SAMPLED = Kind("sampled", draws=64)
READ = {"": SAMPLED, "stratified ": Kind("sampled", draws=32, stratified=True)}


def split(tokens: int, seed: int = 0) -> corpus.Split:
    """Random documents of 300 to 1 500 tokens."""
    rng = np.random.default_rng(seed)
    offsets = np.r_[0, np.cumsum(rng.integers(300, 1500, tokens // 900 + 1))]
    names = [f"random/{number}#00" for number in range(len(offsets) - 1)]
    table = pd.DataFrame({"document": names, "source": [name[:-3] for name in names], "domain": "random"})
    table["bytes"], table["tokens"] = np.diff(offsets) * 4, np.diff(offsets) - 1
    return corpus.Split("train", table, rng.integers(1, VOCABULARY, offsets[-1]).astype(np.int32), offsets, 0)


def llama(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, attention: str = "eager"):
    """A randomly initialised Llama with tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def student(attention: str = "eager"):
    """4 layers of width 128."""
    return llama(4, 128, 4, 4, 352, attention)


def teacher():
    """The shape of SmolLM2-135M on the pruned vocabulary."""
    return llama(30, 576, 9, 3, 1536).eval().requires_grad_(False)


def alternate(rounds: int, *sides) -> list[float]:
    """Median seconds of each function, called in turns after two warm-up rounds."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 2):
        for side, seconds in zip(sides, times, strict=True):
            synchronise()
            started = time.perf_counter()
            side()
            synchronise()
            if turn >= 2:
                seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in times]


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Step:
    """One optimisation step of a student: from hidden states (ours), or as a plain Trainer takes it, which is with the attention
    that transformers chooses (SDPA) and through dense float32 logits. ``compiled`` is body and loss, as the trainer compiles
    them; ``any_order`` leaves out what makes the compiled step repeatable on a CPU.
    """

    def __init__(
        self,
        batch: dict,
        dense: bool = False,
        kd_weight: float = 0.0,
        teacher=None,
        compiled: bool = False,
        any_order: bool = False,
    ):
        self.model = student("sdpa" if dense else "eager")
        self.body = models.body(self.model)
        self.compiled = compiled
        self.body = torch.compile(self.body, dynamic=False) if compiled else self.body
        self.context = repeatable if compiled and DEVICE == "cpu" and not any_order else nullcontext
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, fused=True)
        self.batch, self.dense, self.kd_weight, self.teacher = batch, dense, kd_weight, teacher

    def hidden(self, body):
        """Last hidden states [tokens, width]."""
        mask = models.attention_mask(self.batch["segments"], torch.float32)
        with torch.autocast(DEVICE, dtype=AUTOCAST, enabled=AUTOCAST is not None):
            return body(
                input_ids=self.batch["input_ids"],
                position_ids=self.batch["position_ids"],
                attention_mask=mask,
            ).last_hidden_state.flatten(0, 1)

    def __call__(self):
        with self.context():
            self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self):
        """The loss of the batch."""
        labels = self.batch["labels"].flatten()
        if self.dense:
            with torch.autocast(DEVICE, dtype=AUTOCAST, enabled=AUTOCAST is not None):
                logits = self.model(input_ids=self.batch["input_ids"], position_ids=self.batch["position_ids"]).logits
            return F.cross_entropy(logits.float().flatten(0, 1), labels)
        targets = self.batch.get("targets")
        if self.teacher is not None:
            with torch.no_grad():
                targets = DenseTargets(self.hidden(models.body(self.teacher)), *models.head(self.teacher))
        return linear_distillation_loss(
            self.hidden(self.body),
            *models.head(self.model),
            labels,
            targets if self.kd_weight else None,
            self.kd_weight,
            matmul_dtype=AUTOCAST,
            compiled=self.compiled,
        ).loss


def batches(data: corpus.Split, rows: int, targets: TargetCache | None = None) -> dict:
    """One batch of full rows, on the device."""
    windows = data.windows(LENGTH)
    index = corpus.pack(windows[windows[:, 1] == LENGTH][:rows], LENGTH)
    batch = Collator(data, targets)(list(index))
    return {name: value.to(torch.device(DEVICE)) for name, value in batch.items()}


def products(tokens: int):
    """A function that takes the matrix products of a student's linear layers, forward and backward, and nothing else.

    Into memory that is there already; those of the output layer a chunk at a time, as the loss takes them. Attention's own
    products are not among them.
    """
    dtype = AUTOCAST or torch.float32
    shapes = 4 * [(128, 128)] * 4 + 3 * [(128, 352)] * 4
    weights = [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in [*shapes, (128, VOCABULARY)]]
    inputs, outputs = (
        {width: torch.randn(tokens, width, device=DEVICE, dtype=dtype) for width in (128, 352)} for _ in range(2)
    )
    gradients = {weight.shape: torch.empty_like(weight) for weight in weights}
    chunk = fused.CHUNK_ELEMENTS[DEVICE] // VOCABULARY
    logits = torch.randn(min(chunk, tokens), VOCABULARY, device=DEVICE, dtype=dtype)
    # Products of a product soon overflow, and such numbers are slower to multiply: what is read is never what was written.
    written = torch.empty_like(logits)

    def multiply():
        for weight in weights[:-1]:
            wide, narrow = weight.shape
            x, gradient = inputs[wide], inputs[narrow]
            torch.mm(x, weight, out=outputs[narrow])
            torch.mm(gradient, weight.T, out=outputs[wide])
            torch.mm(x.T, gradient, out=gradients[weight.shape])
        weight = weights[-1]
        for start in range(0, tokens, chunk):
            x, out = inputs[128][start : start + chunk], outputs[128][start : start + chunk]
            torch.mm(x, weight, out=written[: len(x)])
            torch.mm(logits[: len(x)], weight.T, out=out)
            torch.mm(x.T, logits[: len(x)], out=gradients[weight.shape])

    return multiply


class Turns(TrainerCallback):
    """Times the steps of a trainer, each with all that the trainer does from one to the next, and ``other`` in turn with them."""

    def __init__(self, other):
        self.other, self.resumed, self.steps, self.others = other, None, [], []

    def on_step_end(self, args, state, control, **_):
        synchronise()
        ended = time.perf_counter()
        if self.resumed is not None and state.global_step > 3:  # the first ones compile
            self.steps.append(ended - self.resumed)
        self.other()
        synchronise()
        self.resumed = time.perf_counter()
        self.others.append(self.resumed - ended)

    def on_save(self, args, state, control, **_):
        self.resumed = None  # eight times a run, however long it is


def share_of_products(data: corpus.Split, rounds: int) -> list[dict]:
    """A step of the trainer itself against its matrix products."""
    index = corpus.pack(data.windows(LENGTH), LENGTH)
    index = index[(index >= 0).all(1)]
    steps = 3 + 3 * rounds
    values = TrainingParameters(
        profile="benchmark", epochs=steps / (len(index) // 16), batch_size=16, gradient_accumulation=1, learning_rate=3e-3,
        warmup=0.05, weight_decay=0.1, seed=0, precision="auto", compile=True,
    )  # fmt: skip
    turns = Turns(products(16 * LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(student(), values, TrainingText(data), index, Path(folder))
        trainer.add_callback(turns)
        trainer.fit()
    a, b = statistics.median(turns.steps), statistics.median(turns.others[3:])
    target = ">= 0.75"
    if AUTOCAST is not None:
        amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
        target = "" if DEVICE == "cuda" else ">= 0.5" if amx else ">= 0.55"
    tokens = 16 * LENGTH
    return [
        row(
            "student step of the trainer as a share of its matrix products alone, tokens/s",
            b / a,
            target,
            f"{tokens / a:,.0f} of {tokens / b:,.0f} tokens/s",
        )
    ]


def repeatability(data: corpus.Split, rounds: int) -> list[dict]:
    """What it costs that compiled training repeats itself bit for bit."""
    if DEVICE != "cpu":
        return []
    batch = batches(data, 16)
    a, b = alternate(rounds, Step(batch, compiled=True), Step(batch, compiled=True, any_order=True))
    return [
        row(
            "compiled step that repeats itself bit for bit against one that does not, time",
            a / b,
            "<= 1.05",
            f"{1e3 * a:.0f} against {1e3 * b:.0f} ms",
        )
    ]


def student_step(data: corpus.Split, rounds: int) -> list[dict]:
    """A student's step against a plain one, and against the least that any could take."""
    batch = batches(data, 16)
    ours, eager, plain = Step(batch, compiled=True), Step(batch), Step(batch, dense=True)
    tokens = int((batch["labels"] >= 0).sum())
    a, b, c = alternate(rounds, ours, eager, plain)
    return [
        row(
            "student step against a plain step with dense float32 logits, tokens/s",
            c / a,
            ">= 4",
            f"{tokens / a:,.0f} against {tokens / c:,.0f} tokens/s",
        ),
        row(
            "the same without torch.compile, tokens/s",
            c / b,
            "",
            f"{tokens / b:,.0f} against {tokens / c:,.0f} tokens/s",
        ),
    ]


def kd_step(data: corpus.Split, rounds: int) -> list[dict]:
    """Cached targets against cross-entropy, and against the teacher in the loop."""
    large = teacher()
    with tempfile.TemporaryDirectory() as folder:
        write_targets(Path(folder), ModelTeacher(large, AUTOCAST), data, {}, SAMPLED, block_length=LENGTH)
        cache = TargetCache(Path(folder), {}, 1.0)
        batch = batches(data, 16, cache)
        index = corpus.pack(data.windows(LENGTH), LENGTH)[:16]
        ce, kd = Step(batch, compiled=True), Step(batch, kd_weight=0.9, compiled=True)
        online = Step({**batch, "targets": None}, kd_weight=0.9, teacher=large, compiled=True)

        def kd_with_reading():
            batch["targets"] = cache.read(index).to(torch.device(DEVICE))
            kd()

        a, b, read = alternate(rounds, ce, kd_with_reading, lambda: cache.read(index))
        (c,) = alternate(2, online)
    return [
        row(
            "KD step with cached targets (reading included) against the CE step, time",
            b / a,
            "<= 1.15",
            f"{1e3 * b:.0f} against {1e3 * a:.0f} ms",
        ),
        row(
            "training from cached targets against an online teacher, tokens/s",
            c / b,
            ">= 5",
            f"{c:.2f} against {b:.2f} s a step",
        ),
        row("reading targets, share of the KD step's time", read / b, "<= 0.03", f"{1e3 * read:.1f} of {1e3 * b:.0f} ms"),
    ]


def reading(data: corpus.Split, rounds: int) -> list[dict]:
    """Batches of 16 rows in shuffled order from a cache that is larger than a frame or a shard."""
    model = student()
    # Logits with a standard deviation of 4: a trained teacher repeats itself in 64 draws, a random one hardly does.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 128, device=DEVICE) * 4 / 128**0.5)
    order = np.random.default_rng(0).permutation(corpus.pack(data.windows(LENGTH), LENGTH))
    def read(cache: TargetCache) -> None:
        for at in range(0, len(order), 16):
            cache.read(order[at : at + 16])

    with tempfile.TemporaryDirectory() as folder:
        written, caches = [], []
        for number, kind in enumerate(READ.values()):
            at = Path(folder, str(number))
            written.append(write_targets(at, ModelTeacher(model, AUTOCAST), data, {}, kind, block_length=LENGTH, shard_tokens=2**14))
            caches.append(TargetCache(at, {}, 1.0))
        times = alternate(rounds, *(functools.partial(read, cache) for cache in caches))
    rows = []
    for (name, kind), found, seconds in zip(READ.items(), written, times, strict=True):
        ids, size = found["distinct_ids_per_token"], found["bytes_per_token"]
        detail = f"16 x {LENGTH} shuffled; {kind.draws} draws, {ids:.0f} ids and {size:.1f} bytes a token"
        rows.append(row(f"reading {name}targets, one process, warm", order.size / seconds, ">= 1000000", detail, "tokens/s"))
    return rows


def writing(data: corpus.Split, rounds: int) -> list[dict]:
    """Writing targets against the teacher's forward pass with its output layer."""
    large = teacher()
    index = corpus.pack(data.windows(LENGTH), LENGTH)

    def forward():
        with torch.inference_mode():
            for start in range(0, len(index), 8):
                batch = {
                    name: torch.from_numpy(value).to(DEVICE)
                    for name, value in corpus.rows(data, index[start : start + 8]).items()
                }
                mask = models.attention_mask(batch["segments"], torch.float32)
                with torch.autocast(DEVICE, dtype=AUTOCAST, enabled=AUTOCAST is not None):
                    large(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask)

    def write():
        with tempfile.TemporaryDirectory() as folder:
            write_targets(Path(folder), ModelTeacher(large, AUTOCAST), data, {}, SAMPLED, block_length=LENGTH)

    a, b = alternate(rounds, forward, write)
    return [
        row(
            "writing targets against the bare teacher forward, time",
            b / a,
            "<= 1.2",
            f"{len(data.tokens) / b:,.0f} against {len(data.tokens) / a:,.0f} tokens/s",
        )
    ]


def loss_memory(tokens: int, vocabulary: int, target: str, width: int = 128) -> list[dict]:
    """Peak memory that the loss allocates, forward and backward, against dense logits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(DEVICE).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul_(0.05).to(DEVICE).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE)
    ids = torch.randint(vocabulary, (tokens, 32), generator=generator)
    targets = SparseTargets(ids, torch.full((tokens, 32), 1 / 32), None, torch.zeros(tokens), 1.0).to(
        torch.device(DEVICE)
    )

    def ours():
        linear_distillation_loss(hidden, weight, None, labels, targets, 0.9).loss.backward()

    def dense():
        F.cross_entropy((hidden @ weight.T).float(), labels).backward()

    a, b = peak_memory(ours), peak_memory(dense)
    return [
        row(
            f"loss's peak memory at {tokens:,} tokens x {vocabulary:,} ids, against dense",
            a / b,
            target,
            f"{a / 2**20:,.0f} against {b / 2**20:,.0f} MiB",
        )
    ]


def peak_memory(function) -> int:
    """Most bytes of tensors alive at once above what was there, from the allocator's own record."""
    gc.collect()
    if DEVICE == "cuda":
        function()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    function()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def row(what: str, measured: float, target: str, detail: str, unit: str = "×") -> dict:
    """One line of the results table."""
    shown = f"{measured:.3g}" if unit == "×" else f"{measured:.0f}"
    print(f"{what}: {shown} {unit} (target {target or 'none'}; {detail})", flush=True)
    return {
        "what": what,
        "target": target,
        "measured": shown,
        "unit": unit,
        "detail": detail,
        "device": store.device(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    AUTOCAST = models.precision("auto")
    tokens = 40_000 if DEVICE == "cuda" else 6_000
    found = student_step(split(20_000), options.rounds) + share_of_products(split(40_000), options.rounds)
    found += repeatability(split(20_000), options.rounds)
    found += kd_step(split(tokens), options.rounds) + writing(split(tokens), 2)
    found += reading(split(100_000), options.rounds)
    found += loss_memory(4096, 8192, "<= 0.167") + loss_memory(8192, 49152, "<= 0.1")
    record(found)
