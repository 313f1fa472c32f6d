"""Activations that memory has no room for: on disk and back, the same bits, nothing left behind."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_adapt import Failing, Net, Twice, assert_exact, layer_by_layer, seeded, target
from test_modules import Hall, Seat, assert_bits, assert_same_moments, estimated, state
from torch import nn

from bnfold.errors import InputError
from bnfold.measuring import lockstep, rounds
from bnfold.measuring import shelf as shelves
from bnfold.measuring.spill import Ledger, Mixed, Spill


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """Where temporary files go; empty again afterwards."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.glob("bnfold-*"))


@pytest.fixture(params=["greenlet", "thread"])
def tasks(request, monkeypatch):
    before = threading.active_count()
    monkeypatch.setattr(rounds, "task_maker", lambda: lockstep.task_maker(request.param))
    yield request.param
    assert threading.active_count() == before


class Odd(nn.Module):
    """What a forward may do: views, work in place, tuples, mappings, sums of what is far apart."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (4, 4, 2, 4))
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("scale", torch.full((1, 4, 1, 1), 0.5))

    def forward(self, x):
        kept = {"input": x, "pair": (x[:, :1], x.flatten(1))}
        y = self.norms[0](self.first(x)).relu_()
        y += self.scale
        left, right = y.chunk(2, 1)  # two views of one storage
        y = self.norms[1](self.second(y))
        right.mul_(2)  # seen in `y` before, through the other view
        z = self.norms[2](left) + right + kept["pair"][0]
        both = torch.cat([z, left.transpose(2, 3)], 1)
        with torch.inference_mode():
            extra = kept["pair"][1].sum(1)[:, None, None, None] * torch.ones(1)
        return self.norms[3](both + y + extra.clone() + kept["input"].mean())


class Casting(Net):
    """Casts inside, in and out of autocast."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.conv1(x)
        x = self.bn1(x.float()).relu()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = (x + self.bn2(self.conv2(x).float())).relu()
        return self.head(self.bn3(self.fc(x.mean((2, 3)))))


NETS = {"residual": Net, "odd": Odd, "twice": Twice, "autocast": Casting}


@pytest.mark.usefixtures("disk", "tasks")
@pytest.mark.parametrize("max_bytes", [0, 5_000, 20_000])
@pytest.mark.parametrize("kind", NETS)
def test_spilling_changes_no_bit(kind, max_bytes):
    net, batches = seeded(NETS[kind]()), target().split(7)
    inside, work = estimated(net, batches)
    spilled, again = estimated(net, batches, max_bytes=max_bytes)
    assert_bits(state(work), state(again))
    assert (inside.passes, inside.spilled, spilled.passes) == (0, 0, 0)
    assert spilled.spilled > 0


@pytest.mark.usefixtures("disk", "tasks")
def test_it_works_in_inference_mode():
    net, batches = seeded(Net()), target().split(7)
    _, work = estimated(net, batches)
    with torch.inference_mode():
        found, again = estimated(net, batches, max_bytes=0)
    assert found.spilled
    assert_bits(state(work), state(again))


@pytest.mark.usefixtures("disk")
def test_it_is_exact():
    net, x = seeded(Net()), target()
    found, work = estimated(net, x.split(7), max_bytes=0)
    assert found.spilled
    assert_exact(work, layer_by_layer(net, x))


def test_a_byte_lost_on_disk_is_caught(monkeypatch):
    net, batches = seeded(Net()), target().split(7)
    _, work = estimated(net, batches)
    take = shelves.Shelf.take

    def lossy(shelf, bundle):
        arrays = take(shelf, bundle)
        for array in arrays.values():
            array[2::4] ^= 32  # within the fraction of a float32
        return arrays

    monkeypatch.setattr(shelves.Shelf, "take", lossy)
    _, again = estimated(net, batches, max_bytes=0)
    with pytest.raises(AssertionError):
        assert_bits(state(work), state(again))


@pytest.mark.usefixtures("disk")
def test_what_the_caller_holds_is_left_alone():
    """Batches that are views of one tensor, of numpy's memory, and one that is used twice."""
    net, x = seeded(Net()), target()
    batches = [*x.split(20), x[:5], x.numpy()[5:9]]
    before = x.clone()
    _, work = estimated(net, batches)
    found, again = estimated(net, batches, max_bytes=0)
    assert found.spilled
    assert_bits(state(work), state(again))
    assert torch.equal(x, before)


# --- when it fails --------------------------------------------------------------------------------


@pytest.mark.usefixtures("disk", "tasks")
@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_nothing_is_left_after_a_failure(error):
    net = seeded(Failing(error))
    x = target(32)
    x[16, 0, 0, 0] = 1e4
    with pytest.raises((InputError, KeyboardInterrupt)):
        estimated(net, x.split(8), max_bytes=0)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


class Careful(Net):
    """Looks at its tensors while it is unwound."""

    seen = 0

    def forward(self, x):
        x = self.conv1(x)
        try:
            x = self.bn1(x)
            if float(x.sum()) > 0 or True:
                raise_where = self.bn2(self.conv2(x))
            if raise_where.shape[0] == 5:
                raise ValueError("the last batch")
        finally:
            Careful.seen += int(x.isfinite().sum() >= 0)
        return raise_where


@pytest.mark.usefixtures("disk", "tasks")
def test_tensors_have_memory_while_a_batch_is_unwound():
    Careful.seen = 0
    with pytest.raises(InputError, match="the last batch"):
        estimated(seeded(Careful()), target(61).split(7), max_bytes=0)
    assert Careful.seen == 2 + 9  # the first two also before memory gave out


@pytest.mark.usefixtures("disk", "tasks")
def test_passes_take_over_where_the_disk_is_full(monkeypatch):
    net, batches = seeded(Net()), target().split(7)
    _, work = estimated(net, batches)
    monkeypatch.setattr(shelves, "_LEFT_FREE", 1 << 62)
    found, again = estimated(net, batches, max_bytes=0)
    assert (found.passes, found.spilled) == (4, 0)
    assert_bits(state(work), state(again))


# --- what a network keeps -------------------------------------------------------------------------


class Keeping(Net):
    """Keeps an activation on itself and reads it behind the next batch norm."""

    def forward(self, x):
        self.kept = self.conv1(x)
        x = self.bn1(self.kept).relu()
        x = (x + self.kept + self.bn2(self.conv2(x))).relu()
        return self.head(self.bn3(self.fc(x.mean((2, 3)))))


class Late(Net):
    """Keeps something behind the first batch norm; batches of two sizes cannot be mixed up."""

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        self.kept = [x]
        x = self.bn2(self.conv2(x)).relu()
        x = (x + self.kept.pop()).relu()
        return self.head(self.bn3(self.fc(x.mean((2, 3)))))


class Lazy(Net):
    """Builds a constant when it first runs."""

    grid = None

    def forward(self, x):
        if self.grid is None:
            self.grid = torch.linspace(0, 1, 5) * 1
        x = self.bn1(self.conv1(x) + self.grid).relu()
        x = (x + self.grid + self.bn2(self.conv2(x))).relu()
        return self.head(self.bn3(self.fc(x.mean((2, 3)))))


class Hooked(Net):
    """Reads in its last part what a hook kept of the first one, as a U-Net may."""

    def __init__(self):
        super().__init__()
        self.found = {}
        self.conv1.register_forward_hook(self.keep)

    def keep(self, _layer, _args, output):
        self.found["first"] = output

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = (x + self.found["first"]).relu()
        return self.head(self.bn3(self.fc(x.mean((2, 3)))))


@pytest.mark.usefixtures("disk", "tasks")
@pytest.mark.parametrize("max_bytes", [1 << 30, 0])
@pytest.mark.parametrize("kind", [Keeping, Hooked, Late])
def test_batches_do_not_mix_in_a_network_that_keeps_activations(kind, max_bytes):
    net, x = seeded(kind()), target()
    found, work = estimated(net, x.split(7), max_bytes=max_bytes)
    assert found.passes
    assert_exact(work, layer_by_layer(net, x))


@pytest.mark.usefixtures("disk", "tasks")
def test_a_constant_that_is_built_late_does_no_harm():
    net, x = seeded(Lazy()), target()
    found, work = estimated(net, x.split(7), max_bytes=0)
    assert (found.passes, found.spilled > 0) == (0, True)
    reference = copy.deepcopy(net)
    reference.grid = torch.linspace(0, 1, 5).double()
    assert_exact(work, layer_by_layer(reference, x))


def test_the_ledger_knows_who_made_what():
    ledger = Ledger(nn.Conv2d(2, 2, 1))
    given = torch.ones(3)
    with ledger:
        ledger.batch = 0
        a = given + 1
        view, b = a[:2], a * 2
        a.add_(1)
        given.view(3).mul_(1)
        ledger.batch = 1
        with pytest.raises(Mixed):
            view + 1
        c = given * 2
        with ledger.nobodys():
            d = given * 3
        ledger.batch = 1
        grid = torch.arange(3) * 2
        ledger.batch = 0
        assert (a + grid + d).shape == (3,)  # what was made of no batch is everybody's
        grid.add_(a.long())
        ledger.batch = 1
        with pytest.raises(Mixed):
            grid + 1
    assert {s.data_ptr() for s in ledger.held_by(0)} == {t.data_ptr() for t in (a, b, grid)}
    assert [s.data_ptr() for s in ledger.held_by(1)] == [c.data_ptr()]
    del a, view, grid
    assert [s.data_ptr() for s in ledger.held_by(0)] == [b.data_ptr()]


@pytest.mark.usefixtures("disk")
def test_memory_is_taken_before_the_disk():
    given, numbers = torch.ones(900, dtype=torch.uint8), torch.arange(1500, dtype=torch.int16)
    spill, kept = Spill(nn.Conv2d(2, 2, 1), 1000), []
    with spill.ledger:
        for batch, size in enumerate((900, 200, 50)):
            with spill.running(batch):
                kept.append(given[:size] + 1)
                with spill.paused():
                    assert kept[0].untyped_storage().nbytes() == 900
                    on_disk = kept[-1].untyped_storage().nbytes() == 0
                    assert on_disk == (size > 1000)
        with spill.running(3):
            a = numbers + 0
            with spill.paused():
                assert a.untyped_storage().nbytes() == 0
                assert spill._shelf.on_disk == 3000
            assert torch.equal(a, numbers)
    assert spill.most == 3000
    spill.close()


@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize("kind", [Keeping, Hooked, Late, Lazy, Net])
def test_processes_that_keep_activations_go_another_way_together(kind):
    """One process with memory enough and one without; whoever sees it first tells the others."""
    net, x = seeded(kind()).double(), target(61).double()
    hall = Hall(2)
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(estimated, net, x.split(7)[r::2], "exact", Seat(hall, r), max_bytes=room)
            for r, room in enumerate((1 << 30, 0))
        ]
    alone, _ = estimated(net, x.split(61))
    for run in runs:
        assert_same_moments(alone, run.result()[0])


@pytest.mark.parametrize("kind", [Keeping, Hooked])
def test_batches_that_mix_are_caught_by_the_exactness_test(kind, monkeypatch):
    monkeypatch.setattr("bnfold.measuring.spill.Kept.has_changed", lambda _: False)
    net, x = seeded(kind()), target(60)
    found, work = estimated(net, x.split(10))
    assert found.passes == 0
    with pytest.raises(AssertionError):
        assert_exact(work, layer_by_layer(net, x))
