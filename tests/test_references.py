"""Runs that name other runs: students taught by students and by ensembles, chains, checkpoints, and names that lead nowhere."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from test_training import same
from tiny import dense_log_probs, predicting
from tiny_study import BLOCK_LENGTH, log, make, saved, step, train_split

from kdlib.data.corpus import load_split
from kdlib.errors import KdlibError
from kdlib.runs import artefacts
from kdlib.runs.make import make as make_run
from kdlib.study import design, plan, profiles

CE = {"student": {"objective": "ce", "seed": 1, "epochs": 4, "batch_size": 4}}
OTHER = {"student": {"objective": "ce", "seed": 2, "epochs": 4, "batch_size": 4}}
# Taught by whom, by the members whose models are pooled, and how.
TEACHERS = {
    "student": (CE, [CE], "mean"),
    "ensemble": ({"ensemble": {"members": [CE, OTHER], "pool": "logit"}}, [CE, OTHER], "geometric"),
    "method": (
        {"ensemble": {"student": {"objective": "ce", "epochs": 4, "batch_size": 4}, "seeds": [1, 2]}},
        [CE, OTHER],
        "mean",
    ),
    "list": ([CE, OTHER], [CE, OTHER], "mean"),
    "one and a teacher": ([CE, "scratch"], [CE, "scratch"], "mean"),
}


def model_of(profile, ref):
    return artefacts.load_model(make_run(plan.Planner(profile).resolve(ref)))


def pooled(profile, members, pool, split):
    """Log-probabilities [positions, V] of the pool, from all logits of the members."""
    found = [dense_log_probs(model_of(profile, one), split, block_length=BLOCK_LENGTH) for one in members]
    stacked = torch.stack(found)
    if pool == "geometric":
        return torch.log_softmax(stacked.mean(0), -1)
    return torch.logsumexp(stacked, 0) - np.log(len(found))


# One step on all rows at once: what it logs is the loss of the student as it begins, on the whole of the text.
ONE_STEP = {"epochs": 1, "batch_size": 10**6, "kd_weight": 1.0, "seed": 5}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_is_taught_by_any_run_in_the_loop(profile, name):
    teacher, members, pool = TEACHERS[name]
    train = train_split(profile)
    run = make(profile, objective="online_kd", teacher=teacher, **ONE_STEP)
    begun = dense_log_probs(model_of(profile, {"student": {"epochs": 0, "seed": 5}}), train, block_length=BLOCK_LENGTH)
    log_t, used = pooled(profile, members, pool, train), predicting(train)
    expected = (log_t.exp() * (log_t - begun))[used].sum(1).mean().item()
    assert float(log(run)[0]["kd"]) == pytest.approx(expected, rel=1e-4)
    assert run.settings["inputs"]["teacher"] == plan.Planner(profile).resolve(teacher).id
    assert run.metrics["training"]["teacher_flops"] > 0


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_is_taught_by_the_cached_targets_of_any_run(profile, name):
    teacher, members, pool = TEACHERS[name]
    train, k = train_split(profile), 64
    run = make(profile, objective="kd", teacher=teacher, targets={"kind": "topk", "top_k": k}, **ONE_STEP)
    begun = dense_log_probs(model_of(profile, {"student": {"epochs": 0, "seed": 5}}), train, block_length=BLOCK_LENGTH)
    used = predicting(train)
    log_t, log_s = pooled(profile, members, pool, train)[used], begun[used]
    # Kept are the k most likely tokens, and the mass of all others as one more outcome.
    values, ids = log_t.topk(k, dim=-1)
    rest_t, rest_s = (1 - one.exp().sum(1) for one in (values, log_s.gather(1, ids)))
    expected = (values.exp() * (values - log_s.gather(1, ids))).sum(1) + rest_t * (rest_t / rest_s).log()
    # Weights are one byte each.
    assert float(log(run)[0]["kd"]) == pytest.approx(expected.mean().item(), rel=0.02)
    targets = make(profile, "03_targets", teacher=teacher, kind="topk", top_k=k)
    assert run.settings["inputs"]["targets"] == targets.id
    assert targets.settings["inputs"]["teacher"] == plan.Planner(profile).resolve(teacher).id
    labels = torch.from_numpy(train.tokens[used + 1].astype(np.int64))
    assert targets.metrics["teacher_nll"] == pytest.approx(-log_t.gather(1, labels[:, None]).mean().item(), rel=0.02)


def test_a_student_becomes_more_like_the_student_that_taught_it(profile):
    options = {"epochs": 4, "batch_size": 4, "kd_weight": 1.0, "seed": 5}
    test = load_split(make(profile, "01_corpus").path / "data", "test")
    used = predicting(test)
    log_t = dense_log_probs(model_of(profile, CE), test, block_length=BLOCK_LENGTH)[used]

    def distance_to_its_teacher(run):
        log_s = dense_log_probs(artefacts.load_model(run), test, block_length=BLOCK_LENGTH)[used]
        return (log_t.exp() * (log_t - log_s)).sum(1).mean().item()

    ids = {"objective": "online_kd", "teacher": CE}, {"targets": {"kind": "dense"}, "teacher": CE}
    taught = [distance_to_its_teacher(make(profile, **options, **one)) for one in ids]
    others = [distance_to_its_teacher(make(profile, **options, objective="online_kd"))]
    assert max(taught) < 0.5 * min(others)
    assert taught[0] == pytest.approx(taught[1], rel=0.1)


@pytest.mark.parametrize("name", ["student", "ensemble"])
def test_the_fidelity_of_a_student_is_to_whoever_taught_it(profile, name):
    teacher, members, pool = TEACHERS[name]
    student = {"objective": "kd", "teacher": teacher, "targets": {"kind": "topk", "top_k": 200}, "kd_weight": 1.0}
    found = make(profile, "06_fidelity", student=student, tokens=100_000).metrics
    test = load_split(make(profile, "01_corpus").path / "data", "test")
    log_s = dense_log_probs(artefacts.load_model(make(profile, **student, seed=1)), test, block_length=BLOCK_LENGTH)
    log_t, used = pooled(profile, members, pool, test), predicting(test)
    expected = (log_t.exp() * (log_t - log_s))[used].sum(1).mean().item()
    assert found["teacher_kl"] == pytest.approx(expected, rel=1e-4)
    # Of 300 tokens the 200 likeliest and the mass of the rest: nearly the whole distribution.
    assert found["angle_initial"] < 5 and found["angle_trained"] < 15


def test_a_copy_of_a_student_has_nothing_to_learn_from_it(profile):
    run = make(profile, objective="online_kd", teacher=CE, initialisation="identical", kd_weight=1.0)
    assert float(log(run)[0]["kd"]) < 1e-6
    untrained = make(profile, objective="ce", teacher=CE, initialisation="identical", epochs=0)
    assert same(saved(untrained), saved(make(profile, **CE["student"])))


def test_a_chain_is_the_same_runs_however_it_is_spelled(profile):
    second = {"student": {"teacher": CE, "seed": 2}}
    third = {"teacher": second, "seed": 3, "targets": {"kind": "dense"}}
    planner = plan.Planner(profile)
    one = planner.student(**CE["student"])
    two = planner.student(teacher=one, seed=2)
    spelled = [
        step(profile, **third),
        planner.student(**third),
        planner.student(**third | {"teacher": two}),
        planner.student(**third | {"teacher": two.id}),
        planner.student(**third | {"teacher": {"student": {"teacher": one, "seed": 2}}}),
        planner.student(**third | {"teacher": {"student": {"teacher": one.id, "seed": 2, "objective": "kd"}}}),
        planner.resolve({"student": third}),
    ]
    assert len({chain.id for chain in spelled}) == 1
    for chain in spelled:
        kinds = [link.kind for link in chain.upstream()]
        assert kinds == ["corpus", "student", "targets", "student", "targets", "student"]
    other = planner.student(**third | {"teacher": planner.student(teacher=OTHER, seed=2)})
    assert other.id != spelled[0].id, "what is upstream counts"
    assert make_run(spelled[-1]).settings["inputs"]["targets"] == spelled[0].inputs["targets"].id
    assert make_run(spelled[0].inputs["targets"]).settings["inputs"]["teacher"] == two.id


def test_an_ensemble_is_the_same_run_however_its_members_are_named(profile):
    planner, student = plan.Planner(profile), {"objective": "ce", "epochs": 4, "batch_size": 4}
    first, second = planner.student(**CE["student"]), planner.student(**OTHER["student"])
    spelled = [
        planner.run("ensemble", method="independent", seeds=[1, 2], student=student),
        planner.run("ensemble", seeds=[2, 1], student=student),
        planner.run("ensemble", members=[CE, OTHER]),
        planner.run("ensemble", members=[OTHER, CE], seeds=[7], student={"objective": "kd"}, method="bagging"),
        planner.ensemble([first, second]),
        planner.ensemble([second.id, first.id]),
        planner.ensemble([first, OTHER]),
        planner.resolve([CE, OTHER]),
        planner.resolve([first.id, second]),
        planner.resolve({"ensemble": {"seeds": [1, 2], "student": student}}),
    ]
    assert len({one.id for one in spelled}) == 1
    assert planner.ensemble([first, second], pool="logit").id != spelled[0].id
    assert planner.ensemble([first]).id != spelled[0].id
    run = make_run(spelled[2])
    assert run.metrics["members"] == sorted([first.id, second.id])
    test = load_split(make(profile, "01_corpus").path / "data", "test")
    used = predicting(test)
    labels = torch.from_numpy(test.tokens[used + 1].astype(np.int64))
    expected = -pooled(profile, [CE, OTHER], "mean", test)[used].gather(1, labels[:, None]).mean().item()
    assert run.metrics["evaluation"]["test"]["nll"] == pytest.approx(expected, rel=1e-5)


def test_an_ensemble_of_unlike_runs_pools_them(profile):
    members = ["scratch", CE, {"student": {"seed": 3}}]
    run = make(profile, "05_ensemble", members=members)
    assert {one.split("-")[0] for one in run.metrics["members"]} == {"teacher", "student"}
    single = [make_run(plan.Planner(profile).resolve(one)).metrics["evaluation"]["test"]["nll"] for one in members]
    assert run.metrics["evaluation"]["test"]["nll"] < np.mean(single), "the NLL of a mean is below the mean NLL (Jensen)"


def test_one_run_named_twice_is_no_ensemble(profile):
    planner = plan.Planner(profile)
    for twice in ([CE, CE], [CE, planner.student(**CE["student"])], [{"student": {}}, {"student": {"objective": "kd"}}]):
        with pytest.raises(KdlibError, match="Members of an ensemble must be different runs, got student"):
            planner.ensemble(twice)


def test_a_checkpoint_of_a_student_teaches_as_the_student_does(profile):
    student = make(profile, **CE["student"])
    folder = str(student.path / "model")
    teacher = make_run(plan.Planner(profile).resolve(folder))
    assert teacher.kind == "teacher" and same(saved(teacher), saved(student))
    for split, found in student.metrics["evaluation"].items():
        assert teacher.metrics["evaluation"][split]["nll"] == pytest.approx(found["nll"], rel=1e-6)
    options = {"objective": "online_kd", "seed": 5}
    by_folder, by_run = make(profile, teacher=folder, **options), make(profile, teacher=CE, **options)
    assert same(saved(by_folder), saved(by_run))
    assert by_folder.settings["inputs"]["teacher"] == teacher.id != student.id
    cached = [make(profile, teacher=ref, targets={"kind": "dense"}, seed=5) for ref in (folder, CE)]
    assert same(*(saved(run) for run in cached))


def test_a_checkpoint_counts_by_its_content_wherever_it_lies(profile, tmp_path):
    student, other = make(profile, **CE["student"]), make(profile, **OTHER["student"])
    shutil.copytree(student.path / "model", tmp_path / "copy")
    planner = plan.Planner(profile)
    found = [planner.resolve(str(path)) for path in (student.path / "model", tmp_path / "copy", other.path / "model")]
    assert found[0].id == found[1].id != found[2].id
    assert str(tmp_path) not in json.dumps(found[1].settings)
    # A profile's own name for a source stays part of the id.
    named = planner.teacher(adaptation="frozen", source="smollm2-135m-instruct")
    assert named.settings["parameters"]["source"] == "smollm2-135m-instruct"


# Names that lead nowhere


def written(profile, folder, **sections):
    """The profile with other sections, in a file of its own."""
    with open(profile, encoding="utf-8") as file:
        values = yaml.safe_load(file)
    for section, changes in sections.items():
        values[section] = values[section] | changes
    path = folder / "odd.yaml"
    path.write_text(yaml.safe_dump(values | {"name": "odd"}), encoding="utf-8")
    return str(path)


def test_a_run_without_a_model_is_no_teacher_member_or_writer():
    planner = plan.Planner("smoke")
    for kind, leaves in (("corpus", "data"), ("targets", "targets"), ("scores", "scores"), ("fidelity", "results alone")):
        run = {kind: {}}
        for ask in (
            lambda run=run: planner.student(teacher=run),
            lambda run=run: planner.student(objective="online_kd", teacher=run),
            lambda run=run: planner.student(objective="ce", text={"generated": {"by": run}}),
            lambda run=run: planner.targets(teacher=run),
            lambda run=run: planner.ensemble(["scratch", run]),
        ):
            with pytest.raises(KdlibError, match=f"must leave model, got .*{kind}-.*which leaves {leaves}"):
                ask()


def test_what_an_ensemble_cannot_give_is_refused_in_the_plan():
    planner, pool = plan.Planner("smoke"), [CE, OTHER]
    with pytest.raises(KdlibError, match="kind of an ensemble's targets must not be dense"):
        planner.student(teacher=pool, targets={"kind": "dense"})
    for changes in ({"features": {"of": "hidden_mse"}}, {"initialisation": "identical"}):
        with pytest.raises(KdlibError, match="teacher must be one model for features and initialisation, got ensemble of 2"):
            planner.student(objective="online_kd", teacher=pool, **changes)
    with pytest.raises(KdlibError, match="members: .*at least 1 item"):
        planner.ensemble([])


def test_a_run_that_is_not_planned_is_refused_by_name(profile):
    for ask in (
        lambda: step(profile, teacher="student-0123456789ab"),
        lambda: plan.Planner(profile).ensemble([CE, "student-0123456789ab"]),
        lambda: plan.Planner(profile).scores(scorer="student-0123456789ab"),
    ):
        with pytest.raises(KdlibError, match="'student-0123456789ab' must be the id or label of a run that profile"):
            ask()


def test_a_planned_run_may_be_named_by_its_id(profile):
    planned = plan.Planner(profile).student(objective="ce", seed=2)
    found = step(profile, objective="online_kd", teacher=planned.id)
    assert found.inputs["teacher"].id == planned.id


@pytest.mark.parametrize(
    "student",
    [
        {"teacher": {"student": {"seed": 3}}},
        {"teacher": {"student": {}}},
        {"teacher": [{"student": {"seed": 3}}, "scratch"]},
        {"teacher": {"ensemble": {"seeds": [1, 2]}}},
        {"text": {"selected": {"by": {"student": {"seed": 4}}, "measure": "nll", "mode": "highest", "share": 0.5}}},
    ],
)
def test_a_student_that_leads_back_to_itself_is_refused(profile, tmp_path, student):
    odd = written(profile, tmp_path, student=student)
    with pytest.raises(KdlibError, match="A run must not lead back to itself, got (student kd|targets sampled|scores by nll)"):
        plan.Planner(odd).student()


def test_an_id_in_a_profile_that_no_run_has_is_refused(profile, tmp_path):
    odd = written(profile, tmp_path, student={"teacher": "student-0123456789ab"})
    with pytest.raises(KdlibError, match="'student-0123456789ab' must be"):
        plan.Planner(odd).student()


def test_a_profile_may_name_a_run_of_its_own_plan_that_needs_no_teacher(profile, tmp_path):
    first = plan.Planner(profile).student(objective="ce", seed=2)
    odd = written(profile, tmp_path, student={"teacher": first.id})
    found = plan.Planner(odd).student()
    assert found.inputs["targets"].inputs["teacher"].id == first.id
    assert found.id in {one.id for one in design.study(odd)}


def test_a_chain_in_a_profile_ends_where_a_student_needs_no_teacher(profile, tmp_path):
    odd = written(profile, tmp_path, student={"teacher": {"student": {"objective": "ce"}}})
    found = plan.Planner(odd).student()
    assert [one.kind for one in found.upstream()] == ["corpus", "student", "targets", "student"]
    assert profiles.load(odd).student.teacher == {"student": {"objective": "ce"}}
