"""Finished runs as tidy tables: what each method reached, and by how much one beats another.

A *method* is what a reader compares ("KD student", "chain (probability pool)"); its runs are the repeats that the plan gives
it. Means and differences come with bootstrap intervals over seeds × sources (``kdlib.analysis.statistics``), computed from
the stored per-document sums.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kdlib.analysis import statistics
from kdlib.errors import KdlibError
from kdlib.study import store

TEXTS = {"test": "test text", "ood": "out-of-domain text"}
BEST = "its best member"


def models(profile: str) -> pd.DataFrame:
    """The entries of the profile's comparison, a row each: method, role, repeat, objective, pool, members, label, seed, run, flops.

    What a run is comes from the plan (:mod:`kdlib.study.design`); index is its id. ``flops`` is what training took: forward and
    backward passes of the model or its members, plus what the teacher computed for their targets, charged once where they
    share a cache; NaN for a teacher that was not trained here.
    """
    everything = store.table(profile)
    table = pd.DataFrame(store.entries(profile)).rename(columns={"run": "id"}).set_index("id", drop=False)
    for name in ("run", "label", "kind"):
        table[name] = everything[name].loc[table.index]
    table["seed"] = [run.settings["parameters"].get("seed") for run in table.run]
    table["flops"] = [_flops(run) for run in table.run]
    return table


def _flops(run: store.Run) -> float:
    trained = [run.beside(member) for member in run.metrics.get("members", [])] or [run]
    training = [one.metrics["training"] for one in trained]
    if None in training:
        return np.nan
    caches = {one.settings["inputs"]["targets"] for one in trained if "targets" in one.settings["inputs"]}
    students = sum(one["flops"] + one.get("teacher_flops", 0) for one in training)
    return students + sum(run.beside(cache).metrics["flops"] for cache in caches)


def runs_table(profile: str) -> pd.DataFrame:
    """Everything that was run, a row per run and split: settings, tokens, FLOPs, time, memory and every metric.

    Columns are prefixed by where they come from (``setting_``, ``training_``, ``cost_``, ``parameters_``, ``pool_``,
    ``targets_``); the evaluation of the row's split has no prefix. A corpus or targets run has one row, with an empty
    split.
    """
    methods, rows = models(profile).method, []
    for run_id, row in store.table(profile).iterrows():
        settings, metrics = row.run.settings["parameters"], row.run.metrics
        common = {"run": run_id, "kind": row.run.kind, "label": row.label, "method": methods.get(run_id)}
        common |= _prefixed("setting", settings)
        for part in ("training", "cost", "parameters"):
            common |= _prefixed(part, metrics.get(part))
        if row.run.kind == "targets":
            common |= {f"targets_{name}": value for name, value in metrics.items() if not isinstance(value, dict)}
        for split, values in metrics.get("evaluation", {None: {}}).items():
            pool = _prefixed("pool", metrics.get("pool", {}).get(split))
            rows.append({**common, "split": split, **values, "fitted_temperature": metrics.get("temperature"), **pool})
    return pd.DataFrame(rows)


def _prefixed(prefix: str, values: dict | None) -> dict:
    return {
        f"{prefix}_{name}": json.dumps(value) if isinstance(value, dict | list) else value
        for name, value in (values or {}).items()
    }


def losses(chosen: Sequence[store.Run], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Summed NLL [runs, sources] in nats and tokens [sources] of runs that were evaluated on the same documents.

    Raises:
        KdlibError: their documents differ.
    """
    files = [run.path / "documents.parquet" for run in chosen]
    parts = [_per_source(file, file.stat().st_mtime_ns, split) for file in files]
    for run, part in zip(chosen, parts, strict=True):
        if not part.tokens.equals(parts[0].tokens):
            raise KdlibError(
                f"Runs {chosen[0].id} and {run.id} were not evaluated on the same {split} documents, so their losses "
                "cannot be compared. Both must come from one corpus: delete the older one and have it made again."
            )
    return np.stack([part.nll.to_numpy() for part in parts]), parts[0].tokens.to_numpy()


@lru_cache(maxsize=1024)
def _per_source(file: Path, written: int, split: str) -> pd.DataFrame:
    # A study compares its reference with every other student; ``written`` tells a file that was made anew.
    return statistics.per_source(pd.read_parquet(file), split)


def mean_losses(table: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """Test and out-of-domain metrics of every method, a row per method and split, averaged over its runs.

    ``low`` and ``high`` bound the mean NLL (seeds × sources bootstrap; a single run is resampled over sources alone);
    ``seed_standard_error`` is over runs, NaN for one. ``perplexity`` is exp of the mean NLL.
    """
    rows = []
    for method, group in table.groupby("method", sort=False):
        for split in TEXTS:
            values = pd.DataFrame([run.metrics["evaluation"][split] for run in group.run])
            nll, tokens = losses(list(group.run), split)
            interval = statistics.seed_bootstrap(nll, np.zeros((1, len(tokens))), tokens, resamples)
            error = statistics.mean_interval(nll.sum(axis=1) / tokens.sum()).standard_error
            row = {"method": method, "split": split, "runs": len(group)}
            row |= {
                "nll": interval.difference,
                "low": interval.low,
                "high": interval.high,
                "seed_standard_error": error,
            }
            row |= {"perplexity": np.exp(interval.difference)}
            row |= values.drop(columns=["nll", "perplexity", "tokens", "bytes", "documents"]).mean().to_dict()
            rows.append(row | {"tokens": tokens.sum(), "sources": len(tokens)})
    return pd.DataFrame(rows)


def sizes(table: pd.DataFrame) -> pd.DataFrame:
    """Parameters, training FLOPs and ambiguity of every method of :func:`models`, a row each, averaged over its runs.

    ``ambiguity``: the members' mean NLL minus their pool's on test text, as the pool's own identity splits it; NaN
    for single models.
    """
    rows = []
    for method, group in table.groupby("method", sort=False):
        pools = [
            run.metrics["pool"]["test"][f"ambiguity_{pool}"]
            for run, pool in zip(group.run, group.pool, strict=True)
            if "pool" in run.metrics
        ]
        parameters = group.run.iloc[0].metrics["parameters"]
        row = {"method": method, "parameters": parameters["total"], "non_embedding": parameters["non_embedding"]}
        rows.append(row | {"flops": group.flops.mean(), "ambiguity": np.mean(pools) if pools else np.nan})
    return pd.DataFrame(rows)


def best_member(ensemble: pd.Series) -> store.Run:
    """The ensemble's member with the lowest NLL on the validation split (the test splits have no say in it)."""
    members = [ensemble.run.beside(member) for member in ensemble.members]
    return min(members, key=lambda run: run.metrics["evaluation"]["validation"]["nll"])


def rivals(ensembles: pd.DataFrame) -> list[tuple[str, str, bool]]:
    """Pairs A, B of ensemble methods worth comparing, and whether they are paired run by run.

    Two pools of the same members, paired; and two objectives under one pool, whose members share nothing but their
    seeds.
    """
    kinds = ensembles.drop_duplicates("method")[["method", "objective", "pool"]].to_dict("records")
    pairs = []
    for first, second in itertools.combinations(kinds, 2):
        if first["objective"] == second["objective"]:
            pairs.append((first["method"], second["method"], True))
        elif first["pool"] == second["pool"]:
            pairs.append((second["method"], first["method"], False))
    return pairs


class Pair(NamedTuple):
    """A comparison to make: is A better than B?

    ``paired``: run i of A belongs to run i of B (an ensemble and its own member, two pools of the same members), so
    their differences are resampled. Otherwise the seeds of either side are drawn independently.
    """

    a: str
    b: str
    runs_a: Sequence[store.Run]
    runs_b: Sequence[store.Run]
    paired: bool


def difference(pair: Pair, split: str, resamples: int) -> tuple[statistics.Comparison, float]:
    """Mean NLL of A minus that of B, nats per token, and its standard error over seeds."""
    (nll_a, tokens), (nll_b, _) = losses(pair.runs_a, split), losses(pair.runs_b, split)
    sides = (nll_a - nll_b, np.zeros((1, len(tokens)))) if pair.paired else (nll_a, nll_b)
    varied = sides[:1] if pair.paired else sides
    errors = [statistics.mean_interval(side.sum(axis=1) / tokens.sum()).standard_error for side in varied]
    return statistics.seed_bootstrap(*sides, tokens, resamples), float(np.sqrt(np.square(errors).sum()))


def differences(pairs: Sequence[Pair], resamples: int) -> pd.DataFrame:
    """One family of comparisons, a row per pair and split: difference, adjusted interval and p, verdict, sentence."""
    keys = [(pair, split) for pair in pairs for split in TEXTS]
    measured = [difference(pair, split, resamples) for pair, split in keys]
    adjusted = statistics.holm_intervals([comparison for comparison, _ in measured])
    rows = []
    for (pair, split), comparison, (_, error) in zip(keys, adjusted, measured, strict=True):
        row = {"a": pair.a, "b": pair.b, "split": split, "runs": len(pair.runs_a)}
        row |= {name: getattr(comparison, name) for name in ("difference", "low", "high", "p_value", "level")}
        claim = statistics.claim(comparison, error)
        row |= {"seed_standard_error": error, "verdict": claim.verdict}
        # Where B turns out to be the better one, that is what there is to say.
        other = statistics.claim(_reversed(comparison), error)
        said = sentence(row, claim.reason) if other.verdict != "yes" else sentence(_mirrored(row), other.reason)
        rows.append(row | {"sentence": said})
    return pd.DataFrame(rows)


def _reversed(comparison: statistics.Comparison) -> statistics.Comparison:
    return replace(comparison, difference=-comparison.difference, low=-comparison.high, high=-comparison.low)


def _mirrored(row: dict) -> dict:
    turned = {"difference": -row["difference"], "low": -row["high"], "high": -row["low"]}
    return row | {"a": row["b"], "b": row["a"], "verdict": "yes"} | turned


def sentence(row: dict, reason: str) -> str:
    """What a difference says, in words a reader can check against the row's own numbers; ``reason`` is the claim's."""
    a, b = (name if name == BEST else f"the {name}" for name in (row["a"], row["b"]))
    size = f"difference {row['difference']:+.3f} nats/token, interval {row['low']:+.3f} to {row['high']:+.3f}"
    where, because = TEXTS[row["split"]], reason.rsplit(": ", 1)[1]
    text = {
        "yes": f"{a} beats {b} on {where} ({size}).",
        "no": f"{a} does not beat {b} on {where} by an amount that matters ({size}).",
        "undecided": f"whether {a} beats {b} on {where} is undecided: {because} ({size}).",
    }[row["verdict"]]
    if row["verdict"] == "undecided" and row["high"] < 0:
        text = f"{a} scores better than {b} on {where}, but no claim is made: {because} ({size})."
    return text[0].upper() + text[1:]
