"""Tables, figures and numbers are those of the results, and nothing that looks like a result is typed by hand."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import synthetic_results

from kdlib.analysis import accounts, comparison, figures, grids, outputs, panels, report
from kdlib.errors import KdlibError
from kdlib.study import design, profiles, store
from kdlib.study.kinds import kinds
from kdlib.study.profiles import REPOSITORY

GENERATED = re.compile(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", re.DOTALL)


def literals(text: str, kind: str) -> list[str]:
    """What looks like a result in a LaTeX or Markdown text: decimals, percentages, and whole numbers above nine.

    Left out are generated parts, code, links, comments, lengths, names of things, and what stands in the preamble.
    """
    if kind == "latex":
        text = re.sub(r"(?<!\\)%.*", "", text).split(r"\begin{document}", 1)[-1]
        text = re.sub(
            r"\\(result|setting|amount|generated|label|ref|cite|input|includegraphics)(\[[^]]*\])?\{[^}]*\}", "", text
        )
        text = re.sub(r"[\d.]+(pt|em|ex|cm|mm|in)\b|[\d.]+\\(linewidth|textwidth)", "", text)
    else:
        text = GENERATED.sub("", text)
        text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    return re.findall(r"\d+[.,]\d+\s*\\?%?|\d+\s*\\?%|\d{2,}|\.\d+", text)


@pytest.mark.parametrize(
    ("typed", "kind"),
    [
        ("a loss of 4.86 nats", "latex"),
        (r"by 3\,\% or 3\% at most", "latex"),
        ("over 150 runs", "latex"),
        ("$<.05$", "latex"),
        ("a loss of 4.86 nats", "markdown"),
        ("5% better", "markdown"),
        ("12 members", "markdown"),
    ],
)
def test_the_rule_finds_typed_results(typed, kind):
    assert literals(r"\begin{document} " + typed if kind == "latex" else typed, kind)


@pytest.mark.parametrize(
    ("allowed", "kind"),
    [
        (r"\vspace{1.5ex}\includegraphics[width=0.6\linewidth]{a1234.pdf} \cite{guo2017}", "latex"),
        (r"$1 - w$ % 4.86", "latex"),
        (r"\result{methods/KD 12/test/nll}", "latex"),
        ("Python `3.11`, [a](https://x.org/1503.02531)", "markdown"),
        ("<!-- results:begin -->4.86<!-- results:end -->", "markdown"),
    ],
)
def test_the_rule_lets_lengths_code_and_lookups_pass(allowed, kind):
    assert literals(r"\begin{document} " + allowed if kind == "latex" else allowed, kind) == []


READERS = [name for name, (_, section) in profiles.notebooks().items() if section == "analysis"]
TEXTS = [path for path in sorted((REPOSITORY / "paper").glob("*.tex")) if path.stem != "references"]


@pytest.mark.parametrize("path", [REPOSITORY / "README.md", *TEXTS], ids=lambda path: path.name)
def test_no_result_is_typed_by_hand(path):
    kind = "latex" if path.suffix == ".tex" else "markdown"
    assert literals(path.read_text(encoding="utf-8"), kind) == []


def recomputed(results) -> int:
    """Checks every registered number against its CSV, read here by other means than the code's; returns how many."""
    checked = 0
    for path in (results / "numbers").glob("*.json"):
        for name, lookup in json.loads(path.read_text()).items():
            table = pd.read_csv(results / f"{lookup['csv']}.csv", dtype=str, keep_default_na=False)
            for column, value in lookup["where"].items():
                table = table[table[column] == value]
            assert len(table) == 1, name
            if found := re.fullmatch(r"\{(\w+):([+,]?\.\df)\}", lookup["format"]):
                cell = table.iloc[0][found[1]]
                assert lookup["text"] == (format(float(cell), found[2]) if cell else "–"), name
                checked += 1
            assert lookup["text"] == report.render(lookup["format"], table.iloc[0].to_dict()), name
    return checked


@pytest.mark.slow
def test_every_number_is_the_cell_it_names(home):
    assert recomputed(home / "results" / "smoke") > 50


@pytest.mark.parametrize("profile", sorted(path.parent.name for path in REPOSITORY.glob("results/*/numbers")))
def test_every_number_of_the_results_here_is_the_cell_it_names(profile):
    assert recomputed(REPOSITORY / "results" / profile) > 50


def test_the_readme_shows_the_results_here(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    for name in ("results", "benchmarks"):
        if (REPOSITORY / name).is_dir():
            (tmp_path / name).symlink_to(REPOSITORY / name)
    committed = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(committed, encoding="utf-8")
    report.update_readme()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == committed, "redraw it: make figures"


@pytest.mark.slow
def test_a_changed_result_shows_as_a_number_that_is_no_longer_its_lookup(home, tmp_path, monkeypatch):
    shutil.copytree(home / "results", tmp_path / "results")
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    table = tmp_path / "results" / "smoke" / "methods.csv"
    frame = pd.read_csv(table)
    frame["nll"] += 0.1
    frame.to_csv(table, index=False)
    lookups = json.loads((tmp_path / "results" / "smoke" / "numbers" / "12_methods.json").read_text())
    one = lookups["methods/KD student/test/nll"]
    assert report.look_up("smoke", one) != one["text"]


@pytest.mark.slow
def test_analyses_write_what_is_listed_and_every_figure_has_its_table(home):
    results, drawn = home / "results" / "smoke", home / "figures" / "smoke"
    analyses = outputs.analyses(store.grids("smoke")).values()
    tables = {stem for analysis in analyses for stem in analysis.tables}
    pictures = {stem for analysis in analyses for stem in analysis.figures}
    assert {path.stem for path in results.glob("*.csv")} == tables
    assert {path.name for path in drawn.iterdir()} == {f"{stem}.{kind}" for stem in pictures for kind in ("pdf", "png")}
    assert pictures <= tables
    assert {path.stem for path in (results / "numbers").iterdir()} == {analysis.name for analysis in analyses}
    assert {analysis.notebook for analysis in analyses} == set(READERS), "each has something to read in the smoke profile"


@pytest.mark.slow
def test_the_same_results_give_the_same_bytes_without_a_notebook_or_torch(home, tmp_path, monkeypatch):
    shutil.copytree(home / "results" / "smoke" / "runs", tmp_path / "results" / "smoke" / "runs")
    shutil.copy(home / "results" / "smoke" / "plan.json", tmp_path / "results" / "smoke")
    code = []
    for one in outputs.analyses(store.grids("smoke")).values():  # with the defaults that are in them, which are those of the smoke profile
        notebook = nbformat.read(REPOSITORY / "notebooks" / f"{one.notebook}.ipynb", as_version=4)
        cells = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        code.append(re.sub(r'(?m)^grid = "\w+"$', f"grid = {one.grid!r}", cells))
    program = "import sys\n" + "".join(f"exec({one!r}, {{}})\n" for one in code) + 'assert "torch" not in sys.modules'
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    made = [path for path in home.rglob("*") if path.is_file() and {"runs", "paper"}.isdisjoint(path.parts)]
    assert len(made) > 20
    for path in made:
        assert (tmp_path / path.relative_to(home)).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", READERS)
def test_analysis_notebooks_are_short_stripped_and_declare_their_parameters(name):
    notebook = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lines = [line for cell in code for line in cell.source.splitlines()]
    assert notebook.cells[0].cell_type == "markdown"
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert len(notebook.cells) <= 25 and len(lines) <= 150
    for cell in code:
        for function in re.findall(r"^def .*?(?=^\S|\Z)", cell.source + "\n", flags=re.MULTILINE | re.DOTALL):
            assert len(function.strip().splitlines()) <= 10, function.splitlines()[0]


@pytest.fixture
def synthetic(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return synthetic_results.write("smoke")


@pytest.fixture
def twelve(tmp_path, monkeypatch):
    """Students of twelve seeds: two are too few to claim anything."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return synthetic_results.write("laptop")


def test_a_missing_run_is_named(synthetic):
    students = sorted((synthetic / "runs").glob("student-*"))
    shutil.rmtree(students[0])
    with pytest.raises(KdlibError, match=students[0].name):
        comparison.models("smoke")


def test_mean_losses_are_sums_over_tokens_averaged_over_runs(synthetic):
    models = comparison.models("smoke")
    means = comparison.mean_losses(models).set_index(["method", "split"])
    each = []
    for run in models.run[models.method == "KD student"]:
        documents = pd.read_parquet(run.path / "documents.parquet").query("split == 'ood'")
        each.append(documents.nll.sum() / documents.tokens.sum())
    row = means.loc["KD student", "ood"]
    np.testing.assert_allclose(row.nll, np.mean(each), rtol=1e-12)
    np.testing.assert_allclose(row.seed_standard_error, np.std(each, ddof=1) / np.sqrt(2), rtol=1e-9)
    assert row.runs == len(each) == 2


def test_losses_of_different_documents_are_not_compared(synthetic):
    students = comparison.models("smoke").query("method == 'KD student'").run.tolist()
    path = students[0].path / "documents.parquet"
    pd.read_parquet(path).iloc[1:].to_parquet(path)
    with pytest.raises(KdlibError, match="same validation documents"):
        comparison.losses(students, "validation")


def test_a_difference_is_claimed_only_with_more_than_one_run(twelve):
    models = comparison.models("laptop")
    kd, ce = (models.run[models.method == f"{name} student"].tolist() for name in ("KD", "CE"))
    pairs = [
        comparison.Pair("KD student", "CE student", kd, ce, True),
        comparison.Pair("one KD", "one CE", kd[:1], ce[:1], True),
    ]
    several, one = comparison.differences(pairs).query("split == 'test'").to_dict("records")
    assert (several["verdict"], one["verdict"]) == ("yes", "undecided")
    assert "beats" in several["sentence"] and "no claim is made" in one["sentence"]
    assert f"{several['difference']:+.3f}" in several["sentence"]


def test_where_b_is_the_better_one_the_sentence_says_so(twelve):
    models = comparison.models("laptop")
    kd, ce = (models.run[models.method == f"{name} student"].tolist() for name in ("KD", "CE"))
    pair = comparison.Pair("CE student", "KD student", ce, kd, True)
    row = comparison.differences([pair]).query("split == 'test'").iloc[0]
    assert row.verdict == "no" and row.low > 0
    assert row.sentence.startswith("The KD student beats the CE student on test text")
    assert f"difference {-row.difference:+.3f}" in row.sentence


def test_the_best_member_is_chosen_on_validation_text(synthetic):
    models = comparison.models("smoke")
    ensemble = models[models.kind == "ensemble"].iloc[0]
    worst = max(ensemble.members, key=lambda member: models.run[member].metrics["evaluation"]["validation"]["nll"])
    metrics = models.run[worst].metrics
    for split in ("test", "ood"):
        metrics["evaluation"][split]["nll"] = 0.0
    store.write_json(models.run[worst].path / "metrics.json", metrics)
    assert comparison.best_member(ensemble).id in set(ensemble.members) - {worst}


def teachers_targets() -> store.Run:
    """The targets that students of the smoke profile's teacher learn from; its chains have others."""
    student = comparison.models("smoke").query("method == 'KD student'").run.iloc[0]
    return store.find("smoke", student.settings["inputs"]["targets"])


def test_an_ensemble_pays_for_its_members_and_once_for_their_targets(synthetic):
    flops = comparison.models("smoke").groupby("method").flops.mean()
    targets = teachers_targets().metrics["flops"]
    assert flops["CE ensemble (logit pool)"] == 2 * flops["CE student"]
    assert flops["KD student"] == flops["CE student"] + targets
    assert flops["KD ensemble (logit pool)"] == 2 * flops["CE student"] + targets


@pytest.mark.parametrize("formed", ["bagging", "chain"])
def test_another_way_to_form_members_is_a_method_of_its_own(synthetic, formed):
    models = comparison.models("smoke")
    means = comparison.mean_losses(models).query("split == 'test'").set_index("method")
    for method, way in ((f"{formed} (logit pool)", formed), ("KD ensemble (logit pool)", "independent")):
        found = [one for one in store.entries("smoke") if (one["formed"], one["objective"], one["pool"]) == (way, "kd", "logit")]
        metrics = [store.find("smoke", one["run"]).metrics["evaluation"]["test"]["nll"] for one in found]
        assert means.runs[method] == len(found) == 1
        np.testing.assert_allclose(means.nll[method], metrics[0], rtol=1e-12)
    pairs = [(a, b) for a, b in comparison.rivals(models[models.kind == "ensemble"]) if a.startswith(formed)]
    assert sorted(pairs) == sorted(
        [(f"{formed} ({pool} pool)", f"KD ensemble ({pool} pool)") for pool in ("logit", "probability")]
        + [(f"{formed} (probability pool)", f"{formed} (logit pool)")]
    ), "against independent members of the same objective and pool, and neither CE nor another way"


@pytest.mark.slow
def test_every_method_of_the_profile_is_a_row_and_compared_with_independent_members(home):
    results = home / "results" / "smoke"
    written, told = pd.read_csv(results / "methods.csv"), pd.read_csv(results / "methods_differences.csv")
    for formed in ("bagging", "chain"):
        for pool in ("probability", "logit"):
            method = f"{formed} ({pool} pool)"
            assert set(written.runs[written.method == method]) == {1}
            assert set(told.split[(told.a == method) & (told.b == f"KD ensemble ({pool} pool)")]) == {"test", "ood"}
            assert (told.a[told.b == comparison.BEST] == method).sum() == 2


def test_tables_take_methods_from_the_plan_and_nothing_from_names(synthetic):
    def seen():
        models = comparison.models("smoke")
        found = comparison.mean_losses(models).drop(columns="method"), comparison.sizes(models).drop(columns="method")
        cost = accounts.cost("smoke")
        return models, (*found, cost[~cost.what.str.startswith("writing")].drop(columns="what"), accounts.setup("smoke"))

    models, before = seen()
    rivals = comparison.rivals(models[models.kind == "ensemble"])
    plan = store.read_json(synthetic / "plan.json")
    for number, run in enumerate(plan["runs"]):
        run["label"] = f"KD ensemble {number}, logit pool"
    store.write_json(synthetic / "plan.json", plan)
    models, after = seen()
    assert list(models.method) == [one["method"] for one in plan["entries"]]
    assert comparison.rivals(models[models.kind == "ensemble"]) == rivals
    called = {method: f"way {number}" for number, method in enumerate(models.method.unique())}
    plan["entries"] = [one | {"method": called[one["method"]]} for one in plan["entries"]]
    store.write_json(synthetic / "plan.json", plan)
    models, renamed = seen()
    assert comparison.rivals(models[models.kind == "ensemble"]) == [(called[a], called[b]) for a, b in rivals]
    for one, two, three in zip(before, after, renamed, strict=True):
        pd.testing.assert_frame_equal(one, two)
        pd.testing.assert_frame_equal(one, three)


def test_an_edit_of_a_label_makes_no_run_anew(synthetic, monkeypatch):
    before = store.read_json(synthetic / "plan.json")
    for kind in kinds().values():
        monkeypatch.setattr(kind, "label", lambda values: "called anew")
    caches = (design.comparison, design.study, design.cells)
    for cached in caches:
        cached.cache_clear()
    try:
        design.write("smoke", store.grids("smoke"))
    finally:
        monkeypatch.undo()
        for cached in caches:
            cached.cache_clear()
    after = store.read_json(synthetic / "plan.json")
    assert "called anew" in {run["label"] for run in after["runs"]}
    assert [run["id"] for run in after["runs"]] == [run["id"] for run in before["runs"]]
    assert after["entries"] == before["entries"]


def test_the_run_table_has_a_row_for_every_run_and_split(synthetic):
    table, planned = comparison.runs_table("smoke"), store.table("smoke")
    assert set(table.run) == set(planned.index)
    assert (table[table.kind == "student"].groupby("run").split.nunique() == 4).all()
    assert {
        "setting_kd_weight",
        "training_flops",
        "cost_seconds",
        "parameters_total",
        "pool_ambiguity_logit",
        "nll",
    } <= set(table)


def test_set_up_and_cost_come_from_the_runs(synthetic):
    setup = accounts.setup("smoke").set_index("name").value
    assert (setup["seeds"], setup["members"], setup["targets"]) == ("2", "2", "32 tokens drawn from its distribution")
    assert setup["train_tokens"] == str(accounts.corpus("smoke").query("split == 'train'").tokens.sum())
    cost = accounts.cost("smoke").set_index("what")
    assert cost.tokens["CE ensemble (logit pool)"] == 2 * cost.tokens["CE student"]
    assert cost.bytes_per_token["writing targets"] == 36
    assert cost.runs["writing targets"] == cost.runs["writing targets of students"] == 1, "a chain of two has one link"


def written_by_the_teacher():
    """The targets of the smoke profile that its teacher writes; the first link of its chain writes others."""
    (found,) = (run for run in accounts._of_kind("smoke", "targets") if run.settings["inputs"]["teacher"].startswith("teacher-"))
    return found


def test_the_cost_of_a_method_is_that_of_all_upstream_each_once(synthetic):
    cost = accounts.cost("smoke").set_index("what")
    targets = teachers_targets()
    written, own = targets.metrics["flops"], cost.flops["CE student"]
    assert cost.total_flops["CE student"] == cost.train_flops["CE student"] == own
    assert cost.total_flops["KD ensemble (logit pool)"] == 2 * own + written
    assert cost.teacher_forward_flops["KD ensemble (logit pool)"] == written == cost.flops["writing targets"]
    # A teacher's own training is in its own row, and apart from the rows of those that it taught.
    taught = store.find("smoke", targets.settings["inputs"]["teacher"])
    trained = taught.metrics["training"]["flops"]
    teacher = design.TEACHERS[taught.settings["parameters"]["adaptation"]]
    assert cost.total_flops[teacher] == cost.train_flops[teacher] == trained > 0
    assert cost.teacher_training_flops["KD student"] == cost.teacher_training_flops["KD ensemble (logit pool)"] == trained
    assert cost.teacher_training_flops["CE student"] == cost.teacher_training_flops[teacher] == 0
    # Evaluating members, teacher and pool is no part of the making.
    assert cost.evaluation_flops["CE ensemble (logit pool)"] == 3 * cost.evaluation_flops["CE student"] > 0


@pytest.mark.parametrize(("kind", "what"), [("student", "students"), ("ensemble", "ensembles")])
def test_what_is_written_for_other_students_is_a_row_of_its_own(synthetic, kind, what):
    cost = accounts.cost("smoke").set_index("what").loc
    assert cost["writing targets", "runs"] == 1
    written = {run.id: run for run in accounts._of_kind("smoke", "targets")}
    others = [run for run in written.values() if run.settings["inputs"]["teacher"].startswith(kind)]
    assert others and cost[f"writing targets of {what}", "runs"] == len(others)
    np.testing.assert_allclose(cost[f"writing targets of {what}", "flops"], np.mean([run.metrics["flops"] for run in others]))


def test_set_up_counts_the_ensembles_of_independent_members(synthetic):
    setup = accounts.setup("smoke").set_index("name").value
    assert (setup["members"], setup["repeats"]) == ("2", "1"), "bagging and chains are other methods, not repeats"


def test_set_up_is_what_was_run_whatever_the_profile_says_now(synthetic, monkeypatch):
    before = accounts.setup("smoke")
    # All that is left of the profile is its name.
    monkeypatch.setattr(accounts.profiles, "load", lambda profile: SimpleNamespace(name=profile))
    pd.testing.assert_frame_equal(accounts.setup("smoke"), before)


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("owner/model@0123abc", "owner/model@0123abc"),
        ("/data/people/me/my-teacher", "my-teacher"),
        ("~/models/my-teacher/", "my-teacher"),
        ("models/tiny.gguf", "tiny.gguf"),
        (".", "a local model"),
    ],
)
def test_a_local_teacher_is_called_by_its_name_not_by_where_it_lies(synthetic, source, called):
    for run in accounts._of_kind("smoke", "teacher"):
        settings = run.settings
        settings["parameters"] |= {"source": source, "adaptation": "lora"}
        store.write_json(run.path / "settings.json", settings)
    for run in accounts._of_kind("smoke", "student"):
        settings = run.settings
        settings["parameters"]["teacher"] = "lora"
        store.write_json(run.path / "settings.json", settings)
    assert accounts.setup("smoke").set_index("name").value["teacher"] == called


def test_set_up_tells_of_targets_from_elsewhere_and_of_a_weight_on_a_schedule(synthetic):
    targets = teachers_targets()
    settings = targets.settings
    del settings["inputs"]["teacher"]
    store.write_json(targets.path / "settings.json", settings)
    for run in accounts._of_kind("smoke", "student"):
        settings = run.settings
        settings["parameters"]["kd_weight"] = {"shape": "linear", "start": 0.0, "end": 1.0}
        store.write_json(run.path / "settings.json", settings)
    setup = accounts.setup("smoke").set_index("name").value
    assert (setup["teacher"], setup["kd_weight"]) == ("a small model", "on a schedule")


def test_the_peak_is_that_of_the_process_that_took_most(synthetic):
    before = accounts.cost("smoke").set_index("what").peak_memory_bytes
    run = next(run for run in accounts._of_kind("smoke", "student") if run.metrics["training"]["tokens"])
    store.write_json(run.path / "metrics.json", run.metrics | {"training": run.metrics["training"] | {"peak_memory_bytes": int(9e9)}})
    after = accounts.cost("smoke").set_index("what").peak_memory_bytes
    assert after.max() == 9e9 > before.max()


def test_targets_of_a_writer_that_timed_none_have_no_speed(synthetic):
    targets = teachers_targets()
    store.write_json(targets.path / "metrics.json", targets.metrics | {"tokens_per_second": None})
    cost = accounts.cost("smoke").set_index("what")
    assert cost.tokens["writing targets"] == targets.metrics["tokens"] and np.isnan(cost.seconds["writing targets"])


def test_every_grid_has_an_analysis_whose_files_no_other_writes():
    held = ["all_of_it", "targets", "methods", "kd_weight", "depth", "depth_runs", "depth_grid", *grids.KNOWN, "runs"]
    analyses = outputs.analyses(held)
    files = [stem for analysis in analyses.values() for stem in analysis.tables]
    own = [*outputs.COMPARISON, outputs.TARGETS]
    grown = [name for name, about in grids.KNOWN.items() if about.growth]
    assert len(files) == len(set(files)) == sum(len(one.tables) for one in own) + 3 * (len(held) - 1) + len(grown)
    assert grown == ["chain"] and analyses["14_growth_chain"].arguments == ["notebooks/14_growth.ipynb", "--set", "grid=chain"]
    assert list(analyses)[:6] == ["10_objectives", "11_target_fidelity", "12_methods", "15_calibration", "17_cost", "21_grid_weights"]
    drawn = [analysis.grid for analysis in analyses.values() if analysis.notebook == outputs.GRID_NOTEBOOK]
    assert drawn[: len(grids.KNOWN)] == list(grids.KNOWN)
    assert analyses["21_grid_depth"].arguments == ["notebooks/21_grid.ipynb", "--set", "grid=depth"]
    assert analyses["11_target_fidelity"].arguments == ["notebooks/11_target_fidelity.ipynb"]


def test_a_profile_without_grids_has_the_analyses_of_its_comparison():
    assert [analysis.notebook for analysis in outputs.analyses([]).values()] == [one.notebook for one in outputs.COMPARISON]


@pytest.mark.parametrize("name", [*grids.KNOWN, "of_my_own"])
def test_the_description_of_a_grid_names_panels_that_there_are(name):
    about = grids.describe(name)
    assert set(about.panels) <= set(panels.PANELS) and len(about.panels) == len(about.widths)
    assert about.about.startswith("**") and about.student.format("x") != about.student
    assert {"NLL", "ECE"} <= set(about.columns) and ("Student" in about.columns) != ("Ensemble" in about.columns)


@pytest.mark.parametrize(
    ("template", "cells", "text"),
    [
        ("{x:.2f}", {"x": "1.005001"}, "1.01"),
        ("{x:si}", {"x": "9999"}, "9,999"),
        ("{x:si}", {"x": "1649576"}, "1.65 M"),
        ("{x:si}", {"x": "5.9e13"}, "59.0 T"),
        ("{x:si}", {"x": "0"}, "0"),
        ("[{x:.1f}, {y:.1f}]", {"x": "1", "y": ""}, "–"),
        ("{x:p}", {"x": "0.0123"}, "0.012"),
        ("{x:p}", {"x": "1e-12"}, "< 0.001"),
        ("{x}", {"x": "KD student"}, "KD student"),
        ("{x:si}", {"x": "words"}, "words"),
    ],
)
def test_cells_are_rendered(template, cells, text):
    assert report.render(template, cells) == text


def test_a_table_is_written_with_whole_numbers_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    frame = pd.DataFrame({"tokens": [12345678, None], "nll": [4.123456789, 5.0], "method": ["a", "b, c"]})
    report.save_table(frame, "smoke", "one")
    assert (tmp_path / "results/smoke/one.csv").read_bytes() == b'tokens,nll,method\n12345678,4.12346,a\n,5,"b, c"\n'
    with pytest.raises(KdlibError, match="needs one row"):
        report.look_up("smoke", {"csv": "one", "where": {"method": "d"}, "format": "{nll}"})
    with pytest.raises(KdlibError, match="no column speed"):
        report.rows("smoke", "one", {"speed": "1"})


def test_latex_and_markdown_say_what_the_csv_says(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    report.save_table(pd.DataFrame({"name": ["a_b & c"], "x": [-0.25]}), "smoke", "one")
    table = report.Table("one", {"Name": "{name}", "50 %": "{x:.2f}"})
    assert report.latex_table(table, "smoke").splitlines()[1:5] == [
        r"\toprule", r"Name & 50 \% \\", r"\midrule", r"a\_b \& c & $-$0.25 \\"
    ]  # fmt: skip
    assert report.markdown_table(table.columns, table.body("smoke")).splitlines()[1:] == [
        "| --- | ---: |",
        "| a_b & c | -0.25 |",
    ]


@pytest.mark.slow
def test_the_readme_is_redrawn_between_its_marks_only(home, tmp_path, monkeypatch):
    shutil.copytree(home / "results", tmp_path / "results")
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    readme = tmp_path / "README.md"
    shutil.copy(REPOSITORY / "README.md", readme)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results.csv").write_text(
        "what,target,measured,unit,detail,device\nstep,≥ 4,4.7,×,fast,two cores\n"
    )
    before = GENERATED.sub("", readme.read_text(encoding="utf-8"))
    report.update_readme("smoke")
    text = readme.read_text(encoding="utf-8")
    assert GENERATED.sub("", text) == before
    told = report.rows("smoke", "targets_differences", {"split": "test"})
    assert re.search(rf"\| `targets` \| [^|]+ \| {told[0]['b']} \|", text) and "(figures/smoke/targets.png)" in text
    assert "| KD ensemble (probability pool) | 1 |" in text and "| step | ≥ 4 | 4.7 × (fast) | two cores |" in text
    report.update_readme("smoke")
    assert readme.read_text(encoding="utf-8") == text
    report.update_readme("laptop")
    assert "No results of the profile `laptop` yet" in readme.read_text(encoding="utf-8")


def test_a_readme_without_its_marks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    (tmp_path / "README.md").write_text("# kdlib\n")
    with pytest.raises(KdlibError, match="results:begin"):
        report.update_readme("smoke")


def test_a_figure_has_no_date_and_embeds_its_fonts(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    figures.use_style()
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(3, 2))
    rows = pd.DataFrame(
        {"method": ["KD student", "untrained"], "nll": [4.9, 9.0], "low": [4.8, 8.9], "high": [5.0, 9.1]}
    )
    figures.dots(axis, rows, "method", "nll", limits=(4.5, 5.5))
    shown = figures.save(figure, "smoke", "dots")
    content = (tmp_path / "figures/smoke/dots.pdf").read_bytes()
    assert shown.data == (tmp_path / "figures/smoke/dots.png").read_bytes() and (shown.width, shown.height) == (300, 200)
    assert not plt.fignum_exists(figure.number), "a notebook would draw a figure that is open once more"
    assert b"CreationDate" not in content and b"/FontFile2" in content
    assert sorted(axis.get_lines()[-1].get_xdata()) == [5.5], "a value beyond the limits is drawn at the edge"


def test_differences_are_drawn_where_most_of_them_lie():
    import matplotlib.pyplot as plt

    found = pd.DataFrame(
        {
            "a": ["better", "unknown", "same", "hopeless"],
            "difference": [-0.04, 0.02, 0.01, 2.5],
            "low": [-0.06, -np.inf, -0.01, 2.4],
            "high": [-0.02, np.inf, 0.03, 2.6],
            "p_value": [0.01, 0.9, 0.7, 0.001],
        }
    )
    figure, axis = plt.subplots()
    figures.against(axis, found, "reference")
    plt.close(figure)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["reference", *found.a]
    low, high = axis.get_xlim()
    assert -0.07 < low < -0.06 and 0.03 < high < 0.04
    numbers = {text.get_text(): text.get_color() for text in axis.texts}
    dark, grey = figures.DARK, figures.GREY
    assert numbers == {"0.000": dark, "−0.040": dark, "0.020": grey, "0.010": grey, "2.500": dark}
    arrow = [line for line in axis.get_lines() if line.get_marker() == ">"]
    assert [list(line.get_ydata()) for line in arrow] == [[4]]


def test_seeds_are_drawn_with_their_mean_in_the_order_of_the_grid():
    import matplotlib.pyplot as plt

    table = pd.DataFrame({"cell": ["b", "b", "a", "a"], "share": [0.4, 0.6, 0.9, 1.0]})
    figure, axis = plt.subplots()
    figures.seeds(axis, table, "share", ".1%")
    plt.close(figure)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["b", "a"]
    assert [text.get_text() for text in axis.texts] == ["50.0%", "95.0%"]
    assert [list(line.get_xdata()) for line in axis.get_lines()] == [[0.4, 0.6], [0.5], [0.9, 1.0], [0.95]]
