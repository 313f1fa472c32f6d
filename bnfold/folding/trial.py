"""A trial: the change of gauges by which one node would go, and all that it must pass.

The waves have found gauges that agree. Whether the folded network would be as right, as precise and
as quick as the original is asked here, of every node around the values that change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Gauge
from bnfold.folding.constants import constant
from bnfold.folding.holds import broken
from bnfold.folding.network import Network
from bnfold.folding.quantized import Unquantizable, requantized
from bnfold.folding.rules import rewritable_slots, rewritten
from bnfold.folding.rules.linear import matmul_bias
from bnfold.folding.rules.node import Opaque, input_of, name_of, optional_input, real, weights
from bnfold.folding.rules.relations import Gauges
from bnfold.folding.wave import Conflict, Wave
from bnfold.graph import is_batch_norm


@dataclass(frozen=True)
class Trial:
    """New scales and origins. extra: the operators that they bring. earlier: values whose gauges
    had changed before these waves set in.
    """

    network: Network
    scales: Wave
    origins: Wave
    extra: int = 0
    earlier: tuple[ir.Value, ...] = ()

    @cached_property
    def touched(self) -> list[ir.Value]:
        """The values whose gauges change."""
        touched = (*self.earlier, *self.scales.touched(), *self.origins.touched())
        return list(dict.fromkeys(touched))

    @cached_property
    def around(self) -> dict[ir.Node, tuple[int, ...]]:
        """The nodes that produce or read those values, with the operands that may be rewritten."""
        found = {node: () for value in self.touched for node in self.network.around(value)}
        gone = self.network.gone
        return {node: () if node in gone else rewritable_slots(node) for node in found}

    @property
    def burden(self) -> tuple[int, int]:
        """What a better way has less of."""
        return self.extra, len(self.touched)

    def gauge(self, value: ir.Value) -> Gauge:
        """The gauge of a value, were the trial to be taken."""
        return Gauge(self.scales.now(value), self.origins.now(value))


def check_result(trial: Trial) -> None:
    """Read the whole result back, knowing nothing of how it was found. Raises Conflict."""
    network = trial.network
    assert network.trying is not None
    nodes = {network.trying, *trial.around}
    fault = broken(network, nodes, trial.scales.now, trial.origins.now)
    if fault is not None:
        raise Conflict(fault)


# Measured on pre-activation networks: a stream moved 18 of its spreads away from its mean costs a
# factor 1.8 in R, 45 spreads 3, 300 spreads 22. Where there is no such channel nothing changes.
_FARTHEST = 32


def check_precision(trial: Trial) -> None:
    """A value that several layers read stays near its own mean. Raises Conflict.

    A batch norm knows mean and spread of what it reads. A channel of small gamma and ordinary beta
    asks for an origin beta / gamma spreads away, and the digits that this costs are lost to the
    other readers, of this value or of one that it is only a view of.
    """
    network, moved = trial.network, trial.origins.touched()
    if all(len({user for user, _ in value.uses()}) < 2 for value in moved):
        return
    norms = {user for value in moved for user, _ in value.uses()}
    for node in {network.trying, *norms}:
        if node is None or not is_batch_norm(node):
            continue
        try:
            value, shape = input_of(node, 0), network.map_of(node).affine.scale.shape
        except Opaque:
            continue
        mean = weights(node, 3).reshape(shape)
        spread = np.sqrt(weights(node, 4).reshape(shape) + real(node, "epsilon", 1e-5))
        scale = trial.scales.now(value)
        distance = np.abs(mean - trial.origins.now(value))
        far = distance > np.maximum(np.abs(mean), _FARTHEST * spread)
        far &= np.isfinite(scale) & (scale != 0)
        if np.any(far):
            raise Conflict(
                f"'{name_of(node)}' would see '{value.name}' moved"
                f" {np.max(np.where(far, distance / spread, 0)):.0f} of its spreads away, which"
                " would cost the other layers that read it their digits"
            )


def check_cost(trial: Trial) -> None:
    """A batch norm that goes leaves room for one addition; anything else for none. Conflict."""
    network = trial.network
    products = [node for node, slots in trial.around.items() if slots and node.op_type == "MatMul"]
    added = sum(
        _needs_bias(node, trial.gauge) and not _needs_bias(node, network.gauge) for node in products
    )
    assert network.trying is not None
    if added > (1 if is_batch_norm(network.trying) else 0):
        what = "batch norm" if is_batch_norm(network.trying) else network.trying.op_type
        raise Conflict(f"it would put {added} additions in the place of one {what}")


def _needs_bias(node: ir.Node, gauge: Gauges) -> bool:
    """True for a MatMul that, with these gauges, needs an Add behind it."""
    return bool(np.any(matmul_bias(node, gauge)))


def check_quantized(trial: Trial) -> None:
    """A weight that is held as integers stays so. Raises Conflict."""
    for node, slots in trial.around.items():
        held = {slot: constant(optional_input(node, slot)) for slot in slots}
        if not any(c is not None and c.dequantizer is not None for c in held.values()):
            continue
        for slot, array in rewritten(node, trial.gauge).items():
            c = held.get(slot)
            if c is not None and c.dequantizer is not None:
                try:
                    requantized(c, array)
                except Unquantizable as why:
                    name = c.dequantizer.inputs[0].name  # type: ignore[union-attr]
                    raise Conflict(f"the quantised weight '{name}' cannot take it: {why}") from None


def extra_operators(trial: Trial) -> int:
    """How many operators the repairs bring that these gauges ask for."""
    network, extra = trial.network, 0
    for node in {network.unit(node) for node in trial.around}:
        repair = network.repair(node)
        if repair is not None:
            before, after = repair.form(network.gauge), repair.form(trial.gauge)
            extra += after.extra_operators if after is not None else 0
            extra -= before.extra_operators if before is not None else 0
    return extra
