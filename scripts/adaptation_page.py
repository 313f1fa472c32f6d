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
MAIN = ("source", "fast", "exact", "half", "calibrated")
WORST = 5  # the severity at which every way is measured
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


def _measured(found: Found, network: str, methods: Sequence[str], severity: int) -> list[str]:
    """The corruptions that were measured at a severity with each of the methods."""
    return [
        shift
        for shift in CORRUPTIONS
        if all(
            _accuracy(found, f"{network} {shift} {severity}", method) is not None
            for method in methods
        )
    ]


def _complete(found: Found, network: str, methods: Sequence[str]) -> list[int]:
    """The severities at which all of them were."""
    return [
        severity
        for severity in SEVERITIES
        if len(_measured(found, network, methods, severity)) == len(CORRUPTIONS)
    ]


def _means(
    found: Found,
    network: str,
    methods: Sequence[str],
    severities: Sequence[int],
    shifts: Sequence[str] = tuple(CORRUPTIONS),
) -> Iterator[Sequence[str]]:
    """A row for clean images, one for each corruption, the mean over severities, and their mean."""
    yield ("clean", *(_shown(_accuracy(found, f"{network} clean", m)) for m in methods))
    columns: dict[str, list[float | None]] = {method: [] for method in methods}
    for shift in shifts:
        for method in methods:
            cases = [f"{network} {shift} {severity}" for severity in severities]
            columns[method].append(_mean([_accuracy(found, case, method) for case in cases]))
        yield (shift, *(_shown(columns[method][-1]) for method in methods))
    yield (f"**mean of {len(shifts)}**", *(_shown(_mean(v)) for v in columns.values()))


def _each_severity(found: Found, network: str, methods: Sequence[str]) -> Iterator[Sequence[str]]:
    """A row for each corruption, a column for each severity, the methods in a cell."""
    for shift in CORRUPTIONS:
        cells = []
        for severity in SEVERITIES:
            case = f"{network} {shift} {severity}"
            values = [_accuracy(found, case, method) for method in methods]
            cells.append(" / ".join(MISSING if v is None else f"{v:.1f}" for v in values))
        yield (shift, *cells)


def _corruptions(found: Found, network: str) -> str:
    parts = [f"## {network}: CIFAR-10 under 15 corruptions", ""]
    main = [m for m in MAIN if len(_complete(found, network, [m])) == len(SEVERITIES)]
    if main:
        header = (network, *(COLUMNS[m] for m in main))
        over = ", ".join(map(str, SEVERITIES))
        table = _table(header, _means(found, network, main, SEVERITIES))
        parts += [f"Mean over severities {over}:", "", table, ""]
    worst = [m for m in COLUMNS if _measured(found, network, [m], WORST)]
    shifts = _measured(found, network, worst, WORST)
    if shifts:
        header = (network, *(COLUMNS[m] for m in worst))
        rest = [shift for shift in CORRUPTIONS if shift not in shifts]
        missing = f" (not measured: {', '.join(rest)})" if rest else ""
        table = _table(header, _means(found, network, worst, [WORST], shifts))
        parts += [f"Severity {WORST}{missing}:", "", table, ""]
    if main:
        legend = " / ".join(COLUMNS[method] for method in main)
        table = _table((network, *map(str, SEVERITIES)), _each_severity(found, network, main))
        parts += [f"Each severity: {legend}", "", table, ""]
    return "\n".join(parts)


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


def _conclusions(found: Found) -> str:
    """Counts over the resnet20 cases, for ways that were measured on all of them; then prose."""
    cases = ["resnet20 clean", *(f"resnet20 {c} {s}" for c in CORRUPTIONS for s in SEVERITIES)]
    lines = ["## What this shows, and what falls short", ""]
    for method in COLUMNS:
        accuracies = [_accuracy(found, case, method) for case in cases]
        sources = [_accuracy(found, case, "source") for case in cases]
        gains = [a - s for a, s in zip(accuracies, sources, strict=True) if a is not None and s]
        if method == "source" or len(gains) < len(cases):
            continue
        lines.append(
            f"- {COLUMNS[method]}, all {len(gains)} cases of resnet20: {np.mean(gains):+.2f} points"
            f" on average, worst {min(gains):+.2f}; {sum(gain < -1 for gain in gains)} lose more"
            " than a point."
        )
    return "\n".join([*lines, TAIL])


TAIL = """\
- fast, exact and plain AdaBN agree within chance at this size and batch: the case for exact is
  that it does not depend on how the set is cut or ordered, and small batches; it is not accuracy.
- Source images are worth more than any rule without them. These CIFAR networks were trained on
  augmented images, and their stored statistics are not those of plain ones: re-estimating costs
  resnet20 3 points on clean images before any shift comes in ([why](clean_loss.md)). Calibrated
  leaves that out of the adaptation: clean images lose nothing, and every corruption gains on
  exact. 64 source images do nearly what 1000 do there (digits: 256); 16 do not.
- It is no free lunch: the digit networks store the statistics of plain images, calibrated has
  nothing to correct there, and it costs up to 2.7 points against exact (mlp, stretched).
- Half of the source's statistics (weight .5) beats exact on 28 of the 30 corruptions at severity
  5 (resnet56: a tie and a loss), and on each stretched digit; on MNIST-M it loses 3.7 and 5.6
  points (lenet5, mlp). On the CIFAR networks a part of that is the black frame again, half of
  which it keeps. No rule without labels told which weight is best; the default stays the target's
  own statistics.
- With few images the source belongs in: with 4 to 16 of them a prior of 16 images is worth 3 to
  17 points (but costs 1.5 to 4 on MNIST-M, where the source network knows little). `auto` is more
  careful than exact and does less than that prior. From 512 images on nothing is left of either.
- The standard errors are about right in the first layer (two halves differ by .55 to 1.65 of
  them, over few and correlated channels), and too large for the means of later ones, by a factor
  of 3 on resnet20: those see what the earlier ones, adapted to the same images, have evened out.
  The number of images that the diagnosis asks for errs on the safe side.
- Nothing here proves a gain without labels. What the warnings catch and miss is in
  [warnings.md](warnings.md).
- The published CIFAR-10-C files were not at hand: figures are comparable in kind with those of
  others, not digit by digit. There are 761 lossless test images; a dash was not measured.
"""
