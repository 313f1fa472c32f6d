"""The networks of a comparison, each opened where it is to run, before any arithmetic is done.

The original runs on onnxruntime's CPU with its graph optimization off: it is the measure. Gate B's
folded network runs there too; gate C's run at the places that were asked for, as deployed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnx

from bnfold.errors import BnfoldError, InputError, UsageError, one_line
from bnfold.proof.places.in_torch import require_torch, run_torch
from bnfold.proof.places.precision import effective
from bnfold.proof.places.process import Worker
from bnfold.proof.places.runtime import (
    PROTOBUF_LIMIT,
    Session,
    mapped_libraries,
    open_session,
)
from bnfold.proof.places.runtimes import DEFAULT, Runtime

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, np.dtype[Any]]
Values = Mapping[str, Any]
Run = Callable[[Mapping[str, Array]], Values]

PLAIN = Runtime(DEFAULT)
TORCH = Runtime("torch")
FLOATS = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}


@dataclass(frozen=True)
class Backend:
    """Something that maps inputs to outputs by name, for gate B or C.

    role: whose network it runs ("original", "folded", "model"; "measure": the original in another
    class, which is not judged). runtime: where, and its declared
    class. again: runs once in a new session, None where there is no such thing. original: the name
    of the backend that runs the original in the same place and class. libraries: what its process
    has loaded by now.
    """

    name: str
    gate: str
    role: str
    runtime: Runtime
    run: Run = field(repr=False)
    session: Session | None = None
    again: Run | None = field(default=None, repr=False)
    original: str = ""
    libraries: Callable[[], tuple[str, ...]] = field(default=tuple, repr=False)
    own_process: bool = False

    @property
    def takes_inputs(self) -> bool:
        """Whether there is anything that its outputs could depend on."""
        return self.session is None or bool(self.session.input_names)

    @property
    def placement(self) -> Mapping[str, Mapping[str, int]]:
        """Where onnxruntime says that the nodes ran: provider -> operator -> count."""
        return self.session.assignment if self.session is not None else {}


@dataclass(frozen=True)
class Backends:
    """The original's session, and all that is compared with it."""

    original: Backend
    compared: tuple[Backend, ...]


def open_two(
    places: Places,
    original: Any,
    folded: Any,
    runtimes: Sequence[Runtime],
    modules: tuple[torch.nn.Module, torch.nn.Module] | None,
    narrowed: Callable[[str], onnx.ModelProto],
    stored: str,
) -> Backends:
    """The original, and the folded network for gate B and on every runtime.

    In a class beyond fp32 the original runs in that class too: on the runtime where that rounds by
    itself, else as `narrowed`. stored: the narrower class of the folded weights, if any. Torch
    modules that are at hand are compared on torch's CPU where no other torch is asked for.
    """
    _check_modules(runtimes, modules)
    declared = any(runtime.precision == stored for runtime in runtimes)
    runtimes = list(dict.fromkeys(effective(runtime, stored) for runtime in runtimes))
    if modules is not None and not any(r.place.library == "torch" for r in runtimes):
        runtimes.append(TORCH)
    original, folded = once(original), once(folded)
    first = places.plain(original, "original", "original")
    compared: list[Backend] = []
    for runtime in runtimes:
        if runtime.place.library == "torch":
            assert modules is not None
            one = places.torch(
                modules[0], runtime, f"{runtime}, original module", "original", first
            )
            two = places.torch(modules[1], runtime, f"{runtime}, folded module", "folded", first)
            compared += [one, _beside(two, one)]
        elif not beyond(runtime):
            compared.append(places.onnx(folded, runtime, str(runtime), "folded"))
        elif runtime.precision == stored and runtime.place.provider != "tensorrt":
            model, title = narrowed(stored), f"{runtime}, original rounded"
            one = places.onnx(model, runtime, title, "measure", optimize=False)
            two = places.onnx(folded, runtime, f"{runtime}, folded", "folded")
            compared += [one, _beside(two, one)]
        else:
            title = f"{runtime}, original"
            one = places.onnx(original, runtime, title, "original", optimize=False)
            two = places.onnx(folded, runtime, f"{runtime}, folded", "folded")
            compared += [one, _beside(two, one)]
    title = f"{DEFAULT}, unoptimized"
    if not (stored and declared):
        return Backends(first, (places.plain(folded, title, "folded"), *compared))
    own = Runtime(DEFAULT, stored)
    measure = places.plain(narrowed(stored), f"{title}, original rounded", "measure", own)
    network = _beside(places.plain(folded, title, "folded", own), measure)
    return Backends(first, (measure, network, *compared))


def open_one(
    places: Places, model: Any, runtimes: Sequence[Runtime], module: torch.nn.Module | None
) -> Backends:
    """One network as its own measure, and on every runtime."""
    _check_modules(runtimes, module)
    model = once(model)
    first = places.plain(model, "original", "model")
    compared = []
    for runtime in dict.fromkeys(effective(runtime, "") for runtime in runtimes):
        if runtime.place.library == "torch":
            assert module is not None
            compared.append(places.torch(module, runtime, str(runtime), "model", first))
        else:
            compared.append(places.onnx(model, runtime, str(runtime), "model"))
    return Backends(first, tuple(compared))


def open_in_torch(
    original: onnx.ModelProto, modules: tuple[torch.nn.Module, torch.nn.Module]
) -> Backends:
    """The two modules alone, for types that onnxruntime has no operators for."""
    held = {tensor.name for tensor in original.graph.initializer}
    names = [value.name for value in original.graph.input if value.name not in held]
    outputs = [value.name for value in original.graph.output]
    first, second = (
        Backend(title, "B", role, TORCH, _torch_runner(module, names, outputs, title, TORCH))
        for module, role in zip(modules, ("original", "folded"), strict=True)
        for title in [f"torch, {role} module"]
    )
    return Backends(first, (second,))


def _check_modules(runtimes: Sequence[Runtime], modules: Any) -> None:
    wanted = next((r for r in runtimes if r.place.library == "torch"), None)
    if wanted is not None and modules is None:
        raise UsageError(
            f"{wanted} runs a torch module, and there is none here: an ONNX file holds no module. "
            f"Give a torch checkpoint with its factory (--model), or another runtime."
        )


def _beside(backend: Backend, original: Backend) -> Backend:
    """Held against the original in the same class; in fp32 the ceiling is narrower than that."""
    return replace(backend, original=original.name if beyond(backend.runtime) else "")


def beyond(runtime: Runtime) -> bool:
    """Whether the user declared a class with its own rounding."""
    return runtime.precision != "fp32"


def once(model: Any) -> Any:
    """A proto as bytes, so that several sessions do not serialize it each."""
    small = isinstance(model, onnx.ModelProto) and model.ByteSize() < PROTOBUF_LIMIT
    return model.SerializeToString() if small else model


# -------------------------------------------------------------------------------- the places


class Places:
    """Opens networks at the places that are asked for; a context manager that ends processes.

    own_process: onnxruntime's CPU runs in a process of its own as well, so that a model that
    crashes it is a sentence. time_limit: seconds for each answer of such a process.
    """

    def __init__(
        self,
        threads: int | None = None,
        *,
        own_process: bool = False,
        time_limit: float | None = None,
    ):
        self._threads, self._own, self._limit = threads, own_process, time_limit
        self._workers: dict[Runtime, Worker] = {}
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._ending.__exit__(kind, error, trace)

    def plain(self, model: Any, name: str, role: str, runtime: Runtime = PLAIN) -> Backend:
        """onnxruntime's CPU with its graph optimization off, for gate B."""
        session = self._session(model, runtime, optimize=False)
        run = _runner(session)
        return Backend(name, "B", role, runtime, run, session, own_process=self._own)

    def onnx(
        self, model: Any, runtime: Runtime, name: str, role: str, optimize: bool = True
    ) -> Backend:
        """A runtime of onnxruntime, and whatever it takes to say that it ran there."""

        def again(feeds: Mapping[str, Array]) -> Values:
            another = self._session(model, runtime, optimize)
            try:
                return _runner(another)(feeds)
            finally:
                another.end()

        session = self._session(model, runtime, optimize)
        worker = self._workers.get(runtime)
        return Backend(
            name,
            "C",
            role,
            runtime,
            _runner(session),
            session,
            again,
            libraries=worker.libraries if worker is not None else mapped_libraries,
            own_process=worker is not None,
        )

    def torch(
        self, module: torch.nn.Module, runtime: Runtime, name: str, role: str, like: Backend
    ) -> Backend:
        """A torch module in this process: torch sets TF32 by itself, call by call.

        like: the backend whose inputs and outputs it has. The caller's module stays where it is.
        """
        assert like.session is not None
        require_torch(runtime.place.device)
        cuda = runtime.place.device == "cuda"
        away = {tensor.device.type for tensor in module.parameters()} - {runtime.place.device}
        if away or cuda:
            module = copy.deepcopy(module).to(runtime.place.device)
        names = (like.session.input_names, like.session.output_names)
        run = _torch_runner(module, *names, name, runtime)
        return Backend(name, "C", role, runtime, run, libraries=mapped_libraries if cuda else tuple)

    def _session(self, model: Any, runtime: Runtime, optimize: bool) -> Session:
        if not self._own and not runtime.needs_own_process:
            provider, precision = runtime.place.provider, runtime.precision
            return open_session(
                model, provider, optimize=optimize, threads=self._threads, precision=precision
            )
        if runtime not in self._workers:
            self._workers[runtime] = self._ending.enter_context(Worker(runtime, self._limit))
        return self._workers[runtime].open(model, optimize=optimize, threads=self._threads)


def _runner(session: Session) -> Run:
    """The session's run, its inputs in the float type that the model asks for."""
    kinds = dict(zip(session.input_names, session.input_types, strict=True))

    def run(feeds: Mapping[str, Array]) -> Values:
        return session.run(
            {
                name: value.astype(FLOATS[kinds[name]], copy=False)
                if kinds.get(name) in FLOATS and value.dtype.kind == "f"
                else value
                for name, value in feeds.items()
            }
        )

    return run


def _torch_runner(
    module: torch.nn.Module,
    inputs: Sequence[str],
    outputs: Sequence[str],
    name: str,
    runtime: Runtime,
) -> Run:
    def run(feeds: Mapping[str, Array]) -> Values:
        try:
            given = [feeds[key] for key in inputs]
            values = run_torch(module, given, runtime.precision, runtime.place.device)
        except BnfoldError:
            raise
        except Exception as error:
            raise InputError(
                f"{name} cannot run on the model's inputs: {one_line(error)}"
            ) from error
        if len(values) != len(outputs):
            raise InputError(f"{name} has {len(values)} outputs, the model has {len(outputs)}.")
        return dict(zip(outputs, values, strict=True))

    return run
