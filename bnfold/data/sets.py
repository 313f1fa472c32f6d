"""MNIST, USPS, CIFAR: known data sets from a folder, by torchvision's own loaders.

torchvision is no dependency of bnfold; where it is installed, its loaders know the files, their
names and their checksums. Nothing is downloaded unless that is asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.data.readers import ArrayReader, Stored
from bnfold.errors import InputError, RuntimeUnavailableError, UsageError, one_line

# the loader's name, and the files that it looks for
SETS = {
    "mnist": ("MNIST", "MNIST/raw/train-images-idx3-ubyte and its like"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw/train-images-idx3-ubyte and its like"),
    "usps": ("USPS", "usps.bz2 and usps.t.bz2"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py/data_batch_1 and its like"),
    "cifar100": ("CIFAR100", "cifar-100-python/train and its like"),
}
PARTS = ("train", "test", "all")


def open_set(name: str, rest: str, *, download: bool) -> ArrayReader:
    """The data set `name` in the folder `rest`, `DIR`, `DIR:train` or `DIR:test`; bytes, labels.

    Raises UsageError without a folder, RuntimeUnavailableError without torchvision, InputError
    where the folder does not hold the data set's files.
    """
    folder, _, part = rest.rpartition(":")
    if part not in PARTS or not folder:
        folder, part = rest, "all"
    if not folder:
        raise UsageError(f"{name} needs the folder of its files: {name}:DIR or {name}:DIR:train.")
    loader = getattr(_torchvision(name), SETS[name][0])
    wanted = ("train", "test") if part == "all" else (part,)
    loaded = [_loaded(loader, name, folder, one == "train", download) for one in wanted]
    x = np.concatenate([np.asarray(data.data) for data in loaded])
    y = np.concatenate([np.asarray(data.targets) for data in loaded])
    return ArrayReader(f"{name}:{Path(folder).name}", _writable(x), y)


def _writable(x: Stored) -> Stored:
    return x if x.flags.writeable else x.copy()


def _torchvision(name: str) -> Any:
    try:
        return importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was made for another torch
        what = one_line(error)
        raise RuntimeUnavailableError(
            f"{name}: is read by torchvision, which cannot be loaded here ({what}). Install the"
            " torchvision that belongs to this torch, or give arrays (.npz with x and y)."
        ) from error


def _loaded(loader: Any, name: str, folder: str, is_train: bool, download: bool) -> Any:
    path = Path(folder).expanduser()
    if not (path.is_dir() or download):
        raise InputError(f"There is no folder {path} with the files of {name}.")
    try:
        return loader(str(path), train=is_train, download=download)
    except Exception as error:  # of torchvision, of the files, of the network
        what = one_line(error)
        hint = (
            "" if download else " bnfold train --download lets torchvision fetch what is missing."
        )
        raise InputError(
            f"torchvision cannot read {name} in {path}, where it looks for {SETS[name][1]}:"
            f" {what}.{hint}"
        ) from error
