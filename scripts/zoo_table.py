"""The results of the zoo as a table: one row per network, totals above, reasons below."""

from __future__ import annotations

import importlib.metadata
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Result = dict[str, Any]
Results = Mapping[str, Mapping[str, Result]]  # network -> measurement -> result
OTHERS = ("onnxruntime", "onnxsim", "onnxslim", "onnxscript")
WRONG = 4.0  # R above which a network is another one; bnfold.proof's own limit
CHAOTIC = 1e-4  # an original this far from float64 says little about small errors
FAR = 0.1  # an error that is no rounding even there
WRONG_IN_DOUBLE = 1e-6  # the same for networks that were compared in float64
PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxruntime-gpu", *OTHERS)

COLUMNS = (
    "network",
    "BN",
    "bnfold",
    "repaired",
    *OTHERS,
    "torch.fx",
    "gates",
    "R",
    "time",
    "memory",
)


def table(found: Results, facts: Mapping[str, Result], rounds: int) -> str:
    """The results as Markdown. facts: what the export of each network told."""
    parts: list[list[str]] = [
        ["# The zoo: published architectures, folded"],
        _about(rounds),
        _summary(found, facts),
        [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
        + [_row(name, got, facts[name]) for name, got in found.items()],
        ["## What stays with repairs, and why"],
        _reasons(found),
        ["## Not exported"],
        [f"- {name}: {fact['error']}" for name, fact in facts.items() if "error" in fact],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _about(rounds: int) -> list[str]:
    versions = []
    for package in dict.fromkeys(PACKAGES):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return [
        f"Printed by `scripts/measure_zoo.py` ({', '.join(versions)}).",
        "",
        "Random weights; gammas, betas and statistics as `scripts/zoo.py` describes (3 % of the",
        "gammas negative, 4 % near zero, in every fourth batch norm 2 % zero).",
        "",
        "- BN: batch norms in the exported graph; then how many each tool leaves. Repaired: bnfold",
        "  with `--repair all`. torch.fx: how many modules its `fuse` leaves.",
        "- Gates and R: `bnfold.verify`. A network that float32 itself cannot evaluate (ill",
        "  conditioned) proves nothing.",
        "- Time: read, plan, apply and write, file to file, over onnxruntime's offline",
        f"  optimisation of the same file, medians of {rounds} rounds, the tools in turn in one",
        "  process and thread. Memory: growth of a fresh process's peak, over onnxruntime's.",
    ]


def _row(name: str, got: Mapping[str, Result], facts: Result) -> str:
    fold, proof = got["fold"], got.get("proof", {})
    if "error" in fold:
        return f"| {name} | {facts['norms']} | crash: {fold['error'][:80]} |" + " |" * 10
    tools = _tools(got)
    cells = [name, *(str(fold[what]) for what in ("before", "left", "left, repairs allowed"))]
    cells += [_left(tools.get(other, {}), fold["before"]) for other in OTHERS]
    cells += [_left(facts["torch.fx"], facts["norms"]), _verdict(proof)]
    cells += [_figure(proof.get("r")), _figure(_time_ratio(got)), _figure(_memory_ratio(got))]
    return "| " + " | ".join(cells) + " |"


def _tools(got: Mapping[str, Result]) -> Mapping[str, Result]:
    measured = got.get("tools", {})
    own = measured.get("original error", 0.0)
    return {name: {**result, "own": own} for name, result in measured.get("tools", {}).items()}


def _left(result: Result, before: int) -> str:
    """How many batch norms a tool leaves, and whether its network is a wrong one."""
    if "error" in result:
        return "fails"
    wrong = " (wrong)" if _is_wrong(result) else ""
    return f"{min(result['left'], before)}{wrong}" if result else ""


def _is_wrong(result: Result) -> bool:
    if "difference" in result:
        return not result["difference"] <= WRONG_IN_DOUBLE
    r, own = result.get("r", 1.0), result.get("own", 0.0)
    if own > CHAOTIC:  # another order of sums is amplified as much as a fold
        return not r * own <= FAR
    return not r <= WRONG


def _is_ill(proof: Result) -> bool:
    return not proof.get("passed", True) and any(
        "the original's own output" in failure for failure in proof["failures"]
    )


def _breaks_the_algebra(proof: Result) -> bool:
    return any(failure.startswith("A:") for failure in proof.get("failures", ()))


def _verdict(proof: Result) -> str:
    if not proof:
        return ""
    if "error" in proof:
        return "crash"
    if _breaks_the_algebra(proof):
        return "WRONG"
    if _is_ill(proof):
        return "ill conditioned"
    return "pass" if proof["passed"] else "rounding"


def _time_ratio(got: Mapping[str, Result], which: str = "seconds") -> float | None:
    mine, theirs = (_tools(got).get(t, {}).get(which) for t in ("bnfold", "onnxruntime"))
    return mine / theirs if mine and theirs else None


def _processor_ratio(got: Mapping[str, Result]) -> float | None:
    return _time_ratio(got, "processor seconds")


def _memory_ratio(got: Mapping[str, Result]) -> float | None:
    mine, theirs = (got.get(f"memory {t}", {}).get("MiB") for t in ("bnfold", "onnxruntime"))
    return mine / theirs if mine and theirs else None


def _figure(value: float | None) -> str:
    return f"{value:.2f}" if value is not None and not math.isnan(value) else ""


def _summary(found: Results, facts: Mapping[str, Result]) -> list[str]:
    """Totals over the networks that were folded."""
    good = {name: got for name, got in found.items() if "error" not in got["fold"]}
    total = sum(got["fold"]["before"] for got in good.values())
    left = sum(got["fold"]["left"] for got in good.values())
    repaired = sum(got["fold"]["left, repairs allowed"] for got in good.values())
    positive = sum(got["fold"]["left, all gammas positive"] for got in good.values())
    lines = [
        f"- {len(good)} networks, {total} batch norms; bnfold removes {_share(total - left, total)}"
        f" ({left} stay), with `--repair all` {_share(total - repaired, total)} ({repaired} stay);"
        f" were all gammas positive, {positive} would stay without repairs.",
        *(_total_of(other, good) for other in OTHERS),
        _total_of_fx(good, facts),
        *_proved(found),
    ]
    for what, of in (
        ("Time", _time_ratio),
        ("Processor time", _processor_ratio),
        ("Peak memory", _memory_ratio),
    ):
        ratios = [ratio for got in good.values() if (ratio := of(got)) is not None]
        if ratios:
            lines.append(f"- {what} over onnxruntime's: {_spread(ratios)}.")
    return lines


def _total_of(other: str, good: Results) -> str:
    results = {n: _tools(got)[other] for n, got in good.items() if other in _tools(got)}
    ran = {name: result for name, result in results.items() if "error" not in result}
    before = {name: good[name]["fold"]["before"] for name in ran}
    total = sum(before.values())
    left = sum(min(result["left"], before[name]) for name, result in ran.items())
    mine = sum(good[name]["fold"]["left"] for name in ran)
    wrong = [name for name, result in ran.items() if _is_wrong(result)]
    return (
        f"- {other} removes {_share(total - left, total)} of {total} on {len(ran)} networks (bnfold"
        f" {_share(total - mine, total)} there); {len(results) - len(ran)} failures, {len(wrong)}"
        f" wrong{': ' if wrong else ''}{', '.join(wrong)}."
    )


def _total_of_fx(good: Results, facts: Mapping[str, Result]) -> str:
    fused = {name: facts[name]["torch.fx"] for name in good}
    ran = {name: result for name, result in fused.items() if "error" not in result}
    total = sum(facts[name]["norms"] for name in ran)
    left = sum(result["left"] for result in ran.values())
    return (
        f"- torch.fx fuse removes {_share(total - left, total)} of {total} on {len(ran)} networks;"
        f" {len(fused) - len(ran)} failures, {sum(map(_is_wrong, ran.values()))} wrong."
    )


def _proved(found: Results) -> list[str]:
    proofs = [got["proof"] for got in found.values() if "proof" in got]
    ran = [proof for proof in proofs if "error" not in proof]
    ill = sum(map(_is_ill, ran))
    crashes = len(proofs) - len(ran) + sum("error" in got["fold"] for got in found.values())
    wrong = sum(map(_breaks_the_algebra, ran))
    beyond = sum(not proof["passed"] for proof in ran) - ill - wrong
    fair = [proof["r"] for proof in ran if not math.isnan(proof["r"]) and not _is_ill(proof)]
    text = (
        f"- bnfold in {len(proofs)} proofs: {wrong} wrong (gate A), {crashes} crashes,"
        f" {beyond} beyond a limit of rounding (gates B, C), {ill} too ill conditioned in float32"
        " to be judged."
    )
    return [text, *([f"- R of the others: {_spread(fair)}."] if fair else [])]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def _spread(values: Sequence[float]) -> str:
    values = sorted(values)
    tenth = values[int(0.9 * (len(values) - 1))]
    return f"median {statistics.median(values):.2f}, p90 {tenth:.2f}, max {values[-1]:.2f}"


def _reasons(found: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """The reasons without their names, most frequent first, with the commonest surroundings."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, got in found.items():
        for kept in got["fold"].get("kept, repairs allowed", []):
            groups.setdefault(_without_names(kept["reason"]), []).append((name, kept["around"]))
    lines = []
    for reason, cases in sorted(groups.items(), key=lambda item: -len(item[1])):
        networks = Counter(name for name, _ in cases)
        around, _ = Counter(around for _, around in cases).most_common(1)[0]
        where = ", ".join(f"{name} ({count})" for name, count in networks.most_common(6))
        lines.append(f"- {len(cases)}: {reason}. In {where}. Such as `{around}`")
    return lines


def _without_names(reason: str) -> str:
    reason = re.sub(r" \(channels? [^)]*\)", "", re.sub(r"'[^']*'", "·", reason))
    return re.sub(r"\b\d+\b", "N", reason)
