"""The zoo: published architectures with random weights and the statistics that training leaves.

Needs torchvision and timm, which live in an environment of their own (`scripts/env-zoo`). A network
is exported once, batch norms in place, into a folder of ONNX files; measurements read those.

    .venv-zoo/bin/python scripts/zoo.py FOLDER [NAME ...]      export into FOLDER
"""

from __future__ import annotations

import copy
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

SECONDS_TO_EXPORT = 1800  # of a busy machine

# Name -> height and width (None: what the network asks for, 224). Small where the network allows:
# a fold depends on the graph and on the channels, not on the image.
TORCHVISION: Mapping[str, int | tuple[int, ...]] = {
    "densenet121": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "vgg11_bn": 224,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x1_0": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "maxvit_t": 224,
    "segmentation.fcn_resnet50": 64,
    "segmentation.deeplabv3_resnet50": 64,
    "segmentation.deeplabv3_mobilenet_v3_large": 64,
    "segmentation.lraspp_mobilenet_v3_large": 64,
    "video.r3d_18": (8, 56, 56),
    "video.mc3_18": (8, 56, 56),
    "video.r2plus1d_18": (8, 56, 56),
    "video.s3d": (16, 224, 224),
}
TIMM: Mapping[str, int] = {
    "levit_128s": 224,
    "repvgg_a0": 64,
    "mobileone_s0": 64,
    "fastvit_t8": 128,
    "resnetv2_50": 64,
    "xcit_nano_12_p16_224": 224,
    "dpn68": 64,
    "convmixer_768_32": 64,
    "visformer_tiny": 224,
    "coatnet_nano_rw_224": 224,
    "nextvit_small": 64,
    "swiftformer_xs": 64,
    "repghostnet_050": 64,
    "repvit_m0_9": 64,
    "ghostnet_100": 64,
    "hardcorenas_a": 64,
    "tf_efficientnet_b0": 64,
    "mixnet_s": 64,
    "lcnet_050": 64,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "mobilevit_xxs": 64,
    "mobilevitv2_050": 64,
    "dla34": 64,
    "hrnet_w18_small": 64,
    "selecsls42b": 64,
    "ese_vovnet19b_dw": 64,
    "cspresnet50": 64,
    "darknet53": 64,
    "res2net50_26w_4s": 64,
    "skresnet18": 64,
    "resnest14d": 64,
    "regnety_002": 64,
    "rexnet_100": 64,
    "inception_resnet_v2": 96,
    "inception_v4": 96,
    "xception41": 64,
    "xception41p": 64,
    "gernet_s": 64,
    "tresnet_m": 64,
    "edgenext_xx_small": 64,
    "volo_d1_224": 224,
    "tiny_vit_5m_224": 224,
    "efficientvit_b0": 64,
    "efficientvit_m0": 224,
    "inception_next_atto": 64,
    "starnet_s1": 64,
    "shvit_s1": 224,
    "fasternet_t0": 64,
    "hgnet_tiny": 64,
    "hgnetv2_b0": 64,
    "botnet26t_256": 256,
    "lambda_resnet26t": 64,
    "halonet26t": 256,
    "bat_resnext26ts": 256,
    "regnetz_005": 64,
    "regnetx_002": 64,
    "regnetv_040": 64,
    "mobilenetv4_conv_small": 64,
    "mobilenetv4_hybrid_medium": 64,
    "ghostnetv2_100": 64,
    "spnasnet_100": 64,
    "fbnetc_100": 64,
    "fbnetv3_b": 64,
    "semnasnet_075": 64,
    "tinynet_e": 64,
    "mnasnet_small": 64,
    "tf_efficientnetv2_b0": 64,
    "tf_efficientnet_lite0": 64,
    "tf_mixnet_s": 64,
    "tf_mobilenetv3_small_minimal_100": 64,
    "efficientnet_es": 64,
    "mobilenet_edgetpu_v2_xs": 64,
    "dla46_c": 64,
    "dla60_res2net": 64,
    "vovnet39a": 64,
    "cspdarknet53": 64,
    "cspresnext50": 64,
    "cs3darknet_s": 64,
    "res2next50": 64,
    "skresnext50_32x4d": 64,
    "seresnet18": 64,
    "legacy_seresnet18": 64,
    "ecaresnet26t": 64,
    "gcresnet33ts": 64,
    "resnet18d": 64,
    "resnet26t": 64,
    "resnetaa50": 64,
    "resnetblur18": 64,
    "resnetrs50": 64,
    "seresnext26d_32x4d": 64,
    "legacy_xception": 64,
    "densenetblur121d": 64,
    "dpn68b": 64,
    "resnetv2_50d": 64,
    "repvgg_b0": 64,
    "mobileone_s1": 64,
    "mobileone_s4": 64,
    "fastvit_sa12": 128,
    "levit_conv_128s": 224,
    "levit_192": 224,
    "xcit_tiny_12_p8_224": 224,
    "visformer_small": 224,
    "coatnet_rmlp_nano_rw_224": 224,
    "nasnetalarge": 96,
    "pnasnet5large": 96,
}
# defined in models/, name -> (file, factory, shape)
OWN: Mapping[str, tuple[str, str, tuple[int, ...]]] = {
    "preact_resnet18": ("models.preact_resnet", "preact_resnet18", (3, 32, 32)),
}


def names() -> list[str]:
    """All networks, each as LIBRARY:NAME."""
    return [
        *(f"timm:{name}" for name in TIMM),
        *(f"torchvision:{name}" for name in TORCHVISION),
        *(f"models:{name}" for name in OWN),
    ]


def build(name: str, size: int | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """The network of this name with realistic statistics, and the shape of one input.

    size: another height and width than the zoo's.
    """
    library, _, short = name.partition(":")
    torch.manual_seed(0)
    if library == "models":
        module, factory, shape = OWN[short]
        network = getattr(importlib.import_module(module), factory)()
    elif library == "timm":
        declare_vision_operators()
        network = importlib.import_module("timm").create_model(short)
        shape = (3, TIMM[short], TIMM[short])
    else:
        network = _from_torchvision(short)
        extents = TORCHVISION[short]
        shape = (3, *(extents if isinstance(extents, tuple) else (extents, extents)))
    if size is not None:
        shape = (*shape[:-2], size, size)
    return trained_like(network, shape), shape


def _from_torchvision(short: str) -> nn.Module:
    declare_vision_operators()
    folder, _, factory = ("torchvision.models." + short).rpartition(".")
    options: dict[str, Any] = {"weights": None}
    if "segmentation" in folder:
        options["weights_backbone"] = None
    if short in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    network: nn.Module = getattr(importlib.import_module(folder), factory)(**options)
    return _OneOutput(network) if "segmentation" in folder else network


class _OneOutput(nn.Module):
    """A segmentation network without its dictionary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The scores per pixel."""
        result: torch.Tensor = self.network(x)["out"]
        return result


_DECLARED: list[torch.library.Library] = []


def declare_vision_operators() -> None:
    """Tell torch of the operators that `import torchvision` wants to describe.

    Its compiled part is made for one build of torch and does not load beside another; the networks
    here need none of it.
    """
    if not _DECLARED:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)


def trained_like(network: nn.Module, shape: Sequence[int], *, seed: int = 0) -> nn.Module:
    """The network in eval mode with gammas, betas and statistics as training leaves them.

    Gammas around 0.4; in 100 channels 3 are negative and 4 near zero, and in every fourth batch
    norm 2 are zero. The statistics are those that the activations have on pictures of noise (no
    channel is dead), then moved: means by a third of a spread, variances by a factor of 0.5 to 2,
    as images of another domain would.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for position, norm in enumerate(norms):
        if norm.affine:
            n = norm.num_features
            lot = torch.rand(n, generator=generator)
            gamma = (torch.randn(n, generator=generator) * 0.12 + 0.4).abs() + 0.01
            gamma[lot < 0.07] *= -1
            gamma[lot < 0.04] *= -0.05
            if position % 4 == 3:
                gamma[lot < 0.02] = 0.0
            norm.weight.data.copy_(gamma)
            norm.bias.data.copy_(torch.randn(n, generator=generator) * 0.15)
    network.eval()
    for norm in norms:
        norm.momentum = None  # the plain average over the batches seen
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        network(_pictures(8, shape, generator))
        for norm in norms:
            norm.eval()
            n = norm.num_features
            mean, var = norm.running_mean, norm.running_var
            if mean is not None and var is not None:
                var.clamp_(min=0.01 * float(var.mean()))
                mean.add_(torch.randn(n, generator=generator) / 3 * var.sqrt())
                var.mul_(2 ** (2 * torch.rand(n, generator=generator) - 1))
    return network


def _pictures(count: int, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Noise with structure: coarse and fine, each picture with a brightness and a contrast."""
    fine = torch.randn(count, *shape, generator=generator)
    coarse = torch.randn(count, shape[0], *(4 for _ in shape[1:]), generator=generator)
    contrast, brightness = (
        torch.randn(count, shape[0], *(1 for _ in shape[1:]), generator=generator) for _ in "ab"
    )
    # what has no extent (a generator's code) has no coarse and fine
    smooth = nn.functional.interpolate(coarse, size=tuple(shape[1:])) if shape[1:] else coarse
    return (0.5 * fine + smooth) * (0.5 + contrast.abs()) + brightness


def left_by_torch_fx(network: nn.Module, shape: Sequence[int]) -> dict[str, Any]:
    """What torch.fx.experimental.optimization.fuse leaves, and how far off its result is."""
    from torch.fx.experimental.optimization import fuse

    try:
        exact = copy.deepcopy(network).double()
        fused = fuse(exact)
        modules = dict(fused.named_modules())
        left = sum(
            node.op == "call_module"
            and isinstance(modules[str(node.target)], nn.modules.batchnorm._BatchNorm)
            for node in fused.graph.nodes
        )
        x = torch.randn(1, *shape, dtype=torch.float64)
        with torch.no_grad():
            a, b = exact(x), fused(x)
        return {"left": left, "difference": float((a - b).norm() / a.norm())}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}


def export(name: str, folder: Path) -> None:
    """Write NAME.onnx and NAME.json (facts of the torch module) into the folder."""
    import bnfold

    begun = time.perf_counter()
    network, shape = build(name)
    with torch.no_grad():
        y = network(torch.randn(1, *shape))
    facts = {
        "name": name,
        "shape": [1, *shape],
        "parameters": sum(p.numel() for p in network.parameters()),
        "norms": sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()),
        "spread of the output": float(y.std()),
        "torch.fx": left_by_torch_fx(network, shape),
    }
    bnfold.export(network, torch.zeros(1, *shape), file_of(name, folder))
    facts["seconds"] = time.perf_counter() - begun
    file_of(name, folder).with_suffix(".json").write_text(json.dumps(facts))


def file_of(name: str, folder: Path) -> Path:
    """Where the network's ONNX file is."""
    return folder / (name.replace(":", "-") + ".onnx")


def main() -> None:
    """Export, each network in a process of its own; what fails leaves NAME.json with the error."""
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    declare_vision_operators()
    # forked once all is imported: the imports take as long as an export
    for library in ("timm", "torchvision", "onnxscript", "torch.onnx._internal.exporter._core"):
        importlib.import_module(library)
    for name in wanted or names():
        facts = file_of(name, folder).with_suffix(".json")
        if facts.exists() and not wanted:
            continue
        error = _in_a_fork(name, folder)
        if error:
            facts.write_text(json.dumps({"name": name, "error": error}))
        print(name, error or "exported", flush=True)


def _in_a_fork(name: str, folder: Path) -> str:
    """Export in a process of its own, with a time limit: what went wrong, or ""."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def work() -> None:
        try:
            export(name, folder)
            sender.send("")
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    child = fork.Process(target=work)
    child.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS_TO_EXPORT):
            child.kill()
            return f"not exported in {SECONDS_TO_EXPORT} s"
        return str(receiver.recv())
    except EOFError:
        return "the exporting process died"
    finally:
        child.join()


if __name__ == "__main__":
    main()
