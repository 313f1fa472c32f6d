"""What a path names is told by content, and opened without running anything in it.

Each hostile file carries a payload that would create a marker file; the fixture shows first that
the payload works when pickle itself is let loose on it.
"""

import argparse
import codecs
import contextlib
import gzip
import io
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper
from torch import nn

from bnfold.errors import InputError, UnsafeInputError, UsageError
from bnfold.reading.checkpoint import Checkpoint, load_checkpoint
from bnfold.reading.sniff import Kind, sniff
from bnfold.reading.weights import check_batchnorm_statistics, load_into

REAL_CHECKPOINTS = {
    "cifar10/resnet20-12fca82f.th": 19,
    "cifar10/resnet56-4bfd9763.th": 55,
    "denoise/DnCNN-S-25.pth": 15,
    "digits/mnist_cnn.pth": 2,
    "digits/mnist_mlp.pth": 2,
    "digits/mnist_lenet5.pth": 4,
    "digits/mnist_resnet.pth": 6,
    "onnx/linzaer_slim-320.pth": 25,
}


class Payload:
    """Unpickles to a call of os.system that creates `marker`."""

    def __init__(self, marker: pathlib.Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'echo run > "{self.marker}"',)


class UserNet(nn.Module):
    """A class that exists only in this file."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)


SYSTEM = f"{os.system.__module__}.system"  # posix.system, nt.system


@pytest.fixture
def marker(tmp_path):
    """A path that no payload has created by the end of the test, though it could have."""
    path = tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists(), "the payload is harmless, so the test would prove nothing"
    path.unlink()
    yield path
    assert not path.exists(), "the payload was run"


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def plain_model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LSTM(4, 2)
    )


def refused(path, error=InputError, **options):
    """The sentence with which load_checkpoint refuses the file."""
    with pytest.raises(error) as caught:
        load_checkpoint(path, **options)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    return str(caught.value)


# --- sniffing ------------------------------------------------------------------------------------


def onnx_bytes():
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()


def zip_bytes(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_bytes():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def npy_bytes():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
STRANGERS = {
    "empty": (b"", "empty (0 bytes)"),
    "lfs pointer": (LFS, "run git lfs pull"),
    "web page": (b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>", "web page (HTML)"),
    "text": ("größe = 3\n".encode() * 99, "a text file"),
    "garbage": (bytes(range(128, 256)) * 8, "damaged"),
    "short garbage": (b"\x08", "damaged"),
    "gzip": (gzip.compress(b"x" * 99), "gzip archive: unpack it"),
    "tar": (tar_bytes(), "tar archive"),
    "zip of texts": (zip_bytes(readme="hello"), "holds no model known to bnfold ('readme'"),
    "cut zip": (zip_bytes(readme="hello" * 99)[:-30], "cut short or damaged"),
    "npy": (npy_bytes(), "a NumPy array"),
    "npz": (zip_bytes(**{"x.npy": npy_bytes()}), "a NumPy archive"),
    "pickle": (pickle.dumps({"w": 1}), "plain Python pickle"),
    "old pt2": (zip_bytes(**{"serialized_exported_program.json": "{}"}), "torch 2.7 or older"),
    "cut onnx": (onnx_bytes()[:-5], "ONNX model that was cut short"),
    "json": (b'{"model": 1}', "a text file"),
}


@pytest.mark.parametrize("case", STRANGERS)
@pytest.mark.parametrize("suffix", [".onnx", ".pt"])
def test_what_is_no_model_is_named(tmp_path, case, suffix):
    content, sentence = STRANGERS[case]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        sniff(path)
    assert caught.value.exit_code == 3
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "model.onnx").write_bytes(onnx_bytes())
    with pytest.raises(InputError, match=r"does not exist; did you mean .*model\.onnx\?"):
        sniff(tmp_path / "modle.onnx")
    with pytest.raises(InputError, match=r"does not exist\."):
        sniff(tmp_path / "elsewhere" / "x.onnx")
    with pytest.raises(InputError, match="is a folder"):
        sniff(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        sniff(tmp_path / "a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_without_waiting_on_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        sniff(tmp_path / "pipe")


def test_the_suffix_is_not_consulted(tmp_path):
    path = tmp_path / "weights.onnx"
    assert sniff(saved(path, {"w": torch.ones(1)})) is Kind.CHECKPOINT
    path = tmp_path / "model.safetensors"
    path.write_bytes(onnx_bytes())
    assert sniff(path) is Kind.ONNX
    path = tmp_path / "weights.pt"
    safetensors.torch.save_file({"w": torch.ones(1)}, path)
    assert sniff(path) is Kind.SAFETENSORS
    assert load_checkpoint(path).state_dict["w"] == 1
    # torch.load would take this suffix at its word
    saved(tmp_path / "weights.safetensors", {"w": torch.ones(1)})
    assert load_checkpoint(tmp_path / "weights.safetensors").state_dict["w"] == 1


def test_both_torch_formats_are_checkpoints(tmp_path):
    for zipped in (True, False):
        path = saved(tmp_path / "w.pt", {"w": torch.ones(1)}, _use_new_zipfile_serialization=zipped)
        assert sniff(path) is Kind.CHECKPOINT
        assert load_checkpoint(path).state_dict["w"] == 1


def test_real_models_are_recognised(shared_data):
    for path in sorted((shared_data / "onnx").glob("*.onnx")):
        assert sniff(path) is Kind.ONNX, path
    for name in REAL_CHECKPOINTS:
        assert sniff(shared_data / name) is Kind.CHECKPOINT, name


def test_torchscript_is_recognised_and_refused(tmp_path):
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; old files are not
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    assert sniff(path) is Kind.TORCHSCRIPT
    sentence = refused(path)
    assert "TorchScript" in sentence
    assert "Export the nn.Module" in sentence


def test_a_zip_bomb_is_refused_before_anything_is_unpacked(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02.")
        archive.writestr("bomb/data/0", bytes(1 << 20))
        archive.infolist()[-1].file_size = 3 << 30  # the directory's word is what readers allocate
    assert "zip bomb" in refused(path, UnsafeInputError)


def test_an_onnx_model_is_no_checkpoint(tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(onnx_bytes())
    with pytest.raises(UsageError, match="is an ONNX model and not a checkpoint"):
        load_checkpoint(path)


# --- unsafe pickles ------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", ["beside", "inside"])
def test_a_payload_is_named_and_not_run(tmp_path, marker, zipped, wrapped):
    weights = {"w": torch.ones(2)}
    weights["x" if wrapped == "inside" else "args"] = Payload(marker)
    content = {"state_dict": weights} if wrapped == "inside" else weights
    path = saved(tmp_path / "m.pt", content, _use_new_zipfile_serialization=zipped)
    sentence = refused(path, UnsafeInputError)
    assert SYSTEM in sentence
    assert "state_dict" in sentence
    assert "--trust-pickle" in sentence


def test_a_payload_in_another_pickle_protocol_is_named_and_not_run(tmp_path, marker):
    for protocol in (3, 4, 5):
        content = {"w": torch.ones(2), "x": Payload(marker)}
        path = saved(tmp_path / "m.pt", content, pickle_protocol=protocol)
        assert SYSTEM in refused(path, UnsafeInputError)


def test_a_plain_pickle_is_never_loaded(tmp_path, marker):
    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps(Payload(marker)))
    refused(path, UnsafeInputError)
    refused(path, UnsafeInputError, trust_pickle=True)  # torch.load reads no such file


def test_a_refused_file_is_not_tried_again_unsafely(tmp_path, marker, monkeypatch):
    path = saved(tmp_path / "m.pt", {"w": torch.ones(2), "x": Payload(marker)})
    asked = []
    load = torch.load

    def watched(*args, **kwargs):
        asked.append(kwargs["weights_only"])
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    refused(path, UnsafeInputError)
    assert asked == [True]


def test_only_trust_lets_pickle_run(tmp_path):
    path = tmp_path / "wanted"
    saved(tmp_path / "m.pt", {"w": torch.ones(2), "x": Payload(path)})
    checkpoint = load_checkpoint(tmp_path / "m.pt", trust_pickle=True)
    assert path.exists()
    assert list(checkpoint.state_dict) == ["w"]
    assert "the file was unpickled on trust, which ran whatever it says" in checkpoint.notes


@pytest.mark.parametrize(
    ("leftover", "name"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (pathlib.PurePosixPath("/data"), "PurePosixPath"),
        (np.float64(0.9), "multiarray.scalar"),
    ],
)
def test_objects_left_by_training_are_named(tmp_path, leftover, name):
    path = saved(tmp_path / "m.pt", {"state_dict": {"w": torch.ones(2)}, "args": leftover})
    sentence = refused(path, UnsafeInputError)
    assert name in sentence
    assert "objects beside its weights" in sentence
    assert "torch.save(model.state_dict()" in sentence


@pytest.mark.parametrize("cut", [0.2, 0.6, 0.98])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint_is_called_so(tmp_path, cut, zipped):
    path = saved(tmp_path / "m.pt", {"w": torch.ones(999)}, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    assert "cut short or damaged" in refused(path)


def test_no_damage_gives_a_traceback(tmp_path):
    """Every byte of the pickle flipped in turn: read, or refused with a sentence."""
    path = saved(tmp_path / "m.pt", {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    intact = path.read_bytes()
    for position in range(0, len(intact), 3):
        path.write_bytes(
            intact[:position] + bytes([intact[position] ^ 0x5A]) + intact[position + 1 :]
        )
        with contextlib.suppress(InputError):
            load_checkpoint(path)


# --- pickled modules -----------------------------------------------------------------------------


def test_a_model_of_plain_layers_is_loaded(tmp_path):
    model = plain_model()
    for content in (model, {"epoch": 3, "model": model}):
        checkpoint = load_checkpoint(saved(tmp_path / "m.pt", content))
        assert isinstance(checkpoint.module, nn.Sequential)
        assert checkpoint.state_dict.keys() == model.state_dict().keys()
        assert torch.equal(checkpoint.module[0].weight, model[0].weight)
        assert "the file holds a whole model, Sequential" in checkpoint.notes


def test_a_model_of_the_users_classes_asks_for_a_factory(tmp_path):
    path = saved(tmp_path / "m.pt", UserNet())
    sentence = refused(path, UnsafeInputError)
    assert f"{UserNet.__module__}.UserNet" in sentence
    assert "--model pkg.mod:factory" in sentence
    assert "--trust-pickle" in sentence
    assert type(load_checkpoint(path, trust_pickle=True).module) is UserNet


def test_loading_a_model_leaves_torchs_list_as_it_was(tmp_path):
    path = saved(tmp_path / "m.pt", plain_model())
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([nn.Conv2d]):
        load_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) == {nn.Conv2d, *before}
    assert set(torch.serialization.get_safe_globals()) == before


def with_hook(model):
    model[2]._forward_hooks[0] = torch.Size


def with_another_forward(model):
    model[2].forward = torch.Size


def with_a_callable(model):
    model[2].note = [{"x": (torch.Size,)}]


def with_itself(model):
    model[2].add_module("again", model)


def with_a_forest(model):
    for _ in range(40):  # 40 layers, which state_dict() would meet 2**40 times
        model[2] = nn.Sequential(model[2], model[2])


def with_something_that_is_no_layer(model):
    model._modules["3"] = torch.ones(1)


def without_tables(model):
    model._modules["3"] = nn.ReLU.__new__(nn.ReLU)


@pytest.mark.parametrize(
    ("attack", "sentence"),
    [
        (with_hook, "layer '2' has entries in _forward_hooks"),
        (with_another_forward, "layer '2' replaces the method forward"),
        (with_a_callable, "attribute note of layer '2' holds more than data"),
        (with_itself, "its layers are nested without end"),
        (with_a_forest, "more than 20000 layers"),
        (with_something_that_is_no_layer, "layer '3' is a Tensor"),
        (without_tables, "layer '3' was never initialised"),
    ],
)
def test_a_plain_model_may_hold_data_only(tmp_path, attack, sentence):
    model = plain_model()
    attack(model)
    path = saved(tmp_path / "m.pt", model)
    assert sentence in refused(path, UnsafeInputError)


def test_a_plain_model_cannot_bring_functions_that_torch_lists(tmp_path):
    """codecs.encode is on torch's own list; beside layers that can be called it is refused."""
    model = plain_model()
    model[2].note = codecs.encode
    assert "_codecs.encode" in refused(saved(tmp_path / "m.pt", model), UnsafeInputError)
    saved(tmp_path / "m.pt", {"w": torch.ones(1), "x": b"\xff"})  # bytes are written with it
    assert list(load_checkpoint(tmp_path / "m.pt").state_dict) == ["w"]


def test_a_payload_beside_a_plain_model_is_not_run(tmp_path, marker):
    model = plain_model()
    model[2].note = Payload(marker)
    assert SYSTEM in refused(saved(tmp_path / "m.pt", model), UnsafeInputError)


def test_a_legacy_file_with_a_whole_model_is_explained(tmp_path):
    path = tmp_path / "m.pt"
    saved(path, plain_model(), _use_new_zipfile_serialization=False)
    assert "torch 1.5 or older" in refused(path, UnsafeInputError)


# --- finding the weights -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [(), ("state_dict",), ("model_state_dict",), ("net",), ("model", "state_dict"), ("generator",)],
)
def test_weights_are_found_under_their_wrapper(tmp_path, keys):
    weights = {"conv.weight": torch.ones(2)}
    content = weights
    for key in reversed(keys):
        optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
        content = {"epoch": 3, "optimizer": optimizer, key: content}
    checkpoint = load_checkpoint(saved(tmp_path / "m.pt", content))
    assert list(checkpoint.state_dict) == ["conv.weight"]
    expected = f"weights found under {' / '.join(map(repr, keys))}"
    assert checkpoint.notes == ((expected,) if keys else ())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(1)], "a list and no weights"),
        ({}, "an empty dictionary"),
        ({"epoch": 3, "lr": 0.1}, "a dictionary with 'epoch', 'lr'"),
        ({"optimizer": {"state": {0: {"m": torch.ones(1)}}}}, "no weights"),
        ({3: torch.ones(1)}, "no named tensors"),
        ({"g": {"w": torch.ones(1)}, "d": {"w": torch.ones(1)}}, "2 sets of weights ('g', 'd')"),
    ],
)
def test_a_file_without_one_set_of_weights_is_refused(tmp_path, content, sentence):
    assert sentence in refused(saved(tmp_path / "m.pt", content))


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    content = {}
    content.update({str(number): content for number in range(99)})
    assert "no weights" in refused(saved(tmp_path / "m.pt", content))
    # a pickle of 5000 dictionaries, each the only item of the one around it
    nested = b"\x80\x02" + b"}X\x01\x00\x00\x00k" * 5000 + b"}" + b"s" * 5000 + b"."
    with zipfile.ZipFile(tmp_path / "deep.pt", "w") as archive:
        archive.writestr("deep/data.pkl", nested)
        archive.writestr("deep/version", "3\n")
    assert "no weights" in refused(tmp_path / "deep.pt")
    shared = [[]]
    for _ in range(60):
        shared = [shared, shared]
    model = plain_model()
    model[2].note = shared
    assert load_checkpoint(saved(tmp_path / "m.pt", model)).module is not None


def test_averaged_weights_are_a_second_choice(tmp_path):
    trained, averaged = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    both = load_checkpoint(saved(tmp_path / "m.pt", {"ema": averaged, "model": trained}))
    assert both.state_dict["w"] == 0
    assert "the averaged weights under 'ema' are not used" in both.notes
    assert load_checkpoint(saved(tmp_path / "m.pt", {"ema": averaged})).state_dict["w"] == 1


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module.module."])
def test_shells_are_taken_off_when_every_name_wears_them(tmp_path, prefix):
    worn = {f"{prefix}conv.weight": torch.ones(1), f"{prefix}bn.weight": torch.ones(1)}
    checkpoint = load_checkpoint(saved(tmp_path / "m.pt", worn))
    assert list(checkpoint.state_dict) == ["conv.weight", "bn.weight"]
    assert len([note for note in checkpoint.notes if "removed" in note]) == prefix.count(".")
    part = {f"{prefix}conv.weight": torch.ones(1), "bn.weight": torch.ones(1)}
    assert list(load_checkpoint(saved(tmp_path / "m.pt", part)).state_dict) == list(part)


def test_a_prefix_that_may_be_a_real_name_stays_with_a_note(tmp_path):
    checkpoint = load_checkpoint(saved(tmp_path / "m.pt", {"model.w": torch.ones(1)}))
    assert list(checkpoint.state_dict) == ["model.w"]
    assert any("'model.'" in note for note in checkpoint.notes)


def test_bnfolds_own_description_comes_back(tmp_path):
    content = {"bnfold": {"model": "resnet20"}, "state_dict": {"w": torch.ones(1)}}
    checkpoint = load_checkpoint(saved(tmp_path / "m.pt", content))
    assert checkpoint.description == {"model": "resnet20"}
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"w": torch.ones(1)}, path, {"bnfold": '{"model": "resnet20"}'})
    assert load_checkpoint(path).description == {"model": "resnet20"}
    assert load_checkpoint(saved(tmp_path / "m.pt", {"w": torch.ones(1)})).description is None


def test_weights_saved_on_cuda_arrive_on_the_cpu(tmp_path):
    source = saved(tmp_path / "cpu.pt", {"w": torch.arange(3.0)})
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "cuda.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(name, data)
    weight = load_checkpoint(tmp_path / "cuda.pt").state_dict["w"]
    assert weight.device.type == "cpu"
    assert weight.tolist() == [0, 1, 2]


def test_what_is_no_tensor_is_left_out_with_a_note(tmp_path):
    content = OrderedDict(w=torch.ones(1), epoch=3, name="net")
    checkpoint = load_checkpoint(saved(tmp_path / "m.pt", content))
    assert list(checkpoint.state_dict) == ["w"]
    assert "2 entries that are no tensors left out: 'epoch', 'name'" in checkpoint.notes


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch; old checkpoints are not
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.empty(3, device="meta"), "has no data"),
        (quantised, "quantised"),
    ],
)
def test_tensors_that_cannot_be_folded_are_named(tmp_path, make, fault):
    sentence = refused(saved(tmp_path / "m.pt", {"conv.weight": make()}))
    assert "'conv.weight'" in sentence
    assert fault in sentence


def test_a_tensor_that_repeats_one_number_without_end_is_refused(tmp_path):
    path = saved(tmp_path / "m.pt", {"w": torch.ones(1).expand(1 << 16, 1 << 16)})
    assert "expanded" in refused(path)


def test_parameters_arrive_without_gradients(tmp_path):
    path = saved(tmp_path / "m.pt", {"w": nn.Parameter(torch.ones(1))})
    assert not load_checkpoint(path).state_dict["w"].requires_grad


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:20],
        lambda data: (1 << 30).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"{" + b"\xff" * (len(data) - 9),
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,'),
        lambda data: data + b"more",
    ],
)
def test_a_damaged_safetensors_file_is_called_so(tmp_path, damage):
    data = safetensors.torch.save({"w": torch.ones(5)})
    assert damage(data) != data
    path = tmp_path / "m.safetensors"
    path.write_bytes(damage(data))
    assert "cut short or damaged" in refused(path)


@pytest.mark.parametrize("name", REAL_CHECKPOINTS)
def test_real_checkpoints_load(shared_data, name):
    checkpoint = load_checkpoint(shared_data / name)
    variances = [key for key in checkpoint.state_dict if key.endswith("running_var")]
    assert len(variances) == REAL_CHECKPOINTS[name]
    assert not any(key.startswith("module.") for key in checkpoint.state_dict)
    assert {tensor.device.type for tensor in checkpoint.state_dict.values()} == {"cpu"}


def test_a_real_checkpoint_tells_what_was_unwrapped(shared_data):
    checkpoint = load_checkpoint(shared_data / "cifar10/resnet20-12fca82f.th")
    assert checkpoint.notes[:2] == (
        "weights found under 'state_dict'",
        "prefix 'module.' removed",
    )


# --- weights into modules ------------------------------------------------------------------------


class Holder(nn.Module):
    """A module whose own names begin with `model.`."""

    def __init__(self):
        super().__init__()
        self.model = UserNet()


def weights_of(module, rename=lambda key: key):
    return Checkpoint({rename(key): value for key, value in module.state_dict().items()})


def same(left, right):
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("target", "rename", "note"),
    [
        (UserNet, lambda key: key, ()),
        (UserNet, lambda key: f"model.{key}", ("prefix 'model.' removed",)),
        (UserNet, lambda key: f"a.b.{key}", ("prefix 'a.b.' removed",)),
        (Holder, lambda key: key, ("prefix 'model.' added",)),
        (Holder, lambda key: f"net.{key}", ("prefix 'net.' replaced by 'model.'",)),
        (Holder, lambda key: f"model.{key}", ()),
        (
            UserNet,
            lambda key: key.replace(".", "._orig_mod."),
            ("'module' and '_orig_mod' removed inside the names",),
        ),
    ],
)
def test_prefixes_give_way_when_the_names_then_agree(target, rename, note):
    torch.manual_seed(0)
    source, module = UserNet(), target()
    assert load_into(module, weights_of(source, rename)) == note
    assert same(source, module)


def test_counters_may_be_missing():
    checkpoint = weights_of(UserNet())
    del checkpoint.state_dict["bn.num_batches_tracked"]
    assert "1 num_batches_tracked counters" in load_into(UserNet(), checkpoint)[0]


def test_missing_and_unexpected_names_are_listed():
    checkpoint = weights_of(UserNet())
    checkpoint.state_dict["head.weight"] = checkpoint.state_dict.pop("conv.weight")
    with pytest.raises(InputError) as caught:
        load_into(UserNet(), checkpoint)
    assert "1 names it needs are not in the file (conv.weight)" in str(caught.value)
    assert "1 in the file are not in it (head.weight)" in str(caught.value)
    with pytest.raises(InputError, match="another model than the factory builds"):
        load_into(nn.Linear(2, 2), checkpoint)


def test_another_shape_is_one_sentence():
    checkpoint = weights_of(UserNet())
    checkpoint.state_dict["conv.weight"] = torch.ones(4, 1, 3, 3)
    with pytest.raises(InputError) as caught:
        load_into(UserNet(), checkpoint)
    assert "conv.weight is (4, 1, 3, 3) in the file and (4, 3, 3, 3) in the" in str(caught.value)
    assert "The factory builds another variant" in str(caught.value)


def test_a_change_of_precision_is_told():
    checkpoint = weights_of(UserNet().half())
    notes = load_into(UserNet(), checkpoint)
    assert notes == ("5 tensors read from torch.float16 into torch.float32",)


class Renamed(UserNet):
    """Knows the names its weights had in an older version, as torchvision's models do."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if "old" in state_dict:
            state_dict["conv.weight"] = state_dict.pop("old")
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_a_modules_own_renaming_is_heard():
    source, module = UserNet(), Renamed()
    load_into(module, weights_of(source, lambda key: key.replace("conv.weight", "old")))
    assert same(source, module)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("running_var", -1e-3, "running_var of channel 2 is -0.001, which is negative"),
        ("running_var", float("nan"), "running_var of channel 2 is nan, which is not finite"),
        ("running_mean", float("inf"), "running_mean of channel 2 is inf"),
        ("weight", float("nan"), "weight of channel 2 is nan"),
        ("bias", float("-inf"), "bias of channel 2 is -inf"),
    ],
)
def test_statistics_that_normalise_nothing_name_layer_and_channel(name, value, sentence):
    model = UserNet()
    check_batchnorm_statistics(model)
    with torch.no_grad():
        getattr(model.bn, name)[2] = value
    with pytest.raises(InputError, match="BatchNorm2d 'bn': ") as caught:
        check_batchnorm_statistics(model)
    assert sentence in str(caught.value)


def test_a_variance_of_zero_needs_its_eps():
    bn = nn.BatchNorm1d(3)
    bn.running_var.zero_()
    check_batchnorm_statistics(bn)
    bn.eps = 0.0
    with pytest.raises(InputError, match=r"not positive with eps 0\.0 \(and 2 more channels\)"):
        check_batchnorm_statistics(bn)
    check_batchnorm_statistics(nn.BatchNorm2d(3, track_running_stats=False, affine=False))


def test_reading_modules_import_no_framework():
    names = ("sniff", "checkpoint", "exported", "factory", "weights")
    modules = ", ".join(f"bnfold.reading.{name}" for name in names)
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    frameworks = {"torch", "onnx", "onnxruntime", "safetensors", "numpy"}
    assert not frameworks & set(loaded.stdout.decode().split())
