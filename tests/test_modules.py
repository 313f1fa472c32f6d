"""The torch runner: several processes find what one finds, a rule decides, a run can be resumed."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_adapt import Forking, Net, Twice, batch_norms, layer_by_layer, seeded, target
from torch import nn

from bnfold.errors import InputError
from bnfold.measuring import modules
from bnfold.measuring.estimate import Progress
from bnfold.measuring.feed import Feed
from bnfold.measuring.ranks import Alone
from bnfold.measuring.statistics import Rule

METHODS = {"exact": modules.exact, "fast": modules.fast}


class Hall:
    """Where processes that are threads meet: each puts down what it has and takes what all have."""

    def __init__(self, size):
        self.size, self.said = size, [None] * size
        self.barrier = threading.Barrier(size)

    def exchange(self, rank, value):
        self.said[rank] = value
        self.barrier.wait(20)
        said = list(self.said)
        self.barrier.wait(20)
        return said


class Seat(Alone):
    """One of them. A failure breaks the barrier, as a closed connection would."""

    def __init__(self, hall, rank):
        self.hall, self.rank, self.size = hall, rank, hall.size

    def together(self, waiting):
        merged = {}
        for part in self.hall.exchange(self.rank, dict(waiting)):
            for name, found in part.items():
                merged[name] = merged[name].merge(found) if name in merged else found
        return merged

    def share(self, value):
        return self.hall.exchange(self.rank, value)

    def __exit__(self, kind, error, trace):
        if error is not None:
            self.hall.barrier.abort()


def estimated(net, batches, method="exact", rank=None, **options):
    """(estimate, network) of a copy of `net`, as the API would make them."""
    work = copy.deepcopy(net).eval()
    layers = batch_norms(work)
    feed = Feed(work, batches, forward=None, max_bytes=1 << 30, is_share=rank is not None)
    if method == "exact":
        options = {"max_bytes": 1 << 30, **options}
    if rank is not None:
        options["ranks"] = rank
    with torch.no_grad(), rank or Alone():
        progress = Progress(None, feed, len(layers), False)
        return METHODS[method](work, layers, feed, progress, **options), work


def in_processes(count, net, batches, method="exact", **options):
    """The same in `count` processes, batch r, r + count, ... in process r."""
    hall = Hall(count)

    def run(rank):
        return estimated(net, batches[rank::count], method, Seat(hall, rank), **options)

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(run, r) for r in range(count)]]


def assert_same_moments(a, b, tolerance=1e-9):
    """Same layers, same numbers: in standard deviations and relative."""
    assert a.moments.keys() == b.moments.keys()
    for name, found in a.moments.items():
        other = b.moments[name]
        assert (found.images, found.pixels.count) == (other.images, other.pixels.count)
        sd = np.sqrt(found.pixels.var)
        np.testing.assert_allclose(found.pixels.mean / sd, other.pixels.mean / sd, atol=tolerance)
        np.testing.assert_allclose(found.pixels.m2, other.pixels.m2, rtol=tolerance)
        np.testing.assert_allclose(found.var_error, other.var_error, rtol=1e-6)


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_bits(a, b):
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def net():
    """In float64: float32 statistics differ in their last bit where moments differ in the 16th."""
    return seeded(Net()).double()


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_find_what_one_finds(net, count, method):
    batches = target(61).split(7)  # nine, the last of five images
    alone, _ = estimated(net, batches, method)
    several = in_processes(count, net, batches, method)
    for estimate, work in several:
        assert_same_moments(alone, estimate)
        assert estimate.excess == pytest.approx(alone.excess, rel=1e-9)
        assert_bits(state(several[0][1]), state(work))


def test_a_process_that_does_not_merge_is_caught(net, monkeypatch):
    batches = target(61).split(7)
    alone, _ = estimated(net, batches)
    monkeypatch.setattr(Seat, "together", lambda _, waiting: dict(waiting))
    with pytest.raises(AssertionError):
        assert_same_moments(alone, in_processes(2, net, batches)[0][0])


@pytest.mark.parametrize("method", METHODS)
def test_a_process_without_any_batch_gets_the_same_statistics(net, method):
    batches = target(20).split(10)
    alone, _ = estimated(net, batches, method)
    several = in_processes(4, net, batches, method)
    for estimate, work in several:
        assert_same_moments(alone, estimate)
        assert_bits(state(several[0][1]), state(work))


def test_processes_may_run_out_of_memory_apart_from_each_other(net):
    """One walks in step, the other makes passes: they settle the same layers all the same."""
    batches = target(61).split(7)
    hall = Hall(2)
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(estimated, net, batches[r::2], "exact", Seat(hall, r), max_bytes=room)
            for r, room in enumerate((1 << 30, 0))
        ]
    alone, _ = estimated(net, batches)
    for run in runs:
        assert_same_moments(alone, run.result()[0])


def forked(count=8):
    """Batches of which the third ones take a way of their own."""
    x = target(8 * count).double()
    for i, part in enumerate(x.split(8)):
        part[0, 0, 0, 0] = 0.1 * (i % 3) + 0.05
    return x.split(8)


@pytest.mark.parametrize("count", [2, 3])
def test_images_of_one_process_may_take_another_branch(count):
    """With three processes each takes one way alone; a layer is met in different orders."""
    net, batches = seeded(Forking()).double(), forked()
    alone, _ = estimated(net, batches)
    for estimate, _ in in_processes(count, net, batches):
        assert estimate.reused == alone.reused
        assert_same_moments(alone, estimate, 1e-6)  # a fixed point, found to that


def test_a_layer_used_twice_is_iterated_together():
    net, batches = seeded(Twice()).double(), target(61).double().split(7)
    alone, _ = estimated(net, batches)
    for estimate, _ in in_processes(2, net, batches):
        assert (estimate.rounds, estimate.reused) == (alone.rounds, ("shared",))
        assert_same_moments(alone, estimate)


@pytest.mark.parametrize("method", METHODS)
def test_an_error_in_one_process_ends_the_others(net, method):
    """Within the ranks' context, which tells the others; here a broken barrier."""
    batches = list(target(40).split(10))
    before = threading.active_count()
    batches[1] = batches[1] * float("nan")
    with pytest.raises((InputError, threading.BrokenBarrierError)):
        in_processes(2, net, batches, method)
    assert threading.active_count() == before


def test_what_is_observed_is_of_all_processes(net):
    batches = target(61).split(7)

    def observed(part, ranks):
        work = copy.deepcopy(net).eval()
        feed = Feed(work, part, forward=None, max_bytes=1 << 30)
        progress = Progress(None, feed, 1, True)
        with torch.no_grad():
            twin, names = copy.deepcopy(work), list(batch_norms(net))
            return modules.observe(twin, work, names, feed, progress).merged(ranks)

    hall = Hall(2)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(observed, batches[r::2], Seat(hall, r)) for r in range(2)]
    alone = observed(batches, Alone())
    for run in runs:
        for name, found in alone.before.items():
            other = run.result().before[name]
            assert other.images == 61
            np.testing.assert_allclose(found.pixels.m2, other.pixels.m2, rtol=1e-9)


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", ["mean", "var"])
def test_a_part_leaves_the_other_as_it_was(net, method, part):
    _, work = estimated(net, target().split(16), method, rule=Rule(part=part))
    for name, layer in batch_norms(work).items():
        was = net.get_submodule(name)
        assert torch.equal(layer.running_mean, was.running_mean) == (part == "var")
        assert torch.equal(layer.running_var, was.running_var) == (part == "mean")


def test_exact_blends_inside_the_pass(net):
    """Each layer is measured behind layers that are blended already."""
    x, rule = target().double(), Rule(prior=20)
    estimate, work = estimated(net, x.split(16), rule=rule)
    reference = copy.deepcopy(net).eval()
    for name, layer in batch_norms(reference).items():
        inputs = []
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # noqa: B023
        with torch.no_grad():
            reference(x)
        handle.remove()
        channels = inputs[0].transpose(0, 1).flatten(1)
        w = 20 / (20 + 61)
        layer.running_mean.copy_(w * layer.running_mean + (1 - w) * channels.mean(1))
        layer.running_var.copy_(w * layer.running_var + (1 - w) * channels.var(1, correction=1))
        got = work.get_submodule(name)
        torch.testing.assert_close(got.running_mean, layer.running_mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.running_var, layer.running_var, rtol=1e-9, atol=0)
        assert np.array_equal(estimate.statistics[name].mean, got.running_mean.numpy())


def test_fast_weighs_a_prior_against_all_images(net):
    """With the number of images given, a batch is blended as the whole set is."""
    x, rule = target(64).double(), Rule(prior=64, images=64)
    estimate, _ = estimated(net, x.split(16), "fast", rule=rule)
    behind = []
    for part in x.split(16):
        work = copy.deepcopy(net).eval()
        y = net.conv1(part)
        channels = y.transpose(0, 1).flatten(1)
        with torch.no_grad():
            work.bn1.running_mean.copy_((net.bn1.running_mean + channels.mean(1)) / 2)
            work.bn1.running_var.copy_((net.bn1.running_var + channels.var(1, correction=0)) / 2)
            behind.append(work.conv2(work.bn1(y).relu()))
    channels = torch.cat(behind).transpose(0, 1).flatten(1)
    found = estimate.moments["bn2"].pixels
    np.testing.assert_allclose(found.mean, channels.mean(1).detach().numpy(), rtol=1e-9)
    np.testing.assert_allclose(found.var, channels.var(1, correction=0).detach().numpy(), rtol=1e-9)
    against_a_batch, _ = estimated(net, x.split(16), "fast", rule=Rule(prior=64))
    assert not np.allclose(found.mean, against_a_batch.moments["bn2"].pixels.mean)


# --- resumed --------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def stopped_after(count, net, batches, **options):
    """What `on_settled` was told by a run that ended after it had been called `count` times."""
    told, names = {}, []

    def on_settled(name, moments):
        told[name] = moments
        names.append(name)
        if len(names) == count:
            raise StoppedError

    with pytest.raises(StoppedError):
        estimated(net, batches, on_settled=on_settled, **options)
    return told


@pytest.mark.parametrize("max_bytes", [1 << 30, 0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_resumed_run_gives_what_an_uninterrupted_one_gives(net, count, max_bytes):
    batches = target().split(16)
    whole, work = estimated(net, batches)
    resumed = stopped_after(count, net, batches, max_bytes=max_bytes)
    measured = []
    again, work_again = estimated(
        net,
        batches,
        resumed=resumed,
        max_bytes=max_bytes,
        on_settled=lambda name, _: measured.append(name),
    )
    assert_same_moments(whole, again)
    assert_bits(state(work), state(work_again))
    assert measured == ["bn1", "bn2", "bn3"][count:]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [Twice, Forking])
def test_a_run_with_a_layer_used_twice_can_be_resumed(kind, count):
    """What it was told of does not hold all visits, or of another round: it starts anew then."""
    net, batches = seeded(kind()).double(), forked()
    whole, _ = estimated(net, batches)
    again, _ = estimated(net, batches, resumed=stopped_after(count, net, batches))
    assert again.reused == whole.reused
    assert_same_moments(whole, again, 1e-6)


def test_processes_resume_together(net):
    batches = target().split(7)
    whole, _ = estimated(net, batches)
    resumed = stopped_after(2, net, batches)
    for estimate, _ in in_processes(2, net, batches, resumed=resumed):
        assert_same_moments(whole, estimate)


def test_settled_layers_may_also_be_left_out(net):
    """Written into the network beforehand, and no longer among the layers."""
    x = target().double()
    reference = layer_by_layer(net, x)
    work = copy.deepcopy(net).eval()
    for index, part in enumerate((work.bn1.running_mean, work.bn1.running_var)):
        part.copy_(torch.from_numpy(reference["bn1"][index]))
    layers = {name: layer for name, layer in batch_norms(work).items() if name != "bn1"}
    feed = Feed(work, x.split(16), forward=None, max_bytes=1 << 30)
    with torch.no_grad():
        modules.exact(work, layers, feed, Progress(None, feed, 3, False), max_bytes=1 << 30)
    for name, (mean, var) in reference.items():
        layer = work.get_submodule(name)
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-9)


def test_each_layer_is_told_of_once_it_is_settled(net):
    told = []
    estimate, _ = estimated(
        net, target().split(16), on_settled=lambda name, moments: told.append((name, moments))
    )
    assert [name for name, _ in told] == list(estimate.moments) == ["bn1", "bn2", "bn3"]
    assert all(moments is estimate.moments[name] for name, moments in told)


def test_a_single_value_per_channel_is_refused_by_every_process():
    net = seeded(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2))).double()
    with pytest.raises((InputError, threading.BrokenBarrierError)):
        in_processes(2, net, target(1, shape=(2,)).double().split(1))
