"""What the pages of the experiments have in common: one style, spreads over seeds, a page's form.

A page is title, claims, figure, table, setting and command. Its sentences are made from the
measurement: figures are filled in, and where a claim is a comparison, its outcome chooses the
words. Each experiment is a module with `main(arguments)`, run from the root of the repository:

    .venv/bin/python -m scripts.experiments.NAME [--quick] [--out FOLDER] [--seeds N] [--data DIR]
"""

from __future__ import annotations

import argparse
import io
import math
import platform
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from bnfold.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "experiments"
MAX_BYTES = 150_000
# From dark to light, so that they stay apart in grey; each with a dash and a marker of its own.
COLOURS = ("#14213d", "#c1121f", "#2a9d8f", "#e9a93a", "#8d99ae")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.fontsize": 8,
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "figure.dpi": 100,
    "savefig.dpi": 100,
}
# Student's t, two-sided 95 %, by the number of values: a spread of few seeds is itself uncertain.
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


# --- numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The same figure from several seeds; formatted with a spec it reads `mean ± deviation`."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of any iterable of at least one number."""
        return cls(tuple(map(float, values)))

    @classmethod
    def by(cls, found: Iterable[Any], name: str) -> Spread:
        """One attribute of what each seed gave."""
        return cls.of(getattr(one, name) for one in found)

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """Standard deviation over the seeds (n - 1); 0 of a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} ± {self.std:{spec}}"

    def __sub__(self, other: Spread) -> Spread:
        """Differences by seed: what the seeds have in common falls out."""
        return Spread.of(a - b for a, b in zip(self.values, other.values, strict=True))

    def over(self, other: Spread) -> Spread:
        """Ratios by seed."""
        return Spread.of(a / b for a, b in zip(self.values, other.values, strict=True))

    @property
    def differs_from_zero(self) -> bool:
        """Whether Student's 95 % interval of the mean leaves out zero."""
        count = len(self.values)
        if count < 2:
            return False
        return abs(self.mean) > T95.get(count, 2.26) * self.std / math.sqrt(count)


def compared(
    one: str, a: Spread, other: str, b: Spread, *, unit: str = "points", spec: str = ".1f",
    is_lower_better: bool = False, word: str = "better",
) -> str:  # fmt: skip
    """A clause: with which of two it is better and by how much, or that it cannot be told."""
    gain = b - a if is_lower_better else a - b
    if not gain.differs_from_zero:
        return f"no difference beyond the spread between {one} and {other} ({gain:{spec}} {unit})"
    if gain.mean < 0:
        one, other, gain = other, one, Spread.of(-v for v in gain.values)
    return f"{word} with {one} than with {other}, by {gain:{spec}} {unit}"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


# --- figures --------------------------------------------------------------------------------------


def canvas(
    rows: int, columns: int, *, width: float = 9.0, height: float = 3.0, **shared: Any
) -> Any:
    """A figure in the house's style and its axes, a two-dimensional array; height is of a row."""
    mpl.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def curve(
    axes: Any,
    x: Sequence[float],
    spreads: Sequence[Spread],
    number: int,
    label: str,
    *,
    is_log: bool = False,
) -> None:
    """Means with a band of one standard deviation, in the style of the so-many-th line.

    is_log: for a logarithmic axis; the band goes from the least value to the greatest.
    """
    mean = np.array([s.mean for s in spreads])
    std = np.array([s.std for s in spreads])
    low, high = mean - std, mean + std
    if is_log:
        low, high = (np.array([f(s.values) for s in spreads]) for f in (min, max))
    colour = COLOURS[number]
    axes.plot(x, mean, color=colour, linestyle=DASHES[number], marker=MARKERS[number], label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


# --- pages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What was asked for on the command line.

    data: a folder of real data, or None.  options: as the page's command shows them, without the
    paths of this machine.
    """

    quick: bool
    out: Path
    seeds: tuple[int, ...]
    data: Path | None
    options: str = ""


def asked(description: str | None, arguments: Sequence[str] | None, seeds: int = 5) -> Run:
    """The command line of every experiment."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, no claim")
    parser.add_argument("--out", type=Path, default=PAGES, help="folder for page and figure")
    parser.add_argument("--seeds", type=int, default=None, help="how many, from 0 on")
    parser.add_argument("--data", type=Path, default=None, help="folder of real data, see the page")
    chosen = parser.parse_args(arguments)
    if chosen.seeds is not None and chosen.seeds < 1:
        parser.error(f"--seeds is {chosen.seeds}; it must be at least 1.")
    options = " --quick" * chosen.quick + " --data DIR" * (chosen.data is not None)
    if chosen.seeds is not None:
        options += f" --seeds {chosen.seeds}"
    count = chosen.seeds or (2 if chosen.quick else seeds)
    return Run(chosen.quick, chosen.out, tuple(range(count)), chosen.data, options)


@dataclass(frozen=True)
class Page:
    """title; about: what is asked, with its source; claims: sentences, the first the result itself.

    tables: Markdown, between the figure and the setting, which is how it was measured.
    """

    name: str
    title: str
    about: str
    claims: Sequence[str]
    tables: Sequence[str]
    setting: str


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(run: Run, page: Page, figure: Figure) -> None:
    """NAME.md and NAME.png into the folder, and its index anew. Refuses too large a figure."""
    run.out.mkdir(parents=True, exist_ok=True)
    picture = run.out / f"{page.name}.png"
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(64).save(picture, optimize=True)
    size = picture.stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"{picture} has {size} bytes; draw it smaller than {MAX_BYTES}.")
    first, *others = [sentence(claim) for claim in page.claims]
    parts = [
        f"# {page.title}",
        filled(page.about),
        f"**{first}**",
        *(["\n".join(f"- {claim}" for claim in others)] if others else []),
        f"![{page.title}]({page.name}.png)",
        *page.tables,
        "## Setting",
        filled(page.setting),
        filled(
            f"Mean ± standard deviation over {len(run.seeds)} seeds (0 to {run.seeds[-1]}). A"
            " difference is called one where Student's 95 % interval of the differences by seed"
            " leaves out zero."
        ),
        f"    OMP_NUM_THREADS=1 .venv/bin/python -m scripts.experiments.{page.name}{run.options}",
        versions(),
    ]
    (run.out / f"{page.name}.md").write_text("\n\n".join(parts) + "\n")
    (run.out / "README.md").write_text(index(run.out))


def filled(text: str) -> str:
    """A paragraph in lines."""
    return textwrap.fill(text, 150, break_long_words=False, break_on_hyphens=False)


def index(folder: Path) -> str:
    """The pages of a folder, each with its first claim, as the pages themselves have them."""
    lines = []
    for path in sorted(folder.glob("*.md")):
        text = path.read_text()
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        claim = re.search(r"^\*\*(.+)\*\*$", text, re.MULTILINE)
        if path.name != "README.md" and title and claim:
            lines.append(f"- [{title[1]}]({path.name}): {claim[1]}")
    return "\n\n".join(["# Experiments", filled(INDEX), "\n".join(lines)]) + "\n"


INDEX = (
    "Each page is written by the script of its name in `scripts/experiments`; its sentences are"
    " filled in and chosen by what was measured. All of it is small networks on small data: it"
    " shows in which direction an effect goes here, not how large it is elsewhere."
)


def versions() -> str:
    """What it ran on."""
    return (
        f"bnfold {VERSION}, torch {torch.__version__}, numpy {np.__version__},"
        f" Python {platform.python_version()}, {platform.machine()}."
    )


if __name__ == "__main__":  # the index alone, after pages came from elsewhere
    (PAGES / "README.md").write_text(index(PAGES))
