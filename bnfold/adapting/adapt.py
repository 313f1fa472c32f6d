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
from bnfold.adapting.networks import LayerChoice, Run, Settled, SkippedLayer, first_ones
from bnfold.adapting.targets import Options, Target, target_of
from bnfold.errors import InputError, UsageError
from bnfold.measuring import diagnosis
from bnfold.measuring.diagnosis import LayerShift, Observed, OutputShift
from bnfold.measuring.estimate import Progress
from bnfold.measuring.feed import Replay
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
    rule = Rule(part, prior, weight, mixture)
    options = Options(source_data is not None, layers, forward, device, provider)
    target = target_of(model, options, record, Reading(factory))
    return adapt_target(
        target,
        data,
        method=method,
        rule=rule,
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


def adapt_target(
    target: Target,
    data: Iterable[Any],
    *,
    method: Method = "exact",
    rule: Rule | None = None,
    source_data: Iterable[Any] | None = None,
    up_to: str | int | None = None,
    test_data: Iterable[Any] | None = None,
    stop: float | None = None,
    precision: float = 0.1,
    max_bytes: int | None = None,
    progress: Tell | None = None,
    diagnose: bool = True,
    ranks: Ranks | None = None,
    resumed: Mapping[str, ImageMoments] | None = None,
    on_settled: Settled | None = None,
) -> AdaptResult:
    """`adapt` of a target that was opened; resumed, on_settled: see `networks.Run`."""
    _check(method, precision, stop, max_bytes)
    network, ranks, given = target.network, ranks or Alone(), data
    room = network.room() // 2 if max_bytes is None else max_bytes
    with contextlib.ExitStack() as stack:

        def opened(batches: Iterable[Any]) -> Any:
            feed = network.feed(batches, room // 4, is_share=ranks.size > 1)
            return stack.enter_context(contextlib.closing(feed))

        if stop is not None:  # read more than once
            data = stack.enter_context(contextlib.closing(Replay(data, room // 4)))
        feed = opened(data)
        run = Run(rule or Rule(), Progress(progress, feed, 1, False), room, ranks)
        if up_to is not None:
            orders = ranks.share(network.order(feed))  # a share without a batch knows none
            network.keep_only(first_ones(max(orders, key=len), up_to))
        if source_data is not None:
            own = network.measure(opened(source_data), run)
            seen_all = ranks.together({name: Waiting(1, found) for name, found in own.items()})
            reference = {name: waiting.moments for name, waiting in seen_all.items()}
            run = replace(run, rule=network.matched(run.rule, reference))
        if stop is not None:
            feed = opened(First(data, enough(network, data, run, stop, room // 4)))
        if run.rule.prior:
            run = replace(run, rule=replace(run.rule, images=_counted(feed, ranks)[0]))
        stretches = len(network.layers) + 1 if method == "exact" else 1
        run = replace(
            run,
            progress=Progress(progress, feed, stretches, diagnose),
            resumed=resumed or {},
            on_settled=on_settled,
        )
        found = network.exact(feed, run) if method == "exact" else network.fast(feed, run)
        images, batches = _counted(feed, ranks)
        if not images:  # each share alone may be empty
            raise InputError("The target data holds no image; nothing can be estimated from it.")
        if not found.moments:
            raise InputError(
                f"The forward passed none of the {len(network.layers)} batch norms to adapt; if it"
                " uses their statistics in another way, give forward= a function that calls them."
            )
        seen = network.observe(feed, run, found.statistics) if diagnose else None
        accuracy, unlabelled = _accuracy(seen, getattr(given, "labels", None), ranks)
        if test_data is not None:
            tests = list(test_data)  # read once: it may be shuffled anew each time
            if not tests:
                raise UsageError("The test data holds no batch.")
            known = getattr(test_data, "labels", None)
            labels = _labels(tests) if known is None else known
            tested = network.observe(opened(tests), run, found.statistics)
            accuracy, fault = _accuracy(tested, labels, Alone())
            if fault is not None:
                raise UsageError(fault)
        seen = seen and seen.merged(ranks)
        run.progress.finish()
        left_out = sum(ranks.share(feed.left_out))
    shifts = diagnosis.layer_shifts(network.layers, found, seen, precision)
    outputs = seen.outputs if seen else None
    unvisited = [SkippedLayer(n, _UNVISITED) for n in network.layers if n not in found.moments]
    said = diagnosis.warnings(
        found,
        shifts,
        outputs,
        images,
        batches,
        method,
        precision,
        len(unvisited),
        run.rule.is_plain,
    )
    adapted = target.finish(found.statistics)
    return AdaptResult(
        model=adapted.model,
        method=method,
        statistics=found.statistics,
        layers=shifts,
        skipped=(*network.skipped, *unvisited),
        images=images,
        batches=batches,
        outputs=outputs,
        accuracy=accuracy,
        warnings=(
            *target.warnings,
            *_about_rest(left_out),
            *([unlabelled] if unlabelled else []),
            *said,
        ),
        passes=max(found.passes, 1),
        adapted=adapted,
    )


_UNVISITED = "The forward did not pass it."


def _check(method: str, precision: float, stop: float | None, max_bytes: int | None) -> None:
    if method not in ("exact", "fast"):
        raise UsageError(f"method is {method!r}; it must be 'exact' or 'fast'.")
    if not 0 < precision < 1:
        raise UsageError(f"precision is {precision}; it must lie between 0 and 1.")
    if stop is not None and not 0 < stop < 1:
        raise UsageError(f"stop is {stop}; it must lie between 0 and 1.")
    if max_bytes is not None and max_bytes < 0:
        raise UsageError(f"max_bytes is {max_bytes}; it must not be negative.")


def _counted(feed: Any, ranks: Ranks) -> tuple[int, int]:
    """The images and batches of all processes, the data read for it where they were not yet."""
    if feed.images is None:
        for _ in feed:
            pass
    return sum(ranks.share(feed.images)), sum(ranks.share(feed.batches))


def _about_rest(left_out: int) -> tuple[str, ...]:
    if not left_out:
        return ()
    return (
        f"The model's batch size is fixed; of the images {left_out} did not fill a batch and"
        " were left out.",
    )


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
