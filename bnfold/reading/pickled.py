"""Reading torch's pickles without running them.

A pickle is a program. torch's weights_only reader runs a small part of that language, in which
only listed names can be called, and refuses the rest. bnfold always reads with it, never falls
back, and lists nothing more than the layer classes of torch.nn.modules, so that a whole model
saved with torch.save(model) opens when it is built of those alone. Such a model is then looked
through: no hooks, nothing callable, nothing that stands in for a method. Whatever else a file
names is told to the user by name. Only `trust_pickle=True`, which a person has to ask for, lets
Python's own pickle run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import pickletools
import re
import warnings
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bnfold.errors import InputError, UnsafeInputError
from bnfold.reading.factory import importable

if TYPE_CHECKING:
    from torch import nn

_LEGACY_PICKLES = 4  # magic number, protocol, system, and then the object

# What torch.save(model) names beside the model's classes.
_MODEL_PARTS = re.compile(
    r"collections\.OrderedDict|(__builtin__|builtins)\.set"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.(storage\.)?\w*Storage|torch\.(Size|device)|torch\.[a-z]+\d*"
)

_TABLES = ("_parameters", "_buffers", "_modules")
_MOST_LAYERS = 20_000
_DEEPEST_LAYER = 100

# Packages whose objects training scripts leave in checkpoints.
_LEFTOVERS = ("argparse.", "pathlib.", "numpy.", "datetime.", "omegaconf.", "torch.")

_SAVE_WEIGHTS = (
    "Save the weights alone, torch.save(model.state_dict(), 'weights.pt'), in the program that "
    "wrote the file, and pass them with --model pkg.mod:factory"
)


def load_pickled(path: Path, *, trust_pickle: bool = False) -> tuple[Any, bool]:
    """What torch.save wrote to `path`, on the CPU, and whether pickle itself had to run.

    Raises UnsafeInputError, naming the classes and functions, when the file asks for anything
    but tensors, plain containers and layers of torch.nn.modules; InputError when it is damaged.
    With `trust_pickle`, a file refused so is loaded by pickle itself, which runs what it says.
    """
    named = globals_in_file(path)
    modules, foreign = _split(named)
    try:
        return _load_safely(path, modules), False
    except Exception as error:  # the reader raises whatever the file makes it raise
        if trust_pickle:
            return _load_trusted(path), True
        raise _refusal(path, foreign, error) from error


def _split(named: set[str]) -> tuple[list[type[nn.Module]], list[str]]:
    """The layer classes to allow for a file that names `named`, and the names that forbid it."""
    plain = plain_module_classes()
    refused = refused_globals(named)
    foreign = [name for name in refused if name not in plain]
    if refused and not foreign:
        # A listed class is reachable by every listed function, so keep to those a model needs.
        foreign = sorted(name for name in named - plain.keys() if not _MODEL_PARTS.fullmatch(name))
    return ([] if foreign else [plain[name] for name in refused]), foreign


def _load_safely(path: Path, allowed: list[Any]) -> Any:
    import torch

    # An open file, because torch.load takes a path ending in .safetensors at its word.
    with without_warnings(), path.open("rb") as file, torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True)


def _load_trusted(path: Path) -> Any:
    import torch

    try:
        with without_warnings(), path.open("rb") as file, importable(Path.cwd()):
            return torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:
        hint = ""
        if isinstance(error, ImportError | AttributeError):
            hint = " Run bnfold in the folder from which the file's classes can be imported."
        raise InputError(f"{path} cannot be unpickled: {first_line(error)}.{hint}") from error


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Torch warns about pickle protocols and storage classes; the user can change neither."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refusal(path: Path, foreign: list[str], error: Exception) -> InputError:
    """Why the safe reader could not read the file, and what to do."""
    if foreign:
        shown = ", ".join(foreign[:6]) + (f" and {len(foreign) - 6} more" * (len(foreign) > 6))
        what = "more than tensors and torch's own layers"
        if all(name.startswith(_LEFTOVERS) for name in foreign):
            what = "objects beside its weights"
        return UnsafeInputError(
            f"{path} holds {what}, and loading that can run code: {shown}. {_SAVE_WEIGHTS}; or, "
            "if you trust whoever made the file, pass --trust-pickle."
        )
    if isinstance(error, pickle.UnpicklingError):
        return UnsafeInputError(
            f"{path} is a pickle that torch's safe reader refuses ({_reason(error)}). "
            f"{_SAVE_WEIGHTS}; or, if you trust whoever made the file, pass --trust-pickle."
        )
    return InputError(
        f"{path} begins like a torch checkpoint and cannot be read to its end, so it was cut "
        f"short or damaged: {first_line(error)}. Copy it again."
    )


def _reason(error: Exception) -> str:
    """The reader's own reason, without torch's advice to switch the safe reader off."""
    text = str(error)
    if "Unsupported operand" in text:
        return "it was written with pickle protocol 3 or newer; torch.save writes protocol 2"
    if "persistent_load" in text:
        return "a whole model in the format of torch 1.5 or older, which carries source code"
    for line in text.splitlines():
        if "WeightsUnpickler error:" in line and line.split("error:", 1)[1].strip():
            return line.split("error:", 1)[1].strip()
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The type of an exception and the first line of what it says, for the inside of a sentence."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__


# --- which names a pickle asks for ---------------------------------------------------------------


def globals_in_file(path: Path) -> set[str]:
    """`module.name` of every class and function that a torch file's pickles name; none if damaged.

    Read from the opcodes; nothing is run or imported.
    """
    names: set[tuple[str, str]] = set()
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        if file.read(4) == b"PK\x03\x04":  # as torch decides
            archive = stack.enter_context(zipfile.ZipFile(file))
            for entry in archive.namelist():
                if entry.lower().endswith("data.pkl"):  # torch finds members in any case
                    names |= _globals_in_pickle(io.BytesIO(archive.read(entry)))
        else:
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                names |= _globals_in_pickle(file)
    return {f"{module}.{name}" for module, name in names}


def refused_globals(named: set[str]) -> list[str]:
    """Those of the `module.name`s that torch's safe reader does not list.

    They serve the messages and the choice among plain layers; what may be called is decided by
    the reader itself.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    # torch answers for a checkpoint of its zip format, so ask with one that only names them.
    pairs = [name.rpartition(".") for name in sorted(named)]
    asked = "".join(f"c{module}\n{name}\n" for module, _, name in pairs)
    checkpoint = io.BytesIO()
    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("names/data.pkl", b"\x80\x02" + asked.encode() + b".")
        archive.writestr("names/version", b"3\n")
    checkpoint.seek(0)
    return sorted(get_unsafe_globals_in_checkpoint(checkpoint))


def _globals_in_pickle(stream: BinaryIO) -> set[tuple[str, str]]:
    names: set[tuple[str, str]] = set()
    strings: list[str] = []  # STACK_GLOBAL takes its two names from the stack
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            names.add((module, name))
        elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
            names.add((strings[-2], strings[-1]))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET") and argument in memo:
            strings.append(memo[argument])
        elif isinstance(argument, str):
            strings.append(argument)
    return {pair for pair in names if not any(c in "\r\n" for c in "".join(pair))}


# --- models of plain torch layers ----------------------------------------------------------------


@functools.cache
def plain_module_classes() -> dict[str, type[nn.Module]]:
    """Full name -> class, for the layers that torch.nn.modules makes public."""
    from torch import nn
    from torch.nn import modules

    found = [getattr(modules, name) for name in modules.__all__]
    found.append(modules.linear.NonDynamicallyQuantizableLinear)  # inside MultiheadAttention
    return {
        f"{cls.__module__}.{cls.__qualname__}": cls
        for cls in found
        if issubclass(cls, nn.Module) and cls.__module__.startswith("torch.nn.modules.")
    }


def check_plain_module(module: nn.Module, path: Path) -> None:
    """Raise UnsafeInputError unless `module` is data: layers, tensors, numbers and strings.

    The safe reader lets a file set any attribute of a layer to anything it may build, so a file
    can hang one of the listed functions in as a hook or in the place of a method.
    """
    if fault := _fault(module):
        raise UnsafeInputError(
            f"{path} holds a model of torch layers that torch itself would not have written: "
            f"{fault}. {_SAVE_WEIGHTS}."
        )


def _fault(root: nn.Module) -> str | None:
    """What is wrong with the model, layer by layer, each as often as state_dict() meets it."""
    from torch import nn

    waiting: list[tuple[object, str, int]] = [(root, "", 0)]
    for _ in range(_MOST_LAYERS):
        if not waiting:
            return None
        layer, name, depth = waiting.pop()
        here = f"layer {name!r}" if name else "the model"
        if not isinstance(layer, nn.Module):
            return f"{here} is a {type(layer).__name__}"
        if depth > _DEEPEST_LAYER:
            return "its layers are nested without end"
        if fault := _fault_of_layer(layer, here):
            return fault
        children = vars(layer)["_modules"].items()
        waiting += [
            (child, f"{name}.{key}" if name else str(key), depth + 1)
            for key, child in children
            if child is not None
        ]
    return f"it has more than {_MOST_LAYERS} layers"


def _fault_of_layer(layer: nn.Module, here: str) -> str | None:
    if type(layer) not in plain_module_classes().values():
        return f"{here} is a {type(layer).__name__}"
    state = vars(layer)
    for key, value in state.items():
        if callable(getattr(type(layer), key, None)):
            return f"{here} replaces the method {key}"
        if isinstance(value, dict) and "hook" in key and value:
            return f"{here} has entries in {key}"
        if key != "_modules" and not _is_data(value):
            return f"attribute {key} of {here} holds more than data"
    if not all(isinstance(state.get(table), dict) for table in _TABLES):
        return f"{here} was never initialised"
    return None


def _is_data(value: object) -> bool:
    import torch

    leaves = (
        *(bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.nn.Parameter),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    )
    waiting, met = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, weakref.ref):  # torch's RNN layers make these of their weights
            item = item()
        if type(item) in leaves or id(item) in met:
            continue
        met.add(id(item))
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            waiting += item
        else:
            return False
    return True
