"""bnfold's proof beside the checks of other tools: right folds and planted faults, who is wrong.

    .venv/bin/python scripts/measure_checks.py [--page-only] [--again TOOL] [NETWORK ...]

Each network, well and ill conditioned (tests/conditions.py), is folded rightly in float64 (bnfold)
and in float32 (onnxruntime), and wrongly in every way of tests/planted.py at its middle batch norm.
Each tool judges the same pair of files by its own code and its own default inputs and tolerances:

- bnfold, record: `bnfold.verify` with the fold's record; bnfold, files: of the two files alone.
- onnxsim: `onnxsim.model_checking.compare(folded, original)`, what `check_n` runs.
- onnxslim: `check_onnx`, `onnxruntime_inference`, `check_result` of `onnxslim.utils`, what
  `--model-check` runs.
- Polygraphy: `Comparator.run` of two `OnnxrtRunner` and `Comparator.compare_accuracy`, what
  `polygraphy run a.onnx --onnxrt` and a comparison with b.onnx run.
- torch.onnx: `torch.onnx.verification.verify_onnx_program` of the exported module with the folded
  graph in its program, judged as `torch.onnx.export(verify=True)` does (an absolute difference of
  5e-3 or a relative one of 1e-1 fails).
- assert_close: `torch.testing.assert_close` of the two files' outputs on the network's own inputs.

A fault that leaves the right fold's file, byte for byte in its weights, is none and is left out.
Results are lines of build/checks/results.jsonl, so that a stopped run goes on where it stopped; the
page goes to docs/results/checks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import realdata  # noqa: E402
from conditions import PROFILES, Profile, conditioned  # noqa: E402
from planted import FAULTS, Bed, norms_of  # noqa: E402

import bnfold  # noqa: E402
from bnfold.errors import BnfoldError, RuntimeUnavailableError  # noqa: E402
from bnfold.graph import to_proto  # noqa: E402
from models.densenet import densenet_bc  # noqa: E402
from models.mobilenet_v2 import mobilenet_v2_small  # noqa: E402
from models.resnet_cifar import resnet20  # noqa: E402
from models.vgg import vgg7  # noqa: E402

RESULTS = ROOT / "build" / "checks" / "results.jsonl"
PAGE = ROOT / "docs" / "results" / "checks.md"
SHARED = Path(os.environ.get("BNFOLD_SHARED_DATA", ROOT.parent / "shared" / "data"))
RIGHT = ("right, float64 (bnfold)", "right, float32 (onnxruntime)")
ROWS = 4

Result = dict[str, Any]


# --- the networks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A network under a profile, as the tools get it."""

    network: nn.Module
    shape: tuple[int, ...]
    profile: Profile

    @cached_property
    def x(self) -> np.ndarray:
        """The network's own inputs."""
        return self.profile.inputs(ROWS, self.shape, seed=7)

    @cached_property
    def bed(self) -> Bed:
        """The exported original, and its right fold."""
        return Bed(to_proto(bnfold.export(self.network, torch.zeros(1, *self.shape))))

    @cached_property
    def program(self) -> Any:
        """What torch's exporter makes of the module."""
        with contextlib.redirect_stdout(sys.stderr):
            example = (torch.from_numpy(self.x[:1]),)
            return torch.onnx.export(self.network, example, dynamo=True, verbose=False)


FACTORIES: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (resnet20, (3, 32, 32)),
    "mobilenet_v2": (mobilenet_v2_small, (3, 32, 32)),
    "vgg7": (lambda: vgg7(width=32), (3, 32, 32)),
    "densenet": (lambda: densenet_bc(depth=22), (3, 32, 32)),
}
REAL = {"resnet20, trained on CIFAR-10": ("resnet20", (3, 32, 32)),
        "cnn, trained on MNIST": ("mnist_cnn", (1, 28, 28))}  # fmt: skip


def subjects(wanted: list[str]) -> Iterator[tuple[str, str, Callable[[], Subject]]]:
    """(network, profile, how it is made)."""
    for name, (factory, shape) in FACTORIES.items():
        for title, profile in PROFILES.items():

            def made(
                factory: Callable[[], nn.Module] = factory,
                shape: tuple[int, ...] = shape,
                profile: Profile = profile,
            ) -> Subject:
                torch.manual_seed(0)
                return Subject(conditioned(factory(), shape, profile), shape, profile)

            if not wanted or name in wanted:
                yield name, title, made
    for name, (checkpoint, shape) in REAL.items():
        if SHARED.is_dir() and (not wanted or name in wanted):

            def loaded(checkpoint: str = checkpoint, shape: tuple[int, ...] = shape) -> Subject:
                network = realdata.load_model(SHARED, checkpoint)
                return Subject(network, shape, PROFILES["ordinary"])

            yield name, "as trained", loaded


def cases(bed: Bed) -> Iterator[tuple[str, Callable[[], tuple[onnx.ModelProto, Any]]]]:
    """Right folds and faults: a title, and how to make the folded graph and its record."""
    yield RIGHT[0], lambda: (bed.folded, bed.right.record)
    yield RIGHT[1], lambda: (_by_onnxruntime(bed.original), None)
    output = bed.outputs[len(bed.outputs) // 2]
    norm = next(n for n in norms_of(bed.original) if n.node.output[0] == output)
    gammas = np.abs(norm.read(1))
    channel = int(np.argsort(gammas)[len(gammas) // 2])
    for fault in FAULTS:

        def plant(fault: str = fault) -> tuple[onnx.ModelProto, Any]:
            wrong = bed.plant(fault, output, channel)
            return wrong.folded, wrong.record

        yield fault, plant


def _by_onnxruntime(original: onnx.ModelProto) -> onnx.ModelProto:
    """Folded by onnxruntime, offline; beyond "basic" it writes operators of its own."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = f"{folder}/folded.onnx"
        onnxruntime.InferenceSession(original.SerializeToString(), options,
                                     providers=["CPUExecutionProvider"])  # fmt: skip
        return onnx.load(f"{folder}/folded.onnx")


def same_weights(a: onnx.ModelProto, b: onnx.ModelProto) -> bool:
    """Whether two graphs hold the same constants and operators."""

    def facts(model: onnx.ModelProto) -> list[Any]:
        held = [numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer]
        return [[node.op_type for node in model.graph.node], sorted(held)]

    return facts(a) == facts(b)


# --- the tools' own checks -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A folded graph, held against its subject's original. record: where there is one."""

    subject: Subject
    folded: onnx.ModelProto
    record: Any


def by_record(pair: Pair) -> bool | None:
    """bnfold with the record of the fold; nothing to say without one."""
    if pair.record is None:
        return None
    return bnfold.verify(pair.subject.bed.original, pair.folded, record=pair.record).passed


def by_files(pair: Pair) -> bool:
    """bnfold with the two files alone."""
    return bnfold.verify(pair.subject.bed.original, pair.folded).passed


def by_onnxsim(pair: Pair) -> bool:
    """onnxsim's comparison, five random inputs."""
    from onnxsim.model_checking import compare

    return bool(compare(pair.folded, pair.subject.bed.original, verbose=False))


def by_onnxslim(pair: Pair) -> bool:
    """onnxslim's comparison, one random input."""
    from onnxslim.utils import check_onnx, check_result, onnxruntime_inference

    x, before, _ = check_onnx(copy.deepcopy(pair.subject.bed.original))
    after, _ = onnxruntime_inference(copy.deepcopy(pair.folded), x)
    return bool(check_result(before, after))


def by_polygraphy(pair: Pair) -> bool:
    """Polygraphy's comparison, one random input."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = {"": G_LOGGER.CRITICAL}
    runners = [
        OnnxrtRunner(SessionFromOnnx(model.SerializeToString()))
        for model in (pair.subject.bed.original, pair.folded)
    ]
    return bool(Comparator.compare_accuracy(Comparator.run(runners)))


def by_torch_onnx(pair: Pair) -> bool:
    """The verification of torch's exporter, on the example that it was given."""
    import onnx_ir as ir
    from torch.onnx.verification import verify_onnx_program

    program = pair.subject.program
    program.release()
    program.model = ir.from_proto(pair.folded)
    example = (torch.from_numpy(pair.subject.x[:1]),)
    found = verify_onnx_program(program, example)
    return all(info.max_abs_diff < 5e-3 and info.max_rel_diff < 1e-1 for info in found)


def by_assert_close(pair: Pair) -> bool:
    """torch.testing.assert_close with its defaults, on the network's own inputs."""
    models = (pair.subject.bed.original, pair.folded)
    before, after = (_outputs(model, pair.subject.x) for model in models)
    try:
        torch.testing.assert_close(after, before)
    except AssertionError:
        return False
    return True


def _outputs(model: onnx.ModelProto, x: np.ndarray) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(model.SerializeToString(),
                                           providers=["CPUExecutionProvider"])  # fmt: skip
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x})]


Check = Callable[[Pair], bool | None]
TOOLS: Mapping[str, Check] = {
    "bnfold, record": by_record,
    "bnfold, files": by_files,
    "onnxsim": by_onnxsim,
    "onnxslim": by_onnxslim,
    "Polygraphy": by_polygraphy,
    "torch.onnx": by_torch_onnx,
    "assert_close": by_assert_close,
}


# --- CUDA that is not there ----------------------------------------------------------------------


def on_cuda(subject: Subject) -> dict[str, str]:
    """What is said of a right fold where CUDA is asked for, and onnxruntime falls back."""
    said = {}
    try:
        report = bnfold.verify(subject.bed.original, subject.bed.folded, runtimes=["cuda"])
        said["bnfold"] = "pass" if report.passed else "FAIL"
    except RuntimeUnavailableError as refusal:
        said["bnfold"] = f"refused, exit {refusal.exit_code}"
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator

    runners = [
        OnnxrtRunner(SessionFromOnnx(subject.bed.original.SerializeToString())),
        OnnxrtRunner(SessionFromOnnx(subject.bed.folded.SerializeToString(), providers=["cuda"])),
    ]
    try:
        passed = bool(Comparator.compare_accuracy(Comparator.run(runners)))
        said["Polygraphy"] = "pass" if passed else "FAIL"
    except Exception as refusal:
        said["Polygraphy"] = f"refused: {' '.join(str(refusal).split())[:100]}"
    return said


# --- all of them ---------------------------------------------------------------------------------


def results() -> list[Result]:
    """Every line that was written; the latest of each case."""
    if not RESULTS.exists():
        return []
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return list({(x["network"], x["profile"], x["case"]): x for x in lines}.values())


def measure(wanted: list[str], again: str | None) -> None:
    """What is missing, a line for each case as it comes; one tool again, where it passed."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    done = {(line["network"], line["profile"], line["case"]): line for line in results()}
    known = {key for key, line in done.items() if again is None or not passed(line, again)}
    for name, title, make in subjects(wanted):
        if {(name, title, case) for case in (*RIGHT, *FAULTS)} <= known:
            continue
        subject = make()
        for case, plant in cases(subject.bed):
            if (name, title, case) in known:
                continue
            line = done.get((name, title, case)) or {
                "network": name,
                "profile": title,
                "case": case,
            }
            try:
                folded, record = plant()
                if case not in RIGHT and same_weights(folded, subject.bed.folded):
                    line["none"] = True
                else:
                    old = line.get("verdicts", {})
                    tools = [tool for tool in TOOLS if tool not in old or tool == again]
                    pair = Pair(subject, folded, record)
                    line["verdicts"] = old | {tool: ask(TOOLS[tool], pair) for tool in tools}
            except BnfoldError as error:
                line["error"] = str(error)
            with RESULTS.open("a") as out:
                out.write(json.dumps(line) + "\n")
            print(name, title, case, line.get("verdicts", line.get("error", "")), file=sys.stderr)
    if (".", ".", "cuda") not in done:
        torch.manual_seed(0)
        ordinary = PROFILES["ordinary"]
        made = conditioned(resnet20(), (3, 32, 32), ordinary)
        line = {"network": ".", "profile": ".", "case": "cuda"}
        line["said"] = on_cuda(Subject(made, (3, 32, 32), ordinary))
        line["offered"] = onnxruntime.get_available_providers()
        with RESULTS.open("a") as out:
            out.write(json.dumps(line) + "\n")


def passed(line: Result, tool: str) -> bool:
    """Whether the tool let the pair pass."""
    return bool(line.get("verdicts", {}).get(tool) is True)


def ask(check: Check, pair: Pair) -> bool | str | None:
    """The verdict, or what stopped the check; its prints held back."""
    try:
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):  # noqa: PTH123
            np.random.seed(0)  # which the tools draw from
            return check(pair)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


# --- the page ------------------------------------------------------------------------------------


def page(lines: list[Result]) -> str:
    """Counts, what was wrong of what, and every verdict."""
    judged = [line for line in lines if "verdicts" in line]
    names = sorted({line["network"] for line in judged})
    known = [*FACTORIES, *REAL]
    absent = [name for name in known if name not in names]
    intro = (
        f"# Checks held against planted faults\n\nPrinted by `scripts/{Path(__file__).name}` "
        f"({versions()}). {len(names)} networks ({', '.join(names)}), well and ill conditioned; "
        f"{len(judged)} pairs. A right fold should pass, a fault should FAIL; a wrong verdict is "
        "**bold**. How each tool was called stands at the head of the script. Where float32 itself "
        "is more than 0.8 % away from the exact result of the original, bnfold says that nothing "
        "can be said and fails; on a right fold that counts as wrong."
    )
    left_out = sum("none" in line for line in lines)
    notes = [f"Left out: {left_out} faults that leave every weight of the right fold as it is."]
    notes += [f"Not measured: {', '.join(absent)}."] if absent else []
    notes += [
        f"Not planted: {line['network']}, {line['profile']}, {line['case']}: {line['error']}"
        for line in lines
        if "error" in line
    ]
    parts = [intro, "## Wrong verdicts\n\n" + counts(judged), "\n".join(f"- {n}" for n in notes)]
    for line in lines:
        if line["case"] == "cuda":
            said = ", ".join(f"{tool}: {verdict}" for tool, verdict in line["said"].items())
            parts.append(
                "## CUDA silently on the CPU\n\nA right fold of resnet20, CUDA asked for, "
                f"onnxruntime offering {', '.join(line['offered'])} on a machine without CUDA: "
                f"{said}. The other checks know no provider."
            )
    parts.append("## Every verdict\n\n" + table(judged))
    return "\n\n".join(parts) + "\n"


def versions() -> str:
    """Of what was measured."""
    packages = ("onnxsim", "onnxslim", "polygraphy", "torch", "onnxruntime-gpu", "onnxruntime")
    found = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def wrong(line: Result, tool: str) -> bool:
    """Whether a verdict is not what it should be; a check that broke off gave none."""
    verdict = line["verdicts"][tool]
    return isinstance(verdict, bool) and verdict is not (line["case"] in RIGHT)


def counts(lines: list[Result]) -> str:
    """Case by case, how many verdicts of each tool were wrong, and the sums."""
    rows = [f"| case | {' | '.join(TOOLS)} |", "|" + " --- |" * (len(TOOLS) + 1)]
    groups = {case: [x for x in lines if x["case"] == case] for case in (*RIGHT, *FAULTS)}
    groups["all right folds"] = [line for line in lines if line["case"] in RIGHT]
    groups["all faults"] = [line for line in lines if line["case"] not in RIGHT]
    groups["wrong verdicts"] = lines
    for title, group in groups.items():
        cells = []
        for tool in TOOLS:
            asked = [line for line in group if isinstance(line["verdicts"][tool], bool)]
            cells.append(f"{sum(wrong(x, tool) for x in asked)} of {len(asked)}" if asked else "")
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows)


def table(lines: list[Result]) -> str:
    """A row for each pair."""
    rows = [
        f"| network | profile | case | {' | '.join(TOOLS)} |",
        "|" + " --- |" * (len(TOOLS) + 3),
    ]
    for line in lines:
        cells = []
        for tool in TOOLS:
            verdict = line["verdicts"][tool]
            told = {True: "pass", False: "FAIL", None: ""}.get(verdict, verdict)
            cells.append(f"**{told}**" if wrong(line, tool) else str(told))
        rows.append(
            f"| {line['network']} | {line['profile']} | {line['case']} | {' | '.join(cells)} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Measure what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("--again", choices=TOOLS, help="ask this tool again where it passed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if not args.page_only:
        measure(args.networks, args.again)
    text = page(results())
    PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
