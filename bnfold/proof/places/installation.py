"""What is installed here and what of it really runs: packages, runtimes, libraries, the machine.

That a provider is listed, or that a session opens, says nothing (`runtime`): each is tried with a
model of one convolution. No name of the machine, no user and no path is among the facts.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bnfold.errors import BnfoldError, RuntimeUnavailableError, one_line
from bnfold.proof.places import runtime
from bnfold.proof.places.in_torch import require_torch
from bnfold.proof.places.process import Worker
from bnfold.proof.places.runtimes import RUNTIMES, Runtime

PACKAGES = (
    "onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir", "onnxscript", "torch", "numpy",
    "safetensors",
)  # fmt: skip
OPTIONAL = ("onnxsim", "onnxslim", "timm", "torchvision")
SECONDS = 120.0  # for one runtime: TensorRT builds an engine first
# what an older one does with a file from somebody else
FLOORS: Mapping[str, tuple[tuple[int, int], str]] = {
    "torch": ((2, 10), "its weights_only loader can be made to corrupt memory (CVE-2026-24747)"),
    "onnx": ((1, 21), "its external data can be led out of the model's folder (CVE-2026-34446)"),
}
# variables that change what a GPU computes, or how many threads compute
TF32_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
VARIABLES = (*TF32_VARIABLES, "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def installation() -> dict[str, Any]:
    """Facts for `bnfold doctor`.

    Keys: versions, optional {package: version or None}, claimed [provider of onnxruntime],
    loads {runtime: True, or the sentence why it does not run}, missing_libraries [name], cuda
    {torch, onnxruntime: the version that each was built for}, machine (`machine`), environment
    {variable: value, where set}, conflicts [sentence].
    """
    facts: dict[str, Any] = {
        "versions": {name: version(name) for name in PACKAGES},
        "optional": {name: version(name) for name in OPTIONAL},
        "claimed": _claimed(),
        "loads": {name: runs(name) for name in RUNTIMES},
        "missing_libraries": runtime.missing_libraries(),
        "cuda": {"torch": runtime.torch_cuda(), "onnxruntime": _onnxruntime_cuda()},
        "machine": machine(gpu=True),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    return facts | {"conflicts": conflicts(facts)}


def version(distribution: str) -> str | None:
    """The version that is installed, None where none is."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def runs(name: str) -> bool | str:
    """True, or a sentence: a model of one convolution is opened there, and run."""
    place = Runtime(name).place
    x = np.ones((1, 1, 1, 1), np.float32)
    try:
        if place.library == "torch":
            return _torch_runs(place.device)
        if place.device == "cpu":
            runtime.open_session(smallest_model(), place.provider, optimize=False).run({"x": x})
        else:
            with Worker(Runtime(name), SECONDS) as worker:
                worker.open(smallest_model(), optimize=False).run({"x": x})
    except BnfoldError as error:
        return str(error)
    return True


def _torch_runs(device: str) -> bool | str:
    require_torch(device)
    import torch

    try:
        one = torch.ones(1, 1, 1, 1, device=device)
        torch.nn.functional.conv2d(one, one)
    except RuntimeError as error:
        return f"torch cannot compute on {device}: {one_line(error)}."
    return True


def smallest_model() -> onnx.ModelProto:
    """One convolution of one number."""
    image = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, (1, 1, 1, 1))
    weight = onnx.numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"])],
        "smallest",
        [onnx.helper.make_value_info("x", image)],
        [onnx.helper.make_value_info("y", image)],
        [weight],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _claimed() -> list[str]:
    with contextlib.suppress(RuntimeUnavailableError):
        return list(runtime._onnxruntime().get_available_providers())
    return []


def _onnxruntime_cuda() -> str | None:
    """The major version of CUDA that onnxruntime's provider is linked with (Linux)."""
    folder = runtime._capi_folder()
    library = folder / "libonnxruntime_providers_cuda.so" if folder else None
    if library is None or not library.is_file():
        return None
    linked = (re.match(r"libcudart\.so\.(\d+)", n) for n in runtime.needed_libraries(library))
    return next((found[1] for found in linked if found), None)


# --- what does not go together -------------------------------------------------------------------


def conflicts(facts: Mapping[str, Any]) -> list[str]:
    """What stands in the way of right results or of safety, a sentence each."""
    return [*_packages(facts["versions"]), *_cuda(facts["cuda"]), *_settings(facts)]


def _packages(versions: Mapping[str, str | None]) -> list[str]:
    found = []
    if versions.get("onnxruntime") and versions.get("onnxruntime-gpu"):
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "uninstall both, then install one."
        )
    for name, (floor, why) in FLOORS.items():
        installed = versions.get(name)
        numbers = re.match(r"(\d+)\.(\d+)", installed or "")
        if numbers and (int(numbers[1]), int(numbers[2])) < floor:
            wanted = ".".join(map(str, floor))
            found.append(f"{name} {installed} is older than {wanted}: {why}; upgrade it.")
    return found


def _cuda(cuda: Mapping[str, str | None]) -> list[str]:
    ours, theirs = (cuda[name] for name in ("torch", "onnxruntime"))
    if ours and theirs and ours.split(".")[0] != theirs.split(".")[0]:
        return [
            f"torch was built for CUDA {ours} and onnxruntime for CUDA {theirs}: in one process"
            " each needs libraries of its own; install two of the same major version."
        ]
    return []


def _settings(facts: Mapping[str, Any]) -> list[str]:
    environment, found = facts["environment"], []
    for name in TF32_VARIABLES:
        if environment.get(name) == "1":
            found.append(
                f"{name}=1 turns on TF32 for all that asks for float32 on a GPU; results are of 11"
                " bits. Unset it, and say `--runtime ort-cuda:tf32` where TF32 is what you want."
            )
    threads, cores = environment.get("OMP_NUM_THREADS", ""), facts["machine"]["cores"]
    if threads.isdigit() and int(threads) > cores:
        found.append(f"OMP_NUM_THREADS is {threads}, and only {cores} cores may be used here.")
    return found


# --- the machine ---------------------------------------------------------------------------------


def machine(*, gpu: bool) -> dict[str, Any]:
    """The processor's model, the cores that this process may use, how busy they are; with `gpu`,
    each GPU and its driver. cores: of the machine, less what affinity and the cgroup leave out.
    """
    found: dict[str, Any] = {
        "cpu": _processor(),
        "cores": usable_cores(),
        "cores_of_machine": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    return found | {"gpus": _gpus()} if gpu else found


def _processor() -> str:
    import platform

    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may use: affinity, and a container's share of time, rounded up.

    Source: cpu.max of cgroup v2 ("quota period" or "max"), cpu.cfs_* of v1 (-1 for none).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            text = " ".join((cgroup / name).read_text() for name in files)
        except OSError:
            continue
        quota, period = text.split()[:2]
        if quota.isdigit() and int(quota) > 0 and int(period) > 0:
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(cores, 1)


def _gpus() -> list[dict[str, str]]:
    """Name and driver of each GPU, as NVIDIA's own tool tells; none where it is not there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in run.stdout.splitlines() if run.returncode == 0]
    names = ("name", "driver", "memory")
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def require(names: Iterable[str]) -> None:
    """Raise RuntimeUnavailableError with the reason, where one of these runtimes does not run."""
    for name in dict.fromkeys(names):
        reason = runs(name)
        if reason is not True:
            raise RuntimeUnavailableError(f"{name} cannot run here: {reason}")
