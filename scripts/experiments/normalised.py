"""One network under each kind of normalisation: built, trained, looked at, timed."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bnfold.norm import Kind, Propagated, convert, initialise
from bnfold.norm.propagation import GAIN
from bnfold.training.train import Step
from models.densenet import densenet_bc
from models.preact_resnet import preact_resnet20
from models.resnet_cifar import resnet20
from models.vgg import vgg11
from scripts.experiments.figure import Spread
from scripts.experiments.hidden import Layer, looked_at
from scripts.experiments.setting import Labelled, accuracy, fitted

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

    @property
    def by_batches(self) -> Variant:
        """The same with its input normalised by its batches."""
        options = {**self.options, "input": "batch"}
        return Variant(f"{self.name}, batch input", self.kind, options)


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
    PAPER.by_batches,
    UNIT.by_batches,
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
        if "input" in variant.options:
            continue
        found = {
            rate: accuracy(learnt(built(variant, 99, part[0]), part, 99, rate, epochs), rest)
            for rate in RATES
        }
        rates[variant.name] = max(found, key=lambda rate: found[rate])
    return rates | {v.by_batches.name: rates[v.name] for v in (PAPER, UNIT)}


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
