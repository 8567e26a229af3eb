import copy

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlib import models
from kdlib.data import vocabulary
from kdlib.errors import KdlibError

ARCHITECTURES = ("llama", "gpt2", "qwen3")
TEXTS = ["the cat sat on the mat and then the cat ate the rat " * 8, "a bird sang in 1997, over 12 trees"]


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.train(TEXTS, 280)


def shape(architecture="llama", **sizes):
    return models.Shape(**{"layers": 2, "hidden_size": 16, "heads": 2, "architecture": architecture, **sizes})


def build(tokenizer, architecture="llama", seed=0, attention="eager", spread=True):
    """A float64 student; with ``spread``, its biases and norms are drawn too, so that leaving one out shows."""
    model = models.build(shape(architecture), tokenizer, 32, seed, attention).double().eval()
    if spread:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += noise * (0.5 if parameter.ndim == 1 else 0.1)
    return model


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_built_model_depends_on_its_seed_alone(tokenizer, architecture):
    torch.manual_seed(1)
    first = weights(models.build(shape(architecture), tokenizer, 32, seed=5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = weights(models.build(shape(architecture), tokenizer, 32, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    other = weights(models.build(shape(architecture), tokenizer, 32, seed=6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(next(iter(first.values())), next(iter(other.values())))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_built_model_is_what_its_shape_says(tokenizer, architecture):
    model = models.build(shape(architecture, intermediate_size=40), tokenizer, 32, seed=0)
    assert model.config.model_type == architecture
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 16)
    assert model.config.max_position_embeddings == 32
    assert model.config.vocab_size == len(tokenizer) == len(model.get_input_embeddings().weight)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert getattr(model.get_input_embeddings(), "padding_idx", None) is None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert 40 in {size for parameter in model.parameters() for size in parameter.shape}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = torch.arange(8)[None]
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits), "dropout"


def test_default_mlp_widths_hold_as_many_parameters_with_and_without_a_gate():
    assert shape(hidden_size=128).mlp_width == 352  # 8/3 of it is 341.3
    assert shape(hidden_size=576).mlp_width == 1536
    assert shape("gpt2", hidden_size=576).mlp_width == 2304
    assert 3 * 1536 == 2 * 2304


@pytest.mark.parametrize(
    "wrong", [{"heads": 3}, {"heads": 16}, {"layers": 0}, {"architecture": "rnn"}, {"width": 3}]
)
def test_an_impossible_shape_is_refused(wrong):
    with pytest.raises(ValidationError):
        shape(**wrong)


WINDOWS = [[3, 40, 41, 42, 9], [7, 8], [50, 60, 70]]


def packed():
    """The windows in one row of 12, two positions of padding, and an all-padding second row."""
    rows = {"input_ids": torch.zeros(2, 12, dtype=torch.long), "position_ids": torch.zeros(2, 12, dtype=torch.long)}
    segments = torch.full((2, 12), -1)
    start = 0
    for number, window in enumerate(WINDOWS):
        span = slice(start, start + len(window))
        rows["input_ids"][0, span] = torch.tensor(window)
        rows["position_ids"][0, span] = torch.arange(len(window))
        segments[0, span] = number
        start += len(window)
    return rows, segments


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_window_sees_itself_alone(tokenizer, architecture, attention):
    model = build(tokenizer, architecture, attention=attention)
    assert model.config._attn_implementation == attention
    rows, segments = packed()
    mask = models.attention_mask(segments, torch.float64)
    together = models.body(model)(attention_mask=mask, **rows).last_hidden_state
    alone = [models.body(model)(torch.tensor([window])).last_hidden_state[0] for window in WINDOWS]
    used = together[segments >= 0]
    # Norms and softmax compute in float32 whatever the weights' dtype; a leak between windows would show as 0.1.
    torch.testing.assert_close(used, torch.cat(alone), rtol=0, atol=1e-5)
    assert together.isfinite().all()

    direction = torch.linspace(-1, 1, used.numel(), dtype=torch.float64).view_as(used)
    gradients = [
        torch.autograd.grad((hidden * direction).sum(), list(models.body(model).parameters()))
        for hidden in (used, torch.cat(alone))
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.isfinite().all()


def test_the_mask_is_causal_within_windows_and_padding_sees_itself():
    mask = models.attention_mask(torch.tensor([[0, 0, 1, 1, -1, -1]]), torch.float32)
    seen = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ]
    )
    assert mask.shape == (1, 1, 6, 6) and mask.dtype == torch.float32
    assert torch.equal(mask[0, 0] == 0, seen.bool())
    assert torch.all(mask[0, 0][seen == 0] == torch.finfo(torch.float32).min)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_float32_mask_serves_bfloat16_autocast(tokenizer, attention):
    model = models.build(shape(), tokenizer, 32, 0, attention)
    rows, segments = packed()
    mask = models.attention_mask(segments, torch.float32)
    plain = models.body(model)(attention_mask=mask, **rows).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        hidden = models.body(model)(attention_mask=mask, **rows).last_hidden_state
    torch.testing.assert_close(hidden.float(), plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_body_and_head_make_the_logits(tokenizer, architecture, adapted):
    model = build(tokenizer, architecture)
    if adapted:
        model = stirred(models.lora(model, rank=2, alpha=4, dropout=0.0, seed=0))
    ids = torch.arange(10)[None]
    hidden = models.body(model)(ids).last_hidden_state
    weight, bias = models.head(model)
    assert bias is None
    torch.testing.assert_close(hidden @ weight.T, model(ids).logits, rtol=0, atol=1e-12)


def test_the_heads_bias_is_part_of_it(tokenizer):
    model = build(tokenizer)
    layer = torch.nn.Linear(16, len(tokenizer), dtype=torch.float64)
    model.set_output_embeddings(layer)
    weight, bias = models.head(model)
    assert weight is layer.weight and bias is layer.bias


def test_a_head_that_is_not_linear_is_refused(tokenizer):
    model = build(tokenizer)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(KdlibError, match="final_logit_softcapping"):
        models.head(model)


def stirred(model):
    """Adapters start as the identity; move them off it."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 10
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_adapts_a_copy_and_merges_back_into_an_ordinary_model(tokenizer, architecture):
    base = build(tokenizer, architecture)
    before, ids = weights(base), torch.arange(10)[None]
    expected = base(ids).logits
    adapted = models.lora(base, rank=2, alpha=4, dropout=0.0, seed=3)
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=1e-12)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    linear = {"llama": 7, "qwen3": 7, "gpt2": 4}[architecture] * 2
    assert len(trainable) == 2 * linear and all("lora_" in name for name in trainable)

    changed = stirred(adapted)(ids).logits
    assert (changed - expected).abs().max() > 1e-3
    merged = models.merge(adapted)
    torch.testing.assert_close(merged(ids).logits, changed, rtol=0, atol=1e-12)
    assert type(merged) is type(base) and weights(merged).keys() == before.keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert all(torch.equal(before[name], parameter) for name, parameter in base.named_parameters())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_lora_shares_no_training_mode_with_its_base(tokenizer):
    base = build(tokenizer)
    adapted = models.lora(base, rank=2, alpha=4, dropout=0.5, seed=0).train()
    base.eval()
    dropouts = [module for module in adapted.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts and all(module.training and module.p == 0.5 for module in dropouts)


def test_lora_depends_on_its_seed_alone(tokenizer):
    base = build(tokenizer)
    torch.manual_seed(1)
    first = weights(models.lora(base, 2, 4, 0.0, seed=3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = (weights(models.lora(base, 2, 4, 0.0, seed=seed)) for seed in (3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_auto_precision_is_bfloat16_only_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    for amx, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert models.precision("auto") == expected
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert models.precision("auto") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda yes=supported, **_: yes)
        assert models.precision("auto") == expected


def test_precision_by_name():
    assert models.precision("float32") is None
    assert models.precision("bfloat16") == torch.bfloat16
    with pytest.raises(KdlibError, match="must be auto, float32 or bfloat16, got 'fp8'"):
        models.precision("fp8")


def test_parameters_are_counted_once_by_component(tokenizer):
    tokens, width, mlp = len(tokenizer), 16, 64
    expected = {
        "llama": {"attention": 4 * width**2, "mlp": 3 * width * mlp, "norms": 2 * width},
        "qwen3": {"attention": 4 * width**2, "mlp": 3 * width * mlp, "norms": 2 * width + 2 * 8},
        "gpt2": {
            "attention": 4 * width**2 + 4 * width,
            "mlp": 2 * width * mlp + mlp + width,
            "norms": 4 * width,
        },
    }
    for architecture in ARCHITECTURES:
        model = models.build(shape(architecture, intermediate_size=mlp), tokenizer, 32, 0)
        counts = models.parameters_by_component(model)
        assert counts["embedding"] == tokens * width + (32 * width if architecture == "gpt2" else 0)
        assert counts["head"] == counts["other"] == 0
        final = 2 * width if architecture == "gpt2" else width
        for name, layer in expected[architecture].items():
            assert counts[name] == 2 * layer + (final if name == "norms" else 0)
        assert counts["non_embedding"] == counts["attention"] + counts["mlp"] + counts["norms"]
        assert counts["total"] == counts["embedding"] + counts["non_embedding"]
        assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())


def test_an_untied_head_is_counted_as_head(tokenizer):
    model = build(tokenizer)
    model.set_output_embeddings(torch.nn.Linear(16, len(tokenizer)))
    counts = models.parameters_by_component(model)
    assert counts["head"] == 17 * len(tokenizer) and counts["embedding"] == 16 * len(tokenizer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_loads_anywhere_with_the_same_logits(tokenizer, architecture, tmp_path):
    model = build(tokenizer, architecture)
    folder = tmp_path / "runs" / "model"
    models.save(model, tokenizer, folder, {"license": "apache-2.0"})
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    saved = weights(model)
    assert all(torch.equal(saved[name], weight) for name, weight in loaded.named_parameters())
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    vocabulary.require_same(tokenizer, AutoTokenizer.from_pretrained(folder))
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_the_model_card_tells_data_settings_metrics_and_versions(tokenizer, tmp_path):
    card = {
        "license": "apache-2.0",
        "base_model": "some/teacher",
        "data": {"domains": ["speeches", "récits"]},
        "settings": {"seed": 1},
        "metrics": {"nll": 3.25},
        "versions": {"torch": "2"},
    }
    models.save(build(tokenizer), tokenizer, tmp_path / "model", card)
    _, front, text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8").split("---\n")
    front = yaml.safe_load(front)
    assert front["library_name"] == "transformers" and front["base_model"] == "some/teacher"
    use, *blocks = text.split("## ")[1:]
    assert use.startswith("Use\n\n```python\nfrom transformers import")  # a type of transformers' own needs no other import
    assert [block.split("\n")[0] for block in blocks] == ["Data", "Settings", "Metrics", "Versions"]
    found = [yaml.safe_load(block.split("```yaml\n")[1].split("```")[0]) for block in blocks]
    assert found == [card["data"], card["settings"], card["metrics"], card["versions"]]


def test_a_save_that_fails_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        models.save(build(tokenizer), tokenizer, tmp_path / "model", {})
    with pytest.raises(yaml.YAMLError):
        models.save(build(tokenizer), tokenizer, tmp_path / "model", {"metrics": {"nll": np.float32(1)}})
    assert list(tmp_path.iterdir()) == []


def test_save_never_overwrites(tokenizer, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(KdlibError, match="exists already"):
        models.save(build(tokenizer), tokenizer, tmp_path / "model", {})


def test_a_padded_embedding_is_cut_to_the_tokenizer(tokenizer, tmp_path):
    model = build(tokenizer)
    full = copy.deepcopy(model)
    model.resize_token_embeddings(len(tokenizer) + 24, mean_resizing=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = models.load_teacher(tmp_path, dtype=torch.float64)
    assert not loaded.training
    assert len(loaded.get_input_embeddings().weight) == loaded.config.vocab_size == len(tokenizer)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(ids).logits, full(ids).logits, rtol=0, atol=1e-6)
    assert next(models.load_teacher(tmp_path).parameters()).dtype == torch.float32


def test_more_tokens_than_embedding_rows_are_refused(tokenizer, tmp_path):
    model = vocabulary.slice_model(build(tokenizer), np.arange(270))
    models.save(model, tokenizer, tmp_path / "model", {})
    with pytest.raises(KdlibError, match="tokenizer's 280 tokens, got 270"):
        models.load_teacher(tmp_path / "model")


def test_weights_that_would_be_unpickled_are_refused(tokenizer, tmp_path):
    models.save(build(tokenizer), tokenizer, tmp_path / "model", {})
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(build(tokenizer).state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(KdlibError, match="must be a .gguf file, a folder of save_pretrained with safetensors"):
        models.load_teacher(tmp_path / "model")


def test_a_hub_teacher_out_of_reach_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(KdlibError, match="nobody/no-such-model must be .*or a Hugging Face id"):
        models.load_teacher("nobody/no-such-model", revision="main")
    with pytest.raises(KdlibError, match="nothing.gguf must be"):
        models.load_teacher("nothing.gguf")


def write_gguf(path, tokenizer, splitter):
    """A two-layer Llama with quantised matrices, as llama.cpp writes it; returns the matrices' true values."""
    rng, width, mlp = np.random.default_rng(0), 64, 96
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if text.startswith("<|") else 1 for text in tokens])
    merges = yaml.safe_load(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    shapes = {"token_embd.weight": (len(tokenizer), width)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_{name}.weight": (width, width) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{name}.weight": (mlp, width) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (width, mlp)}
    values = {}
    for name, size in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        blocks = gguf.quants.quantize(rng.standard_normal(size).astype(np.float32), kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        values[name] = gguf.quants.dequantize(blocks, kind)
    for name in ("output_norm", *(f"blk.{i}.{kind}_norm" for i in range(2) for kind in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_a_gguf_teacher_is_dense_and_splits_text_as_it_was_trained_to(tokenizer, tmp_path):
    values = write_gguf(tmp_path / "teacher.gguf", tokenizer, "smollm")
    model, loaded = models.load_teacher(tmp_path / "teacher.gguf"), models.load_tokenizer(tmp_path / "teacher.gguf")
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    layer = model.model.layers[1].mlp.down_proj
    assert type(layer) is torch.nn.Linear
    np.testing.assert_array_equal(layer.weight.detach().numpy(), values["blk.1.ffn_down.weight"])
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    assert loaded.chat_template == tokenizer.chat_template
    for text in (*TEXTS, "in   12 or\n\n  7", "<|im_start|>user"):
        assert loaded.encode(text) == tokenizer.encode(text)
    models.save(model, loaded, tmp_path / "model", {})


def test_a_gguf_tokenizer_with_an_unknown_splitter_is_refused(tokenizer, tmp_path):
    write_gguf(tmp_path / "teacher.gguf", tokenizer, "mystery")
    with pytest.raises(KdlibError, match="must be gpt-2, .* got 'mystery'"):
        models.load_tokenizer(tmp_path / "teacher.gguf")
