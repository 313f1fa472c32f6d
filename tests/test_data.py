"""Data of every form becomes the same batches, and what does not fit is refused in one sentence."""

import subprocess
import sys

import numpy as np
import pytest
import realdata
import torch
from PIL import Image
from torch.nn import functional

from bnfold.adapting.adapt import adapt
from bnfold.data import SHIFTS, open_data, resized, shard, shifted
from bnfold.errors import (
    InputError,
    RuntimeUnavailableError,
    UnsafeInputError,
    UsageError,
)

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)
FLOATS = RNG.standard_normal((10, 3, 6, 5)).astype(np.float32)


def save(path, array):
    np.save(path, array)
    return path


def everything(batches):
    return np.concatenate(list(batches))


def as_inputs(pixels):
    return pixels.astype(np.float32).transpose(0, 3, 1, 2) / np.float32(255)


# --- arrays ---------------------------------------------------------------------------------------


def test_floats_pass_as_they_are(tmp_path):
    data = open_data(save(tmp_path / "x.npy", FLOATS), batch_size=4, shuffle=False)
    batches = list(data)
    assert [batch.shape for batch in batches] == [(4, 3, 6, 5), (4, 3, 6, 5), (2, 3, 6, 5)]
    assert batches[0].dtype == np.float32
    np.testing.assert_array_equal(everything(data), FLOATS)
    assert (data.images, len(data), data.labels, data.name) == (10, 3, None, "x.npy")


def test_an_npy_file_is_mapped_and_not_changed(tmp_path):
    path = save(tmp_path / "x.npy", FLOATS)
    data = open_data(path, shuffle=False, mean=[1], std=[2])
    assert isinstance(data._reader._x, np.memmap)
    np.testing.assert_allclose(everything(data), (FLOATS - 1) / 2, rtol=1e-6)
    np.testing.assert_array_equal(np.load(path), FLOATS)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_other_floats_become_float32(tmp_path, dtype):
    path = save(tmp_path / "x.npy", FLOATS.astype(dtype))
    found = everything(open_data(path, shuffle=False))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, FLOATS, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("stored", "options"),
    [
        (BYTES, {}),
        (BYTES, {"input_shape": (None, 3, 6, 5)}),
        (BYTES.transpose(0, 3, 1, 2), {}),
        (BYTES.transpose(0, 3, 1, 2), {"input_shape": ("batch", 3, "height", "width")}),
        (np.concatenate([BYTES, BYTES[..., :1]], axis=3), {}),
        (np.concatenate([BYTES, BYTES[..., :1]], axis=3), {"mean": (0, 0, 0)}),
    ],
    ids=["NHWC", "NHWC, shape", "NCHW", "NCHW, shape", "RGBA", "RGBA, mean"],
)
def test_bytes_are_scaled_and_put_channels_first(tmp_path, stored, options):
    data = open_data(save(tmp_path / "x.npy", stored), shuffle=False, **options)
    np.testing.assert_allclose(everything(data), as_inputs(BYTES), rtol=1e-6)


def test_grey_bytes_get_a_channel_axis(tmp_path):
    path = save(tmp_path / "x.npy", BYTES[..., 0])
    for shape in (None, (1, 1, 6, 5)):
        found = everything(open_data(path, shuffle=False, input_shape=shape))
        np.testing.assert_allclose(found, as_inputs(BYTES[..., :1]), rtol=1e-6)


def test_square_bytes_follow_the_shape_of_the_network(tmp_path):
    """(N, 3, 3, 3): as bytes the channels are taken to be last, as floats to be first."""
    x = BYTES[:, :3, :3]
    path = save(tmp_path / "x.npy", x)
    with pytest.raises(InputError, match="first or last"):
        list(open_data(path))
    found = everything(open_data(path, shuffle=False, input_shape=(1, 3, 3, 3)))
    np.testing.assert_allclose(found, as_inputs(x), rtol=1e-6)
    path = save(tmp_path / "y.npy", x.astype(np.float32))
    found = everything(open_data(path, shuffle=False, input_shape=(1, 3, 3, 3)))
    np.testing.assert_array_equal(found, x)


def test_floats_with_channels_last_follow_the_shape_of_the_network(tmp_path):
    path = save(tmp_path / "x.npy", FLOATS.transpose(0, 2, 3, 1))
    found = everything(open_data(path, shuffle=False, input_shape=(1, 3, 6, 5)))
    np.testing.assert_array_equal(found, FLOATS)


def test_other_ranks_pass(tmp_path):
    x = FLOATS.reshape(10, -1)
    data = open_data(save(tmp_path / "x.npy", x), shuffle=False, input_shape=(None, 90))
    np.testing.assert_array_equal(everything(data), x)


def test_mean_std_and_scale_are_applied_per_channel_in_this_order(tmp_path):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    path = save(tmp_path / "x.npy", BYTES)
    found = everything(open_data(path, shuffle=False, mean=mean, std=std))
    wanted = (as_inputs(BYTES) - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    found = everything(open_data(path, shuffle=False, input_scale=2.0))
    np.testing.assert_array_equal(found, 2.0 * BYTES.transpose(0, 3, 1, 2))


def test_the_order_is_drawn_once_by_the_seed(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=FLOATS, y=np.arange(10))
    data = open_data(path, seed=3)
    np.testing.assert_array_equal(everything(data), everything(data))
    np.testing.assert_array_equal(everything(data), FLOATS[data.labels])
    assert data.labels.tolist() != list(range(10))
    assert data.labels.tolist() == open_data(path, seed=3).labels.tolist()
    assert data.labels.tolist() != open_data(path, seed=4).labels.tolist()
    some = open_data(path, seed=3, samples=4)
    assert (some.images, some.labels.tolist()) == (4, data.labels[:4].tolist())
    assert open_data(path, shuffle=False, samples=4).labels.tolist() == [0, 1, 2, 3]
    assert open_data(path, samples=100).images == 10


def test_an_archive_may_hold_one_array_of_any_name(tmp_path):
    np.savez_compressed(tmp_path / "one.npz", pixels=BYTES, y=np.zeros(10, np.int32))
    data = open_data(tmp_path / "one.npz", shuffle=False)
    np.testing.assert_allclose(everything(data), as_inputs(BYTES), rtol=1e-6)
    assert data.labels.dtype == np.int64
    np.savez(tmp_path / "two.npz", a=BYTES, b=BYTES)
    with pytest.raises(InputError, match=r"holds the arrays a, b; name the images 'x'"):
        open_data(tmp_path / "two.npz")


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1000, 8, 8, 1), np.uint8))
    assert (tmp_path / "x.npz").stat().st_size < 2000
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UnsafeInputError, match="unpacks to 64128 bytes, more than the 50000"):
        open_data(tmp_path / "x.npz", max_bytes=50_000)


def test_an_archive_whose_sizes_lie_is_refused(tmp_path):
    """The entry claims fewer bytes than it holds: what is beyond them is not unpacked."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.zeros((100, 8, 8, 1), np.uint8))
    raw = path.read_bytes()
    assert raw.count((6528).to_bytes(4, "little")) == 2
    path.write_bytes(raw.replace((6528).to_bytes(4, "little"), (200).to_bytes(4, "little")))
    with pytest.raises(InputError, match="cannot be read"):
        open_data(path)


def test_pickled_objects_are_refused(tmp_path):
    array = np.array([{"a": 1}], dtype=object)
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=array)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(UnsafeInputError, match="pickled Python objects"):
            open_data(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no data that bnfold reads"),
        (b"hello", "no data that bnfold reads"),
        (b"\x93NUMPY\x01\x00", "cannot be read as a NumPy file"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'}", "cannot be read as a NumPy file"),
        (b"PK\x03\x04" + b"\0" * 40, "cannot be read as a NumPy file"),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path, content, words):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_data(tmp_path / "x.npy")


def test_a_truncated_file_is_refused(tmp_path):
    path = save(tmp_path / "x.npy", FLOATS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read as a NumPy file"):
        open_data(path)
    np.savez(tmp_path / "x.npz", x=FLOATS)
    raw = bytearray((tmp_path / "x.npz").read_bytes())
    raw[300] ^= 255
    (tmp_path / "x.npz").write_bytes(raw)
    with pytest.raises(InputError, match="cannot be read as a NumPy file"):
        open_data(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("array", "options", "words"),
    [
        (np.float32(1).reshape(()), {}, r"array of shape \(\)"),
        (np.zeros(5, np.float32), {}, r"array of shape \(5,\)"),
        (np.zeros((0, 3, 4, 4), np.float32), {}, "there must be one"),
        (np.zeros((5, 3, 4, 4), np.int64), {}, "holds int64; images are bytes"),
        (FLOATS, {"input_shape": (1, 1, 6, 5)}, r"\(3, 6, 5\), but the network takes \(1, 6, 5\)"),
        (FLOATS, {"input_shape": (1, 3, 8, 8)}, r"takes \(3, 8, 8\)\. Give resize"),
        (FLOATS, {"input_shape": (1, 90)}, r"takes \(90\)"),
        (FLOATS, {"mean": (0.5, 0.5)}, "3 channels; mean and std have 2 values"),
        (BYTES[..., :2], {"mean": (0.0, 0.0, 0.0)}, "6 channels; mean and std have 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both(tmp_path, array, options, words):
    with pytest.raises(InputError, match=words):
        list(open_data(save(tmp_path / "x.npy", array), **options))


def test_labels_that_do_not_fit_are_refused(tmp_path):
    for y in (np.arange(9), np.zeros((10, 2), int), np.zeros(10)):
        np.savez(tmp_path / "x.npz", x=FLOATS, y=y)
        with pytest.raises(InputError, match="expected 10 integers"):
            open_data(tmp_path / "x.npz")


def test_nan_is_refused_with_the_sample(tmp_path):
    x = FLOATS.copy()
    x[7, 0, 1, 1] = np.nan
    with pytest.raises(InputError, match=r"Sample 7 of x\.npy holds NaN"):
        list(open_data(save(tmp_path / "x.npy", x)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"std": (1.0, 0.0, 1.0)}, "std is 1,0,1"),
        ({"mean": (1.0, 0.0), "std": (1.0, 1.0, 1.0)}, "mean has 2 values and std 3"),
        ({"mean": (1.0, 0.0), "input_shape": (1, 3, 6, 5)}, "the network takes 3 channels"),
        ({"input_scale": 0.0}, "input_scale is 0"),
        ({"resize": (1, 2, 3)}, "resize is 1,2,3"),
        ({"resize": 0}, "resize is 0"),
        ({"resize": 3, "preprocess": abs}, "resize cannot be given as well"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        open_data(save(tmp_path / "x.npy", FLOATS), **options)


def test_what_does_not_exist_is_told_with_its_neighbour(tmp_path):
    save(tmp_path / "target.npy", FLOATS)
    with pytest.raises(InputError, match=r"does not exist; did you mean .*target\.npy\?"):
        open_data(tmp_path / "targte.npy")


def test_preprocess_makes_the_input_from_a_stored_image(tmp_path):
    path = save(tmp_path / "x.npy", BYTES)
    grey = open_data(path, shuffle=False, preprocess=lambda image: image.mean(2)[None] / 255)
    found = everything(grey)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, as_inputs(BYTES).mean(1, keepdims=True), rtol=1e-5)
    (tmp_path / "mine.py").write_text("def flat(image):\n    return image.reshape(-1) * 1.0\n")
    flat = open_data(path, shuffle=False, preprocess=f"{tmp_path / 'mine.py'}:flat")
    np.testing.assert_array_equal(everything(flat), BYTES.reshape(10, -1))


def test_a_preprocess_that_fails_is_told(tmp_path):
    path = save(tmp_path / "x.npy", BYTES)
    for function, words in (
        (lambda _: 1 / 0, "preprocess failed with ZeroDivisionError"),
        (lambda image: image[: image[0, 0, 0] % 5], "preprocess returned different shapes"),
        (lambda _: "no", "preprocess returned type <U2"),
    ):
        with pytest.raises(InputError, match=words):
            list(open_data(path, preprocess=function))


# --- resizing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 5), (12, 9), (3, 5), (4, 2), (1, 1), (7, 4)])
def test_resizing_is_torchs_antialiased_bilinear(size):
    x = RNG.random((2, 3, 6, 5), dtype=np.float32)
    wanted = functional.interpolate(
        torch.from_numpy(x), size=size, mode="bilinear", align_corners=False, antialias=True
    )
    np.testing.assert_allclose(resized(x, size), wanted.numpy(), atol=1e-6)


def test_enlarging_is_torchs_plain_bilinear():
    x = RNG.random((2, 1, 16, 16), dtype=np.float32)
    wanted = functional.interpolate(torch.from_numpy(x), size=20, mode="bilinear")
    np.testing.assert_allclose(resized(x, (20, 20)), wanted.numpy(), atol=1e-6)


def test_resize_comes_before_mean_and_std(tmp_path):
    path = save(tmp_path / "x.npy", BYTES)
    found = everything(open_data(path, shuffle=False, resize=4, mean=[0.5], std=[0.25]))
    np.testing.assert_allclose(found, (resized(as_inputs(BYTES), (4, 4)) - 0.5) / 0.25, atol=1e-6)
    assert everything(open_data(path, resize=(4, 7))).shape == (10, 3, 4, 7)


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for i, pixels in enumerate(BYTES):
        path = root / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (root / "class0" / "notes.txt").write_text("not an image")
    return root


def test_a_folder_gives_its_images_in_the_order_of_their_paths(folder):
    data = open_data(folder, shuffle=False, batch_size=4)
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    np.testing.assert_allclose(everything(data), as_inputs(BYTES[order]), rtol=1e-6)
    assert (data.images, len(data), data.name) == (10, 3, "images")
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    assert data._reader.classes == ("class0", "class1")


def test_the_network_or_the_mean_decides_between_grey_and_colour(folder):
    grey = np.stack([np.asarray(Image.fromarray(pixels).convert("L")) for pixels in BYTES])
    wanted = (grey / 255)[[0, 2, 4, 6, 8, 1, 3, 5, 7, 9], None]
    data = open_data(folder, shuffle=False, input_shape=(None, 1, 6, 5))
    np.testing.assert_allclose(everything(data), wanted, rtol=1e-6)
    colour = open_data(folder, mean=(0, 0, 0), std=(1, 1, 1))
    assert everything(colour).shape == (10, 3, 6, 5)
    with pytest.raises(InputError, match="the network takes 2"):
        open_data(folder, input_shape=(None, 2, 6, 5))


@pytest.mark.parametrize(
    ("mode", "shape"), [("L", (1, 6, 5)), ("1", (1, 6, 5)), ("P", (3, 6, 5)), ("RGBA", (3, 6, 5))]
)
def test_the_first_image_decides_where_nothing_else_does(tmp_path, mode, shape):
    Image.fromarray(BYTES[0]).convert(mode).save(tmp_path / "a.png")
    assert everything(open_data(tmp_path)).shape == (1, *shape)


def test_16_bit_grey_is_read_as_the_nearest_bytes(tmp_path):
    wide = BYTES[0, :, :, 0].astype(np.uint16) * 257
    Image.fromarray(wide ^ 7).save(tmp_path / "a.png")
    np.testing.assert_allclose(everything(open_data(tmp_path)), as_inputs(BYTES[:1, :, :, :1]))


def test_unreadable_images_are_left_out_by_name(folder):
    (folder / "class0" / "2.png").write_bytes(b"no image")
    whole = (folder / "class1" / "3.png").read_bytes()
    (folder / "class1" / "3.png").write_bytes(whole[:60])
    data = open_data(folder, shuffle=False, batch_size=4)
    order = [0, 4, 6, 8, 1, 5, 7, 9]
    for _ in range(2):
        np.testing.assert_allclose(everything(data), as_inputs(BYTES[order]), rtol=1e-6)
        assert [len(batch) for batch in data] == [3, 3, 2]
    assert data.images == 8
    assert data.labels.tolist() == [i % 2 for i in order]
    assert set(data.skipped) == {"class0/2.png", "class1/3.png"}


def test_a_folder_of_unreadable_images_is_refused(tmp_path):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"None of the 2 images in .* can be read; [ab]\.\w+: "):
        list(open_data(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        open_data(tmp_path / "empty")


def test_a_decompression_bomb_is_left_out(tmp_path, monkeypatch):
    Image.fromarray(BYTES[0]).save(tmp_path / "a.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # more than it, less than twice
    data = open_data(tmp_path)
    assert everything(data).shape == (1, 3, 6, 5)
    assert "bomb" in data.skipped["bomb.png"]


def test_formats_that_run_other_programs_are_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    with pytest.raises(InputError, match="cannot identify"):
        list(open_data(tmp_path))


def test_images_of_several_sizes_need_resize(folder):
    Image.fromarray(BYTES[0, :4]).save(folder / "class0" / "2.png")
    with pytest.raises(InputError, match=r"different shapes, such as \(4, 5, 3\) and \(6, 5, 3\)"):
        list(open_data(folder, shuffle=False))
    found = everything(open_data(folder, shuffle=False, resize=6))
    assert found.shape == (10, 3, 6, 6)
    small = resized(as_inputs(BYTES[:1, :4]), (6, 6))
    np.testing.assert_allclose(found[1:2], small, atol=1e-6)


def test_images_are_resized_as_pillow_does(folder):
    wanted = Image.fromarray(BYTES[0]).resize((3, 4), Image.Resampling.BILINEAR)
    found = everything(open_data(folder, shuffle=False, resize=(4, 3)))[0]
    assert np.abs(found - as_inputs(np.asarray(wanted)[None])[0]).max() <= 1.01 / 255


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shards_are_every_nth_batch_and_all_of_them_are_the_whole(tmp_path, size):
    path = tmp_path / "x.npz"
    np.savez(path, x=FLOATS, y=np.arange(10))
    whole = list(open_data(path, batch_size=2, seed=3))
    seen = set()
    for rank in range(size):
        data = shard(open_data(path, batch_size=2, seed=3), rank, size)
        found = list(data)
        assert len(found) == len(data) == len(whole[rank::size])
        for batch, wanted in zip(found, whole[rank::size], strict=True):
            np.testing.assert_array_equal(batch, wanted)
        assert data.images == sum(map(len, found)) == len(data.labels)
        np.testing.assert_array_equal(FLOATS[data.labels], np.concatenate([FLOATS[:0], *found]))
        assert data.name == "x.npz"
        seen |= set(data.labels.tolist())
    assert seen == set(range(10))


def test_a_shard_reads_no_image_of_the_others(folder):
    for name in ("class0/2.png", "class0/6.png"):
        (folder / name).write_bytes(b"no image")
    first, second = (
        shard(open_data(folder, shuffle=False, batch_size=1, samples=4), rank, 2) for rank in (0, 1)
    )
    assert len(list(first)) == 2
    assert not first.skipped
    assert list(second) == []  # both unreadable: the other part may hold what counts
    assert set(second.skipped) == {"class0/2.png", "class0/6.png"}


def test_shards_of_any_iterable_are_read_again_and_of_an_iterator_once():
    data = shard([1, 2, 3, 4, 5], 1, 2)
    assert (list(data), list(data)) == ([2, 4], [2, 4])
    data = shard(iter([1, 2, 3, 4, 5]), 0, 2)
    assert (list(data), list(data)) == ([1, 3, 5], [])


# --- factories and digits -------------------------------------------------------------------------

FACTORIES = """
import numpy as np
calls = []

def generator():
    calls.append(1)
    for i in range(3):
        yield np.full((4, 1, 2, 2), i, np.float32), np.arange(4)

def mappings():
    return [{"x": np.ones((4, 2)), "mask": np.ones(4), "gain": 2.0}] * 3

def opaque():
    return ["a", "b"]

def array():
    return np.zeros((4, 1, 2, 2))

def fails():
    yield np.zeros((4, 1, 2, 2))
    raise OSError("disk")
"""


@pytest.fixture
def factories(tmp_path):
    (tmp_path / "made.py").write_text(FACTORIES)
    return lambda name, **options: open_data(f"{tmp_path / 'made.py'}:{name}", **options)


def test_a_factory_is_called_anew_for_each_pass(factories):
    data = factories("generator")
    assert data.images is None
    first, second = list(data), list(data)
    assert len(first) == len(second) == 3
    assert data.images == 12


def test_a_shard_of_a_factory_reads_it_whole_and_keeps_its_part(factories):
    data = shard(factories("generator"), 1, 2)
    for _ in range(2):
        assert [float(x.mean()) for x, _ in data] == [1.0]
    assert data.name.endswith("made.py:generator")


def test_samples_cut_the_last_batch_of_a_factory(factories):
    data = factories("generator", samples=6)
    (x, y), (x2, y2) = data
    assert (len(x), len(y), len(x2), len(y2)) == (4, 4, 2, 2)
    assert data.images == 6
    batches = list(factories("mappings", samples=5))
    assert [len(batch["mask"]) for batch in batches] == [4, 1]
    assert batches[1]["gain"] == 2.0
    assert list(factories("opaque")) == ["a", "b"]


def test_preprocess_takes_a_factorys_batches(factories):
    data = factories("generator", preprocess=lambda batch: batch[0] + 1)
    assert [float(batch.mean()) for batch in data] == [1.0, 2.0, 3.0]


def test_what_a_factory_does_wrong_is_told(factories):
    with pytest.raises(UsageError, match=r"returned an array of shape \(4, 1, 2, 2\)"):
        list(factories("array"))
    with pytest.raises(UsageError, match="mean and resize cannot be given as well"):
        factories("generator", mean=[1.0], resize=4)
    with pytest.raises(UsageError, match="has no 'missing'"):
        factories("missing")
    with pytest.raises(InputError, match="could not be read after 1 batches: OSError: disk"):
        adapt(torch.nn.Sequential(torch.nn.BatchNorm2d(1)), factories("fails"))


def test_the_digits_are_split_once_and_for_all():
    train, test, whole = (
        open_data(spec, shuffle=False) for spec in ("digits:train", "digits:test", "digits")
    )
    assert (train.images, test.images, whole.images) == (1437, 360, 1797)
    x = everything(whole)
    assert x.shape == (1797, 1, 8, 8)
    assert (x.min(), x.max()) == (0, 1)
    rows = {row.tobytes() for row in everything(train)} | {
        row.tobytes() for row in everything(test)
    }
    assert rows == {row.tobytes() for row in x}
    assert set(test.labels.tolist()) == set(range(10))
    assert everything(open_data("digits", resize=16, samples=5)).shape == (5, 1, 16, 16)
    with pytest.raises(UsageError, match="no part 'valid'"):
        open_data("digits:valid")


def test_without_scikit_learn_the_digits_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RuntimeUnavailableError, match="scikit-learn, which is not installed"):
        open_data("digits")


def test_reading_data_does_not_import_torch(tmp_path):
    path = save(tmp_path / "x.npy", BYTES)
    code = (
        "import sys; from bnfold.data import open_data;"
        f"list(open_data({str(path)!r}, resize=4, mean=[.5])); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- shifts ---------------------------------------------------------------------------------------

UNIT = RNG.random((3, 2, 9, 8), dtype=np.float32)
AMOUNTS = {
    "gaussian_noise": 0.1,
    "salt_and_pepper": 0.2,
    "contrast": 0.4,
    "brightness": 0.2,
    "blur": 1.0,
    "pixelate": 3,
    "invert": 1.0,
}


def test_every_shift_is_tested():
    assert AMOUNTS.keys() == SHIFTS.keys()


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_is_pure_seeded_and_stays_in_range(name):
    before = UNIT.copy()
    found = shifted(UNIT, name, AMOUNTS[name], seed=1)
    assert found.shape == UNIT.shape
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert not np.array_equal(found, UNIT)
    np.testing.assert_array_equal(UNIT, before)
    np.testing.assert_array_equal(found, shifted(UNIT, name, AMOUNTS[name], seed=1))
    random = name in ("gaussian_noise", "salt_and_pepper")
    assert random != np.array_equal(found, shifted(UNIT, name, AMOUNTS[name], seed=2))


def test_shifts_do_what_they_say():
    grey = np.full((64, 1, 32, 32), 0.5, np.float32)
    assert shifted(grey, "gaussian_noise", 0.1).std() == pytest.approx(0.1, rel=0.02)
    spots = shifted(grey, "salt_and_pepper", 0.2)
    assert (spots == 1).mean() == pytest.approx(0.1, rel=0.1)
    assert (spots == 0).mean() == pytest.approx(0.1, rel=0.1)
    np.testing.assert_allclose(shifted(UNIT, "contrast", 0.4), 0.5 + 0.4 * (UNIT - 0.5), atol=1e-6)
    np.testing.assert_allclose(
        shifted(UNIT, "brightness", 0.2), np.minimum(UNIT + 0.2, 1), atol=1e-6
    )
    np.testing.assert_allclose(shifted(UNIT, "invert", 1.0), 1 - UNIT, atol=1e-6)
    np.testing.assert_array_equal(shifted(UNIT, "blur", 0), UNIT)
    np.testing.assert_allclose(shifted(grey, "blur", 2.0), grey, atol=1e-6)
    point = np.zeros((1, 1, 15, 15), np.float32)
    point[0, 0, 7, 7] = 1
    spread = shifted(point, "blur", 1.0)[0, 0]
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    rows = np.arange(15) - 7
    assert (spread.sum(1) * rows**2).sum() == pytest.approx(1.0, rel=0.05)
    squares = shifted(UNIT, "pixelate", 3)
    np.testing.assert_array_equal(
        squares[:, :, 0:3, 3:6], UNIT[:, :, 1:2, 4:5].repeat(3, 2).repeat(3, 3)
    )


def test_a_shift_refuses_what_it_cannot_shift():
    with pytest.raises(UsageError, match="no shift 'fog'; there are gaussian_noise"):
        shifted(UNIT, "fog", 1)
    with pytest.raises(UsageError, match=r"found shape \(9, 8\)"):
        shifted(UNIT[0, 0], "blur", 1)
    with pytest.raises(UsageError, match="before mean and std"):
        shifted(UNIT * 2, "blur", 1)


# --- the real thing -------------------------------------------------------------------------------


def test_mnist_m_from_its_file_adapts_lenet5(shared_data):
    """The stored bytes with mean of RGB and size 28 as preprocess: 31.7 -> 52.4 %."""
    path = shared_data / "digits/mnistm_test5000.npz"

    def grey28(image):
        grey = torch.from_numpy(image.astype(np.float32) / 255).mean(2)[None, None]
        return functional.interpolate(grey, size=28, mode="bilinear")[0].numpy()

    data = open_data(path, batch_size=250, preprocess=grey28, input_shape=(None, 1, 28, 28))
    net = realdata.load_model(shared_data, "mnist_lenet5")
    adapted = adapt(net, data, diagnose=False).model
    x = everything(data)
    assert realdata.accuracy(net, x, data.labels) == pytest.approx(31.7, abs=0.1)
    assert realdata.accuracy(adapted, x, data.labels) == pytest.approx(52.4, abs=0.2)


def test_contrast_on_cifar_costs_accuracy_and_adapting_brings_it_back(shared_data):
    with np.load(shared_data / "cifar10/cifar10_test_first761.npz") as file:
        pixels, y = file["x"][:200], file["y"][:200].astype(np.int64)
    low = shifted(as_inputs(pixels), "contrast", 0.15)
    mean, std = (np.float32(v)[:, None, None] for v in (realdata.CIFAR_MEAN, realdata.CIFAR_STD))
    x = (low - mean) / std
    net = realdata.load_model(shared_data, "resnet20")
    adapted = adapt(net, torch.from_numpy(x).split(50), diagnose=False).model
    assert realdata.accuracy(net, x, y) < 40
    assert realdata.accuracy(adapted, x, y) > 80
