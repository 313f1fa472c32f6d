"""An interrupted run goes on from its last merged state, and ends as a whole one does.

The state is a file of the layers that were settled so far, of all processes together, and of the
run's identity. It is rewritten whole, or not at all, each time; it is gone when the run is
complete. Another run's state is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnfold.errors import InputError, UsageError
from bnfold.graph import replacing
from bnfold.measuring.moments import ImageMoments
from bnfold.measuring.ranks import Ranks
from bnfold.measuring.stored import Waiting, from_bytes, to_bytes

FORMAT = "bnfold-state-1"
_DIGEST = 32  # bytes of the SHA-256 in front
MAX_BYTES = 1 << 30  # of a state file; that of a ResNet-152 has 12 MB

Identity = Mapping[str, Any]


class State:
    """What a run has so far, in a file that the first process alone reads and writes.

    settled: moments by layer, in the order in which they were settled.
    """

    def __init__(self, path: Path, identity: Identity, ranks: Ranks) -> None:
        self._path, self._ranks = path, ranks
        self._identity = json.loads(json.dumps(dict(identity)))  # as it comes back from the file
        self.settled: dict[str, ImageMoments] = {}

    @classmethod
    def open(cls, path: Path | str, identity: Identity, ranks: Ranks) -> State:
        """The state in the file, or the beginning of one; every process calls it.

        identity: whatever the numbers depend on, as JSON, by names that make sense to the user: the
        SHA-256 of the model, method, rule, layers, data, number of images, seed, batch size, number
        of processes.
        Raises UsageError where the file is of another run, naming what differs, or cannot be
        written; InputError where it is no state.
        """
        state = cls(Path(path), identity, ranks)
        layers = ranks.together(state._found() if ranks.rank == 0 else {})
        if not layers:
            state._write({})  # that it cannot be written shows now, not hours later
        state.settled = {name: found.moments for name, found in layers.items()}
        return state

    def add(self, name: str, moments: ImageMoments) -> None:
        """A layer is settled, in all processes."""
        self.settled[name] = moments
        layers = {name: Waiting(0, found) for name, found in self.settled.items()}
        self._write(layers)

    def finish(self) -> None:
        """The run is complete and its results are written: the state is not needed any more."""
        if self._ranks.rank == 0:
            self._path.unlink(missing_ok=True)

    def _write(self, layers: Mapping[str, Waiting]) -> None:
        if self._ranks.rank == 0:
            told = {"format": FORMAT, "identity": self._identity}
            with replacing(self._path) as staged:
                data = to_bytes(told, layers)
                staged.write_bytes(hashlib.sha256(data).digest() + data)

    def _found(self) -> dict[str, Waiting]:
        """What the file holds of this run; nothing where it is new or has only begun."""
        if not self._path.exists():
            return {}
        found = self._bytes()
        digest, data = found[:_DIGEST], found[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            raise InputError(f"{self._path} is no state of a run, or is damaged.")
        facts, layers = from_bytes(data, str(self._path))
        if facts.get("format") != FORMAT or not isinstance(facts.get("identity"), dict):
            raise InputError(
                f"{self._path} is no state of a run that this version of bnfold reads."
            )
        self._check(facts["identity"])
        return layers

    def _bytes(self) -> bytes:
        try:
            if self._path.stat().st_size <= MAX_BYTES:
                return self._path.read_bytes()
        except OSError as error:
            raise InputError(f"{self._path} cannot be read: {error.strerror or error}.") from error
        raise InputError(f"{self._path} is too large to be the state of a run.")

    def _check(self, other: Mapping[str, Any]) -> None:
        differ = [
            f"{name} is {_shown(self._identity, name)} and was {_shown(other, name)}"
            for name in dict.fromkeys((*self._identity, *other))
            if self._identity.get(name) != other.get(name)
        ]
        if differ:
            raise UsageError(
                f"{self._path} is the state of another run: {'; '.join(differ)}. Give another file,"
                " or remove it to begin anew."
            )


def _shown(identity: Mapping[str, Any], name: str) -> str:
    text = str(identity.get(name, "not given"))
    return text if len(text) <= 60 else f"{text[:57]}..."
