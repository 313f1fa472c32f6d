"""Real checkpoints, folded and proved: every batch norm that can go, no decision changed."""

import numpy as np
import onnxruntime
import pytest
import realdata
import torch
from nets import with_statistics

import bnfold
from bnfold import graph
from models.mobilenet_v2 import mobilenet_v2
from models.preact_resnet import preact_resnet18
from models.resnet import resnet18

CLASSIFIERS = {
    # name: (batch norms, test set, accuracy in percent as published with the data)
    "resnet20": (19, realdata.cifar_test761, 91.72),
    "resnet56": (55, realdata.cifar_test761, 93.43),
    "mnist_cnn": (2, realdata.mnist_test, 98.78),
    "mnist_mlp": (2, realdata.mnist_test, 98.61),
    "mnist_lenet5": (4, realdata.mnist_test, 99.08),
    "mnist_resnet": (6, realdata.mnist_test, 97.87),
}

ONNX_FILES = {
    # file: (batch norms folded, words of the reasons for those that stay)
    "linzaer_slim-320.onnx": (25, {}),
    "linzaer_slim-320_without_postprocessing.onnx": (25, {}),
    "ppocr_v2_cls_opset10.onnx": (35, {}),
    "pfld.onnx": (42, {}),
    "cgan_32_1.onnx": (
        5,
        {
            "dis.conv_blocks.6": ("Relu", "pads with zeros"),
            "dis.conv_blocks.10": ("Relu", "pads with zeros"),
        },
    ),
    "gtsrb_bnn_48_tf2onnx.onnx": (2, {}),
}


def ort_predict(model, x, batch_size=250):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        graph.to_bytes(model), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    parts = [
        session.run(None, {name: x[i : i + batch_size]})[0] for i in range(0, len(x), batch_size)
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_real_classifier_folds_whole_and_decides_as_before(shared_data, name):
    count, test_set, published = CLASSIFIERS[name]
    module = realdata.load_model(shared_data, name)
    x, y = test_set(shared_data)
    result = bnfold.fold(module, torch.from_numpy(x[:2]))
    assert (len(result.folded), len(result.kept)) == (count, 0)
    report = result.verify()
    report.raise_for_failure()
    assert report.r <= 4
    before = realdata.predict(module, x).argmax(axis=1)
    for decisions in (realdata.predict(result.model, x), ort_predict(result.graph, x)):
        assert np.array_equal(decisions.argmax(axis=1), before)
    assert 100 * np.mean(before == y) == pytest.approx(published, abs=0.005)


def test_a_real_denoiser_folds_whole_and_keeps_its_psnr(shared_data):
    module = realdata.load_model(shared_data, "dncnn")
    image = realdata.set12(shared_data)["01"]
    noisy = image + np.random.default_rng(0).normal(0, 25 / 255, image.shape).astype(np.float32)
    result = bnfold.fold(module, torch.from_numpy(noisy[:, :, :32, :32]))
    assert (len(result.folded), len(result.kept)) == (15, 0)
    result.verify().raise_for_failure()

    def psnr(network):
        clean = np.clip(noisy - realdata.predict(network, noisy), 0, 1)
        return -10 * np.log10(np.mean((clean - image).astype(np.float64) ** 2))

    assert psnr(module) > 29
    assert abs(psnr(result.model) - psnr(module)) < 0.001


@pytest.mark.parametrize("file", ONNX_FILES)
def test_a_real_onnx_file_folds_as_far_as_the_algebra_goes(shared_data, file):
    count, reasons = ONNX_FILES[file]
    result = bnfold.fold(shared_data / "onnx" / file, freeze_inputs=True)
    assert len(result.folded) == count
    assert {kept.name for kept in result.kept} == set(reasons)
    for kept in result.kept:
        assert all(word in kept.reason for word in reasons[kept.name])
    report = result.verify()
    report.raise_for_failure()
    assert report.r <= 4


def test_an_overridable_weight_is_not_baked_in(shared_data):
    result = bnfold.fold(shared_data / "onnx/linzaer_slim-320.onnx")
    assert not result.folded
    assert all("--freeze-inputs" in kept.reason for kept in result.kept)


@pytest.mark.parametrize(("factory", "size", "count"), [(resnet18, 64, 20), (mobilenet_v2, 64, 52)])
def test_the_standard_architectures_fold_whole(factory, size, count):
    module = with_statistics(factory())
    result = bnfold.fold(module, torch.zeros(1, 3, size, size))
    assert (len(result.folded), len(result.kept)) == (count, 0)
    report = result.verify()
    report.raise_for_failure()
    assert report.r <= 4


def test_a_preactivation_resnet_of_positive_gammas_telescopes_whole():
    module = with_statistics(preact_resnet18(), positive=True)
    result = bnfold.fold(module, torch.zeros(1, 3, 32, 32))
    assert (len(result.folded), len(result.kept)) == (17, 0)
    report = result.verify()
    report.raise_for_failure()
    assert report.r <= 4
