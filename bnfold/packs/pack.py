"""The domain pack: the statistics of one domain for one network, in one small file.

One base is deployed, and a pack for each domain beside it. A pack says which network it is for and
is refused by any other; it holds a SHA-256 of itself, so that a changed byte shows, and can be
signed (Ed25519, RFC 8032), so that a changed file with a new sum shows too. The file is safetensors
with the tensors `LAYER.running_mean` and `LAYER.running_var`, as a state_dict names them; the same
content gives the same bytes. The format is described in docs/pack.md.

    Pack.of(statistics, base="net.onnx", data="rain").save("rain.pack", sign="key.pem")
    adapted = load_pack("rain.pack", public_key="key.pub.pem").apply("net.onnx")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from bnfold.adapting.base import Adapted, Base, Reading, open_base
from bnfold.errors import InputError, one_line
from bnfold.folding.record import FoldRecord
from bnfold.folding.told import AnyArray
from bnfold.graph import replacing
from bnfold.measuring.diagnosis import symmetric_kl, wasserstein
from bnfold.measuring.statistics import Statistics
from bnfold.packs import signing
from bnfold.saving import as_json
from bnfold.version import VERSION

if TYPE_CHECKING:
    import onnx
    from torch import nn

    Model: TypeAlias = nn.Module | ir.Model | onnx.ModelProto | Path | str

SCHEMA = 1
KEY = "bnfold-pack"
# the statistics of the widest networks are some megabytes
LARGEST = 2**28
_TYPES = {"F64": "DOUBLE", "F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16"}
_DTYPES = {name: np.dtype(ir.DataType[kind].numpy()) for name, kind in _TYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
EPS = 1e-5  # of torch and ONNX, where a pack does not know it
_MEAN, _VAR = ".running_mean", ".running_var"


@dataclass(frozen=True, eq=False)
class PackLayer:
    """One batch norm: mean and var, (num_features,) each, in the type that the base holds them in.

    eps: None where the base was tensors alone.
    """

    eps: float | None
    mean: AnyArray
    var: AnyArray

    @property
    def statistics(self) -> Statistics:
        """In float64."""
        return Statistics(self.mean.astype(np.float64), self.var.astype(np.float64))


@dataclass(frozen=True, eq=False)
class Pack:
    """The statistics of a domain.

    base: SHA-256 sums of the network it is for, of files by name and over its weights (`Base`).
    layers: by the batch norms' names. method, images, options, data: how they were measured, on how
    many images, of what. version: of what wrote it. signed_by: the fingerprint of the key that
    signed the file; whether it did is only known where the public key was given.
    """

    base: Mapping[str, str]
    layers: Mapping[str, PackLayer]
    method: str = ""
    images: int | None = None
    data: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    version: str = f"bnfold {VERSION}"
    signed_by: str | None = None

    @classmethod
    def of(
        cls,
        statistics: Any,
        *,
        base: Model | Base,
        record: FoldRecord | Path | str | None = None,
        factory: str | None = None,
        method: str | None = None,
        images: int | None = None,
        data: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> Pack:
        """A pack of statistics by layer, or of a result that has them as `statistics`.

        base: the network they are for, folded or not; record, factory: as for `open_base`.
        method, images: of the result, unless they are given. options: plain values as JSON has.
        Raises InputError for statistics that the base has no place for.
        """
        found = statistics if isinstance(statistics, Mapping) else statistics.statistics
        network = base if isinstance(base, Base) else open_base(base, record, Reading(factory))
        held = network.layers
        if not found:
            raise InputError("There are no statistics to pack.")
        layers = {}
        for name, new in found.items():
            if name not in held:
                raise InputError(f"{network.label} has no batch norm '{name}' to hold statistics.")
            there = held[name]
            layers[name] = PackLayer(
                there.eps, _as(new.mean, there.mean, name), _as(new.var, there.var, name)
            )
        made = cls(
            dict(network.digests),
            layers,
            method if method is not None else str(getattr(statistics, "method", "")),
            images if images is not None else getattr(statistics, "images", None),
            data,
            as_json(options or {}),
        )
        _check(made)
        return made

    @property
    def statistics(self) -> dict[str, Statistics]:
        """By layer, in float64."""
        return {name: layer.statistics for name, layer in self.layers.items()}

    @property
    def sha256(self) -> str:
        """The SHA-256 of what the pack says: of its file as it is without sum and signature."""
        return hashlib.sha256(_file(_about(self), self.layers)).hexdigest()

    def to_bytes(self, sign: Path | str | None = None) -> bytes:
        """The file; sign: the file of an Ed25519 private key (PEM)."""
        digest = self.sha256
        about = {**_about(self), "sha256": digest}
        if sign is not None:
            about["signature"] = signing.sign(_message(digest), sign)
        return _file(about, self.layers)

    def save(self, path: Path | str, sign: Path | str | None = None) -> None:
        """Write the file, whole or not at all."""
        data = self.to_bytes(sign)
        with replacing(path) as staged:
            staged.write_bytes(data)

    def apply(
        self,
        base: Model,
        record: FoldRecord | Path | str | None = None,
        *,
        factory: str | None = None,
    ) -> Any:
        """The base with the pack's statistics, of the type that came in; `Adapted.model` says more.

        A folded base is unfolded by its record (beside a path, or given), and folded again.
        Raises InputError for another network than the pack was made for.
        """
        return self.applied(open_base(base, record, Reading(factory))).model

    def applied(self, base: Base) -> Adapted:
        """`apply` to a base that was opened, and all there is to know of the result."""
        self.check_is_for(base)
        return base.adapted(self.statistics)

    def check_is_for(self, base: Base) -> None:
        """Raises InputError where the base is not the network that the pack was made for."""
        if not base.is_one_of(self.base):
            raise InputError(
                f"The pack was made for {_named(self.base)}; {base.label} is another network"
                f" ({_named(base.digests)}). Apply it to its own base, or adapt this one."
            )
        for name, layer in self.layers.items():
            held = base.layers.get(name)
            if held is None or held.mean.shape != layer.mean.shape:
                there = "none" if held is None else f"one of {held.mean.size}"
                raise InputError(
                    f"The pack has a batch norm '{name}' of {layer.mean.size} channels,"
                    f" {base.label} has {there}."
                )
            if None not in (layer.eps, held.eps) and layer.eps != held.eps:
                raise InputError(
                    f"The pack's '{name}' has eps {layer.eps:g}, that of {base.label} {held.eps:g}."
                )


def load_pack(path: Path | str, public_key: Path | str | bytes | None = None) -> Pack:
    """Read a pack; with a public key (PEM, or its file) only one that this key signed.

    Raises InputError for a file that is none, of another schema, changed since it was written, or
    with statistics that no batch norm can have; with a public key, for one that is unsigned or that
    another key signed.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise InputError(f"{path} has {size} bytes; no pack has more than {LARGEST}.")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"There is no pack at {path}: {error.strerror}.") from None
    about, layers = _read(data, path)
    digest, signature = about.pop("sha256", None), about.pop("signature", None)
    try:
        pack = _pack(about, layers, signature)
        same = hashlib.sha256(_file(_about(pack), layers)).hexdigest() == digest
        ends = {} if signature is None else {"signature": signature}
        same = same and _file({**_about(pack), "sha256": digest, **ends}, layers) == data
    except _BROKEN as error:
        raise _broken(path, error) from error
    if not same:
        raise InputError(
            f"{path} was changed after it was written: what it holds does not have the SHA-256"
            " that it states. Copy it again."
        )
    if public_key is not None:
        if signature is None:
            raise InputError(f"{path} is not signed; a public key was given, so it must be.")
        signing.check(_message(str(digest)), signature, public_key, str(path))
    try:
        _check(pack)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return pack


# --- how far two packs are apart ------------------------------------------------------------------


@dataclass(frozen=True)
class LayerDiff:
    """One layer of two packs, the first as the unit.

    kl, w2: symmetric Kullback-Leibler divergence and squared 2-Wasserstein distance of the two
    Gaussians, means over channels (as `LayerShift`). mean_move: the largest move of a mean, in
    standard deviations; sd_move: of a standard deviation, relative.
    """

    name: str
    num_features: int
    kl: float
    w2: float
    mean_move: float
    sd_move: float


def diff(a: Pack, b: Pack) -> tuple[LayerDiff, ...]:
    """The layers that both packs have, in the order of `a`.

    Raises InputError for packs of different networks.
    """
    if set(a.base.values()).isdisjoint(b.base.values()):
        raise InputError(f"One pack was made for {_named(a.base)}, the other for {_named(b.base)}.")
    rows = []
    for name, first in a.layers.items():
        if name not in b.layers:
            continue
        one, two = first.statistics, b.layers[name].statistics
        eps = EPS if first.eps is None else first.eps
        unit = one.var + eps
        shift, ratio = (two.mean - one.mean) / np.sqrt(unit), (two.var + eps) / unit
        rows.append(
            LayerDiff(
                name,
                len(shift),
                float(symmetric_kl(shift, ratio).mean()),
                float(wasserstein(shift, ratio).mean()),
                float(np.abs(shift).max()),
                float(np.abs(np.sqrt(ratio) - 1).max()),
            )
        )
    return tuple(rows)


# --- the file -------------------------------------------------------------------------------------


def _about(pack: Pack) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "base": dict(sorted(pack.base.items())),
        "layers": {
            name: {"num_features": len(layer.mean), "eps": layer.eps}
            for name, layer in pack.layers.items()
        },
        "method": pack.method,
        "images": pack.images,
        "data": pack.data,
        "options": dict(pack.options),
        "version": pack.version,
    }


def _file(about: Mapping[str, Any], layers: Mapping[str, PackLayer]) -> bytes:
    """A safetensors file, written here because the same content must give the same bytes."""
    tensors = {f"{name}{_MEAN}": layer.mean for name, layer in layers.items()}
    tensors |= {f"{name}{_VAR}": layer.var for name, layer in layers.items()}
    header: dict[str, Any] = {"__metadata__": {KEY: _dumps(about)}}
    parts: list[bytes] = []
    at = 0
    for name, array in sorted(tensors.items(), key=lambda pair: (-pair[1].itemsize, pair[0])):
        part = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(part)],
        }
        parts.append(part)
        at += len(part)
    text = _dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


# what a file that only looks like a pack makes of the code below
_BROKEN = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)


def _broken(path: Path, error: Exception) -> InputError:
    text = one_line(error)
    return InputError(f"{path} is not a domain pack, or is damaged: {text}.")


def _read(data: bytes, path: Path) -> tuple[dict[str, Any], dict[str, PackLayer]]:
    """What the file says and holds, not checked yet."""
    try:
        size = int.from_bytes(data[:8], "little")
        if not 0 < size <= len(data) - 8:
            raise ValueError("it was cut short")
        header = json.loads(data[8 : 8 + size])
        about = json.loads(header.pop("__metadata__")[KEY])
        if about["schema"] != SCHEMA:
            raise InputError(
                f"{path} is a domain pack of schema {about['schema']}; this bnfold reads schema"
                f" {SCHEMA}. Read it with the bnfold that wrote it, or make it again."
            )
        body = memoryview(data)[8 + size :]
        tensors = {name: _tensor(entry, body) for name, entry in header.items()}
        layers = {
            str(name): PackLayer(
                said["eps"] if said["eps"] is None else float(said["eps"]),
                tensors[f"{name}{_MEAN}"],
                tensors[f"{name}{_VAR}"],
            )
            for name, said in about["layers"].items()
        }
    except (*_BROKEN, RecursionError) as error:
        raise _broken(path, error) from error
    return about, layers


def _tensor(entry: Any, body: memoryview) -> AnyArray:
    dtype, (begin, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
    (count,) = entry["shape"]
    if not 0 <= begin <= end <= len(body) or count * dtype.itemsize != end - begin:
        raise ValueError("it was cut short")
    return np.frombuffer(body[begin:end], dtype)


def _pack(about: Mapping[str, Any], layers: Mapping[str, PackLayer], signature: Any) -> Pack:
    if about["images"] is not None and not isinstance(about["images"], int):
        raise ValueError("its number of images is none")
    return Pack(
        {str(name): str(digest) for name, digest in about["base"].items()},
        layers,
        str(about["method"]),
        about["images"],
        str(about["data"]),
        dict(about["options"]),
        str(about["version"]),
        None if signature is None else str(signature["key"]),
    )


def _message(digest: str) -> bytes:
    """What is signed: the sum, and what it is a sum of."""
    return f"{KEY} {SCHEMA}\n{digest}".encode()


def _check(pack: Pack) -> None:
    """Raises InputError for statistics that no batch norm can have."""
    for name, layer in pack.layers.items():
        mean, var = layer.mean.astype(np.float64), layer.var.astype(np.float64)
        eps = 0.0 if layer.eps is None else layer.eps
        for what, bad in (
            (f"{mean.size} means and {var.size} variances", mean.shape != var.shape),
            ("no channels", not mean.size),
            ("a mean that is not finite", not np.isfinite(mean).all()),
            ("a variance that is not finite", not np.isfinite(var).all()),
            ("a variance below 0", bool(np.any(var < 0))),
            (f"eps {eps:g}", not 0 <= eps < np.inf),
        ):
            if bad:
                raise InputError(f"'{name}' has {what}, which no batch norm can have.")


def _as(new: AnyArray, there: AnyArray, name: str) -> AnyArray:
    """A statistic in the type of the base."""
    if np.shape(new) != there.shape:
        raise InputError(f"'{name}' has {there.size} channels, its statistics {np.size(new)}.")
    with np.errstate(over="ignore"):
        stored = np.asarray(new, np.float64).astype(there.dtype)
    if np.isfinite(new).all() and not np.isfinite(stored.astype(np.float64)).all():
        raise InputError(
            f"A statistic of '{name}' reaches {np.abs(new).max():.3g}, which {there.dtype} cannot"
            " hold; convert the model to float32 before it is adapted."
        )
    return stored


def _named(digests: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {digest[:12]}" for name, digest in digests.items()) or "nothing"
