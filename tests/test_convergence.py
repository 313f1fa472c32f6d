"""The stop rule: early on easy data, never while the data drifts, and right where it stops."""

import numpy as np
import pytest
import torch
from test_adapt import Net, seeded

import bnfold
from bnfold.adapting import convergence
from bnfold.errors import UsageError
from bnfold.measuring.moments import movement


def easy(count, seed=0):
    """Images that differ little from each other."""
    rng = torch.Generator().manual_seed(seed)
    level = 0.3 * torch.randn((count, 2, 1, 1), generator=rng)
    return level + torch.randn((count, 2, 6, 6), generator=rng)


@pytest.fixture
def net():
    return seeded(Net()).eval()


def adapted(net, x, size=32, **options):
    return bnfold.adapt(net, x.split(size), diagnose=False, **options)


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_it_stops_early_on_easy_data(net, method):
    x = easy(4000)
    found = adapted(net, x, method=method, stop=0.1)
    assert {layer.samples for layer in found.layers} == {found.images}
    assert 96 < found.images < 2100
    assert adapted(net, x, method=method, stop=0.3).images < found.images


def test_it_takes_the_first_batches_and_no_others(net):
    x = easy(4000)
    found = adapted(net, x, stop=0.1)
    whole = adapted(net, x[: found.images])
    for name, own in whole.statistics.items():
        np.testing.assert_array_equal(found.statistics[name].var, own.var)


def test_it_reads_to_the_end_where_there_is_not_enough(net):
    assert adapted(net, easy(64), size=16, stop=0.02).images == 64


@pytest.mark.parametrize("shape", ["line", "classes"])
def test_it_never_stops_while_the_data_drifts(net, shape):
    """Slow enough that no batch moves the estimate by more than the tolerance."""
    x, steps = easy(3200), torch.linspace(0, 8, 3200)
    if shape == "classes":
        steps = steps.round()
    x = x + steps[:, None, None, None]
    assert adapted(net, x, stop=0.1, method="fast").images == 3200
    mixed = x[torch.randperm(3200, generator=torch.Generator().manual_seed(0))]
    assert adapted(net, mixed, stop=0.1, method="fast").images < 3200


def test_it_does_not_trust_batches_that_differ(net, monkeypatch):
    """Each batch of one class: however still the estimate stands, another class may come."""
    x = easy(3200) + (torch.arange(3200) // 32 % 2)[:, None, None, None]
    assert adapted(net, x, stop=0.15, method="fast").images == 3200
    monkeypatch.setattr(convergence, "chance_limit", lambda *_: np.inf)
    assert adapted(net, x, stop=0.15, method="fast").images < 3200


def test_where_it_stops_the_estimate_is_within_the_tolerance(net):
    """Twenty draws from one large set: the median channel of the worst layer, 19 times in 20."""
    whole, order = easy(20_000, seed=5), torch.Generator().manual_seed(1)
    truth = {layer.name: layer.moments for layer in adapted(net, whole, size=500).layers}
    stop, within, sizes = 0.15, 0, []
    for _ in range(20):
        part = whole[torch.randperm(len(whole), generator=order)[:4000]]
        found = adapted(net, part, stop=stop)
        off = max(
            np.median(np.abs(layer.moments.pixels.mean - truth[layer.name].pixels.mean))
            / np.sqrt(np.median(truth[layer.name].pixels.var))
            for layer in found.layers
        )
        within += off < stop
        sizes.append(found.images)
    assert within >= 19
    assert max(sizes) < 4000


def test_movement_is_of_the_worst_channel_mean_or_deviation(net):
    moments = adapted(net, easy(64)).layers[0].moments
    assert movement(moments, moments, 1e-5) == 0
    other = adapted(net, 2 * easy(64)).layers[0].moments
    assert movement(moments, other, 0) >= np.log(2) - 1e-6


@pytest.mark.parametrize("stop", [0, 1, -0.1, float("nan")])
def test_a_tolerance_that_means_nothing_is_refused(net, stop):
    with pytest.raises(UsageError, match="must lie between 0 and 1"):
        adapted(net, easy(8), stop=stop)
