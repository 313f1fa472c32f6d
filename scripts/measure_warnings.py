"""What the warnings of `bnfold adapt` catch and miss, on every real network and shift there is.

    .venv/bin/python scripts/measure_warnings.py [--data FOLDER] [--rows FILE] [--print]

For each case the accuracy before and after, and what the diagnosis saw without labels, are appended
to the file of rows (default build/warnings.jsonl); what is there is not measured again. Then
docs/results/warnings.md is printed from it. The cases: whole targets; few classes; few images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from measure_adaptation import DIGITS, ROOT, Case, batches, cifar, digits, versions

import realdata  # isort: skip  # measure_adaptation puts its folder on the path

from warnings_page import CLASSES, FEW, IMAGES, page

import bnfold
from bnfold.data.corruptions import CORRUPTIONS

TARGETS = ("MNIST", "USPS pad", "USPS stretch", "MNIST-M")


@dataclass(frozen=True, eq=False)
class Trial:
    """A case as it is, with few classes (0: all), or with few images (0: IMAGES)."""

    name: str
    make: Callable[[], Case]
    classes: int = 0
    images: int = 0
    draw: int = 0

    @property
    def key(self) -> str:
        """As rows are known by."""
        limits = [f"{self.classes} classes"] * bool(self.classes)
        limits += [f"{self.images} images"] * bool(self.images)
        return ", ".join([self.name, *limits, *[f"draw {self.draw}"] * bool(limits)])

    def case(self) -> Case:
        """Target and test images of the chosen classes, so many of them."""
        case = self.make()
        rng = np.random.default_rng((11, self.draw))
        x, y = case.test
        kept, tested = np.arange(len(case.labels)), np.arange(len(y))
        if self.classes:
            chosen = rng.permutation(10)[: self.classes]
            kept, tested = (np.flatnonzero(np.isin(a, chosen)) for a in (case.labels, y))
        kept = rng.permutation(kept)[: self.images or IMAGES]
        tested = rng.permutation(tested)[: 2 * IMAGES]
        return replace(case, target=case.target[kept], test=(x[tested], y[tested]))


def trials(shared: Path) -> Iterator[Trial]:
    """All of them, the quick ones first."""
    cases: dict[str, Callable[[], Case]] = {
        f"{network} {target}": lambda n=network, t=target: digits(shared, n, t)  # type: ignore[misc]
        for network in DIGITS
        for target in TARGETS
    }
    whole = [Trial(name, make) for name, make in cases.items()]
    few = [
        Trial(name, make, classes=count, draw=draw)
        for name, make in cases.items()
        for count in CLASSES
        for draw in range(2)
    ]
    small = [
        Trial(name, make, images=count, draw=draw)
        for name, make in cases.items()
        for count in FEW
        for draw in range(2)
    ]
    shifts = [("clean", 0), *((shift, s) for s in (1, 3, 5, 2, 4) for shift in CORRUPTIONS)]
    coloured: dict[str, Callable[[], Case]] = {
        f"resnet20 {shift} {s}".removesuffix(" 0"): lambda c=shift, s=s: cifar(  # type: ignore[misc]
            shared, "resnet20", c, s
        )
        for shift, s in shifts
    }
    yield from whole
    yield from few
    yield from small
    yield from (Trial(name, make) for name, make in coloured.items())
    for name in FEW_CLASS_SHIFTS:
        for count in CLASSES:
            for draw in range(2):
                yield Trial(name, coloured[name], classes=count, draw=draw)
        for count in FEW:
            yield Trial(name, coloured[name], images=count)


FEW_CLASS_SHIFTS = ("resnet20 clean", "resnet20 contrast 4", "resnet20 fog 3", "resnet20 snow 3")


def measured(trial: Trial) -> dict[str, Any]:
    """The row of a trial: accuracies, what the diagnosis saw, what it said."""
    case = trial.case()
    result = bnfold.adapt(case.module, batches(case.target, 50))
    assert result.outputs is not None
    outputs = asdict(result.outputs)
    del outputs["predictions"]
    return {
        "trial": trial.key,
        "case": trial.name,
        "classes": trial.classes,
        "images": trial.images,
        "before": realdata.accuracy(case.module, *case.test),
        "after": realdata.accuracy(result.model, *case.test),
        "w2": [layer.w2_before for layer in result.layers],
        "kl": [layer.kl_before for layer in result.layers],
        "kl_after": [layer.kl_after for layer in result.layers],
        "errors": [layer.mean_error for layer in result.layers],
        "outputs": outputs,
        "warnings": result.warnings,
    }


def rows_of(path: Path, shared: Path, *, measure: bool) -> list[dict[str, Any]]:
    """What was measured, and what is missing where that is asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {row["trial"] for row in rows}
    for trial in trials(shared) if measure else ():
        if trial.key not in known:
            rows.append(measured(trial))
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(trial.key, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure what is missing, print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--rows", type=Path, default=ROOT / "build" / "warnings.jsonl")
    parser.add_argument("--print", action="store_true", help="print only, measure nothing")
    chosen = parser.parse_args()
    rows = rows_of(chosen.rows, chosen.data, measure=not chosen.print)
    print(page(rows, versions()))


if __name__ == "__main__":
    main()
