"""Networks timed together on a runtime, for one batch and number of threads.

onnxruntime's part runs in a process of its own, with a runtime's environment from its start and
nobody else's threads. torch's part runs here, since a module lives in the process that made it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfold import errors
from bnfold.benchmark.paired import Clock, Run, repeats_of, timed_rounds
from bnfold.errors import BnfoldError, LimitError
from bnfold.proof.places.in_torch import autocast, require_torch, rounding
from bnfold.proof.places.process import command_of, ending, environment_of
from bnfold.proof.places.runtimes import Runtime, parse_runtime

if TYPE_CHECKING:
    from torch import nn

Array = np.ndarray[Any, np.dtype[Any]]
Rounds = list[dict[str, float]]

SITTINGS = 3  # times that everything is opened anew: where a session's memory lies is luck, too
TO_START = 300.0  # seconds that a process has to load its libraries and models, besides its rounds


@dataclass(frozen=True)
class Effort:
    """How long is measured: rounds over all sittings, or wall seconds, whichever end first.

    Each sitting has one round at least.
    """

    rounds: int = 200
    seconds: float = 10.0
    seed: int = 0


@dataclass(frozen=True)
class OnnxModel:
    """A file that onnxruntime runs, with its graph optimization, as deployed, or without."""

    path: str
    optimize: bool = True


@dataclass(frozen=True)
class Timed:
    """What came of a place: the rounds of each sitting, the clock, and where the nodes ran.

    placed: model -> provider -> operator -> nodes, as onnxruntime tells; empty for torch.
    """

    sittings: list[Rounds]
    clock: Clock
    placed: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)

    @property
    def rounds(self) -> Rounds:
        """Those of all sittings."""
        return [taken for sitting in self.sittings for taken in sitting]


def clock_for(runtime: Runtime, threads: int) -> Clock:
    """A single thread's time is its processor's, whatever others do; any other is the wall's."""
    return "processor" if runtime.place.device == "cpu" and threads == 1 else "wall"


def in_sittings(
    opened: Callable[[], contextlib.AbstractContextManager[Mapping[str, Run]]],
    clock: Clock,
    effort: Effort,
) -> list[Rounds]:
    """The rounds of several sittings, each of which opens what is timed anew."""
    draw, sittings, repeats = random.Random(effort.seed), list[Rounds](), 0
    for sitting in range(SITTINGS):
        with opened() as runs:
            warmed = repeats_of(list(runs.values()))
            repeats = repeats or warmed
            share = (effort.rounds + sitting) // SITTINGS
            rounds = timed_rounds(
                runs,
                clock=clock,
                rounds=max(share, 1),
                seconds=effort.seconds / SITTINGS,
                repeats=repeats,
                draw=draw,
            )
            sittings.append(rounds)
    return sittings


# --- onnxruntime ---------------------------------------------------------------------------------


def time_onnx(
    models: Mapping[str, OnnxModel],
    feeds: Mapping[str, Array],
    runtime: Runtime,
    threads: int,
    effort: Effort,
) -> Timed:
    """The models on a runtime of onnxruntime, in a process of its own.

    Inputs and outputs lie where the provider computes: no copy is measured, and a run ends when the
    device has ended. Raises RuntimeUnavailableError where the provider cannot run here, LimitError
    where the process does not end well, InputError for a model that onnxruntime refuses.
    """
    job = {
        "models": {name: asdict(model) for name, model in models.items()},
        "runtime": str(runtime),
        "threads": threads,
        "effort": asdict(effort),
    }
    with tempfile.TemporaryDirectory(prefix="bnfold-") as folder:
        np.savez(Path(folder) / "feeds.npz", **feeds)  # type: ignore[arg-type]
        job["feeds"] = str(Path(folder) / "feeds.npz")
        answer = _in_process(job, runtime, TO_START + 4 * effort.seconds)
    if "error" in answer:
        error = answer["error"]
        raise getattr(errors, error["type"])(
            error["message"], code=error["code"], hint=error["hint"]
        )
    return Timed(answer["sittings"], answer["clock"], answer["placed"])


def _in_process(job: Mapping[str, Any], runtime: Runtime, limit: float) -> dict[str, Any]:
    try:
        run = subprocess.run(
            command_of(__name__),
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=limit,
            env=environment_of(runtime.precision),
        )
    except subprocess.TimeoutExpired:
        raise LimitError(
            f"timing on {runtime} did not end within {limit:.0f} s and was given up.",
            code="E_TIMEOUT",
        ) from None
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        said = (run.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
        raise LimitError(
            f"the process that timed on {runtime} ended {ending(run.returncode)}: {said}",
            code="E_CRASH",
        )
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def serve() -> None:
    """The other side: a job on stdin, an answer on stdout."""
    print(json.dumps(_answer(json.load(sys.stdin))))


def _answer(job: Mapping[str, Any]) -> dict[str, Any]:
    from bnfold.proof.places.runtime import open_session

    runtime = parse_runtime(job["runtime"])
    clock = clock_for(runtime, job["threads"])
    feeds = dict(np.load(job["feeds"]))
    placed: dict[str, Any] = {}

    @contextlib.contextmanager
    def opened() -> Iterator[Mapping[str, Run]]:
        sessions = {
            name: open_session(
                Path(model["path"]),
                runtime.place.provider,
                precision=runtime.precision,
                optimize=model["optimize"],
                threads=job["threads"],
                deployed=True,
            )
            for name, model in job["models"].items()
        }
        placed.update({name: session.assignment for name, session in sessions.items()})
        yield {name: session.bound(feeds) for name, session in sessions.items()}

    try:
        sittings = in_sittings(opened, clock, Effort(**job["effort"]))
    except BnfoldError as error:
        return {"error": error.to_dict()}
    return {"sittings": sittings, "clock": clock, "placed": placed}


# --- torch ---------------------------------------------------------------------------------------


def time_torch(
    modules: Mapping[str, nn.Module],
    inputs: list[Array],
    runtime: Runtime,
    threads: int,
    effort: Effort,
) -> Timed:
    """The modules in eval mode on torch's CPU or GPU, without gradients; fp16, bf16: by autocast.

    inputs: forward's arguments; they lie on the device before the clock starts, and a run ends when
    the device has ended. The modules stay as they are. Raises RuntimeUnavailableError where there
    is no such device.
    """
    import torch

    device = runtime.place.device
    require_torch(device)
    tensors = [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in inputs]

    def runner(module: nn.Module) -> Run:
        own = copy.deepcopy(module).eval().to(device)

        def run() -> None:
            own(*tensors)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    @contextlib.contextmanager
    def opened() -> Iterator[Mapping[str, Run]]:
        yield {name: runner(module) for name, module in modules.items()}

    clock = clock_for(runtime, threads)
    cast = autocast(device, runtime.precision)
    settings = rounding(runtime.precision, repeatable=False)
    with _in_threads(threads), settings, torch.inference_mode(), cast:
        return Timed(in_sittings(opened, clock, effort), clock)


@contextlib.contextmanager
def _in_threads(threads: int) -> Iterator[None]:
    """torch's number of threads, put back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
