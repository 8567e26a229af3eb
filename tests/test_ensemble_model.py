"""An ensemble behaves as any other transformers model: loss, generation, files."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from test_losses import Living
from tokenizers import Tokenizer, models
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from kdlib.ensemble.model import EnsembleConfig, EnsembleForCausalLM
from kdlib.ensemble.pooling import log_probs, logit_pool, probability_pool
from kdlib.errors import KdlibError

VOCABULARY = 53


pytestmark = pytest.mark.usefixtures("one_thread")


def member(seed, **changes):
    torch.manual_seed(seed)
    common = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    if changes.pop("architecture", "llama") == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=48, **common | changes)
    else:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"max_position_embeddings": 64, "tie_word_embeddings": True}
        config = LlamaConfig(**common | shape | changes)
    return AutoModelForCausalLM.from_config(config).eval()


def unlike_members():
    return [
        member(0),
        member(1, hidden_size=24, num_hidden_layers=1, tie_word_embeddings=False),
        member(2, architecture="gpt2"),
    ]


def text(rows=2, length=9):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_logits_are_the_log_of_the_pooled_distribution():
    members, ids = unlike_members(), text()
    alone = torch.stack([log_probs(one(ids).logits) for one in members])
    for pool, function in (("probability", probability_pool), ("logit", logit_pool)):
        logits = EnsembleForCausalLM.from_members(members, pool)(ids).logits
        assert torch.equal(logits, function(alone))
        assert torch.allclose(functional.softmax(logits, -1), function(alone).exp(), atol=1e-6)


@torch.no_grad()
def test_the_calibration_temperature_divides_the_pooled_log_probabilities():
    members, ids = unlike_members(), text()
    pooled = EnsembleForCausalLM.from_members(members)(ids).logits
    softer = EnsembleForCausalLM.from_members(members, temperature=2.0)(ids).logits
    assert torch.allclose(softer, functional.log_softmax(pooled / 2, -1))


@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_next_token_with_ignored_labels_left_out():
    ids = text()
    labels = ids.clone()
    labels[0, :4] = -100
    found = EnsembleForCausalLM.from_members(unlike_members())(ids, labels=labels)
    by_hand = [
        -found.logits[row, i, ids[row, i + 1]] for row in range(2) for i in range(8) if labels[row, i + 1] != -100
    ]
    assert len(by_hand) == 13
    assert found.loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-6)


@pytest.mark.parametrize("pool", ["probability", "logit"])
def test_an_ensemble_of_one_generates_what_its_member_generates(pool):
    one, ids = member(0), text()
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": -1}
    assert torch.equal(
        EnsembleForCausalLM.from_members([one], pool).generate(ids, **options), one.generate(ids, **options)
    )


@pytest.mark.parametrize("search", [{"num_beams": 1}, {"num_beams": 3}])
def test_generation_with_the_members_caches_equals_generation_without(search):
    ensemble, ids = EnsembleForCausalLM.from_members(unlike_members()), text()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "eos_token_id": -1, **search}
    cached = ensemble.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, ensemble.generate(ids, use_cache=False, **options))
    assert cached.shape == (2, 21)


def test_an_ensemble_of_one_samples_what_its_member_samples():
    one, ids = member(0), text()
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "attention_mask": torch.ones_like(ids)}
    found = []
    for model in (one, EnsembleForCausalLM.from_members([one]), EnsembleForCausalLM.from_members([one, one])):
        torch.manual_seed(3)
        found.append(model.generate(ids, eos_token_id=-1, **options))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], one.generate(ids, eos_token_id=-1, **options)), "it does draw"


@pytest.mark.parametrize("use_cache", [True, False])
def test_samples_of_a_pool_have_its_frequencies(use_cache):
    ensemble, ids = EnsembleForCausalLM.from_members(unlike_members(), weights=[0.6, 0.1, 0.3]), text(1, 4)
    torch.manual_seed(0)
    options = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "attention_mask": torch.ones_like(ids), "use_cache": use_cache}
    drawn = ensemble.generate(ids.expand(4000, -1), **options | {"attention_mask": torch.ones(4000, 4, dtype=torch.long)})[:, -1]
    with torch.no_grad():
        p = ensemble(ids).logits[0, -1].exp()
    error = torch.bincount(drawn, minlength=VOCABULARY) / 4000 - p
    assert (error.abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("how", [{}, {"pool": "logit", "weights": [0.5, 0.2, 0.3]}], ids=["even", "weighted"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_logits_and_no_text(how):
    ensemble, ids = EnsembleForCausalLM.from_members(unlike_members(), **how), text(2, 6)
    alone = ensemble(ids).logits
    padding, mask = torch.full((2, 3), 7), torch.cat([torch.zeros(2, 3), torch.ones(2, 6)], 1).long()
    right = ensemble(torch.cat([ids, padding], 1), attention_mask=mask.flip(1)).logits
    assert torch.allclose(right[:, :6], alone, atol=1e-5)
    numbered = (mask.cumsum(-1) - 1).clamp(min=0)
    left = ensemble(torch.cat([padding, ids], 1), attention_mask=mask, position_ids=numbered).logits
    assert torch.allclose(left[:, 3:], alone, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    plain = ensemble.generate(ids, attention_mask=torch.ones_like(ids), **options)
    padded = ensemble.generate(torch.cat([padding, ids], 1), attention_mask=mask, **options)
    assert torch.equal(padded[:, 3:], plain)


@torch.no_grad()
def test_members_that_compute_one_by_one_hold_as_many_sets_of_logits_whatever_their_number():
    most = {}
    for count in (4, 10):
        ensemble, ids = EnsembleForCausalLM.from_members(unlike_members()[1:] * (count // 2)), text(4, 40)
        ensemble(ids)
        with Living(ids.numel() * VOCABULARY) as living:
            ensemble(ids)
        most[count] = living.most
    assert most[10] == most[4] < 10  # also what a member computes on the way to its logits


@torch.no_grad()
def test_a_step_with_the_cache_gives_the_logits_of_the_whole_text():
    ensemble, ids = EnsembleForCausalLM.from_members(unlike_members()), text()
    past = ensemble(ids[:, :-1], use_cache=True).past_key_values
    assert len(past) == 2 + 1 + 1  # a layer of cache for every layer of every member
    step = ensemble(ids[:, -1:], past_key_values=past)
    assert torch.allclose(step.logits[:, 0], ensemble(ids).logits[:, -1], atol=1e-5)


@pytest.mark.parametrize("shard", ["1GB", "8KB"])
@torch.no_grad()
def test_saved_and_loaded_by_the_auto_class_the_logits_are_the_same_bits(tmp_path, shard):
    ensemble, ids = EnsembleForCausalLM.from_members(unlike_members(), "logit", temperature=1.25), text()
    ensemble.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shard == "1GB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, EnsembleForCausalLM) and not loaded.training
    assert torch.equal(loaded(ids).logits, ensemble(ids).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EnsembleConfig)


def test_tied_weights_are_saved_once_and_tied_again_where_they_were(tmp_path):
    EnsembleForCausalLM.from_members(unlike_members()).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        heads = [name for name in file.keys() if "lm_head" in name]  # noqa: SIM118
    assert heads == ["members.1.lm_head.weight"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tied = [one.get_output_embeddings().weight is one.get_input_embeddings().weight for one in loaded.members]
    assert tied == [True, False, True]
    loaded.tie_weights()
    assert loaded.members[1].lm_head.weight is not loaded.members[1].model.embed_tokens.weight


@torch.no_grad()
def test_an_ensemble_with_a_mixture_of_experts_survives_its_files(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    ensemble = EnsembleForCausalLM.from_members([AutoModelForCausalLM.from_config(config), member(0)])
    ensemble.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(text()).logits, ensemble(text()).logits)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_and_precision_asked_of_the_ensemble_reach_every_member(tmp_path, attention):
    members = unlike_members()
    members[0].save_pretrained(tmp_path / "member")
    members[0] = AutoModelForCausalLM.from_pretrained(tmp_path / "member")  # its configuration now names a precision
    ensemble = EnsembleForCausalLM.from_members(members)
    ensemble.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention, dtype=torch.bfloat16)
    assert {one.config._attn_implementation for one in loaded.members} == {attention}
    assert {one.dtype for one in loaded.members} == {torch.bfloat16} and loaded(text()).logits.dtype == torch.float32
    assert loaded(text(), use_cache=True).past_key_values.layers[0].keys.dtype == torch.bfloat16
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert torch.allclose(whole(text()).logits, ensemble(text()).logits, atol=1e-4)


def test_members_are_held_unchanged_and_not_initialised_again():
    one = member(0)
    one.lm_head = torch.nn.Linear(16, VOCABULARY, bias=False)  # a module transformers has not seen
    before = copy.deepcopy(one.state_dict())
    ensemble = EnsembleForCausalLM.from_members([one, member(1)])
    assert ensemble.members[0] is one
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_the_configuration_names_no_path_and_the_shortest_context(tmp_path):
    one = member(0)
    one.save_pretrained(tmp_path / "member")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "member")
    EnsembleForCausalLM.from_members([one, member(2, architecture="gpt2")]).save_pretrained(tmp_path / "ensemble")
    written = (tmp_path / "ensemble" / "config.json").read_text()
    assert str(tmp_path) not in written
    found = json.loads(written)
    assert found["max_position_embeddings"] == 48 and found["vocab_size"] == VOCABULARY and found["eos_token_id"] == 0


def test_training_the_ensemble_reaches_every_member():
    ensemble = EnsembleForCausalLM.from_members(unlike_members())
    ensemble(text(), labels=text()).loss.backward()
    assert all(parameter.grad is not None for parameter in ensemble.parameters())


def tokenizer(*tokens):
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: EnsembleForCausalLM.from_members([member(0), member(1, vocab_size=54)]),
            "different vocab_size: .53, 54",
        ),
        (lambda: EnsembleForCausalLM.from_members([member(0), member(1, eos_token_id=2)]), "different eos_token_id"),
        (lambda: EnsembleForCausalLM.from_members([member(0), member(1).bfloat16()]), "different dtype"),
        (lambda: EnsembleForCausalLM.from_members([]), "at least one member"),
        (lambda: EnsembleForCausalLM.from_members([torch.nn.Linear(2, 2)]), "got Linear as member 0"),
        (lambda: EnsembleForCausalLM.from_members([member(0)], "median"), "probability"),
        (lambda: EnsembleForCausalLM.from_members([member(0)], temperature=0.0), "positive"),
        (
            lambda: EnsembleForCausalLM.from_members(
                [member(0)] * 2, tokenizers=[tokenizer("a", "b"), tokenizer("b", "a")]
            ),
            r"one tokenizer.* \[1\] differ",
        ),
    ],
)
def test_members_whose_distributions_cannot_be_pooled_are_refused(call, message):
    with pytest.raises(KdlibError, match=message):
        call()


def test_members_with_one_tokenizer_are_accepted():
    same = [tokenizer("a", "b"), tokenizer("a", "b")]
    assert len(EnsembleForCausalLM.from_members([member(0), member(1)], tokenizers=same).members) == 2
