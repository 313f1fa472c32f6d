"""A batch norm at a wrong value: what it should have computed there, and what it seems to compute.

Folded backward, into the operator in front of it, a batch norm's result is the wrong value itself:
slope and shift are fitted to it, channel by channel. Folded forward, into the operator behind it,
it shows through that operator alone: each channel is pushed a little in both networks, and the
slope is told from the answers. Either way a supposition about the batch norm is tested by the value
that it leads to, in float64, and not by the fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError
from bnfold.proof.exact.alignment import Alignment, relative_error
from bnfold.proof.exact.counterpart import View, attributes
from bnfold.proof.exact.layers import Norm, is_norm
from bnfold.proof.exact.reference import Float64Reference

Array = np.ndarray[Any, np.dtype[Any]]

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PASSED = 6  # operators between a wrong value and its batch norm
TOGETHER = 32  # channels pushed in one run, as rows of a batch


@dataclass(frozen=True, eq=False)
class Place:
    """A batch norm near a wrong value. own: the wrong value is its result, as the fold carries it.

    frontier: values of the original that are enough to compute `value`, the batch norm's own input
    among them.
    """

    norm: Norm
    value: str
    own: bool
    frontier: tuple[str, ...]


def places(view: View, norms: Mapping[str, Norm], alignment: Alignment, wrong: str) -> list[Place]:
    """The batch norms whose fold may have spoiled a value: its own first, then those behind.

    norms: by their result. A norm belongs to the value where the value is its result, or leads to
    its input and the folded graph carries input and result as one tensor; behind, where at most one
    linear operator lies between.
    """
    value = wrong
    for norm in norms.values():
        here, there = (alignment.there.get(name) for name in (norm.input, norm.output))
        if here == there is not None and _leads(view, norms, wrong, norm.input):
            value = norm.output
            break
    behind, frontier = _behind(view, norms, value)
    found = [norms[value]] if value in norms else []
    # a result that the folded network holds as it is was compared by itself, and is right
    found += [norm for norm in behind if not alignment.holds(norm.output)]
    return [Place(n, value, n.output == value, frontier) for n in found if n.parameters is not None]


@dataclass(frozen=True, eq=False)
class Taken:
    """A batch norm that went into an operator; own: it stood behind it, else in front."""

    norm: Norm
    own: bool


def folded_into(
    node: onnx.NodeProto, view: View, norms: Sequence[Norm], folded: View, alignment: Alignment
) -> list[Taken]:
    """The batch norms that were folded into an operator, by the structure of both graphs.

    Those that its result leads to and that the folded graph lacks; in front of it, where the plan
    is known, those whose result it does not hold as it is.
    """
    gone = [norm for norm in norms if not _kept(norm, folded, alignment)]
    taken = [
        Taken(norm, own=True)
        for norm in gone
        if node.output[0] != norm.output
        and _leads(view, _but(norms, norm), node.output[0], norm.input)
    ]
    if alignment.gauges:
        named = {norm.output: norm for norm in gone}
        in_front, _ = _behind(view, named, node.output[0])
        taken += [Taken(n, own=False) for n in in_front if not alignment.holds(n.output)]
    if is_norm(node):
        taken += [Taken(norm, own=True) for norm in norms if norm.output == node.output[0]]
    return taken


def _but(norms: Sequence[Norm], one: Norm) -> dict[str, Norm]:
    return {norm.output: norm for norm in norms if norm is not one}


def _kept(norm: Norm, folded: View, alignment: Alignment) -> bool:
    """Whether the folded graph has the batch norm too."""
    node = folded.producers.get(alignment.there.get(norm.output, ""))
    return node is not None and is_norm(node)


def _leads(view: View, norms: Mapping[str, Norm], first: str, last: str) -> bool:
    """Whether `last` is computed from `first`, and by operators that pass a fold on only."""
    for _ in range(PASSED):
        if last == first:
            return True
        node = view.producers.get(last)
        if node is None or node.op_type in LINEAR or last in norms:
            return False
        sources = view.sources(node)
        if len(sources) != 1:
            return False
        last = sources[0]
    return False


def _behind(
    view: View, norms: Mapping[str, Norm], value: str
) -> tuple[list[Norm], tuple[str, ...]]:
    """The batch norms behind a value and the values where the walk ended, nearest first."""
    found: list[Norm] = []
    frontier: dict[str, None] = {}
    pending = [(value, 0)]
    seen: set[str] = set()
    while pending:
        name, passed = pending.pop(0)
        if name in seen:
            continue
        seen.add(name)
        node = view.producers.get(name)
        passed += node is not None and node.op_type in LINEAR
        if node is None or passed > 1:
            frontier[name] = None
        elif name in norms and name != value:
            found.append(norms[name])
            frontier[norms[name].input] = None
        else:
            pending += [(source, passed) for source in view.sources(node)]
    return found, tuple(frontier)


class Site:
    """The batch norm of a place with its values: what went in, what should have come out, what did.

    slope, shift: (channels,) as the folded network seems to have them; NaN where that cannot be
    told. misfit: share of each channel that no slope and shift explain.
    """

    def __init__(
        self,
        place: Place,
        before: Float64Reference,
        after: Float64Reference,
        inputs: Mapping[str, Array],
        z: Array,
        alignment: Alignment,
        view: View,
    ) -> None:
        self._view = view
        self.place, self.norm = place, place.norm
        self._before, self._after, self._alignment = before, after, alignment
        self._there = {**{name: name for name in inputs}, **alignment.there}
        wanted = {*place.frontier, self.norm.input, self.norm.output, place.value}
        self._right = before.run(inputs, sorted(wanted))
        self.x, self.y = self._right[self.norm.input], self._right[self.norm.output]
        self.right = self._right[place.value]
        self.actual, self.usable = alignment.read_back(place.value, z)
        self.error = relative_error(self.right, self.actual, self.usable)
        fitted = self._fitted_own() if place.own else self._fitted_through()
        self.slope, self.shift, self.misfit = fitted

    @staticmethod
    def of(
        place: Place,
        before: Float64Reference,
        after: Float64Reference,
        inputs: Mapping[str, Array],
        alignment: Alignment,
        view: View,
    ) -> Site | None:
        """The site of a place; None where its values cannot be held against each other."""
        there = alignment.there.get(place.value)
        if there is None:
            return None
        right = before.run(inputs, [place.value])[place.value]
        z = after.run(inputs, [there])[there]
        comparable = right.ndim > 1 and right.shape == z.shape and right.dtype.kind == "f"
        if not comparable or not np.all(np.isfinite(z)):
            return None
        return Site(place, before, after, inputs, z, alignment, view)

    def normalized(self, slope: Array, shift: Array) -> Array:
        """The batch norm's result with this slope and shift."""
        result: Array = self.along(slope) * self.x + self.along(shift)
        return result

    def along(self, values: Array) -> Array:
        """A number per channel, as it broadcasts against the batch norm's values."""
        return np.asarray(values, np.float64).reshape(1, -1, *(1,) * (self.x.ndim - 2))

    def predicted(self, y: Array) -> Array:
        """The value of the place if the batch norm's result were y."""
        if self.place.own:
            return y
        given = {name: self._right[name] for name in self.place.frontier}
        name = self.place.value
        return self._before.run({**given, self.norm.output: y}, [name])[name]

    def left(self, y: Array) -> float:
        """The error that stays, of the size of the right value, if the result were y."""
        if not np.all(np.isfinite(y)):
            return np.inf
        with np.errstate(all="ignore"):
            predicted = self.predicted(y)
            gap = np.where(self.usable, predicted - self.actual, 0.0)
            return float(np.linalg.norm(gap.ravel()) / np.linalg.norm(self.right.ravel()))

    def input_with(self, order: Array) -> Array | None:
        """The batch norm's input if the grouped convolution in front had its kernels in this order.

        None where no such convolution stands there.
        """
        node = self._view.producers.get(self.norm.input)
        if node is None or node.op_type != "Conv" or attributes(node).get("group", 1) == 1:
            return None
        if not all(self._view.is_constant(name) for name in node.input[1:] if name):
            return None
        if self._view.constant(node.input[1]).value.shape[0] != len(order):
            return None
        held = {name: self._view.constant(name).value[order] for name in node.input[1:] if name}
        given = {name: self._right[name] for name in self.place.frontier}
        given.pop(self.norm.input, None)
        try:
            return self._before.run({**given, **held}, [self.norm.input])[self.norm.input]
        except BnfoldError:
            return None

    def wrong_channels(self, limit: float) -> list[int]:
        """The channels that are off, by more than `limit` and 1 % of the worst."""
        if self.place.own:
            gap, size = _by_channel(self.actual - self.right), _by_channel(self.right)
            off = np.linalg.norm(gap, axis=1)
            floor = limit * np.linalg.norm(size, axis=1)
        else:
            with np.errstate(all="ignore"):
                off = np.nan_to_num(np.abs(self.slope / self.norm.slope - 1))
            off, floor = np.maximum(off, self.misfit), np.full(len(off), limit)
        return [int(c) for c in np.flatnonzero((off > floor) & (off > 0.01 * off.max(initial=0)))]

    # ------------------------------------------------------------------------------ the fit

    def _fitted_own(self) -> tuple[Array, Array, Array]:
        """Least squares of the wrong values over the batch norm's inputs, channel by channel."""
        x, y = _by_channel(self.x), _by_channel(self.actual)
        centred = x - x.mean(axis=1, keepdims=True)
        spread = (centred**2).sum(axis=1)
        size = (x**2).sum(axis=1)
        with np.errstate(all="ignore"):
            slope = (centred * y).sum(axis=1) / spread
        told = (x.shape[1] > 2) & (spread > 1e-12 * size)
        slope = np.where(told, slope, self.norm.slope)
        shift = y.mean(axis=1) - slope * x.mean(axis=1)
        rest = y - slope[:, None] * x - shift[:, None]
        with np.errstate(all="ignore"):
            misfit = np.nan_to_num(np.linalg.norm(rest, axis=1) / np.linalg.norm(y, axis=1))
        return slope, shift, misfit

    def _fitted_through(self) -> tuple[Array, Array, Array]:
        """Slopes by pushing each channel in both networks; the shifts stay unknown."""
        channels = self.x.shape[1]
        slope = np.full(channels, np.nan)
        misfit = np.zeros(channels)
        if self.norm.input in self._there:
            for first in range(0, channels, TOGETHER):
                chosen = np.arange(first, min(first + TOGETHER, channels))
                try:
                    here, there = self._answers(chosen)
                except BnfoldError:
                    break
                with np.errstate(all="ignore"):
                    factor = (here * there).sum(axis=1) / (here**2).sum(axis=1)
                    rest = np.linalg.norm(there - factor[:, None] * here, axis=1)
                    misfit[chosen] = np.nan_to_num(rest / np.linalg.norm(there, axis=1))
                slope[chosen] = factor * self.norm.slope[chosen]
        return slope, np.full(channels, np.nan), misfit

    def _answers(self, channels: Array) -> tuple[Array, Array]:
        """How the value answers to a push of each channel: of the original, of the folded network.

        Both (channels, elements). The first row of the batch stands for all.
        """
        rows = len(channels) + 1
        right = {
            name: np.repeat(self._right[name][:1], rows, axis=0) for name in self.place.frontier
        }
        x = np.repeat(self.x[:1], rows, axis=0)
        size = np.abs(self.x[0]).mean() or 1.0
        for row, channel in enumerate(channels):
            x[row + 1, channel] += size
        value = self.place.value
        here = self._before.run({**right, self.norm.input: x}, [value])[value]
        there = self._there
        given = {
            there[name]: self._alignment.written(name, array)
            for name, array in {**right, self.norm.input: x}.items()
            if name in there
        }
        answer = self._after.run(given, [there[value]])[there[value]]
        back, usable = self._alignment.read_back(value, answer)
        flat = [np.where(usable, a, 0.0).reshape(rows, -1) for a in (here, back)]
        return flat[0][1:] - flat[0][:1], flat[1][1:] - flat[1][:1]


def _by_channel(values: Array) -> Array:
    """(channels, everything else)."""
    return np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
