import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kdlib.data import vocabulary
from kdlib.data.sources import cache_folder
from kdlib.errors import KdlibError

UNUSED = ["<repo_name>", "<file_sep>", "<empty_output>"]
AWKWARD = " \n\t\r\u00a0\u3000\x00\x04\x1d'09½é\u0301ßπ漢🙂👩\u200d🚀\U0010fffftheaou<|>"
TEXT = st.text() | st.text(st.sampled_from(AWKWARD))


def prose(seed, words=40, length=4000):
    """Sentences over an invented lexicon of ``words`` words with Zipf's frequencies."""
    rng = np.random.default_rng(seed)
    lexicon = ["".join(rng.choice(list("aeioustrnlkm"), rng.integers(2, 9))) for _ in range(words)]
    chosen = rng.zipf(1.3, length) % words
    return [" ".join(lexicon[word] for word in chosen[i : i + 12]) + f", {i}.\n" for i in range(0, length, 12)]


TEXTS = prose(0, words=300)


@pytest.fixture(scope="module")
def full():
    """A 900-token tokenizer with reserved special tokens among its ids, as teachers have."""
    trained = vocabulary.train(TEXTS, 900 - len(UNUSED))
    trained.add_special_tokens({"extra_special_tokens": UNUSED})
    return trained


@pytest.fixture(scope="module")
def pruned(full):
    return vocabulary.prune(full, TEXTS, 500)


@pytest.fixture(scope="module")
def at_full_size(full):
    return vocabulary.prune(full, TEXTS, len(full))


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def lossless(tokenizer, text):
    return tokenizer.decode(ids(tokenizer, text)) == text


def merges(tokenizer):
    return [tuple(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


@given(TEXT)
@settings(max_examples=400, deadline=None)
def test_pruned_tokenizer_loses_nothing_of_any_text(pruned, text):
    assert lossless(pruned[0], text)


@given(TEXT)
@settings(max_examples=200, deadline=None)
def test_pruning_at_full_size_changes_no_encoding(full, at_full_size, text):
    assert ids(at_full_size[0], text) == ids(full, text)


@pytest.mark.parametrize("size", [900, 905])
def test_pruning_at_full_size_keeps_every_token(full, size):
    same, kept = vocabulary.prune(full, TEXTS, size)
    assert kept.tolist() == list(range(len(full)))
    vocabulary.require_same(full, same)
    assert vocabulary.fingerprint(full) == vocabulary.fingerprint(same)


@pytest.fixture(scope="module")
def smollm2():
    files = sorted(cache_folder().rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not files:
        pytest.skip("the SmolLM2 teacher is not in the cache")
    from kdlib.models import load_tokenizer

    return load_tokenizer(files[0])


@pytest.fixture(scope="module")
def pruned_smollm2(smollm2):
    return vocabulary.prune(smollm2, ["The teacher's text is short. " * 20], 2048)


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_pruned_smollm2_loses_nothing_although_its_vocabulary_lacks_bytes(pruned_smollm2, text):
    assert lossless(pruned_smollm2[0], text)


def test_smollm2_keeps_its_separator_and_chat_tokens_and_splits_digits(smollm2, pruned_smollm2):
    tokenizer, kept = pruned_smollm2
    assert kept[:3].tolist() == [0, 1, 2] and len(tokenizer) == 2048
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert len(ids(tokenizer, "a   12")) == len(ids(smollm2, "a   12")) == 4
    assert vocabulary.fingerprint(vocabulary.prune(smollm2, [], 10**6)[0]) == vocabulary.fingerprint(smollm2)


def test_kept_tokens_are_the_teachers_own_closed_under_merges_with_all_bytes(full, pruned):
    tokenizer, kept = pruned
    assert kept.dtype == np.int64 and len(kept) == len(tokenizer) == 500
    assert np.all(np.diff(kept) > 0)
    assert full.convert_ids_to_tokens(kept.tolist()) == tokenizer.convert_ids_to_tokens(list(range(500)))
    tokens = set(tokenizer.get_vocab())
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= tokens
    made = {left + right for left, right in merges(tokenizer)}
    assert {text for text in tokens if len(text) > 1 and not text.startswith("<")} == made
    assert {part for merge in merges(tokenizer) for part in merge} <= tokens
    assert merges(tokenizer) == [m for m in merges(full) if {*m, "".join(m)} <= tokens]


def test_encoding_is_greedy_byte_pair_encoding_with_the_kept_merges(pruned):
    tokenizer, _ = pruned
    ranks = {merge: rank for rank, merge in enumerate(merges(tokenizer))}

    def greedy(piece):
        symbols = list(piece)
        while len(symbols) > 1:
            rank, at = min((ranks.get(pair, np.inf), i) for i, pair in enumerate(pairwise(symbols)))
            if rank == np.inf:
                break
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        return symbols

    for text in [*TEXTS[:50], "Nothing like 1234 it, naïve 🙂"]:
        pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert tokenizer.convert_ids_to_tokens(ids(tokenizer, text)) == [s for piece in pieces for s in greedy(piece)]


def test_every_kept_token_is_used_or_part_of_one_that_is(pruned):
    tokenizer, _ = pruned
    used = {text for line in TEXTS for text in tokenizer.convert_ids_to_tokens(ids(tokenizer, line))}
    parts = {part for merge in merges(tokenizer) for part in merge}
    assert {left + right for left, right in merges(tokenizer)} <= used | parts


def test_tokens_are_chosen_for_the_text_they_are_counted_in(full):
    both = vocabulary.train(prose(1, 150) + prose(2, 150), 1200)
    for own, other in ((1, 2), (2, 1)):
        fitted, _ = vocabulary.prune(both, prose(own, 150), 450)
        foreign, _ = vocabulary.prune(both, prose(other, 150), 450)
        length = [sum(len(ids(tokenizer, line)) for line in prose(own, 150)) for tokenizer in (fitted, foreign)]
        assert length[0] < 0.8 * length[1]


def by_hand(tokens, merges, reverse=False):
    """The 256 bytes, then ``tokens``; or the same with ids in reverse."""
    order = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *tokens]
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(order[::-1] if reverse else order)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_token_counts_wherever_longer_ones_are_built_from_it():
    tokenizer = by_hand(["ab", "abx", "aby", "cd"], [("a", "b"), ("ab", "x"), ("ab", "y"), ("c", "d")])
    texts = ["abx"] * 3 + ["aby"] * 2 + ["cd"] * 4  # "ab" itself never; without "abx" and "aby" five times
    added = [vocabulary.prune(tokenizer, texts, size)[1][256:].tolist() for size in (257, 258, 259)]
    assert added == [[256], [256, 259], [256, 257, 259]]


def test_parts_are_kept_where_ids_do_not_follow_the_merges():
    tokens = ["ab", "abx", "abxy"]
    tokenizer = by_hand(tokens, [("a", "b"), ("ab", "x"), ("abx", "y")], reverse=True)
    for size, expected in ((256, set()), (257, {"ab"}), (258, {"ab", "abx"})):
        pruned, _ = vocabulary.prune(tokenizer, ["abxy"], size)
        assert set(tokens) & set(pruned.get_vocab()) == expected


def test_used_special_tokens_stay_and_reserved_ones_go(full, pruned):
    tokenizer, _ = pruned
    assert not set(UNUSED) & set(tokenizer.get_vocab())
    assert tokenizer.special_tokens_map == full.special_tokens_map
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>",) * 3
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    rendered = full.apply_chat_template(chat, tokenize=False)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == rendered
    assert ids(tokenizer, rendered).count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert lossless(tokenizer, rendered + UNUSED[0])


def test_special_tokens_of_a_post_processor_stay_and_are_renumbered(full):
    processed = copy.deepcopy(full)
    last = processed.convert_tokens_to_ids(UNUSED[-1])
    processed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{UNUSED[-1]} $A", special_tokens=[(UNUSED[-1], last)]
    )
    tokenizer, kept = vocabulary.prune(processed, TEXTS, 400)
    encoded = tokenizer.encode("the")
    assert tokenizer.convert_ids_to_tokens(encoded)[0] == UNUSED[-1]
    assert kept[encoded[0]] == last


def test_a_reserved_token_stands_in_for_a_byte_the_vocabulary_lacks(full):
    lacking = "Ą"  # the byte 0x04
    damaged = without(full, lacking)
    assert damaged.decode(ids(damaged, "a\x04b")) == "ab"
    tokenizer, kept = vocabulary.prune(damaged, TEXTS, 400)
    assert lossless(tokenizer, "a\x04b")
    assert kept[tokenizer.convert_tokens_to_ids(lacking)] == damaged.convert_tokens_to_ids(UNUSED[0])
    with pytest.raises(KdlibError, match="got 4 missing and 3 unused"):
        vocabulary.prune(without(full, "ĀĂĄą"), TEXTS, 400)


def without(tokenizer, byte_tokens):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for text in byte_tokens:
        del state["model"]["vocab"][text]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


@pytest.mark.parametrize("config", [LlamaConfig, GPT2Config, Qwen3Config])
def test_a_saved_tokenizer_is_the_same_beside_a_models_configuration(pruned, config, tmp_path):
    tokenizer, _ = pruned
    tokenizer.save_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    vocabulary.require_same(tokenizer, loaded)
    assert vocabulary.fingerprint(tokenizer) == vocabulary.fingerprint(loaded)
    assert loaded.chat_template == tokenizer.chat_template
    for text in (*TEXTS[:20], " spaced  ,  out . 🙂\x00"):
        assert ids(loaded, text) == ids(tokenizer, text) and lossless(loaded, text)


def test_pruning_is_deterministic_and_reads_the_texts_once(full, pruned):
    again, kept = vocabulary.prune(full, iter(TEXTS), 500)
    assert np.array_equal(kept, pruned[1])
    assert vocabulary.fingerprint(again) == vocabulary.fingerprint(pruned[0])


def test_a_size_below_bytes_and_special_tokens_names_the_least(full):
    with pytest.raises(KdlibError, match="at least 259: 256 bytes and 3 special tokens"):
        vocabulary.prune(full, TEXTS, 258)
    tokenizer, kept = vocabulary.prune(full, TEXTS, 259)
    assert len(kept) == 259 and merges(tokenizer) == [] and lossless(tokenizer, "anything 🙂")
    with pytest.raises(KdlibError, match="must be at least 259"):
        vocabulary.train(TEXTS, 258)


def test_a_tokenizer_of_another_kind_is_named():
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(KdlibError, match="byte-level BPE.*got .* with model WordLevel, pre-tokenizer none"):
        vocabulary.prune(PreTrainedTokenizerFast(tokenizer_object=backend), TEXTS, 300)
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(KdlibError, match="model BPE, pre-tokenizer Metaspace"):
        vocabulary.prune(PreTrainedTokenizerFast(tokenizer_object=backend), TEXTS, 300)


def test_training_is_deterministic_and_lossless():
    tokenizer, again = vocabulary.train(TEXTS, 400), vocabulary.train(iter(TEXTS), 400)
    assert vocabulary.fingerprint(tokenizer) == vocabulary.fingerprint(again)
    assert len(tokenizer) == 400 and tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert all(lossless(tokenizer, text) for text in (*TEXTS, "\x00\x04 🙂  é"))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(KdlibError, match="at most the .* tokens that the texts yield, got 5000"):
        vocabulary.train(["short"], 5000)


def tiny(architecture, tied, tokens=60):
    common = {"vocab_size": tokens, "tie_word_embeddings": tied, "bos_token_id": 7, "eos_token_id": [9, 11]}
    heads = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=32, **heads, **common)).double().eval()
    sizes = heads | {"intermediate_size": 24, "num_key_value_heads": 1, "pad_token_id": 11}
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes, **common)).double().eval()
    return LlamaForCausalLM(LlamaConfig(**sizes, **common)).double().eval()


KEPT = np.array([3, 7, 8, 11, 20, 21, 59])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_a_sliced_model_gives_the_old_logits_of_the_kept_tokens(architecture, tied):
    torch.manual_seed(0)
    model = tiny(architecture, tied)
    if not tied:  # no architecture here has an output bias, but others do
        model.lm_head.bias = torch.nn.Parameter(torch.randn(60, dtype=torch.float64))
    old = copy.deepcopy(model)
    sliced = vocabulary.slice_model(model, KEPT)
    new = torch.tensor([[0, 3, 6, 2, 2, 1]])
    with torch.no_grad():
        expected = old(torch.tensor(KEPT)[new]).logits[..., KEPT]
        torch.testing.assert_close(sliced(new).logits, expected, rtol=0, atol=1e-13)
    embedding, head = sliced.get_input_embeddings().weight, sliced.get_output_embeddings().weight
    assert torch.equal(embedding, old.get_input_embeddings().weight[KEPT])
    assert torch.equal(head, old.get_output_embeddings().weight[KEPT])
    assert (head is embedding) == tied
    assert embedding.requires_grad and head.requires_grad
    assert sliced.config.vocab_size == sliced.vocab_size == len(KEPT)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_special_ids_follow_the_slice(architecture):
    model = vocabulary.slice_model(tiny(architecture, tied=True), KEPT)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (1, [3])
    if architecture != "gpt2":
        assert model.config.pad_token_id == model.get_input_embeddings().padding_idx == 3
    model = vocabulary.slice_model(tiny(architecture, tied=True), np.array([3, 4]))
    assert model.config.bos_token_id is model.config.eos_token_id is model.generation_config.eos_token_id is None


def test_a_sliced_model_survives_saving(tmp_path):
    model = vocabulary.slice_model(tiny("llama", tied=True), KEPT)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    new = torch.tensor([[0, 3, 6]])
    assert torch.equal(loaded(new).logits, model(new).logits)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_slicing_beyond_the_embedding_is_refused():
    with pytest.raises(KdlibError, match="60 rows, got 60"):
        vocabulary.slice_model(tiny("llama", tied=True), np.array([1, 60]))


def test_tokenizers_that_differ_are_told_apart(full, pruned):
    tokenizer, _ = pruned
    vocabulary.require_same(tokenizer, copy.deepcopy(tokenizer))
    with pytest.raises(KdlibError, match=r"size: 900 against 500; tokens at \d+: .* against .*; merges at \d+"):
        vocabulary.require_same(full, tokenizer)
    for change in (
        {"eos_token": "<|im_end|>"},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    ):
        other = copy.deepcopy(tokenizer)
        for name, value in change.items():
            setattr(other if name == "eos_token" else other.backend_tokenizer, name, value)
        name = "special tokens" if "eos_token" in change else "pre-tokenizer"
        with pytest.raises(KdlibError, match=f"differ in {name}: "):
            vocabulary.require_same(tokenizer, other)
        assert vocabulary.fingerprint(tokenizer) != vocabulary.fingerprint(other)
