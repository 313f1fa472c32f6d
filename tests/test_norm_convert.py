"""One normalization in place of another, and what carries over."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from bnfold import norm
from bnfold.errors import InputError, UsageError
from bnfold.norm import KINDS, Clipping, convert

STATEFUL = ["batch", "renorm", "ghost", "frozen", "sync"]
PLACED = [*STATEFUL, "mean-only", "weight-mean-only"]
HERE = [kind for kind in KINDS if kind != "normprop"]
NAMES = {
    "batch": "BatchNorm",
    "renorm": "BatchRenorm",
    "ghost": "GhostBatchNorm",
    "frozen": "FrozenBatchNorm",
    "mean-only": "MeanOnlyBatchNorm",
    "weight-mean-only": "MeanOnlyBatchNorm",
}


def network():
    """Convolutions and a linear layer with batch norms of all ranks but 3, once trained."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6, eps=1e-3, momentum=0.3),
        nn.Flatten(),
        nn.Linear(6 * 25, 5, bias=False),
        nn.BatchNorm1d(5, momentum=None),
    )
    for _ in range(3):
        net(images())
    with torch.no_grad():
        for part in net:
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.weight.normal_()
                part.bias.normal_()
    return net


def images(n=8):
    return 2 * torch.randn(n, 2, 5, 5) + 1


def norms(net):
    return [part for part in net.modules() if hasattr(part, "running_mean")]


@pytest.mark.parametrize("old", STATEFUL)
@pytest.mark.parametrize("new", STATEFUL)
def test_one_state_goes_round(old, new):
    net, x = network().eval(), images()
    expected = net(x)
    second = convert(convert(net, old), new)
    assert torch.equal(second(x), expected)
    assert [n.eps for n in norms(second)] == [1e-5, 1e-3, 1e-5]
    for one, other in zip(norms(net), norms(second), strict=True):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(one, leaf), getattr(other, leaf))
        assert not other.training


@pytest.mark.parametrize("kind", PLACED)
def test_classes_and_ranks(kind):
    classes = [type(n) for n in norms(convert(network(), kind))]
    if kind == "sync":
        assert classes == [nn.SyncBatchNorm] * 3
    else:
        module = nn if kind == "batch" else norm
        assert classes == [getattr(module, NAMES[kind] + rank) for rank in ("2d", "2d", "1d")]
    assert type(convert(nn.BatchNorm3d(2), "renorm")) is norm.BatchRenorm3d
    assert type(convert(nn.SyncBatchNorm(2), "renorm")) is norm.BatchRenorm
    assert type(convert(nn.SyncBatchNorm(2), "batch")) is norm.BatchNorm


@pytest.mark.parametrize("kind", HERE)
@pytest.mark.parametrize("training", [True, False])
def test_every_kind_trains_and_keeps_modes(kind, training):
    net = network().train(training)
    net[4].train(not training)
    new = convert(net, kind)
    assert [part.training for part in new] == [part.training for part in net]
    assert new.training == training
    assert convert(net, kind, inplace=True) is net
    if kind == "sync":
        return
    new.train()(images()).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in new.parameters())
    assert any(p.grad is not None for p in new.parameters())


@pytest.mark.parametrize("kind", HERE)
def test_a_copy_leaves_the_model_alone(kind):
    net, x = network().eval(), images()
    state, expected = copy.deepcopy(net.state_dict()), net(x)
    new = convert(net, kind)
    with torch.no_grad():
        for tensor in (*new.parameters(), *new.buffers()):
            tensor.zero_()
    assert torch.equal(net(x), expected)
    assert list(net.state_dict()) == list(state)


@pytest.mark.parametrize("kind", HERE)
def test_twice_is_once(kind):
    once = convert(network(), kind)
    twice = convert(once, kind)
    assert list(once.state_dict()) == list(twice.state_dict())
    assert [type(part) for part in once] == [type(part) for part in twice]


def test_in_place_an_optimiser_goes_on_with_the_same_parameters():
    net = network()
    parameters = list(net.parameters())
    convert(net, "renorm", inplace=True)
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))


def test_settings_carry_over():
    net = network()
    assert [n.momentum for n in norms(convert(net, "ghost", ghost_size=4))] == [0.1, 0.3, None]
    assert [n.ghost_size for n in norms(convert(net, "ghost", ghost_size=4))] == [4] * 3
    renorm = convert(net, "renorm", schedule=Clipping.fixed(2, 1))
    assert [n.momentum for n in norms(renorm)] == [0.1, 0.3, None]
    assert [n.momentum for n in norms(convert(net, "renorm", momentum=0.2))] == [0.2] * 3
    assert [n.num_batches_tracked for n in norms(renorm)] == [3] * 3
    again = convert(renorm, "renorm", momentum=0.5)
    assert [n.schedule for n in norms(again)] == [Clipping.fixed(2, 1)] * 3
    assert [n.momentum for n in norms(convert(again, "batch"))] == [0.5] * 3


@pytest.mark.parametrize("kind", ["batch", "ghost", "sync"])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_what_a_batch_norm_lacks_stays_lacking(kind, tracked, affine):
    old = nn.BatchNorm2d(3, affine=affine, track_running_stats=tracked)
    new = convert(convert(old, "ghost"), kind)
    assert (new.weight is not None) == (new.bias is not None) == new.affine == affine
    assert (new.running_mean is not None) == new.track_running_stats == tracked
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(new.eval()(x), old.eval()(x))


def test_a_scale_without_a_bias_and_frozen_parameters():
    old = nn.BatchNorm2d(3)
    old.bias = None
    old.weight.requires_grad_(False)
    for kind in ("renorm", "ghost", "sync"):
        new = convert(convert(old, kind), "batch")
        assert new.bias is None
        assert not new.weight.requires_grad
    assert not convert(old, "frozen").bias.any()
    bare = nn.BatchNorm2d(3, affine=False)
    for kind in ("renorm", "mean-only"):
        new = convert(bare, kind)
        new(torch.randn(4, 3, 2, 2))
        assert not list(new.parameters())
    assert torch.equal(convert(bare, "frozen").weight, torch.ones(3))


@pytest.mark.parametrize("kind", ["renorm", "mean-only", "frozen"])
def test_no_statistics_where_they_are_needed(kind):
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(InputError, match=f"'1' keeps no running statistics .* '{kind}'"):
        convert(net, kind, inplace=True)
    assert type(net[0]) is nn.BatchNorm2d


def test_to_mean_only_and_back():
    net = network().double()
    new = convert(net, "mean-only")
    for one, other in zip(norms(net), norms(new), strict=True):
        assert torch.equal(one.running_mean, other.running_mean)
        assert torch.equal(one.bias, other.bias)
        assert other.weight is None
        assert other.eps == 0
        assert torch.equal(other.running_var, torch.ones_like(one.running_var))
        assert other.running_var.dtype == torch.float64
    back = convert(new, "batch")
    assert [(n.eps, n.affine) for n in norms(back)] == [(1e-5, True)] * 3
    x = images().double()
    torch.testing.assert_close(back.eval()(x), new.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["weight", "none", "weight-mean-only"])
def test_layers_get_what_the_kind_is_made_of(kind):
    net = network().requires_grad_(False)
    weights = [part.weight.clone() for part in net if hasattr(part, "out_channels")]
    new = convert(net, kind)
    layers = [new[0], new[3], new[6]]
    assert [parametrize.is_parametrized(n) for n in layers] == [kind != "none"] * 3
    if kind == "weight-mean-only":
        assert all(n.bias is None for n in layers)
    else:
        assert [len(n.bias) for n in layers] == [4, 6, 5]
        assert not any(n.bias.any() for n in layers)
        assert [type(new[i]) for i in (1, 4, 7)] == [nn.Identity] * 3
    for layer, weight in zip(layers, weights, strict=False):
        torch.testing.assert_close(layer.weight, weight)
    if kind != "none":
        assert len(layers[1].parametrizations.weight.original0.ravel()) == 6


class PreActivation(nn.Module):
    """A block whose activation overwrites what the batch norm gives it, and not the stream."""

    def __init__(self, *, inplace):
        super().__init__()
        self.norm, self.act, self.layer = nn.BatchNorm1d(4), nn.ReLU(inplace), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.layer(self.act(self.norm(x)))


@pytest.mark.parametrize("kind", HERE)
def test_an_activation_in_place_leaves_the_stream_alone(kind):
    one, two = PreActivation(inplace=False), PreActivation(inplace=True)
    two.load_state_dict(one.state_dict())
    x = torch.randn(8, 4)
    one, two = (convert(net, kind).eval() for net in (one, two))
    assert torch.equal(one(x.clone()), two(x.clone()))
    assert two.act.inplace == (kind not in ("weight", "none"))


def test_log_scale_is_handed_on():
    new = convert(network(), "weight", log_scale=2.0)
    assert new[3].parametrizations.weight[0].c == 2.0


@pytest.mark.parametrize("kind", HERE)
def test_shared_modules_stay_shared(kind):
    shared, conv = nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1, bias=False)
    net = nn.ModuleDict({"a": nn.Sequential(conv, shared), "b": nn.Sequential(conv, shared)})
    new = convert(net, kind)
    assert new["a"][0] is new["b"][0]
    assert new["a"][1] is new["b"][1]


def test_weights_that_two_layers_share():
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    net = nn.Sequential(one, nn.BatchNorm1d(3), two)
    with pytest.raises(InputError, match="weight of '0' is another layer's too"):
        convert(net, "weight", inplace=True)
    assert type(net[1]) is nn.BatchNorm1d
    assert convert(net, "none")[0].weight is not None


def test_a_weight_that_is_computed_is_refused_before_anything_changes():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)))
    with pytest.raises(InputError, match="ParametrizedLinear '1' is computed"):
        convert(net, "weight", inplace=True)
    assert type(net[0]) is nn.BatchNorm1d


def test_device_and_type_carry_over():
    for kind in HERE:
        new = convert(network().bfloat16().to("meta"), kind)
        for tensor in (*new.parameters(), *new.buffers()):
            assert tensor.is_meta
            assert tensor.dtype in (torch.bfloat16, torch.int64)


# --- classes of others ---------------------------------------------------------------------------


class FrozenBatchNorm2d(nn.Module):
    """The interface of torchvision's and detectron2's."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((num_features,), float(value)))


class BatchNormAct2d(nn.BatchNorm2d):
    """The interface of timm's."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("module", ["torchvision.ops.misc", "detectron2.layers.batch_norm"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_frozen_batch_norms_of_others(module, kind, monkeypatch):
    monkeypatch.setattr(FrozenBatchNorm2d, "__module__", module)
    old = FrozenBatchNorm2d(3, 0.1)
    old.running_mean.normal_()
    old.running_var.fill_(2)
    new = convert(nn.Sequential(old), kind)
    assert new[0].eps == 0.1
    assert torch.equal(new[0].running_mean, old.running_mean)
    assert [p.requires_grad for p in new.parameters()] == ([] if kind == "frozen" else [True] * 2)
    assert type(new[0]).__name__ == ("SyncBatchNorm" if kind == "sync" else NAMES[kind] + "2d")
    torchs = nn.BatchNorm2d(3, 0.1).eval()
    torchs.load_state_dict(old.state_dict() | {"num_batches_tracked": torch.tensor(0)})
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(new.eval()(x), torchs(x))


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """The interface of timm's."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        state = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(self.drop(nn.functional.batch_norm(x, *state, eps=self.eps)))


@pytest.mark.parametrize("kind", HERE)
@pytest.mark.parametrize("cls", [BatchNormAct2d, FrozenBatchNormAct2d])
def test_timms_batch_norm_and_activation(cls, kind, monkeypatch):
    monkeypatch.setattr(cls, "__module__", "timm.layers.norm_act")
    net, x = nn.Sequential(nn.Conv2d(2, 3, 1), cls(3)), torch.randn(4, 2, 3, 3)
    net(x)
    expected = net.eval()(x)
    net[1].drop.train()
    new = convert(net, kind)
    assert list(new[1]._modules) == ["norm", "drop", "act"]
    assert isinstance(new[1].act, nn.SiLU)
    assert [part.training for part in new[1].modules()] == [False, False, True, False]
    if kind in STATEFUL:
        assert torch.equal(new(x), expected)
    else:
        assert isinstance(new[1].norm, norm.MeanOnlyBatchNorm2d | nn.Identity)


class Mine(nn.BatchNorm2d):
    pass


def hooked():
    layer = nn.BatchNorm2d(3)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize("kind", HERE)
@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: Mine(3), r"'1' is a test_norm_convert\.Mine, not one of"),
        (lambda: FrozenBatchNorm2d(3), r"'1' is a test_norm_convert\.FrozenBatchNorm2d, not one"),
        (nn.LazyBatchNorm2d, "'1' is a LazyBatchNorm2d whose size is not known"),
        (lambda: nn.LazyConv2d(3, 3), "'1' is a LazyConv2d whose size is not known"),
        (hooked, "'1' has hooks"),
    ],
    ids=["own class", "own frozen class", "lazy norm", "lazy conv", "hooks"],
)
def test_what_is_refused(kind, layer, words):
    net = nn.Sequential(nn.BatchNorm2d(3), layer())
    with pytest.raises(InputError, match=words):
        convert(net, kind, inplace=True)
    assert type(net[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("kind", HERE)
def test_other_normalizations_are_left(kind):
    others = [nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm2d(3, track_running_stats=True)]
    new = convert(nn.Sequential(nn.BatchNorm2d(3), *others), kind)
    assert [type(part) for part in new[1:]] == [type(part) for part in others]


@pytest.mark.parametrize("kind", [kind for kind in PLACED if kind != "batch"])
def test_a_network_without_batch_norm_has_no_place(kind):
    with pytest.raises(InputError, match=f"Linear has no batch norm, so .* '{kind}'"):
        convert(nn.Linear(2, 2), kind)
    for kept in ("batch", "weight", "none"):
        assert isinstance(convert(nn.Linear(2, 2), kept), nn.Linear)


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, norm.FrozenBatchNorm2d])
@pytest.mark.parametrize("kind", STATEFUL)
def test_an_epsilon_of_zero_carries_over(cls, kind):
    old = cls(3, eps=0.0)
    old.running_var.fill_(1e-4)
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(convert(old.eval(), kind)(x), old(x))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("batch", {"eps": "1"}, "eps is '1'; it must be a finite number, 0 or more"),
        ("batch", {"eps": -1}, "eps is -1; it must be a finite number, 0 or more"),
        ("sync", {"eps": float("inf")}, "eps is inf"),
        ("ghost", {"eps": None}, "eps is None"),
        ("frozen", {"eps": True}, "eps is True"),
        ("mean-only", {"momentum": "x"}, "momentum is 'x'; it must be the weight of a new batch"),
        ("batch", {"momentum": 5}, "momentum is 5; .* a number from 0 to 1, or None"),
        ("renorm", {"momentum": float("nan")}, "momentum is nan"),
        ("ghost", {"ghost_size": "a"}, "ghost_size is 'a'; it must be the samples of a ghost"),
        ("ghost", {"ghost_size": 2.5}, "ghost_size is 2.5; .* a whole number, 1 or more"),
        ("ghost", {"ghost_size": True}, "ghost_size is True"),
        ("renorm", {"schedule": 3}, "schedule is 3; it must be a Clipping"),
        ("sync", {"process_group": 3}, "process_group is 3; it must be a group of torch"),
        ("weight", {"log_scale": "a"}, "log_scale is 'a'; it must be the scale c"),
        ("weight-mean-only", {"log_scale": -1}, "log_scale is -1; .* a number above 0"),
    ],
)
def test_options_that_are_none(kind, options, words):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(UsageError, match=words):
        convert(net, kind, inplace=True, **options)
    assert type(net[1]) is nn.BatchNorm1d
    assert not parametrize.is_parametrized(net[0])


def test_calls_that_are_wrong():
    with pytest.raises(UsageError, match="no kind 'layer'; the kinds are batch, renorm"):
        convert(nn.BatchNorm2d(2), "layer")
    with pytest.raises(UsageError, match=r"'ghost' has no option 'size'; .*: eps, ghost_size"):
        convert(nn.BatchNorm2d(2), "ghost", size=3)
    with pytest.raises(UsageError, match="'none' has no option 'eps'; its options: none"):
        convert(nn.BatchNorm2d(2), "none", eps=1)
    with pytest.raises(UsageError, match="'normprop' has no option 'eps'"):
        convert(nn.BatchNorm2d(2), "normprop", eps=1)


def test_a_tensor_that_a_forward_left_behind_is_no_obstacle():
    net = nn.Sequential(nn.BatchNorm1d(2))
    net.left = net[0].weight * 2
    made = convert(net, "renorm")
    assert torch.equal(made.left, net.left)
    assert not made.left.requires_grad


def test_a_model_that_cannot_be_copied():
    net = nn.Sequential(nn.BatchNorm1d(2))
    net.lock = threading.Lock()
    with pytest.raises(InputError, match=r"Sequential cannot be copied .* in place"):
        convert(net, "renorm")
    assert convert(net, "renorm", inplace=True) is net
