"""A plain fold, judged by its weights without a plan.

Other tools fold a batch norm into the linear layer in front of it and move nothing else. Then the
weights must be gamma / sqrt(var + eps) times the original's, to a few roundings of float32
arithmetic, and that can be seen without data: in a wide network one wrong channel in a thousand
is far below what float32 itself loses on the way to the outputs, where gate B looks.

What is near that product and not equal to it is a wrong fold, or a right one that carries a
channel at another scale, which a later layer gives back. Another scale is one factor for all
weights of a channel, above 1 in one layer and below 1 in another. So layers are wrong for certain
where one alone deviates, where all that do are near the product and lie on one side of it, and
where weights near it between the same two channels, the taps of a kernel, have no common factor;
and only where the constants of all other operators are what they were, for a Mul can give a scale
back too. Where every weight holds, so must the biases, but for a shift, which shows in two of them.
Nothing is said of anything else: of files in which a layer is far from the product (gate B sees
that) or a batch norm went elsewhere, and of channels in another order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError, capital
from bnfold.proof.algebra.equations import Linear, read_linear
from bnfold.proof.exact.alignment import PASSING, Alignment
from bnfold.proof.exact.counterpart import View, attributes, same_constant
from bnfold.proof.exact.layers import Norm, is_norm, norms_of
from bnfold.proof.figures.verdicts import GateResult

Array = np.ndarray[Any, np.dtype[Any]]

ROUNDINGS = 8  # of float32 arithmetic: eps added, root, quotient, product; in any order
# operators whose attributes say what they compute, and that no tool writes in another way
SPOKEN = ("MaxPool", "AveragePool", "Clip", "LeakyRelu", "Elu", "Celu", "Selu", "HardSigmoid",
          "ThresholdedRelu", "Softmax", "LogSoftmax", "InstanceNormalization", "LayerNormalization",
          "GroupNormalization", "LRN", "DepthToSpace", "SpaceToDepth", "Gelu")  # fmt: skip
NEAR = 0.1  # where most weights are further from the product, they were folded in another way


@dataclass(frozen=True)
class Deviation:
    """A layer of the folded graph and the channels whose weights are not what they should be.

    norm: the batch norm that it took up, None for a layer without one. low, high: the least and the
    greatest factor beyond the exact product, minus 1; 0 where there is none below, or above.
    near: whether all its weights are near the product. torn: the channels with a kernel that is
    near it and whose taps have no factor in common. roundings: the worst of all.
    """

    norm: str | None
    node: str
    op_type: str
    channels: int
    wrong: tuple[int, ...]
    torn: tuple[int, ...]
    near: bool
    low: float
    high: float
    roundings: float
    what: str = "weights"

    @property
    def sentence(self) -> str:
        """What is wrong with it."""
        shown = ", ".join(str(channel) for channel in self.wrong[:4])
        more = ", ..." if len(self.wrong) > 4 else ""
        product = "original's"
        if self.what == "bias":
            of = f" beside the batch norm '{self.norm}'" if self.norm is not None else ""
            return (
                f"{self.op_type} '{self.node}': the bias of {len(self.wrong)} of {self.channels} "
                f"channels ({shown}{more}) is not what it should be{of}; it is off by "
                f"{self.roundings:.3g} roundings of its terms."
            )
        if self.norm is not None:
            product += f" times gamma / sqrt(var + eps) of '{self.norm}'"
        return (
            f"{self.op_type} '{self.node}': the weights of {len(self.wrong)} of {self.channels} "
            f"channels ({shown}{more}) are not the {product}; {self._size}."
        )

    @property
    def _size(self) -> str:
        worst = max(-self.low, self.high)
        if not math.isfinite(worst):
            return "one that should be 0, or a number, is not"
        return f"they are off by up to {worst:.2g} of themselves ({self.roundings:.3g} roundings)"


@dataclass(frozen=True)
class PlainFold:
    """Two files that are a plain fold: its linear layers, and those that deviate.

    roundings: the greatest deviation of all layers' weights. wrong: layers whose weights are wrong
    for certain, in order of execution. unsure: those that another scale or shift may explain.
    untouched: whether constants and attributes of all other operators are what they were.
    """

    layers: int
    roundings: float
    wrong: tuple[Deviation, ...]
    unsure: tuple[Deviation, ...]
    untouched: bool

    @property
    def passed(self) -> bool:
        """True when every linear layer holds what a plain fold puts there, and nothing moved."""
        return not self.wrong and not self.unsure and self.untouched


class _NotPlainError(Exception):
    """Something was folded in another way."""


@dataclass(frozen=True)
class _Held:
    """A layer whose weights hold: the roundings they are off by; its bias where that is wrong."""

    roundings: float
    bias: Deviation | None


def read_plain_fold(before: View, after: View) -> PlainFold | None:
    """What the weights of an original and of a folded graph say; None where it is no plain fold."""
    try:
        judged = list(_judged_layers(before, after))
        untouched = _rest(before) == _rest(after)
    except (_NotPlainError, BnfoldError):
        return None
    off = [found for found in judged if isinstance(found, Deviation)]
    if off:
        sides = (any(d.low for d in off), any(d.high for d in off))
        together = all(d.near for d in off) and not all(sides)
    else:  # the scales are the product's, so nothing but a shift can explain a bias
        off = [found.bias for found in judged if isinstance(found, _Held) and found.bias]
        together = False
    certain = off if together or len(off) == 1 else [d for d in off if d.torn]
    wrong = tuple(certain) if untouched else ()
    worst = max((found.roundings for found in judged), default=0.0)
    return PlainFold(len(judged), worst, wrong, tuple(d for d in off if d not in wrong), untouched)


def _rest(view: View) -> Counter[object]:
    """What no plain fold changes: the float constants that neither a linear layer nor a batch norm
    reads, and the attributes of operators that say what they compute."""
    found: Counter[object] = Counter()
    for node in view.nodes:
        if is_norm(node) or read_linear([node], view) is not None:
            continue
        if node.op_type in SPOKEN and not node.domain:
            found[(node.op_type, *_said(node, view.opsets.get("", 1)))] += 1
        for name in node.input:
            if name and view.is_constant(name) and not view.is_constant(node.output[0]):
                value = view.constant(name).value
                if value.dtype.kind == "f":
                    found[np.asarray(value, np.float32).tobytes()] += 1
    return found


def _said(node: onnx.NodeProto, opset: int) -> list[str]:
    """A node's attributes but those that say what is so anyway."""
    known = onnx.defs.get_schema(node.op_type, opset).attributes
    usual = {name: onnx.helper.get_attribute_value(a.default_value)
             for name, a in known.items() if a.default_value.name}  # fmt: skip
    given = attributes(node)
    if not any(given.get("pads", ())) and given.get("auto_pad", b"NOTSET") == b"NOTSET":
        usual |= {name: given.get(name) for name in ("pads", "count_include_pad")}
    return sorted(f"{name}={given[name]}" for name in given if given[name] != usual.get(name))


def _judged_layers(before: View, after: View) -> Iterator[Deviation | _Held]:
    """For each linear layer how many roundings its weights are off, or where they are too much."""
    there = Alignment.of(before, after, None, None).there
    behind = {_source(norm.input, before): norm for norm in norms_of(before)}
    gone = 0
    for node in before.nodes:
        mine = read_linear([node], before)
        if mine is None:
            continue
        norm = behind.get(node.output[0])
        if norm is not None and _stays(norm, there, before, after):
            norm = None
        gone += norm is not None
        name = there.get(node.output[0] if norm is None else norm.output, "")
        producer = after.producers.get(_source(name, after))
        theirs = read_linear([producer], after) if producer is not None else None
        if theirs is None or not _alike(mine, theirs):
            raise _NotPlainError
        yield _judged(mine, theirs, norm, before.label(node), node.op_type)
    if not gone or gone < sum(not _stays(norm, there, before, after) for norm in behind.values()):
        raise _NotPlainError  # none, or one behind something that is no linear layer


def _source(name: str, view: View) -> str:
    """The value that only passes through to this one."""
    while name in view.producers and view.producers[name].op_type in PASSING:
        name = view.producers[name].input[0]
    return name


def _alike(mine: Linear, theirs: Linear) -> bool:
    return mine.settings == theirs.settings and mine.weight.shape == theirs.weight.shape


def _stays(norm: Norm, there: Mapping[str, str], before: View, after: View) -> bool:
    """Whether the folded graph has the batch norm too. Raises _NotPlainError for another one."""
    node = after.producers.get(there.get(norm.output, ""))
    if node is None or not is_norm(node):
        return False
    pairs = zip(before.producers[norm.output].input[1:], node.input[1:], strict=True)
    if not all(same_constant(mine, before, theirs, after) for mine, theirs in pairs):
        raise _NotPlainError
    return True


def _judged(mine: Linear, theirs: Linear, norm: Norm | None, node: str, op_type: str
            ) -> Deviation | _Held:  # fmt: skip
    """Raises _NotPlainError where most weights are far from the product."""
    exact = mine.weight
    if norm is not None:
        if norm.parameters is None:
            raise _NotPlainError
        exact = exact * norm.slope.reshape(mine.shape_out)[:, :, None, None]
    rounding = max(mine.rounding, theirs.rounding)
    smallest = rounding.tiny / rounding.unit
    told = np.abs(exact) > smallest
    with np.errstate(all="ignore"):
        # what is 0, or too small for a factor, has to stay so
        kept = np.where(np.abs(theirs.weight) <= 2 * smallest, 0.0, np.inf)
        factor = np.where(told, theirs.weight / np.where(told, exact, 1.0) - 1.0, kept)
    factor = np.where(np.isnan(factor), np.inf, factor)
    if not np.isfinite(exact).all() or np.mean(np.abs(factor) > NEAR) > 0.5:
        raise _NotPlainError
    rows = factor.reshape(-1, factor.shape[2] * factor.shape[3])
    allowed = ROUNDINGS * rounding.unit
    low, high = rows.min(axis=1), rows.max(axis=1)
    wrong = np.flatnonzero((low < -allowed) | (high > allowed))
    below, above = float(low.min(initial=0.0)), float(high.max(initial=0.0))
    if not wrong.size:
        bias = _judged_bias(mine, theirs, norm, node, op_type)
        return _Held(max(-below, above) / rounding.unit, bias)
    # weights of one input channel and one output channel share a factor, whatever the scales are
    whole = (told & (np.abs(factor) <= NEAR)).all(axis=3)
    apart = whole & (np.ptp(np.where(np.expand_dims(whole, 3), factor, 0.0), axis=3) > 2 * allowed)
    torn = np.flatnonzero(apart.any(axis=2))
    return Deviation(
        norm=norm.name if norm is not None else None,
        node=node,
        op_type=op_type,
        channels=len(rows),
        wrong=tuple(int(channel) for channel in wrong),
        torn=tuple(int(channel) for channel in torn),
        near=bool(np.all(np.abs(factor) <= NEAR)),
        low=below if below < -allowed else 0.0,
        high=above if above > allowed else 0.0,
        roundings=max(-below, above) / rounding.unit,
    )


def _judged_bias(mine: Linear, theirs: Linear, norm: Norm | None, node: str, op_type: str
                 ) -> Deviation | None:  # fmt: skip
    """The bias of a layer whose weights hold, against beta + slope * (bias - mean)."""
    exact, size = mine.bias.reshape(-1), np.abs(mine.bias).reshape(-1)
    if norm is not None:
        assert norm.parameters is not None
        beta, mean = norm.parameters["beta"], norm.parameters["mean"]
        exact = beta + norm.slope * (exact - mean)
        size = np.abs(beta) + np.abs(norm.slope) * (size + np.abs(mean))
    rounding = max(mine.rounding, theirs.rounding)
    with np.errstate(all="ignore"):
        off = np.abs(theirs.bias.reshape(-1) - exact) / (rounding.unit * size + rounding.tiny)
    wrong = np.flatnonzero(~(off <= ROUNDINGS))
    if not wrong.size:
        return None
    channels = tuple(int(channel) for channel in wrong)
    return Deviation(
        norm=norm.name if norm is not None else None, node=node, op_type=op_type,
        channels=len(off), wrong=channels, torn=(), near=True, low=0.0, high=0.0,
        roundings=float(np.max(np.nan_to_num(off, nan=np.inf))), what="bias",
    )  # fmt: skip


def doubt(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    """What deviates from a plain fold and may or may not be a fault; empty where nothing does."""
    found = read_plain_fold(View.of(before), View.of(after))
    if found is None or found.passed or found.wrong:
        return ""
    told = []
    if found.unsure:
        nodes = ", ".join(f"'{deviation.node}'" for deviation in found.unsure[:4])
        told.append(f"the weights or biases of {nodes} are not those of a plain fold")
    if not found.untouched:
        told.append("constants or attributes of other operators than linear layers were changed")
    return (
        f"Without the plan of this fold it cannot be told whether what differs is a fault: "
        f"{' and '.join(told)}. Give the fold's record."
    )


def judge(before: onnx.ModelProto, after: onnx.ModelProto) -> tuple[list[GateResult], str]:
    """Gate A where the plan is not known: its results, and what is to be said besides."""
    found = read_plain_fold(View.of(before), View.of(after))
    unknown = "the plan of this fold is not known"
    if found is None:
        return [], f"Gate A was not run: {unknown}, and it is no plain one."
    note = f"{capital(unknown)}: the weights were held against those of a plain one."
    wrong = [GateResult("A", "weights", d.node, d.roundings, ROUNDINGS, False, d.sentence)
             for d in found.wrong]  # fmt: skip
    if wrong or not found.passed:
        return wrong, note
    sentence = (
        f"all {found.layers} linear layers hold the weights of a plain fold, to "
        f"{found.roundings:.2g} roundings, and the biases that belong to them."
    )
    result = GateResult("A", "weights", "every linear layer", found.roundings, ROUNDINGS, True,
                        sentence)  # fmt: skip
    return [result], note
