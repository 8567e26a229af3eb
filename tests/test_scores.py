"""Scores of the train split: equal to those computed independently, made once, and read by every selection."""

import numpy as np
import pytest
import torch
from tiny import dense_log_probs, predicting
from tiny_study import BLOCK_LENGTH, make, step, train_split

from kdlib.errors import KdlibError
from kdlib.runs import artefacts, scores
from kdlib.study import plan, profiles

CE = {"student": {"objective": "ce", "seed": 1}}
OTHER = {"student": {"objective": "ce", "seed": 2}}
POOLED = {"ensemble": {"members": [CE, OTHER], "pool": "logit"}}


def kept(run):
    return np.load(run.path / "scores" / "scores.npy")


def log_probs(profile, name):
    """Log-probabilities [positions, V] of whoever scores, from all logits of the models themselves."""
    runs = {
        "teacher": [("02_teacher", {})],
        "student": [("04_student", CE["student"])],
        "pool": [("04_student", one["student"]) for one in (CE, OTHER)],
    }
    train = train_split(profile)
    models = [artefacts.load_model(make(profile, notebook, **settings)) for notebook, settings in runs[name]]
    return torch.stack([dense_log_probs(model, train, block_length=BLOCK_LENGTH) for model in models])


def measured(log_p, split, measure):
    """NLL or entropy [positions], 0 where nothing is predicted."""
    found, used = np.zeros(len(split.tokens)), predicting(split)
    if measure == "nll":
        found[used] = -log_p[used, split.tokens[used + 1].astype(np.int64)].numpy()
    else:
        found[used] = -(log_p[used].exp() * log_p[used]).sum(1).numpy()
    return found


@pytest.mark.parametrize("measure", ["nll", "entropy"])
def test_scores_of_a_model_are_those_of_all_its_logits(profile, measure):
    train = train_split(profile)
    arithmetic = {"mean": torch.logsumexp(log_probs(profile, "pool"), 0) - np.log(2)}
    geometric = torch.log_softmax(log_probs(profile, "pool").mean(0), -1)
    expected = {
        "teacher": ("scratch", log_probs(profile, "teacher")[0]),
        "student": (CE, log_probs(profile, "student")[0]),
        "list": ([CE, OTHER], arithmetic["mean"]),
        "logit pool": (POOLED, geometric),
    }
    for name, (scorer, log_p) in expected.items():
        run = make(profile, "07_scores", scorer=scorer, measure=measure)
        np.testing.assert_allclose(kept(run), measured(log_p, train, measure), rtol=1e-4, atol=1e-5, err_msg=name)
        found = kept(run)[predicting(train)]
        assert run.metrics["tokens"] == len(found)
        assert run.metrics["mean"] == pytest.approx(found.mean(), rel=1e-5)
        assert [run.metrics[one] for one in ("low", "median", "high")] == pytest.approx(
            np.percentile(found, [5, 50, 95]), rel=1e-5
        )
    assert not np.allclose(measured(arithmetic["mean"], train, measure), measured(geometric, train, measure), atol=1e-3)


@pytest.mark.parametrize("measure", ["nll", "entropy"])
@pytest.mark.parametrize(
    "targets",
    [{}, {"kind": "topk", "top_k": 4}, {"kind": "dense"}, {"teacher": CE}, {"temperature": 2.0}],
    ids=["sampled", "topk", "dense", "student's", "warm"],
)
def test_scores_of_targets_are_what_was_kept_beside_them(profile, targets, measure):
    train = train_split(profile)
    run = make(profile, "07_scores", scorer={"targets": targets}, measure=measure)
    log_p = log_probs(profile, "student" if "teacher" in targets else "teacher")[0]
    log_p = torch.log_softmax(log_p / targets.get("temperature", 1.0), -1)
    found, expected = kept(run), measured(log_p, train, measure)
    # Each is kept in one byte: off by sqrt(nats) / 31 at most.
    assert (np.abs(found - expected) <= np.sqrt(expected) / 31 + 1e-3).all()
    assert found[predicting(train)].mean() == pytest.approx(expected[predicting(train)].mean(), rel=0.02)
    assert set(run.settings["inputs"]) == {"corpus", "scorer"}
    assert run.settings["inputs"]["scorer"] == make(profile, "03_targets", **targets).id


def test_a_scorer_counts_by_its_run_however_it_is_named(profile):
    planner = plan.Planner(profile)
    first, second = planner.student(**CE["student"]), planner.student(**OTHER["student"])
    spelled = [[CE, OTHER], [OTHER, CE], [first, second], [first.id, second.id], planner.ensemble([first, second])]
    spelled += [{"ensemble": {"members": [CE, OTHER]}}, {"ensemble": {"seeds": [1, 2], "student": {"objective": "ce"}}}]
    assert len({planner.scores(scorer=one).id for one in spelled}) == 1
    assert planner.scores(scorer=CE).id == planner.scores(scorer=first).id == planner.scores(scorer=first.id).id
    assert len({planner.scores(scorer=one).id for one in (CE, OTHER, POOLED, "scratch", {"targets": {}})}) == 5
    assert planner.scores().id == planner.scores(scorer={"targets": {}}, measure="nll").id
    assert planner.scores(measure="entropy").id != planner.scores().id


def test_scores_are_made_once_and_shared_by_all_selections(profile, monkeypatch):
    made, produce = [], scores.produce

    def watched(one, inputs, folder):
        made.append(one.id)
        return produce(one, inputs, folder)

    monkeypatch.setattr(scores, "produce", watched)
    by = {"by": {"student": {"objective": "ce", "seed": 7}}, "measure": "nll"}
    asked = [
        {"objective": "ce", "text": {"selected": by | {"mode": "highest", "share": 0.4}}},
        {"objective": "ce", "text": {"selected": by | {"mode": "lowest", "share": 0.3}}, "seed": 2},
        {"objective": "kd", "text": {"selected": by | {"mode": "weighted", "temperature": 1.0}}},
    ]
    read = {make(profile, **changes).settings["inputs"]["scores"] for changes in asked}
    own = step(profile, "07_scores", scorer=by["by"], measure="nll").id
    assert read == {own} and made == [own]


def test_a_students_own_targets_score_unless_it_says_otherwise(profile):
    selected = {"text": {"selected": {"measure": "entropy", "mode": "highest", "share": 0.5}}}
    for changes in ({}, {"targets": {"kind": "dense"}}, {"teacher": CE}, {"objective": "ce"}, {"temperature": 2.0}):
        one = step(profile, **changes, **selected)
        targets = step(profile, **changes | {"objective": "kd"}).inputs["targets"]
        assert one.inputs["scores"].inputs["scorer"].id == targets.id
        assert one.inputs["scores"].parameters.measure == "entropy"


def test_targets_score_for_a_student_whose_temperature_moves(profile):
    moving = {"objective": "online_kd", "temperature": {"shape": "linear", "start": 3, "end": 1}}
    selected = {"text": {"selected": {"measure": "nll", "mode": "lowest", "share": 0.5}}}
    scorer = step(profile, **moving, **selected).inputs["scores"].inputs["scorer"]
    assert scorer.id == step(profile, "03_targets").id


def test_a_scorer_that_is_none_is_refused():
    for kind in ("corpus", "fidelity", "scores"):
        with pytest.raises(KdlibError, match="A run that is named here must leave model or targets, got"):
            plan.Planner("smoke").scores(scorer={kind: {"measure": "entropy"} if kind == "scores" else {}})
    for wrong, message in (("nobody", "a run must be one of"), ([], "at least one"), ({"judge": {}}, "with a kind of")):
        with pytest.raises(KdlibError, match=f"scorer: .*{message}"):
            profiles.parameters("07_scores", "smoke", scorer=wrong)
    with pytest.raises(KdlibError, match="measure: .*'entropy'"):
        profiles.parameters("07_scores", "smoke", measure="loss")


# KL to the teacher's targets


def cached(profile, **targets):
    """Dense weights [positions, V] of targets, 0 where nothing is predicted, and the entropy kept with them."""
    corpus, run = make(profile, "01_corpus"), make(profile, "03_targets", **targets)
    train = train_split(profile)
    cache = artefacts.open_targets(run, corpus, train, targets.get("temperature", 1.0))
    weights, entropy = np.zeros((len(train.tokens), log_probs(profile, "teacher").shape[-1])), np.zeros(len(train.tokens))
    for position in predicting(train):
        one = cache.read(np.array([position]))
        np.add.at(weights[position], one.ids[0].numpy(), one.weights[0].numpy())
        entropy[position] = one.entropy[0]
    return weights, entropy


@pytest.mark.parametrize(
    "targets",
    [{}, {"temperature": 2.0}, {"kind": "topk_sampled", "top_k": 4, "draws": 8}],
    ids=["sampled", "warm", "topk_sampled"],
)
@pytest.mark.parametrize("scorer", ["student", "pool"])
def test_kl_of_drawn_targets_is_the_cross_entropy_to_them_less_the_entropy_kept(profile, scorer, targets):
    train, used = train_split(profile), predicting(train_split(profile))
    found = log_probs(profile, scorer)
    log_p = (torch.logsumexp(found, 0) - np.log(len(found))) / targets.get("temperature", 1.0)
    log_p = torch.log_softmax(log_p, -1).numpy()
    weights, entropy = cached(profile, **targets)
    asked = {"scorer": CE if scorer == "student" else [CE, OTHER], "measure": "kl", "targets": {"targets": targets}}
    run = make(profile, "07_scores", **asked)
    expected = np.zeros(len(train.tokens))
    expected[used] = -(weights[used] * log_p[used]).sum(1) - entropy[used]
    np.testing.assert_allclose(kept(run), expected, rtol=1e-4, atol=1e-4)
    assert set(run.settings["inputs"]) == {"corpus", "scorer", "targets"} and run.metrics["work"]["scoring"]["flops"] > 0


def test_kl_of_dense_targets_is_that_of_whole_distributions_and_draws_agree_on_average(profile):
    used = predicting(train_split(profile))
    t, p = (log_probs(profile, name)[0][used] for name in ("teacher", "student"))
    expected = (t.exp() * (t - p)).sum(1).numpy()
    dense = {"measure": "kl", "targets": {"targets": {"kind": "dense"}}}
    found = kept(make(profile, "07_scores", scorer=CE, **dense))[used]
    # Hidden states are kept in half precision.
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=5e-3)
    drawn = kept(make(profile, "07_scores", scorer=CE, measure="kl"))[used]
    # The entropy that was kept is in one byte, and off on average; what is drawn is not.
    off = kept(make(profile, "07_scores", measure="entropy"))[used] + (t.exp() * t).sum(1).numpy()
    missed = drawn + off - expected
    assert abs(missed.mean()) < 4 * missed.std() / len(used) ** 0.5 < 0.01 and missed.std() > 0
    itself = kept(make(profile, "07_scores", scorer="scratch", **dense))
    assert np.abs(itself).max() < 5e-3 < expected.mean()


def test_the_output_layer_of_dense_targets_is_charged(profile):
    plain = make(profile, "07_scores", scorer=CE).metrics
    whole = make(profile, "07_scores", scorer=CE, measure="kl", targets={"targets": {"kind": "dense"}}).metrics
    width, vocabulary = 32, log_probs(profile, "teacher").shape[-1]
    more = whole["work"]["scoring"]["flops"] - plain["work"]["scoring"]["flops"]
    assert more == 2 * width * vocabulary * plain["tokens"]


def test_kl_without_a_model_or_without_whole_targets_is_refused():
    planner = plan.Planner("smoke")
    with pytest.raises(KdlibError, match="must leave model, got targets sampled"):
        planner.scores(measure="kl")
    with pytest.raises(KdlibError, match="must leave targets, got student"):
        planner.scores(measure="kl", scorer=CE, targets=CE)
    with pytest.raises(KdlibError, match="kind of targets must be dense, sampled or topk_sampled for measure kl, got topk"):
        planner.scores(measure="kl", scorer=CE, targets={"targets": {"kind": "topk"}})
    with pytest.raises(KdlibError, match="targets must be left out with measure=nll"):
        planner.scores(scorer=CE, targets={"targets": {"draws": 8}})
    with pytest.raises(KdlibError, match="by must name a model with measure=kl"):
        planner.student(text={"selected": {"measure": "kl", "mode": "highest", "share": 0.5}})
