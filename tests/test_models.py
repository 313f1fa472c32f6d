"""The network definitions hold the published checkpoints and reproduce their published figures."""

import hashlib
import importlib.util
import inspect
import math
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import realdata
import torch
from conftest import ROOT
from digit_tasks import TASKS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfold.errors import UsageError
from bnfold.norm import KINDS, initialise
from models import (
    dcgan,
    densenet,
    digits,
    dncnn,
    lenet,
    mlp,
    mobilenet_v2,
    preact_resnet,
    resnet,
    resnet_cifar,
    slim320,
    tcn,
    unet,
    vgg,
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
    (vgg.vgg11, (3, 32, 32), 10, 8, 9.23),
    (vgg.vgg7, (3, 32, 32), 10, 6, 0.29),
    (densenet.densenet_bc, (3, 32, 32), 10, 39, 0.18),
    (mobilenet_v2.mobilenet_v2_small, (3, 32, 32), 10, 52, 0.70),
    (tcn.tcn, (1, 28, 28), 10, 16, 0.07),
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
    for factory, shape, *_ in NETWORKS[9:]:
        with torch.no_grad():
            assert factory(num_classes=3).eval()(torch.ones(2, *shape)).shape == (2, 3)


def factories():
    """Every public factory of every file of models/."""
    for path in sorted((ROOT / "models").glob("*.py")):
        module = importlib.import_module(f"models.{path.stem}")
        for name, member in inspect.getmembers(module, inspect.isfunction):
            if member.__module__ == module.__name__ and not name.startswith("_"):
                yield pytest.param(member, id=f"{path.stem}.{name}")


@pytest.mark.parametrize("factory", list(factories()))
def test_a_factory_says_how_many_batch_norms_it_builds_and_takes_the_norm(factory):
    said = re.search(r"(\d+) batch norms", factory.__doc__)
    assert said is not None
    module = factory()
    assert sum(isinstance(m, _BatchNorm) for m in module.modules()) == int(said[1])
    if millions := re.search(r"([\d.]+) million", factory.__doc__):
        parameters = sum(p.numel() for p in module.parameters())
        digits_said = len(millions[1].partition(".")[2])
        assert f"{parameters / 1e6:.{digits_said}f}" == millions[1]
    parameters = inspect.signature(factory).parameters
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert parameters["norm"].default == "batch"
    with pytest.raises(UsageError, match="batch"):
        factory(norm="bath")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("batch", "sync")])
@pytest.mark.parametrize("name", TASKS)
def test_each_network_learns_with_each_norm(name, kind):
    """Forward, backward, a gradient other than zero at each parameter."""
    task = TASKS[name]
    x = task.data().train.x[:8]
    torch.manual_seed(0)
    module = task.factory(**task.options, norm=kind).train()
    if "weight" in kind or "mean" in kind:
        initialise(module, x)
    assert not sum(type(m).__name__.startswith("BatchNorm") for m in module.modules())
    outputs = module(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((output**2).mean() for output in outputs).backward()
    for parameter, value in module.named_parameters():
        assert value.grad is not None, parameter
        assert torch.isfinite(value.grad).all(), parameter
        assert value.grad.any(), parameter


@pytest.mark.parametrize(
    ("factory", "channels", "sizes"),
    [
        (vgg.vgg7, 3, ((8, 8), (32, 48))),
        (densenet.densenet_bc, 3, ((8, 8), (33, 20))),
        (mobilenet_v2.mobilenet_v2_small, 3, ((8, 8), (40, 56))),
        (resnet.resnet18, 3, ((32, 32), (65, 40))),
        (resnet_cifar.resnet20, 3, ((8, 8), (31, 40))),
        (preact_resnet.preact_resnet20, 3, ((8, 8), (31, 40))),
        (tcn.tcn, 1, ((8, 8), (5, 7))),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_classifiers_that_pool_take_any_size(factory, channels, sizes):
    module = factory(num_classes=4).eval()
    for height, width in sizes:
        with torch.no_grad():
            assert module(torch.rand(2, channels, height, width)).shape == (2, 4)


def test_dncnn_returns_an_image_of_any_size():
    module = dncnn.dncnn().eval()
    with torch.no_grad():
        assert module(torch.zeros(1, 1, 17, 23)).shape == (1, 1, 17, 23)


def test_unet_says_a_class_for_each_pixel_and_hands_the_fine_levels_across():
    module = unet.unet(num_classes=3, in_channels=2, width=4).eval()
    x = torch.rand(1, 2, 24, 40)
    with torch.no_grad():
        assert module(x).shape == (1, 3, 24, 40)
        for up in module.up:  # nothing comes up from below: what is left came across
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        reference = module(x)
        x[:, :, 20, 20] += 1
        touched = (module(x) != reference).any(dim=1)[0]
    assert touched[20, 20]
    rows, columns = touched.nonzero(as_tuple=True)
    # four 3x3 convolutions see four pixels to each side
    assert (int(rows.min()), int(rows.max())) == (16, 23)
    assert (int(columns.min()), int(columns.max())) == (16, 24)


def test_tcn_never_sees_the_future_and_sees_as_far_back_as_it_says():
    module = tcn.tcn(levels=3, kernel_size=3, width=8).eval()
    sees = 1 + 2 * (3 - 1) * (2**3 - 1)
    x = torch.rand(1, 1, 60, dtype=torch.float64)
    module = module.double()
    with torch.no_grad():
        before = module.blocks(x)
        said = module(x)
        later = x.clone()
        later[:, :, 40:] += 1
        assert torch.equal(module.blocks(later)[:, :, :40], before[:, :, :40])
        assert not torch.equal(module.blocks(later)[:, :, 40], before[:, :, 40])
        last_seen, too_old = x.clone(), x.clone()
        last_seen[:, :, 60 - sees] += 5
        too_old[:, :, 60 - sees - 1] += 5
        assert torch.equal(module(too_old), said)
        assert not torch.equal(module(last_seen), said)


def test_a_dense_layer_puts_its_channels_behind_those_it_read():
    layer = densenet.DenseLayer(6, 4).eval()
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        y = layer(x)
    assert y.shape == (2, 10, 5, 5)
    assert torch.equal(y[:, :6], x)
    with pytest.raises(ValueError, match="6n \\+ 4"):
        densenet.densenet_bc(depth=41)


def test_dcgan_draws_images_of_the_size_that_is_asked_for():
    for size, layers in ((8, 2), (16, 3), (64, 5)):
        module = dcgan.generator(code=7, channels=1, width=4, size=size).eval()
        assert sum(isinstance(m, nn.ConvTranspose2d) for m in module.modules()) == layers
        with torch.no_grad():
            image = module(torch.randn(2, 7))
            assert not torch.equal(image[0], image[1])
        assert image.shape == (2, 1, size, size)
        assert image.abs().max() <= 1
    with pytest.raises(ValueError, match="power of two"):
        dcgan.generator(size=28)


def test_slim320_keeps_the_published_layout_at_another_width():
    module = slim320.slim320(num_classes=5, in_channels=1, width=4).eval()
    with torch.no_grad():
        scores, boxes = module(torch.rand(2, 1, 64, 64))
    assert scores.shape[::2] == (2, 5)
    assert boxes.shape == (2, scores.shape[1], 4)
    assert torch.allclose(scores.sum(2), torch.ones(scores.shape[:2]))


def test_mobilenet_widths_are_multiples_of_eight_near_what_was_asked():
    module = mobilenet_v2.mobilenet_v2(width=0.35)
    blocks = [m for m in module.features if isinstance(m, mobilenet_v2.InvertedResidual)]
    widths = list(dict.fromkeys(block.conv[-1].num_features for block in blocks))
    # 0.35 times 16, 24, 32, 64, 96, 160, 320; 11.2 becomes 16, as 8 were less than nine tenths
    assert widths == [8, 16, 24, 32, 56, 112]
    assert module.classifier[1].in_features == 1280  # the last layer is never made narrower


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
