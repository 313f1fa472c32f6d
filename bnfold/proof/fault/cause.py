"""What kind of fault spoiled a batch norm: supposed one after the other, and tested by the numbers.

Every supposition (eps dropped, two channels swapped, ...) is a batch norm with another result. It
explains the fault where the original, with that result in the place of the right one, gives what
the folded network gives: what is left must be rounding (no more than would be suspected at all),
and an eighth of the fault at most, so that a small fault is not explained by whatever is near. A
number (another eps, a factor) is solved for from slopes that are fitted, and then tested the same
way on the values. Of suppositions that do equally well the one with the fewest such numbers is
told, and with it all others that have as few; where none does, that is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from bnfold.errors import BnfoldError, capital
from bnfold.proof.algebra.certificate import Gauge
from bnfold.proof.exact.alignment import Alignment, relative_error
from bnfold.proof.exact.counterpart import View
from bnfold.proof.exact.layers import Norm, in_training, is_norm, norms_of
from bnfold.proof.exact.reference import Float64Reference
from bnfold.proof.fault.divergence import NOISE, Divergence
from bnfold.proof.fault.measured import own_errors
from bnfold.proof.fault.sites import LINEAR, Place, Site, places
from bnfold.proof.places.runtimes import R_LIMIT

Array = np.ndarray[Any, np.dtype[Any]]

EXPLAINED = 8  # share of the fault that must be gone: all but one in this many
AS_GOOD = 2  # a supposition that leaves at most this many times what the best leaves is as good
FEW_WEIGHTS = 16  # non-zero weights below which all may be float16 numbers by chance
PLURALS = {"gamma": "gammas", "beta": "betas", "mean": "means", "var": "variances"}
# type -> its name, and the error of a value that its rounding can explain: 8 of its roundings
# (a bfloat16 number of a weight's size is a float16 number too, so it comes first)
NARROW = ((np.dtype(ml_dtypes.bfloat16), "bfloat16", 2.0**-5),
          (np.dtype(np.float16), "float16", 2.0**-8))  # fmt: skip


@dataclass(frozen=True)
class Cause:
    """Why a value is wrong, as far as the numbers tell.

    norm: the batch norm, None where none explains it. value: of the original, where it shows; node:
    what computes that. error: there, of the value's size; left: what remains of it with the fault
    put into the original. fault: its kind, "unknown" where nothing known explains it. figures: what
    was solved for. besides: other faults that the numbers do not tell from this one. others: the
    layers where further faults lie, in order of execution.
    """

    norm: str | None
    value: str
    node: str
    error: float
    fault: str
    sentence: str
    left: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    besides: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The cause as JSON takes it."""
        return {
            **vars(self),
            "error": self.error if np.isfinite(self.error) else str(self.error),
            "figures": dict(self.figures),
            "besides": list(self.besides),
            "others": list(self.others),
        }


@dataclass(frozen=True, eq=False)
class Supposition:
    """A fault that may be: the result that the batch norm would have, and how to say it."""

    fault: str
    sentence: str
    result: Array
    figures: Mapping[str, float] = field(default_factory=dict)


def find_cause(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    inputs: Mapping[str, Array],
    parted: Sequence[Divergence],
    *,
    gauges: Mapping[str, Gauge] | None,
    aliases: Mapping[str, str] | None,
    unit: float,
) -> Cause | None:
    """The cause of the first of the divergences, the layers of the others named; None without any.

    inputs: a batch that they were found on; a few rows tell more than one. gauges, aliases, unit:
    as for `divergences`. Raises BnfoldError where a model cannot be run in float64.
    """
    if not parted:
        return None
    view, other = View.of(original), View.of(folded)
    alignment = Alignment.of(view, other, gauges, aliases)
    norms = {norm.output: norm for norm in norms_of(view)}
    first = parted[0]
    before, after = Float64Reference(original), Float64Reference(folded)
    near = places(view, norms, alignment, first.value)
    usual = own_errors(original, before, [first.value], inputs, alignment)[first.value]
    limit = max(NOISE * unit, R_LIMIT * usual)
    own = near[0].norm if near and near[0].own else None
    named = [layer for part in parted[1:] if (layer := layer_at(view, norms, alignment, part))]
    opened = (Site.of(place, before, after, inputs, alignment, view) for place in near)
    sites: list[Site] = []
    found = (
        _by_shape(first, before, after, inputs, alignment)
        or _by_the_batch(first, own, other, alignment, near)
        or _by_parameters(first, _kept(sites, opened), view, limit)
        or _by_type(first, own or _taken_up(near, view, other, alignment), view, other, alignment)
        or _by_other_rows(first, own, before, after, inputs, alignment, limit)
        or _unknown(first, own, sites)
    )
    others = tuple(dict.fromkeys(name for name in named if name != found.norm))
    sentence = found.sentence
    if others:
        sentence += f" Further faults lie at {', '.join(map(repr, others))}."
    return Cause(**{**vars(found), "others": others, "sentence": sentence})


def layer_at(view: View, norms: Mapping[str, Norm], alignment: Alignment, part: Divergence) -> str:
    """The batch norm whose result a divergence is, else the node that computes the value."""
    near = places(view, norms, alignment, part.value)
    return near[0].norm.name if near and near[0].own else part.node


def _taken_up(near: Sequence[Place], view: View, folded: View, alignment: Alignment) -> Norm | None:
    """The batch norm behind a value that must have been folded forward, into what computes it."""
    for place in near:
        before = view.producers.get(place.norm.input)
        kept = folded.producers.get(alignment.there.get(place.norm.output, ""))
        if (before is None or before.op_type not in LINEAR) and not (kept and is_norm(kept)):
            return place.norm
    return None


# ------------------------------------------------------------------- what the graph itself tells


def _by_shape(first: Divergence, before: Float64Reference, after: Float64Reference,
              inputs: Mapping[str, Array], alignment: Alignment) -> Cause | None:  # fmt: skip
    """A value of another shape: no number of a batch norm makes that."""
    there = alignment.there[first.value]
    shapes = [
        list(np.shape(reference.run(inputs, [name])[name]))
        for reference, name in ((before, first.value), (after, there))
    ]
    if shapes[0] == shapes[1]:
        return None
    sentence = (
        f"what {first.op_type} '{first.node}' gives has the shape {shapes[1]} and should have"
        f" {shapes[0]}."
    )
    return _cause(first, None, "shape", sentence)


def _by_the_batch(first: Divergence, own: Norm | None, folded: View, alignment: Alignment,
                  near: Sequence[Place]) -> Cause | None:  # fmt: skip
    """A batch norm in training mode in front of the wrong value."""
    for node in _region(folded, alignment, first.value):
        if is_norm(node) and in_training(node, folded.opsets.get("", 1)):
            norm = own or (near[0].norm if near else None)
            name = norm.name if norm else folded.label(node)
            sentence = (
                f"batch norm '{name}' is in training mode in the folded network: it normalizes by"
                " the statistics of the batch."
            )
            return _cause(first, name, "training mode", sentence)
    return None


def _by_type(first: Divergence, norm: Norm | None, view: View, folded: View,
             alignment: Alignment) -> Cause | None:  # fmt: skip
    """Weights that are all numbers of a narrower type, and an error of the size that leaves."""
    weights = _weights(folded, _region(folded, alignment, first.value))
    if sum(np.count_nonzero(array) for array in weights) < FEW_WEIGHTS:
        return None
    plain = _weights(view, [view.producers[first.value]]) if norm is None else []
    for kind, name, most in NARROW:
        if first.error > most or not all(_fits(array, kind) for array in weights):
            continue
        if plain and all(_fits(array, kind) for array in plain):
            continue
        into = f"batch norm '{norm.name}' was folded into" if norm else f"'{first.node}' uses"
        sentence = f"the weights that {into} were rounded to {name}."
        return _cause(first, norm.name if norm else None, f"{name} weights", sentence)
    return None


def _fits(array: Array, kind: np.dtype[Any]) -> bool:
    with np.errstate(all="ignore"):
        return bool(np.all(array.astype(kind).astype(array.dtype) == array))


def _weights(view: View, nodes: Sequence[onnx.NodeProto]) -> list[Array]:
    """The float32 and float64 tensors that linear operators among these nodes multiply with."""
    held = [
        onnx.numpy_helper.to_array(view.initializers[name])
        for node in nodes
        if node.op_type in LINEAR
        for name in node.input[:2]
        if name in view.initializers
    ]
    return [array for array in held if array.dtype in (np.float32, np.float64)]


def _region(folded: View, alignment: Alignment, value: str) -> list[onnx.NodeProto]:
    """The nodes of the folded graph between a value's counterpart and the nearest other ones."""
    stops = set(alignment.there.values())
    pending = [alignment.there[value]]
    nodes: list[onnx.NodeProto] = []
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        node = folded.producers.get(name)
        if node is None or name in seen or (nodes and name in stops):
            continue
        seen.add(name)
        nodes.append(node)
        pending += folded.sources(node)
    return nodes


def _by_other_rows(first: Divergence, own: Norm | None, before: Float64Reference,
                   after: Float64Reference, inputs: Mapping[str, Array], alignment: Alignment,
                   limit: float) -> Cause | None:  # fmt: skip
    """A value that is another one when the first row runs alone, of the folded network only."""
    rows = {np.shape(array)[:1] for array in inputs.values()}
    if len(rows) != 1 or rows <= {(), (1,)}:
        return None
    alone = {name: array[:1] for name, array in inputs.items()}
    changes = []
    for reference, name in ((before, first.value), (after, alignment.there[first.value])):
        try:
            many, one = (reference.run(feeds, [name])[name] for feeds in (inputs, alone))
        except BnfoldError:
            return None
        changes.append(relative_error(many[:1], one))
    if not (changes[0] <= limit < changes[1] < np.inf):
        return None
    layer = own.name if own else None
    sentence = (
        f"what {f'batch norm {layer!r}' if layer else repr(first.node)} became depends on the other"
        f" rows of a batch (by {changes[1]:.2g} of its size): it normalizes by the statistics of"
        " the batch."
    )
    return _cause(first, layer, "statistics of the batch", sentence)


# --------------------------------------------------------------------------- other parameters


def _kept(sites: list[Site], opened: Iterable[Site | None]) -> Iterator[Site]:
    """The sites that there are, put into a list as they are opened: each costs a few runs."""
    for site in opened:
        if site is not None:
            sites.append(site)
            yield site


def _by_parameters(
    first: Divergence, sites: Iterable[Site], view: View, limit: float
) -> Cause | None:
    """The batch norm with other parameters that gives the wrong values, the nearest that does."""
    for site in sites:
        tried = [(site.left(case.result), case) for case in suppositions(site, view, limit)]
        good = [entry for entry in tried if entry[0] <= min(limit, site.error / EXPLAINED)]
        if good:
            return _simplest(first, site, good, limit)
    return None


def _simplest(
    first: Divergence, site: Site, good: Sequence[tuple[float, Supposition]], limit: float
) -> Cause:
    """Of the suppositions that explain a fault, that with the fewest numbers, and its equals."""
    best = min(left for left, _ in good)
    equal = [entry for entry in good if entry[0] <= AS_GOOD * best + limit / NOISE]
    numbers = min(len(case.figures) for _, case in equal)  # more numbers fit more
    simple = [entry for entry in equal if len(entry[1].figures) == numbers]
    left, told = simple[0]
    besides = tuple(dict.fromkeys(case.sentence for _, case in simple[1:]))
    sentence = told.sentence + "."
    if besides:
        sentence += f" The numbers do not tell it from this: {'; '.join(besides)}."
    return _cause(first, site.norm.name, told.fault, sentence, left, told.figures, besides)


def suppositions(site: Site, view: View, limit: float) -> Iterator[Supposition]:
    """The faults that are known, simple ones first."""
    yield from _left_out(site)
    yield from _of_all_channels(site)
    yield from _of_the_operator(site, view)
    yield from _of_few_channels(site, site.wrong_channels(limit))


def _left_out(site: Site) -> Iterator[Supposition]:
    """A parameter that was not used, or not as it should be; no number is solved for."""
    norm, p = site.norm, site.norm.parameters
    assert p is not None
    s, t = norm.slope, norm.shift
    was = f"batch norm '{norm.name}' was folded"
    one, zero = np.ones_like(s), np.zeros_like(s)
    with np.errstate(all="ignore"):
        bare = p["gamma"] / np.sqrt(p["var"])
        plain = 1 / np.sqrt(p["var"] + norm.eps)
        unrooted = p["gamma"] / (p["var"] + norm.eps)
        outside = p["gamma"] / (np.sqrt(p["var"]) + norm.eps)
    for fault, words, slope, shift in (
        ("eps dropped", f"without its eps ({norm.eps:.3g})", bare, p["beta"] - bare * p["mean"]),
        ("mean's sign", "with the sign of its mean flipped", s, p["beta"] + s * p["mean"]),
        ("mean left out", "without its mean", s, p["beta"]),
        ("beta left out", "without its beta", s, -s * p["mean"]),
        ("gamma left out", "without its gamma", plain, p["beta"] - plain * p["mean"]),
        ("root left out", "with its variance in the place of its standard deviation", unrooted,
         p["beta"] - unrooted * p["mean"]),
        ("eps outside the root", "with its eps added outside the square root", outside,
         p["beta"] - outside * p["mean"]),
        ("slope left out", "into the bias alone: the weights were not scaled", one, t),
        ("shift left out", "into the weights alone: the bias was not", s, zero),
        ("not folded", "into nothing: it was taken out as if it did nothing", one, zero),
        ("folded twice", "twice", s * s, s * t + t),
    ):  # fmt: skip
        yield Supposition(fault, f"{was} {words}", site.normalized(slope, shift))


def _of_all_channels(site: Site) -> Iterator[Supposition]:
    """One number for all channels, solved for from the slopes: another eps, another variance."""
    norm, p = site.norm, site.norm.parameters
    assert p is not None
    was = f"batch norm '{norm.name}' was folded"
    with np.errstate(all="ignore"):
        denominators = (p["gamma"] / site.slope) ** 2
        eps = denominators - p["var"]
        factors = (denominators - norm.eps) / p["var"]
        sensitive = 1 / (p["var"] + norm.eps)  # a slope tells eps by this much
        weights = np.abs(p["gamma"])
    for fault, number in (
        ("eps", _settled(eps, sensitive)), ("variance", _settled(factors, weights)),
    ):  # fmt: skip
        if number is None or (fault == "variance" and number <= 0):
            continue
        words = f"with eps {number:.3g} instead of {norm.eps:.3g}"
        if fault == "variance":
            words = f"with its variance times {number:.6g} (or its gamma times {number**-0.5:.6g})"
        var = p["var"] + number if fault == "eps" else p["var"] * number + norm.eps
        with np.errstate(all="ignore"):
            slope = p["gamma"] / np.sqrt(var)
        result = site.normalized(slope, p["beta"] - slope * p["mean"])
        figures = {fault if fault == "eps" else "factor": number}
        yield Supposition(fault, f"{was} {words}", result, figures)


def _settled(values: Array, weights: Array) -> float | None:
    """The median by weight of what the channels say; None where none says a finite number."""
    told = np.isfinite(values) & np.isfinite(weights) & (weights > 0)
    if not told.any():
        return None
    order = np.argsort(values[told])
    share = np.cumsum(weights[told][order])
    return float(values[told][order][np.searchsorted(share, share[-1] / 2)])


def _of_the_operator(site: Site, view: View) -> Iterator[Supposition]:
    """The weights and the bias of the operator in front: a factor, a bias forgotten or left."""
    if not site.place.own:
        return
    s, t = site.norm.slope, site.norm.shift
    bias = _bias(site.norm, view)
    was = f"batch norm '{site.norm.name}' was folded"
    if bias is not None and bias.shape == s.shape:
        for fault, words, shift in (
            ("bias not scaled", "the bias of the operator in front was not scaled",
             t + (1 - s) * bias),
            ("bias left out", "the bias of the operator in front was left out", t - s * bias),
        ):  # fmt: skip
            yield Supposition(fault, f"{was} and {words}", site.normalized(s, shift))
    with np.errstate(all="ignore"):
        k = _settled(site.slope / s, np.abs(s))
    if k is not None:
        held = bias if bias is not None and bias.shape == s.shape else np.zeros_like(s)
        for fault, words, shift in (
            ("weights scaled", f"and its weights are {k:.6g} times the right ones",
             t + (1 - k) * s * held),
            ("result scaled", f"and its result is {k:.6g} times the right one", k * t),
        ):  # fmt: skip
            result = site.normalized(k * s, shift)
            yield Supposition(fault, f"{was} {words}", result, {"factor": k})


def _bias(norm: Norm, view: View) -> Array | None:
    """The constants per channel that are added right in front of a batch norm."""
    node = view.producers.get(norm.input)
    if node is None or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "Add"):
        return None
    for name in node.input[2:] if node.op_type != "Add" else node.input:
        if name and view.is_constant(name):
            return np.ravel(view.constant(name).value)
    return None


def _of_few_channels(site: Site, wrong: Sequence[int]) -> Iterator[Supposition]:
    """One channel's number off, or two channels swapped."""
    norm, p = site.norm, site.norm.parameters
    assert p is not None
    was = f"batch norm '{norm.name}' was folded"
    if len(wrong) == 1:
        yield from _of_one_channel(site, wrong[0])
    if len(wrong) != 2:
        return
    a, b = wrong
    order = np.arange(len(norm.slope))
    order[[a, b]] = b, a
    figures = {"channel": a, "with": b}
    words = f"channels {a} and {b} of batch norm '{norm.name}' were swapped"
    yield Supposition("channels swapped", words, np.take(site.y, order, axis=1), figures)
    result = _with_rows_swapped(site, order)
    if result is not None:
        words = (
            f"the weights in front of batch norm '{norm.name}' were folded with channels {a} and"
        )
        yield Supposition("channels swapped", f"{words} {b} swapped", result, figures)
    both = f"of channels {a} and {b} swapped"
    result = site.normalized(norm.slope[order], norm.shift[order])
    yield Supposition("parameters swapped", f"{was} with the parameters {both}", result, figures)
    for key, plural in PLURALS.items():
        q = {**p, key: p[key][order]}
        with np.errstate(all="ignore"):
            slope = q["gamma"] / np.sqrt(q["var"] + norm.eps)
        result = site.normalized(slope, q["beta"] - slope * q["mean"])
        yield Supposition(f"{plural} swapped", f"{was} with the {plural} {both}", result, figures)


def _with_rows_swapped(site: Site, order: Array) -> Array | None:
    """The result if a grouped convolution's kernels were swapped, with their scales and biases."""
    x = site.input_with(order)
    if x is None:
        return None
    slope, shift = site.norm.slope[order], site.norm.shift[order]
    result: Array = site.along(slope) * x + site.along(shift)
    return result


def _of_one_channel(site: Site, channel: int) -> Iterator[Supposition]:
    norm, p = site.norm, site.norm.parameters
    assert p is not None
    was = f"batch norm '{norm.name}' was folded"
    with np.errstate(all="ignore"):
        factor = float(site.slope[channel] / norm.slope[channel])
    slope = norm.slope.copy()
    slope[channel] = site.slope[channel]
    gamma = float(p["gamma"][channel])
    same = f", or its variance times {factor**-2:.6g}" if factor else ""
    yield Supposition(
        "gamma", f"{was} with the gamma of channel {channel} times {factor:.6g} "
        f"({gamma * factor:.6g} instead of {gamma:.6g}){same}",
        site.normalized(slope, p["beta"] - slope * p["mean"]),
        {"channel": channel, "factor": factor},
    )  # fmt: skip
    shift = norm.shift.copy()
    shift[channel] = site.shift[channel]
    by = float(shift[channel] - norm.shift[channel])
    yield Supposition(
        "shift", f"{was} with the shift of channel {channel} off by {by:.3g} (its beta, its mean or"
        " a bias)", site.normalized(norm.slope, shift), {"channel": channel, "by": by},
    )  # fmt: skip
    yield Supposition(
        "slope", f"{was} with the slope of channel {channel} times {factor:.6g} and its shift off "
        f"by {by:.3g}", site.normalized(slope, shift),
        {"channel": channel, "factor": factor, "by": by},
    )  # fmt: skip


# ------------------------------------------------------------------------------- what is left


def _unknown(first: Divergence, own: Norm | None, sites: Sequence[Site]) -> Cause:
    """That nothing known explains it, with what was fitted."""
    if own is None:
        near = ", ".join(f"'{site.norm.name}'" for site in sites)
        sentence = f"what {first.op_type} '{first.node}' computes is wrong by itself"
        sentence += (
            f": no known fault of the batch norms behind it ({near}) gives that." * bool(near)
            or "; no batch norm was folded into it."
        )
        return _cause(first, None, "unknown", sentence)
    sentence = f"nothing known explains what batch norm '{own.name}' became."
    site = next((site for site in sites if site.norm is own), None)
    if site is not None:
        sentence = sentence[:-1] + f": {_fitted(site)}."
    return _cause(first, own.name, "unknown", sentence)


def _fitted(site: Site) -> str:
    with np.errstate(all="ignore"):
        factors = site.slope / site.norm.slope
        off = site.shift - site.norm.shift
    factors, off = factors[np.isfinite(factors)], off[np.isfinite(off)]
    if not len(factors) or not len(off):
        return "its slopes cannot be told"
    left = site.left(site.normalized(site.slope, site.shift))
    return (
        f"by channel, its slopes are {factors.min():.6g} to {factors.max():.6g} of the right ones,"
        f" its shifts off by up to {np.abs(off).max():.3g}, and {left:.2g} of its size is left"
    )


def _cause(first: Divergence, norm: str | None, fault: str, sentence: str,
           left: float | None = None, figures: Mapping[str, float] | None = None,
           besides: tuple[str, ...] = ()) -> Cause:  # fmt: skip
    return Cause(norm, first.value, first.node, first.error, fault, capital(sentence), left,
                 figures or {}, besides)  # fmt: skip
