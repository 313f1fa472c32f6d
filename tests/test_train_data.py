"""Labelled data of every form reaches training: known sets, class folders, tars, arrays."""

import bz2
import hashlib
import importlib.util
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bnfold.cli import main
from bnfold.data import LabelledSamples, open_data
from bnfold.errors import InputError, RuntimeUnavailableError, UsageError
from bnfold.training.train import train


@pytest.fixture(scope="session")
def torchvision():
    """torchvision with its datasets, or a skip; its compiled part may be of another torch."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    from scripts.zoo import declare_vision_operators

    declare_vision_operators()
    import torchvision
    import torchvision.datasets

    return torchvision


def pictures(count, *shape, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, 10, count)


def write_mnist(folder):
    """idx files of 12 training and 7 test images, as LeCun's are; (x, y) of each."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    made = {}
    for part, name, count in (("train", "train", 12), ("test", "t10k", 7)):
        x, y = made[part] = pictures(count, 28, 28, seed=count)
        head = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + x.tobytes())
        head = np.array([0x801, count], ">i4").tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(head + y.astype(np.uint8).tobytes())
    return made


def write_usps(folder):
    """Text lines, packed by bzip2: labels from 1, pixels from -1 to 1."""
    made = {}
    for part, name, count in (("train", "usps.bz2", 9), ("test", "usps.t.bz2", 5)):
        x, y = made[part] = pictures(count, 16, 16, seed=count)
        rows = [
            f"{label + 1} " + " ".join(f"{i}:{v / 127.5 - 1:.6f}" for i, v in enumerate(row, 1))
            for row, label in zip(x.reshape(count, -1), y, strict=True)
        ]
        (folder / name).write_bytes(bz2.compress("\n".join(rows).encode()))
    return made


def write_cifar10(folder, loader, monkeypatch):
    """Pickled batches, whose checksums the loader is told instead of the real ones."""
    home = folder / "cifar-10-batches-py"
    home.mkdir()

    def put(name, content):
        data = pickle.dumps(content)
        (home / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    made, sums = {"train": [], "test": []}, []
    for number, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        x, y = pictures(4, 3, 32, 32, seed=number)
        made["test" if name == "test_batch" else "train"].append((x, y))
        sums.append([name, put(name, {"data": x.reshape(4, -1), "labels": y.tolist()})])
    meta = put("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(loader, "train_list", sums[:5])
    monkeypatch.setattr(loader, "test_list", sums[5:])
    monkeypatch.setattr(loader, "meta", {**loader.meta, "md5": meta})
    return {
        part: tuple(np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
        for part, pairs in made.items()
    }


@pytest.mark.parametrize("name", ["mnist", "usps", "cifar10"])
def test_known_sets_come_by_torchvisions_own_loaders(name, tmp_path, torchvision, monkeypatch):
    if name == "mnist":
        wanted = write_mnist(tmp_path)
    elif name == "usps":
        wanted = write_usps(tmp_path)
    else:
        wanted = write_cifar10(tmp_path, torchvision.datasets.CIFAR10, monkeypatch)
    for part in ("train", "test"):
        found = LabelledSamples(open_data(f"{name}:{tmp_path}:{part}", shuffle=False))
        x, y = wanted[part]
        got_x, got_y = found.take(np.arange(len(found)))
        expected = x[:, None] if x.ndim == 3 else x
        # usps rounds its decimals down to a byte
        assert np.abs(got_x - expected / 255).max() <= (1 / 255 + 1e-6 if name == "usps" else 1e-6)
        np.testing.assert_array_equal(got_y, y)
    both = open_data(f"{name}:{tmp_path}", shuffle=False)
    assert both.images == sum(len(y) for _, y in wanted.values())


def test_a_set_that_is_not_there_says_what_is_looked_for(tmp_path, torchvision, monkeypatch):
    with pytest.raises(InputError, match=r"looks for MNIST/raw/train-images.*--download"):
        open_data(f"mnist:{tmp_path}:train")
    with pytest.raises(InputError, match="There is no folder"):
        open_data(f"cifar10:{tmp_path / 'absent'}")
    with pytest.raises(UsageError, match="mnist needs the folder of its files"):
        open_data("mnist:")
    asked = []

    def loader(root, *, train, download):
        asked.append((root, train, download))
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "MNIST", loader)
    for download in (False, True):
        with pytest.raises(InputError, match="no network"):
            open_data(f"mnist:{tmp_path}:test", download=download)
    assert asked == [(str(tmp_path), False, False), (str(tmp_path), False, True)]


def test_without_torchvision_its_sets_are_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(RuntimeUnavailableError, match=r"mnist: is read by torchvision.*\.npz"):
        open_data(f"mnist:{tmp_path}")


# --- samples by number ----------------------------------------------------------------------------


@pytest.fixture
def class_folders(tmp_path):
    """root/bright/*.png and root/dark/*.png, one of them broken."""
    rng = np.random.default_rng(0)
    for number in range(24):
        name = ("dark", "bright")[number % 2]
        (tmp_path / "root" / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (6, 6)) + 150 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"root/{name}/{number:02}.png")
    (tmp_path / "root" / "dark" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "root"


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )


def test_labels_follow_the_names_of_the_folders(class_folders):
    samples = LabelledSamples(open_data(class_folders))
    assert samples.classes == ("bright", "dark")
    x, y = samples.take(np.arange(len(samples)))
    assert len(x) == 24
    assert list(samples.skipped) == ["dark/broken.png"]
    np.testing.assert_array_equal(x.mean(axis=(1, 2, 3)) < 0.5, y == 1)


def test_a_class_folder_trains_and_says_what_it_left_out(class_folders):
    samples = LabelledSamples(open_data(class_folders))
    result = train(network(), samples, test_data=samples, epochs=8, batch_size=8)
    assert result.test_accuracy == 1
    assert list(result.unread) == ["dark/broken.png"]


def test_workers_read_the_same_samples_and_say_the_same(class_folders):
    results = [
        train(
            nn.Sequential(nn.Dropout(0.3), network()),
            LabelledSamples(open_data(class_folders)),
            epochs=2,
            batch_size=8,
            workers=workers,
        )
        for workers in (0, 2)
    ]
    states = [result.module.state_dict() for result in results]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert results[0].history == results[1].history
    assert list(results[1].unread) == ["dark/broken.png"]


def test_what_a_worker_finds_wrong_is_the_same_sentence(tmp_path):
    x = np.zeros((8, 1, 6, 6), np.float32)
    x[3] = np.nan
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(8) % 2)
    samples = LabelledSamples(open_data(tmp_path / "data.npz"))
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"^Sample 3 of data.npz holds NaN or infinity"):
            train(network(), samples, epochs=1, workers=workers)


def test_grey_images_are_read_in_colour_where_that_is_asked_for(class_folders, monkeypatch, capsys):
    monkeypatch.chdir(class_folders.parent)
    Path("net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(),\n"
        "                         nn.Linear(32, 2))\n"
    )
    call = ["train", "net.py:net", "--data", "root", "--epochs", "1"]
    assert main(call) == 2
    assert "It takes 3 channels and the data has 1" in capsys.readouterr().err
    assert main([*call, "--channels", "3"]) == 0
    said = capsys.readouterr().out
    assert "1 image could not be read; the first: dark/broken.png" in said
    run = torch.load("net.pt", weights_only=True)["bnfold"]["metrics"]["run"]
    assert run["classes"] == ["bright", "dark"]
    for name in ("bright", "other"):
        Path("tests", name).mkdir(parents=True)
        Image.fromarray(np.zeros((6, 6), np.uint8)).save(f"tests/{name}/0.png")
    assert main([*call, "--test-data", "tests", "--overwrite"]) == 2
    assert "has the classes bright, dark and tests bright, other" in capsys.readouterr().err


def test_data_without_labels_are_refused(tmp_path, class_folders):
    np.save(tmp_path / "x.npy", np.zeros((4, 3, 8, 8), np.float32))
    with pytest.raises(UsageError, match=r"x.npy holds no labels.*an array y"):
        LabelledSamples(open_data(tmp_path / "x.npy"))
    Image.fromarray(np.zeros((6, 6), np.uint8)).save(class_folders / "loose.png")
    with pytest.raises(UsageError, match=r"root holds no labels.*a folder for each class"):
        LabelledSamples(open_data(class_folders))


def test_a_resumed_run_knows_samples_again(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(100, 1, 6, 6)).astype(np.float32), np.arange(100)
    np.savez(tmp_path / "a.npz", x=x, y=y % 2)
    np.savez(tmp_path / "b.npz", x=x, y=(y + 1) % 2)
    np.savez(tmp_path / "c.npz", x=x + 1, y=y % 2)
    run = {"epochs": 1, "batch_size": 50}
    state = tmp_path / "run.state"
    train(network(), LabelledSamples(open_data(tmp_path / "a.npz")), checkpoint=state, **run)
    train(network(), LabelledSamples(open_data(tmp_path / "a.npz")), resume=state, **run)
    for other in ("b.npz", "c.npz"):
        with pytest.raises(InputError, match="other training data"):
            train(network(), LabelledSamples(open_data(tmp_path / other)), resume=state, **run)
