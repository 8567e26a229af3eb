"""Operations against those that PyTorch's own counter sees, product by product.

The counter sees what is computed: attention over the whole square of a window, of which half is masked. Given that square
for the pairs, counted and seen are equal to the last operation.
"""

import numpy as np
import pytest
import torch
from tiny import BLOCK, VOCABULARY, make_model, make_split
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from kdlib import models
from kdlib.cache import Kind, ModelTeacher, TargetCache, write_targets
from kdlib.data.corpus import pack
from kdlib.data.text import TrainingText
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.evaluation import fidelity, metrics, reliability
from kdlib.evaluation.metrics import evaluate
from kdlib.losses import DenseTargets, SparseTargets, balance, linear_distillation_loss
from kdlib.losses.divergences import DIVERGENCES
from kdlib.losses.features import FeatureLoss
from kdlib.study.parameters import TrainingParameters
from kdlib.study.schedules import Schedule, Stage
from kdlib.training import read_log, train_model
from kdlib.training.objective import Distillation, Objective
from kdlib.training.work import (
    Text,
    feature_operations,
    group_flops,
    output_layer,
    training_flops,
    training_work,
)

V, ROWS, LENGTH = 48, 3, 16
TOKENS, SQUARE = ROWS * LENGTH, ROWS * LENGTH**2
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": {"num_key_value_heads": 4, "tie_word_embeddings": True, "intermediate_size": 40},
    "llama, grouped queries": {"num_key_value_heads": 2, "tie_word_embeddings": False, "intermediate_size": 40},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True, "intermediate_size": 40},
    "olmoe": MIXTURE | {"num_key_value_heads": 2, "tie_word_embeddings": False, "intermediate_size": 24},
}


def build(name="llama", layers=3, hidden=32, seed=0, **changes):
    sizes = {"vocab_size": V, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "max_position_embeddings": 64}
    config = AutoConfig.for_model(name.split(",")[0], **sizes | special | CONFIGS[name] | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if "olmoe" in name:
        model.set_experts_implementation("eager")  # the grouped product of a GPU is one operator that the counter does not know
    return model


def addmm_(self, left, right, **_):
    return 2 * left[0] * left[1] * right[1]


def seen_by_counter(run) -> int:
    # In-place and batched ones as well, which the counter leaves out.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        run()
    return counter.get_total_flops()


def ids(rows=ROWS, length=LENGTH):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(0))


def logits(model):
    return model(ids(), use_cache=False).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_backward_are_what_the_operators_take(name):
    model, counted = build(name), models.operations(build(name))
    with torch.no_grad():
        seen = seen_by_counter(lambda: logits(model))
    assert counted.forward(TOKENS, SQUARE) == seen
    seen = seen_by_counter(lambda: logits(model).sum().backward())
    assert counted.forward(TOKENS, SQUARE) + counted.backward(TOKENS, SQUARE) == seen
    # What the mathematics needs: in each row token k sees k tokens, itself included.
    tokens, pairs = models.extent([LENGTH] * ROWS)
    assert (tokens, pairs) == (TOKENS, ROWS * sum(range(1, LENGTH + 1)))
    assert counted.forward(TOKENS, SQUARE) - counted.forward(tokens, pairs) == counted.attention * (SQUARE - pairs)


def test_a_mixture_takes_the_experts_that_a_token_meets():
    sizes = {"num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 16, "vocab_size": 353, "num_key_value_heads": 4}
    model = build("olmoe", layers=2, **sizes)
    counts, counted = models.parameters_by_component(model), models.operations(model)
    assert counts["non_embedding"] + counts["head"] == 220_480
    # 7/8 of the experts' three matrices in two layers are not met.
    assert (counted.body + counted.head) // 2 + counts["norms"] == 220_480 - 7 * 64 * 3 * 32 * 16 * 2 // 8 == 48_448


def test_an_ensemble_takes_what_its_members_take():
    members = [build(seed=1), build("qwen3", layers=2, seed=2)]
    one, two = map(models.operations, members)
    both = models.operations(EnsembleForCausalLM.from_members(members))
    assert both == one + two and both.forward(7, 9) == one.forward(7, 9) + two.forward(7, 9)


def frozen(model, pattern):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern not in name)
    return model


@pytest.mark.parametrize("name", ["llama", "llama, grouped queries", "gpt2", "qwen3"])
@pytest.mark.parametrize("pattern", ["mlp", "attn", "embed_tokens", "lm_head", "norm", "layers.1."])
def test_a_frozen_matrix_has_no_gradient_of_its_own(name, pattern):
    pattern = {"embed_tokens": "wte", "layers.1.": "h.1.", "norm": "ln_"}.get(pattern, pattern) if name == "gpt2" else pattern
    model = frozen(build(name), pattern)
    counted = models.operations(model)
    seen = seen_by_counter(lambda: logits(model).sum().backward())
    assert counted.forward(TOKENS, SQUARE) + counted.backward(TOKENS, SQUARE) == seen


@pytest.mark.parametrize("name", ["llama, grouped queries", "gpt2"])
@pytest.mark.parametrize("lowest", [1, 2, "norm", "head"])
def test_what_is_frozen_below_all_that_is_trained_takes_no_backward_pass(name, lowest):
    model = build(name, tie_word_embeddings=False)
    blocks, last = (model.transformer.h, model.transformer.ln_f) if name == "gpt2" else (model.model.layers, model.model.norm)
    model.requires_grad_(False)
    for part in [*(blocks[lowest:] if isinstance(lowest, int) else []), *([last] if lowest != "head" else []), model.lm_head]:
        part.requires_grad_(True)
    counted = models.operations(model)
    seen = seen_by_counter(lambda: logits(model).sum().backward())
    assert counted.forward(TOKENS, SQUARE) + counted.backward(TOKENS, SQUARE) == seen
    assert counted.attention_backward == 2 * counted.attention * (3 - lowest if isinstance(lowest, int) else 0) // 3
    model.requires_grad_(False)
    assert models.operations(model).backward(TOKENS, SQUARE) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_adapters_are_trained_and_what_they_adapt_is_not(name):
    model = models.lora(build(name), rank=4, alpha=8, dropout=0.0, seed=0)
    counted = models.operations(model)
    seen = seen_by_counter(lambda: logits(model).sum().backward())
    # The first block's query, key and value matrices (and what adapts them) need not hand a gradient down; said in the docstring.
    first = [
        parameter.numel()
        for part, parameter in model.named_parameters()
        if ".0." in part and any(key in part for key in ("q_proj", "k_proj", "v_proj", "c_attn")) and parameter.ndim == 2
        if "lora_B" not in part
    ]
    spared = 2 * TOKENS * sum(first)
    total = counted.forward(TOKENS, SQUARE) + counted.backward(TOKENS, SQUARE)
    assert total - spared == seen
    assert counted.backward(TOKENS, SQUARE) < models.operations(models.merge(model)).backward(TOKENS, SQUARE)


def sparse_targets():
    chosen = torch.stack([torch.randperm(V)[:5] for _ in range(TOKENS)])
    return SparseTargets(chosen, torch.full((TOKENS, 5), 0.15), torch.full((TOKENS,), 0.25), torch.ones(TOKENS), 1.0)


def dense_targets(model):
    with torch.no_grad():
        hidden = models.body(model)(ids(), use_cache=False).last_hidden_state.flatten(0, 1)
    return DenseTargets(hidden, *models.head(model))


def a_step(student, targets, divergence="forward_kl", kd_weight=0.5):
    """One step: forward, fused loss, backward; ``targets`` are made within."""
    hidden = models.body(student)(ids(), use_cache=False).last_hidden_state.flatten(0, 1)
    labels = ids().flatten()
    made = targets() if targets else None
    weight = kd_weight if targets else 0.0
    linear_distillation_loss(hidden, *models.head(student), labels, made, weight, chunk_tokens=TOKENS, divergence=divergence).loss.backward()


WIDE = {"hidden": 56, "seed": 1}


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmoe"])
@pytest.mark.parametrize("signal", ["none", "sparse", "dense", "online"])
def test_a_step_takes_the_student_three_times_and_the_teacher_once(name, signal):
    student, teacher = build(name), build("llama, grouped queries", **WIDE)
    kept = dense_targets(teacher)
    targets = {"none": None, "sparse": sparse_targets, "dense": lambda: kept, "online": lambda: dense_targets(teacher)}[signal]
    counted = {"dense": output_layer(kept.weight), "online": models.operations(teacher)}.get(signal)
    text = Text(TOKENS, SQUARE, TOKENS if targets else 0, TOKENS if signal == "online" else 0)
    found = training_flops(models.operations(student), text, V, counted)
    assert sum(found.values()) == seen_by_counter(lambda: a_step(student, targets))
    expected = {"dense": 2 * TOKENS * V * 56, "online": models.operations(teacher).forward(TOKENS, SQUARE)}
    assert found["teacher_forward"] == expected.get(signal, 0)
    assert found["train"] == models.operations(student).forward(TOKENS, SQUARE) + models.operations(student).backward(TOKENS, SQUARE)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_takes_the_output_layers_and_what_it_compares_in_groups(divergence, monkeypatch):
    student, kept = build(), dense_targets(build(**WIDE))
    text = Text(TOKENS, SQUARE, TOKENS)
    found = training_flops(models.operations(student), text, V, output_layer(kept.weight), divergence, {"group": 16})
    monkeypatch.setattr(f"kdlib.losses.divergences.{divergence}.__defaults__", defaults_with_group_16(divergence))
    seen = seen_by_counter(lambda: a_step(student, lambda: kept, divergence))
    grouped = TOKENS * group_flops(divergence, {"group": 16}, V)
    assert (grouped > 0) == (divergence in ("sinkhorn", "mutual_information"))
    # Distances are no products, so the counter does not see them.
    assert sum(found.values()) - seen == (grouped if divergence == "sinkhorn" else 0)


def defaults_with_group_16(divergence):
    return tuple(16 if one == 32 else one for one in DIVERGENCES[divergence].__defaults__)


@pytest.mark.parametrize("objective", ["hidden_mse", "hidden_cosine", "relation", "attention_mse"])
@pytest.mark.parametrize("layers", ["last", "uniform_consecutive"])
def test_losses_on_features_take_projectors_and_relations(objective, layers):
    student, teacher = build("llama, grouped queries"), build(layers=6, **WIDE)
    features = FeatureLoss(student, teacher, objective, layers)
    segments, distances = torch.zeros(ROWS, LENGTH, dtype=torch.long), feature_operations(features, student, teacher)

    def step():
        with features.recorded():
            hidden = models.body(student)(ids(), use_cache=False).last_hidden_state
            with torch.no_grad():
                models.body(teacher)(ids(), use_cache=False)
        loss = linear_distillation_loss(hidden.flatten(0, 1), *models.head(student), ids().flatten()).loss
        (loss + features(segments)[0]).backward()

    text = Text(TOKENS, SQUARE, asked=TOKENS)
    found = training_flops(models.operations(student), text, V, models.operations(teacher), features=distances)
    assert sum(found.values()) == seen_by_counter(step)
    assert (distances == (0, 0)) == (objective == "attention_mse")


def test_a_balanced_step_takes_two_backward_passes_through_the_body():
    student, teacher = build(), build(layers=6, **WIDE)
    features = FeatureLoss(student, teacher, "hidden_mse", "last")
    segments, distances = torch.zeros(ROWS, LENGTH, dtype=torch.long), feature_operations(features, student, teacher)

    def step():
        with features.recorded():
            hidden = models.body(student)(ids(), use_cache=False).last_hidden_state
            with torch.no_grad():
                models.body(teacher)(ids(), use_cache=False)
        loss = linear_distillation_loss(hidden.flatten(0, 1), *models.head(student), ids().flatten()).loss
        balance.backward(loss, features(segments)[0], [*student.parameters(), *features.parameters()])

    text = Text(TOKENS, SQUARE, asked=TOKENS)
    found = training_flops(models.operations(student), text, V, models.operations(teacher), features=distances, balanced=True)
    assert sum(found.values()) == seen_by_counter(step)


def test_text_is_generated_at_the_price_of_one_pass_over_it():
    model = build(pad_token_id=0).eval()
    new = LENGTH - 1
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    prompt = torch.ones(ROWS, 1, dtype=torch.long)
    seen = seen_by_counter(lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options))
    # Each token sees the kept keys and values of those before it: nothing is masked, so causal pairs are what is computed.
    assert models.operations(model).forward(*models.extent([new] * ROWS)) == seen


def test_the_extent_of_packed_rows_is_that_of_their_windows():
    split = make_split(documents=40)
    lengths = split.windows(BLOCK)[:, 1]
    index = pack(split.windows(BLOCK), BLOCK)
    assert sorted(models.window_lengths(index)) == sorted(lengths)
    brute = sum(1 for length in lengths for query in range(length) for key in range(length) if key <= query)
    assert models.extent(lengths) == (lengths.sum(), brute) == models.extent(models.window_lengths(index))
    assert models.extent(models.window_lengths(index[:0])) == (0, 0)


def whole_windows(documents=4):
    """A split whose documents are one window of BLOCK tokens each: rows without padding."""
    split = make_split(documents=documents)
    stream = np.random.default_rng(0).integers(1, VOCABULARY, documents * (BLOCK + 1)).astype(np.int32)
    offsets = np.arange(documents + 1) * (BLOCK + 1)
    table = split.documents.assign(tokens=BLOCK)
    return type(split)("train", table, stream, offsets, 0)


def masked(counted, documents):
    """What is computed beyond the causal half of full windows."""
    return counted.attention * documents * (BLOCK**2 - BLOCK * (BLOCK + 1) // 2)


def test_evaluating_and_writing_targets_are_passes_over_the_text(tmp_path, monkeypatch):
    # Histograms are summed by products with one-hot bins, on purpose; they are no part of the model.
    for module in (metrics, reliability):
        monkeypatch.setattr(module, "count", lambda histogram, p, hit: histogram.add_(1))
    split, members = whole_windows(), [make_model(0), make_model(1, layers=2)]
    counted = sum(map(models.operations, members), models.Operations())
    evaluations = []
    seen = seen_by_counter(lambda: evaluations.append(evaluate(members, {"test": split}, BLOCK, "probability", temperature=1.0)))
    work = evaluations[0].work
    assert work["flops"] + masked(counted, 4) == seen
    assert work["seconds"] > 0

    teacher = ModelTeacher(members[1])
    seen = seen_by_counter(lambda: write_targets(tmp_path / "targets", teacher, split, {}, Kind("topk", top_k=4), block_length=BLOCK))
    counted = models.operations(members[1])
    assert counted.forward(*models.extent([BLOCK] * 4)) + masked(counted, 4) == seen


def test_fidelity_takes_two_steps_of_each_student_and_passes_of_the_teacher(tmp_path):
    split, student, fresh = whole_windows(), make_model(0), make_model(2)
    teacher = ModelTeacher(make_model(1, layers=2))
    index = pack(split.windows(BLOCK), BLOCK)
    for kind in (Kind("topk", top_k=4), Kind("dense")):
        folder = tmp_path / kind.name
        write_targets(folder, teacher, split, {}, kind, block_length=BLOCK)
        cache = TargetCache(folder, {}, 1.0)

        def measure(cache=cache):
            fidelity.gradient_angles([fresh, student], teacher, cache, split, index)
            fidelity.divergence(student, teacher, split, index[:2])

        counted, asked = models.operations(student), models.operations(teacher.model)
        # Attention's square: four steps of a student (thrice the forward pass) and one of the teacher, then one pass of each.
        square = masked(counted, 4 * 12) + masked(asked, 4) + masked(counted, 2) + masked(asked, 2)
        assert fidelity.flops(student, teacher.model, cache, index, index[:2]) + square == seen_by_counter(measure)


def in_training(folder, model=None, split=None, **options):
    schedule = {"epochs": 2, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-3, "warmup": 0.1, "weight_decay": 0.1}
    settings = TrainingParameters(profile="smoke", seed=1, precision="float32", compile=False, **schedule)
    text, model = TrainingText(split or whole_windows(8)), model or make_model(0)
    validation = whole_windows(2)
    seen = []
    found = seen_by_counter(lambda: seen.append(train_model(model, settings, text, validation, BLOCK, folder, **options)))
    return seen[0], found


@pytest.mark.parametrize("signal", ["none", "sparse", "dense", "online"])
def test_a_run_counts_the_steps_that_it_took(tmp_path, signal):
    split, teacher = whole_windows(8), make_model(1, layers=2)
    given = teacher
    if signal in ("sparse", "dense"):
        kind = Kind("topk", top_k=4) if signal == "sparse" else Kind("dense")
        write_targets(tmp_path / "targets", ModelTeacher(teacher), split, {}, kind, block_length=BLOCK)
        given = TargetCache(tmp_path / "targets", {}, 1.0)
    objective = None if signal == "none" else Objective([Distillation(0.5)], given)
    training, seen = in_training(tmp_path / "run", split=split, objective=objective)
    work, rows = training["work"], read_log(tmp_path / "run" / "log.csv")
    validations = [row for row in rows if row["validation_seconds"]]
    assert training["tokens"] == 2 * 8 * BLOCK and len(validations) > 1
    counted, asked = models.operations(make_model(0)), models.operations(teacher)
    square = masked(counted, 3 * 16) + len(validations) * masked(counted, 1)
    square += masked(asked, 16) if signal == "online" else 0
    # A run this short validates on one row of two.
    assert sum(one["flops"] for one in work.values()) + square == seen
    assert work["evaluation"]["flops"] == len(validations) * counted.forward(*models.extent([BLOCK]))
    assert work["train"]["seconds"] + work["evaluation"]["seconds"] == pytest.approx(training["seconds"])
    assert work["train"]["flops"] == training["flops"]
    expected = {"online": asked.forward(*models.extent([BLOCK] * 16)), "dense": 16 * BLOCK * asked.head}
    assert work["teacher_forward"]["flops"] == expected.get(signal, 0)


def test_a_teacher_is_charged_for_the_steps_that_ask_it(tmp_path):
    teacher = make_model(1, layers=2)
    falling = Schedule(shape="step", start=1.0, end=0.0)
    training, _ = in_training(tmp_path, objective=Objective([Distillation(falling)], teacher))
    asked = training["teacher_tokens"]
    assert 0 < asked < training["tokens"]
    per_token = models.operations(teacher).forward(*models.extent([BLOCK])) / BLOCK
    assert training["work"]["teacher_forward"]["flops"] == asked * per_token


def test_stages_add_up_and_frozen_parts_are_left_out(tmp_path):
    stages = [Stage(share=0.5, learning_rate_multipliers={"mlp": 0.0}), Stage(share=0.5, learning_rate_multipliers={})]
    plain, _ = in_training(tmp_path / "plain")
    staged, _ = in_training(tmp_path / "staged", stages=stages)
    mlp = 3 * 32 * 32
    assert staged["tokens"] == plain["tokens"]
    assert plain["work"]["train"]["flops"] - staged["work"]["train"]["flops"] == 2 * mlp * plain["tokens"] / 2


def test_a_run_without_steps_took_none():
    work = training_work(make_model(0), [], pack(whole_windows().windows(BLOCK), BLOCK))
    assert [(one["flops"], one["seconds"]) for one in work.values()] == [(0, 0)] * 3
