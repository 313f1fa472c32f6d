"""The options that several verbs share, a group each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeAlias

from bnfold.errors import UsageError
from bnfold.proof.places.runtimes import PRECISIONS, parse_runtime

Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: a sentence, and the help that says more."""

    def error(self, message: str) -> Any:
        """Wrong usage."""
        raise UsageError(f"{message} ({self.prog} --help)")


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    """`1,3,224,224` or `name:1,3,224,224`."""
    name, _, numbers = text.rpartition(":")
    try:
        shape = tuple(int(number) for number in numbers.split(","))
    except ValueError:
        shape = ()
    if not shape or any(number < 1 for number in shape):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a shape; write 1,3,224,224 or name:1,3,224,224"
        )
    return name, shape


def numbers(text: str) -> tuple[float, ...]:
    """`0.485,0.456,0.406`."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers") from None


def size(text: str) -> tuple[int, ...]:
    """`224` or `224,320` (height, width)."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size") from None


def runtime(text: str) -> str:
    """`ort-cuda` or `ort-cuda:tf32`, as it was written; a wrong one is told at once."""
    parse_runtime(text)
    return text


def add_model(parser: argparse.ArgumentParser, name: str = "model") -> None:
    """A file that holds a network."""
    parser.add_argument(
        name, type=Path, metavar=name.upper(), help=".onnx, .pt2, .pt/.pth/.th or .safetensors"
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    """What a model file is, where it does not say so itself."""
    group = parser.add_argument_group("what the model file is")
    group.add_argument(
        "--model",
        dest="factory",
        metavar="SPEC",
        help="factory of a checkpoint's network: pkg.mod:name, path.py:name, torchvision:NAME,"
        " timm:NAME",
    )
    group.add_argument(
        "--input-shape",
        dest="shapes",
        type=shape,
        action="append",
        metavar="[NAME:]N,C,H,W",
        help="shape of an input; repeat for several",
    )
    group.add_argument("--opset", type=int, help="opset of an export (default 20)")
    group.add_argument(
        "--trust-pickle",
        action="store_true",
        help="run the code in a pickled model; only for files you made yourself",
    )
    group.add_argument(
        "--freeze-inputs",
        action="store_true",
        help="treat initializers that a caller could override as constants",
    )


def add_data(parser: argparse.ArgumentParser, name: str, what: str, *, required: bool) -> None:
    """Samples, and how they become inputs."""
    group = parser.add_argument_group("data")
    group.add_argument(
        name,
        dest="data",
        required=required,
        metavar="DATA",
        help=f"{what}: a folder of images, .npy, .npz, .safetensors, webdataset .tar, hf:NAME,"
        " path.py:factory, digits, mnist:DIR, usps:DIR or cifar10:DIR, with :train or :test; in"
        " random order, by --seed",
    )
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="default 64")
    group.add_argument("--samples", type=int, metavar="N", help="use N samples of the data")
    group.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")
    group.add_argument("--mean", type=numbers, metavar="M,M,M", help="subtracted per channel")
    group.add_argument("--std", type=numbers, metavar="S,S,S", help="divided by per channel")
    group.add_argument("--resize", type=size, metavar="H[,W]", help="bilinear resize")
    group.add_argument(
        "--input-scale",
        type=float,
        metavar="F",
        help="factor on the raw numbers (default 1/255 for bytes, else 1)",
    )
    group.add_argument(
        "--preprocess", metavar="path.py:fn", help="your function, raw image -> input array"
    )


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """Where results go."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        dest="outputs",
        type=Path,
        action="append",
        metavar="OUT",
        help=f"{what}; repeat for several",
    )
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")


def add_report(parser: argparse.ArgumentParser) -> None:
    """How the report is told."""
    group = add_telling(parser)
    group.add_argument(
        "--report",
        type=Path,
        action="append",
        metavar="FILE",
        help="also write it: .html (a page with pictures), .md, .xml (JUnit), .json or .txt; repeat"
        " for several",
    )
    group.add_argument(
        "--github",
        action="store_true",
        help="append it as Markdown to the job's summary, $GITHUB_STEP_SUMMARY",
    )


def add_telling(parser: argparse.ArgumentParser) -> Any:
    """What the terminal shows; the group comes back."""
    group = parser.add_argument_group("report")
    group.add_argument("--json", action="store_true", help="one JSON document on stdout")
    group.add_argument("-v", "--verbose", action="store_true", help="every table in full")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress, no notes")
    return group


def add_runtimes(group: argparse._ArgumentGroup, what: str) -> None:
    """The places where networks run."""
    group.add_argument(
        "--runtime",
        dest="runtimes",
        action="append",
        type=runtime,
        metavar="NAME[:CLASS]",
        help=f"{what}; repeat for several",
    )


def add_proof(parser: argparse.ArgumentParser, *, precision: bool = True) -> None:
    """Where networks are compared; precision: whether the verb has no other option of that name."""
    group = parser.add_argument_group("proof")
    add_runtimes(
        group,
        "where to compare: torch, torch-cuda, ort-cpu (default), ort-cuda, ort-tensorrt, with the"
        " precision class declared for it",
    )
    group.add_argument(
        "--provider",
        dest="runtimes",
        action="append",
        choices=("cpu", "cuda"),
        help="another spelling of --runtime ort-cpu and ort-cuda",
    )
    if precision:
        group.add_argument(
            "--precision",
            dest="declared",
            choices=tuple(PRECISIONS),
            help="class of every runtime without one of its own (default fp32)",
        )
