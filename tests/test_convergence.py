"""The stop rule: early on easy data, never while the data drifts, and right where it stops."""

import copy

import numpy as np
import pytest
import torch
from test_adapt import Net, batch_norms, seeded
from test_modules import estimated, in_processes, state
from torch import nn

from bnfold.adapting import modules
from bnfold.adapting.convergence import Convergence, movement
from bnfold.adapting.estimate import Progress
from bnfold.adapting.feed import Feed
from bnfold.errors import UsageError


def easy(count, seed=0):
    """Images that differ little from each other."""
    rng = torch.Generator().manual_seed(seed)
    level = 0.3 * torch.randn((count, 2, 1, 1), generator=rng)
    return level + torch.randn((count, 2, 6, 6), generator=rng)


@pytest.fixture
def net():
    return seeded(Net()).double()


def test_it_stops_early_on_easy_data(net):
    x = easy(4000)
    found, _ = estimated(net, x.split(32), "fast", stop=0.1)
    assert {m.images for m in found.moments.values()} == {found.moments["bn1"].images}
    assert 96 < found.moments["bn1"].images < 2000
    coarse, _ = estimated(net, x.split(32), "fast", stop=0.3)
    assert coarse.moments["bn1"].images < found.moments["bn1"].images


def test_it_reads_to_the_end_where_there_is_not_enough(net):
    x = easy(64)
    found, _ = estimated(net, x.split(16), "fast", stop=0.02)
    assert found.moments["bn1"].images == 64


@pytest.mark.parametrize("shape", ["line", "classes"])
def test_it_never_stops_while_the_data_drifts(net, shape):
    """Slow enough that no batch moves the estimate by more than the tolerance."""
    x, steps = easy(3200), torch.linspace(0, 8, 3200)
    if shape == "classes":
        steps = steps.round()
    x = x + steps[:, None, None, None]
    found, _ = estimated(net, x.split(32), "fast", stop=0.1)
    assert found.moments["bn1"].images == 3200
    mixed = x[torch.randperm(3200, generator=torch.Generator().manual_seed(0))]
    found, _ = estimated(net, mixed.split(32), "fast", stop=0.1)
    assert found.moments["bn1"].images < 3200


def test_without_the_comparison_of_batches_it_would_stop_on_sorted_data(net, monkeypatch):
    monkeypatch.setattr("bnfold.adapting.convergence._is_sorted", lambda _: False)
    x = easy(3200) + torch.linspace(0, 8, 3200)[:, None, None, None]
    found, _ = estimated(net, x.split(32), "fast", stop=0.1)
    assert found.moments["bn1"].images < 3200


def test_where_it_stops_the_estimate_is_within_the_tolerance(net):
    """Twenty draws from one large set: the median channel of the worst layer, 19 times in 20."""
    whole, order = easy(20_000, seed=5), torch.Generator().manual_seed(1)
    truth, _ = estimated(net, whole.split(500), "fast")
    stop, within, sizes = 0.15, 0, []
    for _ in range(20):
        part = whole[torch.randperm(len(whole), generator=order)[:4000]]
        found, _ = estimated(net, part.split(32), "fast", stop=stop)
        off = max(
            np.median(movement(truth.moments[name], moments, 1e-5))
            for name, moments in found.moments.items()
        )
        within += off < stop
        sizes.append(found.moments["bn1"].images)
    assert within >= 19
    assert max(sizes) < 4000


@pytest.mark.parametrize("count", [2, 3])
def test_processes_stop_together(net, count):
    """Also where they have different numbers of batches, or none is left in one."""
    batches = easy(1500).split(32)
    several = in_processes(count, net, batches, "fast", stop=0.15)
    images = {e.moments["bn1"].images for e, _ in several}
    assert len(images) == 1
    assert images.pop() < 1500
    short = in_processes(count, net, batches[: count + 1], "fast", stop=0.01)
    assert {e.moments["bn1"].images for e, _ in short} == {32 * (count + 1)}


def test_exact_takes_as_many_as_are_enough(net):
    """The network is as it was, and the feed ends where it is enough, on each pass."""
    x = easy(4000)
    work = copy.deepcopy(net).eval()
    layers = batch_norms(work)
    feed = Feed(work, x.split(32), forward=None, max_bytes=1 << 30)
    progress = Progress(None, feed, len(layers), False)
    before = state(work)
    with torch.no_grad():
        modules.read_until_enough(work, layers, feed, progress, stop=0.1)
        after = state(work)
        assert all(torch.equal(before[key], after[key]) for key in before)
        images = feed.images
        found = modules.exact(work, layers, feed, progress, max_bytes=1 << 30)
    assert 96 < images < 2000
    assert feed.images == found.moments["bn1"].images == images == 32 * feed.batches
    whole, _ = estimated(net, x[:images].split(32))
    np.testing.assert_array_equal(whole.moments["bn3"].pixels.m2, found.moments["bn3"].pixels.m2)


@pytest.mark.parametrize("stop", [0, 1, -0.1, float("nan")])
def test_a_tolerance_that_means_nothing_is_refused(stop):
    with pytest.raises(UsageError, match="must lie between 0 and 1"):
        Convergence({}, stop)


def test_a_single_batch_is_read_once(net):
    calls = []

    class Counting(nn.Sequential):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    estimated(Counting(net), [easy(8).double()], "fast", stop=0.5)
    assert calls == [8]
