"""Every variant on every architecture: trained on the digits, folded, proved, held against itself.

    .venv/bin/python scripts/measure_variants.py [-o PAGE.md] [--models mlp,vgg] [--kinds batch]

Each file of models/ with each kind of normalization, at a width that trains in seconds (see
tests/digit_tasks.py), is folded; counted are the normalisation operators left in the graph, the
decisions on the test digits that changed in torch and in onnxruntime, and R, the error of the
folded network against float64 over the original's own. Exit code 1 where anything but 0, 0 and
R <= 4 comes out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import onnxruntime
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from digit_tasks import (  # noqa: E402
    BATCH,
    CODE,
    EPOCHS,
    TASKS,
    Outcome,
    Task,
    denoised,
    folded,
    trained,
)

from bnfold.norm import KINDS  # noqa: E402

MEASURED = tuple(kind for kind in KINDS if kind != "sync")  # which needs several processes
HEAD = (
    "| model | norm | norms | left | original | torch | onnxruntime | changed"
    " | R | gates | holds |",
    "| --- " * 11 + "|",
)


def main() -> int:
    """Print the table and write the page; 1 where a row does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="the page; its other rows stay")
    parser.add_argument("--models", default=",".join(TASKS))
    parser.add_argument("--kinds", default=",".join(MEASURED))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # the torch exporter's own
    failures: list[str] = []
    print(*HEAD, sep="\n")
    for name in args.models.split(","):
        for kind in args.kinds.split(","):
            outcome = folded(TASKS[name], trained(TASKS[name], kind))
            line = row(name, kind, TASKS[name], outcome)
            print(line, flush=True)
            if not outcome.holds:
                failures.append(f"{name}, {kind}: " + "; ".join(outcome.notes or ("see its row",)))
            if args.output:  # read again: another process may have written its own rows
                known = rows_of(args.output)
                text = page(known | {(name, kind): line})
                args.output.write_text(text, encoding="utf-8")
    print(*failures, sep="\n")
    return 1 if failures else 0


def row(name: str, kind: str, task: Task, outcome: Outcome) -> str:
    """One line of the table."""
    digits = 4 if task.unit == "dB" else 2
    figures = [f"{figure:.{digits}f}" for figure in outcome.figures]
    counts = [str(outcome.before), str(outcome.left), *figures, str(outcome.changed)]
    gates = "pass" if outcome.passed else "FAIL"
    verdict = "yes" if outcome.holds else "NO"
    return "| " + " | ".join([name, kind, *counts, f"{outcome.r:.2f}", gates, verdict]) + " |"


def rows_of(page: Path) -> dict[tuple[str, str], str]:
    """The rows of a page that was written before, by model and kind."""
    found: dict[tuple[str, str], str] = {}
    if not page.exists():
        return found
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = line.strip("| ").split(" | ")
        if cells[0] in TASKS and line.startswith("| "):
            found[cells[0], cells[1]] = line
    return found


def page(rows: dict[tuple[str, str], str]) -> str:
    """The results as Markdown, in the order of the tasks."""
    ordered = [rows[key] for key in itertools.product(TASKS, MEASURED) if key in rows]
    hold = sum(line.endswith("| yes |") for line in ordered)
    noise = denoised()
    return TEXT.format(
        torch=torch.__version__,
        ort=onnxruntime.__version__,
        epochs=EPOCHS,
        more=EPOCHS // 4,
        batch=BATCH,
        code=CODE,
        train=len(noise.train.x),
        test=len(noise.test.x),
        noisy=-10 * math.log10(float((noise.test.y**2).mean())),
        needs="; ".join(f"{name} `{' '.join(t.repair)}`" for name, t in TASKS.items() if t.repair),
        rows="\n".join([*HEAD, *ordered]),
        hold=f"{hold} of {len(ordered)} rows hold",
    )


TEXT = """\
# Every variant, every architecture, folded

Printed by `scripts/measure_variants.py` (torch {torch} on the CPU, one thread;
onnxruntime {ort}, CPU provider, all optimisations on). Each file of `models/` at a small width
learns {epochs} epochs on the {train} training digits of scikit-learn's data set (AdamW, one cycle,
batches of {batch}, seed 0) with each kind of normalization. `frozen` is trained with batch norms,
frozen, then trained on for {more} epochs at a tenth of the learning rate; `none` is the control.

The figures are of the {test} test digits: accuracy in percent. `dncnn` takes noise off the digits
(PSNR in dB; the noisy digits themselves have {noisy:.2f}), `unet` marks ink under noise (accuracy
by pixel), `dcgan` draws a digit from its {code} principal components (accuracy of the nearest
training digit to the drawing), `slim320` says a digit's class by its scores,
averaged over all priors.

- norms: normalisations in the exported graph before the fold, where additions, subtractions,
  multiplications and divisions by constants count as such; left: after it. Weight normalization
  has none: what is exported are the weights that it computes.
- original, torch, onnxruntime: the figure of the trained network, of the folded one in torch and
  of the folded graph. changed: decisions (a class, a pixel for `unet`, for `dncnn` the clean
  training digit nearest to the result) that differ from the original's, in torch and onnxruntime
  together.
- R: error of the folded network against float64 over the original's own, worst over the kinds of
  inputs; at most 4 passes.
- Repairs were asked for by: {needs}; in torch a graph module takes them.

Nothing is compared here but a network with its own fold: {epochs} epochs at a width chosen for
speed do not say which variant is better.

{hold}: no operator left, no decision changed, all gates passed, R at most 4.

{rows}
"""


if __name__ == "__main__":
    sys.exit(main())
