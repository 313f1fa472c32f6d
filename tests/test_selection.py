"""--keep and --only: the user's word on each batch norm, and nothing about a kept one changes."""

import numpy as np
import pytest
import torch
from nets import with_statistics
from torch import nn

import bnfold
from bnfold import graph
from bnfold.cli import main
from bnfold.errors import UsageError
from bnfold.folding.network import Network
from bnfold.folding.rules import relations_of
from bnfold.folding.rules.normalization import bypass
from bnfold.folding.selection import Selection
from models.resnet_cifar import ResNetCifar

IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def resnet():
    """7 batch norms: bn1 and two in each of layer1.0, layer2.0, layer3.0."""
    return with_statistics(ResNetCifar(1, 10, 3, 16))


class TwoReaders(nn.Module):
    """Two batch norms read one value: where one goes, its shift moves what the other reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        one, two = torch.relu(self.bn1(x)), torch.relu(self.bn2(x))
        return self.conv1(one) + self.conv2(two)


@pytest.fixture(scope="module")
def two_readers():
    return with_statistics(TwoReaders(), positive=True)


def names(norms):
    return {norm.name for norm in norms}


def parameters(module, norm):
    return {k: v for k, v in module.state_dict().items() if k.startswith(f"{norm}.")}


def check_untouched(module, result):
    """The parameters of every kept batch norm are as they were, in the module and in the graph."""
    before = result.original.graph.initializers
    after = result.graph.graph.initializers
    for kept in result.kept:
        for key, tensor in parameters(module, kept.name).items():
            assert torch.equal(tensor, result.model.state_dict()[key])
            if key in before:
                assert np.array_equal(
                    before[key].const_value.numpy(), after[key].const_value.numpy()
                )


def test_kept_batch_norms_stay_untouched_and_the_others_go(resnet):
    result = bnfold.fold(resnet, IMAGE, keep=["layer2.*", "bn1"])
    assert names(result.kept) == {"bn1", "layer2.0.bn1", "layer2.0.bn2"}
    assert len(result.folded) == 4
    assert {kept.reason for kept in result.kept} == {
        "you asked to keep it as it is (keep layer2.*)",
        "you asked to keep it as it is (keep bn1)",
    }
    check_untouched(resnet, result)
    result.verify().raise_for_failure()


def test_only_these_go_and_the_others_stay_untouched(resnet):
    result = bnfold.fold(resnet, IMAGE, only=["layer3.0.bn?", "bn1"], keep=["layer3.0.bn2"])
    assert names(result.folded) == {"layer3.0.bn1", "bn1"}
    reasons = {kept.name: kept.reason for kept in result.kept}
    assert "keep layer3.0.bn2" in reasons["layer3.0.bn2"]
    assert reasons["layer1.0.bn1"] == "you asked to fold others only (only layer3.0.bn?, bn1)"
    check_untouched(resnet, result)
    result.verify().raise_for_failure()


def test_nothing_moves_what_a_kept_batch_norm_reads(two_readers):
    result = bnfold.fold(two_readers, IMAGE, keep=["bn1"])
    reasons = {norm.name: norm.reason for norm in result.kept}
    assert "keep bn1" in reasons["bn1"]
    assert "it is to stay as it is" in reasons["bn2"]
    check_untouched(two_readers, result)


def test_a_kept_batch_norm_that_absorbs_a_shift_is_seen(two_readers, monkeypatch):
    """A selection that only spares the batch norm from folding lets its neighbour rewrite it."""
    monkeypatch.setattr(Network, "_ask", _ask_without_hold)
    result = bnfold.fold(two_readers, IMAGE, keep=["bn1"])
    assert names(result.folded) == {"bn2"}
    with pytest.raises(AssertionError):
        check_untouched(two_readers, result)


def _ask_without_hold(network, node):
    if node in network.gone:
        m = network.map_of(node)
        return bypass(m.x, m.y, m.affine)
    return relations_of(node)


def test_inspect_takes_the_same_selection(resnet):
    found = bnfold.inspect(resnet, IMAGE, only=["layer1.*"])
    assert len(found.folded) == 2
    assert len(found.kept) == 5


def test_nodes_are_known_by_their_own_names_too(resnet):
    model = graph.to_proto(bnfold.export(resnet, IMAGE))
    node = next(n for n in model.graph.node if n.op_type == "BatchNormalization")
    result = bnfold.fold(model, keep=[node.name])
    assert [kept.name for kept in result.kept] == ["bn1"]


def test_a_name_with_brackets_is_meant_as_it_stands():
    net = with_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    node = next(n for n in bnfold.export(net, IMAGE).graph if n.op_type == "BatchNormalization")
    node.inputs[3].name = "blocks[0].running_mean"
    assert Selection(keep=("blocks[0]",)).held([node])
    assert Selection(keep=("blocks[[]0]",)).held([node])


def test_a_pattern_without_a_batch_norm_is_refused_with_near_names(resnet, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"'layer1.0.bn3'.*Near names: layer1.0.bn"):
        bnfold.fold(resnet, IMAGE, keep=["layer1.0.bn3"])
    with pytest.raises(UsageError, match="lists of patterns"):
        bnfold.fold(resnet, IMAGE, keep="bn1")
    path = tmp_path / "net.onnx"
    bnfold.export(resnet, IMAGE, path)
    assert main(["fold", str(path), "--only", "layer9.*"]) == 2
    assert "No batch norm is called 'layer9.*'. Near names: layer" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    bare = bnfold.export(nn.Sequential(nn.Conv2d(3, 3, 1)), IMAGE)
    with pytest.raises(UsageError, match="the model has none"):
        bnfold.fold(bare, keep=["*"])


def test_the_command_line_says_who_wanted_it(resnet, tmp_path, capsys):
    path = tmp_path / "net.onnx"
    bnfold.export(resnet, IMAGE, path)
    assert main(["fold", str(path), "--keep", "layer1.*", "--keep", "bn1"]) == 0
    out = capsys.readouterr().out
    assert "4 of 7 batch norms folded" in out
    assert "you asked to keep it as it is (keep layer1.*)" in out
    assert main(["inspect", str(path), "--only", "layer1.*"]) == 0
    assert "2 of 7 batch norms fold exactly" in capsys.readouterr().out
