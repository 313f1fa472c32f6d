"""The report as one page to look at: a file of its own that asks nothing of any network.

The page holds no script, and its first line forbids the browser to load anything. What comes from
a model is printable text before it gets here, and escaped where it is put in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Any

import jinja2
from markupsafe import Markup, escape

from bnfold.jsonable import plain
from bnfold.report import drawing
from bnfold.report.drawing import LinearAxis, LogAxis, Series
from bnfold.report.facts import all_printable, number
from bnfold.report.schema import schema_text
from bnfold.report.tables import figure, operators, widening
from bnfold.report.verdict import Verdict, verdict_of

Run = Mapping[str, Any]

MANY_NORMS = 48  # batch norms from which the list of the folded ones is closed at first
MANY_WEIGHTS = 24  # weights from which only those that changed most are shown at first
NO_DISTANCE = 1e-4  # a KL divergence that nobody needs to tell from 0
FAULTY = (
    16  # roundings that a layer may be off by in exact arithmetic: as proof/fault/divergence.py
)


def to_html(runs: Sequence[Run]) -> str:
    """One page for a run, or for several."""
    views = [_View.of(_complete(run), index) for index, run in enumerate(runs)]
    first = min(views, key=lambda view: view.verdict.rank)
    heat = _heat_map([domain for view in views for domain in view.domains])
    return _template().render(views=views, first=first, heat=heat, title=_title(views))


def _complete(run: Run) -> Run:
    """The run in printable text, None for each part that it does not have."""
    parts: dict[str, Any] = json.loads(schema_text())["$defs"]["run"]["properties"]
    told: dict[str, Any] = all_printable(plain(run))
    return dict.fromkeys(parts) | told


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bnfold.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"figure": _shown, "coded": _coded}
    environment.globals |= {"gauge": _gauge, "count_bars": drawing.count_bars}
    return environment.get_template("page.html")


def _title(views: Sequence[_View]) -> str:
    names = list(dict.fromkeys(view.model for view in views if view.model))
    said = " · ".join(dict.fromkeys(view.verdict.word for view in views))
    return f"{', '.join(names) or 'bnfold'}: {said}"


# --- what the template shows of a run -------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A run as the page shows it: the report itself, and what is drawn from it."""

    index: int
    run: Run
    verdict: Verdict
    model: str
    said: str
    brief: str
    runtimes: list[dict[str, Any]]
    places: list[str]
    profile: Mapping[str, Any] | None
    norms: Mapping[str, Any] | None
    operators: list[tuple[str, int, int]]
    weights: Mapping[str, Any] | None
    domains: list[dict[str, Any]]
    bench: Mapping[str, Any] | None

    @classmethod
    def of(cls, run: Run, index: int) -> _View:
        files = run.get("files") or ()
        verdict = verdict_of(run)
        return cls(
            index=index,
            run=run,
            verdict=verdict,
            model=PurePath(files[0]["path"]).name if files else "",
            said=_said(run).removeprefix(f"{verdict.word}. "),
            brief=_brief(run),
            runtimes=_runtimes(run),
            places=list(dict.fromkeys(r["name"].partition(",")[0] for r in _runtimes(run))),
            profile=_profile(run, verdict),
            norms=_norms(run),
            operators=_operators(run),
            weights=_weights(run),
            domains=[_domain(domain) for domain in run.get("domains") or ()],
            bench=_bench(run),
        )


def _said(run: Run) -> str:
    return str(run["error"]["message"] if run["summary"] is None else run["summary"])


def _coded(text: str) -> Markup:
    """A sentence whose words between `backticks` are code."""
    parts = enumerate(text.split("`"))
    tagged = [Markup("<code>{}</code>").format(p) if at % 2 else escape(p) for at, p in parts]
    return Markup("").join(tagged) if len(tagged) % 2 else escape(text)


def _brief(run: Run) -> str:
    """The first sentence about a run, with the domain and R that tell it from its like."""
    domains = ", ".join(domain["name"] for domain in run["domains"] or ())
    first = re.split(r"(?<=[.:]) ", _said(run))[0].rstrip(":")
    r = f" R = {_shown(run['proof']['r'])}." if run["proof"] else ""
    return f"{domains}: {first}{r}" if domains else f"{first}{r}"


def _shown(value: Any, digits: int = 3) -> str:
    """A figure as people write it: 2.78, 31,200, 5.96·10⁻⁸."""
    told = figure(value, digits)
    if "e" not in told:
        return told
    if 1 <= abs(number(value)) < 1e6:
        return f"{float(told):,.0f}"
    mantissa, _, power = told.partition("e")
    return f"{mantissa}·{drawing.raised(int(power))}"


def _between(middle: Any, pair: Sequence[Any] | None) -> str:
    """A median and its quartiles."""
    return _shown(middle) + (f" ({_shown(pair[0])} to {_shown(pair[1])})" if pair else "")


def _gauge(value: Any, limit: Any, passed: bool) -> Markup:
    return drawing.gauge(number(value), number(limit), passed=passed)


def _runtimes(run: Run) -> list[dict[str, Any]]:
    """Where the networks ran; of a report that says it in the proof alone, from there."""
    if run.get("runtimes"):
        return [dict(runtime) for runtime in run["runtimes"]]
    proof = run.get("proof") or {}
    noise = proof.get("noise") or {}
    return [
        {"name": name, "providers": placement, "noise": noise.get(name), "ratio": None}
        for name, placement in (proof.get("backends") or {}).items()
    ]


def _operators(run: Run) -> list[tuple[str, int, int]]:
    """(operator, before, after), those in front whose number changed most."""
    found = operators(run) if run["operators"] else []
    return sorted(found, key=lambda row: -abs(row[1] - row[2]))


# --- batch norms ----------------------------------------------------------------------------------


def _norms(run: Run) -> Mapping[str, Any] | None:
    """The batch norms, those that stay grouped by the reason without its names."""
    norms = run.get("batch_norms")
    if not norms or not (norms["folded"] or norms["kept"] or norms["absorbed"]):
        return None
    groups: dict[str, list[Any]] = {}
    for norm in norms["kept"]:
        groups.setdefault(_without_names(norm["reason"]), []).append(norm)
    folded, kept = len(norms["folded"]), len(norms["kept"])
    return {
        "folded": norms["folded"],
        "kept": kept,
        "absorbed": norms["absorbed"],
        "groups": sorted(groups.items(), key=lambda group: -len(group[1])),
        "share": folded / (folded + kept) if folded + kept else 1.0,
        "open": folded <= MANY_NORMS,
    }


def _without_names(reason: str) -> str:
    """A reason without the names and channels in it, which it shares with others then."""
    return re.sub(r" '[^']*'| \([^)]*\)", "", reason)


# --- error by layer -------------------------------------------------------------------------------


def _profile(run: Run, verdict: Verdict) -> Mapping[str, Any] | None:
    profile = run.get("profile")
    layers = profile["layers"] if profile else []
    if not layers:
        return None
    assert profile is not None
    names = [layer["norm"] for layer in layers]
    series = [
        Series(label, kind, [number(layer.get(kind)) for layer in layers])
        for label, kind in (
            ("the original, in its own type", "original"),
            ("the folded network, in its own type", "folded"),
            ("the folded network, in float64", "exact"),
        )
    ]
    unit = number(profile.get("unit"))
    at = _parting(run, verdict, layers, unit)
    hints = [
        f"{layer['norm']}\noriginal {_shown(layer.get('original'))}, folded"
        f" {_shown(layer.get('folded'))}, in float64 {_shown(layer.get('exact'))}"
        f" (ratio {_shown(layer.get('ratio'))})"
        for layer in layers
    ]
    chart = drawing.line_chart(
        names,
        series,
        hints=hints,
        marks={} if at is None else {at: f"first wrong: {names[at]}"},
        guides=[] if math.isnan(unit) else [(unit, "one rounding")],
        about=f"Error against the float64 reference at {len(names)} layers, logarithmic.",
    )
    ratios = [number(layer.get("ratio")) for layer in layers]
    known = [(ratio, name) for ratio, name in zip(ratios, names, strict=True) if ratio == ratio]
    return {
        "chart": chart,
        "series": series,
        "layers": layers,
        "inputs": profile.get("inputs"),
        "worst": max(known, default=None),
        "parting": None if at is None else names[at],
    }


def _parting(run: Run, verdict: Verdict, layers: Sequence[Run], unit: float) -> int | None:
    """The layer at which the two networks part, of a run that found that they do."""
    if verdict.kind != "bad":
        return None
    named = (run.get("cause") or {}).get("norm")
    for index, layer in enumerate(layers):
        if layer["norm"] == named or (not named and number(layer.get("exact")) > FAULTY * unit):
            return index
    return None


# --- weights --------------------------------------------------------------------------------------


def _weights(run: Run) -> Mapping[str, Any] | None:
    """The weights; of many those in front that the fold changed most."""
    weights = run["weights"]
    if not weights:
        return None
    factors = [widening(weight) for weight in weights]
    moved = [abs(math.log(factor)) if factor > 0 else 0.0 for factor in factors]
    few = sorted(range(len(weights)), key=lambda at: -moved[at])[: MANY_WEIGHTS * 2 // 3]
    front = set(few if len(weights) > MANY_WEIGHTS else range(len(weights)))
    shown = [weight for at, weight in enumerate(weights) if at in front]
    others = [weight for at, weight in enumerate(weights) if at not in front]
    widest = max(weights, key=widening)
    return {
        "shown": _ranges(shown),
        "others": _ranges(others),
        "widest": {"name": widest["name"], "widening": widening(widest)},
    }


def _ranges(weights: Sequence[Run]) -> Mapping[str, Any] | None:
    """Rows that share an axis."""
    sides = [[(kind, _reach(w[kind])) for kind in ("before", "after") if w[kind]] for w in weights]
    axis = LogAxis.of(value for row in sides for _, reach in row for value in reach)
    if axis is None:
        return None
    rows = [
        {**weight, "bars": drawing.range_bars(axis, row), "widening": widening(weight)}
        for weight, row in zip(weights, sides, strict=True)
    ]
    return {"scale": drawing.scale(axis), "rows": rows}


def _reach(side: Mapping[str, Any]) -> tuple[float, float, float]:
    """The largest |w| of the smallest channel, of the median one and of the largest."""
    largest = max(abs(number(side["min"])), abs(number(side["max"])))
    spread = number(side["spread"])
    return number(side["smallest"]), largest / spread if spread else 0.0, largest


# --- domains and latency --------------------------------------------------------------------------


def _domain(domain: Mapping[str, Any]) -> dict[str, Any]:
    layers = domain["layers"]
    names = [layer["name"] for layer in layers]
    lines = [
        Series(label, kind, [number(layer[f"kl_{kind}"]) for layer in layers])
        for label, kind in (("before", "before"), ("after", "after"))
    ]
    series = [line for line in lines if any(value == value for value in line.values)]
    hints = [
        f"{layer['name']}\nKL before {_shown(layer['kl_before'])}, after"
        f" {_shown(layer['kl_after'])}"
        for layer in layers
    ]
    return {
        "name": domain["name"],
        "layers": layers,
        "series": series,
        "chart": drawing.line_chart(
            names,
            series,
            hints=hints,
            marks={},
            floor=NO_DISTANCE,
            about=f"KL divergence at {len(names)} layers, logarithmic.",
        ),
    }


def _heat_map(domains: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Markup]]:
    """The page's domains beside each other, where there are several: (domain, when, its strip).

    Layers stand in the order of each domain; one colour means one distance.
    """
    lines = [(domain, line) for domain in domains for line in domain["series"]]
    axis = LogAxis.of(max(value, 10 * NO_DISTANCE) for _, line in lines for value in line.values)
    if len(domains) < 2 or axis is None:
        return []
    return [
        (
            domain["name"],
            line.label,
            _strip([layer["name"] for layer in domain["layers"]], line, axis),
        )
        for domain, line in lines
    ]


def _strip(names: Sequence[str], line: Series, axis: LogAxis) -> Markup:
    return drawing.heat_strip(names, line.values, axis, f"KL {line.label}")


def _bench(run: Run) -> Mapping[str, Any] | None:
    bench = run.get("bench")
    if not bench or not bench["rows"]:
        return None
    reaches = [
        number(value)
        for row in bench["rows"]
        for value in (row.get("ratio"), *(row.get("ratio_quartiles") or ()))
    ]
    known = [value for value in reaches if math.isfinite(value)]
    axis = LinearAxis(max([1.0, *known]) * 1.1)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in bench["rows"]:
        told = [row["runtime"], f"batch {row['batch']}" if row.get("batch") is not None else ""]
        threads = row.get("threads")
        told.append(f"{threads} thread{'s' * (threads != 1)}" if threads is not None else "")
        groups.setdefault(" · ".join(part for part in told if part), []).append(_timing(row, axis))
    return {**bench, "groups": groups, "scale": drawing.scale(axis)}


def _timing(row: Mapping[str, Any], axis: LinearAxis) -> dict[str, Any]:
    ratio, pair = number(row.get("ratio")), row.get("ratio_quartiles")
    said = _between(row.get("ratio"), pair)
    drawn = Markup("")
    if not math.isnan(ratio):
        reach = (number(pair[0]), number(pair[1])) if pair else (ratio, ratio)
        drawn = drawing.spread_dot(axis, ratio, reach, f"{row['model']}: {said} of the original")
    return {
        **row,
        "drawn": drawn,
        "ratio_said": said,
        "ms_said": _between(row.get("median_ms"), row.get("quartiles_ms")),
    }
