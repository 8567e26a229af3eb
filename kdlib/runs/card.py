"""The model card of a run: what its model learned from, how it was made, how good it is, and on what terms it may be used."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from kdlib.data import catalogue, sources
from kdlib.study import store
from kdlib.study.plan import Step
from kdlib.study.store import Run

SPLITS = ("test", "ood")
LEVEL = 0.95  # of intervals
SHOWN = ("nll", "nll_calibrated", "bits_per_byte", "accuracy", "ece", "ece_calibrated", "tokens", "documents")


def card(step: Step, text: Run, folder: Path, metrics: dict, config: Any) -> dict:
    """Content of :func:`kdlib.models.save`'s card.

    Args:
        text: the corpus. folder: of the run, which holds ``documents.parquet`` of its evaluation. config: of the model.
    """
    about = store.provenance(time.time())
    found = {"run": step.id, "license": "other", "data": _data(text), "settings": step.settings}
    if "members" in metrics:
        found["ensemble"] = {"members": metrics["members"], "pool": config.pool, "exponent": config.exponent, "weights": config.weights}
        found["ensemble"] |= {"router": config.router, "calibration_temperature": config.calibration_temperature}
    return found | {
        "metrics": _metrics(folder, metrics),
        "versions": {"commit": about["commit"], "uncommitted_changes": about["dirty"], "python": about["python"], **about["packages"]},
        "licence": {"code": "Apache-2.0", "text": _licences(text), "teachers": _teachers(step)},
    }


def interval(sums: pd.Series, tokens: pd.Series, groups: pd.DataFrame) -> list[float]:
    """The 95 % interval of Σ sums/Σ tokens over documents, where other sources could have been drawn within each domain.

    Residuals of sources about their domain's mean, and a t quantile (Cochran, Sampling Techniques, 1977, sections 5.6 and 6.11). A
    domain with one source does not show how its sources vary; then all sources vary about one mean.

    Args:
        groups: columns ``domain`` and ``source`` of the documents. One source in all gives NaN.
    """
    by_source = pd.DataFrame({"sums": sums, "tokens": tokens}).groupby([groups["domain"], groups["source"]]).sum()
    strata = by_source.index.get_level_values("domain").to_numpy()
    if by_source.groupby(level="domain").size().min() < 2:
        strata = np.zeros(len(by_source))
    stratum = by_source.groupby(strata)
    totals, size = stratum.transform("sum"), stratum["tokens"].transform("size")
    residual = by_source["sums"] - by_source["tokens"] * totals["sums"] / totals["tokens"]
    variance, freedom = (residual**2 * size / (size - 1)).sum(min_count=1), len(by_source) - len(np.unique(strata))
    mean, half = by_source["sums"].sum() / by_source["tokens"].sum(), t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance)
    return [float(mean + sign * half / by_source["tokens"].sum()) for sign in (-1, 1)]


def _metrics(folder: Path, metrics: dict) -> dict:
    documents = pd.read_parquet(folder / "documents.parquet")
    found = {"temperature": metrics["temperature"], "interval_level": LEVEL}
    for split in SPLITS:
        here = documents[documents["split"] == split]
        shown = {name: metrics["evaluation"][split][name] for name in SHOWN}
        shown["nll_interval"] = interval(here["nll"], here["tokens"], here)
        shown["accuracy_interval"] = interval(here["correct"], here["tokens"], here)
        found[split] = shown
    return found


def _data(text: Run) -> dict:
    told, counted = text.metrics["card"], ("documents", "tokens")
    splits = {name: {key: one[key] for key in counted} | {"domains": sorted(one["domains"])} for name, one in told["splits"].items()}
    return {"corpus": text.id, "splits": splits, "out_of_domain": sorted(name for name, one in told["domains"].items() if one["out_of_domain"])}


def _licences(text: Run) -> dict[str, str]:
    return {name: one["licence"] for name, one in text.metrics["card"]["domains"].items()}


def _teachers(step: Step) -> dict[str, str]:
    """Terms of every model that was downloaded and that this one learned from, or is."""
    taught = [one for one in step.upstream() if one.kind == "teacher" and one.parameters.adaptation != "scratch"]
    return {
        one.parameters.carrier: sources.resolve(one.parameters.source, catalogue.known(one.parameters.profile)).licence for one in taught
    }
