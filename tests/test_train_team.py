"""Several processes train one network: the weights of one process alone, and one end for all."""

import json

import numpy as np
import pytest
import torch
from processes import run_in
from test_torchrun import run

from bnfold.measuring.ranks import Alone

# x and y, and how networks of them are trained: run in each process, and here
COMMON = """
import sys
import numpy as np, torch
from torch import nn
from bnfold.errors import BnfoldError, UsageError
from bnfold.measuring.ranks import group_from_environment
from bnfold.norm import convert
from bnfold.training.train import train

rng = np.random.default_rng(3)
x = rng.normal(size=(51, 6)).astype(np.float32)
y = (x @ rng.normal(size=(6, 4))).argmax(axis=1)
given = [(x[i : i + 11], y[i : i + 11]) for i in range(0, 44, 11)]
options = {"epochs": 3, "lr": 0.05, "schedule": "cosine", "test_data": (x, y)}

def network(norm=False):
    torch.manual_seed(1)
    middle = nn.BatchNorm1d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Linear(8, 4))

def trained(how, ranks):
    result = train(
        network(how == "norm"), given if how == "given" else (x, y), batch_size=12 // ranks.size,
        statistics="exact" if how == "norm" else "moving", ranks=ranks, **options,
    )
    history = [[m.loss, m.accuracy, m.test_loss, m.test_accuracy] for m in result.history]
    return {"state": result.module.state_dict(), "history": history}
"""

TRAIN = """
with group_from_environment() as ranks:
    found = {how: trained(how, ranks) for how in ("samples", "given", "norm")}
    for kind in ("batch", "renorm"):
        momentum = {"momentum": 0.5} if kind == "renorm" else {}
        net = convert(network(True), kind, **momentum)
        one_step = train(net, [(x[:50], y[:50])], epochs=1, ranks=ranks)
        found[kind] = one_step.module.state_dict()
    torch.save(found, f"{sys.argv[1]}/{ranks.rank}.pt")
"""


@pytest.fixture(scope="module")
def here():
    """What COMMON defines, in this process."""
    names: dict = {}
    exec(COMMON, names)
    return names


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes ends with."""
    folder = tmp_path_factory.mktemp("two")
    assert [code for code, _ in run_in(2, COMMON + TRAIN, folder)] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def furthest(a, b):
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


@pytest.mark.parametrize("how", ["samples", "given"])
def test_two_processes_reach_the_weights_and_the_figures_of_one(here, two, how):
    one = here["trained"](how, Alone())
    for part in two:
        assert furthest(part[how]["state"], one["state"]) < 2e-6
        np.testing.assert_allclose(part[how]["history"], one["history"], rtol=1e-5)
    assert furthest(two[0][how]["state"], two[1][how]["state"]) == 0
    assert furthest(here["network"]().state_dict(), one["state"]) > 0.1  # the measure sees steps


def test_batch_norms_of_two_processes_are_one_network_with_exact_statistics(here, two):
    first = two[0]["norm"]["state"]
    assert furthest(first, two[1]["norm"]["state"]) == 0
    hidden = torch.from_numpy(here["x"]) @ first["0.weight"].T + first["0.bias"]
    torch.testing.assert_close(first["1.running_mean"], hidden.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first["1.running_var"], hidden.var(0), rtol=1e-5, atol=1e-6)


def test_moving_averages_are_the_mean_of_what_the_processes_saw(here, two):
    state = two[0]["batch"]
    assert furthest(state, two[1]["batch"]) == 0
    seen = here["network"](True)[0](torch.from_numpy(here["x"][:50])).detach()
    torch.testing.assert_close(state["1.running_mean"], 0.1 * seen.mean(0))
    var = (seen[:25].var(0) + seen[25:].var(0)) / 2
    torch.testing.assert_close(state["1.running_var"], 0.9 + 0.1 * var)
    # batch renormalization averages deviations, of the batch and of the processes
    eps = 1e-5
    parts = [(part.var(0, correction=0) + eps).sqrt() for part in (seen[:25], seen[25:])]
    start = (torch.tensor(1.0) + eps).sqrt()
    std = (parts[0] + parts[1] + 2 * start) / 4
    found = (two[0]["renorm"]["1.running_var"] + eps).sqrt()
    torch.testing.assert_close(found, std)


FAIL = """
class Spoiled(nn.Sequential):
    def forward(self, x):
        spoils = self.training and ranks.rank == 1
        return super().forward(x) * (float("nan") if spoils else 1.0)

class Short:
    def __len__(self):
        return 4
    def __iter__(self):
        yield from given[:3]

def boo(*_):
    if ranks.rank == 1:
        raise UsageError("boo")
    return _[0]

for how in ("nan", "short", "arguments", "augment", "on_step", "log"):
    net, data, more = network(norm=True), given, {}
    try:
        with group_from_environment() as ranks:
            if how == "nan":
                net = Spoiled(*net)
            if ranks.rank == 1 and how == "short":
                data = Short()
            if ranks.rank == 1 and how == "arguments":
                more["lr"] = 0.04
            if how in ("augment", "on_step", "log"):
                more[how] = boo
            train(net, data, ranks=ranks, **{**options, **more})
    except BnfoldError as error:
        print(how, "|", error)
"""


def test_what_fails_in_one_process_ends_all_with_its_words():
    ended = run_in(2, COMMON + FAIL, joined=True)
    assert [code for code, _ in ended] == [0, 0]
    for _, said in ended:
        nan, short, arguments, augment, hook, log = said.splitlines()
        assert nan.startswith("nan | The loss became nan in step 1 of epoch 1")
        assert "short | The processes got different numbers of batches: 1 of 2 are" in short
        assert "arguments | The processes were started with different arguments" in arguments
        assert augment == "augment | augment failed on a batch of shape (5, 6): boo."
        assert (hook, log) == ("on_step | boo", "log | boo")


BACKWARD = """
class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no way back")

class Stuck(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return Refusing.apply(y) if ranks.rank == 1 else y

try:
    with group_from_environment() as ranks:
        net = network(norm=True)
        train(Stuck(*net), given, ranks=ranks, **options)
except BnfoldError as error:
    print(type(error).__name__, error)
"""


def test_a_failure_on_the_way_back_does_not_leave_the_others_waiting():
    (other, failed) = run_in(2, COMMON + BACKWARD)
    assert failed[0] == other[0] == 0
    assert "RuntimeUnavailableError Process 1 of 2 failed while the processes averaged" in failed[1]
    assert "no way back" in failed[1]
    assert "RuntimeUnavailableError Process 0 of 2 failed while" in other[1]
    assert "lost the others" in other[1]


def test_torchrun_trains_reports_and_writes_once(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 1, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=(x.mean(axis=(1, 2, 3)) > 0).astype(np.int64))
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),\n"
        "                         nn.Flatten(), nn.Linear(16, 2))\n"
    )
    call = ("train", "net.py:net", "--data", "data.npz", "--test-data", "data.npz", "--epochs", 3)
    call = (*call, "--statistics", "exact", "--log-file", "run.jsonl", "--json")
    code, said, error = run(tmp_path, *call, "--batch-size", 16, processes=2)
    assert code == 0, error
    report = json.loads(said)  # one report, and nothing else
    assert "in 2 processes" in report["summary"]
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["run", "epoch", "epoch", "epoch"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py") == (
        ["__pycache__"] * (tmp_path / "__pycache__").exists() + ["data.npz", "net.pt", "run.jsonl"]
    )
    content = torch.load(tmp_path / "net.pt", weights_only=True)
    assert content["bnfold"]["metrics"]["run"]["processes"] == 2
    assert content["state_dict"]["1.num_batches_tracked"] == 9
    code, _, error = run(tmp_path, "inspect", "net.pt")
    assert code == 0, error
