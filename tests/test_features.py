"""Feature losses against the formulas spelled out token by token, and what the hooks read against transformers itself."""

import copy
import math
import weakref
from itertools import product

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from kdlib import models
from kdlib.errors import KdlibError
from kdlib.losses.features import (
    FeatureLoss,
    attention_mse,
    hidden_cosine,
    hidden_mse,
    relation,
    relation_kl,
)
from kdlib.losses.layers import VECTORS, capture, taps

ARCHITECTURES = ("llama", "gpt2", "qwen2", "qwen3")
OBJECTIVES = ("hidden_mse", "hidden_cosine", "attention_mse", "relation")
PADDING_TOKEN = 10
SEGMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1], [0, 0, 1, 1, 1, 1, -1, -1]])
# Llama and Qwen compute norms and softmax in float32 even in a float64 model; their gradients are rounded on the way.
TOLERANCE = {"llama": 2e-6, "gpt2": 1e-10, "qwen2": 2e-6, "qwen3": 2e-6}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoder(architecture="llama", seed=0, layers=3, width=16, heads=4, attention="eager", **options):
    """A float64 model with grouped keys and values where the architecture has them, and no parameter at its default."""
    grouped = {"intermediate_size": 24, "num_key_value_heads": heads // 2}
    sizes = {
        "llama": grouped,
        "qwen2": grouped,
        "qwen3": grouped | {"head_dim": 6},  # not width / heads
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    }
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, **sizes[architecture]}
    sizes |= {"vocab_size": 11, "max_position_embeddings": 16, "pad_token_id": None, "tie_word_embeddings": True}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **sizes, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def pair(architecture="llama", **student):
    """A student, and a teacher of other depth, width, number of heads and, but for Qwen3, head width."""
    return decoder(architecture, seed=1, layers=2, **student), decoder(
        architecture, seed=2, layers=5, width=36, heads=6
    )


def windows(segments=SEGMENTS):
    """(row, positions) of each window."""
    found = [
        (row, (line == number).nonzero().flatten().tolist()) for row, line in enumerate(segments) for number in (0, 1)
    ]
    return [(row, positions) for row, positions in found if positions]


def inputs(segments=SEGMENTS):
    """What the trainer feeds a body; the padding token is at padding and nowhere else."""
    ids, positions = torch.full_like(segments, PADDING_TOKEN), torch.zeros_like(segments)
    ids[segments >= 0] = torch.arange((segments >= 0).sum()) * 7 % PADDING_TOKEN
    for row, window in windows(segments):
        positions[row, window] = torch.arange(len(window))
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": models.attention_mask(segments, torch.float64),
        "use_cache": False,
    }


def run(features, student, teacher, batch=None):
    batch = batch or inputs()
    with features.recorded():
        models.body(student)(**batch)
        with torch.no_grad():
            models.body(teacher)(**batch)


def loss(features, student, teacher, segments=SEGMENTS):
    run(features, student, teacher, inputs(segments))
    return features(segments)


def gradients(value, model):
    return torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)


def accumulated(model):
    return tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())


def assert_close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# What the model computes, from transformers' own outputs and the weights alone


def internals(model):
    """feature -> a tensor for each layer, without the hooks under test."""
    body = models.body(model)
    final = []
    handle = (body.ln_f if hasattr(body, "ln_f") else body.norm).register_forward_pre_hook(
        lambda _, x: final.append(x[0])
    )
    out = body(**inputs(), output_hidden_states=True, output_attentions=True)
    handle.remove()
    # The last of transformers' hidden states is that after the final norm.
    hidden = [*out.hidden_states[:-1], final[0]]
    found = {"hidden": hidden[1:], "attention": list(out.attentions)}
    blocks = body.h if hasattr(body, "h") else body.layers
    for feature in VECTORS:
        found[feature] = [vectors(block, x, feature) for block, x in zip(blocks, hidden, strict=False)]
    return found


def vectors(block, hidden, feature):
    """[B, heads, T, d], one head after the other."""
    if hasattr(block, "attn"):
        width = hidden.shape[-1]
        columns = slice(VECTORS.index(feature) * width, (VECTORS.index(feature) + 1) * width)
        projected = block.ln_1(hidden) @ block.attn.c_attn.weight[:, columns] + block.attn.c_attn.bias[columns]
        d = width // block.attn.num_heads
    else:
        attention = block.self_attn
        projection = getattr(attention, f"{feature[0]}_proj")
        projected = F.linear(block.input_layernorm(hidden), projection.weight, projection.bias)
        d = attention.head_dim
    heads = [projected[:, :, start : start + d] for start in range(0, projected.shape[-1], d)]
    norm = getattr(getattr(block, "self_attn", None), f"{feature[0]}_norm", None)
    if norm is not None:
        heads = [F.rms_norm(head.float(), (d,), eps=norm.variance_epsilon).double() * norm.weight for head in heads]
    return torch.stack(heads, 1)


def turned(x, position_ids, theta=10_000.0):
    """The rotary embedding: coordinate i turns with coordinate i + d/2 by position · theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = position_ids[:, None, :, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def relation_row(x, row, head, query, keys, heads):
    """Relation of one token to earlier ones of its window, a scalar product at a time."""
    flat = torch.cat(list(x[row]), -1)
    d = flat.shape[-1] // heads
    part = flat[:, head * d : (head + 1) * d]
    scores = torch.stack([(part[query] * part[key]).sum() / math.sqrt(d) for key in keys])
    weights = scores.exp()
    return weights / weights.sum()


def relation_by_hand(student, teachers, heads, segments=SEGMENTS):
    total = 0.0
    for row, window in windows(segments):
        for head, end in product(range(heads), range(len(window))):
            arguments = (row, head, window[end], window[: end + 1], heads)
            t = sum(relation_row(x, *arguments) for x in teachers) / len(teachers)
            total = total + (t * (t / relation_row(student, *arguments)).log()).sum() / heads
    return total


def attention_by_hand(student, teachers):
    total = 0.0
    for row, window in windows():
        for end, query in enumerate(window):
            keys = window[: end + 1]
            s, t = student[row, :, query, keys], sum(x[row, :, query, keys] for x in teachers) / len(teachers)
            if len(s) != len(t):
                s, t = s.mean(0, keepdim=True), t.mean(0, keepdim=True)
            total = total + sum(((a - b) ** 2).sum() for a, b in zip(s, t, strict=True)) / len(s)
    return total


def hidden_by_hand(objective, student, teachers):
    total = 0.0
    for row, window in windows():
        for position in window:
            s, t = student[row, position], sum(x[row, position] for x in teachers) / len(teachers)
            if objective == "hidden_mse":
                total = total + ((s - t) ** 2).sum() / len(t)
            else:
                total = total + 1 - (s * t).sum() / ((s * s).sum() * (t * t).sum()).sqrt()
    return total


def loss_by_hand(objective, pairs, student, teacher, heads, projectors):
    """The loss of mapped layers, from what :func:`internals` finds in both models."""
    total = 0.0
    for layer, layers in pairs:
        for feature in {"relation": VECTORS, "attention_mse": ("attention",)}.get(objective, ("hidden",)):
            s, t = student[feature][layer - 1], [teacher[feature][one - 1].detach() for one in layers]
            if feature in VECTORS:
                total = total + relation_by_hand(s, t, heads[feature]) / 3
            elif feature == "attention":
                total = total + attention_by_hand(s, t)
            else:
                total = total + hidden_by_hand(objective, s @ projectors[str(layer)].weight.T if projectors else s, t)
    return total / len(pairs)


# What the hooks read


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_recorded_is_what_transformers_computes(architecture, wrapped):
    model = decoder(architecture)
    if wrapped:
        model = models.lora(model, rank=2, alpha=4, dropout=0.0, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += normal(*parameter.shape, seed=3)
    wanted = list(product(("hidden", "attention", *VECTORS), (1, 2, 3)))
    with capture(taps(model, wanted)) as found:
        models.body(model)(**inputs())
    assert set(found) == set(wanted)
    expected = internals(models.merge(model) if wrapped else model)
    for (feature, layer), value in found.items():
        assert_close(value, expected[feature][layer - 1], 1e-6 if wrapped else TOLERANCE[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recorded_queries_keys_and_values_reproduce_attention_and_its_output(architecture):
    model, batch = decoder(architecture), inputs()
    wanted = [(feature, 2) for feature in ("attention", *VECTORS)]
    attention = models.body(model).h[1].attn if architecture == "gpt2" else models.body(model).layers[1].self_attn
    outputs = []
    attention.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
    with capture(taps(model, wanted)) as found:
        models.body(model)(**batch)
    q, k, v = (found[feature, 2] for feature in VECTORS)
    if architecture != "gpt2":
        q, k = turned(q, batch["position_ids"]), turned(k, batch["position_ids"])
    # Consecutive query heads share a head of keys and values.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + batch["attention_mask"]).softmax(-1)
    assert_close(found["attention", 2], weights, TOLERANCE[architecture])
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    out = attention.c_proj if architecture == "gpt2" else attention.o_proj
    assert_close(outputs[0], out(mixed), TOLERANCE[architecture])


def test_hooks_are_gone_after_the_block_even_if_it_fails():
    model = decoder()
    before = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError), capture(taps(model, [("hidden", 1), ("query", 2)])):
        raise RuntimeError
    assert [len(module._forward_hooks) for module in model.modules()] == before


# The formulas


def test_relations_equal_the_formula_in_value_and_gradient():
    student, teacher = normal(2, 4, 8, 3, seed=1).requires_grad_(), normal(2, 2, 8, 9, seed=2)
    target = relation(teacher, SEGMENTS, 6)
    assert_close(target.sum(-1), torch.ones(2, 6, 8, dtype=torch.float64))
    found = relation_kl(student, target, SEGMENTS, 6)[SEGMENTS >= 0].sum()
    expected = relation_by_hand(student, [teacher], 6)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, student), torch.autograd.grad(expected, student))


def test_rotating_the_vectors_of_a_relation_head_leaves_the_relation_unchanged():
    heads, width = 3, 4
    x = normal(2, 2, 8, 6, seed=1)
    by_relation_head = x.transpose(1, 2).reshape(2, 8, heads, width)
    rotations, _ = torch.linalg.qr(normal(heads, width, width, seed=2))
    rotated = torch.einsum("bthi,hij->bthj", by_relation_head, rotations).reshape(2, 8, 2, 6).transpose(1, 2)
    assert (rotated - x).abs().max() > 0.5
    assert_close(relation(rotated, SEGMENTS, heads), relation(x, SEGMENTS, heads))
    assert (relation(2 * x, SEGMENTS, heads) - relation(x, SEGMENTS, heads)).abs().max() > 0.1


def test_a_relation_looks_back_within_its_window_only():
    r = relation(normal(2, 2, 8, 6, seed=1), SEGMENTS, 2)
    for row, window in windows():
        for end, query in enumerate(window):
            others = [key for key in range(8) if key not in window[: end + 1]]
            assert (r[row, :, query, others] == 0).all()
            assert (r[row, :, query, window[: end + 1]] > 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_of_two_models_equals_the_formula_in_value_and_gradient(architecture, objective):
    student, teacher = pair(architecture)
    features = FeatureLoss(student, teacher, objective, "uniform_consecutive")
    assert features.pairs == [(1, (1, 2)), (2, (3, 4, 5))]
    assert bool(features.projectors) == objective.startswith("hidden")
    total, tokens = loss(features, student, teacher)
    heads = getattr(features, "relation_heads", None)
    expected = loss_by_hand(
        objective, features.pairs, internals(student), internals(teacher), heads, features.projectors
    )
    assert tokens == 13
    assert total.dtype == torch.float64
    assert_close(total, expected, TOLERANCE[architecture])
    assert_close(gradients(total, student), gradients(expected, student), 10 * TOLERANCE[architecture])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_gpt2_student_learns_from_a_llama_teacher(objective):
    student, teacher = decoder("gpt2", layers=2, width=12, heads=3), decoder("llama", layers=4)
    features = FeatureLoss(student, teacher, objective, "last_k", last_k=2)
    total, _ = loss(features, student, teacher)
    heads = getattr(features, "relation_heads", None)
    if objective == "relation":
        # Queries are 12 and 16 wide in 3 and 4 heads, keys and values 12 and 8 wide in 3 and 2.
        assert heads == {"query": 4, "key": 2, "value": 2}
    expected = loss_by_hand(
        objective, features.pairs, internals(student), internals(teacher), heads, features.projectors
    )
    assert_close(total, expected, 2e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_identical_models_have_no_loss_and_no_gradient(architecture, objective):
    student = decoder(architecture)
    teacher = copy.deepcopy(student)
    features = FeatureLoss(student, teacher, objective, "all")
    assert not list(features.parameters())
    total, _ = loss(features, student, teacher)
    assert abs(total.item()) < 1e-12
    assert max(gradient.abs().max() for gradient in gradients(total, student)) < 1e-12


@pytest.mark.parametrize("objective", ["hidden_mse", "relation"])
def test_the_mean_of_several_teacher_layers_has_the_gradient_of_a_term_per_layer(objective):
    student, teacher = decoder(layers=1), decoder(seed=2, layers=3)
    together, _ = loss(FeatureLoss(student, teacher, objective, "uniform_consecutive"), student, teacher)
    apart = []
    for layer in (1, 2, 3):
        shallow = copy.deepcopy(teacher)
        models.body(shallow).layers = models.body(shallow).layers[:layer]
        apart.append(loss(FeatureLoss(student, shallow, objective, "last"), student, shallow)[0])
    assert together < sum(apart) / 3
    assert_close(gradients(together, student), gradients(sum(apart) / 3, student), 2e-6)


# Masks and packing


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_windows_packed_in_a_row_count_as_in_rows_of_their_own(architecture, objective):
    student, teacher = pair(architecture)
    features = FeatureLoss(student, teacher, objective, "uniform_last")
    packed, tokens = loss(features, student, teacher)
    apart, count = 0.0, 0
    for row, window in windows():
        batch = {name: value[row : row + 1, window] for name, value in inputs().items() if name.endswith("ids")}
        segments = torch.zeros(1, len(window), dtype=torch.long)
        mask = models.attention_mask(segments, torch.float64)
        run(features, student, teacher, batch | {"attention_mask": mask, "use_cache": False})
        part, number = features(segments)
        apart, count = apart + part, count + number
    assert count == tokens
    assert_close(packed, apart, TOLERANCE[architecture])
    assert_close(gradients(packed, student), gradients(apart, student), 10 * TOLERANCE[architecture])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_has_exactly_zero_gradient(architecture, objective):
    student, teacher = pair(architecture)
    total, _ = loss(FeatureLoss(student, teacher, objective, "uniform_consecutive"), student, teacher)
    total.backward()
    gradient = student.get_input_embeddings().weight.grad
    assert (gradient[PADDING_TOKEN] == 0).all()
    assert (gradient[:PADDING_TOKEN] != 0).any(1).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_of_padding_alone_count_nothing(objective):
    student, teacher = pair()
    features = FeatureLoss(student, teacher, objective)
    total, tokens = loss(features, student, teacher, torch.full((1, 4), -1))
    assert tokens == 0 and total.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(total, student))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sums_over_micro_batches_equal_one_batch(objective):
    student, teacher = pair()
    features = FeatureLoss(student, teacher, objective)
    total, tokens = loss(features, student, teacher)
    whole = gradients(total / tokens, student)
    for row in (slice(0, 1), slice(1, 2)):
        batch = {name: value[row] if name != "use_cache" else value for name, value in inputs().items()}
        run(features, student, teacher, batch)
        part, _ = features(SEGMENTS[row])
        (part / tokens).backward()
    assert_close(accumulated(student), whole, 2e-6)


# Training


@pytest.mark.parametrize("objective", ["hidden_mse", "hidden_cosine"])
def test_a_projector_is_there_where_widths_differ_and_is_trained(objective):
    student, teacher = pair()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    features = FeatureLoss(student, teacher, objective, "uniform_last")
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: tuple(p.shape) for name, p in features.named_parameters()} == {
        "projectors.1.weight": (36, 16),
        "projectors.2.weight": (36, 16),
    }
    again, other = (FeatureLoss(student, teacher, objective, "uniform_last", seed=seed) for seed in (0, 1))
    assert torch.equal(again.projectors["1"].weight, features.projectors["1"].weight)
    assert not torch.equal(other.projectors["1"].weight, features.projectors["1"].weight)
    optimiser = torch.optim.SGD(features.parameters(), lr=0.01)
    values = []
    for _ in range(3):
        total, tokens = loss(features, student, teacher)
        optimiser.zero_grad()
        (total / tokens).backward()
        optimiser.step()
        values.append(total.item())
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_adapters_learn_in_train_mode_and_nothing_else_gets_a_gradient(objective):
    plain, teacher = pair("gpt2")
    student = models.lora(plain, rank=2, alpha=4, dropout=0.5, seed=0).train()
    features = FeatureLoss(student, teacher, objective)
    with features.recorded():
        models.body(student)(**inputs())
        models.body(teacher)(**inputs())  # with gradients on, as a caller might forget
    total, _ = features(SEGMENTS)
    total.backward()
    assert {name for name, p in student.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert all("lora_" in name for name, p in student.named_parameters() if p.grad is not None)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_checkpointing_changes_nothing(objective):
    student, teacher = pair()
    features = FeatureLoss(student, teacher, objective)
    expected = gradients(loss(features, student, teacher)[0], student)
    student.train().activation_checkpointing_enable()
    loss(features, student, teacher)[0].backward()
    assert_close(accumulated(student), expected, 2e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_computed_in_full_precision_under_autocast(objective):
    student, teacher = (model.float() for model in pair())
    features = FeatureLoss(student, teacher, objective)
    batch = inputs() | {"attention_mask": models.attention_mask(SEGMENTS, torch.float32)}
    values = []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(features, student, teacher, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            values.append(features(SEGMENTS)[0])
    assert values[0].dtype == values[1].dtype == torch.float32
    assert torch.equal(*values)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_was_recorded_is_forgotten_after_the_loss(objective):
    student, teacher = pair()
    features = FeatureLoss(student, teacher, objective)
    run(features, student, teacher)
    recorded = [weakref.ref(tensor) for tensors in features._recorded for tensor in tensors.values()]
    total, _ = features(SEGMENTS)
    total.backward()
    assert recorded and not any(reference() is not None for reference in recorded)
    with pytest.raises(KdlibError, match="got nothing for"):
        features(SEGMENTS)


def test_a_failed_pass_leaves_nothing_to_take_for_the_next_one():
    student, teacher = pair()
    features = FeatureLoss(student, teacher, "hidden_mse")
    run(features, student, teacher)
    with pytest.raises(RuntimeError), features.recorded():
        raise RuntimeError
    with pytest.raises(KdlibError, match="got nothing for"):
        features(SEGMENTS)


def test_a_compiled_body_gives_the_same_loss_or_an_error_never_a_stale_one():
    student, teacher = decoder(layers=1), decoder(layers=1, seed=2)
    features = FeatureLoss(student, teacher, "hidden_mse")
    expected, _ = loss(features, student, teacher)
    torch._dynamo.reset()
    compiled = torch.compile(models.body(student), backend="eager", dynamic=False)
    compiled(**inputs())  # compiled before any hook was there
    with features.recorded():
        compiled(**inputs())
        models.body(teacher)(**inputs())
    with pytest.raises(KdlibError, match="not compiled"):
        features(SEGMENTS)
    torch._dynamo.reset()
    compiled = torch.compile(models.body(student), backend="eager", dynamic=False)
    for _ in range(2):
        with features.recorded():
            compiled(**inputs())
            models.body(teacher)(**inputs())
        assert_close(features(SEGMENTS)[0], expected, 2e-6)


# Wrong input


def no_forward(*_arguments, **_options):
    raise AssertionError("a forward pass was made")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "hidden_l1"}, "objective"),
        ({"objective": "relation", "relations": ()}, "`relations` must be"),
        ({"objective": "relation", "relations": ("query", "output")}, "`relations` must be"),
        ({"objective": "relation", "relation_heads": 0}, "`relation_heads` must divide"),
        ({"objective": "relation", "relation_heads": 5}, "width of the query vectors .*16 .* 36 .*got 5"),
        ({"objective": "hidden_mse", "layers": "all"}, "5 teacher and 2 student layers"),
        ({"objective": "hidden_mse", "layers": "last_k", "last_k": 3}, "got 3"),
    ],
)
def test_wrong_settings_are_refused_before_any_forward_pass(options, message):
    student, teacher = pair()
    student.forward = teacher.forward = models.body(student).forward = models.body(teacher).forward = no_forward
    with pytest.raises(KdlibError, match=message):
        FeatureLoss(student, teacher, **options)


def test_attention_maps_that_are_not_there_or_dropped_out_are_refused():
    student, teacher = pair()
    with pytest.raises(KdlibError, match="of the teacher must be eager for attention maps, got sdpa"):
        FeatureLoss(student, decoder(attention="sdpa"), "attention_mse")
    with pytest.raises(KdlibError, match="must be 0 for attention maps, got 0.1"):
        FeatureLoss(decoder(attention_dropout=0.1), teacher, "attention_mse")
    switched = decoder(attention="sdpa")
    switched.set_attn_implementation("eager")
    assert loss(FeatureLoss(switched, teacher, "attention_mse"), switched, teacher)[0] > 0


def test_relations_need_no_eager_attention():
    values = []
    for attention in ("eager", "sdpa"):
        student, teacher = pair(attention=attention)
        values.append(loss(FeatureLoss(student, teacher, "relation"), student, teacher)[0])
    assert_close(*values, 1e-6)


def test_models_built_otherwise_are_refused():
    student = decoder()
    other = copy.deepcopy(student)
    del models.body(other).layers[-1].self_attn.q_proj
    with pytest.raises(KdlibError, match="query of layer 3 must be found.*got LlamaModel"):
        FeatureLoss(student, other, "relation")
    del models.body(other).layers
    with pytest.raises(KdlibError, match="neither in LlamaModel"):
        FeatureLoss(student, other, "hidden_mse")


def test_a_model_that_runs_twice_is_refused():
    student = decoder()
    features = FeatureLoss(student, student, "hidden_mse")
    with pytest.raises(KdlibError, match="run forward once and share no layers"):
        run(features, student, student)
    teacher = copy.deepcopy(student)
    features = FeatureLoss(student, teacher, "hidden_mse")
    with pytest.raises(KdlibError, match="run forward once and share no layers"), features.recorded():
        models.body(student)(**inputs())
        models.body(student)(**inputs())


def test_one_forward_pass_missing_is_refused():
    student, teacher = pair()
    features = FeatureLoss(student, teacher, "hidden_mse")
    with features.recorded():
        models.body(student)(**inputs())
    with pytest.raises(KdlibError, match="teacher .*'hidden', 5"):
        features(SEGMENTS)


def test_segments_of_another_batch_are_refused():
    student, teacher = pair()
    features = FeatureLoss(student, teacher, "relation")
    run(features, student, teacher)
    with pytest.raises(KdlibError, match="same tokens"):
        features(SEGMENTS[:, :5])


def test_functions_return_a_value_per_token_in_float32_for_half_precision_input():
    a, b = normal(2, 8, 6, seed=1).bfloat16(), normal(2, 8, 6, seed=2).bfloat16()
    maps = [normal(2, 3, 8, 8, seed=seed).softmax(-1).bfloat16() for seed in (1, 2)]
    for found in (hidden_mse(a, b), hidden_cosine(a, b), attention_mse(*maps)):
        assert found.shape == (2, 8) and found.dtype == torch.float32
    assert_close(hidden_mse(a, b), hidden_mse(a.double(), b.double()).float(), 1e-6)
