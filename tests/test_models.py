"""The network definitions hold the published checkpoints and reproduce their published figures."""

import hashlib
import importlib.util
import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import realdata
import torch
from conftest import ROOT
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import (
    digits,
    dncnn,
    lenet,
    mlp,
    mobilenet_v2,
    preact_resnet,
    resnet,
    resnet_cifar,
)

# factory, one sample's shape, output width, batch norms, parameters (millions as the papers round)
NETWORKS = [
    (resnet_cifar.resnet20, (3, 32, 32), 10, 19, 0.27),
    (resnet_cifar.resnet32, (3, 32, 32), 10, 31, 0.46),
    (resnet_cifar.resnet44, (3, 32, 32), 10, 43, 0.66),
    (resnet_cifar.resnet56, (3, 32, 32), 10, 55, 0.85),
    (resnet_cifar.resnet110, (3, 32, 32), 10, 109, 1.73),
    (preact_resnet.preact_resnet20, (3, 32, 32), 10, 19, 0.27),
    (preact_resnet.preact_resnet18, (3, 32, 32), 10, 17, 11.17),
    (resnet.resnet18, (3, 224, 224), 1000, 20, 11.69),
    (mobilenet_v2.mobilenet_v2, (3, 224, 224), 1000, 52, 3.50),
    (digits.cnn, (1, 28, 28), 10, 2, 0.01),
    (digits.resnet, (1, 28, 28), 10, 6, 0.01),
    (digits.digits_cnn, (1, 8, 8), 10, 4, 0.02),
    (lenet.lenet5, (1, 28, 28), 10, 4, 0.04),
    (mlp.mlp, (1, 28, 28), 10, 2, 0.54),
]

# percent: MNIST test, USPS padded, USPS stretched, MNIST-M, of the networks before any adaptation
DIGIT_ACCURACIES = {
    "mnist_cnn": (98.78, 93.7, 77.6, 19.2),
    "mnist_mlp": (98.61, 92.6, 32.0, 20.9),
    "mnist_lenet5": (99.08, 91.8, 64.3, 31.7),
    "mnist_resnet": (97.87, 94.2, 39.9, 11.1),
}

# sha256 of torchvision 0.29's own parameter names and shapes, in order
TORCHVISION_LAYOUT = {
    resnet.resnet18: ("84fb10d9c6905a1cbb020b284537dc97c4f4ec55fb2a780a41152a23a2dd0e9d"),
    mobilenet_v2.mobilenet_v2: ("37bbbce8932fd0c49fe8e941719a7aa7b25b60c17b428749b72562f754135844"),
}


def layout_digest(module: nn.Module) -> str:
    lines = [f"{name} {tuple(tensor.shape)}" for name, tensor in module.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def psnr(image: np.ndarray, estimate: np.ndarray) -> float:
    return -10 * math.log10(float(np.mean((image - estimate) ** 2, dtype=np.float64)))


def denoised_psnr(module: nn.Module, name: str, image: np.ndarray) -> float:
    rng = np.random.default_rng(int(name))
    noisy = image + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(25 / 255)
    return psnr(image, np.clip(noisy - realdata.predict(module, noisy), 0, 1))


@pytest.mark.parametrize(
    ("factory", "shape", "outputs", "batch_norms", "millions"),
    NETWORKS,
    ids=[row[0].__name__ for row in NETWORKS],
)
def test_factory_needs_no_arguments_and_builds_the_published_size(
    factory, shape, outputs, batch_norms, millions
):
    module = factory().eval()
    assert sum(isinstance(m, _BatchNorm) for m in module.modules()) == batch_norms
    parameters = sum(p.numel() for p in module.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.006)
    with torch.no_grad():
        logits = module(torch.ones(1, *shape))
    assert logits.shape == (1, outputs)
    assert torch.isfinite(logits).all()


def test_num_classes_sets_the_width_of_the_output():
    for factory, shape, *_ in NETWORKS[-6:]:
        with torch.no_grad():
            assert factory(num_classes=3).eval()(torch.ones(2, *shape)).shape == (2, 3)


def test_dncnn_returns_an_image_of_any_size():
    module = dncnn.dncnn().eval()
    with torch.no_grad():
        assert module(torch.zeros(1, 1, 17, 23)).shape == (1, 1, 17, 23)


def test_each_definition_stands_alone():
    """A factory is addressed as `file.py:name`, so no file may need another one."""
    for path in sorted((ROOT / "models").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"alone_{path.stem}", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert "from models" not in path.read_text()


@pytest.mark.parametrize("factory", TORCHVISION_LAYOUT, ids=lambda f: f.__name__)
def test_imagenet_parameters_carry_the_names_of_torchvision(factory):
    module = factory()
    assert layout_digest(module) == TORCHVISION_LAYOUT[factory]
    module.register_parameter("misnamed", nn.Parameter(torch.zeros(1)))
    assert layout_digest(module) != TORCHVISION_LAYOUT[factory]


def test_pre_activation_stream_carries_nothing_but_sums():
    module = preact_resnet.preact_resnet20().eval()
    stage = module.layers[1]
    for block in stage[1:]:
        nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert torch.equal(stage(x), stage[0](x))
        nn.init.dirac_(stage[2].conv2.weight)
        assert not torch.equal(stage(x), stage[0](x))


def test_cifar_shortcut_subsamples_and_pads_with_zero_channels():
    block = resnet_cifar.BasicBlock(16, 32, 2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    with torch.no_grad():
        y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("name", realdata.WEIGHTS)
def test_published_checkpoint_loads_strictly(shared_data: Path, name):
    module = realdata.load_model(shared_data, name)
    loaded = realdata.load_state_dict(realdata.load_weights(shared_data, name)[1])
    for key, tensor in loaded.items():
        assert torch.equal(module.state_dict()[key], tensor)


def test_another_networks_checkpoint_does_not_load(shared_data: Path):
    deeper = realdata.load_state_dict(realdata.load_weights(shared_data, "resnet56")[1])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        resnet_cifar.resnet20().load_state_dict(deeper, strict=True)


@pytest.mark.parametrize(("name", "percent"), [("resnet20", 91.72), ("resnet56", 93.43)])
def test_cifar_checkpoint_reproduces_its_accuracy(shared_data: Path, name, percent):
    module = realdata.load_model(shared_data, name)
    measured = realdata.accuracy(module, *realdata.cifar_test761(shared_data))
    assert measured == pytest.approx(percent, abs=0.14)  # one image of 761


@pytest.mark.parametrize("name", DIGIT_ACCURACIES)
def test_digit_checkpoint_reproduces_its_accuracies(shared_data: Path, name):
    module = realdata.load_model(shared_data, name)
    on_mnist, on_usps, on_stretched, on_mnistm = DIGIT_ACCURACIES[name]
    mnist = realdata.accuracy(module, *realdata.mnist_test(shared_data))
    assert mnist == pytest.approx(on_mnist, abs=0.011)  # one digit of 10000
    shifted = {
        on_usps: realdata.usps(shared_data),
        on_stretched: realdata.usps(shared_data, layout="stretch"),
        on_mnistm: realdata.mnistm(shared_data),
    }
    for percent, (x, y) in shifted.items():
        assert realdata.accuracy(module, x, y) == pytest.approx(percent, abs=0.11)


def test_accuracy_tells_when_one_batch_norm_is_wrong(shared_data: Path):
    module = realdata.load_model(shared_data, "mnist_lenet5")
    module.bn2.running_var *= 4
    measured = realdata.accuracy(module, *realdata.mnist_test(shared_data))
    assert measured < DIGIT_ACCURACIES["mnist_lenet5"][0] - 0.1


def test_dncnn_checkpoint_denoises_three_of_the_set12_images(shared_data: Path):
    """31.30 dB is the mean of these three in the run whose 12 images have the mean 30.40."""
    module = realdata.load_model(shared_data, "dncnn")
    images = realdata.set12(shared_data)
    measured = [denoised_psnr(module, name, images[name]) for name in ("01", "02", "03")]
    assert np.mean(measured) == pytest.approx(31.30, abs=0.1)


@pytest.mark.slow
def test_dncnn_checkpoint_reproduces_its_psnr_on_set12(shared_data: Path):
    module = realdata.load_model(shared_data, "dncnn")
    images = realdata.set12(shared_data)
    measured = [denoised_psnr(module, name, image) for name, image in images.items()]
    assert len(measured) == 12
    assert np.mean(measured) == pytest.approx(30.38, abs=0.1)


def test_psnr_tells_when_one_batch_norm_is_wrong(shared_data: Path):
    module = realdata.load_model(shared_data, "dncnn")
    image = realdata.set12(shared_data)["01"][:, :, :96, :96]
    intact = denoised_psnr(module, "01", image)
    module.dncnn[24].running_mean += module.dncnn[24].running_var.sqrt()
    assert denoised_psnr(module, "01", image) < intact - 0.5


def test_slim320_is_the_function_of_the_published_onnx_file(shared_data: Path):
    module = realdata.load_model(shared_data, "slim320")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = shared_data / "onnx/linzaer_slim-320_without_postprocessing.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).uniform(-1, 1, (1, 3, 240, 320)).astype(np.float32)
    expected = session.run(["scores", "boxes"], {"input": x})

    def distance() -> float:
        with torch.no_grad():
            got = module(torch.from_numpy(x))
        return max(float(np.abs(g.numpy() - e).max()) for g, e in zip(got, expected, strict=True))

    assert distance() < 1e-4
    module.extras[0][0].bias.data += 0.1
    assert distance() > 1e-3


def test_readers_give_what_their_names_say(shared_data: Path):
    x, y = realdata.mnist_train10k(shared_data)
    assert x.shape == (10000, 1, 28, 28)
    assert np.bincount(y).tolist() == [1000] * 10
    x, y = realdata.usps(shared_data, "train", layout="pad")
    assert x.shape == (7291, 1, 28, 28)
    assert not x[:, :, :4].any()
    assert not x[..., 24:].any()
    x, y = realdata.cifar_train_part(shared_data)
    assert x.shape == (2283, 3, 32, 32)
    # CIFAR-10's own mean (.491, .482, .447) seen through the normalisation the checkpoints use
    assert x.mean(axis=(0, 2, 3)) == pytest.approx([0.028, 0.115, 0.181], abs=0.03)
    assert set(y.tolist()) == set(range(10))
    assert len(realdata.set12(shared_data)) == 12
    for images, labels in (realdata.mnistm(shared_data), realdata.cifar_test761(shared_data)):
        assert len(images) == len(labels)
        assert (images.dtype, labels.dtype) == (np.float32, np.int64)
        assert images.flags.c_contiguous
