"""Initialisation from a teacher: exact copies, exact half-depth students, tied weights, and models that still work."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCABULARY, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from kdlib import models
from kdlib.data import vocabulary
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.models.initialisation import initialise, layer_choice, perturb

ARCHITECTURES = ("llama", "gpt2", "qwen3")
LAYERS = 6


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.train(["the cat sat on the mat and then the cat ate the rat " * 8], 270)


def build(tokenizer, architecture, layers=LAYERS, seed=0, width=16, heads=2):
    """A model all of whose weights, biases and norms included, are far from those that a new model would have."""
    shape = models.Shape(layers=layers, hidden_size=width, heads=heads, architecture=architecture)
    model = models.build(shape, tokenizer, 32, seed, "eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def unlike(architecture="qwen3", tied=False, **changes):
    """A teacher with what no model built here has: grouped heads, an untied head, sliding windows, a padding id."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    windows = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * LAYERS}
    windows["layer_types"][1::2] = ["sliding_attention"] * (LAYERS // 2)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=0.3,
        **{"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 0},
        **sizes,
        **(windows if architecture == "qwen3" else {}),
        **changes,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def small(teacher, layers, **changes):
    """A student of the teacher's family at another depth, built at random."""
    config = copy.deepcopy(teacher.config)
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * layers
    for name, value in {"num_hidden_layers": layers, "pad_token_id": None, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(9)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def make_identity(model, layers):
    """Zero what these layers add to the residual stream."""
    blocks = models.body(model).h if model.config.model_type == "gpt2" else models.body(model).layers
    for layer in layers:
        for name, parameter in blocks[layer].named_parameters():
            if "c_proj" in name or "o_proj" in name or "down_proj" in name:
                parameter.data.zero_()


def ids(seed=0, vocabulary_size=VOCABULARY, length=12):
    return torch.randint(vocabulary_size, (3, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens=None):
    return model(ids() if tokens is None else tokens, use_cache=False).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def storages(model):
    return {parameter.data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_leaves_the_student_as_it_was_built(tokenizer, architecture):
    student = build(tokenizer, architecture, layers=2, seed=1)
    before = state(student)
    assert initialise(student, build(tokenizer, architecture), "random") is student
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_identical_student_is_the_teacher_and_shares_nothing_with_it(tokenizer, architecture):
    teacher = build(tokenizer, architecture)
    teacher(ids()).logits.sum().backward()
    teacher.requires_grad_(False)
    before = state(teacher)
    student = initialise(build(tokenizer, architecture, seed=1), teacher, "identical")
    assert torch.equal(logits(student), logits(teacher))
    assert not storages(student) & storages(teacher)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for parameter in student.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("layers", [1, 3, 4, LAYERS])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_layers_that_do_nothing_the_logits_are_the_teachers(tokenizer, architecture, layers):
    teacher = build(tokenizer, architecture)
    make_identity(teacher, set(range(LAYERS)) - set(layer_choice(LAYERS, layers)))
    student = initialise(build(tokenizer, architecture, layers, seed=1), teacher, "every_nth")
    assert student.config.num_hidden_layers == layers
    assert torch.equal(logits(student), logits(teacher))
    assert not storages(student) & storages(teacher)


def test_layers_that_do_something_are_missed(tokenizer):
    teacher = build(tokenizer, "llama")
    student = initialise(build(tokenizer, "llama", 3, seed=1), teacher, "every_nth")
    assert (logits(student) - logits(teacher)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_what_a_shape_does_not_say_is_the_teachers(architecture):
    teacher = unlike(architecture)
    teacher.generation_config.top_k = 7
    make_identity(teacher, {1, 3, 4})
    student = initialise(small(teacher, 3, intermediate_size=32, num_key_value_heads=4), teacher, "every_nth")
    assert (student.config.intermediate_size, student.config.num_key_value_heads) == (24, 2)
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()
    if architecture == "qwen3":
        kept = [teacher.config.layer_types[layer] for layer in layer_choice(LAYERS, 3)]
        assert student.config.layer_types == kept == ["full_attention", "full_attention", "sliding_attention"]
    # Twelve tokens are more than a window of four, so a layer with the other kind of attention would show.
    assert torch.equal(logits(student), logits(teacher))


def test_the_choice_of_layers_is_even_and_that_of_published_half_depth_models():
    assert layer_choice(12, 6) == [0, 2, 4, 7, 9, 11]
    assert layer_choice(30, 1) == [0]
    assert layer_choice(4, 2) == [0, 3]


@given(st.integers(1, 60), st.data())
def test_chosen_layers_rise_from_the_first_to_the_last_in_even_steps(depth, data):
    chosen = layer_choice(depth, data.draw(st.integers(1, depth)))
    gaps = np.diff(chosen)
    assert chosen[0] == 0 and (len(chosen) == 1 or chosen[-1] == depth - 1)
    assert (gaps >= 1).all() and (not len(gaps) or gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize("how", ["embeddings", "every_nth", "identical"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_student_generates_with_its_cache_what_it_generates_without(tokenizer, architecture, how):
    layers = LAYERS if how == "identical" else 3
    student = initialise(build(tokenizer, architecture, layers, seed=1), build(tokenizer, architecture), how).double()
    prompt = torch.tensor([[5, 9, 40], [7, 7, 80]])
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached, plain = (student.generate(prompt, use_cache=use, **settings) for use in (True, False))
    assert cached.shape == (2, 15) and torch.equal(cached, plain)
    with torch.no_grad():
        first = student(cached[:, :9], use_cache=True)
        rest = student(cached[:, 9:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), logits(student, cached), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["embeddings", "every_nth", "identical"])
@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "untied"))
def test_the_student_comes_back_from_safetensors(tokenizer, architecture, how, tmp_path):
    teacher = unlike() if architecture == "untied" else build(tokenizer, architecture)
    layers = LAYERS if how == "identical" else 3
    student = small(teacher, layers) if architecture == "untied" else build(tokenizer, architecture, layers, seed=1)
    student = initialise(student, teacher, how)
    student.save_pretrained(tmp_path)
    assert [file.suffix for file in tmp_path.glob("*.*") if "model" in file.name] == [".safetensors"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(logits(again), logits(student))
    assert tied(again) == tied(student) == (architecture != "untied")


@pytest.mark.parametrize("how", ["embeddings", "every_nth", "identical"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_weights_stay_tied_and_are_the_teachers_embedding(tokenizer, architecture, how):
    teacher = build(tokenizer, architecture)
    layers = LAYERS if how == "identical" else 3
    student = build(tokenizer, architecture, layers, seed=1)
    own = student.get_input_embeddings().weight.norm()
    student = initialise(student, teacher, how)
    assert tied(student) and student.config.tie_word_embeddings
    rows, source = (model.get_input_embeddings().weight for model in (student, teacher))
    scale = own / source.norm() if how == "embeddings" else torch.ones(())
    assert torch.equal(rows, source * scale)
    assert rows.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("says_tied", [False, True])
@pytest.mark.parametrize("how", ["every_nth", "identical"])
def test_an_untied_head_never_overwrites_the_embedding(how, says_tied):
    teacher = unlike()
    teacher.config.tie_word_embeddings = says_tied  # some conversions leave this flag wrong
    student = initialise(small(teacher, LAYERS, tie_word_embeddings=False), teacher, how)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert torch.equal(student.get_output_embeddings().weight, teacher.get_output_embeddings().weight)
    assert torch.equal(logits(student), logits(teacher))


@pytest.mark.parametrize("student_tied", [True, False])
def test_transferred_embeddings_keep_the_students_scale_and_change_nothing_else(student_tied):
    teacher = unlike()
    student = small(teacher, 2, tie_word_embeddings=student_tied)
    student.get_input_embeddings().weight.data.mul_(0.1)
    before = state(student)
    assert initialise(student, teacher, "embeddings") is student
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.embed_tokens.weight"} | ({"lm_head.weight"} if student_tied else set())
    rows, source = (model.get_input_embeddings().weight.detach() for model in (student, teacher))
    torch.testing.assert_close(rows.norm(), before["model.embed_tokens.weight"].norm())
    torch.testing.assert_close(rows / rows.norm(), source / source.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_narrower_student_gets_the_principal_coordinates_at_its_own_scale(tokenizer, architecture):
    teacher = build(tokenizer, architecture)
    student = build(tokenizer, architecture, layers=1, seed=1, width=8)
    norm = student.get_input_embeddings().weight.norm().item()
    rows = initialise(student, teacher, "embeddings").get_input_embeddings().weight.detach().double()
    assert tied(student) and rows.norm().item() == pytest.approx(norm, rel=1e-6)
    source = teacher.get_input_embeddings().weight.detach().double().numpy()
    centred = source - source.mean(0)
    directions = np.linalg.svd(centred)[2][:8].T
    directions *= np.sign(directions[np.abs(directions).argmax(0), range(8)])
    expected = centred @ directions
    np.testing.assert_allclose(rows, expected * norm / np.linalg.norm(expected), rtol=0, atol=1e-6)


def test_distances_between_tokens_survive_where_the_width_can_hold_them(tokenizer):
    teacher = build(tokenizer, "llama")
    generator = torch.Generator().manual_seed(0)
    size = len(tokenizer)
    flat = torch.randn(size, 8, generator=generator) @ torch.randn(8, 16, generator=generator) + 3
    teacher.get_input_embeddings().weight.data.copy_(flat)
    student = initialise(build(tokenizer, "llama", 1, seed=1, width=8), teacher, "embeddings")
    rows = student.get_input_embeddings().weight.detach()
    scale = rows.norm() / (flat - flat.mean(0)).norm()
    torch.testing.assert_close(torch.cdist(rows, rows), scale * torch.cdist(flat, flat), rtol=0, atol=1e-3)


@pytest.mark.parametrize("how", ["every_nth", "identical"])
def test_the_student_has_the_dtype_and_attention_it_was_built_with(tokenizer, how, tmp_path):
    build(tokenizer, "llama").save_pretrained(tmp_path)
    teacher, reference = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
        for dtype in (torch.bfloat16, torch.float32)
    )
    for parameter in reference.parameters():
        parameter.data = parameter.data.bfloat16().float()
    shape = models.Shape(layers=LAYERS, hidden_size=16, heads=2)
    student = initialise(models.build(shape, tokenizer, 32, 1, "sdpa").train(), teacher, how)
    assert student.config._attn_implementation == "sdpa" and student.training
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    student.set_attn_implementation("eager")
    assert torch.equal(logits(student.eval()), logits(reference))


@pytest.mark.parametrize("how", ["every_nth", "identical"])
def test_the_teachers_padding_token_is_trained_like_any_other(how):
    teacher = unlike()
    assert teacher.get_input_embeddings().padding_idx == 2
    student = initialise(small(teacher, LAYERS), teacher, how)
    student(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    assert student.get_input_embeddings().weight.grad[2].abs().sum() > 0
    assert teacher.config.pad_token_id == 2


def test_the_global_random_state_is_left_alone(tokenizer):
    teacher, student = build(tokenizer, "llama"), build(tokenizer, "llama", 3, seed=1)
    before = torch.get_rng_state()
    perturb(initialise(student, teacher, "every_nth"), 0.1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_initialised_is_refused_with_what_was_expected(tokenizer):
    def student(**sizes):
        return build(tokenizer, **{"architecture": "llama", "layers": 2, **sizes})

    teacher = build(tokenizer, "llama")
    for how, wrong, message in [
        ("every_nth", student(layers=7), "must be 1 to the teacher's 6, got 7"),
        ("every_nth", student(width=8), "hidden_size must be the teacher's, 16, to copy layers, got 8"),
        ("every_nth", student(heads=4), "num_attention_heads must be the teacher's, 2, to copy layers, got 4"),
        ("every_nth", student(architecture="gpt2"), "model_type must be the teacher's, llama, to copy layers, got gpt2"),
        ("identical", student(), "num_hidden_layers must be the teacher's, 6, to copy layers, got 2"),
        ("embeddings", student(width=32), "at most the teacher's 16 to transfer embeddings, got 32"),
        ("halved", student(), "must be one of random, .* got 'halved'"),
        ("every_nth", make_model(0), f"the teacher's 270 tokens to copy weights, got {VOCABULARY}"),
        ("embeddings", make_model(0), f"the teacher's 270 tokens to copy weights, got {VOCABULARY}"),
        ("identical", make_model(0), f"the teacher's 270 tokens to copy weights, got {VOCABULARY}"),
    ]:
        with pytest.raises(KdlibError, match=message):
            initialise(wrong, teacher, how)


@pytest.mark.parametrize("how", ["embeddings", "every_nth", "identical"])
def test_a_teacher_that_is_not_one_plain_model_is_refused(how):
    pool = EnsembleForCausalLM.from_members([make_model(0), make_model(1)])
    adapted = models.lora(make_model(0), rank=2, alpha=4, dropout=0.0, seed=0)
    for teacher, name in ((pool, "EnsembleForCausalLM"), (adapted, "PeftModelForCausalLM")):
        with pytest.raises(KdlibError, match=name):
            initialise(make_model(2), teacher, how)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_noise_is_a_share_of_each_matrix_and_of_nothing_else(tokenizer, architecture):
    model = build(tokenizer, architecture, width=32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert perturb(model, 0.1, seed=4) is model
    for name, parameter in model.named_parameters():
        noise = parameter.detach() - before[name]
        if parameter.ndim < 2:
            assert not noise.any(), name
        else:
            spread = 0.1 * before[name].std(correction=0).item()
            # Mean and standard deviation within four of their standard errors.
            assert noise.std().item() == pytest.approx(spread, rel=4 / (2 * noise.numel()) ** 0.5), name
            assert abs(noise.mean().item()) < 4 * spread / noise.numel() ** 0.5, name
    assert tied(model)


def test_noise_depends_on_its_seed_alone(tokenizer):
    first, again, other = (perturb(build(tokenizer, "llama"), 0.1, seed) for seed in (4, 4, 5))
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    assert torch.equal(logits(perturb(build(tokenizer, "llama"), 0.0, 4)), logits(build(tokenizer, "llama")))
    for scale in (-0.1, float("nan"), float("inf")):
        with pytest.raises(KdlibError, match="scale"):
            perturb(first, scale, 0)
