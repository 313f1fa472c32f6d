"""Every variant of batch norm becomes plain weights, and the gates say so."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

import bnfold
from bnfold.folding.constants import constant
from bnfold.folding.module import load_folded
from bnfold.graph import to_proto
from bnfold.norm import KINDS, convert
from bnfold.norm.batch import MeanOnlyBatchNorm
from bnfold.outputs import writer_of
from bnfold.training.checkpoint import save_checkpoint
from tests import folding
from tests.nets import agree

RANKS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.MaxPool1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, nn.MaxPool3d),
}


def sequential(rank: int) -> nn.Module:
    """Padded, grouped and transposed convolutions, a pooling in between."""
    conv, transposed, norm, pool = RANKS[rank]
    return nn.Sequential(
        *(conv(2, 4, 3, padding=1, bias=False), norm(4), nn.ReLU()),
        *(conv(4, 8, 3, padding=1, groups=2), norm(8), nn.ReLU(), pool(2)),
        *(transposed(8, 6, 2, stride=2, groups=2), norm(6), nn.ReLU()),
        conv(6, 3, 3, padding=2, dilation=2),
    )


class Residual(nn.Module):
    """A stem and one block with a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(4), nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4), nn.ReLU()
        self.head = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.head(self.relu2(x + y))


def linear() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()),
        nn.Linear(8, 3),
    )


NETS = {
    "1d": (lambda: sequential(1), (2, 10)),
    "2d": (lambda: sequential(2), (2, 6, 8)),
    "3d": (lambda: sequential(3), (2, 4, 6, 4)),
    "residual": (Residual, (2, 5, 7)),
    "linear": (linear, (6,)),
}
# those whose layers depend on the rank are tried on all nets
EVERYWHERE = ("renorm", "mean-only", "weight-mean-only", "normprop")
CASES = [(k, n) for k in KINDS for n in NETS if k in EVERYWHERE or n in ("2d", "residual")]


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, affine parameters and biases as training could leave them, in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for part in net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            draw(part.running_mean, -1, 1)
            if not isinstance(part, MeanOnlyBatchNorm):
                draw(part.running_var, 0.3, 3)
            if part.weight is not None:
                draw(part.weight, -1.5, 1.5)
        if isinstance(getattr(part, "bias", None), torch.Tensor):
            draw(part.bias, -1, 1)
    return net.eval()


def variant(kind: str, net: str = "2d", seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A network of this kind, and inputs for it."""
    torch.manual_seed(seed)
    build, shape = NETS[net]
    return randomised(convert(build(), kind), seed), torch.randn(3, *shape)


def normalising(graph: ir.Model) -> list[str]:
    """The batch norms of a graph, and what it multiplies or adds by constants."""
    found = []
    for node in graph.graph:
        by_constant = any(constant(value) is not None for value in node.inputs)
        if node.op_type == "BatchNormalization":
            found.append(node.op_type)
        if node.op_type in ("Add", "Sub", "Mul", "Div") and by_constant:
            found.append(node.op_type)
    return found


def on_onnxruntime(graph: ir.Model, x: torch.Tensor) -> torch.Tensor:
    proto = to_proto(graph)
    return torch.from_numpy(
        next(iter(folding.run(proto, {proto.graph.input[0].name: x.numpy()}).values()))
    )


@pytest.mark.parametrize(("kind", "net"), CASES)
def test_a_variant_becomes_plain_weights_of_its_own_class(kind: str, net: str) -> None:
    module, x = variant(kind, net)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = bnfold.fold(module, x)
    assert type(result.model) is type(module)
    assert normalising(result.graph) == []
    assert not any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) or hasattr(part, "parametrizations")
        for part in result.model.modules()
    )
    report = result.verify()
    assert report.passed, [gate.sentence for gate in report.gates if not gate.passed]
    assert {gate.gate for gate in report.gates} == {"A", "B", "C"}
    assert max(g.value for g in report.gates if g.name == "error ratio") <= 4
    assert agree(module, result.model, x)
    torch.testing.assert_close(on_onnxruntime(result.graph, x), module(x), rtol=1e-4, atol=1e-5)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), f"folding changed {name}"


@pytest.mark.parametrize("kind", ["batch", "renorm", "mean-only", "weight-mean-only", "normprop"])
def test_the_gates_find_one_wrong_number(kind: str) -> None:
    module, x = variant(kind)
    result = bnfold.fold(module, x)
    assert result.verify().passed
    weight = result.model.get_parameter("3.weight").data
    weight[1, 0, 0, 0] += 1e-3 * weight.abs().max()
    assert not result.verify().passed, "gate C runs the torch module, of which a weight is wrong"


def test_a_relu_without_its_floor_is_found() -> None:
    module, x = variant("normprop")
    result = bnfold.fold(module, x)
    (name, *_) = [n for n, part in result.model.named_modules() if isinstance(part, nn.Hardtanh)]
    setattr(result.model, name, nn.ReLU())
    assert not result.verify().passed


def test_normprop_needs_no_other_operators_than_its_network() -> None:
    module, x = variant("normprop", "residual")
    result = bnfold.fold(module, x)
    operators = bnfold.api.count_operators(result.graph)
    assert operators == {"Conv": 4, "Clip": 3, "Add": 1}, operators


def with_normalised_input(channels_alike: bool) -> nn.Module:
    norm = nn.BatchNorm2d(2, affine=False)
    net = randomised(nn.Sequential(norm, *convert(sequential(2), "normprop")))
    if channels_alike:
        norm.running_mean.fill_(0.75)
        norm.running_var.fill_(2.0)
    return net


def test_an_input_of_one_mean_and_deviation_is_a_pad_in_front() -> None:
    net, x = with_normalised_input(channels_alike=True), torch.randn(3, 2, 6, 8)
    result = bnfold.fold(net, x)
    assert result.verify().passed
    assert normalising(result.graph) == []
    assert bnfold.api.count_operators(result.graph)["Pad"] == 1
    assert agree(net, result.model, x)
    assert agree(net, result.model, torch.randn(5, 2, 6, 8)), "the batch is free"
    for other in (pickle.loads(pickle.dumps(result.model)), copy.deepcopy(result.model)):
        assert torch.equal(other(x), result.model(x))
    alone = bnfold.fold(net, x, writeback="class")
    assert [kept.name for kept in alone.kept] == ["0"]
    assert alone.verify().passed


def test_an_input_of_several_means_keeps_its_norm_unless_a_border_map_is_asked_for() -> None:
    net, x = with_normalised_input(channels_alike=False), torch.randn(3, 2, 6, 8)
    assert [kept.name for kept in bnfold.fold(net, x).kept] == ["0"]
    asked = bnfold.fold(net, x, repair=("border",), writeback="graph")
    assert not asked.kept
    assert asked.verify().passed
    assert agree(net, asked.model, x)


@pytest.mark.parametrize("act", [nn.Tanh, nn.LeakyReLU, nn.Sigmoid])
def test_the_constants_of_other_activations_go_with_a_pad(act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), act(), nn.Conv2d(4, 4, 3, padding=1), act()]
    net = randomised(convert(nn.Sequential(*layers, nn.Conv2d(4, 3, 1)), "normprop"))
    x = torch.randn(2, 2, 6, 5)
    assert normalising(bnfold.fold(net, x).graph) == ["Sub"]
    asked = bnfold.fold(net, x, repair=("pad",), writeback="graph")
    assert normalising(asked.graph) == []
    assert asked.verify().passed
    assert agree(net, asked.model, x)


def test_relu6_gets_other_bounds() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3, padding=1), nn.ReLU6(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU6())
    net = randomised(convert(nn.Sequential(*layers, nn.Conv2d(4, 3, 3, padding=1)), "normprop"))
    x = 9 * torch.randn(2, 2, 6, 5)
    result = bnfold.fold(net, x)
    assert type(result.model) is nn.Sequential
    assert normalising(result.graph) == []
    assert result.verify().passed
    assert agree(net, result.model, x)
    first = result.model[1]
    assert isinstance(first, nn.Hardtanh)
    assert first.max_val - first.min_val == pytest.approx(6, rel=1e-6)  # shifted, not scaled


# --- files ----------------------------------------------------------------------------------------


class _NoArguments:
    factory = None


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["renorm", "mean-only", "weight", "frozen", "normprop"])
def test_a_folded_file_loads_into_a_new_network_of_the_class(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    module, x = variant(kind)
    result = bnfold.fold(module, x)
    path = tmp_path / f"net{suffix}"
    writer_of(path, _NoArguments, result, result.source)(path)  # type: ignore[arg-type]
    fresh = load_folded(convert(sequential(2), kind), path)
    assert torch.equal(fresh(x), result.model(x))
    assert torch.equal(pickle.loads(pickle.dumps(fresh))(x), result.model(x))
    assert torch.equal(copy.deepcopy(fresh)(x), result.model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_a_variant_needs_no_model(tmp_path: Path, kind: str) -> None:
    module, x = variant(kind)
    path = tmp_path / "net.pt"
    save_checkpoint(path, module, model_spec=None, example_input=x, metrics={})
    convert(sequential(2), kind).load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    result = bnfold.fold(path)
    assert normalising(result.graph) == []
    assert result.verify().passed
    assert result.state_dict is not None
    assert not [name for name in result.state_dict if "parametrizations" in name]
    torch.testing.assert_close(on_onnxruntime(result.graph, x), module(x), rtol=1e-4, atol=1e-5)
    written = tmp_path / "folded.pt"
    writer_of(written, _NoArguments, result, result.source)(written)  # type: ignore[arg-type]
    fresh = load_folded(convert(sequential(2), kind), written)
    assert agree(module, fresh, x)


def test_a_computed_weight_follows_the_tensors_not_the_graph(tmp_path: Path) -> None:
    module, x = variant("weight")
    save_checkpoint(tmp_path / "a.pt", module, model_spec=None, example_input=x, metrics={})
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["state_dict"]["0.parametrizations.weight.original0"] *= 2
    torch.save(content, tmp_path / "b.pt")
    one, two = (bnfold.fold(tmp_path / f"{name}.pt").state_dict for name in "ab")
    assert one is not None
    assert two is not None
    torch.testing.assert_close(two["0.weight"], 2 * one["0.weight"])


# --- adapting -------------------------------------------------------------------------------------


def batches(seed: int, shift: float = 0.0, size: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(8, 2, 6, 8, generator=generator) + shift for _ in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mean-only", "weight-mean-only"])
def test_a_mean_only_batch_norm_adapts_by_its_mean_on_every_target(kind: str) -> None:
    module, x = variant(kind)
    target = batches(5, 0.5, 2.0)
    adapted = bnfold.adapt(module, target)
    # told in the target's own deviations: its variance is no statistic that could be missed
    assert not [said for said in adapted.warnings if "does not see" in said]
    assert all(0 <= layer.kl_after < 1e-6 < layer.kl_before for layer in adapted.layers)
    for name, part in adapted.model.named_modules():
        if isinstance(part, MeanOnlyBatchNorm):
            before = module.get_submodule(name)
            assert torch.equal(part.running_var, torch.ones_like(part.running_var))
            assert not torch.equal(part.running_mean, before.running_mean)
    # by itself: each layer's mean over the whole set, the layers before it adapted
    whole, seen = torch.cat(target).double(), {}
    exact = copy.deepcopy(adapted.model).double()

    def look(name: str, x: torch.Tensor) -> None:
        seen[name] = x.transpose(0, 1).flatten(1).mean(1)

    for name, part in exact.named_modules():
        if isinstance(part, MeanOnlyBatchNorm):
            part.register_forward_pre_hook(lambda _m, args, n=name: look(n, args[0]))
    exact(whole)
    for name, mean in seen.items():
        found = adapted.model.get_submodule(name).running_mean.double()
        torch.testing.assert_close(found, mean, rtol=0, atol=1e-5)
    graph = bnfold.adapt(bnfold.export(module, x), [{"input": b.numpy()} for b in target])
    torch.testing.assert_close(
        on_onnxruntime(graph.model, x), adapted.model(x), rtol=1e-4, atol=1e-5
    )
    folded = bnfold.fold(module, x)
    again = bnfold.adapt(folded.model, target, record=folded.record)
    torch.testing.assert_close(again.model(x), adapted.model(x), rtol=1e-4, atol=1e-5)
    afterwards = bnfold.fold(adapted.model, x).model.state_dict()
    for name, tensor in again.model.state_dict().items():
        torch.testing.assert_close(tensor, afterwards[name], rtol=1e-5, atol=1e-5)


def test_an_ordinary_batch_norm_of_variance_1_still_gets_the_targets() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2)).eval()  # eps is not 0: its variance is a statistic
    found = bnfold.adapt(net, batches(1, size=3.0)).model[0].running_var
    assert float(found.min()) > 5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["renorm", "mean-only"])
def test_matched_to_the_source_nothing_changes_on_the_source(kind: str) -> None:
    """The calibrated mode: batch renorm's deviations are averages over small batches, and stay."""
    torch.manual_seed(0)
    net = convert(sequential(2), kind).train()
    for batch in batches(1):
        for part in batch.split(2):
            net(part)
    net.eval()
    source, target = batches(2), batches(3, 0.5, 2.0)
    x = source[0]
    plain = bnfold.adapt(net, source).model(x)
    matched = bnfold.adapt(net, source, source_data=source).model(x)
    size = float(net(x).abs().max())
    assert float((plain - net(x)).abs().max()) > 1e-2 * size
    assert float((matched - net(x)).abs().max()) < 1e-4 * size
    moved = bnfold.adapt(net, target, source_data=source).model
    shifted = torch.cat(target)
    assert not torch.equal(moved(shifted), net(shifted))
    # behind the first layer the target has the mean and deviation that the source had there
    there, here = net[:2](torch.cat(source)), moved[:2](shifted)
    torch.testing.assert_close(here.mean((0, 2, 3)), there.mean((0, 2, 3)), rtol=0, atol=1e-4)
    if kind == "renorm":
        torch.testing.assert_close(here.std((0, 2, 3)), there.std((0, 2, 3)), rtol=1e-4, atol=0)
    folded = bnfold.fold(moved, x)
    assert folded.verify().passed
    assert agree(moved, folded.model, x)
