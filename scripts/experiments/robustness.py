"""How much learning rate and initialisation matter, with and without batch norm.

Ioffe & Szegedy 2015, section 3.3: with batch norm in front of the activation a layer's output does
not change with the scale of its weights, and its gradient shrinks as they grow. Section 4.2.2:
with it even a network of sigmoids trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import nn

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

ARMS = {
    "without": "without batch norm",
    "before": "batch norm before the activation",
    "after": "batch norm after the activation",
}
NAMES = {"without": "none", "before": "batch norm before", "after": "batch norm after"}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
SCALES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SIGMOID_RATES = {"sgd": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
STEP = 0.5  # decades between two rates, or two scales
TRAINED = 90.0  # percent: below it a run has failed
WIDTH = 64


@dataclass(frozen=True)
class Case:
    """A network of equal hidden layers and its training; scale: of the first weights."""

    arm: str
    rate: float
    scale: float = 1.0
    sigmoid: bool = False
    optimizer: str = "sgd"
    depth: int = 5
    epochs: int = 8


def network(case: Case) -> nn.Module:
    """Weights drawn by He (2015) for Relu, by Glorot (2010) for sigmoids, then scaled."""
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(case.depth):
        layers.append(nn.Linear(WIDTH, WIDTH))
        if case.arm == "before":
            layers.append(nn.BatchNorm1d(WIDTH))
        layers.append(nn.Sigmoid() if case.sigmoid else nn.ReLU())
        if case.arm == "after":
            layers.append(nn.BatchNorm1d(WIDTH))
    made = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    draw = nn.init.xavier_normal_ if case.sigmoid else nn.init.kaiming_normal_
    with torch.no_grad():
        for layer in made:
            if isinstance(layer, nn.Linear):
                draw(layer.weight).mul_(case.scale)
                layer.bias.zero_()
    return made


def measured(case: Case, seed: int, data: Labelled, test: Labelled) -> float:
    """Test accuracy in percent."""
    torch.manual_seed(seed)
    trained = fitted(
        network(case),
        data,
        epochs=case.epochs,
        optimizer=case.optimizer,
        lr=case.rate,
        schedule="constant",
        weight_decay=0.0,
        seed=seed,
    )
    return accuracy(trained, test)


# --- the page -------------------------------------------------------------------------------------

Results = Mapping[Case, Spread]


def cases(quick: bool) -> dict[str, list[Case]]:
    """By what they vary; all learning rates of the sigmoids are one group."""
    some = slice(1, None, 3) if quick else slice(None)
    short, deep, long = (3, 3, 5) if quick else (8, 8, 30)
    return {
        "rate": [Case(arm, rate, epochs=short) for arm in ARMS for rate in RATES[some]],
        "scale": [Case(arm, 0.03, scale, epochs=short) for arm in ARMS for scale in SCALES[some]],
        "sigmoid": [
            Case(arm, rate, 1.0, True, optimizer, deep, long)
            for optimizer, rates in SIGMOID_RATES.items()
            for arm in ("without", "before")
            for rate in rates[some]
        ],
    }


def decades(members: Sequence[Case], results: Results, arm: str) -> Spread:
    """How many decades of the varied value train, by seed."""
    found = [results[case].values for case in members if case.arm == arm]
    return Spread.of(
        STEP * sum(a >= TRAINED for a in by_seed) for by_seed in zip(*found, strict=True)
    )


def best(members: Sequence[Case], results: Results, arm: str, optimizer: str = "sgd") -> Case:
    """The case of an arm with the best mean."""
    arms = [case for case in members if case.arm == arm and case.optimizer == optimizer]
    return max(arms, key=lambda case: results[case].mean)


def draw(groups: Mapping[str, list[Case]], results: Results) -> Figure:
    """Accuracy over learning rate, over initial scale, and over the sigmoids' learning rate."""
    figure, axes = canvas(1, 3, height=3.1, sharey=True)
    rate, scale, sigmoid = axes[0]
    for number, (arm, label) in enumerate(ARMS.items()):
        for panel, group, key in ((rate, "rate", "rate"), (scale, "scale", "scale")):
            members = [case for case in groups[group] if case.arm == arm]
            x = [getattr(case, key) for case in members]
            curve(panel, x, [results[case] for case in members], number, label)
    for number, (arm, optimizer) in enumerate(
        (("without", "sgd"), ("before", "sgd"), ("without", "adamw"), ("before", "adamw"))
    ):
        members = [c for c in groups["sigmoid"] if (c.arm, c.optimizer) == (arm, optimizer)]
        label = f"{'with' if arm == 'before' else 'without'}, {optimizer}"
        curve(sigmoid, [c.rate for c in members], [results[c] for c in members], number, label)
    depth = groups["sigmoid"][0].depth
    rate.set(xlabel="learning rate", ylabel="test accuracy, %", title="Relu, learning rate")
    scale.set(xlabel="scale of the first weights (He: 1)", title="Relu, initialisation")
    sigmoid.set(xlabel="learning rate", title=f"{depth} layers of sigmoids")
    for panel in axes[0]:
        panel.set(xscale="log", ylim=(0, 102))
        panel.axhline(TRAINED, color="black", linewidth=0.6)
    handles, labels = sigmoid.get_legend_handles_labels()
    labels = [f"sigmoids {label}" for label in labels]
    figure.legend(*rate.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def claims(groups: Mapping[str, list[Case]], results: Results) -> list[str]:
    """What came out, in words."""
    wide = {
        (group, arm): decades(groups[group], results, arm)
        for group in ("rate", "scale")
        for arm in ARMS
    }
    deep = groups["sigmoid"]
    top = {
        (arm, optimizer): results[best(deep, results, arm, optimizer)]
        for arm in ("without", "before")
        for optimizer in SIGMOID_RATES
    }
    said = [
        f"With batch norm before the activation {wide['rate', 'before']:.1f} decades of learning"
        f" rate and {wide['scale', 'before']:.1f} of initial scale train to {TRAINED:.0f} %,"
        f" without {wide['rate', 'without']:.1f} and {wide['scale', 'without']:.1f};"
        f" {deep[0].depth} layers of sigmoids reach {top['before', 'sgd']:.1f} % by SGD with it,"
        f" {top['without', 'sgd']:.1f} % without"
    ]
    for group, name in (("rate", "Learning rates"), ("scale", "Initial scales")):
        for one, other in (("before", "without"), ("after", "without"), ("before", "after")):
            arms = NAMES[one], wide[group, one], NAMES[other], wide[group, other]
            said.append(f"{name}: {compared(*arms, unit='decades')}")
    for optimizer, name in (("sgd", "SGD"), ("adamw", "AdamW")):
        arms = "batch norm", top["before", optimizer], "none", top["without", optimizer]
        said.append(f"Sigmoids by {name}, each at its best learning rate: {compared(*arms)}")
    tops = ", ".join(
        f"{results[best(groups['rate'], results, arm)]:.1f} % with {NAMES[arm]}" for arm in ARMS
    )
    said.append(f"At its best learning rate the Relu network reaches {tops}")
    return said


def by_arm(members: Sequence[Case], results: Results, key: str, title: str) -> str:
    """A table with a row for each value of what is varied."""
    arms = list(dict.fromkeys(case.arm for case in members))
    rows: dict[float, list[str]] = {}
    for case in members:  # of one arm after the other, in the same order
        rows.setdefault(getattr(case, key), []).append(f"{results[case]:.1f}")
    lines = [[f"{value:g}", *shown] for value, shown in rows.items()]
    return table([title, *(NAMES[arm] for arm in arms)], lines)


def page(groups: Mapping[str, list[Case]], results: Results) -> Page:
    """All of it."""
    wide = [
        [what, arm, f"{decades(groups[group], results, arm):.1f}"]
        for group, what in (("rate", "learning rate"), ("scale", "initial scale"))
        for arm in ARMS
    ]
    first, deep = groups["rate"][0], groups["sigmoid"][0]
    return Page(
        name="robustness",
        title="Learning rate and initialisation, with and without batch norm",
        about="How wide the range of learning rates and of initial scales is in which a network"
        " trains, without batch norm, with it before the activation (as in the paper) and after it"
        " (Ioffe & Szegedy 2015, sections 3.3 and 4.2.2)."
        f" Thin line in the figure: {TRAINED:.0f} %.",
        claims=claims(groups, results),
        tables=[
            table(["range of", "batch norm", f"decades that reach {TRAINED:.0f} %"], wide),
            "Relu, test accuracy, %:",
            by_arm(groups["rate"], results, "rate", "learning rate"),
            by_arm(groups["scale"], results, "scale", "initial scale"),
            f"{deep.depth} layers of sigmoids, test accuracy, %:",
            *(
                by_arm([c for c in groups["sigmoid"] if c.optimizer == o], results, "rate", o)
                for o in SIGMOID_RATES
            ),
        ],
        setting=f"Scikit-learn's digits, 1437 for training, 360 for the test; hidden layers of"
        f" {WIDTH}, batches of 64, a constant learning rate, no weight decay; SGD with Nesterov"
        f" momentum 0.9 unless AdamW is named. Relu: {first.depth} hidden layers, {first.epochs}"
        f" epochs, He's initialisation times the scale; sigmoids: {deep.epochs} epochs, Glorot's."
        f" The scale is varied at a learning rate of {groups['scale'][0].rate:g}. A run that"
        " diverged counts as guessing, 10 %. The best learning rate is the one with the best mean"
        " test accuracy, for each alike.",
    )


def main(arguments: Sequence[str] | None = None) -> Results:
    """Measure, write page and figure."""
    run: Run = asked(__doc__, arguments)
    data, test = digits("train"), digits("test")
    groups = cases(run.quick)
    wanted = dict.fromkeys(case for members in groups.values() for case in members)
    results = {
        case: Spread.of(measured(case, seed, data, test) for seed in run.seeds) for case in wanted
    }
    write(run, page(groups, results), draw(groups, results))
    return results


if __name__ == "__main__":
    main()
