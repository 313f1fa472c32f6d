"""bnfold on this machine's GPU: what holds there, with its figures, as a page.

    python scripts/gpu_check.py [--output docs/results/cuda.md]
    python scripts/gpu_check.py --torch-only        where onnxruntime has no CUDA: torch's part
    python scripts/gpu_check.py --rehearse          the same on the CPU; shows nothing of CUDA

Needs torch, onnx, onnx-ir, onnxscript, onnxruntime-gpu and an NVIDIA GPU; no network and no
environment of its own. Each step is a process of its own with a time limit, so that one that fails
or crashes leaves the others; the page and a JSON file beside it are written after each. Exit code
0: all that was judged holds (what could not be run or is only told is named); 1: something does
not; 4: CUDA cannot run here, and then no page is written.

The steps: parity of every network, folded against unfolded, in float32 without TF32, in TF32 and in
float16, on onnxruntime's CUDA provider and on torch's; planted faults, which must be found; the
statistics that adaptation measures there; the tests marked gpu; latency.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

PAGE = ROOT / "docs" / "results" / "cuda.md"
TORCH_PAGE = PAGE.with_name("cuda_torch.md")
REHEARSAL = ROOT / "build" / "gpu_check" / "rehearsal.md"
AT_ONCE = 4  # steps that time nothing, and are mostly arithmetic of the CPU
UNIT = 2.0**-24
# the statistics of adaptation: their error over the CPU's own, both against float64; nobody has
# calibrated that ratio, so the line is where the design calls a fold failed
STATISTICS_LIMIT = 10.0
FAULT = 1.001
PATIENCE = 4  # a rehearsal may be on a small machine


# --- what is checked -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Where:
    """The GPU, or the CPU that rehearses in its place; torch_only: without onnxruntime's CUDA."""

    rehearse: bool
    torch_only: bool = False

    @property
    def onnx(self) -> str:
        """onnxruntime's place."""
        return "ort-cpu" if self.rehearse else "ort-cuda"

    @property
    def torch(self) -> str:
        """torch's place."""
        return "torch" if self.rehearse else "torch-cuda"

    @property
    def device(self) -> str:
        """The same as torch and onnxruntime's providers are named."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def classes(self) -> tuple[str, ...]:
        """The runtimes and precision classes that every network runs in; a CPU has no TF32."""
        classes = ("ort-cuda", "ort-cuda:tf32", "torch-cuda", "torch-cuda:tf32", "torch-cuda:fp16")
        return self._had(("ort-cpu", "torch", "torch:bf16") if self.rehearse else classes)

    @property
    def plain(self) -> tuple[str, ...]:
        """Those of them in float32, or in the model's own type."""
        return self._had((self.onnx, self.torch))

    @property
    def timed(self) -> tuple[str, ...]:
        """Where latency is measured."""
        tf32 = () if self.rehearse else (f"{self.onnx}:tf32", f"{self.torch}:tf32")
        return self._had((*self.plain, *tf32))

    @property
    def page(self) -> Path:
        """Where the results go unless another file is named."""
        return REHEARSAL if self.rehearse else TORCH_PAGE if self.torch_only else PAGE

    def _had(self, classes: Sequence[str]) -> tuple[str, ...]:
        return tuple(c for c in classes if not self.torch_only or c.startswith("torch"))


# name -> the factory, its arguments, the shape of a row; statistics as training leaves them
NETWORKS: Mapping[str, tuple[str, Mapping[str, Any], tuple[int, ...]]] = {
    "resnet18": ("resnet.resnet18", {}, (3, 64, 64)),
    "mobilenet_v2": ("mobilenet_v2.mobilenet_v2", {}, (3, 64, 64)),
    "densenet_bc": ("densenet.densenet_bc", {}, (3, 32, 32)),
    "unet": ("unet.unet", {}, (1, 64, 64)),
    "preact_resnet18": ("preact_resnet.preact_resnet18", {}, (3, 32, 32)),
    "tcn": ("tcn.tcn", {"levels": 5}, (1, 128)),
    "dncnn": ("dncnn.dncnn", {}, (1, 32, 32)),
    "dcgan": ("dcgan.generator", {}, (100,)),
}
# trained, from models/ -> the repairs without which not all of its batch norms fold
TRAINED: Mapping[str, tuple[str, ...]] = {
    "resnet20_batch.pt": (),
    "preact_resnet20_exact.pt": (),
    "vgg7_renorm.pt": (),
    "densenet_ghost.pt": ("clamp",),
    "digits_cnn_mean-only.pt": (),
    "tcn_weight.pt": (),
    "mlp_weight-mean-only.pt": (),
    "lenet5_normprop.pt": (),
}
HALF = " in float16"  # behind a network's name: as .half() makes it
TIMED: Mapping[str, tuple[int, ...]] = {
    "resnet18": (3, 224, 224),
    f"resnet18{HALF}": (3, 224, 224),
    "mobilenet_v2": (3, 224, 224),
    "preact_resnet18": (3, 32, 32),
}


@dataclass(frozen=True)
class Result:
    """What a step came to: its verdict, its sentences, and rows of its table.

    passed: None where nothing is judged: the step could not be run here, or only tells figures, as
    the sentence says.
    """

    passed: bool | None
    sentence: str
    rows: Sequence[Mapping[str, Any]] = ()
    libraries: Sequence[str] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """A step by name, what it is about, and variables that its process starts with."""

    kind: str
    about: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    limit: float = 240.0

    @property
    def name(self) -> str:
        """As it is called on the command line and in the JSON."""
        return f"{self.kind}:{self.about}" if self.about else self.kind


NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}


def steps() -> list[Step]:
    """All steps, the longest first; latency at the end, when nothing else runs."""
    return [
        Step("tests", limit=300.0),
        *(Step("parity", name) for name in [*NETWORKS, *TRAINED]),
        Step("planted"),
        Step("silent CPU"),
        Step("adaptation", "torch", NO_TF32),
        Step("adaptation", "torch as it comes"),
        Step("adaptation", "onnxruntime", NO_TF32),
        *(Step("latency", name) for name in TIMED),
    ]


# --- the steps, each in its own process ----------------------------------------------------------


def network(name: str) -> tuple[Any, tuple[int, ...]]:
    """A network of models/ with statistics as training leaves them, and a row's shape."""
    from importlib import import_module

    import torch
    from zoo import trained_like

    where, options, shape = NETWORKS[name]
    module, _, factory = where.rpartition(".")
    torch.manual_seed(0)
    made = getattr(import_module(f"models.{module}"), factory)(**options)
    return trained_like(made, shape), shape


def parity(where: Where, name: str) -> Result:
    """Folded against unfolded, in every class of precision; then with float16 weights."""
    import torch

    import bnfold

    if name in TRAINED:
        fold = bnfold.fold(ROOT / "models" / name, repair=TRAINED[name])
        halves = None
    else:
        module, shape = network(name)
        fold = bnfold.fold(module, torch.zeros(2, *shape))
        halves = (module, torch.zeros(2, *shape, dtype=torch.float16))
    classes = [c for c in where.classes if fold.modules is not None or not c.startswith("torch")]
    if not classes:
        return Result(None, "the file holds no module, and without onnxruntime nothing runs it.")
    found = [(name, fold.verify(runtimes=classes))]
    if halves is not None:
        half = bnfold.fold(halves[0].half(), halves[1])
        found.append((f"{name}{HALF}", half.verify(runtimes=where.plain)))
    rows = [_ran(label, ran) for label, proof in found for ran in proof.runtimes if ran.gate == "C"]
    failures = [f"{label}: {f.sentence}" for label, proof in found for f in proof.failures]
    libraries = {
        library for _, proof in found for ran in proof.runtimes for library in ran.libraries
    }
    folded = f"{len(fold.folded)} of {len(fold.folded) + len(fold.kept)} batch norms folded"
    return Result(not failures, " ".join([f"{folded}.", *failures]), rows, sorted(libraries))


def _ran(label: str, ran: Any) -> dict[str, Any]:
    """A row of the table of parity."""
    placed = {
        provider.removesuffix("ExecutionProvider"): sum(operators.values())
        for provider, operators in ran.providers.items()
    }
    return {
        "network": label,
        "runtime": ran.name,
        "of": ran.role,
        "ratio": _finite(ran.ratio),
        "noise": _finite(ran.noise),
        "nodes": placed,
    }


def planted(where: Where, _: str) -> Result:
    """A fault that the GPU's own comparison must find: one channel off by 1e-3, in float32."""
    import copy

    import torch
    from onnx import numpy_helper

    import bnfold
    from bnfold.graph import to_proto
    from bnfold.proof.places.runtimes import R_LIMIT
    from bnfold.proof.verify import verify

    fold = bnfold.fold(network("resnet18")[0], torch.zeros(2, 3, 32, 32))
    right, wrong = to_proto(fold.graph), to_proto(fold.graph)
    weight = next(t for t in wrong.graph.initializer if len(t.dims) == 4)
    changed = numpy_helper.to_array(weight).copy()
    changed[0] *= FAULT
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    modules = [fold.modules[1], copy.deepcopy(fold.modules[1])]
    next(p for p in modules[1].parameters() if p.ndim == 4).data[0] *= FAULT
    rows = []
    for label, graph, folded in zip(("right", "wrong"), (right, wrong), modules, strict=True):
        both = fold.modules[0], folded
        proof = verify(to_proto(fold.original), graph, runtimes=where.plain, torch_modules=both)
        rows += [
            {"fault": label, "runtime": ran.name, "found": not ran.ratio <= R_LIMIT}
            | {"ratio": _finite(ran.ratio)}
            for ran in proof.runtimes
            if ran.gate == "C" and ran.role == "folded" and ran.name in where.plain
        ]
    passed = len(rows) == 2 * len(where.plain)
    passed = passed and all(row["found"] == (row["fault"] == "wrong") for row in rows)
    said = "found" if passed else "NOT told from the right fold"
    return Result(passed, f"A channel of weights off by a thousandth was {said}.", rows)


def silent_cpu(where: Where, _: str) -> Result:
    """With the GPU hidden, everything that asks for CUDA must end with exit code 4."""
    import torch

    import bnfold

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        module, shape = network("resnet18")
        bnfold.export(module, torch.zeros(1, *shape), path)
        asked = [
            ["verify", str(path), str(path), "--runtime", "ort-cuda"],
            ["parity", str(path), "--runtime", "ort-cuda:tf32"],
            ["bench", str(path), "--runtime", "ort-cuda", "--rounds", "1"],
            ["doctor", "--runtime", "ort-cuda"],
            ["doctor", "--runtime", "torch-cuda"],
        ]
        if where.torch_only:
            asked = asked[-1:]
        rows = []
        for arguments in asked:
            run = _bnfold(arguments, {"CUDA_VISIBLE_DEVICES": ""})
            shown = " ".join(a for a in arguments if a != str(path))
            said = (run.stderr.strip().splitlines() or [""])[-1]
            rows.append({"asked": shown, "exit": run.returncode, "said": _unnamed(said)[:160]})
    passed = all(row["exit"] == 4 for row in rows)
    said = "refused" if passed else "NOT refused everywhere"
    return Result(passed, f"CUDA asked for with the GPU hidden was {said} (exit code 4).", rows)


def _bnfold(arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
    command = [sys.executable, "-m", "bnfold", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def adaptation(where: Where, about: str) -> Result:
    """Statistics of a moved domain measured there and on the CPU, both against float64."""
    import copy

    import torch
    from zoo import _pictures

    import bnfold

    if about == "onnxruntime" and where.torch_only:
        return Result(None, "onnxruntime's CUDA provider is left out.")
    module, shape = network("preact_resnet18")
    images = _pictures(128, shape, torch.Generator().manual_seed(1)) * 1.3 + 0.5
    batches, wide = list(images.split(32)), list(images.double().split(32))
    exact = bnfold.adapt(copy.deepcopy(module).double(), wide, diagnose=False).statistics
    if about == "onnxruntime":
        model = bnfold.export(module, torch.zeros(1, *shape))
        arrays = [batch.numpy() for batch in batches]
        here = bnfold.adapt(model, arrays, provider="cpu", diagnose=False).statistics
        there = bnfold.adapt(model, arrays, provider=where.device, diagnose=False).statistics
    else:
        here = bnfold.adapt(module, batches, device="cpu", diagnose=False).statistics
        there = bnfold.adapt(
            copy.deepcopy(module), batches, device=where.device, diagnose=False
        ).statistics
    own, error = _away(here, exact), _away(there, exact)
    ratio = error / max(own, 4 * UNIT)
    row = {"by": about, "layers": len(exact), "cpu": own, "there": error, "ratio": ratio}
    said = f"The statistics of {len(exact)} batch norms are {ratio:.2f} times the CPU's error off"
    if about == "torch as it comes":  # on a GPU it may round convolutions to TF32
        return Result(None, f"{said}: told, not judged, as torch may round to TF32.", [row])
    return Result(ratio <= STATISTICS_LIMIT, f"{said} (limit {STATISTICS_LIMIT:g}).", [row])


def _away(statistics: Mapping[str, Any], exact: Mapping[str, Any]) -> float:
    """Root mean square of what means (in deviations) and variances (in shares) are off by."""
    import numpy as np

    if len(statistics) != len(exact):
        return math.inf
    parts = []
    for mine, right in zip(statistics.values(), exact.values(), strict=True):
        parts += [(mine.mean - right.mean) / np.sqrt(right.var), mine.var / right.var - 1]
    return float(np.sqrt(np.mean(np.concatenate(parts) ** 2)))


def tests(where: Where, _: str) -> Result:
    """pytest, of the tests marked gpu alone."""
    from importlib.util import find_spec

    if find_spec("pytest") is None:
        return Result(None, "pytest is not installed here, so the tests marked gpu did not run.")
    folder = ROOT / "tests"
    marked = [p for p in sorted(folder.glob("test_*.py")) if "pytest.mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *map(str, marked)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BNFOLD_REQUIRE_GPU": str(int(not where.rehearse and not where.torch_only)),
        },
    )
    lines = run.stdout.strip().splitlines() or ["pytest said nothing"]
    counts = {
        what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])
    }
    rows = [{"test": line} for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    ran = counts.get("passed", 0) + counts.get("failed", 0)
    passed = run.returncode == 0 and (where.rehearse or ran > 0)
    if where.torch_only and run.returncode == 0 and not ran:
        return Result(None, "the tests marked gpu need onnxruntime's CUDA provider, too.")
    return Result(passed, f"pytest -m gpu: {lines[-1].strip('= ')}.", rows)


def latency(where: Where, name: str) -> Result:
    """Original and folded, in turn, on onnxruntime and torch."""
    import torch

    import bnfold

    module, _ = network(name.removesuffix(HALF))
    shape = (TIMED[name][0], 32, 32) if where.rehearse else TIMED[name]
    example = torch.zeros(1, *shape)
    if name.endswith(HALF):
        module, example = module.half(), example.half()
    quick = {"rounds": 3, "seconds": 1.0} if where.rehearse else {"rounds": 200, "seconds": 4.0}
    report = bnfold.bench(
        module,
        None,
        example,
        runtimes=where.timed,
        batch_sizes=(1, 2) if where.rehearse else (1, 32),
        check=False,  # that is the parity of the same network
        **quick,
    )
    keys = (
        "runtime", "batch", "model", "clock", "rounds", "median_ms", "quartiles_ms", "ratio",
        "ratio_quartiles", "verdict",
    )  # fmt: skip
    rows = [{"network": name, **{key: getattr(row, key) for key in keys}} for row in report.rows]
    return Result(None, f"{'x'.join(map(str, shape))}: told, not judged.", rows)


KINDS: Mapping[str, Callable[[Where, str], Result]] = {
    "parity": parity,
    "planted": planted,
    "silent CPU": silent_cpu,
    "adaptation": adaptation,
    "tests": tests,
    "latency": latency,
}


# --- all of them ---------------------------------------------------------------------------------


def run_step(step: Step, where: Where, threads: int) -> Result:
    """The step in a process of its own; a failure of any kind is a result."""
    command = [sys.executable, __file__, "--step", step.name]
    command += ["--rehearse"] * where.rehearse + ["--torch-only"] * where.torch_only
    begun, limit = time.monotonic(), step.limit * (PATIENCE if where.rehearse else 1)
    environment = {**os.environ, **step.environment, "OMP_NUM_THREADS": str(threads)}
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return Result(False, f"not done within {limit:g} s.", seconds=limit)
    seconds = round(time.monotonic() - begun, 1)
    answer = run.stdout.strip().splitlines()[-1:]
    if run.returncode or not answer:
        said = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
        failure = f"the step ended with exit code {run.returncode}: {_unnamed(said)[:300]}"
        return Result(False, failure, seconds=seconds)
    return Result(**{**json.loads(answer[0]), "seconds": seconds})


def run_all(
    where: Where, chosen: Sequence[Step], told: Callable[[dict[str, Result]], None]
) -> None:
    """Every step; `told` gets all results after each of them."""
    from bnfold.proof.places.installation import usable_cores

    cores, results = usable_cores(), dict[str, Result]()

    def finished(step: Step, result: Result) -> None:
        results[step.name] = result
        verdict = {True: "holds", False: "FAILS", None: "no verdict"}[result.passed]
        print(f"{step.name}: {verdict} ({result.seconds:.0f} s). {result.sentence}", flush=True)
        told({step.name: results[step.name] for step in chosen if step.name in results})

    together = [step for step in chosen if step.kind != "latency"]
    at_once = max(1, min(AT_ONCE, cores // 2))
    with ThreadPoolExecutor(at_once) as pool:
        threads = max(1, cores // at_once)
        running = {pool.submit(run_step, step, where, threads): step for step in together}
        for done in as_completed(running):
            finished(running[done], done.result())
    for step in chosen:
        if step.kind == "latency":
            finished(step, run_step(step, where, cores))


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _unnamed(text: str) -> str:
    """A sentence without the paths of this machine."""
    return re.sub(r"(?<!\w)/[\w./+-]+/", "", text)


def _chosen(only: Iterable[str]) -> list[Step]:
    wanted = set(only)
    return [s for s in steps() if not wanted or s.name in wanted or s.kind in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps and write the page; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="the page; its JSON lies beside it")
    parser.add_argument("--rehearse", action="store_true", help="the CPU in the GPU's place")
    parser.add_argument("--torch-only", action="store_true", help="leave onnxruntime's CUDA out")
    parser.add_argument("--only", default="", help="steps or kinds of steps, with commas")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    where = Where(args.rehearse, args.torch_only)
    if args.step:
        kind, _, about = args.step.partition(":")
        print("\n" + json.dumps(asdict(KINDS[kind](where, about))))
        return 0
    output = (args.output or where.page).resolve()
    chosen = _chosen(filter(None, args.only.split(",")))
    if not chosen:
        parser.error(f"there is no step {args.only}; there are {', '.join(KINDS)}")
    if output in (PAGE, TORCH_PAGE) and output != where.page:
        what = "a rehearsal" if args.rehearse else "torch's part"
        parser.error(f"{what} is no result for {output.name}")
    return check(where, chosen, output)


def check(where: Where, chosen: Sequence[Step], output: Path) -> int:
    """All chosen steps; the exit code."""
    from gpu_check_page import page

    from bnfold.errors import RuntimeUnavailableError
    from bnfold.proof.places.installation import installation, require

    if not where.rehearse:
        try:
            require(where.plain)
        except RuntimeUnavailableError as error:
            print(f"gpu_check: {error} No page was written.", file=sys.stderr)
            return 4
    facts, begun, last = installation(), time.time(), dict[str, Result]()
    output.parent.mkdir(parents=True, exist_ok=True)

    def tell(results: dict[str, Result]) -> None:
        last.update(results)
        found = {
            "rehearsal": where.rehearse,
            "torch only": where.torch_only,
            "date": time.strftime("%Y-%m-%d", time.gmtime(begun)),
            "seconds": round(time.time() - begun),
            "facts": facts,
            "steps": {name: asdict(result) for name, result in results.items()},
            "missing": [step.name for step in chosen if step.name not in results],
            "whole": len(chosen) == len(steps()),
        }
        output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        output.write_text(page(found))

    run_all(where, chosen, tell)
    holds, failed, left = (
        [name for name, result in last.items() if result.passed is verdict]
        for verdict in (True, False, None)
    )
    told = [f"{len(holds)} of {len(last)} steps hold."]
    told += [f"Failed: {', '.join(failed)}."] if failed else []
    print(*told, *([f"No verdict: {', '.join(left)}."] if left else []))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
