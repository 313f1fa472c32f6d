"""What the verbs share: models and data opened as the arguments say, reports begun and ended."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnfold.errors import UsageError
from bnfold.outputs import add_file
from bnfold.runs import begun, counted

Report = dict[str, Any]


def open_model(args: argparse.Namespace, path: Path) -> Any:
    """A model file, read as the arguments say."""
    from bnfold.reading.sniff import Kind, sniff
    from bnfold.reading.source import open_source

    own = sniff(path) in (Kind.ONNX, Kind.EXPORTED_PROGRAM)
    two = hasattr(args, "original")  # of two models, --model belongs to the checkpoints
    return open_source(
        path,
        model=None if own and two else args.factory,
        input_shapes=args.shapes,
        opset=args.opset,
        trust_pickle=args.trust_pickle,
        freeze_inputs=args.freeze_inputs,
    )


def open_samples(
    args: argparse.Namespace, spec: str, shape: Sequence[int | None] | None = None
) -> Any:
    """The data that an option names, as batches; shape: of the input that they are for."""
    from bnfold.data import open_data

    if args.seed < 0:
        raise UsageError(f"--seed is {args.seed}; it must be 0 or more.")
    shapes = getattr(args, "shapes", None)
    shape = shapes[0][1] if shapes else shape
    return open_data(
        spec,
        batch_size=args.batch_size,
        samples=args.samples,
        seed=args.seed,
        preprocess=args.preprocess,
        mean=args.mean,
        std=args.std,
        resize=args.resize,
        input_scale=args.input_scale,
        input_shape=shape and (None, *shape[1:]),
        download=getattr(args, "download", False),
    )


def unread(skipped: Mapping[str, str]) -> list[str]:
    """A sentence about the images that could not be read, and why."""
    if not skipped:
        return []
    path, reason = next(iter(skipped.items()))
    return [f"{counted(len(skipped), 'image')} could not be read; the first: {path}: {reason}"]


def percent(share: float | None) -> str:
    """A share as a number of percent."""
    return "-" if share is None else f"{100 * share:.2f}"


class Bar:
    """A progress bar, called with the steps that are done and how many there are."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __call__(self, done: int, total: int | None) -> None:
        """Move to a step."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def tell(self, figures: Mapping[str, Any]) -> None:
        """Show figures behind the bar from its next step on."""
        self._bar.set_postfix(figures, refresh=False)


@contextlib.contextmanager
def progress_bar(args: argparse.Namespace, what: str) -> Iterator[Bar]:
    """A progress bar on a terminal's stderr, nothing elsewhere."""
    from tqdm import tqdm

    other = os.environ.get("RANK", "0") != "0"  # of the processes that torchrun started
    hidden = args.quiet or args.json or other or not sys.stderr.isatty()
    with tqdm(desc=what, disable=hidden, leave=False) as bar:
        yield Bar(bar)


def new_report(command: str, args: argparse.Namespace, notes: Any) -> Report:
    """An empty report; the notes also go to stderr as they come, and to stdout no more."""
    args.told = () if args.json else tuple(notes)
    if not args.quiet:
        for note in args.told:
            print(f"bnfold: {note}", file=sys.stderr)
    done = begun(command, list(notes))
    for role in ("model", "original", "folded"):
        path = getattr(args, role, None)
        if isinstance(path, Path):
            add_file(done, role, path)
    return done


def timed(done: Report, started: float) -> Report:
    """The report with the time that it took."""
    done["seconds"] = round(time.perf_counter() - started, 3)
    return done


def runtimes_of(args: argparse.Namespace) -> tuple[Any, ...]:
    """Where to compare, as the options say (runtimes.Runtime)."""
    from bnfold.proof.places.runtimes import DEFAULT, as_runtimes

    return as_runtimes(args.runtimes or (DEFAULT,), getattr(args, "declared", None) or "fp32")


def provider_of(args: argparse.Namespace) -> str:
    """Where onnxruntime measures an ONNX model: "cpu", or "cuda" where a GPU is named first."""
    return "cuda" if runtimes_of(args)[0].place.device == "cuda" else "cpu"


def shapes_of(args: argparse.Namespace, source: Any) -> dict[str, tuple[int, ...]] | None:
    """The shapes of --input-shape by input, for the proof; a nameless one is the first input's."""
    names = list(inputs_of(source))
    given = {name or names[0]: shape for name, shape in args.shapes or () if name or names}
    return {name: shape for name, shape in given.items() if name in names} or None


def inputs_of(source: Any) -> dict[str, Any]:
    """The inputs of a source by name."""
    from bnfold.graph import graph_inputs

    return graph_inputs(source.graph)
