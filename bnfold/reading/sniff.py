"""What kind of file a path names, told by its content.

A suffix is a wish: checkpoints are called `.th`, `.ckpt` or `.bin`, a download that failed is an
HTML page called `model.onnx`, and torch's own error for any of these speaks of miniz. So the
first bytes decide, or the names in the zip directory, and what is no model is refused with a
sentence that says what it is. Nothing here unpickles, imports or decompresses anything.
"""

import difflib
import enum
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO

from bnfold.errors import InputError, UnsafeInputError

HEAD_BYTES = 512

# A zip may unpack to this many bytes, or to this many times its own size, whichever is more.
UNPACKED_BYTES = 1 << 30
UNPACKED_RATIO = 64

# The number 0x1950a86a20f9469cfc6c, pickled: how torch.save began a file before torch 1.6.
LEGACY_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_UNPACK = "unpack it and give the model inside"
_STRANGERS: tuple[tuple[int, bytes, str], ...] = (
    (
        0,
        b"version https://git-lfs.github.com/spec/",
        "is a Git LFS pointer, not the file itself: run git lfs pull",
    ),
    (0, b"\x93NUMPY", "is a NumPy array, which is data and not a model"),
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file (as Keras writes): export the model to ONNX first"),
    (0, b"GGUF", "is a GGUF file, which bnfold does not read: export the model to ONNX"),
    (4, b"TFL3", "is a TensorFlow Lite model: convert it to ONNX first"),
    (0, b"\x1f\x8b", f"is a gzip archive: {_UNPACK}"),
    (0, b"BZh", f"is a bzip2 archive: {_UNPACK}"),
    (0, b"\xfd7zXZ\x00", f"is an xz archive: {_UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"is a zstd archive: {_UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"is a 7z archive: {_UNPACK}"),
    (0, b"Rar!\x1a\x07", f"is a rar archive: {_UNPACK}"),
    (
        257,
        b"ustar",
        f"is a tar archive: {_UNPACK} (a checkpoint of torch 0.1 must be saved again first)",
    ),
    (0, b"\x89PNG\r\n\x1a\n", "is a PNG image, not a model"),
    (0, b"\xff\xd8\xff", "is a JPEG image, not a model"),
    (0, b"%PDF-", "is a PDF document, not a model"),
    (0, b"\x7fELF", "is a compiled program or library, not a model"),
    (0, b"PK\x05\x06", "is an empty zip archive"),
)


class Kind(enum.StrEnum):
    """The files that hold a model bnfold knows."""

    ONNX = "onnx"
    EXPORTED_PROGRAM = "pt2"
    CHECKPOINT = "checkpoint"
    SAFETENSORS = "safetensors"
    TORCHSCRIPT = "torchscript"

    @property
    def label(self) -> str:
        """The kind as a sentence names it, with its article."""
        return _LABELS[self]


_LABELS = {
    Kind.ONNX: "an ONNX model",
    Kind.EXPORTED_PROGRAM: "a torch.export program (.pt2)",
    Kind.CHECKPOINT: "a torch checkpoint",
    Kind.SAFETENSORS: "a safetensors file",
    Kind.TORCHSCRIPT: "a TorchScript archive",
}


def sniff(path: str | Path) -> Kind:
    """The kind of the file at `path`, from its content alone.

    Raises InputError, with what was found and what to do, for a path that names no file, an empty
    or truncated file, a Git LFS pointer, a web page, another archive, and anything unknown; and
    UnsafeInputError for a zip that would unpack to far more than its own size.
    An ONNX model is judged by its outermost protobuf fields only; the rest is the parser's.
    """
    path = Path(path)
    size = _size_of_file(path)
    if size == 0:
        raise InputError(f"{path} is empty (0 bytes): copy or export it again.")
    try:
        with path.open("rb") as file:
            return _kind_of(path, file, size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def _size_of_file(path: Path) -> int:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist{did_you_mean_file(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{path} cannot be read: {error}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path} is a folder; give the model file inside it.")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a regular file (a pipe, a socket or a device).")
    return status.st_size


def did_you_mean_file(path: Path) -> str:
    """`; did you mean X?` with the nearest name in the same folder, or a full stop."""
    try:
        neighbours = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return "."
    near = difflib.get_close_matches(path.name, neighbours, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else "."


def _kind_of(path: Path, file: BinaryIO, size: int) -> Kind:
    head = file.read(HEAD_BYTES)
    for offset, magic, sentence in _STRANGERS:
        if head.startswith(magic, offset):
            raise InputError(f"{path} {sentence}.")
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path, size)
    if head[:1] == b"\x80" and head.startswith(LEGACY_TORCH_MAGIC, 2):
        return Kind.CHECKPOINT
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise UnsafeInputError(
            f"{path} is a plain Python pickle, which can run code when it is loaded. In the "
            "program that wrote it, save the weights with "
            "torch.save(model.state_dict(), 'weights.pt') and pass that with --model."
        )
    # Before ONNX: an 8-byte length below 2**40 has zero bytes where protobuf can have none.
    if head[8:9] == b"{" and head[5:8] == b"\x00\x00\x00":
        return Kind.SAFETENSORS
    if _is_onnx(path, file, size):
        return Kind.ONNX
    raise InputError(f"{path} {_stranger(head)}.")


def _stranger(head: bytes) -> str:
    """What unknown bytes look like, as the end of a sentence."""
    formats = "(ONNX, .pt2, a torch checkpoint or safetensors)"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "is a web page (HTML), not a model: the download failed, fetch the file itself"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return f"is none of the formats that bnfold reads {formats}; it may be damaged"
        text = head[: error.start].decode("utf-8")
    if all(character.isprintable() or character in "\t\r\n\f" for character in text):
        return f"is a text file, not one of the formats that bnfold reads {formats}"
    return f"is none of the formats that bnfold reads {formats}; it may be damaged"


# --- zip archives: torch checkpoints, TorchScript, torch.export ----------------------------------


def _kind_of_zip(path: Path, size: int) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises nine types for what it cannot parse
        raise InputError(
            f"{path} is a zip archive that was cut short or damaged ({error}): copy it again."
        ) from error
    # A directory found behind other data belongs to an archive stored inside this one.
    if entries and min(entry.header_offset for entry in entries) > 0:
        raise InputError(
            f"{path} is a zip archive that was cut short or damaged (its directory is missing): "
            "copy it again."
        )
    refuse_zip_bomb(str(path), entries, size)
    names = [entry.filename for entry in entries]
    inner = {name.partition("/")[2] for name in names}  # torch puts all under one folder
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return Kind.TORCHSCRIPT
    if "archive_format" in inner or any(name.startswith("models/") for name in inner):
        return Kind.EXPORTED_PROGRAM
    if "data.pkl" in inner:
        return Kind.CHECKPOINT
    if "serialized_exported_program.json" in names:
        raise InputError(
            f"{path} was written by torch.export of torch 2.7 or older: load it there and save it "
            "again with torch 2.8 or newer."
        )
    if names and all(name.endswith(".npy") for name in names):
        raise InputError(f"{path} is a NumPy archive (.npz), which is data and not a model.")
    shown = ", ".join(repr(name) for name in names[:3])
    raise InputError(f"{path} is a zip archive that holds no model known to bnfold ({shown}, ...).")


def refuse_zip_bomb(name: str, entries: list[zipfile.ZipInfo], size: int) -> None:
    """Raise UnsafeInputError when the entries unpack to far more than the `size` bytes on disk."""
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > max(UNPACKED_BYTES, UNPACKED_RATIO * size):
        raise UnsafeInputError(
            f"{name} has {size} bytes and would unpack to {unpacked}: a zip bomb. torch.save "
            "does not compress; if the file is yours, load it and save it again."
        )


# --- ONNX: the outermost fields of a protobuf ModelProto -----------------------------------------

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_IR_VERSION, _GRAPH = 1, 7
# field number -> wire type, from onnx.proto's ModelProto
_MODEL_PROTO = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_NEWEST_FIELD = 64  # numbers that onnx may yet give out; larger ones are other formats


def _is_onnx(path: Path, file: BinaryIO, size: int) -> bool:
    """Whether the file is a sequence of ModelProto fields with an ir_version and a graph.

    Skips over the fields' contents. Raises InputError for a model whose last field runs past the
    end of the file.
    """
    seen: set[int] = set()
    position = 0
    while position < size:
        file.seek(position)
        header = file.read(20)  # a tag and a length: at most ten bytes each
        try:
            tag, used = _varint(header, 0)
            field, wire = tag >> 3, tag & 7
            value, used = _varint(header, used) if wire in (_VARINT, _BYTES) else (0, used)
        except IndexError:  # the file ends inside the tag
            position = size + 1
            break
        except ValueError:
            return False
        skip = {_VARINT: 0, _FIXED64: 8, _BYTES: value, _FIXED32: 4}.get(wire)
        if not 0 < field < _NEWEST_FIELD or _MODEL_PROTO.get(field, wire) != wire or skip is None:
            return False
        seen.add(field)
        position += used + skip
    if _IR_VERSION in seen and position > size:
        raise InputError(
            f"{path} looks like an ONNX model that was cut short: its last field runs past the "
            f"end of its {size} bytes. Copy it again."
        )
    return {_IR_VERSION, _GRAPH} <= seen and position == size


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """The base-128 number at `start` and the position behind it."""
    value = 0
    for position in range(start, start + 10):
        value |= (data[position] & 0x7F) << 7 * (position - start)
        if data[position] < 0x80:
            return value, position + 1
    raise ValueError("a varint of more than ten bytes")
