"""Finished runs as tidy tables: what each method reached, and by how much one beats another.

A *method* is what a reader compares ("KD student", "chain (probability pool)"); its runs are the repeats that the plan gives
it. Differences come with intervals over runs and over the sources of text (``kdlib.analysis.statistics``), computed from the
stored sums per document.
"""

import itertools
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kdlib.analysis import calibration, ledger, statistics, variance
from kdlib.errors import KdlibError
from kdlib.study import store

TEXTS = {"test": "test text", "ood": "out-of-domain text"}
BEST = "its best member"
# Reliability histograms by the name of the error that they give, before and after the fitted temperature.
KINDS = {"ece": "raw", "ece_calibrated": "calibrated"}


def models(profile: str) -> pd.DataFrame:
    """The entries of the profile's comparison, a row each: method, role, repeat, objective, pool, members, label, seed, run, flops.

    What a run is comes from the plan (:mod:`kdlib.study.design`); index is its id. ``flops`` is what making it
    took, over the union of the runs upstream (:func:`kdlib.analysis.ledger.making`); NaN for a teacher that was not trained here.
    """
    everything = store.table(profile)
    table = pd.DataFrame(store.entries(profile)).rename(columns={"run": "id"}).set_index("id", drop=False)
    for name in ("run", "label", "kind"):
        table[name] = everything[name].loc[table.index]
    table["seed"] = [run.settings["parameters"].get("seed") for run in table.run]
    table["flops"] = [ledger.making(profile, run) for run in table.run]
    return table


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


class Losses(NamedTuple):
    """What runs made of the same text: ``nll`` (nats) and ``correct``, [runs, sources] sums; ``tokens``, ``domains`` [sources]."""

    nll: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray
    domains: np.ndarray


def losses(chosen: Sequence[store.Run], split: str) -> Losses:
    """Losses of runs that were evaluated on the same documents.

    Raises:
        KdlibError: their documents differ.
    """
    files = [run.path / "documents.parquet" for run in chosen]
    parts = [_per_source(file, file.stat().st_mtime_ns, split) for file in files]
    for run, part in zip(chosen, parts, strict=True):
        if not part.tokens.equals(parts[0].tokens):
            raise KdlibError(
                f"Runs to compare must be evaluated on the same {split} documents, got others in {chosen[0].id} and {run.id}. Delete the "
                "older one and have it made again."
            )
    nll, correct = (np.stack([part[name].to_numpy(dtype=float) for part in parts]) for name in ("nll", "correct"))
    return Losses(nll, correct, parts[0].tokens.to_numpy(dtype=float), parts[0].domain.to_numpy())


# A study compares its reference with every other student, on one split after the other; ``written`` tells a file that was
# made anew.
@lru_cache(maxsize=1024)
def _per_source(file: Path, written: int, split: str) -> pd.DataFrame:
    return statistics.per_source(_documents(file, written), split)


@lru_cache(maxsize=1024)
def _documents(file: Path, written: int) -> pd.DataFrame:
    return pd.read_parquet(file, columns=["split", "source", "domain", *statistics.SUMS])


def mean_losses(table: pd.DataFrame) -> pd.DataFrame:
    """Test and out-of-domain metrics of every method, a row per method and split, averaged over its runs.

    ``perplexity`` is exp of the mean NLL; ``seed_standard_error`` of the mean NLL is over runs, NaN for one. What a method
    differs from another by has an interval (:func:`differences`); its own mean would have one that the difficulty of the
    text makes wide, and that is no help in comparing.
    """
    rows = []
    for method, group in table.groupby("method", sort=False):
        for split in TEXTS:
            values, found = pd.DataFrame([run.metrics["evaluation"][split] for run in group.run]), losses(list(group.run), split)
            nll = pd.Series(found.nll.sum(axis=1) / found.tokens.sum())
            row = {"method": method, "split": split, "runs": len(group), "nll": nll.mean(), "seed_standard_error": nll.sem()}
            row |= {"perplexity": np.exp(nll.mean())}
            row |= values.drop(columns=["nll", "perplexity", "tokens", "bytes", "documents"]).mean().to_dict()
            rows.append(row | {"tokens": found.tokens.sum(), "sources": len(found.tokens)})
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


def calibration_errors(table: pd.DataFrame) -> pd.DataFrame:
    """ECE of every method's first choice, a row per method, split and kind (raw, calibrated), averaged over its runs.

    ``ece`` is the plain estimate and ``floor`` what it would be on average if the model were calibrated; ``debiased``, with ``low``
    and ``high``, is what is left without chance (:mod:`kdlib.analysis.calibration`). The interval is over runs, where there are several, and
    over sources within their domain, as far as accuracy beyond what the loss explains shows them to vary, but no less than independent
    tokens would.
    """
    rows = []
    for (method, group), split in itertools.product(table.groupby("method", sort=False), TEXTS):
        runs, text = list(group.run), losses(list(group.run), split)
        for measure, kind in KINDS.items():
            bins, (values, sums) = [run.metrics["reliability"][split][kind] for run in runs], _values(runs, split, measure)
            seen = variance.of_sources(sums.mean(axis=0), text.tokens, variance.strata(text.domains)).value.sum() ** 0.5
            sums *= max(1.0, np.mean([calibration.error_of_tokens(one) for one in bins]) / seen)
            found = statistics.estimate([(values, sums)], text.tokens, text.domains)
            row = {"method": method, "split": split, "kind": kind, "runs": len(runs)}
            row["ece"] = np.mean([run.metrics["evaluation"][split][measure] for run in runs])
            row["floor"] = np.mean([calibration.floor(one) for one in bins])
            rows.append(row | {"debiased": found.difference, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


def rivals(ensembles: pd.DataFrame) -> list[tuple[str, str]]:
    """Pairs A, B of ensemble methods worth comparing, run by run.

    Two pools of the same members; and under one pool two objectives of independent members, or another way of forming members
    against independent ones of the same objective.
    """
    kinds = ensembles.drop_duplicates("method").to_dict("records")
    pairs = []
    for first, second in itertools.combinations(kinds, 2):
        apart = {name for name in ("formed", "objective", "pool") if first[name] != second[name]}
        independent = [one["formed"] == "independent" for one in (first, second)]
        if apart == {"pool"} and first["members"] == second["members"]:
            pairs.append((first["method"], second["method"]))
        elif apart == {"objective"} and all(independent) or apart == {"formed"} and independent[0]:
            pairs.append((second["method"], first["method"]))
        elif apart == {"formed"} and independent[1]:
            pairs.append((first["method"], second["method"]))
    return pairs


class Pair(NamedTuple):
    """A comparison to make: is A better than B?

    ``paired``: run i of A belongs with run i of B. They start from the same seed, which sets initialisation and data order
    alike, or are an ensemble and its own member, or two pools of the same members. Otherwise either side varies by itself.
    """

    a: str
    b: str
    runs_a: Sequence[store.Run]
    runs_b: Sequence[store.Run]
    paired: bool


def against(table: pd.DataFrame, reference: str) -> list[Pair]:
    """Every other method of :func:`models` with ``reference``: paired with students of the same seeds, else not."""
    groups = dict(list(table.groupby("method", sort=False)))
    seeds = {method: list(group.seed) for method, group in groups.items()}
    runs = {method: list(group.run) for method, group in groups.items()}
    return [
        Pair(method, reference, runs[method], runs[reference], seeds[method] == seeds[reference])
        for method in groups
        if method != reference
    ]


def _of(runs: Sequence[store.Run]) -> tuple[str, ...]:
    return tuple(run.id for run in runs)


def _values(runs: Sequence[store.Run], split: str, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """A measure of every run, [runs], and the sums [runs, sources] whose variation is that of its sources."""
    found = losses(runs, split)
    if measure == "nll":
        return found.nll.sum(axis=1) / found.tokens.sum(), found.nll
    values = [calibration.debiased(run.metrics["reliability"][split][KINDS[measure]]) for run in runs]
    return np.array(values), _unexplained(found)


def _unexplained(found: Losses) -> np.ndarray:
    """What a source's accuracy has that its loss does not explain: stands in for accuracy − confidence, [runs, sources] sums.

    Confidence is kept for whole splits alone. It follows the difficulty of the text, and so does the loss; the slope between
    accuracy and loss is that between the sources of a domain.
    """
    members = variance.strata(found.domains)
    share = (members * found.tokens[:, None] / (found.tokens @ members)) @ members.T
    correct, nll = (sums.mean(axis=0) / found.tokens for sums in (found.correct, found.nll))
    correct, nll = (values - values @ share for values in (correct, nll))
    return found.correct - (found.tokens * correct @ nll) / ((found.tokens * nll @ nll) or 1.0) * found.nll


def _pools(cells: Sequence[Sequence[store.Run]], split: str, measure: str) -> dict[tuple, variance.Pooled]:
    """The variance of a run, pooled over a study; by the cells it holds for."""
    if len(cells) < 2 or len(cells[0]) < 2:
        return {}
    pooled = variance.pool(np.stack([_values(runs, split, measure)[0] for runs in cells]))
    return {_of(runs): pooled for runs, kept in zip(cells, pooled.kept, strict=True) if kept}


def compare(
    pairs: Sequence[Pair], split: str, measure: str = "nll", cells: Sequence[Sequence[store.Run]] = ()
) -> list[statistics.Comparison]:
    """A minus B on one split for every pair: mean NLL in nats per token, or debiased ECE.

    Args:
        cells: runs of each cell of a study, aligned by their seeds and sharing nothing else: the variance of a run is pooled over
            them. Pairs of other runs speak for themselves (two pools of the same members are alike in all but the
            pool), and so do pairs with a cell that varies far more than the rest, and those that are not paired.
    """
    pools, found = _pools(cells, split, measure), []
    for pair in pairs:
        (a, of_a), (b, of_b) = (_values(side, split, measure) for side in (pair.runs_a, pair.runs_b))
        text = losses([*pair.runs_a, *pair.runs_b], split)
        both = pair.paired and {_of(pair.runs_a), _of(pair.runs_b)} <= set(pools)
        sides = [(a - b, of_a - of_b)] if pair.paired else [(a, of_a), (-b, -of_b)]
        found.append(statistics.estimate(sides, text.tokens, text.domains, pools[_of(pair.runs_a)] if both else None))
    return found


def differences(pairs: Sequence[Pair], cells: Sequence[Sequence[store.Run]] = ()) -> pd.DataFrame:
    """What the pairs differ by (:func:`compare`), a row per pair and split: difference, interval, p, verdict, sentence.

    Test text is one family, out-of-domain text another: ``p_value`` and ``p_no_gain`` are Holm-adjusted within each, intervals are
    not adjusted.
    """
    rows = []
    for split in TEXTS:
        family = compare(pairs, split, cells=cells)
        for pair, found, claim in zip(pairs, family, statistics.claims(family), strict=True):
            row = {"a": pair.a, "b": pair.b, "split": split, "runs": len(pair.runs_a)}
            row |= {name: getattr(found, name) for name in ("difference", "low", "high")} | {"p_value": claim.p_value}
            row |= {"seed_standard_error": found.seed_standard_error, "df": found.df, "p_no_gain": claim.p_no_gain}
            rows.append(row | {"verdict": claim.verdict, "sentence": sentence(row, claim)})
    order = {(pair.a, pair.b): place for place, pair in enumerate(pairs)}
    return pd.DataFrame(sorted(rows, key=lambda row: order[row["a"], row["b"]]))


def sentence(row: dict, claim: statistics.Claim) -> str:
    """What a difference says, in words a reader can check against the row's own numbers."""
    # Where B turns out to be the better one, that is what there is to say.
    beaten = claim.verdict == "no" and claim.p_value <= statistics.ALPHA and row["difference"] >= statistics.MINIMUM
    worse = beaten or (claim.verdict == "undecided" and row["low"] > 0)
    turned = {"a": row["b"], "b": row["a"], "difference": -row["difference"], "low": -row["high"], "high": -row["low"]}
    shown, verdict = turned if worse else row, "yes" if beaten else claim.verdict
    a, b = (name if name == BEST else f"the {name}" for name in (shown["a"], shown["b"]))
    p = "p < 0.001" if claim.p_value < 0.001 else f"p = {claim.p_value:.3f}"
    size = f"difference {shown['difference']:+.3f} nats/token, 95 % interval {shown['low']:+.3f} to {shown['high']:+.3f}, {p}"
    where, because = TEXTS[row["split"]], f": {claim.reason}" if claim.reason else ""
    text = {
        "yes": f"{a} beats {b} on {where} ({size}).",
        "no": f"{a} does not beat {b} on {where} by an amount that matters ({size}).",
        "undecided": f"whether {a} beats {b} on {where} is undecided{because} ({size}).",
    }[verdict]
    if verdict == "undecided" and shown["high"] < 0:
        text = f"{a} scores better than {b} on {where}, but no claim is made{because} ({size})."
    return text[0].upper() + text[1:]
