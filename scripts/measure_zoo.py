"""The zoo folded: batch norms that stay, R, fold time and peak memory, beside the other tools.

    scripts/env-zoo
    .venv-zoo/bin/python scripts/measure_zoo.py [NAME ...]

Each network is exported once (scripts/zoo.py); each measurement is a process of its own with a time
limit, and its result a line of build/zoo/results.jsonl, so that a run that was stopped goes on
where it stopped; delete that file to measure afresh. With names, those networks are measured anew.
The table goes to docs/results/zoo.md.

Times are from file to file (read, plan, apply, write) within one process, one thread, the tools
in turn, median of ROUNDS after one round that warms up. Memory is the growth of a fresh process's
peak over what it needs once the tool is imported.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

FOLDER = ROOT / "build" / "zoo"
TABLE = ROOT / "docs" / "results" / "zoo.md"
FLOOR = 4 * 2.0**-24  # an original's error below this is luck, as in bnfold.proof
SECONDS = 1200  # for one measurement of one network
ROUNDS = 3
REPEATS = 3
OTHERS = ("onnxruntime", "onnxsim", "onnxslim", "onnxscript")
TOOLS = ("bnfold", *OTHERS)

Tool = Callable[[Path, Path], None]
Result = dict[str, Any]


# --- the tools, each from file to file -----------------------------------------------------------


def tool(name: str) -> Tool:
    """The tool of this name, imported and ready."""
    return {
        "bnfold": _bnfold,
        "onnxruntime": _onnxruntime,
        "onnxsim": _onnxsim,
        "onnxslim": _onnxslim,
        "onnxscript": _onnxscript,
    }[name]()


def _bnfold() -> Tool:
    from bnfold.folding.apply import apply
    from bnfold.folding.plan import plan
    from bnfold.graph import read_onnx, write_onnx

    return lambda source, target: write_onnx(apply(plan(read_onnx(source))).model, target)


def _onnxruntime() -> Tool:
    import onnxruntime

    def run(source: Path, target: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        # beyond "extended" the file would hold layouts for this machine alone
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(target)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    return run


def _onnxsim() -> Tool:
    import onnxsim

    def run(source: Path, target: Path) -> None:
        simplified, _ = onnxsim.simplify(str(source))
        onnx.save(simplified, target)

    return run


def _onnxslim() -> Tool:
    import onnxslim

    return lambda source, target: onnxslim.slim(str(source), str(target))


def _onnxscript() -> Tool:
    import onnx_ir as ir
    from onnxscript import optimizer

    def run(source: Path, target: Path) -> None:
        model = ir.load(source)
        optimizer.optimize(model)
        ir.save(model, target)

    return run


# --- one measurement, in a process of its own ----------------------------------------------------


def measure_fold(path: Path) -> Result:
    """What bnfold does with the network, and where its time goes (seconds, the best of three)."""
    from bnfold.folding.apply import apply
    from bnfold.folding.plan import plan
    from bnfold.folding.rules.repairs import REPAIRS
    from bnfold.graph import read_onnx, write_onnx

    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(REPEATS):
            at = [time.perf_counter()]
            model = read_onnx(path)
            at.append(time.perf_counter())
            planned = plan(model)
            at.append(time.perf_counter())
            folded = apply(planned)
            at.append(time.perf_counter())
            write_onnx(folded.model, Path(folder) / "folded.onnx")
            at.append(time.perf_counter())
            runs.append([b - a for a, b in pairwise(at)])
    repaired = plan(read_onnx(path), repairs=frozenset(REPAIRS))
    positive = plan(_all_positive(read_onnx(path)))
    return {
        "before": len(planned.removed) + len(planned.kept),
        "left": len(planned.kept),
        "left, repairs allowed": len(repaired.kept),
        "left, all gammas positive": len(positive.kept),
        "kept": _kept(planned),
        "kept, repairs allowed": _kept(repaired),
        "merged": len(planned.merged),
        "nodes": [sum(len(g) for g in m.graphs()) for m in (planned.model, folded.model)],
        "seconds": dict(zip(("read", "plan", "apply", "write"), min(runs, key=sum), strict=True)),
    }


def _kept(planned: Any) -> list[dict[str, str]]:
    return [
        {"name": kept.name, "reason": kept.reason, "around": _around(kept.node)}
        for kept in planned.kept
    ]


def _all_positive(model: Any) -> Any:
    """The model with |gamma| for every gamma, in place, and a small number for 0."""
    import onnx_ir as ir

    for graph in model.graphs():
        for node in graph:
            gamma = node.inputs[1] if node.op_type == "BatchNormalization" else None
            tensor = ir.convenience.get_const_tensor(gamma) if gamma is not None else None
            if tensor is not None and gamma.is_initializer():
                positive = np.maximum(np.abs(tensor.numpy()), np.float32(0.01))
                gamma.const_value = ir.Tensor(positive, name=gamma.name)
    return model


def measure_proof(path: Path) -> Result:
    """The three gates on the fold, and on the one with all repairs where that differs."""
    import bnfold
    from bnfold.folding.rules.repairs import REPAIRS

    folded, repaired = bnfold.fold(path), bnfold.fold(path, repair=tuple(REPAIRS))
    results = [_proof(folded)]
    if len(repaired.kept) < len(folded.kept):
        results.append(_proof(repaired))
    return {
        "r": results[0]["r"],
        "passed": all(result["passed"] for result in results),
        "failures": [failure for result in results for failure in result["failures"]],
        "notes": [note for result in results for note in result["notes"]],
        "repaired": results[1] if len(results) > 1 else None,
    }


def _proof(result: Any) -> Result:
    proof = result.verify()
    return {
        "r": proof.r,
        "passed": proof.passed,
        "failures": [f"{failure.gate}: {failure.sentence}" for failure in proof.failures][:3],
        "notes": list(proof.notes),
        "seconds": proof.seconds,
    }


def _around(norm: Any) -> str:
    """The operators before and behind a batch norm: 'Add(Conv, Relu) > BN > Relu, Conv'."""

    def source(value: Any, depth: int) -> str:
        node = value.producer()
        if node is None:
            return "input"
        data = [v for v in node.inputs if v is not None and not v.is_initializer()]
        inside = ", ".join(source(v, depth - 1) for v in data) if depth else ""
        return f"{node.op_type}({inside})" if inside else str(node.op_type)

    def readers(value: Any, depth: int) -> str:
        found = []
        for node in dict.fromkeys(user for user, _ in value.uses()):
            behind = readers(node.outputs[0], depth - 1) if depth else ""
            found.append(f"{node.op_type} > {behind}" if behind else str(node.op_type))
        text = "; ".join(dict.fromkeys(found))
        return f"[{text}]" if len(found) > 1 else text

    x, y = norm.inputs[0], norm.outputs[0]
    others = sorted({user.op_type for user, _ in x.uses() if user is not norm})
    also = f" (also read by {', '.join(others)})" if others else ""
    return f"{source(x, 2)}{also} > BN > {readers(y, 2) or 'output'}"


def measure_tools(path: Path) -> Result:
    """Every tool on the network: time, batch norms left, error beside the original's own."""
    jobs = {name: tool(name) for name in TOOLS}
    results: dict[str, Result] = {name: {} for name in TOOLS}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in TOOLS}
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(ROUNDS + 1):
            for name, job in jobs.items():
                # the two that the ratio is about are measured in every round, the others twice
                if "error" in results[name] or (round_ > 2 and name not in TOOLS[:2]):
                    continue
                target = Path(folder) / f"{name}.onnx"
                begun = time.perf_counter(), time.process_time()
                try:
                    job(path, target)
                except Exception as error:
                    results[name]["error"] = _sentence(error)
                if round_:
                    taken = time.perf_counter() - begun[0], time.process_time() - begun[1]
                    times[name].append(taken)
        for name, result in results.items():
            if "error" not in result:
                wall, processor = zip(*times[name], strict=True)
                result["seconds"] = statistics.median(wall)
                result["processor seconds"] = statistics.median(processor)
        ran = [name for name, result in results.items() if "error" not in result]
        own, judgements = judged(path, [Path(folder) / f"{name}.onnx" for name in ran])
        for name, judgement in zip(ran, judgements, strict=True):
            results[name] |= judgement
    return {"tools": results, "original error": own}


def judged(original: Path, made: Sequence[Path]) -> tuple[float, list[Result]]:
    """The original's own error, and for each file made of it the batch norms left and R.

    Errors are relative 2-norms against float64, on two normal draws, without further optimisation.
    """
    from bnfold.proof.exact.reference import Float64Reference
    from bnfold.proof.figures.draws import drawn_inputs

    model = onnx.load(original)
    reference = Float64Reference(model)
    feeds = dict(drawn_inputs(model, reference, seed=0, samples=2)[0].batches[0])
    exact = list(reference.run(feeds).values())
    own = _error(original, feeds, exact)
    results: list[Result] = []
    for path in made:
        try:
            norms = [n for n in _nodes(onnx.load(path)) if n.op_type == "BatchNormalization"]
            r = _error(path, feeds, exact) / max(own, FLOOR)
            results.append({"left": len(norms), "r": r})
        except Exception as error:
            results.append({"error": f"its model does not run: {_sentence(error)}"})
    return own, results


def _error(path: Path, feeds: Mapping[str, Any], exact: Sequence[Any]) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    got = session.run(None, dict(zip(names, feeds.values(), strict=True)))
    return max(
        float(np.linalg.norm((a - b).ravel()) / max(np.linalg.norm(b.ravel()), 1e-30))
        for a, b in zip(got, exact, strict=True)
    )


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    graphs, found = [model.graph.node, *(f.node for f in model.functions)], []
    while graphs:
        for node in graphs.pop():
            found.append(node)
            graphs += [a.g.node for a in node.attribute if a.HasField("g")]
            graphs += [g.node for a in node.attribute for g in a.graphs]
    return found


def measure_memory(path: Path, name: str) -> Result:
    """How far the peak memory of this process grows while the tool works, in MiB."""
    job = tool(name)
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        job(path, Path(folder) / "out.onnx")
        return {"MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# --- all of them ---------------------------------------------------------------------------------

MEASUREMENTS: Mapping[str, Callable[[Path], Result]] = {
    "fold": measure_fold,
    "proof": measure_proof,
    "tools": measure_tools,
    "memory bnfold": lambda path: measure_memory(path, "bnfold"),
    "memory onnxruntime": lambda path: measure_memory(path, "onnxruntime"),
}


def run_child(what: str, path: Path) -> Result:
    """One measurement in a process of its own; {"error": ...} if it fails."""
    command = [sys.executable, __file__, "--child", what, str(path)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {SECONDS} s"}
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit {run.returncode}: {last[:300]}"}
    result: Result = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def results_of(file: Path) -> dict[tuple[str, str, float], Result]:
    """The latest result of each network, measurement and (by its time) exported file."""
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {(line["name"], line["what"], line["file"]): line["result"] for line in lines}


def measure_all(folder: Path, wanted: Sequence[str]) -> None:
    """Measure what has not been measured yet; with names, those anew."""
    import zoo  # torch, which a measurement's own process does without

    file = folder / "results.jsonl"
    done = {} if wanted else results_of(file)
    for what in MEASUREMENTS:  # the quick ones first: an early picture of all networks
        for name in wanted or zoo.names():
            path = zoo.file_of(name, folder)
            key = (name, what, path.stat().st_mtime if path.exists() else 0.0)
            if key[2] and key not in done:
                result = run_child(what, path)
                line = dict(zip(("name", "what", "file"), key, strict=True)) | {"result": result}
                with file.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                shown = result.get("error") or result.get("left", "")
                print(name, what, shown, flush=True)


def write_table(folder: Path) -> None:
    """Everything measured so far, as a table in the documentation."""
    import zoo
    from zoo_table import table

    done = results_of(folder / "results.jsonl")
    facts, found = {}, {}
    for name in zoo.names():
        path = zoo.file_of(name, folder)
        file = path.with_suffix(".json")
        facts[name] = json.loads(file.read_text()) if file.exists() else {"error": "not tried yet"}
        when = path.stat().st_mtime if path.exists() else 0.0
        got = {what: done[name, what, when] for what in MEASUREMENTS if (name, what, when) in done}
        if "error" not in facts[name] and "fold" in got:
            found[name] = got
    TABLE.write_text(table(found, facts, ROUNDS))


def main() -> None:
    """Export what is missing, measure, write the table."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(MEASUREMENTS[sys.argv[2]](Path(sys.argv[3]))))
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[1:]
    subprocess.run([sys.executable, str(ROOT / "scripts" / "zoo.py"), str(FOLDER)], check=True)
    measure_all(FOLDER, wanted)
    write_table(FOLDER)


if __name__ == "__main__":
    main()
