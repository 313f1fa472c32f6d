"""Processes that measure together find what one finds, all the same numbers, and fail together."""

import json

import numpy as np
import pytest
from processes import run_in

from bnfold.errors import InputError, UsageError
from bnfold.measuring.moments import ImageMoments, batch_excess, excess_between
from bnfold.measuring.ranks import Alone, Waiting, group_from_environment, own_device
from bnfold.measuring.stored import from_bytes, to_bytes

FIELDS = ("centre", "within", "m2", "m3", "m4", "v2", "mv", "mmv")


def batch(seed, channels=3):
    """Moments of one batch; sizes and levels differ from seed to seed."""
    rng = np.random.default_rng(seed)
    shape = (2 + seed % 5, channels)
    return ImageMoments.of(seed + rng.gamma(2.0, size=shape), rng.random(shape), 7 + seed)


def waiting(batches):
    return Waiting(
        len(batches), ImageMoments.pooled(batches), np.sum([b.m2 for b in batches], axis=0)
    )


def numbers(found):
    """Everything in moments, as JSON gives it back bit for bit."""
    pixels = [found.pixels.mean, found.pixels.m2, *(getattr(found, name) for name in FIELDS)]
    return [found.images, found.pixels.count, np.stack(pixels).tolist()]


# --- as bytes -------------------------------------------------------------------------------------


def test_moments_come_back_bit_for_bit_and_in_their_order():
    moments = {
        "z": waiting([batch(1), batch(3)]),
        "a/b.c": Waiting(4, batch(2, 5)),
        "m": Waiting(0, ImageMoments.none(2)),
    }
    facts, back = from_bytes(to_bytes({"read": 3, "x": [1.5, None]}, moments), "it")
    assert facts == {"read": 3, "x": [1.5, None]}
    assert list(back) == list(moments)
    for name, found in back.items():
        assert numbers(found.moments) == numbers(moments[name].moments)
        assert found.batches == moments[name].batches
        assert (found.within is None) == (name != "z")
    np.testing.assert_array_equal(back["z"].within, moments["z"].within)


def test_other_bytes_are_refused():
    good = to_bytes({}, {"a": Waiting(1, batch(1))})
    from safetensors.numpy import save

    bad = [
        b"",
        b"hello there, this is text",
        good[:-5],
        save({"x": np.ones(3)}),
        save({"facts": np.frombuffer(b"[1]", np.uint8)}),
        save({"facts": np.frombuffer(b'{"facts":{},"layers":[["a",1,1,1]]}', np.uint8)}),
        save(
            {
                "facts": np.frombuffer(b'{"facts":{},"layers":[["a",1,1,1]]}', np.uint8),
                "0": np.ones((3, 2)),
            }
        ),
        good.replace(b'"layers": [["a", ', b'"layers": [["a",-'),
    ]
    for data in bad:
        with pytest.raises(InputError, match="it holds no moments"):
            from_bytes(data, "it")


# --- one process ----------------------------------------------------------------------------------


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with group_from_environment() as ranks:
        assert isinstance(ranks, Alone)
        found = {"a": waiting([batch(1)])}
        assert ranks.together(found) == found
        assert ranks.share([1]) == [[1]]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert isinstance(group_from_environment(), Alone)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT not"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK 2 of 2 processes",
        ),
    ],
)
def test_half_an_environment_is_refused(monkeypatch, values, words):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words):
        group_from_environment()


def test_cuda_is_the_gpu_of_the_process(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert own_device("cuda") == "cuda:3"
    assert (own_device("cpu"), own_device("cuda:1"), own_device(None)) == ("cpu", "cuda:1", None)


# --- several --------------------------------------------------------------------------------------

MERGE = """
import json
from bnfold.measuring.ranks import Waiting, group_from_environment
from test_ranks import batch, numbers, waiting

with group_from_environment() as ranks:
    every = [batch(seed) for seed in range(3)]
    mine = every[ranks.rank :: ranks.size]
    here = {"a": waiting(mine)} if mine else {}
    if ranks.rank == 1:
        here["only in 1"] = Waiting(1, batch(9, 4))
    merged = ranks.together(here)
    a = merged["a"]
    print(json.dumps({
        "rank": ranks.rank, "shared": ranks.share({"r": ranks.rank}), "layers": list(merged),
        "a": numbers(a.moments), "only": numbers(merged["only in 1"].moments),
        "batches": a.batches, "within": a.within.tolist(), "none": ranks.together({}),
    }))
"""


@pytest.mark.parametrize("size", [2, 4])
def test_every_process_gets_the_same_numbers_and_they_are_those_of_one(size):
    """Of 4 processes, one has no batch."""
    told = []
    for code, said in run_in(size, MERGE):
        assert code == 0
        told.append(json.loads(said))
    assert [one.pop("rank") for one in told] == list(range(size))
    assert all(one == told[0] for one in told)  # bit for bit
    first = told[0]
    assert first["shared"] == [{"r": rank} for rank in range(size)]
    assert first["layers"] == ["a", "only in 1"]
    assert first["only"] == numbers(batch(9, 4))
    assert first["none"] == {}
    every = [batch(seed) for seed in range(3)]
    images, count, rows = numbers(ImageMoments.pooled(every))
    assert first["a"][:2] == [images, count]
    np.testing.assert_allclose(first["a"][2], rows, rtol=1e-12)
    assert first["batches"] == 3
    excess = excess_between(ImageMoments.pooled(every), np.array(first["within"]), 3)
    assert excess == pytest.approx(batch_excess(every), rel=1e-12)


FAIL = """
import sys
from bnfold.measuring.ranks import group_from_environment
from bnfold.errors import BnfoldError, InputError, UnsafeInputError

def attempt(what):
    try:
        with group_from_environment() as ranks:
            what(ranks)
    except (BnfoldError, ZeroDivisionError) as error:
        print(f"{type(error).__name__} {getattr(error, 'exit_code', '')} {error}", flush=True)
    else:
        print("fine", flush=True)

def one_is_wrong(ranks):
    ranks.together({})
    if ranks.rank == 1:
        raise UnsafeInputError("It would run code.")
    ranks.together({})

def two_are_wrong(ranks):
    if ranks.rank:
        raise InputError(f"Broken in {ranks.rank}.")
    ranks.share(0)

def one_stops_while_others_are_done(ranks):
    if ranks.rank == 2:
        raise InputError("Broken at the end.")

def one_has_a_bug(ranks):
    if ranks.rank == 2:
        1 / 0
    ranks.together({})

def apart(ranks):
    ranks.share(1) if ranks.rank else ranks.together({})

for what in (one_is_wrong, two_are_wrong, one_stops_while_others_are_done, one_has_a_bug, apart,
             lambda ranks: ranks.together({})):
    attempt(what)
assert dist.is_initialized()  # it was not made here
"""


def test_a_failure_in_one_ends_all_with_its_error():
    told = []
    for code, said in run_in(3, FAIL, joined=True):
        assert code == 0
        told.append(said.splitlines())
    for lines in told:
        assert lines[0] == "UnsafeInputError 3 It would run code."
        assert lines[1] == "InputError 3 Broken in 1."
        assert lines[2] == "InputError 3 Broken at the end."
        assert lines[4].startswith("UsageError 2 The processes have come apart (together, share,")
        assert lines[5] == "fine"
    bug = "BnfoldError 70 Process 2 failed with ZeroDivisionError: division by zero."
    assert [lines[3] for lines in told] == [bug, bug, "ZeroDivisionError  division by zero"]


DIE = """
import os, sys
from bnfold.measuring.ranks import group_from_environment
from bnfold.errors import BnfoldError

try:
    with group_from_environment(timeout=1.5) as ranks:
        ranks.together({})
        if ranks.rank == 1:
            if sys.argv[1] == "die":
                os._exit(9)
            import time
            time.sleep(4)
        ranks.together({})
except BnfoldError as error:
    print(type(error).__name__, error.exit_code, error)
"""


@pytest.mark.parametrize("how", ["die", "sleep"])
def test_a_process_that_is_gone_or_stuck_is_told_in_a_sentence(how):
    (code, said), (other, _) = run_in(2, DIE, how)
    assert said.startswith("RuntimeUnavailableError 4 Process 0 of 2 lost the others (")
    assert "one has ended without a word, or did not answer in time" in said
    assert (code, other) == (0, 9 if how == "die" else 0)
