"""The page of `gpu_check.py`: what was run, on what, and the figures of each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]

TITLE = "# bnfold on CUDA"
TORCH_ONLY = "# bnfold on CUDA, torch alone: onnxruntime's provider was not run"
REHEARSED = "# Rehearsal on a CPU: nothing here was run on CUDA"


def page(found: Found) -> str:
    """The results as Markdown."""
    steps = found["steps"]
    title = TORCH_ONLY if found["torch only"] else TITLE
    lines = [REHEARSED if found["rehearsal"] else title, "", *_about(found), ""]
    lines += ["## Steps", "", *_verdicts(steps, found["missing"]), ""]
    for title, kind, head, row in TABLES:
        rows = [
            r for name, step in steps.items() if name.split(":")[0] == kind for r in step["rows"]
        ]
        if rows:
            lines += [f"## {title}", "", *_table(head, map(row, rows)), ""]
    return "\n".join(lines)


def _about(found: Found) -> list[str]:
    facts = found["facts"]
    versions = {name: version for name, version in facts["versions"].items() if version}
    gpus = [", ".join(gpu.values()) for gpu in facts["machine"].get("gpus", [])]
    libraries = sorted({lib for step in found["steps"].values() for lib in step["libraries"]})
    cudnn = [library for library in libraries if library.startswith("libcudnn")]
    options = " --torch-only" * found["torch only"] + " --rehearse" * found["rehearsal"]
    by = f"scripts/gpu_check.py{options}"
    return [
        f"Made by `{by}` on {found['date']} in {found['seconds']} s.",
        "",
        f"- GPU and driver: {'; '.join(gpus) or 'none seen'}",
        f"- CPU: {facts['machine']['cpu']}, {facts['machine']['cores']} cores",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"- CUDA that torch and onnxruntime were built for: {facts['cuda']['torch'] or '-'},"
        f" {facts['cuda']['onnxruntime'] or '-'}",
        f"- libraries in the GPU's processes: {', '.join(libraries) or 'none'}",
        f"- cuDNN: {'in use' if cudnn else 'not in any process'}",
        *(f"- warning: {sentence}" for sentence in facts["conflicts"]),
        *([] if found["whole"] else ["- only some of the steps were asked for"]),
    ]


def _verdicts(steps: Mapping[str, Found], missing: Sequence[str]) -> list[str]:
    words = {True: "holds", False: "**FAILS**", None: "no verdict"}
    rows = [
        [name, words[step["passed"]], f"{step['seconds']:.0f}", step["sentence"]]
        for name, step in steps.items()
    ]
    rows += [[name, "not done", "", ""] for name in missing]
    return _table(("step", "", "s", ""), rows)


def _parity(row: Found) -> list[str]:
    nodes = ", ".join(f"{count} {provider}" for provider, count in row["nodes"].items())
    of = [row["network"], row["runtime"], row["of"]]
    return [*of, _number(row["ratio"]), _number(row["noise"]), nodes or "-"]


def _latency(row: Found) -> list[str]:
    if row["median_ms"] is None:
        return [row["network"], row["runtime"], str(row["batch"]), row["model"], "-", "-", "-"]
    low, high = row["ratio_quartiles"]
    where = [row["network"], row["runtime"], str(row["batch"]), row["model"]]
    ratio = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
    return [*where, f"{row['median_ms']:.3f}", ratio, row["verdict"]]


# title, kind of step, head, a row's cells
TABLES = (
    (
        "Parity: R, the error against float64 over that of the unfolded network on the CPU",
        "parity",
        ("network", "runtime", "of", "R", "noise between sessions", "nodes"),
        _parity,
    ),
    (
        "Planted faults",
        "planted",
        ("fault", "runtime", "found", "R"),
        lambda row: [
            row["fault"], row["runtime"], "yes" if row["found"] else "no", _number(row["ratio"])
        ],
    ),
    (
        "The GPU hidden",
        "silent CPU",
        ("bnfold", "exit code", "said"),
        lambda row: [row["asked"], str(row["exit"]), row["said"]],
    ),
    (
        "Adaptation: what statistics are off by against float64",
        "adaptation",
        ("by", "batch norms", "CPU", "there", "ratio"),
        lambda row: [
            row["by"], str(row["layers"]), *map(_number, (row["cpu"], row["there"], row["ratio"]))
        ],
    ),
    ("Tests marked gpu", "tests", ("",), lambda row: [row["test"]]),
    (
        "Latency: ratios are to the original, within a round (quartiles)",
        "latency",
        ("network", "runtime", "batch", "model", "ms", "ratio", "verdict"),
        _latency,
    ),
)  # fmt: skip


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
