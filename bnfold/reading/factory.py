"""Factories: the functions that users name on the command line.

`pkg.mod:factory`, `path/to/file.py:factory`, `torchvision:NAME` and `timm:NAME` become callables.
The code is the user's own and named by the user, never by a file that is being read; what goes
wrong inside it is told in one sentence with its file and line, the exception kept as the cause.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bnfold.errors import BnfoldError, RuntimeUnavailableError, UsageError
from bnfold.reading.sniff import did_you_mean_file

if TYPE_CHECKING:
    from torch import nn

_FORMS = "pkg.mod:factory, path/to/file.py:factory, torchvision:NAME or timm:NAME"
_HERE = str(Path(__file__).resolve().parent)


def resolve_factory(spec: str) -> Callable[..., Any]:
    """The callable that `spec` names; its module or file is imported now, it is not called.

    The current folder is importable for `pkg.mod`, the file's own folder for `file.py`, while the
    code is imported and again while the callable runs. The callable raises UsageError, with the
    user's file and line, for what its code raises.

    Raises UsageError when there is no such file, module or name (with the nearest one), when the
    name is not callable, or when importing fails; RuntimeUnavailableError when torchvision or
    timm is asked for and missing.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(f"{spec!r} names no factory; write {_FORMS}.")
    if where in _COLLECTIONS:
        return _COLLECTIONS[where](name)
    if where.endswith(".py") or "/" in where or "\\" in where:
        path = Path(where).expanduser()
        folder, module = path.resolve().parent, _import_file(path, spec)
    else:
        folder, module = Path.cwd(), _import_module(where, spec)
    target = _attribute(module, name, spec)

    @functools.wraps(target, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        called = f"{spec}({_listed(kwargs)})" if kwargs else spec
        with importable(folder), _user_code(called, folder):
            return target(*args, **kwargs)

    return call


def build_module(spec: str, **arguments: Any) -> nn.Module:
    """The module that the factory `spec` builds when called with these arguments, by name.

    Its mode, train or eval, is left as the factory leaves it.
    Raises UsageError when the factory needs other arguments or returns something else, and what
    `resolve_factory` raises.
    """
    import torch

    factory = resolve_factory(spec)
    target = getattr(factory, "__wrapped__", factory)
    if isinstance(target, torch.nn.Module):
        raise UsageError(
            f"{spec} is a module that exists already; name a function that builds and returns it."
        )
    _check_arguments(spec, target, arguments)
    try:
        module = factory(**arguments)
    except TypeError as error:  # of a collection's builder, which passes them on
        raise UsageError(
            f"{spec} does not take these arguments ({_listed(arguments)}): {error}."
        ) from error
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError(f"{spec} returned TorchScript; return the nn.Module it was made from.")
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{spec} returned a {type(module).__name__}; it must return an nn.Module.")
    return module


def _listed(arguments: Mapping[str, Any]) -> str:
    """Arguments as they are written in a call; long ones cut."""
    return ", ".join(f"{name}={reprlib.repr(value)}" for name, value in arguments.items())


def _check_arguments(spec: str, target: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises UsageError for arguments that are missing or unknown, with those that there are."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [parameter for parameter in parameters if parameter.kind not in starred]
    by_name = [p.name for p in named if p.kind is not p.POSITIONAL_ONLY]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    unknown = [] if takes_any else [name for name in given if name not in by_name]
    if unknown:
        raise UsageError(
            f"{spec} has no argument {unknown[0]!r}, it takes {', '.join(by_name) or 'none'}"
            f"{_did_you_mean(unknown[0], by_name)}."
        )
    needed = [p.name for p in named if p.default is p.empty and p.name not in given]
    if needed:
        raise UsageError(
            f"{spec} cannot be called without arguments (it needs {', '.join(needed)}); name a "
            "factory that fills them in, such as def net(): return Net(num_classes=10), or, to"
            f" train it, give --set {needed[0]}=VALUE."
        )


# --- importing what the user named ---------------------------------------------------------------


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """`folder` first on sys.path, as Python puts a script's own folder, until the block ends."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have taken it away
            sys.path.remove(entry)


def _import_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"{spec}: {path} does not exist{did_you_mean_file(path)}")
    status = path.stat()
    with importable(path.resolve().parent), _user_code(spec, path.resolve().parent):
        return _run_file(path.resolve(), (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=32)
def _run_file(path: Path, stamp: tuple[int, int]) -> ModuleType:
    """The file as a module, run once for each `stamp` (its time and size)."""
    name = f"{path.stem}_{hashlib.sha256(f'{path}{stamp}'.encode()).hexdigest()[:12]}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(where: str, spec: str) -> ModuleType:
    with importable(Path.cwd()), _user_code(spec, Path.cwd()):
        importlib.invalidate_caches()
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if where != missing and not where.startswith(missing + "."):
                raise  # an import inside the user's code
            raise UsageError(
                f"{spec}: there is no module {missing} in {Path.cwd()} or among the installed "
                f"packages{_did_you_mean(missing, _modules_beside(missing))}."
            ) from error
        except (TypeError, ValueError) as error:  # import_module of ".x" or "a..b"
            raise UsageError(f"{spec}: {where!r} is no module name; write {_FORMS}.") from error


def _modules_beside(name: str) -> list[str]:
    """The modules that stand where `name` was looked for."""
    parent, _, _ = name.rpartition(".")
    if parent:
        paths: Iterable[str] = getattr(sys.modules.get(parent), "__path__", ())
        return [f"{parent}.{info.name}" for info in pkgutil.iter_modules(paths)]
    return [info.name for info in pkgutil.iter_modules([str(Path.cwd())])]


def _attribute(module: ModuleType, name: str, spec: str) -> Callable[..., Any]:
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            known = [key for key in dir(target) if not key.startswith("_")]
            owner = getattr(target, "__file__", None) or getattr(target, "__name__", name)
            raise UsageError(f"{spec}: {owner} has no {part!r}{_did_you_mean(part, known)}.")
        target = getattr(target, part)
    if not callable(target):
        raise UsageError(f"{spec} is a {type(target).__name__}, which cannot be called.")
    return target  # type: ignore[no-any-return]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# --- errors in the user's code -------------------------------------------------------------------


@contextlib.contextmanager
def _user_code(spec: str, folder: Path) -> Iterator[None]:
    """Turns what the user's code raises into a UsageError that says where."""
    try:
        yield
    except BnfoldError:
        raise
    except (Exception, SystemExit) as error:
        what = str(error).strip().splitlines()
        said = f": {what[0]}" if what else ""
        hint = ""
        if "relative import" in said:
            hint = " Name the file as part of its package instead: pkg.mod:factory."
        raise UsageError(
            f"{spec} failed with {type(error).__name__}{said}, at {_place(error, folder)}.{hint}"
        ) from error


def _place(error: BaseException, folder: Path) -> str:
    """`file, line n`: the innermost line of the user's own code, or else the innermost line."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_HERE, "<frozen importlib"))
    ]
    own = [
        frame
        for frame in frames
        if Path(frame.filename).is_relative_to(folder) and "site-packages" not in frame.filename
    ]
    if not frames:
        return "the call itself"
    last = (own or frames)[-1]
    return f"{last.filename}, line {last.lineno}"


# --- model collections ---------------------------------------------------------------------------


def _collection(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"{name} is not installed here ({error}): pip install {name}."
        ) from error


def _torchvision(name: str) -> Callable[..., Any]:
    _collection("torchvision")
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise UsageError(
            f"torchvision has no model {name!r}{_did_you_mean(name, models.list_models())}."
        )
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # its default is a download
    return functools.partial(models.get_model, name, **options)


def _timm(name: str) -> Callable[..., Any]:
    timm = _collection("timm")
    if name not in timm.list_models():
        raise UsageError(f"timm has no model {name!r}{_did_you_mean(name, timm.list_models())}.")
    return functools.partial(timm.create_model, name, pretrained=False)


_COLLECTIONS: dict[str, Callable[[str], Callable[..., Any]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
}
