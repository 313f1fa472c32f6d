"""onnxruntime in a process of its own: what CUDA does is settled when its process starts.

Whether products may be rounded to TF32 is an environment variable that NVIDIA's libraries read
once, and a library that crashes takes its process along. So a GPU's sessions run in a fresh
interpreter. Requests and answers go over its stdin and stdout, each a pair of lengths, a line of
JSON and the arrays' bytes, nothing that could run code; what libraries print goes to its stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import ml_dtypes  # noqa: F401  numpy learns the name bfloat16
import numpy as np

import bnfold
from bnfold.errors import BnfoldError, InputError, LimitError, RuntimeUnavailableError, UsageError
from bnfold.limits import end_with_parent
from bnfold.proof.places.runtime import Model, Session, loadable, mapped_libraries, open_session
from bnfold.proof.places.runtimes import Runtime

Array = np.ndarray[Any, np.dtype[Any]]
Head = dict[str, Any]

LENGTHS = struct.Struct("<QQ")  # bytes of the JSON, bytes of the arrays
LARGEST = 1 << 40  # no message is longer: lengths beyond are not ours
KINDS = {kind.__name__: kind for kind in (InputError, RuntimeUnavailableError)}
GRACE = 10.0  # seconds that a process may take to end


def command_of(module: str) -> list[str]:
    """A fresh interpreter with this bnfold, in which the module's `serve` answers."""
    home = str(Path(bnfold.__file__).resolve().parent.parent)
    start = f"import sys; sys.path.insert(0, sys.argv[1]); from {module} import serve; serve()"
    return [sys.executable, "-P", "-c", start, home]


def ending(code: int) -> str:
    """How a process ended, from its exit code: "by SIGSEGV", "with exit code 1"."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"by {signal.Signals(-code).name}"
    return f"with exit code {code}"


# ------------------------------------------------------------------------------- the messages


class _BrokenError(Exception):
    """The pipe ended, or what came through it is no message."""


def send(stream: IO[bytes], head: Head, arrays: Mapping[str, Any]) -> None:
    """Write one message: plain values, and arrays by name (others are sent as what they are)."""
    parts, described = [], []
    for name, value in arrays.items():
        part, description = _packed(value)
        described.append({"name": name, **description})
        parts.append(part)
    text = json.dumps({**head, "arrays": described}).encode()
    stream.write(LENGTHS.pack(len(text), sum(map(len, parts))))
    stream.write(text)
    for part in parts:
        stream.write(part)
    stream.flush()


def _packed(value: Any) -> tuple[memoryview, Head]:
    if not isinstance(value, np.ndarray):
        return memoryview(b""), {"other": type(value).__name__}
    if value.dtype.kind == "O":  # onnxruntime's strings
        return memoryview(b""), {"text": [str(x) for x in value.flat], "shape": value.shape}
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return flat.data, {"dtype": value.dtype.name, "shape": value.shape}


def receive(stream: IO[bytes]) -> tuple[Head, dict[str, Any]]:
    """Read one message. Raises _BrokenError."""
    try:
        words, size = LENGTHS.unpack(_exactly(stream, LENGTHS.size))
        if max(words, size) > LARGEST:
            raise _BrokenError
        head = json.loads(_exactly(stream, words))
        body, at = _exactly(stream, size), 0
        arrays: dict[str, Any] = {}
        for described in head.pop("arrays"):
            value, used = _unpacked(described, body, at)
            arrays[described["name"]] = value
            at += used
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise _BrokenError from error
    return head, arrays


def _unpacked(described: Head, body: bytearray, at: int) -> tuple[Any, int]:
    if "other" in described:
        return described["other"], 0
    shape = tuple(described["shape"])
    if "text" in described:
        return np.array(described["text"], dtype=object).reshape(shape), 0
    kind = np.dtype(described["dtype"])
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(body, kind, count, at).reshape(shape), count * kind.itemsize


def _exactly(stream: IO[bytes], size: int) -> bytearray:
    body = bytearray(size)
    view, at = memoryview(body), 0
    while at < size:
        got = stream.readinto(view[at:])  # type: ignore[attr-defined]
        if not got:
            raise _BrokenError
        at += got
    return body


# -------------------------------------------------------------------------------- the parent's


def environment_of(precision: str) -> dict[str, str]:
    """This process's environment, with NVIDIA's switch as the class says: 0 is never TF32."""
    environment = dict(os.environ)
    environment.pop("NVIDIA_TF32_OVERRIDE", None)
    if precision != "tf32":
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    return environment


class Worker:
    """A process with the sessions of one runtime; a context manager that ends it.

    It belongs to the thread that made it, and ends with that.

    time_limit: seconds that it may take for an answer, None for any time. Raises
    RuntimeUnavailableError where it cannot start; a process that crashes or does not answer in time
    is a LimitError of what was asked of it.
    """

    def __init__(self, runtime: Runtime, time_limit: float | None = None):
        if time_limit is not None and not time_limit > 0:
            raise UsageError(f"the time limit is {time_limit:g} s; it must be above 0.")
        self.runtime = runtime
        self._limit = time_limit
        self._late = False
        self._waiting = threading.Lock()  # held by whoever settles whether an answer was late
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        try:
            self._process = subprocess.Popen(
                command_of(__name__),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment_of(runtime.precision),
            )
        except OSError as error:
            self._stderr.close()
            raise RuntimeUnavailableError(
                f"a process for {runtime} cannot be started: {error.strerror or error}."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close(at_once=kind is not None)

    def close(self, *, at_once: bool = False) -> None:
        """End the process, by force if it does not go; may be called again."""
        if at_once:  # in the middle of something, which nobody waits for now
            self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def open(self, model: Model, *, optimize: bool, threads: int | None = None) -> Session:
        """`runtime.open_session` in the process; raises what that raises."""
        with loadable(model) as source:
            is_path = isinstance(source, str)
            head = {
                "call": "open",
                "path": os.path.abspath(source) if is_path else None,  # noqa: PTH100  keeps links
                "provider": self.runtime.place.provider,
                "precision": self.runtime.precision,
                "optimize": optimize,
                "threads": threads,
            }
            model_bytes = {} if is_path else {"model": np.frombuffer(source, np.uint8)}  # type: ignore[arg-type]
            found, _ = self._ask(head, model_bytes, "opening the model")
        return Session(
            provider=self.runtime.place.provider,
            optimized=optimize,
            input_names=tuple(found["input_names"]),
            input_types=tuple(found["input_types"]),
            output_names=tuple(found["output_names"]),
            providers=tuple(found["providers"]),
            assignment=found["assignment"],
            _session=_Remote(self, found["key"], tuple(found["providers"])),
        )

    def libraries(self) -> tuple[str, ...]:
        """The files of CUDA, cuDNN and TensorRT that the process has in memory."""
        return tuple(self._ask({"call": "libraries"}, {}, "reading its libraries")[0]["libraries"])

    def _ask(
        self, head: Head, arrays: Mapping[str, Any], doing: str
    ) -> tuple[Head, dict[str, Any]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answered = threading.Event()
        watch = threading.Timer(self._limit or 0.0, self._too_late, [answered])
        if self._limit is not None:
            watch.start()
        try:
            send(self._process.stdin, head, arrays)
            answer, values = receive(self._process.stdout)
            with self._waiting:
                answered.set()
        except (_BrokenError, OSError, ValueError) as error:
            sentence = self._obituary(doing)  # tells whether it was too late
            code = "E_TIMEOUT" if self._late else "E_CRASH"
            raise LimitError(sentence, code=code) from error
        finally:
            watch.cancel()
        if "error" in answer:
            kind = KINDS.get(answer["error"], BnfoldError)
            raise kind(answer["sentence"], code=answer["code"], hint=answer["hint"])
        return answer, values

    def _too_late(self, answered: threading.Event) -> None:
        with self._waiting:
            if not answered.is_set():
                self._late = True
                self._process.kill()

    def _obituary(self, doing: str) -> str:
        """How the process ended, and what it last said."""
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._late:
            return (
                f"{self.runtime} was ended: it took more than {self._limit:g} s for {doing}. "
                f"Nothing was proved about it."
            )
        how = ending(code)
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        said = f" Its last words: {lines[-1][:300]}" if lines else ""
        return (
            f"the process of {self.runtime} ended {how} while {doing}. Nothing was proved about "
            f"it.{said}"
        )


class _Remote:
    """What `Session` runs: an InferenceSession's two methods, in the worker."""

    def __init__(self, worker: Worker, key: int, providers: tuple[str, ...]):
        self._worker, self._key, self._providers = worker, key, providers

    def run(self, _: None, feeds: Mapping[str, Array]) -> list[Any]:
        head = {"call": "run", "key": self._key}
        return list(self._worker._ask(head, feeds, "running the model")[1].values())

    def get_providers(self) -> Sequence[str]:
        return self._providers

    def end(self) -> None:
        self._worker._ask({"call": "end", "key": self._key}, {}, "ending a session")


# --------------------------------------------------------------------------------- the child's


def serve() -> None:
    """Answer requests until the parent closes the pipe, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt at the terminal is the parent's
    end_with_parent()  # nobody reads the answers then
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    sessions: dict[int, Session] = {}  # a key is never given twice
    while True:
        try:
            head, arrays = receive(requests)
        except _BrokenError:
            return
        try:
            answer, values = _answer(head, arrays, sessions)
        except BnfoldError as error:
            kind = type(error).__name__
            told = {"sentence": str(error), "code": error.code, "hint": error.hint}
            answer, values = {"error": kind, **told}, {}
        try:
            send(answers, answer, values)
        except BrokenPipeError:
            return


def _answer(
    head: Head, arrays: dict[str, Any], sessions: dict[int, Session]
) -> tuple[Head, dict[str, Any]]:
    call = head["call"]
    if call == "open":
        key = max(sessions, default=-1) + 1
        source: Model = head["path"] or arrays["model"].tobytes()
        session = sessions[key] = open_session(
            source,
            head["provider"],
            optimize=head["optimize"],
            threads=head["threads"],
            precision=head["precision"],
        )
        names = ("input_names", "input_types", "output_names", "providers", "assignment")
        return {"key": key, **{name: getattr(session, name) for name in names}}, {}
    if call == "run":
        return {}, sessions[head["key"]].run(arrays)
    if call == "end":
        del sessions[head["key"]]
        return {}, {}
    return {"libraries": mapped_libraries()}, {}
