"""What a fold multiplies each weight by: asked of the rules, with weights of ones.

A rule's new weight is the old one times a factor for what its output became and one for what its
input became; each is found by leaving the other side as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bnfold.errors import InputError
from bnfold.folding.affine import Array, Gauge, canonical
from bnfold.folding.apply import correspondence, set_root
from bnfold.folding.constants import Constant, constant
from bnfold.folding.plan import FoldPlan
from bnfold.folding.rules import rewritable_slots, rewritten
from bnfold.folding.rules.node import Opaque, integer
from bnfold.folding.rules.relations import Gauges


@dataclass(frozen=True, eq=False)
class Factors:
    """The arrays whose product multiplied a weight; they broadcast against it in shape `view`."""

    view: tuple[int, ...]
    arrays: tuple[Array, ...]


def factors_of(plan: FoldPlan, written: Collection[str]) -> dict[str, Factors]:
    """The factors of the weights of these names, as far as the rules give them.

    Of a weight that several nodes read, those of the first. A vector (a bias, a statistic) is as
    small as its factor and has none here.
    """
    gauges = {str(value.name): gauge for value, gauge in plan.gauges.items()}
    gone = {removed.node for removed in (*plan.removed, *plan.absorbed)}
    found: dict[str, Factors] = {}
    for node, probe in correspondence(plan.model, plan.model.clone()).items():
        slots = () if node in gone else rewritable_slots(node)
        held = {slot: _weight(probe, slot, written) for slot in slots}
        weights = {slot: weight for slot, weight in held.items() if weight is not None}
        for weight in weights.values():
            _fill_with_ones(weight)
        sides = _both_sides(probe, gauges) if weights else []
        for slot, weight in weights.items():
            dense = [side[slot] for side in sides if slot in side]
            # a new constant may be larger than the old one, where what was one number now differs
            if dense and all(array.shape == weight.shape for array in dense):
                groups = 1 if weight.views else integer(node, "group", 1)
                at_root = [weight.as_root(array) for array in dense]
                found.setdefault(str(weight.root.name), _factors(at_root, groups))
    return found


def _weight(node: ir.Node, slot: int, written: Collection[str]) -> Constant | None:
    held = constant(node.inputs[slot]) if slot < len(node.inputs) else None
    if held is None or held.tensor is None or len(held.tensor.shape) < 2:
        return None
    return held if held.root.name in written else None


def _fill_with_ones(weight: Constant) -> None:
    assert weight.tensor is not None
    dtype = weight.tensor.dtype
    ones = np.broadcast_to(np.ones((), dtype.numpy()), weight.tensor.shape.numpy())
    set_root(weight.root, ir.Tensor(ones, dtype=dtype, name=weight.tensor.name))


def _both_sides(probe: ir.Node, gauges: Mapping[str, Gauge]) -> list[dict[int, Array]]:
    """The rewritten constants where only the outputs are re-expressed, and only the inputs."""
    sides = (probe.outputs, probe.inputs)
    try:
        return [rewritten(probe, _gauges_at(side, gauges)) for side in sides]
    except (Opaque, InputError):
        return []


def _gauges_at(values: Sequence[ir.Value | None], gauges: Mapping[str, Gauge]) -> Gauges:
    def gauge(value: ir.Value) -> Gauge:
        found = gauges.get(str(value.name)) if value in values else None
        return found if found is not None else Gauge.identity(len(value.shape or ()))

    return gauge


def _factors(dense: Sequence[Array], groups: int) -> Factors:
    """Each factor with size 1 along the axes along which it is constant."""
    shape = dense[0].shape
    view = (groups, shape[0] // groups, *shape[1:]) if groups > 1 else shape
    small = [canonical(array.reshape(view)) for array in dense]
    return Factors(view, tuple(array for array in small if np.any(array != 1)))
