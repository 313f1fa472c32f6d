"""An ONNX graph gets the statistics that its torch network gets, and that float64 arithmetic gives.

Deviations are told in standard deviations of the layer's input: of the mean, and relative of the
standard deviation, the worst channel of all layers.
"""

import copy
import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_adapt import Net, seeded, target
from torch import nn

import bnfold
from bnfold import graph
from bnfold.errors import InputError, UsageError
from bnfold.measuring import graphs, meter, modules
from bnfold.measuring.arrays import ArrayFeed
from bnfold.measuring.estimate import Progress
from bnfold.measuring.feed import Feed
from bnfold.measuring.moments import ImageMoments, Moments
from bnfold.measuring.norms import norms_of, refused, with_statistics
from bnfold.measuring.segments import Cut
from bnfold.measuring.statistics import Rule, Statistics
from bnfold.proof.exact.reference import Float64Reference
from bnfold.proof.places.runtime import open_session
from models import resnet_cifar

ROOMY, EPS = 1 << 30, 1e-5
METHODS = {"exact": {"max_bytes": ROOMY}, "fast": {}}


def onnx_estimate(model, batches, method="exact", **options):
    """The estimate for all batch norms of a graph."""
    feed = ArrayFeed(model, batches, max_bytes=ROOMY)
    progress = Progress(None, feed, 1, False)
    run = {"exact": graphs.exact, "fast": graphs.fast}[method]
    return run(model, norms_of(model), feed, progress, **{**METHODS[method], **options})


def torch_estimate(module, batches, method="exact"):
    """The estimate for all batch norms of a module, which is not changed."""
    module = copy.deepcopy(module).eval()
    layers = {n: m for n, m in module.named_modules() if "BatchNorm" in type(m).__name__}
    feed = Feed(module, batches, forward=None, max_bytes=ROOMY)
    with torch.no_grad():
        run = {"exact": modules.exact, "fast": modules.fast}[method]
        return run(module, layers, feed, Progress(None, feed, 1, False), **METHODS[method])


def oracle(model, inputs):
    """Whole-set statistics in float64, one batch norm after the other: {name: Statistics}.

    Each batch norm node is evaluated with what its input has, the variance divided by count - 1.
    Written independently of what is tested; for layers that are used once.
    """
    names = {norm.nodes[0].outputs[0].name: name for name, norm in norms_of(model).items()}
    reference, found = Float64Reference(graph.to_proto(model)), {}
    run = reference._run_node

    def watched(node, values):
        name = names.get(node.onnx_node.output[0])
        if name is not None:
            x, _, _, mean, var = node.input
            channels = np.moveaxis(values[x], 1, 0).reshape(values[x].shape[1], -1)
            values[mean], values[var] = channels.mean(1), channels.var(1, ddof=1)
            found[name] = Statistics(values[mean], values[var])
        run(node, values)

    reference._run_node = watched
    reference.run(inputs, list(names))
    return found


def off(found, expected):
    """The worst deviation between two sets of statistics; of a dead channel, in sqrt(eps)."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, right in expected.items():
        sd = np.sqrt(right.var + EPS)
        mean = np.abs(found[name].mean - right.mean) / sd
        spread = np.abs(np.sqrt(found[name].var + EPS) - sd) / sd
        worst = max(worst, mean.max(), spread.max())
    return worst


class Wide(nn.Module):
    """2-D and 1-D batch norms, a depthwise convolution, a residual sum, two branches joined."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.bn_depthwise = nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 2, 3, stride=2, padding=1)
        self.bn_left, self.bn_right = nn.BatchNorm2d(4), nn.BatchNorm2d(2)
        self.fc = nn.Linear(6, 5)
        self.bn_fc = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        x = (x + self.bn_depthwise(self.depthwise(x))).relu()
        left, right = self.bn_left(self.left(x)).relu(), self.bn_right(self.right(x)).relu()
        x = torch.cat((left.mean((2, 3)), right.mean((2, 3))), 1)
        return self.head(self.bn_fc(self.fc(x)).relu())


class Twice(nn.Module):
    """A batch norm that both of two convolutions run through, and one behind."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.shared, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.shared(self.first(x)).relu()
        x = self.shared(self.second(x)).relu()
        return self.last(x).mean((2, 3))


def scaled(module):
    """With weights as wide as He et al. draw them, so that few channels die."""
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.dim() > 1:
                tensor.mul_((2 / tensor[0].numel()) ** 0.5 / tensor.std())
    return module


NETS = {
    "net": (Net, (2, 5, 5)),
    "wide": (Wide, (2, 6, 6)),
    "twice": (Twice, (2, 6, 6)),
    "resnet20": (resnet_cifar.resnet20, (3, 16, 16)),
}


@pytest.fixture(scope="module", params=NETS.values(), ids=NETS.keys())
def pair(request):
    """A torch network, its graph, and 41 images."""
    make, shape = request.param
    net = scaled(seeded(make())).eval()
    x = target(41, shape=shape)
    return net, bnfold.export(net, x[:2]), x


# --- two runners, one result ----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [41, 16, 7])
def test_a_graph_gets_what_its_network_gets(pair, method, size):
    net, model, x = pair
    expected = torch_estimate(net, x.split(size), method)
    found = onnx_estimate(model, x.split(size), method)
    assert off(found.statistics, expected.statistics) < 1e-6
    assert set(found.reused) == set(expected.reused)
    assert found.rounds == expected.rounds
    if size == 41 or isinstance(net, Twice):  # whose uses differ more than batches do
        return
    assert found.excess == pytest.approx(expected.excess, rel=1e-5)


@pytest.mark.parametrize(
    "rule", [Rule(prior=16), Rule(weight=0.3, mixture=True), Rule(part="mean")]
)
def test_a_rule_holds_inside_the_pass(pair, rule):
    _, model, x = pair
    plain, ruled = onnx_estimate(model, x.split(16)), onnx_estimate(model, x.split(16), rule=rule)
    norms = norms_of(model)
    for name, moments in ruled.moments.items():
        expected = rule(norms[name].layer, moments)
        np.testing.assert_array_equal(ruled.statistics[name].mean, np.float32(expected.mean))
        np.testing.assert_array_equal(ruled.statistics[name].var, np.float32(expected.var))
    assert off(ruled.statistics, plain.statistics) > 1e-2


def test_exact_is_float64_layer_by_layer_for_any_split_and_order(pair):
    net, model, x = pair
    if isinstance(net, Twice):
        pytest.skip("a layer used twice is a fixed point")
    expected = oracle(model, {model.graph.inputs[0].name: x.numpy()})
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(3))]
    for batches in (x.split(41), x.split(16), x.split(1), shuffled.split(9)):
        assert off(onnx_estimate(model, batches).statistics, expected) < 1e-6


def test_the_adapted_graph_normalises_the_target(pair):
    """What the written model's batch norms read has the statistics they hold."""
    net, model, x = pair
    found = onnx_estimate(model, x.split(16))
    adapted = with_statistics(model, found.statistics)
    again = graphs.observe(
        adapted, found.statistics, norms_of(adapted), *feed_and_progress(adapted, x.split(16))
    )
    for name, moments in again.before.items():
        seen = {name: Statistics(moments.pixels.mean, moments.pixels.var_unbiased)}
        assert off(seen, {name: found.statistics[name]}) < 2e-6
    if not isinstance(net, Twice):
        norm = next(iter(norms_of(model)))
        value = adapted.graph.initializers[f"{norm}.running_mean"]
        np.testing.assert_array_equal(value.const_value.numpy(), found.statistics[norm].mean)


def feed_and_progress(model, batches):
    feed = ArrayFeed(model, batches, max_bytes=ROOMY)
    return feed, Progress(None, feed, 1, True)


def test_activations_on_disk_give_the_same_bits(pair):
    _, model, x = pair
    kept, spilled = (
        onnx_estimate(model, x.split(7), max_bytes=room).statistics for room in (ROOMY, 0)
    )
    for name, one in kept.items():
        assert (one.mean == spilled[name].mean).all()
        assert (one.var == spilled[name].var).all()


# --- planted faults -------------------------------------------------------------------------------


def fault_source_upstream(monkeypatch):
    feeds = Cut.feeds

    def with_source(self, use, _):
        return feeds(self, use, self._norms[use.layer].layer.source)

    monkeypatch.setattr(Cut, "feeds", with_source)


def fault_dropped_batch(monkeypatch):
    taken, start = graphs._taken, itertools.chain([1], itertools.repeat(0))

    def without_first(waiting, shelf):
        return itertools.islice(taken(waiting, shelf), next(start), None)

    monkeypatch.setattr(graphs, "_taken", without_first)


def fault_averaged_variances(monkeypatch):
    unbiased = graphs.Tally.total

    def averaged(self):
        parts = [meter.pooled([found], "x") for found in self._recent]
        whole = unbiased(self)
        within = np.mean([part.pixels.var for part in parts], axis=0)
        pixels = Moments(whole.pixels.count, whole.pixels.mean, within * whole.pixels.count)
        return replace(whole, pixels=pixels)

    monkeypatch.setattr(graphs.Tally, "total", averaged)


@pytest.mark.parametrize(
    "plant", [fault_source_upstream, fault_dropped_batch, fault_averaged_variances]
)
def test_a_planted_fault_is_found(plant, monkeypatch):
    net = seeded(Wide()).eval()
    x = target(41, shape=(2, 6, 6))
    model = bnfold.export(net, x[:2])
    expected = oracle(model, {model.graph.inputs[0].name: x.numpy()})
    plant(monkeypatch)
    assert off(onnx_estimate(model, x.split(16)).statistics, expected) > 1e-3


# --- graphs of every kind -------------------------------------------------------------------------


def conv_bn_twice(
    opset=17, dtype=np.float32, ir_version=8, batch="N", constants=(), overridable=(), extra=()
):
    """Conv, BN, Relu, Conv, BN; `constants` become Constant nodes, `overridable` inputs too."""
    rng = np.random.default_rng(0)
    weights = {"w1": rng.normal(size=(4, 2, 3, 3)), "w2": rng.normal(size=(3, 4, 3, 3))}
    for index, size in ((1, 4), (2, 3)):
        weights |= {
            f"gamma{index}": rng.uniform(0.5, 1.5, size),
            f"beta{index}": rng.normal(size=size),
            f"bn{index}.running_mean": rng.normal(size=size),
            f"bn{index}.running_var": rng.uniform(0.5, 1.5, size),
        }
    tensors = {k: numpy_helper.from_array(v.astype(dtype), k) for k, v in weights.items()}
    nodes = [helper.make_node("Constant", [], [name], value=tensors[name]) for name in constants]
    norm = [[f"gamma{i}", f"beta{i}", f"bn{i}.running_mean", f"bn{i}.running_var"] for i in (1, 2)]
    nodes += [
        helper.make_node("Conv", ["x", "w1"], ["c1"]),
        helper.make_node("BatchNormalization", ["c1", *norm[0]], ["n1"], epsilon=1e-3),
        helper.make_node("Relu", ["n1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"]),
        helper.make_node("BatchNormalization", ["c2", *norm[1]], ["y"]),
        *extra,
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs = [helper.make_tensor_value_info("x", kind, [batch, 2, 7, 7])]
    inputs += [
        helper.make_tensor_value_info(name, kind, weights[name].shape) for name in overridable
    ]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            inputs,
            [helper.make_tensor_value_info("y", kind, None)],
            [tensor for name, tensor in tensors.items() if name not in constants],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )
    return graph.prepare(ir.from_proto(proto))


def images(count=13, shape=(2, 7, 7), seed=0):
    rng = np.random.default_rng(seed)
    return (2 * rng.uniform(size=(count, 1, 1, 1)) + rng.normal(size=(count, *shape))).astype("f4")


@pytest.mark.parametrize("opset", [7, 9, 15, 23])
def test_every_opset(opset):
    model, x = conv_bn_twice(opset), images()
    expected = oracle(model, {"x": x})
    assert off(onnx_estimate(model, [x[:8], x[8:]]).statistics, expected) < 1e-6


def test_statistics_in_constant_nodes_are_read_and_written():
    held = [f"bn{i}.running_{what}" for i in (1, 2) for what in ("mean", "var")]
    plain, model = conv_bn_twice(), conv_bn_twice(constants=held)
    x = images()
    found = onnx_estimate(model, [x])
    assert off(found.statistics, onnx_estimate(plain, [x]).statistics) == 0
    outputs = [
        open_session(graph.to_proto(with_statistics(m, found.statistics)), optimize=False).run(
            {"x": x}
        )["y"]
        for m in (plain, model)
    ]
    np.testing.assert_array_equal(*outputs)


def test_statistics_read_through_views_are_written_at_their_root():
    """A double initializer of shape (1, 4) that reaches the batch norm through Cast and Squeeze."""
    model = conv_bn_twice()
    proto = graph.to_proto(model)
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        if node.output[0] == "n1":
            node.input[3] = "seen"
    held = next(t for t in proto.graph.initializer if t.name == "bn1.running_mean")
    array = numpy_helper.to_array(held).astype(np.float64)[None]
    held.CopyFrom(numpy_helper.from_array(array, "bn1.running_mean"))
    proto.graph.node.insert(
        0, helper.make_node("Cast", ["bn1.running_mean"], ["cast"], to=TensorProto.FLOAT)
    )
    axes = numpy_helper.from_array(np.array([0], np.int64), "axes")
    proto.graph.initializer.append(axes)
    proto.graph.node.insert(1, helper.make_node("Squeeze", ["cast", "axes"], ["seen"]))
    viewed, x = graph.prepare(ir.from_proto(proto)), images()
    found = onnx_estimate(viewed, [x])
    assert off(found.statistics, onnx_estimate(model, [x]).statistics) == 0
    written = with_statistics(viewed, found.statistics).graph.initializers["bn1.running_mean"]
    assert written.const_value.dtype == ir.DataType.DOUBLE
    np.testing.assert_array_equal(written.const_value.numpy(), found.statistics["bn1"].mean[None])


def test_nothing_but_the_statistics_changes():
    model = conv_bn_twice()
    adapted = with_statistics(model, {"bn1": Statistics(np.arange(4.0), np.arange(4.0) + 1)})
    before, after = (graph.to_proto(m) for m in (model, adapted))
    for proto in (before, after):
        for tensor in proto.graph.initializer:
            if tensor.name.startswith("bn1.running_"):
                tensor.CopyFrom(onnx.TensorProto())
    assert before == after
    weight = model.graph.initializers["w1"].const_value
    assert adapted.graph.initializers["w1"].const_value is weight
    with pytest.raises(UsageError, match="no batch norm 'bn9'"):
        with_statistics(model, {"bn9": Statistics(np.zeros(4), np.ones(4))})


def test_a_type_that_cannot_hold_a_statistic_names_the_layer():
    model = conv_bn_twice(dtype=np.float16)
    with pytest.raises(InputError, match="'bn1' reaches 1e\\+06, which float16 cannot hold"):
        with_statistics(model, {"bn1": Statistics(np.full(4, 1e6), np.ones(4))})


def test_half_precision():
    model, x = conv_bn_twice(dtype=np.float16), images()
    found = onnx_estimate(model, [x[:8], x[8:]])
    assert off(found.statistics, oracle(model, {"x": x.astype(np.float16)})) < 2e-3
    adapted = with_statistics(model, found.statistics)
    assert adapted.graph.initializers["bn2.running_var"].const_value.dtype == ir.DataType.FLOAT16
    for name, given in found.statistics.items():
        np.testing.assert_array_equal(given.var, norms_of(adapted)[name].layer.source.var)


def test_overridable_statistics_are_refused_until_they_are_frozen():
    """Before IR 4 initializers stand among the inputs by rule; since then a caller may set them."""
    names = ["bn1.running_mean", "bn1.running_var"]
    assert list(norms_of(conv_bn_twice(9, ir_version=3, overridable=names))) == ["bn1", "bn2"]
    model = conv_bn_twice(overridable=names)
    assert list(norms_of(model)) == ["bn2"]
    (reason,) = refused(model).values()
    assert "caller may override it; --freeze-inputs" in reason
    x = images()
    found = onnx_estimate(model, [x])
    assert list(found.statistics) == ["bn2"]
    assert list(norms_of(graph.freeze_inputs(model))) == ["bn1", "bn2"]


def reader(op_type, value, output, **attributes):
    return helper.make_node(op_type, [value], [output], **attributes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extra": [reader("Neg", "bn1.running_mean", "z")]}, "'bn1.running_mean' is read by Neg"),
        ({"overridable": ["bn1.running_var"]}, "--freeze-inputs"),
    ],
)
def test_what_cannot_be_adapted_says_why(change, reason):
    (said,) = refused(conv_bn_twice(**change)).values()
    assert reason in said


def edited(edit, **options):
    proto = graph.to_proto(conv_bn_twice(**options))
    edit(proto.graph)
    return graph.prepare(ir.from_proto(proto))


def test_training_mode_computed_statistics_and_bodies_are_refused():
    def train(g):
        g.node[1].attribute.append(helper.make_attribute("training_mode", 1))

    assert "training mode" in refused(edited(train))["bn1"]

    def compute(g):
        g.node.insert(0, helper.make_node("ReduceMean", ["x"], ["m"], axes=[0, 2, 3], keepdims=0))
        g.node.insert(1, helper.make_node("Concat", ["m", "m"], ["mm"], axis=0))
        g.node[3].input[3] = "mm"

    assert "computed, not constant" in " ".join(refused(edited(compute)).values())

    def wrap(g):
        norm = helper.make_node("BatchNormalization", list(g.node[1].input), ["inner"])
        output = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
        body = helper.make_graph([norm], "body", [], [output])
        either = helper.make_node("If", ["yes"], ["n1"], then_branch=body, else_branch=body)
        g.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        g.node[1].CopyFrom(either)

    model = edited(wrap)
    assert list(norms_of(model)) == ["bn2"]
    assert all("inside the body of an If" in reason for reason in refused(model).values())
    x = images()
    assert off(onnx_estimate(model, [x]).statistics, {"bn2": onnx_bn2(x)}) < 1e-6


def onnx_bn2(x):
    """bn2 of conv_bn_twice on x, where bn1 keeps what the source gave it and eps is 1e-5."""
    model = conv_bn_twice()
    proto = graph.to_proto(model)
    del proto.graph.node[1].attribute[:]
    (c2,) = Float64Reference(proto).run({"x": x}, ["c2"]).values()
    channels = np.moveaxis(c2, 1, 0).reshape(3, -1)
    return Statistics(channels.mean(1), channels.var(1, ddof=1))


def test_a_body_reads_values_of_other_segments():
    """An If whose branches read the graph's input and what a batch norm gave."""

    def branch(g):
        output = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
        then = helper.make_graph(
            [helper.make_node("Add", ["r1", "shift"], ["inner"])], "then", [], [output]
        )
        other = helper.make_graph(
            [helper.make_node("Neg", ["r1"], ["inner"])], "else", [], [output]
        )
        g.initializer.append(numpy_helper.from_array(np.float32(0.5), "zero"))
        g.node.insert(0, helper.make_node("ReduceMax", ["x"], ["shift"], keepdims=0))
        g.node.insert(1, helper.make_node("Greater", ["shift", "zero"], ["yes"]))
        g.node.insert(
            5, helper.make_node("If", ["yes"], ["chosen"], then_branch=then, else_branch=other)
        )
        g.node[6].input[0] = "chosen"

    model, x = edited(branch), images()
    cut = Cut(model, norms_of(model))
    assert cut.segments[0].held == ("c1", "shift", "yes")
    expected = oracle(model, {"x": x})
    assert off(onnx_estimate(model, [x]).statistics, expected) < 1e-6


def test_a_fixed_number_of_images_is_cut_to_and_the_rest_left_out():
    model, free, x = conv_bn_twice(batch=4), conv_bn_twice(), images(23)
    feed = ArrayFeed(model, [x[:6], x[6:7], x[7:]], max_bytes=ROOMY)
    found = graphs.exact(
        model, norms_of(model), feed, Progress(None, feed, 1, False), max_bytes=ROOMY
    )
    assert (feed.images, feed.batches, feed.left_out) == (20, 5, 3)
    assert off(found.statistics, onnx_estimate(free, [x[:20]]).statistics) < 1e-6
    with pytest.raises(InputError, match="3 do not fill a batch"):
        onnx_estimate(model, [x[:3]])


def test_norms_that_nothing_reads_and_outputs_on_the_way():
    """A batch norm whose output goes nowhere is measured; a value in the middle is an output."""

    def side(g):
        statistics = [f"bn1.running_{what}" for what in ("mean", "var")]
        for name in statistics:
            held = next(t for t in g.initializer if t.name == name)
            g.initializer.append(
                numpy_helper.from_array(numpy_helper.to_array(held), f"side.{name}")
            )
        norm = ["gamma1", "beta1", *(f"side.{name}" for name in statistics)]
        g.node.append(helper.make_node("BatchNormalization", ["r1", *norm], ["nowhere"]))
        g.output.insert(0, helper.make_tensor_value_info("r1", TensorProto.FLOAT, None))

    model, x = edited(side), images()
    expected = oracle(model, {"x": x})
    assert len(expected) == 3
    found = onnx_estimate(model, [x[:8], x[8:]])
    assert off(found.statistics, expected) < 1e-6
    feed, progress = feed_and_progress(model, [x])
    seen = graphs.observe(model, found.statistics, norms_of(model), feed, progress)
    assert seen.outputs is None  # r1 has no class scores
    assert list(seen.after) == list(found.statistics)


def test_a_batch_norm_may_read_the_input_itself():
    def first(g):
        g.node[0].CopyFrom(helper.make_node("Conv", ["normed", "w1"], ["c1"]))
        for name, array in {"m": [0.0, 0.0], "v": [1.0, 1.0], "g": [1.0, 2.0]}.items():
            g.initializer.append(numpy_helper.from_array(np.array(array, np.float32), name))
        norm = helper.make_node("BatchNormalization", ["x", "g", "m", "m2", "v"], ["normed"])
        g.initializer.append(numpy_helper.from_array(np.zeros(2, np.float32), "m2"))
        g.node.insert(0, norm)

    model, x = edited(first), images()
    assert Cut(model, norms_of(model)).segments[0].nodes == []
    assert off(onnx_estimate(model, [x]).statistics, oracle(model, {"x": x})) < 1e-6


def test_several_inputs_some_of_them_integers():
    def second_input(g):
        g.input.append(helper.make_tensor_value_info("index", TensorProto.INT64, ["N"]))
        g.initializer.append(
            numpy_helper.from_array(np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1), "table")
        )
        g.node.insert(3, helper.make_node("Gather", ["table", "index"], ["shift"]))
        g.node.insert(4, helper.make_node("Add", ["r1", "shift"], ["shifted"]))
        g.node[5].input[0] = "shifted"

    model, x = edited(second_input), images()
    index = np.arange(len(x)) % 5
    batches = [
        {"x": x[:8], "index": index[:8].astype("u1"), "label": 3},
        {"x": x[8:], "index": index[8:]},
    ]
    expected = oracle(model, {"x": x, "index": index})
    assert off(onnx_estimate(model, batches).statistics, expected) < 1e-6
    with pytest.raises(InputError, match="the graph takes x, index; give mappings"):
        onnx_estimate(model, [x])
    with pytest.raises(InputError, match="holds float32, but the graph takes int64"):
        onnx_estimate(model, [{"x": x, "index": index.astype("f4")}])


# --- feeding --------------------------------------------------------------------------------------


def test_batches_of_any_make():
    model, x = conv_bn_twice(), images()
    expected = onnx_estimate(model, [x]).statistics
    makes = {
        "tensor": [torch.from_numpy(x)],
        "labelled": [(x, np.zeros(len(x)))],
        "mapping": [{"x": x, "label": 1}],
        "double": [x.astype(np.float64)],
        "strided": [np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)],
        "big-endian": [x.astype(">f4")],
        "iterator": iter([x]),
    }
    for make, batches in makes.items():
        assert off(onnx_estimate(model, batches).statistics, expected) == 0, make


def test_bytes_are_numbers():
    model = conv_bn_twice()
    x = np.random.default_rng(0).integers(0, 256, (9, 2, 7, 7)).astype(np.uint8)
    expected = onnx_estimate(model, [x.astype("f4")]).statistics
    assert off(onnx_estimate(model, [x]).statistics, expected) == 0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "holds no image"),
        ([np.zeros((4, 3, 7, 7), "f4")], r"shape \(4, 3, 7, 7\), float32 for 'x', which takes \(N"),
        ([np.zeros((4, 2, 7), "f4")], "which takes"),
        ([["a"]], "holds of type str for 'x'"),
        ([{"y": 1}], "the graph takes x; give mappings"),
        ([np.full((2, 2, 7, 7), np.nan, "f4")], "NaN or infinity"),
        ([np.zeros((0, 2, 7, 7), "f4")], "holds no image"),
    ],
)
def test_data_that_does_not_fit_is_told_in_a_sentence(batches, message):
    with pytest.raises(InputError, match=message):
        onnx_estimate(conv_bn_twice(), batches)


def test_an_array_is_no_iterable_of_batches():
    with pytest.raises(UsageError, match="iterable of batches"):
        ArrayFeed(conv_bn_twice(), images(), max_bytes=0)


def test_an_iterator_is_kept_for_the_rounds_of_a_layer_used_twice(pair):
    net, model, x = pair
    if isinstance(net, Twice):
        found = onnx_estimate(model, iter(x.split(9)))
        assert found.rounds > 2
        assert off(found.statistics, onnx_estimate(model, x.split(9)).statistics) == 0


def test_a_broken_off_run_goes_on_where_it_was():
    model, x = conv_bn_twice(), images()
    told = {}
    whole = onnx_estimate(model, [x[:8], x[8:]], on_settled=told.__setitem__)
    assert list(told) == ["bn1", "bn2"]
    for count in (1, 2):
        resumed = {name: told[name] for name in list(told)[:count]}
        again = onnx_estimate(model, [x[:8], x[8:]], resumed=resumed)
        assert off(again.statistics, whole.statistics) < 1e-6
        assert list(again.moments) == list(whole.moments)
        assert all(isinstance(m, ImageMoments) for m in again.moments.values())


# --- real files -----------------------------------------------------------------------------------

FILES = {
    "cgan_32_1": (9, 5),
    "gtsrb_bnn_48_tf2onnx": (5, 48, 48, 3),
    "linzaer_slim-320": (2, 3, 240, 320),
    "pfld": (4, 3, 112, 112),
    "ppocr_v2_cls_opset10": (4, 3, 48, 96),
}


@pytest.mark.parametrize("name", FILES)
def test_real_files(shared_data, name):
    model = graph.freeze_inputs(graph.read_onnx(shared_data / "onnx" / f"{name}.onnx"))
    assert not refused(model)
    x = np.random.default_rng(0).normal(size=FILES[name]).astype(np.float32)
    found = onnx_estimate(model, [x[:1], x[1:]])
    expected = oracle(model, {next(iter(graph.graph_inputs(model))): x})
    assert off(found.statistics, expected) < 2e-6
