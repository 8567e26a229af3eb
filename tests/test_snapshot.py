"""Snapshots of one trajectory: where each cycle begins, who teaches it, how it decays, and what it cost."""

import pytest
import torch
from test_independent import watched  # noqa: F401
from test_training import same, weights
from tiny import make_model
from tiny_study import make, saved

from kdlib.analysis import ledger
from kdlib.errors import KdlibError
from kdlib.models import initialisation
from kdlib.study.plan import Planner

CE = {"objective": "ce"}
PLAIN = {"student": CE | {"seed": 1}}


def members(seeds=(1, 2, 3, 4), profile="smoke", **options):
    return Planner(profile).members("snapshot", list(seeds), **options)


def teacher(one):
    return one.inputs["targets"].inputs["teacher"]


@pytest.mark.parametrize("taught", ["profile", "previous"])
def test_each_cycle_begins_with_the_one_before_and_all_take_the_epochs_of_one_student(taught):
    found = members(taught=taught)
    assert "start" not in found[0].inputs
    assert [one.inputs["start"].id for one in found[1:]] == [one.id for one in found[:-1]]
    student = Planner("smoke").student()
    assert sum(one.parameters.epochs for one in found) == student.parameters.epochs
    assert [one.parameters.seed for one in found] == [1, 2, 3, 4]
    assert [one.parameters.weight_decay for one in found] == [student.parameters.weight_decay] * 4
    plain = student.inputs["targets"].inputs["teacher"].id
    taught_by = [plain] + [one.id for one in found[:-1]] if taught == "previous" else [plain] * 4
    assert [teacher(one).id for one in found] == taught_by


def test_the_weight_is_that_of_cycles_that_a_snapshot_teaches():
    first, *others = members(taught="previous", kd_weight=0.3)
    assert [first.parameters.kd_weight, *(one.parameters.kd_weight for one in others)] == [0.9, 0.3, 0.3, 0.3]


def test_what_the_first_begins_with_is_its_own():
    first, second = members([1, 2], student={"initialisation": "embeddings", "noise": 0.1}, first={"epochs": 1.5})
    assert (first.parameters.initialisation, first.parameters.noise, first.parameters.epochs) == ("embeddings", 0.1, 1.5)
    assert (second.parameters.initialisation, second.parameters.noise, second.parameters.epochs) == ("random", 0.0, 1.0)


def test_weight_decay_in_anti_phase_rises_to_twice_the_students():
    for one in members(anti_phase=True, student={"weight_decay": 0.3}):
        decay = one.parameters.weight_decay
        assert [decay.value(progress) for progress in (0, 0.5, 1)] == pytest.approx([0, 0.3, 0.6])


def test_what_makes_no_trajectory_is_refused():
    with pytest.raises(KdlibError, match="kd_weight must be left out with taught=profile, got 0.5"):
        members(kd_weight=0.5)
    with pytest.raises(KdlibError, match="objective of members must be kd or online_kd .*got ce"):
        members(taught="previous", student=CE)
    assert members(student=CE)
    for decay in (0, {"shape": "linear", "start": 0, "end": 1}):
        with pytest.raises(KdlibError, match="weight_decay of student must be a number above 0 with anti_phase, got"):
            members(anti_phase=True, student={"weight_decay": decay})
    with pytest.raises(KdlibError, match="weight_decay must stay between 0 and 10, got 0.0 to 12"):
        members(anti_phase=True, student={"weight_decay": 6})
    with pytest.raises(KdlibError, match="start must have the student's shape, llama of 1 x 32, 2 heads, got gpt2 of 1 x 32, 2 heads"):
        members(first={"architecture": "gpt2"})


# The run that a student begins with


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        ({"layers": 2}, "llama of 2 x 32, 2 heads"),
        ({"hidden_size": 64}, "llama of 1 x 64, 2 heads"),
        ({"heads": 1}, "llama of 1 x 32, 1 heads"),
        ({"architecture": "qwen3"}, "qwen3 of 1 x 32, 2 heads"),
    ],
)
def test_a_start_of_another_shape_is_refused_in_the_plan(changes, there):
    with pytest.raises(KdlibError, match=f"start must have the student's shape, llama of 1 x 32, 2 heads, got {there}"):
        Planner("smoke").student(start={"student": changes})
    assert Planner("smoke").student(start={"student": changes}, **changes).inputs["start"].kind == "student"


def test_a_start_that_is_no_single_model_is_refused_in_the_plan():
    with pytest.raises(KdlibError, match="start must be one model, got ensemble of 2"):
        Planner("smoke").student(start=[PLAIN, {"student": {}}])
    with pytest.raises(KdlibError, match="must leave model, got"):
        Planner("smoke").student(start={"corpus": {}})


@pytest.mark.parametrize("other", [{"layers": 2}, {"vocabulary": 31}])
def test_a_model_of_another_shape_is_refused_with_both(other):
    with pytest.raises(KdlibError, match="start must have the student's shape, llama of 1 x 32, 2 heads, 29 tokens, .* got llama of"):
        initialisation.continued(make_model(0), make_model(1, **other))


def test_a_model_of_the_same_shape_is_taken_bit_for_bit_and_trains():
    student, other = make_model(0).train(), make_model(1).eval().requires_grad_(False)
    wanted = weights(other)
    found = initialisation.continued(student, other)
    assert same(weights(found), wanted) and not same(weights(make_model(0)), wanted)
    assert found.training and all(parameter.requires_grad for parameter in found.parameters())


def test_a_trajectory_is_trained_cycle_by_cycle_pooled_and_charged_once(profile, watched):  # noqa: F811
    # Settings that no other test has, so that these runs are made here.
    student = CE | {"epochs": 2, "learning_rate": 0.0051}
    run = make(profile, "05_ensemble", method="snapshot", options={"anti_phase": True}, seeds=[1, 2], student=student)
    one, other = (run.beside(member.id) for member in members([1, 2], profile, student=student, anti_phase=True))
    assert run.metrics["members"] == sorted((one.id, other.id))
    first, second = watched
    assert all(torch.equal(value, second["weights"][name].cpu()) for name, value in saved(one).items())
    assert second["training"] and not same(saved(one), saved(other))
    assert not torch.equal(first["batches"][0], second["batches"][0])
    steps = [found.metrics["training"]["steps"] for found in (one, other)]
    assert steps[0] == steps[1] == make(profile, **student | {"epochs": 1}).metrics["training"]["steps"]
    # What came before a snapshot is part of its cost, and nothing is charged twice.
    alone = [ledger.work(found)["train"]["flops"] for found in (one, other)]
    costs = [ledger.cost(profile, found, teacher_training=True).flops["train"] for found in (one, other, run)]
    assert costs == [alone[0], sum(alone), sum(alone)] and min(alone) > 0
