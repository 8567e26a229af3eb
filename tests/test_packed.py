"""Packed members compute what their loop computes, hold the same memory, and give way where they cannot or need not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config
from transformers.cache_utils import DynamicCache

from kdlib import models
from kdlib.ensemble import packing
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.ensemble.packed import PackedMembers, unpackable
from kdlib.ensemble.packing import EnsembleCache
from kdlib.errors import KdlibError
from kdlib.losses.logits import Streamed

VOCABULARY, WIDTH, HEADS, MEMBERS = 53, 32, 4, 3
FAMILIES = {
    "llama": {},
    "llama, grouped queries, untied, biases": {
        "num_key_value_heads": 2, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True,
    },
    "gpt2": {},
    "gpt2, untied": {"tie_word_embeddings": False},
    "qwen3": {},
    "qwen3, grouped queries, wide heads, untied": {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": False},
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def member(seed, family="llama", attention="sdpa", **changes):
    torch.manual_seed(seed)
    architecture = family.partition(",")[0]
    values = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if architecture == "gpt2":
        values |= {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        values |= {"intermediate_size": 48, "num_key_value_heads": HEADS}
    if architecture == "qwen3":
        values |= {"head_dim": WIDTH // HEADS}
    config = AutoConfig.for_model(architecture, **values | FAMILIES[family] | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():  # norms and biases too: at their ones and zeros a mistake would not show
        if parameter.ndim == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def alike(family="llama", attention="sdpa", count=MEMBERS, **changes):
    return [member(seed, family, attention, **changes) for seed in range(count)]


def text(rows=2, length=9):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def both(members, **arguments):
    """Logits of the loop, then packed, each [K, rows, positions, V]."""
    with torch.no_grad():
        loop = torch.stack([one(use_cache=False, **arguments).logits for one in members])
        return loop, PackedMembers(members)(**arguments)


def close(one, other):
    return torch.allclose(one, other, rtol=0, atol=1e-5)


# The forward pass


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_the_loop(family, attention):
    loop, packed = both(alike(family, attention), input_ids=text())
    assert loop.shape == (MEMBERS, 2, 9, VOCABULARY) and close(loop, packed)
    assert (loop[0] - loop[1]).abs().max() > 0.1  # members differ, so that a mix-up would show


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", ["left", "right", "all of one row"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_padding_is_left_out_as_in_the_loop(family, padded, attention):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, {"left": slice(0, 4), "right": slice(5, 9), "all of one row": slice(None)}[padded]] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {"input_ids": text(), "attention_mask": mask, "position_ids": positions}
    loop, packed = both(alike(family, attention), **arguments)
    assert close(loop, packed)
    seen = both(alike(family, attention), input_ids=text())[1]
    assert close(packed[:, 0], seen[:, 0]) and not close(packed[:, 1], seen[:, 1])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_windows_packed_in_a_row_are_kept_apart(family, masked):
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1], [0, 0, 1, 1, 1, 1, 1, 1, 2]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5, 0]])
    arguments = {"input_ids": text(), "position_ids": positions}
    if masked:  # without a mask transformers finds the windows by their positions
        arguments["attention_mask"] = models.attention_mask(segments, torch.float32)
    members = alike(family)
    loop, packed = both(members, **arguments)
    assert close(loop, packed)
    alone = both(members, input_ids=text()[:1, 4:7])[1]
    assert close(packed[:, :1, 4:7], alone)


def test_a_mask_may_differ_between_the_heads():
    mask = models.attention_mask(torch.zeros(2, 9, dtype=torch.long), torch.float32).repeat(1, HEADS, 1, 1)
    mask[:, 1] += torch.randn(9, 9)
    loop, packed = both(alike(), input_ids=text(), attention_mask=mask)
    assert close(loop, packed)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4]), torch.tensor([[1, 2], [8, 0]]), torch.rand(2, 9) > 0.5])
def test_only_the_logits_that_are_asked_for_are_made(keep):
    loop, packed = both(alike(), input_ids=text(), logits_to_keep=keep)
    assert loop.shape == packed.shape and close(loop, packed)


def test_one_member_is_packed_as_itself():
    loop, packed = both(alike(count=1), input_ids=text())
    assert torch.allclose(loop, packed, rtol=0, atol=1e-6)


@torch.no_grad()
def test_packed_in_bfloat16_and_under_autocast_as_in_the_loop():
    members = [one.bfloat16() for one in alike("qwen3")]
    loop, packed = both(members, input_ids=text())
    assert packed.dtype == torch.bfloat16 and (loop - packed).abs().max() < 0.05 * loop.abs().max()
    members = alike("qwen3")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loop, packed = both(members, input_ids=text())
    assert loop.dtype == packed.dtype and (loop - packed).abs().max() < 0.05 * loop.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_step_by_step_with_the_cache_packed_logits_are_those_of_the_whole_text(family):
    members, ids = alike(family), text()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole, packed = both(members, input_ids=ids, attention_mask=mask)[1], PackedMembers(members)
    cache, found = DynamicCache(config=members[0].config), []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
        found.append(packed(ids[:, start:end], mask[:, :end], None, cache))
    assert close(torch.cat(found, dim=2), whole)
    assert cache.layers[0].keys.shape[:2] == (2, MEMBERS * packed.kv_heads)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_member_may_have_a_text_of_its_own(family, attention):
    members = alike(family, attention)
    ids = torch.randint(1, VOCABULARY, (MEMBERS, 2, 9), generator=torch.Generator().manual_seed(3))
    one, other, third = [0, 0, 0, 0, 1, 1, 1, -1, -1], [0] * 9, [0, 1, 1, 1, 1, 2, 2, 2, 2]
    segments = torch.tensor([[one, other], [other, third], [third, one]])
    one, other, third = [0, 1, 2, 3, 0, 1, 2, 0, 0], [*range(9)], [0, 0, 1, 2, 3, 0, 1, 2, 3]
    positions = torch.tensor([[one, other], [other, third], [third, one]])
    masks = torch.stack([models.attention_mask(one, torch.float32) for one in segments])
    with torch.no_grad():
        each = zip(members, ids, masks, positions, strict=True)
        loop = torch.stack([one(input_ids=a, attention_mask=b, position_ids=c, use_cache=False).logits for one, a, b, c in each])
        packed = PackedMembers(members)
        hidden = packed.hidden_of_each(ids, masks, positions)
        weights, biases = packed.output_layers()
    assert close(torch.stack([one @ weight.T for one, weight in zip(hidden, weights, strict=True)]), loop)
    assert biases == (None,) * MEMBERS
    places = {id(part): stack[1, rows] for part, stack, rows in packed.places(1)}
    assert all(torch.equal(places[id(one)], one) for one in packed.member(1).parameters())


# The weights


@pytest.mark.parametrize("family", FAMILIES)
def test_members_come_back_bit_for_bit(family):
    members = alike(family)
    before = [copy.deepcopy(one.state_dict()) for one in members]
    packed = PackedMembers(members)
    assert len(packed) == MEMBERS
    for number, state in enumerate(before):
        found = packed.member(number).state_dict()
        assert list(found) == list(state) and all(torch.equal(found[name], state[name]) for name in state)
        assert packed.member(number) is members[number]
    # Everything is held once: by the stacked weights, and nothing besides.
    assert sum(one.numel() for one in packed.parameters()) == sum(one.numel() for m in members for one in m.parameters())
    memory = {one.untyped_storage().data_ptr() for one in packed.parameters()}
    assert {one.untyped_storage().data_ptr() for m in members for one in m.parameters()} == memory


def test_what_changes_the_stacked_weights_changes_the_members_and_the_other_way_round():
    packed = PackedMembers(alike())
    with torch.no_grad():
        packed.member(1).lm_head.weight.fill_(2.0)
        packed.ends["norm_weight"][2] = 3.0
    assert (packed.ends["embedding_weight"][1] == 2).all() and (packed.member(2).model.norm.weight == 3).all()
    packed.double()
    assert packed.member(0).dtype == torch.float64 and close(*both_of(packed))


def both_of(packed):
    with torch.no_grad():
        return torch.stack([one(text()).logits for one in packed.models]), packed(text())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_the_packed_forward_pass_are_those_of_the_loop(family):
    members, ids = alike(family, "eager"), text()
    apart = copy.deepcopy(members)
    packed = PackedMembers(members)
    scale = torch.tensor([1.0, 2.0, 0.5])  # members' losses differ, so that their gradients cannot be exchanged
    loss = [functional.cross_entropy(one[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for one in packed(ids).unbind()]
    (scale * torch.stack(loss)).sum().backward()
    for one, factor in zip(apart, scale, strict=True):
        (factor * functional.cross_entropy(one(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())).backward()
    for stack, views in packed._views:
        for number, parts in enumerate(views):
            found = stack.grad[number].split([len(part) for part in parts])
            names = {id(one): name for name, one in members[number].named_parameters()}
            for gradient, part in zip(found, parts, strict=True):
                expected = apart[number].get_parameter(names[id(part)]).grad
                assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)


# Members that cannot be packed


def hooked():
    members = alike()
    members[1].model.norm.register_forward_hook(lambda *_: None)
    return members


def replaced():
    members = alike()
    members[2].model.layers[0].mlp = nn.Sequential()
    return members


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def of_another_kind():
    members = alike(tie_word_embeddings=False)
    members[1].lm_head = Halved(WIDTH, VOCABULARY, bias=False)
    return members


UNLIKE = {
    "configuration in member 1": lambda: [member(0), member(1, hidden_size=16)],
    "configuration in member 2": lambda: [member(0), member(1), member(2, rms_norm_eps=1e-3)],
    "configuration in member 1 than": lambda: [member(0), member(1, "gpt2")],
    "a Qwen2ForCausalLM": lambda: [
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", vocab_size=9, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=8)) for _ in range(2)
    ],
    "hooks in member 1": hooked,
    "parts in member 2": replaced,
    "parts in member 1": of_another_kind,
    "precision or device in member 1": lambda: [member(0), member(1).bfloat16()],
    "share parameters": lambda: [member(0)] * 2,
    "sliding window": lambda: alike("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "upcast": lambda: alike("gpt2", reorder_and_upcast_attn=True),
}  # fmt: skip


@pytest.mark.parametrize("reason", UNLIKE)
def test_members_that_cannot_be_packed_are_told_why(reason):
    members = UNLIKE[reason]()
    assert reason in unpackable(members)
    with pytest.raises(KdlibError, match=reason):
        PackedMembers(members)


def test_members_of_one_shape_can_be_packed():
    assert unpackable(alike()) is None and unpackable([member(0, eos_token_id=5), member(1)]) is None


# The ensemble


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(packing, "CROSSOVER", 10**9)


@pytest.fixture
def spy(monkeypatch):
    """Numbers of positions of the forward passes that were packed."""
    seen, logits = [], PackedMembers.logits
    monkeypatch.setattr(PackedMembers, "logits", lambda self, ids, *rest: seen.append(ids.numel()) or logits(self, ids, *rest))
    return seen


def loop_only(ensemble):
    """The same ensemble, never packed."""
    apart = EnsembleForCausalLM.from_members(copy.deepcopy(list(ensemble.members)), ensemble.config.pool)
    apart.members[0].lm_head.register_forward_hook(lambda *_: None)
    return apart


OPTIONS = {"max_new_tokens": 12, "eos_token_id": -1, "pad_token_id": 0}


@pytest.mark.parametrize(
    "search", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"do_sample": True, "num_return_sequences": 3}, {"use_cache": False}]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_generation_packed_is_that_of_the_loop(family, search, spy, always):
    ensemble, ids = EnsembleForCausalLM.from_members(alike(family)), text()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"do_sample": False, "attention_mask": mask} | OPTIONS | search
    torch.manual_seed(0)
    packed = ensemble.generate(ids, **options)
    assert len(spy) == 12 and ensemble.packing.reason is None
    torch.manual_seed(0)
    assert torch.equal(packed, loop_only(ensemble).generate(ids, **options)) and len(spy) == 12


@pytest.mark.parametrize("keep", [0, 5, torch.tensor([0, 2, 8])])
@torch.no_grad()
def test_output_layers_of_long_texts_compute_one_by_one_and_agree(keep, monkeypatch):
    packed = PackedMembers(alike())
    together = packed.logits(text(), logits_to_keep=keep)
    monkeypatch.setattr("kdlib.ensemble.packed.STACKED", 4)
    apart = packed.logits(text(), logits_to_keep=keep)
    assert isinstance(together, torch.Tensor) and isinstance(apart, Streamed) and len(apart) == len(together)
    assert close(torch.stack(list(apart)), together) and close(packed(text(), logits_to_keep=keep), together)


def test_a_cache_may_be_filled_one_by_one_and_read_packed(monkeypatch, spy):
    monkeypatch.setattr(packing, "CROSSOVER", 4 * WIDTH)
    ensemble, ids = EnsembleForCausalLM.from_members(alike("qwen3, grouped queries, wide heads, untied")), text()
    with torch.no_grad():
        whole, cache = ensemble(ids).logits, None
        for start, end in ((0, 3), (3, 4), (4, 7), (7, 9)):  # six positions one by one, then packed ones, and again
            found = ensemble(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            assert close(found.logits, whole[:, start:end])
        assert spy == [2, 4]
        cache.crop(-2)
        cache.batch_select_indices(torch.tensor([1]))
        again = ensemble(ids[1:, 7:], past_key_values=cache)
    assert close(again.logits, whole[1:, 7:])


def test_long_texts_single_members_gradients_and_training_go_one_by_one(spy):
    ensemble, ids = EnsembleForCausalLM.from_members(alike()), text()
    with torch.no_grad():
        ensemble(torch.ones(packing.CROSSOVER // WIDTH // 64 + 1, 64, dtype=torch.long))
        assert spy == []
        EnsembleForCausalLM.from_members([member(0)])(ids)
        ensemble.train()(ids)
    assert spy == []
    ensemble.eval()(ids, labels=ids).loss.backward()
    assert spy == [] and all(one.grad is not None for one in ensemble.parameters())
    with torch.no_grad():
        ensemble(ids)
    assert spy == [18]


def test_unlike_members_fall_back_and_say_so(spy, always):
    members, ids = [member(0), member(1, hidden_size=16)], text()
    ensemble = EnsembleForCausalLM.from_members(members)
    with torch.no_grad():
        found = ensemble(ids, use_cache=True)
        assert spy == [] and "another configuration in member 1" in ensemble.packing.reason
        assert isinstance(found.past_key_values, EnsembleCache)
        with pytest.raises(KdlibError, match="cache of a forward pass of this ensemble, got a DynamicCache"):
            ensemble(ids, past_key_values=DynamicCache(config=members[0].config))


@torch.no_grad()
def test_members_that_change_are_packed_anew_or_not_at_all(spy, always):
    ensemble, ids = EnsembleForCausalLM.from_members(alike(tie_word_embeddings=False)), text()
    before = ensemble(ids).logits
    ensemble.members[1].lm_head.weight.mul_(2)  # in place
    changed = ensemble(ids).logits
    assert len(spy) == 2 and not close(changed, before) and close(changed, loop_only(ensemble)(ids).logits)
    ensemble.members[1].lm_head.weight.data = torch.randn(VOCABULARY, WIDTH)  # other memory
    assert close(ensemble(ids).logits, loop_only(ensemble)(ids).logits) and len(spy) == 3
    ensemble.double()
    assert ensemble(ids).logits.dtype == torch.float64 and len(spy) == 4
    ensemble.float()
    ensemble.members[0].lm_head = Halved(WIDTH, VOCABULARY, bias=False)  # another module
    assert close(ensemble(ids).logits, loop_only(ensemble)(ids).logits)
    assert len(spy) == 4 and "parts in member 0" in ensemble.packing.reason
    ensemble.members[0] = member(7, tie_word_embeddings=False)
    ensemble(ids)
    assert len(spy) == 5
    handle = ensemble.members[2].model.register_forward_hook(lambda *_: None)
    ensemble(ids)
    assert len(spy) == 5 and "hooks" in ensemble.packing.reason
    handle.remove()
    ensemble(ids)
    assert len(spy) == 6
    del ensemble.members[0]
    assert close(ensemble(ids).logits, loop_only(ensemble)(ids).logits) and len(spy) == 7


@torch.no_grad()
def test_a_copy_of_a_packed_ensemble_stands_alone(always):
    ensemble, ids = EnsembleForCausalLM.from_members(alike()), text()
    before = ensemble(ids).logits
    other = copy.deepcopy(ensemble)
    assert torch.equal(other(ids).logits, before)
    other.members[0].lm_head.weight.zero_()
    assert not close(other(ids).logits, before) and torch.equal(ensemble(ids).logits, before)


@pytest.mark.parametrize("shard", ["1GB", "8KB"])
def test_a_packed_ensemble_is_saved_and_loaded_as_any_other(tmp_path, shard, always):
    ensemble, ids = EnsembleForCausalLM.from_members(alike()), text()
    with torch.no_grad():
        before = ensemble(ids).logits
        assert ensemble.packing.reason is None
        ensemble.save_pretrained(tmp_path / "one", max_shard_size=shard)
        loop_only(ensemble).save_pretrained(tmp_path / "other", max_shard_size=shard)
        ensemble.members[1].save_pretrained(tmp_path / "member")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
        assert torch.equal(loaded(ids).logits, before)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "member")
    state = ensemble.members[1].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())
    # Not a byte more than without packing, also where one member's weights are a part of larger memory.
    loop_only(ensemble).members[1].save_pretrained(tmp_path / "other" / "member")
    sizes = [sum(one.stat().st_size for one in tmp_path.glob(f"{at}/model.safetensors")) for at in ("member", "other/member")]
    assert sizes[0] == sizes[1] > 0
    for one in (tmp_path / "one").glob("model.safetensors"):
        assert one.stat().st_size == (tmp_path / "other" / one.name).stat().st_size


def test_what_was_packed_in_inference_mode_can_be_trained(always):
    ensemble, ids = EnsembleForCausalLM.from_members(alike()), text()
    with torch.inference_mode():
        ensemble(ids)
    ensemble(ids, labels=ids).loss.backward()
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.1)
    with torch.no_grad():
        before = ensemble(ids).logits
    optimizer.step()
    with torch.no_grad():
        assert not close(ensemble(ids).logits, before)
        assert close(ensemble(ids).logits, loop_only(ensemble)(ids).logits)


def test_dropout_is_left_out_in_evaluation_only(spy, always):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=48, attn_pdrop=0.5)
    ensemble = EnsembleForCausalLM.from_members([AutoModelForCausalLM.from_config(config) for _ in range(2)])
    with torch.no_grad():
        assert close(ensemble(text()).logits, loop_only(ensemble)(text()).logits) and len(spy) == 1
        assert not close(ensemble.train()(text()).logits, loop_only(ensemble)(text()).logits) and len(spy) == 1
