"""Adapted statistics are those of the network as it will run, and nothing else changes."""

import contextlib
import copy
import threading

import numpy as np
import pytest
import realdata
import torch
from torch import nn
from torch.nn import functional

from bnfold.adapting.adapt import adapt
from bnfold.errors import InputError, RuntimeUnavailableError, UsageError
from bnfold.measuring import diagnosis, lockstep, memory, meter, rounds, shelf
from bnfold.measuring.moments import ImageMoments


class Net(nn.Module):
    """2-D and 1-D batch norms, a residual sum, a batch norm with neither conv nor activation."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 6)
        self.bn3 = nn.BatchNorm1d(6, eps=1e-3, affine=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn2(self.conv2(x))).relu()
        return self.head(self.bn3(self.fc(x.mean((2, 3)))))


def seeded(module, seed=0):
    """Parameters and statistics of a network that has been trained on something else."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if "var" in name or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=rng))
            elif tensor.is_floating_point():
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=rng))
    return module


@pytest.fixture
def net():
    return seeded(Net())


def target(count=61, seed=1, shape=(2, 5, 5)):
    rng = torch.Generator().manual_seed(seed)
    level = torch.rand((count, shape[0], *[1] * (len(shape) - 1)), generator=rng)
    return 3 * level + (0.3 + level) * torch.randn((count, *shape), generator=rng)


@pytest.fixture(params=["greenlet", "thread"])
def tasks(request, monkeypatch):
    """Both ways to pause a batch; afterwards no thread is left."""
    before = threading.active_count()
    monkeypatch.setattr(rounds, "task_maker", lambda: lockstep.task_maker(request.param))
    yield request.param
    assert threading.active_count() == before
    assert torch.is_grad_enabled()


def batch_norms(module):
    return {n: m for n, m in module.named_modules() if n and "Norm" in type(m).__name__}


def layer_by_layer(module, x):
    """Whole-set statistics in float64: for one layer after the other a run of all images at once.

    {name: (mean, variance with divisor count - 1)}; written independently of what is tested.
    """
    module = copy.deepcopy(module).double().eval()
    found = {}
    for name, layer in batch_norms(module).items():
        inputs = []
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # noqa: B023
        with torch.no_grad():
            module(x.double())
            handle.remove()
            channels = inputs[0].transpose(0, 1).flatten(1)
            layer.running_mean.copy_(channels.mean(1))
            layer.running_var.copy_(channels.var(1, correction=1))
        found[name] = (layer.running_mean.numpy(), layer.running_var.numpy())
    return found


def assert_exact(module, reference, tolerance=1e-6):
    """Means to 1e-6 standard deviations (and float32's own digits), variances to 1e-6 relative."""
    for name, (mean, var) in reference.items():
        layer = module.get_submodule(name)
        sd = np.sqrt(var)
        np.testing.assert_allclose(
            layer.running_mean.double().numpy() / sd, mean / sd, rtol=2**-23, atol=tolerance
        )
        np.testing.assert_allclose(layer.running_var.double().numpy(), var, rtol=tolerance)


# --- exactness ------------------------------------------------------------------------------------

SPLITS = {"one": 61, "halves": 31, "sixteens": 16, "unequal last": 12, "singles": 1}


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("size", SPLITS.values(), ids=SPLITS.keys())
def test_exact_is_the_whole_set_layer_by_layer_for_any_split(net, size):
    x = target()
    result = adapt(net, x.split(size), diagnose=False)
    assert_exact(result.model, layer_by_layer(net, x))
    assert (result.images, result.batches) == (61, -(-61 // size))


@pytest.mark.usefixtures("tasks")
def test_exact_does_not_depend_on_the_order(net):
    x = target()
    batches = [part.flip(0) for part in x.split([30, 1, 17, 13])][::-1]
    assert_exact(adapt(net, batches, diagnose=False).model, layer_by_layer(net, x))


def test_both_kinds_of_tasks_give_the_same_bits(net, monkeypatch):
    states = []
    for kind in ("greenlet", "thread"):
        monkeypatch.setattr(rounds, "task_maker", lambda kind=kind: lockstep.task_maker(kind))
        states.append(adapt(net, target().split(7)).model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize(("max_bytes", "passes"), [(0, 4), (20_000, 4), (40_000, 3)])
def test_passes_take_over_where_memory_and_disk_give_out(net, max_bytes, passes, monkeypatch):
    """At the first batch norm, or in the middle: what is settled stays settled."""
    monkeypatch.setattr(shelf, "_LEFT_FREE", 1 << 62)
    x = target()
    result = adapt(net, x.split(7), max_bytes=max_bytes, diagnose=False)
    assert_exact(result.model, layer_by_layer(net, x))
    assert result.passes == passes
    assert f"{passes} passes over the data were made" in result.warnings[-1]


def test_memory_may_give_out_in_a_later_layer(monkeypatch):
    """The second layer is sixteen times as wide: only the first was settled in step."""
    monkeypatch.setattr(shelf, "_LEFT_FREE", 1 << 62)
    net = seeded(
        nn.Sequential(
            nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 32, 1), nn.BatchNorm2d(32)
        )
    )
    x = target()
    result = adapt(net, x.split(7), max_bytes=100_000, diagnose=False)
    assert_exact(result.model, layer_by_layer(net, x))
    assert result.passes == 2


def test_images_of_different_sizes_weigh_by_their_pixels(net):
    small, large = target(20), target(10, seed=2, shape=(2, 9, 7))
    result = adapt(nn.Sequential(net.conv1, net.bn1), [small, large, small], diagnose=False)
    with torch.no_grad():
        parts = [net.conv1(x).double().transpose(0, 1).flatten(1) for x in (small, large, small)]
    channels = torch.cat(parts, 1)
    reference = {"1": (channels.mean(1).numpy(), channels.var(1).numpy())}
    assert_exact(result.model, reference)


def test_a_dropped_batch_is_caught_by_the_exactness_test(net, monkeypatch):
    pooled = meter.pooled
    monkeypatch.setattr(meter, "pooled", lambda found, name: pooled(list(found)[:9], name))
    wrong = adapt(net, target().split(6), diagnose=False)  # 11 batches
    with pytest.raises(AssertionError):
        assert_exact(wrong.model, layer_by_layer(net, target()))


def test_averaged_variances_are_caught_by_the_exactness_test(net, monkeypatch):
    def averaged(found, name):
        parts = list(found)
        whole = ImageMoments.pooled(pooled([part], name) for part in parts)
        var = np.mean([pooled([part], name).pixels.var for part in parts], axis=0)
        whole.pixels.m2[:] = var * whole.pixels.count
        return whole

    pooled = meter.pooled
    monkeypatch.setattr(meter, "pooled", averaged)
    wrong = adapt(net, target().split(10), diagnose=False)
    with pytest.raises(AssertionError):
        assert_exact(wrong.model, layer_by_layer(net, target()))


def test_statistics_of_the_source_network_are_caught_by_the_exactness_test(net):
    """One pass in eval mode, the layers before not adapted: wrong from the second layer on."""
    x, wrong = target(), copy.deepcopy(net)
    reference = layer_by_layer(net, x)
    found = {}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        net.eval()
        for name, layer in batch_norms(net).items():
            hook = layer.register_forward_pre_hook(
                lambda _, args, name=name: found.setdefault(name, args[0])
            )
            stack.callback(hook.remove)
        net(x)
        for name, value in found.items():
            channels = value.transpose(0, 1).flatten(1)
            wrong.get_submodule(name).running_mean.copy_(channels.mean(1))
            wrong.get_submodule(name).running_var.copy_(channels.var(1))
    assert_exact(wrong, {"bn1": reference["bn1"]})
    with pytest.raises(AssertionError):
        assert_exact(wrong, {"bn2": reference["bn2"]})


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_a_mean_far_from_zero_costs_no_digits(mean):
    x = (mean + torch.randn(64, 3, 24, 24, generator=torch.Generator().manual_seed(0))).float()
    result = adapt(nn.Sequential(nn.BatchNorm2d(3)), x.split(10), diagnose=False)
    channels = x.double().transpose(0, 1).flatten(1)
    moments = result.layers[0].moments.pixels
    np.testing.assert_allclose(moments.mean, channels.mean(1), rtol=1e-12)
    np.testing.assert_allclose(moments.var, channels.var(1, correction=0), rtol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, "transposed"])
def test_a_rectified_input_of_many_pixels_is_measured_to_1e_6(layout):
    """Where most values are equal, float32 sums that do not cascade are off by 4e-5."""
    x = torch.randn(3, 4, 224, 224, generator=torch.Generator().manual_seed(0)).relu()
    exact = x.double().flatten(2)
    if layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        x = x.to(memory_format=layout)
    found = meter.Meter()("bn", x, 0)
    np.testing.assert_allclose(found.means, exact.mean(2), rtol=1e-6)
    np.testing.assert_allclose(found.variances, exact.var(2, correction=0), rtol=1e-6)


# --- fast -----------------------------------------------------------------------------------------


def test_fast_pools_what_training_mode_sees(net):
    """Each layer normalises by its batch; the whole set's pooled moments, not averages."""
    x = target()
    inputs = {name: [] for name in batch_norms(net)}
    reference = copy.deepcopy(net).train()
    for name, layer in batch_norms(reference).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
    with torch.no_grad():
        for part in x.split(16):
            reference(part)
    pooled = {}
    for name, parts in inputs.items():
        channels = torch.cat([p.double().transpose(0, 1).flatten(1) for p in parts], 1)
        pooled[name] = (channels.mean(1).numpy(), channels.var(1).numpy())
    result = adapt(net, x.split(16), method="fast", diagnose=False)
    assert_exact(result.model, pooled)
    assert result.method == "fast"


def test_fast_on_a_single_batch_is_exact_but_for_the_divisor(net):
    x = target(200)
    exact, fast = (adapt(net, [x], method=m, diagnose=False).model for m in ("exact", "fast"))
    for name in batch_norms(net):
        a, b = exact.get_submodule(name).running_var, fast.get_submodule(name).running_var
        torch.testing.assert_close(a, b, rtol=0.02, atol=0)


def test_fast_warns_of_small_batches(net):
    small = adapt(net, target(640).split(16), method="fast").warnings
    assert any("below 32" in warning for warning in small)
    large = adapt(net, target(640).split(64), method="fast").warnings
    assert not any("below 32" in warning for warning in large)


# --- the module that comes in ---------------------------------------------------------------------


def fingerprint(module):
    return (
        {
            key: (value.clone(), id(value))
            for key, value in module.state_dict(keep_vars=True).items()
        },
        [(name, m.training, m.__dict__.get("momentum")) for name, m in module.named_modules()],
        [dict(m._forward_pre_hooks) for m in module.modules()],
        [dict(m._forward_hooks) for m in module.modules()],
    )


def assert_untouched(module, before):
    after = fingerprint(module)
    assert before[0].keys() == after[0].keys()
    for key, (value, identity) in before[0].items():
        assert torch.equal(value, after[0][key][0]), key
        assert identity == after[0][key][1], key
    assert before[1:] == after[1:]


def prepared(net):
    net.train()
    net.bn2.eval()
    net.bn1.momentum = None
    net.bn2.register_forward_pre_hook(_their_hook)
    return net


def _their_hook(layer, args):
    """A hook of the user's."""


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("method", ["exact", "fast"])
def test_only_running_statistics_differ_in_the_result(net, method):
    before = fingerprint(prepared(net))
    result = adapt(net, target().split(8), method=method).model
    assert_untouched(net, before)
    assert type(result) is Net
    changed = {
        key
        for key, value in result.state_dict().items()
        if not torch.equal(value, net.state_dict()[key])
    }
    assert changed == {f"bn{i}.running_{s}" for i in (1, 2, 3) for s in ("mean", "var")}
    assert fingerprint(result)[1:] == before[1:]
    shared = {p.data_ptr() for p in net.state_dict().values()} & {
        p.data_ptr() for p in result.state_dict().values()
    }
    assert not shared
    assert all(not p.is_inference() for p in result.state_dict().values())


class Failing(Net):
    """Fails behind the second batch norm, on a batch whose first value is marked."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        if x[0, 0, 0, 0] > 1e3:
            raise self.error
        return y


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("method", ["exact", "fast"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [(ValueError("a bug"), InputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_nothing_changes_when_a_forward_fails_midway(error, raised, method):
    net = prepared(seeded(Failing(error)))
    x = target(32)
    x[16, 0, 0, 0] = 1e4
    before = fingerprint(net)
    with pytest.raises(raised) as caught:
        adapt(net, x.split(8), method=method)
    assert_untouched(net, before)
    if raised is InputError:
        where = "failed on batch 2 (shape (8, 2, 5, 5), float32) with ValueError: a bug"
        assert where in str(caught.value)
        assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.usefixtures("tasks")
def test_nothing_changes_when_reading_the_data_is_interrupted(net):
    def batches():
        yield target(8)
        raise KeyboardInterrupt

    before = fingerprint(prepared(net))
    with pytest.raises(KeyboardInterrupt):
        adapt(net, batches())
    assert_untouched(net, before)


# --- batches --------------------------------------------------------------------------------------


class Named(Net):
    def forward(self, pixels, *, gain):
        return super().forward(pixels * gain)


def forms():
    parts = target().split(12)
    yield "tensors", Net, list(parts), None
    yield "numpy", Net, [part.numpy() for part in parts], None
    yield "float64", Net, [part.double() for part in parts], None
    yield "big-endian", Net, [part.numpy().astype(">f4") for part in parts], None
    yield "tuples with labels", Net, [(part, ["cat"] * len(part)) for part in parts], None
    yield "lists", Net, [[part.numpy(), np.zeros(len(part))] for part in parts], None
    yield "generator", Net, (part for part in parts), None
    yield (
        "mappings with labels",
        Named,
        [{"pixels": part, "gain": np.float32(1), "labels": 3} for part in parts],
        None,
    )
    yield (
        "objects",
        Net,
        [("meta", {"image": part.numpy()}) for part in parts],
        lambda module, batch: module(batch[1]["image"]),
    )


@pytest.mark.parametrize("method", ["exact", "fast"])
@pytest.mark.parametrize(
    ("kind", "batches", "forward"), [f[1:] for f in forms()], ids=[f[0] for f in forms()]
)
def test_batches_may_be_of_any_make(kind, batches, forward, method):
    if not isinstance(batches, list):
        batches = (part for part in target().split(12))  # a generator is used up by each test
    result = adapt(seeded(kind()), batches, method=method, forward=forward)
    plain = adapt(seeded(Net()), target().split(12), method=method)
    for key, value in plain.model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[key], value, rtol=1e-6, atol=1e-7)
    assert result.images == 61
    assert plain.layers[1].samples == 61


def test_an_iterator_is_kept_on_disk_where_memory_is_small(net, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    x, kept = target(), []

    def batches():
        for part in x.split(12):
            yield part, torch.arange(len(part))
        kept.extend(tmp_path.glob("bnfold-*/*.pt"))

    result = adapt(net, batches(), max_bytes=0)
    assert_exact(result.model, layer_by_layer(net, x))
    assert len(kept) == 6
    assert not list(tmp_path.iterdir())


def test_data_that_ends_after_one_pass_is_refused(net):
    class Once:
        def __init__(self):
            self.parts = list(target().split(12))

        def __iter__(self):
            while self.parts:
                yield self.parts.pop()

    with pytest.raises(InputError, match="61 images on the first pass and 0 on another"):
        adapt(net, Once())


@pytest.mark.parametrize("nothing", [[], [torch.empty(0, 2, 5, 5)]])
@pytest.mark.parametrize("method", ["exact", "fast"])
def test_no_image_is_refused(net, nothing, method):
    with pytest.raises(InputError, match="no image"):
        adapt(net, nothing, method=method)


def test_an_empty_batch_among_others_does_no_harm(net):
    x = target()
    result = adapt(net, [x[:20], x[:0], x[20:]], diagnose=False)
    assert_exact(result.model, layer_by_layer(net, x))


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("method", ["exact", "fast"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused_with_the_layer(net, bad, method):
    x = target()
    x[33, 1, 2, 2] = bad
    with pytest.raises(InputError, match=r"input of 'bn1' holds NaN or infinity in batch 2"):
        adapt(net, x.split(12), method=method)


def test_wrong_shapes_and_types_are_refused_in_words(net):
    with pytest.raises(InputError, match=r"failed on batch 0 \(shape \(61, 5, 2, 5\), float32\)"):
        adapt(net, [target().transpose(1, 2)])
    with pytest.raises(InputError, match=r"Batch 0 is of type str; a batch is an array"):
        adapt(net, ["image.png"])
    with pytest.raises(InputError, match=r"Batch 0 holds image, but the network takes x"):
        adapt(net, [{"image": target()}])
    with pytest.raises(UsageError, match="give an iterable of batches"):
        adapt(net, target())
    with pytest.raises(InputError, match=r"could not be read after 1 batches: OSError: disk"):
        adapt(net, _then_fails())


def _then_fails():
    yield target(8)
    raise OSError("disk")


def test_arguments_that_mean_nothing_are_refused(net):
    with pytest.raises(UsageError, match="'exact' or 'fast'"):
        adapt(net, [target()], method="eval")
    with pytest.raises(UsageError, match="precision"):
        adapt(net, [target()], precision=0)
    with pytest.raises(UsageError, match="max_bytes"):
        adapt(net, [target()], max_bytes=-1)
    with pytest.raises(UsageError, match="Statistics belong to an nn"):
        adapt(3, [target()])
    with pytest.raises(RuntimeUnavailableError, match="'nowhere' cannot be used"):
        adapt(net, [target()], device="nowhere")


def test_progress_grows_to_its_total(net):
    told = []
    adapt(net, target().split(12), progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[0] == (1, None)
    assert told[-1] == (30, 30)  # 6 batches: three batch norms, the end, the diagnosis


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "adapted"),
    [
        (["bn1", "bn3"], {"bn1", "bn3"}),
        ("bn*", {"bn1", "bn2", "bn3"}),
        (["!bn2"], {"bn1", "bn3"}),
        (["bn*", "!*3"], {"bn1", "bn2"}),
        (lambda name: name not in ("bn1", "bn3"), {"bn2"}),
    ],
)
def test_layers_can_be_chosen(net, choice, adapted):
    result = adapt(net, target().split(12), layers=choice)
    assert {layer.name for layer in result.layers} == adapted
    assert {skip.name for skip in result.skipped} == {"bn1", "bn2", "bn3"} - adapted
    for name in {skip.name for skip in result.skipped}:
        torch.testing.assert_close(
            result.model.get_submodule(name).running_mean, net.get_submodule(name).running_mean
        )


def test_a_choice_without_any_layer_is_refused(net):
    with pytest.raises(UsageError, match=r"'layer1\.\*' matches no batch norm; there are bn1, bn2"):
        adapt(net, [target()], layers=["layer1.*"])
    with pytest.raises(UsageError, match="None of the 3 batch norms was chosen"):
        adapt(net, [target()], layers=lambda _: False)
    with pytest.raises(InputError, match="holds no batch norm"):
        adapt(nn.Sequential(nn.Linear(2, 2)), [target()])


def test_a_layer_without_running_statistics_is_skipped_with_the_reason(net):
    net.bn2 = nn.BatchNorm2d(4, track_running_stats=False)
    result = adapt(net, [target()])
    assert [(skip.name, "track_running_stats=False" in skip.reason) for skip in result.skipped] == [
        ("bn2", True)
    ]


def test_a_layer_that_is_not_visited_keeps_its_statistics(net):
    net.spare = nn.BatchNorm2d(4)
    result = adapt(net, target().split(12))
    assert [skip.name for skip in result.skipped] == ["spare"]
    assert torch.equal(result.model.spare.running_mean, torch.zeros(4))
    assert any("did not pass 1 batch norms" in warning for warning in result.warnings)


def test_a_forward_past_all_batch_norms_is_refused(net):
    with pytest.raises(InputError, match="passed none of the 3 batch norms"):
        adapt(net, [target()], forward=lambda module, x: module.conv1(x))


class FrozenBatchNorm2d(nn.Module):
    """As in detection code: four buffers, no batch norm by inheritance."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((num_features,), float(value)))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class NormAct2d(nn.BatchNorm2d):
    """As in timm: normalises, then activates, in one module."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 7)),
        (nn.BatchNorm2d(4), (4, 5, 3)),
        (nn.BatchNorm3d(4), (4, 3, 2, 5)),
        (nn.SyncBatchNorm(4), (4, 5, 3)),
        (NormAct2d(4), (4, 5, 3)),
        (FrozenBatchNorm2d(4), (4, 5, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(len(value)),
)
@pytest.mark.parametrize("method", ["exact", "fast"])
def test_every_kind_of_batch_norm_is_adapted(layer, shape, method):
    x = target(40, shape=shape)
    net = nn.Sequential(seeded(copy.deepcopy(layer)), seeded(copy.deepcopy(layer), 1))
    result = adapt(net, x.split(15), method=method, diagnose=False)
    reference = layer_by_layer(net, x)
    assert_exact(result.model, reference if method == "exact" else {"0": reference["0"]})


def test_one_value_per_channel_is_refused(net):
    with pytest.raises(InputError, match="'bn3' saw 1 value per channel"):
        adapt(net, [target(1)])


def assert_consistent(module, batches, tolerance):
    """Each layer normalises with the statistics of all that reaches it, in eval mode."""
    module = copy.deepcopy(module).eval()
    seen = {name: [] for name in batch_norms(module)}
    for name, layer in batch_norms(module).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            module(batch)
    for name, inputs in seen.items():
        channels = torch.cat([i.double().transpose(0, 1).flatten(1) for i in inputs], 1)
        assert_exact(module, {name: (channels.mean(1).numpy(), channels.var(1).numpy())}, tolerance)


class Twice(nn.Module):
    """One batch norm used twice in a forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.shared = nn.BatchNorm2d(2)
        self.last = nn.BatchNorm2d(2)

    def forward(self, x):
        x = self.shared(self.conv(x)).relu()
        return self.last(self.shared(self.conv(x)))


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("max_bytes", [None, 0])
def test_a_layer_used_twice_holds_the_statistics_of_both_uses(max_bytes):
    """A fixed point: what it normalises with is what it sees, in the network as it will run."""
    x = target()
    result = adapt(seeded(Twice()), x.split(13), max_bytes=max_bytes)
    assert_consistent(result.model, x.split(13), 3e-6)
    assert [layer.count for layer in result.layers if layer.name == "shared"] == [61 * 25 * 2]
    assert any("shared: used more than once" in warning for warning in result.warnings)


class Forking(nn.Module):
    """Batches take different ways, and two of them meet the same layers in different orders."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.BatchNorm2d(2) for _ in range(3))
        self.last = nn.BatchNorm2d(2)

    def forward(self, x):
        kind = int(x[0, 0, 0, 0].abs() * 10) % 3
        if kind == 0:
            x = self.b(self.a(x).relu())
        elif kind == 1:
            x = self.a(self.b(x).relu())
        else:
            x = self.c(x)
        return self.last(x)


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("max_bytes", [None, 0])
def test_batches_on_different_ways_do_not_wait_for_each_other(max_bytes):
    x = target(64)
    for i, part in enumerate(x.split(8)):
        part[0, 0, 0, 0] = 0.1 * (i % 3) + 0.05
    result = adapt(seeded(Forking()), x.split(8), max_bytes=max_bytes, diagnose=False)
    assert_consistent(result.model, x.split(8), 3e-6)


# --- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_buffers_keep_their_type(net, dtype):
    x = target()
    result = adapt(net.to(dtype), x.split(12), diagnose=False)
    reference = layer_by_layer(net.float(), x)
    for name, (mean, var) in reference.items():
        layer = result.model.get_submodule(name)
        assert layer.running_mean.dtype == dtype
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
        np.testing.assert_allclose(
            layer.running_mean.double().numpy() / np.sqrt(var),
            mean / np.sqrt(var),
            rtol=0,
            atol=tolerance,
        )
        np.testing.assert_allclose(layer.running_var.double().numpy(), var, rtol=tolerance)


def test_statistics_that_do_not_fit_are_refused():
    net = nn.Sequential(nn.BatchNorm2d(2)).half()
    with pytest.raises(InputError, match=r"'0' reaches .*e\+05, which float16 cannot hold"):
        adapt(net, [300 * target()])


@pytest.mark.usefixtures("tasks")
def test_autocast_of_the_caller_is_used(net):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = adapt(net, target().split(12), diagnose=False).model
    fine = adapt(net, target().split(12), diagnose=False).model
    assert rough.bn2.running_mean.dtype == torch.float32
    assert not torch.equal(rough.bn2.running_mean, fine.bn2.running_mean)
    torch.testing.assert_close(rough.bn2.running_var, fine.bn2.running_var, rtol=0.05, atol=0)


def test_it_works_inside_inference_mode(net):
    with torch.inference_mode():
        result = adapt(net, target().split(12))
    assert not any(value.is_inference() for value in result.model.state_dict().values())
    assert_exact(result.model, layer_by_layer(net, target()))


def test_modules_that_cannot_be_adapted_are_refused():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(2)))
    with pytest.raises(InputError, match="TorchScript"):
        adapt(scripted, [target()])
    with pytest.raises(InputError, match="before compile"):
        adapt(torch.compile(nn.Sequential(nn.BatchNorm2d(2))), [target()])
    with pytest.raises(InputError, match="no shape yet"):
        adapt(nn.Sequential(nn.LazyBatchNorm2d()), [target()])
    net = nn.Sequential(nn.BatchNorm2d(2))
    net.lock = threading.Lock()
    with pytest.raises(InputError, match="Sequential cannot be copied"):
        adapt(net, [target()])


# --- diagnosis ------------------------------------------------------------------------------------


def test_distances_are_those_of_the_gaussians():
    """Against numerical integrals of the definitions."""
    grid = np.linspace(-30, 30, 200_001)
    step = grid[1] - grid[0]

    def density(mean, sd):
        return np.exp(-((grid - mean) ** 2) / (2 * sd**2)) / (sd * np.sqrt(2 * np.pi))

    shift, ratio = np.array([0.7, -1.0]), np.array([1.8, 0.5])
    for d, r, kl, w2 in zip(
        shift,
        ratio,
        diagnosis.symmetric_kl(shift, ratio),
        diagnosis.wasserstein(shift, ratio),
        strict=True,
    ):
        p, q = density(0, 1), density(d, np.sqrt(r))
        mask = (p > 1e-300) & (q > 1e-300)
        log = np.log(p[mask] / q[mask])
        assert kl == pytest.approx(((p[mask] - q[mask]) * log).sum() * step, rel=1e-6)
        assert w2 == pytest.approx(d**2 + (np.sqrt(r) - 1) ** 2)


def test_distances_are_measured_before_and_after(net):
    x = target(200)
    result = adapt(net, x.split(40))
    for layer in result.layers:
        assert layer.kl_before > 0.01 > 1e-3 > layer.kl_after >= 0
        assert layer.w2_before > layer.w2_after >= 0
    bn1 = result.layers[0]
    with torch.no_grad():
        y = net.conv1(x).double().transpose(0, 1).flatten(1)
    unit = net.bn1.running_var.double() + net.bn1.eps
    shift = (y.mean(1) - net.bn1.running_mean) / unit.sqrt()
    ratio = (y.var(1, correction=0) + net.bn1.eps) / unit
    expected = diagnosis.symmetric_kl(shift.numpy(), ratio.numpy()).mean()
    assert bn1.kl_before == pytest.approx(expected, rel=1e-5)
    assert adapt(net, x.split(40), diagnose=False).layers[0].kl_before is None


def test_fast_leaves_a_distance_that_exact_does_not(net):
    x = target(200).split(8)
    exact, fast = (adapt(net, x, method=method).layers[-1].kl_after for method in ("exact", "fast"))
    assert fast > 5 * exact


def test_outputs_are_compared_where_they_are_class_scores(net):
    x = target(120)
    outputs = adapt(net, x.split(40)).outputs
    adapted = adapt(net, x.split(40), diagnose=False).model.eval()
    with torch.no_grad():
        before, after = net.eval()(x), adapted(x)
    assert outputs.classes == 3
    assert outputs.agreement == pytest.approx((before.argmax(1) == after.argmax(1)).float().mean())
    share = torch.bincount(after.argmax(1), minlength=3) / 120
    assert outputs.histogram_after == pytest.approx(share.tolist())
    p = before.double().softmax(1)
    assert outputs.entropy_before == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    assert 0 <= outputs.histogram_change <= 1
    probabilities = adapt(net, x.split(40), forward=lambda m, b: m(b).softmax(1)).outputs
    assert probabilities.entropy_before == pytest.approx(outputs.entropy_before, rel=1e-5)
    assert adapt(net, x.split(40), forward=lambda m, b: {"logits": m(b)}).outputs == outputs
    maps = adapt(net, x.split(40), forward=lambda m, b: (m(b)[..., None], 0))
    assert maps.outputs is None


def test_standard_errors_are_by_image(net):
    x = target(150)
    layer = adapt(net, x.split(40)).layers[0]
    with torch.no_grad():
        y = net.conv1(x).double().flatten(2)
    error = y.mean(2).std(0) / 150**0.5
    sd = (y.transpose(0, 1).flatten(1).var(1, correction=0) + 1e-5).sqrt()
    assert layer.mean_error == pytest.approx(float(np.median(error / sd)), rel=1e-5)
    assert 0 < layer.scale_error < 1
    assert (layer.samples, layer.count, layer.num_features) == (150, 150 * 25, 4)


def warned(result, words):
    return [warning for warning in result.warnings if words in warning]


def test_too_few_images_are_warned_of_with_the_number_needed(net):
    few, many = adapt(net, [target(12)]), adapt(net, target(800).split(100))
    (warning,) = warned(few, "needed at")
    needed = max(layer.images_needed for layer in few.layers)
    assert f"The target data holds 12 images; about {needed} are needed" in warning
    assert not warned(many, "needed at")
    assert warned(adapt(net, target(800).split(100), precision=0.01), "needed at")


def test_sorted_data_is_warned_of(net):
    x = target(400)
    order = x.mean((1, 2, 3)).argsort()
    for method, words in (("exact", "does no harm"), ("fast", "needs shuffled batches")):
        assert warned(adapt(net, x[order].split(40), method=method), words)
        assert not warned(adapt(net, x.split(40), method=method), "sorted")


def test_a_target_like_the_source_is_warned_of(net):
    x = target(800)
    home = adapt(net, x.split(100)).model
    assert warned(adapt(home, target(800, seed=5).split(100)), "looks like the source")
    assert not warned(adapt(net, x.split(100)), "looks like the source")


def test_an_adapted_network_that_says_less_is_warned_of(net):
    x = target(800)
    home = adapt(net, x.split(100)).model
    surer, less = copy.deepcopy(home), copy.deepcopy(home)
    less.bn3.running_var *= 0.6  # its outputs are too large: sure of themselves
    surer.bn3.running_var *= 1.6
    assert warned(adapt(less, x.split(100)), "less about the images than before (-")
    assert not warned(adapt(surer, x.split(100)), "about the images than before")


def test_a_single_predicted_class_is_warned_of(net):
    net.head.bias.data[1] = 50
    assert warned(adapt(net, target(100).split(50)), "predicted as class 1 of 3")


def test_images_that_are_all_alike_are_warned_of(net):
    x = target(1).expand(50, -1, -1, -1) + 1e-5 * target(50, seed=3)
    assert warned(adapt(net, [x]), "nearly all alike")


def test_dead_channels_are_warned_of_and_named(net):
    net.conv1.weight.data[2] = 0
    result = adapt(net, target(100).split(50))
    assert result.layers[0].dead == (2,)
    assert warned(result, "1 channels hardly vary on the target (in bn1)")
    assert not warned(adapt(seeded(Net()), target(100).split(50)), "hardly vary")


def test_a_network_that_looks_at_no_class_has_no_output_warning():
    net = seeded(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    result = adapt(net, target().split(12))
    assert result.outputs is None
    assert not warned(result, "predicted")


# --- memory ---------------------------------------------------------------------------------------


def test_the_limit_of_a_container_counts(tmp_path):
    assert memory._control_group(tmp_path) is None
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._control_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory._control_group(tmp_path) == 4000


def test_some_memory_is_available():
    assert memory.available_bytes(torch.device("cpu")) > 1 << 20


# --- the real thing -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_lenet5_gains_twenty_points_on_mnist_m(shared_data, method):
    """31.7 -> 52.4 %, as published with the data."""
    x, y = realdata.mnistm(shared_data)
    net = realdata.load_model(shared_data, "mnist_lenet5")
    result = adapt(net, torch.from_numpy(x).split(500), method=method, diagnose=False)
    assert realdata.accuracy(net, x, y) == pytest.approx(31.7, abs=0.1)
    assert realdata.accuracy(result.model, x, y) == pytest.approx(52.4, abs=0.2)


def test_lenet5_gains_two_points_on_usps(shared_data):
    """91.8 -> 93.8 %, statistics from the training images, tested on others."""
    net = realdata.load_model(shared_data, "mnist_lenet5")
    x, y = realdata.usps(shared_data, "test")
    train, _ = realdata.usps(shared_data, "train")
    result = adapt(net, torch.from_numpy(train).split(500), diagnose=False)
    assert realdata.accuracy(net, x, y) == pytest.approx(91.8, abs=0.1)
    assert realdata.accuracy(result.model, x, y) == pytest.approx(93.8, abs=0.2)


def test_a_real_network_is_measured_exactly(shared_data):
    net = realdata.load_model(shared_data, "mnist_resnet")
    x = torch.from_numpy(realdata.mnistm(shared_data)[0][:200])
    result = adapt(net, x.split(64), diagnose=False)
    assert_exact(result.model, layer_by_layer(net, x), 2e-6)


def test_functional_batch_norm_is_told_apart(net):
    """A forward that reads the statistics itself passes no batch norm."""

    def forward(module, x):
        y = module.conv1(x)
        return functional.batch_norm(y, module.bn1.running_mean, module.bn1.running_var)

    with pytest.raises(InputError, match="passed none"):
        adapt(net, [target()], forward=forward)
