"""Two and four processes give what one gives: statistics, figures, warnings, and errors."""

import json

import numpy as np
import pytest
import torch
from processes import run_in
from torch import nn

import bnfold

BATCHES = (7, 5, 7, 1, 6, 7, 3)  # of images


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(5),
        nn.BatchNorm1d(5),
    )


def ready():
    made = net().eval()
    made(torch.zeros(1, 3, 9, 9))
    return made


def batches(count):
    """Of unequal sizes, sorted by brightness."""
    rng = np.random.default_rng(1)
    return [
        (i / 3 + (1 + i / 9) * rng.standard_normal((n, 3, 9, 9))).astype(np.float32)
        for i, n in enumerate(BATCHES[:count])
    ]


def told(result):
    """Everything that does not depend on who did it; what fits into memory is each one's own."""
    return {
        "images": result.images,
        "batches": result.batches,
        "statistics": {
            name: [s.mean.tolist(), s.var.tolist()] for name, s in result.statistics.items()
        },
        "shifts": [[s.kl_before, s.kl_after, s.mean_error, s.samples] for s in result.layers],
        "outputs": [
            result.outputs.entropy_before,
            result.outputs.entropy_after,
            result.outputs.agreement,
            *result.outputs.histogram_after,
        ],
        "warnings": [said for said in result.warnings if "memory" not in said],
    }


SHARED = """
import json, sys
import bnfold
from bnfold.measuring.ranks import group_from_environment
from bnfold.data import shard
from test_distributed import batches, model_of, told

with group_from_environment() as ranks:
    for kind, method, count, options in json.loads(sys.argv[2]):
        mine = shard(batches(count), ranks.rank, ranks.size)
        model = model_of(kind, sys.argv[1])
        found = bnfold.adapt(model, mine, method=method, ranks=ranks, **options)
        print(json.dumps(told(found)), flush=True)
"""


def model_of(kind, path):
    return ready() if kind == "module" else str(path)


def assert_alike(found, wanted):
    assert found["images"] == wanted["images"]
    assert found["batches"] == wanted["batches"]
    assert found["warnings"] == wanted["warnings"]
    assert list(found["statistics"]) == list(wanted["statistics"])
    for name, both in wanted["statistics"].items():
        for ours, theirs in zip(found["statistics"][name], both, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found["shifts"], wanted["shifts"], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found["outputs"], wanted["outputs"], rtol=1e-5)


RUNS = {
    2: [
        ("module", "exact", 7, {}),
        ("module", "fast", 7, {"prior": 4.0}),
        ("graph", "exact", 7, {}),
        ("graph", "fast", 7, {}),
    ],
    4: [
        ("module", "exact", 7, {"max_bytes": 0}),
        ("module", "exact", 3, {"prior": "auto"}),
        ("module", "fast", 3, {}),
        ("graph", "exact", 3, {"max_bytes": 0}),
        ("graph", "fast", 3, {}),
    ],
}


@pytest.mark.parametrize("size", RUNS)
def test_several_processes_give_what_one_gives(size, tmp_path):
    """Of 3 batches for 4 processes, one has none."""
    path = tmp_path / "net.onnx"
    bnfold.export(ready(), (torch.zeros(2, 3, 9, 9),), path=path)
    found = run_in(size, SHARED, path, json.dumps(RUNS[size]), timeout=120)
    assert [code for code, _ in found] == [0] * size
    every = [said.splitlines() for _, said in found]
    assert all(one == every[0] for one in every)  # bit for bit
    for line, (kind, method, count, options) in zip(every[0], RUNS[size], strict=True):
        alone = bnfold.adapt(model_of(kind, path), batches(count), method=method, **options)
        assert_alike(json.loads(line), json.loads(json.dumps(told(alone))))


FAILING = """
import sys
import bnfold
from bnfold.measuring.ranks import group_from_environment
from bnfold.data import shard
from bnfold.errors import BnfoldError
from test_distributed import batches, model_of

for kind in ("module", "graph"):
    for method in ("exact", "fast"):
        for what in ("nan", "nothing"):
            given = batches(7) if what == "nan" else []
            if what == "nan":
                given[5][0, 0, 0, 0] = float("nan")  # the last of the second process
            try:
                with group_from_environment() as ranks:
                    mine = shard(given, ranks.rank, ranks.size)
                    bnfold.adapt(model_of(kind, sys.argv[1]), mine, method=method, ranks=ranks)
            except BnfoldError as error:
                print(type(error).__name__, error, flush=True)
"""


def test_what_is_wrong_in_the_part_of_one_ends_all(tmp_path):
    path = tmp_path / "net.onnx"
    bnfold.export(ready(), (torch.zeros(2, 3, 9, 9),), path=path)
    (code, first), (other, second) = run_in(2, FAILING, path, joined=True)
    assert (code, other) == (0, 0)
    assert first == second
    lines = first.splitlines()
    assert len(lines) == 8
    for line in lines[::2]:
        assert line.startswith("InputError The input of '")
        assert "holds NaN or infinity in batch 2" in line
    for line in lines[1::2]:
        assert line.startswith("InputError The target data holds no image")
