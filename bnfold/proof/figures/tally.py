"""What one run of a network differs by from its float64 evaluation, summed over batches.

A NaN or an infinity counts as equal where both have it, and as trouble where one has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Values = Mapping[str, Any]
TEXTS = "OUS"  # numpy's kinds of strings, and of objects, as onnxruntime gives them


@dataclass(frozen=True)
class Slices:
    """Sums of squares at every index of one axis; count: elements at one index."""

    error: Array
    size: Array
    count: int

    def plus(self, other: Slices) -> Slices:
        """Both together; the first alone where the axis has another length there."""
        if self.error.shape != other.error.shape:
            return self
        error, size = self.error + other.error, self.size + other.size
        return Slices(error, size, self.count + other.count)


@dataclass
class Tally:
    """What one backend's output differs by from the reference, over the batches of an input set.

    peaks, sizes: per sample, the largest error of an element and the largest exact element.
    slices: by axis, of the two that may hold channels (the second and the last). flipped: per
    sample of an output of two axes, whether the largest element is another one; margins: the
    distance of the exact two largest.
    """

    error: float = 0.0  # sum of squares
    size: float = 0.0  # sum of squares of the reference
    elements: int = 0  # finite ones
    not_finite: int = 0
    flips: int = 0
    discrete: bool = False
    peaks: list[Array] = field(default_factory=list)
    sizes: list[Array] = field(default_factory=list)
    slices: dict[int, Slices] = field(default_factory=dict)
    flipped: list[Array] = field(default_factory=list)
    margins: list[Array] = field(default_factory=list)
    trouble: str = ""

    def add(self, value: Any, exact: Any, kind: np.dtype[Any] | None = None) -> None:
        """Count one batch; kind: the type that the value should have."""
        problem = unlike(value, exact, kind)
        self.trouble = self.trouble or problem
        if problem:
            return
        # a NaN that both agree on says nothing about two networks
        if exact.dtype.kind in TEXTS:
            self.elements += exact.size
            self.discrete = True
            self.flips += int(np.count_nonzero(value.astype(str) != exact.astype(str)))
            return
        self.elements += int(np.count_nonzero(np.isfinite(exact)))
        self.not_finite += int(np.count_nonzero(~np.isfinite(exact)))
        if exact.dtype.kind not in "fc":
            self.discrete = True
            self.flips += int(np.count_nonzero(value != exact))
            return
        difference = difference_of(value, exact)
        finite = np.where(np.isfinite(exact), exact, 0.0)
        self.error += float(np.sum(difference**2))
        self.size += float(np.sum(finite**2))
        self.peaks.append(peaks_of(difference))
        self.sizes.append(peaks_of(finite))
        for axis in {1, exact.ndim - 1} if exact.ndim > 1 else ():
            found = _sliced(difference, finite, axis)
            known = self.slices.get(axis)
            self.slices[axis] = known.plus(found) if known else found
        if exact.ndim == 2 and exact.shape[1] > 1:
            best = np.sort(finite, axis=1)[:, -2:]
            self.flipped.append(np.argmax(value, axis=1) != np.argmax(finite, axis=1))
            self.margins.append(best[:, 1] - best[:, 0])


def _sliced(difference: Array, exact: Array, axis: int) -> Slices:
    others = tuple(k for k in range(exact.ndim) if k != axis)
    count = exact.size // max(exact.shape[axis], 1)
    return Slices(np.sum(difference**2, axis=others), np.sum(exact**2, axis=others), count)


def unlike(value: Any, exact: Any, kind: np.dtype[Any] | None = None) -> str:
    """Why two results cannot be compared element by element; empty when they can."""
    if not isinstance(value, np.ndarray) or not isinstance(exact, np.ndarray):
        return "it is no tensor"
    if value.shape != exact.shape:
        return f"its shape is {value.shape}, and should be {exact.shape}"
    if kind is not None and value.dtype != kind:
        return f"its type is {value.dtype}, and should be {kind}"
    if (value.dtype.kind in "biu") != (exact.dtype.kind in "biu"):
        return f"its type is {value.dtype}"
    if exact.dtype.kind == "f":
        got = value.astype(np.float64)
        wrong = ~((np.isfinite(got) & np.isfinite(exact)) | (np.isnan(got) & np.isnan(exact))
                  | (got == exact))  # fmt: skip
        if wrong.any():
            return f"{int(wrong.sum())} of {wrong.size} elements are NaN or infinite"
    return ""


def peak_share(tally: Tally) -> float:
    """Root mean square over samples of the largest error over the largest element."""
    if not tally.peaks:
        return 0.0
    with np.errstate(all="ignore"):
        shares = np.concatenate(tally.peaks) / np.concatenate(tally.sizes)
    return float(np.sqrt(np.mean(np.nan_to_num(shares, posinf=0.0) ** 2)))


def difference_of(value: Array, exact: Array) -> Array:
    """Element by element; 0 where it is NaN or infinite, which `unlike` tells apart."""
    with np.errstate(all="ignore"):
        difference = value.astype(np.float64) - exact
    return np.where(np.isfinite(difference), difference, 0.0)


def peaks_of(values: Array) -> Array:
    """Largest magnitude per sample (first axis)."""
    flat = np.abs(
        np.atleast_1d(values).reshape(len(np.atleast_1d(values)), -1)
        if values.size
        else np.zeros((1, 1))
    )
    peaks: Array = np.max(flat, axis=1, initial=0.0)
    return peaks


def relative_differences(first: Values, second: Values, exact: Values) -> dict[str, float]:
    """By output: distance of two runs over the size of the exact output (2-norms).

    Infinite where one has a NaN or another shape; of integers, the share that differs.
    """
    return {
        name: _apart(first.get(name), second.get(name)) / (_size(value) or 1.0)
        for name, value in exact.items()
        if isinstance(value, np.ndarray)
    }


def _size(exact: Array) -> float:
    if exact.dtype.kind != "f":
        return float(exact.size)
    return float(np.linalg.norm(np.where(np.isfinite(exact), exact, 0.0).ravel()))


def _apart(a: Any, b: Any) -> float:
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.shape != b.shape:
        return np.inf
    if a.dtype.kind in TEXTS or b.dtype.kind in TEXTS:
        return float(np.count_nonzero(a.astype(str) != b.astype(str)))
    if a.dtype.kind in "biu" or b.dtype.kind in "biu":
        return float(np.count_nonzero(a != b))
    first, second = a.astype(np.float64), b.astype(np.float64)
    if not np.array_equal(np.isfinite(first), np.isfinite(second)):
        return np.inf
    return float(np.linalg.norm(difference_of(first, second).ravel()))
