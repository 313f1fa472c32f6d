"""The table of runtimes: what is written comes back, a slip is told with the nearest name."""

import itertools

import pytest

from bnfold.errors import UsageError
from bnfold.proof.places.runtimes import (
    PRECISIONS,
    RUNTIMES,
    Runtime,
    as_runtimes,
    ceiling,
    parse_runtime,
)

FLOAT32 = 2.0**-24


def test_what_is_written_comes_back():
    for name, precision in itertools.product(RUNTIMES, PRECISIONS):
        if precision in RUNTIMES[name].classes:
            runtime = Runtime(name, precision)
            assert parse_runtime(str(runtime)) == runtime
    assert str(parse_runtime("cuda:tf32")) == "ort-cuda:tf32"
    assert str(parse_runtime("cpu")) == "ort-cpu"
    assert str(Runtime("ort-cuda")) == "ort-cuda"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ort-cude", "did you mean ort-cuda"),
        ("trch", "did you mean torch"),
        ("gpu", "did you mean ort-cuda"),
        ("ort-cuda:fp23", "did you mean fp32"),
        ("ort-cuda:", "no precision class ''"),
        ("", "no runtime ''"),
        ("ort-cpu:tf32", "has no tf32"),
        ("torch:tf32", "has no tf32"),
    ],
)
def test_slips_are_told(text, said):
    with pytest.raises(UsageError, match=said):
        parse_runtime(text)


def test_a_class_for_all_goes_where_it_exists():
    given = ["ort-cpu", "ort-cuda", "ort-cuda:bf16", Runtime("torch")]
    assert [str(r) for r in as_runtimes(given, "tf32")] == [
        "ort-cpu", "ort-cuda:tf32", "ort-cuda:bf16", "torch",
    ]  # fmt: skip


def test_each_place_once_and_never_none():
    assert as_runtimes(["cpu", "ort-cpu", Runtime("ort-cpu")]) == (Runtime("ort-cpu"),)
    with pytest.raises(UsageError, match="No runtime"):
        as_runtimes([])
    with pytest.raises(UsageError, match="is a list"):
        as_runtimes("ort-cpu")


def test_ceilings_are_ratios_of_roundings():
    assert [ceiling(name, FLOAT32) for name in PRECISIONS] == [4, 2**13, 2**15, 2**18]
    assert ceiling("fp16", 2.0**-11) == 4  # of a model that is float16 itself
    assert ceiling("bf16", 2.0**-11) == 4 * 8


def test_gpus_have_a_process_of_their_own():
    own = [name for name in RUNTIMES if Runtime(name).needs_own_process]
    assert own == ["ort-cuda", "ort-tensorrt"]
