"""An ONNX graph whose statistics are estimated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch

from bnfold.adapting.networks import (
    NOT_CHOSEN,
    LayerChoice,
    Run,
    SkippedLayer,
    choose,
)
from bnfold.adapting.recovered import set_moments, with_identity_norms
from bnfold.errors import InputError
from bnfold.measuring import graphs
from bnfold.measuring.arrays import ArrayFeed
from bnfold.measuring.diagnosis import Observed
from bnfold.measuring.estimate import Estimate
from bnfold.measuring.memory import available_bytes
from bnfold.measuring.moments import ImageMoments
from bnfold.measuring.norms import norms_of, refused, with_statistics
from bnfold.measuring.statistics import Layer, Rule, Statistics


class GraphNetwork:
    """An ONNX model, run by onnxruntime. The model itself is never changed."""

    def __init__(
        self, model: ir.Model, *, choice: LayerChoice = None, provider: str = "cpu"
    ) -> None:
        self.model, self._provider = model, provider
        found, stay = norms_of(model), refused(model)
        if not found:
            raise InputError(
                "The model holds no batch norm whose statistics could be adapted."
                + "".join(f" '{name}': {reason}" for name, reason in list(stay.items())[:3])
            )
        chosen = choose(list(found), choice)
        self._norms = {name: found[name] for name in chosen}
        self.skipped = [SkippedLayer(name, reason) for name, reason in stay.items()]
        self.skipped += [SkippedLayer(name, NOT_CHOSEN) for name in found if name not in chosen]
        self.layers: Mapping[str, Layer] = {name: n.layer for name, n in self._norms.items()}

    def order(self, feed: ArrayFeed) -> list[str]:
        """See Network."""
        del feed
        return list(self.layers)

    def keep_only(self, names: Sequence[str]) -> None:
        """See Network."""
        self.skipped += [SkippedLayer(n, NOT_CHOSEN) for n in self.layers if n not in names]
        self._norms = {name: norm for name, norm in self._norms.items() if name in names}
        self.layers = {name: norm.layer for name, norm in self._norms.items()}

    def room(self) -> int:
        """See Network."""
        return available_bytes(torch.device("cpu"))

    def feed(self, data: Iterable[Any], max_bytes: int, *, is_share: bool = False) -> ArrayFeed:
        """See Network."""
        return ArrayFeed(self.model, data, max_bytes=max_bytes, is_share=is_share)

    def measure(self, feed: ArrayFeed, run: Run) -> dict[str, ImageMoments]:
        """See Network."""
        return graphs.measure(self.model, self._norms, feed, run.progress, provider=self._provider)

    def matched(self, rule: Rule, reference: Mapping[str, ImageMoments]) -> Rule:
        """See Network."""
        return replace(rule, reference=reference)

    def exact(self, feed: ArrayFeed, run: Run) -> Estimate:
        """See Network."""
        return graphs.exact(
            self.model,
            self._norms,
            feed,
            run.progress,
            rule=run.rule,
            ranks=run.ranks,
            max_bytes=run.max_bytes,
            on_settled=run.on_settled,
            resumed=run.resumed,
            provider=self._provider,
        )

    def fast(self, feed: ArrayFeed, run: Run) -> Estimate:
        """See Network."""
        return graphs.fast(
            self.model,
            self._norms,
            feed,
            run.progress,
            rule=run.rule,
            ranks=run.ranks,
            provider=self._provider,
        )

    def observe(self, feed: ArrayFeed, run: Run, statistics: Mapping[str, Statistics]) -> Observed:
        """See Network."""
        return graphs.observe(
            self.model,
            statistics,
            self._norms,
            feed,
            run.progress,
            provider=self._provider,
        )

    def result(self, statistics: Mapping[str, Statistics]) -> ir.Model:
        """See Network."""
        return with_statistics(self.model, statistics)


class RecoveredNetwork(GraphNetwork):
    """An ONNX model without batch norms, with idle ones put in; see recovered.py."""

    def __init__(
        self, model: ir.Model, *, choice: LayerChoice = None, provider: str = "cpu"
    ) -> None:
        super().__init__(with_identity_norms(model), choice=choice, provider=provider)

    def matched(self, rule: Rule, reference: Mapping[str, ImageMoments]) -> Rule:
        """The batch norms get what was seen of the source, which the target then differs from."""
        set_moments(self.model, reference)
        chosen = list(self.layers)
        super().__init__(self.model, choice=chosen.__contains__, provider=self._provider)
        return rule
