"""Weight norm, mean-only batch norm and Normalization Propagation against batch norm.

What Salimans & Kingma 2016 and Arpit et al. 2016 compare: test error, time per step, the mean of
what each hidden layer reads (NormProp's argument), and the singular values of the layers' Jacobians
(its reason for the factor 1.21). One network without pooling in between, trained alike, the
learning rate chosen for each variant on training images set apart.
"""

from __future__ import annotations

import copy
import gzip
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from bnfold.norm import Kind, convert, initialise
from bnfold.norm.propagation import GAIN, Propagated
from bnfold.training.train import Step
from models.densenet import densenet_bc
from models.preact_resnet import preact_resnet20
from models.resnet_cifar import resnet20
from models.vgg import vgg11
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
from scripts.experiments.setting import Labelled, accuracy, digits, fitted

WIDTHS = (16, 16, 32, 32, 32, 32, 32)
KERNELS = (3, 3, 3, 3, 1, 3, 1)
STRIDES = (2, 1, 2, 1, 1, 1, 1)
RATES = (3e-3, 1e-2, 3e-2)
BATCH = 64
PROBE = 256
LOOKS = 2  # in an epoch


@dataclass(frozen=True)
class Variant:
    """A kind of normalisation with its options, and its name on the page."""

    name: str
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


BATCH_NORM = Variant("batch norm", "batch")
NONE = Variant("none", "none")
WEIGHT = Variant("weight norm", "weight")
BOTH = Variant("weight norm, mean-only", "weight-mean-only")
PAPER = Variant("NormProp 1/1.21", "normprop", {"gain": GAIN})
UNIT = Variant("NormProp 1", "normprop", {"gain": 1.0})
VARIANTS = (
    BATCH_NORM,
    NONE,
    Variant("mean-only", "mean-only"),
    WEIGHT,
    BOTH,
    PAPER,
    UNIT,
    Variant("NormProp 1/1.21, batch input", "normprop", {"gain": GAIN, "input": "batch"}),
    Variant("NormProp 1, batch input", "normprop", {"gain": 1.0, "input": "batch"}),
)
DRAWN = (BATCH_NORM, NONE, WEIGHT, PAPER, UNIT)


class Network(nn.Module):
    """Seven layers of convolution, norm and Relu, two of them strided; averages; a classifier."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers, width = [], 1
        for channels, kernel, stride in zip(WIDTHS, KERNELS, STRIDES, strict=True):
            conv = nn.Conv2d(width, channels, kernel, stride, kernel // 2, bias=False)
            norm = nn.BatchNorm2d(channels)
            layers.append(nn.Sequential(OrderedDict(conv=conv, norm=norm, act=nn.ReLU())))
            width = channels
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, classes)."""
        logits: Tensor = self.classifier(self.layers(x).mean((2, 3)))
        return logits


def built(variant: Variant, seed: int, x: Tensor) -> nn.Module:
    """A new network; weight norm is initialised by 500 training images, as its authors do."""
    torch.manual_seed(seed)
    network = convert(Network(), variant.kind, **variant.options)
    if variant.kind in ("weight", "weight-mean-only"):
        initialise(network, x[:500])
    return network


# --- what is looked at ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """What a layer reads, mean and root mean square over samples, units and channels; `jacobian`:
    the quadratic mean of the singular values of what it computes."""

    mean: float
    rms: float
    jacobian: float

    @property
    def shift(self) -> float:
        """The mean in units of the root mean square, so that scale does not enter."""
        return self.mean / self.rms


def settled(module: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode whose running statistics are those of x: the function of training."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        if isinstance(part, _BatchNorm):
            part.reset_running_stats()
            part.momentum = None
    with torch.no_grad():
        copied.train()(x)
    return copied.eval().requires_grad_(False)


def hidden(module: nn.Module) -> nn.Sequential:
    """The layers, wherever an input norm has put the network."""
    network = module if isinstance(module, Network) else module.get_submodule("network")
    assert isinstance(network, Network)
    return network.layers


def looked_at(module: nn.Module, x: Tensor, *, jacobians: bool = True) -> list[Layer]:
    """Each hidden layer but the first, on the samples x."""
    still, found = settled(module, x), []
    network = hidden(still)
    read: dict[int, Tensor] = {}
    for number, layer in enumerate(network):
        layer.register_forward_pre_hook(lambda _, args, n=number: read.update({n: args[0]}))
    with torch.no_grad():
        still(x)
    generator = torch.Generator().manual_seed(0)
    for number, given in list(read.items())[1:]:
        size = _jacobian(network[number], given[:64], generator) if jacobians else float("nan")
        found.append(Layer(float(given.mean()), float(given.square().mean().sqrt()), size))
    return found


def _jacobian(layer: nn.Module, x: Tensor, generator: torch.Generator) -> float:
    """sqrt(E|J|_F^2 / outputs), J of one sample: E|J^T u|^2 = |J|_F^2 for random signs u."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    signs = torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1
    (gradient,) = torch.autograd.grad((y * signs).sum(), x)
    return float((gradient.square().sum() / y.numel()).sqrt())


def spectrum(variant: Variant, x: Tensor, number: int = -2) -> list[float]:
    """The singular values of one layer's Jacobian at one image, of a new network."""
    network = hidden(settled(built(variant, 0, x), x[:PROBE]))
    with torch.no_grad():
        given = network[:number](x[:1])[0]

    def layer(flat: Tensor) -> Tensor:
        y: Tensor = network[number](flat.view_as(given)[None])
        return y.flatten()

    return sorted(torch.linalg.svdvals(torch.func.jacrev(layer)(given.flatten())).tolist())


def depths(x: Tensor, seeds: Sequence[int]) -> dict[str, dict[float, Spread]]:
    """The second moment behind the last activation of new networks of `models/`, by gain."""
    images = functional.interpolate(x[:64], 32, mode="bilinear").expand(-1, 3, -1, -1)
    found: dict[str, dict[float, Spread]] = {}
    for factory in (vgg11, densenet_bc, preact_resnet20, resnet20):
        for gain in (1.0, GAIN):
            moments = []
            for seed in seeds:
                torch.manual_seed(seed)
                network = convert(factory(), "normprop", gain=gain).eval()
                last = [part for part in network.modules() if isinstance(part, Propagated)][-1]
                last.register_forward_hook(
                    lambda _, __, y, into=moments: into.append(float(y.square().mean()))
                )
                with torch.no_grad():
                    network(images)
            found.setdefault(factory.__name__, {})[gain] = Spread.of(moments)
    return found


@dataclass
class Found:
    """One run: its error in percent, and the layers at the start, at each look, at the end."""

    error: float
    first: list[Layer]
    last: list[Layer]
    shifts: list[list[float]]


def measured(
    variant: Variant, seed: int, rate: float, data: Labelled, test: Labelled, epochs: int
) -> Found:
    """Train once, and look."""
    network, probe = built(variant, seed, data[0]), test[0][:PROBE]
    start = looked_at(network, probe)
    shifts = [[layer.shift for layer in start]]
    steps = -(-len(data[0]) // BATCH)
    looks = {round(steps * number / LOOKS) for number in range(1, LOOKS * epochs + 1)}

    def look(step: Step) -> None:
        if step.number in looks:
            shifts.append([one.shift for one in looked_at(step.module, probe, jacobians=False)])

    trained = learnt(network, data, seed, rate, epochs, on_step=look)
    end = looked_at(trained, probe) if trained is not None else start
    return Found(100 - accuracy(trained, test), start, end, shifts)


def learnt(
    network: nn.Module, data: Labelled, seed: int, rate: float, epochs: int, **more: Any
) -> nn.Module | None:
    """The training that all have."""
    return fitted(
        network,
        data,
        epochs=epochs,
        batch_size=BATCH,
        optimizer="adamw",
        lr=rate,
        seed=seed,
        **more,
    )


def chosen_rates(data: Labelled, epochs: int) -> dict[str, float]:
    """The learning rate of each kind: the best on a seventh of the training images, one seed."""
    cut = len(data[0]) * 6 // 7
    part, rest = (data[0][:cut], data[1][:cut]), (data[0][cut:], data[1][cut:])
    rates: dict[str, float] = {}
    for variant in VARIANTS:
        if "input" in variant.options:  # as without
            rates[variant.name] = rates[variant.name.removesuffix(", batch input")]
            continue
        found = {
            rate: accuracy(learnt(built(variant, 99, part[0]), part, 99, rate, epochs), rest)
            for rate in RATES
        }
        rates[variant.name] = max(found, key=lambda rate: found[rate])
    return rates


def step_times(data: Labelled, rounds: int, steps: int = 10) -> dict[str, Spread]:
    """Time of a training step as a multiple of batch norm's, the variants in turn in each round."""
    x, y = data[0][:BATCH], data[1][:BATCH]
    runs = {}
    for variant in VARIANTS:
        network = built(variant, 0, data[0]).train()
        runs[variant.name] = network, torch.optim.AdamW(network.parameters(), lr=1e-4)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, (network, optimizer) in runs.items():
            begun = time.perf_counter()
            for _ in range(steps):
                optimizer.zero_grad()
                functional.cross_entropy(network(x), y).backward()
                optimizer.step()
            if turn:  # the first warms up
                taken[name].append(time.perf_counter() - begun)
    return {n: Spread.of(t).over(Spread.of(taken[BATCH_NORM.name])) for n, t in taken.items()}


# --- the data -------------------------------------------------------------------------------------


def mnist(folder: Path) -> tuple[Labelled, Labelled]:
    """8,000 of the 10,000 training images at hand and the 10,000 test images of MNIST."""
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
    axes[0, 0].legend(ncols=2, loc="lower right", fontsize=7)
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
    for plain, batch in ((PAPER, VARIANTS[-2]), (UNIT, VARIANTS[-1])):
        gain = found.error(plain) - found.error(batch)
        word = "changes" if gain.differs_from_zero else "does not change beyond the spread"
        said.append(
            f"Normalising NormProp's input by its batches instead of the training set {word} the"
            f" error at gain {plain.name.split()[-1]} ({-gain.mean:+.2f} points)"
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
        {v.name: spectrum(v, data[0]) for v in DRAWN},
        depths(data[0], run.seeds),
    )
    write(run, page(run, found, (len(data[0]), len(test[0]), epochs)), draw(found))
    return found


if __name__ == "__main__":
    main()
