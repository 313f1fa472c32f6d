"""Unfolding: the network that was folded comes back bit for bit, or not at all."""

from __future__ import annotations

import copy
import json
import zlib

import numpy as np
import onnx
import pytest
import realdata
import torch
from nets import with_statistics
from odd_nets import Frozen, Pair
from onnx import numpy_helper
from safetensors.numpy import load, save
from torch import nn

import bnfold
from bnfold import bare, graph
from bnfold.cli import main
from bnfold.errors import BnfoldError, InputError, UsageError
from bnfold.folding.record import SCHEMA, load_record
from bnfold.folding.torch_undo import arrays_of, tensors_of
from bnfold.folding.undo import original_state
from models.digits import digits_cnn
from models.mobilenet_v2 import mobilenet_v2
from models.preact_resnet import PreActResNet
from models.resnet_cifar import ResNetCifar
from tests import folding
from tests.law_models import Law, build

SPEC = "models/digits.py:digits_cnn"
DIGIT = torch.zeros(1, 1, 8, 8)
RECORD = "net.folded.record.safetensors"


def same_state(a, b):
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


# --- graphs ---------------------------------------------------------------------------------------


def unfolded(proto, tmp_path, **options):
    """Fold, write record and model, read both, unfold."""
    result = bnfold.fold(proto, **options)
    result.record.save(tmp_path / "r.safetensors")
    graph.write_onnx(result.graph, tmp_path / "folded.onnx")
    return result, bnfold.unfold(tmp_path / "folded.onnx", tmp_path / "r.safetensors")


def law(text, removed=1, **options):
    return build(Law("unfold", "", text, removed, **options))


CASES = {
    "a convolution": "x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); y = BN4:alt(c)",
    "gamma 0": "x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); b = BN4:alt0(c); r = Relu(b);"
    " y = Conv(r, V[8,4,1,1])",
    "no gamma but 0": "x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); y = BN4:all0(c)",
    "forward": "x[4,4,4,4] > y; r = Relu(x); b = BN4:alt(r); y = Conv(b, V[8,4,3,3])",
    "a product without a bias": "x[4,8] > y; c = MatMul(x, W[8,4]); y = BN4:alt(c)",
    "a weight of two readers": "x[4,4,4,4] > y; c = Conv(x, W[4,4,1,1]); b = BN4:alt(c);"
    " d = Conv(b, W); e = BN4:tla(d); y = Sigmoid(e)",
    "groups": "x[4,8,4,4] > y; r = Relu(x); b = BN8(r); c = Conv<group=4>(b, W[8,2,3,3]);"
    " y = BN8:neg(c)",
    "a graph output in the middle": "x[4,4,4,4] > b y; c = Conv(x, W[4,4,3,3]); b = BN4(c);"
    " y = Sigmoid(b)",
}


@pytest.mark.parametrize("nodes", [False, True], ids=["initializers", "constant nodes"])
@pytest.mark.parametrize("name", CASES)
def test_a_graph_comes_back_bit_for_bit(tmp_path, name, nodes):
    proto = law(CASES[name], nodes=nodes)
    result, back = unfolded(proto, tmp_path)
    assert result.folded
    assert graph.to_bytes(back.graph) == graph.to_bytes(result.original)
    assert {norm.name for norm in back.norms} == {norm.name for norm in result.folded}
    again = bnfold.fold(graph.to_proto(back.graph))
    assert graph.to_bytes(again.graph) == graph.to_bytes(result.graph)
    back.verify().raise_for_failure()


def test_a_batch_norm_comes_back_with_all_it_had(tmp_path):
    proto = law(CASES["a convolution"])
    node = next(n for n in proto.graph.node if n.op_type == "BatchNormalization")
    node.attribute.append(onnx.helper.make_attribute("momentum", 0.25))
    node.name = "my norm"
    _, back = unfolded(proto, tmp_path)
    restored = next(
        n for n in graph.to_proto(back.graph).graph.node if n.op_type == "BatchNormalization"
    )
    assert list(restored.attribute) == list(node.attribute)
    assert (restored.name, restored.input, restored.output) == (node.name, node.input, node.output)


@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE])
def test_other_types_come_back(tmp_path, kind):
    proto = law(CASES["gamma 0"], dtype=kind)
    result, back = unfolded(proto, tmp_path)
    assert result.folded
    assert graph.to_bytes(back.graph) == graph.to_bytes(result.original)


def test_a_repair_and_absorbed_arithmetic_are_undone(tmp_path):
    text = (
        "x[4,4,4,4] > y; m = Mul(x, W:pow[4,1,1]); a = Conv(m, V[4,4,3,3]); r = Relu(a);"
        " b = BN4:alt(r); y = Conv<pads=[1,1,1,1]>(b, U[4,4,3,3])"
    )
    result, back = unfolded(law(text), tmp_path, repair=["border"])
    assert result.folded
    assert result.absorbed
    assert graph.to_bytes(back.graph) == graph.to_bytes(result.original)


def test_external_data_come_back(tmp_path):
    proto = law(CASES["gamma 0"])
    path = tmp_path / "net.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="net.bin", size_threshold=0)
    original = graph.to_bytes(graph.read_onnx(path))
    assert main(["fold", str(path), "--no-verify"]) == 0
    assert main(["unfold", str(tmp_path / "net.folded.onnx")]) == 0
    assert graph.to_bytes(graph.read_onnx(tmp_path / "net.unfolded.onnx")) == original


def test_models_in_memory_give_their_own_type_back():
    proto = law(CASES["gamma 0"])
    result = bnfold.fold(proto)
    back = bnfold.unfold(result.model, result.record)
    assert isinstance(back.model, onnx.ModelProto)
    assert graph.to_bytes(bnfold.unfold(result.graph, result.record).model) == graph.to_bytes(
        result.original
    )
    with pytest.raises(UsageError, match="needs the record"):
        bnfold.unfold(result.model)
    with pytest.raises(UsageError, match="this is a int"):
        bnfold.unfold(3, result.record)


# --- torch ----------------------------------------------------------------------------------------

NETWORKS = {
    "digits": (digits_cnn, DIGIT),
    "resnet": (lambda: ResNetCifar(1, 10, 3, 16), torch.zeros(1, 3, 8, 8)),
    "preact": (lambda: PreActResNet((2,), (8,), 10, 3), torch.zeros(1, 3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_module_comes_back(name):
    factory, x = NETWORKS[name]
    module = with_statistics(factory(), positive=name == "preact")
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.momentum, child.num_batches_tracked = None, torch.tensor(7)
    state = copy.deepcopy(module.state_dict())
    result = bnfold.fold(module, x)
    assert result.folded
    folded_state = copy.deepcopy(result.model.state_dict())
    back = bnfold.unfold(result.model, result.record, example_inputs=x)
    assert type(back.model) is type(module)
    assert repr(back.model) == repr(module)
    assert same_state(back.model.state_dict(), state)
    assert same_state(result.model.state_dict(), folded_state)
    back.verify().raise_for_failure()
    again = bnfold.fold(back.model, x)
    assert same_state(again.model.state_dict(), folded_state)


def test_the_record_is_of_the_weights_that_were_folded():
    """The caller's module may go on training."""
    module = with_statistics(digits_cnn())
    state = copy.deepcopy(module.state_dict())
    result = bnfold.fold(module, DIGIT)
    in_graph = bnfold.fold(module, DIGIT, repair=["border"])
    folded = graph.parse_onnx(graph.to_bytes(in_graph.graph))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert same_state(bnfold.unfold(result.model, result.record).model.state_dict(), state)
    held = bnfold.unfold(folded, in_graph.record).graph.graph.initializers
    for name in ("fc1.weight", "fc2.bias", "bn1.weight", "bn1.running_var"):
        assert np.array_equal(held[name].const_value.numpy(), state[name].numpy())


def test_a_module_that_was_changed_is_refused():
    result = bnfold.fold(with_statistics(digits_cnn()), DIGIT)
    with pytest.raises(UsageError, match="example_inputs"):
        bnfold.unfold(result.model, result.record).verify()
    for change, word in (
        (lambda m: next(m.parameters()).data.add_(1e-3), "changed since"),
        (lambda m: setattr(m, _first_identity(m), nn.ReLU()), "no Identity"),
    ):
        module = copy.deepcopy(result.model)
        change(module)
        with pytest.raises(InputError, match=word):
            bnfold.unfold(module, result.record)
    other = bnfold.fold(with_statistics(ResNetCifar(1, 10, 3, 16)), torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError):
        bnfold.unfold(other.model, result.record)


def test_a_norm_of_the_users_own_class_is_not_built_as_another():
    """Its state_dict comes back as it was; the module only from its own factory."""
    module = with_statistics(Pair(Frozen(4)))
    result = bnfold.fold(module, torch.randn(2, 3, 6, 6))
    assert result.folded
    with pytest.raises(InputError, match="'bn' was a Frozen, which cannot be built anew"):
        bnfold.unfold(result.model, result.record)
    arrays, _ = original_state(result.record.undo, arrays_of(result.state_dict))
    assert same_state(tensors_of(arrays), module.state_dict())


def _first_identity(module):
    return next(name for name, child in module.named_children() if type(child) is nn.Identity)


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """net.pt folded to every format, net.onnx as it was exported, with one record."""
    made = tmp_path_factory.mktemp("folded")
    module = with_statistics(digits_cnn())
    torch.save(module.state_dict(), made / "net.pt")
    outputs = [f"-o{made / f'net.folded{end}'}" for end in (".onnx", ".pt", ".safetensors")]
    assert (
        main(["fold", str(made / "net.pt"), "--model", SPEC, "--input-shape", "1,1,8,8", *outputs])
        == 0
    )
    return made


@pytest.fixture
def net(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_each_format_unfolds_with_proof(net, capsys):
    original = torch.load(net / "net.pt")
    for name, options in (
        ("net.folded.onnx", ()),
        ("net.folded.pt", ()),
        ("net.folded.safetensors", ("--model", SPEC, "--input-shape", "1,1,8,8")),
    ):
        code, out, err = run(capsys, "unfold", net / name, *options)
        assert code == 0, err
        assert "4 batch norms are back, every weight the original's bit for bit" in out
        assert "Proved by gates" in out
    checkpoint = torch.load(net / "net.unfolded.pt", weights_only=True)
    assert same_state(checkpoint["state_dict"], original)
    digits_cnn().load_state_dict(checkpoint["state_dict"])
    from safetensors.torch import load_file

    loaded = load_file(net / "net.unfolded.safetensors")
    assert same_state({name: loaded[name] for name in original}, original)
    exported = onnx.load(net / "net.unfolded.onnx")
    held = {t.name: numpy_helper.to_array(t) for t in exported.graph.initializer}
    for name, tensor in original.items():
        assert name.endswith("num_batches_tracked") or np.array_equal(held[name], tensor.numpy())


def test_an_unfolded_checkpoint_folds_again_to_the_same_bits(net, capsys):
    assert run(capsys, "unfold", net / "net.folded.pt")[0] == 0
    assert run(capsys, "fold", net / "net.unfolded.pt", "-o", net / "again.pt")[0] == 0
    first, again = (torch.load(net / name)["state_dict"] for name in ("net.folded.pt", "again.pt"))
    assert same_state(dict(sorted(first.items())), dict(sorted(again.items())))


def test_with_a_factory_the_modules_are_run_too(net, capsys):
    code, out, _ = run(capsys, "unfold", net / "net.folded.pt", "--model", SPEC, "--json")
    subjects = [gate["subject"] for gate in json.loads(out)["gates"]]
    assert code == 0
    assert any("torch, original module" in subject for subject in subjects)
    assert any("torch, folded module" in subject for subject in subjects)


def test_a_file_that_bnfold_wrote_comes_back_byte_for_byte(net, capsys):
    plain = net / "plain.onnx"
    graph.write_onnx(graph.read_onnx(net / "net.folded.onnx"), plain)
    module = with_statistics(digits_cnn(), seed=3)
    bnfold.export(module, DIGIT, net / "own.onnx")
    assert run(capsys, "fold", net / "own.onnx", "--keep", "*1")[0] == 0
    code, out, _ = run(capsys, "unfold", net / "own.folded.onnx", "-o", net / "mine.onnx")
    assert code == 0
    assert "byte for byte" in out
    assert (net / "mine.onnx").read_bytes() == (net / "own.onnx").read_bytes()


def damaged(record, change):
    about, streams = _opened(record)
    change(about, streams)
    packed = {k: np.frombuffer(zlib.compress(v), np.uint8) for k, v in streams.items()}
    record.write_bytes(save(packed, metadata={"bnfold": json.dumps(about)}))


def _opened(record):
    size = int.from_bytes(record.read_bytes()[:8], "little")
    about = json.loads(json.loads(record.read_bytes()[8 : 8 + size])["__metadata__"]["bnfold"])
    return about, {k: zlib.decompress(v.tobytes()) for k, v in load(record.read_bytes()).items()}


def change_facts(change):
    def changed(_about, streams):
        facts = json.loads(streams["facts"])
        change(facts)
        streams["facts"] = json.dumps(facts).encode()

    return changed


def flipped(name, at=40):
    def changed(_about, streams):
        data = bytearray(streams[name])
        data[at] ^= 1
        streams[name] = bytes(data)

    return changed


BAD_RECORDS = {
    "another schema": (lambda about, _s: about.update(schema=SCHEMA + 1), "of schema"),
    "no files": (lambda about, _s: about.pop("files"), "is damaged"),
    "a wrong hash": (
        lambda about, _s: about.update(files={"net.folded.onnx": "0" * 64}),
        "not what its record was written for",
    ),
    "a changed vector": (flipped("float32"), "another one's, or damaged"),
    "a changed factor": (flipped("float64", 7), "another one's, or damaged"),
    "a stream too short": (
        lambda _a, streams: streams.update(float32=streams["float32"][:-40]),
        "is damaged",
    ),
    "no graph": (lambda _a, streams: streams.pop("graph"), "is damaged"),
    "an empty graph": (lambda _a, streams: streams.update(graph=b""), "record"),
    "a weight forgotten": (
        change_facts(lambda facts: facts["undo"]["told"].popitem()),
        "another one's, or damaged",
    ),
    "a weight from elsewhere": (
        change_facts(lambda facts: next(iter(facts["undo"]["told"].values())).update(source="no")),
        "has no weight 'no'",
    ),
    "another view": (
        change_facts(lambda facts: next(iter(facts["undo"]["told"].values())).update(view=[1, 2])),
        "the record was written for",
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_refused_with_a_sentence(net, capsys, name):
    change, word = BAD_RECORDS[name]
    damaged(net / RECORD, change)
    before = files(net)
    code, out, err = run(capsys, "unfold", net / "net.folded.onnx")
    assert (code, out) == (3, ""), err
    assert word in err
    assert "Traceback" not in err
    assert files(net) == before


def test_a_record_cut_anywhere_or_with_any_bit_wrong_gives_no_wrong_network(net):
    """Either it is refused, or what was changed did not matter."""
    good = (net / RECORD).read_bytes()
    right = graph.to_bytes(bnfold.unfold(net / "net.folded.onnx").graph)
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(120):
        data, at = bytearray(good), int(rng.integers(len(good)))
        if trial % 4:
            data[at] ^= 1 << int(rng.integers(8))
        (net / RECORD).write_bytes(data if trial % 4 else data[:at])
        try:
            assert graph.to_bytes(bnfold.unfold(net / "net.folded.onnx").graph) == right
        except BnfoldError:
            refused += 1
    assert refused > 100


def test_a_record_that_unpacks_to_too_much_is_refused(net, capsys):
    damaged(net / RECORD, lambda _a, streams: streams.update(graph=bytes(2**29)))
    code, _, err = run(capsys, "unfold", net / "net.folded.onnx")
    assert code == 3
    assert "too large" in err


def test_a_graph_that_names_a_file_is_refused(net, capsys):
    def point_elsewhere(_about, streams):
        model = onnx.ModelProto.FromString(streams["graph"])
        tensor = next(t for t in model.graph.initializer if t.external_data)
        tensor.external_data[0].value = "net.pt"
        streams["graph"] = model.SerializeToString()

    damaged(net / RECORD, point_elsewhere)
    code, _, err = run(capsys, "unfold", net / "net.folded.onnx")
    assert code == 3
    assert "refers to a file" in err


def test_what_does_not_belong_together_is_refused(net, capsys):
    changed = onnx.load(net / "net.folded.onnx")
    changed.doc_string = "mine"
    onnx.save(changed, net / "changed.onnx")
    before = files(net)
    for arguments, code, word in (
        (("changed.onnx", "--record", net / RECORD), 3, "or was changed since"),
        (("net.pt", "--record", net / RECORD), 3, "is the original of this fold"),
        (("changed.onnx",), 3, "There is no fold record at"),
        (("net.folded.onnx", "--record", net / "net.folded.onnx"), 3, "is not a fold record"),
        (("net.folded.onnx", "-o", net / "x.pt"), 2, "an ONNX model unfolds to .onnx"),
        (("net.folded.onnx", "-o", net / "net.folded.onnx", "--overwrite"), 2, "the input itself"),
        (("net.folded.safetensors",), 2, "--model"),
    ):
        found, out, err = run(capsys, "unfold", net / arguments[0], *arguments[1:])
        assert (found, out) == (code, ""), err
        assert word in err
        assert files(net) == before


def test_a_record_of_onnx_alone_holds_no_state_dict(net, capsys):
    assert run(capsys, "fold", net / "net.unfolded.onnx")[0] != 0  # not there yet
    assert run(capsys, "unfold", net / "net.folded.onnx")[0] == 0
    assert run(capsys, "fold", net / "net.unfolded.onnx", "-o", net / "o.onnx")[0] == 0
    about, _ = _opened(net / "o.record.safetensors")
    assert set(about["files"]) == {"original", "o.onnx"}
    record = load_record(net / "o.record.safetensors")
    with pytest.raises(InputError, match="holds no state_dict"):
        bnfold.unfold(bnfold.load_folded(digits_cnn(), net / "net.folded.pt"), record)


def test_nothing_is_written_when_a_gate_fails(net, capsys, monkeypatch):
    """Unfolding is proved like a fold: shown by an unfolding that gives a wrong weight."""
    right = bare.put_in

    def wrong(data, weights):
        name = next(name for name in weights if weights[name].ndim == 4)
        return right(data, {**weights, name: weights[name] * np.float32(1.001)})

    monkeypatch.setattr(bare, "put_in", wrong)
    before = files(net)
    code, out, _ = run(capsys, "unfold", net / "net.folded.onnx")
    assert code == 1
    assert "NOT the same function" in out
    assert "No file was written" in out
    assert files(net) == before


def test_verify_says_that_the_folded_file_was_changed_and_gate_a_judges(net, capsys):
    assert run(capsys, "unfold", net / "net.folded.onnx")[0] == 0
    path = net / "net.folded.onnx"
    assert run(capsys, "fold", net / "net.unfolded.onnx", "-o", path, "--overwrite")[0] == 0
    code, out, _ = run(capsys, "verify", net / "net.unfolded.onnx", path)
    assert code == 0
    assert "was changed since" not in out
    changed = onnx.load(path)
    changed.doc_string = "mine"
    onnx.save(changed, path)
    code, out, _ = run(capsys, "verify", net / "net.unfolded.onnx", path)
    assert code == 0
    assert "was changed since: gate A says" in out
    tensor = next(t for t in changed.graph.initializer if len(t.dims) == 4)
    array = numpy_helper.to_array(tensor) * np.float32(1 + 1e-6)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(changed, path)
    code, out, _ = run(capsys, "verify", net / "net.unfolded.onnx", path)
    assert code == 1
    assert "was changed since: gate A says" in out


# --- the check behind the fuzz, and real networks -------------------------------------------------


def test_the_check_of_undoing_sees_a_lost_bit():
    made = folding.fold(law(CASES["a convolution"]))
    folding.check_undo(made)
    weight = next(t for t in made.model.graph.initializer if len(t.dims) == 4)
    array = numpy_helper.to_array(weight).copy()
    array.reshape(-1)[3] = np.nextafter(array.reshape(-1)[3], np.float32(9))
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    with pytest.raises(InputError, match="changed since"):
        folding.check_undo(made)


def test_a_mobile_network_comes_back_from_a_small_record(tmp_path):
    module = with_statistics(mobilenet_v2())
    x = torch.zeros(1, 3, 32, 32)
    result = bnfold.fold(module, x)
    result.record.save(tmp_path / "r.safetensors")
    back = bnfold.unfold(result.model, tmp_path / "r.safetensors")
    assert same_state(back.model.state_dict(), module.state_dict())
    weights = sum(t.nbytes for t in module.state_dict().values())
    assert (tmp_path / "r.safetensors").stat().st_size < 0.06 * weights


def plainly(model):
    """The model as bytes, every tensor in its raw form: files also write numbers one by one."""
    proto = graph.to_proto(model)
    held = [attribute.t for node in proto.graph.node for attribute in node.attribute]
    for tensor in (*proto.graph.initializer, *(t for t in held if t.data_type)):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    return proto.SerializeToString()


@pytest.mark.parametrize("name", ["resnet20", "mnist_resnet", "dncnn"])
def test_a_real_network_comes_back_bit_for_bit(shared_data, tmp_path, name):
    factory, path = realdata.load_weights(shared_data, name)
    shape = {"resnet20": "1,3,32,32", "mnist_resnet": "1,1,28,28", "dncnn": "1,1,40,40"}[name]
    out, record = tmp_path / "net.folded.pt", tmp_path / "net.folded.record.safetensors"
    arguments = [str(path), "--model", factory, "--input-shape", shape, "--no-verify"]
    assert main(["fold", *arguments, "-o", str(out)]) == 0
    assert main(["unfold", str(out), "--no-verify"]) == 0
    original = realdata.load_state_dict(path)
    state = torch.load(tmp_path / "net.unfolded.pt")["state_dict"]
    for key, tensor in original.items():
        assert torch.equal(state[key], tensor), key
    weights = sum(tensor.nbytes for tensor in original.values())
    assert record.stat().st_size < 8192 + 0.04 * weights
    if name == "resnet20":
        module = realdata.load_model(shared_data, name)
        x, y = realdata.cifar_test761(shared_data)
        before = realdata.accuracy(module, x, y)
        module.load_state_dict(state)
        assert realdata.accuracy(module, x, y) == before == pytest.approx(91.72, abs=0.005)


@pytest.mark.parametrize(
    "name",
    ["ppocr_v2_cls_opset10", "pfld", "cgan_32_1", "gtsrb_bnn_48_tf2onnx", "linzaer_slim-320"],
)
def test_a_real_onnx_file_comes_back_bit_for_bit(shared_data, tmp_path, name):
    path = shared_data / "onnx" / f"{name}.onnx"
    result = bnfold.fold(path)
    graph.write_onnx(result.graph, tmp_path / "f.onnx")
    result.record.save(tmp_path / "f.record.safetensors")
    back = bnfold.unfold(tmp_path / "f.onnx")
    assert plainly(back.graph) == plainly(graph.read_onnx(path))
    assert plainly(bnfold.fold(back.graph).graph) == plainly(result.graph)


# --- the page about the format --------------------------------------------------------------------


def read_by_the_page(record, folded):
    """The original weights from docs/record.md alone: nothing of bnfold is used."""
    about, streams = _opened(record)
    assert about["schema"] == 2
    facts = json.loads(streams["facts"])["undo"]
    graph_without = onnx.ModelProto.FromString(streams["graph"]).graph
    found = {}
    for name in [t.name for t in graph_without.initializer if t.external_data]:
        if name in facts["kept"]:
            found[name] = _array(streams, facts["kept"][name])
        elif name in facts["told"]:
            found[name] = _told_by_the_page(streams, facts["told"][name], folded)
        else:
            found[name] = folded[name]
    return found


def _array(streams, reference):
    dtype, begin, shape = reference
    every = np.frombuffer(streams[dtype], dtype)
    return every[begin : begin + int(np.prod(shape))].reshape(shape)


def _told_by_the_page(streams, told, folded):
    w = folded[told["source"]].reshape(told["view"]).astype(np.float64)
    f = np.ones(1)
    for factor in told["factors"]:
        f = f * _array(streams, factor)
    f = np.broadcast_to(f, w.shape)
    upper = iter(np.unpackbits(_array(streams, told["upper"])))
    places = np.unpackbits(_array(streams, told["places"]))
    fixes = iter(_array(streams, told["fixes"]))
    answer = []
    with np.errstate(all="ignore"):
        for at, (one, factor) in enumerate(zip(w.flat, f.flat, strict=True)):
            wanted = np.float32(one).tobytes()
            guess = int(np.float32(one / factor).view(np.uint32))
            three = [np.array(guess + k).astype(np.uint32).view(np.float32) for k in (-1, 0, 1)]
            fits = [np.float32(np.float64(n) * factor).tobytes() == wanted for n in three]
            number = next((n for n, fit in zip(three, fits, strict=True) if fit), three[2])
            if fits[1] and (fits[0] or fits[2]) and factor != 0:
                number = three[fits.index(True) + int(next(upper))]
            if places.size and places[at]:
                number = next(fixes)
            answer.append(number)
    return np.array(answer, np.float32).reshape(told["shape"])


def test_the_page_is_enough_to_read_a_record(net):
    folded = {
        t.name: numpy_helper.to_array(t)
        for t in onnx.load(net / "net.folded.onnx").graph.initializer
    }
    original = torch.load(net / "net.pt")
    found = read_by_the_page(net / RECORD, folded)
    told = json.loads(_opened(net / RECORD)[1]["facts"])["undo"]["told"]
    assert told
    assert set(told) <= set(found)
    for name, array in found.items():
        assert array.tobytes() == original[name].numpy().tobytes(), name
