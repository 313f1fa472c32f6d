"""Whether gauges satisfy everything that nodes ask of them: the check behind the search.

The waves find gauges by implying one number from another; this reads the result back, relation by
relation, and knows nothing of how it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from bnfold.folding.affine import Array, Mask
from bnfold.folding.network import Network
from bnfold.folding.rules.node import label
from bnfold.folding.rules.relations import Sum, Tie

Numbers = Callable[[ir.Value], Array]
_ROUNDING = 1e-9  # of float64 sums and products, far below what one wrong number would leave


def broken(
    network: Network, nodes: Iterable[ir.Node], scales: Numbers, origins: Numbers
) -> str | None:
    """A sentence about the first relation that these scales and origins do not satisfy, or None."""
    for node in nodes:
        asks = network.relations(node)
        held = (
            all(_tie_holds(tie, scales, scales) for tie in asks.scales)
            and all(_tie_holds(tie, origins, scales) for tie in asks.origins)
            and all(_sum_holds(total, origins) for total in asks.sums)
            and all(np.all(d.holds(scales(d.value), origins(d.value))) for d in asks.demands)
        )
        if not held:
            return f"the gauges around {label(node)} do not agree"
    return None


def _near(a: Array, b: Array, size: Array | float = 0.0) -> Mask:
    with np.errstate(invalid="ignore"):
        room = _ROUNDING * np.maximum(np.maximum(np.abs(a), np.abs(b)), size)
        return np.asarray((a == b) | (np.abs(a - b) <= room))


def _tie_holds(tie: Tie, numbers: Numbers, scales: Numbers) -> bool:
    """One side is what the other implies; NaN implies nothing."""
    a, b = numbers(tie.a), numbers(tie.b)
    ahead = tie.forward(a, scales)
    if not tie.elementwise:
        return ahead is not None and bool(np.all(np.isnan(ahead) | _near(ahead, b)))
    back = tie.backward(b, scales)
    if ahead is None or back is None:
        return False
    silent = np.isnan(ahead) & np.isnan(back)
    return bool(np.all(silent | _near(ahead, b) | _near(back, a)))


def _sum_holds(total: Sum, origins: Numbers) -> bool:
    terms = [term.sign * term.lift(origins(term.value)) for term in total.terms]
    size = np.asarray(sum(np.abs(term) for term in terms))
    return bool(np.all(_near(origins(total.result), np.asarray(sum(terms)), size)))
