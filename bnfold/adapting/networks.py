"""A network whose statistics are estimated, whatever holds it: a torch module, an ONNX graph.

Both know their batch norms by the same names, measure them in the same ways and take statistics
back; what is done with that is adapt.py's.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bnfold.errors import UsageError
from bnfold.measuring.diagnosis import Observed
from bnfold.measuring.estimate import Estimate, Progress
from bnfold.measuring.feed import Passes
from bnfold.measuring.moments import ImageMoments
from bnfold.measuring.ranks import Alone, Ranks
from bnfold.measuring.statistics import Layer, Rule, Statistics

LayerChoice = Callable[[str], bool] | Sequence[str] | str | None
Settled = Callable[[str, ImageMoments], None]


@dataclass(frozen=True)
class SkippedLayer:
    """A batch norm whose statistics stayed as they were, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Run:
    """How an estimate is to be made: see `bnfold.adapt`.

    resumed: layers that were settled before, in order, with what they saw. on_settled: told of
    each layer as it is settled.
    """

    rule: Rule
    progress: Progress
    max_bytes: int
    ranks: Ranks = field(default_factory=Alone)
    resumed: Mapping[str, ImageMoments] = field(default_factory=dict)
    on_settled: Settled | None = None


class Network(Protocol):
    """A copy of the network that came in, to be measured and written to.

    layers: the batch norms to adapt, in the order in which they are defined.  skipped: the others.
    """

    layers: Mapping[str, Layer]
    skipped: list[SkippedLayer]

    def feed(self, data: Iterable[Any], max_bytes: int, *, is_share: bool = False) -> Passes:
        """The data as this network takes them, to be closed; as a share it may be empty."""

    def order(self, feed: Any) -> list[str]:
        """The layers in the order of the forward."""

    def keep_only(self, names: Sequence[str]) -> None:
        """Leave the other layers as they are."""

    def room(self) -> int:
        """Bytes of memory that are free."""

    def measure(self, feed: Any, run: Run) -> dict[str, ImageMoments]:
        """What each layer sees with the source's statistics."""

    def matched(self, rule: Rule, reference: Mapping[str, ImageMoments]) -> Rule:
        """The rule by which the target is brought to what the layers saw of the source."""

    def exact(self, feed: Any, run: Run) -> Estimate:
        """Each layer measured over the whole set with all layers before it adapted."""

    def fast(self, feed: Any, run: Run) -> Estimate:
        """One pass in which each layer normalises by its batch."""

    def observe(self, feed: Any, run: Run, statistics: Mapping[str, Statistics]) -> Observed:
        """The source and the adapted network, run over the data side by side."""

    def result(self, statistics: Mapping[str, Statistics]) -> Any:
        """The network that came in with these statistics, of the same type."""


# --- which layers ---------------------------------------------------------------------------------

NOT_CHOSEN = "It was not chosen."


def choose(names: Sequence[str], choice: LayerChoice) -> list[str]:
    """Those of the `names` that are to be adapted.

    choice: a predicate, or shell-style patterns; one with a "!" in front excludes. Raises
    UsageError for a pattern that matches nothing, or where nothing is left.
    """
    if choice is None:
        chosen = list(names)
    elif callable(choice):
        chosen = [name for name in names if choice(name)]
    else:
        chosen = _matching(names, [choice] if isinstance(choice, str) else list(choice))
    if not chosen:
        raise UsageError(f"None of the {len(names)} batch norms was chosen.")
    return chosen


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    without = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    within = [pattern for pattern in patterns if not pattern.startswith("!")]
    for pattern in (*within, *without):
        if not fnmatch.filter(names, pattern):
            raise UsageError(
                f"The pattern {pattern!r} matches no batch norm; there are"
                f" {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
            )

    def matches(name: str) -> bool:
        inside = not within or any(fnmatch.fnmatchcase(name, pattern) for pattern in within)
        return inside and not any(fnmatch.fnmatchcase(name, pattern) for pattern in without)

    return [name for name in names if matches(name)]


def first_ones(order: Sequence[str], last: str | int) -> list[str]:
    """The layers of `order` up to the one of this name, or so many. Raises UsageError."""
    if isinstance(last, int):
        if last < 1:
            raise UsageError(f"up_to is {last}; give a number of batch norms, or a name.")
        return list(order[:last])
    if last not in order:
        raise UsageError(
            f"up_to is {last!r}, which is no batch norm that is adapted; there are"
            f" {', '.join(order[:8])}{', ...' if len(order) > 8 else ''}."
        )
    return list(order[: order.index(last) + 1])
