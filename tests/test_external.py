"""Targets from a server or a file are those that the same teacher writes itself, up to what k outcomes can tell."""

import dataclasses
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from tiny import BLOCK, VOCABULARY, contents, make_model, make_split, predicting

from kdlib.cache import FileTeacher, Kind, ModelTeacher, ServerTeacher, TargetCache, export_cache, write_targets
from kdlib.cache.exchange import export_top_k
from kdlib.errors import KdlibError

K = 5
GUARD = {"vocabulary": VOCABULARY}


def write(folder, teacher, split, kind=None, **changes):
    settings = {"block_length": BLOCK, "shard_tokens": 60} | changes
    return write_targets(folder, teacher, split, GUARD, kind or Kind("topk", top_k=K), **settings)


def server(model, top_k=K):
    """What CompletionServer gives, without HTTP: that part has tests of its own."""

    @torch.no_grad()
    def top_log_probabilities(windows):
        found = []
        for window in windows:
            logits = model(torch.as_tensor(np.asarray(window, np.int64))[None]).logits[0]
            values, ids = torch.log_softmax(logits, -1).topk(top_k)
            found.append((ids.numpy(), values.numpy()))
        return found

    return SimpleNamespace(top_log_probabilities=top_log_probabilities, vocabulary=VOCABULARY, top_k=top_k)


def assert_same(found, expected):
    assert torch.equal(found.ids, expected.ids)
    # A weight may fall to either side of a rounding.
    torch.testing.assert_close(found.weights, expected.weights, rtol=0.2, atol=1e-6)
    assert (found.weights != expected.weights).float().mean() < 0.05
    torch.testing.assert_close(found.tail, expected.tail, rtol=2e-3, atol=1e-6)


def test_targets_from_a_server_are_those_of_the_model_it_serves(tmp_path):
    split, model = make_split(documents=20), make_model(0)
    about = write(tmp_path / "model", ModelTeacher(model), split)
    served = write(tmp_path / "server", ServerTeacher(server(model)), split)
    positions = predicting(split)
    caches = [TargetCache(tmp_path / name, GUARD, 1.0) for name in ("server", "model")]
    assert_same(*(cache.read(positions) for cache in caches))
    assert served["tokens"] == about["tokens"] == len(positions)
    # k + 1 outcomes tell less than all.
    assert served["teacher_entropy"] < about["teacher_entropy"]
    assert served["teacher_nll"] < about["teacher_nll"]


def test_every_window_is_a_prompt_of_its_own_however_rows_are_packed(tmp_path):
    split, asked = make_split(documents=20, longest=3 * BLOCK), []
    plain = server(make_model(0))
    watched = SimpleNamespace(
        **{
            **vars(plain),
            "top_log_probabilities": lambda windows: asked.extend(windows) or plain.top_log_probabilities(windows),
        }
    )
    write(tmp_path, ServerTeacher(watched), split)
    expected = sorted(split.tokens[start : start + length].tolist() for start, length in split.windows(BLOCK))
    assert sorted(window.tolist() for window in asked) == expected


def test_a_smaller_k_than_the_server_tells_puts_the_others_into_the_tail(tmp_path):
    split, model = make_split(), make_model(0)
    write(tmp_path / "model", ModelTeacher(model), split, Kind("topk", top_k=3))
    write(tmp_path / "server", ServerTeacher(server(model, top_k=8)), split, Kind("topk", top_k=3))
    positions = predicting(split)
    assert_same(*(TargetCache(tmp_path / name, GUARD, 1.0).read(positions) for name in ("server", "model")))


def test_a_cache_survives_the_way_through_hdf5(tmp_path):
    split = make_split(documents=20)
    write(tmp_path / "here", ModelTeacher(make_model(0)), split)
    here = TargetCache(tmp_path / "here", GUARD, 1.0)
    export_cache(here, split, tmp_path / "targets.h5", {"teacher": "a tiny model"})
    write(tmp_path / "back", FileTeacher(tmp_path / "targets.h5", split, VOCABULARY), split)
    back = TargetCache(tmp_path / "back", GUARD, 1.0)
    assert_same(back.read(predicting(split)), here.read(predicting(split)))
    with h5py.File(tmp_path / "targets.h5") as file:
        assert file["logprobs"].shape == (len(split.tokens), K)
        assert (np.diff(file["logprobs"][:], axis=1)[predicting(split)] <= 0).all()
        ends = split.offsets[1:] - 1
        assert np.isneginf(file["logprobs"][:][ends]).all()
        tail = np.exp(file["log_tail"][:]) + np.exp(file["logprobs"][:]).sum(1)
        assert np.allclose(tail[predicting(split)], 1, atol=1e-4) and (tail[ends] == 0).all()


def test_probabilities_too_small_to_be_kept_leave_a_file_that_can_be_read(tmp_path):
    split = make_split()
    model = make_model(0)
    model.get_input_embeddings().weight.data *= 10
    write(tmp_path / "here", ModelTeacher(model), split)
    here = TargetCache(tmp_path / "here", GUARD, 1.0)
    assert (here.read(predicting(split)).weights == 0).any(), "nothing to show"
    export_cache(here, split, tmp_path / "targets.h5")
    write(tmp_path / "back", FileTeacher(tmp_path / "targets.h5", split, VOCABULARY), split)
    back = TargetCache(tmp_path / "back", GUARD, 1.0).read(predicting(split))
    expected = here.read(predicting(split))
    for row in range(len(expected)):
        kept, found = (
            {i: weight for i, weight in zip(one.ids[row].tolist(), one.weights[row].tolist(), strict=True) if weight}
            for one in (expected, back)
        )
        assert found.keys() <= kept.keys() and found == pytest.approx({i: kept[i] for i in found}, rel=0.2)


def test_a_writer_from_a_file_goes_on_where_it_stopped(tmp_path):
    split = make_split(documents=20)
    write(tmp_path / "here", ModelTeacher(make_model(0)), split)
    export_cache(TargetCache(tmp_path / "here", GUARD, 1.0), split, tmp_path / "targets.h5")
    teacher = FileTeacher(tmp_path / "targets.h5", split, VOCABULARY)
    write(tmp_path / "whole", teacher, split)
    write(tmp_path / "cut", teacher, split)
    for name in ("manifest.json", "00001.json"):
        (tmp_path / "cut" / name).unlink()
    write(tmp_path / "cut", teacher, split)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "temperature"), [(Kind("sampled", draws=4), 1.0), (Kind("topk", top_k=K + 1), 1.0), (Kind("topk", top_k=K), 2.0)]
)
def test_more_than_such_a_teacher_tells_is_refused(tmp_path, kind, temperature):
    with pytest.raises(KdlibError, match=f"must be topk with top_k at most {K}, at temperature 1"):
        write(tmp_path, ServerTeacher(server(make_model(0))), make_split(), kind, temperature=temperature)


def test_a_file_of_other_documents_or_another_vocabulary_is_refused(tmp_path):
    split, other = make_split(), make_split(seed=1)
    write(tmp_path / "here", ModelTeacher(make_model(0)), split)
    export_cache(TargetCache(tmp_path / "here", GUARD, 1.0), split, tmp_path / "targets.h5")
    with pytest.raises(KdlibError, match="must have one row for each of the"):
        FileTeacher(tmp_path / "targets.h5", other, VOCABULARY)
    moved = dataclasses.replace(split, offsets=split.offsets + np.r_[0, np.ones(len(split.offsets) - 2, int), 0])
    with pytest.raises(KdlibError, match="must have one row for each of the"):
        FileTeacher(tmp_path / "targets.h5", moved, VOCABULARY)
    with pytest.raises(KdlibError, match="its vocabulary must have 30 tokens, got 29"):
        FileTeacher(tmp_path / "targets.h5", split, VOCABULARY + 1)


def test_a_file_of_another_tool_that_tells_no_vocabulary_is_read(tmp_path):
    split = make_split()
    write(tmp_path / "here", ModelTeacher(make_model(0)), split)
    export_cache(TargetCache(tmp_path / "here", GUARD, 1.0), split, tmp_path / "targets.h5")
    with h5py.File(tmp_path / "targets.h5", "a") as file:
        for name in list(file.attrs):
            del file.attrs[name]
    write(tmp_path / "back", FileTeacher(tmp_path / "targets.h5", split, VOCABULARY), split)
    here, back = (TargetCache(tmp_path / name, GUARD, 1.0).read(predicting(split)) for name in ("here", "back"))
    assert torch.equal(here.ids, back.ids)


def test_a_text_token_outside_a_file_that_leaves_no_mass_for_it_has_a_finite_loss(tmp_path):
    split = make_split()
    n = len(split.tokens)
    ids = np.tile(np.arange(K, dtype=np.int32), (n, 1))
    whole = np.full((n, K), -np.log(K), np.float32)
    nothing = np.full(n, -np.inf, np.float32)
    export_top_k(tmp_path / "targets.h5", ids, whole, nothing, vocabulary=VOCABULARY)
    about = write(tmp_path / "cache", FileTeacher(tmp_path / "targets.h5", split, VOCABULARY), split)
    assert (split.tokens >= K).any() and np.isfinite(about["teacher_nll"])


def test_a_file_without_a_row_that_is_needed_is_refused(tmp_path):
    split = make_split()
    n = len(split.tokens)
    empty = np.full((n, K), -np.inf, np.float32)
    export_top_k(tmp_path / "targets.h5", np.tile(np.arange(K, dtype=np.int32), (n, 1)), empty, vocabulary=VOCABULARY)
    with pytest.raises(KdlibError, match="must have log-probabilities, got .* without, the first 0"):
        write(tmp_path / "cache", FileTeacher(tmp_path / "targets.h5", split, VOCABULARY), split)


def test_only_the_largest_probabilities_can_be_exported(tmp_path):
    split = make_split()
    write(tmp_path / "here", ModelTeacher(make_model(0)), split, Kind("sampled", draws=4))
    with pytest.raises(KdlibError, match="got sampled"):
        export_cache(TargetCache(tmp_path / "here", GUARD, 1.0), split, tmp_path / "targets.h5")
