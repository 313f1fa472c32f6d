"""The samples of --data as the proof takes them: an array for each input of the network."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.commands.shared import inputs_of, open_samples
from bnfold.data import MAX_ARCHIVE_BYTES
from bnfold.errors import InputError, UnsafeInputError, UsageError

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]

OF_IMAGES = ("mean", "std", "resize", "input_scale", "preprocess")


def given_inputs(args: argparse.Namespace, source: Any) -> Arrays | None:
    """By input name; None without --data, where inputs are to be drawn.

    An .npz with an array for each input goes in as it is, row by row. Batches of a factory are
    mappings by input name, or lists in the order of the inputs; what else a list holds, such as
    labels, is left out. Raises UsageError and InputError.
    """
    if args.data is None:
        return None
    names = list(inputs_of(source))
    named = _named(args, names)
    if named is not None:
        return named
    parts = [_by_name(batch, names, args.data) for batch in open_samples(args, args.data)]
    if not parts:
        raise InputError(f"{args.data} holds no samples.")
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _named(args: argparse.Namespace, names: Sequence[str]) -> Arrays | None:
    """The arrays of an .npz that are called as the inputs are; None for any other data."""
    path = Path(args.data).expanduser()
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        found = {info.filename.removesuffix(".npy"): info.file_size for info in archive.filelist}
    if set(found) != set(names):
        if len(names) == 1:
            return None
        raise InputError(
            f"{path} holds the arrays {', '.join(sorted(found)) or '(none)'}; the network's inputs "
            f"are {', '.join(names)}."
        )
    images = [name for name in OF_IMAGES if getattr(args, name, None) is not None]
    if len(names) == 1 and (images or found.keys() == {"x"}):
        return None  # images, which are prepared
    if images:
        option = images[0].replace("_", "-")
        raise UsageError(f"--{option} prepares images; the arrays of {path} are inputs already.")
    if sum(found.values()) > MAX_ARCHIVE_BYTES:
        raise UnsafeInputError(f"{path} unpacks to more than {MAX_ARCHIVE_BYTES} bytes.")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name][: args.samples] for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as a NumPy file: {error}.") from error


def _by_name(batch: Any, names: Sequence[str], data: str) -> Arrays:
    """One batch of the data: a mapping, a list, or the single input's array."""
    if isinstance(batch, Mapping):
        missing = [name for name in names if name not in batch]
        if missing:
            raise InputError(
                f"{data}: a batch holds {', '.join(map(str, batch))}; the network's input "
                f"'{missing[0]}' is not among them."
            )
        return {name: np.asarray(batch[name]) for name in names}
    values = list(batch) if isinstance(batch, list | tuple) else [batch]
    if len(values) < len(names):
        raise InputError(
            f"{data}: a batch holds {len(values)} array{'s' * (len(values) != 1)}; the network has "
            f"the inputs {', '.join(names)}."
        )
    return {name: np.asarray(value) for name, value in zip(names, values, strict=False)}
