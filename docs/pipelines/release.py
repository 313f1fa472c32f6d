r"""A release: one folder that holds a proved model and its papers, or no folder at all.

    python release.py net.onnx --data inputs.npy --domain night=night.npy --domain rain=rain.npy \
        --key release.pem -o release/

release/model.onnx and its fold record; DOMAIN.pack for each domain, signed; release.json for
programs and release.html for people. Every gate is asked; at the first that fails the script ends
with the exit code and the sentence of the failure, and what was made until then is gone.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bnfold

MODEL = Path("model.onnx")
Run = dict[str, Any]  # of the report


def release(
    model: Path,
    out: Path,
    *,
    data: np.ndarray,
    domains: Mapping[str, np.ndarray],
    key: Path,
    runtimes: Sequence[str] = ("ort-cpu",),
    bench_seconds: float = 10.0,
) -> None:
    """Make `out` of `model`. Raises bnfold.BnfoldError, and leaves nothing, where a gate fails.

    data: inputs of the kind that the model will get. domains: unlabelled inputs of each, by name.
    key: Ed25519, as `bnfold pack keygen` makes it. runtimes: where the model will be deployed.
    """
    model, key, out = model.resolve(), key.resolve(), out.resolve()
    if out.exists():
        raise bnfold.UsageError(f"{out} exists, and a release is not made twice; name another one.")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
        folder = Path(staging) / out.name
        folder.mkdir()
        with contextlib.chdir(folder):  # the page names the files as they will lie together
            runs = [
                fold(model, data),
                parity(data, runtimes),
                *(pack(name, samples, key) for name, samples in domains.items()),
                bench(model, runtimes, bench_seconds),
            ]
            bnfold.write_report("release.json", runs)
            bnfold.write_report("release.html", runs)
        folder.rename(out)


def fold(model: Path, data: np.ndarray) -> Run:
    """Every batch norm folds, and the folded network is the same function: gates A and B."""
    result = bnfold.fold(model)
    result.require_folded("all")
    proof = result.verify({one_input(result): data})
    proof.raise_for_failure()
    record = result.save(MODEL)
    files = {"original": model, "folded": MODEL, "record": record}
    return bnfold.report_of("fold", fold=result, proof=proof, files=files)


def parity(data: np.ndarray, runtimes: Sequence[str]) -> Run:
    """The file that will be deployed, on each runtime that will run it: gate C."""
    name = one_input(bnfold.fold(MODEL))
    proof = bnfold.parity(MODEL, {name: data}, runtimes=runtimes)
    proof.raise_for_failure()
    return bnfold.report_of("parity", proof=proof)


def pack(name: str, samples: np.ndarray, key: Path) -> Run:
    """The statistics of one domain, in a signed file; the model with them is proved as well."""
    result = bnfold.adapt(MODEL, [samples])
    if result.warnings:
        raise bnfold.DemandError(f"Domain '{name}': {result.warnings[0]}", code="E_WARNING")
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
    return bnfold.report_of("bench", bench=result)


def one_input(result: bnfold.FoldResult) -> str:
    """The name of the network's input."""
    (value,) = (v for v in result.original.graph.inputs if not v.is_initializer())
    return str(value.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the failure (docs/pipelines/README.md)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="inputs, .npy")
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=FILE.npy")
    parser.add_argument("--key", type=Path, required=True, help="signing key (bnfold pack keygen)")
    parser.add_argument("--runtime", action="append", help="default ort-cpu; repeat for several")
    parser.add_argument("--bench-seconds", type=float, default=10.0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    named = (text.partition("=") for text in args.domain)
    try:
        release(
            args.model,
            args.out,
            data=np.load(args.data),
            domains={name: np.load(file) for name, _, file in named},
            key=args.key,
            runtimes=args.runtime or ("ort-cpu",),
            bench_seconds=args.bench_seconds,
        )
    except bnfold.BnfoldError as error:
        print(f"no release ({error.code}): {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
