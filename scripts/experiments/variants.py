"""Weight norm, mean-only batch norm and Normalization Propagation against batch norm.

What Salimans & Kingma 2016 and Arpit et al. 2016 compare: test error, time per step, the mean of
what each hidden layer reads (NormProp's argument), and the singular values of the layers' Jacobians
(its reason for the factor 1.21). One network without pooling in between, trained alike, the
learning rate chosen for each variant on training images set apart.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from scripts.experiments.figure import (
    COLOURS,
    DASHES,
    MARKERS,
    Page,
    Run,
    Spread,
    asked,
    canvas,
    compared,
    curve,
    table,
    write,
)
from scripts.experiments.hidden import spectrum
from scripts.experiments.normalised import (
    BATCH,
    BATCH_NORM,
    BOTH,
    DRAWN,
    GAIN,
    LOOKS,
    NONE,
    PAPER,
    PROBE,
    RATES,
    UNIT,
    VARIANTS,
    WEIGHT,
    WIDTHS,
    Found,
    Variant,
    built,
    chosen_rates,
    depths,
    measured,
    step_times,
)
from scripts.experiments.setting import Labelled, digits

# --- the data -------------------------------------------------------------------------------------


def mnist(folder: Path) -> tuple[Labelled, Labelled]:
    """8,000 of the 10,000 training images at hand and the 10,000 test images of MNIST."""
    folder = folder / "digits"
    with np.load(folder / "mnist_train10k.npz") as file:
        train = file["x"], file["y"]
    pixels = np.frombuffer(
        gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer((folder / "t10k-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    order = np.random.default_rng(0).permutation(len(train[0]))[:8000]
    pairs = (train[0][order], train[1][order]), (pixels.reshape(-1, 28, 28), labels)
    first, second = (
        (torch.from_numpy(x / np.float32(255))[:, None], torch.from_numpy(y.astype(np.int64)))
        for x, y in pairs
    )
    return first, second


def standardised(train: Labelled, test: Labelled) -> tuple[Labelled, Labelled]:
    """Both by the mean and deviation of the training set."""
    mean, std = train[0].mean(), train[0].std()
    return ((train[0] - mean) / std, train[1]), ((test[0] - mean) / std, test[1])


# --- the page -------------------------------------------------------------------------------------


@dataclass
class Results:
    """All that was measured; runs and times by the variants' names, in their order."""

    runs: dict[str, list[Found]]
    times: dict[str, Spread]
    rates: dict[str, float]
    spectra: dict[str, list[float]]
    depths: dict[str, dict[float, Spread]]

    def error(self, variant: Variant) -> Spread:
        """Of the test set, in percent."""
        return Spread.of(found.error for found in self.runs[variant.name])

    def layer(self, variant: Variant, when: str, number: int, what: str) -> Spread:
        """A figure of one of the layers that `looked_at` gives, `first` or `last`."""
        layers = (getattr(found, when)[number] for found in self.runs[variant.name])
        return Spread.of(getattr(layer, what) for layer in layers)


def draw(found: Results) -> Figure:
    """Above, the mean of what three layers read; below, Jacobians, and the error."""
    figure, axes = canvas(2, 3, height=2.8)
    for panel, number in zip(axes[0], (0, 2, 5), strict=True):
        for style, variant in enumerate(DRAWN):
            runs = [one.shifts for one in found.runs[variant.name]]
            values = [Spread.of(run[look][number] for run in runs) for look in range(len(runs[0]))]
            curve(panel, [look / LOOKS for look in range(len(values))], values, style, variant.name)
        panel.set(title=f"layer {number + 2}", xlabel="epoch", ylim=(-1, 1))
    axes[0, 0].set_ylabel("mean of its input / r.m.s.")
    axes[0, 1].legend(loc="lower right", fontsize=7)
    ratios, sorted_values, errors = axes[1]
    for style, variant in enumerate(DRAWN):
        layers = range(len(found.runs[variant.name][0].first))
        values = [found.layer(variant, "first", n, "jacobian") for n in layers]
        curve(ratios, [n + 2 for n in layers], values, style, variant.name)
        spectrum = found.spectra[variant.name]
        share = np.linspace(0, 1, len(spectrum))
        sorted_values.plot(share, spectrum, color=COLOURS[style], linestyle=DASHES[style])
    ratios.set(
        title="at the start", xlabel="layer", ylabel="singular values, r.m.s.", ylim=(0, 1.5)
    )
    sorted_values.set(
        title="layer 6 at the start, one image", xlabel="share of the singular values"
    )
    sorted_values.set_ylabel("singular value")
    for at in (ratios, sorted_values):
        at.axhline(1, color="black", linewidth=0.6)
    for place, variant in enumerate(VARIANTS):
        error = found.error(variant)
        style = DRAWN.index(variant) if variant in DRAWN else None
        colour = "#555555" if style is None else COLOURS[style]
        marker = "x" if style is None else MARKERS[style]
        errors.errorbar(error.mean, place, 0, error.std, color=colour, marker=marker, capsize=2)
    errors.set_yticks(range(len(VARIANTS)), [variant.name for variant in VARIANTS], fontsize=7)
    errors.set(xlabel="test error, %", xscale="log")
    errors.invert_yaxis()
    errors.xaxis.set_major_formatter("{x:g}")
    errors.xaxis.set_minor_formatter("{x:g}")
    return figure


def claims(found: Results) -> list[str]:
    """What came out, in words."""
    errors = {variant: found.error(variant) for variant in VARIANTS}

    def held(one: Variant, other: Variant) -> str:
        return compared(
            one.name, errors[one], other.name, errors[other], spec=".2f", is_lower_better=True
        )

    said = [
        "Test error, the lowest first: "
        + ", ".join(
            f"{variant.name} {errors[variant]:.2f} %"
            for variant in sorted(errors, key=lambda variant: errors[variant].mean)
        )
    ]
    against = (PAPER, UNIT, WEIGHT, BOTH)
    said.append("Test error: " + "; ".join(held(one, BATCH_NORM) for one in against))
    said.append(_ordering(errors))
    for plain, gain_named in ((PAPER, "1/1.21"), (UNIT, "1")):
        gain = found.error(plain) - found.error(plain.by_batches)
        word = "changes" if gain.differs_from_zero else "does not change beyond the spread"
        said.append(
            f"Normalising NormProp's input by its batches instead of the training set {word} the"
            f" error at gain {gain_named} ({-gain.mean:+.2f} points)"
        )
    times = ", ".join(f"{v.name} {found.times[v.name]:.2f}" for v in (NONE, WEIGHT, BOTH, PAPER))
    said.append(f"A step takes, as a multiple of batch norm's: {times}")
    said += _of_layers(found)
    off = {
        name: [abs(np.log(by[gain].mean)) for gain in (1.0, GAIN)]
        for name, by in found.depths.items()
    }
    wider = [name for name, (unit, paper) in off.items() if unit > paper]
    said.append(
        "In the deeper networks of `models/` the second moment behind the last activation of a new"
        f" network is farther from 1 with gain 1 than with 1/1.21 in {len(wider)} of {len(off)}"
        f" ({', '.join(wider) or 'none'}); most with gain 1:"
        f" {max(by[1.0].mean for by in found.depths.values()):.3g}, with 1/1.21:"
        f" {max(by[GAIN].mean for by in found.depths.values()):.3g}"
    )
    return said


def _ordering(errors: Mapping[Variant, Spread]) -> str:
    """Whether the papers' orders come out."""
    orders = {
        "Salimans & Kingma's order on CIFAR-10 (weight norm with mean-only batch norm before batch"
        " norm, batch norm before weight norm)": (BOTH, BATCH_NORM, WEIGHT),
        "Arpit et al.'s on CIFAR-10 without augmentation (NormProp before batch norm)": (
            PAPER,
            BATCH_NORM,
        ),
    }
    parts = []
    for name, order in orders.items():
        means = [errors[variant].mean for variant in order]
        clear = all((errors[b] - errors[a]).differs_from_zero for a, b in pairwise(order))
        if means != sorted(means):
            parts.append(f"{name} does not come out here")
        else:
            parts.append(f"{name} comes out" + ("" if clear else ", though not beyond the spread"))
    return "; ".join(parts)


def _of_layers(found: Results) -> list[str]:
    last = len(found.runs[UNIT.name][0].first) - 1
    means = {
        when: ", ".join(
            f"{v.name} {found.layer(v, when, last, 'mean'):.2f}" for v in (BATCH_NORM, PAPER, UNIT)
        )
        for when in ("first", "last")
    }
    layers = range(last + 1)
    sizes = {
        when: ", ".join(
            f"{v.name} {np.mean([found.layer(v, when, n, 'jacobian').mean for n in layers]):.2f}"
            for v in (PAPER, UNIT, BATCH_NORM, WEIGHT, NONE)
        )
        for when in ("first", "last")
    }
    nearer = {
        when: [
            variant.name
            for variant in (PAPER, UNIT)
            if abs(found.layer(variant, when, last, "shift").mean)
            < abs(found.layer(BATCH_NORM, when, last, "shift").mean)
        ]
        for when in ("first", "last")
    }
    return [
        f"The mean of what layer {last + 2} reads is at the start: {means['first']}, after"
        f" training: {means['last']}",
        "In units of its root mean square it is nearer to 0 than batch norm's (whose Relu it"
        f" contains) at the start with {' and '.join(nearer['first']) or 'neither gain'}, after"
        f" training with {' and '.join(nearer['last']) or 'neither gain'}",
        "The quadratic mean of the singular values of a layer's Jacobian, averaged over the"
        f" layers, is at the start: {sizes['first']}, after training: {sizes['last']}",
    ]


def page(run: Run, found: Results, counts: tuple[int, int, int]) -> Page:
    """All of it."""
    rows = []
    for variant in VARIANTS:
        layers = [
            f"{found.layer(variant, when, 5, what):.2f}"
            for what in ("mean", "rms", "jacobian")
            for when in ("first", "last")
        ]
        rate, time = f"{found.rates[variant.name]:g}", f"{found.times[variant.name]:.2f}"
        rows.append([variant.name, f"{found.error(variant):.2f}", time, rate, *layers])
    head = ["variant", "test error, %", "time / batch norm's", "rate"]
    head += [
        f"{what}, {when}" for what in ("mean", "r.m.s.", "Jacobian") for when in ("start", "end")
    ]
    moments = [
        [name, *(f"{by[gain]:.3g}" for gain in (1.0, GAIN))] for name, by in found.depths.items()
    ]
    source = (
        "MNIST (mnist_train10k.npz with 10,000 images `x` and their `y`, and the two t10k files)"
        if run.data
        else "Scikit-learn's digits"
    )
    return Page(
        name="variants",
        title="Weight norm, mean-only batch norm and NormProp against batch norm",
        about="What Salimans & Kingma 2016 (weight norm) and Arpit et al. 2016 (Normalization"
        " Propagation) say of their normalisations, on a small network: test error, time, the mean"
        " of what hidden layers read, singular values of the layers' Jacobians.",
        claims=claims(found),
        tables=[
            table(head, rows),
            "The last six columns are of layer 7: mean and root mean square of what it reads, the"
            " quadratic mean of its Jacobian's singular values; at the start and after training.",
            table(["new network, NormProp", "second moment, gain 1", "gain 1/1.21"], moments),
            "On images at 32x32. Depth and sums make what the analysis does not follow (means,"
            " correlated values, values that are not Gaussian) add up.",
        ],
        setting=f"{source}, {counts[0]} images for training and {counts[1]} for the test, less the"
        f" training set's mean and divided by its deviation. {len(WIDTHS)} convolutions of widths"
        f" {', '.join(map(str, WIDTHS))}, two with stride 2, then the average over the image and a"
        f" linear classifier. AdamW, one cycle, {counts[2]} epochs in batches of {BATCH}; the rate"
        f" of each kind is the best of {', '.join(f'{rate:g}' for rate in RATES)} on a seventh of"
        " the training images (one other seed). Weight norm is initialised by 500 images. What"
        f" layers read is measured on {PROBE} test images with batch statistics of those, as in"
        " training; a Jacobian is that of convolution, norm and activation together at one image,"
        " statistics held. Times are of the same process, the variants in turn, mean and deviation"
        " over rounds.",
    )


def main(arguments: Sequence[str] | None = None) -> Results:
    """Measure, write page and figure."""
    run: Run = asked(__doc__, arguments, seeds=4)
    pairs = (digits("train"), digits("test")) if run.data is None else mnist(run.data)
    data, test = standardised(*pairs)
    if run.quick:
        data = data[0][:320], data[1][:320]
    epochs = 1 if run.quick else 3
    rates = chosen_rates(data, max(epochs - 1, 1))
    runs = {
        v.name: [measured(v, seed, rates[v.name], data, test, epochs) for seed in run.seeds]
        for v in VARIANTS
    }
    found = Results(
        runs,
        step_times(data, 2 if run.quick else 15, 2 if run.quick else 10),
        rates,
        {v.name: spectrum(built(v, 0, data[0]), data[0][:PROBE]) for v in DRAWN},
        depths(data[0], run.seeds),
    )
    write(run, page(run, found, (len(data[0]), len(test[0]), epochs)), draw(found))
    return found


if __name__ == "__main__":
    main()
