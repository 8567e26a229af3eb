"""The layer maps, for every pair of depths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlib.errors import KdlibError
from kdlib.losses.layers import layer_map

depths = st.integers(1, 100)


def impossible(name, teacher, student, last_k=None):
    with pytest.raises(KdlibError, match="teacher and .* student layers|last_k|must be last, last_k"):
        layer_map(name, teacher, student, last_k)
    return True


@given(depths, depths)
def test_last_pairs_the_last_layers(teacher, student):
    assert layer_map("last", teacher, student) == [(student, (teacher,))]


@given(depths, depths, depths)
def test_last_k_pairs_the_last_k_layers_in_order_one_from_one(teacher, student, k):
    if k > min(teacher, student):
        assert impossible("last_k", teacher, student, k)
        return
    pairs = layer_map("last_k", teacher, student, k)
    assert [layer for layer, _ in pairs] == list(range(student - k + 1, student + 1))
    assert [layers for _, layers in pairs] == [(layer,) for layer in range(teacher - k + 1, teacher + 1)]
    assert pairs[-1:] == layer_map("last", teacher, student)


@given(depths, depths)
def test_all_is_the_identity_and_for_equal_depths_only(teacher, student):
    assert layer_map("all", student, student) == [(layer, (layer,)) for layer in range(1, student + 1)]
    assert teacher == student or impossible("all", teacher, student)


@given(depths, depths)
def test_uniform_consecutive_covers_every_teacher_layer_once_in_order_and_none_beyond(teacher, student):
    if student > teacher:
        assert impossible("uniform_consecutive", teacher, student)
        return
    pairs = layer_map("uniform_consecutive", teacher, student)
    assert [layer for layer, _ in pairs] == list(range(1, student + 1))
    assert [layer for _, layers in pairs for layer in layers] == list(range(1, teacher + 1))
    sizes = {len(layers) for _, layers in pairs}
    assert max(sizes) - min(sizes) <= 1


@given(depths, depths)
def test_uniform_last_pairs_each_layer_with_the_end_of_its_share_and_with_the_last(teacher, student):
    if student > teacher:
        assert impossible("uniform_last", teacher, student)
        return
    pairs = layer_map("uniform_last", teacher, student)
    shares = layer_map("uniform_consecutive", teacher, student)
    assert [(layer, {layers[-1], teacher}) for layer, layers in shares] == [
        (layer, {*layers}) for layer, layers in pairs
    ]
    assert all(len(layers) == 2 for _, layers in pairs[:-1])
    assert pairs[-1] == (student, (teacher,))


def test_the_maps_by_example():
    assert layer_map("last_k", 6, 4, last_k=2) == [(3, (5,)), (4, (6,))]
    assert layer_map("uniform_consecutive", 7, 3) == [(1, (1, 2)), (2, (3, 4)), (3, (5, 6, 7))]
    assert layer_map("uniform_last", 7, 3) == [(1, (2, 7)), (2, (4, 7)), (3, (7,))]


@pytest.mark.parametrize(
    "arguments",
    [
        ("first", 4, 2),
        ("last", 0, 2),
        ("last", 4, 0),
        ("last_k", 4, 2),
        ("last_k", 4, 2, 0),
        ("last", 4, 2, 1),
    ],
)
def test_a_map_that_does_not_exist_is_refused(arguments):
    assert impossible(*arguments)
