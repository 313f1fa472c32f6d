"""Moments of layers as bytes: what processes send each other and what an interrupted run keeps.

The bytes are a safetensors file, so that nothing is unpickled: one float64 array (10, C) per layer,
a row per moment, and `facts`, JSON, which holds the names in their order and the counts. What comes
back is what was put in, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from bnfold.adapting.moments import ImageMoments, Moments
from bnfold.errors import InputError

_ROWS = ("centre", "within", "m2", "m3", "m4", "v2", "mv", "mmv")  # behind the pixels' mean and m2


def to_bytes(facts: Mapping[str, Any], moments: Mapping[str, ImageMoments]) -> bytes:
    """Facts (JSON) and moments of layers, in their order."""
    head = {
        "facts": dict(facts),
        "layers": [[name, found.pixels.count, found.images] for name, found in moments.items()],
    }
    arrays: dict[str, NDArray[Any]] = {
        str(index): np.stack(
            (found.pixels.mean, found.pixels.m2, *(getattr(found, row) for row in _ROWS))
        )
        for index, found in enumerate(moments.values())
    }
    arrays["facts"] = np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)
    data: bytes = save(arrays)
    return data


def from_bytes(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, ImageMoments]]:
    """Facts and moments. Raises InputError where `name` holds something else."""
    try:
        arrays = load(data)
        head = json.loads(arrays["facts"].tobytes())
        moments = {
            str(layer): _moments(arrays[str(index)], int(count), int(images))
            for index, (layer, count, images) in enumerate(head["layers"])
        }
        return dict(head["facts"]), moments
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{name} holds no moments as bnfold writes them ({type(error).__name__}:"
            f" {' '.join(str(error).split())[:200]})."
        ) from error


def _moments(rows: NDArray[Any], count: int, images: int) -> ImageMoments:
    if rows.dtype != np.float64 or rows.ndim != 2 or len(rows) != 2 + len(_ROWS):
        raise ValueError(f"an array of {rows.dtype} and shape {rows.shape}")
    if min(count, images) < 0:
        raise ValueError("a count below 0")
    mean, m2, *rest = rows
    return ImageMoments(Moments(count, mean, m2), images, *rest)
