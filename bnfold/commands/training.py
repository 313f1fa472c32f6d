"""`bnfold train`: a network trained, in a checkpoint that describes itself."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold import report
from bnfold.commands.shared import Report, counted, new_report, open_samples, percent, unread
from bnfold.errors import UsageError
from bnfold.outputs import add_file, check_outputs

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
        data = _data_of(args)
        args = _in_run(args, data, ranks.size)
        result = _trained(args, data, files, ranks)
        if ranks.rank:
            return None
        return _report(args, outputs, data, files, result, ranks.size)


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """What the user left open and other arguments decide."""
    from bnfold.training.network import default_rate
    from bnfold.training.settings import defaults_of

    lr = default_rate(args.norm, args.optimizer) if args.lr is None else args.lr
    rates = defaults_of(args.optimizer, lr, args.weight_decay, args.momentum)
    decided = dict(zip(("lr", "weight_decay"), rates, strict=False))
    backend = args.backend or ("nccl" if args.device.startswith("cuda") else "gloo")
    return argparse.Namespace(**vars(args) | decided | {"backend": backend})


def _in_run(args: argparse.Namespace, data: _Named, processes: int) -> argparse.Namespace:
    """With the options of the normalisation that the length of the run decides."""
    from bnfold.training.batches import Share, labelled
    from bnfold.training.network import options_in_run

    share = Share(0, processes)
    cut = {"batch_size": args.batch_size, "seed": args.seed, "name": "train_data"}
    steps = labelled(data.train, **cut, share=share).count() * args.epochs
    options = options_in_run(args.norm, dict(args.norm_options), steps=steps)
    return argparse.Namespace(**vars(args) | {"norm_options": options})


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Named:
    """The data by the names that they were opened by. classes: their names, if they have any."""

    name: str
    train: Any
    test_name: str | None
    test: Any
    classes: tuple[str, ...]


def _data_of(args: argparse.Namespace) -> _Named:
    """Training and test data; a known data set without a part means both of its parts."""
    name, test_name = args.data, args.test_data
    if _is_set(name) and test_name is None:
        name, test_name = f"{name}:train", f"{name}:test"
    train = _labelled(args, name)
    test = _labelled(args, test_name, samples=None) if test_name else None
    classes = getattr(train, "classes", ())
    others = getattr(test, "classes", ())
    if classes and others and classes != others:
        raise UsageError(
            f"{name} has the classes {_listed(classes)} and {test_name} {_listed(others)};"
            " classes are numbered by their names, so both need the same ones."
        )
    return _Named(name, train, test_name, test, classes)


def _is_set(name: str) -> bool:
    """Whether it names a data set that has parts, and not one of them."""
    from bnfold.data.sets import PARTS, SETS

    head, _, rest = name.partition(":")
    named = head == "digits" or (head in SETS and rest)
    return bool(named) and not Path(name).exists() and name.rpartition(":")[2] not in PARTS


def _labelled(args: argparse.Namespace, spec: str, **other: Any) -> Any:
    """Samples that are read by number, or the batches (x, y) that a factory gives."""
    from bnfold.data import FactoryBatches, LabelledSamples

    shape = None if args.channels is None else (None, args.channels, None, None)
    found = open_samples(argparse.Namespace(**vars(args) | other), spec, shape)
    if isinstance(found, FactoryBatches):
        return found
    samples = LabelledSamples(found)
    if other == {} and len(set(samples.labels.tolist())) < 2:
        raise UsageError(
            f"{spec} holds samples of one class only ({_listed(samples.classes) or 'label'}"
            f" {samples.labels[0]}); there is nothing to tell apart."
        )
    return samples


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)


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


def _trained(args: argparse.Namespace, data: _Named, files: _Files, ranks: Ranks) -> TrainResult:
    from bnfold.measuring.ranks import own_device
    from bnfold.training.evaluation import device_of
    from bnfold.training.network import build_network, is_started_by_data, start_by_data
    from bnfold.training.task import task_of
    from bnfold.training.train import train as fit

    device = device_of(own_device(args.device) or "cpu")
    task = task_of("cross_entropy", args.label_smoothing)
    module = build_network(
        args.factory,
        dict(args.arguments),
        norm=args.norm,
        options=args.norm_options,
        example=_example(data.train),
        seed=args.seed,
    ).to(device)
    if is_started_by_data(args.norm) and not args.resume:
        start_by_data(module, data.train, task, batch_size=args.batch_size, seed=args.seed)
    journals = _journals(args, data, files) if ranks.rank == 0 else []
    with files.telling() if ranks.rank == 0 else contextlib.nullcontext(), _bar(args) as bar:

        def log(metrics: dict[str, Any]) -> None:
            bar.epoch(metrics)
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
                progress=bar.step,
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


def _journals(args: argparse.Namespace, data: _Named, files: _Files) -> list[Journal]:
    from bnfold.training.journal import Curves, Lines

    made: list[Journal] = []
    if args.log_file is not None:
        about = _about(args, data)
        made.append(Lines(args.log_file, about, every=args.log_every, goes_on=files.resumes))
    if args.tensorboard is not None:
        made.append(Curves(args.tensorboard, every=args.log_every))
    return made


class _Bar:
    """Steps done, and how well the last epoch did."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def step(self, done: int, total: int | None) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def epoch(self, metrics: dict[str, Any]) -> None:
        told = {"epoch": metrics["epoch"], "loss": f"{metrics['loss']:.3f}"}
        for name in ("accuracy", "test_accuracy"):
            if metrics[name] is not None:
                told[name.replace("_", " ")] = f"{percent(metrics[name])} %"
        self._bar.set_postfix(told, refresh=False)


@contextlib.contextmanager
def _bar(args: argparse.Namespace) -> Iterator[_Bar]:
    """A progress bar on a terminal's stderr, nothing elsewhere."""
    from tqdm import tqdm

    other = os.environ.get("RANK", "0") != "0"  # of the processes that torchrun started
    hidden = args.quiet or args.json or other or not sys.stderr.isatty()
    with tqdm(desc="training", disable=hidden, leave=False) as bar:
        yield _Bar(bar)


# --- what comes of it -----------------------------------------------------------------------------


def _report(
    args: argparse.Namespace,
    outputs: Sequence[Path],
    data: _Named,
    files: _Files,
    result: TrainResult,
    processes: int,
) -> Report:
    """The checkpoint, and what is said about the run."""
    from bnfold.training.train import save_checkpoint

    done = new_report("train", args, ())
    head = ["epoch", "loss", "accuracy %", "test loss", "test accuracy %", "s"]
    rows = [
        [
            e.epoch,
            f"{e.loss:.4f}",
            percent(e.accuracy),
            "-" if e.test_loss is None else f"{e.test_loss:.4f}",
            percent(e.test_accuracy),
            f"{e.seconds:.1f}",
        ]
        for e in result.history
    ]
    done["layers"] = {"head": head, "rows": rows}
    done["warnings"] = unread(result.unread)
    done["summary"] = _summary(args, data, result, processes)
    metrics = _figures(result) | {"epochs": args.epochs, "seed": args.seed}
    metrics["run"] = _about(args, data) | {"processes": processes}
    for path in outputs:
        save_checkpoint(
            path,
            result.module,
            model_spec=args.factory,
            example_input=_example(data.train),
            metrics=metrics,
        )
        add_file(done, "checkpoint", path)
    files.finish()
    return done


def _summary(args: argparse.Namespace, data: _Named, result: TrainResult, processes: int) -> str:
    said = f"Trained on {data.name} for {counted(args.epochs, 'epoch')}"
    said += f" in {processes} processes." if processes > 1 else "."
    if result.test_accuracy is not None:
        said += f" Test accuracy {percent(result.test_accuracy)} %"
        if result.moving is not None:
            said += f" ({percent(result.moving[1])} % with moving averages)"
        said += f" on {data.test_name}"
        chosen = f", by which epoch {result.epoch} was chosen: on other data expect less"
        said += f"{chosen if args.keep == 'best' else ''}."
    return said


def _figures(result: TrainResult) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "test_accuracy": result.test_accuracy,
        "test_loss": result.test_loss,
        "epoch": result.epoch,
    }
    if result.moving is not None:
        figures["with_moving_averages"] = {
            "test_loss": result.moving[0],
            "test_accuracy": result.moving[1],
        }
    return figures


_RECORDED = (
    *("norm", "batch_size", "samples", "seed", "epochs", "optimizer", "lr", "schedule"),
    *("weight_decay", "momentum", "label_smoothing", "clip_norm", "amp", "augment", "statistics"),
    *("keep", "device"),
)
_PREPARATION = ("mean", "std", "resize", "input_scale", "channels", "preprocess")


def _about(args: argparse.Namespace, data: _Named) -> dict[str, Any]:
    """The run in words and numbers, as JSON: all that it takes to repeat it."""
    from bnfold.training.settings import defaults_of

    about: dict[str, Any] = {name: getattr(args, name) for name in _RECORDED}
    rates = defaults_of(args.optimizer, args.lr, args.weight_decay, args.momentum)
    about["momentum"] = rates[2]
    about |= {
        "model": args.factory,
        "arguments": dict(args.arguments),
        "norm_options": args.norm_options,
        "data": data.name,
        "test_data": data.test_name,
        "preprocessing": {name: getattr(args, name) for name in _PREPARATION},
        "versions": report.versions(),
    }
    if data.classes:
        about["classes"] = list(data.classes)
    loaded: dict[str, Any] = json.loads(json.dumps(about, default=str))
    return loaded


def _example(data: Any) -> Any:
    """One input, as forward takes it."""
    from bnfold.training.batches import labelled

    source = labelled(data, batch_size=1, seed=None, name="train_data")
    for batch in source.epoch(0):
        return batch.x[:1]
    raise UsageError("The training data hold no sample.")
