"""The limits of the proof, calibrated: R of right folds and of planted faults on many networks.

    scripts/env-zoo
    .venv-zoo/bin/python scripts/calibrate_thresholds.py [--page-only] [--right] [NAME ...]

Networks: the small ones of the zoo (scripts/zoo.py, exported into build/zoo) and every file of
models/. Each network is folded by bnfold (float64, rounded once) and by tools that compute in
float32; then the faults of tests/planted.py are planted at its first, middle and last batch norm,
in the channel whose gamma is the median one, and for a single gamma in one of the weakest tenth as
well. Of every pair gates A and B are asked, with the record where there is one, and what the
weights alone say (`bnfold.proof.algebra.plain`). A right fold with R beyond SUSPECT is evaluated in
float64 as well: what is left of R then is the weights' rounding. --right: right folds only.

Each network is a process of its own with a time limit; a result is a line of
build/thresholds/results.jsonl, so that a run that was stopped goes on where it stopped. The page
goes to docs/results/thresholds.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

from bnfold.proof.algebra.plain import read_plain_fold  # noqa: E402
from bnfold.proof.exact.counterpart import View  # noqa: E402
from bnfold.proof.exact.reference import Float64Reference  # noqa: E402
from bnfold.proof.figures.draws import drawn_inputs  # noqa: E402
from bnfold.proof.places.runtime import open_session  # noqa: E402

ZOO = ROOT / "build" / "zoo"
RESULTS = ROOT / "build" / "thresholds" / "results.jsonl"
PAGE = ROOT / "docs" / "results" / "thresholds.md"
SECONDS = 900  # for one network, on a busy machine
SAMPLES = 4
SUSPECT = 2.0
FEWEST = 30  # right folds that a page needs
LIMITS = (2.0, 4.0, 10.0, 30.0)

# small ones of many families: a network takes a minute
ZOO_NAMES = (
    *(
        f"torchvision:{name}"
        for name in (
            "resnet18",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "mnasnet0_5",
            "shufflenet_v2_x1_0",
            "efficientnet_b0",
            "googlenet",
            "densenet121",
            "segmentation.lraspp_mobilenet_v3_large",
        )
    ),
    "models:preact_resnet18",
    *(
        f"timm:{name}"
        for name in (
            "lcnet_050",
            "mobilevit_xxs",
            "mobilevitv2_050",
            "repghostnet_050",
            "regnetx_002",
            "regnety_002",
            "starnet_s1",
            "cs3darknet_s",
            "efficientvit_b0",
            "swiftformer_xs",
            "fasternet_t0",
            "mobilenetv4_conv_small",
            "inception_next_atto",
            "mixnet_s",
            "mobileone_s1",
            "rexnet_100",
            "ghostnet_100",
            "hardcorenas_a",
            "tf_efficientnet_b0",
            "fbnetc_100",
            "hgnetv2_b0",
            "ese_vovnet19b_dw",
            "gernet_s",
            "repvit_m0_9",
            "resnest14d",
            "skresnet18",
            "lambda_resnet26t",
            "levit_128s",
            "visformer_tiny",
            "efficientformerv2_s0",
        )
    ),
)
# onnxsim and onnxslim write the same weights as onnxruntime, bit for bit
IN_FLOAT32 = ("onnxruntime", "onnxscript")

Result = dict[str, Any]


# --- the networks --------------------------------------------------------------------------------


def names() -> list[str]:
    """All networks: LIBRARY:NAME of the zoo, digits:NAME of models/."""
    from digit_tasks import TASKS

    own = [f"digits:{name}" for name in TASKS]
    return [name for pair in zip(own, ZOO_NAMES, strict=False) for name in pair] + list(
        ZOO_NAMES[len(own) :]
    )


def model_of(name: str) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The original with batch norms in place, and the repairs without which some would stay."""
    library, _, short = name.partition(":")
    if library != "digits":
        import zoo

        return onnx.load(str(zoo.file_of(name, ZOO))), ()
    import torch
    from digit_tasks import TASKS, trained

    import bnfold
    from bnfold.graph import to_proto

    task = TASKS[short]
    torch.set_num_threads(1)
    network = trained(task, "batch", samples=512, epochs=4)
    return to_proto(bnfold.export(network, task.data().test.x[:2])), task.repair


# --- one network, in a process of its own --------------------------------------------------------


def measure(name: str, done: Mapping[str, Result], *, only_right: bool) -> Iterator[Result]:
    """The network's cases that are not done yet, one after another.

    done: by title. Where gate B found nothing and the weights were not asked, they are.
    """
    from planted import FAULTS, Bed, norms_of

    original, repair = model_of(name)
    bed = Bed(original, repair)
    held = Pair(original)
    known = {title for title, line in done.items() if "weights" in line or not line.get("B")}
    gone = bed.outputs

    def case(title: str, make: Callable[[], tuple[onnx.ModelProto, Any]], **about: Any) -> Result:
        line = {"network": name, "case": title, **about}
        try:
            folded, record = make()
            if title in done:
                return done[title] | held.weights(folded)
            line |= held.against(folded, record)
            if line["kind"] != "fault" and line["R"] > SUSPECT:
                line["exact"] = exact_ratio(original, folded)
            return line
        except Exception as error:
            return line | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}

    if "right" not in known:
        about = {"kind": "right", "norms": len(gone)}
        yield case("right", lambda: (bed.folded, bed.right.record), **about)
    for tool in IN_FLOAT32:
        if tool not in known:
            yield case(tool, lambda tool=tool: (by_tool(tool, original), None), kind="float32")
    if only_right:
        return
    by_output = {norm.node.output[0]: norm for norm in norms_of(original)}
    places = {"first": gone[:1], "middle": gone[len(gone) // 2 :][:1], "last": gone[-1:]}
    for place, (output,) in ((place, found) for place, found in places.items() if found):
        weakest = np.argsort(np.abs(by_output[output].read(1)))
        channels = {"median": len(weakest) // 2, "weak": len(weakest) // 10}
        for fault in FAULTS:
            if place != "first" and fault == "float16 weights":
                continue  # it is in all of them
            for which in channels if "one gamma" in fault else ("median",):
                title = f"{fault}, {place}, {which}"
                if title in known:
                    continue
                channel = int(weakest[channels[which]])

                def plant(
                    fault: str = fault, output: str = output, channel: int = channel
                ) -> tuple[onnx.ModelProto, Any]:
                    wrong = bed.plant(fault, output, channel)
                    return wrong.folded, wrong.record

                yield case(
                    title, plant, kind="fault", fault=fault, place=place, channel=which,
                    channels=len(weakest),
                )  # fmt: skip


class Pair:
    """The original, and what each folded model held against it comes to."""

    def __init__(self, original: onnx.ModelProto) -> None:
        self.original = original

    def against(self, folded: onnx.ModelProto, record: Any) -> Result:
        """What `verify` says, and the figures that it says it by."""
        from bnfold.proof import verify

        nowhere = SimpleNamespace(first=None, kind="", sentence="", cause=None)
        with (  # where a fault lies is not asked here: that takes longer than the proof
            mock.patch.object(verify, "_find", return_value=nowhere),
            mock.patch.object(verify, "_profile", return_value=(None, ())),
        ):
            report = verify.verify(
                self.original,
                folded,
                gauges=record.gauges if record else None,
                aliases=record.aliases if record else None,
                samples=SAMPLES,
                threads=1,
            )
        channel = [g.value for g in report.gates if g.gate == "B" and g.name == "channel"]
        figures = {kind: [g for g in report.gates if g.gate == kind] for kind in "AB"}
        element = [g.value for g in figures["B"] if g.name == "largest element"]
        unreliable = [g.value for g in figures["B"] if g.name in ("original", "not run")]
        return {
            "R": report.r,
            "element": max(element, default=math.nan),
            "channel": max(channel, default=math.nan),
            **self.weights(folded),
            "A": all(g.passed for g in figures["A"]) if record and figures["A"] else None,
            "roundings": max((g.value for g in figures["A"]), default=math.nan),
            "B": all(g.passed for g in figures["B"]),
            "ill conditioned": unreliable[0] if unreliable else None,
            "passed": report.passed,
            "seconds": report.seconds,
        }

    def weights(self, folded: onnx.ModelProto) -> Result:
        """What the weights alone say, as those of a plain fold."""
        found = read_plain_fold(View.of(self.original), View.of(folded))
        return {
            "weights": None if found is None else "FAIL" if found.wrong else "pass",
            "weights, roundings": math.nan if found is None else found.roundings,
        }


def exact_ratio(original: onnx.ModelProto, folded: onnx.ModelProto) -> float:
    """R with the folded network in float64: its error over the original's in float32."""
    before, after = Float64Reference(original), Float64Reference(folded)
    session = open_session(original, "cpu", optimize=False, threads=1)
    worst = usual = 0.0
    for group in drawn_inputs(original, before, seed=0, samples=SAMPLES):
        errors = np.zeros(2)
        size = 0.0
        for feeds in group.batches:
            exact, runs = before.run(feeds), (session.run(feeds), after.run(feeds))
            size += sum(float(np.sum(y**2)) for y in exact.values())
            errors += [sum(float(np.sum((run[k] - y) ** 2)) for k, y in exact.items())
                       for run in runs]  # fmt: skip
        own, kept = np.sqrt(errors / size)
        usual = usual or own  # normal draws come first
        worst = max(worst, kept / max(own, usual, 4 * 2.0**-24))
    return worst


def by_tool(tool: str, original: onnx.ModelProto) -> onnx.ModelProto:
    """The original with its batch norms folded by another tool, which computes in float32."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        onnx.save(original, source)
        TOOLS[tool](source, target)
        folded = onnx.load(str(target))
    norms = [n.op_type for n in folded.graph.node].count("BatchNormalization")
    if norms == [n.op_type for n in original.graph.node].count("BatchNormalization"):
        raise ValueError("no batch norm was folded")
    return folded


def _by_onnxruntime(source: Path, target: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # beyond "basic" there are operators of its own, which have no float64 reference
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _by_onnxscript(source: Path, target: Path) -> None:
    import onnx_ir as ir
    from onnxscript import optimizer

    model = ir.load(source)
    optimizer.optimize(model)
    ir.save(model, target)


TOOLS: Mapping[str, Callable[[Path, Path], None]] = {
    "onnxruntime": _by_onnxruntime,
    "onnxscript": _by_onnxscript,
}


# --- all of them ---------------------------------------------------------------------------------


def results() -> list[Result]:
    """Every line that was written; the latest of each case."""
    if not RESULTS.exists():
        return []
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return list({(line["network"], line["case"]): line for line in lines}.values())


def measure_all(wanted: Sequence[str], *, only_right: bool) -> None:
    """Each network in a process of its own; what it prints is kept as it comes."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        known = [line["case"] for line in results() if line["network"] == name]
        if "end" in known or (only_right and {"right", *IN_FLOAT32} <= set(known)):
            continue
        command = [sys.executable, __file__, "--child", name, *(["--right"] if only_right else [])]
        with RESULTS.open("a") as out, tempfile.TemporaryFile() as noise:
            try:
                run = subprocess.run(
                    command, stdout=out, stderr=noise, timeout=SECONDS, check=False
                )
                end = f"exit {run.returncode}" if run.returncode else ""
            except subprocess.TimeoutExpired:
                end = f"stopped after {SECONDS} s"
            if end.startswith("exit"):
                noise.seek(0)
                end += f": {noise.read().decode(errors='replace').strip().splitlines()[-1:]}"
        with RESULTS.open("a") as out:
            out.write(
                json.dumps({"network": name, "case": "end", "kind": "end", "note": end}) + "\n"
            )
        print(name, end or "done", flush=True)


# --- the page ------------------------------------------------------------------------------------


def finite(lines: Iterable[Result], key: str) -> list[float]:
    """The figures of the lines that have one."""
    return sorted(float(line[key]) for line in lines if key in line and not math.isnan(line[key]))


def quantiles(values: Sequence[float], shares: Sequence[float]) -> list[str]:
    """At these shares, three digits."""
    return [f"{np.quantile(values, share):.3g}" if values else "" for share in shares]


def page(lines: list[Result]) -> str:
    """The tables."""
    asked = [line for line in lines if line["kind"] != "float32" or line["case"] in IN_FLOAT32]
    sound = [line for line in asked if line["kind"] != "end" and "error" not in line]
    judged = [line for line in sound if line["ill conditioned"] is None]
    networks = sorted({line["network"] for line in judged})
    if (folds := sum(line["kind"] == "right" for line in judged)) < FEWEST:
        raise SystemExit(
            f"{folds} right folds are judged, and {FEWEST} needed; no page is written."
        )
    parts = [ABOUT.format(script=Path(__file__).name, versions=versions(), samples=SAMPLES)]
    kinds = {kind: {line["network"] for line in judged if line["kind"] == kind}
             for kind in ("right", "float32", "fault")}  # fmt: skip
    parts.append(
        f"{len(networks)} networks judged, {len(sound)} pairs: right folds of bnfold on "
        f"{len(kinds['right'])}, of the float32 tools on {len(kinds['float32'])}, faults on "
        f"{len(kinds['fault'])}. The script knows {len(names())}; the rest was not measured."
    )
    parts.append("## Right folds\n\n" + right_table(judged))
    parts.append("## Planted faults\n\n" + fault_table(judged))
    parts.append("## What each limit would decide\n\n" + limit_table(judged))
    parts.append("## Right folds above 4, and faults below\n\n" + odd_ones(judged))
    parts.append("## Not judged\n\n" + not_judged(asked))
    parts.append("## Each network\n\n" + network_table(judged, networks))
    return "\n\n".join(parts) + "\n"


ABOUT = """# The proof's limits, calibrated

Printed by `scripts/{script}` ({versions}); {samples} rows of normal draws, besides the other kinds
of input that `verify` draws. R is the worst of an output over all kinds of input: the folded
network's error over the original's, both against float64. "element" is the largest error of one
element over the original's largest, "channel" the same within one channel; "weights" is what the
weights say of the two files alone."""


def versions() -> str:
    """Of what was measured with."""
    found = []
    for package in ("onnxruntime-gpu", "onnxruntime", "onnx", "torch", "onnxscript"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def right_table(lines: Sequence[Result]) -> str:
    """Distribution of R and of the element ratio, float64 folds and float32 folds."""
    head = "| folded by | pairs | figure | median | 90 % | 99 % | largest | above 4 | above 10 |\n"
    rows = [head + "|" + " --- |" * 9]
    groups = {"bnfold (float64)": [line for line in lines if line["kind"] == "right"]}
    for tool in IN_FLOAT32:
        groups[f"{tool} (float32)"] = [line for line in lines if line["case"] == tool]
    for title, group in groups.items():
        for figure in ("R", "element", "channel", "weights, roundings"):
            values = finite(group, figure)
            cells = quantiles(values, (0.5, 0.9, 0.99, 1))
            above = [str(sum(v > limit for v in values)) for limit in (4, 10)]
            rows.append(f"| {' | '.join([title, str(len(values)), figure, *cells, *above])} |")
    return "\n".join(rows)


def by_fault(lines: Iterable[Result]) -> dict[str, list[Result]]:
    """The faults' lines by what was planted, and in which channel."""
    found = defaultdict(list)
    for line in lines:
        if line["kind"] == "fault":
            weak = ", weak channel" if line["channel"] == "weak" else ""
            found[line["fault"] + weak].append(line)
    return found


def fault_table(lines: Sequence[Result]) -> str:
    """R of each fault, and how many each gate found."""
    columns = ["fault", "pairs", "smallest R", "1 %", "10 %", "median", "A finds", "B finds",
               "weights find of the rest", "files alone miss"]  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for fault, group in by_fault(lines).items():
        cells = quantiles(finite(group, "R"), (0, 0.01, 0.1, 0.5))
        a, b = (sum(line[gate] is False for line in group) for gate in "AB")
        weights = sum(line["B"] and line.get("weights") == "FAIL" for line in group)
        missed = sum(line["B"] and line.get("weights") != "FAIL" for line in group)
        counts = [str(a), str(b), str(weights), str(missed)]
        rows.append(f"| {' | '.join([fault, str(len(group)), *cells, *counts])} |")
    return "\n".join(rows)


def limit_table(lines: Sequence[Result]) -> str:
    """Right folds refused and faults missed by R alone, for several limits."""
    right = [line for line in lines if line["kind"] in ("right", "float32")]
    wrong = [line for line in lines if line["kind"] == "fault"]
    rows = ["| limit on R | right folds refused | faults missed |", "| --- | --- | --- |"]
    for limit in LIMITS:
        refused = sum(value > limit for value in finite(right, "R"))
        missed = sum(value <= limit for value in finite(wrong, "R"))
        rows.append(f"| {limit:g} | {refused} of {len(right)} | {missed} of {len(wrong)} |")
    return "\n".join(rows)


def odd_ones(lines: Sequence[Result]) -> str:
    """The pairs that R alone would judge wrongly."""
    columns = ["network", "case", "channels", "R", "element", "gate A", "gate B", "weights",
               "R in float64"]  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for line in lines:
        is_fault = line["kind"] == "fault"
        if (is_fault and line["R"] <= 4) or (not is_fault and not line["R"] <= 4):
            told = {True: "pass", False: "FAIL", None: ""}
            cells = [line["network"], line["case"], str(line.get("channels", "")),
                     f"{line['R']:.3g}", f"{line['element']:.3g}", told[line["A"]],
                     told[line["B"]], line.get("weights") or "",
                     f"{line['exact']:.2f}" if "exact" in line else ""]  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def not_judged(lines: Sequence[Result]) -> str:
    """Networks that float32 cannot evaluate, failures of tools, time that ran out."""
    ill = sorted({line["network"] for line in lines if line.get("ill conditioned") is not None})
    told = [f"- float32 itself is too far from float64 for a verdict: {', '.join(ill) or 'none'}"]
    errors = defaultdict(list)
    for line in lines:
        if "error" in line:
            errors[f"{line['case']}: {line['error']}"].append(line["network"])
        if line.get("note"):
            errors[line["note"]].append(line["network"])
    told += [f"- {error} ({', '.join(sorted(where))})" for error, where in sorted(errors.items())]
    return "\n".join(told)


def network_table(lines: Sequence[Result], networks: Sequence[str]) -> str:
    """R of the right fold, the largest R of a float32 fold, the smallest R of a fault."""
    rows = ["| network | BN | right | float32, largest | fault, smallest | which |"]
    rows.append("|" + " --- |" * 6)
    for name in networks:
        own = [line for line in lines if line["network"] == name]
        right = next((line for line in own if line["kind"] == "right"), None)
        faults = [line for line in own if line["kind"] == "fault"]
        least = min(faults, key=lambda line: line["R"], default=None)
        fast = finite((line for line in own if line["kind"] == "float32"), "R")
        cells = [
            name,
            str(right["norms"]) if right else "",
            f"{right['R']:.2f}" if right else "",
            f"{fast[-1]:.2f}" if fast else "",
            f"{least['R']:.3g}" if least else "",
            least["case"] if least else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Measure what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("--right", action="store_true")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        done = {line["case"]: line for line in results() if line["network"] == args.child}
        told = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the tools print is no result
        for line in measure(args.child, done, only_right=args.right):
            print(json.dumps(line), file=told, flush=True)
        return
    if not args.page_only:
        import zoo

        wanted = args.names or names()
        missing = [n for n in wanted if n in zoo.names() and not zoo.file_of(n, ZOO).exists()]
        if missing:
            exporter = str(ROOT / "scripts" / "zoo.py")
            subprocess.run([sys.executable, exporter, str(ZOO), *missing], check=True)
        measure_all(wanted, only_right=args.right)
    text = page(results())
    PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
