"""8-bit training against the same in float32: what is saved, what is rounded and how far, and who is refused."""

import io
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from test_training import interrupted, logged, make_trainer, same, settings, trained, weights
from tiny import make_split
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, get_cosine_schedule_with_warmup

from kdlib import models
from kdlib.errors import KdlibError
from kdlib.models import low_precision
from kdlib.models.low_precision import adamw_8bit, eight_bit_backward, require
from kdlib.study import profiles
from kdlib.study.schedules import Schedule
from kdlib.training.optimizer import WeightDecay

library = pytest.mark.skipif(low_precision._torchao() is None, reason="needs torchao")
hardware = pytest.mark.skipif(
    low_precision._torchao() is None or not low_precision.has_eight_bit_products(),
    reason="needs torchao and a GPU that multiplies 8-bit floating point",
)
BETAS, RATE = (0.9, 0.95), 1e-2


@pytest.fixture(autouse=True)
def _alone(one_thread):
    pass


def make_wide(seed=0, device="cpu"):
    """A Llama whose matrices are large enough for 8-bit states (4096 parameters) and products (multiples of 16)."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(device)


def adamw(groups, rate=RATE):
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS)


def eight_bit(groups, rate=RATE, compiled=False):
    return adamw_8bit(groups, rate, BETAS, compiled)


def groups_of(parameters, decay=0.1):
    return [{"params": list(parameters), "lr": RATE, "weight_decay": decay}]


def regression(make, steps=100, size=64, device="cpu"):
    """Fits a matrix to noisy products with it; the loss after each step, and the optimiser."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(size, 256, generator=generator).to(device) for _ in range(2))
    wanted = torch.randn(size, size, generator=generator).to(device)
    matrix = nn.Parameter(torch.zeros(size, size, device=device))
    optimizer, losses = make(groups_of([matrix], decay=0.0)), []
    for _ in range(steps):
        loss = (matrix @ x - wanted @ x - 0.1 * noise).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, optimizer


def on_disk(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return buffer.getvalue()


def gradients(model, emulate=None, seed=0):
    """Logits and gradients of one batch; ``emulate`` None: without 8-bit products."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (3, 21), generator=generator).to(model.device)  # 63 tokens, no multiple of 16
    model.zero_grad()
    if emulate is None:
        output = model(ids, labels=ids)
        output.loss.backward()
    else:
        with eight_bit_backward(model, emulate):
            output = model(ids, labels=ids)
            output.loss.backward()
    return output.logits.detach(), {name: one.grad.clone() for name, one in model.named_parameters()}


def cosine(one, other):
    return nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0).item()


# 8-bit optimiser states


@library
def test_eight_bit_states_are_a_quarter_of_adamws():
    plain, small = (len(on_disk(regression(make, 1, size=512)[1])) for make in (adamw, eight_bit))
    assert 0.25 < small / plain < 0.27


@library
def test_training_with_eight_bit_states_ends_where_adamw_ends():
    (plain, _), (rounded, _) = regression(adamw, 400), regression(eight_bit, 400)
    assert rounded[99] == pytest.approx(plain[99], rel=0.05) and 10 * plain[-1] < plain[99] < plain[0] / 5
    # The noise has a variance of 0.01, and 64 of 256 degrees of freedom fit it.
    assert plain[-1] == pytest.approx(0.01 * 192 / 256, rel=0.05)
    assert rounded[-1] == pytest.approx(plain[-1], rel=0.01)
    assert rounded[99] != plain[99]


@library
def test_small_tensors_keep_float32_states_and_take_adamws_very_steps():
    start, optimizers = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)), []
    found = []
    for make in (adamw, eight_bit):
        matrix, vector = nn.Parameter(start.clone()), nn.Parameter(start[0].clone())
        # A multiplier of its own for the vector, and no decay, as parameter_groups has it.
        parts = groups_of([matrix]) + [{"params": [vector], "lr": RATE / 4, "weight_decay": 0.0}]
        optimizers.append(make(parts))
        for step in range(20):
            matrix.grad, vector.grad = torch.cos(matrix.detach() + step), torch.sin(vector.detach() * step)
            optimizers[-1].step()
        found.append((matrix.detach(), vector.detach()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@library
def test_schedulers_set_the_learning_rate_of_every_group():
    rates = []
    for make in (adamw, eight_bit):
        one, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = make(groups_of([one]) + [{"params": [other], "lr": RATE / 4, "weight_decay": 0.0}])
        scheduler = get_cosine_schedule_with_warmup(optimizer, 3, 20)
        found = []
        for _ in range(20):
            one.grad, other.grad = torch.ones(3), torch.ones(3)
            optimizer.step()
            scheduler.step()
            found.append([float(group["lr"]) for group in optimizer.param_groups])
        rates.append(torch.tensor(found))
    torch.testing.assert_close(*rates, rtol=1e-6, atol=1e-12)
    assert len(set(rates[1][:, 0].tolist())) > 15


@library
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_saved_state_is_loaded_without_code_and_goes_on_bit_for_bit(compiled):
    def run(matrix, optimizer, steps):
        for step in steps:
            matrix.grad = torch.cos(matrix.detach() * (step + 1))
            optimizer.step()

    def make():
        matrix = nn.Parameter(torch.linspace(-1, 1, 4096).reshape(64, 64))
        return matrix, eight_bit(groups_of([matrix]), compiled=compiled)

    whole, optimizer = make()
    run(whole, optimizer, range(6))
    half, optimizer = make()
    run(half, optimizer, range(3))
    state = torch.load(io.BytesIO(on_disk(optimizer)), weights_only=True)
    again, optimizer = make()
    again.data.copy_(half.data)
    optimizer.load_state_dict(state)
    run(again, optimizer, range(3, 6))
    assert torch.equal(whole, again) and not torch.equal(whole, half)


@library
@pytest.mark.parametrize("decay", [0.1, {"shape": "cosine", "start": 0.0, "end": 2.0}], ids=["number", "schedule"])
def test_an_interrupted_run_with_eight_bit_states_goes_on_to_the_same_weights_and_log(tmp_path, decay):
    options = {"split": make_split(documents=20), "changes": {"low_precision": "optimizer", "weight_decay": decay}}
    whole, trainer = trained(tmp_path / "whole", make_wide(), **options)
    states = trainer.optimizer.state.values()
    assert any(type(state["exp_avg"]) is not torch.Tensor for state in states)
    interrupted(tmp_path / "again", 7, make_wide(), **options)
    resumed, _ = trained(tmp_path / "again", make_wide(), **options)
    assert same(whole, resumed) and logged(tmp_path / "whole") == logged(tmp_path / "again")
    plain, _ = trained(tmp_path / "plain", make_wide(), split=options["split"])
    assert not same(plain, whole)


@library
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_decay_that_moves_is_filled_in_place_and_compiled_once(compiled):
    matrix = nn.Parameter(torch.ones(64, 64))
    optimizer = adamw_8bit(groups_of([matrix]), RATE, BETAS, compiled, moving_decay=True)
    schedule, wanted, steps = Schedule(shape="linear", start=0.0, end=2.0), 1.0, 20
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for step in range(steps):
        state = SimpleNamespace(global_step=step)
        WeightDecay(schedule, steps).on_pre_optimizer_step(None, state, None, optimizer=optimizer)
        matrix.grad = torch.zeros_like(matrix)
        optimizer.step()
        wanted *= 1 - RATE * 2.0 * step / (steps - 1)
    assert torch.allclose(matrix, torch.full_like(matrix, wanted), rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= compiled


# 8-bit products in the backward pass


@library
def test_only_gradients_are_rounded_and_only_to_eight_bits():
    model = make_wide()
    logits, exact = gradients(model)
    logits_8bit, rounded = gradients(model, emulate=True)
    assert torch.equal(logits, logits_8bit)
    for name, gradient in exact.items():
        assert cosine(gradient, rounded[name]) > 0.99, name
    # No linear layer lies between the last norm and the loss.
    assert {name for name in exact if torch.equal(exact[name], rounded[name])} == {"model.norm.weight"}
    # The last layer's own gradient sees one rounding of either factor, of at most 2^-4 each.
    name = "model.layers.1.mlp.down_proj.weight"
    error = (exact[name] - rounded[name]).norm() / exact[name].norm()
    assert 1e-3 < error < 2**-4


@library
def test_head_and_embedding_stay_and_the_layers_come_back():
    model = make_wide()
    before, names = dict(model.named_modules()), model.state_dict().keys()
    parameters = dict(model.named_parameters())
    with eight_bit_backward(model, emulate=True):
        inside = dict(model.named_modules())
        assert model.state_dict().keys() == names and dict(model.named_parameters()) == parameters
    replaced = {name for name in before if inside[name] is not before[name]}
    layers = {f"model.layers.{layer}" for layer in (0, 1)}
    attention = {f"{layer}.self_attn.{name}_proj" for layer in layers for name in "qkvo"}
    assert replaced == attention | {f"{layer}.mlp.{name}_proj" for layer in layers for name in ("gate", "up", "down")}
    assert dict(model.named_modules()) == before and dict(model.named_parameters()) == parameters
    with pytest.raises(ZeroDivisionError), eight_bit_backward(model, emulate=True):
        1 / 0  # noqa: B018
    assert dict(model.named_modules()) == before


@library
def test_a_model_trained_in_eight_bits_is_saved_as_any_other(tmp_path):
    model = make_wide()
    start = weights(model)
    with eight_bit_backward(model, emulate=True):
        optimizer = eight_bit(groups_of(model.parameters()))
        ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
        losses = []
        for _ in range(8):
            loss = model(ids, labels=ids).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert same(weights(loaded), weights(model)) and not same(weights(loaded), start)
    assert {value.dtype for value in weights(loaded).values()} == {torch.float32}
    assert not hasattr(loaded.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_model_without_layers_to_convert_is_refused():
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    for config in (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64), LlamaConfig(vocab_size=64, **sizes)):
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(KdlibError, match=f"multiples of 16, got none in {type(models.body(model)).__name__}"):
            eight_bit_backward(model).__enter__()


# Refusals


def gpu(monkeypatch, capability, cuda="13.0"):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def installed(monkeypatch, version):
    def found(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)


@pytest.mark.parametrize("setting", ["optimizer", "optimizer_and_backward"])
@pytest.mark.parametrize(("version", "told"), [(None, "got none"), ("0.9.0", "got 0.9.0")])
def test_a_missing_or_old_library_is_refused(monkeypatch, setting, version, told):
    gpu(monkeypatch, (9, 0))
    installed(monkeypatch, version)
    with pytest.raises(KdlibError, match=f"torchao must be 0.18 or newer for .*, {told}"):
        require(setting)
    require("none")


@pytest.mark.parametrize(
    ("capability", "cuda", "told"),
    [(None, None, "no CUDA device"), ((8, 0), "13.0", "capability 8.0"), ((9, 4), None, "capability 9.4")],
    ids=["no GPU", "Ampere", "another maker's"],
)
def test_hardware_without_eight_bit_products_is_refused(monkeypatch, capability, cuda, told):
    installed(monkeypatch, "0.18.0")
    gpu(monkeypatch, capability, cuda)
    with pytest.raises(KdlibError, match=rf"8\.9 or higher.*got .*{told}"):
        require("optimizer_and_backward")
    require("optimizer")


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("version", ["0.18.0", "0.18.0+cu130", "0.20.1", "1.0.0"])
def test_hardware_with_eight_bit_products_is_accepted(monkeypatch, capability, version):
    installed(monkeypatch, version)
    gpu(monkeypatch, capability)
    require("optimizer_and_backward")


@pytest.mark.parametrize(
    "changes",
    [{"architecture": "gpt2"}, {"objective": "online_kd", "features": {"of": "relation"}}],
    ids=["gpt2", "relation"],
)
def test_students_whose_layers_cannot_be_replaced_are_refused_by_name(changes):
    profiles.parameters("04_student", "smoke", low_precision="optimizer", **changes)
    with pytest.raises(KdlibError, match="must be optimizer or none with gpt2.*and with features of relation"):
        profiles.parameters("04_student", "smoke", low_precision="optimizer_and_backward", **changes)


def test_unknown_settings_are_refused():
    with pytest.raises(KdlibError, match="must be one of .* got 'int4'"):
        require("int4")


def test_a_trainer_refuses_before_it_starts_and_writes_nothing(tmp_path, monkeypatch):
    installed(monkeypatch, None)
    with pytest.raises(KdlibError, match="torchao must be"):
        make_trainer(tmp_path / "run", make_wide(), changes={"low_precision": "optimizer"})
    assert not (tmp_path / "run").exists()


def test_without_the_setting_a_run_is_named_and_trained_as_before(tmp_path):
    assert "low_precision" not in settings().identity()
    assert settings(low_precision="optimizer").identity()["low_precision"] == "optimizer"
    _, trainer = trained(tmp_path)
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW


# On the hardware


@hardware
def test_on_the_gpu_gradients_are_those_of_the_emulation_and_near_float32s():
    model = make_wide(device="cuda")
    logits, exact = gradients(model)
    emulated = gradients(model, emulate=True)[1]
    logits_8bit, real = gradients(model, emulate=False)
    assert torch.equal(logits, logits_8bit)
    for name, gradient in exact.items():
        assert cosine(gradient, real[name]) > 0.99, name
        # What is left is the rounding of products to bfloat16.
        assert cosine(emulated[name], real[name]) > 0.999, name


@hardware
@pytest.mark.parametrize("compiled", [False, True])
def test_on_the_gpu_a_student_learns_alike(tmp_path, compiled):
    split, losses = make_split(documents=60), {}
    for setting in ("none", "optimizer", "optimizer_and_backward"):
        changes = {"epochs": 4, "precision": "bfloat16", "compile": compiled, "low_precision": setting}
        model = make_wide(device="cuda")
        trainer = make_trainer(tmp_path / setting, model, split, changes=changes, validation=False)
        losses[setting] = trainer.fit()["final_loss"]
        assert all(type(module).__name__ != "Float8Linear" for module in model.modules())
        assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert losses["none"] < 3.3  # it began at ln 64 = 4.16, and tokens are drawn evenly from 28
    assert losses["optimizer"] == pytest.approx(losses["none"], rel=0.03)
    assert losses["optimizer_and_backward"] == pytest.approx(losses["none"], rel=0.03)


@hardware
def test_on_the_gpu_an_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    changes = {"precision": "bfloat16", "low_precision": "optimizer_and_backward"}
    options = {"split": make_split(documents=20), "changes": changes, "validation": False}
    whole, _ = trained(tmp_path / "whole", make_wide(device="cuda"), **options)
    interrupted(tmp_path / "again", 7, make_wide(device="cuda"), **options)
    resumed, _ = trained(tmp_path / "again", make_wide(device="cuda"), **options)
    assert same(whole, resumed)
