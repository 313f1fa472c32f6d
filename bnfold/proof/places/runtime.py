"""Where a model runs, and the proof that it ran there.

onnxruntime falls back to the CPU in silence: a session asked for CUDA alone comes back without an
error, and with the CPU provider. So a session opened here reads back which provider every node was
given, and a request that was not met is a RuntimeUnavailableError that names what is missing.
What onnxruntime and its libraries print while they load never reaches our stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import os
import re
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from bnfold.errors import BnfoldError, InputError, RuntimeUnavailableError

Array = np.ndarray[Any, np.dtype[Any]]
Model: TypeAlias = onnx.ModelProto | bytes | str | Path

PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
FALLBACK = "E_CUDA_FALLBACK"
PROTOBUF_LIMIT = 2**31 - 1
# what onnxruntime may leave on the CPU: the arithmetic of shapes and indices, and control flow
MAY_STAY = frozenset({
    "Shape", "Size", "Constant", "ConstantOfShape", "Identity", "Cast", "Gather",
    "GatherElements", "GatherND", "Slice", "Split", "Concat", "Squeeze", "Unsqueeze",
    "Reshape", "Flatten", "Transpose", "Expand", "Tile", "Range", "Add", "Sub", "Mul",
    "Div", "Mod", "Neg", "Abs", "Floor", "Ceil", "Min", "Max", "ReduceProd", "ReduceMax",
    "ReduceMin", "ReduceSum", "CumSum", "Equal", "Greater", "Less", "GreaterOrEqual",
    "LessOrEqual", "And", "Or", "Not", "Where", "NonZero", "OneHot", "TopK",
    "NonMaxSuppression", "Scatter", "ScatterElements", "ScatterND", "If", "Loop", "Scan",
    "SequenceConstruct", "SequenceAt", "SequenceInsert", "SequenceEmpty",
    "ConcatFromSequence", "SplitToSequence", "MemcpyFromHost", "MemcpyToHost",
})  # fmt: skip
CUDNN = "libcudnn.so.9"  # the major version that onnxruntime-gpu 1.19 and later opens
GPU_LIBRARIES = re.compile(r"lib(cuda|cudart|cudnn|cublas|cufft|curand|nvrtc|nvinfer)\w*[.]so")


@dataclass(frozen=True)
class Session:
    """An onnxruntime session and the evidence of where its nodes were placed.

    providers: what the session registered, in order of precedence.
    assignment: provider -> operator type -> number of nodes, after onnxruntime's own graph
    optimization; empty where this onnxruntime cannot tell (never for CUDA).
    """

    provider: str
    optimized: bool
    input_names: tuple[str, ...]
    input_types: tuple[str, ...]  # as onnxruntime writes them, such as "tensor(float16)"
    output_names: tuple[str, ...]
    providers: tuple[str, ...]
    assignment: Mapping[str, Mapping[str, int]]
    _session: Any = field(repr=False, compare=False)
    _held: Any = field(default=None, repr=False, compare=False)  # memory that the session reads

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """The graph's outputs by name. Raises InputError when onnxruntime refuses the inputs."""
        try:
            values = self._session.run(None, dict(feeds))
        except BnfoldError:  # of a session in another process
            raise
        except Exception as error:
            raise InputError(f"onnxruntime could not run the model: {_sentence(error)}") from error
        if tuple(self._session.get_providers()) != self.providers:
            raise RuntimeUnavailableError(
                f"onnxruntime left {self.providers[0]} while running and fell back to "
                f"{self._session.get_providers()[0]}; the result proves nothing about it.",
                code=FALLBACK,
            )
        return dict(zip(self.output_names, values, strict=True))

    def end(self) -> None:
        """Free what it holds at once, where it is in another process."""
        if hasattr(self._session, "end"):
            self._session.end()

    def bound(self, feeds: Mapping[str, Array]) -> Callable[[], None]:
        """A run of these inputs that copies nothing, to be timed.

        The inputs lie where the session computes, and the outputs stay there. It returns when the
        device has ended.
        """
        device = "cpu" if self.providers[0] == PROVIDERS["cpu"] else "cuda"
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))  # copied to the device here
        for name in self.output_names:
            binding.bind_output(name, device)

        def run() -> None:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


class Noise:
    """What a library printed while `quiet` held it back."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def add(self, text: str) -> None:
        """Append text that was printed."""
        self._parts.append(text)

    def text(self) -> str:
        """Everything printed so far, terminal colours removed."""
        return re.sub(r"\x1b\[[0-9;]*m", "", "".join(self._parts)).strip()


@contextlib.contextmanager
def quiet() -> Iterator[Noise]:
    """Hold back what Python code and native libraries write to stdout and stderr.

    Works on the file descriptors, since onnxruntime logs from C++. Not for use from two threads
    at once: the descriptors belong to the process.
    """
    noise = Noise()
    printed = io.StringIO()
    with tempfile.TemporaryFile() as sink, contextlib.ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # a closed descriptor has nothing to hold back
                saved = os.dup(descriptor)
                stack.callback(_restore, saved, descriptor)
                os.dup2(sink.fileno(), descriptor)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                yield noise
        finally:
            sink.seek(0)
            noise.add(printed.getvalue())
            noise.add(sink.read().decode(errors="replace"))


def _restore(saved: int, descriptor: int) -> None:
    os.dup2(saved, descriptor)
    os.close(saved)


def _sentence(error: BaseException) -> str:
    """The part of an onnxruntime error that a user can read."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__


def _onnxruntime() -> Any:
    try:
        with quiet() as noise:
            import onnxruntime
    except ImportError as error:
        detail = noise.text().splitlines()[-1:] or [str(error)]
        raise RuntimeUnavailableError(
            f"onnxruntime cannot be imported ({detail[0]}); install onnxruntime, or "
            f"onnxruntime-gpu for CUDA."
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise RuntimeUnavailableError(
            "the installed onnxruntime is incomplete: it has no InferenceSession. Two of its "
            "distributions were probably installed over each other; remove both, install one."
        )
    return onnxruntime


# -------------------------------------------------------------------------------- the session


def open_session(
    model: Model,
    provider: str = "cpu",
    *,
    optimize: bool,
    threads: int | None = None,
    part: bool = False,
    precision: str = "fp32",
    deployed: bool = False,
) -> Session:
    """An onnxruntime session of `model` on `provider` ("cpu", "cuda", "tensorrt"), and only there.

    model: a file's path, the bytes of a file, or a ModelProto (beyond 2 GiB: a path, or a proto
    that is written to a temporary folder with its tensors beside it). optimize: onnxruntime's
    default graph optimization, which folds batch normalization itself; False turns all of it off.
    part: of a model that is cut into many, so that nothing of it need be placed on the provider.
    precision: what the provider may round products to (`runtimes.PRECISIONS`); what CUDA's own
    libraries do is settled when the process starts (`process.environment_of`). deployed: as
    onnxruntime has it by default, to be timed: threads that wait keep their cores, and of CUDA's
    algorithms the quickest is searched for.

    Raises RuntimeUnavailableError when the provider cannot run here or did not take the model's
    convolutions and products, and InputError when onnxruntime refuses the model.
    """
    _check_known(provider)
    runtime = _onnxruntime()
    if provider != "cpu":
        _require_offered(runtime, provider)
    options = _session_options(runtime, optimize, threads, spinning=deployed)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(loadable(model))
        try:
            with quiet() as noise:
                session = runtime.InferenceSession(
                    source,
                    options,
                    providers=[
                        (PROVIDERS[provider], provider_options(provider, precision, deployed))
                    ],
                    enable_fallback=0,
                )
        except Exception as error:
            said = f"{error}\n{noise.text()}"
            if provider != "cpu" and _looks_like_gpu(said):
                raise RuntimeUnavailableError(_gpu_failure(said, provider)) from error
            raise InputError(f"onnxruntime cannot load the model: {_sentence(error)}") from error
    return _proved(session, provider, optimize, noise.text(), part)


def open_with_weights(
    graph: bytes,
    weights: Mapping[str, Array],
    provider: str = "cpu",
    *,
    threads: int | None = None,
) -> Session:
    """An optimized session of a model whose weights lie in memory and not in the model.

    graph: a model whose initializers of these names are external data. The weights are in place
    before onnxruntime optimizes: what `SessionOptions.add_initializer` sets comes after it, when a
    batch norm's own statistics are in the convolution already, and is then ignored without a word.
    Prints of other threads are left alone, so this may run while a service does.
    Raises as `open_session`.
    """
    _check_known(provider)
    runtime = _onnxruntime() if "onnxruntime" not in sys.modules else sys.modules["onnxruntime"]
    if provider != "cpu":
        _require_offered(runtime, provider)
    options = _session_options(runtime, True, threads, spinning=True)
    held = [(array, _ort_value(runtime, array)) for array in weights.values()]
    options.add_external_initializers(list(weights), [value for _, value in held])
    try:
        session = runtime.InferenceSession(
            graph,
            options,
            providers=[(PROVIDERS[provider], provider_options(provider))],
            enable_fallback=0,
        )
    except Exception as error:
        if provider != "cpu" and _looks_like_gpu(str(error)):
            raise RuntimeUnavailableError(_gpu_failure(str(error), provider)) from error
        raise InputError(f"onnxruntime cannot load the model: {_sentence(error)}") from error
    return replace(_proved(session, provider, True, ""), _held=held)


def _check_known(provider: str) -> None:
    if provider not in PROVIDERS:
        raise RuntimeUnavailableError(
            f"'{provider}' is not a provider of bnfold; use {' or '.join(PROVIDERS)}."
        )


def provider_options(
    provider: str, precision: str = "fp32", deployed: bool = False
) -> dict[str, str]:
    """What a provider is asked for: one algorithm for one shape, and no rounding undeclared.

    deployed: the quickest algorithm, as by default.

    Source: the option names of onnxruntime's cuda_provider_options.h and TensorRT provider.
    """
    if provider == "cuda":  # EXHAUSTIVE times several algorithms, and may take another each time
        search = "EXHAUSTIVE" if deployed else "DEFAULT"
        return {"use_tf32": str(int(precision == "tf32")), "cudnn_conv_algo_search": search}
    if provider == "tensorrt":  # TF32 is by the environment alone
        asked = {"trt_fp16_enable": precision == "fp16", "trt_bf16_enable": precision == "bf16"}
        return {name: str(wanted) for name, wanted in asked.items()}
    return {}


def _ort_value(runtime: Any, array: Array) -> Any:
    """An array as onnxruntime reads it where it lies; numpy has no bfloat16 of its own."""
    if array.dtype.isbuiltin == 1:
        return runtime.OrtValue.ortvalue_from_numpy(array)
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    bits = array.view(f"u{array.dtype.itemsize}")
    return runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, kind)


def _session_options(
    runtime: Any, optimize: bool, threads: int | None, *, spinning: bool = False
) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what it logs as an error, it raises too
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # an idle pool would spin on the cores that the float64 reference needs next
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    return options


@contextlib.contextmanager
def loadable(model: Model) -> Iterator[bytes | str]:
    """The model as InferenceSession takes it."""
    if isinstance(model, bytes):
        yield model
    elif isinstance(model, str | Path):
        if not Path(model).is_file():
            raise InputError(f"there is no model file at {model}.")
        yield str(model)
    elif model.ByteSize() < PROTOBUF_LIMIT:
        yield model.SerializeToString()
    else:
        with tempfile.TemporaryDirectory(prefix="bnfold-") as folder:
            copy = onnx.ModelProto()
            copy.CopyFrom(model)  # saving moves the tensors out of the proto
            path = Path(folder) / "model.onnx"
            onnx.save_model(copy, str(path), save_as_external_data=True, location="model.data")
            yield str(path)


def _proved(session: Any, provider: str, optimize: bool, noise: str, part: bool = False) -> Session:
    """The session with its evidence, or RuntimeUnavailableError where it runs elsewhere."""
    wanted = PROVIDERS[provider]
    providers = tuple(session.get_providers())
    if not providers or providers[0] != wanted:
        told = noise if provider == "cpu" else _gpu_failure(noise, provider)
        raise RuntimeUnavailableError(told, code=FALLBACK)
    assignment = _assignment(session)
    if provider != "cpu":
        _require_placement(assignment, wanted, part)
    return Session(
        provider=provider,
        optimized=optimize,
        input_names=tuple(value.name for value in session.get_inputs()),
        input_types=tuple(value.type for value in session.get_inputs()),
        output_names=tuple(value.name for value in session.get_outputs()),
        providers=providers,
        assignment=assignment,
        _session=session,
    )


def _assignment(session: Any) -> dict[str, dict[str, int]]:
    """provider -> operator type -> nodes; empty where this onnxruntime does not record it."""
    read = getattr(session, "get_provider_graph_assignment_info", None)
    if read is None:
        return {}
    counts: dict[str, Counter[str]] = {}
    for subgraph in read():
        placed = counts.setdefault(subgraph.ep_name, Counter())
        placed.update(node.op_type for node in subgraph.get_nodes())
    return {name: dict(sorted(placed.items())) for name, placed in counts.items()}


def _require_placement(
    assignment: Mapping[str, Mapping[str, int]], wanted: str, part: bool = False
) -> None:
    """Shape arithmetic may stay on the CPU; whatever computes features may not.

    Raises RuntimeUnavailableError naming what was placed elsewhere, or that nothing is known.
    """
    if not assignment:
        raise RuntimeUnavailableError(
            f"this onnxruntime does not tell which provider each node was given, so a run on "
            f"{wanted} cannot be proved; install onnxruntime-gpu 1.28 or later."
        )
    strays = [
        f"{count} {op_type} on {provider}"
        for provider, placed in assignment.items()
        if provider != wanted
        for op_type, count in placed.items()
        if op_type not in MAY_STAY
    ]
    if strays:
        raise RuntimeUnavailableError(
            f"{wanted} was asked for, but onnxruntime placed {', '.join(strays)}; "
            f"a comparison would not be about {wanted}.",
            code=FALLBACK,
        )
    if wanted not in assignment and not part:
        raise RuntimeUnavailableError(
            f"onnxruntime placed no node of the model on {wanted}.", code=FALLBACK
        )


# ----------------------------------------------------------------------- what a GPU provider lacks


@dataclass(frozen=True)
class _Gpu:
    """A provider's name for people, what its library file is, what of its needs is told apart."""

    title: str
    file: str
    prefixes: tuple[str, ...]
    opened: tuple[str, ...]  # not linked, but opened on demand
    remedy: str


_GPUS = {
    "cuda": _Gpu(
        "CUDA",
        "libonnxruntime_providers_cuda.so",
        ("libcu",),
        (CUDNN,),
        "Install NVIDIA's driver and the CUDA libraries that this onnxruntime-gpu was built for "
        "(pip install onnxruntime-gpu[cuda,cudnn])",
    ),
    "tensorrt": _Gpu(
        "TensorRT",
        "libonnxruntime_providers_tensorrt.so",
        ("libnv", "libcu"),
        (),
        "Install NVIDIA's driver and the TensorRT that this onnxruntime-gpu was built for",
    ),
}


def _require_offered(runtime: Any, provider: str) -> None:
    """Load CUDA's libraries where torch or pip packages carry them; refuse a build without it."""
    offered = runtime.get_available_providers()
    if PROVIDERS[provider] not in offered:
        raise RuntimeUnavailableError(
            f"{_GPUS[provider].title} was asked for, but this onnxruntime {runtime.__version__} was"
            f" built without it (it offers {', '.join(offered)}); install onnxruntime-gpu instead "
            f"of onnxruntime."
        )
    with quiet(), contextlib.suppress(Exception):
        if torch_cuda() is not None:
            import torch  # noqa: F401  its wheels bring CUDA's libraries along
        else:
            runtime.preload_dlls()


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for, None for a CPU build or no torch.

    Read from its file: importing torch takes seconds, and a build for the CPU has nothing to give.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    told = Path(spec.origin).with_name("version.py")
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)", told.read_text(), re.MULTILINE)
    return found.group(1) if found else None


def _looks_like_gpu(text: str) -> bool:
    words = ("cuda", "cudnn", "cublas", "tensorrt", "nvinfer")
    return any(word in text.lower() for word in words)


def missing_libraries(provider: str = "cuda") -> list[str]:
    """The shared libraries that a GPU provider of onnxruntime needs and this machine cannot load.

    Linux only (elsewhere: empty). cuDNN is not linked but opened on demand: it is asked for too.
    """
    folder, gpu = _capi_folder(), _GPUS[provider]
    library = folder / gpu.file if folder else None
    if library is None or not library.is_file():
        return []
    linked = [name for name in needed_libraries(library) if name.startswith(gpu.prefixes)]
    return [name for name in [*linked, *gpu.opened] if not _loads(name)]


def mapped_libraries() -> tuple[str, ...]:
    """The files of CUDA, cuDNN and TensorRT that this process has in memory (Linux; else none).

    cuDNN may be missing: onnxruntime then has kernels of its own, which is worth knowing.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return ()
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    names = {Path(os.path.realpath(path)).name for path in paths}
    return tuple(sorted(name for name in names if GPU_LIBRARIES.match(name)))


def needed_libraries(path: Path) -> list[str]:
    """The DT_NEEDED names of a 64-bit little-endian ELF file; empty for any other file.

    Source: System V ABI, program header PT_DYNAMIC (2) and PT_LOAD (1), dynamic tags DT_NEEDED
    (1) and DT_STRTAB (5).
    """
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return []
        (start,) = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        file.seek(start)
        table = file.read(size * count)
        segments = [struct.unpack_from("<IIQQQQQQ", table, size * index) for index in range(count)]
        loaded = [
            (at, where, length) for kind, _, where, at, _, length, *_ in segments if kind == 1
        ]
        dynamic = [(where, length) for kind, _, where, _, _, length, *_ in segments if kind == 2]
        if not dynamic:
            return []
        file.seek(dynamic[0][0])
        entries = list(struct.iter_unpack("<QQ", file.read(dynamic[0][1] // 16 * 16)))
        strings = next(value for tag, value in entries if tag == 5)
        base = next(strings - at + where for at, where, n in loaded if at <= strings < at + n)
        names = []
        for offset in (value for tag, value in entries if tag == 1):
            file.seek(base + offset)
            names.append(file.read(256).split(b"\0")[0].decode())
    return names


def _capi_folder() -> Path | None:
    spec = importlib.util.find_spec("onnxruntime")
    return Path(spec.origin).parent / "capi" if spec and spec.origin else None


def _loads(library: str) -> bool:
    try:
        with quiet():
            ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _gpu_failure(text: str, provider: str = "cuda") -> str:
    """One sentence: it cannot run, the library the loader named, the others, what to do."""
    gpu = _GPUS[provider]
    named = re.search(r"(\S+\.(?:so|dll)[.\d]*): cannot open shared object file", text)
    missing = missing_libraries(provider)
    if named:
        others = [name for name in missing if name != named.group(1)]
        also = f" (and {', '.join(others)})" if others else ""
        return (
            f"{gpu.title} was asked for, but onnxruntime's {gpu.title} provider cannot load "
            f"{named.group(1)}{also}: no such file here. {gpu.remedy}, or ask for the CPU."
        )
    said = [line for line in text.splitlines() if _looks_like_gpu(line)]
    reason = re.sub(r"^.*?\]\s*", "", said[0]).strip() if said else "onnxruntime gave no reason"
    also = f"; these libraries are not here: {', '.join(missing)}" if missing else ""
    return (
        f"{gpu.title} was asked for, but onnxruntime fell back to another provider: {reason}{also}."
        f" Ask for the CPU, or repair the installation (bnfold doctor)."
    )
