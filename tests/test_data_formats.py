"""Files as they come: mapped arrays, tars, Hugging Face data sets, images that are odd or bad."""

import importlib
import io
import json
import os
import resource
import sys
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file
from test_data import BYTES, FLOATS, as_inputs, everything

from bnfold.data import open_data, shard
from bnfold.errors import InputError, RuntimeUnavailableError, UnsafeInputError, UsageError

LABELS = np.arange(10) % 3


def library(name):
    """An optional library, or a skip; where BNFOLD_REQUIRE_DATA=1, as in CI, it must be there."""
    if os.environ.get("BNFOLD_REQUIRE_DATA") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name)


# --- arrays that stay in their file ---------------------------------------------------------------


@pytest.mark.parametrize(
    "x", [FLOATS, BYTES, FLOATS.astype(">f8"), np.asfortranarray(FLOATS), FLOATS[::2]]
)
def test_what_an_npz_holds_uncompressed_is_mapped(tmp_path, x):
    path = tmp_path / "x.npz"
    np.savez(path, other=np.arange(7), x=x, y=np.arange(len(x)))
    data = open_data(path, seed=1, max_bytes=10)
    assert isinstance(data._reader._x, np.memmap)
    found = everything(data)
    wanted = as_inputs(x) if x.dtype == np.uint8 else x.astype(np.float32)
    np.testing.assert_allclose(found, wanted[data.labels], rtol=1e-6)


def test_a_mapped_npz_takes_no_memory(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros((20, 1000, 1000, 4), np.uint8))
    tracemalloc.start()
    try:
        data = open_data(path, samples=2, batch_size=1, input_shape=(1, 4, 1000, 1000))
        assert data._reader.read(np.array([3]))[0].shape == (1, 1000, 1000, 4)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_an_npz_whose_header_lies_about_its_shape_is_refused(tmp_path):
    """The array claims to be larger than its member: what lies behind it is not read as images."""
    header = (
        b"\x93NUMPY\x01\x00\x76\x00{'descr': '|u1', 'fortran_order': False, 'shape': (90, 4), }"
    )
    member = header.ljust(128) + bytes(40)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", member)
        archive.writestr("secret.npy", bytes(4000))
    with pytest.raises(InputError, match=r"x\.npy holds 40 bytes for \(90, 4\)"):
        open_data(tmp_path / "x.npz")


def test_a_mapped_array_with_a_wrong_checksum_is_refused(tmp_path):
    """Of more than zipfile reads ahead."""
    path = tmp_path / "x.npz"
    np.savez(path, x=np.tile(FLOATS, (20, 1, 1, 1)))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="Bad CRC-32"):
        open_data(path)


def test_an_encrypted_npz_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=FLOATS)
    raw = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(mark) + offset] |= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="encrypted"):
        open_data(path)


@pytest.mark.parametrize("x", [FLOATS, BYTES, FLOATS.astype(np.float16), FLOATS.astype(np.float64)])
def test_safetensors_are_read_by_sample(tmp_path, x):
    path = tmp_path / "data.safetensors"
    save_file({"x": x, "y": np.arange(10), "z": np.zeros(3)}, path)
    data = open_data(path, seed=1, batch_size=4)
    wanted = as_inputs(x) if x.dtype == np.uint8 else x.astype(np.float32)
    np.testing.assert_allclose(everything(data), wanted[data.labels], rtol=1e-6)
    assert (data.images, data.name, data.labels.dtype) == (10, "data.safetensors", np.int64)
    save_file({"pixels": x}, path)
    np.testing.assert_allclose(everything(open_data(path, shuffle=False)), wanted, rtol=1e-6)
    assert open_data(path).labels is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": FLOATS, "b": FLOATS}, "holds the arrays a, b; name the images 'x'"),
        ({"x": np.zeros((3, 4, 4), np.int32)}, "'x' in .* holds I32; images are bytes"),
        ({"x": np.zeros((0, 3, 4, 4), np.float32)}, "there must be one"),
        ({"x": FLOATS, "y": np.arange(9)}, "expected 10 integers"),
        ({f"layer{i}.weight": np.zeros(3) for i in range(20)}, r"layer\d+.weight, \.\.\.; name"),
    ],
)
def test_safetensors_that_hold_something_else_are_refused(tmp_path, arrays, words):
    save_file(arrays, tmp_path / "data.safetensors")
    with pytest.raises(InputError, match=words):
        open_data(tmp_path / "data.safetensors")


def test_a_broken_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "data.safetensors"
    save_file({"x": FLOATS}, path)
    whole = path.read_bytes()
    for content in (
        whole[:-8],
        whole[:40],
        b"",
        b"{}",
        whole.replace(b"[10,3,6,5]", b"[10,3,6,9]"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as a safetensors file"):
            open_data(path)


# --- tars -----------------------------------------------------------------------------------------


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(indices):
    files = {}
    for i in indices:
        files[f"{i:04}.png"] = encoded(BYTES[i])
        files[f"{i:04}.cls"] = b"%d\n" % LABELS[i]
        files[f"{i:04}.json"] = b"{}"
    return files


@pytest.fixture
def tars(tmp_path):
    library("webdataset")
    for number, indices in enumerate(np.split(np.arange(10), [4, 7])):
        write_tar(tmp_path / f"shard-{number:03}.tar", samples(indices))
    return tmp_path / "shard-{000..002}.tar"


def test_tars_give_their_samples_in_order_with_labels(tars):
    data = open_data(str(tars), shuffle=False, batch_size=4)
    np.testing.assert_allclose(everything(data), as_inputs(BYTES), rtol=1e-6)
    assert data.labels.tolist() == LABELS.tolist()
    assert (data.images, len(data), data.name) == (10, 3, "shard-{000..002}.tar")
    one = open_data(tars.parent / "shard-001.tar", shuffle=False)
    np.testing.assert_allclose(everything(one), as_inputs(BYTES[4:7]), rtol=1e-6)


def test_tars_are_shuffled_cut_and_sharded_as_any_data(tars):
    data = open_data(str(tars), seed=3, samples=6, batch_size=2)
    found = everything(data)
    assert data.labels.tolist() != LABELS[:6].tolist()
    np.testing.assert_array_equal(found, everything(data))
    parts = [list(shard(data, rank, 2)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [2, 1]
    np.testing.assert_array_equal(np.concatenate([parts[0][0], parts[1][0], parts[0][1]]), found)


def test_bad_images_in_a_tar_are_left_out_by_name(tars):
    write_tar(tars.parent / "bad.tar", samples([1]) | {"x.jpg": b"no image", "x.cls": b"2"})
    data = open_data(tars.parent / "bad.tar", shuffle=False)
    assert everything(data).shape == (1, 3, 6, 5)
    assert list(data.skipped) == ["bad.tar/x"]
    assert data.labels.tolist() == [1]


def test_a_pickle_in_a_tar_is_not_opened_and_links_are_not_followed(tars):
    bomb = b"cos\nsystem\n(S'touch %s/ran'\ntR." % os.fsencode(tars.parent)
    path = tars.parent / "bad.tar"
    write_tar(path, samples([1]) | {"0001.pyd": bomb, "0001.pickle": bomb, "0002.pth": bomb})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("0003.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    data = open_data(path)
    assert everything(data).shape == (1, 3, 6, 5)
    assert not data.skipped
    assert not (tars.parent / "ran").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.tar", "cannot be read as a tar: No such file or directory"),
        ("shard-{000..005}.tar", r"shard-003\.tar cannot be read as a tar: No such file"),
        ("text.tar", "cannot be read as a tar"),
        ("empty.tar", "holds no sample with an image"),
        ("labels.tar", "holds no sample with an image"),
        ("two.tar", r"sample a in .* holds several images \(left\.png, right\.png\)"),
        ("twice.tar", "cannot be read as a tar: a.png: duplicate file name"),
        ("packed.tar", "cannot be read as a tar"),
        ("cut.tar", "cannot be read as a tar: unexpected end of data"),
    ],
)
def test_tars_that_hold_something_else_are_refused(tars, name, words):
    folder = tars.parent
    png = encoded(BYTES[0])
    (folder / "text.tar").write_text("hello" * 500)
    write_tar(folder / "empty.tar", {})
    write_tar(folder / "labels.tar", {"a.cls": b"1", "b.txt": b"hello"})
    write_tar(folder / "two.tar", {"a.left.png": png, "a.right.png": png})
    write_tar(folder / "packed.tar", samples([1]), "w:gz")
    with tarfile.open(folder / "twice.tar", "w") as tar:
        for _ in range(2):
            member = tarfile.TarInfo("a.png")
            member.size = len(png)
            tar.addfile(member, io.BytesIO(png))
    whole = (folder / "shard-000.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[:600])
    with pytest.raises(InputError, match=words):
        list(open_data(str(folder / name)))


def test_commands_and_addresses_are_no_tars(tars):
    for spec in (f"pipe:touch {tars.parent}/ran; cat x.tar", "http://localhost:1/x.tar"):
        with pytest.raises((InputError, UsageError)):
            open_data(spec)
    assert not (tars.parent / "ran").exists()


def test_without_webdataset_tars_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    write_tar(tmp_path / "x.tar", samples([1]))
    with pytest.raises(RuntimeUnavailableError, match=r"bnfold\[webdataset\] brings it"):
        open_data(tmp_path / "x.tar")


# --- Hugging Face data sets -----------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves columns as a data set, and fails the test where the network is asked."""
    datasets = library("datasets")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    datasets.disable_progress_bars()

    def save(columns, splits=None, **kinds):
        kinds = {name: getattr(datasets, kind)(*args) for name, (kind, *args) in kinds.items()}
        data = datasets.Dataset.from_dict(columns)
        for name, kind in kinds.items():
            data = data.cast_column(name, kind)
        if splits:
            data = datasets.DatasetDict(dict.fromkeys(splits, data))
        data.save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return save


def pictures():
    return [{"bytes": encoded(pixels), "path": None} for pixels in BYTES]


@pytest.mark.parametrize("column", ["image", "img", "photo"])
def test_a_saved_data_set_gives_its_images_and_labels(saved, column):
    path = saved({column: pictures(), "label": LABELS.tolist()}, **{column: ["Image"]})
    for spec in (path, f"hf:{path}"):
        data = open_data(spec, shuffle=False, batch_size=4)
        np.testing.assert_allclose(everything(data), as_inputs(BYTES), rtol=1e-6)
        assert data.labels.tolist() == LABELS.tolist()
        assert (data.images, data.name) == (10, "saved")
    some = open_data(path, seed=3, samples=4)
    assert len(everything(some)) == 4
    assert some.labels.tolist() != LABELS[:4].tolist()


def test_a_saved_data_set_may_hold_arrays(saved):
    path = saved(
        {"pixel_values": FLOATS, "labels": LABELS.tolist()},
        pixel_values=["Array3D", (3, 6, 5), "float32"],
    )
    data = open_data(path, seed=2)
    order = np.random.default_rng(2).permutation(10)
    np.testing.assert_array_equal(everything(data), FLOATS[order])
    assert data.labels.tolist() == LABELS[order].tolist()


def test_a_split_is_chosen_by_name(saved):
    path = saved({"image": pictures()}, ["train", "test"], image=["Image"])
    assert open_data(f"hf:{path}:test").images == 10
    with pytest.raises(UsageError, match=r"has the splits train, test; write hf:.*saved:test, for"):
        open_data(path)
    with pytest.raises(UsageError, match="has the splits train, test, and no 'valid'"):
        open_data(f"hf:{path}:valid")


def test_bad_images_in_a_data_set_are_left_out(saved, tmp_path):
    """A path alone is not followed, although an image lies there."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(BYTES[4]))
    rows = pictures()
    rows[3] = {"bytes": b"no image", "path": None}
    rows[4] = {"bytes": None, "path": str(secret)}
    rows[5] = None
    path = saved({"image": rows})  # a struct; saved as images, the secret would be copied in
    info = json.loads((path / "dataset_info.json").read_text())
    info["features"] = {"image": {"_type": "Image"}}
    (path / "dataset_info.json").write_text(json.dumps(info))
    data = open_data(path, shuffle=False)
    assert len(everything(data)) == 7
    assert list(data.skipped) == ["sample 3", "sample 4", "sample 5"]
    assert "path only" in data.skipped["sample 4"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["a", "b"]}, "has the columns text; images are looked for in image, img"),
        ({"pixel_values": [[1, 2], [3, 4]]}, "holds int64; images are bytes"),
        ({"pixel_values": [[1.0, 2.0], [3.0]]}, "differ in shape"),
        ({"image": ["a", "b"]}, "holds an array of shape"),
    ],
)
def test_data_sets_that_hold_something_else_are_refused(saved, columns, words):
    with pytest.raises(InputError, match=words):
        list(open_data(saved(columns)))


def test_a_folder_that_is_no_data_set_is_refused(saved, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="no data set as save_to_disk writes it"):
        open_data(f"hf:{tmp_path / 'mine'}")
    path = saved({"image": pictures()}, image=["Image"])
    with pytest.raises(UsageError, match="without splits; leave :test out"):
        open_data(f"hf:{path}:test")
    (path / "data-00000-of-00001.arrow").write_bytes(b"hello")
    with pytest.raises(InputError, match="saved cannot be loaded"):
        open_data(path)


def test_without_the_library_data_sets_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeUnavailableError, match=r"bnfold\[hf\] brings it"):
        open_data("hf:mnist")


# --- images that are odd, or bad --------------------------------------------------------------


def png_chunk(kind, content):
    body = kind + content
    return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def png_bomb(width, height):
    """A PNG of a few hundred bytes that claims so many pixels."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    data = zlib.compress(bytes(1 << 16), 9)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(*part) for part in ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    )


def test_bombs_are_left_out_by_name_before_they_are_unpacked(tmp_path):
    Image.fromarray(BYTES[0]).save(tmp_path / "a.png")
    (tmp_path / "pixels.png").write_bytes(png_bomb(10_000, 10_000))  # a warning of Pillow's
    (tmp_path / "more.png").write_bytes(png_bomb(65_000, 65_000))  # an error of Pillow's
    text = PngImagePlugin.PngInfo()
    text.add_itxt("comment", "a" * (80 << 20), zip=True)
    Image.fromarray(BYTES[0]).save(tmp_path / "text.png", pnginfo=text)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 200_000
    data = open_data(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert everything(data).shape == (1, 3, 6, 5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert set(data.skipped) == {"pixels.png", "more.png", "text.png"}
    assert "bomb" in data.skipped["pixels.png"]
    assert "bomb" in data.skipped["more.png"]
    assert "too large" in data.skipped["text.png"]


def one(path, **options):
    (image,) = everything(open_data(path, **options))
    return image


def test_a_truncated_jpeg_is_left_out(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    data = open_data(tmp_path)
    assert everything(data).shape == (1, 3, 64, 64)
    assert "truncated" in data.skipped["b.jpg"]


def test_cmyk_palette_and_alpha_become_rgb(tmp_path):
    flat = np.full((6, 5, 3), (200, 100, 50), np.uint8)
    for name, mode in (("c.jpg", "CMYK"), ("p.png", "P"), ("a.png", "RGBA"), ("la.png", "LA")):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        image = Image.fromarray(flat).convert(mode)
        if mode == "RGBA":
            image.putalpha(0)
        image.save(folder / name, **({"transparency": b"\x80" * 5} if mode == "P" else {}))
        found = one(folder, mean=(0, 0, 0)) * 255
        wanted = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        assert np.abs(found - wanted).max() <= 3


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (5, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert one(tmp_path)[:, 0, 0].tolist() == [1, 0, 0]


def test_an_orientation_in_the_metadata_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(BYTES[0]).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_allclose(one(tmp_path), as_inputs(BYTES[:1])[0], rtol=1e-6)


def test_links_are_followed_and_loops_end(tmp_path):
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(BYTES[0]).save(root / "a" / "0.png")
    Image.fromarray(BYTES[1]).save(tmp_path / "elsewhere" / "1.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "gone.png").symlink_to(root / "nothing.png")
    (root / "a" / "self.png").symlink_to(root / "a" / "self.png")
    data = open_data(root, shuffle=False)
    np.testing.assert_allclose(everything(data), as_inputs(BYTES[:2]), rtol=1e-6)
    assert data.labels.tolist() == [0, 1]


def test_what_has_no_images_suffix_is_no_image(tmp_path):
    Image.fromarray(BYTES[0]).save(tmp_path / "A.PNG")
    for name in ("notes.txt", "x.svg", "y.pdf", "z.eps", "png", "archive.zip"):
        (tmp_path / name).write_bytes(encoded(BYTES[1]))
    data = open_data(tmp_path)
    assert (data.images, len(everything(data)), dict(data.skipped)) == (1, 1, {})


def test_the_first_image_decides_whatever_is_read_first(tmp_path):
    """In each process of several, and for each seed."""
    for i in range(8):
        mode = "L" if i == 0 else "RGB"
        Image.fromarray(BYTES[i]).convert(mode).save(tmp_path / f"{i}.png")
    for seed in range(4):
        assert everything(open_data(tmp_path, seed=seed)).shape == (8, 1, 6, 5)
        assert everything(shard(open_data(tmp_path, seed=seed, batch_size=1), 1, 2)).shape[1] == 1


def test_large_images_are_made_small_a_few_at_a_time(tmp_path):
    """24 pictures of a megapixel have 72 MB decoded, and one of them as floats 12."""
    Image.new("RGB", (1000, 1000), "red").save(tmp_path / "0.jpg")
    for i in range(1, 24):
        os.link(tmp_path / "0.jpg", tmp_path / f"{i}.jpg")
    data = open_data(tmp_path, resize=32)
    tracemalloc.start()
    try:
        (batch,) = data
        assert batch.shape == (24, 3, 32, 32)
        assert tracemalloc.get_traced_memory()[1] < 75 << 20
    finally:
        tracemalloc.stop()


def test_a_factorys_file_may_be_called_digits(tmp_path, monkeypatch):
    (tmp_path / "digits.py").write_text("def data():\n    return [[1.0]]\n")
    monkeypatch.chdir(tmp_path)
    assert list(open_data("digits.py:data")) == [[1.0]]


def test_a_pickled_npz_member_is_refused_where_it_lies_uncompressed(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UnsafeInputError, match="pickled Python objects"):
        open_data(tmp_path / "x.npz")
