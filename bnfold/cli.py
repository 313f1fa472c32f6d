"""The command line: arguments in, one report on stdout, progress and notes on stderr.

Nothing heavy is imported until a verb runs, so that `bnfold --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnfold.errors import BnfoldError, UsageError

EXIT_CODES = """exit codes:
  0  good (nothing to fold included)      4  a runtime that was asked for cannot run here
  1  a gate failed: not the same function 5  nothing was compared
  2  wrong usage                          130  interrupted
  3  input unreadable, unsupported or unsafe
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message} (bnfold {self.prog.removeprefix('bnfold ')} --help)")


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
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


def _numbers(text: str) -> tuple[float, ...]:
    """`0.485,0.456,0.406`."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers") from None


def _size(text: str) -> tuple[int, ...]:
    """`224` or `224,320` (height, width)."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size") from None


def _add_model(parser: argparse.ArgumentParser, name: str = "model") -> None:
    parser.add_argument(
        name, type=Path, metavar=name.upper(), help=".onnx, .pt2, .pt/.pth/.th or .safetensors"
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
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
        type=_shape,
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


def _add_folding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("folding")
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep the batch norms of this name, parameters and statistics unchanged, so that they"
        " can be tuned or re-estimated; shell-style (layer1.*), repeat for several",
    )
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="fold the batch norms of this name and keep the others unchanged",
    )
    group.add_argument(
        "--repair",
        dest="repairs",
        choices=("clamp", "pad", "border", "all"),
        action="append",
        default=[],
        help="allow an exact repair where a batch norm would stay: Relu as Max and Min (clamp), a"
        " Pad in front of a padded convolution where one number does (pad), a constant map behind"
        " it (border); it may be slower than the batch norm (docs/results/repairs.md)",
    )
    group.add_argument(
        "--clean-up",
        dest="clean_up",
        choices=("pad", "conv-chain", "dead-channels", "all"),
        action="append",
        default=[],
        help="simplify besides: a Pad with zeros becomes the convolution's own (pad), a 1x1"
        " convolution of a convolution one of both where that costs no more (conv-chain), channels"
        " that are constant or unread go (dead-channels); ONNX only, repeat for several",
    )
    group.add_argument(
        "--input-mean",
        type=_numbers,
        metavar="M,M,M",
        help="the network is fed (x - mean) / std: fold that into it, so that it takes x itself",
    )
    group.add_argument("--input-std", type=_numbers, metavar="S,S,S", help="see --input-mean")
    group.add_argument(
        "--input-name", metavar="NAME", help="the input of --input-mean, where there are several"
    )


def _add_data(parser: argparse.ArgumentParser, name: str, what: str, *, required: bool) -> None:
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
    group.add_argument("--mean", type=_numbers, metavar="M,M,M", help="subtracted per channel")
    group.add_argument("--std", type=_numbers, metavar="S,S,S", help="divided by per channel")
    group.add_argument("--resize", type=_size, metavar="H[,W]", help="bilinear resize")
    group.add_argument(
        "--input-scale",
        type=float,
        metavar="F",
        help="factor on the raw numbers (default 1/255 for bytes, else 1)",
    )
    group.add_argument(
        "--preprocess", metavar="path.py:fn", help="your function, raw image -> input array"
    )


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
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


def _add_report(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("report")
    group.add_argument("--json", action="store_true", help="one JSON document on stdout")
    group.add_argument(
        "--report", type=Path, metavar="FILE", help="also write it (.md, .json, .txt)"
    )
    group.add_argument("-v", "--verbose", action="store_true", help="every table in full")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress, no notes")


def _add_proof(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("proof")
    group.add_argument(
        "--provider",
        dest="providers",
        action="append",
        choices=("cpu", "cuda"),
        help="onnxruntime provider to compare on (default cpu); repeat for several",
    )


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="bnfold",
        description="Fold batch normalization into the neighbouring weights, adapt its statistics"
        " to a target domain, export ONNX, and prove that nothing changed.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="the versions in use")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    fold = verbs.add_parser("fold", help="fold a model's batch norms, prove it, write it")
    _add_model(fold)
    _add_output(
        fold,
        "folded model: .onnx, .pt or .safetensors (the network's own class), .pt2 (a graph module);"
        " default beside the input",
    )
    fold.add_argument(
        "--record", type=Path, metavar="FILE", help="fold record (default beside OUT)"
    )
    fold.add_argument("--no-verify", action="store_true", help="write without proof")
    fold.add_argument("--dry-run", action="store_true", help="plan only, write nothing")
    _add_folding(fold)
    _add_source(fold)
    _add_proof(fold)
    _add_report(fold)

    unfold = verbs.add_parser(
        "unfold",
        help="give back the network that was folded",
        description="From a folded model and its fold record: the network that was folded, its"
        " batch norms, its graph and every weight bit for bit. Proved before it is written.",
    )
    _add_model(unfold, "folded")
    _add_output(unfold, "unfolded model (default NAME.unfolded beside the input, same suffix)")
    unfold.add_argument("--record", type=Path, metavar="FILE", help="fold record (default beside)")
    unfold.add_argument("--no-verify", action="store_true", help="write without proof")
    _add_source(unfold)
    _add_proof(unfold)
    _add_report(unfold)

    _add_adapt(
        verbs.add_parser(
            "adapt",
            help="re-estimate the statistics on a target domain",
            description="The model with the batch-norm statistics of the target's own samples, no"
            " labels needed. A folded model comes back folded, through its fold record.",
        )
    )

    _add_pack(verbs.add_parser("pack", help="domain packs: make, show, apply, diff, keygen"))

    export = verbs.add_parser("export", help="export a torch model to ONNX, unfolded, and prove it")
    _add_model(export)
    _add_output(export, "the ONNX file (default beside the input)")
    export.add_argument("--no-verify", action="store_true", help="write without proof")
    _add_source(export)
    _add_proof(export)
    _add_report(export)

    verify = verbs.add_parser("verify", help="prove that two models are the same function")
    _add_model(verify, "original")
    _add_model(verify, "folded")
    verify.add_argument("--record", type=Path, metavar="FILE", help="fold record (default beside)")
    _add_data(verify, "--data", "inputs to compare on (default: drawn)", required=False)
    _add_source(verify)
    _add_proof(verify)
    _add_report(verify)

    inspect = verbs.add_parser("inspect", help="where each batch norm would go, or why it stays")
    _add_model(inspect)
    _add_folding(inspect)
    _add_source(inspect)
    _add_report(inspect)

    _add_train(
        verbs.add_parser(
            "train",
            help="train a network with batch normalization or a variant",
            description="Train a classifier; the checkpoint describes itself, so that it folds,"
            " adapts and exports without another word. In several processes: torchrun"
            " --nproc-per-node=N -m bnfold train ..., each with --batch-size samples of a step.",
        )
    )

    doctor = verbs.add_parser("doctor", help="what is installed, and which providers really load")
    _add_report(doctor)
    return parser


def _add_adapt(adapt: argparse.ArgumentParser) -> None:
    _add_model(adapt)
    _add_data(adapt, "--target-data", "samples of the target domain", required=True)
    adapt.add_argument(
        "--source-data",
        metavar="DATA",
        help="samples of the source domain: bring each layer to the mean and deviation that it had"
        " on these; without batch norms and record, the only way",
    )
    adapt.add_argument(
        "--test-data", metavar="DATA", help="labelled samples: accuracy before and after"
    )
    group = adapt.add_argument_group("estimate")
    group.add_argument(
        "--method",
        choices=("exact", "fast"),
        default="exact",
        help="exact: each layer behind adapted ones, over the whole set; fast: one pass",
    )
    group.add_argument(
        "--layers",
        action="append",
        metavar="PATTERN",
        help="adapt the batch norms of this name, shell-style; with ! in front: all but these;"
        " repeat for several",
    )
    group.add_argument(
        "--up-to", metavar="NAME|K", help="only those up to this one in the forward, or the first K"
    )
    group.add_argument(
        "--part",
        choices=("both", "mean", "var"),
        default="both",
        help="adapt both statistics (default) or one",
    )
    group.add_argument(
        "--prior",
        type=_prior,
        default=0.0,
        metavar="N|auto",
        help="let the source count as N images beside the n of the target, w = N / (N + n);"
        " auto: as far as chance explains the difference",
    )
    group.add_argument(
        "--source-weight", type=float, metavar="W", help="share of the source, 0 to 1, fixed"
    )
    group.add_argument(
        "--mixture",
        action="store_true",
        help="blended variances hold the difference of the means too",
    )
    group.add_argument(
        "--stop",
        type=float,
        metavar="TOL",
        help="read only until statistics move by less than TOL standard deviations",
    )
    group.add_argument(
        "--precision",
        type=float,
        default=0.1,
        metavar="P",
        help="images are counted as enough for +-P standard deviations (default 0.1)",
    )
    group.add_argument(
        "--max-memory",
        type=int,
        metavar="MIB",
        help="for activations of batches that wait; beyond it they go to disk (TMPDIR)",
    )
    group.add_argument("--state", type=Path, metavar="FILE", help="resume from here if interrupted")
    group.add_argument(
        "--device", metavar="DEVICE", help="of a torch network: cpu (default) or cuda"
    )
    group.add_argument(
        "--backend",
        choices=("gloo", "nccl"),
        default="gloo",
        help="by which torchrun's processes talk (default gloo)",
    )
    group.add_argument(
        "--no-verify", action="store_true", help="write a folded model without proof"
    )
    group.add_argument(
        "--record", type=Path, metavar="FILE", help="of a folded model (default beside)"
    )
    _add_output(adapt, "adapted model (default NAME.adapted beside the input, same suffix)")
    adapt.add_argument("--pack", type=Path, metavar="FILE", help="also write a domain pack")
    _add_source(adapt)
    _add_proof(adapt)
    _add_report(adapt)


def _prior(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of images, nor auto") from None


def _add_pack(pack: argparse.ArgumentParser) -> None:
    actions = pack.add_subparsers(
        dest="action",
        metavar="ACTION",
        required=True,
        parser_class=_Parser,
        help="each has a --help of its own",
    )
    make = actions.add_parser("make", help="pack the statistics of an adapted model")
    make.add_argument("adapted", type=Path, metavar="ADAPTED", help="the adapted model")
    make.add_argument(
        "--base", type=Path, required=True, help="the model that it was adapted from, as deployed"
    )
    make.add_argument("--record", type=Path, metavar="FILE", help="fold record of a folded base")
    make.add_argument("--sign", type=Path, metavar="KEY", help="sign it with this private key")
    for name, what in (("--data", "name of the data"), ("--method", "how it was adapted")):
        make.add_argument(name, metavar="TEXT", help=f"{what}, to be noted in the pack")
    make.add_argument("--images", type=int, metavar="N", help="how many images were measured")
    show = actions.add_parser("show", help="what a pack holds, and whether it is whole")
    apply = actions.add_parser("apply", help="put a pack into its base, prove it, write it")
    apply.add_argument("base", type=Path, metavar="BASE", help="folded (with its record) or not")
    apply.add_argument("--record", type=Path, metavar="FILE", help="fold record (default beside)")
    apply.add_argument("--no-verify", action="store_true", help="write without proof")
    diff = actions.add_parser("diff", help="how far two packs of one base are apart")
    for parser in (show, apply, diff):
        parser.add_argument("pack", type=Path, metavar="PACK", help="a file of `pack make`")
        parser.add_argument(
            "--public-key", type=Path, metavar="KEY", help="refuse a pack that it did not sign"
        )
    diff.add_argument("other", type=Path, metavar="OTHER", help="another one")
    keygen = actions.add_parser("keygen", help="a pair of keys to sign packs with")
    _add_output(make, "the pack (default ADAPTED.pack beside the adapted model)")
    _add_output(apply, "the adapted model (default BASE.adapted beside the base, same suffix)")
    keygen.add_argument(
        "-o", "--output", type=Path, required=True, metavar="NAME", help="NAME.pem, NAME.pub.pem"
    )
    for parser in (make, apply):
        parser.add_argument(
            "--model", dest="factory", metavar="SPEC", help="factory of a checkpoint's network"
        )
    _add_proof(apply)
    for parser in (make, show, apply, diff, keygen):
        _add_report(parser)


def _setting(text: str) -> tuple[str, Any]:
    """`num_classes=10`: a name and a JSON value, or a text where it is no JSON."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"'{text}' is no setting; write NAME=VALUE")
    with contextlib.suppress(ValueError):
        return name, json.loads(value)
    return name, value


def _add_train(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "factory",
        metavar="SPEC",
        help="the network: path.py:name, pkg.mod:name, torchvision:NAME or timm:NAME",
    )
    _add_data(train, "--data", "training samples with labels", required=False)
    train.set_defaults(data="digits")
    _add_network(train)
    _add_training(train)
    _add_run(train)
    _add_output(train, "checkpoint, .pt (default NAME.pt here)")
    _add_report(train)


def _add_network(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("network")
    group.add_argument(
        "--set",
        dest="arguments",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the factory, such as num_classes=10; repeat for several",
    )
    group.add_argument(
        "--norm",
        metavar="KIND",
        help="normalisation in place of every batch norm: batch, renorm, ghost, mean-only, weight,"
        " weight-mean-only, normprop, frozen, sync, none",
    )
    group.add_argument(
        "--norm-set",
        dest="norm_options",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the normalisation: ghost_size=16 (ghost), r_max=3 and d_max=5 (renorm;"
        " reached over the run), log_scale=true (weight), gain=1, pooling=true and input=null"
        " (normprop; null: the data are normalised already), momentum=0.1, eps=1e-5; repeat for"
        " several",
    )
    group.add_argument(
        "--statistics",
        choices=("moving", "exact"),
        default="moving",
        help="of the trained network: moving averages (default), or exactly those of the training"
        " set, measured after training",
    )


def _add_training(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("training")
    group.add_argument(
        "--test-data", metavar="DATA", help="samples to measure on (of a known data set: its test)"
    )
    group.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        help="read images as grey (1) or colour (3); default as the first one is stored",
    )
    group.add_argument(
        "--download", action="store_true", help="let torchvision fetch a data set that is not there"
    )
    group.add_argument("--epochs", type=int, default=10, metavar="N", help="default 10")
    group.add_argument(
        "--optimizer",
        choices=("sgd", "adam", "adamw", "rmsprop"),
        default="sgd",
        help="default sgd, with Nesterov momentum",
    )
    group.add_argument(
        "--schedule",
        choices=("onecycle", "cosine", "constant"),
        default="onecycle",
        help="of the learning rate (default onecycle)",
    )
    group.add_argument(
        "--lr",
        type=float,
        metavar="RATE",
        help="peak learning rate (default sgd 0.1, or 0.01 with --norm weight, weight-mean-only and"
        " normprop; others 3e-3)",
    )
    group.add_argument(
        "--weight-decay", type=float, metavar="W", help="default sgd 5e-4, adamw 1e-2, others 0"
    )
    group.add_argument(
        "--momentum", type=float, metavar="M", help="of sgd (default 0.9) and rmsprop (default 0)"
    )
    group.add_argument(
        "--label-smoothing", type=float, default=0.0, metavar="S", help="default 0, none"
    )
    group.add_argument(
        "--clip-norm", type=float, metavar="N", help="the most that the gradients' norm may be"
    )
    group.add_argument(
        "--augment", metavar="path.py:fn", help="your function, batch of inputs -> other ones"
    )
    group.add_argument("--amp", action="store_true", help="forward in bfloat16 where torch can")
    group.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    group.add_argument(
        "--backend",
        choices=("gloo", "nccl"),
        help="by which torchrun's processes talk (default nccl on cuda, else gloo)",
    )
    group.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read ahead (default 0)"
    )
    group.add_argument(
        "--keep",
        choices=("last", "best"),
        default="last",
        help="the last epoch's network (default), or the best one's on the test data (with moving"
        " averages)",
    )


def _add_run(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("run")
    group.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="the run's state after each epoch (default NAME.state beside the checkpoint, gone when"
        " the run is complete)",
    )
    group.add_argument("--resume", action="store_true", help="go on with the run of the state file")
    group.add_argument(
        "--log-file", type=Path, metavar="FILE", help="one JSON object per epoch (.jsonl)"
    )
    group.add_argument("--tensorboard", type=Path, metavar="DIR", help="curves for TensorBoard")
    group.add_argument(
        "--log-every",
        type=int,
        metavar="N",
        help="also every N steps in --log-file and --tensorboard",
    )


def _terminated(*_: object) -> None:
    """What schedulers and torchrun ask for: end, but leave no temporary file behind."""
    raise SystemExit(143)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code comes back. Bad input gives a sentence, no traceback."""
    with contextlib.suppress(ValueError):  # of a thread, which may not
        signal.signal(signal.SIGTERM, _terminated)
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        args = build_parser().parse_args(arguments)
        return _run(args)
    except BnfoldError as error:
        _tell_failure(error, as_json)
        return error.exit_code
    except KeyboardInterrupt:
        print("bnfold: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of stdout went away, which is its right; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(args: argparse.Namespace) -> int:
    if args.version:
        from bnfold.report import versions

        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    if args.verb is None:
        build_parser().print_help()
        return 2
    from bnfold import commands, report
    from bnfold.outputs import check_report, write_text

    if args.report is not None:
        check_report(args)
    result = commands.run(args)
    if result is None:  # of several processes one reports
        return 0
    print(report.to_json(result) if args.json else report.to_text(result, verbose=args.verbose))
    sys.stdout.flush()
    if args.report is not None:
        write_text(args.report, report.render(result, args.report))
    return int(result["exit_code"])


def _tell_failure(error: BnfoldError, as_json: bool) -> None:
    from bnfold.report import printable

    if os.environ.get("RANK", "0") != "0":
        # torchrun's processes fail with the same sentence; it ends all when one does, so the one
        # that tells goes first
        time.sleep(2)
        return
    print(f"bnfold: {printable(str(error))}", file=sys.stderr)
    if as_json:
        from bnfold.report import to_json

        kind = type(error).__name__
        document: Mapping[str, Any] = {
            "error": {"type": kind, "message": str(error), "exit_code": error.exit_code}
        }
        print(to_json(document))


if __name__ == "__main__":
    sys.exit(main())
