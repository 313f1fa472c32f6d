"""The main job, end to end, on scikit-learn's handwritten digits.

Trains a small network with batch norm, fades the pictures (the target domain), adapts the
statistics to them without labels, folds, exports and proves; prints one table and leaves the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the network definitions lie in models/, beside the package

import bnfold  # noqa: E402
from bnfold.data import open_data, shifted  # noqa: E402
from bnfold.graph import write_onnx  # noqa: E402
from bnfold.proof.places.runtime import open_session  # noqa: E402
from bnfold.training.train import evaluate, save_checkpoint, train  # noqa: E402
from models.digits import digits_cnn  # noqa: E402

OUT = ROOT / "demo-output"
SPEC = "models/digits.py:digits_cnn"


def arrays(spec: str) -> tuple[np.ndarray, np.ndarray]:
    """All samples of a data set and their labels."""
    data = open_data(spec)
    return np.concatenate(list(data)), data.labels


def faded(x: np.ndarray) -> np.ndarray:
    """The target domain: pictures of low contrast, overexposed."""
    return shifted(shifted(x, "contrast", 0.3), "brightness", 0.3)


def onnx_accuracy(path: Path, x: np.ndarray, y: np.ndarray) -> float:
    """Accuracy of an ONNX file on onnxruntime's CPU provider, all optimisations on."""
    session = open_session(path, "cpu", optimize=True)
    (scores,) = session.run({"x": x}).values()
    return float(np.mean(scores.argmax(axis=1) == y))


def main() -> int:
    """Run the demo; the exit code is 1 if a gate fails."""
    torch.set_num_threads(1)  # the pictures are tiny: threads would only wait for each other
    torch.manual_seed(0)
    OUT.mkdir(exist_ok=True)
    x, y = arrays("digits:train")
    x_test, y_test = arrays("digits:test")
    x_target, x_target_test = faded(x), faded(x_test)

    print("training on the source domain ...", file=sys.stderr)
    source = train(digits_cnn(), (x, y), epochs=10, seed=0).module
    example = torch.from_numpy(x_test[:1])
    save_checkpoint(OUT / "digits.pt", source, model_spec=SPEC, example_input=example, metrics={})

    print("adapting to faded pictures, without labels ...", file=sys.stderr)
    batches = [x_target[i : i + 64] for i in range(0, len(x_target), 64)]
    adapted = bnfold.adapt(source, batches, method="exact")
    save_checkpoint(
        OUT / "digits.adapted.pt",
        adapted.model,
        model_spec=SPEC,
        example_input=example,
        metrics={"method": adapted.method, "images": adapted.images},
    )

    print("folding, exporting, proving ...", file=sys.stderr)
    folded = bnfold.fold(adapted.model, example)
    proof = folded.verify({"x": x_target_test})
    write_onnx(folded.graph, OUT / "digits.adapted.folded.onnx")
    folded.record.save(OUT / "digits.adapted.folded.record.safetensors")

    rows = [
        ("source network, source pictures", evaluate(source, (x_test, y_test))),
        ("source network, faded pictures", evaluate(source, (x_target_test, y_test))),
        ("adapted", evaluate(adapted.model, (x_target_test, y_test))),
        ("adapted and folded", evaluate(folded.model, (x_target_test, y_test))),
        (
            "the same on onnxruntime",
            onnx_accuracy(OUT / "digits.adapted.folded.onnx", x_target_test, y_test),
        ),
    ]
    table = report(rows, adapted, folded, proof)
    (OUT / "report.md").write_text(table, encoding="utf-8")
    print(table)
    print(f"Files are in {OUT.relative_to(ROOT)}/.", file=sys.stderr)
    return 0 if proof.passed else 1


def report(rows: list, adapted, folded, proof) -> str:
    """The table, and what stands behind it."""
    lines = ["| step | accuracy |", "| --- | --- |"]
    lines += [f"| {step} | {100 * accuracy:.2f} % |" for step, accuracy in rows]
    found = len(folded.folded) + len(folded.kept)
    verdict = "proved" if proof.passed else "NOT PROVED"
    lines += [
        "",
        f"{len(folded.folded)} of {found} batch norms folded, {verdict}: R = {proof.r:.2f}"
        f" (limit 4). Adapted to {adapted.images} pictures without labels.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
