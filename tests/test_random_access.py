"""Targets by document and position: the same as reading everything, and no byte of another frame is needed."""

import json

import numpy as np
import pytest
import torch
from tiny import BLOCK, VOCABULARY, make_model, make_split

from kdlib.cache import Kind, ModelTeacher, TargetCache, shards, write_targets
from kdlib.cache.reader import guard
from kdlib.errors import KdlibError

KINDS = [
    Kind("sampled", draws=50),
    Kind("topk", top_k=7),
    Kind("topk_sampled", draws=10, top_k=4, proposal=0.9),
    Kind("dense"),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def write(folder, kind, split, shard_tokens):
    about = guard(split, "tokenizer-1", VOCABULARY, BLOCK, "teacher-1")
    teacher = ModelTeacher(make_model(0), batch_rows=8)
    write_targets(folder, teacher, split, about, kind, block_length=BLOCK, shard_tokens=shard_tokens)
    return TargetCache(folder, about, 1.0)


def held(targets):
    """All that targets hold, [T, anything], whatever width they are padded to."""
    if hasattr(targets, "hidden"):
        return targets.hidden
    weights = torch.zeros(len(targets), VOCABULARY).scatter_add_(1, targets.ids, targets.weights)
    tail = torch.zeros(len(targets)) if targets.tail is None else targets.tail
    return torch.column_stack([weights, tail, targets.entropy])


@every_kind
def test_a_documents_targets_are_a_slice_of_the_whole_splits(tmp_path, kind):
    split = make_split(longest=250)
    cache = write(tmp_path, kind, split, shard_tokens=60)
    whole, known = held(cache.read(np.arange(len(split.tokens)))), cache.statistics(np.arange(len(split.tokens)))
    begins = [json.loads(path.read_text())["first"] for path in sorted(tmp_path.glob("0*.json"))]
    first, most_shards = 0, 0
    for document, tokens in zip(split.documents.document, split.documents.tokens, strict=True):
        most_shards = max(most_shards, sum(first < begin < first + tokens for begin in begins) + 1)
        ranges = [(0, tokens), (0, 1), (tokens - 1, tokens), (tokens // 3, tokens // 2), (tokens, tokens)]
        for start, stop in ranges:
            at = cache.document_positions(split, document, start, stop)
            assert at.dtype == np.int64
            assert torch.equal(held(cache.read(at)), whole[first + start : first + stop])
            assert np.array_equal(cache.statistics(at)["nll"], known["nll"][first + start : first + stop])
        everything = cache.document_positions(split, document)
        assert everything.tolist() == list(range(first, first + tokens))
        assert cache.document_positions(split, document, tokens // 2).tolist() == everything[tokens // 2 :].tolist()
        # Streams are [separator, text, separator], and the separator 0 is nowhere within a text.
        assert split.tokens[everything[0]] == 0 == split.tokens[everything[-1] + 1]
        assert (split.tokens[everything[:-1] + 1] != 0).all()
        first += tokens + 1
    assert first == len(split.tokens) and most_shards > 2 and split.documents.tokens.max() > 5 * BLOCK


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    split = make_split()
    return split, write(tmp_path_factory.mktemp("targets"), Kind("topk", top_k=7), split, shard_tokens=60)


def test_an_unknown_document_is_named_with_one_that_is_there(opened):
    split, cache = opened
    with pytest.raises(KdlibError, match=r"id of the split 'train', got 'talk/nobody#00'\. .* such as 'talk/train0#00'"):
        cache.document_positions(split, "talk/nobody#00", 0, 1)


@pytest.mark.parametrize("case", ["before", "past the end", "backwards", "begins past the end", "from the end"])
def test_a_range_outside_the_document_is_refused_though_the_split_goes_on(opened, case):
    split, cache = opened
    document, tokens = split.documents.document[3], int(split.documents.tokens[3])
    start, stop = {
        "before": (-1, 2),
        "past the end": (0, tokens + 1),
        "backwards": (3, 2),
        "begins past the end": (tokens + 1, None),
        "from the end": (0, -1),
    }[case]
    told = f"0 <= start <= stop <= {tokens}, the positions of document '{document}', got start {start} and stop {stop or tokens}"
    with pytest.raises(KdlibError, match=told):
        cache.document_positions(split, document, start, stop)


def test_another_split_than_the_targets_is_refused(opened):
    split, cache = opened
    other = make_split("validation", seed=1)
    told = f"'validation' must have the targets' {len(split.tokens)} positions, got {len(other.tokens)}"
    with pytest.raises(KdlibError, match=told):
        cache.document_positions(other, "talk/validation0#00")


def keep_one_frame(folder, frame, positions):
    """Overwrite what the only shard holds of the positions outside one frame, in place."""
    path, shard = folder / "00000.safetensors", shards.map_shard(folder, 0)
    rows = slice(*positions)
    kept = {name: rows for name in ("entropy", "nll", "log_tail", "hidden")}
    if "frames" in shard:
        low, high = shard["frame_bytes"][frame : frame + 2].tolist()
        assert shard["frame_positions"][frame : frame + 2].tolist() == positions
        kept |= {"frames": slice(low, high)}
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    with open(path, "r+b") as file:
        for name in kept.keys() & shard.keys():
            array = np.full_like(shard[name], 255)
            array[kept[name]] = shard[name][kept[name]]
            file.seek(8 + size + header[name]["data_offsets"][0])
            file.write(array.tobytes())


@every_kind
def test_reading_a_position_needs_no_byte_of_another_frame(tmp_path, kind):
    split = make_split(documents=70)
    cache = write(tmp_path, kind, split, shard_tokens=10**6)
    assert len(split.tokens) > 3 * shards.FRAME and len(list(tmp_path.glob("0*.safetensors"))) == 1
    # As kdlib.cache.writer forms them: of whole windows, a new one where the tokens so far pass a multiple.
    windows = split.windows(BLOCK)
    passed = np.flatnonzero(np.diff(np.cumsum(windows[:, 1]) // shards.FRAME)) + 1
    begin, end = windows[passed[:2], 0].tolist()
    at = np.array([begin, begin + 200, end - 1])
    before, known = held(cache.read(at)), cache.statistics(at)
    keep_one_frame(tmp_path, 1, [begin, end])
    # The files are mapped: what was overwritten is what is read now.
    assert cache.statistics(np.array([0, begin - 1, end]))["nll"].tolist() == [64, 64, 64]
    for row, position in enumerate(at):
        assert torch.equal(held(cache.read(at[row : row + 1])), before[row : row + 1])
        assert cache.statistics(np.array([position]))["nll"] == known["nll"][row]
