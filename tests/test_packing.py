"""Which students that are to be made are trained packed, and that they are then the runs that they are alone."""

import fcntl
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_study import step

from kdlib.errors import KdlibError
from kdlib.runs import packing
from kdlib.runs.make import make, make_all
from kdlib.runs.packing import Packer, why_alone
from kdlib.study import store
from kdlib.study.plan import Planner
from kdlib.training import read_log

LINE = "Students trained one by one: "


class Fake:
    """In place of training: what was packed, by seed; a run of ``batches`` is unlike those of others."""

    def __init__(self, monkeypatch, tmp_path):
        monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
        self.packs, self.looked_at, self.raises, self.batches, self.room = [], [], None, {}, 99
        monkeypatch.setattr(packing.student, "begun", lambda values, inputs, folder: ({}, {"seed": values.seed, "folder": folder}, {}))
        monkeypatch.setattr(packing, "trainer_of", self.trainer)
        monkeypatch.setattr(packing, "PackedTrainer", self.packed)
        monkeypatch.setattr(packing, "_fit", lambda trainers: len({len(one.train_dataset) for one in trainers}) == 1)
        monkeypatch.setattr(packing, "affordable", lambda trainer: self.room)

    def trainer(self, seed, folder):
        assert folder.is_dir()
        self.looked_at.append(seed)
        return SimpleNamespace(seed=seed, train_dataset=range(self.batches.get(seed, 5)), args=SimpleNamespace(per_device_train_batch_size=1))

    def packed(self, trainers):
        self.packs.append([one.seed for one in trainers])
        error, self.raises = self.raises, None
        return SimpleNamespace(fit=lambda: error and (_ for _ in ()).throw(error))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return Fake(monkeypatch, tmp_path)


PLAN = Planner("smoke")


def finish(one):
    """A run without content."""
    return store.make("smoke", one.id, one.settings, lambda work: (work / "model").mkdir() or {})


def packer(steps, pack=None):
    return Packer(steps, lambda one: {}, pack=pack)


def students(*seeds, **changes):
    return [PLAN.student(**{"objective": "ce"} | changes, seed=seed) for seed in seeds]


def through(steps, **options):
    """As runs are made: each in its turn, trained ahead with others where that is possible."""
    made = packer(steps, **options)
    for one in steps:
        made.train(one)
        finish(one)


def test_students_alike_are_packed_whatever_their_seeds_texts_and_objectives(fake, capsys):
    ce, kd, bagged = students(1, 2), students(3, objective="kd", kd_weight=0.4), students(4, text={"bagged": {"share": 0.7}})
    other, wide = students(5, learning_rate=0.001), students(6, 7, hidden_size=64)
    through([*ce, *other, *wide, *kd, *bagged], pack=8)
    assert fake.packs == [[1, 2, 3, 4], [6, 7]]
    assert capsys.readouterr().out.startswith(f"training 4 students packed: {ce[0].id}, {ce[1].id}, {kd[0].id}")


def test_no_more_are_packed_than_was_asked_for_or_than_memory_holds(fake):
    through(students(1, 2, 3, 4, 5, 6), pack=4)
    assert fake.packs == [[1, 2, 3, 4], [5, 6]]
    fake.room = 2
    through(students(11, 12, 13), pack=4)
    assert fake.packs[2:] == [[11, 12]]


def test_runs_of_other_lengths_are_left_to_packs_of_their_own_and_not_looked_at_again(fake):
    fake.batches = {2: 6, 4: 6, 6: 7}
    through(students(1, 2, 3, 4, 5, 6), pack=8)
    assert fake.packs == [[1, 3, 5], [2, 4]]
    assert fake.looked_at == [1, 2, 3, 4, 5, 6, 2, 4]


def test_what_is_finished_or_made_by_another_process_is_left_out(fake):
    steps = students(1, 2, 3, 4)
    made = packer(steps, pack=8)
    finish(steps[1])
    lock = store.results("smoke") / "work" / f"{steps[2].id}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        made.train(steps[2])
        assert fake.packs == [], "the one whose turn it is"
        made.train(steps[0])
    assert fake.packs == [[1, 4]]
    with store.claimed("smoke", steps[0].id) as work:
        assert work is not None, "claims are given back"


def test_students_of_a_student_wait_for_it(fake):
    first, second = students(1, 2)
    learners = [PLAN.student(objective="kd", teacher=teacher, seed=seed + 10) for seed, teacher in ((1, first), (2, second))]
    through([first, second, *learners], pack=8)
    # Targets of students are made in the making, which is faked here: learners are looked at, and packed, in their turn.
    assert fake.packs == [[1, 2], [11, 12]]


def test_members_of_an_ensemble_that_is_asked_for_are_packed(fake):
    members = students(1, 2, 3)
    made = packer([PLAN.ensemble(members)], pack=8)
    made.train(PLAN.ensemble(members))
    assert [sorted(one) for one in fake.packs] == [[1, 2, 3]]
    made.train(members[1])
    assert len(fake.packs) == 1, "trained already"


def test_what_goes_wrong_in_a_pack_leaves_its_runs_to_their_turns(fake, capsys):
    fake.raises = KdlibError("The loss became nan at step 3.")
    through(students(1, 2, 3), pack=8)
    assert fake.packs == [[1, 2, 3]]
    assert "Packed training stopped, and its runs go on one by one. The loss became nan at step 3." in capsys.readouterr().out
    fake.raises = torch.OutOfMemoryError("CUDA out of memory")
    through(students(4, 5, 6, 7, 8), pack=8)
    assert fake.packs[1:] == [[4, 5, 6, 7, 8], [5, 6], [7, 8]]
    assert "5 students at once took more memory than there is; from now on half as many." in capsys.readouterr().out


def test_on_a_cpu_students_go_one_by_one_unless_asked_otherwise_and_on_a_gpu_they_do_not(fake, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    through(students(1, 2, 3))
    assert fake.packs == [] and capsys.readouterr().out == f"{LINE}3 (packed training pays on a GPU only)\n"
    through(students(4, 5), pack=1)
    assert fake.packs == [] and capsys.readouterr().out == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    through(students(*range(10, 30)))
    assert [len(one) for one in fake.packs] == [16, 4]


ALONE = {
    "a teacher in the loop": {"objective": "online_kd"},
    "stages": {"stages": [{"share": 1.0, "learning_rate_multipliers": {}}]},
    "learning-rate multipliers": {"learning_rate_multipliers": {"mlp": 0.5}},
    "8-bit states": {"low_precision": "optimizer"},
    "text that is written for it": {"text": "generated"},
    "no training": {"epochs": 0},
}


@pytest.mark.parametrize("reason", ALONE)
def test_what_is_never_packed_says_why(fake, capsys, reason):
    steps = students(1, 2, **ALONE[reason])
    assert [why_alone(one) for one in steps] == [reason] * 2
    through(steps, pack=8)
    assert fake.packs == [] and f"{LINE}2 ({reason})\n" in capsys.readouterr().out


# Runs themselves


def test_packed_runs_are_the_runs_that_they_are_alone(profile, capsys, one_thread):
    shared, text = {"objective": "ce", "learning_rate": 0.0043, "epochs": 3}, {"bagged": {"share": 1.0}}
    steps = [step(profile, seed=seed, **shared, **changes) for seed, changes in ((1, {}), (2, {"noise": 0.1}), (3, {"text": text}))]
    make_all(steps[0].upstream()[:-1])
    capsys.readouterr()
    make_all(steps, pack=8)
    assert f"training 3 students packed: {', '.join(one.id for one in steps)}" in capsys.readouterr().out
    for one in steps:
        together, runs = make(one), store.results(profile) / "runs"
        kept = shutil.copytree(together.path, runs.parent / "packed" / one.id)
        shutil.rmtree(together.path)
        alone = make(one)
        assert {path.relative_to(kept) for path in kept.rglob("*")} == {path.relative_to(alone.path) for path in alone.path.rglob("*")}
        metrics = store.read_json(kept / "metrics.json")
        for split, found in alone.metrics["evaluation"].items():
            assert metrics["evaluation"][split]["nll"] == pytest.approx(found["nll"], abs=1e-5)
        for name in ("tokens", "steps", "flops"):
            assert metrics["training"][name] == alone.metrics["training"][name] > 0
        assert metrics.keys() == alone.metrics.keys() and metrics["training"].keys() == alone.metrics["training"].keys()
        logs = [[(row["step"], row["tokens"], row["epoch"]) for row in read_log(path / "log.csv")] for path in (kept, alone.path)]
        assert logs[0] == logs[1] and len(logs[0]) > 6
