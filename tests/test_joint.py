"""Members that are trained together: independent without coupling, resumed bit for bit, counted operation by operation."""

import signal

import numpy as np
import pytest
import torch
from test_counting import in_training, masked, whole_windows
from test_training import cache_of, interrupted, logged, make_trainer, same, trained, weights
from tiny import BLOCK, die_at, exit_code, make_model, make_split

from kdlib import models
from kdlib.cache import Kind, ModelTeacher, TargetCache, write_targets
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.evaluation.metrics import evaluate
from kdlib.training import (
    Coupling,
    Distillation,
    DistillationTrainer,
    JointTrainer,
    Objective,
    newest_checkpoint,
    parameter_groups,
    read_log,
)

CHANGES = {"epochs": 3, "gradient_accumulation": 2}


class Joint(JointTrainer):
    """As the trainers of other tests are made: with the coupling among the options."""

    def __init__(self, *arguments, coupling=0.0, pool="logit", **options):
        *given, objective = arguments
        terms, targets = [objective.distillation], objective.targets or objective.teacher
        super().__init__(*given, Objective(terms, targets, Coupling(coupling, pool)), **options)


def ensemble(count=2, dropout=0.0, unlike=False):
    members = [make_model(seed, dropout, layers=1 + unlike * seed) for seed in range(count)]
    return EnsembleForCausalLM.from_members(members)


def jointly(coupling, pool="logit"):
    def kind(*arguments, **options):
        return Joint(*arguments, coupling=coupling, pool=pool, **options)

    return kind


# Without coupling


@pytest.mark.parametrize("signal_", ["none", "sparse", "online"])
def test_members_without_coupling_end_as_they_would_alone_on_the_same_rows(tmp_path, signal_):
    split = make_split(documents=20)
    given = {"none": {}, "online": {"teacher": make_model(7, layers=2), "kd_weight": 0.6}}
    given["sparse"] = {"targets": cache_of(tmp_path / "targets", make_model(7), split), "kd_weight": 0.6}
    options = {"split": split, "changes": CHANGES, "multipliers": {"mlp": 0.5}} | given[signal_]
    clipped = []

    class Watched(Joint):
        def _clip_grad_norm(self, model):
            clipped.append([torch.cat([p.grad.flatten() for p in one.parameters()]).norm().item() for one in model.members])
            return super()._clip_grad_norm(model)

    _, together = trained(tmp_path / "joint", ensemble(3, unlike=True), kind=Watched, **options)
    assert together.steps == 12 == len(clipped)
    assert any(max(norms) > 1 for norms in clipped) and all(len(set(norms)) == 3 for norms in clipped), "some are clipped, each by its own norm"
    losses = []
    for seed, member in enumerate(together.model.members):
        alone, trainer = trained(tmp_path / f"alone-{seed}", make_model(seed, layers=1 + seed), **options)
        start = weights(make_model(seed, layers=1 + seed))
        for name, value in alone.items():
            torch.testing.assert_close(member.state_dict()[name], value, rtol=0, atol=1e-5)
        assert max((alone[name] - start[name]).abs().max() for name in alone) > 1e-2
        losses.append([float(row["loss"]) for row in read_log(trainer.step_log.path) if row["loss"]])
    found = [float(row["loss"]) for row in read_log(together.step_log.path) if row["loss"]]
    np.testing.assert_allclose(found, np.mean(losses, axis=0), rtol=1e-4)


def test_a_coupling_pulls_members_apart_or_leaves_it_to_their_pool(tmp_path):
    split, found = make_split(documents=20), {}
    for coupling in (0.0, 0.9, 1.0):
        _, trainer = trained(tmp_path / str(coupling), ensemble(), split=split, changes={"epochs": 6}, kind=jointly(coupling))
        texts = {"train": split}
        found[coupling] = evaluate(list(trainer.model.members), texts, BLOCK, "logit", temperature=1.0).metrics["pool"]["train"]["ambiguity_logit"]
    assert found[0.0] < found[0.9] and found[0.0] < found[1.0]


@pytest.mark.parametrize("pool", ["logit", "probability"])
def test_validation_is_of_the_pool(tmp_path, pool):
    model = ensemble()
    trainer = make_trainer(tmp_path, model, kind=jointly(0.5, pool))
    split, index = trainer.validation
    trainer.evaluate()
    told = float(read_log(trainer.step_log.path)[-1]["validation_nll"])
    model.config.pool = pool
    rows = split.tokens[np.maximum(index, 0)]
    total = count = 0
    for row, places in zip(rows, index, strict=True):
        begins = [0, *(np.flatnonzero(places[1:] != places[:-1] + 1) + 1), len(places)]
        for begin, end in zip(begins, begins[1:], strict=False):
            if places[begin] < 0:
                continue
            with torch.no_grad():
                log_p = model(torch.from_numpy(row[begin:end].astype(np.int64))[None]).logits[0]
            labels = torch.from_numpy(split.tokens[places[begin:end] + 1].astype(np.int64))
            total, count = total - log_p.gather(1, labels[:, None]).sum().item(), count + end - begin
    assert told == pytest.approx(total / count, rel=1e-5)


# Stopping and going on


def test_members_interrupted_go_on_to_the_same_weights_and_log(tmp_path):
    split = make_split(documents=20)
    options = {"split": split, "targets": cache_of(tmp_path / "targets", make_model(7), split), "kd_weight": 0.9, "changes": CHANGES}
    options |= {"kind": jointly(0.5)}
    whole, _ = trained(tmp_path / "whole", ensemble(dropout=0.3), **options)
    for step in (1, 7, 11):
        interrupted(tmp_path / str(step), step, ensemble(dropout=0.3), **options)
        resumed, _ = trained(tmp_path / str(step), ensemble(dropout=0.3), **options)
        assert same(whole, resumed) and logged(tmp_path / str(step)) == logged(tmp_path / "whole")


def test_members_that_had_finished_are_read_back(tmp_path):
    whole, trainer = trained(tmp_path, ensemble(), kind=jointly(0.5), changes=CHANGES)
    log = trainer.step_log.path.read_bytes()
    fresh = EnsembleForCausalLM.from_members([make_model(5), make_model(6)])
    resumed, again = trained(tmp_path, fresh, kind=jointly(0.5), changes=CHANGES)
    assert same(whole, resumed) and again.step_log.path.read_bytes() == log


def _train_and_die(folder, event):
    split = make_split(documents=20)
    targets = TargetCache(folder.parent / "targets", {}, 1.0)
    if event:
        die_at(event, folder)
    options = {"split": split, "targets": targets, "kd_weight": 0.9, "changes": CHANGES}
    after, _ = trained(folder, ensemble(dropout=0.3), kind=jointly(0.5, "probability"), **options)
    torch.save(after, folder.parent / f"{folder.name}.pt")


@pytest.mark.slow
def test_members_killed_while_they_train_end_with_the_weights_of_those_that_were_not(tmp_path):
    cache_of(tmp_path / "targets", make_model(7), make_split(documents=20))
    assert exit_code(_train_and_die, tmp_path / "whole", 0) == 0
    for event in (25, 40):
        assert exit_code(_train_and_die, tmp_path / "killed", event) == -signal.SIGKILL
    assert newest_checkpoint(tmp_path / "killed" / "checkpoints") is not None
    assert exit_code(_train_and_die, tmp_path / "killed", 0) == 0
    assert same(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "killed.pt"))
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")


# What it takes


@pytest.mark.parametrize("coupling", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("given", ["none", "dense", "online"])
def test_members_take_what_each_takes_alone_and_one_teacher(tmp_path, given, coupling):
    split, teacher = whole_windows(8), make_model(7, layers=2)
    if given == "dense":
        write_targets(tmp_path / "targets", ModelTeacher(teacher), split, {}, Kind("dense"), block_length=BLOCK)
    taught = {"none": None, "online": teacher}[given] if given != "dense" else TargetCache(tmp_path / "targets", {}, 1.0)
    terms = [] if taught is None else [Distillation(0.5)]
    model = ensemble(unlike=True)
    objective = Objective(terms, taught, Coupling(coupling, "probability"))
    training, seen = in_training(tmp_path, model, split, objective=objective, kind=JointTrainer)
    counted, asked, work = models.operations(model), models.operations(teacher), training["work"]
    validations = [row for row in read_log(tmp_path / "log.csv") if row["validation_seconds"]]
    square = masked(counted, 3 * 16) + len(validations) * masked(counted, 1) + (masked(asked, 16) if given == "online" else 0)
    assert sum(one["flops"] for one in work.values()) + square == seen
    extent = models.extent([BLOCK] * 16)
    assert work["train"]["flops"] == sum(
        models.operations(one).forward(*extent) + models.operations(one).backward(*extent) for one in model.members
    )
    once = {"none": 0, "dense": 16 * BLOCK * asked.head, "online": asked.forward(*extent)}
    assert work["teacher_forward"]["flops"] == once[given]
    assert training["tokens"] == 2 * 8 * BLOCK


@pytest.mark.parametrize("pool", ["logit", "probability"])
def test_a_student_beside_others_takes_one_pass_of_each_of_them(tmp_path, pool):
    split, others = whole_windows(8), (make_model(3, layers=2), make_model(4))
    before = [weights(one) for one in others]
    objective = Objective((), None, Coupling(1.0, pool, others))
    training, seen = in_training(tmp_path, split=split, objective=objective)
    student, frozen = models.operations(make_model(0)), sum(map(models.operations, others), models.Operations())
    validations = [row for row in read_log(tmp_path / "log.csv") if row["validation_seconds"]]
    square = masked(student, 3 * 16) + len(validations) * masked(student, 1)
    # Nothing of them is trained, so what is counted of them now is a forward pass alone.
    assert sum(one["flops"] for one in training["work"].values()) + square + masked(frozen, 16) == seen
    extent = models.extent([BLOCK] * 16)
    alone = student.forward(*extent) + student.backward(*extent)
    assert training["work"]["train"]["flops"] == alone + frozen.forward(*extent) == training["flops"]
    assert all(same(one, weights(model)) for one, model in zip(before, others, strict=True))


def test_a_student_beside_others_learns_what_their_pool_lacks(tmp_path):
    split, other = make_split(documents=20), make_model(3)
    found = {}
    for coupling in (None, Coupling(1.0, "logit", (other,))):
        model, text = make_model(0), {"split": split, "changes": {"epochs": 6}, "validation": False}

        def kind(*arguments, coupling=coupling, **options):
            *given, _ = arguments
            return DistillationTrainer(*given, Objective((), None, coupling), **options)

        trained(tmp_path / str(coupling is None), model, kind=kind, **text)
        pool = EnsembleForCausalLM.from_members([model.eval(), other], "logit")
        found[coupling is None] = evaluate(pool, {"train": split}, BLOCK, temperature=1.0).metrics["evaluation"]["train"]["nll"]
    assert found[False] < found[True] - 0.05, "the pool is better where the student was trained for it"


# What is refused


def test_what_cannot_be_trained_together_is_refused(tmp_path):
    with pytest.raises(KdlibError, match="must have a coupling in their objective, got none"):
        make_trainer(tmp_path, ensemble(), kind=JointTrainer)
    with pytest.raises(KdlibError, match="must have forward_kl and no features, got jsd"):
        Objective([Distillation(0.5, divergence="jsd")], make_model(1), Coupling(0.5, "logit"))
    with pytest.raises(KdlibError, match=r"must share one vocabulary.*'student': 29, 'teacher': 31"):
        make_trainer(tmp_path, ensemble(), kind=jointly(0.5), teacher=make_model(1, vocabulary=31), kd_weight=0.5)
    strange = Objective((), None, Coupling(0.5, "logit", (make_model(1, vocabulary=31),)))
    with pytest.raises(KdlibError, match=r"must share one vocabulary.*'student': 29, 'beside 1': 31"):
        in_training(tmp_path, objective=strange)
    trainer = make_trainer(tmp_path, ensemble(), kind=jointly(0.5))
    assert len(trainer._groups()) == 2 * len(parameter_groups(make_model(0), {}, 1.0, 0.1))
