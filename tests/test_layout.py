"""How per-channel arrays follow tensors, against brute force.

An array stands for the tensor it broadcasts to. So every function of the layout has a law that
needs no second implementation: spread the array over a tensor, let numpy move the tensor, and the
array that comes back must spread over just that.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfold.folding import layout
from bnfold.folding.affine import Array, canonical

FAST = settings(max_examples=150, deadline=None, derandomize=True)


def same(array: Array, tensor: Array) -> bool:
    """The array spreads over exactly this tensor (NaN equal to NaN)."""
    return array.ndim == tensor.ndim and np.array_equal(
        np.broadcast_to(array, tensor.shape), tensor, equal_nan=True
    )


# --- drawing shapes and arrays -------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn, max_rank: int = 4, sides: tuple[int, ...] = (1, 2, 3, 4)) -> list[int]:
    return draw(st.lists(st.sampled_from(sides), min_size=1, max_size=max_rank))


@st.composite
def arrays(draw: st.DrawFn, shape: list[int], *, partial: bool = True) -> Array:
    """An array against a tensor of this shape: constant along some axes, unknown on some channels.

    Few different numbers, so that channels often agree by chance.
    """
    along = [n if draw(st.booleans()) else 1 for n in shape]
    numbers = [1.0, 2.0, 3.0, math.nan] if partial else [1.0, 2.0, 3.0]
    flat = draw(
        st.lists(st.sampled_from(numbers), min_size=math.prod(along), max_size=math.prod(along))
    )
    return np.array(flat).reshape(along)


def spread(array: Array, shape: list[int]) -> Array:
    return np.broadcast_to(array, shape)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of as many elements: merged, split, with ones, and often a permutation."""
    before = draw(shapes())
    after = list(before)
    for _ in range(draw(st.integers(0, 3))):
        step = draw(st.sampled_from(["merge", "split", "one", "shuffle"]))
        at = draw(st.integers(0, max(len(after) - 1, 0)))
        if step == "merge" and at + 1 < len(after):
            after[at : at + 2] = [after[at] * after[at + 1]]
        elif step == "split" and after and after[at] % 2 == 0:
            after[at : at + 1] = [2, after[at] // 2]
        elif step == "one":
            after.insert(at, 1)
        elif step == "shuffle":
            after = list(draw(st.permutations(after)))
    return before, after


@st.composite
def hidden(draw: st.DrawFn, shape: list[int]) -> list[layout.Dim]:
    """The same shape with some extents unknown or named; one name never means two extents."""
    return [draw(st.sampled_from([n, n, None, f"size{n}"])) for n in shape]


# --- reshape -------------------------------------------------------------------------------------


@FAST
@given(st.data())
def test_reshape_of_known_extents_always_has_an_answer(data: st.DataObject) -> None:
    before, after = data.draw(reshapes())
    array = data.draw(arrays(before))
    result = layout.reshape(array, before, after)
    assert result is not None
    assert same(result, spread(array, before).reshape(after))


@FAST
@given(st.data())
def test_reshape_with_unknown_extents_is_right_or_says_nothing(data: st.DataObject) -> None:
    before, after = data.draw(reshapes())
    array = canonical(data.draw(arrays(before)))
    result = layout.reshape(array, data.draw(hidden(before)), data.draw(hidden(after)))
    if result is not None:
        assert same(result, spread(array, before).reshape(after))


@pytest.mark.parametrize(
    ("before", "after", "array", "expected"),
    [
        (["N", 4, 3, 3], ["N", 36], (1, 4, 1, 1), (1, 36)),  # Flatten with a free batch
        ([None, 4, 3, 3], [None, 36], (1, 4, 1, 1), (1, 36)),
        (["N", 5, 4], ["M", 4], (1, 1, 4), (1, 4)),  # tokens into the batch
        (["M", 4], ["N", 5, 4], (1, 4), (1, 1, 4)),
        (["N", 4, "H", "W"], ["N", 2, 2, "H", "W"], (1, 4, 1, 1), (1, 2, 2, 1, 1)),
        (["N", 1, 4], ["N", 4], (1, 1, 4), (1, 4)),
    ],
)
def test_reshape_passes_a_free_batch(
    before: list[layout.Dim],
    after: list[layout.Dim],
    array: tuple[int, ...],
    expected: tuple[int, ...],
) -> None:
    numbers = np.arange(math.prod(array), dtype=float).reshape(array)
    result = layout.reshape(numbers, before, after)
    assert result is not None
    assert result.shape == expected
    assert sorted(set(result.ravel())) == sorted(set(numbers.ravel()))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["N", 4, "L"], ["N", "L", 4]),  # no Transpose: channel and position are mixed
        (["N", 4], [4, "N"]),
        (["N", 4, 6], ["N", 6, 4, None]),
    ],
)
def test_reshape_that_mixes_channels_and_unknown_extents_passes_only_one_number(
    before: list[layout.Dim], after: list[layout.Dim]
) -> None:
    channels = np.arange(4.0).reshape([4 if dim == 4 else 1 for dim in before])
    assert layout.reshape(channels, before, after) is None
    one = layout.reshape(np.full((1,) * len(before), 7.0), before, after)
    assert one is not None
    assert one.shape == (1,) * len(after)


def test_reshape_of_a_square_mixes_channels_without_a_transpose() -> None:
    channels = np.arange(4.0).reshape(1, 4, 1)
    result = layout.reshape(channels, [4, 4, 2], [4, 2, 4])
    assert result is not None
    assert same(result, spread(channels, [4, 4, 2]).reshape(4, 2, 4))
    assert result.shape[1:] == (2, 4)


# --- transpose, broadcast ------------------------------------------------------------------------


@FAST
@given(st.data())
def test_transpose_and_its_inverse(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    array = data.draw(arrays(shape))
    perm = list(data.draw(st.permutations(range(len(shape)))))
    result = layout.transpose(array, perm)
    assert same(result, np.transpose(spread(array, shape), perm))
    assert same(layout.transpose(result, layout.inverse(perm)), spread(array, shape))


@FAST
@given(st.data())
def test_broadcast_and_unbroadcast(data: st.DataObject) -> None:
    result_shape = data.draw(shapes())
    cut = data.draw(st.integers(0, len(result_shape)))
    operand = [n if data.draw(st.booleans()) else 1 for n in result_shape[cut:]]
    array = data.draw(arrays(operand))
    ahead = layout.broadcast(array, len(result_shape))
    assert same(
        np.broadcast_to(ahead, result_shape), np.broadcast_to(spread(array, operand), result_shape)
    )

    wanted = canonical(data.draw(arrays(result_shape)))
    back = layout.unbroadcast(wanted, operand)
    missing = [*range(cut), *(cut + i for i, n in enumerate(operand) if n == 1)]
    if any(wanted.shape[axis] > 1 for axis in missing):
        assert back is None
    else:
        assert back is not None
        assert same(layout.broadcast(back, len(result_shape)), wanted)


def test_unbroadcast_to_an_unknown_extent_is_refused() -> None:
    assert layout.unbroadcast(np.arange(4.0).reshape(1, 4), ["N", None]) is None
    assert layout.unbroadcast(np.ones((1, 1)), ["N", None]) is not None


# --- take and put --------------------------------------------------------------------------------


@st.composite
def selections(draw: st.DrawFn, size: int) -> slice | list[int]:
    if draw(st.booleans()):
        return draw(st.slices(size))
    return draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=2 * size))


@FAST
@given(st.data())
def test_take_selects_as_numpy_does(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    axis = data.draw(st.integers(0, len(shape) - 1))
    index = data.draw(selections(shape[axis]))
    array = data.draw(arrays(shape))
    chosen = np.arange(shape[axis])[index]
    result = layout.take(array, index, axis)
    assert same(result, np.take(spread(array, shape), chosen, axis=axis))


@FAST
@given(st.data())
def test_put_is_undone_by_take_and_leaves_the_rest_unknown(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    axis = data.draw(st.integers(0, len(shape) - 1))
    index = data.draw(selections(shape[axis]))
    chosen = list(np.arange(shape[axis])[index])
    behind = [*shape[:axis], len(chosen), *shape[axis + 1 :]]
    if not chosen:
        return
    array = data.draw(arrays(behind))
    result = layout.put(array, index, axis, shape[axis])
    wanted = spread(array, behind)
    rows = np.moveaxis(wanted, axis, 0)
    copies = {int(i): [rows[k] for k, j in enumerate(chosen) if j == i] for i in chosen}
    pairs = [(row, group[0]) for group in copies.values() for row in group]
    if all(np.array_equal(row, first, equal_nan=True) for row, first in pairs):
        assert result is not None
    if any(np.any(~np.isnan(row) & ~np.isnan(first) & (row != first)) for row, first in pairs):
        assert result is None
    if result is None:
        return
    full = np.broadcast_to(result, shape)
    taken = np.take(full, chosen, axis=axis)
    assert np.array_equal(taken[~np.isnan(wanted)], wanted[~np.isnan(wanted)])
    others = [i for i in range(shape[axis]) if i not in copies]
    assert np.isnan(np.take(full, others, axis=axis)).all()


def test_put_refuses_two_numbers_for_one_channel() -> None:
    assert layout.put(np.array([[1.0, 2.0]]), [0, 0], 1, 3) is None
    assert layout.put(np.array([[1.0, 1.0]]), [0, 0], 1, 3) is not None


def test_put_into_an_unknown_extent_takes_only_one_known_number() -> None:
    assert layout.put(np.array([[2.0]]), [0], 1, "C") is not None
    assert layout.put(np.array([[1.0, 2.0]]), [0, 1], 1, "C") is None
    assert layout.put(np.array([[math.nan]]), [0], 1, None) is None


# --- depth and space -----------------------------------------------------------------------------


def depth_to_space(tensor: Array, block: int, mode: str) -> Array:
    """The operator itself, as its definition has it (ONNX operators, DepthToSpace)."""
    n, c, h, w = tensor.shape
    out = c // block**2
    if mode == "DCR":
        parts = tensor.reshape(n, block, block, out, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        parts = tensor.reshape(n, out, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, out, h * block, w * block)


@FAST
@given(st.data(), st.sampled_from(["DCR", "CRD"]))
def test_depth_to_space_gives_the_channel_where_its_parts_agree(
    data: st.DataObject, mode: str
) -> None:
    channels = 4 * data.draw(st.integers(1, 3))
    shape = [data.draw(st.integers(1, 2)), channels, 2, 2]
    # parts that agree by construction half of the time: a random array almost never does
    if data.draw(st.booleans()):
        inner = data.draw(arrays([1, channels // 4]))
        rows = np.broadcast_to(inner, (1, channels // 4)).ravel()
        flat = np.tile(rows, 4) if mode == "DCR" else np.repeat(rows, 4)
        array = flat.reshape(1, channels, 1, 1)
    else:
        array = data.draw(arrays(shape))
    tensor = depth_to_space(spread(array, shape), 2, mode)
    result = layout.depth_to_space(array, 2, mode)
    if result is not None and same_place(result, tensor):
        assert same(result, tensor)
    per_channel = canonical(tensor)
    if all(n == 1 for axis, n in enumerate(per_channel.shape) if axis != 1) and all(
        n == 1 for axis, n in enumerate(array.shape) if axis != 1
    ):
        assert result is not None


def same_place(array: Array, tensor: Array) -> bool:
    """The array can stand against this tensor at all; what cannot is refused where it is put."""
    return all(n in (1, m) for n, m in zip(array.shape, tensor.shape, strict=True))


@FAST
@given(st.data(), st.sampled_from(["DCR", "CRD"]))
def test_space_to_depth_undoes_depth_to_space(data: st.DataObject, mode: str) -> None:
    channels = data.draw(st.integers(1, 3))
    behind = [1, channels, 4, 4]
    array = data.draw(arrays([1, channels, 1, 1]))
    result = layout.space_to_depth(array, 2, mode)
    assert result is not None
    front = np.broadcast_to(result, [1, 4 * channels, 2, 2])
    assert same(array, depth_to_space(front, 2, mode)) or same(
        canonical(depth_to_space(front, 2, mode)), spread(array, behind)
    )


def test_arrays_that_vary_over_positions_do_not_pass_blocks() -> None:
    positions = np.arange(8.0).reshape(1, 4, 2, 1)
    assert layout.depth_to_space(positions, 2, "DCR") is None
    assert layout.space_to_depth(positions, 2, "DCR") is None
    assert layout.space_to_depth(np.arange(2.0).reshape(1, 1, 2, 1), 2, "DCR") is None


def test_constant_along_passes_only_what_is_constant() -> None:
    channels = np.arange(4.0).reshape(1, 4, 1, 1)
    assert layout.constant_along(channels, [2, 3]) is channels
    assert layout.constant_along(channels, [1]) is None
