"""What a batch norm is given for what was measured: the rule from moments to a mean and a variance.

By default they are the target's own, the variance with the divisor count - 1, as torch keeps it.
Blending with the statistics of the source follows Schneider et al., "Improving robustness against
common corruptions by covariate shift adaptation", 2020 (section 3): the source counts as N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from bnfold.errors import InputError, UsageError
from bnfold.measuring.moments import Float64, ImageMoments

Part = Literal["both", "mean", "var"]

_DEAD = 1e-12  # share of a layer's own variance, below which a channel does not vary


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and variance of a batch norm, (num_features,) float64 each."""

    mean: Float64
    var: Float64


@dataclass(frozen=True, eq=False)
class Layer:
    """A batch norm of a network, whatever holds it: its name, its eps, its source statistics."""

    name: str
    eps: float
    source: Statistics

    @property
    def num_features(self) -> int:
        """The number of channels."""
        return len(self.source.mean)

    @property
    def mean_only(self) -> bool:
        """True for a mean-only batch norm: eps 0 and a variance of exactly 1 in every channel.

        Salimans & Kingma, "Weight Normalization", 2016, section 4: its mean is a statistic, its
        scale is learnt with the weights ahead. No measured variance is 1 to the last bit in every
        channel, and where a tool has written 1 for what it took into gamma, the target's own
        variance would be as wrong. So nothing but these numbers has to say what the layer is, in
        torch, in ONNX and in a folded model's record. What is taken for one besides is a batch norm
        of eps 0 that was never trained.
        """
        return self.eps == 0 and bool(np.all(self.source.var == 1))


@dataclass(frozen=True)
class Rule:
    """From what a layer saw of the target to the statistics it gets.

    part: of both statistics, or of one alone; the other stays the source's. A layer that has a mean
    alone (`Layer.mean_only`) keeps its variance of 1 whatever is asked for.
    prior: the source counts as so many images (0: not at all); "auto": per channel as far as the
    distance to the source is no more than the standard error explains.
    weight: the share of the source, 0 to 1, whatever the number of images; instead of `prior`.
    mixture: the blended variance is that of both samples together, so that it holds what their
    means differ by; else the variances are averaged, as Schneider et al. do.
    images: of all the target data: what a prior is weighed against, also where the moments are of a
    batch, or of more than one row of an image; None: as many as the moments are of.
    reference: what each layer saw of the *source* data, by name. The target is then brought to the
    same mean and deviation behind the layer that the source had there: nothing changes on the
    source itself, whatever the stored statistics were measured with (small batches, batch
    renormalization, another augmentation).
    """

    part: Part = "both"
    prior: float | Literal["auto"] = 0.0
    weight: float | None = None
    mixture: bool = False
    images: int | None = None
    reference: Mapping[str, ImageMoments] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.part not in ("both", "mean", "var"):
            raise UsageError(f"part is {self.part!r}; it must be 'both', 'mean' or 'var'.")
        if self.weight is not None and self.prior != 0:
            raise UsageError("prior and weight both say how much the source counts; give one.")
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise UsageError(f"weight is {self.weight:g}; it must lie between 0 and 1.")
        if self.mixture and not (self.prior or self.weight):
            raise UsageError("mixture says how source and target blend; give prior or weight too.")
        if isinstance(self.prior, str):
            if self.prior != "auto":
                raise UsageError(f"prior is {self.prior!r}; it must be 'auto' or a number.")
        elif not (np.isfinite(self.prior) and self.prior >= 0):
            raise UsageError(f"prior is {self.prior:g}; it must be 0 or a number of images.")

    @property
    def is_plain(self) -> bool:
        """Whether the statistics are the target's own."""
        return self.part == "both" and not (self.prior or self.weight or self.reference)

    def __call__(self, layer: Layer, moments: ImageMoments) -> Statistics:
        """The statistics of `layer` for what it saw.

        Raises InputError where there are too few values for a variance.
        """
        if moments.pixels.count < 2:
            raise InputError(
                f"'{layer.name}' saw {moments.pixels.count} value per channel in all of the target"
                " data, which has no variance; give more images."
            )
        target = self._matched(layer, moments)
        mean, var = self._blended(layer.source, target, moments)
        return Statistics(
            layer.source.mean if self.part == "var" else mean,
            layer.source.var if self.part == "mean" or layer.mean_only else var,
        )

    def _matched(self, layer: Layer, moments: ImageMoments) -> Statistics:
        """The target's statistics, or those that do to it what the source's did to the source."""
        target = Statistics(moments.pixels.mean, moments.pixels.var_unbiased)
        seen = self.reference.get(layer.name)
        if seen is None:
            return target
        if layer.mean_only:
            return replace(target, mean=target.mean - (seen.pixels.mean - layer.source.mean))
        unit = layer.source.var + layer.eps
        tiny = _DEAD * unit  # a channel that is constant on the source is so on the target too
        ratio = (target.var + tiny) / (seen.pixels.var_unbiased + tiny)
        var = np.maximum(unit * ratio - layer.eps, 0.0)
        offset = (seen.pixels.mean - layer.source.mean) / np.sqrt(unit)
        return Statistics(target.mean - offset * np.sqrt(var + layer.eps), var)

    def _blended(
        self, source: Statistics, target: Statistics, moments: ImageMoments
    ) -> tuple[Float64, Float64]:
        difference = source.mean - target.mean
        images = self.images or moments.images
        if self.prior == "auto":
            scale = min(moments.images / images, 1.0)  # a squared error falls as 1 / images
            w = _share_of_chance(difference, moments.mean_error**2 * scale)
            w_var = _share_of_chance(source.var - target.var, moments.var_error**2 * scale)
        else:
            share = self.weight if self.weight is not None else self.prior / (self.prior + images)
            w = w_var = np.full_like(difference, share)
        mean = w * source.mean + (1 - w) * target.mean
        var = w_var * source.var + (1 - w_var) * target.var
        if self.mixture:
            var = var + w * (1 - w) * difference**2
        return mean, var


def _share_of_chance(difference: Float64, squared_error: Float64) -> Float64:
    """How much of a squared difference its standard error explains: 1 where it explains all.

    With one image the error is infinite, and the source is all there is.
    """
    known = np.where(np.isfinite(squared_error), squared_error, 1.0)
    share = known / np.maximum(difference**2, np.where(known > 0, known, 1.0))
    return np.where(np.isfinite(squared_error), share, 1.0)
