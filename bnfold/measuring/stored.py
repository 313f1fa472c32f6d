"""What layers saw, as bytes: what processes send each other and what an interrupted run keeps.

The bytes are a safetensors file, so that nothing is unpickled: one float64 array (10, C) per layer,
a row per moment, and `facts`, JSON, which holds the names in their order and the counts. What comes
back is what was put in, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from bnfold.errors import InputError, one_line
from bnfold.measuring.moments import Float64, ImageMoments, Moments, excess_between

_ROWS = ("centre", "within", "m2", "m3", "m4", "v2", "mv", "mmv")  # behind the pixels' mean and m2


@dataclass(frozen=True, eq=False)
class Waiting:
    """What the batches that wait at a layer saw: how many they are, their moments together.

    within: the sum over batches of the m2 of each, where `excess_between` is to be known.
    """

    batches: int
    moments: ImageMoments
    within: Float64 | None = None

    @property
    def excess(self) -> float | None:
        """How much the batches differ, see `batch_excess`; None where it was not looked at."""
        if self.within is None:
            return None
        return excess_between(self.moments, self.within, self.batches)

    def merge(self, other: Waiting) -> Waiting:
        """Both together."""
        known = [w for w in (self.within, other.within) if w is not None]
        return Waiting(
            self.batches + other.batches,
            self.moments.merge(other.moments),
            sum(known[1:], known[0]) if known else None,
        )


def to_bytes(facts: Mapping[str, Any], layers: Mapping[str, Waiting]) -> bytes:
    """Facts (JSON) and what the layers saw, in their order."""
    arrays: dict[str, NDArray[Any]] = {}
    counts = []
    for index, (name, found) in enumerate(layers.items()):
        moments = found.moments
        pixels = moments.pixels
        rows = (pixels.mean, pixels.m2, *(getattr(moments, row) for row in _ROWS))
        arrays[str(index)] = np.stack(rows)
        if found.within is not None:
            arrays[f"{index}.within"] = found.within
        counts.append([name, found.batches, moments.images, pixels.count])
    head = json.dumps({"facts": dict(facts), "layers": counts})
    arrays["facts"] = np.frombuffer(head.encode(), dtype=np.uint8)
    data: bytes = save(arrays)
    return data


def from_bytes(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, Waiting]]:
    """Facts and layers. Raises InputError where `name` holds something else."""
    try:
        arrays = load(data)
        head = json.loads(arrays["facts"].tobytes())
        layers = {
            str(layer): Waiting(
                _count(batches),
                _moments(arrays[str(index)], _count(images), _count(count)),
                arrays.get(f"{index}.within"),
            )
            for index, (layer, batches, images, count) in enumerate(head["layers"])
        }
        return dict(head["facts"]), layers
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{name} holds no moments as bnfold writes them ({type(error).__name__}:"
            f" {one_line(error)})."
        ) from error


def _moments(rows: NDArray[Any], images: int, count: int) -> ImageMoments:
    if rows.dtype != np.float64 or rows.ndim != 2 or len(rows) != 2 + len(_ROWS):
        raise ValueError(f"an array of {rows.dtype} and shape {rows.shape}")
    mean, m2, *rest = rows
    return ImageMoments(Moments(count, mean, m2), images, *rest)


def _count(number: Any) -> int:
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"a count of {number}")
    return number
