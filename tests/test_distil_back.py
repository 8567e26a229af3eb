"""One student in place of an ensemble: taught by the pool of another method's members."""

import pytest
from tiny_study import make

from kdlib.errors import KdlibError
from kdlib.study.plan import Planner


def members(seeds=(1,), profile="smoke", **options):
    return Planner(profile).members("distil_back", list(seeds), **options)


def pool(one):
    return one.inputs.get("targets", one).inputs["teacher"]


def test_the_pool_of_another_methods_members_teaches_each_student():
    plan = Planner("smoke")
    found = members([4, 7], of="bagging", options={"share": 0.5}, teachers=[1, 2, 3])
    teacher = plan.ensemble(plan.members("bagging", [1, 2, 3], share=0.5))
    assert [one.id for one in found] == [plan.student(seed=seed, teacher=teacher).id for seed in (4, 7)]
    assert {pool(one).id for one in found} == {teacher.id}


def test_how_many_teach_is_counted_from_the_first_seed_and_is_as_many_as_learn_unless_it_says():
    plan = Planner("smoke")
    for seeds, teachers, expected in (([5], 3, [5, 6, 7]), ([2, 9], None, [2, 9])):
        wanted = plan.ensemble([plan.student(seed=seed) for seed in expected])
        assert {pool(one).id for one in members(seeds, teachers=teachers)} == {wanted.id}


def test_members_that_teach_may_be_unlike_the_student():
    plan, ce = Planner("smoke"), {"objective": "ce"}
    (one,) = members(student={"layers": 2}, options={"student": ce}, teachers=2, pool="logit")
    teacher = plan.ensemble([plan.student(**ce, seed=seed) for seed in (1, 2)], "logit")
    assert one.id == plan.student(layers=2, seed=1, teacher=teacher).id
    (looped,) = members(student={"objective": "online_kd"}, teachers=2)
    assert looped.inputs["teacher"].kind == "ensemble"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`teachers` must be at least 2, .*got 1 of independent"),
        ({"teachers": [3]}, "`teachers` must be at least 2, .*got 1 of independent"),
        ({"teachers": 0}, "`teachers` must be at least 2, .*got 0 of independent"),
        ({"teachers": 2, "of": "distil_back"}, "formed by another method, got 2 of distil_back"),
        ({"teachers": [1, 1]}, "seeds must be unique"),
        ({"teachers": 2, "of": "magic"}, "method must be one of"),
        ({"teachers": 2, "options": {"share": 0.5}}, "Options of method independent must be among vary"),
        ({"teachers": 2, "student": {"objective": "ce"}}, "objective must be kd or online_kd .*got ce"),
        ({"teachers": 2, "student": {"targets": {"kind": "dense"}}, "options": {"student": {}}}, "must not be dense"),
        ({"number": 2}, "must be among of, options, teachers, pool, got number: Extra inputs"),
    ],
)
def test_what_is_no_pool_is_refused(options, message):
    with pytest.raises(KdlibError, match=message):
        members(**options)


def test_a_student_is_trained_from_cached_targets_of_the_pool_and_pooled(profile):
    run = make(profile, "05_ensemble", method="distil_back", options={"teachers": 2}, seeds=[3], student={"seed": 3})
    (one,) = members([3], profile, teachers=2, student={"seed": 3})
    assert run.metrics["members"] == [one.id]
    targets = run.beside(run.beside(one.id).settings["inputs"]["targets"])
    teacher = run.beside(targets.settings["inputs"]["teacher"])
    assert teacher.kind == "ensemble" and len(teacher.metrics["members"]) == 2
    assert targets.metrics["work"]["teacher_forward"]["flops"] > 0
