"""Every setting of a student as the producers carry it out, on a study of two tiny domains made in seconds."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_training import Interrupt, distance, same, weights
from tiny import BLOCK, dense_log_probs, make_model, make_split, predicting
from tiny_study import BLOCK_LENGTH, TEACHER, log, make, saved, step, train_split

from kdlib import models
from kdlib.cache import export_cache
from kdlib.data import text
from kdlib.data.corpus import load_split, pack
from kdlib.errors import KdlibError
from kdlib.evaluation import fidelity
from kdlib.losses.divergences import DIVERGENCES
from kdlib.losses.features import FeatureLoss
from kdlib.models import initialisation
from kdlib.runs import artefacts, ingredients
from kdlib.runs.make import make as make_run
from kdlib.study import divergences, plan, profiles
from kdlib.study.schedules import Schedule, Stage
from kdlib.training import DistillationTrainer, discard_checkpoints, read_log, steps, train_model
from kdlib.training.objective import FeatureTerm, Objective

# A student without a teacher, as the scorer of others' text.
PLAIN = {"student": {"objective": "ce", "seed": 1}}


# Targets


def test_a_student_learns_from_targets_that_another_tool_wrote(profile, tmp_path):
    train, cells = train_split(profile), {"kind": "topk", "top_k": 4}
    own = step(profile, targets=cells).inputs["targets"]
    cache = artefacts.open_targets(make_run(own), make(profile, "01_corpus"), train, 1.0)
    export_cache(cache, train, tmp_path / "targets.h5")
    taken = cells | {"source": str(tmp_path / "targets.h5")}
    student, alike = make(profile, targets=taken), make(profile, targets=cells)
    assert student.settings["inputs"].keys() == {"corpus", "targets"} and student.id != alike.id
    nll = [run.metrics["evaluation"]["test"]["nll"] for run in (student, alike)]
    assert nll[0] == pytest.approx(nll[1], abs=0.01)
    measured = make(profile, "06_fidelity", student={"objective": "kd", "targets": taken}).metrics
    assert measured["angle_trained"] > 0


@pytest.mark.parametrize(
    "targets",
    [
        {"kind": "dense"},
        {"kind": "topk_sampled", "top_k": 3, "draws": 8},
        {"kind": "sampled", "source": "dense", "draws": 200},
        {"kind": "topk", "source": "dense", "top_k": 50},
    ],
    ids=lambda targets: "-".join(map(str, targets.values())),
)
def test_a_student_learns_from_targets_of_every_kind_and_source(profile, targets):
    run = make(profile, targets=targets, kd_weight=1.0, temperature=1.0)
    found = make(profile, "03_targets", **targets)
    assert run.settings["inputs"]["targets"] == found.id
    assert (found.metrics["flops"] == 0) == (targets.get("source") == "dense")
    rows = log(run)
    assert all(row["loss"] == row["kd"] for row in rows)
    assert float(rows[-1]["kd"]) < 0.9 * float(rows[0]["kd"])
    # All estimate one gradient: none ends far from a student that saw the teacher itself.
    online = make(profile, objective="online_kd", kd_weight=1.0)
    assert run.metrics["training"]["tokens"] == online.metrics["training"]["tokens"]
    assert distance(saved(run), saved(online)) < 0.5 * distance(saved(online), saved(make(profile, epochs=0)))


def test_targets_drawn_from_dense_ones_are_as_those_of_the_teacher(profile):
    drawn, direct = (make(profile, "03_targets", source=source).metrics for source in ("dense", "teacher"))
    for name in ("teacher_entropy", "teacher_nll", "distinct_ids_per_token"):
        assert drawn[name] == pytest.approx(direct[name], rel=1e-2)
    assert (drawn["tokens"], direct["flops"] > 0) == (direct["tokens"], True)


def test_dense_targets_serve_every_temperature_and_loss(profile):
    dense = {"targets": {"kind": "dense"}}
    inputs = {
        step(profile, temperature=2.0, divergence=name, **dense).settings["inputs"]["targets"] for name in DIVERGENCES
    }
    assert inputs == {step(profile, "03_targets", kind="dense").id}
    options = {"group": 16, "iterations": 5}
    run = make(profile, temperature=2.0, divergence={"sinkhorn": options}, kd_weight=0.5, **dense)
    assert all(0 < float(row["kd"]) <= 2 for row in log(run))
    # Before the first step nothing has been learnt, so that the losses differ in what they measure alone.
    first = [
        float(log(make(profile, temperature=2.0, divergence={"jsd": options}, **dense))[0]["kd"])
        for options in ({"beta": 0.01}, {})
    ]
    # JSD tends to beta times KL, which is more than the largest JSD of all where beta is a half.
    assert 0 < first[0] < 0.2 * first[1] < 0.2 * 4 * np.log(2)


# Schedules


def test_a_student_follows_the_schedules_it_is_given(profile):
    schedules = {
        "kd_weight": {"shape": "linear", "start": 1.0, "end": 0.0},
        "temperature": {"shape": "step", "start": 3.0, "end": 1.0, "at": 0.5},
    }
    rows = log(make(profile, objective="online_kd", **schedules))
    last = len(rows) - 1
    assert [float(row["kd_weight"]) for row in rows] == pytest.approx([1 - k / last for k in range(last + 1)], abs=1e-5)
    assert [row["temperature"] for row in rows] == ["3" if k / last < 0.5 else "1" for k in range(last + 1)]
    cached = log(make(profile, kd_weight=schedules["kd_weight"]))
    assert [row["kd_weight"] for row in cached] == [row["kd_weight"] for row in rows]


# Beginnings


def test_an_identical_student_that_is_not_trained_is_its_teacher(profile):
    teacher = make(profile, "02_teacher")
    student = make(profile, objective="ce", initialisation="identical", epochs=0, **TEACHER)
    for name in ("evaluation", "domains", "temperature", "reliability", "parameters"):
        assert student.metrics[name] == teacher.metrics[name]
    assert same(saved(student), saved(teacher))
    one, other = (dict(np.load(run.path / "target_logprobs.npz")) for run in (student, teacher))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert student.metrics["training"]["steps"] == 0
    random_one = make(profile, objective="ce", epochs=0, **TEACHER)
    assert random_one.metrics["evaluation"]["test"]["nll"] > 1 + student.metrics["evaluation"]["test"]["nll"]


def test_a_shallower_student_is_made_of_the_teachers_layers(profile):
    teacher = saved(make(profile, "02_teacher"))
    student = saved(make(profile, objective="ce", initialisation="every_nth", epochs=0, **TEACHER | {"layers": 1}))
    assert initialisation.layer_choice(2, 1) == [0]
    assert same(student, {name: value for name, value in teacher.items() if ".layers.1." not in name})


@pytest.mark.parametrize("width", [32, 16])
def test_a_student_takes_the_teachers_embeddings(profile, width):
    shape = {"objective": "ce", "epochs": 0, "hidden_size": width}
    plain, given = saved(make(profile, **shape)), saved(make(profile, initialisation="embeddings", **shape))
    name = "model.embed_tokens.weight"
    teacher = saved(make(profile, "02_teacher"))[name].double()
    assert {key for key in plain if not torch.equal(plain[key], given[key])} == {name}
    ours = given[name].double()
    assert ours.norm() == pytest.approx(plain[name].double().norm().item(), rel=1e-5)
    if width == 32:
        torch.testing.assert_close(ours / ours.norm(), teacher / teacher.norm())
    else:
        # What a narrower student can keep: distances between tokens, up to a factor.
        pairs = torch.stack([torch.pdist(ours), torch.pdist(teacher)])
        assert torch.corrcoef(pairs)[0, 1] > 0.9


def test_transferred_embeddings_can_be_frozen(profile):
    given = {"objective": "ce", "initialisation": "embeddings"}
    before, after = (
        saved(make(profile, epochs=epochs, learning_rate_multipliers={"embed": 0}, **given)) for epochs in (0, 1)
    )
    assert [name for name in before if torch.equal(before[name], after[name])] == ["model.embed_tokens.weight"]


def test_a_copy_of_the_teacher_has_nothing_to_distil(profile):
    run = make(profile, objective="online_kd", initialisation="identical", kd_weight=0.5, **TEACHER)
    rows = log(run)
    assert float(rows[0]["kd"]) < 1e-6 < float(rows[-1]["kd"]) < float(rows[-1]["ce"])


def test_noise_is_added_to_the_matrices_at_the_start(profile):
    shape = {"objective": "ce", "epochs": 0, "initialisation": "identical", **TEACHER}
    plain, noisy, again = (
        saved(make(profile, noise=noise, seed=seed, **shape)) for noise, seed in ((0, 1), (0.5, 1), (0.5, 2))
    )
    for name, value in plain.items():
        if value.ndim < 2:
            assert torch.equal(value, noisy[name])
            continue
        noise = (noisy[name] - value).std() / value.std()
        assert noise == pytest.approx(0.5, rel=0.1)
        assert not torch.equal(noisy[name], again[name])


# Text


def test_students_read_the_text_they_are_given(profile):
    train = train_split(profile)
    options = {"objective": "ce", "epochs": 4, "batch_size": 4}
    texts = {name: name for name in ("corpus", "uniform", "unigram")} | {"generated": {"generated": {}}}
    runs = {name: make(profile, text=text, **options) for name, text in texts.items()}
    losses = {}
    for name, run in runs.items():
        losses[name] = run.metrics["evaluation"]["test"]["nll"]
        # All that leaves out tokens is the last, partial batch of an epoch.
        assert 0.9 < run.metrics["training"]["tokens"] / (4 * train.documents.tokens.sum()) < 1.001
    assert losses["corpus"] < losses["generated"] < losses["unigram"] < losses["uniform"]
    # There is nothing to learn in independent, equally likely tokens.
    assert losses["uniform"] == pytest.approx(np.log(300), rel=0.2)
    assert {name: sorted(run.settings["inputs"]) for name, run in runs.items()} == {
        "corpus": ["corpus"], "uniform": ["corpus"], "unigram": ["corpus"], "generated": ["corpus", "writer"]
    }  # fmt: skip
    assert runs["generated"].settings["inputs"]["writer"] == make(profile, "02_teacher").id


def test_text_may_be_written_by_any_run(profile):
    options = {"objective": "ce", "epochs": 8, "batch_size": 4}
    bad = make(profile, text={"generated": {"by": {"student": {"objective": "ce", "epochs": 0}}}}, **options)
    good = make(profile, text={"generated": {"by": PLAIN, "temperature": 0.5}}, **options)
    assert good.settings["inputs"]["writer"] == make(profile, **PLAIN["student"]).id
    nll = [run.metrics["evaluation"]["test"]["nll"] for run in (good, bad)]
    # What an untrained model writes is near to random tokens.
    assert nll[0] < nll[1] - 0.1


def test_random_text_can_be_distilled_on_with_the_teacher_in_the_loop(profile):
    options = {"epochs": 4, "batch_size": 4, "text": "unigram"}
    ce, online = (make(profile, objective=objective, **options) for objective in ("ce", "online_kd"))
    assert online.metrics["evaluation"]["test"]["nll"] < ce.metrics["evaluation"]["test"]["nll"]
    assert online.metrics["training"]["teacher_flops"] > 0


def mean_by_document(split, values):
    """Mean of ``values`` [positions] over each document's predicting positions, by id."""
    used = predicting(split)
    owner = np.searchsorted(split.offsets, used, side="right") - 1
    return pd.Series(values[used]).groupby(split.documents.document.to_numpy()[owner]).mean()


def taken(profile, **changes):
    """What a student reads: documents, weights, and the split they are of."""
    one, corpus = step(profile, **changes), make(profile, "01_corpus")
    inputs = {name: make_run(upstream) for name, upstream in one.inputs.items()}
    train, tokenizer = train_split(profile), artefacts.load_tokenizer(corpus)
    given = text.Given(train, tokenizer, BLOCK_LENGTH, one.parameters.seed, inputs, artefacts.load_model)
    found = text.way(one.parameters.text).take(given)
    assert found.split is train
    return found.documents, found.weights, train


@pytest.mark.parametrize(
    ("by", "measure", "mode", "objective"),
    [(None, "entropy", "highest", "ce"), (None, "nll", "lowest", "kd"), (PLAIN, "nll", "lowest", "kd")],
)
def test_a_selection_keeps_its_share_of_the_tokens_in_the_order_of_the_scores(profile, by, measure, mode, objective):
    selected = {"by": by, "measure": measure, "mode": mode, "share": 0.4}
    changes = {"objective": objective, "text": {"selected": selected}, "batch_size": 1}
    kept, weights, train = taken(profile, **changes)
    assert weights is None
    # The scores anew, from all of the logits.
    scorer = make(profile, "02_teacher") if by is None else make(profile, **PLAIN["student"])
    model = artefacts.load_model(scorer)
    log_p = dense_log_probs(model, train, block_length=BLOCK_LENGTH)
    values = -torch.where(log_p.isneginf(), 0, log_p.exp() * log_p).sum(1).numpy()
    if measure == "nll":
        used = predicting(train)
        values[used] = -log_p[used, train.tokens[used + 1].astype(np.int64)].numpy()
    scores = mean_by_document(train, values)
    inside, outside = scores[kept], scores.drop(kept)
    # The cache rounds each nat to a byte, so neighbours in rank may change places.
    slack = 0.02 if by is None else 0.0
    assert (inside.min() + slack > outside.max()) if mode == "highest" else (inside.max() - slack < outside.min())
    sizes = train.documents.set_index("document").tokens
    assert abs(sizes[kept].sum() - 0.4 * sizes.sum()) <= sizes.max() / 2 + 1
    # In batches of one row nothing is left over, so the run has seen just these.
    run = make(profile, **changes)
    assert run.metrics["training"]["tokens"] == sizes[kept].sum()


def test_a_mix_of_domains_keeps_its_share_of_each_and_needs_no_score(profile):
    selected = {"mode": "random", "share": 0.4, "domains": {"few": 1.0, "many": 3.0}}
    changes = {"objective": "ce", "text": {"selected": selected}, "batch_size": 1}
    kept, weights, train = taken(profile, **changes)
    assert weights is None
    table = train.documents[train.documents.document.isin(kept)]
    total, longest = train.documents.tokens.sum(), train.documents.tokens.max()
    for domain, share in (("few", 0.1), ("many", 0.3)):
        assert abs(table.tokens[table.domain == domain].sum() - share * total) <= longest / 2 + 1
    run = make(profile, **changes)
    assert run.metrics["training"]["tokens"] == table.tokens.sum()
    assert run.settings["inputs"].keys() == {"corpus"}
    only = {"text": {"selected": selected | {"domains": {"few": 1.0}}}}
    one, other = (one.metrics["domains"]["test"] for one in (run, make(profile, **changes | only)))
    assert one["many"]["nll"] < other["many"]["nll"] and one["few"]["nll"] > other["few"]["nll"]


def test_a_mix_of_text_that_the_corpus_lacks_is_refused(profile):
    selected = {"by": PLAIN, "measure": "nll", "mode": "highest", "share": 0.9}
    with pytest.raises(KdlibError, match="domains of a selection must be among few, many, got other"):
        step(profile, objective="ce", text={"selected": selected | {"domains": {"few": 1.0, "other": 1.0}}})
    one = step(profile, objective="ce", text={"selected": selected | {"domains": {"few": 1.0}}})
    with pytest.raises(KdlibError, match="of the domain 'few', got [0-9]+"):
        make_run(one)
    assert not list(Path(profile).parent.rglob(f"{one.id}/log.csv")), "nothing was trained"


@pytest.mark.parametrize(
    ("by", "objective"), [(PLAIN, "ce"), (None, "kd"), (PLAIN, "online_kd")]
)
def test_a_weighted_student_reads_all_of_the_text_and_learns_most_of_what_scores_high(profile, by, objective):
    temperature = 0.25
    changes = {"objective": objective, "epochs": 8, "batch_size": 4}
    weighted = {"selected": {"by": by, "measure": "nll", "mode": "weighted", "temperature": temperature}}
    kept, found, train = taken(profile, **changes, text=weighted)
    assert kept is None and len(found) == len(train.tokens)
    scorer = make(profile, "02_teacher") if by is None else make(profile, **PLAIN["student"])
    log_p, used = dense_log_probs(artefacts.load_model(scorer), train, block_length=BLOCK_LENGTH), predicting(train)
    values = np.zeros(len(train.tokens))
    values[used] = -log_p[used, train.tokens[used + 1].astype(np.int64)].numpy()
    scores, own = mean_by_document(train, values), mean_by_document(train, found)
    assert found[used].mean() == pytest.approx(1, abs=1e-12)
    # The cache rounds each nat to a byte.
    slack = 0.05 if by is None else 1e-3
    assert np.ptp(temperature * np.log(own) - scores) < slack < 0.1 * np.ptp(scores)
    run, plain = make(profile, **changes, text=weighted), make(profile, **changes)
    assert run.metrics["training"]["tokens"] == plain.metrics["training"]["tokens"]
    one, other = (student.metrics["domains"]["test"] for student in (run, plain))
    assert one["many"]["nll"] < other["many"]["nll"] and one["few"]["nll"] > other["few"]["nll"]


# Feature losses


def test_a_student_with_projectors_is_saved_without_them(profile):
    features = {"of": "hidden_mse", "layers": "uniform_consecutive", "weight": 2.0, "balance": "project"}
    shape = {"objective": "online_kd", "hidden_size": 16}
    run, plain = make(profile, **shape, features=features), make(profile, **shape)
    assert saved(run).keys() == saved(plain).keys() and not same(saved(run), saved(plain))
    assert run.metrics["parameters"] == plain.metrics["parameters"]
    # The projectors' products, and the second backward pass that balancing takes.
    assert run.metrics["training"]["flops"] > plain.metrics["training"]["flops"]
    for row in log(run):
        mixed = 0.9 * float(row["kd"]) + 0.1 * float(row["ce"]) + 2 * float(row["feature"])
        assert float(row["loss"]) == pytest.approx(mixed, rel=1e-5)
    assert not any(row["feature"] for row in log(plain))
    # A loss that drowns the main one, and rules that let it less and less.
    heavy = features | {"weight": 300.0}
    none, project, norm = (
        saved(make(profile, **shape, features=heavy | {"balance": name})) for name in ("none", "project", "norm")
    )
    moved = distance(none, saved(make(profile, epochs=0, **shape)))
    assert min(distance(none, project), distance(none, norm), distance(project, norm)) > 0.01 * moved
    assert distance(norm, saved(plain)) < distance(none, saved(plain))


@pytest.mark.parametrize(
    ("features", "pairs", "compared"),
    [
        ({"of": "hidden_mse", "layers": "last"}, [(2, (4,))], ("hidden",)),
        ({"of": "hidden_cosine"}, [(1, (1, 2)), (2, (3, 4))], ("hidden",)),
        ({"of": "attention_mse", "layers": "last_k", "last_k": 1}, [(2, (4,))], ("attention",)),
        ({"of": "relation", "layers": "uniform_last", "relations": ["value"]}, [(1, (2, 4)), (2, (4,))], ("value",)),
    ],
)
def test_a_feature_loss_is_that_of_the_settings(features, pairs, compared):
    settings = features | {"weight": 3.0, "balance": "norm"}
    values = profiles.parameters("04_student", "smoke", objective="online_kd", features=settings)
    teacher = make_model(1, layers=4)
    found = ingredients.objective_of(values, {}, None, make_model(0, layers=2), teacher)
    assert found.teacher is teacher and (found.features.weight, found.features.balance) == (3.0, "norm")
    loss = found.features.loss
    assert (loss.objective, loss.pairs, loss.features) == (features["of"], pairs, compared)
    plain = profiles.parameters("04_student", "smoke", objective="online_kd")
    assert ingredients.objective_of(plain, {}, None, make_model(0, layers=2), teacher).features is None


def test_students_whose_attention_maps_are_compared_compute_them(profile, monkeypatch):
    built, build = [], models.build

    def watched(*arguments):
        built.append(arguments[4])
        return build(*arguments)

    monkeypatch.setattr(models, "build", watched)
    make(profile, objective="online_kd", features={"of": "attention_mse", "layers": "last"}, seed=5)
    make(profile, objective="online_kd", features={"of": "relation", "layers": "last"}, seed=5)
    # With CUDA the default is an attention that never forms its maps.
    assert built == ["eager", None]


# Fidelity


def test_the_angle_of_dense_targets_is_0_and_that_of_draws_falls_with_their_number(profile, monkeypatch):
    seen = []
    measure = fidelity.gradient_angles
    monkeypatch.setattr(fidelity, "gradient_angles", lambda *given: seen.append(given[-1]) or measure(*given))
    found = {
        name: make(profile, "06_fidelity", student={"objective": "kd", "kd_weight": 1.0, "targets": targets}).metrics
        for name, targets in {
            "dense": {"kind": "dense"},
            **{draws: {"draws": draws, "source": "dense"} for draws in (1, 16, 255)},
        }.items()
    }
    for name in ("angle_initial", "angle_trained"):
        angles = [found[draws][name] for draws in ("dense", 255, 16, 1)]
        assert angles[0] < 0.1 and angles == sorted(angles)
        # The error of a mean of N draws falls as the square root of N.
        assert angles[1] < 0.5 * angles[2] and angles[2] < 0.5 * angles[3] < 45
    for metrics in found.values():
        assert 0 < metrics["teacher_kl"] < 3
    # 256 tokens are 8 rows of 32, the same rows for all.
    assert {index.shape for index in seen} == {(8, 32)}
    assert all(np.array_equal(index, seen[0]) for index in seen)
    make(profile, "06_fidelity", student={"objective": "kd", "targets": {"kind": "dense"}}, tokens=70)
    assert seen[-1].shape == (2, 32)


def test_the_kl_of_a_fidelity_run_is_that_of_all_logits(profile):
    student = {"objective": "kd", "kd_weight": 1.0, "targets": {"kind": "dense"}}
    found = make(profile, "06_fidelity", student=student, tokens=100_000).metrics
    test = load_split(make(profile, "01_corpus").path / "data", "test")
    teacher, model = (artefacts.load_model(run) for run in (make(profile, "02_teacher"), make(profile, **student)))
    log_t, log_s = (dense_log_probs(one, test, block_length=BLOCK_LENGTH)[predicting(test)] for one in (teacher, model))
    assert found["teacher_kl"] == pytest.approx((log_t.exp() * (log_t - log_s)).sum(1).mean().item(), rel=1e-4)


# Stages

MLP_FIRST = [
    Stage(share=0.5, learning_rate_multipliers={"mlp": 1.0, ".*": 0}),
    Stage(share=0.5, learning_rate_multipliers={}),
]
VALUES = {"epochs": 3, "batch_size": 4, "learning_rate": 0.01, "objective": "ce"}


class Staged(DistillationTrainer):
    """Keeps every trainer of a run, the weights it began and ended with, and may be stopped within one of them."""

    made, began, ended, stop = [], [], [], None

    def fit(self):
        self.made.append(self)
        self.began.append(weights(self.model))
        if self.stop and self.stop[0] == len(self.made) - 1:
            self.add_callback(Interrupt(self.stop[1]))
        about = super().fit()
        self.ended.append(weights(self.model))
        return about


def train_in_stages(folder, stages=MLP_FIRST, stop=None, changes=None, features=False):
    """A run of stages: its metrics, its weights, and what :class:`Staged` kept."""
    kind = type("Kept", (Staged,), {"made": [], "began": [], "ended": [], "stop": stop})
    train, validation = make_split(documents=20), make_split("validation", seed=1, documents=4)
    values = profiles.parameters("04_student", "smoke", **VALUES | (changes or {}))
    model, objective = make_model(0), None
    if features:
        torch.manual_seed(1)
        config = make_model(1).config
        config.hidden_size, config.head_dim = 48, 24
        teacher = type(model)(config)
        teacher.set_attn_implementation("eager")
        objective = Objective([FeatureTerm(FeatureLoss(model, teacher, "hidden_mse"))], teacher)
    folder.mkdir(exist_ok=True)
    read = text.TrainingText(train)
    metrics = train_model(model, values, read, validation, BLOCK, folder, objective=objective, stages=stages, kind=kind)
    return metrics, weights(model), kind


def test_a_first_stage_leaves_what_it_freezes_bit_for_bit_and_the_second_trains_all(tmp_path):
    _, _, kept = train_in_stages(tmp_path)
    start = weights(make_model(0))
    first, last = kept.ended
    assert {name for name in start if not torch.equal(start[name], first[name])} == {
        name for name in start if "mlp" in name
    }
    assert same(kept.began[1], first)
    assert all(not torch.equal(first[name], last[name]) for name in start)


def test_each_stage_has_an_optimiser_and_an_order_of_rows_of_its_own(tmp_path):
    _, _, kept = train_in_stages(tmp_path)
    one, other = kept.made
    assert one.optimizer is not other.optimizer
    for trainer in kept.made:
        taken = {int(state["step"]) for state in trainer.optimizer.state.values()}
        assert taken == {trainer.steps}
    # An epoch and a half each: with one seed the second stage would read the same half again.
    assert one.args.seed != other.args.seed and one.args.data_seed != other.args.data_seed


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.3, 0.3, 0.4), (0.05, 0.95), (1.0,)])
@pytest.mark.parametrize("epochs", [1, 2.3, 3])
def test_stages_share_out_the_steps_of_a_run_without_stages(tmp_path, shares, epochs):
    stages = [Stage(share=share, learning_rate_multipliers={}) for share in shares]
    metrics, _, kept = train_in_stages(tmp_path, stages, changes={"epochs": epochs, "batch_size": 1})
    index = pack(make_split(documents=20).windows(BLOCK), BLOCK)
    values = profiles.parameters("04_student", "smoke", **VALUES | {"epochs": epochs, "batch_size": 1})
    assert metrics["steps"] == sum(trainer.steps for trainer in kept.made) == steps(values, len(index))
    assert [trainer.steps / metrics["steps"] for trainer in kept.made] == pytest.approx(
        shares, abs=1 / metrics["steps"]
    )


def test_the_log_of_a_run_counts_on_through_its_stages(tmp_path):
    metrics, _, _ = train_in_stages(tmp_path)
    rows = read_log(tmp_path / "log.csv")
    taken = [row for row in rows if row["loss"]]
    assert [int(row["step"]) for row in taken] == list(range(1, metrics["steps"] + 1))
    for name, number in {"step": int, "tokens": int, "epoch": float, "seconds": float}.items():
        assert (np.diff([number(row[name]) for row in rows]) >= 0).all()
    assert int(rows[-1]["tokens"]) == metrics["tokens"]
    assert float(rows[-1]["epoch"]) == pytest.approx(3, abs=0.1)
    assert all(int(row["memory_bytes"]) > 10**7 for row in taken)
    assert any(row["validation_nll"] for row in rows)
    # Nothing else is left of the stages.
    discard_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.parametrize("features", [False, True], ids=["plain", "features"])
@pytest.mark.parametrize("stop", [(0, 4), (1, 1), (1, 6)], ids=str)
def test_a_run_stopped_in_any_stage_ends_with_the_weights_and_log_of_one_that_was_not(tmp_path, features, stop):
    # The first stage freezes the projectors as well, and the second is to train them.
    options = {"features": features}
    _, whole, kept = train_in_stages(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train_in_stages(tmp_path / "cut", stop=stop, **options)
    _, resumed, again = train_in_stages(tmp_path / "cut", **options)
    assert same(whole, resumed)
    logs = [
        [(row["step"], row["tokens"], row["loss"], row["feature"]) for row in read_log(tmp_path / name / "log.csv")]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    if features:
        one, other = (trainer.objective.features.loss.projectors for trainer in (kept.made[1], again.made[1]))
        assert same(weights(one), weights(other))
        fresh = FeatureLoss(make_model(0), kept.made[0].objective.teacher, "hidden_mse").projectors
        assert not same(weights(fresh), weights(one))


def test_stages_that_a_run_has_no_steps_for_are_refused_before_anything_is_trained(tmp_path):
    for epochs in (0, 0.01):
        with pytest.raises(KdlibError, match="Every stage must have at least one step, got .* for [01] steps"):
            train_in_stages(tmp_path, changes={"epochs": epochs})
    assert not list(tmp_path.iterdir())


def test_a_student_in_stages_is_made_by_its_producer(profile):
    stages = [stage.model_dump() for stage in MLP_FIRST]
    run, plain = make(profile, objective="ce", stages=stages, epochs=4), make(profile, objective="ce", epochs=4)
    assert run.metrics["training"]["steps"] == plain.metrics["training"]["steps"] == len(log(run))
    assert not same(saved(run), saved(plain))
    assert not list(run.path.glob("stage-*"))


# What is refused

WEIGHTED = {"by": PLAIN, "measure": "nll", "mode": "weighted", "temperature": 0.5}
HIDDEN = {"of": "hidden_mse"}


def selected(**settings):
    return {"text": {"selected": settings}}


def features(**settings):
    return {"features": HIDDEN | settings}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "kd", **features()}, "objective must be online_kd for features, got kd"),
        (
            {"objective": "kd", "temperature": {"shape": "linear", "start": 2, "end": 1}},
            "objective must be online_kd for a temperature schedule, got kd",
        ),
        (
            {"objective": "online_kd", "temperature": {"shape": "linear", "start": 2, "end": 0}},
            "temperature must stay between 1e-06 and 100, got 2.0 to 0.0",
        ),
        (
            {"kd_weight": {"shape": "linear", "start": 0, "end": 1.5}},
            "kd_weight must stay between 0 and 1, got 0.0 to 1.5",
        ),
        ({"kd_weight": {"shape": "linear", "start": 0}}, "kd_weight.end: Field required"),
        ({"kd_weight": 1.5}, "kd_weight: .*less than or equal to 1"),
        ({"temperature": 0}, "temperature: .*greater than 0"),
        ({"objective": "ce", "fresh_draws": True}, "objective must be kd for fresh_draws, got ce"),
        ({"objective": "ce", "divergence": "jsd"}, "objective must be kd or online_kd for a divergence, got ce with jsd"),
        ({"divergence": "kl"}, "divergence: must be one of forward_kl, .*got 'kl'"),
        ({"divergence": {}}, "divergence: must be one of forward_kl, .*got {}"),
        ({"divergence": {"jsd": {}, "tvd": {}}}, "divergence: must be one of forward_kl"),
        ({"divergence": {"forward_kl": {"beta": 0.5}}}, "options of forward_kl must be among none, got beta"),
        ({"divergence": {"jsd": {"alpha": 0.5}}}, "options of jsd must be among beta, got alpha"),
        ({"divergence": {"jsd": {"beta": 7}}}, "beta of jsd must be between 0 and 1.*got 7"),
        ({"objective": "kd", "text": "uniform"}, "objective must be ce or online_kd for text made in the run, got kd"),
        ({"objective": "kd", "text": {"generated": {}}}, "objective must be ce or online_kd for text made in the run"),
        ({"text": "teacher"}, "text must be corpus or {way: settings} with a way of .*bagged.*got 'teacher'"),
        ({"text": {"bagged": {"share": 0.5}, "selected": {}}}, "text must be corpus or {way: settings}"),
        ({"text": {}}, "text must be corpus or {way: settings}"),
        ({"text": {"bagged": {}}}, "text bagged: share: Field required"),
        ({"text": {"bagged": {"share": 1.5}}}, "text bagged: share: .*less than or equal to 1, got 1.5"),
        ({"objective": "ce", "text": {"uniform": {"share": 0.5}}}, "text uniform: share: Extra inputs"),
        (
            {"stages": [{"share": 1, "learning_rate_multipliers": {}}], "learning_rate_multipliers": {"mlp": 0.5}},
            "learning_rate_multipliers must be empty with stages",
        ),
        (
            {"stages": [{"share": share, "learning_rate_multipliers": {}} for share in (0.5, 0.4)]},
            r"shares of the stages must add up to 1, got \[0.5, 0.4\], which add up to 0.9",
        ),
        (
            {
                "stages": [{"share": 1, "learning_rate_multipliers": {}}],
                "kd_weight": {"shape": "linear", "start": 0, "end": 1},
            },
            "must be constant with stages; a schedule would begin anew in each",
        ),
        (
            {
                "stages": [{"share": 1, "learning_rate_multipliers": {}}],
                "weight_decay": {"shape": "linear", "start": 0, "end": 1},
            },
            "weight_decay must be constant with stages",
        ),
        ({"weight_decay": {"shape": "linear", "start": 0, "end": 11}}, "weight_decay must stay between 0 and 10, got 0.0 to 11.0"),
        ({"weight_decay": -0.1}, "weight_decay: .*greater than or equal to 0"),
        ({"start": PLAIN, "initialisation": "embeddings"}, "initialisation must be random with start, .*got embeddings"),
        ({"start": "nobody"}, "start: a run must be one of frozen,.*got 'nobody'"),
        ({"data_seed": -1}, "data_seed: .*greater than or equal to 0"),
        (
            {"learning_rate_multipliers": {"mlp": 1, "[": 0}},
            r"got '\[' .unterminated character set.*put a backslash",
        ),
        ({"stages": [{"share": 1, "learning_rate_multipliers": {"a(": 0}}]}, r"got 'a\('"),
        (
            {"stages": [{"share": 1, "learning_rate_multipliers": {"a": float("inf")}}]},
            "learning_rate_multipliers.a: .*finite number",
        ),
        ({"learning_rate_multipliers": {"a": float("inf")}}, "learning_rate_multipliers.a: .*finite number"),
        ({"objective": "online_kd", **features(weight=float("inf"))}, "features.weight: .*finite number"),
        ({"objective": "online_kd", **features(weight=0)}, "features.weight.*greater than 0"),
        ({"objective": "online_kd", **features(of="hidden")}, "features.of: .*'hidden_mse'"),
        ({"objective": "online_kd", **features(layer_map="last")}, "features.layer_map: must be one of of, weight, layers, .* \\(found 'last'\\)"),
        ({"objective": "online_kd", **features(last_k=2)}, "last_k must be given with layers=last_k and only then, got 2"),
        ({"objective": "online_kd", **features(layers="last_k")}, "last_k must be given with layers=last_k.*got None"),
        ({"objective": "online_kd", **features(relations=[])}, "relations.*at least 1 item"),
        ({"noise": -1}, "noise.*greater than or equal to 0"),
        (selected(measure="entropy", mode="highest", share=0), "text selected: share: .*greater than 0"),
        (selected(measure="teacher_entropy", mode="highest", share=0.5), "text selected: measure: .*'entropy'"),
        (selected(mode="random", share=1), "text selected: share: .*less than 1"),
        (selected(by="nobody", measure="nll", mode="lowest", share=0.5), "a run must be one of frozen,.*got 'nobody'"),
        (selected(mode="middle", share=0.5), "measure must be given with mode=middle, got None"),
        (selected(measure="nll", mode="random", share=0.5), "measure must be left out with mode=random, got nll"),
        (selected(by=PLAIN, mode="random", share=0.5), "by must be left out with mode=random"),
        (selected(measure="nll", mode="lowest"), "share must be given with mode=lowest, got None"),
        (selected(mode="random", share=0.5, temperature=1), "temperature must be left out with mode=random, got 1"),
        (selected(**WEIGHTED | {"temperature": None}), "temperature must be given with mode=weighted, got None"),
        (selected(**WEIGHTED | {"measure": None}), "measure must be given with mode=weighted, got None"),
        (selected(**WEIGHTED | {"share": 0.5}), "share must be left out with mode=weighted, got 0.5"),
        (selected(**WEIGHTED | {"domains": {"speeches": 1}}), "domains must be left out with mode=weighted"),
        (selected(**WEIGHTED | {"temperature": 0}), "text selected: temperature: .*greater than 0"),
        (selected(mode="random", share=0.5, domains={}), "text selected: domains: .*at least 1 item"),
        (selected(mode="random", share=0.5, domains={"a": 0}), "text selected: domains.a: .*greater than 0"),
        (
            {"objective": "online_kd", **features(of="relation"), **selected(**WEIGHTED)},
            "text must not be weighted with features or the divergences sinkhorn, mutual_information",
        ),
        (
            {"objective": "online_kd", "divergence": "sinkhorn", **selected(**WEIGHTED)},
            "text must not be weighted with features or the divergences sinkhorn, mutual_information",
        ),
        ({"teacher": "nobody"}, "teacher: a run must be one of frozen, lora, full, scratch, a run id.*got 'nobody'"),
        ({"teacher": {"model": {}}}, "teacher: a run in words must be {kind: settings} with a kind of corpus, .*student"),
        ({"teacher": {"student": 1}}, "teacher: the settings of a student must be a mapping, got 1"),
        ({"teacher": []}, "teacher: a pool of runs must have at least one"),
        ({"teacher": [PLAIN, "nobody"]}, "teacher: a run must be one of .*got 'nobody'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_what_was_expected(changes, message):
    with pytest.raises(KdlibError, match=message):
        profiles.parameters("04_student", "smoke", **changes)


def test_a_divergence_that_its_targets_cannot_serve_is_refused_in_the_plan():
    with pytest.raises(KdlibError, match="divergence jsd must be of kind topk or dense, got sampled"):
        plan.step(profiles.parameters("04_student", "smoke", divergence="jsd"))
    with pytest.raises(KdlibError, match="divergence sinkhorn must be of kind dense, got topk"):
        plan.step(profiles.parameters("04_student", "smoke", divergence="sinkhorn", targets={"kind": "topk"}))
    assert plan.step(profiles.parameters("04_student", "smoke", divergence="jsd", targets={"kind": "topk"}))


def test_targets_of_another_temperature_are_refused_in_the_plan():
    wrong = {"kind": "topk", "temperature": 2.0}
    with pytest.raises(KdlibError, match="temperature of targets must be the student's .1.0., got 2.0"):
        plan.step(profiles.parameters("04_student", "smoke", targets=wrong))
    for temperature, targets in ((2.0, wrong), (2.0, {"kind": "dense"})):
        assert plan.step(profiles.parameters("04_student", "smoke", temperature=temperature, targets=targets))


def test_profiles_name_the_divergences_and_options_that_there_are():
    assert set(divergences.NAMES) == set(DIVERGENCES) and len(divergences.NAMES) == len(DIVERGENCES)
    for name, loss in DIVERGENCES.items():
        arguments = loss.__code__.co_varnames[3 : loss.__code__.co_argcount]
        assert tuple(divergences.OPTIONS.get(name, ())) == arguments
        numbers = {option: 4 if option in ("group", "iterations") else 0.25 for option in arguments}
        found = profiles.parameters("04_student", "smoke", divergence={name: numbers}).divergence
        kept = divergences.as_pair(found)
        assert kept == (name, numbers)
        assert [type(value) for value in kept[1].values()] == [type(one) for one in numbers.values()]


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in DIVERGENCES for option in divergences.OPTIONS.get(name, ())]
)
def test_an_option_is_refused_beforehand_exactly_where_the_loss_would_refuse_it(name, option):
    def refused(call, *arguments, **options) -> bool:
        try:
            call(*arguments, **options)
        except KdlibError:
            return True
        return False

    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    values = [-1, 0, 1, 2, 3, -0.5, 0.0, 0.5, 1.0, 2.0, 2.5]
    settings = [{"divergence": {name: {option: value}}} for value in values]
    told = [refused(profiles.parameters, "04_student", "smoke", **one) for one in settings]
    assert told == [refused(DIVERGENCES[name], *logits, 1.0, **{option: value}) for value in values]
    assert len(set(told)) == 2


# Identity

CE = {
    "objective": "ce", "architecture": "llama", "layers": 1, "hidden_size": 32, "heads": 2,
    "learning_rate_multipliers": {}, "epochs": 2.0, "batch_size": 16, "gradient_accumulation": 1,
    "learning_rate": 0.005, "warmup": 0.1, "weight_decay": 0.1, "seed": 1, "precision": "float32",
}  # fmt: skip
KD = CE | {"objective": "kd", "kd_weight": 0.9, "temperature": 1.0}


@pytest.mark.parametrize("identity", [CE, KD], ids=["ce", "kd"])
def test_settings_that_came_later_leave_the_identity_of_a_run_as_it_was(identity):
    assert profiles.parameters("04_student", "smoke", objective=identity["objective"]).identity() == identity


@pytest.mark.parametrize(
    "asked",
    [
        {"mode": "highest", "share": 0.4},
        {"mode": "random", "share": 0.4},
        {"mode": "random", "share": 0.4, "domains": {"speeches": 1.0}},
        {"mode": "weighted", "temperature": 0.5},
    ],
)
def test_the_identity_of_a_selection_is_what_was_asked_for_and_the_run_of_its_scores(asked):
    by = {} if asked["mode"] == "random" else {"by": PLAIN, "measure": "entropy"}
    found = plan.step(profiles.parameters("04_student", "smoke", **selected(**asked, **by))).settings
    assert found["parameters"]["text"] == {"selected": asked}
    assert ("scores" in found["inputs"]) == bool(by)


LINEAR = {"shape": "linear", "start": 1.0, "end": 0.5}


def test_cross_entropy_has_no_identity_of_what_only_distillation_reads():
    for weight in (0.1, LINEAR):
        values = {"kd_weight": weight, "temperature": 2.0, "teacher": "lora"}
        assert profiles.parameters("04_student", "smoke", objective="ce", **values).identity() == CE


@pytest.mark.parametrize(
    ("setting", "spellings"),
    [
        ("divergence", ["jsd", {"jsd": {}}, {"jsd": None}]),
        ("text", ["unigram", {"unigram": {}}, {"unigram": None}]),
        ("text", ["corpus", {"corpus": {}}]),
        ("teacher", ["scratch", {"teacher": {}}, {"teacher": {"adaptation": "scratch"}}]),
        ("features", [{"of": "hidden_mse"}, {"of": "hidden_mse", "weight": 1, "layers": "uniform_consecutive"}]),
        ("kd_weight", [{"shape": "linear", "start": 1, "end": 0}, Schedule(shape="linear", start=1, end=0)]),
    ],
)
def test_a_setting_spelled_otherwise_is_the_same_run(setting, spellings):
    found = {step("smoke", objective="online_kd", **{setting: one}).id for one in spellings}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("base", "change", "same_run"),
    [
        ({"objective": "ce"}, {"targets": {"kind": "dense"}}, True),
        ({"objective": "ce", "initialisation": "embeddings"}, {"kd_weight": 0.1}, True),
        ({"objective": "online_kd", **features()}, features(relations=["query"]), True),
        ({"objective": "online_kd"}, {"targets": {"kind": "dense"}}, True),
        ({}, {"targets": {"kind": "dense"}}, False),
        ({}, {"kd_weight": LINEAR}, False),
        ({"objective": "online_kd"}, {"temperature": LINEAR}, False),
        ({"objective": "online_kd", **features(of="relation")}, features(of="relation", relations=["query"]), False),
        ({"objective": "online_kd", **features()}, features(balance="norm"), False),
        ({"objective": "online_kd", **features()}, features(weight=2.0), False),
        ({"objective": "online_kd", **features()}, features(layers="last"), False),
        ({"objective": "online_kd"}, features(), False),
        ({"objective": "online_kd"}, {"divergence": "jsd"}, False),
        ({"objective": "online_kd", "divergence": "jsd"}, {"divergence": {"jsd": {"beta": 0.1}}}, False),
        ({"objective": "online_kd"}, {"teacher": PLAIN}, False),
        ({}, {"teacher": PLAIN}, False),
        ({"objective": "ce"}, {"initialisation": "embeddings"}, False),
        ({"objective": "ce"}, {"noise": 0.1}, False),
        ({"objective": "ce"}, {"text": "unigram"}, False),
        ({"objective": "ce"}, {"text": {"bagged": {"share": 0.5}}}, False),
        ({"text": {"bagged": {"share": 0.5}}}, {"text": {"bagged": {"share": 0.5, "seed": 2}}}, False),
        ({"objective": "ce"}, selected(measure="nll", mode="lowest", share=0.5), False),
        ({"objective": "ce", **selected(**WEIGHTED)}, selected(**WEIGHTED | {"temperature": 1.0}), False),
        ({"objective": "ce", **selected(**WEIGHTED)}, selected(**WEIGHTED | {"measure": "entropy"}), False),
        ({"objective": "ce", **selected(**WEIGHTED)}, selected(**WEIGHTED | {"by": "scratch"}), False),
        ({"objective": "online_kd", **selected(**WEIGHTED)}, {"divergence": "jsd"}, False),
        ({"objective": "ce", "text": {"generated": {}}}, {"teacher": PLAIN}, False),
        ({"objective": "ce", "text": {"generated": {"by": PLAIN}}}, {"teacher": PLAIN}, True),
        ({"objective": "ce"}, {"stages": [{"share": 1, "learning_rate_multipliers": {}}]}, False),
        ({"objective": "ce"}, {"data_seed": 2}, False),
        ({"objective": "ce", "seed": 3}, {"data_seed": 3}, True),
        ({"objective": "ce"}, {"start": PLAIN}, False),
        ({"objective": "ce"}, {"weight_decay": {"shape": "cosine", "start": 0, "end": 0.2}}, False),
    ],
)
def test_a_run_is_another_only_if_it_reads_what_changed(base, change, same_run):
    one, other = (
        plan.step(profiles.parameters("04_student", "smoke", **changes)) for changes in (base, {**base, **change})
    )
    assert one.parameters != other.parameters
    assert (one.id == other.id) == same_run
