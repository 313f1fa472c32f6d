"""Several processes that measure one data set together: what each saw is merged at every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from bnfold.adapting.moments import ImageMoments


@dataclass(frozen=True, eq=False)
class Waiting:
    """What the batches that wait at a layer saw: how many they are, their moments together."""

    batches: int
    moments: ImageMoments


class Ranks(Protocol):
    """The processes that share the work. rank: this one's number.  size: how many there are."""

    rank: int
    size: int

    def together(self, waiting: Mapping[str, Waiting]) -> dict[str, Waiting]:
        """What waits at each layer in all processes; every process calls it, and gets the same."""


class Alone:
    """One process."""

    rank = 0
    size = 1

    def together(self, waiting: Mapping[str, Waiting]) -> dict[str, Waiting]:
        """See Ranks."""
        return dict(waiting)
