"""A weight told from a folded one, bit for bit.

A fold writes  folded = round(factor * original),  the factor constant along most axes. Dividing it
out gives the original back up to rounding, and what rounding lost is little: the numbers that fold
to one and the same are one or two neighbours, and where they are two, one bit says which it was.
That is 0.2 bits for a weight, on average. What cannot be told is kept as it was, at its place:
elements whose factor is 0 (gamma = 0), or so small that the product underflows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnfold.errors import InputError
from bnfold.folding.affine import Array, Mask

AnyArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Told:
    """How an original weight is told from the folded one.

    source: the folded weight's name. shape: the original's. view: a shape of as many elements,
    against which the factors broadcast; their product is what the fold multiplied by. upper: where
    two neighbours fold to one number, whether it was the one farther from 0. places: which elements
    come out wrong all the same (both as packed bits); fixes: what those were, in order.
    """

    source: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    factors: tuple[Array, ...]
    upper: AnyArray
    places: AnyArray
    fixes: AnyArray

    @property
    def nbytes(self) -> int:
        """What it takes to keep this."""
        arrays = (*self.factors, self.upper, self.places, self.fixes)
        return sum(array.nbytes for array in arrays)


def tell(
    original: AnyArray,
    source: str,
    folded: AnyArray,
    view: tuple[int, ...],
    factors: Sequence[Array],
) -> Told | None:
    """How to tell `original` from `folded`; None where keeping the original takes less.

    Right whatever the factors are: they only decide how much has to be kept besides.
    """
    if folded.dtype != original.dtype or folded.size != original.size or not original.size:
        return None
    low, two = _preimages(folded.reshape(view), factors)
    flat = _bits(original).reshape(-1)
    upper = np.packbits(flat[two] != low[two])
    wrong = _with_upper(low, two, upper) != flat
    places = np.packbits(wrong) if np.any(wrong) else np.zeros(0, np.uint8)
    fixes = np.ascontiguousarray(original).reshape(-1)[wrong]
    told = Told(source, original.shape, view, tuple(factors), upper, places, fixes)
    return told if told.nbytes < original.nbytes else None


def original_of(told: Told, folded: AnyArray) -> AnyArray:
    """The original weight. Raises InputError where this is not the folded one's size and type."""
    size = math.prod(told.shape)
    if folded.size != size or folded.dtype != told.fixes.dtype or math.prod(told.view) != size:
        raise InputError(
            f"'{told.source}' is a {folded.dtype} of {folded.size} elements; the record was written"
            f" for a {told.fixes.dtype} of {size}."
        )
    bits = _with_upper(*_preimages(folded.reshape(told.view), told.factors), told.upper)
    if told.places.size:
        bits[np.unpackbits(told.places, count=size).astype(bool)] = _bits(told.fixes)
    return bits.view(folded.dtype).reshape(told.shape)


def _with_upper(low: AnyArray, two: Mask, upper: AnyArray) -> AnyArray:
    """The farther one of the two neighbours where the bits say so."""
    bits, at = low.copy(), np.flatnonzero(two)
    bits[at] += np.unpackbits(upper, count=at.size)
    return bits


def _preimages(folded: AnyArray, factors: Sequence[Array]) -> tuple[AnyArray, Mask]:
    """The number nearest to 0 that folds to each element, and where the next one does too.

    Numbers as their bits, which grow by one from a number to the next one away from 0; both flat.
    """
    factor = np.asarray(math.prod(factors, start=np.ones((1,) * folded.ndim)))
    wanted = _bits(folded)
    with np.errstate(all="ignore"):
        guess = _bits((folded / factor).astype(folded.dtype))

        def folds(bits: AnyArray) -> Mask:
            image = bits.view(folded.dtype).astype(np.float64)
            image *= factor
            return np.asarray(_bits(image.astype(folded.dtype)) == wanted)

        nearer, itself, farther = folds(guess - 1), folds(guess), folds(guess + 1)
    low = np.where(nearer, guess - 1, np.where(itself, guess, guess + 1))
    two = itself & (nearer | farther) & (factor != 0)
    return low.reshape(-1), two.reshape(-1)


def _bits(numbers: AnyArray) -> AnyArray:
    """The numbers' own bits, so that 0 and -0 differ and NaN is itself."""
    return np.ascontiguousarray(numbers).view(f"u{numbers.dtype.itemsize}")
