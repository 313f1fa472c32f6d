"""Random ONNX graphs for the fuzz: every operator of the table, shapes mostly square.

A graph grows from its inputs: each step draws an operator and the values it reads, biased to the
newest value and to a batch norm behind it. Everything is drawn through one `draw`, so hypothesis
can shrink a graph that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Pick = Callable[[int], int]  # a number below n


@dataclass(frozen=True)
class Live:
    """A float value of the growing graph and its shape at run time."""

    name: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass
class Builder:
    """The growing graph. dyadic: only numbers with which small graphs are exact in float64."""

    pick: Pick
    rng: np.random.Generator
    dyadic: bool
    opset: int = 20
    values: list[Live] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    inputs: list[tuple[Live, list[int | str]]] = field(default_factory=list)
    ids: Live | None = None  # an input of small integers, if the graph has one

    # --- choices

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[self.pick(len(choices))]

    def flag(self, once_in: int = 2) -> bool:
        """False is what hypothesis shrinks to."""
        return self.pick(once_in) == once_in - 1

    def value(self, fits: Callable[[Live], bool] = lambda _v: True) -> Live | None:
        """A value that fits, most often the newest."""
        found = [v for v in self.values if fits(v)]
        if not found:
            return None
        return found[-1 - self.pick(len(found))] if self.flag(3) else found[-1]

    # --- constants

    def constant(self, array: np.ndarray, *, may_share: bool = True) -> str:
        """An initializer; now and then an earlier one of the same shape and type instead."""
        may_share = may_share and array.dtype == np.float32
        same = [name for name in self.shared if self.constants[name].shape == array.shape]
        if may_share and same and self.flag(8):
            return str(self.one_of(same))
        name = f"k{len(self.constants)}"
        self.constants[name] = array
        if may_share:
            self.shared.append(name)
        return name

    def weight(self, array: np.ndarray) -> str:
        """A float constant, now and then behind views that lead to it."""
        if not self.flag(6):
            return self.constant(array)
        view = self.one_of(["Identity", "Transpose", "Reshape", "Unsqueeze"])
        if view == "Transpose" and array.ndim >= 2:
            perm = [*range(array.ndim)][::-1]
            name = self.constant(np.ascontiguousarray(np.transpose(array, perm)))
            return self.hidden("Transpose", [name], perm=perm)
        if view == "Reshape" and array.ndim >= 1:
            return self.hidden(view, [self.constant(array.reshape(-1)), self.integers(array.shape)])
        if view == "Unsqueeze" and array.ndim >= 1 and array.shape[0] == 1 and self.opset >= 13:
            return self.hidden(view, [self.constant(array[0]), self.integers([0])])
        return self.hidden("Identity", [self.constant(array)])

    def numbers(self, *shape: int, fan_in: int = 1) -> np.ndarray:
        if self.dyadic:
            return self.rng.integers(-2, 3, shape).astype(np.float32)
        return (self.rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    def factors(self, *shape: int) -> np.ndarray:
        """Numbers to multiply or divide by: never 0, of both signs."""
        if self.dyadic:
            return self.rng.choice([1, 2, 0.5, -1], shape).astype(np.float32)
        return (self.rng.uniform(0.5, 2, shape) * self.rng.choice([1, 1, -1], shape)).astype(
            np.float32
        )

    # --- nodes

    def node(
        self, op: str, reads: Sequence[str], *shapes: Sequence[int], **attributes: Any
    ) -> list[Live]:
        outs = [
            Live(f"v{len(self.values) + i}", tuple(int(n) for n in s)) for i, s in enumerate(shapes)
        ]
        self.nodes.append(helper.make_node(op, list(reads), [v.name for v in outs], **attributes))
        self.values.extend(outs)
        return outs

    def hidden(self, op: str, reads: Sequence[str], **attributes: Any) -> str:
        """A node whose output the other operators do not draw."""
        name = f"h{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(reads), [name], **attributes))
        return name

    def integers(self, numbers: Sequence[int]) -> str:
        return self.constant(np.array(numbers, np.int64))


Operator = Callable[[Builder], object]
OPERATORS: list[Operator] = []
OLD_OPERATORS: list[Operator] = []  # those whose nodes are valid in opset 9 as well
OLD = 9


def operator(times: int = 1, *, old: int = 0) -> Callable[[Operator], Operator]:
    """Register an operator, `times` as likely as the rest, `old` times in an old opset."""

    def register(function: Operator) -> Operator:
        OPERATORS.extend([function] * times)
        OLD_OPERATORS.extend([function] * old)
        return function

    return register


# --- batch norm and the operators with constants ------------------------------------------------


def gammas(b: Builder, channels: int) -> np.ndarray:
    """Positive, mixed signs, some or all zero, one; of real numbers some channels nearly dead."""
    kind = b.pick(6)
    size = b.factors(channels)
    if not b.dyadic and b.flag(4):
        size *= np.float32(10) ** -b.rng.integers(0, 7, channels).astype(np.float32)
    if kind in (0, 1):
        return np.abs(size)
    if kind == 2:
        return size
    if kind == 3:
        return size * b.rng.choice([0, 1], channels).astype(np.float32)
    if kind == 4:
        return np.ones(channels, np.float32)
    return -np.abs(size) if b.flag() else np.zeros(channels, np.float32)


@operator(times=6, old=4)
def batch_norm(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 2)
    return None if x is None else _normalize(b, x)


def _normalize(b: Builder, x: Live) -> list[Live]:
    channels = x.shape[1]
    shift = 0 if b.flag(4) else 1
    gamma, beta, mean = gammas(b, channels), b.numbers(channels), b.numbers(channels)
    if b.dyadic:
        eps, var = 0.25, b.rng.choice([0.75, 3.75, 0], channels).astype(np.float32)
    else:
        eps, var = 1e-3, b.rng.uniform(0.3, 3, channels).astype(np.float32)
    if b.flag(4):
        gamma, var = np.ones(channels, np.float32), np.full(channels, 1 - eps, np.float32)
    # the variance is never shared: another constant could be negative
    reads = [b.constant(a) for a in (gamma, shift * beta, shift * mean)]
    reads.append(b.constant(var, may_share=False))
    return b.node("BatchNormalization", [x.name, *reads], x.shape, epsilon=eps)


def _out_size(size: int, kernel: int, stride: int, dilation: int, pads: Sequence[int]) -> int:
    return (size + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1


@operator(times=6, old=4)
def conv(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 3 and v.shape[1] > 0)
    if x is None:
        return None
    spatial, channels, rank = x.shape[2:], x.shape[1], x.rank - 2
    groups = b.one_of([1, 1, *(g for g in (2, channels) if channels % g == 0)])
    outs = groups * b.one_of([channels // groups, 1, 2])
    kernel = [b.one_of([1, *(k for k in (2, 3) if k <= n)]) for n in spatial]
    weight = b.numbers(outs, channels // groups, *kernel, fan_in=channels * int(np.prod(kernel)))
    reads = [x.name, b.weight(weight)]
    if b.flag():
        reads.append(b.weight(b.numbers(outs)))
    kind = b.pick(6)
    if kind == 3:
        mode = b.one_of(["SAME_UPPER", "SAME_LOWER"])
        return b.node("Conv", reads, (x.shape[0], outs, *spatial), group=groups, auto_pad=mode)
    low, high = [int(kind == 2)] * rank, [int(kind == 2)] * rank
    if kind == 4:
        low, high = [b.pick(2) for _ in spatial], [b.pick(3) for _ in spatial]
    stride, dilation = b.one_of([1, 1, 2]), 2 if kind == 5 else 1
    sizes = [
        _out_size(n, k, stride, dilation, ends)
        for n, k, *ends in zip(spatial, kernel, low, high, strict=True)
    ]
    if min(sizes) < 1:
        return None
    return b.node(
        "Conv", reads, (x.shape[0], outs, *sizes), group=groups, pads=[*low, *high],
        strides=[stride] * rank, dilations=[dilation] * rank,
    )  # fmt: skip


@operator(times=2, old=1)
def branches(b: Builder) -> object:
    """Convolutions, batch norms and a value itself, of one value, added up."""
    x = b.value(lambda v: v.rank in (3, 4, 5) and v.shape[1] > 0 and min(v.shape[2:]) >= 3)
    if x is None:
        return None
    spatial, channels = len(x.shape) - 2, x.shape[1]
    total: Live | None = None
    for _ in range(2 + b.pick(3)):
        branch, kind = x, b.pick(6)
        if kind < 4:
            groups = b.one_of([1, *(g for g in (2, channels) if channels % g == 0)])
            size = b.one_of([3, 1])
            fan_in = channels // groups * size**spatial
            weight = b.numbers(channels, channels // groups, *[size] * spatial, fan_in=fan_in)
            reads = [x.name, b.constant(weight)]
            reads += [b.constant(b.numbers(channels))] if b.flag() else []
            pads = [size // 2] * 2 * spatial
            (branch,) = b.node("Conv", reads, x.shape, group=groups, pads=pads)
        if kind in (0, 1, 4):
            (branch,) = _normalize(b, branch)
        if total is None:
            total = branch
        else:
            pair = [total, branch] if b.flag() else [branch, total]
            op = b.one_of(["Add", "Add", "Sub", "Sum"])
            (total,) = b.node(op, [v.name for v in pair], x.shape)
    return total


@operator(times=2, old=1)
def conv_transpose(b: Builder) -> object:
    x = b.value(lambda v: 3 <= v.rank <= 5 and max(v.shape[2:]) <= 6)
    if x is None:
        return None
    spatial, channels, rank = x.shape[2:], x.shape[1], x.rank - 2
    groups = b.one_of([1, *(g for g in (2, channels) if channels % g == 0)])
    outs = b.one_of([channels // groups, 1, 2])
    kernel, stride = [b.one_of([1, 2, 3]) for _ in spatial], b.one_of([1, 2])
    weight = b.numbers(channels, outs, *kernel, fan_in=channels)
    reads = [x.name, b.weight(weight)]
    if b.flag():
        reads.append(b.weight(b.numbers(outs * groups)))
    pad, more = b.pick(2) if min(spatial) > 1 else 0, b.pick(2) if stride == 2 else 0
    sizes = [stride * (n - 1) + k - 2 * pad + more for n, k in zip(spatial, kernel, strict=True)]
    if min(sizes) < 1 or int(np.prod(sizes)) > 100:
        return None
    return b.node(
        "ConvTranspose", reads, (x.shape[0], outs * groups, *sizes), group=groups,
        strides=[stride] * rank, pads=[pad] * 2 * rank, output_padding=[more] * rank,
    )  # fmt: skip


@operator(times=2, old=2)
def gemm(b: Builder) -> object:
    x = b.value(lambda v: v.rank == 2)
    if x is None:
        return None
    flip_a, flip_b = int(b.flag(3)), int(b.flag())
    rows, ins = x.shape[::-1] if flip_a else x.shape
    outs = b.one_of([ins, 2, 3])
    weight = b.numbers(outs, ins, fan_in=ins) if flip_b else b.numbers(ins, outs, fan_in=ins)
    reads = [x.name, b.weight(weight)]
    shape = b.one_of([None, (outs,), (1, outs), (rows, 1), (rows, outs), (1,), ()])
    if shape is None and b.opset < 11:
        shape = (outs,)
    if shape is not None:
        reads.append(b.weight(b.numbers(*shape)))
    alpha, beta = b.one_of([1.0, 2.0, 0.5]), b.one_of([1.0, 2.0, 0.5])
    return b.node("Gemm", reads, (rows, outs), alpha=alpha, beta=beta, transA=flip_a, transB=flip_b)


@operator(times=3, old=2)
def matmul(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 2)
    if x is None:
        return None
    left = b.flag(4)
    ins = x.shape[-2] if left else x.shape[-1]
    outs = b.one_of([ins, 2, 3])
    front = x.shape[:-2] if b.flag(4) else ()
    shape = (*front, outs, ins) if left else (*front, ins, outs)
    weight = b.weight(b.numbers(*shape, fan_in=ins))
    if left:
        return b.node("MatMul", [weight, x.name], (*x.shape[:-2], outs, x.shape[-1]))
    return b.node("MatMul", [x.name, weight], (*x.shape[:-1], outs))


def _against(b: Builder, x: Live) -> tuple[int, ...]:
    """The shape of a constant that broadcasts against a value."""
    shape = [n if b.flag(3) else 1 for n in x.shape]
    if x.rank >= 2 and b.flag():
        shape[1] = x.shape[1]
    drop = b.pick(x.rank + 1) if b.flag() else 0
    while drop and shape and shape[0] == 1:
        shape, drop = shape[1:], drop - 1
    return tuple(shape)


@operator()
def recurrent(b: Builder) -> object:
    """RNN, GRU, LSTM over the first axis, of one or two directions."""
    x = b.value(lambda v: v.rank == 3)
    if x is None:
        return None
    op, both, hidden = b.one_of(["RNN", "GRU", "LSTM"]), b.flag(), b.one_of([1, 2])
    rows = {"RNN": 1, "GRU": 3, "LSTM": 4}[op] * hidden
    ways, ins = 1 + int(both), x.shape[2]
    reads = [x.name, b.weight(b.numbers(ways, rows, ins, fan_in=ins))]
    reads.append(b.weight(b.numbers(ways, rows, hidden)))
    if b.flag():
        reads.append(b.weight(b.numbers(ways, 2 * rows)))
    return b.node(
        op, reads, (x.shape[0], ways, x.shape[1], hidden), hidden_size=hidden,
        direction="bidirectional" if both else b.one_of(["forward", "reverse"]),
    )  # fmt: skip


@operator()
def embedding(b: Builder) -> object:
    """Rows of a table that the caller's integers choose."""
    if b.ids is None or b.ids.rank > 3:
        return None
    width = b.one_of([4, 2])
    name = b.weight(b.numbers(4, width))
    return b.node("Gather", [name, b.ids.name], (*b.ids.shape, width))


@operator(times=4, old=3)
def with_constant(b: Builder) -> object:
    """Add, Sub, Mul, Div of a value and a constant, either order."""
    x = b.value()
    if x is None:
        return None
    op, shape = b.one_of(["Add", "Mul", "Sub", "Div"]), _against(b, x)
    array = b.factors(*shape) if op in ("Mul", "Div") else b.numbers(*shape)
    if op == "Mul" and b.flag(6):
        array = array * b.rng.choice([0, 1], shape).astype(np.float32)
    # a divisor is never shared: another constant could hold a 0
    array = np.asarray(array, np.float32)
    name = b.constant(array, may_share=False) if op == "Div" else b.weight(array)
    swapped = op != "Div" and b.flag(3)
    return b.node(op, [name, x.name] if swapped else [x.name, name], x.shape)


# --- several values -----------------------------------------------------------------------------


@operator(times=6, old=4)
def sum_of(b: Builder) -> object:
    """Add, Sub or Sum of values of one shape, or of one that broadcasts."""
    x = b.value()
    if x is None:
        return None

    def fits(v: Live) -> bool:
        return v is not x and v.rank == x.rank and all(
            n in (1, m) for n, m in zip(v.shape, x.shape, strict=True)
        )  # fmt: skip

    other = b.value(fits)
    if other is None:
        return None
    op = b.one_of(["Add", "Add", "Sub", "Sum", "Mean"])
    reads = [other.name, x.name] if b.flag() else [x.name, other.name]
    if op in ("Sum", "Mean") and b.flag():
        reads.append(reads[0] if b.flag(4) else reads[-1])
        third = b.value(lambda v: v.shape == x.shape and v.name not in reads)
        reads = reads[:2] if third is None else [*reads[:2], third.name]
    return b.node(op, reads, x.shape)


@operator()
def product(b: Builder) -> object:
    """A value times another that broadcasts to it, or times itself."""
    x = b.value()
    if x is None:
        return None
    broadcasts = [(n, 1) for n in x.shape]
    other = b.value(
        lambda v: (
            v.rank == x.rank and all(n in fits for n, fits in zip(v.shape, broadcasts, strict=True))
        )
    )
    if other is None:
        return None
    reads = [other.name, x.name] if b.flag() else [x.name, other.name]
    return b.node("Mul", reads, x.shape)


@operator()
def einsum(b: Builder) -> object:
    """A product with a constant along one axis, often with an addition behind it."""
    x = b.value(lambda v: v.rank == 3)
    if x is None:
        return None
    axis, outs = b.one_of([1, 2]), b.one_of([2, 3])
    result = "bot" if axis == 1 else "bco"
    weight = b.constant(b.numbers(x.shape[axis], outs, fan_in=x.shape[axis]))
    equation = f"bct,{'c' if axis == 1 else 't'}o->{result}"
    shape = (x.shape[0], outs, x.shape[2]) if axis == 1 else (*x.shape[:2], outs)
    if b.flag():
        return b.node("Einsum", [x.name, weight], shape, equation=equation)
    product = b.hidden("Einsum", [x.name, weight], equation=equation)
    bias = b.numbers(outs, 1) if axis == 1 else b.numbers(outs)
    return b.node("Add", [product, b.constant(bias)], shape)


@operator()
def matrix_product(b: Builder) -> object:
    """A value times another one, as matrices."""
    x = b.value(lambda v: v.rank >= 2)
    if x is None:
        return None
    other = b.value(lambda v: v.rank == x.rank and v.shape[:-1] == (*x.shape[:-2], x.shape[-1]))
    if other is None:
        return None
    return b.node("MatMul", [x.name, other.name], (*x.shape[:-1], other.shape[-1]))


@operator(times=2, old=1)
def concat(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 1)
    if x is None:
        return None
    axis = b.one_of([min(1, x.rank - 1), *range(x.rank)])

    def fits(v: Live) -> bool:
        return v.rank == x.rank and all(
            m == n for i, (m, n) in enumerate(zip(v.shape, x.shape, strict=True)) if i != axis
        )

    parts = [x, *(v for v in (b.value(fits), b.value(fits)) if v is not None)]
    if b.flag(4):
        shape = list(x.shape)
        shape[axis] = 1
        parts.append(Live(b.constant(b.numbers(*shape)), tuple(shape)))
    total = sum(v.shape[axis] for v in parts)
    if total > 12:
        return None
    shape = [*x.shape[:axis], total, *x.shape[axis + 1 :]]
    return b.node("Concat", [v.name for v in parts], shape, axis=axis - x.rank * int(b.flag(4)))


@operator(times=2)
def split(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 1 and max(v.shape) >= 2)
    if x is None:
        return None
    axes = [axis for axis, n in enumerate(x.shape) if n >= 2]
    axis = 1 if 1 in axes and b.flag() else b.one_of(axes)
    first = 1 + b.pick(x.shape[axis] - 1)
    sizes = (first, x.shape[axis] - first)
    shapes = [(*x.shape[:axis], n, *x.shape[axis + 1 :]) for n in sizes]
    return b.node("Split", [x.name, b.integers(sizes)], *shapes, axis=axis)


# --- passing ------------------------------------------------------------------------------------


@operator(times=2, old=1)
def clip(b: Builder) -> object:
    x = b.value()
    if x is None:
        return None
    if b.opset == OLD:
        return b.node("Clip", [x.name], x.shape, min=-1.0, max=2.0)
    ends = [b.constant(np.array(n, np.float32), may_share=False) for n in (-1.0, 2.0)]
    return b.node("Clip", [x.name, *ends[: 1 + b.pick(2)]], x.shape)


@operator()
def number_of_elements(b: Builder) -> object:
    """A value times a number that follows from its shape."""
    x = b.value(lambda v: int(np.prod(v.shape)) <= 16)
    if x is None:
        return None
    size = b.hidden("Cast", [b.hidden("Size", [x.name])], to=TensorProto.FLOAT)
    return b.node(b.one_of(["Mul", "Add"]), [x.name, size], x.shape)


@operator()
def branch(b: Builder) -> object:
    """If: a layer and a batch norm in one branch, something simple in the other."""
    # onnxruntime 1.31 loses a Cast that only a branch reads
    casts = {name for node in b.nodes if node.op_type == "Cast" for name in node.output}
    x = b.value(lambda v: v.rank >= 3 and v.shape[1] > 0 and v.name not in casts)
    if x is None:
        return None
    channels, at = x.shape[1], len(b.nodes)
    ones = (1,) * (x.rank - 2)
    inner = Builder(b.pick, b.rng, b.dyadic, b.opset)
    inner.constants, inner.shared = b.constants, b.shared
    weight = inner.constant(b.numbers(channels, channels, *ones, fan_in=channels))
    inner.nodes.append(helper.make_node("Conv", [x.name, weight], [f"inner{at}"]))
    inner.values.append(Live(f"inner{at}", x.shape))
    batch_norm(inner)
    inner.nodes[-1].output[0] = f"then{at}"
    other = helper.make_node(b.one_of(["Abs", "Relu"]), [x.name], [f"else{at}"])

    def graph(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{name}{at}", TensorProto.FLOAT, [None] * x.rank)
        return helper.make_graph(nodes, f"{name}{at}", [], [out])

    total = b.hidden("ReduceSum", [x.name], keepdims=0)
    zero = b.constant(np.array(0, np.float32), may_share=False)
    return b.node(
        "If", [b.hidden("Greater", [total, zero])], x.shape,
        then_branch=graph("then", inner.nodes), else_branch=graph("else", [other]),
    )  # fmt: skip


@operator(times=4, old=3)
def pointwise(b: Builder) -> object:
    x = b.value()
    if x is None:
        return None
    op = b.one_of(
        ["Relu", "Relu", "LeakyRelu", "Abs", "Identity", "Dropout", "PRelu", "Sigmoid", "Neg"]
    )
    if op == "LeakyRelu":
        return b.node(op, [x.name], x.shape, alpha=b.one_of([0.25, 0.0, -0.5]))
    if op == "PRelu":
        return b.node(op, [x.name, b.constant(b.numbers(*_against(b, x)))], x.shape)
    return b.node(op, [x.name], x.shape)


@operator(times=2)
def extremum(b: Builder) -> object:
    """Max or Min of a value and a constant, or of two values and perhaps a constant."""
    x = b.value()
    if x is None:
        return None
    op, reads = b.one_of(["Max", "Min"]), [x.name]
    other = b.value(lambda v: v.shape == x.shape) if b.flag() else None
    if other is not None:
        reads.append(other.name)
    if other is None or b.flag():
        bound = b.constant(b.numbers(*_against(b, x)))
        reads = [bound, *reads] if b.flag() else [*reads, bound]
    return b.node(op, reads, x.shape)


@operator()
def tile(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 1 and int(np.prod(v.shape)) <= 64)
    if x is None:
        return None
    repeats = [b.one_of([1, 1, 2]) for _ in x.shape]
    shape = [n * count for n, count in zip(x.shape, repeats, strict=True)]
    return b.node("Tile", [x.name, b.integers(repeats)], shape)


@operator()
def cast(b: Builder) -> object:
    x = b.value()
    if x is None:
        return None
    wide = b.hidden("Cast", [x.name], to=TensorProto.DOUBLE)
    return b.node("Cast", [wide], x.shape, to=TensorProto.FLOAT)


@operator(old=2)
def upsample(b: Builder) -> object:
    """Resize of older opsets."""
    x = b.value(lambda v: v.rank == 4 and v.shape[2] * v.shape[3] <= 16)
    if x is None or b.opset != OLD:
        return None
    scales = b.constant(np.array([1, 1, 2, 2], np.float32), may_share=False)
    shape = (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    return b.node("Upsample", [x.name, scales], shape, mode="nearest")


@operator(times=2, old=2)
def pool(b: Builder) -> object:
    x = b.value(lambda v: v.rank in (3, 4) and min(v.shape[2:]) >= 2)
    if x is None:
        return None
    op = b.one_of(["AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool"])
    rank = x.rank - 2
    if op.startswith("Global"):
        return b.node(op, [x.name], (*x.shape[:2], *(1,) * rank))
    pad, stride = int(b.flag(3)), b.one_of([1, 2])
    sizes = [_out_size(n, 2, stride, 1, (pad, pad)) for n in x.shape[2:]]
    extra = {"count_include_pad": int(b.flag())} if op == "AveragePool" else {}
    return b.node(
        op, [x.name], (*x.shape[:2], *sizes),
        kernel_shape=[2] * rank, pads=[pad] * 2 * rank, strides=[stride] * rank, **extra,
    )  # fmt: skip


@operator(times=2)
def reduce(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 2)
    if x is None:
        return None
    op = b.one_of(["ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"])
    axes = [axis for axis in range(x.rank) if b.flag()] or [x.rank - 1]
    keep = int(b.flag())
    shape = [1 if i in axes else n for i, n in enumerate(x.shape) if keep or i not in axes]
    named = [axis - x.rank if b.flag(3) else axis for axis in axes]
    return b.node(op, [x.name, b.integers(named)], shape, keepdims=keep)


@operator()
def resize(b: Builder) -> object:
    x = b.value(lambda v: v.rank == 4 and v.shape[2] * v.shape[3] <= 16)
    if x is None:
        return None
    scales = b.constant(np.array([1, 1, 2, 2], np.float32), may_share=False)
    mode = b.one_of(["nearest", "linear"])
    how = b.one_of(["asymmetric", "half_pixel", "align_corners"])
    shape = (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    return b.node(
        "Resize", [x.name, "", scales], shape, mode=mode, coordinate_transformation_mode=how
    )


@operator()
def grid_sample(b: Builder) -> object:
    """Elements at places that a constant, or the caller, gives; some lie outside."""
    x = b.value(lambda v: v.rank == 4 and min(v.shape[2:]) >= 2)
    if x is None:
        return None
    places = (x.shape[0], 2, 2, 2)
    grid = b.value(lambda v: v.shape == places) if b.flag(4) else None
    if grid is not None and grid is x:
        return None
    name = b.constant(b.rng.choice([-1.0, 0, 0.5, 1], places).astype(np.float32), may_share=False)
    return b.node(
        "GridSample", [x.name, name if grid is None else grid.name], (*x.shape[:2], 2, 2),
        mode="linear", padding_mode=b.one_of(["border", "zeros"]), align_corners=1,
    )  # fmt: skip


# --- structural ---------------------------------------------------------------------------------


def _factored(b: Builder, shape: tuple[int, ...]) -> list[int]:
    """Another shape of as many elements: merge neighbours, split axes, put in ones."""
    dims = list(shape)
    for _ in range(1 + b.pick(3)):
        kind = b.pick(3)
        if kind == 0 and len(dims) >= 2:
            at = b.pick(len(dims) - 1)
            dims[at : at + 2] = [dims[at] * dims[at + 1]]
        elif kind == 1 and dims and len(dims) < 5:
            at = b.pick(len(dims))
            fits = [k for k in (2, 3, 4) if dims[at] % k == 0]
            if fits:
                k = b.one_of(fits)
                dims[at : at + 1] = [k, dims[at] // k] if b.flag() else [dims[at] // k, k]
        elif kind == 2 and len(dims) < 5:
            dims.insert(b.pick(len(dims) + 1), 1)
    return dims


@operator(times=3, old=2)
def reshape(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 1)
    if x is None:
        return None
    shape = _factored(b, x.shape)
    if b.flag(4):
        shape = list(x.shape)
        b.rng.shuffle(shape)  # the square trap: same extents, other meaning
    asked = list(shape)
    for axis in range(min(len(shape), x.rank)):
        if shape[axis] == x.shape[axis] and b.flag(3):
            asked[axis] = 0
    if asked and b.flag():
        asked[b.pick(len(asked))] = -1
    if b.flag(6):
        asked, shape = list(x.shape), list(x.shape)
        return b.node("Reshape", [x.name, b.hidden("Shape", [x.name])], shape)
    return b.node("Reshape", [x.name, b.integers(asked)], shape)


@operator(old=1)
def flatten(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 1)
    if x is None:
        return None
    axis = b.one_of([1, *range(x.rank + 1)])
    shape = (int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis:])))
    return b.node("Flatten", [x.name], shape, axis=axis)


@operator()
def squeeze(b: Builder) -> object:
    """Squeeze where there is an axis of 1, Unsqueeze where not."""
    x = b.value()
    if x is None:
        return None
    ones = [axis for axis, n in enumerate(x.shape) if n == 1]
    if ones and x.rank > 2:
        axis = b.one_of(ones)
        shape = [n for i, n in enumerate(x.shape) if i != axis]
        return b.node("Squeeze", [x.name, b.integers([axis])], shape)
    if x.rank > 4:
        return None
    axis = b.pick(x.rank + 1)
    shape = [*x.shape[:axis], 1, *x.shape[axis:]]
    return b.node("Unsqueeze", [x.name, b.integers([axis])], shape)


@operator(times=3, old=2)
def transpose(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 2)
    if x is None:
        return None
    perm = list(range(x.rank))
    for _ in range(1 + b.pick(2)):
        i, j = b.pick(x.rank), b.pick(x.rank)
        perm[i], perm[j] = perm[j], perm[i]
    return b.node("Transpose", [x.name], [x.shape[axis] for axis in perm], perm=perm)


@operator()
def expand(b: Builder) -> object:
    x = b.value(lambda v: v.rank < 5 and int(np.prod(v.shape)) <= 64)
    if x is None:
        return None
    shape = [b.one_of([2, 3]) if n == 1 and b.flag() else n for n in x.shape]
    if b.flag(3):
        shape = [b.one_of([1, 2]), *shape]
    return b.node("Expand", [x.name, b.integers(shape)], shape)


@operator(times=2)
def slice_(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 1 and max(v.shape) >= 2)
    if x is None:
        return None
    axis = b.one_of([axis for axis, n in enumerate(x.shape) if n >= 2])
    size = x.shape[axis]
    start, stop, step = b.one_of(
        [(0, 1, 1), (1, size, 1), (0, 2**62, 2), (-1, -(2**62), -1), (size - 1, -size - 1, -2),
         (0, -1, 1), (1, 2**31 - 1, 1)]
    )  # fmt: skip
    cut = slice(start, None if step < 0 else min(stop, size), step)
    length = len(range(size)[cut])
    shape = [*x.shape[:axis], length, *x.shape[axis + 1 :]]
    reads = [b.integers([n]) for n in (start, stop, axis - x.rank * int(b.flag(3)), step)]
    return b.node("Slice", [x.name, *reads], shape)


@operator(times=2)
def gather(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 1 and v.rank < 5)
    if x is None:
        return None
    axis = b.one_of([min(1, x.rank - 1), *range(x.rank)])
    size = x.shape[axis]
    index = b.one_of(
        [np.arange(size)[::-1], np.array([0]), np.array(0), np.array([[0], [size - 1]]),
         np.array([-1, 0, 0])]
    )  # fmt: skip
    if index.ndim == 0 and x.rank < 2:
        return None
    name = b.constant(np.array(index, np.int64))
    return b.node(
        "Gather", [x.name, name], [*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]], axis=axis
    )


@operator(times=2)
def blocks(b: Builder) -> object:
    """DepthToSpace where the channels allow it, else SpaceToDepth."""
    x = b.value(
        lambda v: v.rank == 4 and (v.shape[1] % 4 == 0 or all(n % 2 == 0 for n in v.shape[2:]))
    )
    if x is None:
        return None
    n, c, h, w = x.shape
    if c % 4 == 0 and b.flag():
        mode = b.one_of(["DCR", "CRD"])
        return b.node("DepthToSpace", [x.name], (n, c // 4, 2 * h, 2 * w), blocksize=2, mode=mode)
    if h % 2 or w % 2 or c > 4:
        return None
    return b.node("SpaceToDepth", [x.name], (n, 4 * c, h // 2, w // 2), blocksize=2)


@operator(times=2)
def pad(b: Builder) -> object:
    x = b.value(lambda v: v.rank >= 2 and v.shape[-1] >= 2 and int(np.prod(v.shape)) <= 256)
    if x is None:
        return None
    mode = b.one_of(["constant", "reflect", "edge"])
    axis = b.one_of([x.rank - 1, *([a for a in range(x.rank) if x.shape[a] >= 2])])
    pads = [0] * (2 * x.rank)
    pads[axis], pads[axis + x.rank] = 1, b.pick(2)
    shape = [n + pads[i] + pads[i + x.rank] for i, n in enumerate(x.shape)]
    reads = [x.name, b.integers(pads)]
    if mode == "constant" and b.flag():
        reads.append(b.constant(np.array(b.one_of([0, 2]), np.float32), may_share=False))
    return b.node("Pad", reads, shape, mode=mode)


# --- whole graphs -------------------------------------------------------------------------------


def _add_input(b: Builder) -> None:
    rank = b.one_of([4, 4, 3, 2, 4, 5])
    side = b.one_of([4, 2]) if rank < 5 else 2
    shape = [side] * rank
    if b.flag(4):
        shape = [b.one_of([2, 1, 3, 4, 6]) for _ in range(rank)]
    live = Live(f"x{len(b.inputs)}", tuple(shape))
    # one name never means two extents; the first axis is free most often
    free = b.pick(4)
    declared: list[int | str] = [
        f"size{n}" if (free == 1 and axis == 0) or (free == 2 and b.flag(3)) else n
        for axis, n in enumerate(shape)
    ]
    b.inputs.append((live, declared))
    b.values.append(live)


@dataclass(frozen=True)
class RandomModel:
    """A model, and inputs for it."""

    proto: onnx.ModelProto
    feeds: dict[str, np.ndarray]


def random_model(pick: Pick, seed: int, *, dyadic: bool, steps: int) -> RandomModel:
    """A model of about `steps` operators; `pick(n)` draws a number below n."""
    b = Builder(pick, np.random.default_rng(seed), dyadic)
    b.opset = OLD if b.flag(8) else 20
    for _ in range(1 + int(b.flag(4))):
        _add_input(b)
    if b.opset != OLD and b.flag(4):
        b.ids = Live("ids", b.one_of([(4,), (2, 2), (4, 4)]))
    for _ in range(steps):
        operator = b.one_of(OLD_OPERATORS if b.opset == OLD else OPERATORS)
        if operator(b) is not None and b.flag(3):
            batch_norm(b)
    return RandomModel(_finish(b), _feeds(b))


def _feeds(b: Builder) -> dict[str, np.ndarray]:
    feeds = {
        v.name: (
            b.rng.integers(-3, 4, v.shape) if b.dyadic else b.rng.standard_normal(v.shape)
        ).astype(np.float32)
        for v, _ in b.inputs
    }
    return feeds | ({"ids": b.rng.integers(0, 4, b.ids.shape)} if b.ids is not None else {})


def _finish(b: Builder) -> onnx.ModelProto:
    read = set(_read_anywhere(b.nodes))
    inputs = {live.name for live, _ in b.inputs}
    made = [v for v in b.values if v.name not in inputs]
    outputs = [v for v in made if v.name not in read or b.flag(16)] or [
        b.node("Identity", [b.values[0].name], b.values[0].shape)[0]
    ]

    def info(live: Live, shape: Sequence[int | str | None], kind: int = 1) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(live.name, kind, shape)

    ids = [] if b.ids is None else [info(b.ids, b.ids.shape, TensorProto.INT64)]
    tensors = [numpy_helper.from_array(array, name) for name, array in b.constants.items()]
    as_nodes = [tensor for tensor in tensors if b.flag(12)]
    graph = helper.make_graph(
        [helper.make_node("Constant", [], [t.name], value=t) for t in as_nodes] + b.nodes,
        "random",
        [info(v, declared) for v, declared in b.inputs] + ids,
        [info(v, [None] * v.rank) for v in outputs],
        [tensor for tensor in tensors if tensor not in as_nodes],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", b.opset)],
        ir_version=10 if b.opset != OLD else 4,
        producer_name="fuzz",
    )
    model.metadata_props.add(key="author", value="fuzz")
    return model


def _read_anywhere(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """The names that nodes read, and those that their branches read."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _read_anywhere(attribute.g.node)
