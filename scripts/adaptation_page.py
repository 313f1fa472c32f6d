"""The page docs/results/adaptation.md from measured rows: see measure_adaptation.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bnfold.data.corruptions import CORRUPTIONS, SEVERITIES

Found = Mapping[tuple[str, str, int, int], Mapping[str, Any]]

COLUMNS = {
    "source": "source",
    "update_bn": "`update_bn`",
    "ema": "EMA .1",
    "fast": "fast",
    "exact": "exact",
    "auto": "prior auto",
    "half": "weight .5",
    "calibrated": "calibrated",
}
SHOWN_BY_SEVERITY = ("source", "fast", "exact", "half", "calibrated")
MISSING = "-"


def page(found: Found, cases: Sequence[str], versions: str) -> str:
    """All of it, Markdown."""
    parts = [
        HEAD.format(versions=versions),
        *(_corruptions(found, network) for network in ("resnet20", "resnet56")),
        _digits(found, cases),
        _sizes(found),
        _conclusions(found),
    ]
    return "\n".join(parts)


def _accuracy(found: Found, case: str, method: str, images: int = 0) -> float | None:
    """Mean over draws; None where it was not measured."""
    figures = [
        row["accuracy"]
        for (name, way, count, _), row in found.items()
        if (name, way, count) == (case, method, images)
    ]
    return float(np.mean(figures)) if figures else None


def _shown(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _mean(values: Sequence[float | None]) -> float | None:
    """None unless each one was measured."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    return "\n".join([_line(*header), _line(*["---"] * len(header)), *(_line(*r) for r in rows)])


def severities_of(found: Found, network: str) -> list[int]:
    """Those at which every corruption was measured with each of the main methods."""
    return [
        severity
        for severity in SEVERITIES
        if all(
            _accuracy(found, f"{network} {shift} {severity}", method) is not None
            for shift in CORRUPTIONS
            for method in ("source", "exact", "calibrated")
        )
    ]


def _corruptions(found: Found, network: str) -> str:
    severities = severities_of(found, network)
    if not severities:
        return f"## {network}\n\nNot measured."
    clean = [_shown(_accuracy(found, f"{network} clean", m)) for m in COLUMNS]

    def rows() -> Iterator[Sequence[str]]:
        yield ("clean", *clean)
        columns: dict[str, list[float | None]] = {method: [] for method in COLUMNS}
        for shift in CORRUPTIONS:
            means = {
                method: _mean(
                    [_accuracy(found, f"{network} {shift} {s}", method) for s in severities]
                )
                for method in COLUMNS
            }
            for method, value in means.items():
                columns[method].append(value)
            yield (shift, *map(_shown, means.values()))
        yield ("**mean of 15**", *(_shown(_mean(values)) for values in columns.values()))

    def full() -> Iterator[Sequence[str]]:
        for shift in CORRUPTIONS:
            cells = []
            for severity in SEVERITIES:
                case = f"{network} {shift} {severity}"
                values = [_accuracy(found, case, method) for method in SHOWN_BY_SEVERITY]
                measured = any(value is not None for value in values)
                cells.append(
                    " / ".join(MISSING if v is None else f"{v:.1f}" for v in values)
                    if measured
                    else MISSING
                )
            yield (shift, *cells)

    over = ", ".join(map(str, severities))
    legend = " / ".join(COLUMNS[method].replace("`", "") for method in SHOWN_BY_SEVERITY)
    return "\n".join(
        [
            f"## {network}: CIFAR-10 under 15 corruptions",
            "",
            f"Mean over severities {over}:",
            "",
            _table((network, *COLUMNS.values()), rows()),
            "",
            f"Each severity: {legend}",
            "",
            _table((network, *map(str, SEVERITIES)), full()),
            "",
        ]
    )


def _digits(found: Found, cases: Sequence[str]) -> str:
    names = [case for case in cases if case.startswith("mnist")]
    rows = ((case, *(_shown(_accuracy(found, case, m)) for m in COLUMNS)) for case in names)
    return "\n".join(
        [
            "## Digits: networks trained on MNIST",
            "",
            "The target's statistics come from USPS train (7291 images) and are tested on USPS test"
            " (2007); for MNIST-M the 5000 test images serve for both, without labels; for MNIST"
            " itself 10,000 training images, tested on the 10,000 test images.",
            "",
            _table(("network, target", *COLUMNS.values()), rows),
            "",
        ]
    )


# --- how many images ------------------------------------------------------------------------------

WAYS = ("exact", "prior 16", "auto", "calibrated", "calibrated, prior 16")


def _sizes(found: Found) -> str:
    names = list(dict.fromkeys(case for case, method, _, _ in found if method == "errors"))
    counts = sorted({count for _, _, count, _ in found if count})
    parts = [
        "## How many target images",
        "",
        "Accuracy with so many target images, mean of three draws. `needed` is what the diagnosis"
        " says after the whole set: the images for which chance moves a median channel by less than"
        " a tenth of a standard deviation, 19 times in 20, in the middle layer and the worst one.",
        "",
    ]
    for case in names:
        errors = found[case, "errors", 0, 0]
        source = _accuracy(found, case, "source")
        needed = errors["needed"]
        whole = _accuracy(found, case, "exact")
        parts += [
            f"{case}: source {_shown(source)}, exact on all {errors['available']} {_shown(whole)};"
            f" needed {np.median(needed):.0f} in the middle, {max(needed)} at most; standard error"
            f" of a mean with all images {np.median(errors['mean_error']):.4f}, of a folded scale"
            f" {np.median(errors['scale_error']):.4f}.",
            "",
            _table(
                ("target images", *map(str, counts)),
                ((w, *(_shown(_accuracy(found, case, w, n)) for n in counts)) for w in WAYS),
            ),
            "",
        ]
        if (case, "halves", 0, 0) in found:
            half = found[case, "halves", 0, 0]
            first, *rest = half["ratios"].values()
            mean, scale = np.median(rest, axis=0)
            parts += [
                f"Two halves of {half['each']} images differ, in standard errors: first layer"
                f" {first[0]:.2f} (means) and {first[1]:.2f} (scales), the others {mean:.2f} and"
                f" {scale:.2f} in the middle.",
                "",
            ]
        sources = [
            (int(method.split()[-1]), row["accuracy"])
            for (name, method, _, _), row in found.items()
            if name == case and method.startswith("calibrated on")
        ]
        if sources:
            said = ", ".join(f"{count}: {accuracy:.2f}" for count, accuracy in sorted(sources))
            every = _shown(_accuracy(found, case, "calibrated"))
            parts += [f"Calibrated on so many source images: {said}; 1000: {every}.", ""]
    return "\n".join(parts)


# --- prose ----------------------------------------------------------------------------------------

HEAD = """# Adapting real networks to real shifts

Printed by `scripts/measure_adaptation.py` ({versions}). Accuracies in percent.

The CIFAR networks are published ones, tested on 761 lossless test images: a difference of one
point between two columns is within chance. Corruptions: `bnfold.data.corruptions`, our own code
after Hendrycks & Dietterich (frost is ours in kind: procedural ice), with other draws for target
and test images. Statistics come from 2283 unlabelled training images under the same corruption,
in random order, batches of 250.

- `update_bn`: plain AdaBN: statistics reset, the cumulative average of training-mode batches.
  torch's function *is* that.
- EMA .1: one pass in training mode without reset, momentum .1, as much AdaBN code has it. After
  10 batches a share of .9^10 = .35 of the source's statistics is left, so that it is an
  accidental blend with the source; its result depends on the number and order of the batches.
- fast, exact: `bnfold.adapt`. exact does not depend on batches.
- prior auto: exact, blended with the source as far as chance explains the difference. weight .5:
  exact, half source.
- calibrated: exact with `source_data`: 1000 clean training images (digits: of MNIST). Each layer
  is brought to the mean and deviation that it had on these.
"""


def _gains(found: Found, method: str) -> list[float]:
    """Accuracy against the source's, over all CIFAR cases that were measured."""
    return [
        row["accuracy"] - found[case, "source", 0, 0]["accuracy"]
        for (case, way, count, _), row in found.items()
        if way == method
        and not count
        and case.startswith("resnet")
        and (case, "source", 0, 0) in found
    ]


def _conclusions(found: Found) -> str:
    lines = ["## What this shows, and what falls short", ""]
    for method in COLUMNS:
        gains = _gains(found, method)
        if method == "source" or not gains:
            continue
        lost = sum(gain < -1 for gain in gains)
        lines.append(
            f"- {COLUMNS[method]}: {len(gains)} CIFAR cases, {np.mean(gains):+.2f} points on"
            f" average, worst {min(gains):+.2f}; {lost} lose more than a point."
        )
    return "\n".join([*lines, TAIL])


TAIL = """
- fast, exact and plain AdaBN agree within chance at this size and batch: the case for exact is
  that it does not depend on how the set is cut or ordered, and small batches; it is not accuracy.
- Source images are worth more than any rule without them. These CIFAR networks were trained on
  augmented images, and their stored statistics are not those of plain ones: re-estimating costs 3
  points on clean images before any shift comes in ([why](clean_loss.md)). Calibrated leaves that
  out of the adaptation, so that clean images lose nothing. Where the stored statistics are those
  of plain source images (the digit networks) it has nothing to correct, and can cost a little.
- Blending hedges: it wins where the shift is mild, and loses where it is strong. No label-free
  rule here says which weight is best.
- Nothing here proves a gain without labels. What the warnings catch and miss is in
  [warnings.md](warnings.md).
- The published CIFAR-10-C files were not at hand: figures are comparable in kind with those of
  others, not digit by digit.
"""
