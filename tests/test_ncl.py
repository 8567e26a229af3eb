"""Members that are trained together as runs: planned, trained, interrupted, pooled like any others, and charged once."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_study import log, make, saved, step

from kdlib.analysis import accounts, ledger
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.evaluation.metrics import evaluate
from kdlib.runs import artefacts
from kdlib.study.plan import Planner
from kdlib.training import JointTrainer


def members(seeds=(1, 2), profile="smoke", method="ncl", **options):
    return Planner(profile).members(method, list(seeds), **options)


# The plan


def test_members_are_those_of_one_run_in_the_order_of_their_seeds():
    plan, found = Planner("smoke"), members([5, 2, 7], coupling=0.25, student={"kd_weight": 0.5})
    (joint,) = {one.inputs["joint"].id: one.inputs["joint"] for one in found}.values()
    assert [one.parameters.number for one in found] == [1, 2, 3] and len({one.id for one in found}) == 3
    assert joint.parameters.seeds == [5, 2, 7] and joint.parameters.coupling == 0.25
    assert [one.seed for one in joint.parameters.members] == [5, 2, 7]
    alone = plan.student(kd_weight=0.5, seed=5)
    assert joint.inputs == alone.inputs, "it reads what such a student reads"
    assert joint.settings["parameters"]["student"] | {"seed": 5} == alone.settings["parameters"]


def test_joint_training_is_negative_correlation_learning_at_its_end():
    assert [one.id for one in members(method="joint")] == [one.id for one in members(coupling=1.0)]
    assert {one.id for one in members()}.isdisjoint(one.id for one in members(coupling=1.0))
    assert {one.id for one in members()}.isdisjoint(one.id for one in members(pool="probability"))


def test_a_profiles_section_is_the_members_section(tmp_path):
    plan = Planner("smoke")
    assert plan.run("joint", student={"layers": 1}).id == plan.run("joint").id != plan.run("joint", student={"layers": 2}).id
    taught = plan.student(seed=9, teacher=members()[1])
    assert taught.inputs["targets"].inputs["teacher"].id == members()[1].id, "a member teaches as any model does"


LOOP = {"objective": "online_kd"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": 1.5}, "coupling: .*less than or equal to 1"),
        ({"coupling": -0.5}, "coupling: .*greater than or equal to 0"),
        ({"method": "joint", "coupling": 0.5}, "Options of method joint must be among pool, got coupling"),
        ({"seeds": [1]}, "seeds: .*at least 2"),
        ({"seeds": [1, 1]}, "seeds must be unique"),
        ({"pool": "median"}, "pool: .*probability"),
        ({"student": LOOP | {"features": {"of": "relation"}}}, "must be without features, got"),
        ({"student": {"stages": [{"share": 1.0, "learning_rate_multipliers": {}}]}}, "must be without stages, got"),
        ({"student": {"divergence": "jsd", "targets": {"kind": "dense"}}}, "must be without divergence, got jsd"),
        ({"student": {"beside": {"runs": [{"student": {}}]}}}, "must be without beside, got"),
        ({"student": {"start": {"student": {}}}}, "must be without start, got"),
        ({"student": {"low_precision": "optimizer_and_backward"}}, "must be without low_precision, got optimizer_and_backward"),
        ({"student": {"layers": 0}}, "layers: .*greater than 0"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(options, message):
    with pytest.raises(KdlibError, match=message):
        members(**{"seeds": [1, 2]} | options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": 3}, "`number` must be 1 to 2, one of the members of 2 students together, .* got 3"),
        ({"number": 0}, "number: .*greater than 0"),
        ({"of": {"student": {}}}, "must leave members, got student"),
    ],
)
def test_a_member_that_is_not_there_is_refused_in_the_plan(settings, message):
    with pytest.raises(KdlibError, match=message):
        step("smoke", "09_member", **settings)


def test_students_together_leave_no_model_of_their_own():
    with pytest.raises(KdlibError, match="must leave model, got 2 students together"):
        Planner("smoke").ensemble([{"joint": {}}, {"student": {}}])


# The runs


def weights(run, number):
    return load_file(run.path / "members" / str(number) / "model.safetensors")


@pytest.mark.parametrize("student", [{"objective": "ce"}, {"noise": 0.1}], ids=["ce", "kd"])
def test_without_coupling_members_are_the_students_of_their_seeds_in_the_order_of_the_first(profile, student):
    run, alone = make(profile, "09_joint", coupling=0.0, student=student), make(profile, **student, seed=1)
    for number, one in enumerate((alone, make(profile, **student, seed=2, data_seed=1)), 1):
        found, expected = weights(run, number), saved(one)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    member = make(profile, "09_member", of={"joint": {"coupling": 0.0, "student": student}})
    for split, values in alone.metrics["evaluation"].items():
        assert member.metrics["evaluation"][split]["nll"] == pytest.approx(values["nll"], abs=1e-5)
    # As many operations for both as for two students; each its own share.
    assert abs(run.metrics["work"]["train"]["flops"] - 2 * alone.metrics["work"]["train"]["flops"]) <= 1
    assert member.metrics["training"]["flops"] == alone.metrics["training"]["flops"]
    for name in ("tokens", "steps"):
        assert member.metrics["training"][name] == run.metrics["training"][name] == alone.metrics["training"][name]
    assert member.metrics["parameters"] == alone.metrics["parameters"]
    assert weights(run, 2)["model.norm.weight"].ne(weights(run, 1)["model.norm.weight"]).any()


def test_a_run_that_is_interrupted_ends_with_the_weights_of_one_that_was_not(profile, monkeypatch):
    asked = {"coupling": 0.5, "pool": "probability", "student": {"epochs": 2, "batch_size": 8}}
    planned, stop = step(profile, "09_joint", **asked), []

    def training_step(self, *arguments, **options):
        # Between a checkpoint and the next.
        if not stop and self.state.global_step == self.steps // 2:
            stop.append(self.state.global_step)
            raise KeyboardInterrupt
        return super(JointTrainer, self).training_step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(JointTrainer, "training_step", training_step, raising=False)
        with pytest.raises(KeyboardInterrupt):
            make(profile, "09_joint", **asked)
    assert stop[0] > 0
    resumed = make(profile, "09_joint", **asked)
    again = artefacts.load_model(resumed, "members/2")
    rows = log(resumed)
    (resumed.path.parents[1] / "kept").mkdir(exist_ok=True)
    resumed.path.rename(resumed.path.parents[1] / "kept" / resumed.id)
    whole = make(profile, "09_joint", **asked)
    for number in (1, 2):
        kept = load_file(resumed.path.parents[1] / "kept" / resumed.id / "members" / str(number) / "model.safetensors")
        assert all(torch.equal(value, kept[name]) for name, value in weights(whole, number).items())
    assert [row["loss"] for row in log(whole)] == [row["loss"] for row in rows] and whole.id == planned.id
    assert again.config.num_hidden_layers and not list(whole.path.glob("checkpoints")), "nothing is left to resume from"


@pytest.mark.parametrize("student", [{}, LOOP], ids=["kd", "online_kd"])
def test_members_are_pooled_as_any_students_and_charged_once(profile, student):
    options, student = {"coupling": 0.5}, student or {"targets": {"kind": "topk"}}
    run = make(profile, "05_ensemble", method="ncl", options=options, seeds=[1, 2], student=student, pool="logit")
    planned = members([1, 2], profile, student=student, **options)
    assert run.metrics["members"] == sorted(one.id for one in planned)
    joint = run.beside(planned[0].inputs["joint"].id)
    found = [run.beside(one.id) for one in planned]
    for one in planned:
        kept = weights(joint, one.parameters.number)
        assert all(torch.equal(value, kept[name]) for name, value in saved(run.beside(one.id)).items())
    # The pool of the models that were left is the ensemble.
    pooled = EnsembleForCausalLM.from_members([artefacts.load_model(one) for one in found], "logit")
    text = artefacts.splits(make(profile, "01_corpus"))
    measured = evaluate(pooled, {"test": text["test"]}, 32, temperature=1.0).metrics["evaluation"]["test"]["nll"]
    assert run.metrics["evaluation"]["test"]["nll"] == pytest.approx(measured, rel=1e-6)
    # Charged: the run that trained them, once, and what it read.
    charged = ledger.cost("tiny", run, teacher_training=False)
    trained = joint.metrics["work"]["train"]["flops"]
    assert charged.flops["train"] == trained > 0
    assert [one.id for one in ledger.upstream("tiny", run)].count(joint.id) == 1
    asked = joint.metrics["work"]["teacher_forward"]["flops"]
    assert (asked > 0) == ("objective" in student), "a teacher in the loop is asked once for both"
    members_ = [one.id for one in found]
    row = accounts._work(type("Row", (), {"run": run, "members": members_}))
    assert row["flops"] == trained + asked and row["tokens"] == 2 * joint.metrics["training"]["tokens"]
    assert row["seconds"] == pytest.approx(joint.metrics["training"]["seconds"])


def test_the_log_tells_of_a_member_on_average(profile):
    run = make(profile, "09_joint", coupling=0.5)
    rows = log(run)
    mixed = [0.9 * float(row["kd"]) + 0.1 * float(row["ce"]) for row in rows]
    np.testing.assert_allclose([float(row["loss"]) for row in rows], mixed, rtol=1e-3)
    assert np.mean(mixed[-3:]) < np.mean(mixed[:3])
