"""Members on text that the teacher wrote, each on its own."""

import pytest
from tiny_study import BLOCK_LENGTH, make, train_split

from kdlib.data import text
from kdlib.errors import KdlibError
from kdlib.runs import artefacts
from kdlib.study import design
from kdlib.study.plan import Planner

CE = {"objective": "ce"}


def members(seeds=(1, 2), profile="smoke", **options):
    return Planner(profile).members("synthetic", list(seeds), **options)


def test_each_member_has_text_of_its_own_by_the_students_teacher():
    plan, found = Planner("smoke"), members([3, 5], student=CE, temperature=0.7, top_p=0.9)
    for seed, one in zip([3, 5], found, strict=True):
        written = {"seed": seed, "temperature": 0.7, "top_p": 0.9}
        assert one.id == plan.student(**CE, seed=seed, text={"generated": written}).id
        assert one.inputs["writer"].id == plan.teacher(adaptation="scratch").id
    taught = members(student=CE | {"teacher": {"student": {"seed": 9}}})
    assert taught[0].inputs["writer"].id == plan.student(seed=9).id


def test_the_teacher_is_in_the_loop_of_students_that_read_targets_and_tables_say_so():
    assert {one.parameters.objective for one in members()} == {"online_kd"}
    assert {one.parameters.objective for one in members(student=CE)} == {"ce"}
    assert "teacher" in members()[0].inputs and "targets" not in members()[0].inputs
    told = {one.objective for one in design.comparison("smoke") if one.formed == "synthetic"}
    assert told == {"ce"}


def test_a_share_of_the_text_is_read_as_much_more_often():
    whole, part = members(student=CE)[0], members(student=CE, share=0.25)[0]
    assert part.parameters.epochs == 4 * whole.parameters.epochs
    assert part.id != whole.id


def test_what_it_does_not_take_is_refused():
    with pytest.raises(KdlibError, match="text of student must be left out, since the method chooses it, got unigram"):
        members(student=CE | {"text": "unigram"})
    with pytest.raises(KdlibError, match="must be among temperature, top_p, share, got temperature: .*greater than 0"):
        members(temperature=0)
    with pytest.raises(KdlibError, match="seeds must be unique"):
        members([2, 2])


def test_a_seed_of_its_own_writes_the_same_text_for_every_student(profile):
    writer = make(profile, "02_teacher")
    runs, load = {"writer": writer}, artefacts.load_model
    tokenizer = artefacts.load_tokenizer(make(profile, "01_corpus"))

    def written(students, **settings):
        given = text.Given(train_split(profile), tokenizer, BLOCK_LENGTH, students, runs, load)
        return text.way({"generated": settings}).take(given).split.tokens.tolist()

    assert written(1, seed=4) == written(2, seed=4) == written(4)
    assert len(written(4, share=0.5)) == pytest.approx(len(written(4)) / 2, rel=0.1)
    assert written(1) != written(2)


def test_members_are_trained_and_pooled_and_pay_for_their_text(profile):
    student = CE | {"epochs": 0.5}
    run = make(profile, "05_ensemble", method="synthetic", options={"temperature": 0.8}, seeds=[1, 2], student=student)
    found = [run.beside(one.id) for one in members(profile=profile, student=student, temperature=0.8)]
    assert run.metrics["members"] == sorted(one.id for one in found)
    assert all(one.metrics["work"]["generation"]["flops"] > 0 for one in found)
    assert run.metrics["pool"]["test"]["ambiguity_probability"] > 0
