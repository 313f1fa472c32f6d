"""A state is there whole or not at all, belongs to one run, and gives back every bit of it."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from processes import ROOT
from test_ranks import batch, numbers

from bnfold.errors import InputError, UsageError
from bnfold.measuring.ranks import Alone
from bnfold.measuring.resume import State
from bnfold.measuring.stored import from_bytes, to_bytes

RUN = {"model": "ab12", "method": "exact", "layers": ("a*", "b"), "images": 100, "prior": 0.5}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.state"


def reopened(path, run=RUN):
    return State.open(path, run, Alone())


def test_settled_layers_come_back_in_their_order_with_every_bit(path):
    state = reopened(path)
    assert state.settled == {}
    for name, seed in (("z", 1), ("a", 2), ("m", 3)):
        state.add(name, batch(seed, 2 + seed))
        again = reopened(path)
        assert list(again.settled) == list(state.settled)
        for layer, moments in state.settled.items():
            assert numbers(again.settled[layer]) == numbers(moments)
    state.finish()
    assert not path.exists()
    assert reopened(path).settled == {}
    assert [file.name for file in path.parent.iterdir()] == ["run.state"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"model": "cd34"}, r"another run: model is cd34 and was ab12\. Give another file"),
        ({"images": 99, "prior": 0.0}, "images is 99 and was 100; prior is 0.0 and was 0.5"),
        ({"seed": 1}, "seed is 1 and was not given"),
        ({"layers": ["a*"]}, r"layers is \['a\*'\] and was \['a\*', 'b'\]"),
    ],
)
def test_the_state_of_another_run_is_refused_and_stays(path, other, words):
    reopened(path).add("a", batch(1))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=words):
        reopened(path, RUN | other)
    assert path.read_bytes() == before


def test_a_file_that_is_no_state_is_refused_and_stays(path):
    for content in (b"", b"important notes", to_bytes({"format": "other"}, {})):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"run\.state"):
            reopened(path)
        assert path.read_bytes() == content


def test_a_changed_bit_is_seen(path):
    reopened(path).add("a", batch(0))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="is no state of a run, or is damaged"):
        reopened(path)


def test_a_file_that_cannot_be_written_shows_at_once(tmp_path):
    with pytest.raises(UsageError, match="Cannot write"):
        reopened(tmp_path / "no folder" / "run.state")
    with pytest.raises(InputError, match="cannot be read"):
        reopened(tmp_path)


def test_what_breaks_off_a_write_leaves_the_state_before_it(path, monkeypatch):
    state = reopened(path)
    state.add("a", batch(1))
    before = path.read_bytes()

    def broken_off(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_bytes", broken_off)
    with pytest.raises(KeyboardInterrupt):
        state.add("b", batch(2))
    assert path.read_bytes() == before
    assert list(reopened(path).settled) == ["a"]
    assert [file.name for file in path.parent.iterdir()] == ["run.state"]


KILLED = """
import sys
from bnfold.measuring.ranks import Alone
from bnfold.measuring.resume import State
from test_ranks import batch

state = State.open(sys.argv[1], {}, Alone())
for seed in range(len(state.settled), 100_000):
    print(seed, flush=True)
    state.add(f"layer{seed}", batch(seed % 50, 4096))
"""


def test_a_kill_at_any_moment_leaves_a_whole_state(path):
    """The file is 300 kB and more, and the kills come at other moments of its writing."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    before = 0
    for lines in (3, 4, 6):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, env=environment
        ) as process:
            for _ in range(lines):
                begun = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
        settled = reopened(path, {}).settled
        assert before <= begun <= len(settled) + 1
        assert list(settled) == [f"layer{seed}" for seed in range(len(settled))]
        for seed, moments in enumerate(settled.values()):
            assert numbers(moments) == numbers(batch(seed % 50, 4096))
        before = len(settled)
    assert before >= 3


# --- whole runs -----------------------------------------------------------------------------------

RUN_ALONE = """
import os, signal, sys
import numpy as np
from bnfold.adapting.adapt import Asked, adapt_target
from bnfold.measuring.ranks import Alone
from bnfold.measuring.resume import State
from bnfold.adapting.targets import Options, target_of
from test_distributed import batches, model_of

kind, model, path, after, out = sys.argv[1:]
state = State.open(path, {"kind": kind}, Alone())

def settled(name, moments):
    state.add(name, moments)
    if len(state.settled) == int(after):
        os.kill(os.getpid(), signal.SIGKILL)

result = adapt_target(target_of(model_of(kind, model), Options()), batches(7),
                      Asked(resumed=dict(state.settled), on_settled=settled))
state.finish()
np.savez(out, **{f"{n}.{p}": getattr(s, p) for n, s in result.statistics.items()
                 for p in ("mean", "var")})
"""


@pytest.mark.parametrize(("kind", "kills"), [("module", (1, 3)), ("graph", (2,))])
def test_a_run_that_was_killed_ends_with_the_bits_of_a_whole_one(kind, kills, tmp_path):
    import torch
    from test_distributed import ready

    import bnfold

    model = tmp_path / "net.onnx"
    bnfold.export(ready(), (torch.zeros(2, 3, 9, 9),), path=model)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }

    def run(path, after, out):
        call = [sys.executable, "-c", RUN_ALONE, kind, model, path, str(after), tmp_path / out]
        return subprocess.run(call, env=environment, check=False).returncode

    assert run(tmp_path / "other.state", 0, "whole.npz") == 0
    path = tmp_path / "run.state"
    for layer in kills:  # each run gets further than the one before
        assert run(path, layer, "none.npz") == -signal.SIGKILL
        assert len(from_bytes(path.read_bytes()[32:], "it")[1]) == layer
    assert run(path, 0, "resumed.npz") == 0
    assert not path.exists()
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "resumed.npz") as resumed:
        assert len(whole.files) == 6
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], resumed[name])
