"""Independent members that differ in initialisation and in the order of rows, or in one of the two alone."""

import pytest
import torch
from test_training import same, weights
from tiny import BLOCK, make_model, make_split

from kdlib.data.text import TrainingText
from kdlib.errors import KdlibError
from kdlib.runs.make import make
from kdlib.study import profiles
from kdlib.study.plan import Planner
from kdlib.study.schedules import Stage
from kdlib.training import DistillationTrainer, train_model

# A rate that no other test has, so that these runs are made here.
STUDENT = {"objective": "ce", "learning_rate": 0.0049, "noise": 0.05}


def members(vary, seeds=(1, 2), profile="smoke", **student):
    return Planner(profile).members("independent", list(seeds), STUDENT | student, vary=vary)


@pytest.fixture
def watched(monkeypatch):
    """What trainers began with, and the batches they took, one entry a trainer."""
    seen = []

    class Watched(DistillationTrainer):
        def fit(self):
            seen.append({"weights": weights(self.model), "training": self.model.training, "batches": [], "seed": self.args.data_seed})
            return super().fit()

        def compute_loss(self, model, inputs, **options):
            seen[-1]["batches"].append(inputs["input_ids"].clone())
            return super().compute_loss(model, inputs, **options)

    monkeypatch.setattr("kdlib.training.stages.DistillationTrainer", Watched)
    return seen


def alike(one, other):
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_one_alone_differs_in_what_members_began_with_and_the_batches_they_took(profile, watched):
    found = {}
    for one in (*members("initialisation", profile=profile), *members("order", profile=profile)):
        if one.id not in found:
            make(one)
            found[one.id] = watched.pop()
    first, other = (found[one.id] for one in members("initialisation", profile=profile))
    assert alike(first["batches"], other["batches"]) and len(first["batches"]) > 4
    assert [name for name in first["weights"] if torch.equal(first["weights"][name], other["weights"][name])] == [
        name for name in first["weights"] if first["weights"][name].ndim < 2
    ]
    first, other = (found[one.id] for one in members("order", profile=profile))
    assert same(first["weights"], other["weights"])
    assert not torch.equal(first["batches"][0], other["batches"][0])


def test_both_is_the_default_and_the_first_member_is_the_same_in_every_way():
    plan = Planner("smoke")
    both = [plan.student(**STUDENT, seed=seed).id for seed in (1, 2)]
    assert [one.id for one in members("both")] == [one.id for one in plan.members("independent", [1, 2], STUDENT)] == both
    assert {members(vary)[0].id for vary in ("both", "initialisation", "order")} == {both[0]}
    assert len({members(vary)[1].id for vary in ("both", "initialisation", "order")}) == 3
    assert [(one.parameters.seed, one.parameters.data_seed) for one in members("initialisation", (3, 5))] == [(3, 3), (5, 3)]
    assert [(one.parameters.seed, one.parameters.data_seed) for one in members("order", (3, 5))] == [(3, 3), (3, 5)]
    assert [one.label for one in members("order")] == ["student ce seed 1", "student ce seed 1, data seed 2"]


def test_what_cannot_be_varied_is_refused():
    with pytest.raises(KdlibError, match="Options of method independent must be among vary, got vary: .*'order'.*got 'noise'"):
        members("noise")
    with pytest.raises(KdlibError, match="data_seed of student must be left out with vary=order, got 7"):
        members("order", data_seed=7)
    assert [one.parameters.order_seed for one in members("both", data_seed=7)] == [7, 7]


def trained(folder, stages=(), **changes):
    values = profiles.parameters("04_student", "smoke", **{"objective": "ce", "batch_size": 4, "epochs": 3, "seed": 3} | changes)
    folder.mkdir()
    model, text = make_model(0), TrainingText(make_split(documents=20))
    train_model(model, values, text, make_split("validation", seed=1, documents=4), BLOCK, folder, stages=stages)
    return weights(model)


def test_the_seed_as_data_seed_trains_as_none_does_and_another_does_not(tmp_path, watched):
    plain = trained(tmp_path / "plain")
    assert same(plain, trained(tmp_path / "seed", data_seed=3))
    assert not same(plain, trained(tmp_path / "other", data_seed=4))
    # The order is the data seed's whatever the seed, epoch for epoch.
    assert same(plain, trained(tmp_path / "apart", seed=9, data_seed=3))
    assert alike(watched[0]["batches"], watched[3]["batches"]) and not alike(watched[0]["batches"], watched[2]["batches"])
    # That of an epoch is drawn with the data seed plus its number.
    epoch = len(watched[0]["batches"]) // 3
    assert alike(watched[0]["batches"][epoch:], watched[2]["batches"][: 2 * epoch])


def test_each_stage_has_an_order_of_its_own_from_the_data_seed_on(tmp_path, watched):
    stages = [Stage(share=0.5, learning_rate_multipliers={}) for _ in range(2)]
    trained(tmp_path / "plain", stages)
    trained(tmp_path / "apart", stages, data_seed=7)
    assert [one["seed"] for one in watched] == [3, 4, 7, 8]
    assert not alike(watched[2]["batches"], watched[3]["batches"])
