"""Sums of parallel branches as one convolution: cost, scope, gate A, and planted faults.

The law itself, bit by bit, is the part PARALLEL of `tests.laws`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from handmade import BN, EPS, Array, Fold, affine, along, draw, f32, gauge, node, normalization

from bnfold import graph
from bnfold.folding.plan import plan
from bnfold.folding.rules.node import weights
from bnfold.folding.scope import Scope
from bnfold.proof.algebra.certificate import Certificate, certify
from tests import folding
from tests.law_models import Law, build
from tests.parallel_laws import PARALLEL

MERGED = [law for law in PARALLEL if law.merges]
CERTIFIED = [law for law in MERGED if not law.listed]  # gate A reads no operator set below 7


def fold(law: Law, model: onnx.ModelProto | None = None) -> folding.Fold:
    repairs, absorb = frozenset(law.repairs), law.absorbed is not None
    return folding.fold(model or build(law), absorb=absorb, repairs=repairs)


def certified(original: onnx.ModelProto, made: folding.Fold) -> Certificate:
    """Gate A, with the plan of one fold and what another one wrote."""
    gauges = {str(value.name): gauge for value, gauge in made.plan.gauges.items()}
    return certify(original, made.model, gauges, made.folded.aliases)


# --- what is gained ------------------------------------------------------------------------------


def multiplications(model: onnx.ModelProto) -> int:
    """Of one sample: the elements of each convolution's result times what each one reads."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    sizes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    total = 0
    for made in model.graph.node:
        result = shapes[made.output[0]]
        each = int(np.prod(sizes[made.input[1]][1:])) if made.op_type == "Conv" else 1
        total += each * int(np.prod(result))
    return total


@pytest.mark.parametrize("law", [law for law in MERGED if not law.nodes], ids=lambda law: law.name)
def test_the_result_is_less_work(law: Law) -> None:
    made = fold(law)
    assert multiplications(made.model) < multiplications(made.original)
    convs = sum(len(merge.taken) for merge in made.plan.merges)
    count = [sum(n.op_type == "Conv" for n in m.graph.node) for m in (made.original, made.model)]
    assert count[0] - count[1] == convs


def test_the_host_keeps_its_name_and_the_sum_its_own() -> None:
    law = next(law for law in MERGED if law.name == "parallel, repvgg")
    made = fold(law)
    conv = made.model.graph.node[0]
    assert (conv.op_type, conv.input[1], conv.output[0]) == ("Conv", "W", "s")
    assert [n.op_type for n in made.model.graph.node] == ["Conv", "Relu"]
    assert {removed.into for removed in made.plan.removed} == {("W",)} or all(
        removed.into == ("a",) for removed in made.plan.removed
    )
    names = {tensor.name for tensor in made.model.graph.initializer}
    assert names == {"W", "W_bias"}


def test_a_module_cannot_take_it_back() -> None:
    scope = Scope(frozenset(), frozenset(), frozenset())
    for law in MERGED[:4]:
        assert not plan(graph.prepare(ir.from_proto(build(law))), scope).merges


def test_a_sum_that_float16_cannot_hold_stays_apart() -> None:
    kernel = np.full((4, 4, 1, 1), 40000, np.float16)
    text = "x[4,4,4,4] > y; a = Conv(x, W); b = Conv(x, V); s = Add(a, b); y = Relu(s)"
    law = Law("too large", "", text, 0, dtype=onnx.TensorProto.FLOAT16)
    assert not fold(replace(law, constants={"W": kernel, "V": kernel})).plan.merges
    small = kernel / np.float16(2)
    assert fold(replace(law, constants={"W": small, "V": small})).plan.merges


# --- gate A --------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", CERTIFIED, ids=lambda law: law.name)
def test_gate_a_proves_it(law: Law) -> None:
    original = build(law)
    certificate = certified(original, fold(law, original))
    assert certificate.passed, [record.sentence for record in certificate.failures]


@pytest.mark.parametrize("law", CERTIFIED, ids=lambda law: law.name)
def test_gate_a_catches_a_wrong_weight_anywhere(law: Law) -> None:
    original = build(law)
    made = fold(law, original)
    caught = 0
    hosts = {str(merge.host.inputs[1].name) for merge in made.plan.merges}  # type: ignore[union-attr]
    for tensor in made.model.graph.initializer:
        written = next((h for h in hosts if tensor.name in (h, f"{h}_bias", f"{h}_folded")), None)
        if written is None:
            continue
        right = onnx.numpy_helper.to_array(tensor)
        flat = right.copy().reshape(-1)
        flat[len(flat) // 2] += np.float32(2.0**-10)
        tensor.CopyFrom(onnx.numpy_helper.from_array(flat.reshape(right.shape), tensor.name))
        assert not certified(original, made).passed, tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(right, tensor.name))
        caught += 1
    assert caught or law.nodes


def changed(law: Law, **constants: Array) -> onnx.ModelProto:
    """The case with other constants."""
    model = build(law)
    for tensor in model.graph.initializer:
        if tensor.name in constants:
            tensor.CopyFrom(onnx.numpy_helper.from_array(constants[tensor.name], tensor.name))
    return model


def constants_of(law: Law) -> dict[str, Array]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in build(law).graph.initializer}


BLOCK = Law(
    "a block of every kind",
    "",
    "x[4,4,4,4] > y; a = Conv<pads=[1,1,1,1], group=2>(x, W[4,2,3,3], A[4]); m = BN4(a);"
    " b = Conv<group=4>(x, V[4,1,1,1], B[4]); i = BN4:tla(x); s = Sub(m, i); t = Add(s, b);"
    " u = Sub(t, x); y = Relu(u)",
    2,
    merges=1,
)


def mistakes() -> dict[str, onnx.ModelProto]:
    """Models whose fold is the fold of BLOCK with one mistake in it."""
    held = constants_of(BLOCK)
    held["B"] = np.array([1, -2, 3, 1], np.float32)
    found = {
        "a branch forgotten": changed(BLOCK, V=0 * held["V"]),
        "a bias forgotten": changed(BLOCK, B=0 * held["B"]),
        "the shift of a batch norm forgotten": changed(
            BLOCK, **{"i.beta": 0 * held["i.beta"], "i.running_mean": 0 * held["i.running_mean"]}
        ),
        "groups mixed up": changed(BLOCK, W=held["W"][[2, 3, 0, 1]]),
        "channels mixed up": changed(BLOCK, V=held["V"][[1, 2, 3, 0]]),
        "a kernel turned round": changed(BLOCK, W=held["W"][..., ::-1].copy()),
    }
    for sign, index in (("the sign of a branch", 0), ("the sign of x", 1)):
        model = changed(BLOCK)
        subtractions = [n for n in model.graph.node if n.op_type == "Sub"]
        subtractions[index].op_type = "Add"
        found[sign] = model
    return found


def test_every_mistake_is_one_and_gate_a_catches_it() -> None:
    original = build(BLOCK)
    right = fold(BLOCK, original)
    assert len(right.plan.merges) == 1
    assert certified(original, right).passed
    for mistake, model in mistakes().items():
        made = fold(BLOCK, model)
        certificate = certified(original, made)
        assert not certificate.passed, mistake
        assert any("weights" in r.sentence or "bias" in r.sentence for r in certificate.failures)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("step", [1, -1])
def test_a_kernel_off_centre_is_caught(axis: int, step: int) -> None:
    law = replace(
        BLOCK, graph=BLOCK.graph.replace("Conv<group=4>", "Conv<group=4, pads=[0,0,0,0]>")
    )
    original = build(law)
    made = fold(law, original)
    host = made.plan.merges[0].host
    (tensor,) = (t for t in made.model.graph.initializer if t.name == "W")
    exact = onnx.numpy_helper.to_array(tensor)
    own = np.asarray(weights(host, 1))
    scale = constants_of(law)["m.gamma"] / np.sqrt(constants_of(law)["m.running_var"] + 0.25)
    embedded = exact - own * scale.reshape(-1, 1, 1, 1)  # the 1x1 branches, in the centre
    assert np.count_nonzero(embedded)
    wrong = exact - embedded + np.roll(embedded, step, axis)
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong.astype(np.float32), "W"))
    assert not certified(original, made).passed


# --- gate A, on folds made by hand ---------------------------------------------------------------


def by_hand(*, forget: str = "", off: int = 0, sign: int = 1, swap: bool = False,
            shift: float = 0.0) -> Fold:  # fmt: skip
    """A RepVGG block, Conv 3x3 + Conv 1x1 - BN, with a gauge on what it reads and on the sum.

    The keywords plant faults.
    """
    bn, group = normalization(6), 2
    w, b, v, c = draw(1, 6, 3, 3, 3), draw(2, 6), draw(3, 6, 3, 1, 1), draw(4, 6)
    slope, offset = affine(bn)
    kernel = w.astype(np.float64)
    if forget != "branch":
        kernel[:, :, 1, 1 + off] += v[:, :, 0, 0]
    for channel in range(6):
        column = (channel + 1) % 3 if swap else channel % 3
        kernel[channel, column, 1, 1] -= sign * slope[channel]
    bias = b.astype(np.float64) + (0 if forget == "bias" else c) - sign * offset
    size, out = np.array([2, 0.5, 1, 4, 1, 0.25]), np.array([1, -1, 2, 0.5, -2, 1])
    origin = np.array([1.0, 0, -1, 2, 0, 3])
    read = size.reshape(2, 1, 3, 1, 1).repeat(3, 1).reshape(6, 3, 1, 1)  # each group its inputs
    return Fold(
        nodes=[
            node("Mul", "x m", "h"),
            node("Conv", "h w b", "c3", pads=[1, 1, 1, 1], group=group),
            node("Conv", "h v c", "c1", group=group),
            node("BatchNormalization", f"h {BN}", "n", epsilon=EPS),
            node("Add", "c3 c1", "s"),
            node("Sub", "s n", "r"),
            node("Mul", "r k", "out"),
        ],
        folded_nodes=[
            node("Mul", "x m", "h"),
            node("Conv", "h w b", "r", pads=[1, 1, 1, 1], group=group),
            node("Mul", "r k", "t"),
            node("Add", "t o", "out"),
        ],
        weights={
            "w": w, "b": b, "v": v, "c": c, **bn,
            "m": np.ones((6, 1, 1), np.float32), "k": np.ones((6, 1, 1), np.float32),
        },
        folded_weights={
            "w": f32(kernel * along(out, 4, 0) / read),
            "b": f32(out * (bias - origin)),
            "m": f32(size).reshape(6, 1, 1),
            "k": f32(1 / out).reshape(6, 1, 1),
            "o": f32(origin).reshape(6, 1, 1),
        },
        x=(2, 6, 6, 6),
        gauges={"h": gauge(size, shift, 4), "r": gauge(out, origin, 4)},
    )  # fmt: skip


def test_gate_a_proves_a_block_folded_by_hand() -> None:
    certificate = by_hand().certify()
    assert certificate.passed, [record.sentence for record in certificate.failures]


@pytest.mark.parametrize(
    "fault",
    [
        {"forget": "branch"},
        {"forget": "bias"},
        {"off": 1},
        {"off": -1},
        {"sign": -1},
        {"swap": True},
        {"shift": 1.0},
    ],
    ids=str,
)
def test_gate_a_catches_a_block_folded_wrong(fault: dict[str, object]) -> None:
    certificate = by_hand(**fault).certify()  # type: ignore[arg-type]
    assert not certificate.passed
    assert any(record.op_type == "Sub" for record in certificate.failures)


def test_gate_a_takes_no_other_sum_for_it() -> None:
    """The same weights, where a branch reads another tensor or a Relu lies in between."""
    fold = by_hand()
    elsewhere = [
        node("Conv", "x v c", "c1", group=2) if n.output[0] == "c1" else n for n in fold.nodes
    ]
    between = [
        *(n for n in fold.nodes if n.output[0] not in ("s", "r", "out")),
        node("Add", "c3 c1", "s0"),
        node("Relu", "s0", "s"),
        *(n for n in fold.nodes if n.output[0] in ("r", "out")),
    ]
    for nodes in (elsewhere, between):
        certificate = replace(fold, nodes=nodes).certify()
        assert not certificate.passed
        assert any("one convolution" in record.sentence for record in certificate.failures)
