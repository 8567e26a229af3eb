"""Text without data: splits like any other, reproducible, and distributed as they say."""

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import AutoModelForCausalLM, LlamaConfig

from kdlib.data import corpus, generated, random_tokens, vocabulary
from kdlib.errors import KdlibError

SEPARATOR, VOCABULARY = 0, 259  # three special tokens and one for each byte
LETTERS = np.array([0, 35, 36, 37, 38])  # the separator and A to D: all that the bigram teacher writes
BIGRAM = np.array(
    [
        [0.20, 0.40, 0.20, 0.15, 0.05],
        [0.10, 0.05, 0.50, 0.25, 0.10],
        [0.10, 0.30, 0.10, 0.10, 0.40],
        [0.05, 0.60, 0.05, 0.20, 0.10],
        [0.20, 0.10, 0.30, 0.30, 0.10],
    ]
)


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.train([""], VOCABULARY)


@pytest.fixture(scope="module")
def teacher():
    """A Llama whose next token follows BIGRAM: one layer that adds nothing, one-hot embeddings, log-probabilities as head."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    embedding, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    embedding.zero_()
    head.fill_(0)
    head[:, :5] = -200 / 8**0.5  # no mass elsewhere
    for row, letter in enumerate(LETTERS):
        embedding[letter, row] = 1
        # The norm before the head gives the one-hot vector a length of sqrt(8).
        head[LETTERS, row] = torch.from_numpy(np.log(BIGRAM[row]) / 8**0.5).float()
    # What would bend the distribution if it were read.
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    return model


def inner(split):
    """The tokens of each document, without separators."""
    return [split.tokens[begin + 1 : end - 1] for begin, end in itertools.pairwise(split.offsets)]


def check(split, how, tokens, length):
    """What every train split is."""
    assert split.name == "train" and split.separator_id == SEPARATOR
    assert split.tokens.dtype == np.int32 and split.offsets.dtype == np.int64
    assert (split.tokens[split.offsets[:-1]] == SEPARATOR).all() and (
        split.tokens[split.offsets[1:] - 1] == SEPARATOR
    ).all()
    assert split.offsets[0] == 0 and split.offsets[-1] == len(split.tokens)
    assert all(len(ids) and (ids != SEPARATOR).all() for ids in inner(split))
    table = split.documents
    assert table.columns.tolist() == ["document", "source", "domain", "bytes", "tokens"]
    assert table.document.tolist() == [f"synthetic-{how}/{number}#00" for number in range(len(table))]
    assert (table.document.str.split("#").str[0] == table.source).all() and set(table.domain) == {f"synthetic-{how}"}
    assert table.tokens.tolist() == (np.diff(split.offsets) - 1).tolist()
    assert table.tokens.sum() == tokens and table.tokens.max() <= length


def test_a_synthetic_split_is_a_split_like_any_other(tokenizer, teacher, tmp_path):
    real = random_tokens.uniform(tokenizer, 200, 20, seed=1)
    for how, split in {
        "uniform": random_tokens.uniform(tokenizer, 1000, 64, seed=0),
        "unigram": random_tokens.unigram(real, tokenizer, 1000, 64, seed=0),
        "sampled": generated.sampled(teacher, tokenizer, 1000, 64, seed=1),
    }.items():
        check(split, how, 1000, 64)
        corpus.save_split(split, tmp_path / how)
        again = corpus.load_split(tmp_path / how, "train")
        assert again.fingerprint() == split.fingerprint() and again.separator_id == split.separator_id
        rows = corpus.rows(split, corpus.pack(split.windows(32), 32))
        assert (rows["labels"] != -100).sum() == 1000


def test_bytes_are_those_of_the_text(tokenizer, teacher):
    split = generated.sampled(teacher, tokenizer, 300, 64, seed=0)
    assert split.documents.bytes.tolist() == [len(ids) for ids in inner(split)]
    assert set(tokenizer.decode(np.concatenate(inner(split)).tolist())) == set("ABCD")


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(2, 3000), length=st.integers(8, 400))
def test_any_number_of_tokens_is_reached_exactly_in_documents_of_one_length(tokenizer, tokens, length):
    split = random_tokens.uniform(tokenizer, tokens, length, seed=0)
    check(split, "uniform", tokens, length)
    assert np.ptp(split.documents.tokens) <= 1


@pytest.mark.parametrize("tokens", [2, 3, 50, 51, 52, 53, 54, 55])
def test_sampled_tokens_are_reached_to_within_a_separator(tokenizer, teacher, tokens):
    split = generated.sampled(teacher, tokenizer, tokens, 16, seed=tokens, batch_size=3)
    total = split.documents.tokens.sum()
    check(split, "sampled", total, 16)
    assert total == tokens or (total == tokens + 1 and split.documents.tokens.iloc[-1] == 2)


def test_the_seed_decides_and_the_global_random_states_do_not(tokenizer, teacher):
    real = random_tokens.uniform(tokenizer, 200, 20, seed=1)
    for make in (
        lambda seed: random_tokens.uniform(tokenizer, 500, 64, seed),
        lambda seed: random_tokens.unigram(real, tokenizer, 500, 64, seed),
        lambda seed: generated.sampled(teacher, tokenizer, 500, 64, seed),
    ):
        torch.manual_seed(1)
        np.random.seed(1)
        first = make(5).fingerprint()
        torch.manual_seed(2)
        np.random.seed(2)
        before = torch.get_rng_state(), np.random.get_state()[1]
        assert make(5).fingerprint() == first
        assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
        assert make(6).fingerprint() != first


def chi_square(counts, shares):
    return stats.chisquare(counts, shares / shares.sum() * counts.sum()).pvalue


def test_uniform_tokens_are_uniform_and_never_the_separator(tokenizer):
    counts = np.bincount(random_tokens.uniform(tokenizer, 60_000, 500, seed=3).tokens, minlength=VOCABULARY)
    assert counts[SEPARATOR] == 2 * 120
    assert chi_square(counts[1:], np.ones(VOCABULARY - 1)) > 0.01


def test_unigram_tokens_are_as_frequent_as_in_the_text(tokenizer):
    rng = np.random.default_rng(0)
    shares = np.r_[0, 1 / np.arange(1, 101)]
    text = [rng.choice(101, 400, p=shares / shares.sum()) for _ in range(50)]
    real = corpus.Split(
        "train",
        random_tokens.uniform(tokenizer, 50 * 401, 401, 0).documents,
        np.concatenate([np.r_[0, ids, 0] for ids in text]).astype(np.int32),
        np.arange(51) * 402,
        SEPARATOR,
    )
    frequency = np.bincount(np.concatenate(text), minlength=101)[1:]
    split = random_tokens.unigram(real, tokenizer, 60_000, 500, seed=4)
    counts = np.bincount(np.concatenate(inner(split)), minlength=101)
    assert counts.size == 101, "only tokens of the text"
    assert chi_square(counts[1:], frequency) > 0.01
    assert chi_square(counts[1:], np.ones(100)) < 1e-9, "and the test can tell"
    pairs = np.zeros((2, 2))
    for ids in inner(split):
        np.add.at(pairs, ((ids[:-1] <= 5).astype(int), (ids[1:] <= 5).astype(int)), 1)
    assert stats.chi2_contingency(pairs).pvalue > 0.01, "neighbours are independent"


def transitions(split):
    """Counts [from, to] of the teacher's five tokens; the end of a document counts as going to the separator."""
    places = np.full(VOCABULARY, -1)
    places[LETTERS] = np.arange(5)
    counts = np.zeros((5, 5))
    for begin, end in itertools.pairwise(split.offsets):
        stream = places[split.tokens[begin:end]]
        assert (stream >= 0).all()
        np.add.at(counts, (stream[:-1], stream[1:]), 1)
    return counts


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_text_follows_the_teachers_distribution(tokenizer, teacher, temperature):
    split = generated.sampled(teacher, tokenizer, 12_000, 200, seed=2, temperature=temperature, batch_size=128)
    counts, shares = transitions(split), BIGRAM ** (1 / temperature)
    for row in range(1, 5):
        assert chi_square(counts[row], shares[row]) > 0.01
        assert chi_square(counts[row], BIGRAM[row] ** (1.5 / temperature)) < 1e-3, "and the test can tell"
    assert counts[0, 0] == 0, "no document is empty"
    assert chi_square(counts[0, 1:], shares[0, 1:]) > 0.01


def test_no_token_is_left_out_of_sampling(tokenizer, teacher):
    broad, logits = copy.deepcopy(teacher), torch.linspace(0, 2, VOCABULARY, dtype=torch.float64)
    broad.get_input_embeddings().weight.data.fill_(1)
    broad.get_output_embeddings().weight.data.zero_()[:, 0] = logits
    counts = np.bincount(generated.sampled(broad, tokenizer, 6000, 200, seed=0).tokens, minlength=VOCABULARY)
    assert chi_square(counts[1:], logits.exp().numpy()[1:]) > 0.01


def test_top_p_draws_from_the_likeliest_tokens_alone(tokenizer, teacher):
    split = generated.sampled(teacher, tokenizer, 3000, 64, seed=0, top_p=0.55)
    # Fewest tokens whose shares reach 0.55; the separator is never among them, so documents end at the length alone.
    likeliest = {0: [1, 2], 1: [2, 3], 2: [1, 4], 3: [1], 4: [2, 3]}
    counts = transitions(split)
    assert {row: np.flatnonzero(counts[row, 1:]).tolist() for row in range(5)} == {
        row: [column - 1 for column in columns] for row, columns in likeliest.items()
    }
    assert set(split.documents.tokens[:-1]) == {64}
    assert chi_square(counts[1, [2, 3]], BIGRAM[1, [2, 3]]) > 0.01


def test_documents_are_as_long_as_the_teacher_would_have_them_up_to_the_length(tokenizer, teacher):
    lengths = generated.sampled(teacher, tokenizer, 8000, 8, seed=1, batch_size=64).documents.tokens[:-1]
    alive, shares = BIGRAM[0, 1:] / BIGRAM[0, 1:].sum(), []
    for _ in range(6):
        shares.append(alive @ BIGRAM[1:, 0])
        alive = alive @ BIGRAM[1:, 1:]
    counts = np.bincount(lengths, minlength=9)
    assert len(counts) == 9 and counts[:2].sum() == 0
    assert chi_square(counts[2:], np.array([*shares, alive.sum()])) > 0.01


def test_the_teacher_stays_as_it_was(tokenizer, teacher):
    own = teacher.generation_config
    teacher.train()
    generated.sampled(teacher, tokenizer, 50, 16, seed=0)
    assert teacher.training and teacher.generation_config is own and own.top_k == 1

    def stop(*_, **__):
        assert not teacher.training and teacher.generation_config is not own
        raise KeyboardInterrupt

    hook = teacher.register_forward_pre_hook(stop)
    before = torch.get_rng_state()
    with contextlib.suppress(KeyboardInterrupt):
        generated.sampled(teacher, tokenizer, 50, 16, seed=0)
    hook.remove()
    assert teacher.training and teacher.generation_config is own and torch.equal(torch.get_rng_state(), before)
    teacher.eval()


def test_what_cannot_be_made_is_refused_before_any_work(tokenizer, teacher):
    for tokens, length in ((1, 16), (100, 7)):
        with pytest.raises(KdlibError, match="must be at least 2 and `length` at least 8"):
            random_tokens.uniform(tokenizer, tokens, length, seed=0)
        with pytest.raises(KdlibError, match="must be at least 2 and `length` at least 8"):
            generated.sampled(None, tokenizer, tokens, length, seed=0)
    with pytest.raises(KdlibError, match="context of 256 tokens, got 300"):
        generated.sampled(teacher, tokenizer, 100, 300, seed=0)
    for wrong in ({"temperature": 0}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}):
        with pytest.raises(KdlibError, match="`temperature` must be above 0"):
            generated.sampled(teacher, tokenizer, 100, 16, seed=0, **wrong)
