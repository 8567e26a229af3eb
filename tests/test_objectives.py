"""Objectives of schedules, divergences, ensembles and features: what each step minimises, and resumes to the bit."""

import gc
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_training import (
    Gradients,
    NextTokens,
    built,
    cache_of,
    column,
    distance,
    interrupted,
    logged,
    loose,
    make_trainer,
    objective_of,
    same,
    settings,
    trained,
    weights,
)
from tiny import BLOCK, VOCABULARY, make_model, make_split
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from kdlib import models
from kdlib.data.corpus import pack
from kdlib.data.text import TrainingText
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.losses import fused
from kdlib.losses.divergences import divergence_loss
from kdlib.losses.features import FeatureLoss
from kdlib.study.schedules import Schedule
from kdlib.training import (
    LOG_COLUMNS,
    Distillation,
    DistillationTrainer,
    FeatureTerm,
    Objective,
    newest_checkpoint,
    read_log,
)
from kdlib.training.objective import BALANCES
from kdlib.training.work import training_work

SPLIT = make_split(documents=20)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage():
    # Every run collects garbage, and would walk all that the libraries brought along each time.
    gc.freeze()
    yield
    gc.unfreeze()


def wide_teacher(seed=1, width=48, layers=2):
    """A teacher of another width than the students, which they can follow through a projector only."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.4, tie_word_embeddings=True, **shape)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def linear(start, end):
    return Schedule(shape="linear", start=start, end=end)


class Steps(TrainerCallback):
    """The weights after each step, and the gradients that it was taken with."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append(
            {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        )

    def on_step_end(self, args, state, control, model=None, **_):
        self.weights.append(weights(model))


def watched(folder, *arguments, **options):
    """Every step of a run without gradient clipping, and its trainer."""
    trainer = make_trainer(folder, *arguments, validation=False, **options)
    trainer.args.max_grad_norm = 0.0
    seen = Steps()
    trainer.add_callback(seen)
    trainer.fit()
    return seen, trainer


class Dense(DistillationTrainer):
    """Beside each step's loss, the same from all logits at once, with the weight and temperature that ``expected`` says."""

    name, expected = "forward_kl", None

    def compute_loss(self, model, inputs, **options):
        weight, temperature = self.expected(self.state.global_step / (self.steps - 1))
        mask = models.attention_mask(inputs["segments"], torch.float32)
        call = {"position_ids": inputs["position_ids"], "attention_mask": mask}
        with torch.no_grad():
            pair = (model, self.objective.teacher)
            z_s, z_t = (one(inputs["input_ids"], **call).logits.flatten(0, 1) for one in pair)
        valid = inputs["labels"].flatten() != -100
        ce = F.cross_entropy(z_s[valid], inputs["labels"].flatten()[valid])
        options_ = self.objective.distillation.options
        kd = divergence_loss(self.name, z_s[valid], z_t[valid], temperature, **options_).mean()
        loss = super().compute_loss(model, inputs, **options)
        torch.testing.assert_close(loss.detach(), weight * kd + (1 - weight) * ce, rtol=1e-5, atol=1e-6)
        return loss


def dense(name, expected):
    return type("Expected", (Dense,), {"name": name, "expected": staticmethod(expected)})


# Schedules


def test_a_linear_weight_goes_from_1_to_0_and_each_step_minimises_its_mixture(tmp_path):
    kind = dense("forward_kl", lambda progress: (1 - progress, 2.0))
    options = {"split": SPLIT, "teacher": make_model(1), "temperature": 2.0, "changes": {"epochs": 3}}
    trainer = make_trainer(tmp_path, kd_weight=linear(1.0, 0.0), kind=kind, **options)
    trainer.fit()
    rows = [row for row in read_log(trainer.step_log.path) if row["loss"]]
    last = trainer.steps - 1
    assert [row["kd_weight"] for row in rows] == [f"{1 - k / last:.6g}" for k in range(last + 1)]
    assert (rows[0]["kd_weight"], rows[-1]["kd_weight"]) == ("1", "0")
    assert {row["temperature"] for row in rows} == {"2"}
    for row in rows:
        weight, kd = float(row["kd_weight"]), float(row["kd"] or 0)
        assert float(row["loss"]) == pytest.approx(weight * kd + (1 - weight) * float(row["ce"]), rel=1e-5)
    assert [bool(row["kd"]) for row in rows] == [True] * last + [False]
    assert not any(row["feature"] for row in rows)


def test_a_constant_schedule_is_the_plain_number_bit_for_bit(tmp_path):
    targets = cache_of(tmp_path / "targets", make_model(1), SPLIT)
    options = {"split": SPLIT, "targets": targets}
    plain, trainer = trained(tmp_path / "plain", kd_weight=0.7, **options)
    constant = Schedule(shape="constant", start=0.7)
    other, again = trained(tmp_path / "constant", kd_weight=constant, temperature=linear(1.0, 1.0), **options)
    assert same(plain, other)
    assert logged(tmp_path / "plain") == logged(tmp_path / "constant")
    assert column(trainer, "kd_weight") == column(again, "kd_weight") == ["0.7"] * trainer.steps


def test_a_step_from_0_to_1_is_cross_entropy_exactly_until_the_step(tmp_path):
    ce, _ = watched(tmp_path / "ce", split=SPLIT)
    switch = Schedule(shape="step", start=0.0, end=1.0, at=0.5)
    options = {"split": SPLIT, "kd_weight": switch}
    for name, more in {
        "cached": {"targets": cache_of(tmp_path / "targets", make_model(1), SPLIT)},
        "online": {"teacher": make_model(1)},
    }.items():
        late, trainer = watched(tmp_path / name, **options, **more)
        before = sum(k / (trainer.steps - 1) < 0.5 for k in range(trainer.steps))
        assert 0 < before < trainer.steps
        assert [same(one, other) for one, other in zip(ce.weights, late.weights, strict=True)] == [
            number < before for number in range(trainer.steps)
        ]
        rows = [row for row in read_log(trainer.step_log.path) if row["loss"]]
        assert [row["kd_weight"] for row in rows] == ["0"] * before + ["1"] * (trainer.steps - before)
        assert [row["loss"] == row["ce"] for row in rows[:before]] == [True] * before
        assert [row["loss"] == row["kd"] for row in rows[before:]] == [True] * (trainer.steps - before)


def test_a_teacher_is_not_asked_while_its_weight_is_0(tmp_path):
    teacher, asked = make_model(1), []
    teacher.model.register_forward_hook(lambda *_: asked.append(trainer.state.global_step))
    switch = Schedule(shape="step", start=1.0, end=0.0, at=0.5)
    trainer = make_trainer(tmp_path, split=SPLIT, teacher=teacher, kd_weight=switch, validation=False)
    trainer.fit()
    assert asked == [k for k in range(trainer.steps) if k / (trainer.steps - 1) < 0.5]


def test_a_temperature_schedule_softens_teacher_and_student_as_it_says(tmp_path):
    kind = dense("forward_kl", lambda progress: (0.8, 4.0 - 3.0 * progress))
    trainer = make_trainer(
        tmp_path, split=SPLIT, teacher=make_model(1), kd_weight=0.8, temperature=linear(4.0, 1.0), kind=kind
    )
    trainer.fit()
    last = trainer.steps - 1
    assert column(trainer, "temperature") == [f"{4 - 3 * k / last:.6g}" for k in range(last + 1)]
    assert (column(trainer, "temperature")[0], column(trainer, "temperature")[-1]) == ("4", "1")


def test_sparse_targets_refuse_a_temperature_schedule_at_its_first_step(tmp_path):
    targets = cache_of(tmp_path / "targets", make_model(1), SPLIT)
    trainer = make_trainer(tmp_path, split=SPLIT, targets=targets, kd_weight=0.8, temperature=linear(4.0, 1.0))
    with pytest.raises(KdlibError, match="sparse targets, 1.0, got 4.0"):
        trainer.fit()


def test_a_run_of_one_step_takes_the_start_of_a_schedule(tmp_path):
    changes = {"epochs": 0.01}
    options = {"split": SPLIT, "teacher": make_model(1), "changes": changes}
    one, trainer = trained(tmp_path / "schedule", kd_weight=linear(0.8, 0.0), **options)
    other, _ = trained(tmp_path / "number", kd_weight=0.8, **options)
    assert trainer.steps == 1 and same(one, other)


@pytest.mark.parametrize("step", [3, 9])
def test_a_scheduled_run_interrupted_anywhere_ends_with_the_weights_and_log_of_one_that_was_not(tmp_path, step):
    options = {
        "split": SPLIT,
        "kd_weight": Schedule(shape="cosine", start=1.0, end=0.1),
        "temperature": linear(3.0, 1.0),
    }
    whole, trainer = trained(tmp_path / "whole", teacher=make_model(1), **options)
    interrupted(tmp_path / "cut", step, teacher=make_model(1), **options)
    resumed, again = trained(tmp_path / "cut", teacher=make_model(1), **options)
    assert same(whole, resumed)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    for name in ("kd_weight", "temperature"):
        assert column(trainer, name) == column(again, name) and len(set(column(again, name))) == trainer.steps


# Divergences


@pytest.mark.parametrize(
    ("name", "options"), [("reverse_kl", None), ("jsd", {"beta": 0.2}), ("tvd", None), ("logit_mse", None)]
)
def test_each_step_minimises_the_divergence_that_was_asked_for(tmp_path, name, options):
    kind = dense(name, lambda progress: (0.6, 2.0))
    values = {"kd_weight": 0.6, "temperature": 2.0, "divergence": name, "divergence_options": options}
    after, trainer = trained(tmp_path / name, split=SPLIT, teacher=make_model(1), kind=kind, **values)
    plain, _ = trained(tmp_path / "plain", split=SPLIT, teacher=make_model(1), kd_weight=0.6, temperature=2.0)
    assert distance(after, plain) > 0.05 * distance(plain, weights(make_model(0)))
    assert len(column(trainer, "kd")) == trainer.steps


# An ensemble in the loop

UNLIKE = {"llama": 16, "gpt2": 24, "qwen3": 8}  # architectures and widths


def ensemble(pool="probability", calibration=1.0):
    """Three members of unlike architectures and widths, of float64."""
    members = [built(name, seed, width=width).double() for seed, (name, width) in enumerate(UNLIKE.items(), 1)]
    return EnsembleForCausalLM.from_members(members, pool, calibration)


@torch.no_grad()
def pooled(members, pool, calibration, ids):
    """The calibrated pool's log-probabilities [T, V] of one window, from what each member says of it alone."""
    each = torch.stack([one(ids).logits[0].log_softmax(-1) for one in members])
    log_q = each.exp().mean(0).log() if pool == "probability" else each.mean(0)
    return torch.log_softmax(log_q / calibration, -1)


@pytest.mark.parametrize("pool", ["probability", "logit"])
@pytest.mark.parametrize(("calibration", "tau", "kd_weight"), [(1.0, 1.0, 1.0), (1.0, 2.0, 0.6), (1.7, 2.0, 0.6)])
def test_a_step_with_an_ensemble_is_kd_from_its_pooled_distribution(tmp_path, pool, calibration, tau, kd_weight):
    split = make_split(documents=20, longest=12)
    windows = split.windows(BLOCK)[:12]
    index = pack(windows, BLOCK)
    # Rows of several windows and of padding, in micro-batches of unequal numbers of tokens.
    assert len(index) % 2 == 0 and len(windows) > len(index) and len(set((index >= 0).sum(1))) > 1
    student, teacher = built("llama", 0).double(), ensemble(pool, calibration)
    ce, kd, tokens = 0.0, 0.0, windows[:, 1].sum()
    for start, length in windows.tolist():
        text = torch.from_numpy(split.tokens[start : start + length + 1].astype(np.int64))
        logits = student(text[None, :-1]).logits[0]
        t = torch.softmax(pooled(teacher.members, pool, calibration, text[None, :-1]) / tau, -1)
        ce = ce + F.cross_entropy(logits, text[1:], reduction="sum") / tokens
        kd = kd + tau**2 * F.kl_div(F.log_softmax(logits / tau, -1), t, reduction="sum") / tokens
    loss = kd_weight * kd + (1 - kd_weight) * ce
    names = [name for name, _ in student.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(loss, list(student.parameters())), strict=True))

    values = settings(epochs=1, batch_size=2, gradient_accumulation=len(index) // 2)
    objective = Objective([Distillation(kd_weight, tau)], teacher)
    trainer = DistillationTrainer(student, values, TrainingText(split), index, tmp_path, objective)
    trainer.args.max_grad_norm = 0.0
    step = Gradients()
    trainer.add_callback(step)
    about = trainer.fit()
    assert about["steps"] == 1 and about["teacher_tokens"] == about["tokens"] == tokens
    for name, value in {"loss": loss, "ce": ce, "kd": kd}.items():
        assert float(column(trainer, name)[0]) == pytest.approx(value.item(), rel=1e-5)
    for name, gradient in expected.items():
        # Norms and the eager softmax are computed in float32.
        assert (step.found[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("name", ["reverse_kl", "logit_mse"])
def test_an_ensemble_is_followed_by_any_divergence(tmp_path, name):
    teacher = EnsembleForCausalLM.from_members([make_model(1), make_model(2)], "logit", 1.7)
    kind = dense(name, lambda progress: (0.6, 2.0))
    values = {"kd_weight": 0.6, "temperature": 2.0, "divergence": name}
    _, trainer = trained(tmp_path, split=SPLIT, teacher=teacher, kind=kind, validation=False, **values)
    assert len(column(trainer, "kd")) == trainer.steps


def test_an_ensemble_of_one_teaches_as_its_member_does(tmp_path):
    options = {"split": SPLIT, "kd_weight": 0.9, "temperature": 2.0, "validation": False}
    alone, _ = trained(tmp_path / "alone", teacher=make_model(1), **options)
    pool, _ = trained(tmp_path / "pool", teacher=EnsembleForCausalLM.from_members([make_model(1)]), **options)
    assert distance(alone, pool) < 1e-4 * distance(alone, weights(make_model(0)))


def test_members_in_the_loop_have_no_dropout_and_learn_nothing(tmp_path):
    runs, modes = {}, {"student": set(), "members": set()}
    for dropout in (0.0, 0.5):
        members = [make_model(1, dropout), make_model(2, dropout)]
        teacher, student = EnsembleForCausalLM.from_members(members).train(), make_model(0, dropout=0.3)
        for name, some in {"student": [student], "members": members}.items():
            for one in some:
                layer, seen = one.model.layers[0].self_attn, modes[name]
                layer.register_forward_hook(lambda module, *_, seen=seen: seen.add(module.training))
        before = weights(teacher)
        options = {"split": SPLIT, "kd_weight": 0.9, "validation": False, "changes": {"epochs": 1}}
        runs[dropout], _ = trained(tmp_path / str(dropout), student, teacher=teacher, **options)
        assert same(before, weights(teacher))
        assert not any(one.requires_grad or one.grad is not None for one in teacher.parameters())
    assert modes == {"student": {True}, "members": {False}}
    assert same(runs[0.0], runs[0.5])


def test_an_ensemble_of_another_vocabulary_or_with_the_student_in_it_is_refused(tmp_path):
    wide = [make_model(seed, vocabulary=VOCABULARY + 3) for seed in (1, 2)]
    with pytest.raises(KdlibError, match=f"got {{'student': {VOCABULARY}, 'teacher': {VOCABULARY + 3}}} tokens"):
        make_trainer(tmp_path, teacher=EnsembleForCausalLM.from_members(wide), kd_weight=0.5)
    student = make_model(0)
    teacher = EnsembleForCausalLM.from_members([make_model(1), student])
    with pytest.raises(KdlibError, match="must not share parameters"):
        make_trainer(tmp_path, student, teacher=teacher, kd_weight=0.5)


def test_the_operations_of_an_ensemble_are_those_of_its_members():
    members = [make_model(1), make_model(2, layers=2)]
    pool = models.operations(EnsembleForCausalLM.from_members(members))
    assert pool.forward(3, 7) == sum(models.operations(one).forward(3, 7) for one in members)


# Feature losses


def features_of(student, teacher, objective="hidden_mse", layers="last"):
    return FeatureLoss(student, teacher, objective, layers)


def with_features(folder, objective="hidden_mse", student=None, teacher=None, run=trained, **options):
    student, teacher = student or make_model(0), teacher or wide_teacher()
    features = features_of(student, teacher, objective)
    return run(folder, student, split=SPLIT, teacher=teacher, features=features, **options)


@pytest.fixture(scope="module")
def cross_entropy(tmp_path_factory):
    """Weights and trainer of four epochs without a teacher."""
    return trained(tmp_path_factory.mktemp("ce"), split=SPLIT, changes={"epochs": 4})


@pytest.mark.parametrize("objective", ["hidden_mse", "hidden_cosine", "attention_mse", "relation"])
def test_a_feature_loss_is_logged_minimised_and_changes_the_student(tmp_path, cross_entropy, objective):
    after, trainer = with_features(tmp_path, objective, changes={"epochs": 4}, feature_weight=10.0)
    rows = [row for row in read_log(trainer.step_log.path) if row["loss"]]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["ce"]) + 10 * float(row["feature"]), rel=1e-5)
        assert row["kd"] == row["kd_weight"] == row["temperature"] == ""
    values = np.float64([row["feature"] for row in rows])
    assert values[-4:].mean() < 0.95 * values[:4].mean()
    alone, other = cross_entropy
    assert "feature" in LOG_COLUMNS and column(other, "feature") == []
    assert distance(after, alone) > 0.05 * distance(alone, weights(make_model(0)))


@pytest.mark.parametrize("kd_weight", [0.0, 0.6])
def test_the_feature_weight_scales_its_gradient_and_nothing_else(tmp_path, kd_weight):
    options = {"kd_weight": kd_weight, "changes": {"epochs": 0.01}}
    runs = {
        weight: with_features(tmp_path / str(weight), run=watched, feature_weight=weight, **options)
        for weight in (1.0, 3.0)
    }
    runs[0.0] = watched(tmp_path / "none", split=SPLIT, teacher=wide_teacher(), **options)
    for weight, (_, trainer) in runs.items():
        (row,) = [row for row in read_log(trainer.step_log.path) if row["loss"]]
        kd, ce, feature = (float(row[name] or 0) for name in ("kd", "ce", "feature"))
        expected = kd_weight * kd + (1 - kd_weight) * ce + weight * feature
        assert float(row["loss"]) == pytest.approx(expected, rel=1e-5)
    none, once, thrice = (runs[weight][0].gradients[0] for weight in (0.0, 1.0, 3.0))
    assert once.keys() - none.keys() == {"projectors.1.weight"}
    torch.testing.assert_close(thrice["projectors.1.weight"], 3 * once["projectors.1.weight"])
    for name in none:
        added = once[name] - none[name]
        torch.testing.assert_close(thrice[name] - none[name], 3 * added, rtol=1e-3, atol=1e-5)
        # The last norm comes after what is compared; all before it is reached.
        assert (added.abs().max() > 1e-4) == (name != "model.norm.weight")


def test_the_teacher_learns_nothing_from_a_feature_loss(tmp_path):
    teacher = wide_teacher()
    before = weights(teacher)
    with_features(tmp_path, teacher=teacher, kd_weight=0.5)
    assert same(before, weights(teacher))
    assert not any(one.requires_grad or one.grad is not None for one in teacher.parameters())


def test_projectors_are_trained_kept_in_checkpoints_and_gone_in_the_end(tmp_path):
    student, teacher = make_model(0), wide_teacher()
    features = features_of(student, teacher)
    before = weights(features)
    trainer = make_trainer(tmp_path, student, split=SPLIT, teacher=teacher, features=features)
    assert "projectors.1.weight" in student.state_dict()
    about = trainer.fit()
    assert distance(before, weights(features)) > 0.01
    kept = load_file(newest_checkpoint(tmp_path / "checkpoints") / "model.safetensors")
    assert torch.equal(kept["projectors.1.weight"], features.projectors["1"].weight)
    plain = make_model(0)
    assert student.state_dict().keys() == plain.state_dict().keys()
    assert models.parameters_by_component(student) == models.parameters_by_component(plain)
    projectors = 6 * sum(one.weight.numel() for one in features.projectors.values()) * about["tokens"]
    alone = training_work(plain, read_log(tmp_path / "log.csv"), trainer.train_dataset.index, trainer.validation[1])
    assert projectors and about["flops"] == alone["train"]["flops"] + projectors


@pytest.mark.parametrize("rule", ["none", "project"])
@pytest.mark.parametrize("step", [1, 9])
def test_a_run_with_projectors_interrupted_anywhere_ends_with_the_same_weights(tmp_path, rule, step):
    options = {"kd_weight": 0.5, "balance": rule, "changes": {"gradient_accumulation": 2, "epochs": 3}}

    def run(folder, cut=None):
        student, teacher = make_model(0, dropout=0.3), wide_teacher()
        features = features_of(student, teacher)
        options_ = {"split": SPLIT, "teacher": teacher, "features": features, **options}
        if cut is not None:
            return interrupted(folder, cut, student, **options_)
        after, _ = trained(folder, student, **options_)
        return after, weights(features)

    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", cut=step)
    resumed = run(tmp_path / "cut")
    assert same(whole[0], resumed[0]) and same(whole[1], resumed[1])
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    rows = [[row["feature"] for row in read_log(tmp_path / name / "log.csv")] for name in ("whole", "cut")]
    assert rows[0] == rows[1] and any(rows[0])
    # Called once more, when all is done, nothing is trained and the projectors are those of the last checkpoint.
    again = run(tmp_path / "cut")
    assert same(whole[0], again[0]) and same(whole[1], again[1])


def accumulated(folder, batch_size, accumulation, **options):
    """Weights, projectors and log of a float64 run over rows of unequal numbers of tokens."""
    index = loose(SPLIT)[:24]
    assert len(set((index >= 0).sum(1))) > 8
    values = settings(batch_size=batch_size, gradient_accumulation=accumulation)
    student, teacher = make_model(0).double(), wide_teacher().double()
    features = features_of(student, teacher)
    objective = objective_of(teacher=teacher, features=features, kd_weight=0.5, **options)
    trainer = DistillationTrainer(student, values, TrainingText(SPLIT), index, folder, objective)
    trainer.fit()
    return weights(student) | weights(features), [column(trainer, name) for name in ("loss", "feature", "tokens")]


def test_micro_batches_of_unequal_length_add_up_to_one_batch_with_features(tmp_path):
    expected, log = accumulated(tmp_path / "one", 8, 1)
    start = weights(make_model(0).double()) | weights(features_of(make_model(0).double(), wide_teacher().double()))
    for batch_size, accumulation in ((4, 2), (1, 8)):
        found, other = accumulated(tmp_path / str(batch_size), batch_size, accumulation)
        assert distance(expected, found) < 1e-6 * distance(expected, start)
        assert log == other


# Balanced gradients


@pytest.fixture
def known(monkeypatch):
    """Gives a rule of the test's own a name that an objective knows."""

    def add(rule):
        monkeypatch.setitem(BALANCES, "mine", rule)
        return "mine"

    return add


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_gradients_written_by_the_balance_are_those_that_backward_adds_up(tmp_path, known, accumulation):
    added = known(lambda main, auxiliary: auxiliary)  # no balance at all
    expected, log = accumulated(tmp_path / "plain", 8 // accumulation, accumulation)
    found, other = accumulated(tmp_path / "added", 8 // accumulation, accumulation, balance=added)
    start = weights(make_model(0).double()) | weights(features_of(make_model(0).double(), wide_teacher().double()))
    assert distance(expected, found) < 1e-6 * distance(expected, start)
    assert log == other


class Projected:
    """``project``, and what it was given and gave back in each micro-batch."""

    def __init__(self):
        self.calls, self.project = [], BALANCES["project"]

    def __call__(self, main, auxiliary):
        found = self.project(main, auxiliary)
        self.calls.append(
            tuple(torch.cat([one.flatten().double() for one in part]) for part in (main, auxiliary, found))
        )
        return found


def test_a_projected_step_never_opposes_the_main_loss(tmp_path, known):
    rule = Projected()
    student, teacher = make_model(0), wide_teacher()
    features = features_of(student, teacher)
    options = {"teacher": teacher, "features": features, "feature_weight": 30.0, "balance": known(rule)}
    seen, trainer = watched(tmp_path, student, split=SPLIT, **options)
    assert len(rule.calls) == trainer.steps
    overlaps = [(main @ auxiliary).item() for main, auxiliary, _ in rule.calls]
    assert min(overlaps) < 0 < max(overlaps), "the two losses should both conflict and agree along the way"
    opposed = 0
    for (main, auxiliary, found), gradients in zip(rule.calls, seen.gradients, strict=True):
        parameters = [one for name, one in gradients.items() if name != "projectors.1.weight"]
        taken = torch.cat([one.flatten().double() for one in parameters])
        # The norm after the compared block is reached by the main loss alone.
        assert len(taken) == len(main) + student.config.hidden_size
        # Less than 0 by no more than the float32 rounding of the difference that the projection is.
        assert main @ found >= -(2.0**-22) * main.norm() * auxiliary.norm()
        assert torch.dot(taken, taken) > 0
        opposed += ((main + auxiliary) @ main).item() < 0
        norm = gradients["model.norm.weight"].double()
        expected = torch.cat([main + found, norm])
        torch.testing.assert_close(taken.sort().values, expected.sort().values, rtol=1e-4, atol=1e-5)
    assert opposed, "without the projection some step should go against the main loss"


def test_gradients_that_agree_are_simply_added(tmp_path, known):
    rule = Projected()
    changes = {"epochs": 0.01}
    one, _ = with_features(tmp_path / "project", changes=changes, balance=known(rule), objective="hidden_cosine")
    other, _ = with_features(tmp_path / "none", changes=changes, objective="hidden_cosine")
    ((main, auxiliary, found),) = rule.calls
    assert main @ auxiliary > 0 and torch.equal(auxiliary, found)
    assert distance(one, other) < 1e-5 * distance(other, weights(make_model(0)))


def test_a_bounded_feature_gradient_is_never_the_longer_one(tmp_path, known):
    calls, norm = [], BALANCES["norm"]

    def rule(main, auxiliary):
        found = norm(main, auxiliary)
        calls.append([sum(x.double().square().sum() for x in part).sqrt().item() for part in (main, auxiliary, found)])
        return found

    with_features(tmp_path, feature_weight=30.0, balance=known(rule))
    main, auxiliary, found = np.array(calls).T
    assert (auxiliary > main).any()
    assert np.allclose(found, np.minimum(main, auxiliary), rtol=1e-5)


# Precision


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "sinkhorn"])
def test_half_precision_products_change_no_loss_by_more_than_their_rounding(tmp_path, divergence):
    found = {}
    for precision in ("float32", "bfloat16"):
        changes = {"precision": precision, "epochs": 0.01}
        options = {"kd_weight": 0.5, "temperature": 2.0, "divergence": divergence, "changes": changes}
        _, trainer = with_features(tmp_path / precision, **options)
        found[precision] = [float(column(trainer, name)[0]) for name in ("loss", "ce", "kd", "feature")]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.02)
    assert found["bfloat16"] != found["float32"]


# Compilation


def test_the_body_of_a_student_that_is_looked_into_is_not_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch, "compile", lambda one, **_: compiled.append(one) or one)
    monkeypatch.setattr(fused, "_compiled_softmax_", lambda: torch.compile(fused._softmax_))
    plain, _ = with_features(tmp_path / "plain")
    again, _ = with_features(tmp_path / "compiled", changes={"compile": True})
    assert set(compiled) == {fused._softmax_} and same(plain, again)


# Bad input


def feature_term(**options):
    return FeatureTerm(features_of(make_model(0), make_model(1)), **options)


@pytest.mark.parametrize(
    ("terms", "signal", "message"),
    [
        ([Distillation(0.5), Distillation(0.4)], make_model(1), "one of each kind, got 2 of 1 kinds"),
        ([Distillation(0.5), feature_term(), feature_term()], make_model(1), "one of each kind, got 3 of 2 kinds"),
        ([Distillation(0.5)], None, "distillation term must have a signal, got none"),
        ([Distillation(linear(0.0, 1.0))], None, "distillation term must have a signal, got none"),
        ([feature_term()], None, "feature term must have a teacher in the loop, got none"),
        ([feature_term()], NextTokens(SPLIT), "feature term must have a teacher in the loop, got none"),
        ([Distillation(0.5)], [make_model(1), make_model(2)], "or a model, got list.*EnsembleForCausalLM"),
        ([feature_term(balance="pcgrad")], make_model(1), "one of none, project, norm, got 'pcgrad'"),
    ],
)
def test_terms_that_do_not_fit_together_or_have_nothing_to_compare_with_are_refused(terms, signal, message):
    with pytest.raises(KdlibError, match=message):
        Objective(terms, signal)


def test_no_objective_one_without_terms_and_a_weight_of_0_are_cross_entropy_bit_for_bit(tmp_path):
    text, index = TrainingText(SPLIT), pack(SPLIT.windows(BLOCK), BLOCK)
    found = {}
    for name, objective in {
        "none": None,
        "empty": Objective(),
        "signal": Objective(signal=make_model(1)),
        "weight": Objective([Distillation(0.0, 2.0)]),
    }.items():
        trainer = DistillationTrainer(make_model(0), settings(epochs=1), text, index, tmp_path / name, objective)
        trainer.fit()
        found[name] = weights(trainer.model)
        assert column(trainer, "kd") == column(trainer, "kd_weight") == column(trainer, "temperature") == []
        assert column(trainer, "loss") == column(trainer, "ce")
    assert all(same(found["none"], one) for one in found.values())


def test_a_teacher_whose_logits_are_no_matrix_product_is_refused_before_a_step(tmp_path):
    capped = make_model(1)
    capped.config.final_logit_softcapping = 30.0
    for teacher in (capped, EnsembleForCausalLM.from_members([make_model(2), capped])):
        with pytest.raises(KdlibError, match="final_logit_softcapping"):
            make_trainer(tmp_path / "run", teacher=teacher, kd_weight=0.5)
    assert not (tmp_path / "run").exists()


def test_attention_maps_that_sdpa_never_forms_are_refused_before_anything_is_trained(tmp_path):
    student = make_model(0)
    student.set_attn_implementation("sdpa")
    with pytest.raises(KdlibError, match="of the student must be eager for attention maps, got sdpa"):
        with_features(tmp_path / "run", "attention_mse", student=student)
    assert not (tmp_path / "run").exists()
