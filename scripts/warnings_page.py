"""The page docs/results/warnings.md from measured rows: see measure_warnings.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from bnfold.data.corruptions import CORRUPTIONS
from bnfold.measuring import diagnosis
from bnfold.measuring.diagnosis import OutputShift

IMAGES = 761  # of the target, as many as there are CIFAR images to test on
CLASSES = (1, 2, 3, 5)
FEW = (4, 8, 16, 32, 64, 128)
CHANCE = 1.0  # points of accuracy that count as no change


@dataclass(frozen=True, eq=False)
class Outcome:
    """A row, read: the change of accuracy, the figures without labels, what is said of them now."""

    row: Mapping[str, Any]
    change: float
    figures: Mapping[str, float]
    said: tuple[str, ...]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Outcome:
        """The sentences are those of the diagnosis as it is, not as it was when it was measured."""
        stored = {k: tuple(v) if isinstance(v, list) else v for k, v in row["outputs"].items()}
        none = np.zeros(0, np.int64)
        outputs = OutputShift(**stored, predictions=(none, none))
        third = max(len(row["kl"]) // 3, 1)
        shift = float(np.mean(row["w2"]))
        figures = {
            "mean W2^2 before, small": shift,
            "mean KL before, small": float(np.mean(row["kl"])),
            "KL of the last third over that of the first, large": -float(
                np.mean(row["kl"][-third:]) / np.mean(row["kl"][:third])
            ),
            "entropy after - before, large": outputs.entropy_before - outputs.entropy_after,
            "entropy before, small": outputs.entropy_before,
            "agreement, large": -outputs.agreement,
            "histogram change, small": outputs.histogram_change,
            "information after - before, small": outputs.information_after
            - outputs.information_before,
        }
        said = tuple(diagnosis.likely_harm(shift, outputs))
        return cls(row, row["after"] - row["before"], figures, said)

    @property
    def lost(self) -> bool:
        """More than chance."""
        return self.change < -CHANCE

    @property
    def gained(self) -> bool:
        """More than chance."""
        return self.change > CHANCE

    @property
    def to_fit(self) -> bool:
        """In the half on which thresholds are chosen: every second type of shift or network."""
        case = self.row["case"]
        if case.startswith("mnist"):
            return case.split()[0] in ("mnist_lenet5", "mnist_resnet")
        shift = case.split()[1]
        return shift == "clean" or list(CORRUPTIONS).index(shift) % 2 == 0

    @property
    def kind(self) -> str:
        """What was done to the target."""
        if self.row["classes"]:
            return "few classes"
        return "few images" if self.row["images"] else "whole"


def quality(warned: Sequence[bool], outcomes: Sequence[Outcome]) -> str:
    """Table cells: precision, recall, false alarms where adapting gained."""
    hits = sum(w and o.lost for w, o in zip(warned, outcomes, strict=True))
    lost, said = sum(o.lost for o in outcomes), sum(warned)
    gained = sum(o.gained for o in outcomes)
    false = sum(w and o.gained for w, o in zip(warned, outcomes, strict=True))
    precision = f"{hits / said:.2f} ({hits}/{said})" if said else "-"
    recall = f"{hits / lost:.2f} ({hits}/{lost})" if lost else "-"
    return f"{precision} | {recall} | {false}/{gained}"


def best_threshold(name: str, outcomes: Sequence[Outcome]) -> float:
    """Below which a figure warns, with the largest F1."""
    values = sorted(o.figures[name] for o in outcomes)

    def f1(limit: float) -> float:
        warned = [o.figures[name] < limit for o in outcomes]
        hits = sum(w and o.lost for w, o in zip(warned, outcomes, strict=True))
        return 2 * hits / (sum(warned) + sum(o.lost for o in outcomes))

    return max([(a + b) / 2 for a, b in pairwise(values)], key=f1)


def single_figures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What each figure alone would do."""
    yield "| one figure alone | limit | half | precision | recall | false where it gained |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in outcomes[0].figures:
        limit = best_threshold(name, [o for o in outcomes if o.to_fit])
        for half, chosen in (("chosen on", True), ("other", False)):
            part = [o for o in outcomes if o.to_fit == chosen]
            cells = quality([o.figures[name] < limit for o in part], part)
            shown = -limit if name.endswith("large") else limit
            yield f"| {name} | {shown:.3g} | {half} | {cells} |"


SENTENCES = {
    "any of these": "",
    "looks like the source": "looks like the source",
    "hardly more, or less, about the images": "about the images than before",
    "few classes": "few classes",
    "one class afterwards": "are predicted as class",
}


def product(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What the diagnosis says."""
    yield "| targets | sentence | half | precision | recall | false where it gained |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for kind in ("whole", "few classes", "few images"):
        for label, words in SENTENCES.items():
            for half, chosen in (("chosen on", True), ("other", False)):
                part = [o for o in outcomes if o.kind == kind and o.to_fit == chosen]
                cells = quality([any(words in s for s in o.said) for o in part], part)
                yield f"| {kind} | {label} | {half} | {cells} |"
    few = [o for o in outcomes if o.kind == "few images"]
    size = [any("are needed at" in s for s in o.row["warnings"]) for o in few]
    yield f"| few images | so many are needed | both | {quality(size, few)} |"


def misses(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Each loss without a warning, and each gain with one, of whole targets and of few classes."""
    for title, wanted in (
        ("Losses without a warning", lambda o: o.lost and not o.said),
        ("Warnings where adapting gained", lambda o: o.gained and o.said),
    ):
        found = [o for o in outcomes if o.kind != "few images" and wanted(o)]
        yield f"\n{title}: {len(found)}.\n"
        for o in sorted(found, key=lambda o: -abs(o.change))[:LISTED]:
            yield f"- {o.row['trial']}: {o.row['before']:.1f} to {o.row['after']:.1f}"
        if len(found) > LISTED:
            yield f"- and {len(found) - LISTED} smaller ones"


def by_classes(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """How much a target of few classes costs, and how often that is said."""
    yield "| classes in the target | trials | mean change | lost | of these warned |"
    yield "| --- | --- | --- | --- | --- |"
    for count in (*CLASSES, 0):
        part = [o for o in outcomes if o.row["classes"] == count and not o.row["images"]]
        lost = [o for o in part if o.lost]
        mean = np.mean([o.change for o in part]) if part else float("nan")
        warned = sum(bool(o.said) for o in lost)
        yield f"| {count or 'all'} | {len(part)} | {mean:+.1f} | {len(lost)} | {warned} |"


def by_images(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The same for few images."""
    columns = "images, trials, mean change, lost, of these told the number needed, others told"
    yield "| " + columns.replace(", ", " | ") + " |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for count in (*FEW, 0):
        part = [o for o in outcomes if o.row["images"] == count and not o.row["classes"]]
        said = [any("are needed at" in s for s in o.row["warnings"]) for o in part]
        hits = sum(w and o.lost for w, o in zip(said, part, strict=True))
        mean = np.mean([o.change for o in part]) if part else float("nan")
        lost = sum(o.lost for o in part)
        yield (
            f"| {count or IMAGES} | {len(part)} | {mean:+.1f} | {lost} | {hits} |"
            f" {sum(said) - hits} of {len(part) - lost} |"
        )


def layer_table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Symmetric KL and W2 by layer, as the AdaBN paper has them, of some cases."""
    yield "| case | figure | layers, first to last |"
    yield "| --- | --- | --- |"
    for o in outcomes:
        if o.row["trial"] in SHOWN_LAYERS:
            for label, key in (
                ("KL before", "kl"),
                ("KL after", "kl_after"),
                ("W2^2 before", "w2"),
            ):
                values = ", ".join(f"{value:.2g}" for value in o.row[key])
                yield f"| {o.row['trial']} | {label} | {values} |"


LISTED = 15
SHOWN_LAYERS = (
    "mnist_lenet5 USPS stretch",
    "mnist_resnet USPS pad",
    "resnet20 clean",
    "resnet20 fog 5",
)


LAYERS = """Of each layer's normalised input on the target against N(0, 1), as the AdaBN paper's
table 4 has it for two layers. After `exact` it is 0 by construction on the images that were
measured: that figure checks the arithmetic, it says nothing of accuracy.
"""


def page(rows: Sequence[Mapping[str, Any]], versions: str) -> str:
    """Markdown."""
    outcomes = [Outcome.of(row) for row in rows]
    whole = [o for o in outcomes if o.kind == "whole"]
    counted = (
        f"{len(whole)} whole targets, {len(outcomes) - len(whole)} made small or of few classes"
    )
    return "\n".join(
        [
            HEAD.format(versions=versions, counted=counted, images=IMAGES, chance=CHANCE),
            "## What the diagnosis says\n",
            *product(outcomes),
            "\n## Which figure tells\n\nWhole targets.\n",
            *single_figures(whole),
            "\n## Few classes, few images\n",
            *by_classes(outcomes),
            "",
            *by_images(outcomes),
            "\n## What is missed\n",
            *misses(outcomes),
            "\n## Layer by layer\n",
            LAYERS,
            *layer_table(outcomes),
        ]
    )


HEAD = """# What the warnings catch, and what they miss

Printed by `scripts/measure_warnings.py` ({versions}): {counted}.

Method exact, {images} target images where not said otherwise; the networks and shifts of
[adaptation.md](adaptation.md). A loss is a change of accuracy below -{chance:g} points, a gain one
above. The limits of the single figures below were chosen on one half (every second corruption; of
the digit networks lenet5 and resnet), and tried on the other. Those of the sentences are round
numbers set after a look at both: their rates are no forecast for other networks.

Precision: of the targets that are warned of, how many lose. Recall: of those that lose, how many
are warned of. Where nothing changes by more than chance, a warning costs nothing: the last column
counts those that gain.
"""
