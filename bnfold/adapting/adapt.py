"""Adapt a network to a target domain: new batch-norm statistics, measured without labels.

AdaBN (Li et al., "Revisiting batch normalization for practical domain adaptation", 2016; "Adaptive
batch normalization", Pattern Recognition 2018): the weights stay, each batch norm's mean and
variance become those of the target. What holds the network: targets.py and networks.py. How the
statistics are measured: modules.py (torch) and graphs.py (onnxruntime). What follows from them:
statistics.py. What the result says about itself: diagnosis.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bnfold.adapting.base import Adapted, Reading
from bnfold.adapting.convergence import First, enough
from bnfold.adapting.networks import LayerChoice, Network, Run, Settled, SkippedLayer, first_ones
from bnfold.adapting.targets import Options, Target, target_of
from bnfold.errors import InputError, UsageError
from bnfold.measuring import diagnosis
from bnfold.measuring.diagnosis import LayerShift, Observed, OutputShift
from bnfold.measuring.estimate import Estimate, Progress
from bnfold.measuring.feed import Passes, Replay
from bnfold.measuring.moments import ImageMoments
from bnfold.measuring.ranks import Alone, Ranks, Waiting
from bnfold.measuring.statistics import Part, Rule, Statistics

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import torch
    from torch import nn

    from bnfold.api import FoldResult
    from bnfold.folding.record import FoldRecord
    from bnfold.measuring.feed import Forward

__all__ = ["AdaptResult", "LayerShift", "OutputShift", "SkippedLayer", "adapt"]

Method = Literal["exact", "fast"]
Tell = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class AdaptResult:
    """A network with the target's statistics, and what was seen on the way.

    model: of the type that came in, equal but for the statistics; of a folded model, folded.
    statistics: what each layer got, by name.
    layers: the adapted batch norms, in the order of the forward.  skipped: the others.
    images, batches: in the target data, of all processes.
    outputs: predictions before and after; None without diagnosis, or if they are no class scores.
    accuracy: before and after, 0 to 1, where there are labels; else None.
    warnings: sentences about what may be wrong with the data or the estimate.
    passes: over the data to estimate, where memory did not hold all batches at once; else 1.
    adapted: the same with what else belongs to it: its graph, its fold where the target is folded.
    """

    model: Any
    method: Method
    statistics: Mapping[str, Statistics]
    layers: tuple[LayerShift, ...]
    skipped: tuple[SkippedLayer, ...]
    images: int
    batches: int
    outputs: OutputShift | None
    accuracy: tuple[float, float] | None
    warnings: tuple[str, ...]
    passes: int
    adapted: Adapted = field(repr=False)

    @property
    def fold(self) -> FoldResult | None:
        """Of a folded model, the fold of the adapted one, which can be verified; else None."""
        return self.adapted.fold


def adapt(
    model: nn.Module | ir.Model | onnx.ModelProto | Path | str,
    data: Iterable[Any],
    *,
    method: Method = "exact",
    part: Part = "both",
    prior: float | Literal["auto"] = 0.0,
    weight: float | None = None,
    mixture: bool = False,
    source_data: Iterable[Any] | None = None,
    layers: LayerChoice = None,
    up_to: str | int | None = None,
    test_data: Iterable[Any] | None = None,
    stop: float | None = None,
    precision: float = 0.1,
    record: FoldRecord | Path | str | None = None,
    factory: str | None = None,
    forward: Forward | None = None,
    device: str | torch.device | None = None,
    provider: str = "cpu",
    max_bytes: int | None = None,
    progress: Tell | None = None,
    diagnose: bool = True,
    ranks: Ranks | None = None,
) -> AdaptResult:
    """The model with the statistics of the target data in its batch norms.

    model: an nn.Module, an ONNX model (onnx_ir, onnx or a path), a checkpoint path with its
    `factory`; or what a fold gave, with its fold `record` (of a path, the one beside it): it comes
    back folded. It is never changed, whatever happens. A folded network without record, or one
    that never had a batch norm, needs `source_data` and comes back as an approximation.

    data: an iterable of batches: arrays (N, ...), tuples whose first element is one (labels are
    ignored), or mappings from argument or input names to arrays; tensors or numpy. For anything
    else give `forward(module, batch)`, of a module, which gets each batch with its arrays as
    tensors on the device.
    method: `exact` measures each layer over the whole set with all layers before it adapted (the
    paper's Algorithm 1); its result does not depend on how the set is cut into batches. `fast` is a
    single pass in which each batch norm normalises by its batch; give it shuffled batches of 32
    images or more.
    part, prior, weight, mixture: how much of the source's statistics stays, see
    `bnfold.measuring.statistics.Rule`.
    source_data: samples of the source domain. Each layer is then brought to the mean and deviation
    that it had on these, whatever its stored statistics say: on the source nothing changes (by
    the exact method; the fast one, which sees batches, only nearly).
    layers: which batch norms to adapt: a predicate on the name, or patterns such as "layer1.*";
    a pattern with a "!" in front excludes. up_to: only those up to this one, or the first so many,
    in the order of the forward. The others keep their statistics.
    test_data: labelled samples, (x, y) or `bnfold.data`'s: accuracy before and after.
    stop: use only as many batches, in the order in which they come, as it takes until statistics
    move by less than this (in standard deviations) and are known as well; needs shuffled data.
    precision: in `LayerShift.images_needed` and its warning, +-precision of a standard deviation.
    device: of a module: where to compute; None: where it is. provider: of ONNX: "cpu" or "cuda".
    max_bytes: memory for activations of batches that wait (default: half of what is free); beyond
    it they go to disk (TMPDIR).
    progress: called with (done, total); total is None until it is known.
    diagnose: run both networks over the target once more and compare (two forwards' compute).
    ranks: the processes that share the data, each with its own part; None: this one alone.

    Raises InputError for a model without batch norm, a forward that fails, data without images,
    NaN or infinity (naming the layer), statistics that the buffers' type cannot hold; UsageError
    for arguments that mean nothing; RuntimeUnavailableError for a device that is not there.
    """
    asked = Asked(
        method=method,
        rule=Rule(part, prior, weight, mixture),
        source_data=source_data,
        up_to=up_to,
        test_data=test_data,
        stop=stop,
        precision=precision,
        max_bytes=max_bytes,
        progress=progress,
        diagnose=diagnose,
        ranks=ranks or Alone(),
    )
    options = Options(source_data is not None, layers, forward, device, provider)
    return adapt_target(target_of(model, options, record, Reading(factory)), data, asked)


@dataclass(frozen=True)
class Asked:
    """What is asked for: see `adapt`; resumed, on_settled: see `networks.Run`."""

    method: Method = "exact"
    rule: Rule = field(default_factory=Rule)
    source_data: Iterable[Any] | None = None
    up_to: str | int | None = None
    test_data: Iterable[Any] | None = None
    stop: float | None = None
    precision: float = 0.1
    max_bytes: int | None = None
    progress: Tell | None = None
    diagnose: bool = True
    ranks: Ranks = field(default_factory=Alone)
    resumed: Mapping[str, ImageMoments] = field(default_factory=dict)
    on_settled: Settled | None = None

    def __post_init__(self) -> None:
        if self.method not in ("exact", "fast"):
            raise UsageError(f"method is {self.method!r}; it must be 'exact' or 'fast'.")
        if not 0 < self.precision < 1:
            raise UsageError(f"precision is {self.precision}; it must lie between 0 and 1.")
        if self.stop is not None and not 0 < self.stop < 1:
            raise UsageError(f"stop is {self.stop}; it must lie between 0 and 1.")
        if self.max_bytes is not None and self.max_bytes < 0:
            raise UsageError(f"max_bytes is {self.max_bytes}; it must not be negative.")


def adapt_target(target: Target, data: Iterable[Any], asked: Asked | None = None) -> AdaptResult:
    """`adapt` of a target that was opened."""
    with _Work(target.network, data, asked or Asked()) as work:
        work.prepare()
        found = work.estimate()
        looked = work.look_at(found)
    return _result(target, work, found, looked)


@dataclass(frozen=True, eq=False)
class _Looked:
    """Both networks side by side, and what the data were, of all processes."""

    seen: Observed | None
    accuracy: tuple[float, float] | None
    images: int
    batches: int
    notes: tuple[str, ...]


class _Work:
    """The stages of an adaptation; what is opened on the way is closed with it."""

    def __init__(self, network: Network, data: Iterable[Any], asked: Asked) -> None:
        self.network, self.asked, self._given = network, asked, data
        self._stack = contextlib.ExitStack()
        self._room = network.room() // 2 if asked.max_bytes is None else asked.max_bytes

    def __enter__(self) -> _Work:
        self._data = self._given
        if self.asked.stop is not None:  # read more than once
            replay = Replay(self._given, self._room // 4)
            self._data = self._stack.enter_context(contextlib.closing(replay))
        self._feed = self._opened(self._data)
        progress = Progress(self.asked.progress, self._feed, 1, False)
        self.run = Run(self.asked.rule, progress, self._room, self.asked.ranks)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _opened(self, batches: Iterable[Any]) -> Passes:
        is_share = self.asked.ranks.size > 1
        feed = self.network.feed(batches, self._room // 4, is_share=is_share)
        return self._stack.enter_context(contextlib.closing(feed))

    def prepare(self) -> None:
        """Which layers, by which rule, from how much of the data."""
        asked, network, ranks = self.asked, self.network, self.asked.ranks
        if asked.up_to is not None:
            orders = ranks.share(network.order(self._feed))  # a share without a batch knows none
            network.keep_only(first_ones(max(orders, key=len), asked.up_to))
        if asked.source_data is not None:
            own = network.measure(self._opened(asked.source_data), self.run)
            every = ranks.together({name: Waiting(1, found) for name, found in own.items()})
            reference = {name: waiting.moments for name, waiting in every.items()}
            self.run = replace(self.run, rule=network.matched(asked.rule, reference))
        if asked.stop is not None:
            count = enough(network, self._data, self.run, asked.stop, self._room // 4)
            self._feed = self._opened(First(self._data, count))
        if self.run.rule.prior:
            images, _ = _counted(self._feed, ranks)
            self.run = replace(self.run, rule=replace(self.run.rule, images=images))

    def estimate(self) -> Estimate:
        """The statistics."""
        asked, network = self.asked, self.network
        stretches = len(network.layers) + 1 if asked.method == "exact" else 1
        self.run = replace(
            self.run,
            progress=Progress(asked.progress, self._feed, stretches, asked.diagnose),
            resumed=asked.resumed,
            on_settled=asked.on_settled,
        )
        measured = network.exact if asked.method == "exact" else network.fast
        found = measured(self._feed, self.run)
        if not _counted(self._feed, asked.ranks)[0]:  # each share alone may be empty
            raise InputError("The target data holds no image; nothing can be estimated from it.")
        if not found.moments:
            raise InputError(
                f"The forward passed none of the {len(network.layers)} batch norms to adapt; if it"
                " uses their statistics in another way, give forward= a function that calls them."
            )
        return found

    def look_at(self, found: Estimate) -> _Looked:
        """Both networks on the target, and on labelled samples."""
        asked, ranks, notes = self.asked, self.asked.ranks, list[str]()
        seen = None
        if asked.diagnose:
            seen = self.network.observe(self._feed, self.run, found.statistics)
        accuracy, fault = _accuracy(seen, getattr(self._given, "labels", None), ranks)
        if asked.test_data is not None:
            accuracy = self._tested(asked.test_data, found)
        elif fault is not None:
            notes.append(fault)
        self.run.progress.finish()
        left_out = sum(ranks.share(self._feed.left_out))
        if left_out:
            notes.append(
                f"The model's batch size is fixed; of the images {left_out} did not fill a batch"
                " and were left out."
            )
        images, batches = _counted(self._feed, ranks)
        return _Looked(seen and seen.merged(ranks), accuracy, images, batches, tuple(notes))

    def _tested(self, data: Iterable[Any], found: Estimate) -> tuple[float, float] | None:
        """Accuracy on labelled samples, which every process has whole."""
        tests = list(data)  # read once: it may be shuffled anew each time
        if not tests:
            raise UsageError("The test data holds no batch.")
        labels = getattr(data, "labels", None)
        seen = self.network.observe(self._opened(tests), self.run, found.statistics)
        accuracy, fault = _accuracy(seen, _labels(tests) if labels is None else labels, Alone())
        if fault is not None:
            raise UsageError(fault)
        return accuracy


_UNVISITED = "The forward did not pass it."


def _result(target: Target, work: _Work, found: Estimate, looked: _Looked) -> AdaptResult:
    network, asked, seen = work.network, work.asked, looked.seen
    shifts = diagnosis.layer_shifts(network.layers, found, seen, asked.precision)
    outputs = seen.outputs if seen else None
    unvisited = [SkippedLayer(n, _UNVISITED) for n in network.layers if n not in found.moments]
    said = diagnosis.warnings(
        found,
        shifts,
        outputs,
        looked.images,
        looked.batches,
        asked.method,
        asked.precision,
        len(unvisited),
        work.run.rule.is_plain,
    )
    adapted = target.finish(found.statistics)
    return AdaptResult(
        model=adapted.model,
        method=asked.method,
        statistics=found.statistics,
        layers=shifts,
        skipped=(*network.skipped, *unvisited),
        images=looked.images,
        batches=looked.batches,
        outputs=outputs,
        accuracy=looked.accuracy,
        warnings=(*target.warnings, *looked.notes, *said),
        passes=max(found.passes, 1),
        adapted=adapted,
    )


def _counted(feed: Any, ranks: Ranks) -> tuple[int, int]:
    """The images and batches of all processes, the data read for it where they were not yet."""
    if feed.images is None:
        for _ in feed:
            pass
    return sum(ranks.share(feed.images)), sum(ranks.share(feed.batches))


def _accuracy(
    seen: Observed | None, labels: Any, ranks: Ranks
) -> tuple[tuple[float, float] | None, str | None]:
    """Before and after, of all processes; or why there is none."""
    own, fault = None, None
    if seen is not None and seen.outputs is not None and labels is not None:
        try:
            own = seen.outputs.right(np.asarray(labels)[: len(seen.outputs.predictions[0])])
        except InputError as error:
            fault = str(error)
    shares = ranks.share(own)
    if None in shares:
        return None, fault
    before, after, images = np.sum(shares, axis=0)
    return (float(before / images), float(after / images)), None


def _labels(batches: Sequence[Any]) -> Any:
    """The labels in batches (x, y)."""
    pairs = [b for b in batches if isinstance(b, tuple | list) and len(b) == 2]
    if len(pairs) < len(batches):
        raise UsageError("The test data holds no labels; give batches (x, y), or an array y.")
    return np.concatenate([np.asarray(y) for _, y in pairs])
