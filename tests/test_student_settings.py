"""Every setting of a student as the producers carry it out, on a study of two tiny domains made in seconds."""

import gc
import json
import random

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_training import Interrupt, distance, same, weights
from tiny import BLOCK, dense_log_probs, make_model, make_split, predicting

from kdlib import models
from kdlib.cache import export_cache
from kdlib.data import sources
from kdlib.data.corpus import load_split, pack
from kdlib.data.sources import PathSource
from kdlib.errors import KdlibError
from kdlib.evaluation import fidelity
from kdlib.losses.divergences import DIVERGENCES
from kdlib.losses.features import FeatureLoss
from kdlib.models import initialisation
from kdlib.runs import producers
from kdlib.study import parameters, plan, profiles
from kdlib.study.schedules import Stage
from kdlib.training import DistillationTrainer, discard_checkpoints, read_log, steps, train_model

TEACHER = {"layers": 2, "hidden_size": 32, "heads": 2}


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage():
    # Every run collects garbage, and would walk all that the libraries brought along each time.
    gc.freeze()
    yield
    gc.unfreeze()


def jsonl(folder, name, words, count=250):
    """A domain of documents of 60 words each, drawn from ``words``."""
    texts = (" ".join(random.Random(f"{name} {number}").choices(words, k=60)) for number in range(count))
    (folder / name).mkdir()
    (folder / name / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return PathSource(path=folder / name, members=("*.jsonl",), reader="text", licence="none")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """Path of a profile like smoke: one domain of few words, which is easy, and one of many."""
    home = tmp_path_factory.mktemp("home")
    words = ["".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz", k=5)) for number in range(40)]
    domains = {name: jsonl(home, name, words[:size]) for name, size in (("few", 8), ("many", 40), ("other", 20))}
    catalogue = sources.catalogue() | domains
    values = yaml.safe_load((profiles.REPOSITORY / "profiles" / "smoke.yaml").read_text()) | {"name": "tiny"}
    shares = {"domains": {"few": 0.5, "many": 0.5}, "ood": "other"}
    sizes = {"train_tokens": 4000, "heldout_tokens": 300, "block_length": 32, "vocabulary_size": 300}
    values["corpus"] |= shares | sizes
    values["teacher"] |= TEACHER | {"epochs": 16}
    values["student"] |= {"epochs": 1}
    (home / "tiny.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        patch.setattr(sources, "catalogue", lambda: catalogue)
        plan._identity.cache_clear()
        yield str(home / "tiny.yaml")
    plan._identity.cache_clear()


def step(profile, notebook="04_student", **changes):
    return plan.step(profiles.parameters(notebook, profile, **changes))


def make(profile, notebook="04_student", **changes):
    return make_run(step(profile, notebook, **changes))


def saved(run):
    return load_file(run.path / "model" / "model.safetensors")


def log(run):
    return [row for row in read_log(run.path / "log.csv") if row["loss"]]


def train_split(profile):
    return load_split(make(profile, "01_corpus").path / "data", "train")


# Targets


def test_a_student_learns_from_targets_that_another_tool_wrote(profile, tmp_path):
    train, cells = train_split(profile), {"kind": "topk", "top_k": 4}
    own = step(profile, targets=cells).inputs["targets"]
    cache = producers.open_targets({"corpus": make(profile, "01_corpus"), "targets": make_run(own)}, train, 1.0)
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
    run = make(profile, temperature=2.0, divergence="sinkhorn", divergence_options=options, kd_weight=0.5, **dense)
    assert all(0 < float(row["kd"]) <= 2 for row in log(run))
    # Before the first step nothing has been learnt, so that the losses differ in what they measure alone.
    first = [
        float(log(make(profile, temperature=2.0, divergence="jsd", divergence_options=options, **dense))[0]["kd"])
        for options in ({"beta": 0.01}, {})
    ]
    # JSD tends to beta times KL, which is more than the largest JSD of all where beta is a half.
    assert 0 < first[0] < 0.2 * first[1] < 0.2 * 4 * np.log(2)


# Schedules


def test_a_student_follows_the_schedules_it_is_given(profile):
    schedules = {
        "kd_weight_schedule": {"shape": "linear", "start": 1.0, "end": 0.0},
        "temperature_schedule": {"shape": "step", "start": 3.0, "end": 1.0, "at": 0.5},
    }
    rows = log(make(profile, objective="online_kd", **schedules))
    last = len(rows) - 1
    assert [float(row["kd_weight"]) for row in rows] == pytest.approx([1 - k / last for k in range(last + 1)], abs=1e-5)
    assert [row["temperature"] for row in rows] == ["3" if k / last < 0.5 else "1" for k in range(last + 1)]
    cached = log(make(profile, kd_weight_schedule=schedules["kd_weight_schedule"]))
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
    runs = {text: make(profile, text=text, **options) for text in ("real", "uniform", "unigram", "teacher")}
    losses = {}
    for text, run in runs.items():
        losses[text] = run.metrics["evaluation"]["test"]["nll"]
        # All that leaves out tokens is the last, partial batch of an epoch.
        assert 0.9 < run.metrics["training"]["tokens"] / (4 * train.documents.tokens.sum()) < 1.001
    assert losses["real"] < losses["teacher"] < losses["unigram"] < losses["uniform"]
    # There is nothing to learn in independent, equally likely tokens.
    assert losses["uniform"] == pytest.approx(np.log(300), rel=0.2)
    assert {text: sorted(run.settings["inputs"]) for text, run in runs.items()} == {
        "real": ["corpus"], "uniform": ["corpus"], "unigram": ["corpus"], "teacher": ["corpus", "teacher"]
    }  # fmt: skip


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


def kept_documents(profile, **changes):
    """What a student that selects reads: ids, weights, and the split."""
    one = step(profile, **changes)
    inputs = {name: make_run(upstream) for name, upstream in one.inputs.items()}
    train = train_split(profile)
    targets = None
    if "targets" in inputs:
        targets = producers.open_targets(inputs, train, one.parameters.temperature)
    split, kept, weights, _ = producers._text(one, inputs, train, None, targets, 32)
    assert split is train
    return kept, weights, train


@pytest.mark.parametrize(
    ("by", "mode", "objective"),
    [("teacher_entropy", "highest", "ce"), ("teacher_nll", "lowest", "kd"), ("student_nll", "lowest", "kd")],
)
def test_a_selection_keeps_its_share_of_the_tokens_in_the_order_of_the_scores(profile, by, mode, objective):
    changes = {"objective": objective, "selection": {"by": by, "mode": mode, "share": 0.4}, "batch_size": 1}
    kept, weights, train = kept_documents(profile, **changes)
    assert weights is None
    # The scores anew, from all of the logits.
    scorer = make(profile, "02_teacher") if by.startswith("teacher") else make(profile, objective="ce", seed=1)
    model = artefacts.load_model(scorer)
    log_p = dense_log_probs(model, train, block_length=32)
    values = -torch.where(log_p.isneginf(), 0, log_p.exp() * log_p).sum(1).numpy()
    if by != "teacher_entropy":
        used = predicting(train)
        values[used] = -log_p[used, train.tokens[used + 1].astype(np.int64)].numpy()
    scores = mean_by_document(train, values)
    inside, outside = scores[kept], scores.drop(kept)
    # The cache rounds each nat to a byte, so neighbours in rank may change places.
    slack = 0.0 if by == "student_nll" else 0.02
    assert (inside.min() + slack > outside.max()) if mode == "highest" else (inside.max() - slack < outside.min())
    sizes = train.documents.set_index("document").tokens
    assert abs(sizes[kept].sum() - 0.4 * sizes.sum()) <= sizes.max() / 2 + 1
    # In batches of one row nothing is left over, so the run has seen just these.
    run = make(profile, **changes)
    assert run.metrics["training"]["tokens"] == sizes[kept].sum()


def test_a_mix_of_domains_keeps_its_share_of_each_and_needs_no_score(profile):
    selection = {"mode": "random", "share": 0.4, "domains": {"few": 1.0, "many": 3.0}}
    changes = {"objective": "ce", "selection": selection, "batch_size": 1}
    kept, weights, train = kept_documents(profile, **changes)
    assert weights is None
    table = train.documents[train.documents.document.isin(kept)]
    total, longest = train.documents.tokens.sum(), train.documents.tokens.max()
    for domain, share in (("few", 0.1), ("many", 0.3)):
        assert abs(table.tokens[table.domain == domain].sum() - share * total) <= longest / 2 + 1
    run = make(profile, **changes)
    assert run.metrics["training"]["tokens"] == table.tokens.sum()
    assert run.settings["inputs"].keys() == {"corpus"}
    only = {"selection": selection | {"domains": {"few": 1.0}}}
    one, other = (one.metrics["domains"]["test"] for one in (run, make(profile, **changes | only)))
    assert one["many"]["nll"] < other["many"]["nll"] and one["few"]["nll"] > other["few"]["nll"]


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({"few": 1.0, "other": 1.0}, "names the domains other, which the corpus does not train on; expected some of few, many"),
        ({"few": 1.0}, "of the domain 'few', and there are [0-9]+"),
    ],
)
def test_a_mix_of_text_that_the_corpus_lacks_is_refused_before_anything_is_scored(
    profile, domains, message, monkeypatch
):
    monkeypatch.setattr(producers, "_scores", None)
    selection = {"by": "student_nll", "mode": "highest", "share": 0.9, "domains": domains}
    with pytest.raises(KdlibError, match=message):
        make(profile, objective="ce", selection=selection)


@pytest.mark.parametrize(
    ("by", "objective"), [("student_nll", "ce"), ("teacher_nll", "kd"), ("student_nll", "online_kd")]
)
def test_a_weighted_student_reads_all_of_the_text_and_learns_most_of_what_scores_high(profile, by, objective):
    temperature = 0.25
    changes = {"objective": objective, "epochs": 4, "batch_size": 4}
    selection = {"by": by, "mode": "weighted", "temperature": temperature}
    kept, found, train = kept_documents(profile, **changes, selection=selection)
    assert kept is None and len(found) == len(train.tokens)
    scorer = make(profile, "02_teacher") if by == "teacher_nll" else make(profile, objective="ce", seed=1)
    log_p, used = dense_log_probs(artefacts.load_model(scorer), train, block_length=32), predicting(train)
    values = np.zeros(len(train.tokens))
    values[used] = -log_p[used, train.tokens[used + 1].astype(np.int64)].numpy()
    scores, own = mean_by_document(train, values), mean_by_document(train, found)
    assert found[used].mean() == pytest.approx(1, abs=1e-12)
    # The cache rounds each nat to a byte.
    slack = 1e-3 if by == "student_nll" else 0.05
    assert np.ptp(temperature * np.log(own) - scores) < slack < 0.1 * np.ptp(scores)
    run, plain = make(profile, **changes, selection=selection), make(profile, **changes)
    assert run.metrics["training"]["tokens"] == plain.metrics["training"]["tokens"]
    one, other = (student.metrics["domains"]["test"] for student in (run, plain))
    assert one["many"]["nll"] < other["many"]["nll"] and one["few"]["nll"] > other["few"]["nll"]


# Feature losses


def test_a_student_with_projectors_is_saved_without_them(profile):
    feature = {"feature": "hidden_mse", "layer_map": "uniform_consecutive", "feature_weight": 2.0, "balance": "project"}
    shape = {"objective": "online_kd", "hidden_size": 16}
    run, plain = make(profile, **shape, **feature), make(profile, **shape)
    assert saved(run).keys() == saved(plain).keys() and not same(saved(run), saved(plain))
    assert run.metrics["parameters"] == plain.metrics["parameters"]
    # The projectors' products, and the second backward pass that balancing takes.
    assert run.metrics["training"]["flops"] > plain.metrics["training"]["flops"]
    for row in log(run):
        mixed = 0.9 * float(row["kd"]) + 0.1 * float(row["ce"]) + 2 * float(row["feature"])
        assert float(row["loss"]) == pytest.approx(mixed, rel=1e-5)
    assert not any(row["feature"] for row in log(plain))
    # A loss that drowns the main one, and rules that let it less and less.
    heavy = feature | {"feature_weight": 300.0}
    none, project, norm = (
        saved(make(profile, **shape, **heavy | {"balance": name})) for name in ("none", "project", "norm")
    )
    moved = distance(none, saved(make(profile, epochs=0, **shape)))
    assert min(distance(none, project), distance(none, norm), distance(project, norm)) > 0.01 * moved
    assert distance(norm, saved(plain)) < distance(none, saved(plain))


@pytest.mark.parametrize(
    ("changes", "pairs", "compared"),
    [
        ({"feature": "hidden_mse", "layer_map": "last"}, [(2, (4,))], ("hidden",)),
        ({"feature": "hidden_cosine"}, [(1, (1, 2)), (2, (3, 4))], ("hidden",)),
        ({"feature": "attention_mse", "layer_map": "last_k", "last_k": 1}, [(2, (4,))], ("attention",)),
        (
            {"feature": "relation", "layer_map": "uniform_last", "relations": ["value"]},
            [(1, (2, 4)), (2, (4,))],
            ("value",),
        ),
    ],
)
def test_a_feature_loss_is_that_of_the_settings(changes, pairs, compared):
    values = profiles.parameters("04_student", "smoke", objective="online_kd", **changes)
    found = producers._features(values, make_model(0, layers=2), make_model(1, layers=4))
    assert (found.objective, found.pairs, found.features) == (values.feature, pairs, compared)
    assert producers._features(profiles.parameters("04_student", "smoke"), None, None) is None


def test_students_whose_attention_maps_are_compared_compute_them(profile, monkeypatch):
    built, build = [], models.build

    def watched(*arguments):
        built.append(arguments[4])
        return build(*arguments)

    monkeypatch.setattr(models, "build", watched)
    make(profile, objective="online_kd", feature="attention_mse", layer_map="last", seed=5)
    make(profile, objective="online_kd", feature="relation", layer_map="last", seed=5)
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
    log_t, log_s = (dense_log_probs(one, test, block_length=32)[predicting(test)] for one in (teacher, model))
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


def train_in_stages(folder, monkeypatch, stages=MLP_FIRST, stop=None, changes=None, features=False):
    """A run of stages: its metrics, its weights, and what :class:`Staged` kept."""
    kind = type("Kept", (Staged,), {"made": [], "began": [], "ended": [], "stop": stop})
    monkeypatch.setattr("kdlib.training.stages.DistillationTrainer", kind)
    data = {"train": make_split(documents=20), "validation": make_split("validation", seed=1, documents=4)}
    values = profiles.parameters("04_student", "smoke", **VALUES | (changes or {}))
    model, options = make_model(0), {}
    if features:
        torch.manual_seed(1)
        config = make_model(1).config
        config.hidden_size, config.head_dim = 48, 24
        teacher = type(model)(config)
        teacher.set_attn_implementation("eager")
        options = {"teacher": teacher, "features": FeatureLoss(model, teacher, "hidden_mse")}
    folder.mkdir(exist_ok=True)
    metrics = train_model(model, values, data, BLOCK, folder, stages=stages, **options)
    return metrics, weights(model), kind


def test_a_first_stage_leaves_what_it_freezes_bit_for_bit_and_the_second_trains_all(tmp_path, monkeypatch):
    _, _, kept = train_in_stages(tmp_path, monkeypatch)
    start = weights(make_model(0))
    first, last = kept.ended
    assert {name for name in start if not torch.equal(start[name], first[name])} == {
        name for name in start if "mlp" in name
    }
    assert same(kept.began[1], first)
    assert all(not torch.equal(first[name], last[name]) for name in start)


def test_each_stage_has_an_optimiser_and_an_order_of_rows_of_its_own(tmp_path, monkeypatch):
    _, _, kept = train_in_stages(tmp_path, monkeypatch)
    one, other = kept.made
    assert one.optimizer is not other.optimizer
    for trainer in kept.made:
        taken = {int(state["step"]) for state in trainer.optimizer.state.values()}
        assert taken == {trainer.steps}
    # An epoch and a half each: with one seed the second stage would read the same half again.
    assert one.args.seed != other.args.seed and one.args.data_seed != other.args.data_seed


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.3, 0.3, 0.4), (0.05, 0.95), (1.0,)])
@pytest.mark.parametrize("epochs", [1, 2.3, 3])
def test_stages_share_out_the_steps_of_a_run_without_stages(tmp_path, monkeypatch, shares, epochs):
    stages = [Stage(share=share, learning_rate_multipliers={}) for share in shares]
    metrics, _, kept = train_in_stages(tmp_path, monkeypatch, stages, changes={"epochs": epochs, "batch_size": 1})
    index = pack(make_split(documents=20).windows(BLOCK), BLOCK)
    values = profiles.parameters("04_student", "smoke", **VALUES | {"epochs": epochs, "batch_size": 1})
    assert metrics["steps"] == sum(trainer.steps for trainer in kept.made) == steps(values, len(index))
    assert [trainer.steps / metrics["steps"] for trainer in kept.made] == pytest.approx(
        shares, abs=1 / metrics["steps"]
    )


def test_the_log_of_a_run_counts_on_through_its_stages(tmp_path, monkeypatch):
    metrics, _, _ = train_in_stages(tmp_path, monkeypatch)
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
def test_a_run_stopped_in_any_stage_ends_with_the_weights_and_log_of_one_that_was_not(
    tmp_path, monkeypatch, features, stop
):
    # The first stage freezes the projectors as well, and the second is to train them.
    options = {"features": features}
    _, whole, kept = train_in_stages(tmp_path / "whole", monkeypatch, **options)
    with pytest.raises(KeyboardInterrupt):
        train_in_stages(tmp_path / "cut", monkeypatch, stop=stop, **options)
    _, resumed, again = train_in_stages(tmp_path / "cut", monkeypatch, **options)
    assert same(whole, resumed)
    logs = [
        [(row["step"], row["tokens"], row["loss"], row["feature"]) for row in read_log(tmp_path / name / "log.csv")]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    if features:
        one, other = kept.made[1].features.projectors, again.made[1].features.projectors
        assert same(weights(one), weights(other))
        fresh = FeatureLoss(make_model(0), kept.made[0].teacher, "hidden_mse").projectors
        assert not same(weights(fresh), weights(one))


def test_stages_that_a_run_has_no_steps_for_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    for epochs in (0, 0.01):
        with pytest.raises(KdlibError, match="Every stage needs at least one step; a run of [01] steps"):
            train_in_stages(tmp_path, monkeypatch, changes={"epochs": epochs})
    assert not list(tmp_path.iterdir())


def test_a_student_in_stages_is_made_by_its_producer(profile):
    stages = [stage.model_dump() for stage in MLP_FIRST]
    run, plain = make(profile, objective="ce", stages=stages, epochs=4), make(profile, objective="ce", epochs=4)
    assert run.metrics["training"]["steps"] == plain.metrics["training"]["steps"] == len(log(run))
    assert not same(saved(run), saved(plain))
    assert not list(run.path.glob("stage-*"))


# What is refused

WEIGHTED = {"by": "student_nll", "mode": "weighted", "temperature": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": "kd", "feature": "relation"},
            "feature needs the teacher in the loop, objective=online_kd; found kd",
        ),
        (
            {"objective": "kd", "temperature_schedule": {"shape": "linear", "start": 2, "end": 1}},
            "temperature_schedule needs the teacher in the loop, objective=online_kd; found kd",
        ),
        (
            {"objective": "online_kd", "temperature_schedule": {"shape": "linear", "start": 2, "end": 0}},
            "temperature_schedule must lie above 0 and not above 100; found 2.0 to 0.0",
        ),
        (
            {"kd_weight_schedule": {"shape": "linear", "start": 0, "end": 1.5}},
            "kd_weight_schedule must lie in 0..1; found 0.0 to 1.5",
        ),
        ({"kd_weight_schedule": {"shape": "linear", "start": 0}}, "kd_weight_schedule.end: Field required"),
        ({"objective": "ce", "divergence": "jsd"}, "divergence jsd needs a teacher; found objective ce"),
        ({"divergence": "kl"}, "divergence: Input should be 'forward_kl'"),
        ({"divergence_options": {"beta": 0.5}}, "divergence forward_kl takes the options none; found .*beta"),
        (
            {"divergence": "jsd", "divergence_options": {"alpha": 0.5}},
            "divergence jsd takes the options beta; found .*alpha",
        ),
        ({"objective": "kd", "text": "uniform"}, "text 'uniform' is made in the run.*use ce or online_kd"),
        (
            {"objective": "ce", "text": "uniform", "selection": {"mode": "random", "share": 0.5}},
            "cached targets and selection do not know it",
        ),
        (
            {"stages": [{"share": 1, "learning_rate_multipliers": {}}], "learning_rate_multipliers": {"mlp": 0.5}},
            "leave those of the run empty",
        ),
        (
            {"stages": [{"share": share, "learning_rate_multipliers": {}} for share in (0.5, 0.4)]},
            r"shares of the stages must add up to 1; found \[0.5, 0.4\], which add up to 0.9",
        ),
        (
            {
                "stages": [{"share": 1, "learning_rate_multipliers": {}}],
                "kd_weight_schedule": {"shape": "linear", "start": 0, "end": 1},
            },
            "a schedule would begin anew in every stage",
        ),
        (
            {"learning_rate_multipliers": {"mlp": 1, "[": 0}},
            r"'\[' is malformed .unterminated character set.*put a backslash",
        ),
        ({"stages": [{"share": 1, "learning_rate_multipliers": {"a(": 0}}]}, r"'a\(' is malformed"),
        (
            {"stages": [{"share": 1, "learning_rate_multipliers": {"a": float("inf")}}]},
            "learning_rate_multipliers.a: .*finite number",
        ),
        ({"learning_rate_multipliers": {"a": float("inf")}}, "learning_rate_multipliers.a: .*finite number"),
        ({"feature_weight": float("inf")}, "feature_weight: .*finite number"),
        (
            {"divergence": "jsd", "divergence_options": {"beta": 7}},
            "beta of divergence jsd must be between 0 and 1.*found 7",
        ),
        ({"last_k": 2}, "last_k belongs to layer_map=last_k"),
        ({"layer_map": "last_k"}, "last_k belongs to layer_map=last_k, which needs it"),
        ({"relations": []}, "relations.*at least 1 item"),
        ({"noise": -1}, "noise.*greater than or equal to 0"),
        ({"feature_weight": 0}, "feature_weight.*greater than 0"),
        ({"selection": {"by": "teacher_entropy", "mode": "highest", "share": 0}}, "selection.share.*greater than 0"),
        ({"selection": {"by": "entropy", "mode": "highest", "share": 0.5}}, "selection.by.*'teacher_entropy'"),
        ({"selection": {"mode": "random", "share": 1}}, "selection.share.*less than 1"),
        ({"selection": {"mode": "middle", "share": 0.5}}, "mode=middle needs by; found None"),
        (
            {"selection": {"by": "student_nll", "mode": "random", "share": 0.5}},
            "mode=random does not read by; found stu",
        ),
        ({"selection": {"by": "student_nll", "mode": "lowest"}}, "mode=lowest needs share; found None"),
        ({"selection": {"mode": "random", "share": 0.5, "temperature": 1}}, "mode=random does not read temperature"),
        ({"selection": WEIGHTED | {"temperature": None}}, "mode=weighted needs temperature; found None"),
        ({"selection": WEIGHTED | {"by": None}}, "mode=weighted needs by; found None"),
        ({"selection": WEIGHTED | {"share": 0.5}}, "mode=weighted does not read share; found 0.5"),
        ({"selection": WEIGHTED | {"domains": {"speeches": 1}}}, "mode=weighted keeps all .*leave out domains"),
        ({"selection": WEIGHTED | {"temperature": 0}}, "selection.temperature.*greater than 0"),
        ({"selection": {"mode": "random", "share": 0.5, "domains": {}}}, "selection.domains.*at least 1 item"),
        ({"selection": {"mode": "random", "share": 0.5, "domains": {"a": 0}}}, "selection.domains.a.*greater than 0"),
        (
            {"objective": "online_kd", "feature": "relation", "selection": WEIGHTED},
            "feature losses are not weighted; leave out selection or feature relation",
        ),
        (
            {"objective": "online_kd", "divergence": "sinkhorn", "selection": WEIGHTED},
            "divergence sinkhorn compares tokens in groups.*leave out selection, or choose another divergence",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_what_was_expected(changes, message):
    with pytest.raises(KdlibError, match=message):
        profiles.parameters("04_student", "smoke", **changes)


def test_a_divergence_that_its_targets_cannot_serve_is_refused_in_the_plan():
    with pytest.raises(KdlibError, match="jsd cannot be computed from targets of kind sampled.*topk.*or dense"):
        plan.step(profiles.parameters("04_student", "smoke", divergence="jsd"))
    with pytest.raises(KdlibError, match="sinkhorn cannot be computed from targets of kind topk.*dense"):
        plan.step(profiles.parameters("04_student", "smoke", divergence="sinkhorn", targets={"kind": "topk"}))
    assert plan.step(profiles.parameters("04_student", "smoke", divergence="jsd", targets={"kind": "topk"}))


def test_profiles_name_the_divergences_and_options_that_there_are():
    names = ("forward_kl", *parameters.ON_OUTCOMES, *parameters.ON_LOGITS)
    assert set(names) == set(DIVERGENCES) and len(names) == len(DIVERGENCES)
    for name, loss in DIVERGENCES.items():
        arguments = loss.__code__.co_varnames[3 : loss.__code__.co_argcount]
        assert tuple(parameters.OPTIONS.get(name, ())) == arguments
        numbers = {option: 4 if option in ("group", "iterations") else 0.25 for option in arguments}
        found = profiles.parameters("04_student", "smoke", divergence=name, divergence_options=numbers)
        assert [type(value) for value in found.divergence_options.values()] == [type(one) for one in numbers.values()]


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in DIVERGENCES for option in parameters.OPTIONS.get(name, ())]
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
    settings = [{"divergence": name, "divergence_options": {option: value}} for value in values]
    told = [refused(profiles.parameters, "04_student", "smoke", **one) for one in settings]
    assert told == [refused(DIVERGENCES[name], *logits, 1.0, **{option: value}) for value in values]
    assert len(set(told)) == 2


# Identity

CE = {
    "objective": "ce", "architecture": "llama", "layers": 1, "hidden_size": 32, "heads": 2,
    "learning_rate_multipliers": {}, "epochs": 2.0, "batch_size": 16, "gradient_accumulation": 1,
    "learning_rate": 0.005, "warmup": 0.1, "weight_decay": 0.1, "seed": 1, "precision": "float32",
}  # fmt: skip
KD = CE | {"objective": "kd", "kd_weight": 0.9, "temperature": 1.0, "teacher": "scratch"}


@pytest.mark.parametrize("identity", [CE, KD], ids=["ce", "kd"])
def test_settings_that_came_later_leave_the_identity_of_a_run_as_it_was(identity):
    assert profiles.parameters("04_student", "smoke", objective=identity["objective"]).identity() == identity


@pytest.mark.parametrize(
    "selection",
    [
        {"by": "teacher_entropy", "mode": "highest", "share": 0.4},
        {"mode": "random", "share": 0.4},
        {"mode": "random", "share": 0.4, "domains": {"speeches": 1.0}},
        WEIGHTED,
    ],
)
def test_the_identity_of_a_selection_is_what_was_asked_for(selection):
    assert profiles.parameters("04_student", "smoke", selection=selection).identity()["selection"] == selection


LINEAR = {"shape": "linear", "start": 1.0, "end": 0.5}


def test_cross_entropy_has_no_identity_of_what_only_distillation_reads():
    values = {"kd_weight": 0.1, "temperature": 2.0, "teacher": "lora", "kd_weight_schedule": LINEAR}
    assert profiles.parameters("04_student", "smoke", objective="ce", **values).identity() == CE


@pytest.mark.parametrize(
    ("base", "change", "same_run"),
    [
        ({"objective": "ce"}, {"targets": {"kind": "dense"}}, True),
        ({"objective": "ce", "initialisation": "embeddings"}, {"kd_weight": 0.1}, True),
        ({}, {"balance": "project", "feature_weight": 3.0, "relations": ["query"]}, True),
        ({}, {"layer_map": "last_k", "last_k": 1}, True),
        ({"objective": "online_kd", "feature": "hidden_mse"}, {"relations": ["query"]}, True),
        ({"kd_weight_schedule": LINEAR}, {"kd_weight": 0.1}, True),
        ({"objective": "online_kd", "temperature_schedule": LINEAR}, {"temperature": 3.0}, True),
        ({"objective": "online_kd"}, {"targets": {"kind": "dense"}}, True),
        ({}, {"targets": {"kind": "dense"}}, False),
        ({}, {"kd_weight_schedule": LINEAR}, False),
        ({"objective": "online_kd"}, {"temperature_schedule": LINEAR}, False),
        ({"objective": "online_kd", "feature": "relation"}, {"relations": ["query"]}, False),
        ({"objective": "online_kd", "feature": "hidden_mse"}, {"balance": "norm"}, False),
        ({"objective": "online_kd", "feature": "hidden_mse"}, {"feature_weight": 2.0}, False),
        ({"objective": "online_kd", "feature": "hidden_mse"}, {"layer_map": "last"}, False),
        ({"objective": "online_kd"}, {"feature": "hidden_mse"}, False),
        ({"objective": "online_kd"}, {"divergence": "jsd"}, False),
        ({"objective": "online_kd", "divergence": "jsd"}, {"divergence_options": {"beta": 0.1}}, False),
        ({"objective": "ce"}, {"initialisation": "embeddings"}, False),
        ({"objective": "ce"}, {"noise": 0.1}, False),
        ({"objective": "ce"}, {"text": "unigram"}, False),
        ({"objective": "ce"}, {"selection": {"by": "student_nll", "mode": "lowest", "share": 0.5}}, False),
        ({"objective": "ce", "selection": WEIGHTED}, {"selection": WEIGHTED | {"temperature": 1.0}}, False),
        ({"objective": "online_kd", "selection": WEIGHTED}, {"divergence": "jsd"}, False),
        ({"objective": "ce"}, {"stages": [{"share": 1, "learning_rate_multipliers": {}}]}, False),
    ],
)
def test_a_run_is_another_only_if_it_reads_what_changed(base, change, same_run):
    one, other = (
        plan.step(profiles.parameters("04_student", "smoke", **changes)) for changes in (base, {**base, **change})
    )
    assert one.parameters != other.parameters
    assert (one.id == other.id) == same_run
