"""Every number of an evaluation against a plain computation, window by window and bin by bin."""

import gc
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from kdlib.analysis.statistics import pool_target_logprobs
from kdlib.data.corpus import Split, pack, predicting_positions
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.evaluation import at_bound
from kdlib.evaluation import metrics as evaluation
from kdlib.evaluation.metrics import _tell_of_bound, evaluate, fit_temperature, position_scores
from kdlib.evaluation.positions import hidden_states
from kdlib.evaluation.reliability import BINS, count, count_pairs, ece

VOCABULARY, BLOCK = 67, 16


pytestmark = pytest.mark.usefixtures("one_thread")


def model(seed, architecture="llama", **changes):
    torch.manual_seed(seed)
    if architecture == "gpt2":
        shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": BLOCK}
        config = GPT2Config(vocab_size=VOCABULARY, initializer_range=0.4, **shape)
    else:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(**{"vocab_size": VOCABULARY, "initializer_range": 0.4} | shape | changes)
    return AutoModelForCausalLM.from_config(config).eval()


def split(name, seed, documents=9):
    rng = np.random.default_rng(seed)
    streams = [np.r_[0, rng.integers(1, VOCABULARY, rng.integers(1, 50)), 0] for _ in range(documents)]
    sources = [f"{'talk' if i % 3 else 'news'}/{name}{i // 2}" for i in range(documents)]
    table = pd.DataFrame({"document": [f"{s}#{i:02d}" for i, s in enumerate(sources)], "source": sources})
    table["domain"] = table.source.str.split("/").str[0]
    table["bytes"] = [4 * len(stream) for stream in streams]
    table["tokens"] = [len(stream) - 1 for stream in streams]
    offsets = np.cumsum([0, *map(len, streams)])
    return Split(name, table, np.concatenate(streams).astype(np.int32), offsets.astype(np.int64), 0)


def splits(*names):
    return {name: split(name, seed) for seed, name in enumerate(names or ("validation", "calibration", "test", "ood"))}


@torch.no_grad()
def window_log_probs(one, data):
    """What transformers itself computes, one forward pass a window, in split order [positions, V]."""
    parts = []
    for start, end in itertools.pairwise(data.offsets):
        for first in range(start, end - 1, BLOCK):
            ids = torch.from_numpy(data.tokens[first : min(first + BLOCK, end - 1)].astype(np.int64))[None]
            parts.append(functional.log_softmax(one(ids).logits[0].float(), -1))
    return torch.cat(parts)


def targets_of(data):
    return torch.from_numpy(data.tokens[predicting_positions(data) + 1].astype(np.int64))


def naive_bins(confidence, hit, bins=15):
    """The definition of a reliability histogram, pair by pair."""
    counts, sums, hits = np.zeros(bins), np.zeros(bins), np.zeros(bins)
    for p, came_true in zip(confidence, hit, strict=True):
        b = next(m for m in range(bins) if p <= np.float32(m + 1) / np.float32(bins) or m == bins - 1)
        counts[b], sums[b], hits[b] = counts[b] + 1, sums[b] + p, hits[b] + came_true
    return counts, sums, hits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_document_sums_equal_plain_forward_passes_window_by_window(architecture, batch_size):
    one, data = model(0, architecture), splits("calibration", "test")
    found = evaluate(one, data, BLOCK, batch_size=batch_size)
    for name, part in data.items():
        log_p, targets = window_log_probs(one, part), targets_of(part)
        nll = -log_p[torch.arange(len(targets)), targets].double().numpy()
        correct = (log_p.argmax(-1) == targets).numpy()
        rows = found.documents[found.documents.split == name]
        place = 0
        for row, tokens in zip(rows.itertuples(), part.documents.tokens, strict=True):
            assert row.tokens == tokens
            assert row.nll == pytest.approx(nll[place : place + tokens].sum(), rel=1e-5)
            assert row.correct == correct[place : place + tokens].sum()
            place += tokens
        assert rows.document.tolist() == part.documents.document.tolist()


def test_split_metrics_are_token_weighted_and_perplexity_is_the_exponential_of_the_mean():
    one, data = model(0), splits()
    found = evaluate(one, data, BLOCK)
    for name, part in data.items():
        metrics, rows = found.metrics["evaluation"][name], found.documents[found.documents.split == name]
        assert metrics["nll"] == pytest.approx(rows.nll.sum() / rows.tokens.sum(), rel=1e-12)
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]), rel=1e-12)
        assert metrics["perplexity"] != pytest.approx(np.exp(rows.nll / rows.tokens).mean(), rel=1e-3)
        assert metrics["bits_per_byte"] == pytest.approx(
            rows.nll.sum() / math.log(2) / part.documents.bytes.sum(), rel=1e-12
        )
        assert metrics["accuracy"] == rows.correct.sum() / rows.tokens.sum()
        assert (metrics["tokens"], metrics["bytes"], metrics["documents"]) == (
            len(predicting_positions(part)), part.documents.bytes.sum(), 9,
        )  # fmt: skip
        domains = found.metrics["domains"][name]
        assert set(domains) == {"news", "talk"}
        assert sum(d["nll"] * d["tokens"] for d in domains.values()) == pytest.approx(rows.nll.sum(), rel=1e-12)
    assert list(found.metrics["evaluation"]) == list(data)


@pytest.mark.parametrize("pool", [None, "probability", "logit"])
def test_calibration_errors_equal_a_naive_loop_over_positions_and_over_all_pairs(pool):
    members = [model(0)] if pool is None else [model(0), model(1)]
    data = {"test": split("test", 5, documents=4)}
    found = evaluate(members, data, BLOCK, pool=pool, temperature=1.7)
    log_p, targets = torch.stack([window_log_probs(one, data["test"]) for one in members]), targets_of(data["test"])
    log_p = functional.log_softmax(log_p.mean(0), -1) if pool == "logit" else (log_p.exp().mean(0)).log()
    for temperature, kind, suffix in ((1.0, "raw", ""), (1.7, "calibrated", "_calibrated")):
        p = functional.softmax(log_p / temperature, -1)
        one_hot = functional.one_hot(targets, VOCABULARY)
        top = naive_bins(p.max(-1).values.numpy(), (p.argmax(-1) == targets).numpy())
        pairs = naive_bins(p.flatten().numpy(), one_hot.flatten().numpy())
        metrics, bins = found.metrics["evaluation"]["test"], found.metrics["reliability"]["test"][kind]
        assert metrics[f"ece{suffix}"] == pytest.approx(ece(*top), abs=1e-6)
        assert metrics[f"full_ece{suffix}"] == pytest.approx(ece(*pairs, total=len(targets)), abs=1e-5)
        assert metrics[f"nll{suffix}"] == pytest.approx(
            -p.log()[torch.arange(len(targets)), targets].mean().item(), rel=1e-5
        )
        assert bins["counts"] == top[0].tolist() and bins["full_counts"] == pairs[0].tolist()
        assert bins["hits"] == top[2].tolist() and bins["full_hits"] == pairs[2].tolist()
        assert np.allclose(bins["full_confidence_sums"], pairs[1], atol=1e-4)


def test_labels_drawn_at_temperature_two_are_found_to_need_temperature_two():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(40_000, 20, generator=generator)
    labels = torch.multinomial(functional.softmax(logits / 2, -1), 1, generator=generator)[:, 0]
    scores = functional.log_softmax(logits, -1)
    found = fit_temperature(lambda: zip(scores.split(7_000), labels.split(7_000), strict=True))
    assert found == pytest.approx(2, rel=0.02)

    def nll(temperature):
        return functional.cross_entropy(scores.double() / temperature, labels).item()

    assert nll(found) < min(nll(found * 1.001), nll(found / 1.001))


@pytest.mark.parametrize(("label", "bound"), [(1, 20.0), (0, 0.05)])
def test_a_temperature_without_an_optimum_stops_at_the_end_of_the_range(label, bound):
    scores = functional.log_softmax(torch.tensor([[0.3, 0.0]]).expand(50, 2), -1)  # always wrong, or always right
    found = fit_temperature(lambda: [(scores, torch.full((50,), label))])
    assert found == pytest.approx(bound, rel=1e-5) and at_bound(found) and not at_bound(found * 1.01)


def test_an_evaluation_tells_of_a_temperature_at_its_bound(capsys):
    _tell_of_bound(1.5)
    assert capsys.readouterr().out == ""
    _tell_of_bound(0.05)
    assert "at a bound of its range (0.05 to 20), got 0.05" in capsys.readouterr().out


def test_uniform_predictions_fit_every_temperature_and_keep_one():
    scores = torch.full((8, 4), -math.log(4.0))
    assert fit_temperature(lambda: [(scores, torch.zeros(8, dtype=torch.long))]) == 1


def test_a_calibrated_simulator_has_a_calibration_error_that_vanishes_with_n():
    generator, errors = torch.Generator().manual_seed(1), []
    for n in (300, 30_000):
        p = functional.softmax(3 * torch.randn(n, 12, generator=generator), -1)
        labels = torch.multinomial(p, 1, generator=generator)[:, 0]
        top, pairs = torch.zeros(3, BINS).double(), torch.zeros(3, BINS).double()
        count(top, p.amax(-1), p.argmax(-1) == labels)
        count_pairs(pairs, p.log(), labels)
        errors.append((ece(*top), ece(*pairs, total=n)))
    assert errors[0][0] > 0.03 and errors[0][1] > 0.05
    assert errors[1][0] < 0.015 and errors[1][1] < 0.02


def test_a_pool_of_one_is_evaluated_as_its_member_bit_for_bit():
    data = splits()
    alone = evaluate(model(0), data, BLOCK)
    for pool in ("probability", "logit"):
        pooled = evaluate([model(0)], data, BLOCK, pool=pool)
        same = {key: value for key, value in pooled.metrics.items() if key != "pool"}
        assert same == alone.metrics
        pd.testing.assert_frame_equal(pooled.documents, alone.documents, check_exact=True)
        assert all(np.array_equal(pooled.target_logprobs[name], alone.target_logprobs[name]) for name in data)


def test_an_ensemble_model_is_evaluated_as_its_members_under_its_pool():
    data, members = splits("calibration", "test"), [model(0), model(1, hidden_size=24), model(2, "gpt2")]
    for one in members:
        one.config.bos_token_id = one.config.eos_token_id = one.config.pad_token_id = 0
    direct = evaluate(members, data, BLOCK, pool="logit")
    assert evaluate(EnsembleForCausalLM.from_members(members, "logit"), data, BLOCK).metrics == direct.metrics


def test_stored_log_probabilities_give_the_loss_of_every_subset_of_members_without_a_model():
    data, members = splits("calibration", "test"), [model(seed) for seed in range(3)]
    stored = [evaluate(one, data, BLOCK).target_logprobs for one in members]
    for size in (1, 2, 3):
        for subset in itertools.combinations(range(3), size):
            found = evaluate([members[i] for i in subset], data, BLOCK, pool="probability")
            for name in data:
                recomputed = -pool_target_logprobs([stored[i][name] for i in subset]).mean()
                assert recomputed == pytest.approx(found.metrics["evaluation"][name]["nll"], abs=1e-3)
                assert stored[0][name].dtype == np.float16 and np.isfinite(stored[0][name]).all()


@pytest.mark.parametrize("pool", ["probability", "logit"])
def test_ambiguity_is_the_gap_between_the_mean_member_and_the_pool(pool):
    data, members = splits("calibration", "test"), [model(seed) for seed in range(3)]
    alone = [evaluate(one, data, BLOCK).metrics["evaluation"] for one in members]
    found = evaluate(members, data, BLOCK, pool=pool).metrics
    for name in data:
        losses, gap = [one[name]["nll"] for one in alone], found["pool"][name]
        assert gap["member_nll_mean"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert gap["member_nll_best"] == pytest.approx(min(losses), rel=1e-6)
        pooled = found["evaluation"][name]["nll"]
        assert gap["member_nll_mean"] - pooled == pytest.approx(gap[f"ambiguity_{pool}"], abs=1e-5)
        assert gap["ambiguity_probability"] != pytest.approx(gap["ambiguity_logit"], abs=1e-3)


def test_identical_members_gain_nothing():
    found = evaluate([model(0), model(0)], splits("calibration"), BLOCK, pool="probability").metrics["pool"][
        "calibration"
    ]
    assert abs(found["ambiguity_probability"]) < 1e-6 and abs(found["ambiguity_logit"]) < 1e-6


@torch.no_grad()
def written_by(one, name, temperature, documents=300):
    """Text of one window a document, drawn from a model's own predictions at a temperature."""
    torch.manual_seed(0)
    ids = torch.zeros(documents, 1, dtype=torch.long)
    for _ in range(BLOCK):
        p = functional.softmax(one(ids).logits[:, -1] / temperature, -1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
    table = split(name, 0, documents).documents.assign(tokens=BLOCK)
    offsets = np.arange(documents + 1, dtype=np.int64) * (BLOCK + 1)
    return Split(name, table, ids.flatten().numpy().astype(np.int32), offsets, 0)


def test_the_temperature_is_fitted_on_calibration_alone_and_lowers_its_loss_and_error():
    one = model(0)
    data = {"test": written_by(one, "test", 1.0), "calibration": written_by(one, "calibration", 2.0)}
    found = evaluate(one, data, BLOCK).metrics
    assert found["temperature"] == pytest.approx(2, rel=0.05)
    calibration, test = found["evaluation"]["calibration"], found["evaluation"]["test"]
    for name in ("nll", "ece", "full_ece"):
        assert calibration[f"{name}_calibrated"] < calibration[name] - 0.05
        assert test[f"{name}_calibrated"] > test[name] + 0.05  # the text that the model already predicts rightly
    assert evaluate(one, {"calibration": data["calibration"]}, BLOCK).metrics["temperature"] == found["temperature"]
    given = evaluate(one, {"test": data["test"]}, BLOCK, temperature=found["temperature"]).metrics
    assert given["evaluation"]["test"] == found["evaluation"]["test"]


def test_results_do_not_depend_on_batch_or_chunk_size(monkeypatch):
    data, one = splits("calibration", "test"), model(0)
    whole = evaluate(one, data, BLOCK)
    monkeypatch.setitem(evaluation.CHUNK, "cpu", 5 * VOCABULARY)
    parts = evaluate(one, data, BLOCK, batch_size=1)
    assert np.allclose(parts.documents.nll, whole.documents.nll, rtol=1e-5)
    assert parts.metrics["temperature"] == pytest.approx(whole.metrics["temperature"], rel=1e-4)
    counts = [found.metrics["reliability"]["test"]["raw"]["full_counts"] for found in (parts, whole)]
    assert sum(counts[0]) == sum(counts[1]) == VOCABULARY * len(predicting_positions(data["test"]))


@pytest.mark.parametrize("pool", [None, "probability"])
def test_the_temperature_is_the_same_whether_its_split_is_kept_or_computed_in_every_pass(monkeypatch, pool):
    data, members = splits("calibration"), model(0) if pool is None else [model(0), model(1)]
    kept = evaluate(members, data, BLOCK, pool=pool).metrics
    monkeypatch.setattr(evaluation, "KEPT", 0)
    assert evaluate(members, data, BLOCK, pool=pool).metrics == kept


def test_the_vocabulary_is_never_spread_over_all_positions(monkeypatch):
    largest = 0
    original = evaluation.log_probs

    def watched(logits):
        nonlocal largest
        largest = max(largest, logits.numel())
        return original(logits)

    monkeypatch.setattr(evaluation, "log_probs", watched)
    monkeypatch.setitem(evaluation.CHUNK, "cpu", 10 * VOCABULARY)
    evaluate(model(0), splits("calibration"), BLOCK)
    assert 0 < largest <= 10 * VOCABULARY


def test_hidden_states_lie_in_split_order_whatever_the_order_of_the_rows():
    data, one = split("test", 3), model(0)
    index = pack(data.windows(BLOCK), BLOCK)
    with torch.no_grad():
        states = hidden_states(one, data, index, 4)
        shuffled = hidden_states(one, data, index[np.random.default_rng(0).permutation(len(index))], 3)
        logits = one.lm_head(states)
    assert torch.allclose(states, shuffled, atol=1e-5)
    assert torch.allclose(functional.log_softmax(logits, -1), window_log_probs(one, data), atol=1e-4)


def ensemble(pool, temperature=1.0):
    members = [model(0), model(1, hidden_size=24), model(2, "gpt2")]
    for one in members:
        one.config.bos_token_id = one.config.eos_token_id = one.config.pad_token_id = 0
    return EnsembleForCausalLM.from_members(members, pool, temperature)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "scorer",
    [
        lambda: model(0),
        lambda: model(0, "gpt2"),
        lambda: ensemble("probability"),
        lambda: ensemble("logit"),
        lambda: ensemble("logit", 1.7),
    ],
    ids=["llama", "gpt2", "probability", "logit", "calibrated"],
)
def test_scores_of_positions_are_those_of_dense_log_probabilities(monkeypatch, scorer, batch_size):
    one, data = scorer(), split("test", 3)
    log_p, targets = window_log_probs(one, data).double(), targets_of(data)
    # Chunks that end within a document.
    monkeypatch.setitem(evaluation.CHUNK, "cpu", 7 * VOCABULARY * len(getattr(one, "members", [one])))
    nll = position_scores(one, data, BLOCK, "nll", batch_size)
    entropy = position_scores(one, data, BLOCK, "entropy", batch_size)
    assert nll.dtype == entropy.dtype == np.float32 and len(nll) == len(entropy) == len(predicting_positions(data))
    assert np.allclose(nll, -log_p[torch.arange(len(targets)), targets], rtol=1e-4, atol=1e-5)
    assert np.allclose(entropy, torch.special.entr(log_p.exp()).sum(-1), rtol=1e-4, atol=1e-5)
    assert entropy.min() >= 0 and entropy.max() <= math.log(VOCABULARY) + 1e-5


def test_scores_by_document_add_up_to_those_of_an_evaluation():
    one, data = model(0), split("test", 3)
    table = evaluate(one, {"test": data}, BLOCK, temperature=1.0).documents
    document = np.repeat(np.arange(len(table)), table.tokens)
    found = np.bincount(document, position_scores(one, data, BLOCK, "nll"))
    assert np.allclose(found, table.nll, rtol=1e-5)


def test_scores_are_those_without_dropout_and_every_module_gets_its_mode_back():
    data, one = split("test", 3), model(0, attention_dropout=0.5)
    expected = position_scores(one, data, BLOCK, "entropy")
    one.train()
    one.model.layers[0].eval()
    flags = [module.training for module in one.modules()]
    assert np.array_equal(position_scores(one, data, BLOCK, "entropy"), expected)
    assert [module.training for module in one.modules()] == flags


def test_scores_in_bfloat16_agree_to_its_rounding():
    data, one = split("test", 3), model(0)
    exact, rounded = (position_scores(one, data, BLOCK, "nll", autocast=dtype) for dtype in (None, torch.bfloat16))
    assert rounded.mean() == pytest.approx(exact.mean(), rel=0.02) and not np.array_equal(exact, rounded)


def test_bfloat16_autocast_agrees_to_its_rounding_and_leaves_the_weights_alone():
    data, one = splits("calibration", "test"), model(0)
    exact = evaluate(one, data, BLOCK).metrics["evaluation"]["test"]["nll"]
    rounded = evaluate(one, data, BLOCK, autocast=torch.bfloat16).metrics["evaluation"]["test"]["nll"]
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact
    assert {parameter.dtype for parameter in one.parameters()} == {torch.float32}


def test_every_module_gets_its_own_mode_back_and_dropout_plays_no_part():
    data, one = splits("calibration"), model(0, attention_dropout=0.5)
    expected = evaluate(one, data, BLOCK).metrics
    one.train()
    one.model.layers[0].eval()
    flags = [module.training for module in one.modules()]
    assert evaluate(one, data, BLOCK).metrics == expected
    assert [module.training for module in one.modules()] == flags
    assert all(parameter.grad is None and parameter.requires_grad for parameter in one.parameters())
    other = model(1).eval()
    other.model.norm = one.model.norm  # shared: in train mode here, within a model in evaluation mode
    one.model.norm.train()
    evaluate([one, other], data, BLOCK, pool="logit")
    assert one.model.norm.training and not other.training
    with pytest.raises(RuntimeError, match="interrupted"):
        evaluate(one, {"calibration": Interrupted(**vars(data["calibration"]))}, BLOCK)
    assert [module.training for module in one.modules()] == flags


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_nothing_of_an_evaluation_stays_in_memory():
    data, one = splits("calibration", "test"), model(0)
    evaluate(one, data, BLOCK)
    before = live_tensors()
    evaluate(one, data, BLOCK)
    assert live_tensors() == before


class Interrupted(Split):
    def windows(self, block_length, documents=None):
        raise RuntimeError("interrupted")


def test_metrics_are_plain_json_and_tables_have_the_agreed_columns(tmp_path):
    found = evaluate([model(0), model(1)], splits(), BLOCK, pool="probability")
    assert json.loads(json.dumps(found.metrics, allow_nan=False)) == found.metrics
    columns = ["split", "document", "source", "domain", "tokens", "bytes", "nll", "correct"]
    assert list(found.documents) == columns
    found.documents.to_parquet(tmp_path / "documents.parquet")
    assert set(found.metrics["evaluation"]["test"]) == {
        "nll", "perplexity", "bits_per_byte", "accuracy", "ece", "full_ece", "tokens", "bytes", "documents",
        "nll_calibrated", "ece_calibrated", "full_ece_calibrated",
    }  # fmt: skip
    assert set(found.metrics["pool"]["test"]) == {
        "member_nll_mean", "member_nll_best", "ambiguity_probability", "ambiguity_logit",
    }  # fmt: skip


def empty():
    one = split("empty", 0)
    return Split("empty", one.documents.iloc[:0], one.tokens[:0], one.offsets[:1], 0)


def diverged():
    one = model(0)
    torch.nn.init.constant_(one.lm_head.weight, float("nan"))
    return one


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate([model(0), model(1)], splits(), BLOCK), "Name the pool"),
        (lambda: evaluate([model(0)], splits(), BLOCK, pool="median"), "'median'"),
        (lambda: evaluate([], splits(), BLOCK, pool="logit"), "got 0 with pool"),
        (lambda: evaluate([model(0), model(1, vocab_size=68)], splits(), BLOCK, pool="logit"), r"\[67, 68\]"),
        (lambda: evaluate(model(0), splits("test"), BLOCK), "must include calibration"),
        (lambda: evaluate(model(0), {"calibration": empty()}, BLOCK), "'calibration' must have tokens"),
        (lambda: evaluate(model(0, vocab_size=60), splits("calibration"), BLOCK), "below the model's 60"),
        (lambda: evaluate(diverged(), splits("calibration"), BLOCK), "must be finite"),
        (lambda: evaluate(diverged(), splits("test"), BLOCK, temperature=1.0), "must be finite, got .* split 'test'"),
        (lambda: hidden_states(model(0), split("test", 0), np.full((1, BLOCK), -1), 4), "once, got 0"),
        (lambda: position_scores(model(0), empty(), BLOCK, "nll"), "'empty' must have tokens"),
        (lambda: position_scores(model(0, vocab_size=60), split("test", 0), BLOCK, "nll"), "below the model's 60"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(call, message):
    with pytest.raises(KdlibError, match=message):
        call()


def test_ece_from_a_histogram_is_guos_weighted_gap():
    counts, confidences, hits = [10, 30], [2.0, 27.0], [4, 21]
    by_definition = 10 / 40 * abs(4 / 10 - 0.2) + 30 / 40 * abs(21 / 30 - 0.9)
    assert ece(counts, confidences, hits) == pytest.approx(by_definition, abs=1e-15)
    assert ece(counts, confidences, hits, total=8) == pytest.approx(by_definition * 40 / 8)
