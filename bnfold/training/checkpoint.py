"""The trained network in a file that describes itself.

It carries the network's graph beside its weights, as data: whoever reads it needs neither the code
of the network nor a pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bnfold.folding.module import plain_parts
from bnfold.graph import export_module, graph_inputs
from bnfold.parts import copied
from bnfold.saving import checkpoint_bytes, write_bytes


def save_checkpoint(
    path: Path | str,
    module: nn.Module,
    *,
    model_spec: str | None,
    example_input: Tensor,
    metrics: Mapping[str, Any],
) -> None:
    """Write the module's weights with its graph and figures, whole or not at all.

    The file is a dict of `state_dict` and `bnfold` (schema, model_spec, the input's name and shape,
    the graph as ONNX bytes without the weights in a uint8 tensor, the metrics), and loads with
    `torch.load(path, weights_only=True)`, which is proved before it takes its name.
    example_input: one batch, as forward takes it. metrics: numbers and strings, nested as JSON.
    Raises InputError where torch cannot export the module or the file could not be loaded safely,
    UsageError for metrics that are not JSON and for a path that cannot be written.
    """
    portable = copied(module).cpu().eval()
    example = example_input.detach().cpu()
    graph = export_module(portable, (example,))
    shapes = {name: list(example.shape) for name in graph_inputs(graph)}
    data = checkpoint_bytes(
        portable.state_dict(),
        graph,
        kind="train",
        model=model_spec,
        shapes=shapes,
        metrics=metrics,
        plain=plain_parts(portable, graph),
    )
    write_bytes(path, data)
