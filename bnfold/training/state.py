"""The state of a run between two epochs, in a file: all that it takes to go on at the same bits.

No generator's state is kept, an epoch being seeded by its number. The file holds tensors and plain
values; nothing in it can run code. It is written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.errors import InputError, one_line
from bnfold.graph import replacing
from bnfold.training.settings import Settings

SCHEMA = 2
_DIFFER = {
    "data": "other training data",
    "network": "another network, or another normalisation in it",
}


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch gave; accuracies are fractions, None where nothing is classified or tested.

    loss, accuracy: of the training batches, each as the network was when it came to it.
    lr: of the last step.
    """

    epoch: int
    loss: float
    accuracy: float | None
    test_loss: float | None
    test_accuracy: float | None
    lr: float
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class Best:
    """The network of the best epoch so far."""

    epoch: int
    state_dict: dict[str, Tensor]


@dataclass
class State:
    """A run between two epochs."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    settings: Settings
    history: list[EpochMetrics] = field(default_factory=list)
    best: Best | None = None

    def save(self, path: Path) -> None:
        """Write it. Raises InputError for a network whose state is more than tensors."""
        best = self.best
        content = {
            "bnfold": {"schema": SCHEMA, "kind": "run", "settings": asdict(self.settings)},
            "history": [asdict(metrics) for metrics in self.history],
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": best and {"epoch": best.epoch, "state_dict": best.state_dict},
        }
        with replacing(path) as staged:
            _save_plain(content, staged)

    def load(self, path: Path) -> None:
        """Go on from a saved state. Raises InputError where it belongs to another run."""
        content = _load_plain(path)
        about = content.get("bnfold") if isinstance(content, dict) else None
        kind = (about.get("schema"), about.get("kind")) if isinstance(about, dict) else None
        if about is None or kind != (SCHEMA, "run"):
            raise InputError(f"{path} is not the state of a training run that bnfold wrote.")
        settings = about.get("settings")
        for name, now in asdict(self.settings).items():
            then = settings.get(name) if isinstance(settings, dict) else None
            if then != now:
                what = _DIFFER.get(name, f"{name} {then}, now {now}")
                raise InputError(f"{path} is of a run with {what}; resume with the same settings.")
        try:
            self.module.load_state_dict(content["module"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.history = [EpochMetrics(**metrics) for metrics in content["history"]]
            self.best = content["best"] and Best(**content["best"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is of another network: {one_line(error)}.") from error


def _save_plain(content: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values, and prove that they load as such. Raises InputError."""
    try:
        torch.save(content, path)
        torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # of the disk, not of the content
    except Exception as error:  # pickle, zip and torch each raise types of their own
        raise InputError(
            f"The network's state cannot be written as plain tensors: {one_line(error)}."
        ) from error


def _load_plain(path: Path) -> Any:
    """A file of tensors and plain values; nothing in it can run code. Raises InputError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except Exception as error:  # pickle, zip and torch each raise types of their own
        raise InputError(f"{path} cannot be read as a checkpoint: {one_line(error)}.") from error
