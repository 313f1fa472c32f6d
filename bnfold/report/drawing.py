"""Pictures as inline SVG: lengths in percent across and in pixels down.

So a picture takes the width that there is, on a phone as on a desk, and its letters keep their
size. Colours are the page's (page.css); every mark says in words what it shows when pointed at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bnfold.report.tables import figure

HEIGHT = 230  # of a line chart's field, pixels
LETTER = (0.62, 2.6)  # width of a letter in percent of a field: on a desk, on a phone
BAND = 16  # pixels above the field for the names of the layers' groups
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STEPS = (1, 2, 5)
_LEAST = 1e-300  # beyond it, and its inverse, there are no round numbers


# --- axes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis between two round numbers."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> LogAxis | None:
        """The narrowest that holds the values that have a logarithm; None where none has."""
        known = [min(max(value, _LEAST), 1 / _LEAST) for value in values if 0 < value < math.inf]
        if not known:
            return None
        low, high = _round_down(min(known)), _round_up(max(known))
        return cls(low, high) if high / low > 4 else cls(_round_down(low / 2), _round_up(high * 2))

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1; what is beyond lies at the end."""
        if not value > 0:
            return 0.0
        if value == math.inf:
            return 1.0
        low, high = math.log(self.low), math.log(self.high)
        place = (math.log(value) - low) / (high - low)
        return min(max(place, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round numbers along it, at most eight."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        powers = range(first, last + 1)
        steps = _STEPS if last - first <= 2 else (1,)
        every = max(1, math.ceil((last - first) / 7))
        found = [m * 10.0**k for k in powers if k % every == 0 for m in steps]
        return [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]


@dataclass(frozen=True)
class LinearAxis:
    """An axis from 0 to a round number."""

    high: float

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        return min(max(value / self.high, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round numbers along it."""
        step = _round_up(self.high / 6)
        return [step * k for k in range(int(self.high / step + 1e-9) + 1)]


def _round_down(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return max(m * power for m in _STEPS if m * power <= value * (1 + 1e-9))


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return min(m * power for m in (*_STEPS, 10) if m * power >= value * (1 - 1e-9))


def tick_label(value: float) -> str:
    """A tick in words: 0.2, 50, 10⁻⁷."""
    if value == 0 or 1e-3 <= value < 1e4:
        return f"{value:g}"
    power = math.floor(math.log10(value) + 1e-9)
    mantissa = round(value / 10.0**power)
    return raised(power) if mantissa == 1 else f"{mantissa}·{raised(power)}"


def raised(power: int) -> str:
    """A power of ten in words: 10⁻⁷."""
    return f"10{str(power).translate(_RAISED)}"


def scale(axis: LogAxis | LinearAxis) -> Markup:
    """The numbers along an axis that runs across, to stand above rows that share it."""
    ticks = axis.ticks()
    marks = []
    for value in ticks:
        place = axis.share(value)
        anchor = "start" if place < 0.04 else "end" if place > 0.96 else "middle"
        marks.append(
            Markup('<text x="{}" y="12" text-anchor="{}">{}</text>').format(
                _percent(place), anchor, tick_label(value)
            )
        )
    return _svg("scale", 16, marks)


# --- rows -----------------------------------------------------------------------------------------


def range_bars(axis: LogAxis, sides: Sequence[tuple[str, tuple[float, float, float]]]) -> Markup:
    """A bar for each side, (class, (low, middle, high)), on a shared axis, one below the other."""
    marks = _grid(axis, 10 * len(sides) + 2)
    for row, (kind, (low, middle, high)) in enumerate(sides):
        y = 6 + 10 * row
        ends = [_percent(axis.share(value)) for value in (low, high)]
        told = f"{kind}: {figure(low)} to {figure(high)}, median {figure(middle)}"
        bar = Markup('<line class="bar {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            kind, *ends, y, y
        )
        at = _percent(axis.share(middle))
        dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="3.5"/>').format(kind, at, y)
        marks.append(_hinted(bar + dot, told))
    return _svg("row", 10 * len(sides) + 2, marks)


def spread_dot(axis: LinearAxis, middle: float, pair: tuple[float, float], told: str) -> Markup:
    """A median with its quartiles on a line, and the line at 1."""
    one = _percent(axis.share(1.0))
    marks = _grid(axis, 20)
    marks.append(Markup('<line class="one" x1="{0}" x2="{0}" y1="0" y2="20"/>').format(one))
    ends = [_percent(axis.share(value)) for value in pair]
    bar = Markup('<line class="bar after" x1="{}" x2="{}" y1="10" y2="10"/>').format(*ends)
    at = _percent(axis.share(middle))
    dot = Markup('<circle class="dot after" cx="{}" cy="10" r="5"/>').format(at)
    return _svg("row", 20, [*marks, _hinted(bar + dot, told)])


def count_bars(before: int, after: int, largest: int) -> Markup:
    """Two counts as bars."""
    marks = [
        Markup('<rect class="{}" x="0" y="{}" width="{}" height="7" rx="2"/>').format(
            kind, y, _percent(count / max(largest, 1))
        )
        for kind, y, count in (("before", 1, before), ("after", 10, after))
    ]
    return _svg("row", 18, marks)


def gauge(value: float, limit: float, *, passed: bool) -> Markup:
    """A figure against its limit, which always stands in the middle; logarithmic."""
    share = 0.0 if value <= 0 else 1.0
    if 0 < value < math.inf and 0 < limit < math.inf:  # two decades on either side
        share = min(max(0.5 + (math.log10(value) - math.log10(limit)) / 4, 0.0), 1.0)
    marks = [
        Markup('<rect class="track" x="0" y="6" width="100%" height="6" rx="3"/>'),
        Markup('<rect class="{}" x="0" y="6" width="{}" height="6" rx="3"/>').format(
            "good" if passed else "bad", _percent(max(share, 0.01))
        ),
        Markup('<line class="limit" x1="50%" x2="50%" y1="2" y2="16"/>'),
    ]
    told = f"{figure(value)}, where at most {figure(limit)} passes"
    return _svg("gauge", 18, [_hinted(Markup("").join(marks), told)])


def heat_strip(names: Sequence[str], values: Sequence[float], axis: LogAxis, what: str) -> Markup:
    """A row of cells, the darker the greater."""
    wide = 1 / len(values)
    marks = []
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        level = "none" if math.isnan(value) else f"h{round(8 * axis.share(value))}"
        cell = Markup('<rect class="cell {}" x="{}" y="0" width="{}" height="22"/>').format(
            level, _percent(index * wide), _percent(wide)
        )
        marks.append(_hinted(cell, f"{name}: {what} {figure(value)}"))
    return _svg("strip", 22, marks)


# --- layer by layer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A line of a chart: what it is called, its class in page.css, NaN where it has a gap."""

    label: str
    kind: str
    values: Sequence[float]


def line_chart(
    names: Sequence[str],
    series: Sequence[Series],
    *,
    hints: Sequence[str],
    marks: Mapping[int, str],
    guides: Sequence[tuple[float, str]] = (),
    floor: float = 0.0,
    about: str,
) -> Markup:
    """Layer by layer along a logarithmic axis.

    hints: what a layer's column says when it is pointed at. marks: columns that stand out, with
    what is written there. guides: values with a line of their own. floor: where the axis ends at
    the latest; what is less stands at its end. about: the picture in words.
    """
    values = [*(value for line in series for value in line.values), *(v for v, _ in guides)]
    axis = LogAxis.of(max(value, floor) for value in values)
    if axis is None:
        return Markup("")
    parts = [*_bands(names), *_levels(axis), *_columns(hints)]
    for line in series:
        parts += _line(axis, line)
    parts += [*_guides(axis, guides), *_marks(marks, len(names))]
    labels = [
        Markup('<text x="100%" y="{}" text-anchor="end">{}</text>').format(
            round(_y(axis, value) + 4, 1), tick_label(value)
        )
        for value in axis.ticks()
    ]
    side = _svg("side", HEIGHT + 2 * BAND, labels)
    field = _svg("field", HEIGHT + 2 * BAND, parts, about=about)
    return Markup('<div class="chart">{}{}</div>').format(side, field)


def _y(axis: LogAxis, value: float) -> float:
    return round(BAND + HEIGHT * (1 - axis.share(value)), 1)


def _x(index: int, count: int) -> str:
    return _percent((index + 0.5) / count)


def _levels(axis: LogAxis) -> list[Markup]:
    return [
        Markup('<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(_y(axis, value))
        for value in axis.ticks()
    ]


def _guides(axis: LogAxis, guides: Sequence[tuple[float, str]]) -> list[Markup]:
    return [
        Markup(
            '<line class="guide" x1="0" x2="100%" y1="{0}" y2="{0}"/>'
            '<text class="guide" x="100%" y="{1}" text-anchor="end">{2}</text>'
        ).format(_y(axis, value), _y(axis, value) - 4, label)
        for value, label in guides
    ]


def _columns(hints: Sequence[str]) -> list[Markup]:
    wide = 1 / len(hints)
    return [
        _hinted(
            Markup('<rect class="column" x="{}" y="{}" width="{}" height="{}"/>').format(
                _percent(index * wide), BAND, _percent(wide), HEIGHT
            ),
            hint,
        )
        for index, hint in enumerate(hints)
    ]


def _line(axis: LogAxis, line: Series) -> list[Markup]:
    count = len(line.values)
    points = [
        None if math.isnan(value) else (_x(index, count), _y(axis, value))
        for index, value in enumerate(line.values)
    ]
    parts = [
        Markup('<line class="line {}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(line.kind, *a, *b)
        for a, b in itertools.pairwise(points)
        if a is not None and b is not None
    ]
    radius = 3 if count <= 60 else 1.8
    return parts + [
        Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"/>').format(line.kind, *point, radius)
        for point in points
        if point is not None
    ]


def _marks(marks: Mapping[int, str], count: int) -> list[Markup]:
    found = []
    for index, label in marks.items():
        place = (index + 0.5) / count
        found.append(
            Markup(
                '<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>'
                '<text class="mark" x="{0}" y="{3}" text-anchor="{4}">{5}</text>'
            ).format(
                _percent(place),
                BAND - 2,
                BAND + HEIGHT,
                BAND - 5,
                "end" if place > 0.5 else "start",
                label,
            )
        )
    return found


def _bands(names: Sequence[str]) -> list[Markup]:
    """The background striped by groups of layers, each with its name below where there is room."""
    parts = []
    for stripe, (label, first, count) in enumerate(groups(names)):
        start, wide = first / len(names), count / len(names)
        if stripe % 2:
            parts.append(
                Markup('<rect class="band" x="{}" y="{}" width="{}" height="{}"/>').format(
                    _percent(start), BAND, _percent(wide), HEIGHT
                )
            )
        desk, phone = (100 * wide >= letter * (len(label) + 1) for letter in LETTER)
        if desk or phone:
            parts.append(
                Markup('<text class="{}" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                    "" if phone else "desk",
                    _percent(start + wide / 2),
                    HEIGHT + 2 * BAND - 2,
                    label,
                )
            )
    return parts


def groups(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of layers under one name, (name, first, how many): the shallowest level with several.

    Where names show no such thing, runs of equal length, by number.
    """
    for depth in (1, 2, 3):
        heads = [".".join(name.split(".")[:depth]) for name in names]
        runs = [(head, len(list(run))) for head, run in itertools.groupby(heads)]
        if 2 <= len(runs) <= max(2, min(12, len(names) // 2)):
            firsts = itertools.accumulate((count for _, count in runs), initial=0)
            return [
                (head.split(".")[-1], first, count)
                for (head, count), first in zip(runs, firsts, strict=False)
            ]
    step = max(1, math.ceil(len(names) / 5))
    parts = [(first, min(step, len(names) - first)) for first in range(0, len(names), step)]
    return [
        (f"{first + 1}\u2013{first + count}" if count > 1 else f"{first + 1}", first, count)
        for first, count in parts
    ]


# --- SVG ------------------------------------------------------------------------------------------


def _grid(axis: LogAxis | LinearAxis, height: int) -> list[Markup]:
    return [
        Markup('<line class="grid" x1="{0}" x2="{0}" y1="0" y2="{1}"/>').format(
            _percent(axis.share(value)), height
        )
        for value in axis.ticks()
    ]


def _hinted(drawn: Markup, hint: str) -> Markup:
    return Markup("<g><title>{}</title>{}</g>").format(hint, drawn)


def _svg(kind: str, height: int, parts: Iterable[Markup], about: str | None = None) -> Markup:
    """A picture of the width that there is; `about` for those who cannot see it."""
    role = (
        Markup('role="img" aria-label="{}"').format(about)
        if about
        else Markup('aria-hidden="true"')
    )
    return Markup('<svg class="{}" width="100%" height="{}" {}>{}</svg>').format(
        kind, height, role, Markup("").join(parts)
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
