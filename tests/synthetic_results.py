"""A complete, invented results folder: every run that a profile plans, in the run store's format, in a second or two.

Analyses, figures and the paper are tested on it without training anything. Its numbers only have the right shape:
students trained with soft targets are better than those without, ensembles are better than members, and documents and
seeds vary; students of a grid differ from one another by an amount of their own, whatever the seed.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.runs import corpus, teacher
from kdlib.study import design, profiles, store
from kdlib.study.work import entry, total

SPLITS = ("validation", "calibration", "test", "ood")
NLL = {"frozen": 3.4, "lora": 3.1, "full": 3.05, "scratch": 3.6, "ce": 4.95, "kd": 4.86, "online_kd": 4.85}
BINS = 15


def write(profile: str, sources: int = 12, seed: int = 0, grids: Sequence[str] = ()) -> Path:
    """Lay down ``results/<profile>`` under ``store.home()``: every run of the profile's comparison and of ``grids``.

    Returns the folder.
    """
    documents = _documents(profiles.load(profile).corpus, sources)
    for step in design.study(profile, tuple(grids)):
        rng = np.random.default_rng([seed, int(step.id[-12:], 16)])
        folder = store.results(profile) / "runs" / step.id
        folder.mkdir(parents=True)
        metrics = {
            "cost": {
                "seconds": 60.0 + rng.random(),
                "peak_memory_bytes": int(2e9),
                "device": "invented processor, 2 threads",
            }
        }
        invented = {"corpus": _corpus, "targets": _targets, "scores": _scores, "clusters": _clusters, "fidelity": _fidelity}
        invented["joint"] = _joint
        metrics |= invented.get(step.kind, _model)(step, documents, folder, rng)
        metrics["work"] = _work(step, metrics)
        store.write_json(folder / "settings.json", step.settings)
        store.write_json(
            folder / "provenance.json", {"started": "2024-05-01T00:00:00Z", "seconds": 0.0, "device": "invented processor, 2 threads"}
        )
        store.write_json(folder / "metrics.json", metrics)
    design.write(profile, tuple(grids))
    return store.results(profile)


def _work(step, metrics) -> dict:
    """What the run computed itself, as its metrics have it."""
    if step.kind == "targets":
        return total({"teacher_forward": entry(metrics["flops"], metrics["tokens"] / metrics["tokens_per_second"])})
    measured = {"evaluation": entry(2e12, 20.0)} if "evaluation" in metrics else {}
    if step.kind == "member" or not (training := metrics.get("training")):
        return total(measured)  # of a member the run that trained it tells
    asked = {"teacher_forward": entry(training["teacher_flops"])} if "teacher_flops" in training else {}
    return total({"train": entry(training["flops"], training["seconds"])}, asked, measured)


def _documents(corpus: corpus.Parameters, sources: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for split in SPLITS:
        for domain in [corpus.ood] if split == "ood" else list(corpus.domains):
            for number in range(sources):
                for part in range(rng.integers(1, 4)):
                    name = f"{domain}/{split} {number}"
                    tokens = int(rng.integers(40, 400))
                    rows.append((split, f"{name}#{part:02d}", name, domain, tokens, 4 * tokens))
    frame = pd.DataFrame(rows, columns=["split", "document", "source", "domain", "tokens", "bytes"])
    frame["difficulty"] = rng.normal(0, 0.3, frame.source.nunique())[pd.factorize(frame.source)[0]]
    return frame


def _fidelity(step, documents, folder, rng) -> dict:
    kept = step.inputs["targets"].parameters
    drawn, largest = kept.draws * ("sampled" in kept.kind), kept.top_k * ("topk" in kept.kind)
    size = 1024 if kept.kind == "dense" else 2 + 0.7 * drawn + 2.2 * largest
    angle = 0 if kept.kind == "dense" else 50 / np.sqrt(drawn) if drawn else 60 - 5 * np.log(largest)
    off = 0.001 * angle + 0.01 * rng.normal()
    test = {"nll": 4.86 + off, "ece": 0.02 + 0.2 * abs(off), "full_ece": 0.03, "nll_calibrated": 4.85 + off}
    angles = {"angle_initial": angle / 2, "angle_trained": angle + rng.random()}
    return angles | {"teacher_kl": 1.1 + off, "bytes_per_token": size, "entries_per_token": size / 2, "test": test}


def _corpus(step, documents, folder, rng) -> dict:
    named = pd.concat([documents.assign(split=documents.split.replace("validation", "train")), documents])
    summed = named.groupby(["split", "domain"]).agg(
        documents=("document", "size"), sources=("source", "nunique"), bytes=("bytes", "sum"), tokens=("tokens", "sum")
    )
    splits: dict = {}
    for (split, domain), row in summed.iterrows():
        splits.setdefault(split, {"domains": {}})["domains"][domain] = {name: int(value) for name, value in row.items()}
    for values in splits.values():
        values |= {name: sum(domain[name] for domain in values["domains"].values()) for name in summed}
    about = {"licence": "public domain", "near_duplicates": {"test": 2, "train": 1}}
    size = step.parameters.vocabulary_size
    return {
        "card": {"splits": splits, "domains": {domain: about for domain in documents.domain.unique()}},
        "vocabulary": {"size": size, "teacher_size": None if step.parameters.tokenizer == "train" else 6 * size},
    }


def _scores(step, documents, folder, rng) -> dict:
    return {"tokens": int(documents.tokens.sum()), "mean": 3.0, "low": 0.1, "median": 2.5, "high": 8.0}


def _clusters(step, documents, folder, rng) -> dict:
    return {"documents": [90, 90], "cluster_tokens": [9000, 11000], "distance": 0.8, "at_nearest": 0.9}


def _targets(step, documents, folder, rng) -> dict:
    tokens = int(documents.tokens.sum())
    return {
        "tokens": tokens,
        "bytes": 36 * tokens,
        "bytes_per_token": 36.0,
        "tokens_per_second": 2500.0,
        "distinct_ids_per_token": 14.2,
        "teacher_entropy": 2.9,
        "teacher_nll": 3.1,
        "flops": 2.7e8 * tokens,
    }


def _joint(step, documents, folder, rng) -> dict:
    one, count = _size(step, [], rng), len(step.parameters.seeds)
    training = one["training"] | {"flops": count * one["training"]["flops"], "seconds": count * one["training"]["seconds"]}
    return {"training": training, "parameters": {name: count * value for name, value in one["parameters"].items()}}


def _settings(step):
    """Those of a student, whether it was trained alone or with others."""
    joint = step.inputs.get("joint", step)
    return joint.parameters.members[0] if joint.kind == "joint" else step.parameters


def _model(step, documents, folder, rng) -> dict:
    values = _settings(step)
    members = [upstream for name, upstream in step.inputs.items() if name.startswith("member")]
    trained = _settings(members[0]) if members else values
    untrained = step.kind != "teacher" and trained.epochs == 0
    base = NLL[values.adaptation if step.kind == "teacher" else trained.objective] + _effect(trained)
    if untrained:
        base = float(np.log(profiles.load(values.profile).corpus.vocabulary_size))
    elif members:
        base -= 0.09 if values.pool == "probability" else 0.08
    base += 0 if step.kind == "teacher" or untrained else rng.normal(0, 0.012 / max(1, len(members)))
    rows = documents.copy()
    per_token = base + 0.4 * (rows.split == "ood") + rows.difficulty + rng.normal(0, 0.03, len(rows))
    rows["nll"], rows["correct"] = per_token * rows.tokens, np.round(rows.tokens * np.exp(-per_token / 3)).astype(int)
    rows.drop(columns="difficulty").to_parquet(folder / "documents.parquet")
    if not members and step.kind == "student":
        _log(folder, base, rng, values)
        kept = {split: -rng.gamma(2, base / 2, 200).astype(np.float16) for split in SPLITS}
        np.savez(folder / "target_logprobs.npz", **kept)
    return _evaluation(rows, rng) | _size(step, members, rng) | _pooled(rows, members)


def _effect(values) -> float:
    """What a student's settings make of its loss: nothing for those of the comparison, else the same for every seed."""
    if isinstance(values, teacher.Parameters):
        return 0.0
    usual, found = (one.model_dump(mode="json") for one in (profiles.load(values.profile).student, values))
    own = {name: value for name, value in found.items() if value != usual[name]}
    own = {name: value for name, value in own.items() if name not in {"profile", "objective", "seed", "epochs"}}
    start = {"identical": -1.78, "every_nth": -0.8, "embeddings": -0.1, "random": 0.0}[values.initialisation]
    varied = np.random.default_rng(int(store.digest(own), 16)).normal(0, 0.03) if own else 0.0
    return varied + start + (2.5 if values.text == "uniform" else 0)


def _log(folder, base, rng, values) -> None:
    steps = np.arange(1, 101)
    curve = base + 3 * np.exp(-steps / 25) + rng.normal(0, 0.02, steps.size)
    validation = np.where(steps % 10 == 0, base + 3 * np.exp(-steps / 25), np.nan)
    pd.DataFrame(
        {
            "step": steps,
            "epoch": steps / 50,
            "loss": curve,
            "ce": curve,
            "kd": curve - 1,
            "learning_rate": values.learning_rate,
            "tokens": steps * 1000,
            "seconds": steps * 0.4,
            "memory_bytes": int(1e9),
            "peak_memory_bytes": int(1.5e9),
            "validation_nll": validation,
        }
    ).to_csv(folder / "log.csv", index=False)


def _evaluation(rows, rng) -> dict:
    evaluation, domains, reliability = {}, {}, {}
    for split, part in rows.groupby("split"):
        nll, accuracy = part.nll.sum() / part.tokens.sum(), part.correct.sum() / part.tokens.sum()
        bins = {kind: _bins(accuracy, gap, part.tokens.sum()) for kind, gap in (("raw", 0.06), ("calibrated", 0.01))}
        evaluation[split] = {
            "nll": nll,
            "perplexity": np.exp(nll),
            "bits_per_byte": part.nll.sum() / np.log(2) / part.bytes.sum(),
            "accuracy": accuracy,
            "ece": 0.06 + 0.004 * rng.random(),
            "full_ece": 0.09,
            "tokens": int(part.tokens.sum()),
            "bytes": int(part.bytes.sum()),
            "documents": len(part),
            "nll_calibrated": nll - 0.02,
            "ece_calibrated": 0.01,
            "full_ece_calibrated": 0.03,
        }
        reliability[split] = bins
        domains[split] = {
            domain: {
                "nll": one.nll.sum() / one.tokens.sum(),
                "bits_per_byte": one.nll.sum() / np.log(2) / one.bytes.sum(),
                "accuracy": one.correct.sum() / one.tokens.sum(),
                "tokens": int(one.tokens.sum()),
            }
            for domain, one in part.groupby("domain")
        }
    return json.loads(
        json.dumps({"evaluation": evaluation, "domains": domains, "reliability": reliability, "temperature": 1.1})
    )


def _bins(accuracy, gap, tokens) -> dict:
    confidence = (np.arange(BINS) + 0.5) / BINS
    counts = np.round(tokens * np.exp(-confidence / accuracy) / np.exp(-confidence / accuracy).sum())
    return {
        "counts": counts.tolist(),
        "confidence_sums": (counts * confidence).tolist(),
        "hits": (counts * np.clip(confidence - gap, 0, 1)).tolist(),
    }


def _size(step, members, rng) -> dict:
    parts = {"embedding": 1_048_576, "attention": 200_000, "mlp": 400_000, "norms": 1_000, "head": 0}
    parts |= {"non_embedding": 601_000, "total": 1_649_576}
    settings = _settings(step)
    if step.kind == "teacher" or getattr(settings, "initialisation", "") == "identical":
        parts = {name: 60 * count for name, count in parts.items()}
    size = {"parameters": {name: count * max(1, len(members)) for name, count in parts.items()}}
    if members:
        return size
    if step.kind == "teacher" and step.parameters.adaptation == "frozen":
        return size | {
            "training": None,
            "unpruned": {"test": {"bits_per_byte": 1.0, "nll": 3.0, "tokens": 1000, "bytes": 4000}},
        }
    if settings.epochs == 0:
        return size | {
            "training": {
                "tokens": 0,
                "teacher_tokens": 0,
                "steps": 0,
                "seconds": 0.0,
                "tokens_per_second": None,
                "flops": 0,
                "peak_memory_bytes": 0,
                "final_loss": None,
            }
        }
    tokens = 100_000
    loop = {"teacher_flops": 2.7e8 * tokens} if getattr(settings, "objective", "") == "online_kd" else {}
    return size | {
        "training": loop
        | {
            "tokens": tokens,
            "teacher_tokens": tokens if loop else 0,
            "steps": 100,
            "seconds": 40.0,
            "tokens_per_second": 2450.0 + 100 * rng.random(),
            "peak_memory_bytes": int(1e9),
            "flops": 6 * size["parameters"]["total"] * tokens,
            "final_loss": 4.2,
        }
    }


def _pooled(rows, members) -> dict:
    if not members:
        return {}
    means = rows.groupby("split").nll.sum() / rows.groupby("split").tokens.sum()
    return {
        "members": [member.id for member in members],
        "pool": {
            split: {
                "member_nll_mean": mean + 0.09,
                "member_nll_best": mean + 0.08,
                "ambiguity_probability": 0.09,
                "ambiguity_logit": 0.08,
            }
            for split, mean in means.items()
        },
    }
