"""Where a fold of torch goes: the user's class, a graph module, or ONNX alone; with what is told.

Each network is compared with itself in float64, and goes through bnfold's own gates; each kind of
check is shown once to catch a planted fault.
"""

import copy
import io
import warnings

import pytest
import torch
from nets import CalledTwice, Reused, SharedHead, agree, norms, with_statistics
from odd_nets import (
    BatchNormAct2d,
    DataDependent,
    Doubling,
    Frozen,
    Functional,
    Idle,
    Nested,
    Overwritten,
    Pair,
    Remembers,
    Renamed,
    Tapped,
    Tied,
)
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import bnfold
from bnfold import graph
from bnfold.errors import InputError, UsageError
from bnfold.folding.module import load_folded
from bnfold.folding.plan import plan
from bnfold.folding.program import FoldedGraph, fold_program, scope_of_program

REASON = (
    "input 3 of BatchNormalization 'node__native_batch_norm_legit__0' is computed, not constant"
)


def image(channels=3):
    return torch.randn((2, channels, 6, 6), generator=torch.Generator().manual_seed(1))


def folded(module, x, **options):
    """The result of a fold that every gate passes, and that left the module as it was."""
    before = {name: tensor.clone() for name, tensor in nn.Module.state_dict(module).items()}
    result = bnfold.fold(module, x, **options)
    result.verify().raise_for_failure()
    after = nn.Module.state_dict(module)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert len(before) == len(after)
    return result


# --- the graph module ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "channels"),
    [
        (Functional, 3),
        (CalledTwice, 3),
        (Reused, 4),
        (SharedHead, 4),
        (lambda: Tied("object"), 4),
        (lambda: Pair(Doubling(4)), 3),
    ],
)
def test_what_the_class_cannot_hold_comes_back_as_a_graph_module(factory, channels):
    module, x = with_statistics(factory()), image(channels)
    result = folded(module, x)
    assert isinstance(result.model, FoldedGraph)
    assert not result.kept
    assert "BatchNormalization" not in {node.op_type for node in result.graph.graph}
    assert not [n for n in result.model.graph.nodes if "batch_norm" in str(n.target)]
    assert agree(module, result.model, x)
    assert agree(module, result.model, torch.cat([x, 3 * x]))
    assert any("graph module" in note for note in result.notes)
    in_class = bnfold.fold(module, x, writeback="class")
    assert type(in_class.model) is type(module)
    assert in_class.kept
    assert agree(module, in_class.model, x)
    assert any("graph module" in note for note in in_class.notes)


def test_a_fault_in_a_graph_module_is_caught():
    module, x = with_statistics(CalledTwice()), image()
    result = bnfold.fold(module, x)
    with torch.no_grad():
        for parameter in result.model.parameters():  # one channel alone may be dead
            parameter *= 1.01
    assert not agree(module, result.model, x)
    assert {failure.gate for failure in result.verify().failures} == {"C"}


def test_a_graph_module_keeps_the_names_and_behaves_as_a_module():
    module, x = with_statistics(Functional()), image()
    result = folded(module, x)
    names = set(module.state_dict())
    assert set(result.model.state_dict()) - names == {"conv.bias", "kernel_bias"}
    expected = result.model(x)
    assert torch.equal(copy.deepcopy(result.model)(x), expected)
    assert result.model.eval() is result.model
    with pytest.raises(InputError, match="no training mode"):
        result.model.train()
    file = io.BytesIO()
    torch.save(result.model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    file = io.BytesIO()
    torch.export.save(result.program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), expected)
    assert result.model.double()(x.double()).dtype is torch.float64


def test_a_graph_module_shares_no_memory_with_the_network():
    module, x = with_statistics(Functional()), image()
    result = bnfold.fold(module, x, writeback="graph")
    before = result.model(x)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    assert torch.equal(result.model(x), before)


def test_a_graph_module_refuses_a_size_that_it_was_not_exported_for():
    result = bnfold.fold(with_statistics(CalledTwice()), image())
    with pytest.raises(AssertionError, match="Guard"):
        result.model(torch.randn(2, 3, 7, 6))


def test_a_plan_beyond_its_scope_is_an_error_not_a_wrong_graph():
    module = with_statistics(Functional())
    exported = graph.trace_module(module, (image(),))
    chosen = plan(exported.model, scope_of_program(exported))
    for node in exported.model.graph:
        node.meta.pop(graph.OPERATOR, None)
    with pytest.raises(InputError, match="cannot hold"):
        fold_program(exported.program, chosen)
    assert plan(exported.model, scope_of_program(exported)).kept


def test_an_exported_program_folds_to_an_exported_program():
    module, x = with_statistics(CalledTwice()), image()
    wide = {0: torch.export.Dim("n", max=4), 2: torch.export.Dim("h", min=5, max=9)}
    program = torch.export.export(module, (x,), dynamic_shapes=(wide,))
    result = bnfold.fold(program)
    assert isinstance(result.model, torch.export.ExportedProgram)
    assert not result.kept
    assert agree(module, result.model.module(), x)
    assert result.verify().passed
    with pytest.raises(AssertionError, match="Guard"):
        result.model.module()(torch.randn(2, 3, 10, 6))


def test_an_unknown_way_back_is_a_usage_error():
    with pytest.raises(UsageError, match="'auto', 'class' or 'graph'"):
        bnfold.fold(with_statistics(Pair()), image(), writeback="module")


# --- batch norms of other classes ----------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4, affine=False),
        nn.SyncBatchNorm(4),
        Renamed(4),
        Frozen(4),
        nn.BatchNorm2d(4, eps=0.3),
    ],
    ids=lambda norm: f"{type(norm).__name__}",
)
def test_a_batch_norm_by_another_name_folds_in_its_class(norm):
    module, x = with_statistics(Pair(norm)), image()
    result = folded(module, x)
    assert type(result.model) is Pair
    assert not result.kept
    assert type(result.model.bn) is nn.Identity
    assert agree(module, result.model, x)
    assert isinstance(module.bn, type(norm))


def test_a_frozen_batch_norm_is_said_to_be_one():
    result = bnfold.fold(with_statistics(Pair(Frozen(4))), image())
    assert any("frozen" in note and "'bn'" in note for note in result.notes)


def test_a_module_with_the_buffers_of_a_frozen_batch_norm_is_not_one_by_its_names():
    module, x = with_statistics(Pair(Frozen(4, wrong=True))), image()
    result = folded(module, x)
    assert not result.folded
    assert type(result.model.bn) is Frozen
    assert agree(module, result.model, x)


@pytest.mark.parametrize("act", [None, nn.PReLU(4), nn.Identity()])
def test_a_batch_norm_that_ends_in_its_act_leaves_the_act(act, monkeypatch):
    monkeypatch.setattr(BatchNormAct2d, "__module__", "timm.layers.norm_act")
    module, x = with_statistics(Pair(BatchNormAct2d(4, act))), image()
    result = folded(module, x)
    assert type(result.model) is Pair
    assert not norms(result.model)
    assert type(result.model.bn.act) is type(module.bn.act)
    assert agree(module, result.model, x)


def test_a_class_of_that_name_that_computes_something_else_is_not_taken_apart(monkeypatch):
    monkeypatch.setattr(BatchNormAct2d, "__module__", "timm.layers.norm_act")
    monkeypatch.setattr(
        BatchNormAct2d, "forward", lambda s, x: s.drop(s.act(2 * nn.BatchNorm2d.forward(s, x)))
    )
    module, x = with_statistics(Pair(BatchNormAct2d(4))), image()
    result = folded(module, x)
    assert isinstance(result.model, FoldedGraph)
    assert agree(module, result.model, x)


def test_statistics_of_the_batch_stay_with_a_reason():
    module, x = with_statistics(Pair(nn.BatchNorm2d(4, track_running_stats=False))), image()
    result = folded(module, x)
    assert [kept.reason for kept in result.kept] == [REASON]
    assert type(result.model) is Pair
    assert agree(module, result.model, x)


# --- tied and shared -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "way"), [("object", "class"), ("object", "graph"), ("memory", "class")]
)
def test_tied_weights_are_given_one_value_or_one_each(how, way):
    module, x = with_statistics(Tied(how)), image(4)
    result = folded(module, x, writeback=way)
    assert agree(module, result.model, x)
    if (how, way) != ("object", "class"):
        assert not result.kept


def test_a_weight_under_the_name_of_an_idle_module_reaches_the_one_that_is_called():
    module, x = with_statistics(Idle()), image()
    for way in ("class", "graph"):
        result = bnfold.fold(module, x, writeback=way)
        assert agree(module, result.model, x), way


# --- hooks ---------------------------------------------------------------------------------------


def doubled(_module, _inputs, output):
    return 2 * output


@pytest.mark.parametrize(
    ("place", "way"),
    [("conv1", "class"), ("bn1", "class"), ("relu", "class"), ("conv2", "class"), ("bn2", "graph")],
)
def test_what_a_hook_does_to_tensors_is_not_lost(place, way):
    module, x = with_statistics(Tapped(), positive=True), image()
    getattr(module, place).register_forward_hook(doubled)
    getattr(module, place).register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 0.5,))
    result = folded(module, x, writeback=way)
    assert agree(module, result.model, x)
    assert way == "class" or any("hooks of" in note for note in result.notes)


@pytest.mark.parametrize("place", ["conv1", "relu", "tap", "bn2", "conv2"])
def test_a_hook_that_looks_sees_what_it_saw(place):
    module, x = with_statistics(Tapped(), positive=True), image()
    seen = []

    def look(_module, inputs, output):
        if not torch.compiler.is_exporting():
            seen.append((inputs[0].clone(), output.clone()))

    getattr(module, place).register_forward_hook(look)
    result = bnfold.fold(module, x)
    assert type(result.model) is Tapped
    seen.clear()
    module(x), result.model(x)
    for before, after in zip(*seen, strict=True):
        assert torch.allclose(before, after, rtol=1e-4, atol=1e-5)


def test_a_hook_that_is_told_nothing_would_see_another_value():
    """Planted: without the hook, the same fold does change what the last layer is given."""
    module, x = with_statistics(Tapped(), positive=True), image()
    result = bnfold.fold(module, x)
    seen = []
    for network in (module, result.model):
        network.conv2.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
        network(x)
    assert not torch.allclose(*seen, rtol=1e-4, atol=1e-5)


def test_the_graph_module_says_whose_hooks_it_does_not_call():
    module, x = with_statistics(CalledTwice()), image()
    module.a.register_forward_hook(lambda *_: None)
    result = bnfold.fold(module, x)
    assert type(result.model) is CalledTwice
    assert any("does not call the hooks of 'a'" in note for note in result.notes)
    result = bnfold.fold(module, x, writeback="graph")
    assert not result.kept
    assert any("hooks of 'a'" in note for note in result.notes)


def test_a_forward_of_its_own_is_as_good_as_a_hook():
    module, x = with_statistics(Pair()), image()
    plain_forward = module.bn.forward
    module.bn.forward = lambda y: 2 * plain_forward(y)
    result = bnfold.fold(module, x, writeback="class")
    assert result.kept
    assert result.verify().passed


# --- computed weights ----------------------------------------------------------------------------


def pruned(conv):
    return prune.l1_unstructured(conv, "weight", 0.4)


NORMS = (
    weight_norm,
    spectral_norm,
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    pruned,
)


@pytest.mark.parametrize(
    ("norm", "way"), [*((norm, "class") for norm in NORMS), (NORMS[2], "graph")]
)
def test_a_computed_weight_is_replaced_by_its_value_and_folded(norm, way):
    module, x = Pair(), image()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        norm(module.conv)
    with_statistics(module)
    with torch.no_grad():
        before = module(x)
    kind, names = type(module.conv), set(module.state_dict())
    result = folded(module, x, writeback=way)
    assert not result.kept
    assert agree_in_single(result.model, before, x)
    assert any("'conv'" in note and "values" in note for note in result.notes)
    assert type(module.conv) is kind
    assert set(module.state_dict()) == names
    with torch.no_grad():
        assert torch.equal(module(x), before)
    if way == "class":
        assert set(result.model.state_dict()) == {"conv.weight", "conv.bias"}
        assert not result.model.conv._forward_pre_hooks
        result.model.train().eval()
        assert agree_in_single(result.model, before, x)


def agree_in_single(model, expected, x):
    with torch.no_grad():
        return torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_recomputing_hook_would_undo_the_fold():
    """Planted: writing into the hooked copy is lost at the next forward."""
    module, x = Pair(), image()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(module.conv)
    with_statistics(module)
    with torch.no_grad():
        before = module(x)
        module.conv.weight.data.mul_(3)
        assert torch.equal(module(x), before)


def test_a_folded_checkpoint_of_computed_weights_loads_into_the_class(tmp_path):
    module, x = Pair(), image()
    parametrizations.weight_norm(module.conv)
    result = folded(with_statistics(module), x)
    fresh = Pair()
    parametrizations.weight_norm(fresh.conv)
    content = {
        "state_dict": dict(result.state_dict),
        "bnfold": {"schema": 1, "kind": "fold", "folded": [n.name for n in result.folded]},
    }
    torch.save(content, tmp_path / "folded.pt")
    load_folded(fresh, tmp_path / "folded.pt")
    assert torch.equal(fresh(x), result.model(x))


# --- modules of their own mind -------------------------------------------------------------------


def test_overwritten_names_do_not_mislead():
    module, x = Overwritten(), image()
    with_statistics(module.body)
    nn.Module.train(module, False)
    result = folded(module, x)
    assert type(result.model) is Overwritten
    assert type(result.model.body.bn) is nn.Identity
    assert agree(module, result.model, x)


def test_a_module_that_hides_its_parameters_is_told_so(monkeypatch):
    monkeypatch.setattr(
        Overwritten, "named_parameters", lambda *_args, **_kwargs: iter(()), raising=False
    )
    module = Overwritten()
    nn.Module.train(module, False)
    with pytest.raises(InputError, match=r"Overwritten overwrites named_parameters\(\)"):
        bnfold.fold(module, image())


def test_a_choice_by_data_names_the_line():
    with pytest.raises(InputError, match=r"odd_nets.py:\d+: `if y.sum\(\) > 0:`") as caught:
        bnfold.fold(with_statistics(DataDependent()), image())
    assert "torch.cond" in str(caught.value)


@pytest.mark.parametrize("way", ["class", "graph"])
def test_nested_inputs_and_outputs(way):
    module, x = with_statistics(Nested()), image()
    extra = [torch.randn(2, 4, 6, 6)]
    result = folded(module, ({"image": x}, extra), writeback=way)
    assert not result.kept
    got, wanted = result.model({"image": x}, extra), module({"image": x}, extra)
    assert list(got) == list(wanted)
    assert torch.allclose(got["more"][1][0], wanted["more"][1][0], rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="example_inputs are tensors"):
        bnfold.fold(module, ({"image": 3}, extra))


def test_what_an_earlier_forward_left_behind_is_no_obstacle():
    module, x = with_statistics(Remembers()), image()
    module(x)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(module)
    result = folded(module, x)
    assert type(result.model) is Remembers
    assert agree_in_single(result.model, module(x), x)


def test_a_module_that_cannot_be_copied_comes_back_as_a_graph():
    module, x = with_statistics(Pair()), image()
    module.lock = (i for i in ())
    result = folded(module, x)
    assert isinstance(result.model, FoldedGraph)
    assert not result.kept
    assert any("cannot be copied" in note for note in result.notes)
    with pytest.raises(InputError, match="cannot be copied"):
        bnfold.fold(module, x, writeback="class")


# --- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "way"),
    [(torch.float16, "class"), (torch.bfloat16, "graph"), (torch.float64, "class")],
)
def test_other_types_fold_in_their_own(dtype, way):
    module, x = with_statistics(Pair()).to(dtype), image().to(dtype)
    result = folded(module, x, writeback=way)
    assert not result.kept
    assert result.model(x).dtype is dtype
    assert agree(module, result.model, x)
    proof = result.verify()
    in_torch = any("compared in torch" in note for note in proof.notes)
    assert in_torch == (dtype is not torch.float16)
    with torch.no_grad():
        next(result.model.parameters()).neg_()
    assert not result.verify().passed
    assert not agree(module, result.model, x)


# --- a forward that reads its layers in other ways than by calling them ---------------------------


class Reads(nn.Module):
    """A convolution and a batch norm; `forward` of the subclasses looks into them."""

    def __init__(self):
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def plainly(self, x):
        return self.b(self.c(x))


class ReadsTheWeight(Reads):
    def forward(self, x):
        return self.b(functional.conv2d(x, self.c.weight))


class HoldsTheStatistics(Reads):
    def forward(self, x):
        b = self.b
        statistics = b.running_mean, b.running_var
        return functional.batch_norm(self.c(x), *statistics, b.weight, b.bias, eps=b.eps)


class ReadsAnAttribute(Reads):
    def forward(self, x):
        return self.plainly(x) * self.b.num_features


class AsksForTheClass(Reads):
    def forward(self, x):
        return self.plainly(x) * (2 if isinstance(self.b, nn.BatchNorm2d) else 1)


class AsksForTheBias(Reads):
    def forward(self, x):
        return self.plainly(x) + (5 if self.c.bias is None else 0)


@pytest.mark.parametrize(
    "network",
    [ReadsTheWeight, HoldsTheStatistics, ReadsAnAttribute, AsksForTheClass, AsksForTheBias],
)
def test_what_a_forward_reads_in_its_layers_is_never_lost(network):
    module, x = with_statistics(network()), image()
    result = bnfold.fold(module, x)
    assert agree(module, result.model, x)
    assert not result.kept
    assert any("other ways than by calling" in note for note in result.notes)
    with pytest.raises(InputError, match="other ways than by calling"):
        bnfold.fold(module, x, writeback="class")


def test_a_graph_module_says_what_size_it_takes():
    module, x = with_statistics(CalledTwice()), image()
    size = "x".join(str(n) for n in x.shape[1:])
    assert any(size in note for note in bnfold.fold(module, x).notes)


def test_training_mode_is_said():
    x = image()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert any("training mode" in note for note in bnfold.fold(network.train(), x).notes)
    assert not any("training mode" in note for note in bnfold.fold(network.eval(), x).notes)
