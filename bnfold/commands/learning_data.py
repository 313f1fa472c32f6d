"""The data to learn from and to be measured on, as the arguments of `bnfold train` name them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfold.commands.shared import open_samples
from bnfold.errors import InputError, UsageError


@dataclass(frozen=True)
class LearningData:
    """The data by the names that they were opened by.

    classes: their names, if they have any. example: one input, as forward takes it.
    """

    name: str
    train: Any
    test_name: str | None
    test: Any
    classes: tuple[str, ...]
    example: Any


def learning_data(args: argparse.Namespace) -> LearningData:
    """Training and test data; a known data set without a part means both of its parts."""
    name, test_name = args.data, args.test_data
    if _is_set(name) and test_name is None:
        name, test_name = f"{name}:train", f"{name}:test"
    train = _labelled(args, name)
    if getattr(train, "labels", None) is not None and len(set(train.labels.tolist())) < 2:
        raise InputError(
            f"{name} holds samples of one class only ({_listed(train.classes) or 'label'}"
            f" {train.labels[0]}); there is nothing to tell apart."
        )
    # --samples is how many to learn from
    whole = argparse.Namespace(**vars(args) | {"samples": None})
    test = _labelled(whole, test_name) if test_name else None
    classes = getattr(train, "classes", ())
    others = getattr(test, "classes", ())
    if classes and others and classes != others:
        raise UsageError(
            f"{name} has the classes {_listed(classes)} and {test_name} {_listed(others)};"
            " classes are numbered by their names, so both need the same ones."
        )
    return LearningData(name, train, test_name, test, classes, _example_of(train))


def _is_set(name: str) -> bool:
    """Whether it names a data set that has parts, and not one of them."""
    from bnfold.data.sets import PARTS, SETS

    head, _, rest = name.partition(":")
    named = head == "digits" or (head in SETS and rest)
    return bool(named) and not Path(name).exists() and name.rpartition(":")[2] not in PARTS


def _labelled(args: argparse.Namespace, spec: str) -> Any:
    """Samples that are read by number, or the batches (x, y) that a factory gives."""
    from bnfold.data import FactoryBatches, LabelledSamples

    shape = None if args.channels is None else (None, args.channels, None, None)
    found = open_samples(args, spec, shape)
    return found if isinstance(found, FactoryBatches) else LabelledSamples(found)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)


def _example_of(data: Any) -> Any:
    from bnfold.training.batches import source_of

    source = source_of(data, batch_size=1, seed=None, name="train_data")
    for batch in source.epoch(0):
        return batch.x[:1]
    raise UsageError("The training data hold no sample.")
