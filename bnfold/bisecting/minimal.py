"""The smallest pair of networks that still differs: one batch norm, and what it was folded into.

From right values in to the first wrong value out, both networks are cut, and the values that they
are cut at become inputs, in the original's terms: where the folded network carries one otherwise,
scale * (x - origin) stands as Mul and Add at its beginning, and the way back at its end. A pair is
only given when it fails by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bnfold.bisecting.pieces import cut, names_read
from bnfold.errors import InputError
from bnfold.proof.algebra.certificate import Gauge
from bnfold.proof.exact.alignment import Alignment
from bnfold.proof.exact.counterpart import View
from bnfold.proof.exact.layers import norms_of
from bnfold.proof.exact.reference import Float64Reference
from bnfold.proof.exact.shapes import Shapes
from bnfold.proof.fault.finding import Finding
from bnfold.proof.fault.sites import places
from bnfold.proof.result import VerifyReport
from bnfold.proof.verify import verify

Array = np.ndarray[Any, np.dtype[Any]]

FURTHER = 8  # values behind the first wrong one that a piece may end at instead


@dataclass(frozen=True, eq=False)
class MinimalPair:
    """Two models of the same inputs and output, and the values to run them on.

    norm: the batch norm that the pair is about, None where there is none; value: the original's
    that it ends at. report: the verification that the pair fails.
    """

    original: onnx.ModelProto
    folded: onnx.ModelProto
    inputs: Mapping[str, Array]
    norm: str | None
    value: str
    report: VerifyReport


def minimal_pair(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    finding: Finding,
    *,
    gauges: Mapping[str, Gauge] | None,
    aliases: Mapping[str, str] | None,
) -> MinimalPair | None:
    """The smallest piece of both networks, around the first fault, that fails `verify` by itself.

    finding: of `find_fault`. gauges, aliases: the plan's, if it is known. None where there is no
    divergence, or where no piece fails: then it is the whole network that differs, by many small
    errors. Raises BnfoldError where a model cannot be run in float64.
    """
    if finding.first is None:
        return None
    view = View.of(original)
    alignment = Alignment.of(view, View.of(folded), gauges, aliases)
    norms = {norm.output: norm for norm in norms_of(view)}
    near = places(view, norms, alignment, finding.first.value)
    named = finding.cause.norm if finding.cause else None
    chosen = next((place for place in near if place.norm.name == named), near[0] if near else None)
    shears = Shears(original, folded, view, alignment, finding.inputs)
    start = chosen.value if chosen is not None else finding.first.value
    inside = {chosen.norm.output} if chosen is not None and not chosen.own else set()
    for value in shears.ends(start):
        pair = shears.pair(value, inside)
        if pair is None:
            continue
        try:
            report = verify(*pair[:2], inputs=pair[2])
        except InputError:  # a piece that onnxruntime does not take proves nothing
            continue
        if not report.passed and any(result.gate == "B" for result in report.failures):
            norm = chosen.norm.name if chosen is not None and (chosen.own or named) else None
            return MinimalPair(*pair, norm, value, report)
    return None


class Shears:
    """Cuts the same piece out of two networks, on one batch of inputs."""

    def __init__(
        self,
        original: onnx.ModelProto,
        folded: onnx.ModelProto,
        view: View,
        alignment: Alignment,
        inputs: Mapping[str, Array],
    ) -> None:
        self._original, self._folded = original, folded
        self._view, self._alignment = view, alignment
        self._inputs = inputs
        self._reference = Float64Reference(original)
        self._shapes = Shapes(original, {name: array.shape for name, array in inputs.items()})
        self._rows = {np.shape(array)[:1] for array in inputs.values()}
        self._fit = self._cuttable()

    def _cuttable(self) -> set[str]:
        """The original's floats, a row for each of the batch, that the folded network has too."""
        fit = {name for name, array in self._inputs.items() if np.shape(array)[:1] in self._rows}
        for name, value in self._reference.stream(self._inputs, self._alignment.there):
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim:
                fit |= {name} if value.shape[:1] in self._rows else set()
        return fit

    def ends(self, start: str) -> Iterator[str]:
        """The value itself and, where that is not enough, a few that are computed from it."""
        behind = {start}
        yield start
        given = 0
        for node in self._view.nodes:
            if behind.isdisjoint(names_read(node)):
                continue
            behind.update(filter(None, node.output))
            for name in node.output:
                if name in self._fit and name != start and given < FURTHER:
                    given += 1
                    yield name

    def pair(
        self, value: str, through: set[str]
    ) -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, Array]] | None:
        """The two pieces that end at a value, and their inputs; None where they cannot be cut.

        through: values to go on behind, so that what computes them is in the piece.
        """
        if value not in self._fit:
            return None
        sources = self._sources(value, through)
        if len({self._alignment.there.get(name, name) for name in sources}) < len(sources):
            return None  # one tensor of the folded network would be two inputs
        right = self._reference.run(self._inputs, [*sources, value])
        arrays = {name: right[name].astype(self._dtype(name)) for name in sources}
        end = self._info(value, right[value].astype(self._dtype(value)))
        scale, origin, usable = self._back(value)
        masked = not np.all(usable)
        result = f"{value}_compared" if masked else value
        out = self._retyped(result, end)
        given = {name: self._info(name, array) for name, array in arrays.items()}
        before = cut(self._original, given, [end])
        if masked:
            _append(before, value, result, np.where(usable, 1.0, 0.0), np.zeros(()), out)
        after = self._folded_piece(given, value, result, scale, origin, out)
        for model, role in ((before, "original"), (after, "folded")):
            model.doc_string = _about(role, value, sources, self._alignment)
        return before, after, arrays

    def _sources(self, value: str, through: set[str]) -> list[str]:
        """The nearest values behind that both networks hold apart from this one."""
        there = self._alignment.there
        own = there.get(value)
        passed = self._between(through, value)
        found: dict[str, None] = {}
        pending = self._view.sources(self._view.producers[value])
        seen = set()
        while pending:
            name = pending.pop(0)
            if name in seen:
                continue
            seen.add(name)
            apart = name in self._fit and there.get(name, name) != own and name not in passed
            if apart or name not in self._view.producers:
                found[name] = None
            else:
                pending += self._view.sources(self._view.producers[name])
        return list(found)

    def _between(self, first: set[str], last: str) -> set[str]:
        """The values that are computed from `first` and that `last` is computed from."""
        ahead = set(first)
        for node in self._view.nodes:
            if not ahead.isdisjoint(names_read(node)):
                ahead.update(filter(None, node.output))
        needed = {last}
        for node in reversed(self._view.nodes):
            if not needed.isdisjoint(node.output):
                needed.update(names_read(node))
        return ahead & needed

    def _folded_piece(self, given: Mapping[str, onnx.ValueInfoProto], value: str, result: str,
                      scale: Array, origin: Array, out: onnx.ValueInfoProto
                      ) -> onnx.ModelProto:  # fmt: skip
        """The folded network's piece, re-expressed at both ends in the original's terms."""
        there = self._alignment.there
        ends = {name: there.get(name, name) for name in given}
        inner = {ends[name]: self._retyped(ends[name], info) for name, info in given.items()}
        last = there[value]
        piece = cut(self._folded, inner, [self._retyped(last, out)])
        forth = {name: self._forth(name) for name in given}
        # what is not re-expressed gets its name in the original, and whatever had that another one
        names = {name: f"{name}_carried" for name in (*ends.values(), *given, last, result)}
        names |= {ends[name]: name for name in given if _does_nothing(*forth[name])}
        names |= {last: result} if _does_nothing(scale, origin) else {}
        _rename(piece, names)
        nodes = list(piece.graph.node)
        del piece.graph.node[:], piece.graph.input[:]
        piece.graph.input.extend(given.values())
        for name, info in given.items():
            if names[ends[name]] != name:
                _affine(piece, name, names[ends[name]], *forth[name], info)
        piece.graph.node.extend(nodes)
        if names[last] != result:
            _append(piece, names[last], result, scale, origin, out)
        return piece

    def _forth(self, name: str) -> tuple[Array, Array]:
        """(factor, offset): what the folded network holds for a value is factor * x + offset."""
        gauge = self._alignment.gauges.get(name)
        if gauge is None:
            return np.ones(()), np.zeros(())
        scale, origin = np.asarray(gauge.scale, np.float64), np.asarray(gauge.origin, np.float64)
        finite = np.where(np.isfinite(scale), scale, 0.0)
        return finite, np.where(scale == 0, origin, -finite * origin)

    def _back(self, name: str) -> tuple[Array, Array, Any]:
        """(factor, offset, usable): the way back of a value, where there is one."""
        gauge = self._alignment.gauges.get(name)
        if gauge is None:
            return np.ones(()), np.zeros(()), True
        scale, origin = np.asarray(gauge.scale, np.float64), np.asarray(gauge.origin, np.float64)
        usable = np.isfinite(scale) & (scale != 0)
        with np.errstate(all="ignore"):
            return np.where(usable, 1 / scale, 0.0), np.where(usable, origin, 0.0), usable

    # ----------------------------------------------------------------------------- types

    def _elem_type(self, name: str) -> int:
        known = self._shapes.of(name)
        if known is not None and known.elem_type:
            return known.elem_type
        return int(onnx.TensorProto.FLOAT)

    def _dtype(self, name: str) -> np.dtype[Any]:
        if name in self._inputs:
            return np.asarray(self._inputs[name]).dtype
        kind = helper.tensor_dtype_to_np_dtype(self._elem_type(name))
        dtype: np.dtype[Any] = np.dtype(kind)
        return dtype

    def _info(self, name: str, array: Array) -> onnx.ValueInfoProto:
        """The type of an end; its rows are free where those of the network are."""
        shape: list[int | str] = list(array.shape)
        if all(_rows_are_free(given) for given in self._original.graph.input):
            shape[:1] = ["N"]
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, kind, shape)

    @staticmethod
    def _retyped(name: str, info: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
        renamed = onnx.ValueInfoProto()
        renamed.CopyFrom(info)
        renamed.name = name
        return renamed


def _rows_are_free(given: onnx.ValueInfoProto) -> bool:
    dims = given.type.tensor_type.shape.dim
    return bool(dims) and not dims[0].dim_value


def _rename(piece: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Other names for values and weights, so that those at the ends are free."""

    def renamed(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
            for attribute in node.attribute:
                for body in (*attribute.graphs, *([attribute.g] * attribute.HasField("g"))):
                    renamed(body)
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = names.get(value.name, value.name)

    renamed(piece.graph)


def _append(piece: onnx.ModelProto, source: str, result: str, factor: Array, offset: Array,
            out: onnx.ValueInfoProto) -> None:  # fmt: skip
    """End the piece with factor * source + offset instead of its output."""
    _affine(piece, source, result, factor, offset, out)
    del piece.graph.output[:]
    piece.graph.output.append(out)


def _affine(piece: onnx.ModelProto, source: str, result: str, factor: Array, offset: Array,
            info: onnx.ValueInfoProto) -> None:  # fmt: skip
    """Nodes for factor * source + offset, which does something."""
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
    steps = [("Mul", factor)] if np.any(factor != 1) else []
    steps += [("Add", offset)] if np.any(offset != 0) else []
    for index, (op_type, array) in enumerate(steps):
        name = f"{result}_{op_type.lower()}"
        piece.graph.initializer.append(
            numpy_helper.from_array(np.asarray(array).astype(dtype), name)
        )
        target = result if index == len(steps) - 1 else f"{result}_scaled"
        piece.graph.node.append(helper.make_node(op_type, [source, name], [target], name=target))
        source = target


def _does_nothing(factor: Array, offset: Array) -> bool:
    return not np.any(factor != 1) and not np.any(offset != 0)


def _about(role: str, value: str, sources: Sequence[str], alignment: Alignment) -> str:
    """What a piece is, for whoever opens it."""
    text = (
        f"A piece of the {role} network, from {', '.join(map(repr, sources))} to '{value}', cut out"
        " by bnfold. Its inputs and its output are values of the original network."
    )
    gauged = [name for name in (*sources, value) if name in alignment.gauges]
    if role == "folded" and gauged:
        text += (
            f" The folded network carries {', '.join(map(repr, gauged))} as scale * (x - origin):"
            " the Mul and Add at its ends re-express them and are not its own."
        )
    return text


# ------------------------------------------------------------------------------- fewest names


def fewest(names: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> list[str]:
    """As few of the names as still fail: leaving out any single one of them does not.

    Halves first, then smaller and smaller parts and what is left without them (delta debugging;
    Zeller and Hildebrandt, 2002), so that one culprit among n takes about 2 log2(n) trials. All
    names together must fail; none is asked twice about the same names.
    """
    known: dict[frozenset[str], bool] = {}

    def tried(chosen: Sequence[str]) -> bool:
        key = frozenset(chosen)
        if key not in known:
            known[key] = fails(chosen)
        return known[key]

    left, parts = list(names), 2
    while len(left) > 1:
        size = math.ceil(len(left) / parts)
        pieces = [left[first : first + size] for first in range(0, len(left), size)]
        rests = [[name for name in left if name not in piece] for piece in pieces]
        smaller = next((piece for piece in pieces if tried(piece)), None)
        if smaller is not None:
            left, parts = smaller, 2
            continue
        smaller = next((rest for rest in rests if parts > 2 and tried(rest)), None)
        if smaller is not None:
            left, parts = smaller, max(parts - 1, 2)
        elif parts >= len(left):
            break
        else:
            parts = min(2 * parts, len(left))
    return left
