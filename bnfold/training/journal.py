"""What a run says of itself while it goes: lines of JSON in a file, curves for TensorBoard.

A run that goes on from its state goes on in the same file: what an interrupted epoch had written is
taken back first, as that epoch is run anew.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bnfold.errors import InputError, RuntimeUnavailableError, UsageError
from bnfold.graph import replacing
from bnfold.training.run import Step


class Journal(Protocol):
    """Takes down steps and epochs."""

    def step(self, step: Step) -> None:
        """A step was taken."""

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """An epoch is through; metrics: `EpochMetrics` as a dict."""

    def close(self) -> None:
        """Nothing more comes."""


class Lines:
    """A JSONL file, one object in each line, by its `event`: `run`, `step`, `epoch`.

    every: so many steps make a line; None: no step does.
    """

    def __init__(
        self, path: Path, about: Mapping[str, Any], *, every: int | None, goes_on: bool
    ) -> None:
        if every is not None and every < 1:
            raise UsageError(f"A line every {every} steps makes no sense; give 1 or more.")
        self._path, self._every = path, every
        kept = _lines(path) if goes_on and path.exists() else []
        self._write_all(kept or [{"event": "run", **about}])
        self._is_behind = goes_on

    def step(self, step: Step) -> None:
        """See Journal."""
        self._go_on_at(step.epoch)
        if self._every is not None and step.number % self._every == 0:
            told = {"epoch": step.epoch, "step": step.number, "loss": step.loss, "lr": step.lr}
            self._add({"event": "step", **told})

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """See Journal."""
        self._go_on_at(metrics["epoch"])
        self._add({"event": "epoch", **metrics})

    def close(self) -> None:
        """See Journal."""

    def _go_on_at(self, epoch: int) -> None:
        """Take back what was written of this epoch and of later ones, before it goes on."""
        if self._is_behind:
            self._is_behind = False
            self._write_all([line for line in _lines(self._path) if line.get("epoch", 0) < epoch])

    def _write_all(self, lines: list[dict[str, Any]]) -> None:
        with replacing(self._path) as staged:
            staged.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")

    def _add(self, line: Mapping[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")
        except OSError as error:
            raise UsageError(f"Cannot write {self._path}: {error.strerror or error}.") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; a last one that was broken off is left out."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
        lines = []
        for number, text in enumerate(texts, start=1):
            try:
                lines.append(dict(json.loads(text)))
            except ValueError:
                if number < len(texts):
                    raise
        return lines
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not a run's log that could be gone on with: {error}.") from (
            error
        )


class Curves:
    """Scalars by step for TensorBoard, in a folder of event files."""

    def __init__(self, folder: Path, *, every: int | None) -> None:
        try:
            self._library: Any = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise RuntimeUnavailableError(
                "TensorBoard's files are written by tensorboard, which is not installed;"
                " bnfold[tensorboard] brings it."
            ) from error
        self._folder, self._every, self._last = folder, every or 1, 0
        self._writer: Any = None

    def step(self, step: Step) -> None:
        """See Journal."""
        self._last = step.number
        if step.number % self._every == 0:
            self._add(step.number, {"step/loss": step.loss, "step/lr": step.lr})

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """See Journal."""
        names = ("loss", "accuracy", "test_loss", "test_accuracy")
        self._add(self._last, {f"epoch/{name}": metrics[name] for name in names})

    def close(self) -> None:
        """See Journal."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, step: int, values: Mapping[str, float | None]) -> None:
        try:
            if self._writer is None:  # what an interrupted run had written from here on is void
                self._writer = self._library.SummaryWriter(str(self._folder), purge_step=step)
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            raise UsageError(
                f"Cannot write TensorBoard's files in {self._folder}: {error.strerror or error}."
            ) from error
