"""A chain of students, each taught by the one before."""

import pytest

from kdlib import methods
from kdlib.study import design, profiles
from kdlib.study.plan import Planner, step


@pytest.mark.parametrize("student", [{}, {"objective": "online_kd"}], ids=["kd", "online_kd"])
def test_each_member_is_taught_by_the_one_before(student):
    plan = Planner("smoke")
    first, second, third = methods.load("chain", seeds=[1, 2, 3], student=student).members(plan)
    assert first.id == plan.student(**student, seed=1).id
    for taught, teacher in ((second, first), (third, second)):
        source = taught if student else taught.inputs["targets"]
        assert source.inputs["teacher"].id == teacher.id
        # But for its teacher and seed a member is the profile's student.
        plain = plan.student(**student, seed=taught.parameters.seed).parameters
        assert taught.parameters.model_copy(update={"teacher": plain.teacher}) == plain


def test_a_longer_chain_goes_on_from_a_shorter_one():
    plan = Planner("smoke")
    short, long = (methods.load("chain", seeds=seeds).members(plan) for seeds in ([1, 2], [1, 2, 3]))
    assert [one.id for one in long[:2]] == [one.id for one in short]


def test_a_member_is_found_again_by_the_id_of_its_teacher():
    (*_, entry) = (one for one in design.comparison("smoke") if one.method == "chain (logit pool)")
    named = entry.members[1].parameters
    assert named.teacher == entry.members[0].id
    # As the notebook of the member does, in a process that has planned nothing yet.
    settings = {name: value for name, value in named.model_dump().items() if name != "profile"}
    assert step(profiles.parameters("04_student", "smoke", **settings)).id == entry.members[1].id
