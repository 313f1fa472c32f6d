"""Domain packs: small, the same bytes for the same content, for one base alone, and unchanged."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import safetensors.numpy
import torch
from nets import with_statistics
from onnx import TensorProto

import bnfold
import bnfold.adapting.base
import bnfold.adapting.folded
from bnfold import graph
from bnfold.adapting.base import open_base
from bnfold.adapting.folded import set_statistics
from bnfold.cli import main
from bnfold.errors import InputError, UsageError
from bnfold.measuring import norms
from bnfold.measuring.statistics import Statistics
from bnfold.packs import pack, signing
from bnfold.packs.pack import Pack, diff, load_pack
from models.digits import digits_cnn
from models.resnet_cifar import resnet20
from tests.law_models import Law, build
from tests.test_folded_adapt import moved, same_state

SPEC = "models/digits.py:digits_cnn"
DIGIT = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, its ONNX file, and both folded, with one record."""
    folder = tmp_path_factory.mktemp("nets")
    torch.manual_seed(0)
    module = with_statistics(digits_cnn())
    torch.save(module.state_dict(), folder / "net.pt")
    bnfold.export(module, DIGIT, folder / "net.onnx")
    assert main(["fold", str(folder / "net.onnx"), "--no-verify", "-q"]) == 0
    arguments = ["--model", SPEC, "--input-shape", "1,1,8,8", "--no-verify", "-q"]
    outputs = [f"-o{folder / f'torch.folded{end}'}" for end in (".pt", ".onnx")]
    assert main(["fold", str(folder / "net.pt"), *arguments, *outputs]) == 0
    signing.generate(folder / "key.pem")
    signing.generate(folder / "other.pem")
    return folder


@pytest.fixture(scope="module")
def statistics(made):
    return moved(graph.read_onnx(made / "net.onnx"))


@pytest.fixture(scope="module")
def rain(made, statistics):
    """A pack for net.onnx."""
    return Pack.of(
        statistics,
        base=made / "net.onnx",
        method="exact",
        images=500,
        data="rain",
        options={"n": 1},
    )


def adapted_bytes(made, statistics):
    return graph.to_bytes(norms.with_statistics(graph.read_onnx(made / "net.onnx"), statistics))


# --- the file -------------------------------------------------------------------------------------


def test_a_pack_says_what_it_holds(made, rain, statistics, tmp_path):
    rain.save(tmp_path / "rain.pack")
    back = load_pack(tmp_path / "rain.pack")
    assert (back.method, back.images, back.data, back.options) == ("exact", 500, "rain", {"n": 1})
    assert back.version.startswith("bnfold ")
    assert back.signed_by is None
    assert back.base["net.onnx"] == bnfold.report.sha256(made / "net.onnx")
    assert list(back.layers) == list(statistics)
    for name, layer in back.layers.items():
        assert layer.mean.dtype == layer.var.dtype == np.float32
        assert np.array_equal(layer.mean, statistics[name].mean.astype(np.float32))
        assert layer.eps == pytest.approx(1e-5)
        assert back.statistics[name].var.dtype == np.float64


def test_the_same_content_gives_the_same_bytes_and_other_readers_read_them(
    made, rain, statistics, tmp_path
):
    again = Pack.of(
        dict(statistics),
        base=made / "net.onnx",
        method="exact",
        images=500,
        data="rain",
        options={"n": 1},
    )
    assert again.to_bytes() == rain.to_bytes()
    assert rain.to_bytes(made / "key.pem") == rain.to_bytes(made / "key.pem")
    rain.save(tmp_path / "rain.pack", sign=made / "key.pem")
    assert (
        load_pack(tmp_path / "rain.pack").to_bytes(made / "key.pem")
        == (tmp_path / "rain.pack").read_bytes()
    )
    tensors = safetensors.numpy.load_file(tmp_path / "rain.pack")
    assert set(tensors) == {f"{n}.running_{what}" for n in statistics for what in ("mean", "var")}
    for name, new in statistics.items():
        assert np.array_equal(tensors[f"{name}.running_var"], new.var.astype(np.float32))


def test_no_byte_can_be_changed(rain, made, tmp_path):
    """Every byte of an unsigned and of a signed pack, one bit flipped; and every length."""
    path = tmp_path / "rain.pack"
    for sign, public in ((None, None), (made / "key.pem", made / "key.pub.pem")):
        data = rain.to_bytes(sign)
        path.write_bytes(data)
        load_pack(path, public)
        head = 8 + int.from_bytes(data[:8], "little")
        places = [*range(0, head, 3), *range(head, len(data), 41), len(data) - 1]
        for at in places:
            changed = bytearray(data)
            changed[at] ^= 1 << (at % 8)
            path.write_bytes(changed)
            with pytest.raises(InputError, match=r"rain\.pack"):
                load_pack(path, public)
        for end in (*range(0, len(data), 97), len(data) - 1):
            path.write_bytes(data[:end])
            with pytest.raises(InputError, match=r"rain\.pack"):
                load_pack(path, public)
        path.write_bytes(data + b"\0")
        with pytest.raises(InputError, match="was changed"):
            load_pack(path)


def forged(data, change):
    """A pack that was changed and given a new sum: only a signature tells."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"][pack.KEY])
    body = bytearray(data[8 + size :])
    change(about, header, body)
    kept = {key: about.pop(key) for key in ("sha256", "signature") if key in about}

    def file(about):
        header["__metadata__"] = {pack.KEY: pack._dumps(about)}
        text = pack._dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + bytes(body)

    about["sha256"] = hashlib.sha256(file(about)).hexdigest()
    if "signature" in kept:
        about["signature"] = kept["signature"]
    return file(about)


def one_mean(_about, header, body):
    at = header["bn1.running_mean"]["data_offsets"][0]
    body[at + 3] ^= 1


def test_a_signature_is_asked_for_and_checked(made, rain, tmp_path):
    path, public = tmp_path / "rain.pack", made / "key.pub.pem"
    rain.save(path)
    with pytest.raises(InputError, match="is not signed"):
        load_pack(path, public)
    rain.save(path, sign=made / "other.pem")
    with pytest.raises(InputError, match="was not signed by the key that was given"):
        load_pack(path, public)
    rain.save(path, sign=made / "key.pem")
    good = load_pack(path, public)
    assert good.signed_by == load_pack(path, public.read_bytes()).signed_by
    path.write_bytes(forged(path.read_bytes(), one_mean))
    load_pack(path)  # its sum is right: without the key nobody knows
    with pytest.raises(InputError, match="its signature is wrong"):
        load_pack(path, public)
    # a signature of another key that names ours
    other = rain.to_bytes(made / "other.pem")

    def as_ours(about, _header, _body):
        about["signature"]["key"] = good.signed_by

    path.write_bytes(forged(other, as_ours))
    with pytest.raises(InputError, match="its signature is wrong"):
        load_pack(path, public)


def test_keys_are_checked(made, rain, tmp_path):
    assert (made / "key.pem").stat().st_mode & 0o777 == 0o600
    for private in (made / "key.pub.pem", made / "net.pt", made / "none.pem"):
        with pytest.raises(InputError):
            rain.to_bytes(private)
    rain.save(tmp_path / "rain.pack", sign=made / "key.pem")
    for public in (made / "key.pem", made / "net.pt", made / "none.pem", b"nothing"):
        with pytest.raises(InputError):
            load_pack(tmp_path / "rain.pack", public)
    with pytest.raises(UsageError, match="never overwritten"):
        signing.generate(made / "key.pem")


def set_about(**entries):
    return lambda about, _header, _body: about.update(entries)


def numbers(name, value):
    def change(_about, header, body):
        begin = header[name]["data_offsets"][0]
        body[begin : begin + 4] = np.float32(value).tobytes()

    return change


def layer_of(**entries):
    return lambda about, _header, _body: about["layers"]["bn1"].update(entries)


def reshape(_about, header, _body):
    header["bn1.running_mean"]["shape"] = [4, 4]


def far_away(_about, header, _body):
    header["bn1.running_mean"]["data_offsets"] = [0, 2**50]


def swap_sizes(_about, header, _body):
    a, b = header["bn1.running_var"], header["bn3.running_var"]
    header["bn1.running_var"], header["bn3.running_var"] = b, a


BAD = {
    "another schema": (set_about(schema=2), "of schema 2"),
    "NaN": (numbers("bn1.running_mean", np.nan), "a mean that is not finite"),
    "infinity": (numbers("bn1.running_var", np.inf), "a variance that is not finite"),
    "a negative variance": (numbers("bn1.running_var", -0.5), "a variance below 0"),
    "an eps below 0": (layer_of(eps=-1.0), "eps -1"),
    "an eps that is none": (layer_of(eps="x"), "is not a domain pack, or is damaged"),
    "a layer without tensors": (
        lambda about, _h, _b: about["layers"].update(more={"num_features": 3, "eps": 0.1}),
        "is damaged",
    ),
    "a number of channels that is wrong": (layer_of(num_features=3), "was changed"),
    "two axes": (reshape, "is damaged"),
    "data elsewhere": (far_away, "is damaged"),
    "images that are none": (set_about(images="many"), "is damaged"),
    "sizes that differ": (swap_sizes, "was changed"),
    "an entry too many": (set_about(more=1), "was changed"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pack_is_refused_with_a_sentence(rain, tmp_path, name):
    change, word = BAD[name]
    path = tmp_path / "rain.pack"
    path.write_bytes(forged(rain.to_bytes(), change))
    with pytest.raises(InputError, match=word):
        load_pack(path)


def test_files_that_are_no_packs_are_refused(made, tmp_path, monkeypatch):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "deep").write_bytes((2**17).to_bytes(8, "little") + b"[" * 2**17)
    for path in (
        made / "net.onnx",
        made / "net.pt",
        made / "net.folded.record.safetensors",
        tmp_path / "empty",
        tmp_path / "deep",
        tmp_path,
        tmp_path / "none",
    ):
        with pytest.raises(InputError):
            load_pack(path)
    monkeypatch.setattr(pack, "LARGEST", 100)
    with pytest.raises(InputError, match="no pack has more"):
        load_pack(made / "net.onnx")


# --- making one -----------------------------------------------------------------------------------


def test_statistics_that_do_not_fit_are_not_packed(made, statistics):
    name, good = next(iter(statistics.items()))
    for bad, word in (
        ({}, "no statistics"),
        ({"nobody": good}, "no batch norm 'nobody'"),
        ({name: Statistics(good.mean[:3], good.var[:3])}, "its statistics 3"),
        ({name: Statistics(good.mean * np.nan, good.var)}, "not finite"),
        ({name: Statistics(good.mean, -good.var)}, "below 0"),
        ({name: Statistics(good.mean * 1e300, good.var)}, "cannot hold"),
    ):
        with pytest.raises(InputError, match=word):
            Pack.of(bad, base=made / "net.onnx")


@pytest.mark.parametrize("kind", ["FLOAT16", "DOUBLE", "BFLOAT16"])
def test_statistics_are_in_the_type_of_the_base(tmp_path, kind):
    text = "x[4,4,4,4] > y; c = Conv(x, W[4,4,3,3]); y = BN4:alt(c)"
    if kind == "BFLOAT16":
        module = with_statistics(digits_cnn()).bfloat16()
        new = {
            n: Statistics(np.ones(m.num_features), np.full(m.num_features, 2.0))
            for n, m in module.named_modules()
            if isinstance(m, torch.nn.BatchNorm2d)
        }
        made, expected = Pack.of(new, base=module), np.dtype(ml_dtypes.bfloat16)
    else:
        proto = build(Law("pack", "", text, 1, dtype=getattr(TensorProto, kind)))
        new = moved(graph.parse_onnx(proto.SerializeToString()))
        made = Pack.of(new, base=proto)
        expected = onnx.helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    made.save(tmp_path / "p.pack")
    back = load_pack(tmp_path / "p.pack")
    assert {layer.mean.dtype for layer in back.layers.values()} == {expected}
    assert back.to_bytes() == made.to_bytes()


def test_a_pack_is_small(tmp_path):
    torch.manual_seed(0)
    module = with_statistics(resnet20())
    bnfold.export(module, torch.zeros(1, 3, 32, 32), tmp_path / "net.onnx")
    found = norms.norms_of(graph.read_onnx(tmp_path / "net.onnx"))
    Pack.of({n: v.layer.source for n, v in found.items()}, base=tmp_path / "net.onnx").save(
        tmp_path / "net.pack"
    )
    assert (tmp_path / "net.pack").stat().st_size < 0.01 * (tmp_path / "net.onnx").stat().st_size


# --- applying it ----------------------------------------------------------------------------------


def test_it_applies_to_every_form_of_its_base(made, rain, statistics):
    expected = adapted_bytes(made, statistics)
    assert graph.to_bytes(rain.apply(made / "net.onnx")) == expected
    proto = onnx.load(made / "net.onnx")
    assert rain.apply(proto) == onnx.ModelProto.FromString(expected)
    assert graph.to_bytes(rain.apply(graph.read_onnx(made / "net.onnx"))) == expected
    # folded: by the record beside it, or by one that is given
    straight = bnfold.fold(onnx.ModelProto.FromString(expected))
    folded = rain.apply(made / "net.folded.onnx")
    assert graph.to_bytes(folded) == graph.to_bytes(straight.graph)
    record = made / "net.folded.record.safetensors"
    assert graph.to_bytes(rain.apply(graph.read_onnx(made / "net.folded.onnx"), record)) == (
        graph.to_bytes(straight.graph)
    )


def test_a_pack_for_the_folded_file_is_one_for_its_original(made, statistics):
    for_folded = Pack.of(statistics, base=made / "net.folded.onnx")
    assert graph.to_bytes(for_folded.apply(made / "net.onnx")) == adapted_bytes(made, statistics)


def test_torch_takes_it_too(made, statistics):
    module = digits_cnn().eval()
    module.load_state_dict(torch.load(made / "net.pt"))
    state = copy.deepcopy(module.state_dict())
    for_file = Pack.of(statistics, base=made / "net.pt", factory=SPEC)
    expected = copy.deepcopy(module)
    set_statistics(expected, statistics)
    for base, factory in ((module, None), (made / "net.pt", SPEC)):
        adapted = for_file.apply(base, factory=factory)
        assert type(adapted).__name__ == type(module).__name__
        assert same_state(adapted.state_dict(), expected.state_dict())
    assert same_state(module.state_dict(), state)
    tensors = for_file.apply(made / "net.pt")
    assert same_state(tensors, dict(expected.state_dict()))
    straight = bnfold.fold(expected, DIGIT)
    applied = for_file.applied(open_base(made / "torch.folded.pt"))
    new = straight.model.state_dict()
    assert same_state({name: applied.state_dict[name] for name in new}, new)
    for_folded = Pack.of(statistics, base=made / "torch.folded.pt")
    assert same_state(for_folded.apply(module).state_dict(), expected.state_dict())


def test_another_base_is_refused_naming_both(made, rain, tmp_path):
    other = with_statistics(digits_cnn(), seed=9)
    bnfold.export(other, DIGIT, tmp_path / "other.onnx")
    ours, theirs = (
        bnfold.report.sha256(p)[:12] for p in (made / "net.onnx", tmp_path / "other.onnx")
    )
    with pytest.raises(InputError, match=f"made for net.onnx {ours}.*other.onnx {theirs}"):
        rain.apply(tmp_path / "other.onnx")
    with pytest.raises(InputError, match="is another network"):
        rain.apply(rain.apply(made / "net.onnx"))  # adapted already: not the base any more
    with pytest.raises(InputError, match="is another network"):
        rain.apply(other)
    # a folded file without its record, and one with another's
    (tmp_path / "alone.onnx").write_bytes((made / "net.folded.onnx").read_bytes())
    with pytest.raises(InputError, match="is another network"):
        rain.apply(tmp_path / "alone.onnx")
    record = bnfold.fold(other, DIGIT).record
    dataclasses.replace(record, files={"o.onnx": "0" * 64}).save(tmp_path / "r.safetensors")
    with pytest.raises(InputError, match="not what its record was written for"):
        rain.apply(made / "net.folded.onnx", tmp_path / "r.safetensors")
    with pytest.raises(UsageError, match="this is a int"):
        rain.apply(3)


def test_layers_of_other_sizes_are_refused(made, rain):
    layers = dict(rain.layers)
    layers["bn1"], layers["bn3"] = layers["bn3"], layers["bn1"]
    assert rain.layers["bn1"].mean.size != rain.layers["bn3"].mean.size
    with pytest.raises(InputError, match="'bn1' of 32 channels"):
        Pack(rain.base, layers).apply(made / "net.onnx")
    wrong = pack.PackLayer(0.25, rain.layers["bn1"].mean, rain.layers["bn1"].var)
    with pytest.raises(InputError, match=r"eps 0.25"):
        Pack(rain.base, {"bn1": wrong}).apply(made / "net.onnx")


def test_the_order_of_layers_matters_not_and_their_names_do(made, statistics):
    """Two layers of one size swapped: the network is another one, and the proof says so."""
    sizes = {name: new.mean.size for name, new in statistics.items()}
    a, b = next((a, b) for a in sizes for b in sizes if a < b and sizes[a] == sizes[b])
    right = Pack.of(statistics, base=made / "net.onnx")
    turned = Pack.of(dict(reversed(statistics.items())), base=made / "net.onnx")
    assert graph.to_bytes(right.apply(made / "net.onnx")) == graph.to_bytes(
        turned.apply(made / "net.onnx")
    )
    swapped = {**statistics, a: statistics[b], b: statistics[a]}
    wrong = Pack.of(swapped, base=made / "net.onnx").apply(made / "net.folded.onnx")
    report = bnfold.verify(right.apply(made / "net.onnx"), wrong)
    assert not report.passed
    bnfold.verify(right.apply(made / "net.onnx"), right.apply(made / "net.folded.onnx"))


# --- how far they are apart -----------------------------------------------------------------------


def test_the_difference_of_two_packs(made, rain, statistics):
    assert all(
        (row.kl, row.w2, row.mean_move, row.sd_move) == (0, 0, 0, 0) for row in diff(rain, rain)
    )
    name, one = next(iter(statistics.items()))
    mean, var = one.mean.copy(), one.var.copy()
    sd = np.sqrt(one.var + 1e-5)
    mean[2] += 2 * sd[2]
    var[5] = 4 * sd[5] ** 2 - 1e-5
    other = Pack.of({**statistics, name: Statistics(mean, var)}, base=made / "net.onnx")
    rows = {row.name: row for row in diff(rain, other)}
    assert rows[name].mean_move == pytest.approx(2, rel=1e-5)
    assert rows[name].sd_move == pytest.approx(1, rel=1e-5)
    n = rows[name].num_features
    assert rows[name].w2 == pytest.approx((4 + 1) / n, rel=1e-5)
    assert rows[name].kl == pytest.approx((4 + (1 / 8 + 2 - 1)) / n, rel=1e-5)
    assert all(row.kl == 0 for key, row in rows.items() if key != name)
    elsewhere = Pack({"x": "0" * 64}, rain.layers)
    with pytest.raises(InputError, match="the other for x 000"):
        diff(rain, elsewhere)


# --- the command line -----------------------------------------------------------------------------


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def nets(made, statistics, tmp_path):
    """The folder of networks, with an adapted ONNX file and an adapted checkpoint."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "adapted.onnx").write_bytes(adapted_bytes(made, statistics))
    module = digits_cnn()
    module.load_state_dict(torch.load(made / "net.pt"))
    set_statistics(module, statistics)
    torch.save(module.state_dict(), tmp_path / "adapted.pt")
    return tmp_path


def test_make_show_and_apply(nets, capsys):
    arguments = ("--base", nets / "net.onnx", "-o", nets / "rain.pack", "--sign", nets / "key.pem")
    noted = ("--data", "rain", "--images", "500", "--method", "exact")
    code, out, err = run(capsys, "pack", "make", nets / "adapted.onnx", *arguments, *noted)
    assert code == 0, err
    assert "The statistics of 4 batch norms" in out
    public = ("--public-key", nets / "key.pub.pem")
    code, out, _ = run(capsys, "pack", "show", nets / "rain.pack", *public, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["command"] == "pack show"
    facts = dict(document["diagnostics"]["rows"])
    assert (facts["data"], facts["images"], facts["method"]) == ("rain", "500", "exact")
    assert "(checked)" in facts["signed"]
    assert "not checked" in run(capsys, "pack", "show", nets / "rain.pack")[1]
    code, out, err = run(capsys, "pack", "apply", nets / "net.onnx", nets / "rain.pack", *public)
    assert code == 0, err
    assert "Proved by gates" in out
    assert (nets / "net.adapted.onnx").read_bytes() == (nets / "adapted.onnx").read_bytes()


def test_a_folded_base_is_folded_again_with_its_record(nets, capsys):
    folded = nets / "net.folded.onnx"
    assert run(capsys, "pack", "make", nets / "adapted.onnx", "--base", folded)[0] == 0
    code, out, err = run(capsys, "pack", "apply", folded, nets / "adapted.pack")
    assert code == 0, err
    assert "Proved by gates A, B, C" in out
    assert run(capsys, "fold", nets / "adapted.onnx", "--no-verify")[0] == 0
    new = nets / "net.folded.adapted.onnx"
    assert new.read_bytes() == (nets / "adapted.folded.onnx").read_bytes()
    # its record undoes it: what comes out is the adapted network, byte for byte
    code, out, _ = run(capsys, "unfold", new, "-o", nets / "back.onnx")
    assert code == 0
    assert "byte for byte" in out
    assert (nets / "back.onnx").read_bytes() == (nets / "adapted.onnx").read_bytes()
    code, out, _ = run(capsys, "verify", nets / "adapted.onnx", new)
    assert code == 0
    assert "Proved by gates A, B, C" in out


def test_checkpoints(nets, capsys):
    model = ("--model", SPEC)
    pack_file = nets / "adapted.pack"
    assert (
        run(capsys, "pack", "make", nets / "adapted.pt", "--base", nets / "net.pt", *model)[0] == 0
    )
    code, out, err = run(capsys, "pack", "apply", nets / "net.pt", pack_file)
    assert code == 0, err
    assert "was not run" in out
    expected = torch.load(nets / "adapted.pt")
    assert same_state(torch.load(nets / "net.adapted.pt")["state_dict"], expected)
    digits_cnn().load_state_dict(torch.load(nets / "net.adapted.pt")["state_dict"])
    code, out, err = run(
        capsys,
        "pack",
        "apply",
        nets / "torch.folded.pt",
        pack_file,
        "-o",
        nets / "x.pt",
        "-o",
        nets / "x.onnx",
    )
    assert code == 0, err
    assert run(capsys, "unfold", nets / "x.pt", "-o", nets / "y.pt")[0] == 0
    assert same_state(torch.load(nets / "y.pt")["state_dict"], expected)
    assert run(capsys, "pack", "apply", nets / "net.pt", pack_file, "-o", nets / "n.onnx")[0] == 2


def test_diff(nets, capsys, statistics):
    for name, scale in (("a", 1.0), ("b", 1.5)):
        new = {n: Statistics(s.mean, s.var * scale) for n, s in statistics.items()}
        Pack.of(new, base=nets / "net.onnx").save(nets / f"{name}.pack")
    code, out, _ = run(capsys, "pack", "diff", nets / "a.pack", nets / "b.pack")
    assert code == 0
    assert "4 layers, mean W2 0.0505" in out  # (sqrt(1.5) - 1)^2


def test_keygen(tmp_path, capsys):
    code, out, _ = run(capsys, "pack", "keygen", "-o", tmp_path / "mine")
    assert code == 0
    assert (tmp_path / "mine.pem").stat().st_mode & 0o777 == 0o600
    assert "PRIVATE KEY" not in out
    assert run(capsys, "pack", "keygen", "-o", tmp_path / "mine")[0] == 2
    assert run(capsys, "pack", "keygen", "-o", tmp_path / "no" / "mine")[0] == 2


def test_what_is_wrong_gets_a_sentence_and_no_file(nets, capsys, statistics):
    good = nets / "good.pack"
    Pack.of(statistics, base=nets / "net.onnx").save(good)
    (nets / "cut.pack").write_bytes(good.read_bytes()[:-5])
    other = with_statistics(digits_cnn(), seed=4)
    bnfold.export(other, DIGIT, nets / "other.onnx")
    before = sorted(path.name for path in nets.iterdir())
    for code, word, *arguments in (
        (2, "ACTION"),
        (3, "is another network", "apply", nets / "other.onnx", good),
        (3, "cut short", "apply", nets / "net.onnx", nets / "cut.pack"),
        (
            3,
            "is not signed",
            "apply",
            nets / "net.onnx",
            good,
            "--public-key",
            nets / "key.pub.pem",
        ),
        (3, "no pack at", "show", nets / "none.pack"),
        (2, "the input itself", "apply", nets / "net.onnx", good, "-o", nets / "net.onnx"),
        (2, "exists", "apply", nets / "net.onnx", good, "-o", nets / "adapted.onnx"),
        (2, "must be one of .onnx", "apply", nets / "net.onnx", good, "-o", nets / "n.pt"),
        (3, "nothing to pack", "make", nets / "net.pt", "--base", nets / "net.onnx"),
        (
            3,
            "the weight 'conv1.weight' differs",
            "make",
            nets / "other.onnx",
            "--base",
            nets / "net.onnx",
        ),
        (2, "exists", "make", nets / "adapted.onnx", "--base", nets / "net.onnx", "-o", good),
        (
            3,
            "no private key",
            "make",
            nets / "adapted.onnx",
            "--base",
            nets / "net.onnx",
            "--sign",
            nets / "key.pub.pem",
        ),
    ):
        found, out, err = run(capsys, "pack", *arguments)
        assert (found, out) == (code, ""), err
        assert word in err
        assert "Traceback" not in err
        assert sorted(path.name for path in nets.iterdir()) == before


def test_nothing_is_written_when_a_gate_fails(nets, capsys, statistics, monkeypatch):
    """Shown by a fold that takes one mean wrong, and by a graph in which a weight changed."""
    Pack.of(statistics, base=nets / "net.onnx").save(nets / "good.pack")
    before = sorted(path.name for path in nets.iterdir())
    real = bnfold.adapting.folded.apply

    def wrong(chosen):
        folded = real(chosen)
        value = folded.model.graph.initializers["conv1.bias"]
        array = value.const_value.numpy().copy()
        array[2] += 0.05
        value.const_value = ir.tensor(array, name="conv1.bias")
        return folded

    monkeypatch.setattr(bnfold.adapting.folded, "apply", wrong)
    code, out, _ = run(capsys, "pack", "apply", nets / "net.folded.onnx", nets / "good.pack")
    assert code == 1
    assert "No file was written" in out
    put = bnfold.adapting.base.graph_with

    def swapped(model, new):
        names = [n for n in new if new[n].mean.size == new["bn2"].mean.size]
        return put(model, {**new, names[0]: new[names[1]], names[1]: new[names[0]]})

    monkeypatch.setattr(bnfold.adapting.base, "graph_with", swapped)
    code, _, err = run(capsys, "pack", "apply", nets / "net.onnx", nets / "good.pack")
    assert code == 1
    assert "neither the base's nor the pack's" in err
    assert sorted(path.name for path in nets.iterdir()) == before
