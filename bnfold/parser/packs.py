"""`bnfold pack` and its actions."""

from __future__ import annotations

from pathlib import Path

from bnfold.parser.shared import Parser, Verbs, add_output, add_proof, add_report


def pack(verbs: Verbs) -> None:
    """`bnfold pack ACTION`."""
    pack = verbs.add_parser("pack", help="domain packs: make, show, apply, diff, keygen")
    actions = pack.add_subparsers(
        dest="action",
        metavar="ACTION",
        required=True,
        parser_class=Parser,
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
    add_output(make, "the pack (default ADAPTED.pack beside the adapted model)")
    add_output(apply, "the adapted model (default BASE.adapted beside the base, same suffix)")
    keygen.add_argument(
        "-o", "--output", type=Path, required=True, metavar="NAME", help="NAME.pem, NAME.pub.pem"
    )
    for parser in (make, apply):
        parser.add_argument(
            "--model", dest="factory", metavar="SPEC", help="factory of a checkpoint's network"
        )
    add_proof(apply)
    for parser in (make, show, apply, diff, keygen):
        add_report(parser)
