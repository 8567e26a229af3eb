"""Text of one's own: whatever its files, parts of it are held out whole, apart from what is trained on."""

import itertools
import random

import pytest
from test_corpus import byte_tokenizer

from kdlib.data import corpus, documents, splits
from kdlib.data.sources import PathSource
from kdlib.errors import KdlibError

HELD_OUT = ("validation", "calibration", "test")


def prose(seed: int, characters: int) -> str:
    """Paragraphs of random words: no two alike."""
    draw, found = random.Random(seed), []
    while sum(map(len, found)) + 2 * len(found) < characters:
        found.append(" ".join("".join(draw.choices("abcdefghij", k=6)) for _ in range(draw.randint(10, 60))))
    return "\n\n".join(found)


def folder(path, files: dict[str, str], **settings) -> PathSource:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    path.mkdir(exist_ok=True)
    return PathSource(path=path, reader="text", licence="mine", **settings)


def read(path, files, **settings):
    """Documents of the domain ``mine``, and its entry of the report."""
    known = {
        "mine": folder(path / "mine", files, **settings),
        "other": folder(path / "other", {"o.txt": prose(10**6, 6000)}),
    }
    table, report = documents.read_documents(["mine"], "other", catalogue=known)
    return table, report["domains"]["mine"]


def places(table, texts):
    """File, start, end and split of every document, in order: where in the files their texts stand."""
    found = []
    for row in table[table.domain == "mine"].itertuples():
        [(name, start)] = [(name, text.find(row.text)) for name, text in texts.items() if row.text in text]
        found.append((name, start, start + len(row.text), row.split))
    return sorted(found)


CASES = {
    "one large file": {"corpus.txt": prose(1, 700_000)},
    "27 files": {f"{n:02d}.txt": prose(100 + n, 26_000) for n in range(27)},
}


@pytest.mark.parametrize("files", CASES.values(), ids=CASES)
def test_few_files_are_held_out_in_sections_apart_from_what_is_trained_on(tmp_path, files):
    table, entry = read(tmp_path, files)
    division = entry["division"]
    assert division["rule"] == "sections" and division["section_characters"] in splits.LENGTHS
    mine = table[table.domain == "mine"]
    sources = mine.groupby("split").source.nunique()
    assert sources[list(HELD_OUT)].min() >= splits.ENOUGH
    for split, share in splits.SHARES.items():
        assert division["wanted"][split] == share
        assert division["got"][split] == pytest.approx(share, abs=0.01)
    guard = min(division["section_characters"] // 6, splits.LONGEST_GUARD)
    gaps = [
        after[1] - before[2]
        for before, after in itertools.pairwise(places(table, files))
        if before[0] == after[0] and before[3] != after[3]
    ]
    assert len(gaps) > 60 and min(gaps) >= guard
    # Nothing is lost but guards, the space between documents, and documents that are too short.
    total = sum(map(len, files.values()))
    assert mine.text.str.len().sum() + division["guard_characters"] == pytest.approx(total, rel=0.01)


def test_held_out_sections_of_one_file_are_sources_that_do_not_touch(tmp_path):
    table, _ = read(tmp_path, CASES["one large file"])
    mine = table[table.domain == "mine"]
    start = mine.source.str.rsplit("/", n=1).str[1].astype(int)
    order = mine.assign(start=start).groupby("source").first().sort_values("start").split.tolist()
    assert all("train" in pair for pair in itertools.pairwise(order))
    assert mine.groupby("source").split.nunique().max() == 1


def test_no_document_of_a_held_out_section_shares_text_with_train_even_where_the_file_repeats_itself(tmp_path):
    text = prose(3, 500_000)
    files = {"a.txt": text, "b.txt": text[:100_000] + prose(4, 200_000)}
    table, entry = read(tmp_path, files)
    assert sum(entry["near_duplicates"].values()) > 0

    def runs(rows):
        spelled = (text.split() for text in rows.text)
        return {tuple(one[at : at + 8]) for one in spelled for at in range(len(one) - 7)}

    train = runs(table[table.split == "train"])
    for row in table[table.split.isin(HELD_OUT)].itertuples():
        own = runs(table.loc[[row.Index]])
        assert len(own & train) < documents.CONTAINED * len(own)


def test_what_a_file_is_called_says_its_split(tmp_path):
    files = {"train.txt": prose(1, 300_000), "val.txt": prose(2, 90_000), "test.txt": prose(3, 60_000)}
    table, entry = read(tmp_path, files)
    assert entry["division"]["rule"] == "named by the files" and entry["division"]["wanted"] is None
    said = {"train.txt": {"train"}, "val.txt": {"validation", "calibration"}, "test.txt": {"test"}}
    mine = table[table.domain == "mine"]
    found = mine.split.groupby(mine.source.str.split("/").str[1]).agg(set).to_dict()
    assert found == said
    assert mine.groupby("split").source.nunique().min() >= 2
    assert mine[mine.split == "test"].source.nunique() >= splits.ENOUGH


def test_two_files_give_the_missing_splits_sections_of_the_one_held_out(tmp_path):
    files = {"train.txt": prose(1, 300_000), "val.txt": prose(2, 90_000)}
    table, _ = read(tmp_path, files)
    of = {name: {split for file, _, _, split in places(table, files) if file == name} for name in files}
    assert of == {"train.txt": {"train"}, "val.txt": set(HELD_OUT)}


@pytest.mark.parametrize(
    ("names", "patterns", "expected"),
    [
        (["a.train", "b.dev", "c.test"], None, ["train", "validation", "test"]),
        (["train/1.txt", "valid/1.txt"], None, ["train", "validation"]),
        (["wiki.train.tokens", "wiki.valid.tokens"], None, ["train", "validation"]),
        (["train.jsonl/0000001", "val.jsonl/0000001"], None, ["train", "validation"]),
        (["train.txt"], None, None),
        (["a.txt", "test.txt"], None, None),
        (["trains.txt", "testing.txt"], None, None),
        (["train.txt", "val.txt"], {}, None),
        (["x-train-0.txt", "x-val.txt"], {"train": "*train*", "validation": "*val*"}, ["train", "validation"]),
    ],
)
def test_names_say_splits_only_where_train_and_another_are_said(names, patterns, expected):
    assert splits.named(names, patterns) == (dict(zip(names, expected, strict=True)) if expected else {})


@pytest.mark.parametrize(
    ("names", "patterns", "message"),
    [
        (["train.txt", "val.txt", "notes.txt"], None, "one split where others do, got none for 'notes.txt'"),
        (["train/test.txt", "train/a.txt", "val.txt"], None, "got train and test for 'train/test.txt'"),
        (["a.txt", "val.txt"], {"validation": "val*"}, "must name files of train, got none"),
        (["a.txt"], {"train": "b*"}, "must name files of train, got none for 'b\\*' among a.txt"),
    ],
)
def test_files_that_name_no_split_or_two_are_refused(names, patterns, message):
    with pytest.raises(KdlibError, match=message):
        splits.named(names, patterns)


def test_many_files_are_split_whole_by_the_hash_of_their_names(tmp_path):
    files = {f"text-{n:03d}.txt": prose(n, 400) for n in range(870)}
    table, entry = read(tmp_path, files)
    division = entry["division"]
    assert (division["rule"], division["section_characters"], division["guard_characters"]) == (splits.BY_HASH, None, 0)
    mine = table[table.domain == "mine"]
    assert set(mine.source) == {f"mine/{name}" for name in files}
    assert mine.split.tolist() == [splits.split_of(source) for source in mine.source]


def test_the_carriers_are_split_by_hash_as_long_as_no_split_is_empty():
    texts = {f"d/{n}": "x" * 300 for n in range(120)}
    parts, division = splits.divide("d", texts)
    assert [part.split for part in parts] == [splits.split_of(name) for name in texts]
    assert division["least_sources"] == 0 and {part.content for part in parts} == {"x" * 300}
    few = {name: text for name, text in texts.items() if splits.split_of(name) != "validation"}
    parts, division = splits.divide("d", few)
    assert division["rule"] == "sections" and {part.split for part in parts} == set(splits.SHARES)


def test_chats_are_never_cut():
    chat = [{"role": "user", "content": "x" * 3000}]
    parts, division = splits.divide("d", {f"d/{n}": chat for n in range(25)}, own=True)
    assert len(parts) == 25 and all(part.content is chat for part in parts)
    assert division["guard_characters"] == 0


def test_the_order_of_files_changes_nothing(tmp_path):
    texts = {f"mine/{name}": text for name, text in CASES["27 files"].items()}
    forward, division = splits.divide("mine", texts, own=True)
    backward, again = splits.divide("mine", dict(reversed(texts.items())), own=True)
    assert sorted(forward) == sorted(backward) and division == again
    assert sorted(splits.divide("mine", texts, own=True, salt="another")[0]) != sorted(forward)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.txt": prose(0, 600)},
            "'mine' must have at least 20,000 characters, or 20 texts of 200.*in 1 texts. Add text",
        ),
        ({"a.txt": "  \n"}, "a.txt in .* must have text, got an empty file"),
        ({}, "A file in .* must match anything, got none"),
        (
            {"train.txt": prose(0, 90_000), "val.txt": prose(1, 900)},
            "must give .*calibration.* at least 2 sections of 1,000 characters, got .* Give more text for validation",
        ),
    ],
)
def test_too_little_text_is_refused_with_what_is_needed(tmp_path, files, message):
    with pytest.raises(KdlibError, match=message):
        read(tmp_path, files)


def test_shares_that_cannot_be_met_are_told_as_they_are(tmp_path):
    _, entry = read(tmp_path, {f"{n}.txt": prose(n, 700) for n in range(25)})
    division = entry["division"]
    assert division["wanted"]["validation"] == 0.03 and division["got"]["validation"] > 0.06
    assert sum(division["got"].values()) == pytest.approx(1, abs=0.001)


def test_held_out_splits_take_enough_sources_beyond_their_budget_and_few_are_warned_of(tmp_path):
    known = {
        "mine": folder(tmp_path / "mine", CASES["one large file"]),
        "other": folder(tmp_path / "other", {"o.txt": prose(9, 6000)}),
    }
    table, report = documents.read_documents(["mine"], "other", catalogue=known)
    budgets = {"train": 5000} | dict.fromkeys([*HELD_OUT, "ood"], 1000)
    card = corpus.build(
        tmp_path / "data", table, report, byte_tokenizer(), budgets=budgets, shares={"mine": 1.0}, block_length=64
    )
    for split in HELD_OUT:
        assert card["splits"][split]["domains"]["mine"]["sources"] == splits.ENOUGH
    assert card["splits"]["train"]["tokens"] < 5000 + documents.MAX_CHARACTERS
    assert card["warnings"] == [
        f"other has {card['splits']['ood']['sources']} sources in ood, fewer than 20: an interval for this domain alone is rough."
    ]
