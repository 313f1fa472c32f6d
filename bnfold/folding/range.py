"""The range of number types: what a fold may make of weights and values, each in its own type.

float16 ends at 65504 and loses digits below 6e-5; bfloat16 and float32 end near 1e38, which only
broken statistics reach. So a plan is read once more, in numbers: every new weight, and the values
that the network carries, as large as its batch norms say they are. What is out of range may be
carried at 2^k times its size instead, which costs no digit, where the layers around it allow that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce

import ml_dtypes
import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Gauge, canonical
from bnfold.folding.constants import FLOATS, Constant, constant
from bnfold.folding.merging import Merge
from bnfold.folding.network import Network
from bnfold.folding.rules import relations_of, rewritable_slots, rewritten
from bnfold.folding.rules.node import Opaque, dims, label, real, weights
from bnfold.folding.rules.normalization import normalization_map
from bnfold.folding.rules.relations import Gauges, Repair
from bnfold.folding.wave import Conflict, Wave
from bnfold.graph import is_batch_norm

_SPREADS = 32  # the largest number expected of a value, in standard deviations from its mean
# the sizes expected of a value that no batch norm tells anything about
_USUAL_LARGE, _USUAL_SMALL = 4000.0, 2.0**-10
_SLACK = 2.0**4  # a weight may lose four binary digits
_ROOM = 2.0**40  # a type with so much room beyond a change of scale needs no closer look


class OutOfRange(Conflict):
    """What a plan makes too large or too small for its type.

    excess: how many times too large (above 1) or too small (below 1). values: those whose size
    matters, the first one most.
    """

    def __init__(self, text: str, excess: float, values: Iterable[ir.Value]) -> None:
        super().__init__(text)
        self.excess, self.values = excess, tuple(values)


@dataclass(frozen=True)
class Limits:
    """A floating type: its largest number, and the smallest that has all the type's digits."""

    name: str
    largest: float
    smallest: float

    @staticmethod
    def of(dtype: ir.DataType | None) -> Limits | None:
        """The limits of a type; None where it is no floating type of a network's values."""
        if dtype is None or dtype not in FLOATS:
            return None
        info = ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
        return Limits(str(dtype.numpy()), float(info.max), float(info.smallest_normal))


def _regular(scale: Array) -> Array:
    """The sizes of a scale, NaN on channels that are constants."""
    size = np.abs(scale)
    return np.where((size == 0) | np.isinf(size), np.nan, size)


class Guard:
    """Holds gauges against the number types of a network."""

    def __init__(self, network: Network) -> None:
        self._nodes = network.nodes
        self._largest: dict[ir.Node, float] = {}
        self._faintest: dict[ir.Node, float] = {}

    def check(self, network: Network, touched: Iterable[ir.Value], gauge: Gauges) -> None:
        """Raises OutOfRange where the gauges of these values, which are new, leave a type."""
        values = list(touched)
        for value in values:
            if not any(user in network.gone and is_batch_norm(user) for user, _ in value.uses()):
                # else it becomes the output of that batch norm, whose own size counts
                self._check_value(value, gauge(value))
        for node in dict.fromkeys(node for value in values for node in network.around(value)):
            merge = network.merged(node)
            if merge is not None:
                self.check_merge(merge, gauge)
            elif node not in network.gone:
                self._check_constants(node, network.repair(node), gauge)

    def check_merge(self, merge: Merge, gauge: Gauges) -> None:
        """Raises OutOfRange where the one convolution of parallel branches leaves its type."""
        held = constant(merge.host.inputs[1])
        limits = Limits.of(held.dtype) if held is not None else None
        around = [merge.result, *merge.sources]
        form = merge.form(gauge)
        for new in (*(form.constants or {}).values(), *(step.constant for step in form.steps)):
            _check_largest(new, limits, f"of {label(merge.host)}", around)

    # --- values

    def _check_value(self, value: ir.Value, gauge: Gauge) -> None:
        limits, scale = Limits.of(value.dtype), _regular(gauge.scale)
        if limits is None or np.isnan(scale).all():
            return
        if np.nanmax(scale) * _ROOM < limits.largest and np.nanmin(scale) > limits.smallest * _ROOM:
            return
        large, spread = self._sizes.get(value, (np.array(_USUAL_LARGE), np.array(_USUAL_SMALL)))
        over, under = scale * large / limits.largest, scale * spread / limits.smallest
        # a network that leaves the range by itself is not made worse
        over = np.where((over > 1) & (large <= limits.largest), over, 1)
        under = np.where((under < 1) & (spread >= limits.smallest), under, 1)
        for excess, what in ((over, "may not hold"), (under, "holds with fewer digits")):
            worst = int(np.argmax(np.abs(np.log2(excess))))
            if excess.reshape(-1)[worst] != 1:
                times = np.broadcast_to(scale, excess.shape).reshape(-1)[worst]
                raise OutOfRange(
                    f"'{value.name}' would be carried at {times:.3g} times its size, which"
                    f" {limits.name} {what}",
                    float(excess.reshape(-1)[worst]),
                    (value,),
                )

    @cached_property
    def _sizes(self) -> Mapping[ir.Value, tuple[Array, Array]]:
        """The largest number expected of each value, and its spread.

        A batch norm knows both sides of itself. From there sizes move as scales do: ahead through
        whatever passes a scale, and back to values that nothing in front of them tells about.
        """
        large, spread = _known_sizes(self._nodes)
        _spread_sizes(self._nodes, large, np.add)
        _spread_sizes(self._nodes, spread, np.maximum)

        def usual(known: Array, size: float) -> Array:
            return np.where(np.isnan(known), size, known)

        return {
            value: (usual(large[value], _USUAL_LARGE), usual(spread[value], _USUAL_SMALL))
            for value in large
            if value in spread
        }

    # --- constants

    def _check_constants(self, node: ir.Node, repair: Repair | None, gauge: Gauges) -> None:
        form = repair.form(gauge) if repair is not None else None
        for step in form.steps if form is not None else ():
            finite = np.where(np.isfinite(step.constant), step.constant, 0)
            _check_largest(
                finite, Limits.of(node.outputs[0].dtype), f"behind {label(node)}", _data(node)
            )
        slots = rewritable_slots(node)
        if not slots or (form is not None and form.constants is None):
            return
        held = {slot: constant(node.inputs[slot]) for slot in slots if slot < len(node.inputs)}
        types = [Limits.of(c.dtype) for c in held.values() if c is not None]
        known = [limits for limits in types if limits is not None]
        if not known or self._surely_in_range(node, held, known, gauge):
            return
        absorbs = not relations_of(node).scales  # else the constants are added, not multiplied
        constants = form.constants if form is not None else None
        for slot, new in (constants or rewritten(node, gauge)).items():
            before = held.get(slot)
            limits = Limits.of(before.dtype) if before is not None else known[0]
            if before is not None and not np.all(np.isfinite(before.array)):
                raise Conflict(f"the constant '{before.root.name}' holds NaN or infinity")
            where = f"of {label(node)}" if before is None else f"'{before.root.name}'"
            _check_largest(new, limits, where, _data(node))
            if absorbs and slot == slots[0] and before is not None and limits is not None:
                faint = _faintest(new, before.array, limits.smallest / _SLACK)
                if faint is not None and self._matters(node, slot, before, gauge, limits):
                    raise OutOfRange(
                        f"a channel of the constant {where} would be as small as {faint:.3g}, where"
                        f" {limits.name} loses digits",
                        faint / limits.smallest,
                        _data(node),
                    )

    def _surely_in_range(
        self,
        node: ir.Node,
        held: Mapping[int, Constant | None],
        types: list[Limits],
        gauge: Gauges,
    ) -> bool:
        """A bound that costs little says that no new constant of this node leaves its type."""
        if is_batch_norm(node):
            return False  # it multiplies its constants with each other
        constants = [c for c in held.values() if c is not None]
        if node not in self._largest:
            self._largest[node] = sum(_size(c) for c in constants) * (
                1 + max(map(_peak, constants))
            )
        peak, stretch = self._largest[node], 1.0
        for value in _data(node):
            around = gauge(value)
            size = _regular(around.scale)
            stretch *= float(np.nanmax(np.maximum(size, 1 / size), initial=1.0))
            peak *= 1 + float(np.max(np.abs(around.origin)))
        if peak * stretch * _ROOM > min(t.largest for t in types):
            return False
        if stretch < _ROOM and all(t.smallest * _ROOM**2 < 1 for t in types):
            return True  # only weights of 2^-40 and less could fall out, and those are none
        if node not in self._faintest:
            self._faintest[node] = _faintest_slice(constants[0])
        return self._faintest[node] / stretch >= max(t.smallest for t in types)

    def _matters(
        self, node: ir.Node, slot: int, before: Constant, gauge: Gauges, limits: Limits
    ) -> bool:
        """Digits that a weight loses matter unless the type loses them in the output as well."""

        def lifted(value: ir.Value) -> Gauge:
            """The gauge, were its faint channels carried large enough to have all digits."""
            own, room = gauge(value), Limits.of(value.dtype)
            if value not in node.outputs or value not in self._sizes or room is None:
                return own
            carried = _regular(own.scale) * self._sizes[value][1]
            return Gauge(own.scale * np.fmax(1, room.smallest / carried), own.origin)

        new = rewritten(node, lifted)[slot]
        return _faintest(new, before.array, limits.smallest / _SLACK) is not None


def _check_largest(
    new: Array, limits: Limits | None, where: str, around: Iterable[ir.Value]
) -> None:
    peak = float(np.max(np.abs(new), initial=0))
    if limits is not None and not peak <= limits.largest:
        raise OutOfRange(
            f"the constant {where} would be as large as {peak:.3g}, which {limits.name} does not"
            " hold",
            peak / limits.largest,
            around,
        )


def _data(node: ir.Node) -> list[ir.Value]:
    """The values around a node that a network computes, what it makes first."""
    around = (*node.outputs[:1], *node.inputs)
    return [v for v in around if v is not None and v.shape is not None and constant(v) is None]


def _slices(array: Array) -> Iterator[Array]:
    """The largest magnitude of each slice across each axis; a scalar is one slice."""
    size = np.abs(array)
    if not array.ndim:
        yield size
    for axis in range(array.ndim):
        yield np.max(size, axis=tuple(i for i in range(array.ndim) if i != axis), initial=0)


def _size(held: Constant) -> int:
    return int(np.prod(held.shape))


def _peak(held: Constant) -> float:
    """The largest magnitude."""
    stored = held.stored
    return max(float(np.max(stored, initial=0)), -float(np.min(stored, initial=0)))


def _faintest_slice(held: Constant) -> float:
    """The least of the largest magnitudes of the slices of a constant, 1 at most."""
    slices = _slices(held.array)
    return min(float(np.min(size, where=size > 0, initial=1)) for size in slices)


def _faintest(new: Array, before: Array, bound: float) -> float | None:
    """The largest number of the slice that falls farthest below the bound, if one does.

    What was below it in the original is left out: nothing is known of its digits.
    """
    if new.shape != before.shape:
        return None
    found = [
        float(np.min(now, where=(now > 0) & (now < bound) & (was >= bound), initial=np.inf))
        for now, was in zip(_slices(new), _slices(before), strict=True)
    ]
    faintest = min(found, default=np.inf)
    return faintest if faintest < bound else None


# --- how large the values are ---------------------------------------------------------------------


def _known_sizes(nodes: Iterable[ir.Node]) -> tuple[dict[ir.Value, Array], dict[ir.Value, Array]]:
    """On both sides of the batch norms: the largest number expected, and the spread."""
    large: dict[ir.Value, Array] = {}
    spread: dict[ir.Value, Array] = {}
    for node in nodes:
        try:
            shape = normalization_map(node).scale.shape if is_batch_norm(node) else None
        except Opaque:
            continue
        if shape is None:
            continue
        gamma, beta, mean, var = (np.abs(weights(node, n)).reshape(shape) for n in (1, 2, 3, 4))
        deviation = np.sqrt(var + real(node, "epsilon", 1e-5))
        for value, center, size in (
            (node.inputs[0], mean, deviation),
            (node.outputs[0], beta, gamma),
        ):
            if value is not None:
                large.setdefault(value, center + _SPREADS * size)
                spread.setdefault(value, size)
    return large, spread


def _spread_sizes(
    nodes: Iterable[ir.Node],
    sizes: dict[ir.Value, Array],
    together: Callable[[Array, Array], Array],
) -> None:
    """Sizes ahead in the order of the network, then back; `together` joins those of a sum."""
    asks = [(node, relations_of(node)) for node in nodes if not is_batch_norm(node)]

    def unit(value: ir.Value) -> Array:
        return np.ones((1,) * len(dims(value)))

    def put(value: ir.Value, array: Array | None) -> None:
        if array is not None:
            had = sizes.get(value, np.array(np.nan))
            sizes[value] = canonical(np.where(np.isnan(had), array, had))

    for _, ask in asks:
        for total in ask.sums:
            nothing = np.array(np.nan)
            found = [sizes.get(term.value, nothing * unit(term.value)) for term in total.terms]
            terms = [term.lift(size) for term, size in zip(total.terms, found, strict=True)]
            put(total.result, reduce(together, terms))
        for tie in ask.scales if not ask.sums else ():
            if tie.a in sizes:
                put(tie.b, tie.forward(sizes[tie.a], unit))
    for _, ask in reversed(asks):
        for tie in ask.scales:
            if tie.b in sizes:
                put(tie.a, tie.backward(sizes[tie.b], unit))


# --- carrying a value at another size -------------------------------------------------------------


def remedies(fault: OutOfRange, gauge: Gauges) -> Iterator[tuple[ir.Value, Array]]:
    """Values, and the powers of two by which their size could change to mend a fault.

    One power for all channels, as large as it takes; or channel by channel, so that all of the
    change of size that the plan makes there is undone, or half of it.
    """
    power = np.ceil(np.clip(abs(np.log2(fault.excess)), 1, 100))
    for value in fault.values:
        scale = _regular(gauge(value).scale)
        for sign in (-1, 1):
            yield value, np.full((1,) * scale.ndim, 2.0 ** (sign * power))
        for part in (1, 0.5):
            yield value, 2.0 ** -np.round(part * np.log2(np.where(np.isnan(scale), 1, scale)))


def rescaled(network: Network, value: ir.Value, factor: Array) -> tuple[Wave, Wave]:
    """The scales and origins if a value is carried at a multiple of its size. Raises Conflict."""
    by = next(iter(network.around(value)))
    scales = Wave(network)
    wanted = np.where(factor == 1, np.nan, network.gauge(value).scale * factor)
    scales.put(value, canonical(wanted), by)
    scales = scales.settle()
    return scales, Wave(network, scales).follow_scales()
