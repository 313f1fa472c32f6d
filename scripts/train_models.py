"""The trained files of models/: made by `bnfold train`, hashed and measured into its README.

    .venv/bin/python scripts/train_models.py [--check] [FILE.pt ...]

Trains each file anew (or those that are named) and writes models/README.md. With --check the files
and the README stay as they are, and the exit code is 1 where a file trained now is another one.
Accuracy: of the 360 test digits, by the network that the file itself describes, folded and not, on
onnxruntime.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # sums of another order are other bits

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import bnfold  # noqa: E402
from bnfold.data import open_data  # noqa: E402
from bnfold.graph import to_bytes  # noqa: E402
from bnfold.proof.places.runtime import open_session  # noqa: E402

FOLDER = ROOT / "models"
DIGITS = "--data digits --optimizer adamw --epochs 15"
GREY = "--set in_channels=1"
# file: what follows `bnfold train models/`
COMMANDS = {
    "resnet20_batch.pt": f"resnet_cifar.py:resnet20 {GREY} --set width=8 {DIGITS}",
    "preact_resnet20_exact.pt": f"preact_resnet.py:preact_resnet20 {GREY} --set width=8"
    f" --statistics exact {DIGITS}",
    "vgg7_renorm.pt": f"vgg.py:vgg7 {GREY} --set width=16 --norm renorm --norm-set momentum=0.1"
    f" {DIGITS}",
    "densenet_ghost.pt": f"densenet.py:densenet_bc {GREY} --set depth=16 --set growth=8"
    f" --norm ghost --norm-set ghost_size=16 {DIGITS}",
    "digits_cnn_mean-only.pt": f"digits.py:digits_cnn --norm mean-only {DIGITS}",
    "tcn_weight.pt": f"tcn.py:tcn --set width=16 --set levels=5 --set kernel_size=3 --norm weight"
    f" {DIGITS}",
    "mlp_weight-mean-only.pt": f"mlp.py:mlp --set in_features=64 --norm weight-mean-only {DIGITS}",
    "lenet5_normprop.pt": f"lenet.py:lenet5 --norm normprop --resize 28 {DIGITS}",
}
REPAIRS = {"densenet_ghost.pt": ("clamp",)}  # each channel has many readers, see densenet.py

HEAD = ("file", "command", "accuracy %", "bytes", "SHA-256")


def main() -> int:
    """Train, measure, write; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE.pt")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    changed = []
    for name in args.files or COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / name
            command = [sys.executable, "-m", "bnfold", *arguments(name)[1:-1], str(made)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            before = (FOLDER / name).read_bytes() if (FOLDER / name).exists() else b""
            same = made.read_bytes() == before
            print(f"{name}: {'as before' if same else 'another file'}", flush=True)
            if not same:
                changed.append(name)
                if not args.check:
                    (FOLDER / name).write_bytes(made.read_bytes())
    if args.check:
        return 1 if changed else 0
    (FOLDER / "README.md").write_text(readme(), encoding="utf-8")
    return 0


def arguments(name: str) -> list[str]:
    """The command that makes a file, as the README says it."""
    return shlex.split(f"bnfold train models/{COMMANDS[name]} -o models/{name}")


def accuracy(path: Path) -> tuple[float, float]:
    """Percent of the test digits that a file's network tells, as it is and folded."""
    result = bnfold.fold(path, repair=REPAIRS.get(path.name, ()))
    result.verify().raise_for_failure()
    size = 28 if "--resize 28" in COMMANDS[path.name] else None
    data = open_data("digits:test", shuffle=False, resize=size)
    assert data.labels is not None
    x = np.concatenate(list(data))
    percent = []
    for graph in (result.original, result.graph):
        session = open_session(to_bytes(graph), "cpu", optimize=True)
        (logits,) = session.run({session.input_names[0]: x}).values()
        percent.append(100 * float(np.mean(logits.argmax(1) == data.labels)))
    return percent[0], percent[1]


def row(name: str) -> str:
    """A file's line in the README."""
    content = (FOLDER / name).read_bytes()
    before, after = accuracy(FOLDER / name)
    if before != after:
        raise SystemExit(f"{name}: {before} % before the fold, {after} % after it.")
    cells = [f"`{name}`", f"`{shlex.join(arguments(name))}`", f"{before:.2f}", str(len(content))]
    return "| " + " | ".join([*cells, f"`{hashlib.sha256(content).hexdigest()}`"]) + " |"


def readme() -> str:
    """The README with every file as it lies there."""
    table = [f"| {' | '.join(HEAD)} |", "| --- " * len(HEAD) + "|", *map(row, COMMANDS)]
    return TEXT.replace("TABLE", "\n".join(table))


TEXT = """\
# Networks

Each file is one architecture, short enough to read, and opens with its idea and its source. A
factory takes keyword arguments only, with defaults as published, and `norm`, the normalization:
`batch`, `renorm`, `ghost`, `mean-only`, `weight`, `weight-mean-only`, `normprop`, `frozen`, `sync`
or `none` (see `bnfold.norm`). `bnfold train models/vgg.py:vgg7 --norm renorm --data digits` trains
one, `bnfold fold vgg7.pt` folds it. What each of them loses by its fold, which is nothing, is in
[docs/results/variants.md](../docs/results/variants.md).

| file | network |
| --- | --- |
| `mlp.py` | multilayer perceptron with dropout |
| `lenet.py` | LeNet-5 |
| `digits.py` | three small networks for 28x28 and 8x8 digits |
| `vgg.py` | VGG, 7 and 11 layers |
| `resnet.py` | ResNet-18 |
| `resnet_cifar.py` | ResNet-20 to 110 for 32x32 images |
| `preact_resnet.py` | pre-activation ResNet, 20 and 18 layers |
| `densenet.py` | DenseNet-BC for 32x32 images |
| `mobilenet_v2.py` | MobileNetV2, for 224x224 and for 32x32 images |
| `unet.py` | U-Net: a class for each pixel |
| `tcn.py` | temporal convolutional network: a class for a sequence |
| `dncnn.py` | DnCNN, a denoiser |
| `dcgan.py` | DCGAN's generator |
| `slim320.py` | a face detector with four heads |

## Trained files

For a first try and for tests: small networks that have learnt scikit-learn's digits. They describe
themselves: `bnfold fold models/vgg7_renorm.pt` needs no other word (for `densenet_ghost.pt` add
`--repair clamp`: each of its channels is read by many batch norms). The accuracy is of the 360 test
digits, the same before and after the fold.

TABLE

Made and measured by `scripts/train_models.py` with one thread (`OMP_NUM_THREADS=1`). On one machine
the same command gives the same bytes, which `scripts/train_models.py --check` proves. Elsewhere
they may differ: another processor or another version of torch sums in another order, and a file
holds the exporter's graph, the settings of its run and the versions that it was made with.
"""


if __name__ == "__main__":
    sys.exit(main())
