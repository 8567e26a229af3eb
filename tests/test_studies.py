"""Grids of students: chosen on validation text, compared in families, told in the paper only where they were made."""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
import synthetic_results
import yaml

from kdlib.analysis import accounts, comparison, grids, growth, outputs, paper, report, statistics, studies, variance
from kdlib.errors import KdlibError
from kdlib.study import store
from kdlib.study.profiles import REPOSITORY

LINEAR = {"shape": "linear", "start": 0.0, "end": 1.0}
EASY = {"selected": {"by": {"student": {"objective": "ce", "seed": 1}}, "measure": "nll", "mode": "lowest", "share": 0.5}}
GRIDS = {
    "targets": {"seeds": [1, 2], "students": {"all": {"targets": {"kind": "dense"}}, "8 draws, ρ = 0.5": {"targets": {"draws": 8, "proposal": 0.5}}}},
    "weights": {
        "seeds": [1, 2],
        "students": {"CE": {"objective": "ce", "batch_size": 8}, "CE to KD, linear": {"kd_weight": LINEAR}},
        "vary": {"kd_weight": [0.5, 1.0], "temperature": [1.0, 2.0]},
    },
    "losses": {
        "seeds": [1, 2],
        "base": {"targets": {"kind": "dense"}},
        "students": {"forward KL": {}, "total variation": {"divergence": "tvd"}, "JSD, β = 0.5": {"divergence": {"jsd": {"beta": 0.5}}}},
    },
    "features": {
        "seeds": [1, 2],
        "base": {"objective": "online_kd"},
        "students": {"logits": {}, "attention_maps": {"features": {"of": "attention_mse"}}},
    },
    "initialisation": {
        "seeds": [1, 2],
        "base": {"batch_size": 4},
        "students": {"from scratch": {}, "identical": {"initialisation": "identical", "layers": 2}},
    },
    "data": {
        "seeds": [1, 2],
        "base": {"objective": "online_kd", "batch_size": 8},
        "students": {"real text": {}, "random tokens": {"text": "uniform"}, "50 % & more": {"text": "generated"}, "easy": {"text": EASY}},
    },
    "leaderboard": {
        "seeds": [1, 2, 3, 4],
        "members": 2,
        "base": {"kd_weight": 1.0},
        "ensembles": {
            "independent": {},
            "bagging": {"method": "bagging", "options": {"share": 0.7}},
            "geometric": {"pool": "logit"},
            "one for longer": {"members": 1, "student": {"epochs": 4}},
        },
    },
    "chain": {
        "seeds": [1, 2, 3, 4, 5, 6],
        "members": 3,
        "ensembles": {"independent": {}, "chain": {"method": "chain"}, "all previous": {"method": "all_previous"}},
    },
    "pools": {
        "seeds": [1, 2, 3, 4, 5, 6],
        "members": 3,
        "ensembles": {
            "probability, 3": {},
            "logit, 3": {"pool": "logit"},
            "learned, 3": {"combine": {"weights": "learned"}},
            "probability, 2": {"members": 2},
            "logit, 2": {"members": 2, "pool": "logit"},
            "learned, 2": {"members": 2, "combine": {"weights": "learned"}},
        },
    },
    "routing": {
        "seeds": [1, 2, 3, 4],
        "members": 2,
        "ensembles": {
            "c-BTM, uniform": {"method": "cbtm"},
            "c-BTM, distance": {"method": "cbtm", "combine": {"distance": {"top_k": 1}}},
            "one dense": {"members": 1, "student": {"epochs": 4}},
        },
    },
    "sweeps": {"seeds": [1, 2], "members": 2, "ensembles": {"independent": {}, "60 %": {"method": "bagging", "options": {"share": 0.6}}}},
    "tuning": {"seeds": [1, 2], "members": 2, "ensembles": {"one": {"members": 1}, "two": {"student": {"weight_decay": 0.05}}}},
    "my_depths": {"seeds": [1, 2], "base": {"batch_size": 4}, "students": {"one layer": {}}, "vary": {"layers": [2, 3]}},
}  # fmt: skip

BEST_ON_VALIDATION = "kd_weight 0.5, temperature 2.0"


def metrics(run, **splits) -> None:
    """Give a run other losses per token."""
    found = run.metrics
    for split, nll in splits.items():
        found["evaluation"][split]["nll"] = nll
    store.write_json(run.path / "metrics.json", found)


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> str:
    """A variant of the smoke profile that has every grid."""
    values = yaml.safe_load((REPOSITORY / "profiles" / "smoke.yaml").read_text())
    path = tmp_path_factory.mktemp("profile") / "grids.yaml"
    study = {**values["study"], "grids": GRIDS, "methods": {"on easy text": {"method": "independent", "student": {"text": EASY}}}}
    path.write_text(yaml.safe_dump({**values, "name": "grids", "study": study}, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def invented(profile, tmp_path_factory):
    """A results home with invented runs for the comparison and every grid, where validation and test text disagree.

    Scores lie aside: they only chose text, and no table or figure may need them.
    """
    folder = tmp_path_factory.mktemp("grids")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(folder))
        synthetic_results.write(profile, grids=GRIDS)
        for run in store.cells(profile, "weights")[BEST_ON_VALIDATION]:
            metrics(run, validation=1.0, test=9.0)
        (folder / "aside").mkdir()
        for run in (store.results(profile) / "runs").glob("scores-*"):
            run.rename(folder / "aside" / run.name)
    return folder


@pytest.fixture(scope="module")
def printed(profile, invented):
    """What the analyses print when all of them have read the invented results, in one process without kernels."""
    code = []
    for analysis in outputs.analyses(GRIDS).values():
        notebook = nbformat.read(REPOSITORY / "notebooks" / f"{analysis.notebook}.ipynb", as_version=4)
        cells = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        cells = cells.replace('profile = "smoke"', f"profile = {profile!r}")
        code.append(re.sub(r'(?m)^grid = "\w+"$', f"grid = {analysis.grid!r}", cells))
    program = "import sys\n" + "".join(f"exec({one!r}, {{}})\n" for one in code) + 'assert "torch" not in sys.modules'
    environment = {**os.environ, "KDLIB_HOME": str(invented), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def home(invented, monkeypatch):
    """The invented results, for reading only."""
    monkeypatch.setenv("KDLIB_HOME", str(invented))
    return invented


@pytest.fixture
def fresh(invented, tmp_path, monkeypatch):
    """The runs and their plan, to change."""
    source, target = (folder / "results" / "grids" for folder in (invented, tmp_path))
    shutil.copytree(source / "runs", target / "runs")
    shutil.copy(source / "plan.json", target)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return target


@pytest.fixture
def analysed_copy(home, printed, tmp_path, monkeypatch):
    """Results and figures of every analysis, to change."""
    for name in ("results", "figures"):
        shutil.copytree(home / name, tmp_path / name)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return tmp_path


# Tables


def test_students_are_told_cell_by_cell_as_their_runs_measured_them(profile, home):
    table = studies.models(profile, "losses")
    assert list(table.cell) == [cell for cell in GRIDS["losses"]["students"] for _ in range(2)]
    assert list(table.seed) == [1, 2] * 3
    row, found = table.iloc[3], table.run.iloc[3].metrics
    test = found["evaluation"]["test"]
    assert [row[name] for name in studies.ON_TEST] == [test[name] for name in studies.ON_TEST]
    assert (row.validation_nll, row.ood_nll) == tuple(
        found["evaluation"][split]["nll"] for split in ("validation", "ood")
    )
    assert (row.parameters, row.non_embedding) == (found["parameters"]["total"], found["parameters"]["non_embedding"])
    assert (row.tokens, row.flops) == (found["training"]["tokens"], found["training"]["flops"])


def test_a_teacher_in_the_loop_is_paid_by_its_student_and_cached_targets_apart(profile, home):
    online, cached = studies.models(profile, "features").iloc[0], studies.models(profile, "losses").iloc[0]
    training = online.run.metrics["training"]
    assert online.flops == training["flops"] + training["teacher_flops"] > training["flops"] == cached.flops
    targets = store.find(profile, cached.run.settings["inputs"]["targets"]).metrics["flops"]
    assert (online.target_flops, cached.target_flops) == (0, targets) and targets > 0


def test_redrawn_targets_cost_what_the_dense_ones_did(profile, fresh):
    row = studies.models(profile, "losses").iloc[0]
    dense = store.find(profile, row.run.settings["inputs"]["targets"])
    drawn = dense.path.with_name("targets-000000000000")
    shutil.copytree(dense.path, drawn)
    store.write_json(drawn / "metrics.json", dense.metrics | {"flops": 0})
    store.write_json(
        drawn / "settings.json", dense.settings | {"inputs": {**dense.settings["inputs"], "dense": dense.id}}
    )
    settings = row.run.settings
    settings["inputs"]["targets"] = drawn.name
    store.write_json(row.run.path / "settings.json", settings)
    assert studies.models(profile, "losses").target_flops[0] == dense.metrics["flops"]


def test_settings_are_those_that_the_run_reads(profile, home):
    table = studies.models(profile, "weights").drop_duplicates("cell")
    found = dict(zip(table.cell, studies.setting(table, "kd_weight", "none"), strict=True))
    assert found["CE"] == found["CE to KD, linear"] == "none" and found["kd_weight 0.5, temperature 2.0"] == 0.5
    assert studies.setting(table, "temperature")[0] is None


def test_means_keep_the_order_of_the_grid_and_count_runs(profile, home):
    table = studies.models(profile, "weights")
    means = studies.means(table)
    assert list(means.cell) == list(table.cell.unique()) and set(means.runs) == {2}
    one = table[table.cell == "CE"].nll
    np.testing.assert_allclose(means.nll[0], one.mean(), rtol=1e-12)
    np.testing.assert_allclose(means.seed_standard_error[0], one.sem(), rtol=1e-12)
    alone = studies.means(table[table.seed == 1])
    assert alone.seed_standard_error.isna().all() and set(alone.runs) == {1}


def test_fidelity_is_told_by_the_cells_of_the_profile(profile, home):
    means = studies.means(studies.target_runs(profile))
    assert list(means.cell) == list(GRIDS["targets"]["students"]) and list(means.kind) == ["dense", "importance"]


def test_the_teacher_of_a_grid_is_the_one_its_students_learn_from(profile, home):
    table = studies.models(profile, "initialisation")
    started = table.run.iloc[-1].settings["inputs"]["teacher"]
    assert studies.teacher(profile, table).id == started
    taught = table[table.cell == "from scratch"]
    assert "teacher" not in taught.run[0].settings["inputs"], "knows it through its targets alone"
    assert studies.teacher(profile, taught).id == started
    ce = studies.models(profile, "weights").query("cell == 'CE'")
    with pytest.raises(KdlibError, match="those of CE have 0"):
        studies.teacher(profile, ce)


# Choosing


def test_the_best_cell_is_chosen_on_validation_text_alone(profile, fresh):
    table = studies.models(profile, "weights")
    constants = [cell for cell in table.cell.unique() if cell.startswith("kd_weight")]
    for row in table.itertuples():
        metrics(
            row.run,
            validation=4.0 + 0.1 * (row.cell != constants[2]),
            test=1.0 + 4.0 * (row.cell == constants[2]),
            ood=1.0,
        )
    after = studies.models(profile, "weights")
    assert studies.best(after) == studies.best(after, constants) == constants[2]
    assert after.groupby("cell").nll.mean().idxmax() == constants[2], "the worst on test"
    assert studies.best(after, constants[:2]) in constants[:2]


def test_a_mean_chooses_not_a_lucky_seed(profile, fresh):
    table = studies.models(profile, "weights")
    for row in table.itertuples():
        lucky = 3.0 if (row.cell, row.seed) == ("CE", 1) else 5.0
        metrics(row.run, validation=4.5 if row.cell == "CE to KD, linear" else lucky if row.seed == 1 else 6.5)
    assert studies.best(studies.models(profile, "weights")) == "CE to KD, linear"


def test_nothing_to_choose_from_is_told(profile, home):
    with pytest.raises(KdlibError, match="The grid must hold students to choose from, got forward KL, total variation"):
        studies.best(studies.models(profile, "losses"), ["reverse KL"])


def test_the_reference_is_the_first_cell_or_the_constant_that_validation_chose(profile, home):
    for grid, reference in {"losses": "forward KL", "my_depths": "one layer", "weights": BEST_ON_VALIDATION}.items():
        table = studies.models(profile, grid)
        found = studies.best(table, studies.candidates(table, grid))
        assert found == reference
        told = [a for a, b in studies.compared(table, grid, found) if b == found]
        constants = [cell for cell in table.cell.unique() if cell.startswith("kd_weight")]
        assert told == [cell for cell in table.cell.unique() if cell not in [reference, *constants]]
    alone = table[table.kd_weight.notna() & table.temperature.notna()]
    told = studies.compared(alone, "weights", BEST_ON_VALIDATION)
    assert len(told) == 3 and {b for _, b in told} == {BEST_ON_VALIDATION}, "constants among themselves, where that is all there is"


# Comparing


def test_differences_are_one_family_with_sentences_that_name_the_cells(profile, home):
    table = studies.models(profile, "losses")
    pairs = studies.against(table, "forward KL")
    assert pairs == [("total variation", "forward KL"), ("JSD, β = 0.5", "forward KL")]
    found = studies.differences(table, pairs)
    assert found[["a", "b", "split"]].to_numpy().tolist() == [
        [a, b, split] for a, b in pairs for split in ("test", "ood")
    ]
    nll = table.groupby("cell").nll.mean()
    np.testing.assert_allclose(found.difference[0], nll["total variation"] - nll["forward KL"], rtol=1e-9)
    assert all("the student with forward KL" in one.lower().replace("kl", "KL") for one in found.sentence)
    assert "student with total variation" in found.sentence[0] and "on test text" in found.sentence[0]
    runs_of = {cell: list(group.run) for cell, group in table.groupby("cell")}
    family = [comparison.Pair(a, b, runs_of[a], runs_of[b], paired=True) for a, b in pairs]
    for split in ("test", "ood"):
        each = [one.p_value for one in comparison.compare(family, split, cells=list(runs_of.values()))]
        np.testing.assert_allclose(found.p_value[found.split == split], statistics.holm(each), rtol=1e-12)
    named = studies.differences(table, pairs[:1], "student “{}”")
    assert "student “forward KL”" in named.sentence[0] and list(named.a) == ["total variation"] * 2


def test_cells_that_are_not_compared_tell_how_seeds_vary_too(profile, home):
    table = studies.models(profile, "weights")
    pairs = [("CE to KD, linear", "CE")]
    whole, alone = studies.differences(table, pairs), studies.differences(table[table.cell.isin(pairs[0])], pairs)
    np.testing.assert_allclose(whole.difference, alone.difference)
    found = [comparison.losses(list(group.run), "test") for _, group in table.groupby("cell")]
    wide = np.stack([one.nll.sum(axis=1) / one.tokens.sum() for one in found])
    pooled = np.sqrt(2 * variance.pool(wide).value / wide.shape[1])
    np.testing.assert_allclose(whole.seed_standard_error[0], pooled, rtol=1e-9)
    own = (table[table.cell == pairs[0][0]].nll.to_numpy() - table[table.cell == "CE"].nll.to_numpy()).std(ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(alone.seed_standard_error[0], own, rtol=1e-9)


def test_equivalence_with_the_reference_is_a_family_a_measure(profile, home):
    table = studies.models(profile, "losses")
    found = studies.equivalences(table, "forward KL", {"nll": 0.01, "ece": 0.005})
    assert found[["a", "measure"]].to_numpy().tolist() == [[a, m] for m in ("nll", "ece") for a in ("total variation", "JSD, β = 0.5")]
    told = studies.differences(table, studies.against(table, "forward KL"))
    np.testing.assert_allclose(found.low[:2], told.low[told.split == "test"])
    assert set(studies.equivalences(table, "forward KL", {"nll": 10.0}).verdict) == {"equivalent"}
    assert set(studies.equivalences(table, "forward KL", {"nll": 1e-9}).verdict) <= {"different", "not shown"}


def test_one_cell_is_nothing_to_compare(profile, home):
    table = studies.models(profile, "losses").query("cell == 'forward KL'")
    with pytest.raises(KdlibError, match="two cells or more; its grid holds forward KL"):
        studies.differences(table, studies.against(table, "forward KL"))


def test_a_grid_that_was_not_made_is_told_with_the_command_that_makes_it(profile, fresh):
    plan = json.loads((fresh / "plan.json").read_text())
    plan["grids"].pop("losses")
    store.write_json(fresh / "plan.json", plan)
    with pytest.raises(KdlibError, match="no grid 'losses'.*make paper PROFILE=.*grids.* GRIDS=losses"):
        studies.models(profile, "losses")


def test_a_missing_student_is_named(profile, fresh):
    shutil.rmtree(studies.models(profile, "data").run[0].path)
    with pytest.raises(KdlibError, match="data: real text, seed 1"):
        studies.models(profile, "data")


def test_scores_that_are_missing_stop_no_table_and_leave_costs_unknown(profile, invented, fresh):
    scores = [shutil.copytree(run, fresh / "runs" / run.name) for run in (invented / "aside").iterdir()]
    tables = [studies.means(studies.models(profile, "data")), comparison.mean_losses(comparison.models(profile))]
    flops = comparison.models(profile).flops
    costs = accounts.cost(profile).set_index("what")
    assert scores and flops[comparison.models(profile).role != "teacher"].notna().all()
    for run in scores:
        shutil.rmtree(run)
    again = [studies.means(studies.models(profile, "data")), comparison.mean_losses(comparison.models(profile))]
    for before, after in zip(tables, again, strict=True):
        pd.testing.assert_frame_equal(before, after)
    models, left = comparison.models(profile), accounts.cost(profile).set_index("what")
    chosen = models.method.str.startswith("on easy text")
    assert chosen.any() and models.flops[chosen].isna().all()
    pd.testing.assert_series_equal(models.flops[~chosen], flops[~chosen])
    unknown = left.index.str.startswith("on easy text")
    assert left.total_flops[unknown].isna().all() and left.nll[unknown].notna().all()
    pd.testing.assert_frame_equal(left[~unknown], costs[~unknown])


# Notebooks and paper


@pytest.mark.slow
def test_every_study_writes_what_is_listed(home, printed):
    for name, one in outputs.analyses(GRIDS).items():
        files = [home / "results" / "grids" / f"{stem}.csv" for stem in one.tables]
        files += [home / "figures" / "grids" / f"{stem}.{kind}" for stem in one.figures for kind in ("pdf", "png")]
        files += [home / "results" / "grids" / "numbers" / f"{name}.json"]
        assert [path.name for path in files if not path.is_file()] == []


@pytest.mark.slow
def test_a_study_ends_with_its_findings(home, printed):
    for stem in [stem for one in outputs.analyses(GRIDS).values() if one.grid for stem in one.findings]:
        for sentence in pd.read_csv(home / "results" / "grids" / f"{stem}.csv").sentence:
            assert sentence in printed
    assert len(re.findall(r"The student “.*” reaches \d+\.\d% of the teacher's accuracy", printed)) == 2


@pytest.mark.slow
def test_a_grid_of_ones_own_has_tables_a_figure_and_numbers(profile, home, printed):
    means = pd.read_csv(home / "results" / "grids" / "my_depths_grid.csv")
    assert list(means.cell) == ["one layer", "layers 2", "layers 3"] and set(means.runs) == {2}
    told = pd.read_csv(home / "results" / "grids" / "my_depths_grid_differences.csv")
    assert set(told.b) == {"one layer"} and list(told.a.unique()) == ["layers 2", "layers 3"]
    numbers = json.loads((home / "results" / "grids" / "numbers" / "21_grid_my_depths.json").read_text())
    assert float(numbers["my_depths_grid/layers 2/nll"]["text"]) == round(means.nll[1], 3)
    assert "| `my_depths` |" in "\n".join(report._studies(profile))


@pytest.mark.slow
def test_weights_are_compared_with_the_constant_that_validation_chose(home, printed):
    results = home / "results" / "grids"
    means, told = pd.read_csv(results / "kd_weight.csv"), pd.read_csv(results / "kd_weight_differences.csv")
    assert list(means.cell[means.chosen == "yes"]) == [BEST_ON_VALIDATION]
    assert means.cell[means.nll.idxmax()] == BEST_ON_VALIDATION, "test text had no say"
    assert set(told.b) == {BEST_ON_VALIDATION} and list(told.a.unique()) == ["CE", "CE to KD, linear"]


@pytest.mark.slow
def test_the_share_of_the_teachers_accuracy_is_what_it_says(profile, home, printed):
    means = pd.read_csv(home / "results" / "grids" / "initialisation.csv").set_index("cell")
    teacher = next(run for run in store.table(profile).run if run.kind == "teacher").metrics["evaluation"]["test"]
    np.testing.assert_allclose(means.share, means.accuracy / teacher["accuracy"], rtol=1e-4)
    assert report.look_up(
        profile, {"csv": "initialisation", "where": {"cell": "identical"}, "format": "{share:.1%}"}
    ).endswith("%")


@pytest.mark.slow
def test_the_paper_has_a_table_and_findings_for_every_grid_there_is(profile, analysed_copy):
    plan = analysed_copy / "results" / "grids" / "plan.json"
    found = json.loads(plan.read_text())
    found["grids"].pop("losses")
    store.write_json(plan, found)
    folder = paper.generate(profile)
    written = {path.name for path in folder.iterdir()}
    stems = {one.tables[0] for one in outputs.analyses(GRIDS).values() if one.grid}
    assert {f"table-{stem}.tex" for stem in stems} - written == {"table-losses.tex"}
    stems = {one.tables[0] for one in outputs.analyses(GRIDS).values() if one.grid and one.findings}
    assert {f"findings-{stem}_differences.tex" for stem in stems} - written == {"findings-losses_differences.tex"}
    main = (paper.SOURCE / "main.tex").read_text()
    assert set(re.findall(r"\\study\{(\w+)\}", main)) == stems - {"my_depths_grid"}
    assert (folder / "own-grids.tex").read_text() == "\\owngrid{my\\_depths}{my_depths_grid}\n"
    for stem in stems - {"my_depths_grid"}:
        text = (paper.SOURCE / f"{stem}.tex").read_text()
        assert rf"\generated{{{stem}}}" in text and rf"\input{{findings-{stem}_differences.tex}}" in text
        assert paper.shown(text) == set(), "numbers of a grid are not checked before LaTeX runs"


def test_names_that_latex_cannot_read_are_no_numbers_of_the_paper():
    macros = report.latex_macros({"data/50 % & more/nll": "1.0", "losses/JSD, β = 0.5/nll": "2.0"})
    assert macros == "\\defineresult{losses/JSD, β = 0.5/nll}{2.0}\n"
    assert report.latex("ρ = 0.5, 50 %") == r"$\rho$ = 0.5, 50 \%"


@pytest.mark.slow
def test_the_paper_of_every_grid_compiles(profile, analysed_copy):
    try:
        paper.engine()
    except KdlibError as error:
        pytest.skip(str(error))
    assert paper.build(profile).read_bytes().startswith(b"%PDF")
    build = analysed_copy / "paper" / "build" / "grids"
    log, labels = (build / "main.log").read_text(errors="replace"), (build / "main.aux").read_text(errors="replace")
    assert "undefined" not in log and "Overfull" not in log
    for about in map(grids.describe, GRIDS):
        stem = "targets" if about.stem == "targets_grid" else about.stem
        assert rf"\newlabel{{{stem if stem == 'my_depths_grid' else stem.replace('_', '-')}}}" in labels


def test_an_ensemble_of_a_grid_is_measured_as_it_is_kept(profile, home):
    table, formed = studies.models(profile, "leaderboard"), store.formed(profile, "leaderboard")
    assert dict(table.cell.value_counts()) == dict.fromkeys(GRIDS["leaderboard"]["ensembles"], 2)
    for row in table.itertuples():
        members = [row.run.beside(one) for one in formed[row.run.id]]
        assert len(set(formed[row.run.id])) == len(members)
        assert row.size == len(members) == (1 if row.cell == "one for longer" else 2)
        assert row.tokens == sum(one.metrics["training"]["tokens"] for one in members)
        assert row.nll == row.run.metrics["evaluation"]["test"]["nll"]
        assert row.member_nll - row.ambiguity == pytest.approx(row.nll)
    first = [one.settings["parameters"]["seed"] for one in (table.run[0].beside(two) for two in formed[table.run[0].id])]
    assert first == [1, 2]


def test_a_cell_is_told_beside_the_reference_by_its_cost_and_by_its_share_of_the_gain():
    cells = {"cell": ["pool", "distilled", "worse", "cheap"], "nll": [4.0, 4.05, 4.3, 3.9], "member_nll": [4.2, 4.05, 4.4, 4.2]}
    means = pd.DataFrame(cells | {"flops": [8.0, 12.0, 8.0, 2.0]})
    found = studies.beside_reference(means, "pool")
    assert found.relative_flops.tolist() == [1, 1.5, 1, 0.25]
    assert found.gain.tolist() == pytest.approx([1, 0.75, -0.5, 1.5])
    assert studies.beside_reference(means, "distilled").gain.isna().all()


def test_ensembles_of_a_grid_are_compared_group_by_group(profile, home):
    table = studies.models(profile, "leaderboard")
    found = studies.differences(table, studies.compared(table, "leaderboard", studies.best(table, studies.candidates(table, "leaderboard"))))
    assert set(found.b) == {"independent"} and set(found.a) == {"bagging", "geometric", "one for longer"}
    gaps = table.pivot(index="seed", columns="cell", values="nll")
    told = found[found.split == "test"].set_index("a")
    assert set(told.runs) == {2} and len(told) == 3
    for cell, row in told.iterrows():
        assert row.difference == pytest.approx((gaps[cell] - gaps.independent).mean())
        assert row.low < row.difference < row.high


def test_growth_is_the_pool_of_the_first_members_in_the_order_in_which_they_were_formed(profile, home):
    found, formed = growth.growth(profile, "chain", "test"), store.formed(profile, "chain")
    run = store.cells(profile, "chain")["chain"][1]
    kept = [np.load(run.beside(one).path / "target_logprobs.npz")["test"].astype(float) for one in formed[run.id]]
    rows = found[(found.cell == "chain") & (found.seed == 2)].set_index("size")
    for size in (1, 2, 3):
        assert rows.nll[size] == pytest.approx(-kept[size - 1].mean())
        assert rows.pool_nll[size] == pytest.approx(-np.log(np.exp(kept[:size]).mean(axis=0)).mean())
    means = growth.means(found)
    assert len(means) == 9 and set(means.runs) == {2}
    with pytest.raises(KdlibError, match="must be ensembles"):
        growth.growth(profile, "losses", "test")
