"""Moving averages against the exact statistics of the training set, at inference.

Ioffe & Szegedy 2015 (algorithm 2) normalise at inference by the population's statistics; in
practice a moving average over the last batches stands for them. One network is trained under
settings that make the average worse, then tested with its moving averages and with the exact
statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnfold
from models.digits import digits_cnn
from scripts.experiments.figure import (
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

SAMPLES = 1280  # a multiple of every batch size
LAYERS = ("bn1", "bn2", "bn3", "bn4")
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
MOMENTA = (0.5, 0.1, 0.03, 0.01, 0.003, 0.001)
STEPS = (5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class Case:
    """A training run; tail: samples in a last batch of its own, 0 for none."""

    batch_size: int = 32
    momentum: float = 0.1
    steps: int = 200
    tail: int = 0


@dataclass(frozen=True)
class Found:
    """Test accuracy in percent, and by layer how far the moving averages are off."""

    moving: float
    exact: float
    errors: Mapping[str, float] = field(hash=False)

    @property
    def error(self) -> float:
        """Root mean square over the layers."""
        return float(np.sqrt(np.mean(np.square(list(self.errors.values())))))


class Batches:
    """One pass of so many steps over shuffled data, each epoch's order drawn from the seed."""

    def __init__(self, data: Labelled, case: Case, seed: int) -> None:
        self.data, self.case, self.seed = data, case, seed

    def __len__(self) -> int:
        return self.case.steps + bool(self.case.tail)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draw = np.random.default_rng(self.seed)
        size, left = self.case.batch_size, np.zeros(0, np.int64)
        for _ in range(self.case.steps):
            if len(left) < size:
                left = draw.permutation(len(self.data[0]))
            yield self._batch(left[:size])
            left = left[size:]
        if self.case.tail:
            yield self._batch(draw.permutation(len(self.data[0]))[: self.case.tail])

    def _batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(rows)
        return self.data[0][index], self.data[1][index]


def measured(case: Case, seed: int, data: Labelled, test: Labelled) -> Found:
    """Train, then test with the moving averages and with the exact statistics."""
    torch.manual_seed(seed)
    network = digits_cnn()
    for layer in norms(network).values():
        layer.momentum = case.momentum
    trained = fitted(
        network,
        Batches(data, case, seed),
        epochs=1,
        lr=0.05 * min(1.0, case.batch_size / 32),
        schedule="constant",
        seed=seed,
    )
    assert trained is not None
    exact = bnfold.adapt(trained, list(data[0].split(128)), diagnose=False).model
    errors = {name: error(norms(trained)[name], norms(exact)[name]) for name in LAYERS}
    return Found(accuracy(trained, test), accuracy(exact, test), errors)


def norms(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch norms by name."""
    return {name: getattr(network, name) for name in LAYERS}


def error(stored: nn.BatchNorm2d, exact: nn.BatchNorm2d) -> float:
    """Distance of the stored statistics, in exact standard deviations.

    The 2-Wasserstein distance between the two Gaussians, root mean square over the channels.
    """
    old_mean, mean = stored.running_mean.double(), exact.running_mean.double()
    old, new = (torch.sqrt(layer.running_var.double() + layer.eps) for layer in (stored, exact))
    return float(((((old_mean - mean) / new) ** 2 + (old / new - 1) ** 2).mean()).sqrt())


# --- the page -------------------------------------------------------------------------------------

Results = Mapping[Case, Sequence[Found]]


def cases(quick: bool) -> dict[str, list[Case]]:
    """The settings by what they vary; batch size: the same samples in all, so fewer steps."""
    base = Case(steps=40 if quick else 200)
    short = slice(None, None, 3) if quick else slice(None)
    budget = base.steps * base.batch_size
    return {
        "batch size": [
            replace(base, batch_size=b, steps=budget // b) for b in SIZES[2 * quick :][short]
        ],
        "momentum": [replace(base, momentum=m) for m in MOMENTA[short]],
        "steps": [replace(base, steps=s) for s in STEPS[short] if s <= base.steps],
        "last batch": [base, replace(base, tail=2)],
    }


def draw(groups: Mapping[str, list[Case]], results: Results) -> Figure:
    """Accuracy above, the averages' error by layer below."""
    figure, axes = canvas(2, 3, height=2.6, sharex="col")
    keys = {"batch size": "batch_size", "momentum": "momentum", "steps": "steps"}
    for column, (name, key) in enumerate(keys.items()):
        x = [getattr(case, key) for case in groups[name]]
        found = [results[case] for case in groups[name]]
        top, bottom = axes[:, column]
        curve(top, x, [Spread.by(f, "exact") for f in found], 0, "exact statistics")
        curve(top, x, [Spread.by(f, "moving") for f in found], 1, "moving averages")
        for number, layer in enumerate(LAYERS):
            by_layer = [Spread.of(one.errors[layer] for one in f) for f in found]
            curve(bottom, x, by_layer, number, f"{layer} (layer {number + 1})", is_log=True)
        bottom.set(xscale="log", yscale="log", xlabel=name)
        bottom.set_xticks(x, [f"{v:g}" for v in x])
        bottom.minorticks_off()
    axes[0, 0].set_ylabel("test accuracy, %")
    axes[1, 0].set_ylabel(r"error of the averages, $\sigma$")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def claims(groups: Mapping[str, list[Case]], results: Results) -> list[str]:
    """What came out, in words."""
    gains = {case: Spread.by(f, "exact") - Spread.by(f, "moving") for case, f in results.items()}
    told = {case: gain for case, gain in gains.items() if gain.differs_from_zero}
    better = sum(gain.mean > 0 for gain in told.values())
    most = max(gains, key=lambda case: gains[case].mean)
    said = [
        f"In {better} of {len(gains)} settings exact statistics are better at inference than moving"
        f" averages, in {len(told) - better} worse, in {len(gains) - len(told)} there is no"
        f" difference beyond the spread; they gain most ({gains[most]:.1f} points) at"
        f" {described(most)}"
    ]
    for name, case in {
        f"batches of {groups['batch size'][0].batch_size}": groups["batch size"][0],
        f"momentum {groups['momentum'][-1].momentum:g}": groups["momentum"][-1],
        "a last batch of 2 samples": groups["last batch"][1],
        "a last batch like the others": groups["last batch"][0],
    }.items():
        arms = [Spread.by(results[case], arm) for arm in ("exact", "moving")]
        said.append(f"With {name}: " + compared("exact", arms[0], "moving", arms[1]))
    plain, tail = (Spread.by(results[case], "error") for case in groups["last batch"])
    said.append(f"That last batch multiplies the averages' error by {tail.over(plain):.1f}")
    errors = {c.batch_size: Spread.by(results[c], "error") for c in groups["batch size"]}
    least, greatest = (f(errors, key=lambda b: errors[b].mean) for f in (min, max))
    said.append(
        f"Over the batch sizes the averages' error is least at {least} ({errors[least]:.2f}"
        f" standard deviations) and greatest at {greatest} ({errors[greatest]:.2f})"
    )
    return said


def described(case: Case) -> str:
    """A setting in words."""
    tail = f" and a last one of {case.tail}" if case.tail else ""
    return f"batches of {case.batch_size}{tail}, momentum {case.momentum:g}, {case.steps} steps"


def page(groups: Mapping[str, list[Case]], results: Results) -> Page:
    """All of it."""
    rows = []
    for name, members in groups.items():
        for case in members:
            found = results[case]
            value = {
                "batch size": case.batch_size,
                "momentum": case.momentum,
                "steps": case.steps,
                "last batch": case.tail or "as the others",
            }[name]
            gain = Spread.by(found, "exact") - Spread.by(found, "moving")
            errors = [f"{Spread.of(one.errors[layer] for one in found):.3f}" for layer in LAYERS]
            moving, exact = (f"{Spread.by(found, arm):.1f}" for arm in ("moving", "exact"))
            rows.append([name, value, moving, exact, f"{gain:.1f}", *errors])
    base = groups["last batch"][0]
    return Page(
        name="population",
        title="Moving averages and population statistics at inference",
        about="What a network loses at inference by normalising with moving averages instead of the"
        " statistics of the whole training set (Ioffe & Szegedy 2015, algorithm 2, steps 8 to 12).",
        claims=claims(groups, results),
        tables=[
            table(
                ["varied", "value", "moving, %", "exact, %", "exact - moving", *LAYERS],
                rows,
            ),
            "The last four columns: the moving averages' 2-Wasserstein distance to the exact"
            " statistics, in exact standard deviations, root mean square over channels.",
        ],
        setting=f"Scikit-learn's digits, {SAMPLES} for training, 360 for the test;"
        " `models/digits.py:digits_cnn`; SGD with momentum at a constant rate of 0.05, times"
        " batch size / 32 below 32. What is not varied:"
        f" {described(base)}. All batch sizes see the same number of samples, so the largest take"
        " few steps. A last batch of 2 takes a step like the others, and is averaged like them."
        " The exact statistics are `bnfold.adapt` on the training images, each layer with exact"
        " layers before it; both tests are of the same weights.",
    )


def main(arguments: Sequence[str] | None = None) -> Results:
    """Measure, write page and figure."""
    run: Run = asked(__doc__, arguments)
    (x, y), test = digits("train"), digits("test")
    data = (x[:SAMPLES], y[:SAMPLES])
    groups = cases(run.quick)
    wanted = dict.fromkeys(case for members in groups.values() for case in members)
    results = {case: [measured(case, seed, data, test) for seed in run.seeds] for case in wanted}
    write(run, page(groups, results), draw(groups, results))
    return results


if __name__ == "__main__":
    main()
