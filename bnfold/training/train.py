"""Training: one loop for classifiers, repeatable from its seed, and the checkpoint that it leaves.

The module is trained on a copy. Every random draw (shuffling, dropout) of an epoch follows from the
seed and the epoch's number alone, so a run that was interrupted and resumed goes on exactly as it
would have. The checkpoint carries the network's graph beside its weights, as data: whoever reads it
needs neither the code of the network nor a pickle.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from bnfold.errors import BnfoldError, InputError, RuntimeUnavailableError, UsageError
from bnfold.folding.module import plain_modules, scope_of
from bnfold.graph import export_module, graph_inputs, replacing
from bnfold.saving import checkpoint_bytes, write_bytes
from bnfold.training.batches import ArrayBatches, Data, GivenBatches, describe, labelled

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["onecycle", "cosine", "constant"]
Progress = Callable[[int, int | None], None]

SCHEMA = 1
# (learning rate, weight decay) where the caller names none
DEFAULTS: Mapping[str, tuple[float, float]] = {"sgd": (0.1, 5e-4), "adamw": (3e-3, 1e-2)}
WARM_UP, START_FACTOR = 0.3, 1 / 25
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch gave. Accuracies are fractions; `accuracy` is of the network as it learned."""

    epoch: int
    loss: float
    accuracy: float
    test_accuracy: float | None
    lr: float
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class TrainResult:
    """The trained copy, in eval mode on the training device, and how it got there."""

    module: nn.Module
    history: tuple[EpochMetrics, ...]
    test_accuracy: float | None


def train(
    module: nn.Module,
    train_data: Data,
    *,
    test_data: Data | None = None,
    epochs: int,
    batch_size: int = 64,
    optimizer: Optimizer = "sgd",
    lr: float | None = None,
    schedule: Schedule = "onecycle",
    weight_decay: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    checkpoint: Path | str | None = None,
    resume: Path | str | None = None,
    progress: Progress | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train a copy of a classifier with cross entropy; the module given stays as it is.

    train_data, test_data: `(x, y)`, x float (N, ...) and y integer (N,), which is shuffled and cut
    into near-equal batches of at most `batch_size`; or a re-iterable of such batches, taken as they
    come. An iterable that shuffles by torch's global generator (a DataLoader) is repeatable too.
    optimizer: SGD with Nesterov momentum 0.9, or AdamW; weights of rank 2 and more decay, biases
    and gammas do not. lr and weight_decay are the optimizer's `DEFAULTS` when absent.
    schedule: `onecycle` (Smith & Topin 2018: up over 30 % of the steps, then a cosine to 0),
    `cosine` (Loshchilov & Hutter 2017), or `constant`.
    checkpoint: after each epoch the state of the run is written there; `resume` names such a file
    to go on from. On a CPU the resumed run ends at the bits of one that was never interrupted.
    log: is handed each epoch's `EpochMetrics` as a dict. progress: steps done, steps in all.

    Population statistics are torch's moving averages. Raises UsageError for data the network does
    not take (shapes, labels, a batch norm with one value per channel), for a loss that is no longer
    a number and for settings that make no sense; InputError for values that are not finite and for
    a `resume` file that does not fit; RuntimeUnavailableError for a device that is not there.
    """
    _check_choice("optimizer", optimizer, get_args(Optimizer))
    _check_choice("schedule", schedule, get_args(Schedule))
    default_lr, default_decay = DEFAULTS[optimizer]
    source = labelled(train_data, batch_size=batch_size, seed=seed, name="train_data")
    if test_data is not None:
        labelled(test_data, batch_size=EVALUATION_BATCH, seed=None, name="test_data")
    settings = _Settings(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=default_lr if lr is None else float(lr),
        schedule=schedule,
        weight_decay=default_decay if weight_decay is None else float(weight_decay),
        seed=seed,
        data=source.digest() if checkpoint or resume else "",
    )
    settings.check()
    run_device = _device(device)
    with _own_randomness(run_device):
        run = _Run(_copy(module).to(run_device), settings, source, run_device)
        if resume is not None:
            run.load(Path(resume))
        with _refusing_lone_values(run.module):
            for epoch in range(len(run.history) + 1, epochs + 1):
                metrics = run.epoch(epoch, test_data, progress)
                if checkpoint is not None:
                    run.save(Path(checkpoint))
                if log is not None:
                    log(asdict(metrics))
    return TrainResult(run.module.eval(), tuple(run.history), run.history[-1].test_accuracy)


def evaluate(
    module: nn.Module,
    data: Data,
    *,
    batch_size: int = EVALUATION_BATCH,
    device: str | torch.device | None = None,
) -> float:
    """The fraction of `data`, as `train` takes it, that the module classifies right in eval mode.

    device: where to run, the module's own unless given; the module's parameters have to be there.
    The module's training flags are as before afterwards. Raises what `train` raises for its data.
    """
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
    target = _device(device)
    source = labelled(data, batch_size=batch_size, seed=None, name="the data")
    modes = [(m, m.training) for m in module.modules()]
    correct = seen = 0
    module.eval()
    try:
        with torch.no_grad():
            for batch in source.epoch(0):
                x, y = _to_device(module, batch, target)
                with _explaining_memory(x):
                    logits = _logits(module, x, y)
                correct += int((logits.argmax(dim=1) == y).sum())
                seen += len(y)
    finally:
        for m, training in modes:
            m.training = training
    if not seen:
        raise UsageError("There is no sample in the data to evaluate on.")
    return correct / seen


def schedule_factor(schedule: Schedule, done: float) -> float:
    """What the learning rate is multiplied by when the fraction `done` of the steps is behind."""
    if schedule == "constant":
        return 1.0
    if schedule == "onecycle":
        if done < WARM_UP:
            return START_FACTOR + (1 - START_FACTOR) * done / WARM_UP
        done = (done - WARM_UP) / (1 - WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def save_checkpoint(
    path: Path | str,
    module: nn.Module,
    *,
    model_spec: str | None,
    example_input: Tensor,
    metrics: Mapping[str, Any],
) -> None:
    """Write the module's weights with its graph and figures, whole or not at all.

    The file is a dict of `state_dict` and `bnfold` (schema, model_spec, the input's name and shape,
    the graph as ONNX bytes without the weights in a uint8 tensor, the metrics), and loads with
    `torch.load(path, weights_only=True)`, which is proved before it takes its name.
    example_input: one batch, as forward takes it. metrics: numbers and strings, nested as JSON.
    Raises InputError where torch cannot export the module or the file could not be loaded safely,
    UsageError for metrics that are not JSON and for a path that cannot be written.
    """
    portable = _copy(module).cpu().eval()
    example = example_input.detach().cpu()
    graph = export_module(portable, (example,))
    shapes = {name: list(example.shape) for name in graph_inputs(graph)}
    data = checkpoint_bytes(
        portable.state_dict(),
        graph,
        kind="train",
        model=model_spec,
        shapes=shapes,
        metrics=metrics,
        plain=plain_modules(scope_of(portable, graph)),
    )
    write_bytes(path, data)


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """What determines the result, besides the module's first weights."""

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    schedule: Schedule
    weight_decay: float
    seed: int
    data: str

    def check(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name} is {value}; it must be at least {least}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"lr is {self.lr}; it must be a positive number.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(f"weight_decay is {self.weight_decay}; it must be 0 or more.")


class _Run:
    """A run between two epochs: all that a resumed run needs again."""

    def __init__(
        self,
        module: nn.Module,
        settings: _Settings,
        source: ArrayBatches | GivenBatches,
        device: torch.device,
    ) -> None:
        self.module = module
        self.optimizer = _optimizer(module, settings)
        self.settings = settings
        self.source = source
        self.device = device
        self.steps = source.count()
        self.history: list[EpochMetrics] = []

    def epoch(self, number: int, test_data: Data | None, progress: Progress | None) -> EpochMetrics:
        """One pass over the training data, then the accuracy on the test data."""
        started = time.perf_counter()
        self.module.train()
        _seed_epoch(self.settings.seed, number)
        before, total = (number - 1) * self.steps, self.settings.epochs * self.steps
        loss_sum, correct, seen, lr = 0.0, 0, 0, self.settings.lr
        for step, batch in enumerate(self.source.epoch(number), start=1):
            lr = self._set_lr((before + step - 1) / max(total, 1))
            x, y = _to_device(self.module, batch, self.device)
            loss, right = self._step(x, y)
            if not math.isfinite(loss):
                raise UsageError(_diverged(x, loss, number, step, lr))
            loss_sum += loss * len(y)
            correct += right
            seen += len(y)
            if progress is not None:
                progress(before + step, total)
        if not seen:
            raise UsageError(f"train_data gave no batch in epoch {number}.")
        _check_finite(self.module, number)
        tested = None if test_data is None else evaluate(self.module, test_data, device=self.device)
        seconds = time.perf_counter() - started
        metrics = EpochMetrics(number, loss_sum / seen, correct / seen, tested, lr, seconds)
        self.history.append(metrics)
        return metrics

    def _step(self, x: Tensor, y: Tensor) -> tuple[float, int]:
        """One step down the gradient: the loss before it, and how many were classified right."""
        with _explaining_memory(x):
            logits = _logits(self.module, x, y)
            loss = functional.cross_entropy(logits, y)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
        return float(loss.detach()), int((logits.detach().argmax(dim=1) == y).sum())

    def _set_lr(self, done: float) -> float:
        lr = self.settings.lr * schedule_factor(self.settings.schedule, done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def save(self, path: Path) -> None:
        """Write the state of the run. No generator's state: an epoch is seeded by its number."""

        content = {
            "bnfold": {"schema": SCHEMA, "kind": "run", "settings": asdict(self.settings)},
            "history": [asdict(metrics) for metrics in self.history],
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(path) as staged:
            _save_plain(content, staged)

    def load(self, path: Path) -> None:
        """Go on from a saved state. Raises InputError where it belongs to another run."""
        content = _load_plain(path)
        about = content.get("bnfold") if isinstance(content, dict) else None
        kind = (about.get("schema"), about.get("kind")) if isinstance(about, dict) else None
        if about is None or kind != (SCHEMA, "run"):
            raise InputError(f"{path} is not the state of a training run that bnfold wrote.")
        for name, now in asdict(self.settings).items():
            then = about["settings"].get(name)
            if then != now:
                what = "other training data" if name == "data" else f"{name} {then}, now {now}"
                raise InputError(f"{path} is of a run with {what}; resume with the same settings.")
        try:
            self.module.load_state_dict(content["module"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.history = [EpochMetrics(**metrics) for metrics in content["history"]]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is of another network: {_one_line(error)}") from error


def _optimizer(module: nn.Module, settings: _Settings) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters; gammas, betas and biases do not decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise UsageError(f"{type(module).__name__} has no parameter to train.")
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)


def _seed_epoch(seed: int, epoch: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]))


def _device(device: str | torch.device) -> torch.device:
    """The device, once it has held something."""
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise RuntimeUnavailableError(
            f"The device '{device}' cannot be used here: {_one_line(error)}"
        ) from error


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except RuntimeError as error:  # a tensor that autograd computed, kept as an attribute
        raise InputError(f"{type(module).__name__} cannot be copied: {_one_line(error)}") from error


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the caller's generators as they were, and let cuDNN pick repeatable kernels."""
    cuda = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        yield


@contextlib.contextmanager
def _refusing_lone_values(module: nn.Module) -> Iterator[None]:
    """Name the batch norm that would get one value per channel, from which no variance follows."""

    def refusing(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def check(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if not layer.training or not isinstance(x, Tensor) or x.dim() < 2:
                return
            if x.numel() <= x.shape[1]:
                raise UsageError(
                    f"The batch norm '{name}' gets an input of shape {tuple(x.shape)}: one value"
                    " per channel has no variance. Train with batches of 2 samples or more."
                )

        return check

    handles = [
        layer.register_forward_pre_hook(refusing(name))
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- one batch ------------------------------------------------------------------------------------


def _to_device(
    module: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The batch where the module is, x in the type of its parameters."""
    floats = (p.dtype for p in module.parameters() if p.is_floating_point())
    x, y = batch
    return x.to(device, next(floats, torch.float32)), y.to(device)


def _logits(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What the module says to x, if it can be held against the labels y."""
    shape = tuple(x.shape)
    try:
        logits = module(x)
    except (BnfoldError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the user's forward may raise anything
        raise UsageError(
            f"The network does not take a batch of shape {shape}: {_one_line(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(y):
        raise UsageError(
            f"For a batch of shape {shape} the network returned {describe(logits)}; a classifier"
            f" returns logits of shape ({len(y)}, classes)."
        )
    if int(y.max()) >= logits.shape[1]:
        raise UsageError(
            f"The data has the label {int(y.max())}, but the network has {logits.shape[1]} outputs"
            f" (classes 0 to {logits.shape[1] - 1})."
        )
    return logits


def _check_finite(module: nn.Module, epoch: int) -> None:
    """The loss is taken before a step; what the last step did shows only here."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UsageError(
                f"After epoch {epoch} '{name}' holds NaN or infinity: training diverged. Lower lr,"
                " or scale the inputs."
            )


@contextlib.contextmanager
def _explaining_memory(x: Tensor) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"The memory of {x.device} does not hold a batch of shape {tuple(x.shape)}; lower"
            " batch_size."
        ) from error


# --- words and files ------------------------------------------------------------------------------


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is '{value}'; it must be one of {', '.join(choices)}.")


def _diverged(x: Tensor, loss: float, epoch: int, step: int, lr: float) -> str:
    return (
        f"The loss became {loss} in step {step} of epoch {epoch} at a learning rate of {lr:.3g}, on"
        f" inputs between {float(x.min()):.3g} and {float(x.max()):.3g}: training diverged. Lower"
        " lr, or scale the inputs."
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _save_plain(content: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values, and prove that they load as such. Raises InputError."""
    try:
        torch.save(content, path)
        torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # of the disk, not of the content
    except Exception as error:  # pickle, zip and torch each raise types of their own
        raise InputError(
            f"The network's state cannot be written as plain tensors: {_one_line(error)}"
        ) from error


def _load_plain(path: Path) -> Any:
    """A file of tensors and plain values; nothing in it can run code. Raises InputError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except Exception as error:  # pickle, zip and torch each raise types of their own
        raise InputError(f"{path} cannot be read as a checkpoint: {_one_line(error)}") from error
