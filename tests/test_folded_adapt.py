"""A folded network takes other statistics, and is what adapting before the fold would give."""

from __future__ import annotations

import copy
import dataclasses
import json
import zlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import realdata
import torch
from nets import with_statistics
from onnx import TensorProto
from safetensors.numpy import load, save
from torch import nn

import bnfold
from bnfold import graph
from bnfold.adapting.folded import fold_again, refold, set_statistics, state_with
from bnfold.cli import main
from bnfold.errors import InputError, UsageError
from bnfold.folding.record import load_record
from bnfold.measuring import norms
from bnfold.measuring.statistics import Statistics
from models.digits import digits_cnn
from models.preact_resnet import PreActResNet
from models.resnet_cifar import ResNetCifar
from tests.law_models import Law, build

SPEC = "models/digits.py:digits_cnn"
DIGIT = torch.zeros(1, 1, 8, 8)
IMAGE = torch.zeros(1, 3, 8, 8)


def law(text, removed=1, **options):
    return build(Law("adapt", "", text, removed, **options))


def moved(model, seed=1):
    """Other statistics for every batch norm of a graph."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, norm in norms.norms_of(model).items():
        source = norm.layer.source
        shift = rng.normal(size=len(source.mean)) * np.sqrt(source.var + 0.01)
        found[name] = Statistics(
            source.mean + shift / 2, source.var * rng.uniform(0.3, 3, len(shift))
        )
    return found


def same_state(a, b):
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


# --- graphs ---------------------------------------------------------------------------------------

SUM = "x[4,4,4,4] > y; a = Conv(x, W[4,4,3,3]); b = BN4:alt(a); c = Conv(x, V[4,4,3,3]);"
PADDED = "y = Conv<pads=[1,1,1,1]>(b, U[4,4,3,3])"
CASES = {
    "into the convolution ahead": ("x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); y = BN4:alt(c)", {}),
    "into the one behind": (
        "x[4,4,4,4] > y; r = Relu(x); b = BN4:alt(r); y = Conv(b, V[8,4,3,3])",
        {},
    ),
    "gamma 0": (
        "x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); b = BN4:alt0(c); r = Relu(b);"
        " y = Conv(r, V[8,4,1,1])",
        {},
    ),
    "parallel branches as one": (f"{SUM} d = BN4:tla(c); y = Add(b, d)", {}),
    "a border repair": (f"x[4,4,4,4] > y; r = Relu(x); b = BN4:alt(r); {PADDED}", {"border"}),
    "arithmetic absorbed": (
        "x[4,4,4,4] > y; m = Mul(x, W:pow[4,1,1]); a = Conv(m, V[4,4,3,3]); y = BN4:alt(a)",
        {},
    ),
    "groups": (
        "x[4,8,4,4] > y; r = Relu(x); b = BN8(r); c = Conv<group=4>(b, W[8,2,3,3]); y = BN8:neg(c)",
        {},
    ),
    "one of two kept": (
        "x[4,4,4,4] > y; a = Conv(x, W[4,4,3,3]); b = BN4:alt(a); c = Conv(b, V[4,4,1,1]);"
        " y = BN4:tla(c)",
        {"keep"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_graph_is_what_adapting_before_the_fold_gives(tmp_path, name):
    text, asked = CASES[name]
    options = {"repair": ["border"]} if asked == {"border"} else {}
    proto = law(text)
    if asked == {"keep"}:
        found = norms.norms_of(graph.parse_onnx(proto.SerializeToString()))
        options = {"keep": [next(iter(found))]}
    first = bnfold.fold(proto, **options)
    assert first.folded
    first.record.save(tmp_path / "net.record.safetensors")
    graph.write_onnx(first.graph, tmp_path / "net.onnx")
    statistics = moved(first.original)
    again = refold(tmp_path / "net.onnx", None, statistics)
    adapted = norms.with_statistics(first.original, statistics)
    straight = bnfold.fold(graph.to_proto(adapted), **options)
    assert graph.to_bytes(again.original) == graph.to_bytes(adapted)
    assert graph.to_bytes(again.graph) == graph.to_bytes(straight.graph)
    assert graph.to_bytes(again.graph) != graph.to_bytes(first.graph)
    assert not again.notes
    assert [norm.name for norm in again.folded] == [norm.name for norm in first.folded]
    again.verify().raise_for_failure()
    back = bnfold.unfold(again.graph, again.record)
    assert graph.to_bytes(back.graph) == graph.to_bytes(adapted)
    assert again.record.choices == first.record.choices


def test_the_same_statistics_give_the_same_file():
    first = bnfold.fold(law(CASES["gamma 0"][0]))
    for statistics in ({}, {n: v.layer.source for n, v in norms.norms_of(first.original).items()}):
        again = refold(first.graph, first.record, statistics)
        assert graph.to_bytes(again.graph) == graph.to_bytes(first.graph)


def test_clean_ups_are_done_again():
    """A channel whose gamma is 0 goes, whatever its statistics are."""
    beta = np.array([2, -2, -1, 3], np.float32)  # and Relu makes 0 of it
    proto = law(CASES["gamma 0"][0], constants={"b.beta": beta})
    options = {"clean_up": ["dead-channels"]}
    first = bnfold.fold(proto, **options)
    assert first.graph.graph.initializers["W"].shape[0] < 4
    statistics = moved(first.original)
    again = refold(first.graph, first.record, statistics)
    adapted = graph.to_proto(norms.with_statistics(first.original, statistics))
    assert graph.to_bytes(again.graph) == graph.to_bytes(bnfold.fold(adapted, **options).graph)
    assert graph.to_bytes(again.graph) != graph.to_bytes(bnfold.fold(adapted).graph)


def test_every_type_comes_in_and_goes_out_as_it_came():
    first = bnfold.fold(law(CASES["gamma 0"][0]))
    statistics = moved(first.original)
    a = refold(first.model, first.record, statistics)
    b = refold(first.graph, first.record, statistics)
    assert isinstance(a.model, onnx.ModelProto)
    assert a.model.SerializeToString() == graph.to_bytes(b.model)


# --- torch ----------------------------------------------------------------------------------------


class Hooked(nn.Module):
    """A hook looks at a value that a gauge would change without it."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.bn, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.end = nn.BatchNorm2d(4)
        self.relu.register_forward_hook(lambda _m, _i, _o: None)

    def forward(self, x):
        return self.end(self.last(self.bn(self.relu(self.conv(x)))))


NETWORKS = {
    "digits": (digits_cnn, DIGIT, False),
    "resnet": (lambda: ResNetCifar(1, 10, 3, 16), IMAGE, False),
    "preact": (lambda: PreActResNet((2,), (8,), 10, 3), IMAGE, True),
    "hooked": (Hooked, IMAGE, False),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_module_is_what_adapting_before_the_fold_gives(name):
    factory, x, positive = NETWORKS[name]
    module = with_statistics(factory(), positive=positive)
    first = bnfold.fold(module, x, writeback="class")
    before = copy.deepcopy(first.model.state_dict())
    home = {n: v.layer.source for n, v in norms.norms_of(first.original).items()}
    statistics = moved(first.original)
    again = refold(first.model, first.record, statistics)
    set_statistics(module, statistics)
    straight = bnfold.fold(module, x, writeback="class")
    assert type(again.model) is type(module)
    assert not again.model.training
    assert same_state(again.model.state_dict(), straight.model.state_dict())
    assert graph.to_bytes(again.graph) == graph.to_bytes(straight.graph)
    assert same_state(first.model.state_dict(), before)
    again.verify().raise_for_failure()
    # and once more, from what came out: nothing drifts
    there_and_back = refold(again.model, again.record, home)
    assert same_state(there_and_back.model.state_dict(), before)
    # the ONNX file beside a torch file is what the class could take back, not more
    beside = refold(first.graph, first.record, statistics)
    assert graph.to_bytes(beside.graph) == graph.to_bytes(again.graph)


def test_a_graph_module_is_adapted_by_its_onnx_file():
    module = with_statistics(digits_cnn())
    first = bnfold.fold(module, DIGIT, writeback="graph")
    statistics = moved(first.original)
    again = refold(first.graph, first.record, statistics)
    set_statistics(module, statistics)
    straight = bnfold.fold(module, DIGIT, writeback="graph")
    assert graph.to_bytes(again.graph) == graph.to_bytes(straight.graph)
    with pytest.raises(InputError, match="holds no state_dict"):
        refold(first.model, first.record, statistics)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("folded")
    torch.save(with_statistics(digits_cnn()).state_dict(), made / "net.pt")
    outputs = [f"-o{made / f'net.folded{end}'}" for end in (".onnx", ".pt", ".safetensors")]
    arguments = ["--model", SPEC, "--input-shape", "1,1,8,8", *outputs]
    assert main(["fold", str(made / "net.pt"), *arguments]) == 0
    return made


def test_files_of_every_kind_agree(folder):
    record = load_record(folder / "net.folded.record.safetensors")
    module = digits_cnn().eval()
    module.load_state_dict(torch.load(folder / "net.pt"))
    statistics = moved(bnfold.unfold(folder / "net.folded.onnx").graph)
    set_statistics(module, statistics)
    straight = bnfold.fold(module, DIGIT)
    x = torch.randn(5, 1, 8, 8)
    for end, factory in ((".pt", None), (".pt", SPEC)):
        again = refold(folder / f"net.folded{end}", None, statistics, factory=factory)
        expected = straight.model.state_dict()
        assert same_state({key: again.state_dict[key] for key in expected}, expected)
        again.verify().raise_for_failure()
        assert again.record.undo.built == record.undo.built
        if factory:
            assert torch.equal(again.model(x), straight.model(x))
    beside = refold(folder / "net.folded.onnx", None, statistics)
    assert graph.to_bytes(beside.graph) == graph.to_bytes(again.graph)


# --- what must not go wrong -----------------------------------------------------------------------


def test_a_record_that_does_not_say_what_was_asked_still_does():
    """Records of before there were choices: the same batch norms fold, of a class or a graph."""
    module = with_statistics(ResNetCifar(1, 10, 3, 16))
    first = bnfold.fold(module, IMAGE, only=["layer1.*"])
    statistics = moved(first.original)
    old = dataclasses.replace(first.record, choices=None)
    told, again = (refold(first.model, r, statistics) for r in (first.record, old))
    assert same_state(told.model.state_dict(), again.model.state_dict())
    assert [n.name for n in again.folded] == [n.name for n in first.folded]


def test_choices_are_in_the_file_and_may_be_absent(tmp_path):
    path = tmp_path / "r.safetensors"
    module = bnfold.fold(with_statistics(digits_cnn()), DIGIT, keep=["bn1"], writeback="class")
    module.record.save(path)
    assert load_record(path).choices == module.record.choices
    assert load_record(path).choices.scope == module.plan.scope
    for options in ({}, {"repair": ["border"], "clean_up": ["pad"]}):
        first = bnfold.fold(law(CASES["gamma 0"][0]), **options)
        first.record.save(path)
        assert load_record(path).choices == first.record.choices
    streams = load(path.read_bytes())
    facts = json.loads(zlib.decompress(streams["facts"].tobytes()))
    assert facts.pop("choices")["repairs"] == ["border"]
    streams["facts"] = np.frombuffer(zlib.compress(json.dumps(facts).encode()), np.uint8)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    path.write_bytes(save(streams, metadata=metadata))
    assert load_record(path).choices is None


def test_a_norm_that_cannot_go_any_more_stays_with_a_note():
    """Behind a Relu a shift passes a padded convolution only while it is 0 on every channel."""
    text = f"x[4,4,4,4] > y; r = Relu(x); b = BN4:alt(r); {PADDED}"
    model = graph.parse_onnx(law(text).SerializeToString())
    name, norm = next(iter(norms.norms_of(model).items()))
    norm.nodes[0].inputs[2].const_value = ir.tensor(np.zeros(4, np.float32), name="beta")
    var = norm.layer.source.var
    no_shift = norms.with_statistics(model, {name: Statistics(np.zeros(4), var)})
    first = bnfold.fold(graph.to_proto(no_shift))
    assert [n.name for n in first.folded] == [name]
    again = refold(first.graph, first.record, {name: Statistics(np.ones(4), var)})
    assert not again.folded
    assert "1 of the 1 batch norms that were folded stay with these statistics" in again.notes[0]
    assert f"the first is '{name}'" in again.notes[0]
    again.verify().raise_for_failure()
    assert graph.to_bytes(again.graph) == graph.to_bytes(again.original)


def test_one_that_stayed_stays_though_it_could_go_now():
    text = (
        "x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); a = BN4:tla(c); r = Relu(a); b = BN4:alt(r);"
        f" {PADDED}"
    )
    model = graph.parse_onnx(law(text, 2).SerializeToString())
    found = list(norms.norms_of(model).values())
    behind = found[1]
    behind.nodes[0].inputs[2].const_value = ir.tensor(np.zeros(4, np.float32), name="beta")
    first = bnfold.fold(graph.to_proto(model))
    assert [n.name for n in first.folded] == [found[0].layer.name]
    statistics = {behind.layer.name: Statistics(np.zeros(4), behind.layer.source.var)}
    again = refold(first.graph, first.record, statistics)
    assert [n.name for n in again.folded] == [found[0].layer.name]
    free = bnfold.fold(graph.to_proto(again.original))
    assert len(free.folded) == 2


def test_statistics_that_do_not_fit_are_refused():
    first = bnfold.fold(with_statistics(digits_cnn()), DIGIT)
    statistics = moved(first.original)
    name, good = next(iter(statistics.items()))
    for bad, word in (
        ({"nobody": good}, "nobody"),
        ({name: Statistics(good.mean * 1e300, good.var)}, name),
        ({name: Statistics(good.mean[:3], good.var[:3])}, name),
    ):
        with pytest.raises((InputError, UsageError), match=word):
            refold(first.model, first.record, bad)
        with pytest.raises((InputError, UsageError), match=word):
            refold(first.graph, first.record, bad)
    with pytest.raises(InputError, match="cannot hold"):
        state_with(first.source.state_dict, {name: Statistics(good.mean * 1e300, good.var)})


def test_a_folded_network_that_is_not_the_records_is_refused():
    first = bnfold.fold(with_statistics(digits_cnn()), DIGIT)
    changed = copy.deepcopy(first.model)
    changed.conv1.weight.data[2] += 1e-3
    with pytest.raises(InputError, match="another one's, or damaged"):
        refold(changed, first.record, moved(first.original))


def test_a_wrong_statistic_would_be_seen():
    """The proof is against the adapted network: one mean that differs fails it."""
    first = bnfold.fold(with_statistics(digits_cnn()), DIGIT)
    statistics = moved(first.original)
    again = refold(first.graph, first.record, statistics)
    name, right = next(iter(statistics.items()))
    mean = right.mean.copy()
    mean[1] += 0.05
    back = bnfold.unfold(first.graph, first.record)
    wrong = fold_again(back, {**statistics, name: Statistics(mean, right.var)})
    report = bnfold.verify(again.original, wrong.graph, record=wrong.record)
    assert not report.passed
    assert {gate.gate for gate in report.gates if not gate.passed} >= {"A", "B"}


# --- float16 --------------------------------------------------------------------------------------


def half_errors(module, x, statistics):
    """Relative error of the outputs, float64 arithmetic on float16 folded weights, three ways."""
    exact = copy.deepcopy(module)
    set_statistics(exact, statistics)
    base = bnfold.fold(module, x, writeback="class")
    from_float32 = refold(base.model, base.record, statistics).model.half()
    low = bnfold.fold(copy.deepcopy(module).half(), x.half(), writeback="class")
    from_float16 = refold(low.model, low.record, statistics)
    straight = copy.deepcopy(module).half()
    set_statistics(straight, statistics)
    assert same_state(
        from_float16.model.state_dict(),
        bnfold.fold(straight, x.half(), writeback="class").model.state_dict(),
    )
    images = torch.randn(64, *x.shape[1:], dtype=torch.float64)
    with torch.no_grad():
        right = copy.deepcopy(exact).double()(images)
        return [
            float(
                (
                    (copy.deepcopy(net).double()(images) - right).norm(dim=1) / right.norm(dim=1)
                ).median()
            )
            for net in (from_float32, from_float16.model)
        ]


def test_float16_from_a_float32_base_is_nearer():
    torch.manual_seed(0)
    module = with_statistics(digits_cnn(), positive=True)
    statistics = moved(bnfold.fold(module, DIGIT).original)
    from_float32, from_float16 = half_errors(module, DIGIT, statistics)
    assert from_float32 < from_float16 < 5e-3


def test_float16_graphs_are_what_adapting_before_the_fold_gives():
    proto = law(CASES["gamma 0"][0], dtype=TensorProto.FLOAT16)
    first = bnfold.fold(proto)
    statistics = moved(first.original)
    again = refold(first.model, first.record, statistics)
    adapted = norms.with_statistics(first.original, statistics)
    assert again.model == bnfold.fold(graph.to_proto(adapted)).model


# --- a real network -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "mnist_resnet", "dncnn"])
def test_a_real_network(shared_data, name):
    module = realdata.load_model(shared_data, name)
    shape = {"resnet20": (1, 3, 32, 32), "mnist_resnet": (1, 1, 28, 28), "dncnn": (1, 1, 40, 40)}
    x = torch.zeros(shape[name])
    first = bnfold.fold(module, x)
    statistics = moved(first.original)
    again = refold(first.model, first.record, statistics)
    set_statistics(module, statistics)
    straight = bnfold.fold(module, x)
    assert same_state(again.model.state_dict(), straight.model.state_dict())
    assert graph.to_bytes(again.graph) == graph.to_bytes(straight.graph)
    again.verify().raise_for_failure()
