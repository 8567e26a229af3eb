"""Corpus: clean documents, splits that never move, no duplicates across them, every token predicted exactly once."""

import hashlib
import io
import json
import random
import re
import subprocess
import sys
import unicodedata
import zipfile
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdlib.data import corpus, documents, readers, sources, splits
from kdlib.data.corpus import Split
from kdlib.data.sources import HubSource, PathSource
from kdlib.errors import KdlibError
from kdlib.study.profiles import REPOSITORY

# ---------------------------------------------------------------------------------------------------------- helpers


def byte_tokenizer(chat_template: str | None = None, normaliser=None) -> PreTrainedTokenizerFast:
    """One token a byte, so that any count of tokens can be checked by hand; id 0 is the separator."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {letter: number for number, letter in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normaliser:
        tokenizer.normalizer = normaliser
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", chat_template=chat_template)


def split_of_lengths(predicting: list[int]) -> Split:
    """A split whose documents have these numbers of predicting positions; token ids tell their flat position."""
    offsets = np.concatenate([[0], np.cumsum(np.array(predicting, dtype=np.int64) + 1)])
    names = [f"d/{number}#00" for number in range(len(predicting))]
    table = pd.DataFrame({"document": names, "source": names, "domain": "d", "bytes": 1, "tokens": predicting})
    return Split("train", table, np.arange(offsets[-1], dtype=np.int32), offsets, separator_id=0)


def words(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(count))


def jsonl(folder, name: str, texts) -> PathSource:
    (folder / name).mkdir()
    (folder / name / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return PathSource(path=folder / name, members=("*.jsonl",), reader="text", licence=f"licence of {name}")


@pytest.fixture
def small(tmp_path):
    """A catalogue of three domains of random words: 200 sources each, of about 250 to 3 000 characters."""
    return {
        name: jsonl(tmp_path, name, (words(1000 * start + n, 45 + n % 7 * 80) for n in range(200)))
        for start, name in enumerate(("alpha", "beta", "other"), 1)
    }


def read_small(catalogue, domains=("alpha", "beta"), **options):
    return documents.read_documents(list(domains), "other", catalogue=catalogue, **options)


BUDGETS = {"train": 40_000, "validation": 4000, "calibration": 4000, "test": 4000, "ood": 4000}

# ---------------------------------------------------------------------------------------------- windows, packing, rows

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=30)
blocks = st.integers(8, 24)


@given(lengths, blocks)
@settings(deadline=None)
def test_every_predicting_position_lies_in_exactly_one_window_of_its_document(predicting, block):
    split = split_of_lengths(predicting)
    windows = split.windows(block)
    covered = np.concatenate([np.arange(start, start + length) for start, length in windows])
    last = split.offsets[1:] - 1
    assert sorted(covered) == sorted(set(range(len(split.tokens))) - set(last))
    assert windows.dtype == np.int64 and windows[:, 1].min() >= 1 and windows[:, 1].max() <= block
    first = np.searchsorted(split.offsets, windows[:, 0], side="right")
    assert (first == np.searchsorted(split.offsets, windows.sum(axis=1) - 1, side="right")).all()


@given(lengths, blocks, st.randoms())
@settings(deadline=None)
def test_packing_keeps_windows_whole_and_does_not_depend_on_their_order(predicting, block, shuffle):
    windows = split_of_lengths(predicting).windows(block)
    index = corpus.pack(windows, block)
    order = list(range(len(windows)))
    shuffle.shuffle(order)
    assert np.array_equal(corpus.pack(windows[order], block), index)
    found = []
    for row in index:
        kept = row[row >= 0]
        assert (row[: len(kept)] >= 0).all()  # padding only at the end
        runs = np.split(kept, np.flatnonzero(np.diff(kept) != 1) + 1)
        found += [(run[0], len(run)) for run in runs]
    assert sorted(found) == sorted(map(tuple, windows))


@given(st.lists(st.integers(1, 24), max_size=60))
@settings(deadline=None)
def test_packing_is_first_fit_decreasing(sizes):
    windows = np.array([(1000 * number, size) for number, size in enumerate(sizes)]).reshape(-1, 2)
    free: list[int] = []
    expected = []
    for start, size in sorted(map(tuple, windows), key=lambda window: (-window[1], window[0])):
        row = next((number for number, room in enumerate(free) if room >= size), len(free))
        if row == len(free):
            free.append(24)
        expected.append((row, 24 - free[row], start, size))
        free[row] -= size
    index = corpus.pack(windows, 24)
    assert len(index) == len(free)
    for row, column, start, size in expected:
        assert index[row, column : column + size].tolist() == list(range(start, start + size))
    assert (index >= 0).sum() == sum(sizes)


@given(lengths, blocks)
@settings(deadline=None)
def test_rows_predict_the_next_token_and_restart_positions_in_every_window(predicting, block):
    split = split_of_lengths(predicting)
    windows = split.windows(block)
    batch = corpus.rows(split, corpus.pack(windows, block))
    seen = set()
    for inputs, labels, positions, segments in zip(*batch.values(), strict=True):
        assert list(batch) == ["input_ids", "labels", "position_ids", "segments"]
        padding = segments < 0
        assert (labels[padding] == -100).all() and (inputs[padding] == split.separator_id).all()
        assert (labels[~padding] == inputs[~padding] + 1).all()  # the token ids are their flat positions
        for segment in range(segments.max() + 1):
            inside = segments == segment
            assert positions[inside].tolist() == list(range(inside.sum()))
            seen.add((inputs[inside][0], inside.sum()))
    assert seen == set(map(tuple, windows))


def test_windows_follow_the_documents_asked_for_in_order_and_repeatedly():
    split = split_of_lengths([20, 5, 9])
    windows = split.windows(8, ["d/2#00", "d/1#00", "d/2#00"])
    third, second = [[27, 8], [35, 1]], [[21, 5]]
    assert windows.tolist() == third + second + third
    with pytest.raises(KdlibError, match="must be ids of the split 'train', got 1 of 2 others, the first 'd/9#00'"):
        split.windows(8, ["d/1#00", "d/9#00"])


def test_repeated_documents_are_packed_as_often_as_they_were_drawn():
    split = split_of_lengths([5, 6])
    index = corpus.pack(split.windows(8, ["d/0#00"] * 3), 8)
    assert Counter(index[index >= 0].tolist()) == dict.fromkeys(range(5), 3)


def test_block_lengths_that_cannot_work_are_refused():
    split = split_of_lengths([20, 20])
    for call in (lambda: split.windows(7), lambda: corpus.pack(split.windows(8), 7)):
        with pytest.raises(KdlibError, match="`block_length` must be at least 8 tokens, got 7"):
            call()
    with pytest.raises(KdlibError, match="Windows must have 1 to"):
        corpus.pack(split.windows(16), 8)


def test_windows_of_a_shorter_block_are_not_run_together_in_a_row():
    with pytest.raises(KdlibError, match="must not share a row"):
        corpus.pack(split_of_lengths([16]).windows(8), 16)


# ----------------------------------------------------------------------------------------- selection and storage


def test_a_stream_is_the_text_between_two_separators():
    table = pd.DataFrame(
        {"document": ["d/a#00", "d/b#00"], "source": ["d/a", "d/b"], "domain": "d", "text": ["hé", "xyz"]}
    )
    split = corpus.tokenise("test", table.assign(bytes=[3, 3]), byte_tokenizer())
    tokenizer = byte_tokenizer()
    streams = np.split(split.tokens, split.offsets[1:-1])
    assert [tokenizer.decode(stream[1:-1]) for stream in streams] == ["hé", "xyz"]
    assert all(stream[0] == stream[-1] == split.separator_id == 0 for stream in streams)
    assert split.documents.tokens.tolist() == [4, 4] and split.tokens.dtype == np.int32


def test_the_separator_is_endoftext_else_the_end_of_sequence_token():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<|endoftext|>": 2}))
    assert corpus.separator_id(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")) == 2
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    assert corpus.separator_id(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")) == 1
    with pytest.raises(KdlibError, match="neither"):
        corpus.separator_id(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_smaller_budgets_take_subsets_of_larger_ones(small):
    table, _ = read_small(small)
    shares = {"alpha": 3.0, "beta": 1.0}
    taken = [
        corpus.select(table, byte_tokenizer(), {name: int(budget * scale) for name, budget in BUDGETS.items()}, shares)
        for scale in (0.3, 1.0, 2.0)
    ]
    for name in BUDGETS:
        small_set, middle, large = (set(splits[name].documents.document) for splits in taken)
        assert small_set <= middle <= large, name
        assert name != "train" or len(small_set) < len(middle) < len(large)


def test_every_domain_gets_its_share_of_tokens(small):
    table, _ = read_small(small)
    splits = corpus.select(table, byte_tokenizer(), BUDGETS, {"alpha": 3.0, "beta": 1.0})
    longest = table.bytes.max() + 1
    tokens = splits["train"].documents.groupby("domain").tokens.sum()
    assert 30_000 <= tokens["alpha"] < 30_000 + longest and 10_000 <= tokens["beta"] < 10_000 + longest
    assert 4000 <= splits["ood"].documents.tokens.sum() < 4000 + longest


def test_held_out_splits_take_few_documents_of_a_source(small):
    table, _ = read_small(small, max_characters=300)
    assert table.groupby("source").size().max() > 4
    splits = corpus.select(
        table, byte_tokenizer(), dict.fromkeys(BUDGETS, 10**9), {"alpha": 1, "beta": 1}, per_source=2
    )
    for name, split in splits.items():
        most = split.documents.groupby("source").size().max()
        assert most > 4 if name == "train" else most == 2


def test_selection_refuses_wrong_shares_empty_splits_and_documents_without_tokens(small):
    table, _ = read_small(small)
    shares = {"alpha": 1.0, "beta": 1.0}
    with pytest.raises(KdlibError, match="must be given for alpha, beta"):
        corpus.select(table, byte_tokenizer(), BUDGETS, {"alpha": 1.0})
    with pytest.raises(KdlibError, match="'test' must have documents"):
        corpus.select(table[table.split != "test"], byte_tokenizer(), BUDGETS, shares)
    with pytest.raises(KdlibError, match="must have tokens, got none"):
        corpus.select(table, byte_tokenizer(normaliser=normalizers.Replace(Regex("."), "")), BUDGETS, shares)


def test_a_saved_split_loads_the_same_and_stays_on_disk(tmp_path):
    split = split_of_lengths([20, 5])
    corpus.save_split(split, tmp_path / "data")
    loaded = corpus.load_split(tmp_path / "data", "train")
    assert isinstance(loaded.tokens, np.memmap)
    assert np.array_equal(loaded.tokens, split.tokens) and np.array_equal(loaded.offsets, split.offsets)
    pd.testing.assert_frame_equal(loaded.documents, split.documents)
    assert loaded.separator_id == split.separator_id and loaded.fingerprint() == split.fingerprint()
    with pytest.raises(KdlibError, match="must have the split 'test', got train"):
        corpus.load_split(tmp_path / "data", "test")


def test_the_data_card_counts_what_was_written(small, tmp_path):
    table, report = read_small(small)
    shares = {"alpha": 1.0, "beta": 1.0}
    card = corpus.build(
        tmp_path / "data", table, report, byte_tokenizer(), budgets=BUDGETS, shares=shares, block_length=64
    )
    written = pd.read_parquet(tmp_path / "data" / "documents.parquet")
    assert set(written.columns) >= {"document", "source", "domain", "split", "text", "bytes", "tokens"}
    assert (written.bytes == [len(text.encode()) for text in written.text]).all()
    assert (written.tokens == written.bytes + 1).all()  # one token a byte, and the separator after it
    for name, counts in card["splits"].items():
        of_split = written[written.split == name]
        split = corpus.load_split(tmp_path / "data", name)
        assert set(split.documents.document) == set(of_split.document)
        assert counts["documents"] == len(of_split) and counts["sources"] == of_split.source.nunique()
        assert counts["tokens"] == of_split.tokens.sum() == len(split.tokens) - len(of_split)
        assert sum(part["bytes"] for part in counts["domains"].values()) == counts["bytes"] == of_split.bytes.sum()
        assert counts["packing_efficiency"] == pytest.approx(counts["tokens"] / (counts["rows"] * 64))
    assert card["domains"]["alpha"]["licence"] == "licence of alpha" and card["domains"]["other"]["out_of_domain"]
    assert json.loads(json.dumps(card)) == card
    with pytest.raises(KdlibError, match="block_length"):
        corpus.build(tmp_path / "no", table, report, byte_tokenizer(), budgets=BUDGETS, shares=shares, block_length=4)
    assert not (tmp_path / "no").exists()


# -------------------------------------------------------------------------------------------------- splits


def test_a_source_goes_where_the_hash_of_its_name_says():
    def by_hand(source: str) -> str:
        number = int(hashlib.sha256(f"kdlib/{source}".encode()).hexdigest()[:16], 16) / 2**64
        return (
            "train" if number < 0.86 else "validation" if number < 0.89 else "calibration" if number < 0.92 else "test"
        )

    names = [f"d/{number}" for number in range(20_000)]
    found = [splits.split_of(name) for name in names]
    assert found == [by_hand(name) for name in names]
    shares = pd.Series(found).value_counts(normalize=True)
    for split, share in splits.SHARES.items():
        assert shares[split] == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)


def test_splits_do_not_move_with_the_other_domains_or_the_length_of_documents(small):
    def splits(**options) -> dict[str, str]:
        table, _ = read_small(small, **options)
        assert table.groupby("source").split.nunique().max() == 1
        return dict(zip(table.source, table.split, strict=True))

    everything = splits()
    for other in (splits(domains=["beta"]), splits(max_characters=400)):
        assert all(everything[source] == split for source, split in other.items())
    salted = splits(salt="another")
    assert any(salted[source] != split for source, split in everything.items())


def test_the_out_of_domain_set_is_wholly_ood_and_ids_are_stable(small):
    table, _ = read_small(small)
    assert ((table.domain == "other") == (table.split == "ood")).all()
    assert table.document.is_unique
    assert (table.document.str.rsplit("#", n=1).str[0] == table.source).all()
    again, _ = read_small(small)
    pd.testing.assert_frame_equal(table, again)


def test_short_documents_are_dropped_and_counted(tmp_path, small):
    small["alpha"] = jsonl(tmp_path, "tiny", [words(n, 60) for n in range(200)] + ["too short"] * 7)
    table, report = read_small(small)
    assert report["domains"]["alpha"]["too_short"] == 7
    assert table.text.str.len().min() >= documents.MIN_CHARACTERS


def test_bad_domains_are_refused_with_the_known_ones(small):
    with pytest.raises(KdlibError, match="must be one of alpha, beta, other, got 'gamma'"):
        read_small(small, domains=["alpha", "gamma"])
    with pytest.raises(KdlibError, match="must not be one of `domains`, got 'other'"):
        read_small(small, domains=["alpha", "other"])
    small["beta"] = small["beta"].model_copy(update={"reader": "xml"})
    with pytest.raises(KdlibError, match="must be one of dialogue.*got 'xml'"):
        read_small(small)


def test_a_domain_too_small_to_fill_every_split_is_refused(tmp_path, small):
    small["alpha"] = jsonl(tmp_path, "few", [words(n, 60) for n in range(3)])
    with pytest.raises(KdlibError, match=r"'alpha' must have at least 20,000 characters, or 20 texts.* in 3 texts"):
        read_small(small)


def test_a_split_that_repeated_texts_empty_is_refused(tmp_path, small):
    small["alpha"] = jsonl(tmp_path, "same", [words(0, 60)] * 200)
    with pytest.raises(KdlibError, match="must have text of domain 'alpha', got none for 'train' from 1 sources"):
        read_small(small)


def test_restrictive_terms_are_told_when_used(small):
    small["alpha"] = small["alpha"].model_copy(update={"opt_in": True})
    with pytest.warns(UserWarning, match="licence of alpha"):
        read_small(small)


# --------------------------------------------------------------------------------------------- duplicates


def table_of(texts: list[tuple[str, str, str]]) -> pd.DataFrame:
    rows = [(f"{domain}/{n}#00", f"{domain}/{n}", domain, split, text) for n, (domain, split, text) in enumerate(texts)]
    return pd.DataFrame(rows, columns=["document", "source", "domain", "split", "text"])


def overlapping(text: str, seed: int, share: float) -> str:
    """The first ``share`` of the words of ``text``, then words of its own."""
    kept = text.split()[: round(share * len(text.split()))]
    return " ".join([*kept, words(seed, len(text.split()) - len(kept))])


def test_nothing_is_removed_where_nothing_is_planted():
    table = table_of([("d", split, words(n, 80)) for n, split in enumerate(documents.SPLITS * 40)])
    kept, counts = documents.without_duplicates(table)
    pd.testing.assert_frame_equal(kept, table)
    assert not any(sum(kind.values()) for kind in counts["d"].values())


def test_planted_duplicates_are_found_and_counted_by_split_and_domain():
    test, ood, train = words(1, 100), words(2, 100), words(3, 100)
    planted = [
        ("d", "test", test),
        ("e", "ood", ood),
        ("d", "train", train),
        ("d", "train", train),  # repeated within train
        ("d", "train", test.upper()),  # the case of letters is no difference
        ("e", "train", overlapping(ood, 4, 0.8)),
        ("d", "train", overlapping(test, 5, 0.3)),  # less than half: stays
        ("e", "calibration", overlapping(test, 6, 0.7)),  # test comes before calibration
        ("e", "validation", overlapping(train, 7, 1.0)),  # train comes after validation, so train's copies go
    ]
    kept, counts = documents.without_duplicates(table_of(planted))
    assert kept.source.tolist() == ["d/0", "e/1", "d/6", "e/8"]
    none = dict.fromkeys(documents.SPLITS, 0)
    assert counts["d"] == {"duplicates": none | {"train": 1}, "near_duplicates": none | {"train": 2}}
    assert counts["e"] == {"duplicates": none, "near_duplicates": none | {"train": 1, "calibration": 1}}


@pytest.mark.parametrize(("copied", "kept"), [(15, False), (14, True)])
def test_half_of_the_shingles_make_a_near_duplicate(copied, kept):
    test = words(1, 60)
    text = (
        " ".join(test.split()[:copied]) + " " + words(2, 23 - copied)
    )  # 16 runs of 8 words, copied - 7 of them copied
    found, _ = documents.without_duplicates(table_of([("d", "test", test), ("d", "train", text)]))
    assert ("d/1" in set(found.source)) == kept


@pytest.mark.parametrize(("standing", "kept"), [(102, False), (83, False), (82, True)])
@pytest.mark.parametrize("split", ["test", "ood", "calibration", "validation"])
def test_a_held_out_text_inside_a_longer_one_of_train_is_a_near_duplicate(split, standing, kept):
    held_out = words(1, 102)  # 95 runs of 8 words, standing - 7 of them in train
    longer = " ".join([words(2, 300), *held_out.split()[:standing], words(3, 300)])
    texts = [("d", split, held_out), ("d", split, words(4, 102)), ("d", "train", longer)]
    found, counts = documents.without_duplicates(table_of(texts))
    assert found.source.tolist() == (["d/0"] if kept else []) + ["d/1", "d/2"]
    assert counts["d"]["near_duplicates"] == dict.fromkeys(documents.SPLITS, 0) | {split: int(not kept)}


def test_a_text_inside_a_longer_one_that_is_itself_removed_stays():
    inside, test = words(1, 60), words(2, 300)
    found, _ = documents.without_duplicates(
        table_of([("d", "test", test), ("d", "validation", inside), ("d", "train", f"{test} {inside}")])
    )
    assert found.source.tolist() == ["d/0", "d/1"]


def test_containment_agrees_with_sets_of_word_runs():
    draw = random.Random(0)
    pool = [words(seed, 40) for seed in range(12)]
    texts = [
        ("d", draw.choice(documents.SPLITS), " ".join(draw.sample(pool, 2)) + " " + words(100 + n, 30))
        for n in range(60)
    ]
    table = table_of(texts)
    kept, _ = documents.without_duplicates(table)
    expected, earlier = set(), set()
    for split in ("test", "ood", "calibration", "validation", "train"):
        added = set()
        for source, text in zip(table.source[table.split == split], table.text[table.split == split], strict=True):
            runs = [tuple(text.split()[i : i + 8]) for i in range(len(text.split()) - 7)]
            if 2 * sum(run in earlier for run in runs) < len(runs):
                expected.add(source)
                added |= set(runs)
        earlier |= added
    assert 0 < len(expected) < len(table)
    assert set(kept.source) == expected


def test_texts_shorter_than_a_shingle_are_compared_whole():
    kept, _ = documents.without_duplicates(
        table_of([("d", "test", "three little words"), ("d", "train", "Three little words"), ("d", "train", "others")])
    )
    assert kept.source.tolist() == ["d/0", "d/2"]


def test_shingles_are_the_same_in_every_process():
    script = "from kdlib.data.documents import _shingles; print(_shingles(['a b c d e f g h i'])[0].tolist())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], cwd=REPOSITORY, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs != {""}


# ---------------------------------------------------------------------------------------- cutting and chats


@given(st.text(alphabet="ab. \n", max_size=300), st.integers(8, 60))
@settings(deadline=None)
def test_cutting_loses_nothing_but_space_and_keeps_the_limit(text, limit):
    pieces = list(readers.cut(text, limit))
    assert all(len(piece) <= limit for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_text_is_cut_at_the_best_boundary_in_reach():
    paragraph, sentence, word = "x" * 50 + "\n\n" + "y" * 60, "x" * 50 + ". " + "y" * 60, "x" * 50 + " " + "y" * 60
    for text, first in ((paragraph, "x" * 50), (sentence, "x" * 50 + "."), (word, "x" * 50), ("x" * 110, "x" * 75)):
        assert next(readers.cut(text, 80)) == first
    # A paragraph's end counts for more than a later sentence's.
    assert next(readers.cut("One. Two is here.\n\nThree. Four and so on for a while.", 40)) == "One. Two is here."


def test_text_becomes_composed_unicode_with_plain_line_ends(tmp_path, small):
    raw = "Cafe\u0301 au lait.  \r\nNext line.\r\n\r\n" + words(0, 60)
    small["alpha"] = jsonl(tmp_path, "raw", [raw] + [words(n, 60) for n in range(1, 200)])
    table, _ = read_small(small)
    [text] = table.text[table.source == "alpha/all.jsonl/0000001"]
    assert text.startswith("Café au lait.\nNext line.\n\n") and unicodedata.is_normalized("NFC", text)


def chat(turns: int, length: int = 100) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * turns
    return [{"role": role, "content": f"{n:03d} {words(n, length // 6)}"} for n, role in enumerate(roles[:turns])]


def test_chats_go_through_the_chat_template(tmp_path, small):
    small["alpha"] = jsonl(tmp_path, "chats", [chat(4)] + [words(n, 60) for n in range(1, 200)])
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    for tokenizer, mark in ((byte_tokenizer(template), "[user] 000"), (None, "<|im_start|>user\n000")):
        table, _ = read_small(small, tokenizer=tokenizer)
        [text] = table.text[table.source == "alpha/all.jsonl/0000001"]
        assert text.startswith(mark)


def test_a_long_chat_is_cut_before_a_user_speaks_and_keeps_its_system_message():
    head = [{"role": "system", "content": "Talk."}]
    pieces = list(documents._chats(head + chat(40), None, 1000))
    assert len(pieces) > 4 and all(len(piece) <= 1000 for piece in pieces)
    assert all(piece.startswith("<|im_start|>system\nTalk.<|im_end|>\n<|im_start|>user\n") for piece in pieces)
    numbers = [int(number) for piece in pieces for number in re.findall(r"\n(\d{3}) ", piece)]
    assert numbers == list(range(40))


def test_a_template_that_refuses_system_messages_gets_none():
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    [text] = documents._chats([{"role": "system", "content": "Talk."}, *chat(2)], byte_tokenizer(template), 1000)
    assert text.startswith("user: 000") and "Talk" not in text


# --------------------------------------------------------------------------------------------- readers


def read(reader: str, folder, members: dict[str, object], **settings) -> dict[str, object]:
    path = folder / "carrier.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content if isinstance(content, str | bytes) else json.dumps(content))
    source = PathSource(path=path, licence="none", **settings)
    return dict(readers.READERS[reader](path, source))


def test_dialogue_merges_messages_names_roles_masks_contacts_and_drops_monologues(tmp_path):
    def turn(*lines):
        return [{"sender": sender, "text": text, "timestamp": ""} for sender, text in lines]

    two = {
        "prompt": "Cats?",
        "messages": [turn(("z", "hi "), ("z", " ")), turn(("z", "there")), turn(("a", "call 555 123 4567 or x@y.org"))],
    }
    one = {"messages": [turn(("z", "anyone?"))]}
    chats = read("dialogue", tmp_path, {"d.json": {"two": two, "one": one}})
    assert chats == {
        "two": [
            {"role": "system", "content": "Cats?"},
            {"role": "user", "content": "hi\nthere"},
            {"role": "assistant", "content": "call [contact] or [contact]"},
        ]
    }


def test_encyclopaedia_removes_what_templates_left(tmp_path):
    article = {
        "title": "Chair",
        "extract": "A chair ( ) is\xa0a  seat (, also, stool).",
        "topic": "",
        "description": "",
    }
    assert read("encyclopaedia", tmp_path, {"d.json": {"Chair": article}}) == {
        "Chair": "Chair\n\nA chair is a seat (also, stool)."
    }


def test_fiction_is_cut_into_chapters_and_its_lines_are_joined(tmp_path):
    book = (
        "Chapter 1\r\n\r\n\r\nIt was a\r\ndark night.\r\n\r\n    O verse\r\n    so short\r\n\r\n * * *\r\n\r\n\r\n"
        "And on.\r\n\r\n\r\n\r\nCHAPTER II.\r\n\r\nThe end."
    )
    assert read("fiction", tmp_path, {"texts/Doe - Night.txt": book}) == {
        "Doe - Night/000": "Chapter 1\n\nIt was a dark night.\n\nO verse\nso short\n\nAnd on.",
        "Doe - Night/001": "CHAPTER II.\n\nThe end.",
    }


def test_a_long_chapter_is_one_source(tmp_path):
    chapter = "\n\n".join(words(n, 100) for n in range(100))
    assert len(chapter) > 2 * splits.TRAIN_CHARACTERS
    assert read("fiction", tmp_path, {"texts/Doe - Night.txt": chapter}) == {"Doe - Night/000": chapter}


def test_speeches_lose_the_editors_notes(tmp_path):
    found = read("speeches", tmp_path, {"s/1790-W-1.txt": "The probable [see APP Note] issue. [Laughter]"})
    assert found == {"1790-W-1": "The probable issue. [Laughter]"}


def test_recipes_become_ingredients_and_numbered_steps(tmp_path):
    recipe = {
        "title": "Soup", "category": None, "servings": "4", "time": None, "difficulty": None,
        "ingredients": ["&frac12; cup ''milk''<ref>a book</ref>", "{{broken"],
        "steps": ["# Boil.", "Serve () hot.<ref name='x' />"],
    }  # fmt: skip
    assert read("recipes", tmp_path, {"r.json": {"Cookbook:Soup": recipe}}) == {
        "Soup": "Soup\n\nServes: 4\n\nIngredients:\n- ½ cup milk\n\nMethod:\n1. Boil.\n2. Serve hot."
    }


def test_country_facts_keep_their_headings_and_lose_their_tags(tmp_path):
    facts = {
        "Introduction": {"Background": {"text": "<p>Old.<br><br>R&eacute;public.</p>"}},
        "Geography": {
            "Area": {"total ": {"text": "5 sq km"}, "land": {"text": "land: 4 sq km", "note": "<b>note:</b> dry"}},
            "Empty": {"x": {"text": ""}},
        },
        "Government": {"Country name": {"conventional short form": {"text": "Ruritania"}}},
    }
    assert read("country", tmp_path, {"data/europe/rt.json": facts}) == {
        "europe/rt": "Ruritania\n\nIntroduction\n\nBackground: Old.\nRépublic.\n\nGeography\n\n"
        "Area:\ntotal: 5 sq km\nland: 4 sq km\nnote: dry\n\nGovernment\n\n"
        "Country name: conventional short form: Ruritania"
    }


def test_news_leaves_out_articles_with_lost_letters(tmp_path):
    table = 'article_id,title,text\n1,Good,"All ""well""."\n2,Bad,"He said""?no."\n3,Bad,M?ller spoke.\n'
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("NewsArticles.csv", table)
    assert read("news", tmp_path, {"NewsArticles.zip": inner.getvalue()}) == {"1": 'Good\n\nAll "well".'}


def test_your_own_files_are_read_whole_and_record_by_record(tmp_path):
    found = read(
        "text",
        tmp_path,
        {"a.txt": "short", "c.jsonl": '{"body": "one"}\n{"body": "two"}'},
        text_column="body",
    )
    assert found == {"a.txt": "short", "c.jsonl/0000001": "one", "c.jsonl/0000002": "two"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\xe9".encode("latin-1"), "latin.txt must be UTF-8 text, got 0xe9 at byte 3"),
        ("empty.txt", " \n", "empty.txt in .* must have text, got an empty file"),
        ("bad.jsonl", '{"text": "one"}\n{"body": "two"}', "Line 2 of bad.jsonl .* field 'text'"),
        ("bad.jsonl", '{"text": "one"}\n{"text": ', "Line 2 of bad.jsonl .* must be a JSON object"),
        ("bad.jsonl", '{"text": ""}', "Line 1 of bad.jsonl .* must have text in 'text', got none"),
        ("bad.jsonl", '{"text": "one"}\n7', "Line 2 of bad.jsonl .* must be a JSON object"),
        ("bad.jsonl", '{"text": "one"}\n{"text": 7}', "Line 2 of bad.jsonl .* must have a text.* in 'text', got 7"),
        ("bad.jsonl", '{"text": null}', "Line 1 of bad.jsonl .* must have a text, or a list of messages.* got None"),
        ("bad.jsonl", '{"text": ["hello"]}', "Line 1 of bad.jsonl .*\"role\": \"user\".*got 'hello'"),
        (
            "bad.jsonl",
            '{"text": [{"role": "user", "content": "hi"}, {"from": "gpt", "value": "hello"}]}',
            "Line 1 of bad.jsonl .*\"role\": \"user\".*got {'from': 'gpt', 'value': 'hello'}",
        ),
        ("bad.jsonl", '{"text": [{"role": "user", "content": null}]}', "both texts, .*'content': None"),
    ],
)
def test_bad_files_are_named_with_the_place_of_the_fault(tmp_path, name, content, message):
    with pytest.raises(KdlibError, match=message):
        read("text", tmp_path, {name: content})


def test_a_record_ends_with_its_line_whatever_other_ends_of_lines_its_text_holds(tmp_path):
    texts = ["one\u2028two", "three\u2029four", "five\x85six"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    for ending in ("\n", "\r\n"):
        for last in ("", ending):
            found = read("text", tmp_path, {"a.jsonl": ending.join(lines) + last})
            assert list(found.values()) == texts
            assert list(found) == ["a.jsonl/0000001", "a.jsonl/0000002", "a.jsonl/0000003"]


def test_a_row_of_a_hub_data_set_must_hold_a_text_or_a_chat(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": [{"from": "human", "value": "one"}]}')
    source = HubSource(type="dataset", id="owner/set", revision="abc", licence="none", reader="hub")
    with pytest.raises(KdlibError, match="Row 0 of data set owner/set must have a text.* got {'from': 'human'"):
        list(readers.hub(tmp_path, source))


def test_a_hub_data_set_is_read_from_its_snapshot_without_a_copy(tmp_path):
    from datasets import config

    (tmp_path / "train.jsonl").write_text('{"words": "one"}\n{"words": "two"}')
    before = sorted(config.HF_DATASETS_CACHE.rglob("*")) if config.HF_DATASETS_CACHE.exists() else []
    source = HubSource(
        type="dataset", id="owner/set", revision="abc", licence="none", reader="hub", text_column="words"
    )
    assert dict(readers.hub(tmp_path, source)) == {"train/000000000": "one", "train/000000001": "two"}
    after = sorted(config.HF_DATASETS_CACHE.rglob("*")) if config.HF_DATASETS_CACHE.exists() else []
    assert [file for file in after if file.suffix == ".arrow"] == [file for file in before if file.suffix == ".arrow"]
    with pytest.raises(KdlibError, match="must have a column 'text', got words"):
        list(readers.hub(tmp_path, source.model_copy(update={"text_column": "text"})))


@pytest.mark.parametrize(
    "domain", [name for name, source in sources.catalogue().items() if source.reader and source.kind == "wheel"]
)
def test_the_real_carriers_give_clean_text(domain):
    source = sources.catalogue()[domain]
    if not sources._find_wheel(sources.cache_folder(), source):
        pytest.skip(f"the carrier of {domain} has not been downloaded on this machine")
    count = 0
    for _, content in readers.READERS[source.reader](sources.fetch(source), source):
        for text in [content] if isinstance(content, str) else [message["content"] for message in content]:
            assert text.strip(), domain
            if domain != "dialogue":  # people may write what looks like a tag
                assert not re.search(r"</?(?:p|br|b|strong|em|ref)\b[^>]*>|&[a-z]+;|\{\{|\ufffd|\r", text), text
            count += 1
    assert count > 90
