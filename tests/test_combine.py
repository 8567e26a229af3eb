"""Ensembles that are combined by what was learned: settings, runs, and that no weight sees test text."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import save_file
from scipy import stats
from tiny_study import make, step, train_split
from torch.distributed import checkpoint

from kdlib.ensemble import weights as learned
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.evaluation.metrics import evaluate
from kdlib.runs import artefacts, combiners
from kdlib.runs.card import interval
from kdlib.study import profiles
from kdlib.study.combining import Combine
from kdlib.study.profiles import REPOSITORY
from kdlib.study.store import Run

CE = {"objective": "ce"}
# Two that know a few documents by heart, not the same ones, and one that knows nothing.
MEMBERS = [{"student": CE | {"epochs": 40, "text": {"bagged": {"share": 0.1, "seed": seed}}}} for seed in (1, 2)]
MEMBERS.append({"student": CE | {"epochs": 0}})


def ensemble(profile, **settings):
    return make(profile, "05_ensemble", members=MEMBERS, seeds=[1], student=CE, **settings)


def stored(run, split="calibration"):
    return np.load(run.path / "target_logprobs.npz")[split].astype(np.float64)


def members_of(profile):
    return sorted((make(profile, **one["student"]) for one in MEMBERS), key=lambda run: run.id)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of weights, power, distance, gate, got none"),
        ({"weights": "learned", "power": 0.5}, "got weights, power"),
        ({"power": 0.5, "keep": 2}, "keep must be given with weights"),
        ({"weights": "guessed"}, "learned"),
        ({"power": 0.0}, "greater than or equal to 0.05"),
        ({"power": 1.5}, "less than or equal to 1"),
        ({"distance": {"top_k": 0}}, "greater than 0"),
        ({"distance": {"temperature": 0}}, "greater than 0"),
        ({"gate": {"width": 3}}, "Extra inputs"),
        ({"gate": {"targets": {"no": {}}}}, "a kind of corpus"),
    ],
)
def test_settings_that_say_no_one_way_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Combine.model_validate(settings)


def test_a_misspelt_setting_is_refused_with_those_there_are():
    for combine, told in (
        ({"weight": "learned"}, r"combine.weight: must be one of weights, keep, power, distance, gate \(found 'learned'\)"),
        ({"gate": {"width": 3}}, r"combine.gate.width: must be one of clusters, targets, share, .* \(found 3\)"),
    ):
        with pytest.raises(KdlibError, match=told):
            profiles.parameters("05_ensemble", "smoke", combine=combine)



@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": "logit", "combine": {"power": 0.5}}, "pool must be probability with combine"),
        ({"combine": {"weights": "learned", "keep": 4}}, "keep must be at most 3"),
    ],
)
def test_what_does_not_go_together_is_refused(profile, settings, message):
    with pytest.raises(KdlibError, match=message):
        step(profile, "05_ensemble", members=MEMBERS, **settings)


def test_only_what_is_read_is_in_the_id_and_equal_weights_leave_it_as_it_was(profile):
    def of(**settings):
        return step(profile, "05_ensemble", seeds=[1, 2], **settings)

    assert of(combine=None, calibrate=False).settings == of().settings
    assert not {"combine", "calibrate"} & set(of().settings["parameters"])
    ways = [{"weights": "learned"}, {"weights": "learned", "keep": 1}, {"power": 0.5}, {"power": 0.6}]
    found = [of(), of(calibrate=True), *(of(combine=way) for way in ways)]
    assert len({one.id for one in found}) == 6
    assert [one.label for one in found[1:]] == [
        "ensemble of 2, probability pool",
        "ensemble of 2, learned weights",
        "ensemble of 2, the 1 of largest learned weight",
        "ensemble of 2, power mean 0.5",
        "ensemble of 2, power mean 0.6",
    ]


def test_distance_needs_members_that_know_their_cluster(profile):
    for combine in ({"distance": {}}, {"gate": {}}):
        with pytest.raises(KdlibError, match="got 0 such runs"):
            step(profile, "05_ensemble", seeds=[1, 2], combine=combine)


def test_learned_weights_are_those_of_the_members_own_evaluations(profile):
    run, members = ensemble(profile, combine={"weights": "learned"}), members_of(profile)
    told = run.metrics["combine"]
    found = np.array([told["weights"][one.id] for one in members])
    table = np.stack([stored(one) for one in members])
    best = learned.fit(table, 1e-9)
    assert np.allclose(found, best.weights, atol=5e-3) and told["gap"] <= 1e-5
    assert run.metrics["evaluation"]["calibration"]["nll"] == pytest.approx(best.nll, abs=2e-3)
    assert told["calibration_nll"]["learned"] < told["calibration_nll"]["uniform"] - 1e-3
    untrained = next(one.id for one in members if one.metrics["training"]["steps"] == 0)
    assert told["weights"][untrained] < 0.05
    assert run.metrics["members"] == [one.id for one, weight in zip(members, found, strict=True) if weight > 0]
    pool = run.metrics["pool"]["test"]
    assert pool["member_nll_weighted"] - pool["ambiguity_probability"] == pytest.approx(
        run.metrics["evaluation"]["test"]["nll"], abs=1e-5
    )
    assert pool["oracle_nll"] < run.metrics["evaluation"]["test"]["nll"]
    assert [len(one["members"]) for one in told["budgets"]] == [1, 2, 3]
    model = artefacts.load_model(run)
    assert model.config.weights == [told["weights"][one] for one in run.metrics["members"]]


def test_a_budget_keeps_the_members_of_largest_weight_with_weights_of_their_own(profile):
    run, whole = ensemble(profile, combine={"weights": "learned", "keep": 1}), ensemble(profile, combine={"weights": "learned"})
    first = max(whole.metrics["combine"]["weights"].items(), key=lambda item: item[1])[0]
    assert run.metrics["members"] == [first] and artefacts.load_model(run).config.weights == [1.0]
    alone = next(one for one in members_of(profile) if one.id == first)
    assert run.metrics["evaluation"]["test"]["nll"] == pytest.approx(alone.metrics["evaluation"]["test"]["nll"], abs=1e-6)
    assert run.metrics["parameters"] == alone.metrics["parameters"]


def test_no_learned_weight_depends_on_test_text(profile, tmp_path):
    members = members_of(profile)
    changed = [Run(tmp_path / one.id) for one in members]
    for one, other in zip(members, changed, strict=True):
        shutil.copytree(one.path, other.path)
        arrays = dict(np.load(one.path / "target_logprobs.npz"))
        arrays |= {name: values[::-1] * 3 for name, values in arrays.items() if name != "calibration"}
        np.savez_compressed(other.path / "target_logprobs.npz", **arrays)
    how = Combine(weights="learned")
    assert combiners.by_weights(how, changed).options == combiners.by_weights(how, members).options
    arrays["calibration"] = arrays["calibration"] - 5
    np.savez_compressed(other.path / "target_logprobs.npz", **arrays)
    assert combiners.by_weights(how, changed).options != combiners.by_weights(how, members).options


def test_a_power_mean_lies_between_the_pools(profile):
    nll = [
        ensemble(profile, **settings).metrics["evaluation"]["test"]["nll"]
        for settings in ({"pool": "logit"}, {"combine": {"power": 0.05}}, {"combine": {"power": 1.0}}, {"pool": "probability"})
    ]
    assert nll[2] == nll[3] and abs(nll[1] - nll[0]) < 0.2 * abs(nll[0] - nll[3])


def test_a_calibrated_ensemble_is_saved_with_the_temperature_that_its_metrics_tell_of(profile):
    plain, run = ensemble(profile), ensemble(profile, calibrate=True)
    assert run.metrics["evaluation"] == plain.metrics["evaluation"] and run.metrics["temperature"] != 1
    model, other = artefacts.load_model(run), artefacts.load_model(plain)
    assert (model.config.calibration_temperature, other.config.calibration_temperature) == (run.metrics["temperature"], 1.0)
    ids = torch.arange(5, 15)[None]
    softened = torch.log_softmax(other(ids).logits / run.metrics["temperature"], -1)
    assert torch.allclose(model(ids).logits, softened, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_member_may_be_a_folder_with_a_distributed_checkpoint(profile, tmp_path):
    one, other = MEMBERS[:2]
    trained = make(profile, **one["student"])
    shutil.copytree(trained.path / "model", tmp_path / "model", ignore=lambda *_: ["model.safetensors"])
    checkpoint.save({"model": artefacts.load_model(trained).state_dict(), "step": 3}, checkpoint_id=tmp_path / "model", no_dist=True)
    given = make(profile, "05_ensemble", members=[str(tmp_path / "model"), other], seeds=[1], student=CE)
    plain = make(profile, "05_ensemble", members=[one, other], seeds=[1], student=CE)
    assert given.id != plain.id and any(member.startswith("teacher-") for member in given.metrics["members"])
    for split, measured in plain.metrics["evaluation"].items():
        assert given.metrics["evaluation"][split]["nll"] == pytest.approx(measured["nll"], abs=1e-6)


def card_of(run):
    """Front matter, sections, and the block of Python of a run's model card."""
    _, front, text = (run.path / "model" / "README.md").read_text(encoding="utf-8").split("---\n")
    use, *sections = text.split("\n## ")[1:]
    found = {one.partition("\n")[0]: yaml.safe_load(one.partition("```yaml\n")[2].partition("```")[0]) for one in sections}
    return yaml.safe_load(front), found, use.partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("kind", ["ensemble", "student"])
def test_a_model_card_tells_what_the_run_measured_and_how_to_load_it(profile, kind, tmp_path):
    run = ensemble(profile, calibrate=True) if kind == "ensemble" else members_of(profile)[0]
    front, found, use = card_of(run)
    corpus, metrics = make(profile, "01_corpus").metrics["card"], run.metrics
    assert front["run"] == run.id and front["license"] == "other" and found["Settings"] == run.settings
    for split in ("test", "ood"):
        told, measured = found["Metrics"][split], metrics["evaluation"][split]
        shown = {name: told[name] for name in ("nll", "nll_calibrated", "accuracy", "ece", "ece_calibrated", "bits_per_byte", "tokens")}
        assert shown == {name: measured[name] for name in shown}
        assert found["Data"]["splits"][split]["documents"] == corpus["splits"][split]["documents"]
        low, high = told["nll_interval"]
        assert low < told["nll"] < high and told["accuracy_interval"][0] < told["accuracy"] < told["accuracy_interval"][1]
    assert found["Metrics"]["temperature"] == metrics["temperature"]
    assert found["Data"]["out_of_domain"] and set(found["Data"]["splits"]) == set(corpus["splits"])
    assert found["Versions"].keys() >= {"commit", "python", "torch", "transformers"}
    assert found["Licence"]["text"] == {name: one["licence"] for name, one in corpus["domains"].items()}
    if kind == "ensemble":
        assert found["Ensemble"]["members"] == metrics["members"]
        assert found["Ensemble"]["calibration_temperature"] == metrics["temperature"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", use], cwd=run.path / "model", env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.startswith("It was"), done.stderr


def test_the_interval_of_a_card_is_that_of_a_mean_over_sources():
    rng = np.random.default_rng(0)
    groups = pd.DataFrame({"domain": "talk", "source": np.arange(24) // 2})  # two documents a source, of one length
    tokens = pd.Series(np.full(24, 50))
    sums = tokens * rng.normal(3, 1, 24)
    means = sums.to_numpy().reshape(12, 2).sum(1) / 100
    expected = stats.t.interval(0.95, 11, means.mean(), stats.sem(means))
    assert interval(sums, tokens, groups) == pytest.approx(expected)
    # Domains that differ add nothing within which sources are alike, unless one has a source alone.
    apart = groups.assign(domain=np.where(groups.source < 6, "easy", "hard"))
    shifted = sums + tokens * np.where(apart.domain == "easy", 0, 5)
    low, high = interval(shifted, tokens, apart)
    assert high - low == pytest.approx(expected[1] - expected[0], rel=0.15)
    alone = apart.assign(domain=np.where(groups.source == 0, "easy", "hard"))
    assert np.diff(interval(shifted, tokens, alone)) > 2 * (high - low)
    assert np.isnan(interval(sums[:2], tokens[:2], groups[:2])).all()


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(1), 0
    for _ in range(300):
        sources = np.repeat(np.arange(20), rng.integers(1, 5, 20))
        tokens = pd.Series(rng.integers(40, 200, len(sources)))
        sums = tokens * (3 + rng.normal(0, 0.4, 20)[sources] + rng.normal(0, 0.2, len(sources)))
        low, high = interval(sums, tokens, pd.DataFrame({"domain": sources % 2, "source": sources}))
        held += low < 3 < high
    assert 270 <= held <= 297


def specialists(profile, **settings):
    return make(profile, "05_ensemble", method="cbtm", student=CE, seeds=[1, 2], **settings)


def test_specialists_are_routed_by_the_distance_to_their_clusters(profile):
    settings = {"exponent": 2, "temperature": 0.05}
    run, uniform = specialists(profile, combine={"distance": settings}), specialists(profile)
    assert run.metrics["members"] == uniform.metrics["members"] and run.id != uniform.id
    assert sorted(run.metrics["combine"]["clusters"].values()) == [0, 1]
    for number, place in run.metrics["combine"]["clusters"].items():
        settings_of = next(one for one in step_of(profile).inputs.values() if one.id == number).parameters
        assert settings_of.text["clustered"]["cluster"] == place
    pool = run.metrics["pool"]["test"]
    assert sum(pool["weights"]) == pytest.approx(1) and pool["weights"] != pytest.approx([0.5, 0.5], abs=1e-4)
    model = artefacts.load_model(run)
    assert (model.router.exponent, model.router.temperature) == (2, 0.05)
    kept = model.router.prefix.token_vectors
    assert len(kept) == model.config.vocab_size
    ids = torch.arange(5, 15)[None]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert written.shape[1] > 10
    level = specialists(profile, combine={"distance": {"temperature": 1e6}})
    assert level.metrics["evaluation"]["test"]["nll"] == pytest.approx(uniform.metrics["evaluation"]["test"]["nll"], abs=1e-5)


def step_of(profile):
    return step(profile, "05_ensemble", method="cbtm", student=CE, seeds=[1, 2])


def test_a_gate_is_made_with_the_members_own_clusters_or_those_that_are_named(profile):
    asked = {"share": 0.1, "learning_rate": 1e-2, "epochs": 8}
    run = specialists(profile, combine={"gate": asked})
    told = run.metrics["combine"]
    assert told["share_of_member"] <= 0.1 and told["kl"][-1] < told["kl"][0]
    assert run.metrics["work"]["train"]["flops"] > 0
    own = step(profile, "05_ensemble", method="cbtm", student=CE, seeds=[1, 2], combine={"gate": asked})
    assert own.id == run.id and own.inputs["clusters"].parameters.clusters == 2
    named = step(profile, "05_ensemble", seeds=[1, 2], combine={"gate": asked | {"clusters": {"clusters": {"clusters": 3}}}})
    assert named.inputs["clusters"].parameters.clusters == 3
    assert not {"clusters", "targets"} & set(named.settings["parameters"]["combine"]["gate"])
    drawn = {"targets": {"targets": {"draws": 8}}}
    other = step(profile, "05_ensemble", method="cbtm", student=CE, seeds=[1, 2], combine={"gate": asked | drawn})
    assert other.id != own.id and other.settings["parameters"] == own.settings["parameters"]
    assert artefacts.load_model(run).router.hidden.out_features == 32


@pytest.fixture
def clusters(profile, tmp_path):
    """What a run of clusters leaves."""
    vocabulary, generator = len(artefacts.load_tokenizer(make(profile, "01_corpus"))), torch.Generator().manual_seed(0)
    tensors = {"token_vectors": torch.randn(vocabulary, 8, generator=generator), "centroids": torch.randn(4, 8, generator=generator)}
    (tmp_path / "clusters").mkdir()
    save_file(tensors, tmp_path / "clusters" / "clusters.safetensors")
    return SimpleNamespace(path=tmp_path, tensors=tensors)


def gated(profile, clusters, **settings):
    members = members_of(profile)[:2]
    targets = make(profile, "03_targets")
    inputs = {"corpus": make(profile, "01_corpus"), "clusters": clusters, "targets": targets}
    how, loaded = Combine(gate=settings), [artefacts.load_model(one) for one in members]
    trained = [SimpleNamespace(id=one.id, metrics={"work": {"train": {"flops": 2e9}}}) for one in members]
    return combiners.by_gate(how, inputs, trained, loaded, train_split(profile), "float32"), loaded


def test_a_gate_learns_within_its_share_and_lowers_the_divergence_from_the_teacher(profile, clusters):
    found, loaded = gated(profile, clusters, epochs=3, share=0.05)
    told = found.metrics
    assert 0.025 < told["share_of_member"] <= 0.05 and told["tokens"] > 0
    assert found.work["train"]["flops"] == pytest.approx(told["share_of_member"] * 2e9)
    assert len(told["kl"]) == 4 and told["kl"][-1] < told["kl"][0]
    again, _ = gated(profile, clusters, epochs=3, share=0.05)
    pairs = zip(found.options["router"].parameters(), again.options["router"].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    model = EnsembleForCausalLM.from_members(loaded, **found.options)
    text = make(profile, "01_corpus")
    splits = {name: artefacts.splits(text)[name] for name in ("calibration", "test")}
    assert evaluate(model, splits, artefacts.block_length(text)).metrics["pool"]["test"]["weights"] != [0.5, 0.5]


def test_a_gate_that_its_share_does_not_pay_for_is_refused(profile, clusters):
    with pytest.raises(KdlibError, match="pay for one row"):
        gated(profile, clusters, share=1e-9)


def test_each_member_has_the_centroid_of_its_own_cluster(profile, clusters, monkeypatch):
    members = members_of(profile)
    numbers = dict(zip([one.id for one in members], (2, 0, 3), strict=True))
    planned = {f"member {n}": SimpleNamespace(id=one.id, parameters=SimpleNamespace(text=one.id)) for n, one in enumerate(members)}
    monkeypatch.setattr(combiners.text, "way", lambda asked: SimpleNamespace(cluster=numbers[asked]))
    how = Combine(distance={"exponent": 2, "top_k": 2})
    found = combiners.by_distance(how, SimpleNamespace(inputs=planned), {"clusters": clusters}, members)
    assert torch.equal(found.options["router"].centroids, clusters.tensors["centroids"][[2, 0, 3]])
    assert (found.options["router"].exponent, found.options["router"].top_k) == (2, 2)
    assert found.metrics["clusters"] == numbers
    order = [members[k] for k in (1, 2, 0)]
    other = combiners.by_distance(how, SimpleNamespace(inputs=planned), {"clusters": clusters}, order)
    assert torch.equal(other.options["router"].centroids, clusters.tensors["centroids"][[0, 3, 2]])
