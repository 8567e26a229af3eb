"""Members that are unlike models, in turn."""

import pytest
from tiny_study import make

from kdlib.errors import KdlibError
from kdlib.study.plan import Planner

CE = {"objective": "ce"}


def members(variants=None, seeds=(1, 2, 3), profile="smoke", **options):
    return Planner(profile).members("heterogeneous", list(seeds), **options | ({"variants": variants} if variants else {}))


def test_variants_take_turns_and_differ_in_what_they_say_alone():
    variants = [{"layers": 2}, {"hidden_size": 64, "learning_rate": 0.002}]
    plan, found = Planner("smoke"), members(variants, [3, 1, 2], student=CE)
    wanted = [(3, variants[0]), (1, variants[1]), (2, variants[0])]
    assert [one.id for one in found] == [plan.student(**CE, **variant, seed=seed).id for seed, variant in wanted]


def test_architectures_take_turns_unless_it_says_otherwise():
    assert [one.parameters.architecture for one in members(seeds=[1, 2, 3, 4])] == ["llama", "gpt2", "qwen3", "llama"]


@pytest.mark.parametrize(
    "variants",
    [[{"layers": 2}, {"layers": 3}, {"layers": 2}], [{}, {"layers": 1}], [{"seed": 1}, {"seed": 2}], [{}, {"compile": True}]],
    ids=["equal", "the section's own value", "seeds", "what shapes no result"],
)
def test_variants_that_are_one_student_are_refused(variants):
    with pytest.raises(KdlibError, match="`variants` must be different students, got"):
        members(variants)


def test_what_is_no_list_of_students_is_refused():
    with pytest.raises(KdlibError, match="must be among variants, got variants: .*at least 2"):
        members([{"layers": 2}])
    with pytest.raises(KdlibError, match="Unknown parameter 'depth'"):
        members([{"depth": 2}, {}])
    with pytest.raises(KdlibError, match="seeds must be unique"):
        members(seeds=[1, 1])


def test_unlike_members_are_trained_and_pooled(profile):
    variants = [{"layers": 2}, {"architecture": "gpt2", "hidden_size": 16}]
    asked = {"method": "heterogeneous", "options": {"variants": variants}, "seeds": [1, 2], "student": CE}
    run = make(profile, "05_ensemble", **asked)
    found = [run.beside(one.id) for one in members(variants, [1, 2], profile, student=CE)]
    assert run.metrics["members"] == sorted(one.id for one in found)
    sizes = [one.metrics["parameters"]["total"] for one in found]
    assert sizes[0] != sizes[1] and run.metrics["parameters"]["total"] == sum(sizes)
    nll = [one.metrics["evaluation"]["test"]["nll"] for one in found]
    assert run.metrics["evaluation"]["test"]["nll"] < sum(nll) / 2
