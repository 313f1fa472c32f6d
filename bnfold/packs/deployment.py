"""One base model in a running service, and domain packs that are put into it and taken out again.

    deployment = bnfold.load("net.onnx", "sunny.pack")
    deployment.run({"input": images})
    deployment.swap("rain.pack")

No file is rewritten. A session of onnxruntime cannot change its weights, so each pack gets one of
its own: it is made while the one before goes on serving, and then takes its place. The graph is
kept without its weights, which are given as they lie in memory (`runtime.open_with_weights`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from bnfold import bare, graph
from bnfold.adapting.base import Base, open_base
from bnfold.errors import InputError, UsageError
from bnfold.folding.constants import FLOATS
from bnfold.folding.record import FoldRecord
from bnfold.folding.told import AnyArray
from bnfold.measuring.norms import norms_of, stored
from bnfold.measuring.statistics import Statistics
from bnfold.packs.pack import Pack, load_pack
from bnfold.packs.shortcut import shortcut_of
from bnfold.proof.places.runtime import Session, open_with_weights

# operators whose floats say how large their output is: onnxruntime must see them in the model
_SIZES = ("Resize", "Upsample", "Range", "Loop")


def load(
    base: ir.Model | onnx.ModelProto | Path | str,
    pack: Pack | Path | str | None = None,
    *,
    record: FoldRecord | Path | str | None = None,
    provider: str = "cpu",
    public_key: Path | str | bytes | None = None,
    keep: int = 4,
    threads: int | None = None,
) -> Deployment:
    """An onnxruntime session of `base` with the statistics of `pack`, to be swapped for others.

    base: an ONNX model, folded (with its record beside the path, or given) or not. provider: "cpu"
    or "cuda", never another one in silence. public_key: every pack must be signed by it. keep: how
    many packs stay ready, those used last. threads: of a run, within onnxruntime.
    Raises InputError for a base that is no ONNX model, and as `load_pack`;
    RuntimeUnavailableError where the provider cannot run here.
    """
    if keep < 1:
        raise UsageError(f"keep is {keep}; it must be 1 or more.")
    network = open_base(base, record)
    if network.graph is None or network.state_dict is not None:
        raise InputError(
            f"{network.label} is no ONNX model; onnxruntime runs .onnx (`bnfold export` makes one)."
        )
    deployment = Deployment(network, provider, public_key, keep, threads)
    deployment.swap(pack)
    return deployment


@dataclass(frozen=True, eq=False)
class Serving:
    """What a deployment serves at one moment; it stays as it is when another pack is swapped in.

    pack: None for the base's own statistics. session: with the evidence of where it runs.
    """

    pack: Pack | None
    session: Session

    def run(self, inputs: Mapping[str, AnyArray]) -> dict[str, Any]:
        """The outputs by name."""
        if not isinstance(inputs, Mapping):
            raise UsageError("run takes a mapping from input names to arrays.")
        return self.session.run(inputs)


class Deployment:
    """A base and the pack in use; see `load`. Any thread may run or swap at any time."""

    def __init__(
        self,
        base: Base,
        provider: str,
        public_key: Path | str | bytes | None,
        keep: int,
        threads: int | None,
    ) -> None:
        self._base, self._provider, self._threads = base, provider, threads
        self._public_key, self._keep = public_key, keep
        self._model = _Model(base)
        self._ready: OrderedDict[str, Serving] = OrderedDict()
        self._lock = threading.Lock()
        self._serving: Serving | None = None

    @property
    def serving(self) -> Serving:
        """The pack and the session in use, which belong together whatever is swapped meanwhile."""
        assert self._serving is not None
        return self._serving

    @property
    def pack(self) -> Pack | None:
        """The pack in use; None for the base's own statistics."""
        return self.serving.pack

    @property
    def session(self) -> Session:
        """The session in use, with the evidence of where it runs."""
        return self.serving.session

    def run(self, inputs: Mapping[str, AnyArray]) -> dict[str, Any]:
        """The outputs by name, with the pack that is in use when the run begins."""
        return self.serving.run(inputs)

    def swap(self, pack: Pack | Path | str | None) -> Serving:
        """Use another pack, or None for the base's own statistics; runs that began end as they are.

        Gives what serves from now on. One of the packs used last is there at once. Raises
        InputError for a pack that is refused; the pack in use then stays.
        """
        if not isinstance(pack, Pack | Path | str | None):
            raise UsageError(f"A pack, its path or None is swapped in; this is {pack!r}.")
        if pack is not None and not isinstance(pack, Pack):
            pack = load_pack(pack, self._public_key)
        elif pack is not None and self._public_key is not None:
            raise UsageError("With a public_key, packs are given as files, whose signature counts.")
        key = pack.sha256 if pack is not None else ""
        with self._lock:
            made = self._ready.get(key) or Serving(pack, self._session(pack))
            self._ready[key] = made
            self._ready.move_to_end(key)
            while len(self._ready) > self._keep:
                self._ready.popitem(last=False)
            self._serving = made
            return made

    def _session(self, pack: Pack | None) -> Session:
        if pack is not None:
            pack.check_is_for(self._base)
        data, weights = self._model.with_pack(pack)
        return open_with_weights(data, weights, self._provider, threads=self._threads)


class _Model:
    """The base as onnxruntime takes it: a graph without its weights, and the weights."""

    def __init__(self, base: Base) -> None:
        # the folded model as it came, where there is one
        own = base.back.folded if base.back is not None else base.graph
        assert own is not None
        self._base = base
        self._data, self._weights = halves(own)
        self._norms = norms_of(own)
        self._shortcut = None
        if base.back is not None:
            self._shortcut = shortcut_of(base.back, self._weights)

    def with_pack(self, pack: Pack | None) -> tuple[bytes, dict[str, AnyArray]]:
        """Both halves with the pack's statistics."""
        if pack is None:
            return self._data, self._weights
        changed = self._changed(pack.statistics)
        if changed is not None:
            return self._data, {**self._weights, **changed}
        adapted = self._base.adapted(pack.statistics)
        model = adapted.graph if adapted.fold is None else adapted.fold.graph
        assert model is not None
        return halves(model)

    def _changed(self, statistics: Mapping[str, Statistics]) -> dict[str, AnyArray] | None:
        """The weights that the statistics change; None where only a plan can tell."""
        found: dict[str, AnyArray] = {}
        if self._base.back is not None:
            folded = {n: new for n, new in statistics.items() if n not in self._norms}
            short = self._shortcut.weights(folded) if self._shortcut is not None else None
            if short is None:
                return None
            found.update(short)
        for name in statistics.keys() & self._norms.keys():
            norm = self._norms[name]
            new = stored(norm, statistics[name])
            for held, array in ((norm.mean, new.mean), (norm.var, new.var)):
                root = str(held.root.name)
                if root not in self._weights or held.views:
                    return None
                found[root] = array.astype(self._weights[root].dtype)
        return found


def halves(model: ir.Model) -> tuple[bytes, dict[str, AnyArray]]:
    """A graph without its floats, and these by name; constants behind Constant nodes too."""
    without = model.clone()
    passes.LiftConstantsToInitializersPass()(without)
    weights: dict[str, AnyArray] = {}
    for name, value in without.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in FLOATS or not len(tensor.shape.numpy()):
            continue
        sizes = any(user.op_type in _SIZES for user, _ in value.uses())
        if sizes or value.is_graph_input() or value.is_graph_output():
            continue
        weights[name] = np.ascontiguousarray(tensor.numpy())
        value.const_value = bare.elsewhere(tensor)
    with graph.as_declared(without):
        return bytes(ir.to_proto(without).SerializeToString()), weights
