"""`bnfold train`: a network trained, in a checkpoint that describes itself."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.commands.learning_data import LearningData, learning_data
from bnfold.commands.shared import Report, percent, progress_bar
from bnfold.commands.trained import about_run, write_trained
from bnfold.errors import UsageError
from bnfold.outputs import check_outputs

if TYPE_CHECKING:
    from bnfold.measuring.ranks import Ranks
    from bnfold.training.journal import Journal
    from bnfold.training.train import Step, TrainResult


def train(args: argparse.Namespace) -> Report | None:
    """`bnfold train SPEC`: train, measure, write.

    Under torchrun all processes train together; the first one writes and reports.
    """
    from bnfold.measuring.ranks import group_from_environment

    outputs = args.outputs or [Path(f"{args.factory.rpartition(':')[2]}.pt")]
    args = _with_defaults(args)
    with group_from_environment(backend=args.backend) as ranks:
        check_outputs(outputs, None, args.overwrite, (".pt", ".pth"))
        if args.norm_options and args.norm is None:
            raise UsageError("--norm-set is of --norm; name the kind too.")
        files = _Files.of(args, outputs)
        data = learning_data(args)
        args = _in_run(args, data, ranks.size)
        result = _trained(args, data, files, ranks)
        if ranks.rank:
            return None
        done = write_trained(args, outputs, data, result, ranks.size)
        files.finish()
        return done


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """What the user left open and other arguments decide. Raises UsageError for what is none."""
    from bnfold.norm import KINDS
    from bnfold.training.network import default_rate
    from bnfold.training.settings import defaults_of

    if args.norm is not None and args.norm not in KINDS:
        raise UsageError(f"There is no kind '{args.norm}'; the kinds are {', '.join(KINDS)}.")
    lr = default_rate(args.norm, args.optimizer) if args.lr is None else args.lr
    rates = defaults_of(args.optimizer, lr, args.weight_decay, args.momentum)
    decided = dict(zip(("lr", "weight_decay"), rates, strict=False))
    backend = args.backend or ("nccl" if args.device.startswith("cuda") else "gloo")
    return argparse.Namespace(**vars(args) | decided | {"backend": backend})


def _in_run(args: argparse.Namespace, data: LearningData, processes: int) -> argparse.Namespace:
    """With the options of the normalisation that the length of the run decides."""
    from bnfold.training.batches import Share, source_of
    from bnfold.training.network import options_in_run

    share = Share(0, processes)
    cut = {"batch_size": args.batch_size, "seed": args.seed, "name": "train_data"}
    steps = source_of(data.train, **cut, share=share).count() * args.epochs
    options = options_in_run(args.norm, dict(args.norm_options), steps=steps)
    return argparse.Namespace(**vars(args) | {"norm_options": options})


# --- files of the run -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """Where the run keeps its state, so that it can be gone on with, and what it takes down."""

    state: Path
    is_named: bool
    resumes: bool

    @classmethod
    def of(cls, args: argparse.Namespace, outputs: Sequence[Path]) -> _Files:
        """Checked: nothing of an earlier run is written over by chance."""
        state = args.state or outputs[0].with_name(f"{outputs[0].stem}.state")
        for path, what in ((state, "--state"), (args.log_file, "--log-file")):
            if path is not None and (not path.parent.is_dir() or path.is_dir()):
                raise UsageError(
                    f"{what} {path}: there is no such folder, or it is one; name a file."
                )
        if args.resume and not state.exists():
            raise UsageError(
                f"There is no state {state} of a run to resume; begin it without --resume."
            )
        if state.exists() and not (args.resume or args.overwrite):
            raise UsageError(
                f"{state} is the state of a run that was broken off: --resume goes on with it,"
                " --overwrite begins anew."
            )
        if (
            args.log_file is not None
            and args.log_file.exists()
            and not (args.resume or args.overwrite)
        ):
            raise UsageError(
                f"--log-file {args.log_file} exists; pass --overwrite or another file."
            )
        if args.log_every is not None and args.log_file is None and args.tensorboard is None:
            raise UsageError("--log-every is of --log-file or --tensorboard; give one.")
        return cls(state, args.state is not None, args.resume)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Say, where the run is interrupted, how it goes on."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            if self.state.exists():
                print(
                    f"bnfold: the run up to its last whole epoch is in {self.state}; the same"
                    " command with --resume goes on from there.",
                    file=sys.stderr,
                )
            raise

    def finish(self) -> None:
        """The run is complete and its results are written."""
        if not self.is_named:
            self.state.unlink(missing_ok=True)


# --- the run --------------------------------------------------------------------------------------


def _trained(
    args: argparse.Namespace, data: LearningData, files: _Files, ranks: Ranks
) -> TrainResult:
    from bnfold.measuring.ranks import own_device
    from bnfold.training.evaluation import device_of
    from bnfold.training.network import build_network, initialise_by_data
    from bnfold.training.task import task_of
    from bnfold.training.train import train as fit

    device = device_of(own_device(args.device) or "cpu")
    task = task_of("cross_entropy", args.label_smoothing)
    module = build_network(
        args.factory,
        dict(args.arguments),
        norm=args.norm,
        options=args.norm_options,
        example=data.example,
        seed=args.seed,
    ).to(device)
    if not args.resume:
        cut = {"batch_size": args.batch_size, "seed": args.seed}
        initialise_by_data(module, args.norm, data.train, task, **cut)
    journals = _journals(args, data, files) if ranks.rank == 0 else []
    telling = files.telling() if ranks.rank == 0 else contextlib.nullcontext()
    with telling, progress_bar(args, "training") as bar:

        def log(metrics: dict[str, Any]) -> None:
            bar.tell(_last(metrics))
            for journal in journals:
                journal.epoch(metrics)

        def on_step(step: Step) -> None:
            for journal in journals:
                journal.step(step)

        try:
            return fit(
                module,
                data.train,
                test_data=data.test,
                epochs=args.epochs,
                batch_size=args.batch_size,
                optimizer=args.optimizer,
                lr=args.lr,
                schedule=args.schedule,
                weight_decay=args.weight_decay,
                momentum=args.momentum,
                label_smoothing=args.label_smoothing,
                clip_norm=args.clip_norm,
                amp=args.amp,
                augment=_resolved(args.augment),
                statistics=args.statistics,
                keep=args.keep,
                seed=args.seed,
                device=device,
                workers=args.workers,
                checkpoint=files.state,
                resume=files.state if files.resumes else None,
                progress=bar,
                log=log,
                on_step=on_step,
                ranks=ranks,
            )
        finally:
            for journal in journals:
                journal.close()


def _resolved(spec: str | None) -> Callable[..., Any] | None:
    from bnfold.reading.factory import resolve_factory

    return None if spec is None else resolve_factory(spec)


def _journals(args: argparse.Namespace, data: LearningData, files: _Files) -> list[Journal]:
    from bnfold.training.journal import Curves, Lines

    made: list[Journal] = []
    if args.log_file is not None:
        about = about_run(args, data)
        made.append(Lines(args.log_file, about, every=args.log_every, goes_on=files.resumes))
    if args.tensorboard is not None:
        made.append(Curves(args.tensorboard, every=args.log_every))
    return made


def _last(metrics: dict[str, Any]) -> dict[str, Any]:
    """How well an epoch did, for the progress bar."""
    told = {"epoch": metrics["epoch"], "loss": f"{metrics['loss']:.3f}"}
    for name in ("accuracy", "test_accuracy"):
        if metrics[name] is not None:
            told[name.replace("_", " ")] = f"{percent(metrics[name])} %"
    return told
