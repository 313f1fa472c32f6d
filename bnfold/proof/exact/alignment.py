"""Which value of the folded graph stands for which of the original, and how it is read back.

With the plan of a fold this is known: a value keeps its name or has an alias, and the folded graph
carries scale * (x - origin), its gauge. Without one, values are told by what they are computed
from: a value's key is its operator, its attributes and the keys of what it reads, where a map per
channel by constants (a batch norm, a Mul, an Add) has the key of what it maps. So the result of
Conv and batch norm has the key of the one Conv that took its place, whatever it is called. Values
that no key tells are held by name, where the same operator computes both.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import onnx

from bnfold.proof.exact.counterpart import Carried, Gauge, View, attributes, same_constant
from bnfold.proof.exact.layers import is_norm

Array = np.ndarray[Any, np.dtype[Any]]

CHANNEL_MAPS = ("Mul", "Add", "Sub", "Div")  # where one operand is constant
PASSING = ("Identity", "Dropout", "Cast")
SAME = ("Identity", "Dropout")  # what they give is what they are given, to the bit
PRODUCTS = ("Gemm", "MatMul")
VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
MOVES = (*VIEWS, "Slice", "Pad", "Expand", "Resize", "Tile")  # of their first input
DEPTHS = (None, 6, 3, 2)  # operators that a key looks back, one after the other
MEANS = ("GlobalAveragePool", "ReduceMean")
# attributes that tell nodes apart, with the number that may as well be left out
USUAL = {"strides": 1, "dilations": 1, "group": 1, "pads": 0, "axis": 0, "perm": -1}


@dataclass(frozen=True, eq=False)
class Alignment:
    """The pairs of values that can be compared: name in the original -> name in the folded graph.

    gauges: of the original's values, as far as the fold's plan is known. told: the names that are
    known to stand for each other, by the plan or as outputs; the others are so by their structure.
    """

    there: Mapping[str, str]
    gauges: Mapping[str, Gauge]
    told: frozenset[str]

    @staticmethod
    def of(
        before: View,
        after: View,
        gauges: Mapping[str, Gauge] | None,
        aliases: Mapping[str, str] | None,
    ) -> Alignment:
        """By the plan where its gauges are given, else by structure and then by name."""
        names = [name for node in before.nodes for name in node.output if name]
        names = [name for name in names if not before.is_constant(name)]
        if gauges is not None:
            renamed = {name: (aliases or {}).get(name, name) for name in names}
            known = {name: other for name, other in renamed.items() if after.knows(other)}
            return Alignment(known, gauges, frozenset(known))
        found, left_out = _by_structure(before, after)
        ends = {value.name for value in before.graph.output if after.knows(value.name)}
        found |= {name: name for name in ends}  # whatever computes them
        taken = set(found.values())
        for name in names:
            free = name not in left_out and name not in taken and name not in found
            if free and _same_operator(name, before, after):
                found[name] = name
        for node in reversed(before.nodes):
            if node.op_type in SAME and node.output[0] in found:
                found.setdefault(node.input[0], found[node.output[0]])
        there = {name: found[name] for name in names if name in found}
        return Alignment(there, {}, frozenset(ends))

    def comparable(self, name: str, x: Any, z: Any) -> bool:
        """Whether two values can be those of one name: told by the plan, or of one shape."""
        return name in self.told or np.shape(x) == np.shape(z)

    def holds(self, name: str) -> bool:
        """Whether the folded graph has the value itself."""
        return name in self.there and Carried.by(self.gauges.get(name)).is_identity

    def error(self, name: str, x: Any, z: Any) -> float:
        """How far z is from scale * (x - origin), relative to that."""
        gauge = self.gauges.get(name)
        if gauge is None or not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            return relative_error(x, z)
        if np.shape(x) != np.shape(z):
            return np.inf
        scale = np.asarray(gauge.scale, np.float64)
        usable = np.isfinite(scale) & (scale != 0)
        with np.errstate(all="ignore"):
            return relative_error(np.where(usable, scale * (x - gauge.origin), 0.0), z, usable)

    def written(self, name: str, x: Array) -> Array:
        """What the folded graph should hold for a value: a written constant where scale is 0."""
        gauge = self.gauges.get(name)
        if gauge is None:
            return x
        scale, origin = np.asarray(gauge.scale, np.float64), np.asarray(gauge.origin, np.float64)
        with np.errstate(all="ignore"):
            value = np.where(np.isfinite(scale), scale * (x - origin), 0.0)
        return np.where(scale == 0, origin + 0 * x, value)

    def read_back(self, name: str, z: Any) -> tuple[Any, Any]:
        """The value in the original's terms, z / scale + origin, and where it can be read so.

        A channel with scale 0 holds a constant that was written, and one with scale inf anything:
        both are left out (mask False). Values that are no floats come back as they are.
        """
        gauge = self.gauges.get(name)
        if gauge is None or not isinstance(z, np.ndarray) or z.dtype.kind != "f":
            return z, True
        scale, origin = np.asarray(gauge.scale, np.float64), np.asarray(gauge.origin, np.float64)
        usable = np.isfinite(scale) & (scale != 0)
        with np.errstate(all="ignore"):
            value = np.where(usable, z / np.where(usable, scale, 1.0) + origin, 0.0)
        return value, usable


def relative_error(x: Any, z: Any, usable: Any = True) -> float:
    """Distance of z from x over the size of x, by the 2-norm; inf for another shape or type.

    Elements that agree are right even where they are NaN or infinite; usable: what is compared. For
    integers and booleans 0 where all agree, else inf.
    """
    if not isinstance(x, np.ndarray) or not isinstance(z, np.ndarray):
        return 0.0
    if x.shape != z.shape:
        return np.inf
    if x.dtype.kind != "f":
        return 0.0 if np.array_equal(x, z) else np.inf
    with np.errstate(all="ignore"):
        same = (x == z) | (np.isnan(x) & np.isnan(z)) | ~np.broadcast_to(usable, x.shape)
        distance = float(np.linalg.norm(np.where(same, 0.0, z - x).ravel()))
        held = np.isfinite(x) & np.broadcast_to(usable, x.shape)
        size = float(np.linalg.norm(np.where(held, x, 0.0).ravel()))
    if distance == 0:
        return 0.0
    return distance / size if size and np.isfinite(distance) else np.inf


# ------------------------------------------------------------------------------ by structure


def _by_structure(before: View, after: View) -> tuple[dict[str, str], set[str]]:
    """The values of both graphs that have the same key, in the order in which they are computed.

    Where keys occur at another number of places, nothing is said of them. What is paired has a
    label of its own as its key from then on, so that all behind it may be paired too. Also the
    values of the original that have no counterpart although their chain has one.
    """
    first, second = _Chains(before), _Chains(after)
    pairs: list[tuple[str, str]] = []
    while found := next(filter(None, (_alike(first, second, depth) for depth in DEPTHS)), []):
        for head, other in found:
            label = f"pair {len(pairs)}"
            first.labels[head] = second.labels[other] = label
            pairs.append((head, other))
    members: dict[str, str] = {}
    for head, other in pairs:
        members |= _members(first, head, second, other)
    told = {name for head, _ in pairs for name in first.chains[head]}
    return members, told - members.keys()


def _alike(first: _Chains, second: _Chains, depth: int | None) -> list[tuple[str, str]]:
    """Chains of the same key that have no label yet, by their beginnings.

    Of keys that look back `depth` operators only, those that occur once.
    """
    here, there = first.unpaired(depth), second.unpaired(depth)
    return [
        pair
        for key, heads in here.items()
        if len(heads) == len(there.get(key, [])) and (depth is None or len(heads) == 1)
        for pair in zip(heads, there[key], strict=True)
    ]


def _members(first: _Chains, head: str, second: _Chains, other: str) -> dict[str, str]:
    """Which values of two chains stand for which, where a fold may have shortened one.

    The operator in front took the maps up, and what it gives is the end of the chain, unless it is
    the same one as before: then whoever reads the chain took them up, and its beginning is held.
    """
    chain, shorter = first.chains[head], second.chains[other]
    if len(chain) == len(shorter):
        return dict(zip(chain, shorter, strict=True))
    if not _same_constants(head, other, first.view, second.view):
        return {chain[-1]: shorter[-1]}
    begun = zip(chain, shorter, strict=False)
    return dict(takewhile(lambda pair: not {*pair} & (first.maps | second.maps), begun))


def _same_constants(name: str, other: str, before: View, after: View) -> bool:
    """Whether the nodes that compute two values read the same constants, or none."""
    if name not in before.producers or other not in after.producers:
        return True
    first, second = (
        [given for given in view.producers[value].input if given and view.is_constant(given)]
        for view, value in ((before, name), (after, other))
    )
    return len(first) == len(second) and all(
        same_constant(a, before, b, after) for a, b in zip(first, second, strict=True)
    )


class _Chains:
    """The chains of a graph: a value that is no map of another, and what maps or moves it.

    chains: by their beginnings, in order. maps: their members that are maps per channel. labels: of
    those that are paired, the key to take.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.chains: dict[str, list[str]] = {}
        self.labels: dict[str, str] = {}
        self.maps: set[str] = set()
        self._heads: dict[str, str] = {}
        self._made: list[tuple[str, int, onnx.NodeProto]] = []  # the beginnings that are computed
        for index, name in enumerate(value.name for value in view.graph.input):
            self.chains[name], self._heads[name] = [name], name
            self.labels[name] = f"input {index}"
        for node in view.nodes:
            for slot, name in enumerate(node.output):
                if name and not view.is_constant(name):
                    self._add(name, slot, node)

    def _add(self, name: str, slot: int, node: onnx.NodeProto) -> None:
        mapped = _mapped(node, self.view) if slot == 0 else None
        if mapped is None or mapped not in self._heads:
            self.chains[name], self._heads[name] = [name], name
            self._made.append((name, slot, node))
            return
        self._heads[name] = self._heads[mapped]
        chain = self.chains[self._heads[name]]
        if node.op_type in PASSING and chain[-1] == mapped:
            chain.pop()
        elif node.op_type not in VIEWS and node.op_type not in MOVES:
            self.maps.add(name)
        chain.append(name)

    def unpaired(self, depth: int | None) -> dict[str, list[str]]:
        """key -> the beginnings that have it and no label, in order of execution.

        depth: how many operators a key looks back; None: all of them.
        """
        keys = dict(self.labels)
        for _ in range(depth or 1):
            behind = keys if depth is None else dict(keys)
            for name, slot, node in self._made:
                if name not in self.labels:
                    keys[name] = self._key(node, slot, behind)
        found = defaultdict(list)
        for name, _, _ in self._made:
            if name not in self.labels:
                found[keys[name]].append(name)
        return found

    def _key(self, node: onnx.NodeProto, slot: int, keys: Mapping[str, str]) -> str:
        sources = self.view.sources(node)
        if node.op_type in MOVES:
            sources = sources[:1]  # where it moves them to may be computed in many ways
        behind = [keys.get(self._heads.get(name, name), "") for name in sources]
        parts = [_kind(node.op_type), str(slot), *_told(node, self.view), *behind]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _mapped(node: onnx.NodeProto, view: View) -> str | None:
    """What a node maps channel by channel, or moves on, None where it does something else."""
    sources = view.sources(node)
    if is_norm(node) or node.op_type in PASSING:
        return str(node.input[0])
    if node.op_type in CHANNEL_MAPS and len(sources) == 1:
        constant = any(view.is_constant(name) for name in node.input if name)
        return sources[0] if constant else None
    if node.op_type in MOVES:  # one step after another is one move
        before = view.producers.get(node.input[0])
        again = before is not None and before.op_type == node.op_type
        return str(node.input[0]) if again or node.op_type in VIEWS else None
    return None


def _kind(op_type: str) -> str:
    for alike in (PRODUCTS, VIEWS, MEANS):
        if op_type in alike:
            return alike[0]
    return op_type


def _told(node: onnx.NodeProto, view: View) -> Iterator[str]:
    """What tells a node from others of its operator, and does not change with a fold."""
    if node.op_type in (*VIEWS, *MEANS, *PRODUCTS):
        return
    given = attributes(node)
    for name, usual in USUAL.items():
        values = np.atleast_1d(given.get(name, usual))
        if np.any(values != usual):
            yield f"{name}={values.tolist()}"
    if node.op_type == "Conv" and node.input[1] in view.initializers:
        yield str(list(view.initializers[node.input[1]].dims))


def _same_operator(name: str, before: View, after: View) -> bool:
    here, there = before.producers.get(name), after.producers.get(name)
    if here is None or there is None:
        return False
    return _kind(here.op_type) == _kind(there.op_type)
