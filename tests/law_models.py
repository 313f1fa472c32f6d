"""A case of the law of folding: a graph in a few words, and the model that it stands for.

After the shapes of the inputs and `>` the outputs, each statement is ONNX text with three
abbreviations:

    W[4,4,3,3]    a constant of this shape; W:pow[4] powers of two of both signs, W:pos[4] of one
    K{1,-1,0}     a constant vector of these integers
    BN4:pos(x)    a batch norm of 4 channels; behind the colon what its gammas are (see GAMMAS)

All numbers are dyadic (gamma, and the square root of var + eps, powers of two): float32 is exact,
so the folded model has to agree bit by bit. Shapes are square on purpose: with as many channels as
rows and samples a mistaken axis changes no shape.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

EPS = 0.25
# gammas by channel, repeated; 'alt' and 'tla' disagree on every sign
GAMMAS: Mapping[str, tuple[float, ...]] = {
    "": (1, -2, 0.5, -1),
    "alt": (2, -1, 1, -0.5),
    "tla": (-2, 1, -1, 0.5),
    "pos": (1, 2, 0.5, 4),
    "neg": (-1, -2, -0.5, -4),
    "one": (1, 1, 1, 1),
    "pos0": (0, 2, 0.5, 1),
    "neg0": (0, -2, -0.5, -1),
    "alt0": (2, -1, 0, -0.5),
    "all0": (0, 0, 0, 0),
}


@dataclass(frozen=True)
class Law:
    """One case. op: the row of RULES through which a gauge must really have gone ('': any).

    removed: how many batch norms go. kept: for each that stays, a word of the reason. absorbed: how
    many constant multiplications and additions go (None: they are left alone). merges: how many
    sums of parallel branches become one convolution (None: they are left alone). clean_up: what
    else may become one convolution. repairs: the exact repairs allowed. listed: initializers also
    listed as inputs. nodes: constants as Constant nodes. reference: the float64 reference can run
    it. runs: onnxruntime can (its CPU provider has no batch-first layout).
    """

    name: str
    op: str
    graph: str
    removed: int
    kept: tuple[str, ...] = ()
    opset: int = 20
    ir_version: int = 10
    listed: bool = False
    nodes: bool = False
    reference: bool = True
    runs: bool = True
    dtype: int = TensorProto.FLOAT
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    absorbed: int | None = None
    merges: int | None = None
    clean_up: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()


# --- from words to a model -----------------------------------------------------------------------

_BATCH_NORM = re.compile(r"(\w+) = BN(\d+)(?::(\w+))?(<[^>]*>)?\((\w+)\)")
_LITERAL = re.compile(r"(\w+)\{([-\d,]*)\}")
_CONSTANT = re.compile(r"\b(?!float\b)(\w+)(?::(pow|pos))?\[([\d,]*)\](?=[,)\s])")


class Draw:
    """The numbers of one case, the same in every run."""

    def __init__(self, law: Law):
        self.law = law
        self.constants: dict[str, np.ndarray] = {}

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self.law.name}/{name}".encode()))

    def batch_norm(self, match: re.Match[str]) -> str:
        name, size, kind, attributes, x = match.groups()
        channels, rng = int(size), self._rng(match[1])
        kind = kind or ""
        same, kind = kind.endswith("same"), kind.removesuffix("same")
        pure_shift = kind.endswith("shift")
        pure_scale = kind.endswith("scale")
        signs = kind.removesuffix("shift").removesuffix("scale")
        gamma = np.resize(np.array(GAMMAS[signs], float), channels)
        spread = np.ones(channels) if pure_shift else rng.choice([0.25, 1, 4], channels)
        zero = 0 if pure_scale else 1
        vectors = {
            "gamma": np.ones(channels) if pure_shift else gamma,
            "beta": zero * rng.integers(-3, 4, channels),
            "running_mean": zero * rng.integers(-3, 4, channels),
            "running_var": spread - EPS,
        }
        if same:  # in every channel the numbers of the first, and a shift that is not 0
            vectors = {part: np.full(channels, v[0]) for part, v in vectors.items()}
            vectors |= {"beta": np.full(channels, 3), "running_mean": np.full(channels, -1)}
        for part, vector in vectors.items():
            self.constants.setdefault(f"{name}.{part}", vector.astype(float))
        reads = ", ".join(f"{name}.{part}" for part in vectors)
        return f"{name} = BatchNormalization{attributes or f'<epsilon={EPS}>'}({x}, {reads})"

    def literal(self, match: re.Match[str]) -> str:
        numbers = [int(n) for n in match[2].split(",") if n]
        self.constants.setdefault(match[1], np.array(numbers, np.int64))
        return match[1]

    def constant(self, match: re.Match[str]) -> str:
        name, kind, size = match.groups()
        shape = [int(n) for n in size.split(",") if n]
        rng = self._rng(name)
        if kind is None:
            numbers = rng.integers(-2, 3, shape).astype(float)
        else:
            numbers = rng.choice([0.5, 1, 2], shape)
            numbers = numbers * (rng.choice([1, -1], shape) if kind == "pow" else 1)
        self.constants.setdefault(name, np.asarray(numbers))
        return str(name)


def build(law: Law) -> onnx.ModelProto:
    """The model of a case."""
    draw = Draw(law)
    draw.constants.update(law.constants)
    head, body = law.graph.split(";", 1)
    inputs, outputs = (part.split() for part in head.split(">"))
    lines = []
    for statement in body.split(";"):
        line = _BATCH_NORM.sub(draw.batch_norm, statement.strip())
        line = _LITERAL.sub(draw.literal, line)
        lines.append(_CONSTANT.sub(draw.constant, line))
    kind = "float" if law.dtype == TensorProto.FLOAT else _TYPE_NAMES[law.dtype]
    text = ", ".join(_typed(i, kind) for i in inputs)
    results = ", ".join(
        f"int64 {o.removesuffix(':int')}" if o.endswith(":int") else f"{kind} {o}" for o in outputs
    )
    joined = "\n".join(lines)
    # a dot is no letter of a name in ONNX text
    joined = re.sub(r"(?<=[A-Za-z_]\d)\.(?=[a-z])|(?<=[A-Za-z_])\.(?=[a-z])", "__dot__", joined)
    graph = onnx.parser.parse_graph(f"law ({text}) => ({results}) {{ {joined} }}")
    _restore_dots(graph)
    _add_constants(graph, draw.constants, law)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", law.opset)],
        ir_version=law.ir_version,
        producer_name="laws",
    )
    model.metadata_props.add(key="author", value="laws")
    return _with_output_shapes(model)


def _typed(words: str, kind: str) -> str:
    """'x[4,4]' or 'i:int[4,4]' as ONNX text has it."""
    name, shape = words[: words.index("[")], words[words.index("[") :]
    return f"int64{shape} {name[:-4]}" if name.endswith(":int") else f"{kind}{shape} {name}"


_TYPE_NAMES = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "double",
}


def _restore_dots(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.input[:] = [name.replace("__dot__", ".") for name in node.input]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _restore_dots(attribute.g)


def _add_constants(graph: onnx.GraphProto, arrays: Mapping[str, np.ndarray], law: Law) -> None:
    floats = helper.tensor_dtype_to_np_dtype(law.dtype)
    for name, array in arrays.items():
        held = array if array.dtype.kind in "iub" or name in law.constants else array.astype(floats)
        tensor = numpy_helper.from_array(np.ascontiguousarray(held).reshape(array.shape), name)
        if law.nodes:
            graph.node.insert(0, helper.make_node("Constant", [], [name], value=tensor))
            continue
        graph.initializer.append(tensor)
        if law.listed:
            graph.input.append(
                helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            )


def _with_output_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model)
    for value, known in zip(model.graph.output, inferred.graph.output, strict=True):
        value.CopyFrom(known)
    return model


def inputs(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Small integers for every input that a caller must give; a free extent is 4."""
    held = {tensor.name for tensor in model.graph.initializer}
    rng = np.random.default_rng(5)
    feeds = {}
    for value in model.graph.input:
        if value.name in held:
            continue
        kind = value.type.tensor_type
        shape = [dim.dim_value or 4 for dim in kind.shape.dim]
        low, high = (-4, 5) if kind.elem_type != TensorProto.INT64 else (0, 4)  # places
        numbers = rng.integers(low, high, shape)
        feeds[value.name] = numbers.astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return feeds


def equal_shift(name: str, channels: int) -> dict[str, np.ndarray]:
    """The constants of a batch norm (of eps 0) that moves all channels by the same 3."""
    vectors = {"beta": 5.0, "running_mean": 2.0, "running_var": 1.0}
    return {f"{name}.{part}": np.full(channels, v, np.float32) for part, v in vectors.items()}


def equal_parts(
    name: str, channels: int, spread: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """The constants of a batch norm whose channels repeat those of a smaller one."""
    vectors = {
        "gamma": np.resize([-2.0, 0.5], channels),
        "beta": np.arange(1.0, channels + 1),
        "running_mean": np.arange(channels) - 2.0,
        "running_var": np.resize([0.75, 3.75], channels),
    }
    return {f"{name}.{part}": spread(v).astype(np.float32) for part, v in vectors.items()}
