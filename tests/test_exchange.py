"""Top-k targets in HDF5: what is written is what is read, by anyone, and nothing else is taken for it."""

import subprocess
import sys

import h5py
import numpy as np
import pytest

from kdlib.cache import exchange
from kdlib.cache.exchange import export_top_k, import_top_k
from kdlib.errors import KdlibError

VOCABULARY = 1000


def make(n=300, k=7, dtype=np.float32, seed=0):
    """Ids and log-probabilities, descending, of the k likeliest tokens, and the exact tail."""
    logits = np.random.default_rng(seed).normal(0, 3, (n, VOCABULARY))
    log_p = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
    order = np.argsort(-log_p, 1)
    sorted_log_p = np.take_along_axis(log_p, order, 1)
    tail = np.logaddexp.reduce(sorted_log_p[:, k:], 1).astype(np.float32)
    return order[:, :k].astype(np.int32), sorted_log_p[:, :k].astype(dtype), tail


@pytest.fixture
def path(tmp_path):
    return tmp_path / "targets.h5"


def same(found, expected):
    assert found.dtype == expected.dtype
    return found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("with_tail", [True, False])
def test_a_round_trip_returns_every_bit(dtype, with_tail, path):
    ids, log_probabilities, tail = make(dtype=dtype)
    offsets, names = np.array([0, 100, 100, 300]), ["talk/ä#00", "talk/b#00", "talk/b#01"]
    about = {"teacher": "a model", "temperature": 2.0, "seed": 3}
    export_top_k(
        path,
        ids,
        log_probabilities,
        tail if with_tail else None,
        vocabulary=VOCABULARY,
        offsets=offsets,
        documents=names,
        attributes=about,
    )
    read = import_top_k(path)
    assert same(read.ids, ids) and same(read.log_probabilities, log_probabilities)
    assert same(read.log_tail, tail) if with_tail else read.log_tail is None
    assert same(read.offsets, offsets.astype(np.int64)) and read.documents == names
    assert (read.positions, read.vocabulary, read.attributes) == (300, VOCABULARY, about)


def test_rows_that_predict_nothing_survive(path):
    ids, log_probabilities, tail = make()
    ids[5], log_probabilities[5], tail[5] = np.arange(7), -np.inf, -np.inf
    export_top_k(path, ids, log_probabilities, tail, vocabulary=VOCABULARY)
    assert same(import_top_k(path).log_probabilities, log_probabilities)


def test_the_same_targets_make_the_same_file(path):
    contents = []
    for _ in range(2):
        export_top_k(path, *make(), vocabulary=VOCABULARY, attributes={"teacher": "a"})
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_a_script_with_nothing_but_h5py_reads_it(path, tmp_path):
    ids, log_probabilities, tail = make()
    offsets = np.array([0, 120, 300])
    export_top_k(path, ids, log_probabilities, tail, vocabulary=VOCABULARY, offsets=offsets, documents=["a", "b"])
    script = """
import sys
import h5py
with h5py.File(sys.argv[1]) as file:
    start, end = file["offsets"][1:3]
    ids, log_probabilities = file["indices"][start:end], file["logprobs"][start:end]
    print(file["documents"].asstr()[1], file.attrs["vocabulary"], len(ids), ids[4, 0], repr(float(log_probabilities[4, 0])))
    assert "kdlib" not in sys.modules
"""
    printed = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    expected = ["b", str(VOCABULARY), "180", str(ids[124, 0]), repr(float(log_probabilities[124, 0]))]
    assert printed.split() == expected


# Large files


class Rows:
    """Rows that can be sliced but not held at once; notes how many are asked for."""

    def __init__(self, values, asked):
        self.values, self.asked, self.shape, self.dtype = values, asked, values.shape, values.dtype

    def __getitem__(self, rows):
        self.asked.append(rows.stop - rows.start)
        return self.values[rows]


def test_a_few_rows_are_held_at_a_time(path, monkeypatch):
    monkeypatch.setattr(exchange, "CHUNK", 2**7)
    monkeypatch.setattr(exchange, "BATCH", 2**9)
    asked = []
    arrays = make(n=1000)
    export_top_k(path, *(Rows(values, asked) for values in arrays), vocabulary=VOCABULARY)
    assert max(asked) <= 2**9 // 7 and sum(asked) == 3 * 1000
    read = import_top_k(path)
    assert same(read.ids, arrays[0]) and same(read.log_probabilities, arrays[1]) and same(read.log_tail, arrays[2])


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (7, 123), (299, 300), (0, None), (300, None)])
def test_a_range_of_rows_is_read_alone(first, last, path):
    arrays = make()
    export_top_k(path, *arrays, vocabulary=VOCABULARY)
    read = import_top_k(path, first, last)
    for found, expected in zip((read.ids, read.log_probabilities, read.log_tail), arrays, strict=True):
        assert same(found, expected[first:last])
    assert read.positions == 300


@pytest.mark.parametrize(("first", "last"), [(-1, 5), (5, 4), (0, 301)])
def test_a_range_outside_the_file_is_refused(first, last, path):
    export_top_k(path, *make(), vocabulary=VOCABULARY)
    with pytest.raises(KdlibError, match=rf"rows 0\.\.300, got {first}\.\.{last}"):
        import_top_k(path, first, last)


def test_it_is_smaller_than_the_arrays(path):
    arrays = make(n=3000, k=16)
    export_top_k(path, *arrays, vocabulary=VOCABULARY)
    assert path.stat().st_size < 0.85 * sum(values.nbytes for values in arrays)


# Files of other tools


def test_other_names_types_and_orders_are_read(path):
    ids, log_probabilities, _ = make(dtype=np.float16)
    shuffled = np.random.default_rng(1).permuted(np.tile(np.arange(7), (300, 1)), axis=1)
    with h5py.File(path, "w") as file:
        file["token_ids"] = np.take_along_axis(ids, shuffled, 1).astype(np.uint16)
        file["values"] = np.take_along_axis(log_probabilities, shuffled, 1)
    read = import_top_k(path, vocabulary=VOCABULARY, ids="token_ids", log_probabilities="values")
    assert read.ids.dtype == np.uint16 and same(read.log_probabilities, log_probabilities)
    # Log-probabilities that are equal in half precision may come in either order.
    sure = np.apply_along_axis(lambda row: len(set(row)) == len(row), 1, log_probabilities)
    assert sure.sum() > 200
    np.testing.assert_array_equal(read.ids[sure], ids[sure])


def test_a_file_that_does_not_tell_its_vocabulary_is_refused_unless_told(path):
    ids, log_probabilities, _ = make()
    with h5py.File(path, "w") as file:
        file["indices"], file["logprobs"] = ids, log_probabilities
    with pytest.raises(KdlibError, match="a known number of tokens, got an unknown number"):
        import_top_k(path)
    assert import_top_k(path, vocabulary=VOCABULARY).vocabulary == VOCABULARY


def test_another_vocabulary_is_refused(path):
    export_top_k(path, *make(), vocabulary=VOCABULARY)
    with pytest.raises(KdlibError, match=r"must have 999 tokens, got 1000"):
        import_top_k(path, vocabulary=999)


def test_names_that_are_missing_are_listed(path):
    export_top_k(path, *make(), vocabulary=VOCABULARY)
    with pytest.raises(KdlibError, match=r"must have a dataset 'values', got indices, log_tail, logprobs"):
        import_top_k(path, log_probabilities="values")


def test_another_version_is_refused(path):
    export_top_k(path, *make(), vocabulary=VOCABULARY)
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 2
    with pytest.raises(KdlibError, match="version 1, got 2"):
        import_top_k(path)


@pytest.mark.parametrize("kind", ["link", "virtual", "storage", "group"])
def test_what_is_no_data_of_the_file_itself_is_not_read(kind, path, tmp_path):
    ids, log_probabilities, _ = make()
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["indices"] = ids
    (tmp_path / "raw").write_bytes(ids.tobytes())
    with h5py.File(path, "w") as file:
        file["logprobs"] = log_probabilities
        if kind == "link":
            file["indices"] = h5py.ExternalLink("other.h5", "/indices")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(ids.shape, ids.dtype)
            layout[:] = h5py.VirtualSource(str(other), "indices", ids.shape)
            file.create_virtual_dataset("indices", layout)
        elif kind == "group":
            file["indices/values"] = ids
        else:
            file.create_dataset("indices", ids.shape, ids.dtype, external=[(str(tmp_path / "raw"), 0, ids.nbytes)])
    with pytest.raises(KdlibError, match="must be a dataset stored inside the file"):
        import_top_k(path, vocabulary=VOCABULARY)


# Damage


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(share, path):
    export_top_k(path, *make(), vocabulary=VOCABULARY)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(KdlibError, match=r"targets\.h5 must be a complete HDF5 file"):
        import_top_k(path)


def test_no_changed_byte_goes_unnoticed(path):
    about = {
        "offsets": np.array([0, 100, 300]),
        "documents": ["talk/ä#00", "talk/b#00"],
        "attributes": {"teacher": "a"},
    }
    export_top_k(path, *make(), vocabulary=VOCABULARY, **about)
    data, whole, refused = path.read_bytes(), import_top_k(path), 0
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 150):
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            read = import_top_k(path)
        except KdlibError as error:
            assert "targets.h5" in str(error)
            refused += 1
        else:  # a byte that means nothing
            assert all(np.array_equal(found, expected) for found, expected in zip(read, whole, strict=True))
    assert refused > 140


@pytest.mark.parametrize("content", [b"", b"ids,log_probabilities\n1,2\n", b"\x89HDF\r\n\x1a\n" + bytes(100)])
def test_something_else_is_named(content, path):
    path.write_bytes(content)
    with pytest.raises(KdlibError, match=r"targets\.h5 must be a complete HDF5 file"):
        import_top_k(path)


def test_a_missing_file_is_named(path):
    with pytest.raises(KdlibError, match=r"targets\.h5 must be an HDF5 file of top-k targets, got no file"):
        import_top_k(path)


# Wrong targets, on the way out and on the way in


def shorter(ids, log_probabilities, tail):
    return ids[:-1], log_probabilities, tail


def flat(ids, log_probabilities, tail):
    return ids[:, 0], log_probabilities[:, 0], tail


def none(ids, log_probabilities, tail):
    return ids[:0], log_probabilities[:0], tail[:0]


def tail_of_other_length(ids, log_probabilities, tail):
    return ids, log_probabilities, tail[:-1]


def float_ids(ids, log_probabilities, tail):
    return ids.astype(np.float32), log_probabilities, tail


def double(ids, log_probabilities, tail):
    return ids, log_probabilities.astype(np.float64), tail


def half_tail(ids, log_probabilities, tail):
    return ids, log_probabilities, tail.astype(np.float16)


def past_the_vocabulary(ids, log_probabilities, tail):
    ids[3, 2] = VOCABULARY
    return ids, log_probabilities, tail


def negative_id(ids, log_probabilities, tail):
    ids[3, 2] = -1
    return ids, log_probabilities, tail


def one_token_twice(ids, log_probabilities, tail):
    ids[3, 2] = ids[3, 5]
    return ids, log_probabilities, tail


def not_a_number(ids, log_probabilities, tail):
    log_probabilities[3, 2] = np.nan
    return ids, log_probabilities, tail


def one_minus_infinity(ids, log_probabilities, tail):
    log_probabilities[3, 6] = -np.inf
    return ids, log_probabilities, tail


def endless_tail(ids, log_probabilities, tail):
    tail[3] = np.nan
    return ids, log_probabilities, tail


def too_much(ids, log_probabilities, tail):
    log_probabilities[3] = np.log(1.001 / 7)
    return ids, log_probabilities, None


def too_much_with_the_tail(ids, log_probabilities, tail):
    tail[3] += 0.01
    return ids, log_probabilities, tail


def too_little_with_the_tail(ids, log_probabilities, tail):
    tail[3] -= 0.01
    return ids, log_probabilities, tail


SHAPES = {
    shorter: r"one shape \[n, k\].*\(299, 7\) and \(300, 7\)",
    flat: r"one shape \[n, k\]",
    none: r"n and k above 0",
    tail_of_other_length: r"each of the 300 rows, got shape \(299,\)",
    float_ids: "ids must be integers.*float32 and float32",
    double: "float16 or float32.*float64",
    half_tail: "`log_tail` must be float32, got float16",
}
ROWS = {
    past_the_vocabulary: r"row 3 has ids outside 0\.\.999",
    negative_id: r"row 3 has ids outside 0\.\.999",
    one_token_twice: "row 3 names a token twice",
    not_a_number: "row 3 has values that are not finite",
    one_minus_infinity: "row 3 has values that are not finite",
    endless_tail: "row 3 has values that are not finite",
    too_much: "row 3 has a mass above 1",
    too_much_with_the_tail: "row 3 has a mass above 1",
    too_little_with_the_tail: "row 3 has, with its tail, a mass below 1",
}


@pytest.mark.parametrize(("spoil", "message"), [*SHAPES.items(), *ROWS.items()])
def test_wrong_targets_are_not_exported_and_the_old_file_stays(spoil, message, path):
    path.write_bytes(b"old")
    with pytest.raises(KdlibError, match=rf"targets\.h5 cannot be written: .*{message}"):
        export_top_k(path, *spoil(*make()), vocabulary=VOCABULARY)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("spoil", "message"), [*SHAPES.items(), *ROWS.items()])
def test_wrong_targets_are_not_imported(spoil, message, path):
    names = ("indices", "logprobs", "log_tail")
    with h5py.File(path, "w") as file:
        for name, values in zip(names, spoil(*make()), strict=True):
            if values is not None:
                file[name] = values
    with pytest.raises(KdlibError, match=rf"targets\.h5 cannot be used: .*{message}"):
        import_top_k(path, vocabulary=VOCABULARY)


def test_half_precision_may_miss_the_mass_by_its_own_rounding_and_no_more(path):
    # 900 equal values that half precision rounds up, each by almost half of its last bit.
    rounded = np.full((1, 900), -6.9, np.float16)
    exact = rounded.astype(np.float64) - 0.0019
    assert (exact.astype(np.float16) == rounded).all()
    tail = np.log1p(-np.exp(exact).sum(1))
    assert np.exp(rounded.astype(np.float64)).sum() + np.exp(tail[0]) > 1.0015
    ids = np.arange(900)[None]
    export_top_k(path, ids, rounded, tail.astype(np.float32), vocabulary=VOCABULARY)
    more = np.log(np.exp(tail) + 0.002).astype(np.float32)
    with pytest.raises(KdlibError, match="mass above 1"):
        export_top_k(path, ids, rounded, more, vocabulary=VOCABULARY)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"offsets": np.array([0, 299])}, "ascend from 0 to 300"),
        ({"offsets": np.array([1, 300])}, "ascend from 0 to 300"),
        ({"offsets": np.array([0, 200, 100, 300])}, "ascend from 0 to 300"),
        ({"offsets": np.array([0.0, 300.0])}, "must be integers"),
        ({"offsets": np.array([0, 300]), "documents": ["a", "b"]}, "must have 1 names, one for each document, got 2"),
        ({"documents": ["a"]}, "must come with `offsets`"),
        ({"attributes": {"version": 2}}, "not named format, version, vocabulary, got version"),
        ({"attributes": {"list": [1]}}, "strings and numbers.*got list"),
        ({"vocabulary": 6}, "at least k = 7 tokens"),
    ],
)
def test_what_goes_with_the_targets_is_checked(keywords, message, path):
    with pytest.raises(KdlibError, match=message):
        export_top_k(path, *make(), **{"vocabulary": VOCABULARY} | keywords)
    assert not list(path.parent.iterdir())


def test_until_the_new_file_is_whole_the_old_one_stays(path, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    path.write_bytes(b"old")
    monkeypatch.setattr(exchange.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        export_top_k(path, *make(), vocabulary=VOCABULARY)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_an_export_that_is_broken_off_leaves_nothing(path):
    class Failing(Rows):
        def __getitem__(self, rows):
            raise KeyboardInterrupt

    ids, log_probabilities, tail = make()
    with pytest.raises(KeyboardInterrupt):
        export_top_k(path, ids, Failing(log_probabilities, []), tail, vocabulary=VOCABULARY)
    assert not list(path.parent.iterdir())
