import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest

from kdlib.errors import KdlibError
from kdlib.study import store

ID = "student-0123456789ab"
SETTINGS = {"kind": "student", "parameters": {"objective": "kd", "seed": 1}}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return tmp_path


def test_results_go_where_kdlib_home_says_and_a_profiles_path_counts_by_its_name(home):
    assert store.results("quick") == home / "results" / "quick"
    assert store.results("/elsewhere/mine.yaml") == home / "results" / "mine"


def test_an_empty_kdlib_home_is_the_repository(monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", "")
    assert store.home() == store.REPOSITORY


def test_a_digest_does_not_see_the_order_of_keys_but_every_value():
    assert store.digest({"a": 1, "b": [1, 2]}) == store.digest({"b": [1, 2], "a": 1})
    assert store.digest({"a": 1, "b": [1, 2]}) != store.digest({"a": 1, "b": [2, 1]})
    assert store.digest({"a": 1}) != store.digest({"a": "1"})


def test_a_digest_is_the_same_on_every_machine_and_in_every_version():
    text = b'{"kd_weight":0.9,"objective":"kd","seeds":[1,2]}'
    assert store.digest({"objective": "kd", "kd_weight": 0.9, "seeds": [1, 2]}) == hashlib.sha256(text).hexdigest()[:12]


def test_a_finished_run_is_returned_and_not_made_again():
    made = store.make("smoke", ID, SETTINGS, lambda work: {"nll": 4.5})
    again = store.make("smoke", ID, SETTINGS, lambda work: pytest.fail("made twice"))
    assert again == made == store.find("smoke", ID)
    assert (made.id, made.kind, made.metrics, made.settings) == (ID, "student", {"nll": 4.5}, SETTINGS)


def test_a_run_says_where_it_comes_from():
    run = store.make("smoke", ID, SETTINGS, lambda work: {})
    found = store.read_json(run.path / "provenance.json")
    assert set(found) == {"commit", "dirty", "started", "seconds", "python", "packages", "lock_sha256", "device"}
    assert {"torch", "transformers"} <= set(found["packages"])


def exported(folder, commit="HEAD"):
    """The tree that git archive makes of what provenance reads."""
    files = ["requirements.lock", ".git_archival.txt", ".gitattributes"]
    command = ["git", "-C", str(store.REPOSITORY), "archive", commit, *files]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_an_exported_tree_names_the_commit_it_was_exported_from(tmp_path, monkeypatch):
    tree = exported(tmp_path / "tree")
    head = store._git("rev-parse", "HEAD")
    monkeypatch.setattr(store, "REPOSITORY", tree)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    found = store.provenance(0.0)
    assert found["commit"] == store.exported_commit() == head and len(head) == 40
    assert found["dirty"] is False


@pytest.mark.parametrize("content", ["commit: $Format:%H$\n", "", "commit: main\n"])
def test_a_tree_that_cannot_say_what_code_it_is_makes_no_run(tmp_path, monkeypatch, content):
    tree = exported(tmp_path / "tree")
    (tree / ".git_archival.txt").write_text(content)
    monkeypatch.setattr(store, "REPOSITORY", tree)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(KdlibError, match="Runs must say which commit made them, got code without any .*git archive HEAD"):
        store.make("smoke", ID, SETTINGS, lambda work: {})
    assert store.find("smoke", ID) is None


def test_the_file_that_an_export_fills_in_is_one_that_git_fills_in():
    assert ".git_archival.txt export-subst" in (store.REPOSITORY / ".gitattributes").read_text()
    assert "$Format:%H$" in (store.REPOSITORY / ".git_archival.txt").read_text() or store.exported_commit()


def test_runs_that_shared_the_machine_are_counted_over_their_time(home):
    spans = {"a": (0, 60), "b": (30, 60), "c": (100, 20), "d": (300, 0)}
    made = {}
    for name, (start, seconds) in spans.items():
        run = store.make("smoke", f"student-{name * 12}", SETTINGS, lambda work: {})
        started = {"started": f"2024-05-01T00:{start // 60:02d}:{start % 60:02d}Z", "seconds": float(seconds)}
        store.write_json(run.path / "provenance.json", started)
        made[name] = run
    (home / "results" / "smoke" / "runs" / f"student-{'e' * 12}").mkdir()  # in progress, or killed
    # For 30 of its 60 seconds a has b beside it.
    assert store.side_by_side("smoke", [made["a"]]) == pytest.approx(1.5)
    # Of b and c together, 80 seconds: b has a for 30 of them and c itself alone.
    assert store.side_by_side("smoke", [made["b"], made["c"]]) == pytest.approx(110 / 80)
    assert store.side_by_side("smoke", [made["c"]]) == store.side_by_side("smoke", [made["d"]]) == 1


def test_a_failed_producer_leaves_no_run_and_finds_its_work_again(home):
    def fails(work):
        (work / "shard-0").write_text("done")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        store.make("smoke", ID, SETTINGS, fails)
    assert store.find("smoke", ID) is None
    assert not (home / "results" / "smoke" / "runs").exists()

    run = store.make("smoke", ID, SETTINGS, lambda work: {"resumed": (work / "shard-0").read_text()})
    assert run.metrics == {"resumed": "done"}
    assert sorted(path.name for path in run.path.iterdir()) == [
        "metrics.json",
        "provenance.json",
        "settings.json",
        "shard-0",
    ]
    assert list((home / "results" / "smoke" / "work").iterdir()) == []


def test_two_makers_of_one_run_do_not_write_into_each_other(home, capsys):
    found = []
    other = threading.Thread(
        target=lambda: found.append(store.make("smoke", ID, SETTINGS, lambda work: pytest.fail("made at the same time")))
    )

    def produce(work):
        other.start()
        told = ""
        while "Waiting for another process that is making" not in told and other.is_alive():
            told += capsys.readouterr().out
        return {"nll": 4.5}

    made = store.make("smoke", ID, SETTINGS, produce)
    other.join()
    assert found == [made] and made.metrics == {"nll": 4.5}
    assert list((home / "results" / "smoke" / "work").iterdir()) == []


CPU, ANOTHER, GPU = "Intel Xeon, 2 threads", "AMD EPYC, 8 threads", "NVIDIA H100 80GB HBM3"


def measured(nll=4.5, device=CPU, tokens=1000, **others) -> dict:
    """What a student's metrics hold of it."""
    return {"evaluation": {"test": {"nll": nll, "tokens": tokens}}, "cost": {"device": device}, **others}


def producer(metrics):
    """Leaves a model that tells which of its makings it is of."""

    def produce(work):
        (work / "model").mkdir(exist_ok=True)
        (work / "model" / "weights").write_text(str(metrics["evaluation"]["test"]["nll"]))
        return metrics

    return produce


def remade(metrics, again):
    """The run with these metrics, and made again with others for the model that it no longer has."""
    made = store.make("smoke", ID, SETTINGS, producer(metrics))
    shutil.rmtree(made.artefact)
    return made, lambda: store.make("smoke", ID, SETTINGS, producer(again), with_artefact=True)


def test_what_later_runs_read_is_made_again_where_only_the_results_are_there(home):
    made = store.make("smoke", ID, SETTINGS, producer(measured()))
    assert store.find("smoke", ID, with_artefact=True) == made and made.artefact == made.path / "model"
    shutil.rmtree(made.artefact)
    assert store.find("smoke", ID) == made and store.find("smoke", ID, with_artefact=True) is None
    before = {path.name: path.read_bytes() for path in made.path.iterdir()}
    assert store.make("smoke", ID, SETTINGS, lambda work: pytest.fail("its results are there")) == made
    assert store.make("smoke", ID, SETTINGS, producer(measured(4.51)), with_artefact=True) == made
    assert (made.artefact / "weights").read_text() == "4.51"
    shutil.rmtree(made.artefact)
    (made.path / "again.json").unlink()
    assert {path.name: path.read_bytes() for path in made.path.iterdir()} == before, "results stay as they were"
    assert list((home / "results" / "smoke" / "work").iterdir()) == []


def test_how_near_a_run_comes_that_was_made_again_is_recorded_each_time():
    made, again = remade(measured(), measured(4.51))
    again()
    (first,) = store.read_json(made.path / "again.json")["times"]
    assert set(first) == {"commit", "dirty", "started", "device", "largest_difference"}
    assert first["largest_difference"] == pytest.approx(0.01)
    assert first["device"] == store.read_json(made.path / "provenance.json")["device"]
    shutil.rmtree(made.artefact)
    store.make("smoke", ID, SETTINGS, producer(measured()), with_artefact=True)
    times = store.read_json(made.path / "again.json")["times"]
    assert times[0] == first and [round(one["largest_difference"], 6) for one in times] == [0.01, 0]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (measured(4.5), measured(4.6), r"test: 4\.5000 nats on 1000 tokens, now 4\.6000"),
        (measured(4.5), measured(4.4), r"test: 4\.5000 nats on 1000 tokens, now 4\.4000"),
        (measured(), measured(tokens=999), "test: 4.5000 nats on 1000 tokens"),
        (measured(parameters={"body": 10}), measured(parameters={"body": 11}), "parameters: {'body': 10}, now {'body': 11}"),
        (measured(vocabulary={"size": 10}), measured(vocabulary={"size": 9}), "vocabulary: {'size': 10}, now {'size': 9}"),
        (
            measured(card={"splits": {"train": {"tokens": 7}}}),
            measured(card={"splits": {"train": {"tokens": 8}}}),
            "train: 7 tokens, now 8",
        ),
    ],
)
def test_a_run_made_again_that_disagrees_is_an_error_that_shows_both_and_leaves_the_old(before, after, told):
    made, again = remade(before, after)
    there = {path.name: path.read_bytes() for path in made.path.iterdir()}
    with pytest.raises(KdlibError, match=f"{ID} was made again and must agree with its results, got .*{told}.*delete .*{ID}"):
        again()
    assert {path.name: path.read_bytes() for path in made.path.iterdir()} == there
    assert store.find("smoke", ID, with_artefact=True) is None, "what disagrees is read by no run"


def test_another_kind_of_device_may_end_further_off():
    assert store.tolerance(CPU, CPU) == store.tolerance(CPU, ANOTHER) == store.tolerance(GPU, GPU.replace("H100", "A100"))
    assert store.tolerance(CPU, GPU) == store.tolerance(GPU, CPU) > 5 * store.tolerance(CPU, CPU)
    for old, new, gap, agree in ((CPU, ANOTHER, 0.019, True), (CPU, ANOTHER, 0.03, False), (CPU, GPU, 0.1, True), (GPU, CPU, 0.2, False)):
        largest, told = store.disagreements(measured(4.5, old), measured(4.5 + gap, new))
        assert largest == pytest.approx(gap) and (told == []) is agree


def test_the_largest_of_all_differences_is_told_and_every_one_beyond_tolerance():
    old, new = ({**measured(), "evaluation": {name: {"nll": nll, "tokens": 5} for name, nll in of.items()}} for of in (
        {"test": 4.0, "ood": 5.0, "validation": 3.0}, {"test": 4.5, "ood": 4.3, "validation": 3.001}
    ))
    largest, told = store.disagreements(old, new)
    assert largest == pytest.approx(0.7) and [one.split(":")[0] for one in told] == ["test", "ood"]
    assert store.disagreements({"cost": {"device": CPU}}, {"cost": {"device": CPU}}) == (0.0, []), "a run that evaluates nothing"


def test_what_is_left_of_a_run_that_was_deleted_by_half_is_replaced(home):
    rest = home / "results" / "smoke" / "runs" / ID
    (rest / "model").mkdir(parents=True)
    (rest / "model" / "old").touch()
    run = store.make("smoke", ID, SETTINGS, lambda work: {"nll": 4.5})
    assert run.metrics == {"nll": 4.5}
    assert not (run.path / "model").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_that_cannot_be_read_back_is_refused_and_the_old_file_kept(home, value):
    path = home / "metrics.json"
    store.write_json(path, {"nll": 1})
    with pytest.raises(ValueError):
        store.write_json(path, {"nll": value})
    assert store.read_json(path) == {"nll": 1}


@pytest.mark.parametrize("content", [None, "", '{"nll": '])
def test_a_missing_or_damaged_run_file_is_named_with_the_way_out(home, content):
    path = home / ID / "metrics.json"
    path.parent.mkdir()
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        KdlibError, match=f"metrics.json cannot be read.*Delete the folder .*{ID} to have the run made again"
    ):
        store.read_json(path)


def planned(home, *ids: str, entries=(), upstream=()) -> None:
    """A plan of the smoke profile whose entries are these runs, each a method of its own."""
    folder = home / "results" / "smoke"
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{"id": one, "label": f"label of {one}", "inputs": []} for one in [*upstream, *ids]]
    entries = entries or [{"method": one, "run": one, "members": []} for one in ids]
    (folder / "plan.json").write_text(json.dumps({"profile": "smoke", "runs": runs, "entries": entries}))


def test_the_table_has_the_planned_runs_in_order_with_their_parameters(home):
    corpus = "corpus-000000000000"
    store.make("smoke", ID, SETTINGS, lambda work: {"nll": 4.5})
    store.make("smoke", corpus, {"kind": "corpus", "parameters": {"block_length": 64}}, lambda work: {})
    store.make("smoke", "student-ffffffffffff", SETTINGS, lambda work: {})
    planned(home, corpus, ID)
    table = store.table("smoke")
    assert list(table.index) == [corpus, ID]
    assert list(table.kind) == ["corpus", "student"]
    assert table.loc[ID, "objective"] == "kd"
    assert table.loc[ID, "label"] == f"label of {ID}"
    assert table.loc[ID, "run"].metrics == {"nll": 4.5}
    assert math.isnan(table.loc[corpus, "seed"])
    assert [one["run"] for one in store.entries("smoke")] == [corpus, ID]


def test_a_run_that_no_entry_is_made_of_may_be_missing(home):
    scores, member = "scores-000000000000", "student-eeeeeeeeeeee"
    store.make("smoke", ID, SETTINGS, lambda work: {})
    planned(home, ID, upstream=[scores])
    assert list(store.table("smoke").index) == [ID]
    # A member of an ensemble is what an entry is made of.
    planned(home, ID, upstream=[scores, member], entries=[{"run": ID, "members": [member]}])
    with pytest.raises(KdlibError, match=f"lacks 1 of 2 planned runs: label of {member}"):
        store.table("smoke")
    store.make("smoke", member, SETTINGS, lambda work: {})
    assert list(store.table("smoke").index) == [member, ID]


def test_another_run_of_the_same_results_is_beside_it():
    run = store.make("smoke", ID, SETTINGS, lambda work: {})
    assert run.beside("corpus-000000000000").path == run.path.parent / "corpus-000000000000"
    assert run.beside(ID) == run


def test_missing_runs_are_named_with_the_command_that_makes_them(home):
    store.make("smoke", ID, SETTINGS, lambda work: {})
    planned(home, ID, "ensemble-0123456789ab")
    told = (
        r"lacks 1 of 2 planned runs: label of ensemble-0123456789ab \(ensemble-0123456789ab\).*make paper PROFILE=smoke"
    )
    with pytest.raises(KdlibError, match=told):
        store.table("smoke")


def test_a_profile_that_was_never_run_says_how_to_run_it():
    with pytest.raises(KdlibError, match="No results of profile 'quick'.*make paper PROFILE=quick"):
        store.table("quick")


def test_the_cells_of_a_grid_are_their_runs_in_the_plans_order(home):
    planned(home, ID)
    plan = json.loads((home / "results" / "smoke" / "plan.json").read_text())
    names = [f"student-{digit * 12}" for digit in "abcd"]
    entries = [{"id": one, "label": f"label of {one}", "inputs": []} for one in [*names, ID]]
    plan["grids"] = {"losses": {"runs": entries, "cells": [["z", names[:2]], ["a", names[2:]]]}}
    store.write_json(home / "results" / "smoke" / "plan.json", plan)
    assert store.grids("smoke") == ["losses"]
    with pytest.raises(KdlibError, match="lacks 4 of 4 planned runs: label of student-aaaaaaaaaaaa"):
        store.cells("smoke", "losses")
    for name in names:
        store.make("smoke", name, SETTINGS, lambda work: {})
    found = store.cells("smoke", "losses")
    assert [(cell, [run.id for run in group]) for cell, group in found.items()] == [("z", names[:2]), ("a", names[2:])]
    with pytest.raises(KdlibError, match="hold no grid 'data'.*make paper PROFILE=smoke GRIDS=data"):
        store.cells("smoke", "data")


def test_a_run_folder_has_no_temporary_files(home):
    store.write_json(home / "a.json", {})
    assert os.listdir(home) == ["a.json"]


def test_a_claim_keeps_a_run_from_others_until_the_block_ends_and_is_none_where_it_is_made():
    with store.claimed("smoke", ID) as work, store.claimed("smoke", ID) as again:
        assert work.is_dir() and again is None
        (work / "log.csv").write_text("begun")
    found = []
    store.make("smoke", ID, SETTINGS, lambda work: found.append((work / "log.csv").read_text()) or {})
    assert found == ["begun"], "whoever makes the run finds what the block left"
    with store.claimed("smoke", ID) as work:
        assert work is None and not store.results("smoke").joinpath("work", ID).exists()
    with store.claimed("smoke", ID, with_artefact=True) as work:
        assert work.is_dir(), "made again, for its model"
