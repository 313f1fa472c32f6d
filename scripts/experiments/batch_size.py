"""Batch norm and batch renorm in small batches, and in batches that are no fair draw.

Ioffe 2017, sections 4.2 (few samples in a batch) and 4.3 (batches that hold pairs of one class):
batch norm learns with the statistics of the batch and is tested with moving averages; where the two
differ it fails at the test, and batch renorm is to narrow that gap.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bnfold.norm import Clipping, convert
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

SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
CLASSES = (10, 5, 3, 2, 1)
PAIRED = (4, 8, 16)
SAMPLES = 3200  # that a run sees, at least: small batches take more steps
LEAST_STEPS = 80
REFERENCE = 32  # the batch size from which on rate and momentum are those named
RATE, MOMENTUM = 0.05, 0.1
KINDS = ("batch", "renorm")


@dataclass(frozen=True)
class Case:
    """How batches are made, and how many samples a run sees.

    classes: that a batch holds in equal parts, None for a fair draw.
    """

    batch_size: int
    classes: int | None
    samples: int

    @property
    def steps(self) -> int:
        """Of a run."""
        return self.samples // self.batch_size


@dataclass(frozen=True)
class Found:
    """Accuracy in percent: at inference by kind, and of batch norm on batches as in training."""

    batch: float
    renorm: float
    same: float


class Batches:
    """So many batches, each drawn anew from the training samples."""

    def __init__(self, data: Labelled, case: Case, seed: int, count: int) -> None:
        self.x, self.y = data
        self.case, self.seed, self.count = case, seed, count
        self.by_class = [np.flatnonzero(self.y.numpy() == c) for c in range(10)]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draw = np.random.default_rng(self.seed)
        for _ in range(self.count):
            rows = torch.from_numpy(self._rows(draw))
            yield self.x[rows], self.y[rows]

    def _rows(self, draw: np.random.Generator) -> np.ndarray:
        if self.case.classes is None:
            return draw.integers(len(self.x), size=self.case.batch_size)
        chosen = draw.permutation(10)[: self.case.classes]
        sizes = map(len, np.array_split(range(self.case.batch_size), self.case.classes))
        parts = [draw.choice(self.by_class[c], n) for c, n in zip(chosen, sizes, strict=True)]
        return np.concatenate(parts)


def measured(case: Case, seed: int, data: Labelled, test: Labelled) -> Found:
    """Train the same network on the same batches with either norm."""
    trained = {kind: trained_with(kind, case, seed, data) for kind in KINDS}
    return Found(
        accuracy(trained["batch"], test),
        accuracy(trained["renorm"], test),
        accuracy_in_batches(trained["batch"], Batches(test, case, seed, 2048 // case.batch_size)),
    )


def trained_with(kind: str, case: Case, seed: int, data: Labelled) -> nn.Module:
    """Rate and momentum fall with the batch below REFERENCE: averages remember as many samples."""
    scale = min(1.0, case.batch_size / REFERENCE)
    torch.manual_seed(seed)
    options = {"schedule": Clipping.over(case.steps)} if kind == "renorm" else {}
    module = convert(digits_cnn(), kind, momentum=MOMENTUM * scale, **options)
    trained = fitted(
        module,
        Batches(data, case, seed, case.steps),
        epochs=1,
        lr=RATE * scale,
        schedule="cosine",
        seed=seed,
    )
    assert trained is not None
    return trained


def accuracy_in_batches(module: nn.Module, batches: Batches) -> float:
    """Percent right when test batches are made and normalised as the training ones were."""
    twin = copy.deepcopy(module).train()
    with torch.no_grad():
        right = [(twin(x).argmax(dim=1) == y).double().mean() for x, y in batches]
    return 100 * float(torch.stack(right).mean())


# --- the page -------------------------------------------------------------------------------------

Results = Mapping[Case, Sequence[Found]]


def cases(quick: bool) -> dict[str, list[Case]]:
    """By what they vary."""
    samples, least = (640, 25) if quick else (SAMPLES, LEAST_STEPS)
    base = Case(REFERENCE, None, samples)
    sizes, classes, paired = ((8, 64), (5, 1), (8,)) if quick else (SIZES, CLASSES, PAIRED)
    return {
        "size": [Case(size, None, max(samples, least * size)) for size in sizes],
        "classes": [replace(base, classes=n, samples=2 * samples) for n in classes],
        "pairs": [Case(size, size // 2, samples) for size in paired],
    }


def draw(groups: Mapping[str, list[Case]], results: Results) -> Figure:
    """Accuracy over batch size, and over the classes in a batch."""
    figure, axes = canvas(1, 2, height=3.2, width=8, sharey=True)
    arms = {
        "batch": "batch norm",
        "renorm": "batch renorm",
        "same": "batch norm, tested in batches as in training",
    }
    for panel, group, key in zip(
        axes[0], ("size", "classes"), ("batch_size", "classes"), strict=True
    ):
        x = [getattr(case, key) for case in groups[group]]
        for number, (arm, label) in enumerate(arms.items()):
            curve(panel, x, [Spread.by(results[c], arm) for c in groups[group]], number, label)
        panel.set(xscale="log", ylim=(0, 102))
        panel.set_xticks(x, [str(v) for v in x])
        panel.minorticks_off()
    axes[0, 0].set(xlabel="batch size, fair draws", ylabel="test accuracy, %")
    axes[0, 1].set(xlabel=f"classes in a batch of {REFERENCE}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def verdict(found: Sequence[Found]) -> str:
    """Renorm against batch norm at inference, in words."""
    return compared(
        "batch renorm", Spread.by(found, "renorm"), "batch norm", Spread.by(found, "batch")
    )


def claims(groups: Mapping[str, list[Case]], results: Results) -> list[str]:
    """What came out, in words."""
    said = []
    for group, name in (("size", "fair batches"), ("classes", "batches of few classes"),
                        ("pairs", "batches of pairs")):  # fmt: skip
        gains = [
            Spread.by(results[c], "renorm") - Spread.by(results[c], "batch") for c in groups[group]
        ]
        told = [gain for gain in gains if gain.differs_from_zero]
        better = sum(gain.mean > 0 for gain in told)
        said.append(
            f"{name}: better with batch renorm in {better} of {len(gains)} settings, with batch"
            f" norm in {len(told) - better}"
        )
    small, few = groups["size"][0], groups["classes"][-1]
    where = [
        compared(
            "the moving averages", Spread.by(results[case], "batch"),
            "test batches made as in training", Spread.by(results[case], "same"),
        )
        for case in (small, few)
    ]  # fmt: skip
    pairs = groups["pairs"][0]
    return [
        f"In batches of {small.batch_size}: {verdict(results[small])}; in batches of one class:"
        f" {verdict(results[few])}",
        "Beyond the spread, " + "; ".join(said),
        f"In batches of {pairs.batch_size // 2} pairs: {verdict(results[pairs])}",
        f"The network trained with batch norm, at {small.batch_size} samples in a batch:"
        f" {where[0]}; at one class: {where[1]}",
    ]


def page(groups: Mapping[str, list[Case]], results: Results) -> Page:
    """All of it."""
    rows = []
    for members in groups.values():
        for case in members:
            found = results[case]
            gain = Spread.by(found, "renorm") - Spread.by(found, "batch")
            shown = [f"{Spread.by(found, arm):.1f}" for arm in ("batch", "renorm", "same")]
            classes = "fair draw" if case.classes is None else case.classes
            rows.append([case.batch_size, classes, case.steps, *shown[:2], f"{gain:.1f}", shown[2]])
    head = ["batch", "classes in it", "steps", "batch norm, %", "renorm, %", "difference"]
    return Page(
        name="batch_size",
        title="Small and unfair batches: batch norm and batch renorm",
        about="How batch norm and batch renorm do at inference, with moving averages, after"
        " training in small batches and in batches of few classes (Ioffe 2017, sections 4.2 and"
        " 4.3, in miniature).",
        claims=claims(groups, results),
        tables=[
            table([*head, "batch norm in such batches, %"], rows),
            "The last column tests the network with batch norm on batches made as in training and"
            " normalised by themselves, which tells the classes of a batch to the network.",
        ],
        setting="Scikit-learn's digits, 1437 for training, 360 for the test;"
        " `models/digits.py:digits_cnn`; a batch holds its classes in equal parts, drawn anew each"
        f" time; SGD with Nesterov momentum 0.9, rate {RATE} falling to 0 by a cosine, statistics'"
        f" momentum {MOMENTUM}, both times batch size / {REFERENCE} below {REFERENCE}, so that the"
        " averages remember as many samples; batch renorm's clipping is the paper's schedule on as"
        " many steps as there are (`Clipping.over(steps)`). Both norms start from the same weights"
        " and see the same batches.",
    )


def main(arguments: Sequence[str] | None = None) -> Results:
    """Measure, write page and figure."""
    run: Run = asked(__doc__, arguments)
    data, test = digits("train"), digits("test")
    groups = cases(run.quick)
    wanted = dict.fromkeys(case for members in groups.values() for case in members)
    results = {case: [measured(case, seed, data, test) for seed in run.seeds] for case in wanted}
    write(run, page(groups, results), draw(groups, results))
    return results


if __name__ == "__main__":
    main()
