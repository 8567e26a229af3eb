"""Ways to form an ensemble: short modules, as many different members as seeds, and what each way promises."""

import subprocess
import sys

import numpy as np
import pytest
from tiny_study import make, step, train_split

from kdlib import methods
from kdlib.data import text
from kdlib.data.bagged import draw
from kdlib.errors import KdlibError
from kdlib.methods.bagging import Bagging
from kdlib.methods.independent import Independent
from kdlib.study import plan, profiles
from kdlib.study.profiles import REPOSITORY

CE = {"objective": "ce"}


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_a_short_module_with_a_class_of_its_name_that_plans_a_member_a_seed_without_torch(name):
    lines = (REPOSITORY / "kdlib" / "methods" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    code = (
        "import sys; from kdlib import methods; from kdlib.study.plan import Planner\n"
        f"found = methods.load({name!r}, seeds=[1, 2, 5])\n"
        "members = found.members(Planner('smoke'))\n"
        "print(type(found).__name__, type(found).__module__, len(members), len({one.id for one in members}))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "assert {one.kind for one in members} in ({'student'}, {'member'}) and found.members.__doc__ and type(found).__doc__\n"
        "assert members == found.members(Planner('smoke'))\n"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8")
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == [name.title().replace("_", ""), f"kdlib.methods.{name}", "3", "3"]


def test_there_are_methods():
    assert {"independent", "bagging"} <= set(methods.names())


def test_a_method_that_is_not_there_or_takes_no_such_option_is_refused():
    with pytest.raises(KdlibError, match="method must be one of .*bagging, .*independent.*got 'stacking'"):
        methods.load("stacking", seeds=[1])
    with pytest.raises(KdlibError, match="Options of method bagging must be among share, got share: .*got 2"):
        methods.load("bagging", seeds=[1], share=2)
    with pytest.raises(KdlibError, match="Options of method independent must be among vary, got share: Extra inputs"):
        methods.load("independent", seeds=[1], share=0.5)
    with pytest.raises(KdlibError, match="seeds: .*at least 1 item"):
        methods.load("bagging", seeds=[])
    with pytest.raises(KdlibError, match="Unknown parameter 'objectve'"):
        methods.load("bagging", seeds=[1], student={"objectve": "ce"}).members(plan.Planner("smoke"))


@pytest.mark.parametrize("found", [Independent, Bagging])
def test_a_seed_is_a_member_whatever_the_students_settings_say(found):
    members = found(seeds=[4, 2], student={"seed": 1, **CE}).members(plan.Planner("smoke"))
    assert [one.parameters.seed for one in members] == [4, 2]


# Independent


def test_independent_members_differ_in_their_seed_alone():
    planner = plan.Planner("smoke")
    members = Independent(seeds=[3, 1], student=CE).members(planner)
    assert [one.id for one in members] == [planner.student(**CE, seed=seed).id for seed in (3, 1)]
    one, other = (member.parameters.identity() for member in members)
    assert {name for name in one if one[name] != other[name]} == {"seed"}


def test_an_ensemble_is_of_independent_members_unless_it_says_otherwise():
    planner = plan.Planner("smoke")
    found = planner.run("ensemble", seeds=[1, 2], student=CE)
    assert {one.id for name, one in found.inputs.items() if name != "corpus"} == {
        planner.student(**CE, seed=seed).id for seed in (1, 2)
    }


# Bagging


def bagged(profile, seeds, **options):
    return Bagging(seeds=seeds, student=options.pop("student", CE), **options).members(plan.Planner(profile))


def documents(profile, one):
    given = text.Given(train_split(profile), None, 32, one.parameters.seed)
    return text.way(one.parameters.text).take(given).documents


def test_members_of_bagging_differ_in_seed_and_sample_alone():
    one, other = (member.parameters.identity() for member in bagged("smoke", [1, 2]))
    assert {name for name in one if one[name] != other[name]} == {"seed", "text"}
    plain = plan.Planner("smoke").student(**CE, seed=1).parameters.identity()
    assert {name for name in one if one[name] != plain.get(name)} == {"epochs", "text"}


def test_text_of_another_way_is_refused_by_bagging():
    with pytest.raises(KdlibError, match="text of student must be left out, .*got unigram"):
        bagged("smoke", [1], student=CE | {"text": "unigram"})


@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_members_of_bagging_draw_their_documents_with_replacement_and_keep_the_mix(profile, share):
    train = train_split(profile)
    table = train.documents.set_index("document")
    held, longest = (table.groupby("domain").tokens.agg(how) for how in ("sum", "max"))
    found = [documents(profile, one) for one in bagged(profile, range(8), share=share)]
    assert found == [draw(train, share, seed) for seed in range(8)]
    assert len({tuple(sorted(one)) for one in found}) == 8
    assert all(len(set(one)) < len(one) for one in found)
    for one in found:
        taken = table.loc[one].groupby("domain").tokens.sum()
        assert ((taken - share * held).abs() <= longest / 2 + 1e-9).all()
    shares = [table.tokens[one].sum() / held.sum() for one in found]
    assert np.mean(shares) == pytest.approx(share, abs=longest.sum() / held.sum() / 2)
    assert found == [documents(profile, one) for one in bagged(profile, range(8), share=share)]


@pytest.mark.parametrize("student", [CE, {"objective": "kd"}], ids=["ce", "kd"])
def test_a_bagged_member_takes_the_steps_of_the_profiles_student_on_its_sample(profile, student):
    # In batches of one row the steps of an epoch are its rows.
    student = student | {"epochs": 2, "batch_size": 1}
    plain = make(profile, **student, seed=1)
    for member in bagged(profile, [1, 2], student=student):
        run = make(profile, **member.parameters.model_dump(exclude={"profile"}))
        assert run.id == member.id
        steps, expected = run.metrics["training"]["steps"], plain.metrics["training"]["steps"]
        # A sample misses its share by half a document of each domain, and packs into rows of its own.
        assert steps == pytest.approx(expected, rel=0.05)
        taken = train_split(profile).documents.set_index("document").tokens[documents(profile, member)]
        assert run.metrics["training"]["tokens"] == pytest.approx(2 / 0.7 * taken.sum(), rel=0.02)
        assert run.metrics["training"]["tokens"] == pytest.approx(plain.metrics["training"]["tokens"], rel=0.05)


def test_an_ensemble_of_bagging_pools_its_members(profile):
    asked = {"method": "bagging", "options": {"share": 0.6}, "student": CE, "seeds": [1, 2]}
    run = make(profile, "05_ensemble", **asked)
    members = sorted(one.id for one in bagged(profile, [1, 2], share=0.6))
    assert run.metrics["members"] == members
    assert step(profile, "05_ensemble", **asked).label == "bagging ensemble of 2, probability pool"
    nll = [make(profile, **one.parameters.model_dump(exclude={"profile"})).metrics for one in bagged(profile, [1, 2], share=0.6)]
    single = [metrics["evaluation"]["test"]["nll"] for metrics in nll]
    assert run.metrics["evaluation"]["test"]["nll"] < np.mean(single)


def test_a_profiles_methods_are_formed_for_its_comparison():
    from kdlib.study import design

    options = profiles.load("smoke").study.methods
    assert options, "the smoke profile names a method, so that the pipeline forms one"
    entries = design.comparison("smoke")
    for name, asked in options.items():
        found = [one for one in entries if one.method.startswith(name)]
        chosen = {option: value for option, value in asked.items() if option != "method"}
        members = plan.Planner("smoke").members(asked.get("method", name), found[0].step.parameters.seeds, **chosen)
        assert [one.id for one in found[0].members] == [one.id for one in members]
        assert {one.pool for one in found} == set(profiles.load("smoke").study.pools)


def test_every_run_of_every_method_is_the_same_when_its_notebook_plans_it_anew():
    from kdlib.study import design
    from kdlib.study.kinds import kinds

    for one in design.study("smoke"):
        # As in a process that has planned nothing yet, where runs are named by their ids.
        settings = {name: value for name, value in one.parameters.model_dump().items() if name != "profile"}
        assert plan.step(profiles.parameters(kinds()[one.kind].NOTEBOOK, "smoke", **settings)).id == one.id, one.label
