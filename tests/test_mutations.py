"""The laws bite: each of many one-line mistakes in the folding code is caught by one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
# eps, groups, padding, axes, signs, gamma 0, sums, sharing: one of each kind, in a few seconds
QUICK = ["var + eps", '"group", 1', '!= "VALID"', "split, 1, 2", "scale > 0"]
QUICK += ["scale_y * (t", "Term(", "readers(root)"]


def caught(indices: list[int]) -> dict[str, str | None]:
    """Run the mutants in a process of their own, which imports the package over and over."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.mutants", *map(str, indices)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def survivors(indices: list[int]) -> list[Mutant]:
    laws = caught(indices)
    return [MUTANTS[index] for index in indices if laws[str(index)] is None]


def test_every_mutant_still_finds_its_line() -> None:
    for mutant in MUTANTS:
        compile(mutant.source, mutant.file, "exec")
    assert len(MUTANTS) >= 80


def test_a_mistake_of_each_kind_is_caught() -> None:
    quick = [next(i for i, m in enumerate(MUTANTS) if words in m.right) for words in QUICK]
    assert survivors(quick) == []


def test_a_harmless_change_survives() -> None:
    """The net is not so tight that nothing gets through: what is caught is caught for a reason."""
    code = (
        "from tests import mutants as m;"
        "harmless = m.Mutant(m.LINEAR, 'bias = _bias(', 'bias = 1 * _bias(', 'conv');"
        "m.laws_of = lambda hint, laws=m.laws_of: (l for l in laws(hint) if l.name[:4] == 'conv');"
        "assert m.caught_by(harmless) is None, m.caught_by(harmless)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_mistake_is_caught(part: int) -> None:
    assert survivors(list(range(part, len(MUTANTS), 4))) == []
