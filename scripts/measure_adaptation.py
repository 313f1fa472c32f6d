"""Accuracy before and after adapting real networks to real shifts, and how many images it takes.

    .venv/bin/python scripts/measure_adaptation.py [--data FOLDER] [--rows FILE] [--only TEXT...]

Needs the real checkpoints (default ../shared/data). Each figure is appended to the file of rows
(default build/adaptation.jsonl) as soon as it is there, and what is there is not measured again; at
the end the page docs/results/adaptation.md is printed from it, to standard output. All of it takes
some hours of one core. --only: cases whose name starts so, such as `resnet20 fog`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import realdata  # noqa: E402
from adaptation_page import page  # noqa: E402

import bnfold  # noqa: E402
from bnfold.data.corruptions import CORRUPTIONS, SEVERITIES, corrupted  # noqa: E402
from bnfold.version import VERSION  # noqa: E402

MEAN = np.array(realdata.CIFAR_MEAN, np.float32).reshape(1, 3, 1, 1)
STD = np.array(realdata.CIFAR_STD, np.float32).reshape(1, 3, 1, 1)
DIGITS = ("mnist_lenet5", "mnist_cnn", "mnist_mlp", "mnist_resnet")
BATCH = 250
SOURCES = 1000  # images of the source that the calibrated mode gets
COUNTS = (4, 8, 16, 32, 64, 128, 512, 2048)
DRAWS = 3

Images = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """A network and a shift: target images, labelled test images, source images.

    labels: of the target images; only ever used to leave classes out.
    """

    network: str
    shift: str
    severity: int
    module: nn.Module
    target: Images
    labels: Images
    test: tuple[Images, Images]
    source: Images

    @property
    def name(self) -> str:
        """As rows are known by."""
        return f"{self.network} {self.shift} {self.severity}".removesuffix(" 0")

    def head(self, count: int, draw: int) -> Case:
        """With so many target images, one draw of them."""
        rows = np.random.default_rng((7, draw)).permutation(len(self.target))[:count]
        return replace(self, target=self.target[rows], labels=self.labels[rows])


# --- ways to adapt --------------------------------------------------------------------------------


def batches(x: Images, size: int = BATCH) -> list[Images]:
    """In pieces; exact takes smaller ones, which lie in the cache: its result is the same."""
    return [x[i : i + size] for i in range(0, len(x), size)]


def update_bn(case: Case) -> nn.Module:
    """Plain AdaBN: reset, cumulative average over batches in training mode: torch's function."""
    twin = copy.deepcopy(case.module)
    torch.optim.swa_utils.update_bn(list(torch.from_numpy(case.target).split(BATCH)), twin)
    return twin.eval()


def moving_average(case: Case) -> nn.Module:
    """A pass in training mode as it is, momentum .1, without reset: what much AdaBN code does."""
    twin = copy.deepcopy(case.module)
    for layer in twin.modules():
        if isinstance(layer, _BatchNorm):
            layer.train().momentum = 0.1
    realdata.predict(twin, case.target, BATCH)
    return twin.eval()


def exact(case: Case, **options: Any) -> nn.Module:
    """`bnfold.adapt`, method exact."""
    made: nn.Module = bnfold.adapt(
        case.module, batches(case.target, 50), diagnose=False, **options
    ).model
    return made


def fast(case: Case) -> nn.Module:
    """`bnfold.adapt`, method fast."""
    made: nn.Module = bnfold.adapt(
        case.module, batches(case.target), method="fast", diagnose=False
    ).model
    return made


def calibrated(case: Case, **options: Any) -> nn.Module:
    """`bnfold.adapt` with images of the source."""
    return exact(case, source_data=batches(case.source[:SOURCES], 50), **options)


METHODS: Mapping[str, Callable[[Case], nn.Module]] = {
    "source": lambda case: case.module,
    "update_bn": update_bn,
    "ema": moving_average,
    "fast": fast,
    "exact": exact,
    "auto": lambda case: exact(case, prior="auto"),
    "half": lambda case: exact(case, weight=0.5),
    "calibrated": calibrated,
}
SMALL: Mapping[str, Callable[[Case], nn.Module]] = {
    "exact": exact,
    "prior 16": lambda case: exact(case, prior=16),
    "auto": METHODS["auto"],
    "calibrated": calibrated,
    "calibrated, prior 16": lambda case: calibrated(case, prior=16),
}


# --- cases ----------------------------------------------------------------------------------------


@cache
def cifar_images(shared: Path) -> tuple[tuple[Images, Images], tuple[Images, Images]]:
    """Target and test images in [0, 1], with labels."""
    x, labels = shuffled(*realdata.cifar_train_part(shared))
    test, y = realdata.cifar_test761(shared)
    return (np.clip(x * STD + MEAN, 0, 1), labels), (np.clip(test * STD + MEAN, 0, 1), y)


def shuffled(x: Images, labels: Images) -> tuple[Images, Images]:
    """In random order."""
    order = np.random.default_rng(0).permutation(len(x))
    return x[order], labels[order]


def normalised(x: Images) -> Images:
    """As the CIFAR networks take them."""
    return np.ascontiguousarray((x - MEAN) / STD)


def cifar(shared: Path, network: str, shift: str, severity: int) -> Case:
    """A CIFAR network under a corruption; severity 0 is none."""
    (x, labels), (test, y) = cifar_images(shared)
    target = corrupted(x, shift, severity, seed=1) if severity else x
    shown = corrupted(test, shift, severity, seed=2) if severity else test
    return Case(
        network,
        shift,
        severity,
        realdata.load_model(shared, network),
        target=normalised(target),
        labels=labels,
        test=(normalised(shown), y),
        source=normalised(x),
    )


def digits(shared: Path, network: str, shift: str) -> Case:
    """An MNIST network on other digits."""
    source = shuffled(*realdata.mnist_train10k(shared))
    if shift == "MNIST":
        target, test = source, realdata.mnist_test(shared)
    elif shift == "MNIST-M":
        test = realdata.mnistm(shared)
        target = shuffled(*test)
    else:
        layout = "pad" if shift == "USPS pad" else "stretch"
        target = shuffled(*realdata.usps(shared, "train", layout))
        test = realdata.usps(shared, "test", layout)
    module = realdata.load_model(shared, network)
    return Case(network, shift, 0, module, *target, test=test, source=source[0])


def cases(shared: Path) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Name and maker of each; the heavy ones last."""
    for network in DIGITS:
        for shift in ("MNIST", "USPS pad", "USPS stretch", "MNIST-M"):
            yield f"{network} {shift}", lambda n=network, s=shift: digits(shared, n, s)
    for network in ("resnet20", "resnet56"):
        yield f"{network} clean", lambda n=network: cifar(shared, n, "clean", 0)
        for severity in (5, 1, 3, 4, 2):
            assert severity in SEVERITIES
            for shift in CORRUPTIONS:
                yield (
                    f"{network} {shift} {severity}",
                    lambda n=network, s=shift, v=severity: cifar(shared, n, s, v),
                )


# --- rows -----------------------------------------------------------------------------------------


class Rows:
    """Figures by (case, method, images, draw), each written down as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[str, str, int, int], dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.found[row["case"], row["method"], row["images"], row["draw"]] = row

    def measure(
        self,
        name: str,
        make: Callable[[], Case],
        methods: Mapping[str, Any],
        images: int,
        draw: int,
    ) -> None:
        """What is missing of a case, with so many target images (0: all of them)."""
        missing = [m for m in methods if (name, m, images, draw) not in self.found]
        if not missing:
            return
        case = make()
        if images:
            case = case.head(images, draw)
        for method in missing:
            accuracy = realdata.accuracy(methods[method](case), *case.test)
            self.add(name, method, images, draw, accuracy=accuracy)

    def add(self, name: str, method: str, images: int, draw: int, **figures: Any) -> None:
        """One row, into memory and the file."""
        row = {"case": name, "method": method, "images": images, "draw": draw, **figures}
        self.found[name, method, images, draw] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}, {method}, {images or 'all'}: {figures}", file=sys.stderr, flush=True)


SIZE_CASES = (
    "resnet20 clean",
    "resnet20 gaussian_noise 3",
    "resnet20 fog 5",
    "mnist_lenet5 USPS stretch",
    "mnist_lenet5 MNIST-M",
)
SOURCE_COUNTS = (4, 16, 64, 256)


def needed(rows: Rows, name: str, make: Callable[[], Case]) -> None:
    """What the standard errors say of the images that are needed, measured on all of them."""
    if (name, "errors", 0, 0) in rows.found:
        return
    case = make()
    layers = bnfold.adapt(case.module, batches(case.target, 50), diagnose=False).layers
    rows.add(
        name,
        "errors",
        0,
        0,
        available=len(case.target),
        needed=[layer.images_needed or 0 for layer in layers],
        mean_error=[layer.mean_error for layer in layers],
        scale_error=[layer.scale_error for layer in layers],
    )


def halves(rows: Rows, name: str, make: Callable[[], Case]) -> None:
    """How two halves of the target differ, over what their standard errors say (1: as they say).

    Root mean square over channels and draws, by layer, of the means and of the folded scales.
    """
    if (name, "halves", 0, 0) in rows.found:
        return
    case = make()
    count = min(len(case.target) // 2, 1000)
    squares: dict[str, list[tuple[float, float]]] = {}
    for draw in range(DRAWS):
        order = np.random.default_rng((5, draw)).permutation(len(case.target))
        one, other = (
            bnfold.adapt(case.module, batches(case.target[part], 50), diagnose=False).layers
            for part in (order[:count], order[count : 2 * count])
        )
        for first, second in zip(one, other, strict=True):
            a, b, eps = first.moments, second.moments, 1e-5
            mean = (a.pixels.mean - b.pixels.mean) ** 2 / (a.mean_error**2 + b.mean_error**2)
            log_ratio = np.log((a.pixels.var + eps) / (b.pixels.var + eps)) / 2
            scale = log_ratio**2 / (a.scale_error(eps) ** 2 + b.scale_error(eps) ** 2)
            squares.setdefault(first.name, []).append(
                (float(np.nanmean(mean)), float(np.nanmean(scale)))
            )
    ratios = {name: np.sqrt(np.mean(found, axis=0)).tolist() for name, found in squares.items()}
    rows.add(name, "halves", 0, 0, each=count, ratios=ratios)


def with_source(count: int) -> Callable[[Case], nn.Module]:
    """Calibrated on so many source images."""
    return lambda case: exact(case, source_data=batches(case.source[:count], 50))


def main() -> None:
    """Measure what is missing, print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--rows", type=Path, default=ROOT / "build" / "adaptation.jsonl")
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--sizes", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--print", action="store_true", help="print only, measure nothing")
    chosen = parser.parse_args()
    rows = Rows(chosen.rows)
    makers = dict(cases(chosen.data))
    if not chosen.print:
        for name in [n for n in makers if n.startswith(tuple(chosen.only))]:
            methods = {method: METHODS[method] for method in chosen.methods}
            rows.measure(name, makers[name], methods, 0, 0)
        for name in SIZE_CASES if chosen.sizes else ():
            needed(rows, name, makers[name])
            halves(rows, name, makers[name])
            for count in COUNTS:
                for draw in range(DRAWS):
                    rows.measure(name, makers[name], SMALL, count, draw)
            sources = {f"calibrated on {count}": with_source(count) for count in SOURCE_COUNTS}
            rows.measure(name, makers[name], sources, 0, 0)
    print(page(rows.found, list(makers), versions()))


def versions() -> str:
    """What it ran on."""
    return (
        f"bnfold {VERSION}, torch {torch.__version__}, numpy {np.__version__},"
        f" Python {platform.python_version()}, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
