"""Schedules: exact endpoints, the shapes' own values, never outside their limits; stages that share out every step."""

import math
from itertools import pairwise
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from kdlib.errors import KdlibError
from kdlib.study.schedules import Schedule, Stage, as_schedule, scheduled, stage_ends

MOVING = ("linear", "cosine", "step")
numbers = st.floats(-1e6, 1e6)


@pytest.mark.parametrize("shape", MOVING)
@pytest.mark.parametrize("start, end", [(1, 0), (0, 1), (0.1, 0.3), (4.0, 1.0)])
def test_a_schedule_begins_at_start_and_arrives_at_end_exactly(shape, start, end):
    schedule = Schedule(shape=shape, start=start, end=end)
    assert (schedule.value(0), schedule.value(1)) == (start, end)
    assert not schedule.is_constant


@given(shape=st.sampled_from(MOVING), start=numbers, end=numbers, progress=st.floats(0, 1))
def test_no_rounding_leaves_the_limits(shape, start, end, progress):
    low, high = sorted((start, end))
    assert low <= Schedule(shape=shape, start=start, end=end).value(progress) <= high


@pytest.mark.parametrize("shape", MOVING)
def test_values_never_turn_back(shape):
    there = [Schedule(shape=shape, start=0, end=1).value(i / 1000) for i in range(1001)]
    back = [Schedule(shape=shape, start=1, end=0).value(i / 1000) for i in range(1001)]
    assert all(a <= b for a, b in pairwise(there))
    assert [1 - value for value in there] == pytest.approx(back, abs=1e-15), "the reverse is the mirror image"


def test_each_shape_takes_its_own_way():
    way = {shape: Schedule(shape=shape, start=2, end=4) for shape in MOVING}
    assert way["linear"].value(0.25) == 2.5
    assert way["cosine"].value(0.5) == pytest.approx(3, abs=1e-15)
    assert way["cosine"].value(0.25) == pytest.approx(3 - math.sqrt(0.5), abs=1e-15)
    assert way["cosine"].value(0.01) - 2 < 0.001, "flat at the ends"
    late = Schedule(shape="step", start=2, end=4, at=0.75)
    assert [late.value(progress) for progress in (0.5, math.nextafter(0.75, 0), 0.75)] == [2, 2, 4]


def test_a_number_is_a_constant_and_a_schedule_itself():
    constant = as_schedule(0.3)
    assert constant.is_constant and {constant.value(i / 7) for i in range(8)} == {0.3}
    moving = Schedule(shape="linear", start=1, end=0)
    assert as_schedule(moving) is moving
    flat = Schedule(shape="linear", start=0.37, end=0.37)
    assert flat.is_constant and {flat.value(i / 97) for i in range(98)} == {0.37}, "20/97 would round to 0.37 + 6e-17"


class Parameters(BaseModel):
    kd_weight: scheduled(Annotated[float, Field(ge=0, le=1)])


def test_as_a_parameter_it_is_a_number_or_a_mapping():
    assert Parameters(kd_weight=0.5).model_dump(mode="json") == {"kd_weight": 0.5}
    written = Parameters(kd_weight={"shape": "step", "start": 1, "end": 0}).model_dump(mode="json")
    assert written == {"kd_weight": {"shape": "step", "start": 1.0, "end": 0.0, "at": 0.5}}
    assert Parameters(**written).model_dump(mode="json") == written
    moving = Schedule(shape="linear", start=1, end=0)
    assert Parameters(kd_weight=moving).kd_weight is moving
    constant = as_schedule(0.5).model_dump()
    assert Schedule(**constant).model_dump() == constant


@pytest.mark.parametrize(
    "wrong, place",
    [
        (1.5, ("number",)),
        ("high", ("number",)),
        (None, ("number",)),
        ({"shape": "linear", "start": 1}, ("schedule", "end")),
        ({"shape": "spiral", "start": 1, "end": 0}, ("schedule", "shape")),
        ({}, ("schedule", "shape")),
    ],
)
def test_what_is_wrong_with_a_parameter_is_told_of_what_it_was_meant_to_be(wrong, place):
    with pytest.raises(ValidationError) as told:
        Parameters(kd_weight=wrong)
    assert {error["loc"][1] for error in told.value.errors()} == {place[0]}, "never of both"
    assert told.value.errors()[0]["loc"] == ("kd_weight", *place)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"shape": "linear", "start": 1}, "end"),
        ({"shape": "constant", "start": 1, "end": 0}, "cannot go from 1.0 to 0.0"),
        ({"shape": "linear", "start": 1, "end": 0, "at": 0.2}, "leave out at"),
        ({"shape": "step", "start": 1, "end": 0, "at": 1}, "less than 1"),
        ({"shape": "spiral", "start": 1, "end": 0}, "'cosine'"),
        ({"shape": "linear", "start": math.nan, "end": 0}, "finite"),
        ({"shape": "linear", "start": 1, "end": 0, "speed": 2}, "speed"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(wrong, told):
    with pytest.raises(ValidationError, match=told):
        Schedule(**wrong)


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_is_a_share(progress):
    with pytest.raises(KdlibError, match="from 0 to 1"):
        Schedule(shape="linear", start=1, end=0).value(progress)


def stages(*shares):
    return [Stage(share=share, learning_rate_multipliers={}) for share in shares]


@given(shares=st.lists(st.integers(1, 20), min_size=1, max_size=6), steps=st.integers(200, 5000))
def test_stages_share_out_every_step(shares, steps):
    total = sum(shares)
    ends = stage_ends(stages(*(share / total for share in shares)), steps)
    lengths = [end - begin for begin, end in pairwise([0, *ends])]
    assert ends[-1] == steps
    assert all(abs(length - steps * share / total) <= 1 + 1e-9 for length, share in zip(lengths, shares, strict=True))


def test_stages_are_cut_where_their_shares_say():
    assert stage_ends(stages(0.25, 0.75), 1000) == [250, 1000]
    assert stage_ends(stages(1), 7) == [7]


def test_stages_that_do_not_fit_are_refused():
    with pytest.raises(KdlibError, match="add up to 0.9"):
        stage_ends(stages(0.5, 0.4), 100)
    with pytest.raises(KdlibError, match="at least one step"):
        stage_ends(stages(0.01, 0.99), 10)
    with pytest.raises(KdlibError, match="add up to 0"):
        stage_ends([], 10)
    with pytest.raises(ValidationError):
        Stage(share=0.5, learning_rate_multipliers={"mlp": -1})
