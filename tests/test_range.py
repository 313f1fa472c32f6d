"""What number types can hold: folded where a power of two helps, else kept, never infinite."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bnfold.folding.range import _slices
from bnfold.proof.exact.reference import Float64Reference
from tests import folding

NORM = "BatchNormalization<epsilon=0.25>"
Arrays = dict[str, np.ndarray]


def norm(name: str, gamma: object, spread: object = 1.0, *, shift: float = 0) -> Arrays:
    """A batch norm of 4 channels: scale gamma / spread, with a mean and a beta of `shift`."""
    return {
        f"{name}g": np.broadcast_to(np.asarray(gamma, float), 4),
        f"{name}b": np.full(4, shift),
        f"{name}m": np.full(4, shift),
        f"{name}v": np.broadcast_to(np.asarray(spread, float) ** 2 - 0.25, 4),
    }


def model(body: str, arrays: Arrays, dtype: type = np.float16, kind: str = "float16") -> object:
    """Square values; `N(x, p)` stands for the batch norm whose constants start with p."""
    lines = []
    for line in body.split(";"):
        for p in "pqr":
            line = line.replace(f", {p})", f", {p}g, {p}b, {p}m, {p}v)").replace("N(", f"{NORM}(")
        lines.append(line)
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
        m ({kind}[4,4,4,4] x) => ({kind}[4,4,4,4] y) {{"""
    proto = onnx.parser.parse_model(text + "\n".join(lines) + "}")
    for name, array in arrays.items():
        proto.graph.initializer.append(
            numpy_helper.from_array(np.asarray(array).astype(dtype), name)
        )
    onnx.checker.check_model(proto)
    return proto


def kernel(size: float) -> np.ndarray:
    """1x1 weights of one size and both signs."""
    return size * np.random.default_rng(0).choice([-1.0, 1.0], (4, 4, 1, 1))


def fed(dtype: type = np.float16, size: float = 1) -> dict[str, np.ndarray]:
    return {"x": (size * np.random.default_rng(1).integers(-4, 5, (4, 4, 4, 4))).astype(dtype)}


def largest(of: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> float:
    names = [name for node in of.graph.node for name in node.output]
    return max(float(np.max(np.abs(v))) for v in Float64Reference(of).run(feeds, names).values())


def fold(proto: object, removed: int, feeds: dict[str, np.ndarray]) -> folding.Fold:
    """Fold: that many go, every value is its gauge, every weight finite, nothing left to fold."""
    made = folding.fold(proto)  # type: ignore[arg-type]
    assert len(made.plan.removed) == removed, [kept.reason for kept in made.plan.kept]
    folding.check_counts(made)
    folding.check_values(made, feeds, tolerance=1e-12)
    folding.check_folding_again(made)
    for tensor in made.model.graph.initializer:
        assert np.all(np.isfinite(numpy_helper.to_array(tensor).astype(float)))
    return made


# neither layer can take all of the scale
LARGE = {"W": kernel(512), "V": kernel(128), **norm("p", 1024)}


def test_a_weight_that_would_overflow_keeps_its_batch_norm_and_says_so() -> None:
    made = fold(model("c = Conv(x, W); y = N(c, p)", LARGE), 0, fed(size=2.0**-8))
    reason = made.plan.kept[0].reason
    assert "'W'" in reason
    assert "5.24e+05" in reason
    assert "float16" in reason


@pytest.mark.parametrize(
    "behind",
    [
        "n = N(c, p); r = Relu(n); y = Conv(r, V)",
        "n = N(c, p); r = Relu(n); m = MaxPool<kernel_shape=[1,1]>(r); y = Conv(m, V)",
        "n = N(c, p); d = Conv(x, W); s = Add(n, d); r = Relu(s); y = Conv(r, V)",
    ],
)
def test_a_power_of_two_moves_to_the_next_layer(behind: str) -> None:
    made = fold(model("c = Conv(x, W);" + behind, LARGE), 1, fed(size=2.0**-8))
    new = numpy_helper.to_array(next(t for t in made.model.graph.initializer if "W" in t.name))
    assert 2**14 < np.max(np.abs(new.astype(float))) <= 65504


def test_a_power_of_two_comes_from_the_layer_before() -> None:
    body = "a = Conv(x, V); r = Relu(a); c = Conv(r, W); y = N(c, p)"
    fold(model(body, LARGE | {"V": kernel(1 / 16)}), 1, fed(size=2.0**-8))


def test_a_gauge_of_a_power_of_two_is_exact() -> None:
    arrays = {**LARGE, **norm("p", [1024, -1024, 0, 512], shift=1)}
    body = "c = Conv(x, W); n = N(c, p); y = Conv(n, V)"
    fold(model(body, arrays), 1, fed(size=2.0**-8))


def test_a_constant_without_axes_is_a_slice() -> None:
    assert [float(size) for size in _slices(np.array(-3.0))] == [3]


@pytest.mark.parametrize("size", [2, 20])  # the values would overflow, or the weights too
def test_other_branches_of_a_sum_are_not_pushed_out_of_the_range(size: int) -> None:
    arrays = {"W": kernel(size), "V": kernel(1), **norm("p", 1e-3)}
    body = "f = Floor(x); n = N(f, p); d = Conv(x, W); s = Add(n, d); r = Relu(s); y = Conv(r, V)"
    proto = model(body, arrays)
    made = folding.fold(proto)  # type: ignore[arg-type]
    assert largest(made.model, fed()) <= 16 * largest(made.original, fed())
    assert "1e+03 times its size" in made.plan.kept[0].reason


def test_a_branch_of_a_sum_that_is_normalised_may_grow_with_the_sum() -> None:
    arrays = {"W": kernel(2.0**-7), "V": kernel(2.0**-7), **norm("p", 1, 2.0**-6)}
    arrays["pv"] = np.full(4, 2.0**-12)
    body = "c = Conv(x, W); d = Conv(x, V); s = Add(c, d); y = N(s, p)".replace("N(", "N0(")
    proto = model(
        body.replace("N0(s, p)", "BatchNormalization<epsilon=0.0>(s, pg, pb, pm, pv)"), arrays
    )
    made = folding.fold(proto)  # type: ignore[arg-type]
    assert len(made.plan.removed) == 1


FAINT = {"W": kernel(2.0**-8), "V": kernel(2.0**4), **norm("p", 2.0**-10, 2.0**4)}


def test_a_weight_that_would_lose_its_digits_keeps_its_batch_norm_and_says_so() -> None:
    made = fold(model("c = Conv(x, W); y = N(c, p)", FAINT), 0, fed())
    assert "'W'" in made.plan.kept[0].reason
    assert "loses digits" in made.plan.kept[0].reason


def test_a_weight_that_would_lose_its_digits_is_carried_larger() -> None:
    body = "c = Conv(x, W); n = N(c, p); r = Relu(n); y = Conv(r, V)"
    made = fold(model(body, FAINT), 1, fed())
    for tensor in made.model.graph.initializer:
        if tensor.dims == [4, 4, 1, 1]:
            array = np.abs(numpy_helper.to_array(tensor).astype(float))
            assert np.min(np.max(array, axis=(1, 2, 3))) >= 2.0**-14


def test_one_faint_channel_is_carried_larger_on_its_own() -> None:
    arrays = {**FAINT, **norm("p", [1, 2.0**-10, 1, 1], [1, 2.0**4, 1, 1]), "V": kernel(1)}
    body = "c = Conv(x, W); n = N(c, p); r = Relu(n); y = Conv(r, V)"
    fold(model(body, arrays), 1, fed())


def test_a_channel_that_the_network_itself_cannot_hold_is_no_reason_to_stay() -> None:
    arrays = {"W": kernel(0.5), **norm("p", [1, 2.0**-23, 1, 1], 4)}
    made = folding.fold(model("c = Conv(x, W); y = N(c, p)", arrays))  # type: ignore[arg-type]
    assert len(made.plan.removed) == 1


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.float32, "float"), (ml_dtypes.bfloat16, "bfloat16")]
)
@pytest.mark.parametrize(("size", "gamma"), [(2.0**100, 2.0**40), (2.0**-100, 2.0**-40)])
def test_the_ends_of_the_wide_types_are_guarded_too(
    dtype: type, kind: str, size: float, gamma: float
) -> None:
    arrays = {"W": kernel(size), "V": kernel(1), **norm("p", gamma)}
    # what is carried must fit as well: the batch norm says how large it is
    arrays["pv"] = np.full(4, min(size, 2.0**60) ** 2)
    body = "c = Conv(x, W); y = N(c, p)"
    made = folding.fold(model(body, arrays | norm("p", gamma), dtype, kind))  # type: ignore[arg-type]
    assert len(made.plan.kept) == 1
    assert "'W'" in made.plan.kept[0].reason
    body = "c = Conv(x, W); n = N(c, p); r = Relu(n); y = Conv(r, V)"
    made = folding.fold(model(body, arrays | norm("p", gamma), dtype, kind))  # type: ignore[arg-type]
    assert len(made.plan.removed) == 1
    for tensor in made.model.graph.initializer:
        array = np.abs(numpy_helper.to_array(tensor).astype(float))
        assert np.all(np.isfinite(array))


def test_the_error_of_a_fold_in_float16_is_that_of_the_network() -> None:
    rng = np.random.default_rng(3)
    arrays = {
        "W": 600 * rng.standard_normal((4, 4, 1, 1)),
        "V": rng.standard_normal((4, 4, 1, 1)) / 500,
    }
    arrays |= norm("p", [300, 400, -200, 500], 2, shift=1)
    proto = model("c = Conv(x, W); n = N(c, p); r = Relu(n); y = Conv(r, V)", arrays)
    made = folding.fold(proto)  # type: ignore[arg-type]
    assert len(made.plan.removed) == 1
    given = {"x": (rng.standard_normal((4, 4, 4, 4)) / 2000).astype(np.float16)}
    exact = Float64Reference(made.original).run(given)["y"]
    error = np.max(np.abs(Float64Reference(made.model).run(given)["y"] - exact))
    assert error < 2.0**-9 * np.max(np.abs(exact))
