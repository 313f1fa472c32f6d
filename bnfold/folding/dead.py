"""Channels that are constant after a fold, and channels that nobody reads, taken out.

A channel whose gamma is 0 leaves a fold as a constant: a row of zeros in the layer that writes it,
or a column of zeros in the layer that reads it. Where two layers stand in line, with nothing in
between but operators that take each channel by itself, such a channel can go: its row, its column,
and its constant into the reader's bias. It stays where that is not exact: a constant other than 0
in front of a layer that pads with zeros, a reader without a bias, other readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array
from bnfold.folding.apply import Folded, rounded
from bnfold.folding.constants import FLOATS
from bnfold.folding.merging import is_private
from bnfold.folding.rules.linear import conv_barrier
from bnfold.folding.rules.node import dims, input_of, integer, integers, is_standard, weights
from bnfold.folding.rules.passing import leaky

_DEPTH = 4  # layers in a row that are cut: gate A proves them as one piece


def _average(node: ir.Node, constant: Array) -> Array:
    """An average that counts padded zeros is no constant at the border: NaN."""
    counts = integer(node, "count_include_pad", 0) and any(integers(node, "pads") or ())
    return np.where(constant == 0, 0, np.nan) if counts else constant


def _same(_node: ir.Node, constant: Array) -> Array:
    return constant


# what operators make of a channel that is constant
_EACH_CHANNEL: Mapping[str, Callable[[ir.Node, Array], Array]] = {
    "Relu": lambda _node, constant: np.maximum(constant, 0),
    "LeakyRelu": leaky,
    "Abs": lambda _node, constant: np.abs(constant),
    "Identity": _same,
    "MaxPool": _same,
    "GlobalMaxPool": _same,
    "GlobalAveragePool": _same,
    "AveragePool": _average,
}


@dataclass(frozen=True)
class _Line:
    """A layer that writes channels, one that reads them, and the values in between, in order."""

    writer: ir.Node
    reader: ir.Node
    values: tuple[ir.Value, ...]


def without_dead_channels(folded: Folded) -> Folded:
    """The same fold with fewer channels; its model is cut in place. Shapes of outputs stay."""
    names = _names(folded.model)
    depth: dict[ir.Node, int] = {}
    lost: set[str] = set()
    cut: set[str] = set()
    for graph in folded.model.graphs():
        for line in list(_lines(graph)):
            if depth.get(line.writer, 0) >= _DEPTH:
                continue
            dead, constants = _dead(line)
            if dead.all():
                dead[0] = False  # a tensor keeps a channel
            if dead.any():
                depth[line.reader] = depth.get(line.writer, 0) + 1
                lost |= {str(value.name) for value in line.values}
                cut |= set(_cut(line, dead, constants, names))
    aliases = {name: there for name, there in folded.aliases.items() if there not in lost}
    written = {name: to for name, to in folded.written.items() if not cut & {name, *to}}
    return replace(folded, aliases=aliases, written=written)


def _names(model: ir.Model) -> set[str]:
    found = {str(v.name) for g in model.graphs() for v in (*g.initializers.values(), *g.inputs)}
    return found | {str(v.name) for g in model.graphs() for node in g for v in node.outputs}


def _lines(graph: ir.Graph | ir.Function) -> Iterator[_Line]:
    for node in graph:
        if not _is_layer(node):
            continue
        values = [node.outputs[0]]
        while is_private(values[-1]):
            reader, slot = next(iter(values[-1].uses()))
            if _is_layer(reader) and slot == 0 and reader.graph is node.graph:
                yield _Line(node, reader, tuple(values))
            if reader.op_type not in _EACH_CHANNEL or len(reader.outputs) != 1:
                break
            if reader.graph is not node.graph or reader.domain not in ("", "ai.onnx"):
                break
            values.append(reader.outputs[0])


def _is_layer(node: ir.Node) -> bool:
    """A convolution of all channels whose constants are tensors of its own."""
    if not is_standard(node, "Conv"):
        return False
    if integer(node, "group", 1) != 1:
        return False
    return all(_is_own(value) for value in node.inputs[1:] if value is not None)


def _is_own(value: ir.Value) -> bool:
    single = value.is_initializer() and not value.is_graph_input() and is_private(value)
    return single and value.const_value is not None and value.const_value.dtype in FLOATS


def _dead(line: _Line) -> tuple[np.ndarray, Array]:
    """Which channels can go, and the constant that each of them is for the reader."""
    rows, columns = weights(line.writer, 1), weights(line.reader, 1)
    unread = ~np.any(columns, axis=(0, *range(2, columns.ndim)))
    constants = _bias(line.writer)
    if constants is None:
        constants = np.zeros(len(rows))
    for value in line.values[1:]:
        node = value.producer()
        assert node is not None  # the values follow each other
        constants = _EACH_CHANNEL[node.op_type](node, constants)
    written = ~np.any(rows, axis=tuple(range(1, rows.ndim))) & np.isfinite(constants)
    taken_up = conv_barrier(line.reader, transposed=False) is None
    taken_up &= _bias(line.reader) is not None
    return unread | (written & ((constants == 0) | taken_up)), np.where(unread, 0, constants)


def _bias(node: ir.Node) -> Array | None:
    held = len(node.inputs) > 2 and node.inputs[2] is not None
    return weights(node, 2) if held else None


def _cut(line: _Line, dead: np.ndarray, constants: Array, names: set[str]) -> Iterator[str]:
    """Take the channels out of both layers; the names of the constants that are cut."""
    live = np.flatnonzero(~dead)
    columns, bias = weights(line.reader, 1), _bias(line.reader)
    if bias is not None:
        taken = columns[:, dead].sum(axis=tuple(range(2, columns.ndim))) @ constants[dead]
        if np.any(taken):
            yield _put(line.reader, 2, bias + taken)
    yield _put(line.reader, 1, columns[:, live])
    yield _put(line.writer, 1, weights(line.writer, 1)[live])
    if (own := _bias(line.writer)) is not None:
        yield _put(line.writer, 2, own[live])
    for value in line.values:
        shape = [len(live) if axis == 1 else dim for axis, dim in enumerate(dims(value))]
        value.shape = ir.Shape(shape)
        name = f"{value.name}_live"  # it is another value now
        while name in names:
            name += "_"
        names.add(name)
        value.name = name


def _put(node: ir.Node, slot: int, array: Array) -> str:
    value = input_of(node, slot)
    assert value.const_value is not None
    tensor = rounded(array, value.const_value.dtype, value.name)
    value.const_value, value.shape = tensor, ir.Shape(tensor.shape)
    return str(value.name)
