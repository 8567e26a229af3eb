"""Training against identities: alignment under shuffle, invariance to batching, and resumes that change no bit."""

import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from tiny import (
    BLOCK,
    VOCABULARY,
    contents,
    dense_log_probs,
    die_at,
    exit_code,
    make_model,
    make_split,
    predicting,
)
from transformers import AutoModelForCausalLM, GPT2Config, TrainerCallback

from kdlib import models, training
from kdlib.cache import Kind, ModelTeacher, TargetCache, write_targets
from kdlib.data.corpus import load_split, pack, save_split
from kdlib.data.text import TrainingText
from kdlib.errors import KdlibError
from kdlib.losses import SparseTargets, fused
from kdlib.losses.features import FeatureLoss
from kdlib.study.parameters import TrainingParameters
from kdlib.study.schedules import Schedule, Stage
from kdlib.training import (
    Collator,
    Distillation,
    DistillationTrainer,
    FeatureTerm,
    Objective,
    discard_checkpoints,
    newest_checkpoint,
    parameter_groups,
    read_log,
    steps,
    train_model,
)
from kdlib.training.log import memory_bytes, peak_memory_bytes

DEFAULTS = {
    "profile": "tiny", "epochs": 2, "batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-2, "warmup": 0.1,
    "weight_decay": 0.1, "seed": 0, "precision": "float32", "compile": False,
}  # fmt: skip
ARCHITECTURES = ("llama", "gpt2", "qwen3")
TOKENIZER = SimpleNamespace(
    get_vocab=lambda: {str(token): token for token in range(VOCABULARY)},
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=None,
)


def settings(**changes):
    return TrainingParameters(**DEFAULTS | changes)


def objective_of(
    targets=None, teacher=None, kd_weight=0.0, temperature=1.0, divergence="forward_kl", divergence_options=None,
    features=None, feature_weight=1.0, balance="none",
):  # fmt: skip
    terms = [Distillation(kd_weight, temperature, divergence, divergence_options or {})]
    if features is not None:
        terms.append(FeatureTerm(features, feature_weight, balance))
    return Objective(terms, teacher if targets is None else targets)


def make_trainer(folder, model=None, split=None, validation=True, changes=None, kind=DistillationTrainer, **options):
    """A trainer on all of a split; of ``options``, those that it does not take itself make up the objective."""
    split = split or make_split(documents=20)
    if validation is True:
        held_out = make_split("validation", seed=1, documents=4)
        options |= {"validation_index": pack(held_out.windows(BLOCK), BLOCK)}
        validation = held_out
    model = make_model(0) if model is None else model
    text = TrainingText(split, weights=options.pop("weights", None))
    own = {name: options.pop(name) for name in ("multipliers", "validation_index") if name in options}
    rows, objective = pack(text.windows(BLOCK), BLOCK), objective_of(**options)
    return kind(model, settings(**changes or {}), text, rows, folder, objective, validation=validation or None, **own)


def built(architecture, seed, dropout=0.0, width=16):
    """A model as producers build it, but far from uniform, with norms and biases drawn too, so that none goes unnoticed."""
    shape = models.Shape(layers=2, hidden_size=width, heads=2, architecture=architecture)
    model = models.build(shape, TOKENIZER, BLOCK, seed, "eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model


def loose(split):
    """A row a window, so that rows hold unequal numbers of tokens."""
    return np.concatenate([pack(window[None], BLOCK) for window in split.windows(BLOCK)])


def trained(folder, *arguments, **options):
    """Weights after training, and the trainer."""
    trainer = make_trainer(folder, *arguments, **options)
    trainer.fit()
    return weights(trainer.model), trainer


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one, other):
    return sum((one[name].double() - other[name].double()).square().sum() for name in one).sqrt().item()


def column(trainer, name):
    return [row[name] for row in read_log(trainer.step_log.path) if row[name]]


class NextTokens(TargetCache):
    """A cache whose targets put all mass on the text's own next token, looked up by flat position."""

    temperature, guard = 1.0, {"vocabulary": VOCABULARY}

    def __init__(self, split):
        self.split = split

    def read(self, positions):
        positions = positions.reshape(-1)
        ids = torch.from_numpy(self.split.tokens[np.maximum(positions, 0) + 1].astype(np.int64))[:, None]
        mass = torch.from_numpy((positions >= 0).astype(np.float32))[:, None]
        return SparseTargets(ids, mass, None, torch.zeros(len(positions)), 1.0)


def cache_of(folder, teacher, split, kind="sampled", size=50, temperature=1.0):
    kind = Kind(kind, draws=size, top_k=size)
    write_targets(folder, ModelTeacher(teacher), split, {}, kind, temperature, block_length=BLOCK, shard_tokens=60)
    return TargetCache(folder, {}, temperature)


# Alignment


def test_targets_of_a_shuffled_batch_are_those_of_its_tokens(tmp_path):
    split = make_split(documents=20)
    cache = cache_of(tmp_path, make_model(1), split)
    index = loose(split)
    rows = [index[number] for number in np.random.default_rng(0).permutation(len(index))[:7]]
    batch = Collator(split, cache)(rows)
    assert any((row < 0).any() for row in rows)
    for place, position in enumerate(np.concatenate(rows).tolist()):
        label, mine = batch["labels"].flatten()[place], batch["targets"][slice(place, place + 1)]
        assert (label == -100 and mine.weights.sum() == 0) if position < 0 else label == split.tokens[position + 1]
        if position >= 0:
            alone = cache.read(np.array([position]))
            entry = dict(zip(alone.ids[0].tolist(), alone.weights[0].tolist(), strict=True))
            used = mine.weights[0] > 0
            assert entry == dict(zip(mine.ids[0][used].tolist(), mine.weights[0][used].tolist(), strict=True))


def test_targets_that_are_the_text_itself_train_as_cross_entropy_does(tmp_path):
    split = make_split(documents=20)
    changes = {"epochs": 3, "gradient_accumulation": 2}
    ce, _ = trained(tmp_path / "ce", split=split, changes=changes)
    options = {"split": split, "changes": changes, "targets": NextTokens(split)}
    kd, trainer = trained(tmp_path / "kd", kd_weight=1.0, **options)
    half, _ = trained(tmp_path / "half", kd_weight=0.5, **options)
    moved = distance(ce, weights(make_model(0)))
    assert distance(ce, kd) < 1e-4 * moved and distance(ce, half) < 1e-4 * moved
    assert column(trainer, "kd") == column(trainer, "ce")


def test_every_row_comes_once_an_epoch_in_another_order_each_time(tmp_path):
    seen = []

    class Watched(DistillationTrainer):
        def compute_loss(self, model, inputs, **options):
            seen.append(inputs["input_ids"].clone())
            return super().compute_loss(model, inputs, **options)

    split = make_split(documents=20)
    index = pack(split.windows(BLOCK), BLOCK)
    trained(tmp_path, split=split, validation=False, kind=Watched, changes={"epochs": 2, "batch_size": len(index)})
    first, second = ([tuple(row) for row in batch.tolist()] for batch in seen)
    assert len(seen) == 2 and first != second and sorted(first) == sorted(second)
    assert sorted(first) == sorted(tuple(row) for row in Collator(split)(list(index))["input_ids"].tolist())


# The objective


@pytest.mark.parametrize("weighted", [False, True])
def test_batch_size_and_accumulation_of_one_product_give_the_same_weights(tmp_path, weighted):
    """Rows hold unequal numbers of tokens, so a mean over micro-batches would weigh them differently."""
    split = make_split(documents=20)
    text = TrainingText(split, weights=token_weights(split) if weighted else None)
    index = loose(split)[:24]
    assert len(set((index >= 0).sum(1))) > 8
    found = []
    for number, (batch_size, accumulation) in enumerate([(8, 1), (4, 2), (2, 4), (1, 8)]):
        values = settings(batch_size=batch_size, gradient_accumulation=accumulation)
        targets = cache_of(tmp_path / f"targets-{number}", make_model(1), split)
        objective = objective_of(targets, kd_weight=0.7)
        trainer = DistillationTrainer(make_model(0).double(), values, text, index, tmp_path / str(number), objective)
        trainer.fit()
        found.append((weights(trainer.model), [column(trainer, name) for name in ("loss", "ce", "kd", "tokens")]))
    for other, log in found[1:]:
        # A norm of 1e-6 of how far the weights moved is float32 rounding of the step's 1 / tokens, and less.
        assert distance(found[0][0], other) < 1e-6 * distance(found[0][0], weights(make_model(0).double()))
        assert log == found[0][1]
    assert len(log[0]) == 6


def token_weights(split):
    """A number of mean 1 at each flat position, 0 at some of them."""
    found = np.maximum(0, np.random.default_rng(5).normal(1, 1, len(split.tokens)))
    return found / found.mean()


def test_weights_of_a_shuffled_batch_are_those_of_its_labels():
    split = make_split(documents=20)
    index, values = loose(split), token_weights(split)
    rows = [index[number] for number in np.random.default_rng(0).permutation(len(index))[:7]]
    batch, where = Collator(split, weights=values)(rows), np.stack(rows)
    assert batch["weights"].shape == batch["labels"].shape and batch["weights"].dtype == torch.float32
    assert (where < 0).any()
    for position, weight in zip(where.flatten(), batch["weights"].flatten().tolist(), strict=True):
        assert weight == (np.float32(values[position]) if position >= 0 else 0)
    assert "weights" not in Collator(split)(rows)
    with pytest.raises(KdlibError, match=f"for each of the {len(values)} positions of the split 'train', got 3"):
        Collator(split, weights=values[:3])


def test_training_weighs_each_token_and_validation_none(tmp_path):
    split, model, teacher = make_split(documents=20), make_model(0), make_model(1)
    values = token_weights(split)
    index = pack(split.windows(BLOCK), BLOCK)
    where = index[:4][index[:4] >= 0]
    label = torch.from_numpy(split.tokens[where + 1].astype(np.int64))[:, None]
    log_s, log_t = (dense_log_probs(one, split)[where] for one in (model, teacher))
    ce, kd = -log_s.gather(1, label)[:, 0], (log_t.exp() * (log_t - log_s)).sum(1)
    expected = (torch.from_numpy(values[where]) * (0.7 * kd + 0.3 * ce)).sum() / len(where)
    trainer, plain = (
        make_trainer(tmp_path / name, model, split, teacher=teacher, kd_weight=0.7, weights=given)
        for name, given in (("weighted", values), ("plain", None))
    )
    loss = trainer.compute_loss(model, trainer.data_collator(list(index[:4])))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.evaluate() == plain.evaluate()


def test_weights_of_1_train_alike_bit_for_bit_and_others_do_not(tmp_path):
    split = make_split(documents=20)
    ones = np.ones(len(split.tokens))
    plain, alike, other = (
        trained(tmp_path / name, split=split, weights=given)[0]
        for name, given in (("plain", None), ("alike", ones), ("other", token_weights(split)))
    )
    assert same(plain, alike) and distance(plain, other) > 0.1 * distance(plain, weights(make_model(0)))


def test_weight_zero_is_cross_entropy_bit_for_bit(tmp_path):
    split, teacher = make_split(documents=20), make_model(1)
    ce, _ = trained(tmp_path / "ce", split=split)
    cached, _ = trained(tmp_path / "kd", split=split, targets=cache_of(tmp_path / "targets", teacher, split))
    online, trainer = trained(tmp_path / "online", split=split, teacher=teacher)
    assert same(ce, cached) and same(ce, online)
    assert column(trainer, "kd") == []


class Exact(TargetCache):
    """A cache that keeps the whole distribution in float32."""

    def __init__(self, teacher, split, temperature):
        log_t = dense_log_probs(teacher, split, temperature).nan_to_num(0)
        self.t, self.temperature, self.guard = log_t.exp().float(), temperature, {"vocabulary": VOCABULARY}
        self.entropy = -(log_t.exp() * log_t).sum(1).float()

    def read(self, positions):
        positions = torch.from_numpy(positions.reshape(-1)).clamp(min=0)
        ids = torch.arange(VOCABULARY).expand(len(positions), -1)
        return SparseTargets(ids, self.t[positions], None, self.entropy[positions], self.temperature)


@pytest.mark.parametrize(("temperature", "kd_weight"), [(1.0, 1.0), (2.0, 0.6)])
def test_cached_and_online_teachers_train_alike_up_to_the_caches_rounding(tmp_path, temperature, kd_weight):
    split, teacher = make_split(documents=20), make_model(1)
    options = {"split": split, "kd_weight": kd_weight, "temperature": temperature}
    online, trainer = trained(tmp_path / "online", teacher=teacher, **options)
    exact, other = trained(tmp_path / "exact", targets=Exact(teacher, split, temperature), **options)
    # All but one probability and the tail are the whole distribution, each rounded to values 9 % apart.
    almost = cache_of(tmp_path / "targets", teacher, split, "topk", VOCABULARY - 1, temperature)
    topk, _ = trained(tmp_path / "topk", targets=almost, **options)
    whole = cache_of(tmp_path / "whole", teacher, split, "dense")
    dense, _ = trained(tmp_path / "dense", targets=whole, **options)
    ce, _ = trained(tmp_path / "ce", split=split)
    moved = distance(online, weights(make_model(0)))
    assert distance(online, exact) < 1e-4 * moved
    assert distance(online, topk) < 5e-2 * moved
    assert distance(online, dense) < 1e-2 * moved
    assert distance(online, ce) > 0.3 * moved
    for name in ("loss", "ce", "kd"):
        assert np.allclose(np.float64(column(trainer, name)), np.float64(column(other, name)), atol=1e-4)


class Gradients(TrainerCallback):
    """The gradients that the latest step was taken with."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.found = {name: one.grad.clone() for name, one in model.named_parameters()}


def target_of(source, folder, teacher, split, temperature):
    """What the trainer is given, and a function that reads for itself: flat position -> target [V] and its entropy."""

    def whole(log_t):
        return log_t.exp(), -(log_t.exp() @ log_t)

    if source == "online":
        log_probs = dense_log_probs(teacher, split, temperature)
        return {"teacher": teacher}, lambda position: whole(log_probs[position])
    cache = cache_of(folder, teacher, split, source, temperature=1.0 if source == "dense" else temperature)

    def read(position):
        found = cache.read(np.array([position]))
        if source == "dense":
            return whole(torch.log_softmax((found.hidden @ found.weight.T)[0].double() / temperature, 0))
        t = torch.zeros(VOCABULARY, dtype=torch.float64)
        return t.scatter_add_(0, found.ids[0], found.weights[0].double()), found.entropy[0].double()

    return {"targets": cache}, read


def step_by_hand(student, split, windows, target, kd_weight, temperature):
    """Mean CE, KD and loss over all tokens of the windows, each alone, from the logits transformers itself returns."""
    ce, kd = 0.0, 0.0
    for start, length in windows.tolist():
        tokens = torch.from_numpy(split.tokens[start : start + length + 1].astype(np.int64))
        for place, logits in enumerate(student(tokens[None, :-1]).logits[0]):
            t, entropy = target(start + place)
            ce = ce - torch.log_softmax(logits, 0)[tokens[place + 1]]
            kd = kd - temperature**2 * (t @ torch.log_softmax(logits / temperature, 0) + entropy)
    ce, kd = ce / windows[:, 1].sum(), kd / windows[:, 1].sum()
    return {"ce": ce, "kd": kd, "loss": kd_weight * kd + (1 - kd_weight) * ce}


# Each architecture teaches another.
@pytest.mark.parametrize(("architecture", "teacher"), [("llama", "qwen3"), ("gpt2", "llama"), ("qwen3", "gpt2")])
@pytest.mark.parametrize("source", ["online", "sampled", "dense"])
def test_a_whole_step_is_that_of_dense_logits_of_each_window_alone(tmp_path, architecture, teacher, source):
    kd_weight, temperature = 0.6, 2.0
    split = make_split(documents=20, longest=12)
    windows = split.windows(BLOCK)[:12]
    index = pack(windows, BLOCK)
    # Rows of several windows and of padding, in micro-batches of unequal numbers of tokens.
    assert len(index) % 2 == 0 and len(windows) > len(index) and len(set((index >= 0).sum(1))) > 1
    student, teacher = built(architecture, 0).double(), built(teacher, 1, width=24).double()
    options, target = target_of(source, tmp_path / "targets", teacher, split, temperature)
    expected = step_by_hand(student, split, windows, target, kd_weight, temperature)
    names = [name for name, _ in student.named_parameters()]
    by_hand = dict(zip(names, torch.autograd.grad(expected["loss"], list(student.parameters())), strict=True))

    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    values = settings(epochs=1, batch_size=2, gradient_accumulation=len(index) // 2)
    objective = objective_of(kd_weight=kd_weight, temperature=temperature, **options)
    trainer = DistillationTrainer(student, values, TrainingText(split), index, tmp_path, objective)
    trainer.args.max_grad_norm = 0.0
    step = Gradients()
    trainer.add_callback(step)
    assert trainer.fit()["steps"] == 1
    for name, value in expected.items():
        assert float(column(trainer, name)[0]) == pytest.approx(value.item(), rel=1e-5)
    for name, gradient in by_hand.items():
        # Norms and the eager softmax are computed in float32, and so are logits of cached hidden states.
        assert (step.found[name] - gradient).norm() < 1e-5 * gradient.norm(), name
    # Adam's first step: both moments are the gradient's own.
    rate, decay = values.learning_rate, values.weight_decay
    for name, value in student.named_parameters():
        moved = step.found[name] / (step.found[name].abs() + 1e-8) + decay * (value.ndim > 1) * before[name]
        assert (value - (before[name] - rate * moved)).abs().max() < 1e-9, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_teacher_in_the_loop_has_no_dropout_while_the_students_stays_on(tmp_path, architecture):
    split = make_split(documents=20)
    modes = {"teacher": set(), "student": set()}

    def watch(model, name):
        attention = next(module for path, module in model.named_modules() if path.endswith(("self_attn", ".attn")))
        attention.register_forward_hook(lambda module, *_: modes[name].add(module.training))
        return model

    runs, options = {}, {"split": split, "kd_weight": 0.9, "validation": False, "changes": {"epochs": 1}}
    for dropout in (0.0, 0.5):
        teacher = watch(built(architecture, 1, dropout).train(), "teacher")
        student = watch(built(architecture, 0, dropout=0.3), "student")
        runs[dropout], _ = trained(tmp_path / str(dropout), student, teacher=teacher, **options)
    assert modes == {"teacher": {False}, "student": {True}}
    assert same(runs[0.0], runs[0.5])
    steady, _ = trained(tmp_path / "steady", built(architecture, 0), teacher=built(architecture, 1), **options)
    assert not same(runs[0.0], steady)


def test_adapters_on_the_teachers_own_base_keep_their_dropout_and_leave_the_teacher_alone(tmp_path):
    teacher = make_model(1)
    student = models.lora(teacher, 2, 4.0, 0.5, seed=0)
    before, modes = weights(teacher), {"teacher": set(), "student": set()}
    teacher.model.layers[0].register_forward_hook(lambda module, *_: modes["teacher"].add(module.training))
    dropout = next(module for name, module in student.named_modules() if name.endswith("lora_dropout.default"))
    dropout.register_forward_hook(lambda module, *_: modes["student"].add(module.training))
    trained(tmp_path, student, teacher=teacher, kd_weight=0.5, validation=False)
    assert modes == {"teacher": {False}, "student": {True}}
    assert same(before, weights(teacher))


def test_a_teacher_that_is_the_students_own_base_is_refused(tmp_path):
    student = models.lora(make_model(1), 2, 4.0, 0.5, seed=0)
    with pytest.raises(KdlibError, match="share parameters"):
        make_trainer(tmp_path, student, teacher=student.get_base_model(), kd_weight=0.5)


def test_measuring_the_validation_loss_changes_nothing(tmp_path):
    model = make_model(0, dropout=0.3)
    watched, trainer = trained(tmp_path / "watched", model)
    alone, _ = trained(tmp_path / "alone", make_model(0, dropout=0.3), validation=False)
    assert same(watched, alone)
    held_out, index = trainer.validation
    where = index[index >= 0]
    log_s = dense_log_probs(model.eval(), held_out)[where]
    nll = -log_s.gather(1, torch.from_numpy(held_out.tokens[where + 1].astype(np.int64))[:, None]).mean()
    assert float(column(trainer, "validation_nll")[-1]) == pytest.approx(nll.item(), rel=1e-5)


def test_a_short_run_measures_part_of_the_validation_rows_and_a_long_one_all(tmp_path):
    held_out = make_split("validation", seed=1, documents=20)
    rows = pack(held_out.windows(BLOCK), BLOCK)
    # 7 steps of 4 rows an epoch: a fortieth of 4, of 140 and of far too many rows.
    for epochs, most in ((0.1, 1), (5, 3), (400, len(rows))):
        trainer = make_trainer(tmp_path, validation=held_out, validation_index=rows, changes={"epochs": epochs})
        assert np.array_equal(trainer.validation[1], rows[:: math.ceil(len(rows) / most)])
        assert 1 <= len(trainer.validation[1]) <= most


# Learning rates and decay


def test_multipliers_freeze_slow_down_and_take_the_first_match(tmp_path):
    before = weights(make_model(0, layers=2))
    multipliers = {r"embed_tokens|\.norm\.": 0, r"layers\.1\.mlp": 0.5, r"layers\.1": 2.0}
    after, trainer = trained(tmp_path, make_model(0, layers=2), multipliers=multipliers)
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            expected = 0.5 if "layers.1.mlp" in name else 2.0 if "layers.1" in name else 1.0
            assert group["initial_lr"] == pytest.approx(1e-2 * expected)
    assert set(names.values()) == frozen - {"lm_head.weight"}


def test_half_the_rate_takes_half_the_step():
    """Adam's first step is the learning rate times the gradient's sign, whatever the gradient's size."""
    model = make_model(0)
    groups = parameter_groups(model, {r"mlp": 0.5}, learning_rate=1e-3, weight_decay=0.0)
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    torch.optim.AdamW(groups, lr=1.0).step()
    for name, value in model.named_parameters():
        expected = 0.5e-3 if "mlp" in name else 1e-3
        assert torch.allclose(before[name] - value, torch.full_like(value, expected), rtol=1e-3)


def test_norms_and_biases_are_not_decayed():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": BLOCK}
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=VOCABULARY, **sizes))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, {}, 1e-2, 0.1)
    undecayed = {names[id(one)] for group in groups if group["weight_decay"] == 0 for one in group["params"]}
    assert undecayed == {name for name in names.values() if "ln_" in name or name.endswith("bias")}
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ({"nothing_like_it": 0.5}, r"match no parameter: \['nothing_like_it'\].*embed_tokens"),
        ({"(": 0.5}, "malformed regular expression"),
        ({"": 0}, "freeze every parameter"),
    ],
)
def test_a_multiplier_that_does_nothing_or_too_much_is_refused(tmp_path, multipliers, message):
    trainer = make_trainer(tmp_path, multipliers=multipliers)
    with pytest.raises(KdlibError, match=message):
        trainer.fit()
    assert not trainer.step_log.path.exists()


# Steps and the log


@pytest.mark.parametrize(
    ("rows", "changes", "expected"),
    [
        (28, {}, 14),
        (31, {}, 14),  # the last, partial batch of an epoch is left out
        (28, {"epochs": 0.5}, 4),
        (28, {"epochs": 0.01}, 1),
        (28, {"epochs": 0}, 0),
        (3, {}, 2),
        (28, {"gradient_accumulation": 2}, 8),  # 2 + 2 + 2 + 1 batches an epoch
        (28, {"gradient_accumulation": 2, "epochs": 3}, 12),
        (28, {"gradient_accumulation": 100}, 2),
    ],
)
def test_steps_are_those_of_whole_batches(rows, changes, expected):
    assert steps(settings(**changes), rows) == expected


def test_whole_epochs_see_all_tokens_as_often_whatever_the_accumulation(tmp_path):
    split = make_split(documents=20)
    index = pack(split.windows(BLOCK), BLOCK)[:20]
    for accumulation in (1, 3):
        values = settings(epochs=3, gradient_accumulation=accumulation)
        trainer = DistillationTrainer(make_model(0), values, TrainingText(split), index, tmp_path / str(accumulation))
        assert trainer.fit()["tokens"] == 3 * (index >= 0).sum()
        assert float(column(trainer, "epoch")[-1]) == 3


def test_the_log_has_a_row_a_step_with_its_losses_tokens_and_learning_rate(tmp_path, capsys):
    minimised = []

    class Watched(DistillationTrainer):
        def log(self, logs, *arguments):
            minimised.extend([logs["loss"]] if "loss" in logs else [])
            super().log(logs, *arguments)

    split = make_split(documents=20)
    targets = cache_of(tmp_path / "targets", make_model(1), split)
    changes = {"epochs": 3, "gradient_accumulation": 2, "warmup": 0.25}
    trainer = make_trainer(tmp_path, split=split, targets=targets, kd_weight=0.9, changes=changes, kind=Watched)
    about = trainer.fit()
    text = trainer.step_log.path.read_text()
    assert tuple(text.splitlines()[0].split(",")) == training.LOG_COLUMNS
    rows = read_log(trainer.step_log.path)
    taken, measured = [row for row in rows if row["loss"]], [row for row in rows if row["validation_nll"]]
    assert [int(row["step"]) for row in taken] == list(range(1, trainer.steps + 1))
    assert int(measured[-1]["step"]) == trainer.steps and 2 <= len(measured) <= training.CHECKPOINTS
    for name in ("step", "tokens", "seconds", "epoch"):
        values = np.float64([row[name] for row in rows])
        assert (np.diff(values) >= 0).all()
    total, warm = trainer.steps, round(0.25 * trainer.steps)
    for row, loss in zip(taken, minimised, strict=True):
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(row["loss"]) == pytest.approx(0.9 * float(row["kd"]) + 0.1 * float(row["ce"]), rel=1e-5)
        done = int(row["step"]) - 1
        cosine = 0.5 * (1 + math.cos(math.pi * (done - warm) / (total - warm)))
        assert float(row["learning_rate"]) == pytest.approx(1e-2 * (done / warm if done < warm else cosine), rel=1e-4)
        assert int(row["memory_bytes"]) > 10**7
    labels = (pack(split.windows(BLOCK), BLOCK) >= 0).sum()
    batch_tokens = np.diff([0, *(int(row["tokens"]) for row in taken)])
    assert (batch_tokens > 0).all() and (batch_tokens <= 2 * 4 * BLOCK).all() and sum(batch_tokens) <= 3 * labels
    assert about["tokens"] == sum(batch_tokens) and about["steps"] == total
    assert about["final_loss"] == pytest.approx(np.mean([float(row["loss"]) for row in taken][-20:]))
    seen, pairs = models.extent(models.window_lengths(trainer.train_dataset.index))
    step = 3 * models.operations(trainer.model).forward(about["tokens"], about["tokens"] * pairs / seen)
    assert about["flops"] == about["work"]["train"]["flops"] == pytest.approx(step, abs=2)
    assert capsys.readouterr().out == ""


def test_no_epochs_leave_the_model_as_initialised(tmp_path):
    after, trainer = trained(tmp_path, changes={"epochs": 0})
    assert same(after, weights(make_model(0)))
    about = trainer.fit()
    assert (about["steps"], about["tokens"], about["final_loss"], about["tokens_per_second"]) == (0, 0, None, None)
    assert not trainer.step_log.path.exists()


def test_a_student_of_another_vocabulary_is_refused_before_it_trains(tmp_path):
    padded = make_model(0, vocabulary=VOCABULARY + 3)
    cache = NextTokens(make_split())
    with pytest.raises(KdlibError, match=f"got {{'student': {VOCABULARY + 3}, 'targets': {VOCABULARY}}} tokens"):
        make_trainer(tmp_path, padded, targets=cache, kd_weight=0.9)
    with pytest.raises(KdlibError, match=f"'teacher': {VOCABULARY}}} tokens"):
        make_trainer(tmp_path, padded, teacher=make_model(1), kd_weight=0.9)


def test_features_need_the_teacher_itself(tmp_path):
    model = make_model(0)
    features = FeatureLoss(model, make_model(1), "hidden_mse", seed=0)
    with pytest.raises(KdlibError, match="must have a teacher in the loop, got none: cached targets hold no features"):
        make_trainer(tmp_path, model, features=features)


def test_a_split_without_rows_is_refused(tmp_path):
    split = make_split()
    with pytest.raises(KdlibError, match="'train' must have rows to train on, got none"):
        nothing = pack(split.windows(BLOCK)[:0], BLOCK)
        DistillationTrainer(make_model(0), settings(), TrainingText(split), nothing, tmp_path)


class Greedy(DistillationTrainer):
    """Takes 200 MB within its third step, and gives them back before the step ends."""

    def compute_loss(self, *arguments, **options):
        if self.state.global_step == 2:
            held = torch.ones(50_000_000, device=self.args.device)
            self.held = memory_bytes()
            del held
        return super().compute_loss(*arguments, **options)


def test_peak_memory_is_that_within_a_step_and_memory_in_use_that_between_steps(tmp_path):
    trainer = make_trainer(tmp_path, kind=Greedy)
    about = trainer.fit()
    peaks = [int(value) for value in column(trainer, "peak_memory_bytes")]
    assert peaks == sorted(peaks) and about["peak_memory_bytes"] == peaks[-1]
    assert peaks[-1] > trainer.held - 10**7 > max(int(value) for value in column(trainer, "memory_bytes")) + 10**8


def test_the_peak_resident_set_is_in_bytes_on_linux_and_on_macos(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=3))
    for platform, expected in (("linux", 3072), ("darwin", 3)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_memory_bytes() == expected


@pytest.mark.parametrize("stop", [9, None])
def test_a_log_written_without_the_peak_is_taken_up(tmp_path, stop):
    whole, _ = trained(tmp_path / "whole")
    if stop is None:
        trained(tmp_path / "old")
    else:
        interrupted(tmp_path / "old", stop)
    path, place = tmp_path / "old" / "log.csv", training.LOG_COLUMNS.index("peak_memory_bytes")
    cells = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("".join(",".join(row[:place] + row[place + 1 :]) + "\n" for row in cells))
    trainer = make_trainer(tmp_path / "old")
    about = trainer.fit()
    assert same(whole, weights(trainer.model)) and logged(tmp_path / "old") == logged(tmp_path / "whole")
    assert about["peak_memory_bytes"] >= max(map(int, column(trainer, "peak_memory_bytes")), default=10**7) >= 10**7


class Asking(DistillationTrainer):
    """Counts the labels of the batches that the teacher's body runs on."""

    asked = 0

    def compute_loss(self, model, inputs, **options):
        tokens = (inputs["labels"] >= 0).sum().item()

        def count(*_):
            self.asked += tokens

        handle = self.objective.teacher.model.register_forward_hook(count)
        try:
            return super().compute_loss(model, inputs, **options)
        finally:
            handle.remove()


@pytest.mark.parametrize("shape", [{"start": 1, "end": 0}, {"start": 0, "end": 1}], ids=["1 to 0", "0 to 1"])
def test_tokens_of_the_teacher_are_those_it_was_asked_for(tmp_path, shape):
    options = {"teacher": make_model(1), "changes": {"gradient_accumulation": 2, "epochs": 3}}
    switch = Schedule(shape="step", **shape)
    trainer = make_trainer(tmp_path / "whole", kd_weight=switch, kind=Asking, **options)
    about = trainer.fit()
    assert 0 < about["teacher_tokens"] == trainer.asked < about["tokens"]
    interrupted(tmp_path / "cut", 7, kd_weight=switch, **options)
    again = make_trainer(tmp_path / "cut", kd_weight=switch, **options)
    assert again.fit()["teacher_tokens"] == about["teacher_tokens"]


def test_tokens_of_the_teacher_are_all_or_none_without_a_schedule(tmp_path):
    split, teacher = make_split(documents=20), make_model(1)
    always, never = make_trainer(tmp_path / "always", teacher=teacher, kd_weight=0.5), make_trainer(tmp_path / "ce")
    cached = make_trainer(tmp_path / "kd", split=split, kd_weight=0.5, targets=NextTokens(split))
    idle = make_trainer(tmp_path / "idle", teacher=teacher)
    student = make_model(0)
    inside = make_trainer(
        tmp_path / "inside", student, teacher=teacher, features=FeatureLoss(student, teacher, "hidden_mse")
    )
    found = {trainer: trainer.fit() for trainer in (always, never, cached, idle, inside)}
    for trainer, about in found.items():
        assert about["teacher_tokens"] == (about["tokens"] if trainer in (always, inside) else 0)


def test_frozen_parameters_are_not_charged_for_gradients_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path, multipliers={"mlp": 0})
    about, whole = trainer.fit(), make_trainer(tmp_path / "whole").fit()
    frozen = models.parameters_by_component(trainer.model)["mlp"]
    assert about["flops"] == whole["flops"] - 2 * frozen * about["tokens"]


# One process and one device


def test_on_a_machine_of_two_gpus_one_device_trains(tmp_path, monkeypatch):
    plain, _ = trained(tmp_path / "plain")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    after, trainer = trained(tmp_path / "two")
    assert same(plain, after) and trainer.args.train_batch_size == 4
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


def test_several_processes_for_one_run_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KdlibError, match="one process, got WORLD_SIZE=2.*kdlib make --all --share 0/2"):
        make_trainer(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    make_trainer(tmp_path)


# Compilation


def test_without_a_compiler_training_goes_on_uncompiled(tmp_path, monkeypatch, capsys):
    plain, _ = trained(tmp_path / "plain", validation=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    fallback, _ = trained(tmp_path / "fallback", validation=False, changes={"compile": True})
    assert same(plain, fallback)
    assert "no compiler (g++ or clang++) found" in capsys.readouterr().out.replace(os.environ.get("CXX", "g++"), "g++")


def test_with_a_compiler_the_body_that_trains_is_the_compiled_one(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch, "compile", lambda body, **_: compiled.append(body) or (lambda *a, **b: body(*a, **b)))
    monkeypatch.setattr(fused, "_compiled_softmax_", lambda: torch.compile(fused._softmax_))
    plain, _ = trained(tmp_path / "plain", validation=False)
    assert compiled == []
    model = make_model(0)
    again, _ = trained(tmp_path / "compiled", model, validation=False, changes={"compile": True})
    assert compiled[0] is model.model and set(compiled[1:]) == {fused._softmax_} and same(plain, again)


# Stopping and going on


class Interrupt(TrainerCallback):
    """Ctrl-C before the step after ``step``."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(folder, step, *arguments, **options):
    trainer = make_trainer(folder, *arguments, **options)
    trainer.add_callback(Interrupt(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


LOGGED = ("step", "epoch", "loss", "ce", "kd", "learning_rate", "tokens", "validation_nll")


def logged(folder):
    return [tuple(row[name] for name in LOGGED) for row in read_log(folder / "log.csv")]


def make_student(kind):
    if kind in ARCHITECTURES:
        return built(kind, 0, dropout=0.3)
    return models.lora(make_model(0), 2, 4.0, 0.3, seed=0) if kind == "lora" else make_model(0, dropout=0.3)


# Before the first checkpoint, within an epoch, at the end of one, right before the last step.
@pytest.mark.parametrize(
    ("student", "stops"), [("whole", (1, 7, 8, 11)), ("lora", (7,)), ("gpt2", (7,)), ("qwen3", (7,))]
)
def test_a_run_interrupted_in_any_epoch_goes_on_to_the_same_weights_and_log(tmp_path, student, stops):
    split = make_split(documents=20)
    targets = cache_of(tmp_path / "targets", make_model(1), split)
    changes = {"epochs": 3, "gradient_accumulation": 2}
    options = {"split": split, "targets": targets, "kd_weight": 0.9, "changes": changes}
    whole, trainer = trained(tmp_path / "whole", make_student(student), **options)
    assert trainer.steps == 12
    for step in stops:
        folder = tmp_path / str(step)
        interrupted(folder, step, make_student(student), **options)
        resumed, again = trained(folder, make_student(student), **options)
        assert same(whole, resumed)
        assert logged(folder) == logged(tmp_path / "whole")
        seconds = np.float64([row["seconds"] for row in read_log(folder / "log.csv")])
        assert (np.diff(seconds) >= 0).all()
        assert again.step_log.tokens == trainer.step_log.tokens


def test_a_run_that_had_finished_is_read_back_without_another_step(tmp_path):
    # Ten steps, four an epoch: rows are left that one more step could take.
    changes = {"epochs": 2.5, "gradient_accumulation": 2}
    trainer = make_trainer(tmp_path, changes=changes)
    about = trainer.fit()
    assert about["steps"] == 10
    log = trainer.step_log.path.read_bytes()
    resumed, again = trained(tmp_path, make_model(5), changes=changes)
    assert same(resumed, weights(trainer.model))
    assert again.step_log.path.read_bytes() == log
    assert again.fit()["tokens"] == about["tokens"]


@pytest.mark.parametrize("state", [None, "", '{"global_step": 8'])
def test_an_unfinished_newest_checkpoint_is_skipped_and_removed(tmp_path, state):
    whole, trainer = trained(tmp_path / "whole")
    interrupted(tmp_path / "killed", 9)
    checkpoints = tmp_path / "killed" / "checkpoints"
    newest, older = (checkpoints / f"checkpoint-{step}" for step in (8, 6))
    assert newest_checkpoint(checkpoints) == newest
    (newest / "trainer_state.json").unlink()
    if state is not None:
        (newest / "trainer_state.json").write_text(state)
    assert newest_checkpoint(checkpoints) == older
    assert not newest.exists()
    resumed, _ = trained(tmp_path / "killed")
    assert same(whole, resumed) and logged(tmp_path / "killed") == logged(tmp_path / "whole")


NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize("student", ["whole", "lora"])
def test_a_checkpoint_that_lost_a_file_is_skipped_and_removed(tmp_path, student):
    options = {"changes": {"epochs": 1}}
    whole, _ = trained(tmp_path / "whole", make_student(student), **options)
    checkpoints = tmp_path / "whole" / "checkpoints"
    model = "model.safetensors" if student == "whole" else "adapter_model.safetensors"
    for name in (model, *NEEDED):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "checkpoints" / "checkpoint-7" / name).unlink()
        assert newest_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "checkpoint-6"
        assert os.listdir(folder / "checkpoints") == ["checkpoint-6"]
    resumed, _ = trained(tmp_path / "optimizer.pt", make_student(student), **options)
    assert same(whole, resumed)
    for checkpoint in checkpoints.iterdir():
        (checkpoint / "optimizer.pt").unlink()
    assert newest_checkpoint(checkpoints) is None and not any(checkpoints.iterdir())


def test_no_more_than_two_checkpoints_are_kept(tmp_path):
    trained(tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["checkpoint-12", "checkpoint-14"]


def test_a_log_cut_short_in_a_row_is_read_up_to_there(tmp_path):
    _, trainer = trained(tmp_path)
    rows = read_log(trainer.step_log.path)
    lines = trainer.step_log.path.read_bytes().splitlines(keepends=True)
    trainer.step_log.path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    assert read_log(trainer.step_log.path) == rows[:-1]


class Poison(TrainerCallback):
    """After ``step`` steps the weights are broken, or the gradients of the step that makes it ``step`` are."""

    def __init__(self, step, model, where):
        self.step, self.parameter, self.where = step, next(model.parameters()), where

    def on_step_begin(self, args, state, control, **_):
        if self.where == "weights" and state.global_step == self.step:
            self.parameter.data[0] = torch.nan

    def on_pre_optimizer_step(self, args, state, control, **_):
        if self.where == "gradients" and state.global_step + 1 == self.step:
            self.parameter.data[0] = torch.nan


@pytest.mark.parametrize("saved", [False, True])
def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, saved):
    trainer = make_trainer(tmp_path)
    step = 4 if saved else 1
    trainer.add_callback(Poison(step, trainer.model, "weights"))
    kept = str(tmp_path / "checkpoints" / "checkpoint-4") if saved else "none yet"
    with pytest.raises(KdlibError, match=f"loss became nan at step {step + 1} of 14.*{re.escape(kept)}"):
        trainer.fit()
    assert [int(row["step"]) for row in read_log(trainer.step_log.path) if row["loss"]] == list(range(1, step + 1))
    if saved:
        good = AutoModelForCausalLM.from_pretrained(kept)
        assert all(value.isfinite().all() for value in good.parameters())
        whole, _ = trained(tmp_path / "whole")
        resumed, _ = trained(tmp_path)
        assert same(whole, resumed)


def test_a_gradient_that_is_not_finite_never_becomes_a_checkpoint(tmp_path):
    model = make_model(0)
    parameter = model.model.layers[0].mlp.up_proj.weight
    calls = itertools.count(1)
    # The loss of step 4 is finite; its gradient is not, and step 4 would be saved.
    parameter.register_hook(lambda gradient: gradient * (torch.inf if next(calls) == 4 else 1))
    with pytest.raises(KdlibError, match="gradient's norm became (inf|nan) at step 4 of 14.*checkpoint-2"):
        make_trainer(tmp_path, model).fit()
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"


# A killed process


def _train_and_die(folder, event):
    split = make_split(documents=20)
    targets = TargetCache(folder.parent / "targets", {}, 1.0)
    if event:
        die_at(event, folder)
    decay = {"shape": "cosine", "start": 0.0, "end": 2.0}
    changes = {"epochs": 3, "gradient_accumulation": 2, "weight_decay": decay}
    after, _ = trained(folder, make_student("whole"), split=split, targets=targets, kd_weight=0.9, changes=changes)
    torch.save(after, folder.parent / f"{folder.name}.pt")


@pytest.mark.slow
def test_a_trainer_killed_at_random_moments_ends_with_the_weights_and_log_of_one_that_was_not(tmp_path):
    cache_of(tmp_path / "targets", make_model(1), make_split(documents=20))
    assert exit_code(_train_and_die, tmp_path / "whole", 0) == 0
    kills, unfinished = 0, 0
    for event in np.random.default_rng(0).integers(5, 40, 50):
        if exit_code(_train_and_die, tmp_path / "killed", event) == 0:
            break
        kills += 1
        found = (tmp_path / "killed" / "checkpoints").glob("checkpoint-*")
        unfinished += any(not (checkpoint / "trainer_state.json").is_file() for checkpoint in found)
    assert 3 <= kills < 50 and unfinished  # some fell into the saving of a checkpoint
    assert same(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "killed.pt"))
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "killed/checkpoints")) == sorted(os.listdir(tmp_path / "whole/checkpoints"))


def _train_compiled(folder, student, event):
    torch.set_num_threads(2)
    if event:
        die_at(event, folder)
    model = make_model(0, dropout=0.3) if student == "llama" else built(student, 0, dropout=0.3, width=32)
    # Batches of some 500 tokens: with fewer, one thread alone adds up what the embedding gets.
    changes = {"epochs": 4, "batch_size": 32, "compile": True}
    after, _ = trained(folder, model, split=make_split(documents=120), validation=False, changes=changes)
    torch.save(after, folder.parent / f"{folder.name}.pt")


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")), reason="needs a C++ compiler"
)
@pytest.mark.parametrize("student", ["llama", "gpt2"])  # GPT-2 looks up its positions too
def test_two_threads_of_compiled_training_repeat_it_bit_for_bit_killed_or_not(tmp_path, student):
    for name in ("whole", "again"):
        assert exit_code(_train_compiled, tmp_path / name, student, 0) == 0
    assert exit_code(_train_compiled, tmp_path / "killed", student, 40) == -signal.SIGKILL
    assert newest_checkpoint(tmp_path / "killed" / "checkpoints") is not None
    assert exit_code(_train_compiled, tmp_path / "killed", student, 0) == 0
    whole = torch.load(tmp_path / "whole.pt")
    for name in ("again", "killed"):
        assert same(whole, torch.load(tmp_path / f"{name}.pt")) and logged(tmp_path / name) == logged(tmp_path / "whole")


# After the last step

WAYS = {
    "plain": {"multipliers": {"mlp": 0}},
    "stages": {
        "stages": [
            Stage(share=0.4, learning_rate_multipliers={"mlp": 0}),
            Stage(share=0.6, learning_rate_multipliers={"mlp": 1, ".*": 0}),
        ]
    },
}


def train_whole(folder, way, seed=0):
    """Weights and metrics of a run of :func:`kdlib.training.train_model`."""
    folder.mkdir(exist_ok=True)
    text, validation = TrainingText(make_split(documents=20)), make_split("validation", seed=1, documents=4)
    model = make_model(seed)
    metrics = train_model(model, settings(), text, validation, BLOCK, folder, **WAYS[way])
    return weights(model), metrics


@pytest.mark.parametrize("way", WAYS)
def test_a_run_killed_after_its_training_is_read_back_with_its_metrics(tmp_path, monkeypatch, way):
    whole, metrics = train_whole(tmp_path, way)
    log = (tmp_path / "log.csv").read_bytes()
    monkeypatch.setattr(DistillationTrainer, "train", lambda *_, **__: pytest.fail("a step was taken"))
    again, found = train_whole(tmp_path, way, seed=5)
    assert same(whole, again) and found == metrics
    assert (tmp_path / "log.csv").read_bytes() == log
    assert metrics["tokens"] == int(read_log(tmp_path / "log.csv")[-1]["tokens"]) and metrics["teacher_tokens"] == 0


def _discard_and_die(folder, event):
    changes = itertools.count(1)

    def hook(name, _):
        if name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") and next(changes) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    discard_checkpoints(folder)


@pytest.mark.slow
# Before the first rename, after it, and while files are removed; stages have a folder each.
@pytest.mark.parametrize(("way", "events"), [("plain", (2, 3, 6)), ("stages", (2, 3, 4, 6))])
def test_a_kill_while_checkpoints_are_discarded_leaves_them_whole_or_out_of_sight(tmp_path, way, events):
    whole, metrics = train_whole(tmp_path / "whole", way)
    before = contents(tmp_path / "whole")
    for event in events:
        folder = tmp_path / str(event)
        shutil.copytree(tmp_path / "whole", folder)
        assert exit_code(_discard_and_die, folder, event) == -signal.SIGKILL
        seen = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        kept = {name: text for name, text in contents(folder).items() if not name.startswith(".")}
        assert kept == {name: text for name, text in before.items() if name.split("/")[0] in seen}
        after, found = train_whole(folder, way)
        assert same(whole, after) and found["tokens"] == metrics["tokens"] and found["flops"] == metrics["flops"]
        discard_checkpoints(folder)
        assert os.listdir(folder) == ["log.csv"] and logged(folder) == logged(tmp_path / "whole")
    assert exit_code(_discard_and_die, tmp_path / "whole", 0) == 0
    assert contents(tmp_path / "whole") == {"log.csv": before["log.csv"]}


# What is left behind


def tensors():
    gc.collect()
    return sum(one.nbytes for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter))


def test_memory_is_returned_between_rounds_of_training_and_evaluation(tmp_path):
    def round_of(number):
        model = make_model(0, vocabulary=8_000)
        trained(tmp_path / str(number), model, changes={"epochs": 0.25}, validation=False)
        dense_log_probs(model, make_split(documents=2))
        return tensors(), psutil.Process().memory_info().rss

    rounds = [round_of(number) for number in range(5)]
    # A round holds weights, gradients and two moments of a megabyte each; a leak would keep some of them every time.
    assert max(held for held, _ in rounds) - rounds[1][0] < 10**5
    assert rounds[-1][1] - rounds[1][1] < 8 * 10**6


def test_loading_the_same_data_twice_leaves_the_disk_as_it_was(tmp_path):
    split = make_split()
    save_split(split, tmp_path / "data")
    cache_of(tmp_path / "targets", make_model(0), split)

    def state():
        times = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
        return times, contents(tmp_path)

    before = state()
    for _ in range(2):
        mapped = load_split(tmp_path / "data", "train")
        rows = list(pack(mapped.windows(BLOCK), BLOCK))
        batch = Collator(mapped, TargetCache(tmp_path / "targets", {}, 1.0))(rows)
        assert len(batch["targets"]) == batch["labels"].numel()
        assert state() == before
    assert json.loads((tmp_path / "targets" / "manifest.json").read_text())["tokens"] == len(predicting(split))
