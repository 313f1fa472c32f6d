"""What can be said about an adaptation without labels.

None of it proves that accuracy rose: a target with other class proportions, or one that is like the
source, can lose by adaptation. A small labelled set tells; these figures say where to look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.errors import InputError
from bnfold.measuring.estimate import TOLERANCE, Estimate
from bnfold.measuring.moments import Float64, ImageMoments, chance_limit
from bnfold.measuring.ranks import Ranks, Waiting
from bnfold.measuring.statistics import Layer, Statistics

Classes = NDArray[np.int64]

FAST_BATCH = 32  # images in a batch, below which `fast` is off by some percent and more
# Warnings of harm, tried in docs/results/warnings.md. Of the mean W2^2 / sigma^2 over the layers:
# where a target is the source; where it is so near that the source network is to be believed; where
# it is too far even for a sure one. As shares of log(classes): a gain of information; an entropy,
# or a rise of it. As a share of the classes: few.
SAME = 0.01
NEAR = 0.05
FAR = 1.0
INFORMED = 0.005
SURE = 0.05
FEW_CLASSES = 0.75
ONE_CLASS = 0.5  # share of a single predicted class, of three or more
OTHER_DATA = 1e-3  # KL after an exact estimate; rounding leaves 1e-7
ALIKE = 1e-3  # spread between images, in standard deviations of a pixel


@dataclass(frozen=True, eq=False)
class LayerShift:
    """One batch norm: what its statistics were measured on, and how far the target is off.

    samples: rows of its input, as a rule images.  count: values per channel.
    kl_before, kl_after, w2_before, w2_after: the distance of the layer's normalised input on the
    target from what it was on the source, N(0, 1), mean over channels: symmetric Kullback-Leibler
    divergence (AdaBN paper, eq. 3) and squared 2-Wasserstein distance, both between Gaussians.
    Of a mean-only batch norm, whose source variance nobody knows, the means alone, in the target's
    deviations. Before: the source network; after: the adapted one, in a pass of its own. None if
    not diagnosed.
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

    histogram_*: share of images by predicted class.  mean_*: the predicted distribution, mean over
    images.  entropy_*: of the predicted distribution, mean over images, nats.  agreement: share of
    images for which both predict the same class.
    predictions: the classes, before and after, of this process's images in the order of the data.
    """

    classes: int
    histogram_before: tuple[float, ...]
    histogram_after: tuple[float, ...]
    mean_before: tuple[float, ...]
    mean_after: tuple[float, ...]
    entropy_before: float
    entropy_after: float
    agreement: float
    predictions: tuple[Classes, Classes] = field(repr=False, compare=False)

    @classmethod
    def none(cls, classes: int) -> OutputShift:
        """Of no image."""
        nothing = (0.0,) * classes
        predictions = (np.zeros(0, np.int64), np.zeros(0, np.int64))
        return cls(classes, nothing, nothing, nothing, nothing, 0.0, 0.0, 0.0, predictions)

    def right(self, labels: Classes) -> tuple[int, int, int]:
        """Right predictions, before and after, of how many.

        Raises InputError for labels that are not one class for each image.
        """
        before, after = self.predictions
        labels = labels.reshape(-1) if labels.size == len(labels) else labels
        fault = None
        if labels.shape != before.shape:
            fault = f"there are labels of shape {labels.shape} for {len(before)} images"
        elif labels.dtype.kind not in "iu":
            fault = f"the labels are of type {labels.dtype}, not numbers of classes"
        elif len(labels) and not (labels.min() >= 0 and labels.max() < self.classes):
            fault = (
                f"the labels go from {labels.min()} to {labels.max()}, and the network has"
                f" {self.classes} classes"
            )
        if fault:
            raise InputError(f"No accuracy with the labels: {fault}.")
        return int((before == labels).sum()), int((after == labels).sum()), len(labels)

    def merged(self, ranks: Ranks) -> OutputShift:
        """Of the images of all processes; the predictions stay this one's."""
        own = {name: getattr(self, name) for name in _MEANS}
        shares = ranks.share({"images": len(self.predictions[0]), **own})
        images = np.array([share["images"] for share in shares], np.float64)
        merged: dict[str, Any] = {}
        for name in _MEANS:
            mean = (images / images.sum()) @ np.array([share[name] for share in shares])
            merged[name] = tuple(map(float, mean)) if mean.ndim else float(mean)
        return replace(self, **merged)

    @property
    def histogram_change(self) -> float:
        """Total variation between the histograms, 0 to 1."""
        pairs = zip(self.histogram_before, self.histogram_after, strict=True)
        return sum(abs(a - b) for a, b in pairs) / 2

    @property
    def information_before(self) -> float:
        """Of the predicted class about the image, nats: see `_information`."""
        return _information(self.mean_before, self.entropy_before)

    @property
    def information_after(self) -> float:
        """The same of the adapted network."""
        return _information(self.mean_after, self.entropy_after)


_MEANS = (  # over images
    "histogram_before",
    "histogram_after",
    "mean_before",
    "mean_after",
    "entropy_before",
    "entropy_after",
    "agreement",
)


def _information(mean: tuple[float, ...], entropy: float) -> float:
    """Mutual information of image and predicted class, nats.

    High where single predictions are sure and all classes occur (Bridle, Heading & MacKay,
    "Unsupervised classifiers, mutual information and phantom targets", 1992).
    """
    p = np.array(mean)
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum() - entropy)


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


def distances(statistics: Statistics, layer: Layer, moments: ImageMoments) -> tuple[float, float]:
    """Symmetric KL and squared W2, means over channels, of a layer's input on the target.

    statistics: what the layer normalises by, its source's or the adapted ones.

    In units of the layer's own normalisation: eps belongs to both variances, as it does to what the
    layer divides by, so that a channel without variance is no infinite distance.
    """
    seen = moments.pixels.var + layer.eps
    # the 1 of a mean-only layer is no variance that was measured
    unit = np.where(seen > 0, seen, 1.0) if layer.mean_only else statistics.var + layer.eps
    shift = (moments.pixels.mean - statistics.mean) / np.sqrt(unit)
    ratio = np.ones_like(unit) if layer.mean_only else seen / unit
    return float(symmetric_kl(shift, ratio).mean()), float(wasserstein(shift, ratio).mean())


def _distances(
    statistics: Statistics, layer: Layer, moments: ImageMoments | None
) -> tuple[float, float] | tuple[None, None]:
    return (None, None) if moments is None else distances(statistics, layer, moments)


def layer_shifts(
    layers: Mapping[str, Layer], estimate: Estimate, seen: Observed | None, precision: float
) -> tuple[LayerShift, ...]:
    """The row of each of the `layers` that was measured, in the order of the forward."""
    rows = []
    for name, moments in estimate.moments.items():
        layer, eps = layers[name], layers[name].eps
        before = _distances(layer.source, layer, seen.before.get(name) if seen else None)
        after = _distances(estimate.statistics[name], layer, seen.after.get(name) if seen else None)
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
        self._sides: tuple[list[_Predicted], list[_Predicted]] = ([], [])
        self._classes: set[int] = set()

    def add(self, before: Float64 | None, after: Float64 | None) -> None:
        """One batch: class scores (N, K) of both; None for outputs that are none."""
        if before is None or after is None or before.shape != after.shape:
            self._classes.add(0)
            return
        self._classes.add(before.shape[1])
        for side, scores in zip(self._sides, (before, after), strict=True):
            side.append(_Predicted.of(scores))

    def result(self) -> OutputShift | None:
        """None where some output was none of class scores, or the number of classes varied."""
        classes = max(self._classes, default=0)
        if len(self._classes) != 1 or not classes:
            return None
        before, after = map(_Predicted.joined, self._sides)
        if not len(before.winners):
            return OutputShift.none(classes)
        return OutputShift(
            classes=classes,
            histogram_before=before.histogram(classes),
            histogram_after=after.histogram(classes),
            mean_before=before.mean(),
            mean_after=after.mean(),
            entropy_before=float(before.entropies.mean()),
            entropy_after=float(after.entropies.mean()),
            agreement=float((before.winners == after.winners).mean()),
            predictions=(before.winners, after.winners),
        )


@dataclass(frozen=True, eq=False)
class _Predicted:
    """Of N images: predicted classes (N,), entropies (N,), the sum of distributions (K,)."""

    winners: Classes
    entropies: Float64
    total: Float64

    @classmethod
    def of(cls, scores: Float64) -> _Predicted:
        """Scores are probabilities where they look like it, else logits."""
        if (scores >= 0).all() and (np.abs(scores.sum(1) - 1) < 1e-3).all():
            logs = np.log(np.maximum(scores, 1e-300))
        else:
            logs = scores - scores.max(1, keepdims=True)
            logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
        p = np.exp(logs)
        return cls(scores.argmax(1), -(p * logs).sum(1), p.sum(0))

    @classmethod
    def joined(cls, parts: list[_Predicted]) -> _Predicted:
        return cls(
            np.concatenate([part.winners for part in parts]),
            np.concatenate([part.entropies for part in parts]),
            np.sum([part.total for part in parts], axis=0),
        )

    def histogram(self, classes: int) -> tuple[float, ...]:
        shares = np.bincount(self.winners, minlength=classes) / len(self.winners)
        return tuple(map(float, shares))

    def mean(self) -> tuple[float, ...]:
        return tuple(map(float, self.total / len(self.winners)))


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
    is_plain: bool,
) -> Iterator[str]:
    """What may be wrong, a sentence each; is_plain: the statistics are the target's own."""
    yield from _about_size(layers, images, precision)
    if method == "fast" and images < FAST_BATCH * batches:
        yield (
            f"The batches hold {images / batches:.3g} images; below {FAST_BATCH} the fast method is"
            " off by some percent. Use larger batches or method 'exact'."
        )
    if estimate.excess is not None and estimate.excess > chance_limit(batches, images):
        yield (
            f"The batches differ {estimate.excess:.1f} times as much as chance explains: the data"
            " seems to be sorted."
            + (
                " The fast method needs shuffled batches."
                if method == "fast"
                else " That does no harm where the whole set is used; a part of it is no sample."
            )
        )
    if method == "exact" and is_plain and estimate.residual <= TOLERANCE:
        yield from _about_another_pass(layers)
    yield from _about_shift(layers, outputs)
    yield from _about_network(estimate, layers, unvisited)


def _about_another_pass(layers: tuple[LayerShift, ...]) -> Iterator[str]:
    """Adapted exactly, a layer sees what it was adapted to; else the data are not the same."""
    off = [layer for layer in layers if layer.kl_after is not None and layer.kl_after > OTHER_DATA]
    if off:
        worst = max(off, key=lambda layer: layer.kl_after or 0)
        yield (
            f"'{worst.name}' does not see what it was adapted to (KL {worst.kl_after:.2g}): the"
            " data differ from pass to pass, by random augmentation perhaps, or since a state was"
            " written. Statistics of data that change are those of one draw."
        )


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
    if shifts:
        yield from likely_harm(float(np.mean(shifts)), outputs)


def likely_harm(shift: float, outputs: OutputShift | None) -> Iterator[str]:
    """Why adapting may cost accuracy; shift: mean over the layers of `LayerShift.w2_before`.

    What these sentences catch and miss on real networks: docs/results/warnings.md.
    """
    if shift < SAME:
        yield (
            f"The target looks like the source (mean shift {shift**0.5:.2g} standard deviations):"
            " adapting gains little and may cost accuracy."
        )
    if outputs is None or outputs.classes <= 2:
        return
    gained = outputs.information_after - outputs.information_before
    if shift >= SAME and gained < INFORMED * np.log(outputs.classes):
        yield (
            f"Adapted, the predictions say {'hardly more' if gained >= 0 else 'less'} about the"
            f" images than before ({gained:+.2g} nats of {np.log(outputs.classes):.2g}): adapting"
            " may cost accuracy. Compare on labelled images."
        )
    effective = np.exp(outputs.information_before)
    trusted = _why_trusted(shift, outputs)
    if trusted and effective < FEW_CLASSES * outputs.classes:
        yield (
            f"The source network tells few classes apart in the target (about {effective:.1f} of"
            f" {outputs.classes}), and {trusted}: if they are few, or in other proportions than in"
            " the source, adapted statistics hurt."
        )
    share = max(outputs.histogram_after)
    if share > ONE_CLASS:
        yield (
            f"After adaptation {share:.0%} of the images are predicted as class"
            f" {outputs.histogram_after.index(share)} of {outputs.classes}: if the target has"
            " other class proportions than the source, adapted statistics hurt."
        )


def _why_trusted(shift: float, outputs: OutputShift) -> str | None:
    """Why the classes that the source network finds may be the target's; None if it is broken."""
    limit = SURE * np.log(outputs.classes)
    if outputs.entropy_before < limit and shift < FAR:
        return "is sure of them"
    if shift < NEAR:
        return "is near its source"
    if outputs.entropy_after - outputs.entropy_before > limit and shift < FAR:
        return "is surer of them than the adapted one is of its own"
    return None


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
            f"{estimate.passes} passes over the data were made instead of one: neither memory nor"
            " disk held the activations of all batches, or the network keeps what a batch leaves"
            " behind for the next one."
        )
    if estimate.reused:
        state = "" if estimate.residual <= TOLERANCE else f", up to {estimate.residual:.1g}"
        yield (
            f"{', '.join(estimate.reused)}: used more than once in a forward; the statistics are"
            f" those of all uses, iterated {estimate.rounds} times{state}."
        )
