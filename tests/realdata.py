"""The real checkpoints and images as arrays, for any test that wants them.

Every reader takes the folder that the `shared_data` fixture gives. Images come back as float32
NCHW, prepared as the checkpoints expect them; labels as int64.
"""

import gzip
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

Images = NDArray[np.float32]
Labels = NDArray[np.int64]

CIFAR_MEAN = (0.485, 0.456, 0.406)
CIFAR_STD = (0.229, 0.224, 0.225)

# name: (factory, file in the folder of real data)
WEIGHTS = {
    "resnet20": ("models/resnet_cifar.py:resnet20", "cifar10/resnet20-12fca82f.th"),
    "resnet56": ("models/resnet_cifar.py:resnet56", "cifar10/resnet56-4bfd9763.th"),
    "mnist_cnn": ("models/digits.py:cnn", "digits/mnist_cnn.pth"),
    "mnist_resnet": ("models/digits.py:resnet", "digits/mnist_resnet.pth"),
    "mnist_mlp": ("models/mlp.py:mlp", "digits/mnist_mlp.pth"),
    "mnist_lenet5": ("models/lenet.py:lenet5", "digits/mnist_lenet5.pth"),
    "dncnn": ("models/dncnn.py:dncnn", "denoise/DnCNN-S-25.pth"),
    "slim320": ("models/slim320.py:slim320", "onnx/linzaer_slim-320.pth"),
}


def load_weights(shared: Path, name: str) -> tuple[str, Path]:
    """The factory, as the command line names it, and the checkpoint's path."""
    factory, file = WEIGHTS[name]
    return factory, shared / file


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors by parameter name, out of its wrappers."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_model(shared: Path, name: str) -> nn.Module:
    """The real network, loaded strictly, in eval mode."""
    spec, path = load_weights(shared, name)
    file, factory = spec.split(":")
    definition = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    module: nn.Module = getattr(definition, factory)()
    module.load_state_dict(load_state_dict(path), strict=True)
    return module.eval()


def predict(module: nn.Module, x: Images, batch_size: int = 250) -> Images:
    """The module's output for all of x, batch by batch."""
    with torch.no_grad():
        batches = [module(batch) for batch in torch.from_numpy(x).split(batch_size)]
    return torch.cat(batches).numpy()


def accuracy(module: nn.Module, x: Images, y: Labels) -> float:
    """Percent of x classified as y."""
    return 100.0 * float(np.mean(predict(module, x).argmax(axis=1) == y))


def cifar_test761(shared: Path) -> tuple[Images, Labels]:
    """The first 761 CIFAR-10 test images, lossless, normalised."""
    return _cifar(shared / "cifar10/cifar10_test_first761.npz")


def cifar_train_part(shared: Path) -> tuple[Images, Labels]:
    """2283 CIFAR-10 training images, lossless, normalised."""
    return _cifar(shared / "cifar10/cifar10_train_part.npz")


def cifar_jpeg(shared: Path) -> tuple[Images, Labels]:
    """All 10000 CIFAR-10 test images after JPEG, normalised, sorted by class."""
    return _cifar(shared / "cifar10/cifar10_test_jpeg.npz")


def mnist_test(shared: Path) -> tuple[Images, Labels]:
    """The 10000 MNIST test digits, (N, 1, 28, 28) in [0, 1]."""
    x = _read_idx(gzip.decompress((shared / "digits/t10k-images-idx3-ubyte.gz").read_bytes()))
    y = _read_idx((shared / "digits/t10k-labels-idx1-ubyte").read_bytes())
    return _unit(x)[:, None], y.astype(np.int64)


def mnist_train10k(shared: Path) -> tuple[Images, Labels]:
    """10000 MNIST training digits, 1000 of each class in class order, (N, 1, 28, 28) in [0, 1]."""
    with np.load(shared / "digits/mnist_train10k.npz") as file:
        return _unit(file["x"])[:, None], file["y"].astype(np.int64)


def usps(
    shared: Path,
    split: Literal["train", "test"] = "test",
    layout: Literal["pad", "stretch"] = "pad",
) -> tuple[Images, Labels]:
    """USPS digits (7291 or 2007) as 28x28 inputs.

    `pad`: enlarged to 20x20 and framed by zeros, as MNIST digits are. `stretch`: enlarged to 28x28,
    a harder shift.
    """
    with h5py.File(shared / "digits/usps.h5", "r") as file:
        x = torch.from_numpy(file[split]["data"][:]).reshape(-1, 1, 16, 16)
        y = file[split]["target"][:].astype(np.int64)
    if layout == "stretch":
        return _resize(x, 28).numpy(), y
    return functional.pad(_resize(x, 20), (4, 4, 4, 4)).numpy(), y


def mnistm(shared: Path) -> tuple[Images, Labels]:
    """5000 MNIST-M test digits as grey 28x28 images in [0, 1]."""
    with np.load(shared / "digits/mnistm_test5000.npz") as file:
        grey = torch.from_numpy(_unit(file["x"])).mean(dim=3)[:, None]
        return _resize(grey, 28).numpy(), file["y"].astype(np.int64)


def set12(shared: Path) -> Mapping[str, Images]:
    """The 12 grey images of Set12 by name ('01'...), each (1, 1, H, W) in [0, 1]."""
    files = sorted((shared / "denoise/Set12").glob("*.png"))
    return {file.stem: _unit(np.asarray(Image.open(file)))[None, None] for file in files}


def _cifar(path: Path) -> tuple[Images, Labels]:
    with np.load(path) as file:
        x, y = _unit(file["x"]), file["y"].astype(np.int64)
    x = (x - np.float32(CIFAR_MEAN)) / np.float32(CIFAR_STD)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y


def _unit(pixels: NDArray[np.uint8]) -> Images:
    return pixels.astype(np.float32) / np.float32(255)


def _resize(x: Tensor, size: int) -> Tensor:
    return functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def _read_idx(data: bytes) -> NDArray[np.uint8]:
    """LeCun's idx format: two zero bytes, type 8 (uint8), the rank, big-endian sizes, values."""
    assert data[:3] == b"\x00\x00\x08"
    rank = data[3]
    shape = np.frombuffer(data, ">i4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
