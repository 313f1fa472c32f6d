"""What can be said about an adaptation without labels.

None of it proves that accuracy rose: a target with other class proportions, or one that is like the
source, can lose by adaptation. A small labelled set tells; these figures say where to look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from bnfold.adapting.estimate import TOLERANCE, Estimate
from bnfold.adapting.moments import Float64, ImageMoments, chance_limit
from bnfold.adapting.ranks import Ranks, Waiting
from bnfold.adapting.statistics import Layer, Statistics

Classes = NDArray[np.int64]

FAST_BATCH = 32  # images in a batch, below which `fast` is off by some percent and more
# Mean W2^2 / sigma^2 over the layers, below which a target is the source, and below which it is so
# near that an adapted network that is less sure than before has rather lost. Measured, change of
# accuracy: MNIST on itself .003, 0.0; CIFAR-10 on itself .022, -3.3 (less sure); CIFAR-10 as JPEG
# .034, -2.0 (less sure); MNIST to USPS .014, +1.1 and .038, +0.3 (surer); noise and contrast from
# .126 on, +7 to +36. MNIST to USPS with an MLP, .080, loses 1.2 and nothing tells.
SAME = 0.01
NEAR = 0.05
ONE_CLASS = 0.5  # share of a single predicted class, of three or more
ALIKE = 1e-3  # spread between images, in standard deviations of a pixel


@dataclass(frozen=True, eq=False)
class LayerShift:
    """One batch norm: what its statistics were measured on, and how far the target is off.

    samples: rows of its input, as a rule images.  count: values per channel.
    kl_before, kl_after, w2_before, w2_after: the distance of the layer's normalised input on the
    target from what it was on the source, N(0, 1), mean over channels: symmetric Kullback-Leibler
    divergence (AdaBN paper, eq. 3) and squared 2-Wasserstein distance, both between Gaussians.
    Before: the source network; after: the adapted one, in a pass of its own. None if not diagnosed.
    mean_error: standard error of the mean by image, in standard deviations; scale_error: of the
    scale that is folded, relative. Median over channels.
    images_needed: images for the precision that was asked for, median over channels.
    dead: channels that hardly vary on the target (variance below eps) but did on the source.
    moments: the statistics themselves, which merge with those of other shards.
    """

    name: str
    num_features: int
    samples: int
    count: int
    kl_before: float | None
    kl_after: float | None
    w2_before: float | None
    w2_after: float | None
    mean_error: float
    scale_error: float
    images_needed: int | None
    dead: tuple[int, ...]
    moments: ImageMoments = field(repr=False)


@dataclass(frozen=True)
class OutputShift:
    """Outputs of shape (N, K), read as class scores: of the source network and of the adapted one.

    histogram_*: share of images by predicted class.  entropy_*: of the predicted distribution, mean
    over images, nats.  agreement: share of images for which both predict the same class.
    predictions: the classes, before and after, of this process's images in the order of the data.
    """

    classes: int
    histogram_before: tuple[float, ...]
    histogram_after: tuple[float, ...]
    entropy_before: float
    entropy_after: float
    agreement: float
    predictions: tuple[Classes, Classes] = field(repr=False, compare=False)

    @classmethod
    def none(cls, classes: int) -> OutputShift:
        """Of no image."""
        nothing = (0.0,) * classes
        predictions = (np.zeros(0, np.int64), np.zeros(0, np.int64))
        return cls(classes, nothing, nothing, 0.0, 0.0, 0.0, predictions)

    def accuracy(self, labels: Classes) -> tuple[float, float] | None:
        """Share of right predictions, before and after; None where there are not as many labels."""
        before, after = self.predictions
        if labels.shape != before.shape:
            return None
        return float((before == labels).mean()), float((after == labels).mean())

    def merged(self, ranks: Ranks) -> OutputShift:
        """Of the images of all processes; the predictions stay this one's."""
        shares = ranks.share([len(self.predictions[0]), *self._means()])
        images = np.array([share[0] for share in shares], np.float64)
        means = np.array([share[1:] for share in shares], np.float64)
        told = (images / images.sum()) @ means
        k = self.classes
        return replace(
            self,
            histogram_before=tuple(map(float, told[:k])),
            histogram_after=tuple(map(float, told[k : 2 * k])),
            entropy_before=float(told[2 * k]),
            entropy_after=float(told[2 * k + 1]),
            agreement=float(told[2 * k + 2]),
        )

    def _means(self) -> tuple[float, ...]:
        """Everything that is a mean over images."""
        rest = (self.entropy_before, self.entropy_after, self.agreement)
        return (*self.histogram_before, *self.histogram_after, *rest)

    @property
    def histogram_change(self) -> float:
        """Total variation between the histograms, 0 to 1."""
        pairs = zip(self.histogram_before, self.histogram_after, strict=True)
        return sum(abs(a - b) for a, b in pairs) / 2


@dataclass(frozen=True, eq=False)
class Observed:
    """A pass over the target: moments at each layer before and after, and the outputs."""

    before: Mapping[str, ImageMoments]
    after: Mapping[str, ImageMoments]
    outputs: OutputShift | None

    def merged(self, ranks: Ranks) -> Observed:
        """What all processes saw; each one calls it."""
        before, after = (
            {name: w.moments for name, w in ranks.together(_waiting(side)).items()}
            for side in (self.before, self.after)
        )
        return Observed(before, after, self._merged_outputs(ranks))

    def _merged_outputs(self, ranks: Ranks) -> OutputShift | None:
        """Those of all processes, where all that saw something saw scores of as many classes."""
        saw = bool(self.before)
        classes = {k for k in ranks.share(self.outputs.classes if self.outputs else -saw) if k}
        if len(classes) != 1 or -1 in classes:
            return None
        return (self.outputs or OutputShift.none(classes.pop())).merged(ranks)


def _waiting(side: Mapping[str, ImageMoments]) -> dict[str, Waiting]:
    return {name: Waiting(1, moments) for name, moments in side.items()}


# --- distances ------------------------------------------------------------------------------------


def symmetric_kl(shift: Float64, ratio: Float64) -> Float64:
    """KL(i||j) + KL(j||i) of N(0, 1) and N(shift, ratio), ratio being a variance."""
    return (1 + shift**2) / (2 * ratio) + (ratio + shift**2) / 2 - 1


def wasserstein(shift: Float64, ratio: Float64) -> Float64:
    """Squared 2-Wasserstein distance of N(0, 1) and N(shift, ratio)."""
    distance: Float64 = shift**2 + (np.sqrt(ratio) - 1) ** 2
    return distance


def distances(statistics: Statistics, eps: float, moments: ImageMoments) -> tuple[float, float]:
    """Symmetric KL and squared W2, means over channels, of a layer's input on the target.

    In units of the layer's own normalisation: eps belongs to both variances, as it does to what the
    layer divides by, so that a channel without variance is no infinite distance.
    """
    unit = statistics.var + eps
    shift = (moments.pixels.mean - statistics.mean) / np.sqrt(unit)
    ratio = (moments.pixels.var + eps) / unit
    return float(symmetric_kl(shift, ratio).mean()), float(wasserstein(shift, ratio).mean())


def _distances(
    statistics: Statistics, eps: float, moments: ImageMoments | None
) -> tuple[float, float] | tuple[None, None]:
    return (None, None) if moments is None else distances(statistics, eps, moments)


def layer_shifts(
    layers: Mapping[str, Layer], estimate: Estimate, seen: Observed | None, precision: float
) -> tuple[LayerShift, ...]:
    """The row of each of the `layers` that was measured, in the order of the forward."""
    rows = []
    for name, moments in estimate.moments.items():
        layer, eps = layers[name], layers[name].eps
        before = _distances(layer.source, eps, seen.before.get(name) if seen else None)
        after = _distances(estimate.statistics[name], eps, seen.after.get(name) if seen else None)
        needed = float(np.median(moments.images_needed(precision, eps)))
        was, now = layer.source.var, moments.pixels.var
        rows.append(
            LayerShift(
                name=name,
                num_features=moments.pixels.num_features,
                samples=moments.images,
                count=moments.pixels.count,
                kl_before=before[0],
                kl_after=after[0],
                w2_before=before[1],
                w2_after=after[1],
                mean_error=float(np.median(moments.mean_error / np.sqrt(now + eps))),
                scale_error=float(np.median(moments.scale_error(eps))),
                images_needed=int(np.ceil(needed)) if np.isfinite(needed) else None,
                dead=tuple(map(int, np.flatnonzero((now < eps) & (was + eps > 10 * (now + eps))))),
                moments=moments,
            )
        )
    return tuple(rows)


# --- outputs --------------------------------------------------------------------------------------


class Comparison:
    """Predictions of two networks, batch by batch."""

    def __init__(self) -> None:
        self._rows: list[tuple[NDArray[np.int64], ...]] = []
        self._entropies: list[tuple[Float64, Float64]] = []
        self._classes: set[int] = set()

    def add(self, before: Float64 | None, after: Float64 | None) -> None:
        """One batch: class scores (N, K) of both; None for outputs that are none."""
        if before is None or after is None or before.shape != after.shape:
            self._classes.add(0)
            return
        self._classes.add(before.shape[1])
        self._rows.append((before.argmax(1), after.argmax(1)))
        self._entropies.append((_entropy(before), _entropy(after)))

    def result(self) -> OutputShift | None:
        """None where some output was none of class scores, or the number of classes varied."""
        classes = max(self._classes, default=0)
        if len(self._classes) != 1 or not classes:
            return None
        before, after = (np.concatenate(side) for side in zip(*self._rows, strict=True))
        entropies = [
            float(np.concatenate(side).mean()) for side in zip(*self._entropies, strict=True)
        ]
        shares = [np.bincount(side, minlength=classes) / len(side) for side in (before, after)]
        return OutputShift(
            classes,
            tuple(map(float, shares[0])),
            tuple(map(float, shares[1])),
            entropies[0],
            entropies[1],
            float((before == after).mean()),
            (before, after),
        )


def _entropy(scores: Float64) -> Float64:
    """Per row, nats; scores are probabilities where they look like it, else logits."""
    if (scores >= 0).all() and (np.abs(scores.sum(1) - 1) < 1e-3).all():
        logs = np.log(np.maximum(scores, 1e-300))
    else:
        logs = scores - scores.max(1, keepdims=True)
        logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
    entropy: Float64 = -(np.exp(logs) * logs).sum(1)
    return entropy


# --- warnings -------------------------------------------------------------------------------------


def warnings(
    estimate: Estimate,
    layers: tuple[LayerShift, ...],
    outputs: OutputShift | None,
    images: int,
    batches: int,
    method: str,
    precision: float,
    unvisited: int,
) -> Iterator[str]:
    """What may be wrong, a sentence each."""
    yield from _about_size(layers, images, precision)
    if method == "fast" and images < FAST_BATCH * batches:
        yield (
            f"The batches hold {images / batches:.3g} images; below {FAST_BATCH} the fast method is"
            " off by some percent. Use larger batches or method 'exact'."
        )
    if estimate.excess is not None and estimate.excess > chance_limit(batches):
        yield (
            f"The batches differ {estimate.excess:.1f} times as much as chance explains: the data"
            " seems to be sorted."
            + (
                " The fast method needs shuffled batches."
                if method == "fast"
                else " That does no harm where the whole set is used; a part of it is no sample."
            )
        )
    yield from _about_shift(layers, outputs)
    yield from _about_network(estimate, layers, unvisited)


def _about_size(layers: tuple[LayerShift, ...], images: int, precision: float) -> Iterator[str]:
    worst = max(layers, key=lambda layer: _infinite_if_none(layer.images_needed))
    needed = worst.images_needed
    if needed is None or needed > worst.samples:
        count = "more than one is" if needed is None else f"about {needed} are"
        yield (
            f"The target data holds {images} images; {count} needed at '{worst.name}' to know its"
            f" statistics to +-{precision:g} standard deviations."
        )
    first = layers[0].moments
    if images > 1 and np.median(first.mean_error**2 * first.images / (first.pixels.var + 1e-30)) < (
        ALIKE**2
    ):
        yield "The images are nearly all alike; their statistics say little about other images."


def _infinite_if_none(needed: int | None) -> float:
    return float("inf") if needed is None else needed


def _about_shift(layers: tuple[LayerShift, ...], outputs: OutputShift | None) -> Iterator[str]:
    shifts = [layer.w2_before for layer in layers if layer.w2_before is not None]
    shift = float(np.mean(shifts)) if shifts else float("inf")
    if shift < SAME:
        yield (
            f"The target looks like the source (mean shift {shift**0.5:.2g} standard deviations):"
            " adapting gains little and may cost accuracy."
        )
    elif shift < NEAR and outputs is not None and outputs.entropy_after > outputs.entropy_before:
        yield (
            f"The target is near the source (mean shift {shift**0.5:.2g} standard deviations) and"
            " the adapted network is less sure than before: adapting may cost accuracy. Compare on"
            " labelled images."
        )
    if outputs is not None and outputs.classes > 2:
        share = max(outputs.histogram_after)
        if share > ONE_CLASS:
            yield (
                f"After adaptation {share:.0%} of the images are predicted as class"
                f" {outputs.histogram_after.index(share)} of {outputs.classes}: if the target has"
                " other class proportions than the source, adapted statistics hurt."
            )


def _about_network(
    estimate: Estimate, layers: tuple[LayerShift, ...], unvisited: int
) -> Iterator[str]:
    if unvisited:
        yield f"The forward did not pass {unvisited} batch norms; they keep their statistics."
    dead = {layer.name: len(layer.dead) for layer in layers if layer.dead}
    if dead:
        yield (
            f"{sum(dead.values())} channels hardly vary on the target (in {', '.join(dead)}):"
            " adapted, they amplify whatever noise comes later."
        )
    if estimate.passes:
        yield (
            f"The batches did not fit into memory together; {estimate.passes} passes were made"
            " instead of one."
        )
    if estimate.reused:
        state = "" if estimate.residual <= TOLERANCE else f", up to {estimate.residual:.1g}"
        yield (
            f"{', '.join(estimate.reused)}: used more than once in a forward; the statistics are"
            f" those of all uses, iterated {estimate.rounds} times{state}."
        )
