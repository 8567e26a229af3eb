"""Runs that are trained packed: each as it would be alone, in weights, logs and checkpoints, killed and resumed either way."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_training import LOGGED, Interrupt, built, cache_of, logged, settings, token_weights, weights
from tiny import BLOCK, make_model, make_split

from kdlib.data.corpus import pack
from kdlib.data.text import TrainingText
from kdlib.errors import KdlibError
from kdlib.study.schedules import Schedule
from kdlib.training import Coupling, Distillation, DistillationTrainer, Objective, PackedTrainer, read_log
from kdlib.training.checkpoints import common_step, last_step, newest_checkpoint
from kdlib.training.log import StepLog
from kdlib.training.packed import unlike

pytestmark = pytest.mark.usefixtures("one_thread")

SPLIT, VALIDATION = make_split(documents=24), make_split("validation", seed=1, documents=4)
# Six batches and two steps an epoch, the second of two batches.
CHANGES = {"gradient_accumulation": 4, "learning_rate": 3e-3, "weight_decay": Schedule(shape="linear", start=0.3, end=0.1)}
BUILD = {"llama": lambda seed: built("llama", seed), "gpt2": lambda seed: built("gpt2", seed), "qwen3": lambda seed: built("qwen3", seed)}


def bag(seed):
    """A bootstrap sample of documents; the rows of the samples are of unequal number, their batches are not."""
    documents = np.random.default_rng(seed).choice(SPLIT.documents.document.to_numpy(), 30).tolist()
    index = pack(TrainingText(SPLIT, documents).windows(BLOCK), BLOCK)
    assert len(index) > 26
    return TrainingText(SPLIT, documents, token_weights(SPLIT) if seed == 2 else None), index[: 24 + seed % 3]


def run(folder, seed, model, targets=None, multipliers=None, objective=None, **changes):
    """A trainer on a bag of its own: of cross-entropy, or of distillation with a weight that is constant or moves."""
    weight = (0.0, 0.7, Schedule(shape="linear", start=1.0, end=0.2))[seed % 3]
    if objective is None:
        objective = Objective() if targets is None or seed % 3 == 0 else Objective([Distillation(weight)], targets)
    folder.mkdir(parents=True, exist_ok=True)
    validation = {"validation": VALIDATION, "validation_index": pack(VALIDATION.windows(BLOCK), BLOCK)}
    values = settings(**CHANGES | {"seed": seed} | changes)
    return DistillationTrainer(model, values, *bag(seed), folder, objective, multipliers, **validation)


def runs(folder, build=make_model, targets=None, seeds=(0, 1, 2), **changes):
    return [run(folder / str(seed), seed, build(seed), targets, **changes) for seed in seeds]


def alone(folder, *arguments, stop=None, **options):
    """As :func:`runs`, trained one after another, to the end or until the step after ``stop``."""
    found = runs(folder, *arguments, **options)
    for one in found:
        one.add_callback(Interrupt(stop))
        _fit(one, stop)
    return found


def packed(folder, *arguments, stop=None, readers=0, norms=None, **options):
    """As :func:`alone`, trained at once; ``norms`` takes the norms of the runs' gradients in each step."""
    found = runs(folder, *arguments, **options)
    trainer = PackedTrainer(found)
    trainer.args.dataloader_num_workers = readers
    trainer.add_callback(Interrupt(stop))
    if norms is not None:
        clip = trainer._clip_grad_norm
        trainer._clip_grad_norm = lambda model: (clip(model), norms.append(trainer._norms.tolist()))[0]
    _fit(trainer, stop)
    return found


def _fit(trainer, stop):
    if stop is None:
        trainer.fit()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()


def close(expected, found):
    """Weights or moments of one run, trained in two ways."""
    for name, value in expected.items():
        if name.endswith("c_attn.bias"):
            # A bias of keys moves all scores of a token alike: its gradient is 0, and AdamW makes steps of the rounding.
            value, other = (torch.cat([one.chunk(3)[0], one.chunk(3)[2]]) for one in (value, found[name]))
            torch.testing.assert_close(other, value, rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def agree(one, other):
    """Two trainers of one run, which was trained in two ways: weights and logs."""
    close(weights(one.model), weights(other.model))
    rows, others = (logged(trainer.step_log.path.parent) for trainer in (one, other))
    assert len(rows) == len(others) > one.steps
    for row, told in zip(rows, others, strict=True):
        for name, expected, found in zip(LOGGED, row, told, strict=True):
            assert (expected == "") == (found == ""), name
            assert expected == "" or float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-5), name


def saved(trainer, name):
    """A file of a trainer's newest checkpoint, read back."""
    path = newest_checkpoint(trainer.step_log.path.parent / "checkpoints") / name
    return json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else torch.load(path, weights_only=True)


# One by one and packed


@pytest.mark.parametrize("architecture", BUILD)
def test_packed_runs_end_as_they_would_alone(tmp_path, architecture):
    targets, norms = cache_of(tmp_path / "targets", make_model(7), SPLIT), []
    options = {"build": BUILD[architecture], "targets": targets, "epochs": 10}
    singles = alone(tmp_path / "alone", **options)
    members = packed(tmp_path / "packed", norms=norms, **options)
    assert len(norms) == 20 and max(map(max, norms)) > 1 > min(map(min, norms)), "some are clipped and some are not"
    for seed, (one, member) in enumerate(zip(singles, members, strict=True)):
        assert one.steps == 20
        start = weights(BUILD[architecture](seed))
        assert max((weights(one.model)[name] - start[name]).abs().max() for name in start) > 1e-2
        agree(one, member)
        left, expected = (saved(trainer, "optimizer.pt") for trainer in (member, one))
        assert left["param_groups"] == expected["param_groups"] and left["state"].keys() == expected["state"].keys()
        for number, state in expected["state"].items():
            names = dict(enumerate(name for group in (True, False) for name, value in one.model.named_parameters() if (value.ndim > 1) == group))
            assert state.keys() == left["state"][number].keys() and state["step"] == left["state"][number]["step"] == 20
            close({names[number]: state["exp_avg"]}, {names[number]: left["state"][number]["exp_avg"]})
            torch.testing.assert_close(left["state"][number]["exp_avg_sq"], state["exp_avg_sq"], rtol=1e-3, atol=1e-5)
        assert saved(member, "scheduler.pt") == saved(one, "scheduler.pt")
        told, known = (saved(trainer, "trainer_state.json") for trainer in (member, one))
        assert len(told.pop("log_history")) == len(known.pop("log_history")) == 20
        assert {name for name in known if told[name] != known[name]} <= {"total_flos", "stateful_callbacks"}
        sizes = [{path.name: path.stat().st_size for path in (trainer.step_log.path.parent / "checkpoints" / "checkpoint-20").iterdir()}
                 for trainer in (member, one)]  # fmt: skip
        assert sizes[0].keys() == sizes[1].keys() and sizes[0]["model.safetensors"] == sizes[1]["model.safetensors"]
        assert sizes[0]["optimizer.pt"] < 1.1 * sizes[1]["optimizer.pt"], "a part of the stacks, not all of them"


def test_whoever_trains_after_a_pack_finds_the_run_at_its_last_step(tmp_path):
    members = packed(tmp_path, epochs=2)
    again = runs(tmp_path, build=lambda seed: make_model(9), epochs=2)
    for member, one in zip(members, again, strict=True):
        about = one.fit()
        close(weights(member.model), weights(one.model))
        rows = read_log(one.step_log.path)
        assert about["steps"] == 4 == len([row for row in rows if row["loss"]]) and about["tokens"] == int(rows[-1]["tokens"]) > 0
    assert about["work"]["train"]["seconds"] < about["seconds"] < sum(float(read_log(one.step_log.path)[-1]["seconds"]) for one in members)


def test_a_run_of_large_gradients_changes_no_other(tmp_path):
    def wild(seed):
        model = make_model(seed)
        model.model.norm.weight.data *= 1 + 50 * seed
        return model

    norms = []
    calm = packed(tmp_path / "calm", seeds=(0, 1), epochs=2)
    beside = packed(tmp_path / "wild", build=wild, seeds=(0, 1), epochs=2, norms=norms)
    assert all(other > 10 * own for own, other in norms)
    close(weights(calm[0].model), weights(beside[0].model))


def test_rows_read_ahead_by_other_processes_are_the_same(tmp_path):
    targets = cache_of(tmp_path / "targets", make_model(7), SPLIT)
    for one, other in zip(*(packed(tmp_path / str(n), targets=targets, epochs=1.5, readers=n) for n in (0, 2)), strict=True):
        assert all(torch.equal(value, weights(other.model)[name]) for name, value in weights(one.model).items())


def test_with_a_compiler_the_packed_body_is_compiled(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch, "compile", lambda body, **_: compiled.append(body) or body)
    members = packed(tmp_path / "compiled", epochs=1, seeds=(0, 1), compile=True)
    assert [one.__name__ for one in compiled if hasattr(one, "__name__")] [:1] == ["hidden_of_each"]
    for one, member in zip(packed(tmp_path / "plain", epochs=1, seeds=(0, 1)), members, strict=True):
        close(weights(one.model), weights(member.model))


# Stopping and going on


@pytest.mark.parametrize("ways", [(packed, alone), (alone, packed), (packed, packed)], ids=lambda ways: " then ".join(way.__name__ for way in ways))
def test_what_was_killed_one_way_goes_on_the_other(tmp_path, ways):
    first, then = ways
    options = {"targets": cache_of(tmp_path / "targets", make_model(7), SPLIT), "epochs": 5}
    first(tmp_path / "killed", stop=7, **options)
    folders = [tmp_path / "killed" / str(seed) / "checkpoints" for seed in range(3)]
    assert [last_step(newest_checkpoint(folder)) for folder in folders] == [6, 6, 6]
    if first is then:  # killed while it saved: one run has its newest checkpoint already, another has half of it
        shutil.rmtree(folders[1] / "checkpoint-6")
        (folders[2] / "checkpoint-6" / "optimizer.pt").unlink()
        assert common_step(folders) == 4
    # A model that begins elsewhere shows that weights are read back.
    ended = then(tmp_path / "killed", build=lambda seed: make_model(seed + 10), **options)
    for one, other in zip(alone(tmp_path / "whole", **options), ended, strict=True):
        agree(one, other)


def test_runs_without_a_step_in_common_are_refused(tmp_path):
    alone(tmp_path, seeds=(0,), epochs=2)
    found = runs(tmp_path, epochs=2)
    assert common_step(one.args.output_dir and tmp_path / str(seed) / "checkpoints" for seed, one in enumerate(found)) is None
    with pytest.raises(KdlibError, match="must have a checkpoint of one step to go on packed"):
        PackedTrainer(found).fit()


def test_a_loss_that_is_no_number_is_that_of_its_run(tmp_path):
    found = runs(tmp_path, seeds=(0, 1), epochs=2)
    with torch.no_grad():
        found[1].model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(KdlibError, match="The loss became nan at step 1 of 4"):
        PackedTrainer(found).fit()


# What is not packed

UNLIKE = {
    "another learning_rate in run 1": {"learning_rate": 1e-3},
    "another weight_decay in run 1": {"weight_decay": 0.1},
    "another max_steps in run 1": {"epochs": 3},
    "another per_device_train_batch_size in run 1": {"batch_size": 8, "gradient_accumulation": 2},
    "learning-rate multipliers in run 1": {"multipliers": {"mlp": 0.5}},
    "a teacher in the loop in run 1": {"objective": Objective([Distillation(0.5)], make_model(3))},
    "a pool in run 1": {"objective": Objective((), None, Coupling(0.5, "logit", (make_model(3),)))},
    "dropout in run 1": {"model": make_model(1, dropout=0.1)},
    "another configuration in member 1": {"model": make_model(1, layers=2)},
}


@pytest.mark.parametrize("reason", UNLIKE)
def test_runs_that_are_not_alike_are_told_why(tmp_path, reason):
    first, options = run(tmp_path / "0", 0, make_model(0)), {"model": make_model(1)} | UNLIKE[reason]
    other = run(tmp_path / "1", 1, **options)
    assert unlike([first, other]).startswith(reason)
    with pytest.raises(KdlibError, match=f"must be alike to be trained packed, got {reason}"):
        PackedTrainer([first, other])


def test_runs_share_the_seconds_in_which_they_are_trained_at_once(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("kdlib.training.log.time.perf_counter", lambda: now[0])
    log = StepLog(tmp_path / "log.csv")
    log.resume(0)
    now[0] += 6
    assert log.seconds == 6
    log.sharing = 3
    log.write(1, 0.5, {"loss": 1.0})
    log.resume(1)
    now[0] += 3
    assert log.seconds == 2 + 1, "those before an interruption are in the log as they were shared"
