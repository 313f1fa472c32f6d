"""Exported programs (.pt2), opened without running what is written in them.

torch.export.load trusts its file: it unpickles sample inputs and custom objects, loads compiled
libraries, and evaluates expressions of the graph as Python. So a .pt2 is read here first, member
by member and, in the graph, field by field (export_fields.py), and then written anew in memory:
torch loads only what was looked at, and what is not known is refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bnfold.errors import InputError, UnsafeInputError, UsageError
from bnfold.reading.export_fields import RefusedFieldError, checked_fields
from bnfold.reading.pickled import first_line, without_warnings
from bnfold.reading.sniff import Kind, refuse_zip_bomb, sniff

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_PAYLOADS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_COPIED = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|version"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+"
)
_LEFT_OUT = re.compile(r"extra/.*|\.data/.*|\.format_version|\.storage_alignment")

_AGAIN = "Export the model again on a machine you trust, or convert it to ONNX there"


def load_exported_program(path: str | Path) -> ExportedProgram:
    """The program in a .pt2 that torch.export.save wrote, on the CPU.

    Stack traces, extra files and other metadata of the file are not kept.
    Raises UnsafeInputError, naming the field, for anything that could run code: pickles beyond
    tensors, compiled libraries, custom objects, operators outside torch's own; InputError for a
    damaged file or one of another version; UsageError when the file is no .pt2.
    """
    import torch

    path = Path(path)
    if (kind := sniff(path)) is not Kind.EXPORTED_PROGRAM:
        raise UsageError(f"{path} is {kind.label}, not a torch.export program (.pt2).")
    try:
        rewritten = _rewrite(path)
    except InputError:
        raise
    except RefusedFieldError as refusal:
        raise UnsafeInputError(f"{path} is not opened: {refusal}. {_AGAIN}.") from refusal
    except Exception as error:  # zip, JSON and pickle readers, on bytes of any kind
        raise InputError(
            f"{path} is a .pt2 that cannot be read ({first_line(error)}): it is damaged, or of a "
            f"version that torch {torch.__version__} and bnfold do not know."
        ) from error
    with _listening() as logged:
        try:
            return torch.export.load(rewritten)
        except Exception as error:
            reason = _root(logged[-1] if logged else error)
            raise InputError(
                f"{path} cannot be loaded by torch {torch.__version__}: "
                f"{first_line(reason)[:300]}. Export it again with this version."
            ) from error


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _listening() -> Iterator[list[BaseException]]:
    """torch.export prints why it failed as a traceback, and raises something else: keep the why."""
    logged: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1]:
            logged.append(record.exc_info[1])
        return False

    logger = logging.getLogger("torch.export")
    logger.addFilter(keep)
    try:
        with without_warnings():
            yield logged
    finally:
        logger.removeFilter(keep)


def _rewrite(path: Path) -> io.BytesIO:
    """The archive again, member by member, each one checked; what is not known is refused."""
    rewritten = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(rewritten, "w") as output:
        seen: set[str] = set()
        for entry in archive.infolist():
            name = entry.filename.partition("/")[2] or entry.filename
            if name in seen:
                raise RefusedFieldError(f"it holds the member {name} twice")
            seen.add(name)
            if not _LEFT_OUT.fullmatch(name) or name == ".data/version":
                output.writestr(f"model/{name}", _checked(name, archive.read(entry)))
    if _MODEL not in seen:
        raise InputError(f"{path} holds no graph ({_MODEL}); save it with torch.export.save.")
    rewritten.seek(0)
    return rewritten


def _checked(name: str, data: bytes) -> bytes:
    """The bytes to write for a member, after looking at them."""
    if name == _MODEL:
        return json.dumps(checked_fields(json.loads(data), "program")).encode()
    if name in _PAYLOADS:
        return json.dumps(checked_fields(json.loads(data), "payload")).encode()
    if name == _SAMPLES:
        return _checked_samples(data)
    if _COPIED.fullmatch(name):
        return data
    raise RefusedFieldError(f"its member {name} is none that a plain exported model has")


def _checked_samples(data: bytes) -> bytes:
    """The example inputs, pickled anew from what torch's safe reader found in them."""
    import torch

    if not data:
        return data
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            refuse_zip_bomb(_SAMPLES, archive.infolist(), len(data))
    try:
        with without_warnings():
            samples = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise RefusedFieldError(
            "its sample inputs are a pickle that does more than hold tensors, and loading it "
            "would run code"
        ) from error
    written = io.BytesIO()
    torch.save(samples, written)
    return written.getvalue()
