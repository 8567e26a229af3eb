import hashlib
import json
import math
import os
import shutil
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


def test_what_later_runs_read_is_made_again_where_only_the_results_are_there(home):
    def produce(work, nll):
        (work / "model").mkdir()
        (work / "model" / "weights").write_text(str(nll))
        return {"nll": nll}

    made = store.make("smoke", ID, SETTINGS, lambda work: produce(work, 4.5))
    assert store.find("smoke", ID, with_artefact=True) == made and made.artefact == made.path / "model"
    shutil.rmtree(made.artefact)
    assert store.find("smoke", ID) == made and store.find("smoke", ID, with_artefact=True) is None
    before = {path.name: path.read_bytes() for path in made.path.iterdir()}
    assert store.make("smoke", ID, SETTINGS, lambda work: pytest.fail("its results are there")) == made
    assert store.make("smoke", ID, SETTINGS, lambda work: produce(work, 4.4), with_artefact=True) == made
    assert (made.artefact / "weights").read_text() == "4.4"
    shutil.rmtree(made.artefact)
    assert {path.name: path.read_bytes() for path in made.path.iterdir()} == before, "results stay as they were"
    assert list((home / "results" / "smoke" / "work").iterdir()) == []


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


def planned(home, *ids: str) -> None:
    folder = home / "results" / "smoke"
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"id": one, "label": f"label of {one}", "inputs": []} for one in ids]
    (folder / "plan.json").write_text(json.dumps({"profile": "smoke", "runs": entries}))


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
    with pytest.raises(KdlibError, match="lacks 5 of 5 planned runs: label of student-aaaaaaaaaaaa"):
        store.cells("smoke", "losses")
    for name in [*names, ID]:
        store.make("smoke", name, SETTINGS, lambda work: {})
    found = store.cells("smoke", "losses")
    assert [(cell, [run.id for run in group]) for cell, group in found.items()] == [("z", names[:2]), ("a", names[2:])]
    with pytest.raises(KdlibError, match="hold no grid 'data'.*make paper PROFILE=smoke GRIDS=data"):
        store.cells("smoke", "data")


def test_a_run_folder_has_no_temporary_files(home):
    store.write_json(home / "a.json", {})
    assert os.listdir(home) == ["a.json"]
