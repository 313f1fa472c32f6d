"""What an ONNX model computes in exact arithmetic, as nearly as float64 gives it.

onnx.reference runs the graph; every float16, bfloat16 and float32 constant, attribute and cast
becomes float64 on the way in, so the real function of the stored parameters is evaluated, not the
roundings of their dtype. The spatial operators and the normalization are our own: onnx.reference
1.23 loops in Python over kernel taps and channels, raises on a grouped ConvTranspose, and runs a
BatchNormalization of opsets 7 to 13 with batch statistics.

The constants of an attribute are used as stored: an epsilon is the float32 nearest to 1e-5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_grid_sample import GridSample as OnnxGridSample
from onnx.reference.ops.op_resize import Resize as _Resize

from bnfold.errors import BnfoldError, InputError
from bnfold.proof.exact.recurrent import GRU, LSTM, RNN

Array = np.ndarray[Any, np.dtype[Any]]
Spatial = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]

NARROW_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
NARROW_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
WORKSPACE_BYTES = 1 << 26  # unfolded convolution inputs held at a time: 64 MiB
CACHE_BYTES = 1 << 18  # sums of a depthwise convolution held at a time: they stay in the cache


class NoReferenceError(InputError):
    """The float64 reference cannot run this model: an operator is missing, or failed."""


def widen(value: Any) -> Any:
    """The value in float64 where it is a narrower float, else unchanged."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype in NARROW_FLOATS:
        return np.asarray(value, dtype=np.float64)
    if isinstance(value, list):
        return [widen(item) for item in value]
    return value


class Float64Reference:
    """Evaluates an ONNX model in float64.

    `widened_ops` lists the operator types that returned a narrower float in spite of float64
    inputs in the runs so far (onnx.reference's own limits): their results carry its rounding.
    """

    def __init__(self, model: onnx.ModelProto | str | Path):
        """Prepare `model`: a ModelProto whose tensors are inside, or the path of a file.

        Raises NoReferenceError when an operator has no reference implementation.
        """
        if not isinstance(model, onnx.ModelProto):
            model = onnx.load(str(model))
        graph = model.graph
        self.input_names = [
            value.name
            for value in graph.input
            if value.name not in {tensor.name for tensor in graph.initializer}
        ]
        self.output_names = [value.name for value in graph.output]
        self.widened_ops: set[str] = set()
        self._last_use = _last_uses(graph)
        self._reads = [
            ({name for name in node.output if name}, set(_names_read(node)) - _names_made(node))
            for node in graph.node
        ]
        try:
            self._evaluator = _Float64Evaluator(model)
        except BnfoldError:
            raise
        except Exception as error:
            raise NoReferenceError(
                f"the model cannot be evaluated in float64: {_first_line(error)}"
            ) from error

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The named values (default: the graph's outputs) for these inputs.

        Any value of the main graph may be asked for; the others are freed after their last use.
        Floats come back as float64. Raises InputError for an unknown or missing name and
        NoReferenceError when an operator fails.
        """
        wanted = list(self.output_names if outputs is None else outputs)
        values = dict(self.stream(inputs, wanted))
        return {name: values[name] for name in wanted}

    def stream(
        self, inputs: Mapping[str, Array], outputs: Iterable[str]
    ) -> Iterator[tuple[str, Array]]:
        """The named values as `run` gives them, each as soon as it is known, and once.

        Nothing is held that no later node reads, so that every value of a network can be looked at.
        A value of the graph among `inputs` is taken as given, and what only it needs is left out.
        """
        waiting = set(outputs)
        values: dict[str, Any] = {"": None, **self._evaluator.rt_inits_}
        values.update({name: widen(np.asarray(value)) for name, value in inputs.items()})
        steps = self._steps(waiting, values)
        for name in [name for name in values if name in waiting]:
            yield name, values[name]
        for index in steps:
            node = self._evaluator.rt_nodes_[index]
            with np.errstate(all="ignore"):
                self._run_node(node, values)
            values.update((name, widen(inputs[name])) for name in node.output if name in inputs)
            for name in waiting.intersection(node.output) - inputs.keys():
                yield name, values[name]
            for name in self._last_use.get(index, ()):
                values.pop(name, None)

    def _steps(self, wanted: set[str], known: Mapping[str, Any]) -> list[int]:
        """The nodes that `wanted` needs beside what is known. Raises InputError for what lacks."""
        needed = set(wanted)
        steps = []
        for index in reversed(range(len(self._reads))):
            outputs, read = self._reads[index]
            if any(name in needed and name not in known for name in outputs):
                steps.append(index)
                needed -= outputs
                needed |= read
        lacking = needed - known.keys()
        for name in self.input_names:
            if name in lacking:
                raise InputError(f"the model's input '{name}' was not given a value.")
        if lacking:
            raise InputError(f"the graph has no value named '{min(lacking)}'.")
        return steps[::-1]

    def _run_node(self, node: Any, values: dict[str, Any]) -> None:
        try:
            arguments = [values[name] for name in node.input]
            context = {"context": values} if node.need_context() else {}
            results = node.run(*arguments, **context)
        except BnfoldError:
            raise
        except Exception as error:
            where = node.onnx_node.name or ", ".join(node.output)
            raise NoReferenceError(
                f"{node.op_type} '{where}' cannot be evaluated in float64: {_first_line(error)}"
            ) from error
        for name, value in zip(node.output, results, strict=False):
            values[name] = widen(value)
            if values[name] is not value:
                self.widened_ops.add(node.op_type)


class NodeReference:
    """Evaluates one node in float64: call it with the node's inputs in order, None if absent."""

    def __init__(
        self,
        node: onnx.NodeProto,
        opsets: Mapping[str, int],
        functions: Sequence[onnx.FunctionProto] = (),
    ):
        graph = onnx.GraphProto(name="node")
        graph.node.append(node)
        self.node = node
        try:
            evaluator = _Float64Evaluator(graph, opsets=dict(opsets), functions=list(functions))
            self._node = evaluator.rt_nodes_[0]
        except BnfoldError:
            raise
        except Exception as error:
            raise NoReferenceError(
                f"{node.op_type} has no float64 reference: {_first_line(error)}"
            ) from error

    def __call__(self, *inputs: Array | None) -> list[Any]:
        """The node's outputs. Raises NoReferenceError where the node cannot take these inputs."""
        try:
            with np.errstate(all="ignore"):
                results = self._node.run(*[widen(value) for value in inputs])
        except Exception as error:
            raise NoReferenceError(
                f"{self.node.op_type} cannot be evaluated in float64: {_first_line(error)}"
            ) from error
        return [widen(value) for value in results]


class _Float64Evaluator(ReferenceEvaluator):  # type: ignore[misc]
    """onnx.reference with float64 constants and our operators, in subgraphs and functions too."""

    def __init__(self, proto: Any, **options: Any):
        options["new_ops"] = _OPERATORS
        super().__init__(proto, **options)

    rt_inits_: dict[str, Any]

    def _init(self) -> None:
        super()._init()
        self.rt_inits_ = {name: widen(value) for name, value in self.rt_inits_.items()}


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    text = str(cause).strip() or type(cause).__name__
    return text.splitlines()[0]


def _last_uses(graph: onnx.GraphProto) -> dict[int, list[str]]:
    """Node index -> the values that no later node reads, subgraphs' captures counted."""
    last: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in itertools.chain(node.output, _names_read(node)):
            last[name] = index
    freed: dict[int, list[str]] = {}
    for name, index in last.items():
        if name:
            freed.setdefault(index, []).append(name)
    return freed


def _names_made(node: onnx.NodeProto) -> set[str]:
    """The values of the bodies of a node, which no one else sees."""
    made: set[str] = set()
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            made.update(value.name for value in (*graph.input, *graph.initializer))
            for inner in graph.node:
                made.update(inner.output)
                made |= _names_made(inner)
    return made


def _names_read(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in graph.node:
                yield from _names_read(inner)
            yield from (output.name for output in graph.output)


# ---------------------------------------------------------------- windows, shared by the spatial


def _resolve(values: Sequence[int] | None, rank: int, default: int) -> Spatial:
    return tuple(values) if values else (default,) * rank


def window_pads(
    sizes: Sequence[int],
    kernel: Spatial,
    strides: Spatial,
    dilations: Spatial,
    pads: Sequence[int] | None,
    auto_pad: str | None,
) -> Pads:
    """Padding before and after each spatial axis, with auto_pad resolved as the spec says.

    SAME gives ceil(size / stride) windows and puts the odd element at the end (UPPER) or at the
    beginning (LOWER). Source: ONNX operators, Conv and the pools, attribute auto_pad.
    """
    rank = len(kernel)
    if auto_pad in (None, "", "NOTSET"):
        given = tuple(pads) if pads else (0,) * (2 * rank)
        return tuple((given[axis], given[rank + axis]) for axis in range(rank))
    if auto_pad == "VALID":
        return ((0, 0),) * rank
    resolved = []
    for size, extent, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        windows = -(-size // stride)
        total = max((windows - 1) * stride + (extent - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        resolved.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
    return tuple(resolved)


def _spatial(index: Iterable[Any]) -> tuple[Any, ...]:
    """An index of the axes behind batch and channel."""
    return (slice(None), slice(None), *index)


def _last(index: Iterable[Any]) -> tuple[Any, ...]:
    """An index of the last axes."""
    return (..., *index)


def _pad(x: Array, pads: Pads, value: float) -> Array:
    """x with constant padding on its spatial axes; a negative pad crops."""
    if not any(itertools.chain.from_iterable(pads)):
        return x
    crop = tuple(
        slice(max(-low, 0), size - max(-high, 0))
        for (low, high), size in zip(pads, x.shape[2:], strict=True)
    )
    grown = tuple((max(low, 0), max(high, 0)) for low, high in pads)
    return np.pad(x[_spatial(crop)], ((0, 0), (0, 0), *grown), constant_values=value)


def _window_counts(padded: Sequence[int], kernel: Spatial, strides: Spatial, dilations: Spatial,
                   ceil_mode: bool = False) -> Spatial:  # fmt: skip
    counts = []
    for size, extent, stride, dilation in zip(padded, kernel, strides, dilations, strict=True):
        room = size - ((extent - 1) * dilation + 1)
        counts.append((-(-room // stride) if ceil_mode else room // stride) + 1)
    return tuple(counts)


def _taps(kernel: Spatial, counts: Spatial, strides: Spatial, dilations: Spatial
          ) -> Iterator[tuple[Spatial, tuple[slice, ...]]]:  # fmt: skip
    """Every kernel position with the slice of the padded input that it meets, window by window."""
    for tap in itertools.product(*(range(extent) for extent in kernel)):
        starts = (position * dilation for position, dilation in zip(tap, dilations, strict=True))
        yield (
            tap,
            tuple(
                slice(start, start + (count - 1) * stride + 1, stride)
                for start, count, stride in zip(starts, counts, strides, strict=True)
            ),
        )


# ------------------------------------------------------------------------------- convolutions


def convolve(
    x: Array,
    weight: Array,
    bias: Array | None,
    *,
    strides: Spatial,
    pads: Pads,
    dilations: Spatial,
    group: int,
) -> Array:
    """Cross-correlation. x: (N, C, *spatial), weight: (M, C / group, *kernel), bias: (M,).

    Returns (N, M, *windows) float64. A depthwise weight is applied tap by tap, any other as one
    matrix product per group over the unfolded windows, at most WORKSPACE_BYTES of them at a time.
    """
    kernel = weight.shape[2:]
    padded = _pad(x, pads, 0.0)
    counts = _window_counts(padded.shape[2:], kernel, strides, dilations)
    y = np.empty((x.shape[0], weight.shape[0], *counts))
    if weight.shape[1] == 1 and group > 1:
        _depthwise(padded, weight, y, strides, dilations, group)
    else:
        _unfolded(padded, weight, y, strides, dilations, group)
    if bias is not None:
        y += bias.reshape(-1, *(1,) * len(kernel))
    return y


def _depthwise(x: Array, weight: Array, y: Array, strides: Spatial, dilations: Spatial,
               group: int) -> None:  # fmt: skip
    kernel = weight.shape[2:]
    per_tap = weight.reshape(group, -1, *kernel)
    ones = (1,) * len(kernel)
    taps = list(_taps(kernel, y.shape[2:], strides, dilations))
    step = max(1, CACHE_BYTES // max(y[0].nbytes // group, 1))  # channels
    for sample, out in zip(x, y.reshape(len(y), group, -1, *y.shape[2:]), strict=True):
        for first in range(0, group, step):
            channels = slice(first, first + step)
            sums = out[channels]
            sums[...] = 0.0
            product = np.empty_like(sums)
            for tap, where in taps:
                factor = per_tap[_last(tap)][channels].reshape(len(sums), -1, *ones)
                np.multiply(sample[(channels, None, *where)], factor, out=product)
                sums += product


def _unfolded(x: Array, weight: Array, y: Array, strides: Spatial, dilations: Spatial,
              group: int) -> None:  # fmt: skip
    kernel, counts = weight.shape[2:], y.shape[2:]
    matrix = weight.reshape(group, len(weight) // group, -1)
    extents = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    spatial = tuple(range(1, 1 + len(kernel)))
    row_bytes = 8 * matrix.shape[2] * group * math.prod(counts[1:])
    rows = max(1, WORKSPACE_BYTES // max(row_bytes, 1))
    for sample, out in zip(x, y, strict=True):
        windows = sliding_window_view(sample, extents, axis=spatial)
        windows = windows[(slice(None), *(slice(None, None, s) for s in strides))]
        windows = windows[_last(slice(None, None, d) for d in dilations)]
        for first in range(0, counts[0], rows):
            part = windows[:, first : first + rows]
            order = (0, *(axis + len(kernel) for axis in spatial), *spatial)
            # contiguous, or matmul leaves BLAS for a loop
            columns = np.ascontiguousarray(part.transpose(order))
            product = matrix @ columns.reshape(group, matrix.shape[2], -1)
            out[:, first : first + rows] = product.reshape(len(out), -1, *counts[1:])


def transposed_pads(
    sizes: Sequence[int],
    kernel: Spatial,
    strides: Spatial,
    dilations: Spatial,
    output_padding: Spatial,
    pads: Sequence[int] | None,
    auto_pad: str | None,
    output_shape: Sequence[int] | None,
) -> Pads:
    """What ConvTranspose crops before and after each axis (negative: zeros that it adds).

    With output_shape or SAME the total is derived from the output's size and shared out, the
    odd element at the beginning unless SAME_UPPER; an output_shape beyond the last tap is filled
    at the end. Source: ONNX operators, ConvTranspose; onnxruntime where the text leaves it open.
    """
    rank = len(kernel)
    if not output_shape and auto_pad in (None, "", "NOTSET", "VALID"):
        given = tuple(pads) if pads and auto_pad != "VALID" else (0,) * (2 * rank)
        return tuple((given[axis], given[rank + axis]) for axis in range(rank))
    resolved = []
    for axis in range(rank):
        span = strides[axis] * (sizes[axis] - 1) + (kernel[axis] - 1) * dilations[axis] + 1
        span += output_padding[axis]
        size = output_shape[-rank:][axis] if output_shape else sizes[axis] * strides[axis]
        total = max(span - size, 0)
        low = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
        resolved.append((low, span - size - low if output_shape else total - low))
    return tuple(resolved)


def convolve_transposed(
    x: Array,
    weight: Array,
    bias: Array | None,
    *,
    strides: Spatial,
    pads: Pads,
    dilations: Spatial,
    output_padding: Spatial,
    group: int,
) -> Array:
    """The adjoint of convolve. x: (N, C, *spatial), weight: (C, M / group, *kernel), bias: (M,).

    Each input element adds its kernel to the output; `pads` are then cropped.
    """
    kernel = weight.shape[2:]
    features = weight.shape[1] * group
    full = tuple(
        stride * (size - 1) + (extent - 1) * dilation + 1 + extra
        for size, extent, stride, dilation, extra in zip(
            x.shape[2:], kernel, strides, dilations, output_padding, strict=True
        )
    )
    y = np.zeros((x.shape[0], features, *full))
    taps_last = weight.reshape(group, weight.shape[0] // group, weight.shape[1], *kernel)
    flat = x.reshape(len(x), group, weight.shape[0] // group, -1)
    for tap, where in _taps(kernel, x.shape[2:], strides, dilations):
        matrix = taps_last[_last(tap)].swapaxes(1, 2)
        product = (matrix @ flat).reshape(len(x), features, *x.shape[2:])
        y[_spatial(where)] += product
    y = _pad(y, tuple((-low, -high) for low, high in pads), 0.0)
    if bias is not None:
        y = y + bias.reshape(-1, *(1,) * len(kernel))
    return y


class Conv(OpRun):  # type: ignore[misc]
    """Conv, 1-D and up."""

    op_domain = ""

    def _run(self, X: Array, W: Array, B: Array | None = None, *, auto_pad: str | None = None,
             dilations: Any = None, group: int | None = None, kernel_shape: Any = None,
             pads: Any = None, strides: Any = None) -> tuple[Array]:  # fmt: skip
        del kernel_shape  # the weight says it
        rank = W.ndim - 2
        steps, spread = _resolve(strides, rank, 1), _resolve(dilations, rank, 1)
        around = window_pads(X.shape[2:], W.shape[2:], steps, spread, pads, auto_pad)
        return (convolve(X, W, B, strides=steps, pads=around, dilations=spread,
                         group=group or 1),)  # fmt: skip


class ConvTranspose(OpRun):  # type: ignore[misc]
    """ConvTranspose, 1-D and up, with groups."""

    op_domain = ""

    def _run(self, X: Array, W: Array, B: Array | None = None, *, auto_pad: str | None = None,
             dilations: Any = None, group: int | None = None, kernel_shape: Any = None,
             output_padding: Any = None, output_shape: Any = None, pads: Any = None,
             strides: Any = None) -> tuple[Array]:  # fmt: skip
        del kernel_shape
        rank = W.ndim - 2
        steps, spread = _resolve(strides, rank, 1), _resolve(dilations, rank, 1)
        extra = _resolve(output_padding, rank, 0)
        around = transposed_pads(
            X.shape[2:], W.shape[2:], steps, spread, extra, pads, auto_pad, output_shape
        )
        return (convolve_transposed(X, W, B, strides=steps, pads=around, dilations=spread,
                                    output_padding=extra, group=group or 1),)  # fmt: skip


# -------------------------------------------------------------------------------------- pools


def _pool_windows(x: Array, kernel: Spatial, strides: Any, dilations: Any, pads: Any,
                  auto_pad: str | None, ceil_mode: int | None
                  ) -> tuple[Spatial, Spatial, Pads, Pads, Spatial]:  # fmt: skip
    """strides, dilations, the pads, the pads with the rest that ceil_mode reads, the windows."""
    steps = _resolve(strides, len(kernel), 1)
    spread = _resolve(dilations, len(kernel), 1)
    around = window_pads(x.shape[2:], kernel, steps, spread, pads, auto_pad)
    padded = [size + low + high for size, (low, high) in zip(x.shape[2:], around, strict=True)]
    counts = list(_window_counts(padded, kernel, steps, spread, bool(ceil_mode)))
    grown = []
    for axis, (low, high) in enumerate(around):
        # a window may not start in the padding behind the input
        if ceil_mode and (counts[axis] - 1) * steps[axis] >= x.shape[2 + axis] + low:
            counts[axis] -= 1
        reach = (counts[axis] - 1) * steps[axis] + (kernel[axis] - 1) * spread[axis] + 1
        grown.append((low, max(high, reach - low - x.shape[2 + axis])))
    return steps, spread, around, tuple(grown), tuple(counts)


class AveragePool(OpRun):  # type: ignore[misc]
    """AveragePool; what lies in nobody's padding (ceil_mode's rest) is never counted."""

    op_domain = ""

    def _run(self, X: Array, *, kernel_shape: Any = None, auto_pad: str | None = None,
             ceil_mode: int | None = None, count_include_pad: int | None = None,
             dilations: Any = None, pads: Any = None, strides: Any = None
             ) -> tuple[Array]:  # fmt: skip
        kernel = tuple(kernel_shape)
        steps, spread, around, grown, counts = _pool_windows(
            X, kernel, strides, dilations, pads, auto_pad, ceil_mode
        )
        padded = _pad(X, grown, 0.0)
        y = np.zeros((*X.shape[:2], *counts))
        for _, where in _taps(kernel, counts, steps, spread):
            y += padded[_spatial(where)]
        for axis, (low, high) in enumerate(around):
            size = X.shape[2 + axis]
            counted = np.zeros(low + size + max(high, grown[axis][1]))
            counted[(0 if count_include_pad else low) : low + size] = 1.0
            if count_include_pad:
                counted[low + size : low + size + high] = 1.0
            taken = sum(
                counted[where[0]]
                for _, where in _taps(
                    kernel[axis : axis + 1], counts[axis : axis + 1], steps[axis : axis + 1],
                    spread[axis : axis + 1],
                )
            )  # fmt: skip
            y /= np.reshape(taken, (-1, *(1,) * (len(kernel) - 1 - axis)))
        return (y,)


class MaxPool(OpRun):  # type: ignore[misc]
    """MaxPool, with its second output: the maximum's flat index in X (row or column major)."""

    op_domain = ""

    def _run(self, X: Array, *, kernel_shape: Any = None, auto_pad: str | None = None,
             ceil_mode: int | None = None, dilations: Any = None, pads: Any = None,
             storage_order: int | None = None, strides: Any = None
             ) -> tuple[Array, ...]:  # fmt: skip
        kernel = tuple(kernel_shape)
        steps, spread, _, grown, counts = _pool_windows(
            X, kernel, strides, dilations, pads, auto_pad, ceil_mode
        )
        lowest: Any = -np.inf if X.dtype.kind == "f" else np.iinfo(X.dtype).min
        padded = _pad(X, grown, lowest)
        y = np.full((*X.shape[:2], *counts), lowest, dtype=X.dtype)
        for _, where in _taps(kernel, counts, steps, spread):
            np.maximum(y, padded[_spatial(where)], out=y)
        if len(self.output) < 2:
            return (y,)
        each = np.arange(math.prod(X.shape[2:]))
        each = each.reshape(X.shape[2:], order="F" if storage_order else "C")
        planes = np.arange(math.prod(X.shape[:2])).reshape(*X.shape[:2], *(1,) * len(kernel))
        places = _pad(each + planes * each.size, grown, -1)
        index = np.full(y.shape, -1, dtype=np.int64)
        for _, where in _taps(kernel, counts, steps, spread):
            at = _spatial(where)
            index = np.where((index < 0) & (padded[at] == y), places[at], index)
        return y, index


class GlobalAveragePool(OpRun):  # type: ignore[misc]
    """The mean over every spatial axis."""

    op_domain = ""

    def _run(self, X: Array) -> tuple[Array]:
        return (X.mean(axis=tuple(range(2, X.ndim)), keepdims=True),)


class GlobalMaxPool(OpRun):  # type: ignore[misc]
    """The largest over every spatial axis; onnx.reference drops axes where there is one alone."""

    op_domain = ""

    def _run(self, X: Array) -> tuple[Array]:
        return (X.max(axis=tuple(range(2, X.ndim)), keepdims=True),)


# ----------------------------------------------------------------------------- older upsampling


def _upsampled(x: Array, scales: Sequence[float], mode: str) -> Array:
    """Upsample, and Resize of opset 10: element i of the result lies at i / scale of x.

    Source: the ONNX operators' text; onnxruntime for the place, which the text leaves open.
    """
    for axis, scale in enumerate(scales):
        size = math.floor(x.shape[axis] * np.float32(scale))
        at = np.minimum(np.arange(size) / scale, x.shape[axis] - 1)
        low = np.floor(at).astype(np.int64)
        lower = np.take(x, low, axis=axis)
        if mode == "nearest":
            x = lower
            continue
        upper = np.take(x, np.minimum(low + 1, x.shape[axis] - 1), axis=axis)
        weight = (at - low).reshape(-1, *(1,) * (x.ndim - 1 - axis))
        x = lower + weight * (upper - lower)
    return x


class Upsample(OpRun):  # type: ignore[misc]
    """Upsample, its scales an attribute (opset 7) or an input; onnx.reference has whole ones."""

    op_domain = ""

    def _run(self, X: Array, *operands: Array, mode: str | None = None,
             scales: Sequence[float] | None = None) -> tuple[Array]:  # fmt: skip
        factors = [float(n) for n in (operands[0] if operands else scales or ())]
        return (_upsampled(X, factors, mode or "nearest"),)


class Resize(_Resize):  # type: ignore[misc]
    """Resize; of opset 10, whose second operand is the scales, an Upsample."""

    op_domain = ""

    def _run(self, X: Array, *operands: Array | None, mode: str | None = None,
             **attributes: Any) -> tuple[Array]:  # fmt: skip
        if self.run_params["opsets"][""] < 11 and operands[0] is not None:
            return (_upsampled(X, [float(n) for n in operands[0]], mode or "nearest"),)
        roi, scales, sizes = (*operands, None, None, None)[:3]
        return tuple(super()._run(X, roi, scales, sizes, mode=mode, **attributes))


# --------------------------------------------------------------------- normalization, constants


class BatchNormalization(OpRun):  # type: ignore[misc]
    """BatchNormalization: stored statistics, or the batch's where the node is in training mode.

    Opsets up to 6 say so by is_test, opsets 7 to 13 by having a second output, later ones by
    training_mode.
    """

    op_domain = ""

    def _run(self, X: Array, scale: Array, B: Array, mean: Array, var: Array, *,
             epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int | None = None,
             spatial: int | None = None, is_test: int | None = None,
             **_: Any) -> tuple[Array, ...]:  # fmt: skip
        opset = self.run_params["opsets"][""]
        if spatial == 0 and opset < 9:
            raise NotImplementedError("spatial=0 keeps statistics per position")
        training = (
            bool(training_mode)
            if opset >= 14
            else any(self.output[1:]) if opset >= 7 else not is_test
        )  # fmt: skip
        trailing = (-1, *(1,) * (X.ndim - 2))
        if not training:
            return (_normalize(X, scale, B, mean, var, epsilon, trailing),)
        axes = (0, *range(2, X.ndim))
        batch_mean, batch_var = X.mean(axis=axes), X.var(axis=axes)
        y = _normalize(X, scale, B, batch_mean, batch_var, epsilon, trailing)
        running = (
            momentum * mean + (1 - momentum) * batch_mean,
            momentum * var + (1 - momentum) * batch_var,
        )
        return (y, *running, batch_mean, batch_var)[: len(self.output)]


def _normalize(x: Array, scale: Array, shift: Array, mean: Array, var: Array, epsilon: float,
               shape: tuple[int, ...]) -> Array:  # fmt: skip
    y: Array = x - mean.reshape(shape)
    y *= (scale / np.sqrt(var + epsilon)).reshape(shape)
    y += shift.reshape(shape)
    return y


class Cast(OpRun):  # type: ignore[misc]
    """Cast, where every narrower float type means float64."""

    op_domain = ""

    def _run(self, x: Array, *, to: int, **_: Any) -> tuple[Array]:
        if to in NARROW_TYPES:
            return (np.asarray(x).astype(np.float64),)
        if to == onnx.TensorProto.STRING:
            return (x.astype(np.str_),)
        return (x.astype(onnx.helper.tensor_dtype_to_np_dtype(to)),)


class Constant(OpRun):  # type: ignore[misc]
    """Constant, its floats in float64."""

    op_domain = ""

    def _run(self, **attributes: Any) -> tuple[Any]:
        for name, value in attributes.items():
            if value is None:
                continue
            if name in ("value_int", "value_ints"):
                return (np.asarray(value, dtype=np.int64),)
            if name in ("value_float", "value_floats"):
                return (np.asarray(value, dtype=np.float64),)
            if name in ("value_string", "value_strings"):
                return (np.asarray(value),)
            return (widen(value),)
        raise NotImplementedError("the Constant holds no value")


class ConstantOfShape(OpRun):  # type: ignore[misc]
    """ConstantOfShape, a float value in float64."""

    op_domain = ""

    def _run(self, shape: Array, *, value: Array | None = None) -> tuple[Array]:
        fill = np.zeros(1) if value is None else widen(value)
        return (np.full(tuple(int(size) for size in shape), np.ravel(fill)[0], dtype=fill.dtype),)


class Pad(OpRun):  # type: ignore[misc]
    """Pad in every opset; a negative pad crops, which onnx.reference does not know."""

    op_domain = ""

    def _run(self, x: Array, ends: Array | None = None, number: Array | None = None,
             axes: Array | None = None, *, mode: str | None = None, pads: Any = None,
             paddings: Any = None, value: float | None = None,
             **_: Any) -> tuple[Array]:  # fmt: skip
        given = [int(n) for n in (ends if ends is not None else pads or paddings)]
        half = len(given) // 2
        along = range(half) if axes is None else [int(axis) % x.ndim for axis in axes]
        low, high = np.zeros(x.ndim, int), np.zeros(x.ndim, int)
        low[list(along)], high[list(along)] = given[:half], given[half:]
        mode = mode or "constant"
        if mode in ("reflect", "wrap") and min(given, default=0) < 0:
            raise NotImplementedError(f"negative pads in mode {mode}")
        sizes = zip(low, high, x.shape, strict=True)
        crop = tuple(slice(max(-a, 0), size - max(-b, 0)) for a, b, size in sizes)
        grown = list(zip(np.maximum(low, 0), np.maximum(high, 0), strict=True))
        if mode != "constant":
            return (np.pad(x[crop], grown, mode=mode),)  # type: ignore[call-overload]
        fill = value if number is None else np.ravel(number)[0]
        return (np.pad(x[crop], grown, constant_values=fill or 0),)


class GridSample(OnnxGridSample):  # type: ignore[misc]
    """GridSample whose places are float64: onnx.reference rounds them to float32."""

    op_domain = ""

    def _gs_denormalize_coordinates(self, n: Sequence[float], dims: Sequence[int],
                                    align_corners: bool) -> Array:  # fmt: skip
        places = zip(n, dims, strict=True)
        return np.array([self._gs_denormalize(v, size, align_corners) for v, size in places])


class Mean(OpRun):  # type: ignore[misc]
    """Mean of values that broadcast: onnx.reference adds into the first, whatever its shape."""

    op_domain = ""

    def _run(self, *values: Array) -> tuple[Array]:
        return (np.asarray(sum(values[1:], start=values[0]) / len(values)),)


class DequantizeLinear(OpRun):  # type: ignore[misc]
    """(x - zero_point) * scale in float64: onnx.reference rounds an int32 to float32 first."""

    op_domain = ""

    def _run(self, x: Array, scale: Array, zero_point: Array | None = None, *, axis: int = 1,
             block_size: int | None = None, **_: Any) -> tuple[Array]:  # fmt: skip
        def spread(parameter: Array) -> Array:
            if parameter.size == 1 and not block_size:
                return parameter.reshape(())
            if block_size:
                along = axis % x.ndim
                repeated = np.repeat(parameter, block_size, axis=along)
                return repeated[tuple(slice(0, size) for size in x.shape)]
            return parameter.reshape(-1, *(1,) * (x.ndim - 1 - axis % x.ndim))

        exact = x.astype(np.float64)
        if zero_point is not None:
            exact = exact - spread(zero_point.astype(np.float64))
        return (exact * spread(np.asarray(scale, dtype=np.float64)),)


_OPERATORS: list[type[OpRun]] = [
    Conv, ConvTranspose, AveragePool, MaxPool, GlobalAveragePool, GlobalMaxPool,
    BatchNormalization, Cast, Constant, ConstantOfShape, DequantizeLinear, GridSample, Mean, Pad,
    RNN, GRU, LSTM, Resize, Upsample,
]  # fmt: skip
