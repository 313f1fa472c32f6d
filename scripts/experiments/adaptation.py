"""AdaBN on shifted digits: how far each layer is off, and how many images put it right.

Li et al. 2016 (Revisiting batch normalization for practical domain adaptation), tables 2 and 4 and
figure 4. A network learns the source; its statistics are measured anew on unlabelled images of the
target. Divergence and accuracy are of images that the adaptation has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnfold
from bnfold.data import shifted
from models.digits import digits_cnn
from models.lenet import lenet5
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

SHIFTS = {  # how much: so that the source network suffers, and a person still reads the digits
    "contrast": 0.4,
    "brightness": 0.4,
    "gaussian_noise": 0.3,
    "salt_and_pepper": 0.2,
    "blur": 1.0,
    "invert": 0.75,
}
COUNTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DRAWS = 3  # of so many images, for each seed


@dataclass(frozen=True)
class Domain:
    """Unlabelled images of a target, labelled ones of the same, and labelled ones of the source."""

    name: str
    target: Tensor
    test: Labelled
    source: Labelled


@dataclass(frozen=True)
class Found:
    """Accuracy in percent on target images that were not adapted to, by number of images.

    source: of the source network on the source.  before: the same on the target.  counts: after
    adapting to so many images, mean over draws; the last is all.  kl: by layer, symmetric
    divergence from the stored statistics of the source, of the target before, of it after.
    """

    source: float
    before: float
    counts: Mapping[int, float] = field(hash=False)
    kl: Mapping[str, tuple[float, float, float]] = field(hash=False)

    @property
    def after(self) -> float:
        """With all images."""
        return self.counts[max(self.counts)]


def measured(
    network: nn.Module, domain: Domain, seed: int, counts: Sequence[int] = COUNTS
) -> Found:
    """Adapt to all target images and to draws of few."""
    draw = np.random.default_rng(seed)
    accuracies = {}
    for count in [n for n in counts if n < len(domain.target)]:
        picked = [draw.permutation(len(domain.target))[:count] for _ in range(DRAWS)]
        found = [accuracy(adapted(network, domain.target[rows]), domain.test) for rows in picked]
        accuracies[count] = float(np.mean(found))
    after = adapted(network, domain.target)
    accuracies[len(domain.target)] = accuracy(after, domain.test)
    off = [
        divergences(network, domain.source[0]),
        divergences(network, domain.test[0]),
        divergences(after, domain.test[0]),
    ]
    return Found(
        accuracy(network, domain.source),
        accuracy(network, domain.test),
        accuracies,
        {name: (off[0][name], off[1][name], off[2][name]) for name in off[0]},
    )


def adapted(network: nn.Module, images: Tensor) -> nn.Module:
    """`bnfold.adapt`, the exact method."""
    made: nn.Module = bnfold.adapt(network, list(images.split(128)), diagnose=False).model
    return made


def divergences(network: nn.Module, images: Tensor) -> dict[str, float]:
    """By layer, how far its input on these images is from its stored statistics.

    Symmetric Kullback-Leibler divergence between Gaussians, mean over channels (eq. 3): what
    `bnfold.adapt` says of a network before it adapts it.
    """
    layers = bnfold.adapt(network, list(images.split(128))).layers
    return {layer.name: float(layer.kl_before or 0) for layer in layers}


# --- domains --------------------------------------------------------------------------------------


def shifted_digits() -> list[Domain]:
    """Scikit-learn's digits under each shift; the training images' labels are not looked at."""
    (x, _), (x_test, y_test) = digits("train"), digits("test")
    made = []
    for name, amount in SHIFTS.items():
        target, test = (
            torch.from_numpy(shifted(images.numpy(), name, amount, seed=n))
            for n, images in enumerate((x, x_test))
        )
        made.append(Domain(name, target, (test, y_test), (x_test, y_test)))
    return made


def usps(folder: Path) -> tuple[Labelled, Domain]:
    """MNIST's training images, and USPS with the 16x16 images stretched to 28x28."""
    from tests import realdata

    def tensors(pair: tuple[np.ndarray, np.ndarray]) -> Labelled:
        return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])

    train, test = tensors(realdata.mnist_train10k(folder)), tensors(realdata.mnist_test(folder))
    target, _ = tensors(realdata.usps(folder, "train", "stretch"))
    target = target[torch.from_numpy(np.random.default_rng(0).permutation(len(target))[:2000])]
    shown = tensors(realdata.usps(folder, "test", "stretch"))
    source = test[0][:2000], test[1][:2000]
    return train, Domain("MNIST to USPS", target, shown, source)


def trained(make: Callable[[], nn.Module], data: Labelled, seed: int, epochs: int) -> nn.Module:
    """A source network."""
    torch.manual_seed(seed)
    made = fitted(make(), data, epochs=epochs, lr=0.05, seed=seed)
    assert made is not None
    return made


# --- the page -------------------------------------------------------------------------------------

Results = Mapping[str, Sequence[Found]]


def of_count(found: Sequence[Found], count: int) -> Spread:
    """Accuracy with so many images, over the seeds."""
    return Spread.of(one.counts[count] for one in found)


def of_layer(found: Sequence[Found], layer: str, which: int) -> Spread:
    """A layer's divergence: 0 on the source, 1 on the target before, 2 after."""
    return Spread.of(one.kl[layer][which] for one in found)


def enough(found: Sequence[Found]) -> int | None:
    """The least number of images from which on adapting is better than not, beyond the spread."""
    fine = None
    for count in sorted(found[0].counts, reverse=True):
        gain = of_count(found, count) - Spread.by(found, "before")
        if not (gain.differs_from_zero and gain.mean > 0):
            break
        fine = count
    return fine


def draw(results: Results) -> Figure:
    """Above, accuracy over the number of images; below, divergence by layer."""
    shown = chosen(results)
    figure, axes = canvas(2, len(shown), height=2.7, sharey="row")
    for (top, bottom), name in zip(axes.T, shown, strict=True):
        found = results[name]
        counts = list(found[0].counts)
        curve(top, counts, [of_count(found, n) for n in counts], 0, "adapted to so many images")
        before = Spread.by(found, "before")
        curve(top, (counts[0], counts[-1]), [before, before], 1, "not adapted")
        top.set(xscale="log", title=words(name), xlabel="target images")
        layers = list(found[0].kl)
        places = range(1, len(layers) + 1)
        for which, number, label in ((1, 1, "target, not adapted"), (2, 0, "target, adapted"),
                                     (0, 2, "source")):  # fmt: skip
            by_layer = [of_layer(found, layer, which) for layer in layers]
            curve(bottom, places, by_layer, number, label, is_log=True)
        bottom.set(yscale="log", xlabel="layer")
        bottom.set_xticks(places, layers)
    axes[0, 0].set_ylabel("test accuracy, %")
    axes[1, 0].set_ylabel("symmetric KL to the statistics")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def chosen(results: Results) -> list[str]:
    """What the figure shows: the greatest gain, the least, and the real data where it was given."""
    gains = {n: (Spread.by(f, "after") - Spread.by(f, "before")).mean for n, f in results.items()}
    ends = [max(gains, key=lambda n: gains[n]), min(gains, key=lambda n: gains[n])]
    return list(dict.fromkeys([*ends, *(name for name in results if name not in SHIFTS)]))


def words(name: str) -> str:
    """A shift's name in a sentence."""
    return name.replace("_", " ")


def claims(results: Results) -> list[str]:
    """What came out, in words."""
    gains = {n: Spread.by(f, "after") - Spread.by(f, "before") for n, f in results.items()}
    told = [gain for gain in gains.values() if gain.differs_from_zero]
    better = sum(gain.mean > 0 for gain in told)
    layers = [(n, layer) for n, found in results.items() for layer in found[0].kl]
    falls = [of_layer(results[n], la, 1) - of_layer(results[n], la, 2) for n, la in layers]
    fell = sum(fall.differs_from_zero and fall.mean > 0 for fall in falls)
    counts = {name: enough(found) for name, found in results.items()}
    known = ", ".join(
        f"{words(name)} {count}" for name, count in counts.items() if count is not None
    )
    never = ", ".join(words(name) for name, count in counts.items() if count is None)
    few = min(next(iter(results.values()))[0].counts)
    hurt = [n for n, f in results.items() if (of_count(f, few) - Spread.by(f, "before")).mean < 0]
    said = [
        f"Of {len(results)} shifts, adapting is better in {better}, worse in {len(told) - better},"
        f" and in {len(gains) - len(told)} there is no difference beyond the spread; it lowers the"
        f" divergence of {fell} of {len(layers)} layers on images that it has not seen",
        *(
            f"{words(name)}: "
            + compared("adapting", Spread.by(found, "after"), "none", Spread.by(found, "before"))
            for name, found in results.items()
        ),
    ]
    if known:
        said.append(f"Images from which on adapting is better beyond the spread: {known}")
    if never:
        said.append(f"At no number of images that was tried up to all: {never}")
    said.append(
        f"With {few} images the mean accuracy is below that without adapting in {len(hurt)} of"
        f" {len(results)}"
    )
    return said


def page(results: Results, real: bool) -> Page:
    """All of it."""
    counts = [n for n in COUNTS if all(n in found[0].counts for found in results.values())]
    rows = [
        [
            f"{name} {SHIFTS[name]:g}" if name in SHIFTS else name,
            *(f"{Spread.by(found, key):.1f}" for key in ("source", "before", "after")),
            *(f"{of_count(found, n):.1f}" for n in counts),
        ]
        for name, found in results.items()
    ]
    layers = [
        [name, layer, *(f"{of_layer(found, layer, which):.4f}" for which in (0, 1, 2))]
        for name, found in results.items()
        for layer in found[0].kl
    ]
    mnist = (
        " MNIST to USPS: `models/lenet.py:lenet5` on 10 000 MNIST images, 3 epochs; USPS stretched"
        " from 16x16 to 28x28, 2000 training images without labels as the target, its 2007 test"
        " images as the test; source: the first 2000 MNIST test images."
    )
    return Page(
        name="adaptation",
        title="AdaBN: divergence by layer, accuracy, number of images",
        about="What measuring batch norm's statistics anew on a shifted domain gives (Li et al."
        " 2016), on images of that domain which were not measured on. Figure: the shifts of the"
        " greatest and of the least gain" + (", and real data." if real else "."),
        claims=claims(results),
        tables=[
            "Test accuracy, %: on the source, then on the target without adapting, adapted to all"
            " images, and to so many:",
            table(["shift", "source", "not adapted", "all", *map(str, counts)], rows),
            "Symmetric KL divergence of a layer's input from its statistics, mean over channels:",
            table(["shift", "layer", "source", "target", "target, adapted"], layers),
        ],
        setting="Scikit-learn's digits, 1437 for training, 360 for the test, shifted by"
        " `bnfold.data.SHIFTS`; `models/digits.py:digits_cnn`, 10 epochs of SGD with Nesterov"
        " momentum 0.9 and a one-cycle rate of 0.05. The target's images are the shifted training"
        f" images, without labels. Few images: mean of {DRAWS} draws for each seed."
        + (mnist if real else ""),
    )


def main(arguments: Sequence[str] | None = None) -> Results:
    """Measure, write page and figure."""
    run: Run = asked(__doc__, arguments)
    domains = shifted_digits()[:: 3 if run.quick else 1]
    counts = COUNTS[:: 4 if run.quick else 1]
    networks = [
        trained(digits_cnn, digits("train"), seed, 2 if run.quick else 10) for seed in run.seeds
    ]
    pairs = list(zip(networks, run.seeds, strict=True))
    results = {
        d.name: [measured(network, d, seed, counts) for network, seed in pairs] for d in domains
    }
    if run.data is not None:
        train, domain = usps(run.data)
        nets = [trained(lenet5, train, seed, 1 if run.quick else 3) for seed in run.seeds]
        results[domain.name] = [
            measured(network, domain, seed, counts)
            for network, seed in zip(nets, run.seeds, strict=True)
        ]
    write(run, page(results, run.data is not None), draw(results))
    return results


if __name__ == "__main__":
    main()
