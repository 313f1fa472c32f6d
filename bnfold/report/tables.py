"""The report's parts as tables of words, which text, Markdown and HTML show alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnfold.report.facts import number

FEW = 5  # rows of a long table that a terminal shows unless asked for all
Rows = list[list[str]]


@dataclass(frozen=True)
class Table:
    """A titled table.

    brief: the rows that a terminal shows unless all are asked for; None: all of them.
    """

    title: str
    head: Sequence[str]
    rows: Rows
    brief: Rows | None = None


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Those of the parts that a report has, in the order of reading."""
    made = [table for key, make in _MAKERS.items() if report.get(key) for table in make(report)]
    return [table for table in made if table.rows]


def figure(value: Any, digits: int = 3) -> str:
    """A number in words."""
    if value is None:
        return "-"
    return f"{float(value):.{digits}g}"


def quartiles(middle: Any, pair: Sequence[Any] | None) -> str:
    """A median and its quartiles."""
    return figure(middle) + (f" ({figure(pair[0])} to {figure(pair[1])})" if pair else "")


def placed(providers: Mapping[str, Mapping[str, int]]) -> str:
    """How many nodes ran on each provider."""
    counts = {name: sum(nodes.values()) for name, nodes in providers.items()}
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "-"


def _batch_norms(report: Mapping[str, Any]) -> Iterator[Table]:
    norms = report["batch_norms"]
    stays = [[n["name"], "stays", n["reason"]] for n in norms["kept"]]
    gone = [[n["name"], "folded", ", ".join(n["into"]) or "-"] for n in norms["folded"]]
    head = ("batch norm", "", "into, or the reason why it stays")
    yield Table("Batch norms", head, gone + stays, brief=stays)


def _merged(report: Mapping[str, Any]) -> Iterator[Table]:
    rows = [[m["into"], ", ".join(m["layers"]) or "-", m["sum"]] for m in report["merged"]]
    yield Table("Merged", ("convolution", "took in", "and writes"), rows, brief=[])


def operators(report: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(operator, before, after), most frequent first."""
    before, after = report["operators"]["before"], report["operators"]["after"]
    names = sorted({*before, *after}, key=lambda n: (-before.get(n, 0), n))
    return [(name, before.get(name, 0), after.get(name, 0)) for name in names]


def _operators(report: Mapping[str, Any]) -> Iterator[Table]:
    rows = [[name, str(was), str(now)] for name, was, now in operators(report)]
    yield Table("Operators", ("operator", "before", "after"), rows, brief=[])


def _given(title: str, key: str) -> Callable[[Mapping[str, Any]], Iterator[Table]]:
    def make(report: Mapping[str, Any]) -> Iterator[Table]:
        head, rows = report[key]["head"], report[key]["rows"]
        wide = len(head)  # a row may be shorter, in a file from elsewhere
        yield Table(title, head, [[str(c) for c in (*row, *[""] * wide)][:wide] for row in rows])

    return make


def _proof(report: Mapping[str, Any]) -> Iterator[Table]:
    def row(gate: Mapping[str, Any], told: str) -> list[str]:
        return [gate["gate"], gate["subject"], "pass" if gate["passed"] else "FAIL", told]

    gates = report["gates"]
    head = ("gate", "of", "", "measured")
    full = [row(gate, gate["sentence"]) for gate in gates]
    short = [row(g, _measure(g) if g["passed"] else g["sentence"]) for g in gates]
    yield Table("Proof", head, full, brief=short)


def _measure(gate: Mapping[str, Any]) -> str:
    noise = re.search(r"noise [^;)]+", gate["sentence"])
    told = [f"limit {figure(gate['limit'])}", *([noise[0]] if noise else [])]
    return f"{gate['name']} {figure(gate['value'])} ({'; '.join(told)})"


def _runtimes(report: Mapping[str, Any]) -> Iterator[Table]:
    rows = [
        [
            r["name"] + (f", gate {r['gate']}" if r.get("gate") else ""),
            str(r.get("role") or "-"),
            figure(r.get("ratio")),
            figure(r.get("noise")),
            placed(r.get("providers") or {}),
            ", ".join(r.get("libraries") or ()) or "-",
        ]
        for r in report["runtimes"]
    ]
    head = ("runtime", "ran the", "R", "noise", "nodes by provider", "libraries")
    elsewhere = [set(r.get("providers") or ()) - {_CPU} for r in report["runtimes"]]
    brief = [row for row, other in zip(rows, elsewhere, strict=True) if other]
    yield Table("Runtimes", head, rows, brief=brief)


_CPU = "CPUExecutionProvider"  # where everything runs unless another is asked for


def _decisions(report: Mapping[str, Any]) -> Iterator[Table]:
    found = report["proof"].get("decisions") or ()
    rows = [[d["output"], d["backend"], *(str(d[k]) for k in _DECIDED)] for d in found]
    head = ("output", "on", "rows", "other class", "beyond rounding")
    yield Table("Decisions", head, rows, brief=[row for row in rows if row[-1] != "0"])


_DECIDED = ("rows", "flips", "outside")


def _cause(report: Mapping[str, Any]) -> Iterator[Table]:
    cause = report["cause"]
    rows = [[str(cause.get("norm") or "-"), str(cause.get("sentence") or "-")]]
    yield Table("Cause", ("batch norm", "what is wrong there"), rows)


def _profile(report: Mapping[str, Any]) -> Iterator[Table]:
    layers = report["profile"]["layers"]

    def rows(some: Sequence[Mapping[str, Any]]) -> Rows:
        keys = ("original", "folded", "exact", "ratio")
        return [[layer["norm"], *(figure(layer.get(key)) for key in keys)] for layer in some]

    head = ("at batch norm", "error before", "error after", "in exact arithmetic", "ratio")
    known = [layer for layer in layers if not math.isnan(number(layer.get("ratio")))]
    worst = sorted(known, key=lambda layer: -number(layer["ratio"]))[:FEW]
    short = [layer for layer in layers if any(layer is one for one in worst)]
    yield Table("Error by layer", head, rows(layers), brief=rows(short))


def _weights(report: Mapping[str, Any]) -> Iterator[Table]:
    rows = [[w["name"], *_range(w["before"]), *_range(w["after"])] for w in report["weights"]]
    head = ("weight", "range before", "spread", "range after", "spread")
    yield Table("Weights", head, rows, brief=[])


def widening(weight: Mapping[str, Any]) -> float:
    """How many times farther apart the channels are after than before."""
    before, after = weight["before"], weight["after"]
    if not before or not after or not number(before["spread"]):
        return 0.0
    return number(after["spread"]) / number(before["spread"])


def _range(side: Mapping[str, Any] | None) -> list[str]:
    if side is None:
        return ["-", "-"]
    return [f"{figure(side['min'])} to {figure(side['max'])}", figure(side["spread"])]


def _domains(report: Mapping[str, Any]) -> Iterator[Table]:
    rows = [
        [domain["name"], layer["name"], figure(layer["kl_before"]), figure(layer["kl_after"])]
        for domain in report["domains"]
        for layer in domain["layers"]
    ]
    head = ("domain", "layer", "KL before", "KL after")
    yield Table("Domains", head, rows, brief=[])


def _bench(report: Mapping[str, Any]) -> Iterator[Table]:
    rows = [
        [
            row["model"],
            row["runtime"],
            figure(row.get("batch")),
            figure(row.get("threads")),
            quartiles(row.get("median_ms"), row.get("quartiles_ms")),
            figure(row.get("throughput")),
            quartiles(row.get("ratio"), row.get("ratio_quartiles")),
            str(row.get("verdict") or "-"),
        ]
        for row in report["bench"]["rows"]
    ]
    head = ("model", "runtime", "batch", "threads", "ms (quartiles)", "samples/s")
    yield Table("Latency", (*head, "ratio (quartiles)", ""), rows)


def _files(report: Mapping[str, Any]) -> Iterator[Table]:
    rows = [[f["role"], f["path"], f.get("sha256", "")[:16]] for f in report["files"]]
    yield Table("Files", ("", "path", "sha256 (first 16)"), rows)


_MAKERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Table]]] = {
    "batch_norms": _batch_norms,
    "merged": _merged,
    "operators": _operators,
    "layers": _given("Layers", "layers"),
    "domains": _domains,
    "accuracy": _given("Accuracy", "accuracy"),
    "diagnostics": _given("Output", "diagnostics"),
    "weights": _weights,
    "bench": _bench,
    "profile": _profile,
    "runtimes": _runtimes,
    "proof": _decisions,
    "gates": _proof,
    "cause": _cause,
    "files": _files,
}
