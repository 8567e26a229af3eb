"""Members that learn from the text on which the pool so far misses the teacher most."""

import numpy as np
import pytest
from tiny_study import make, train_split

from kdlib.analysis import ledger
from kdlib.data import selected, text
from kdlib.errors import KdlibError
from kdlib.study.plan import Planner


def members(seeds=(1, 2, 3), profile="smoke", **options):
    return Planner(profile).members("boosting", list(seeds), **options)


def scores(one):
    return one.inputs["scores"]


def test_members_are_chosen_text_by_the_pool_of_those_before_them():
    plan, found = Planner("smoke"), members([1, 2, 3, 4], share=0.1)
    assert found[0].id == plan.student(seed=1).id
    assert scores(found[1]).inputs["scorer"].id == found[0].id, "the pool of one member is that member"
    for number in (2, 3):
        assert scores(found[number]).inputs["scorer"].id == plan.ensemble(found[:number]).id
    for one in found[1:]:
        assert scores(one).parameters.measure == "kl" and scores(one).inputs["targets"].id == one.inputs["targets"].id
        plain = plan.student(seed=one.parameters.seed).parameters
        assert one.parameters.model_copy(update={"text": plain.text, "epochs": plain.epochs}) == plain
        assert one.parameters.epochs == pytest.approx(plain.epochs / 0.1)
    assert [one.id for one in members([1, 2, 3], share=0.1)] == [one.id for one in found[:3]]


def test_weighted_members_read_all_of_the_text_as_often_as_the_student():
    first, second = members([1, 2], mode="weighted", temperature=0.5)
    assert second.parameters.epochs == first.parameters.epochs
    assert second.settings["parameters"]["text"] == {"selected": {"mode": "weighted", "temperature": 0.5}}


def test_kl_is_to_the_targets_that_the_member_reads():
    for targets in ({"kind": "dense"}, {"draws": 8}):
        one = members([1, 2], student={"targets": targets})[1]
        assert scores(one).inputs["targets"].id == one.inputs["targets"].id == Planner("smoke").targets(**targets).id
    looped = members([1, 2], student={"objective": "online_kd"})[1]
    assert scores(looped).inputs["targets"].id == Planner("smoke").targets().id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "weighted", "share": 0.1}, "share must be left out with mode=weighted, got 0.1"),
        ({"temperature": 2.0}, "temperature must be left out with mode=highest, got 2.0"),
        ({"mode": "lowest"}, "must be among mode, share, temperature, pool, got mode"),
        ({"share": 1.0}, "share: .*less than 1"),
        ({"seeds": [1, 1]}, "seeds must be unique"),
        ({"student": {"text": "unigram", "objective": "ce"}}, "text of student must be left out"),
        ({"student": {"targets": {"kind": "topk"}}}, "kind of targets must be dense, sampled or topk_sampled for measure kl, got topk"),
    ],
)
def test_what_cannot_be_boosted_is_refused(options, message):
    with pytest.raises(KdlibError, match=message):
        members(**{"seeds": [1, 2]} | options)


def test_boosted_members_are_trained_on_the_worst_documents_pooled_and_charged(profile):
    student = {"batch_size": 1}
    asked = {"method": "boosting", "options": {"share": 0.25}, "seeds": [1, 2, 3], "student": student}
    run, planned = make(profile, "05_ensemble", **asked), members([1, 2, 3], profile, share=0.25, student=student)
    assert run.metrics["members"] == sorted(one.id for one in planned)
    train, found = train_split(profile), [run.beside(one.id) for one in planned]
    for one, made in zip(planned[1:], found[1:], strict=True):
        given = text.Given(train, None, 32, one.parameters.seed, {"scores": run.beside(scores(one).id)})
        taken = set(text.way(one.parameters.text).take(given).documents)
        table = selected.scores(train, np.load(run.beside(scores(one).id).path / "scores" / "scores.npy"))
        inside = table.document.isin(taken)
        assert table.score[inside].min() >= table.score[~inside].max()
        assert table.tokens[inside].sum() == pytest.approx(0.25 * table.tokens.sum(), abs=table.tokens.max() / 2)
        # In batches of one row the steps of an epoch are its rows.
        assert made.metrics["training"]["steps"] == pytest.approx(found[0].metrics["training"]["steps"], rel=0.1)
    each = [run.beside(scores(one).id).metrics["work"]["scoring"]["flops"] for one in planned[1:]]
    assert each[1] == 2 * each[0] > 0, "the second pass is of a pool of two"
    parts = [ledger.work(run.beside(one.id)) for one in run_upstream(planned)]
    for name in ("train", "scoring", "teacher_forward"):
        charged = ledger.cost("tiny", run, teacher_training=False).flops[name]
        assert charged == sum(part[name]["flops"] for one, part in zip(run_upstream(planned), parts, strict=True) if one.kind != "teacher")
    assert ledger.cost("tiny", run, teacher_training=False).flops["scoring"] == sum(each)


def run_upstream(planned):
    """Every run behind these members, once."""
    return list({one.id: one for member in planned for one in member.upstream()}.values())


def test_a_weighted_member_is_trained_and_pooled(profile):
    options = {"mode": "weighted", "temperature": 0.5}
    run = make(profile, "05_ensemble", method="boosting", options=options, seeds=[1, 2], student={})
    assert run.metrics["members"] == sorted(one.id for one in members([1, 2], profile, **options))


# Residuals


def test_residual_members_are_beside_those_before_them():
    plan, found = Planner("smoke"), members([1, 2, 3], mode="residual", pool="probability")
    assert found[0].id == plan.student(seed=1).id
    for number in (1, 2):
        beside = {name: one.id for name, one in found[number].inputs.items() if name.startswith("beside")}
        assert sorted(beside.values()) == sorted(one.id for one in found[:number])
        assert found[number].settings["parameters"]["beside"] == {"coupling": 1.0, "pool": "probability"}
        plain = plan.student(seed=number + 1).parameters
        assert found[number].parameters.model_copy(update={"beside": None}) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "residual", "share": 0.1}, "share must be left out with mode=residual, got 0.1"),
        ({"mode": "residual", "temperature": 1.0}, "temperature must be left out with mode=residual, got 1.0"),
        ({"pool": "logit"}, "pool must be left out with mode=highest, got logit"),
        ({"mode": "residual", "student": {"divergence": "jsd", "targets": {"kind": "dense"}}}, "beside must stand .* forward_kl, got jsd"),
        ({"mode": "residual", "student": {"objective": "online_kd", "features": {"of": "relation"}}}, "beside must stand without features"),
    ],
)
def test_what_has_no_residual_is_refused(options, message):
    with pytest.raises(KdlibError, match=message):
        members(**options)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"runs": []}, "beside.runs: .*at least 1"),
        ({"runs": [{"student": {}}, {"student": {"seed": 1}}]}, "`runs` of beside must be different runs, got 2, of which 1 differ"),
        ({"runs": [{"ensemble": {}}]}, "`runs` of beside must be one model each, got ensemble of 2"),
        ({"runs": [{"targets": {}}]}, "must leave model, got targets"),
        ({"runs": [{"student": {}}], "coupling": 0.0}, "beside.coupling: .*greater than 0"),
    ],
)
def test_what_a_student_cannot_be_beside_is_refused_in_the_plan(beside, message):
    with pytest.raises(KdlibError, match=message):
        Planner("smoke").student(seed=9, beside=beside)


def test_the_order_of_what_a_student_is_beside_does_not_count():
    plan, runs = Planner("smoke"), [{"student": {"seed": 3}}, {"student": {"seed": 4}}]
    assert plan.student(beside={"runs": runs}).id == plan.student(beside={"runs": runs[::-1]}).id


def test_residual_members_are_trained_in_one_pool_with_those_before_and_pay_for_their_passes(profile):
    student = {"epochs": 3}
    asked = {"method": "boosting", "options": {"mode": "residual"}, "seeds": [1, 2, 3], "student": student, "pool": "logit"}
    run, planned = make(profile, "05_ensemble", **asked), members([1, 2, 3], profile, mode="residual", student=student)
    assert run.metrics["members"] == sorted(one.id for one in planned)
    found = [run.beside(one.id).metrics["work"]["train"]["flops"] for one in planned]
    # Each one more pass, a third of what training the same student takes; an epoch's order says which rows no batch takes.
    assert [found[1] - found[0], found[2] - found[1]] == pytest.approx([found[0] / 3] * 2, rel=0.02) and found[0] > 0
    independent = make(profile, "05_ensemble", seeds=[1, 2, 3], student=student, pool="logit")
    # Its members need not be good alone, and are not.
    mean = [one.metrics["pool"]["validation"]["member_nll_mean"] for one in (run, independent)]
    assert mean[0] > mean[1]
