"""Samples with labels, read by number: in any order, as training asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bnfold.data.readers import Labels
from bnfold.errors import UsageError

if TYPE_CHECKING:
    from bnfold.data import ImageBatches, Inputs


class LabelledSamples:
    """The samples of batches, one by one.

    name: what errors call them.  labels: (N,), one class each.  classes: the names of the classes,
    where they have any.  skipped: what could not be read so far, and why.
    """

    def __init__(self, batches: ImageBatches) -> None:
        labels = batches.labels
        if labels is None:
            raise UsageError(
                f"{batches.name} holds no labels, and training needs them: an array y beside x, a"
                " folder for each class (root/class/image.png), .cls files in a tar."
            )
        self.name, self.labels, self.classes = batches.name, labels, batches.classes
        self._batches, self._order = batches, batches.order

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def skipped(self) -> Mapping[str, str]:
        """Unreadable images and the reasons."""
        return self._batches.skipped

    def take(self, index: NDArray[np.int64]) -> tuple[Inputs, Labels]:
        """Inputs (n, ...) and labels (n,) of the samples that can be read."""
        wanted = self._order[index]
        inputs, kept = self._batches.read(wanted)
        if inputs is None:
            return np.zeros((0, 1), np.float32), self.labels[:0]
        return inputs, self.labels[index[np.isin(wanted, kept)]]
