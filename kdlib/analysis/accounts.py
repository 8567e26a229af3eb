"""What was run and what it cost, as tidy tables: settings, corpus, vocabulary, work."""

import re
from pathlib import PurePath

import numpy as np
import pandas as pd

from kdlib.analysis import comparison, ledger, statistics
from kdlib.study import design, profiles, store

TEACHERS = {
    "frozen": "used as it was published, its vocabulary pruned",
    "lora": "LoRA-adapted to the training text",
    "full": "fine-tuned on the training text",
    "scratch": "trained from random weights on the training text",
}
TARGETS = {
    "sampled": "{draws} tokens drawn from its distribution",
    "topk": "the {top_k} most probable tokens and the mass of the rest",
    "topk_sampled": "the {top_k} most probable tokens and {draws} drawn from the rest",
    "dense": "its whole distribution",
}
STRATIFIED = ", one from each of as many equal parts"


def setup(profile: str) -> pd.DataFrame:
    """The study's settings and a few counts, a row each: name, value. The paper looks its set-up up here.

    Values are those of the runs, not of a profile that may have been edited since they were made.
    """
    table = store.table(profile)
    trained = table[(table.kind == "student") & (table.epochs > 0)]
    distilled = trained[trained.objective == "kd"].run.iloc[0]
    student, inputs = distilled.settings["parameters"], distilled.settings["inputs"]
    targets = table.run[inputs["targets"]].settings["parameters"]
    # Targets from outside have no teacher among the runs; what is told then is the profile's own.
    taught = table.run[inputs["targets"]].settings["inputs"].get("teacher") or table.id[table.kind == "teacher"].iloc[-1]
    teacher = table.run[taught].settings["parameters"]
    text = table.run[inputs["corpus"]]
    pooled = [one for one in store.entries(profile) if one["formed"] == "independent" and one["objective"] == "kd"]
    groups = {tuple(one["members"]) for one in pooled}
    parameters = distilled.metrics["parameters"]
    card = text.metrics["card"]
    read = ("kd_weight", "temperature", "architecture", "layers", "hidden_size", "epochs", "learning_rate")
    values = {
        "profile": profiles.load(profile).name,
        "runs": len(table),
        "date": max(store.read_json(run.path / "provenance.json")["started"] for run in table.run)[:10],
        # A corpus is made where no model computes.
        "device": " and ".join(sorted({run.metrics["cost"]["device"] for run in table.run if run.kind != "corpus"})),
        "precision": " and ".join(sorted({run.metrics["cost"].get("precision", "not recorded") for run in trained.run})),
        "side_by_side": f"{store.side_by_side(profile, trained.run):.0f}",
        "domains": _listed(list(text.settings["parameters"]["domains"])),
        "ood": text.settings["parameters"]["ood"],
        "train_tokens": card["splits"]["train"]["tokens"],
        "test_tokens": card["splits"]["test"]["tokens"],
        "near_duplicates": sum(sum(domain["near_duplicates"].values()) for domain in card["domains"].values()),
        "block_length": text.settings["parameters"]["block_length"],
        "vocabulary": text.metrics["vocabulary"]["size"],
        "teacher": "a small model" if teacher["adaptation"] == "scratch" else _called(teacher["source"]),
        "adaptation": TEACHERS[teacher["adaptation"]],
        "targets": TARGETS[targets["kind"]].format(**targets) + (STRATIFIED if targets.get("stratified") else ""),
        **{name: "on a schedule" if isinstance(student[name], dict) else student[name] for name in read},
        "parameters": parameters["total"],
        "non_embedding": parameters["non_embedding"],
        "seeds": trained.seed.nunique(),
        "members": len(next(iter(groups))),
        "repeats": len(groups),
        "minimum": statistics.MINIMUM,
    }
    return pd.DataFrame(
        {"name": name, "value": f"{value:g}" if isinstance(value, float) else str(value)}
        for name, value in values.items()
    )


def _called(source: str) -> str:
    """A teacher's source as a paper names it: a local model by its file's or folder's name, not by where it lies."""
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+@\S+", source)
    return source if hub else PurePath(source).name or "a local model"


def _of_kind(profile: str, kind: str) -> list[store.Run]:
    return [run for run in store.table(profile).run if run.kind == kind]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def corpus(profile: str) -> pd.DataFrame:
    """The data card as a table: documents, sources, bytes, tokens and licence of every split and domain."""
    card = _of_kind(profile, "corpus")[0].metrics["card"]
    return pd.DataFrame(
        {"split": split, "domain": domain, **counts, "licence": card["domains"][domain]["licence"]}
        for split, values in card["splits"].items()
        for domain, counts in values["domains"].items()
    )


def vocabulary(profile: str) -> pd.DataFrame:
    """Bits per byte of test text of the teacher before its vocabulary was pruned, after, and after adaptation.

    A study whose teacher has a vocabulary of its own has no row "before".
    """
    size, rows = _of_kind(profile, "corpus")[0].metrics["vocabulary"], []
    for run in _of_kind(profile, "teacher"):
        metrics = run.metrics
        if whole := metrics.get("unpruned"):
            unpruned = {
                "teacher": "teacher (as published)",
                "vocabulary": size["teacher_size"],
                "bits_per_byte": whole["test"]["bits_per_byte"],
            }
            rows.append(unpruned)
        pruned = {"teacher": design.TEACHERS[run.settings["parameters"]["adaptation"]], "vocabulary": size["size"]}
        rows.append(pruned | {"bits_per_byte": metrics["evaluation"]["test"]["bits_per_byte"]})
    return pd.DataFrame(rows)


def cost(profile: str) -> pd.DataFrame:
    """Work and quality of every method, and of writing targets (a teacher's, students'), a row each, averaged over runs.

    ``flops``, ``tokens``, ``seconds`` and ``tokens_per_second`` are of training (of writing, for targets), summed over the
    members of an ensemble; ``flops`` includes what a step asks of a teacher; the speed is all tokens by all seconds.
    ``peak_memory_bytes`` is the most that a run allocated on its GPU, or its process held without one, the evaluation
    included; of an ensemble that of the largest member.

    All else is over the union of the runs upstream (:mod:`kdlib.analysis.ledger`): ``<category>_flops`` and
    ``<category>_seconds`` without the training of teachers, but that of the teacher which the row is about;
    ``teacher_training_flops``, which that leaves out; ``total_flops``, all but evaluation and teachers' training. ``nll`` is on
    test text.
    """
    models = comparison.models(profile)
    rows = []
    for what, runs in _writers(_of_kind(profile, "targets")).items():
        work = pd.DataFrame(map(_written, runs)).mean()
        rows.append({"what": what, **work, "runs": len(runs), **_upstream(profile, runs)})
    for method, group in models[models.objective != "untrained"].groupby("method", sort=False):
        work = pd.DataFrame([_work(row) for _, row in group.iterrows()]).mean()
        metrics = group.run.iloc[0].metrics
        size = {"parameters": metrics["parameters"]["total"], "non_embedding": metrics["parameters"]["non_embedding"]}
        nll = np.mean([run.metrics["evaluation"]["test"]["nll"] for run in group.run])
        rows.append({"what": method, "runs": len(group), **size, **work, **_upstream(profile, list(group.run)), "nll": nll})
    return pd.DataFrame(rows).assign(tokens_per_second=lambda table: table.tokens / table.seconds)


def _upstream(profile: str, runs: list[store.Run]) -> dict:
    """By category, over the union of what lies upstream of a run; the mean over ``runs``."""
    rows = []
    for run in runs:
        with_teacher, without = (ledger.cost(profile, run, training) for training in (True, False))
        counted = with_teacher if run.kind == "teacher" else without
        row = {f"{name}_{column}": counted[column][name] for column in counted for name in counted.index}
        left_out = (with_teacher - counted).flops.sum(skipna=False)
        rows.append(row | {"teacher_training_flops": left_out, "total_flops": counted.flops[list(ledger.MAKING)].sum(skipna=False)})
    return pd.DataFrame(rows).mean().to_dict()


def _writers(targets: list[store.Run]) -> dict[str, list[store.Run]]:
    """Targets by what a table calls their writing: those of the study's teacher, those that it redraws from, those of students and pools."""
    inputs = {run.id: run.settings["inputs"] for run in targets}
    dense, found = {read.get("dense") for read in inputs.values()}, {}
    for run in targets:
        teacher = inputs[run.id].get("teacher", "teacher")
        if not teacher.startswith("teacher"):
            what = f"writing targets of {'ensembles' if teacher.startswith('ensemble') else 'students'}"
        else:
            what = "writing dense targets" if run.id in dense else "writing targets"
        found.setdefault(what, []).append(run)
    return found


def _written(run: store.Run) -> dict:
    metrics = run.metrics
    # A writer that was killed after its last shard has timed none.
    seconds = metrics["tokens"] / (metrics["tokens_per_second"] or np.nan)
    return {
        "format": metrics.get("format", 2),  # version 3 was the first to be told
        "runs": 1,
        "tokens": metrics["tokens"],
        "seconds": seconds,
        "flops": _making(run),
        "bytes_per_token": metrics["bytes_per_token"],
        "peak_memory_bytes": _peak(metrics["cost"]),
    }


def _work(row: pd.Series) -> dict:
    parts = [row.run.beside(member) for member in row.members] or [row.run]
    training = [part.metrics["training"] for part in parts]
    names = ("tokens", "seconds")
    if None in training:
        return dict.fromkeys((*names, "flops", "peak_memory_bytes"), np.nan)
    summed = {name: sum(part[name] for part in training) for name in names} | {"flops": sum(map(_making, _trained_in(parts)))}
    # The cost is that of the last process; one that was killed may have taken more while it trained.
    peaks = [max(_peak(part.metrics["cost"]), part.metrics["training"].get("peak_memory_bytes", 0)) for part in parts]
    return summed | {"peak_memory_bytes": max(peaks)}


def _trained_in(parts: list[store.Run]) -> list[store.Run]:
    """The runs that did the work: of members that were trained together their run as well, once."""
    together = {part.settings["inputs"]["joint"]: part for part in parts if part.kind == "member"}
    return parts + [part.beside(one) for one, part in together.items()]


def _making(run: store.Run) -> float:
    return sum(ledger.work(run)[name]["flops"] for name in ledger.MAKING)


def _peak(cost: dict) -> int:
    return cost.get("peak_device_bytes", cost["peak_memory_bytes"])
