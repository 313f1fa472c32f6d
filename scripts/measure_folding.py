"""Real networks folded: batch norms gone, accuracy before and after, on torch and onnxruntime, R.

    .venv/bin/python scripts/measure_folding.py [FOLDER OF REAL DATA]

Needs the real checkpoints (default ../shared/data). Accuracy in percent (DnCNN: PSNR in dB, sigma
25); R is the error of the folded network against a float64 evaluation of the original,
over the original's own float32 error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import realdata  # noqa: E402
from nets import with_statistics  # noqa: E402

import bnfold  # noqa: E402
from bnfold.graph import to_bytes  # noqa: E402
from bnfold.proof.places.runtime import open_session  # noqa: E402
from models.mobilenet_v2 import mobilenet_v2  # noqa: E402
from models.preact_resnet import preact_resnet18  # noqa: E402
from models.resnet import resnet18  # noqa: E402

TEST_SETS = {
    "resnet20": realdata.cifar_test761,
    "resnet56": realdata.cifar_test761,
    "mnist_cnn": realdata.mnist_test,
    "mnist_mlp": realdata.mnist_test,
    "mnist_lenet5": realdata.mnist_test,
    "mnist_resnet": realdata.mnist_test,
}


def onnx_predict(graph: object, x: np.ndarray) -> np.ndarray:
    """Outputs on onnxruntime's CPU provider, all optimisations on."""
    session = open_session(to_bytes(graph), "cpu", optimize=True)
    (name,) = session.input_names
    parts = [
        next(iter(session.run({name: x[i : i + 250]}).values())) for i in range(0, len(x), 250)
    ]
    return np.concatenate(parts)


def line(name: str, result: bnfold.FoldResult, figures: list[str]) -> None:
    """One row of the table."""
    proof = result.verify()
    found = len(result.folded) + len(result.kept)
    verdict = "pass" if proof.passed else "FAIL"
    cells = [name, f"{len(result.folded)} of {found}", *figures, f"{proof.r:.2f}", verdict]
    print("| " + " | ".join(cells) + " |", flush=True)
    for kept in result.kept:
        print(f"|   | {kept.name}: {kept.reason} |", flush=True)


def denoiser(shared: Path) -> None:
    """DnCNN: mean PSNR over the images of Set12 that are 256 pixels square.

    The export fixes height and width, so the graph is made for that size; the proof, which costs
    many float64 forwards, runs on the same network exported for 32 pixels.
    """
    module = realdata.load_model(shared, "dncnn")
    noise = np.random.default_rng(0)
    images = realdata.set12(shared)
    noisy = {
        name: image + noise.normal(0, 25 / 255, image.shape).astype(np.float32)
        for name, image in images.items()
        if image.shape[2:] == (256, 256)
    }

    def psnr(predict) -> float:
        errors = [
            np.mean((np.clip(x - predict(x), 0, 1).astype(np.float64) - images[name]) ** 2)
            for name, x in noisy.items()
        ]
        return float(np.mean([-10 * np.log10(error) for error in errors]))

    result = bnfold.fold(module, torch.zeros(1, 1, 32, 32))
    wide = bnfold.fold(module, torch.zeros(1, 1, 256, 256))
    runs = (
        lambda x: realdata.predict(module, x),
        lambda x: realdata.predict(result.model, x),
        lambda x: onnx_predict(wide.graph, x),
    )
    line("dncnn (dB)", result, [f"{psnr(run):.4f}" for run in runs])


def main() -> None:
    """Print the table."""
    shared = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data"
    print("| network | folded | before | torch | onnxruntime | R | gates |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, test_set in TEST_SETS.items():
        module = realdata.load_model(shared, name)
        x, y = test_set(shared)
        result = bnfold.fold(module, torch.from_numpy(x[:2]))
        outputs = (
            realdata.predict(module, x),
            realdata.predict(result.model, x),
            onnx_predict(result.graph, x),
        )
        line(name, result, [f"{100 * np.mean(o.argmax(1) == y):.2f}" for o in outputs])
    denoiser(shared)
    architectures()
    for path in sorted((shared / "onnx").glob("*.onnx")):
        line(path.name, bnfold.fold(path, freeze_inputs=True), ["", "", ""])


def architectures() -> None:
    """Standard architectures with random weights and statistics."""
    for name, network, shape in (
        ("resnet18, random weights", with_statistics(resnet18()), (1, 3, 224, 224)),
        ("mobilenet_v2, random weights", with_statistics(mobilenet_v2()), (1, 3, 224, 224)),
        (
            "preact_resnet18, positive gammas",
            with_statistics(preact_resnet18(), positive=True),
            (1, 3, 32, 32),
        ),
        ("preact_resnet18, mixed signs", with_statistics(preact_resnet18()), (1, 3, 32, 32)),
    ):
        line(name, bnfold.fold(network, torch.zeros(shape)), ["", "", ""])


if __name__ == "__main__":
    main()
