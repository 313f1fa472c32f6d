"""An onnxruntime that claims CUDA and TensorRT and computes on the CPU, for a process of its own.

Python imports this file when it starts, where its folder is on PYTHONPATH. What is pretended is
what the real providers do: TF32 where the option and the environment allow it, a silent fallback,
noise on stdout, a crash. PRETEND names the misbehaviour.
"""

import os
import signal
import time
from types import SimpleNamespace

import onnx
import onnxruntime
from onnx import helper, numpy_helper

MODE = os.environ.get("PRETEND", "")
CPU = "CPUExecutionProvider"
CLAIMED = ["TensorrtExecutionProvider", "CUDAExecutionProvider", CPU]
MISSING = (
    "[E:onnxruntime] Failed to load library libonnxruntime_providers_cuda.so with error: "
    "libcublasLt.so.99: cannot open shared object file: No such file or directory"
)
real = onnxruntime.InferenceSession


class Session:
    """Of the providers that were asked for, in name."""

    def __init__(self, source, options, providers, enable_fallback=1):
        assert not enable_fallback
        ((self._name, asked),) = providers
        print("EP Error: a line on stdout that is no answer")
        if MODE == "lost library":
            raise RuntimeError(MISSING)
        model = onnx.load(source) if isinstance(source, str) else onnx.load_from_string(source)
        if MODE == "tf32 anyway" or (MODE != "tf32 never" and allows_tf32(self._name, asked)):
            model = with_tf32(model)
        if MODE == "another fold" and options.graph_optimization_level.name == "ORT_ENABLE_ALL":
            model = with_tf32(spoiled(model))
        self._session = real(model.SerializeToString(), options, providers=[CPU])
        self._claimed = [CPU] if MODE == "fallback" else [self._name, CPU]
        self.get_inputs = self._session.get_inputs
        self.get_outputs = self._session.get_outputs

    def get_providers(self):
        return self._claimed

    def get_provider_graph_assignment_info(self):
        for part in self._session.get_provider_graph_assignment_info():
            for node in part.get_nodes():
                stays = MODE == "conv on cpu" and "Conv" in node.op_type
                where = CPU if stays else self._name
                yield SimpleNamespace(ep_name=where, get_nodes=lambda node=node: [node])

    def run(self, names, feeds):
        print("a line on stdout at every run")
        if MODE == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if MODE == "hang":
            time.sleep(60)
        if MODE == "leaves":
            self._claimed = [CPU]
        return self._session.run(names, feeds)


def allows_tf32(provider, asked):
    """As NVIDIA's libraries decide: the environment's 0 is last."""
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return False
    return provider.startswith("Tensorrt") or asked.get("use_tf32", "1") == "1"


def with_tf32(model):
    """Every operand of a product rounded to 10 bits behind the first, by Veltkamp's splitting."""
    nodes = list(model.graph.node)
    del model.graph.node[:]
    factor = numpy_helper.from_array(onnx.numpy_helper.np.float32(2**13 + 1), "tf32/factor")
    model.graph.initializer.append(factor)
    done = {}
    for node in nodes:
        for index, name in enumerate(node.input[:2] if node.op_type in ("Conv", "Gemm") else ()):
            if name not in done:
                big, low, done[name] = f"{name}/big", f"{name}/low", f"{name}/tf32"
                model.graph.node.extend(
                    [
                        helper.make_node("Mul", [name, "tf32/factor"], [big]),
                        helper.make_node("Sub", [big, name], [low]),
                        helper.make_node("Sub", [big, low], [done[name]]),
                    ]
                )
            node.input[index] = done[name]
        model.graph.node.append(node)
    return model


def spoiled(model):
    """One kernel off by half a percent: less than TF32's ceiling, more than its rounding."""
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
    value = numpy_helper.to_array(tensor) * onnx.numpy_helper.np.float32(1.005)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


onnxruntime.InferenceSession = Session
onnxruntime.get_available_providers = lambda: list(CLAIMED)
