"""What reaches each activation of a deep narrow network over training, with and without batch norm.

Seven hidden layers of 30 units fit y = x^2 - 5 + noise. Ioffe & Szegedy 2015, section 1 and figure
1: without normalisation the distributions of a layer's inputs drift while the layers before it
learn; with it they stay.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bnfold.errors import UsageError
from bnfold.training.settings import Optimizer
from bnfold.training.train import Step, train
from scripts.experiments.figure import (
    COLOURS,
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

ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "Relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
ARMS = {False: "without", True: "with"}
DEPTH, WIDTH = 7, 30
RATES = {"sgd": (3e-3, 1e-2, 3e-2, 1e-1), "adam": (1e-3, 3e-3, 1e-2)}
NAMES = {"sgd": "SGD", "adam": "Adam"}
LEARNED = 0.1  # a loss, over the variance of y: the parabola is there
TRAINING, TESTS, BATCH = 1920, 500, 64
LOW, HIGH, NOISE = -7.0, 10.0, 2.0
EDGES = np.linspace(-4, 4, 49)
TIMES = ("start", "middle", "end")


@dataclass(frozen=True)
class Case:
    """A network and its learning rate."""

    activation: str
    norm: bool
    optimizer: Optimizer
    rate: float


@dataclass(frozen=True)
class Found:
    """One run: loss on the test set by epoch, over the variance of y, infinite where it diverged.

    inputs: at each of TIMES, what reaches the activations on the test set, (layers, samples,
    units).
    """

    losses: tuple[float, ...]
    inputs: Mapping[str, np.ndarray] = field(hash=False)

    def width(self, time: str, layer: int) -> float:
        """Standard deviation over the samples of a unit's input, mean over the layer's units."""
        return float(self.inputs[time][layer].std(axis=0).mean())


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """x uniform and y = x^2 - 5 + noise, each brought to mean 0 and variance 1 of the formula."""
    draw = np.random.default_rng(seed)
    x = draw.uniform(LOW, HIGH, (count, 1))
    y = x**2 - 5 + NOISE * draw.standard_normal((count, 1))
    grid = np.linspace(LOW, HIGH, 10_001)
    x, y = (x - grid.mean()) / grid.std(), (y - (grid**2 - 5).mean()) / (grid**2).std()
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()


def floor() -> float:
    """The loss that noise leaves to the formula itself."""
    return float(NOISE**2 / (np.linspace(LOW, HIGH, 10_001) ** 2).var())


def network(case: Case) -> nn.Sequential:
    """Linear, batch norm if asked, activation; torch's own initialisation."""
    layers: list[nn.Module] = []
    for number in range(DEPTH):
        layers.append(nn.Linear(WIDTH if number else 1, WIDTH))
        if case.norm:
            layers.append(nn.BatchNorm1d(WIDTH))
        layers.append(ACTIVATIONS[case.activation]())
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


def inputs(module: nn.Module, x: Tensor) -> np.ndarray:
    """What reaches each activation, as in training: normalised by the batch, which is all of x."""
    twin, seen = copy.deepcopy(module).train(), []
    for layer in twin.modules():
        if isinstance(layer, tuple(ACTIVATIONS.values())):
            layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy().copy()))
    with torch.no_grad():
        twin(x)
    return np.stack(seen)


def measured(case: Case, seed: int, epochs: int) -> Found:
    """Train and look at three times."""
    torch.manual_seed(seed)
    module = network(case)
    x, _ = test = samples(TESTS, seed + 1000)
    seen = {"start": inputs(module, x)}
    half = epochs * TRAINING // BATCH // 2

    def look(step: Step) -> None:
        if step.number == half:
            seen["middle"] = inputs(step.module, x)

    try:
        made = train(
            module,
            samples(TRAINING, seed),
            test_data=test,
            loss="mse",
            epochs=epochs,
            batch_size=BATCH,
            optimizer=case.optimizer,
            lr=case.rate,
            schedule="cosine",
            weight_decay=0.0,
            seed=seed,
            on_step=look,
        )
    except UsageError as error:
        if "training diverged" not in str(error):
            raise
        return Found((np.inf,) * epochs, seen)
    seen["end"] = inputs(made.module, x)
    return Found(tuple(float(metrics.test_loss or 0) for metrics in made.history), seen)


# --- the page -------------------------------------------------------------------------------------

Results = Mapping[tuple[str, str, bool], tuple[Case, Sequence[Found]]]


def best(found: Mapping[Case, Sequence[Found]]) -> Results:
    """By optimiser, activation and norm, the learning rate of the least mean loss, and its runs."""
    chosen = {}
    for key in dict.fromkeys((c.optimizer, c.activation, c.norm) for c in found):
        cases = [c for c in found if (c.optimizer, c.activation, c.norm) == key]
        case = min(cases, key=lambda c: final(found[c]).mean)
        chosen[key] = case, found[case]
    return chosen


def final(runs: Sequence[Found]) -> Spread:
    """Loss at the end, in percent of the variance of y: mean of the last fifth of the epochs."""
    last = max(len(runs[0].losses) // 5, 1)
    return Spread.of(100 * np.mean(run.losses[-last:]) for run in runs)


def learned(runs: Sequence[Found]) -> Spread:
    """Epochs until the loss is first below LEARNED; all of them, where it never is."""
    return Spread.of(
        next((n for n, loss in enumerate(run.losses, 1) if loss < LEARNED), len(run.losses))
        for run in runs
    )


def draw(results: Results) -> Figure:
    """A row for each activation: inputs without, inputs with, both losses."""
    figure, axes = canvas(len(ACTIVATIONS), 3, height=2.7)
    for row, activation in zip(axes, ACTIVATIONS, strict=True):
        for panel, norm in zip(row, ARMS, strict=False):
            ridges(panel, results["sgd", activation, norm][1][0])
            panel.set_title(f"{activation}, {ARMS[norm]} batch norm")
            panel.set_ylabel("hidden layer")
        for number, norm in enumerate(ARMS):
            case, runs = results["sgd", activation, norm]
            by_epoch = [Spread.of(losses) for losses in zip(*(r.losses for r in runs), strict=True)]
            label = f"{ARMS[norm]}, rate {case.rate:g}"
            curve(row[2], range(1, len(by_epoch) + 1), by_epoch, number, label, is_log=True)
        row[2].axhline(floor(), color="black", linewidth=0.8)
        row[2].set(yscale="log", ylim=(floor() / 2, 20), title=f"{activation}, loss")
        row[2].legend(loc="upper right")
    axes[-1, 0].set_xlabel("input of the activation")
    axes[-1, 1].set_xlabel("input of the activation")
    axes[-1, 2].set_xlabel("epoch (thin line: the noise)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def ridges(panel: Any, run: Found) -> None:
    """A layer's histograms on a line of its own, each scaled to the same height."""
    middles = (EDGES[1:] + EDGES[:-1]) / 2
    for layer in range(DEPTH):
        for time, values in run.inputs.items():
            clipped = np.clip(values[layer], EDGES[0], EDGES[-1])
            counts, _ = np.histogram(clipped, EDGES)
            height = layer + 1 + 0.85 * counts / counts.max()
            label = time if layer == 0 else None
            if time == "start":
                panel.fill_between(middles, layer + 1, height, color=COLOURS[4], alpha=0.7,
                                   linewidth=0, label=label)  # fmt: skip
            else:
                dash = "-" if time == "end" else ":"
                panel.plot(middles, height, dash, color=COLOURS[0], linewidth=1, label=label)
    panel.set_yticks(range(1, DEPTH + 1))
    panel.grid(visible=False)


def widths(runs: Sequence[Found], time: str, layer: int) -> Spread:
    """Of the layer's inputs, over the seeds; of runs that came so far."""
    return Spread.of(run.width(time, layer) for run in runs if time in run.inputs)


def summary(results: Results) -> str:
    """All pairings of optimiser and activation in one sentence."""
    pairs = [(optimizer, activation) for optimizer in RATES for activation in ACTIVATIONS]
    counts = []
    for figure in (learned, final):
        gains = [
            figure(results[*pair, False][1]) - figure(results[*pair, True][1]) for pair in pairs
        ]
        told = [gain for gain in gains if gain.differs_from_zero]
        better = sum(gain.mean > 0 for gain in told)
        counts += [better, len(told) - better]
    starts = [
        [widths(results[*pair, norm][1], "start", DEPTH - 1).mean for pair in pairs]
        for norm in ARMS
    ]
    return (
        f"At the start what reaches layer {DEPTH} has a standard deviation of"
        f" {min(starts[1]):.2f} to {max(starts[1]):.2f} with batch norm and at most"
        f" {max(starts[0]):.3f} without; of {len(pairs)} pairings of optimiser and activation"
        f" those with it learn sooner in {counts[0]} and later in {counts[1]}, and end with a"
        f" lower loss in {counts[2]} and a higher one in {counts[3]}, beyond the spread"
    )


def claims(results: Results) -> list[str]:
    """What came out, in words."""
    said = [summary(results)]
    for optimizer in RATES:
        sooner, lower = [], []
        for activation in ACTIVATIONS:
            without, norm = (results[optimizer, activation, n][1] for n in ARMS)
            ends = "batch norm", final(norm), "none", final(without)
            times = "batch norm", learned(norm), "none", learned(without)
            low, early = (
                compared(*arms, unit=unit, spec=".2f", is_lower_better=True, word=word)
                for arms, unit, word in ((ends, "points", "lower"), (times, "epochs", "sooner"))
            )
            lower.append(f"{activation}: {low}")
            sooner.append(f"{activation}: {early}")
        said.append(
            f"By {NAMES[optimizer]}, epochs until the loss is below {100 * LEARNED:.0f} % of the"
            f" variance of y: {'; '.join(sooner)}"
        )
        said.append(
            f"By {NAMES[optimizer]}, loss at the end in percent of that variance:"
            f" {'; '.join(lower)}"
        )
    last = DEPTH - 1
    drifts = []
    for activation in ACTIVATIONS:
        shown = [
            f"{widths(results['sgd', activation, norm][1], time, last):.3f}"
            for norm in ARMS
            for time in ("start", "end")
        ]
        drifts.append(
            f"{activation}: {shown[0]} at the start and {shown[1]} at the end without batch norm,"
            f" {shown[2]} and {shown[3]} with it"
        )
    return [
        *said,
        f"The noise alone is {100 * floor():.2f} %",
        f"Standard deviation of what reaches layer {DEPTH}'s activations (by SGD):"
        f" {'; '.join(drifts)}",
    ]


def page(results: Results, epochs: int) -> Page:
    """All of it."""
    rows = []
    for (optimizer, activation, norm), (case, runs) in results.items():
        shown = [
            f"{widths(runs, time, layer):.3f}"
            for time in ("start", "end")
            for layer in (0, DEPTH - 1)
        ]
        figures = [f"{case.rate:g}", f"{learned(runs):.1f}", f"{final(runs):.2f}"]
        rows.append([NAMES[optimizer], activation, ARMS[norm], *figures, *shown])
    head = [
        f"epochs to {100 * LEARNED:.0f} %",
        "final loss, %",
        "layer 1, start",
        f"layer {DEPTH}, start",
        "layer 1, end",
        f"layer {DEPTH}, end",
    ]
    return Page(
        name="histograms",
        title="What reaches the activations of seven narrow layers",
        about=f"A network of {DEPTH} hidden layers of {WIDTH} units fits y = x^2 - 5 + noise, with"
        " batch norm in front of each activation and without it. Figure, of training by SGD: what"
        " reaches the activations at the start, in the middle and at the end (one seed; what lies"
        " outside is in the outermost bins), and the loss on fresh samples over the variance of"
        " y.",
        claims=claims(results),
        tables=[
            table(["optimiser", "activation", "batch norm", "best rate", *head], rows),
            "The last four columns: standard deviation over the samples of what reaches an"
            " activation, mean over the layer's units.",
        ],
        setting=f"x uniform in [{LOW:g}, {HIGH:g}], noise of standard deviation {NOISE:g}, both"
        f" axes brought to mean 0 and variance 1; {TRAINING} samples for training, {TESTS} for the"
        f" test, batches of {BATCH}, {epochs} epochs, the rate falling to 0 by a cosine; SGD with"
        " Nesterov momentum 0.9, or Adam; torch's own initialisation. Each has the learning rate of"
        f" the least final loss, of {rates_tried()}. Final loss: mean of the last fifth of the"
        " epochs."
        " Where the loss never fell below, all epochs are counted.",
    )


def rates_tried() -> str:
    """In words."""
    return " and ".join(
        f"{', '.join(f'{rate:g}' for rate in rates)} ({NAMES[optimizer]})"
        for optimizer, rates in RATES.items()
    )


def main(arguments: Sequence[str] | None = None) -> Results:
    """Measure, write page and figure."""
    run: Run = asked(__doc__, arguments, seeds=3)
    epochs = 2 if run.quick else 25
    cases = [
        Case(activation, norm, optimizer, rate)
        for optimizer, rates in RATES.items()
        for activation in ACTIVATIONS
        for norm in ARMS
        for rate in (rates[1:2] if run.quick else rates)
    ]
    found = {case: [measured(case, seed, epochs) for seed in run.seeds] for case in cases}
    results = best(found)
    write(run, page(results, epochs), draw(results))
    return results


if __name__ == "__main__":
    main()
