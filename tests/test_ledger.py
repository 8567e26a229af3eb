"""Ledgers on invented run folders: what is summed, once each, and what is left out by name."""

import json
import subprocess
import sys

import numpy as np
import pytest

from kdlib.analysis import ledger
from kdlib.errors import KdlibError
from kdlib.study import store
from kdlib.study.work import CATEGORIES, entry, total

PROFILE = "invented"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))


def write(name, inputs=(), **work):
    """A finished run ``<kind>-<number>`` that reads others and did that work: category=(flops, seconds)."""
    folder = store.results(PROFILE) / "runs" / name
    folder.mkdir(parents=True)
    named = inputs if isinstance(inputs, dict) else {f"input {one}": one for one in inputs}
    store.write_json(folder / "settings.json", {"inputs": named, "parameters": {}})
    done = {category: entry(*value) for category, value in work.items()}
    store.write_json(folder / "metrics.json", {"work": total(done)})
    return store.find(PROFILE, name)


@pytest.fixture
def ensemble():
    """Two students of one teacher's targets, the second taught by the first as well, and their pool."""
    write("corpus-0")
    write("teacher-0", ["corpus-0"], train=(1000, 100.0), evaluation=(7, 1.0))
    write("targets-0", ["corpus-0", "teacher-0"], teacher_forward=(300, 30.0))
    write("targets-1", {"dense": "targets-0", "teacher": "teacher-0"}, teacher_forward=(20, 2.0))
    write("student-0", ["corpus-0", "targets-1"], train=(50, 5.0), teacher_forward=(4, 0.0), evaluation=(1, 0.5))
    write("student-1", ["corpus-0", "targets-1", "student-0"], train=(60, 6.0), scoring=(8, 0.25), evaluation=(1, 0.5))
    members = {"member 1": "student-0", "member 2": "student-1"}
    return write("ensemble-0", {"corpus": "corpus-0"} | members, evaluation=(2, 1.0))


def test_a_run_keeps_every_category(ensemble):
    assert list(ledger.work(ensemble)) == list(CATEGORIES)
    assert ledger.work(ensemble)["evaluation"] == {"flops": 2, "seconds": 1.0}
    assert ledger.work(ensemble)["train"] == {"flops": 0, "seconds": 0.0}


def test_runs_upstream_come_once_and_before_those_that_read_them(ensemble):
    found = [run.id for run in ledger.upstream(PROFILE, ensemble)]
    assert sorted(found) == sorted(set(found)) and len(found) == 7 and found[-1] == ensemble.id
    for run in ledger.upstream(PROFILE, ensemble):
        for read in run.settings["inputs"].values():
            assert found.index(read) < found.index(run.id)


def test_a_method_costs_the_union_of_what_it_rests_on(ensemble):
    without = ledger.cost(PROFILE, ensemble, teacher_training=False)
    assert list(without.index) == list(CATEGORIES)
    assert without.flops.to_dict() == {"train": 110, "teacher_forward": 324, "generation": 0, "scoring": 8, "evaluation": 11}
    assert without.seconds.to_dict() == {"train": 11, "teacher_forward": 32, "generation": 0, "scoring": 0.25, "evaluation": 3}
    # Only its training is left out of a teacher; a student that teaches is a student.
    with_it = ledger.cost(PROFILE, ensemble, teacher_training=True)
    assert (with_it - without).flops.to_dict() == dict.fromkeys(CATEGORIES, 0) | {"train": 1000}
    assert (with_it - without).seconds["train"] == 100
    # The sum over members would charge the teacher and the targets twice, and the first student too.
    members = [ledger.cost(PROFILE, store.find(PROFILE, name), teacher_training=True) for name in ("student-0", "student-1")]
    assert sum(member.flops.sum() for member in members) > with_it.flops.sum()


def test_a_pool_of_teachers_may_be_one_input():
    write("student-0", train=(50, 5.0))
    write("student-1", train=(60, 6.0))
    taught = write("student-2", {"teacher": ["student-0", "student-1"]}, train=(1, 1.0))
    assert ledger.cost(PROFILE, taught, teacher_training=False).flops["train"] == 111


def test_seconds_that_one_run_did_not_keep_are_unknown_in_the_sum():
    write("targets-0", teacher_forward=(300, None))
    run = write("student-0", ["targets-0"], train=(50, 5.0), teacher_forward=(3, 0.0))
    found = ledger.cost(PROFILE, run, teacher_training=True)
    assert np.isnan(found.seconds["teacher_forward"]) and found.seconds["train"] == 5
    assert found.flops["teacher_forward"] == 303


def test_a_long_chain_is_walked():
    write("student-0", train=(1, 1.0))
    for number in range(1, 1500):
        run = write(f"student-{number}", [f"student-{number - 1}"], train=(1, 1.0))
    assert ledger.cost(PROFILE, run, teacher_training=True).flops["train"] == 1500


def test_a_run_without_work_and_a_missing_input_are_named(ensemble):
    path = store.find(PROFILE, "student-0").path / "metrics.json"
    path.write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(KdlibError, match=r"student-0 must say what work it took .* got none. Delete the folder"):
        ledger.cost(PROFILE, ensemble, teacher_training=True)
    path.unlink()
    with pytest.raises(KdlibError, match=r"input .* among the results of 'invented', got no run student-0\. Finish"):
        ledger.upstream(PROFILE, ensemble)


def test_what_chose_text_may_be_missing_and_then_the_cost_is_unknown():
    write("student-0", train=(50, 5.0))
    scores = write("scores-0", {"scorer": "student-0"}, scoring=(8, 1.0))
    run = write("student-1", {"scores": "scores-0"}, train=(60, 6.0))
    pool = write("ensemble-0", {"member 1": "student-0", "member 2": "student-1"})
    assert ledger.making(PROFILE, run) == ledger.making(PROFILE, pool) == 118
    (scores.path / "metrics.json").unlink()
    assert [one.id for one in ledger.upstream(PROFILE, run)] == ["student-1"]
    assert np.isnan([ledger.making(PROFILE, one) for one in (run, pool)]).all(), "not what is left of it"
    assert ledger.cost(PROFILE, run, teacher_training=True).isna().all(axis=None)
    assert ledger.making(PROFILE, store.find(PROFILE, "student-0")) == 50


def test_the_ledger_is_read_without_torch():
    code = "import sys, kdlib.analysis.ledger; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
