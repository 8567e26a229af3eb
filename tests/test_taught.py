"""Members taught by members before them: a chain, a star, and the pool of all previous ones."""

import pytest
from tiny_study import log, make, step

from kdlib.errors import KdlibError
from kdlib.study.plan import Planner

WAYS = ("chain", "star", "all_previous")
ANNEALED = {"shape": "linear", "start": 1.0, "end": 0.5, "at": 0.5}


def members(name, seeds=(1, 2, 3, 4), profile="smoke", **options):
    return Planner(profile).members(name, list(seeds), **options)


def teacher(one):
    return one.inputs.get("targets", one).inputs["teacher"]


def pooled(one):
    return {member.id for name, member in one.inputs.items() if name.startswith("member")}


def test_a_star_is_taught_by_its_first_member():
    first, *others = members("star")
    assert {teacher(one).id for one in others} == {first.id}
    assert first.id == Planner("smoke").student(seed=1).id
    assert [one.parameters.seed for one in others] == [2, 3, 4]


@pytest.mark.parametrize("student", [{}, {"objective": "online_kd"}], ids=["kd", "online_kd"])
def test_all_previous_members_teach_as_their_probability_pool(student):
    first, second, third, fourth = members("all_previous", student=student)
    assert teacher(second).id == first.id, "the pool of one member is that member"
    for taught, before in ((third, [first, second]), (fourth, [first, second, third])):
        assert teacher(taught).id == Planner("smoke").ensemble(before).id
        assert teacher(taught).kind == "ensemble" and teacher(taught).parameters.pool == "probability"
        assert pooled(teacher(taught)) == {one.id for one in before}


def test_two_members_are_the_same_in_every_way():
    assert len({tuple(one.id for one in members(name, [1, 2])) for name in WAYS}) == 1
    assert len({members(name, [1, 2, 3])[-1].id for name in WAYS}) == 3


@pytest.mark.parametrize("name", WAYS)
def test_more_members_go_on_from_fewer(name):
    assert [one.id for one in members(name)[:3]] == [one.id for one in members(name, [1, 2, 3])]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("weight", [0.3, ANNEALED], ids=["number", "schedule"])
def test_the_weight_is_that_of_members_that_are_taught_and_the_first_stays_as_it_is(name, weight):
    first, *others = members(name, kd_weight=weight)
    assert first.id == members(name)[0].id
    plain = Planner("smoke").student(kd_weight=weight).settings["parameters"]
    for one in others:
        assert one.settings["parameters"] == plain | {"seed": one.parameters.seed}


@pytest.mark.parametrize("name", WAYS)
def test_the_first_may_be_taught_by_text_alone(name):
    first, *others = members(name, first={"objective": "ce", "epochs": 3}, kd_weight=0.5)
    assert first.id == Planner("smoke").student(objective="ce", epochs=3, seed=1).id
    assert {(one.parameters.objective, one.parameters.epochs, one.parameters.kd_weight) for one in others} == {("kd", 2, 0.5)}
    assert teacher(others[0]).id == first.id


@pytest.mark.parametrize("name", WAYS)
def test_what_cannot_be_taught_is_refused(name):
    with pytest.raises(KdlibError, match="objective of members must be kd or online_kd .*got ce"):
        members(name, student={"objective": "ce"})
    with pytest.raises(KdlibError, match=f"Options of method {name} must be among kd_weight, first, got seeds: seeds must be unique"):
        members(name, [1, 2, 1])
    with pytest.raises(KdlibError, match="kd_weight.*less than or equal to 1"):
        members(name, kd_weight=1.5)
    with pytest.raises(KdlibError, match="kd_weight must stay between 0 and 1, got 0.0 to 2.0"):
        members(name, kd_weight={"shape": "linear", "start": 0.0, "end": 2.0})
    with pytest.raises(KdlibError, match="Options of method .* must be among kd_weight, first, got weight: Extra inputs"):
        members(name, weight=0.5)


def test_a_student_must_not_be_its_own_teacher(tmp_path):
    from test_ids import written

    own = written(tmp_path, "mine", student={"teacher": {"student": {"seed": 1}}})
    with pytest.raises(KdlibError, match="A run must not lead back to itself"):
        members("star", [1, 2], own)


def test_an_ensemble_of_all_previous_is_trained_and_pooled(profile):
    asked = {"method": "all_previous", "options": {"kd_weight": ANNEALED}, "seeds": [1, 2, 3], "student": {}}
    run = make(profile, "05_ensemble", **asked)
    planned = members("all_previous", [1, 2, 3], profile, kd_weight=ANNEALED)
    assert run.metrics["members"] == sorted(one.id for one in planned)
    assert step(profile, "05_ensemble", **asked).label == "all_previous ensemble of 3, probability pool"
    third = run.beside(planned[2].id)
    assert run.beside(third.settings["inputs"]["targets"]).settings["inputs"]["teacher"] == Planner(profile).ensemble(planned[:2]).id
    rows = log(third)
    # The weight falls to a half, and with it what the loss takes of the KD term.
    for row, weight in ((rows[0], 1.0), (rows[-1], 0.5)):
        assert float(row["loss"]) == pytest.approx(weight * float(row["kd"]) + (1 - weight) * float(row["ce"]), rel=1e-4)
    nll = [run.beside(one.id).metrics["evaluation"]["test"]["nll"] for one in planned]
    assert run.metrics["evaluation"]["test"]["nll"] < sum(nll) / 3


def test_a_star_is_trained_and_pooled(profile):
    run = make(profile, "05_ensemble", method="star", seeds=[1, 2, 3], student={})
    assert run.metrics["members"] == sorted(one.id for one in members("star", [1, 2, 3], profile))
    assert run.metrics["pool"]["test"]["ambiguity_probability"] > 0
