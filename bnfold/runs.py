"""What the API gave, as runs of the report: the dictionary that every face shows (report/).

    fold = bnfold.fold("net.onnx")
    run = bnfold.report_of("fold", fold=fold, proof=fold.verify(), files={"model": "net.onnx"})
    bnfold.write_report("release.html", run)

The verbs fill their reports with the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold import report
from bnfold.errors import VerificationError
from bnfold.outputs import add_file
from bnfold.weight_ranges import weight_ranges

if TYPE_CHECKING:
    from bnfold.adapting.adapt import AdaptResult, LayerShift
    from bnfold.api import FoldResult
    from bnfold.benchmark.bench import BenchReport
    from bnfold.proof.result import VerifyReport

Run = dict[str, Any]


def report_of(
    command: str,
    *,
    fold: FoldResult | None = None,
    proof: VerifyReport | None = None,
    adapted: Mapping[str, AdaptResult] | None = None,
    bench: BenchReport | None = None,
    files: Mapping[str, Path | str] | None = None,
) -> Run:
    """One run with all that is given; plain values, as schema.json says.

    command: the run's name. adapted: results by the names of their domains. files: paths by role,
    which the run names with their SHA-256 sums. The exit code is 1 where a proof failed, also that
    of what was timed.
    """
    run = begun(command, fold.notes if fold is not None else ())
    for role, path in (files or {}).items():
        add_file(run, role, Path(path))
    if fold is not None:
        add_fold(run, fold)
        run["summary"] = fold_sentence(fold)
    for name, result in (adapted or {}).items():
        run.setdefault("domains", []).append(domain_of(name, result.layers))
        run.setdefault("warnings", []).extend(f"{name}: {warning}" for warning in result.warnings)
        run["summary"] += f" {name}: {adapted_sentence(result)}"
    if proof is not None:
        add_proof(run, proof, is_fold=fold is not None)
    if bench is not None:
        run["bench"] = bench.to_dict()
        run["notes"] += bench.notes
        faults = [f"{name}: {fault}" for name, fault in bench.faults.items()]
        run.setdefault("warnings", []).extend(faults)
        run["summary"] += f" {bench_sentence(bench)}"
        run["exit_code"] = run["exit_code"] or int(not bench.passed)
    run["summary"] = run["summary"].strip() or f"{command}: done."
    if run["exit_code"]:
        run["error"] = VerificationError(run["summary"]).to_dict()
    return run


def write_report(path: Path | str, runs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Write one run or several on one page, as the suffix says: .html, .md, .xml, .json or .txt.

    Raises UsageError for another suffix, or where it cannot be written.
    """
    path = Path(path)
    report.check_face("the report", path)
    report.write_text(path, report.render(runs, path))


# -------------------------------------------------------------------------- what the verbs share


def begun(command: str, notes: Sequence[str] = ()) -> Run:
    """A run of which nothing is known yet."""
    return {
        "schema": report.SCHEMA,
        "command": command,
        "versions": report.versions(),
        "files": [],
        "notes": list(notes),
        "summary": "",
        "exit_code": 0,
    }


def counted(count: int, what: str) -> str:
    """A number of things in words."""
    return f"{count} {what}{'s' * (count != 1)}"


def add_proof(done: Run, proof: VerifyReport, *, is_fold: bool = True) -> None:
    """The gates in a report, its verdict and its exit code."""
    found = proof.to_dict()
    done["gates"] = found.pop("gates")
    done["runtimes"] = found.pop("runtimes")
    for part in ("cause", "profile"):
        if found[part] is not None:
            done[part] = found.pop(part)
        else:
            del found[part]
    done["proof"] = found
    done["exit_code"] = 0 if proof.passed else 1
    algebra = proof.certificate is not None  # else gate A holds what it sees without the plan
    if is_fold and not algebra:
        done.setdefault("warnings", []).append(
            "Gate A, the algebra, was not checked node by node: that needs the record that `bnfold"
            " fold` wrote, and weights of the original's type."
        )
    done.setdefault("warnings", []).extend(found.pop("warnings"))
    if proof.passed:
        names = sorted({gate["gate"] for gate in done["gates"]} - ({"A"} if not algebra else set()))
        done["summary"] += (
            f" Proved by gate{'s' * (len(names) > 1)} {', '.join(names)}: R = {proof.r:.2f} (limit"
            f" {proof.limit:g}; {proof.samples} samples, seed {proof.seed})."
        )
    elif _undecided(done["gates"]):
        done["summary"] += " NOT proved: the original's own float32 error leaves no room to judge."
    else:
        done["summary"] += f" NOT the same function. {_why(proof)}"
    done["summary"] = done["summary"].strip()


def _why(proof: VerifyReport) -> str:
    """Where the two part, as far as that was found; else the first check that failed."""
    if proof.fault is not None and (proof.fault.first is not None or proof.fault.cause is not None):
        return proof.fault.sentence
    return proof.failures[0].sentence if proof.failures else ""


def _undecided(gates: list[Run]) -> bool:
    """True where the algebra holds and the original is no measure for the numbers."""
    failed = [gate for gate in gates if not gate["passed"]]
    return any(gate["name"] == "original" for gate in failed) and not any(
        gate["gate"] == "A" for gate in failed
    )


def add_fold(done: Run, result: Any) -> None:
    """What became of each batch norm, the operators and the weights' ranges."""
    from bnfold.api import count_operators

    done["batch_norms"] = {
        "folded": [{"name": norm.name, "into": list(norm.into)} for norm in result.folded],
        "kept": [{"name": norm.name, "reason": norm.reason} for norm in result.kept],
        "absorbed": list(result.absorbed),
    }
    done["merged"] = [
        {"sum": merged.name, "into": merged.into, "layers": list(merged.layers)}
        for merged in result.merged
    ]
    done["operators"] = {
        "before": count_operators(result.original),
        "after": count_operators(result.graph),
    }
    done["weights"] = weight_ranges(result.original, result.graph)


def besides(result: Any) -> str:
    """What became of a network besides its batch norms, a sentence each."""
    weights, others, sums = len(result.source.computed), len(result.absorbed), len(result.merged)
    text = ""
    if weights:
        text += f" {counted(weights, 'layer')} with computed weights hold them as plain ones now."
    if others:
        text += f" {others} Mul, Add, Sub or Div by constants went too."
    if sums:
        text += f" {counted(sums, 'convolution')} took in what stood around."
    return text


def fold_sentence(result: Any) -> str:
    """How many batch norms folded, and what else happened."""
    folded, producer = len(result.folded), result.original.producer_name
    found = folded + len(result.kept)
    more = besides(result)
    if found == 0 and result.source.computed:
        return f"There is no batch norm in the network.{more}"
    if found == 0:
        hint = " (torch's exporter folds by itself unless optimize=False)"
        return f"There is no batch norm in the model{hint * (producer == 'pytorch')}.{more}"
    if folded == found:
        return (
            f"All {counted(found, 'batch norm')} folded.{more}"
            if found > 1
            else f"The batch norm folded.{more}"
        )
    text = (
        f"{folded} of {counted(found, 'batch norm')} folded; each of the others has its reason."
        f"{more}"
    )
    if any("--freeze-inputs" in kept.reason for kept in result.kept):
        text += " Pass --freeze-inputs if nobody overrides the weights as inputs."
    return text


def domain_of(name: str, layers: Sequence[LayerShift]) -> Run:
    """How far each layer was from the target before and after, by the domain's name."""
    rows = [
        {"name": layer.name, "kl_before": layer.kl_before, "kl_after": layer.kl_after}
        for layer in layers
    ]
    return {"name": name, "layers": rows}


def adapted_sentence(result: AdaptResult) -> str:
    """How many batch norms were adapted to how many images."""
    return (
        f"{counted(len(result.layers), 'batch norm')} adapted to {counted(result.images, 'image')}"
        f" ({result.method})."
    )


def bench_sentence(result: BenchReport) -> str:
    """A clause for each model that was to be timed, on each runtime and batch."""
    from bnfold.benchmark.bench import CONTROL, ORIGINAL, UNOPTIMIZED

    clauses = []
    for row in result.rows:
        if row.model not in (ORIGINAL, CONTROL, UNOPTIMIZED):
            figure = "" if row.ratio is None else f" ({row.ratio:.2f} of the original's time)"
            where = f"{row.model} on {row.runtime}, batch {row.batch}"
            clauses.append(f"{where}: {row.verdict}{figure}.")
    return " ".join(clauses)
