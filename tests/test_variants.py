"""Every architecture of models/ with the variants: trained, folded to nothing but weights, proved.

A few steps of training each; `scripts/measure_variants.py` is the whole table.
"""

import pytest
import torch
from digit_tasks import TASKS, folded, norm_operators, trained
from torch import nn
from torch.nn.utils import parametrize

import bnfold
from bnfold.norm import KINDS

MEASURED = [kind for kind in KINDS if kind != "sync"]
OTHERS = [kind for kind in MEASURED if kind != "normprop"]
# each file with NormProp, whose activations fold as well, and with one of the others in turn
CELLS = [(name, "normprop") for name in TASKS]
CELLS += [(name, OTHERS[i % len(OTHERS)]) for i, name in enumerate(TASKS)]


def check(name, kind, **less):
    network = trained(TASKS[name], kind, **less)
    outcome = folded(TASKS[name], network)
    assert outcome.left == 0, outcome.notes
    assert outcome.changed == 0
    assert outcome.passed, outcome.notes
    assert outcome.r <= 4
    assert outcome.holds


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_an_architecture_with_a_variant_folds_to_no_norm_and_decides_as_before(name, kind):
    check(name, kind, epochs=1, samples=256)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MEASURED)
@pytest.mark.parametrize("name", TASKS)
def test_every_architecture_with_every_variant(name, kind):
    check(name, kind, epochs=2)


def test_the_check_tells_a_norm_that_stays_and_a_decision_that_changes():
    task = TASKS["vgg"]
    network = trained(task, "batch", epochs=1, samples=128)
    whole = folded(task, network)
    assert whole.holds
    assert whole.before == 6
    kept = bnfold.fold(network, torch.zeros(1, 1, 8, 8), keep=["features.1"])
    assert norm_operators(kept.graph) == 1

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x) + torch.linspace(-9, 9, 10)

    other = folded(task, Biased().eval())
    assert other.left == 1
    assert not other.holds


@pytest.mark.parametrize("kind", MEASURED)
def test_the_graph_of_each_variant_takes_batches_of_any_size(kind):
    network = TASKS["vgg"].factory(in_channels=1, width=4, norm=kind).eval()
    exported = bnfold.export(network, torch.zeros(2, 1, 8, 8))
    assert [str(size) for size in exported.graph.inputs[0].shape] == ["batch", "1", "8", "8"]


def test_a_folded_network_in_torch_holds_neither_norms_nor_parametrizations():
    for kind in ("renorm", "weight-mean-only", "normprop"):
        result = bnfold.fold(
            trained(TASKS["vgg"], kind, epochs=1, samples=128), torch.zeros(1, 1, 8, 8)
        )
        modules = list(result.model.modules())
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)
        assert not any(parametrize.is_parametrized(m) for m in modules)
