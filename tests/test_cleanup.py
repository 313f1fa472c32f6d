"""Clean-ups that are asked for: gate A, what is saved, the command line, planted faults.

The law of Pads and of convolutions in a chain, bit by bit, is `tests.chain_laws`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import bnfold
from bnfold import graph
from bnfold.cli import main
from bnfold.errors import UsageError
from bnfold.folding.apply import apply
from bnfold.folding.dead import without_dead_channels
from bnfold.folding.plan import plan
from bnfold.proof.algebra.certificate import Certificate, certify
from tests import folding
from tests.chain_laws import CHAIN_LAWS, DEAD, PAD
from tests.law_models import Law, build, inputs

MERGED = [law for law in CHAIN_LAWS if law.merges]


def fold(law: Law, model: onnx.ModelProto | None = None) -> folding.Fold:
    absorb, clean_up = law.absorbed is not None, frozenset(law.clean_up)
    return folding.fold(model or build(law), absorb=absorb, clean_up=clean_up)


def certified(original: onnx.ModelProto, made: folding.Fold) -> Certificate:
    gauges = {str(value.name): gauge for value, gauge in made.plan.gauges.items()}
    return certify(original, made.model, gauges, made.folded.aliases)


# --- Pads and chains -----------------------------------------------------------------------------


@pytest.mark.parametrize("law", MERGED, ids=lambda law: law.name)
def test_gate_a_catches_a_wrong_weight(law: Law) -> None:
    original = build(law)
    made = fold(law, original)
    assert certified(original, made).passed
    name = made.model.graph.node[0].input[1]
    (tensor,) = (t for t in made.model.graph.initializer if t.name == name)
    wrong = onnx.numpy_helper.to_array(tensor).copy()
    wrong.reshape(-1)[wrong.size // 2] += np.float32(2.0**-8)
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, name))
    assert not certified(original, made).passed


@pytest.mark.parametrize("law", [law for law in MERGED if "pad" in law.name], ids=str)
def test_gate_a_catches_wrong_pads(law: Law) -> None:
    """Of the same sum, so that the shape is right."""
    original = build(law)
    made = fold(law, original)
    found = [a for n in made.model.graph.node for a in n.attribute if a.name == "pads"]
    pads = found[0]
    half = len(pads.ints) // 2
    pads.ints[half - 1] += 1
    pads.ints[-1] -= 1
    if min(pads.ints) >= 0:
        assert not certified(original, made).passed


def test_a_chain_never_multiplies_more() -> None:
    for law in CHAIN_LAWS:
        for merge in fold(law).plan.merges:
            first = sum(np.prod(conv.inputs[1].shape.numpy()) for conv in _convs(merge.inner))  # type: ignore[union-attr]
            assert merge.shape.cost <= first


def _convs(nodes: frozenset[ir.Node]) -> list[ir.Node]:
    return [node for node in nodes if node.op_type == "Conv"]


def test_nothing_is_cleaned_up_unasked() -> None:
    for law in CHAIN_LAWS:
        assert not fold(replace(law, clean_up=())).plan.merges or "Add" in law.graph or (
            "Sub" in law.graph
        )  # fmt: skip


# --- dead channels -------------------------------------------------------------------------------


def cut(name: str, constants: dict[str, np.ndarray] | None = None) -> folding.Fold:
    text, _ = DEAD[name]
    beta = np.array([2, -2, -1, 3], np.float32)
    law = Law(f"dead, {name}", "", text, 1, constants=constants or {"b.beta": beta})
    original = build(law)
    chosen = plan(graph.prepare(ir.from_proto(original)))
    folded = without_dead_channels(apply(chosen))
    proto = graph.to_proto(folded.model)
    onnx.checker.check_model(proto)
    return folding.Fold(original, proto, chosen, folded)


@pytest.mark.parametrize("name", DEAD)
def test_dead_channels_go_where_that_is_exact(name: str) -> None:
    made = cut(name)
    folding.check_interface(made)
    folding.check_shapes(made)
    channels = made.model.graph.node[0].input[1]
    (tensor,) = (t for t in made.model.graph.initializer if t.name == channels)
    assert tensor.dims[0] == DEAD[name][1]
    feeds = inputs(made.original)
    before, after = folding.run(made.original, feeds), folding.run(made.model, feeds)
    for output, expected in before.items():
        np.testing.assert_array_equal(after[output], expected)
    certificate = certified(made.original, made)
    assert certificate.passed, [record.sentence for record in certificate.failures]


@pytest.mark.parametrize("name", ["written", "unpadded", "behind pooling", "all"])
def test_gate_a_catches_a_channel_that_was_alive(name: str) -> None:
    """Another channel's column, and a bias without the constant."""
    made = cut(name)
    for tensor in made.model.graph.initializer:
        right = onnx.numpy_helper.to_array(tensor)
        if tensor.name not in ("V", "B"):
            continue
        wrong = np.roll(right, 1, axis=1 if tensor.name == "V" else 0)
        if np.array_equal(wrong, right):
            continue
        tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, tensor.name))
        assert not certified(made.original, made).passed, tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(right, tensor.name))


def test_cutting_twice_is_cutting_once() -> None:
    for name in DEAD:
        made = cut(name)
        before = graph.to_bytes(made.folded.model)
        assert graph.to_bytes(without_dead_channels(made.folded).model) == before


def test_long_runs_are_cut_in_pieces_that_gate_a_proves() -> None:
    layers = "".join(
        f"c{i} = Conv<{PAD}>(r{i}, W{i}[4,4,3,3]); b{i} = BN4:alt0(c{i}); r{i + 1} = Relu(b{i}); "
        for i in range(9)
    )
    text = f"x[1,4,4,4] > y; r0 = Relu(x); {layers}y = Conv<{PAD}>(r9, V[4,4,3,3])"
    beta = np.array([1, 1, -1, 1], np.float32)
    law = Law("a run", "", text, 9, constants={f"b{i}.beta": beta for i in range(9)})
    original = build(law)
    chosen = plan(graph.prepare(ir.from_proto(original)))
    folded = without_dead_channels(apply(chosen))
    made = folding.Fold(original, graph.to_proto(folded.model), chosen, folded)
    sizes = [t.dims[0] for t in made.model.graph.initializer if t.name.startswith("W")]
    assert sizes.count(3) >= 6
    certificate = certified(original, made)
    assert certificate.passed, [record.sentence for record in certificate.failures]


# --- the way in ----------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = next(law for law in CHAIN_LAWS if law.name == "chain, pad, conv, 1x1")
    path, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    onnx.save(build(law), path)
    assert main(["fold", str(path), "-o", str(out), "--clean-up", "all"]) == 0
    assert [n.op_type for n in onnx.load(out).graph.node] == ["Conv"]
    assert "took in" in capsys.readouterr().out
    back = tmp_path / "back.onnx"
    assert main(["unfold", str(out), "-o", str(back)]) == 0
    assert [n.op_type for n in onnx.load(back).graph.node] == ["Pad", "Conv", "Conv"]


def test_the_api() -> None:
    law = next(law for law in CHAIN_LAWS if law.name == "chain, pad, conv")
    result = bnfold.fold(build(law), clean_up=["pad", "dead-channels"])
    assert [m.layers for m in result.merged] == [("Pad 'p'",)]
    result.verify().raise_for_failure()
    with pytest.raises(UsageError, match="no clean-up 'pads'"):
        bnfold.fold(build(law), clean_up=["pads"])
