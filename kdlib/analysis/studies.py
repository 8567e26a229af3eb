"""What a profile's grids found: single students, or ensembles, that differ in one respect, cell by cell.

A *cell* is one such student or ensemble, by the name that the profile gives it; its runs differ in their seeds alone. A cell is
chosen by validation text, and told about by test text.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from kdlib.analysis import comparison, grids, ledger, statistics
from kdlib.errors import KdlibError
from kdlib.study import store
from kdlib.study.combining import Combine

ON_TEST = ("nll", "nll_calibrated", "ece", "accuracy")


def models(profile: str, grid: str) -> pd.DataFrame:
    """The models of a grid (any but ``targets``), students or ensembles, a row each, cell by cell in the order of the profile.

    Columns: cell, seed (of an ensemble the number of its group of seeds), validation_nll, ood_nll; of test text nll,
    nll_calibrated, ece, ece_calibrated (ensembles alone), accuracy; parameters, non_embedding; run; and

    - of students tokens, seconds, tokens_per_second and flops of their training (the student's passes, and those of a teacher in
      the loop); target_flops: what the teacher computed for the targets that the run read, which all their students share (0 where
      it read none). What a teacher computed to write text or to choose it is in neither;
    - of ensembles way (how they are combined, in words), size (members), tokens (trained on, all members'), flops
      (:func:`kdlib.analysis.ledger.making`), member_nll (their mean on test text, or the only one's) and ambiguity.

    Further ones are those that the grid's description asks for (:mod:`kdlib.analysis.grids`): settings, NaN where a student
    has none of its own, and share, the student's accuracy divided by its teacher's.

    Raises:
        KdlibError: the results hold no such grid, or not all of its runs; or its students share no teacher, and it tells shares.
    """
    about, cells, formed = grids.of(profile, grid), store.cells(profile, grid).items(), store.formed(profile, grid)
    if formed:
        rows = [_pooled(profile, run, formed[run.id]) | {"cell": cell, "seed": n} for cell, runs in cells for n, run in enumerate(runs, 1)]
        return pd.DataFrame(rows).set_index("cell").reset_index()
    table = pd.DataFrame([{"cell": cell} | _measured(profile, run) for cell, found in cells for run in found])
    for name in about.settings:
        table[name] = setting(table, name, np.nan)
    if about.shares:
        table["share"] = table.accuracy / teacher(profile, table).metrics["evaluation"]["test"]["accuracy"]
    return table


def _evaluated(metrics: dict, names: Sequence[str]) -> dict:
    text, size = metrics["evaluation"], metrics["parameters"]
    row = {"validation_nll": text["validation"]["nll"], "ood_nll": text["ood"]["nll"]} | {name: text["test"][name] for name in names}
    return row | {"parameters": size["total"], "non_embedding": size["non_embedding"]}


def _measured(profile: str, run: store.Run) -> dict:
    settings, metrics = run.settings, run.metrics
    training = metrics["training"]
    row = {"seed": settings["parameters"]["seed"]} | _evaluated(metrics, ON_TEST)
    row |= {name: training[name] for name in ("tokens", "seconds", "tokens_per_second")}
    row["flops"] = training["flops"] + training.get("teacher_flops", 0)
    return row | {"target_flops": _target_flops(profile, settings["inputs"]), "run": run}


def _pooled(profile: str, run: store.Run, members: Sequence[str]) -> dict:
    metrics = run.metrics
    pool = metrics.get("pool", {}).get("test", {})
    asked = run.settings["parameters"]
    way = Combine(**asked["combine"]).label() if "combine" in asked else f"{asked['pool']} pool"
    row = _evaluated(metrics, (*ON_TEST, "ece_calibrated")) | {"way": way, "size": len(members)}
    row["tokens"] = sum(run.beside(one).metrics["training"]["tokens"] for one in members)
    row |= {"flops": ledger.making(profile, run), "member_nll": pool.get("member_nll_mean", row["nll"])}
    row["ambiguity"] = pool.get("member_nll_weighted", row["member_nll"]) - row["nll"]
    return row | {"run": run}


def _target_flops(profile: str, inputs: dict[str, str]) -> float:
    if "targets" not in inputs:
        return 0
    targets = store.find(profile, inputs["targets"])
    # Redrawn ones took nothing; the dense ones that they were drawn from took the teacher's pass.
    dense = targets.settings["inputs"].get("dense")
    return targets.metrics["flops"] + (store.find(profile, dense).metrics["flops"] if dense else 0)


def target_runs(profile: str) -> pd.DataFrame:
    """The grid ``targets``, a row a student: how its targets were kept, what they cost, how near it came.

    Columns: cell, kind (of ``sampled``, ``importance`` where draws come from a proposal, ``stratified`` where they are), seed,
    format (version of the files), bytes_per_token, entries_per_token, angle_initial, angle_trained (degrees), teacher_kl, of test
    text nll, ece, full_ece, nll_calibrated, tokens (trained on), run (the student's).

    Raises:
        KdlibError: as :func:`models`.
    """
    rows = []
    for cell, found in store.cells(profile, "targets").items():
        for run in found:
            inputs, metrics = run.settings["inputs"], run.metrics
            targets = store.find(profile, inputs["targets"])
            kept = targets.settings["parameters"]
            ways = {"proposal": "importance", "stratified": "stratified"} if kept["kind"] == "sampled" else {}
            kind = next((name for way, name in ways.items() if way in kept), kept["kind"])
            student = store.find(profile, inputs["student"])
            row = {"cell": cell, "kind": kind, "seed": student.settings["parameters"]["seed"]}
            row["format"] = targets.metrics.get("format", 2)  # version 3 was the first to be told
            measured = ("bytes_per_token", "entries_per_token", "angle_initial", "angle_trained", "teacher_kl")
            row |= {name: metrics[name] for name in measured} | metrics["test"]
            rows.append(row | {"tokens": student.metrics["training"]["tokens"], "run": student})
    return pd.DataFrame(rows)


def setting(table: pd.DataFrame, name: str, default: Any = None) -> list:
    """A setting of every student; ``default`` for one that does not read it, has it as students always have, or on a schedule."""
    found = [run.settings["parameters"].get(name, default) for run in table.run]
    return [default if isinstance(one, dict) else one for one in found]


def teacher(profile: str, table: pd.DataFrame) -> store.Run:
    """The teacher that the students of a grid learn from, or start from.

    Raises:
        KdlibError: they have none, or several.
    """
    found = set()
    for run in table.run:
        inputs = run.settings["inputs"]
        if "targets" in inputs:
            inputs = store.find(profile, inputs["targets"]).settings["inputs"] | inputs
        found |= {inputs["teacher"]} if "teacher" in inputs else set()
    if len(found) != 1:
        raise KdlibError(
            f"Students are compared with the one teacher that they share; those of {', '.join(table.cell.unique())} "
            f"have {len(found)}. Give the grid one teacher."
        )
    return store.find(profile, found.pop())


def speed_label(profile: str, table: pd.DataFrame) -> str:
    """What to call the students' tokens a second, which others may have slowed down."""
    return "tokens/s" if store.side_by_side(profile, table.run) < 1.5 else "tokens/s, runs side by side"


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds of :func:`models` or :func:`target_runs`, a row a cell, in the order of the grid.

    ``runs`` counts them; ``seed_standard_error`` is that of the test NLL over seeds, NaN for one.
    """
    words = [name for name in table.columns if name != "run" and not is_numeric_dtype(table[name])]
    grouped = table.drop(columns=["seed", "run"]).groupby(words, sort=False)
    return grouped.mean().assign(runs=grouped.size(), seed_standard_error=grouped.nll.sem()).reset_index()


def beside_reference(means: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Means of ensembles with relative_flops, a multiple of the reference's, and gain: the share of the reference pool's gain.

    That gain is what its NLL is below its members' on average; a cell's is what its own NLL is below the same members'. One that
    distils the pool back tells by it how much is kept. NaN where the reference is no pool.
    """
    one = means.set_index("cell").loc[reference]
    gain = one.member_nll - one.nll
    return means.assign(relative_flops=means.flops / one.flops, gain=(one.member_nll - means.nll) / gain if gain else np.nan)


def best(table: pd.DataFrame, cells: Iterable[str] | None = None) -> str:
    """The cell with the lowest mean NLL on *validation* text, of those named or of all; test text has no say in it.

    Raises:
        KdlibError: none of them is in the table.
    """
    found = table if cells is None else table[table.cell.isin(list(cells))]
    if found.empty:
        raise KdlibError(
            f"The grid must hold students to choose from, got {', '.join(table.cell.unique()) or 'none'}, of which none will do. Add some "
            "to the profile's grid."
        )
    return found.groupby("cell", sort=False).validation_nll.mean().idxmin()


def candidates(table: pd.DataFrame, grid: str) -> list[str]:
    """The cells of a grid that its reference is chosen from by :func:`best`: the first alone, or all that are constant."""
    constant = list(grids.describe(grid).constant)
    found = table[table[constant].notna().all(axis=1)] if constant else table[:1]
    return list(found.cell.unique())


def compared(table: pd.DataFrame, grid: str, reference: str) -> list[tuple[str, str]]:
    """The cells that a grid compares with its reference: those that it was not chosen from, or all others if there are none."""
    chosen = candidates(table, grid)
    pairs = against(table, reference)
    return [(cell, reference) for cell, _ in pairs if cell not in chosen] or pairs


def against(table: pd.DataFrame, reference: str) -> list[tuple[str, str]]:
    """Every other cell with ``reference``, in the order of the grid: pairs for :func:`differences`."""
    return [(cell, reference) for cell in table.cell.unique() if cell != reference]


def differences(table: pd.DataFrame, pairs: Sequence[tuple[str, str]], name: str = "student with {}") -> pd.DataFrame:
    """Pairs of cells, see :func:`kdlib.analysis.comparison.differences`; columns a and b hold the cells.

    Cells are paired seed by seed, and all that ``table`` holds tell how much seeds vary, those that are not compared too.

    Args:
        name: what its sentences call the student of a cell.

    Raises:
        KdlibError: there is nothing to compare.
    """
    cells = _cells(table)
    told = comparison.differences(_pairs(cells, pairs, name), _aligned(cells))
    named = {name.format(cell): cell for cell in cells}
    return told.assign(a=told.a.map(named), b=told.b.map(named))


def equivalences(table: pd.DataFrame, reference: str, margins: Mapping[str, float]) -> pd.DataFrame:
    """Whether every other cell is within a margin of ``reference`` on test text, a row per measure and cell.

    Columns: a, b, measure, margin, difference, low, high, and of :func:`kdlib.analysis.statistics.equivalences` verdict, p_value and
    p_different; each measure is a family (Holm).

    Args:
        margins: measure (``nll`` in nats per token, ``ece`` debiased): how far apart is still the same.

    Raises:
        KdlibError: there is nothing to compare.
    """
    cells, rows = _cells(table), []
    pairs = _pairs(cells, against(table, reference), "{}")
    for measure, margin in margins.items():
        family = comparison.compare(pairs, "test", measure, _aligned(cells))
        for pair, found, told in zip(pairs, family, statistics.equivalences(family, margin), strict=True):
            row = {"a": pair.a, "b": pair.b, "measure": measure, "margin": margin}
            row |= {name: getattr(found, name) for name in ("difference", "low", "high")}
            rows.append(row | {"verdict": told.verdict, "p_value": told.p_value, "p_different": told.p_different})
    return pd.DataFrame(rows)


def _cells(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {cell: group.sort_values("seed") for cell, group in table.groupby("cell", sort=False)}


def _aligned(cells: dict[str, pd.DataFrame]) -> list[list[store.Run]]:
    # The runs of every cell, seed by seed; a grid has the same seeds in all of them.
    first = next(iter(cells.values()), None)
    return [list(group.run) for group in cells.values() if list(group.seed) == list(first.seed)]


def _pairs(cells: dict[str, pd.DataFrame], pairs: Sequence[tuple[str, str]], name: str) -> list[comparison.Pair]:
    if not pairs:
        raise KdlibError(f"A study compares two cells or more; its grid holds {', '.join(cells)}. Name a further one in the profile.")
    seeds = {cell: list(group.seed) for cell, group in cells.items()}
    runs = {cell: list(group.run) for cell, group in cells.items()}
    return [comparison.Pair(name.format(a), name.format(b), runs[a], runs[b], seeds[a] == seeds[b]) for a, b in pairs]
