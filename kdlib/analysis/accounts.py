"""What was run and what it cost, as tidy tables: settings, corpus, vocabulary, work."""

import numpy as np
import pandas as pd

from kdlib.analysis import comparison, statistics
from kdlib.study import profiles, store

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
    teachers = table[(table.kind == "teacher") & (table.adaptation == student["teacher"])]
    teacher = teachers.run.iloc[0].settings["parameters"]
    text = table.run[inputs["corpus"]]
    ensembles = [run.settings["parameters"] for run in table[table.kind == "ensemble"].run]
    groups = {tuple(one["seeds"]) for one in ensembles if one["student"]["objective"] == "kd"}
    parameters = distilled.metrics["parameters"]
    card = text.metrics["card"]
    read = ("kd_weight", "temperature", "architecture", "layers", "hidden_size", "epochs", "learning_rate")
    values = {
        "profile": profiles.load(profile).name,
        "runs": len(table),
        "date": max(store.read_json(run.path / "provenance.json")["started"] for run in table.run)[:10],
        # A corpus is made where no model computes.
        "device": " and ".join(sorted({run.metrics["cost"]["device"] for run in table.run if run.kind != "corpus"})),
        "side_by_side": f"{store.side_by_side(profile, trained.run):.0f}",
        "domains": _listed(list(text.settings["parameters"]["domains"])),
        "ood": text.settings["parameters"]["ood"],
        "train_tokens": card["splits"]["train"]["tokens"],
        "test_tokens": card["splits"]["test"]["tokens"],
        "near_duplicates": sum(sum(domain["near_duplicates"].values()) for domain in card["domains"].values()),
        "block_length": text.settings["parameters"]["block_length"],
        "vocabulary": text.metrics["vocabulary"]["size"],
        "teacher": "a small model" if teacher["adaptation"] == "scratch" else teacher["source"],
        "adaptation": TEACHERS[teacher["adaptation"]],
        "targets": TARGETS[targets["kind"]].format(**targets) + (STRATIFIED if targets.get("stratified") else ""),
        **{name: student.get(name, "on a schedule") for name in read},
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
        pruned = {"teacher": comparison.TEACHERS[run.settings["parameters"]["adaptation"]], "vocabulary": size["size"]}
        rows.append(pruned | {"bits_per_byte": metrics["evaluation"]["test"]["bits_per_byte"]})
    return pd.DataFrame(rows)


def cost(profile: str) -> pd.DataFrame:
    """Work and quality of every method, and of writing targets, a row each, averaged over runs.

    ``flops``, ``tokens``, ``seconds`` and ``tokens_per_second`` are of training (of writing, for targets), summed over the
    members of an ensemble; the speed is all tokens by all seconds. ``peak_memory_bytes`` is the most that a run allocated on
    its GPU, or its process held without one, the evaluation included; of an ensemble that of the largest member.
    ``total_flops`` adds what the teacher computed for the targets. ``nll`` is on test text.
    """
    models = comparison.models(profile)
    rows = [_written(run) for run in _of_kind(profile, "targets")]
    for method, group in models[models.objective != "untrained"].groupby("method", sort=False):
        work = pd.DataFrame([_work(row, models) for _, row in group.iterrows()]).mean()
        metrics = group.run.iloc[0].metrics
        size = {"parameters": metrics["parameters"]["total"], "non_embedding": metrics["parameters"]["non_embedding"]}
        nll = np.mean([run.metrics["evaluation"]["test"]["nll"] for run in group.run])
        rows.append({"what": method, "runs": len(group), **size, **work, "total_flops": group.flops.mean(), "nll": nll})
    return pd.DataFrame(rows).assign(tokens_per_second=lambda table: table.tokens / table.seconds)


def _written(run: store.Run) -> dict:
    metrics = run.metrics
    # A writer that was killed after its last shard has timed none.
    seconds = metrics["tokens"] / (metrics["tokens_per_second"] or np.nan)
    found = {name: metrics[name] for name in ("tokens", "flops", "bytes_per_token")}
    return {
        "what": "writing targets",
        "format": metrics.get("format", 2),  # version 3 was the first to be told
        "runs": 1,
        "seconds": seconds,
        "peak_memory_bytes": _peak(metrics["cost"]),
        **found,
    }


def _work(row: pd.Series, models: pd.DataFrame) -> dict:
    parts = [models.run[member] for member in row.members] or [row.run]
    training = [part.metrics["training"] for part in parts]
    names = ("tokens", "seconds", "flops")
    if None in training:
        return dict.fromkeys((*names, "peak_memory_bytes"), np.nan)
    summed = {name: sum(part[name] for part in training) for name in names}
    # The cost is that of the last process; one that was killed may have taken more while it trained.
    peaks = [max(_peak(part.metrics["cost"]), part.metrics["training"].get("peak_memory_bytes", 0)) for part in parts]
    return summed | {"peak_memory_bytes": max(peaks)}


def _peak(cost: dict) -> int:
    return cost.get("peak_device_bytes", cost["peak_memory_bytes"])
