"""The experiment on the variants: what it measures is what it says, and its page is written."""

import pytest
import torch
from torch import nn

from bnfold.norm.propagation import Propagated
from scripts.experiments import hidden, normalised, variants


@pytest.fixture
def images():
    return torch.randn(64, 1, 20, 20, generator=torch.Generator().manual_seed(0))


def test_a_jacobians_size_is_that_of_its_singular_values(images):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU()).requires_grad_(False)
    small = images[:8, :, :6, :6]
    jacobians = torch.func.vmap(torch.func.jacrev(layer))(small).reshape(8, 27, 36)
    exact = float((torch.linalg.svdvals(jacobians).square().sum() / (8 * 27)).sqrt())
    generator = torch.Generator().manual_seed(0)
    found = [hidden._jacobian(layer, small, generator) for _ in range(100)]
    assert sum(found) / 100 == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("variant", normalised.VARIANTS, ids=lambda variant: variant.name)
def test_a_network_that_is_looked_at_computes_what_it_does_in_training(variant, images):
    network = normalised.built(variant, 0, images)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    still = hidden.settled(network, images)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    wanted = network.train()(images).detach()
    # running variances are unbiased: n / (n - 1) in each layer, n at least 64 * 5 * 5
    bound = len(normalised.WIDTHS) / (64 * 25) * float(wanted.abs().max())
    assert float((still(images) - wanted).abs().max()) < bound
    if variant is normalised.BATCH_NORM:
        assert float((network.eval()(images).detach() - wanted).abs().max()) > 10 * bound
    layers = hidden.looked_at(network, images)
    assert len(layers) == len(normalised.WIDTHS) - 1
    propagates = any(isinstance(part, Propagated) for part in network.modules())
    assert propagates == (variant.kind == "normprop")
    if variant is normalised.PAPER:
        # sqrt(P(u > 0)) gain / std = 1 in mean, less what the zeros around the image take
        assert 0.5 < sum(layer.jacobian for layer in layers) / len(layers) < 1.05


@pytest.mark.slow
def test_the_page_is_written(tmp_path):
    found = variants.main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "variants.png").stat().st_size > 10_000
    text = (tmp_path / "variants.md").read_text()
    best = min(normalised.VARIANTS, key=lambda variant: found.error(variant).mean)
    assert f"**Test error, the lowest first: {best.name} {found.error(best):.2f} %" in text
