"""Every opset from 7 to the newest: one network in the forms that each has for its operators."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests import folding
from tests.law_models import Law, build, inputs

NEWEST = onnx.defs.onnx_opset_version()
ONNXRUNTIMES = 23  # the newest that its stable releases run
OPSETS = range(7, NEWEST + 1)


def operand_or_attribute(op: str, x: str, opset: int, since: int, attribute: str, literal: str,
                         rest: str = "") -> str:  # fmt: skip
    """An operator whose integers are an attribute up to an opset, and an input from there on."""
    if opset < since:
        numbers = literal[literal.index("{") :].replace("{", "[").replace("}", "]")
        return f"{op}<{attribute}={numbers}{', ' + rest if rest else ''}>({x})"
    return f"{op}<{rest}>({x}, {literal})" if rest else f"{op}({x}, {literal})"


def network(opset: int) -> Law:
    """Pad, Conv, BN, Relu, upsampling, Conv, BN, Split, Squeeze, Slice, ReduceMean, Dropout."""
    pad = operand_or_attribute("Pad", "x", opset, 11, "pads", "P{0,0,1,1,0,0,1,1}")
    if opset < 9:
        up = 'Upsample<mode="nearest", scales=[1.0,1.0,2.0,2.0]>(r)'
    elif opset < 10:
        up = 'Upsample<mode="nearest">(r, S)'
    else:
        asked = "r, S" if opset == 10 else "r, O, S" if opset < 13 else "r, , S"
        up = f'Resize<mode="nearest">({asked})'
    split = operand_or_attribute("Split", "n", opset, 13, "split", "N{1,3}", "axis=1")
    squeeze = operand_or_attribute("Squeeze", "a", opset, 13, "axes", "Q{1}")
    unsqueeze = operand_or_attribute("Unsqueeze", "q", opset, 13, "axes", "R{1}")
    cut = "Slice<starts=[0], ends=[2], axes=[3]>(b)"
    if opset >= 10:
        cut = "Slice(b, A{0}, E{2}, X{3})"
    mean = operand_or_attribute("ReduceMean", "t", opset, 18, "axes", "M{2,3}")
    text = (
        f"x[2,4,4,4] > u m; p = {pad}; c = Conv(p, W[4,4,3,3], B[4]); k = BN4:alt0(c); "
        f"r = Relu(k); v = {up}; d = Conv(v, V[4,4,1,1]); n = BN4(d); a, b = {split}; "
        f"q = {squeeze}; u = {unsqueeze}; s = {cut}; t = Dropout(s); e = {mean}; "
        "f = Conv(e, U[4,3,1,1]); m = BN4:tla(f)"
    )
    held = {"S": np.array([1, 1, 2, 2], np.float32)} if opset > 8 else {}
    if opset in (11, 12):
        held["O"] = np.zeros(0, np.float32)
    version = 3 if opset < 9 else 4 if opset < 10 else 8 if opset < 19 else 10
    return Law(f"opset {opset}", "", text, 3, opset=opset, ir_version=version,
               listed=opset < 9, constants=held)  # fmt: skip


@pytest.mark.parametrize("opset", OPSETS)
def test_an_opset(opset: int) -> None:
    proto = build(network(opset))
    onnx.checker.check_model(proto)
    made = folding.fold(proto)
    assert len(made.plan.removed) == 3, [kept.reason for kept in made.plan.kept]
    assert folding.batch_norms(made.model) == 0
    feeds = inputs(proto)
    run = folding.run if opset <= ONNXRUNTIMES else folding.evaluate
    before, after = run(proto, feeds), run(made.model, feeds)
    for name, expected in before.items():
        np.testing.assert_array_equal(after[name], expected)
        assert np.any(expected)
    folding.check_interface(made)
    folding.check_shapes(made)
    folding.check_values(made, feeds)
    folding.check_algebra(made)
    folding.check_folding_again(made)


def test_an_older_opset_is_left_alone_with_the_reason() -> None:
    text = "x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); y = BN4<epsilon=0.25, is_test=1>(c)"
    made = folding.fold(build(Law("opset 6", "", text, 0, opset=6, ir_version=3, listed=True)))
    assert not made.plan.removed
    assert all("opset 6" in kept.reason for kept in made.plan.kept)
