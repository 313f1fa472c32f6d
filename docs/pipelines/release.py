r"""A release: one folder that holds a proved model and its papers, or no folder at all.

    python release.py net.onnx --data inputs.npy --domain night=night.npy --domain rain=rain.npy \
        --key release.pem -o release/

release/model.onnx and its fold record; DOMAIN.pack for each domain, signed; release.json for
programs and release.html for people. Every gate is asked; at the first that fails the script ends
with the exit code and the sentence of the failure, and what was made until then is gone. Warnings
stand on the page; with --strict the first of them ends the script as well.

Data are what the network takes, one sample in a row; bytes are pixels, and become 0 to 1.
"""

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bnfold
from bnfold.data import open_data

MODEL = Path("model.onnx")
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.IGNORECASE)  # of a domain, and of its file
RESERVED = re.compile(r"model|release|con|prn|aux|nul|(com|lpt)\d", re.IGNORECASE)  # ours, Windows'
Run = dict[str, Any]  # of the report


def release(
    model: Path,
    out: Path,
    *,
    data: Path,
    domains: Mapping[str, Path],
    key: Path,
    runtimes: Sequence[str] = ("ort-cpu",),
    bench_seconds: float = 10.0,
    strict: bool = False,
) -> None:
    """Make `out` of `model`. Raises bnfold.BnfoldError, and leaves nothing, where a gate fails.

    data: inputs of the kind that the model will get. domains: unlabelled inputs of each, by name.
    key: Ed25519, as `bnfold pack keygen` makes it. runtimes: where the model will be deployed.
    strict: a warning is a failure.
    """
    model, key, out = model.resolve(), key.resolve(), out.resolve()
    if out.exists():
        raise bnfold.UsageError(f"{out} exists, and a release is not made twice; name another one.")
    if not out.parent.is_dir():
        raise bnfold.UsageError(f"{out.parent} is no folder, so {out.name} cannot be made in it.")
    inputs = read(data)
    samples = {checked(name): read(file) for name, file in domains.items()}
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
        folder = Path(staging) / out.name
        folder.mkdir()
        with contextlib.chdir(folder):  # the page names the files as they will lie together
            runs = [
                fold(model, inputs),
                parity(inputs, runtimes),
                *(pack(name, images, key) for name, images in samples.items()),
                bench(model, runtimes, bench_seconds),
            ]
            for warning in (w for run in runs for w in run.get("warnings", ()) if strict):
                raise bnfold.DemandError(f"There is a warning: {warning}", code="E_WARNING")
            bnfold.write_report("release.json", runs)
            bnfold.write_report("release.html", runs)
        folder.rename(out)


def read(file: Path) -> np.ndarray:
    """All samples of a file, finite and in their order. Raises InputError."""
    if not file.exists():
        raise bnfold.InputError(f"{file} does not exist; give a file of inputs, such as an .npy.")
    return np.concatenate(list(open_data(file, shuffle=False)))


def checked(name: str) -> str:
    """A domain's name, which is its file's as well. Raises UsageError."""
    if not NAME.fullmatch(name) or RESERVED.fullmatch(name):
        raise bnfold.UsageError(
            f"'{name}' cannot name a domain and its file; take letters, digits, - and _."
        )
    return name


def fold(model: Path, data: np.ndarray) -> Run:
    """Every batch norm folds, and the folded network is the same function: gates A and B."""
    result = bnfold.fold(model)
    result.require_folded("all")
    proof = result.verify({one_input(result): data})
    proof.raise_for_failure()
    record = result.save(MODEL)
    files = {"original": model, "folded": MODEL, "record": record}
    run = bnfold.report_of("fold", fold=result, proof=proof, files=files)
    run["files"][0]["path"] = model.name  # its hash says which; where it lay stays in the house
    return run


def parity(data: np.ndarray, runtimes: Sequence[str]) -> Run:
    """The file that will be deployed, on each runtime that will run it: gate C."""
    name = one_input(bnfold.fold(MODEL))
    proof = bnfold.parity(MODEL, {name: data}, runtimes=runtimes)
    proof.raise_for_failure()
    return bnfold.report_of("parity", proof=proof, files={"folded": MODEL})


def pack(name: str, samples: np.ndarray, key: Path) -> Run:
    """The statistics of one domain, in a signed file; the model with them is proved as well."""
    result = bnfold.adapt(MODEL, [samples])
    assert result.fold is not None  # what was folded comes back folded
    proof = result.fold.verify()
    proof.raise_for_failure()
    path = Path(f"{name}.pack")
    bnfold.Pack.of(result, base=MODEL, data=name).save(path, sign=key)
    return bnfold.report_of("adapt", adapted={name: result}, proof=proof, files={"pack": path})


def bench(model: Path, runtimes: Sequence[str], seconds: float) -> Run:
    """What the fold gains, and whether that is told from noise."""
    result = bnfold.bench(model, {"folded": MODEL}, runtimes=runtimes, seconds=seconds)
    result.raise_for_failure()
    return bnfold.report_of("bench", bench=result, files={"folded": MODEL})


def one_input(result: bnfold.FoldResult) -> str:
    """The name of the network's input."""
    names = [str(v.name) for v in result.original.graph.inputs if not v.is_initializer()]
    if len(names) != 1:
        raise bnfold.InputError(f"The inputs are {', '.join(names)}; this script gives one.")
    return names[0]


def named(texts: Sequence[str]) -> dict[str, Path]:
    """The files of NAME=FILE, by name. Raises UsageError."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or not file:
            raise bnfold.UsageError(f"--domain {text}: write NAME=FILE.")
        if name.lower() in map(str.lower, found):  # Night.pack is night.pack on some disks
            raise bnfold.UsageError(f"--domain {text}: there is a domain '{name}' already.")
        found[name] = Path(file)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the failure (docs/pipelines/README.md)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="inputs, .npy")
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=FILE.npy")
    parser.add_argument("--key", type=Path, required=True, help="signing key (bnfold pack keygen)")
    parser.add_argument("--runtime", action="append", help="default ort-cpu; repeat for several")
    parser.add_argument("--bench-seconds", type=float, default=10.0)
    parser.add_argument("--strict", action="store_true", help="a warning is a failure")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        release(
            args.model,
            args.out,
            data=args.data,
            domains=named(args.domain),
            key=args.key,
            runtimes=args.runtime or ("ort-cpu",),
            bench_seconds=args.bench_seconds,
            strict=args.strict,
        )
    except (bnfold.BnfoldError, OSError) as raised:  # OSError: of the disk
        error = raised if isinstance(raised, bnfold.BnfoldError) else bnfold.UsageError(str(raised))
        print(f"no release ({error.code}): {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
