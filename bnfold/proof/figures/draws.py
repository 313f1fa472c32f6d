"""The inputs that a verification compares on: the caller's, or drawn ones.

Drawn inputs are normal with the size that the network was trained for, read off its first batch
normalization; then zeros and constants, ten times the size, a batch of one, and another size of
every dynamic axis. The seed fixes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bnfold.errors import InputError, NothingComparedError, UsageError
from bnfold.proof.exact.counterpart import View, replaceable_inputs
from bnfold.proof.exact.reference import Float64Reference, NoReferenceError

Array = np.ndarray[Any, np.dtype[Any]]

BATCH_ELEMENTS = 1 << 18  # elements of an input that are run at a time: activations are larger
BATCH_ROWS = 4  # but never fewer rows than this
IMPLIED_SCALES = (1e-3, 1e3)  # outside: the first normalization says nothing about the input
PIXELS = 256
SINGLE_ROWS = 4  # of given inputs, run one by one besides
FLAT_ROWS = 4  # of zeros and constants, half of them for large inputs
NEAR_ZERO = 1e-3  # of the input's size: beside exact zeros
SMALL_INPUT = 1 << 14  # elements of a row, up to which many rows cost little


@dataclass(frozen=True, eq=False)
class InputSet:
    """Batches of one kind of input: each maps the model's input names to arrays.

    optional: of sizes that the original may refuse, which is then no failure. repeated: rows of
    the last batch that an earlier one has, too.
    """

    name: str
    batches: tuple[Mapping[str, Array], ...]
    optional: bool = False
    repeated: int = 0

    @property
    def samples(self) -> int:
        """Rows of the first input over all batches (1 for an input without axes)."""
        return sum(rows_of(next(iter(batch.values()))) for batch in self.batches) - self.repeated


def rows_of(array: Array) -> int:
    """How many rows an array has; 1 where it has no axes."""
    return int(array.shape[0]) if array.ndim else 1


@dataclass(frozen=True)
class InputSpec:
    """An input of the model: its numpy dtype, and its dims, None where they are dynamic.

    dims is None where the model does not even say how many axes there are. symbols: what a dynamic
    axis is called; axes of one name have one size.
    """

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | None, ...] | None
    symbols: tuple[str, ...] = ()


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """The inputs that a caller has to give. Raises InputError for one that is no tensor."""
    given = {tensor.name for tensor in model.graph.initializer}
    specs = []
    for value in model.graph.input:
        if value.name in given:
            continue
        if not value.type.HasField("tensor_type"):
            raise InputError(f"the input '{value.name}' is no tensor; it cannot be drawn.")
        tensor = value.type.tensor_type
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        dims = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
        symbols = tuple(
            dim.dim_param or f"{value.name}.{axis}" for axis, dim in enumerate(tensor.shape.dim)
        )
        known = dims if tensor.HasField("shape") else None
        specs.append(InputSpec(value.name, dtype, known, symbols))
    return specs


def input_sets(
    model: onnx.ModelProto,
    reference: Float64Reference | None,
    *,
    seed: int,
    samples: int | None,
    input_shapes: Mapping[str, Sequence[int]] | None,
    inputs: Mapping[str, Array] | None,
    few: Callable[[Sequence[InputSet]], bool],
) -> list[InputSet]:
    """The caller's inputs, with normal draws besides where they are `few`; else draws alone."""
    if seed < 0:
        raise UsageError(f"the seed is {seed}; it must be 0 or more.")
    sets = [] if inputs is None else given_inputs(model, inputs)
    if inputs is not None and not few(sets):
        return sets
    shapes = dict(input_shapes or {})
    shapes |= {name: np.shape(value) for name, value in (inputs or {}).items()}
    drawn = drawn_inputs(model, reference, seed=seed, samples=samples, input_shapes=shapes)
    return drawn if inputs is None else [*sets, drawn[0]]


# ------------------------------------------------------------------------------- given inputs


def given_inputs(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[InputSet]:
    """The caller's arrays in batches that the model takes, and their first rows one by one.

    Raises InputError for names, ranks or sizes that do not fit, NothingComparedError for no rows.
    """
    specs = input_specs(model)
    names = [spec.name for spec in specs]
    if set(names) != set(inputs):
        raise InputError(
            f"the model's inputs are {', '.join(names)}; values were given for "
            f"{', '.join(inputs) or 'none'}."
        )
    arrays = {spec.name: _fitting(spec, inputs[spec.name]) for spec in specs}
    rows = {rows_of(array) for array in arrays.values()}
    if len(rows) != 1:
        raise InputError(f"the inputs have different numbers of rows: {sorted(rows)}.")
    total = rows.pop()
    if total == 0:
        raise NothingComparedError("the given inputs have no rows, so nothing can be compared.")
    sizes = {spec.dims[0] for spec in specs if spec.dims and spec.dims[0] is not None}
    if not sizes:
        largest = max(math.prod(array.shape[1:]) for array in arrays.values())
        size = max(BATCH_ROWS, BATCH_ELEMENTS // max(largest, 1))
        sets = [InputSet("given", _split(arrays, size, total))]
        if total > 1:
            sets.append(InputSet("one row", _split(arrays, 1, min(total, SINGLE_ROWS))))
        return sets
    size = max(sizes)
    if len(sizes) > 1 or size > total:
        raise InputError(f"the model takes batches of {sorted(sizes)}; {total} rows were given.")
    batches = _split(arrays, size, total - total % size)
    if total % size:  # the last rows, some of them once more
        rest = {name: np.ascontiguousarray(array[-size:]) for name, array in arrays.items()}
        batches = (*batches, rest)
    return [InputSet("given", batches, repeated=-total % size)]


def _fitting(spec: InputSpec, value: Array) -> Array:
    array = np.asarray(value)
    if spec.dims is None:
        return _typed(spec, array)
    if array.ndim != len(spec.dims):
        raise InputError(
            f"the input '{spec.name}' has {len(spec.dims)} axes {_shown(spec)}; the given array "
            f"has shape {array.shape}."
        )
    wrong = [
        axis
        for axis, (size, dim) in enumerate(zip(array.shape, spec.dims, strict=True))
        if axis > 0 and dim is not None and size != dim
    ]
    if wrong:
        raise InputError(
            f"the input '{spec.name}' has shape {_shown(spec)}; the given array has {array.shape}."
        )
    return _typed(spec, array)


def _typed(spec: InputSpec, array: Array) -> Array:
    """The array in the input's own type. Raises InputError where numbers would be lost."""
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise InputError(
            f"the input '{spec.name}' holds {spec.dtype}; the given array holds {array.dtype}."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(
            f"the values given for the input '{spec.name}' are not all finite: what a network "
            f"makes of NaN or infinity proves nothing about it."
        )
    with np.errstate(all="ignore"):
        typed = array.astype(spec.dtype, copy=False)
        back = typed.astype(array.dtype, copy=False)
        if spec.dtype.kind in "biu":
            lost = not np.array_equal(back, array)
        else:
            lost = bool(np.any(np.isinf(typed) & np.isfinite(array)))
    if lost:
        raise InputError(
            f"the input '{spec.name}' holds {spec.dtype}; the given array has numbers that are "
            f"none of that type, such as {array.flat[_first_lost(array, back)]}."
        )
    return typed


def _first_lost(array: Array, back: Array) -> int:
    return int(np.argmax((array != back).ravel()))


def _shown(spec: InputSpec) -> str:
    if spec.dims is None:
        return "of any shape"
    return "(" + ", ".join("any" if dim is None else str(dim) for dim in spec.dims) + ")"


def _split(arrays: Mapping[str, Array], size: int, total: int) -> tuple[dict[str, Array], ...]:
    return tuple(
        {name: np.ascontiguousarray(array[first : first + size]) for name, array in arrays.items()}
        if all(array.ndim for array in arrays.values())
        else dict(arrays)
        for first in range(0, total, size)
    )


# ------------------------------------------------------------------------------- drawn inputs


def drawn_inputs(
    model: onnx.ModelProto,
    reference: Float64Reference | None,
    *,
    seed: int,
    samples: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[InputSet]:
    """Normal draws, zeros, a constant, ten times the size, a single row.

    samples: rows of the normal draws (default: 16, fewer for large inputs). input_shapes: sizes
    for dynamic axes (default 224 for images, 32 for volumes, 64 for sequences).
    """
    specs = input_specs(model)
    if not specs:
        return [InputSet("no input", ({},))]
    shapes = {spec.name: _shape(spec, (input_shapes or {}).get(spec.name)) for spec in specs}
    any_batch = all(spec.dims and spec.dims[0] is None for spec in specs)
    largest = max(math.prod(shape) for shape in shapes.values())
    count = samples if samples is not None else _default_samples(largest)
    if count < 1:
        raise NothingComparedError("no samples were asked for, so nothing can be compared.")
    rng = np.random.default_rng(seed)
    bounds = {spec.name: _bound(model, spec) for spec in specs}

    def draw(rows: int, kind: str, scale: float) -> dict[str, Array]:
        sizes = {name: (rows, *shape[1:]) if any_batch else shape for name, shape in shapes.items()}
        return {s.name: _draw(s, sizes[s.name], kind, scale, bounds[s.name], rng) for s in specs}

    scale = _implied_scale(model, reference, draw(1, "normal", 1.0))
    if any_batch:
        rows = min(count, max(BATCH_ROWS, BATCH_ELEMENTS // max(largest, 1)))
        parts = [min(rows, count - first) for first in range(0, count, rows)]
        normal = tuple(draw(part, "normal", scale) for part in parts)
    else:
        normal = tuple(draw(1, "normal", scale) for _ in range(count))
    sets = [InputSet("normal", normal)]
    if any_batch and count > 1:
        sets.append(InputSet("one row", ({n: a[:1].copy() for n, a in normal[0].items()},)))
    rows = FLAT_ROWS if largest <= SMALL_INPUT else FLAT_ROWS // 2
    flat = _Flat(specs, shapes, bounds, np.random.default_rng([seed, 1]))
    for name, level, spread in (("zeros", 0.0, NEAR_ZERO * scale), ("constant", scale, scale)):
        batches = (
            [flat.batch(rows, level, spread)]
            if any_batch
            else [flat.batch(0, None if at else level, spread) for at in range(rows)]
        )
        sets.append(InputSet(name, tuple(batches)))
    again = max(1, count // 2) if largest <= SMALL_INPUT else 1
    large = draw(again, "normal", 10 * scale) if any_batch else None
    tens = [large] if large else [draw(1, "normal", 10 * scale) for _ in range(again)]
    sets.append(InputSet("ten times", tuple(tens)))
    others = _other_sizes(specs, shapes)
    resized = [(f"{symbol} = {size}", {symbol: size}) for symbol, size in others.items()]
    if others:  # where a window or a stride does not fit
        resized.append(
            ("odd sizes", {symbol: size + 1 - size % 2 for symbol, size in others.items()})
        )
    for name, sizes in resized:
        other = {spec.name: _resized(spec, shapes[spec.name], sizes) for spec in specs}
        feeds = {s.name: _draw(s, other[s.name], "normal", scale, bounds[s.name], rng)
                 for s in specs}  # fmt: skip
        sets.append(InputSet(name, (feeds,), optional=True))
    return sets


@dataclass(frozen=True)
class _Flat:
    """Inputs that are one number on each channel.

    There every position rounds alike, nothing averages out, and a network's error is a single draw:
    on zeros alone it can come out ten times better or worse than beside them. So an exact level
    comes with neighbours.
    """

    specs: Sequence[InputSpec]
    shapes: Mapping[str, tuple[int, ...]]
    bounds: Mapping[str, int]
    rng: np.random.Generator

    def batch(self, rows: int, level: float | None, spread: float) -> dict[str, Array]:
        """Rows of normal numbers times `spread`, the first one the level itself, if any.

        rows: 0 for as many as the model's fixed batch has.
        """
        return {spec.name: self._draw(spec, rows, level, spread) for spec in self.specs}

    def _draw(self, spec: InputSpec, rows: int, level: float | None, spread: float) -> Array:
        shape = self.shapes[spec.name]
        shape = (rows, *shape[1:]) if rows else shape
        if spec.dtype.kind in "biu":
            scale = 0.0 if not level else 1.0
            return _draw(spec, shape, "constant", scale, self.bounds[spec.name], self.rng)
        heads = shape[:2] + (1,) * (len(shape) - 2)
        values = np.broadcast_to(spread * self.rng.standard_normal(heads), shape).copy()
        if level is not None:
            np.atleast_1d(values)[:1] = level
        return values.astype(spec.dtype)


def _other_sizes(specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """A second size for every dynamic axis behind the batch, by the axis's name."""
    batch = {spec.symbols[0] for spec in specs if spec.dims and spec.dims[0] is None}
    sizes: dict[str, int] = {}
    for spec in specs:
        for axis, dim in enumerate(spec.dims or ()):
            symbol = spec.symbols[axis]
            if axis > 0 and dim is None and symbol not in batch:
                sizes.setdefault(symbol, _another(shapes[spec.name][axis]))
    return sizes


def _another(size: int) -> int:
    """About three quarters of a size, divisible as often by two as it is, up to 32."""
    step = min(size & -size, 32)
    return max(size * 3 // 4 // step, 1) * step if size > step else step // 2 or 2


def _resized(spec: InputSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    dims = spec.dims or ()
    return tuple(
        sizes.get(spec.symbols[axis], length)
        if axis and axis < len(dims) and dims[axis] is None
        else length
        for axis, length in enumerate(shape)
    )  # fmt: skip


def _default_samples(elements: int) -> int:
    """16 rows of at most 2^14 elements, 8 of 2^16, else 4: the float64 reference is the cost."""
    return 16 if elements <= SMALL_INPUT else 8 if elements <= 1 << 16 else 4


def _shape(spec: InputSpec, given: Sequence[int] | None) -> tuple[int, ...]:
    if spec.dims is None:
        if given is None:
            raise InputError(f"the input '{spec.name}' has no shape in the model; give one.")
        return tuple(int(size) for size in given)
    if given is not None and len(given) != len(spec.dims):
        raise InputError(
            f"the input '{spec.name}' has {len(spec.dims)} axes; {tuple(given)} was given for it."
        )
    rest = {4: 224, 5: 32}.get(len(spec.dims), 64)
    sizes = []
    for axis, dim in enumerate(spec.dims):
        wanted = int(given[axis]) if given is not None else None
        if dim is not None and wanted is not None and wanted != dim and axis > 0:
            raise InputError(
                f"axis {axis} of the input '{spec.name}' is {dim}; {wanted} was given."
            )
        sizes.append(dim or wanted or (1 if axis == 0 else rest))
    return tuple(sizes)


def _draw(spec: InputSpec, shape: tuple[int, ...], kind: str, scale: float, bound: int,
          rng: np.random.Generator) -> Array:  # fmt: skip
    if spec.dtype.kind == "b":
        return rng.random(shape) < 0.5
    if spec.dtype.kind in "iu":
        if kind == "constant":
            return np.full(shape, 0 if scale == 0 else bound - 1, dtype=spec.dtype)
        return rng.integers(0, bound, shape).astype(spec.dtype)
    if spec.dtype.kind not in "fV" and spec.dtype.name != "bfloat16":
        raise InputError(f"the input '{spec.name}' holds {spec.dtype}; it cannot be drawn.")
    if kind == "constant":
        return np.full(shape, scale).astype(spec.dtype)
    return np.asarray(scale * rng.standard_normal(shape)).astype(spec.dtype)


def _bound(model: onnx.ModelProto, spec: InputSpec) -> int:
    """Integers below this are drawn: rows of the table that they index, pixels, else 0 and 1."""
    if spec.dtype.kind not in "iu":
        return 2
    view = View.of(model, replaceable_inputs(model))
    names = {spec.name}
    rows = []
    for node in view.nodes:
        if node.op_type in ("Cast", "Identity", "Reshape", "Unsqueeze") and node.input[0] in names:
            names.update(node.output)
        if node.op_type == "Gather" and node.input[1] in names and view.is_constant(node.input[0]):
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            rows.append(view.constant(node.input[0]).value.shape[axis])
    if rows:
        return int(min(rows))
    return PIXELS if spec.dtype == np.uint8 else 2


def _implied_scale(model: onnx.ModelProto, reference: Float64Reference | None,
                   unit: Mapping[str, Array]) -> float:  # fmt: skip
    """The input's size for which the first normalization meets the variance that it stores."""
    view = View.of(model)
    node = next((n for n in view.nodes if n.op_type == "BatchNormalization"), None)
    if node is None or reference is None or not view.is_constant(node.input[4]):
        return 1.0
    try:
        before = reference.run(unit, [node.input[0]])[node.input[0]]
        stored = view.constant(node.input[4]).value
    except (NoReferenceError, InputError):
        return 1.0
    if before.ndim < 2 or before.shape[1] != stored.size:
        return 1.0
    spread = before.std(axis=(0, *range(2, before.ndim)))
    with np.errstate(all="ignore"):
        scale = float(np.nanmedian(np.sqrt(stored.ravel()) / spread))
    low, high = IMPLIED_SCALES
    return scale if low <= scale <= high else 1.0
