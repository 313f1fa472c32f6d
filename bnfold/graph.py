"""The one graph: how a model becomes an `onnx_ir.Model`, and how it gets back to a file.

An ONNX file is read lazily (external data stays on disk). A torch module enters through torch's own
exporter, whose initializers carry the names of the parameters (`layer1.0.bn1.running_mean`); that
is what lets a fold be written back into the module. This is the only place that exports, runs
clean-up passes or writes a file.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import os
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from bnfold.errors import InputError, UnsafeInputError, UsageError, one_line
from bnfold.parts import parts

if TYPE_CHECKING:
    import torch
    from torch import nn

DEFAULT_OPSET = 20
# protobuf cannot carry more than 2 GiB; below that, one file is what people want to ship
ONE_FILE_LIMIT = 2**31 - 2**20


# --- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Write a file so that it is there whole or not at all.

    Yields a path of the same name in a fresh folder beside the target. When the block ends well,
    everything in that folder is flushed to disk and renamed into place, `path` itself last; when it
    raises, nothing is left and an older file stays as it was. Raises UsageError where the folder
    does not exist or cannot be written.
    """
    path = Path(path)
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UsageError(
            f"Cannot write {path}: {error.strerror or error} (folder {path.parent})."
        ) from None
    try:
        yield staging / path.name
        produced = sorted(staging.iterdir(), key=lambda file: file.name == path.name)
        for file in produced:
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        for file in produced:
            file.replace(path.parent / file.name)
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_onnx(path: Path | str) -> ir.Model:
    """The model in an ONNX file; weights in external files are not read yet.

    Raises InputError for a file that is not a valid model, and UnsafeInputError where external data
    would be read from outside the model's folder.
    """
    path = Path(path)
    try:
        onnx.checker.check_model(str(path))
        model = ir.load(path)
    except Exception as error:  # protobuf, checker and onnx_ir each raise types of their own
        raise _unreadable(path, error) from error
    if not len(model.graph) and not model.graph.outputs:
        raise InputError(f"{path} holds an empty ONNX model: no operators and no outputs.")
    _check_external_data(model, path)
    return prepare(model)


def parse_onnx(data: bytes, name: str = "the model") -> ir.Model:
    """The model in the bytes of an ONNX file. Raises InputError."""
    try:
        proto = onnx.load_model_from_string(data)
        onnx.checker.check_model(proto)
        return prepare(ir.from_proto(proto))
    except Exception as error:
        raise _unreadable(Path(name), error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    """The reader's own error as one sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "external" in text.lower() and any(
        word in text for word in ("..", "symlink", "hard link", "hardlink", "absolute", "escape")
    ):
        return UnsafeInputError(f"{path} refers to external data outside its folder: {text[:300]}")
    return InputError(f"{path} is not a model that can be read: {text[:300]}")


def _check_external_data(model: ir.Model, path: Path) -> None:
    """Refuse external data that is missing or shorter than the model says."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            file = Path(tensor.path)
            if not file.is_file():
                raise InputError(
                    f"{path} keeps the weight '{value.name}' in {tensor.location}, and that file"
                    " is not beside it."
                )
            end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
            if (
                (tensor.offset or 0) < 0
                or end > file.stat().st_size
                or (tensor.length is not None and tensor.length < tensor.nbytes)
            ):
                raise InputError(
                    f"{path}: the weight '{value.name}' needs bytes up to {end} of"
                    f" {tensor.location}, which has {file.stat().st_size}; the file is truncated."
                )


def write_onnx(model: ir.Model, path: Path | str) -> None:
    """Write the model, whole or not at all: one file, beyond 2 GB with `.data` beside it."""
    with replacing(path) as staged:
        save_onnx(model, staged)


def save_onnx(model: ir.Model, path: Path) -> None:
    """Write the model in place: one file, beyond 2 GB with `.data` beside it."""
    size = sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    if size > ONE_FILE_LIMIT:
        with as_declared(model):
            ir.save(model, path, external_data=f"{path.name}.data")
    else:
        path.write_bytes(to_bytes(model))


def to_bytes(model: ir.Model) -> bytes:
    """The model as the bytes of a single ONNX file."""
    return bytes(to_proto(model).SerializeToString())


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a protobuf, every weight inside."""
    external = {
        value: value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    for value, tensor in external.items():
        value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    try:
        with as_declared(model):
            return ir.to_proto(model)
    finally:
        for value, tensor in external.items():
            value.const_value = tensor


def prepare(model: ir.Model) -> ir.Model:
    """The same model with what planning needs: inferred shapes, IR version and opset.

    In place, but where a local function stands in the way of a batch norm: then a copy in which it
    is inlined. What is inferred stays in memory: a file gets the shapes that were declared.
    """
    model = _inline_near_batch_norms(model)
    for graph in model.graphs():
        graph.meta["ir_version"] = model.ir_version
        graph.meta["opset"] = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    for value in _values(model):
        value.meta.setdefault(_DECLARED, value.shape)
        if value.shape is not None and any(isinstance(d, int) and d < 0 for d in value.shape):
            # some exporters write -1 for an extent that is not known
            known = [None if isinstance(d, int) and d < 0 else d for d in value.shape]
            value.shape = ir.Shape(known)
    told = [_tell_channels(node) for graph in model.graphs() for node in graph]
    # integers without a shape are sizes that an exporter computes: no gauge enters them
    unknown = [v for v in _values(model) if v.shape is None and v.dtype not in _INTEGERS]
    if any(told) or unknown:
        orders = [(graph, list(graph.initializers)) for graph in model.graphs()]
        # a shape that cannot be inferred is only a value that no gauge may enter
        with contextlib.suppress(Exception):
            passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        for graph, names in orders:  # the pass puts large initializers last
            for name in names:
                graph.initializers[name] = graph.initializers.pop(name)
    return model


def _inline_near_batch_norms(model: ir.Model) -> ir.Model:
    """The model with the bodies of those local functions in place that hold or touch a batch norm.

    Where a function cannot be inlined (another opset, a graph as an attribute), all stay.
    """
    near = _functions_near_batch_norms(model)
    if near:
        inlined = model.clone()
        with contextlib.suppress(Exception):  # the pass raises errors of several kinds
            passes.InlinePass(criteria=lambda function: function.identifier() in near)(inlined)
            return inlined
    return model


def _functions_near_batch_norms(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Functions with a batch norm inside, or beside one, or beside a call of such a function."""
    near: set[ir.OperatorIdentifier] = set()
    if not model.functions:
        return near
    graphs: list[tuple[ir.OperatorIdentifier | None, ir.Graph]]
    graphs = [(None, graph) for graph in model.graphs()]
    graphs += [(id_, g) for id_, f in model.functions.items() for g in (f.graph, *f.subgraphs())]
    while True:
        before = len(near)
        for owner, graph in graphs:
            hot = [n for n in graph if n.op_identifier() in near or is_batch_norm(n)]
            if hot and owner is not None:
                near.add(owner)
            beside = {m.op_identifier() for node in hot for m in (node, *_neighbours(node))}
            near |= beside & set(model.functions)
        if len(near) == before:
            return near


def names_in(model: ir.Model) -> set[str | None]:
    """The names of all values, in every graph of the model."""
    values = (v for graph in model.graphs() for v in (*graph.initializers.values(), *graph.inputs))
    outputs = (v for graph in model.graphs() for node in graph for v in node.outputs)
    return {value.name for value in (*values, *outputs)}


def fresh_name(name: str, taken: set[str | None]) -> str:
    """The name, or with a number where it is taken; from now on it is."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def is_batch_norm(node: ir.Node) -> bool:
    """True for ONNX's own BatchNormalization."""
    return node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx")


def _neighbours(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes that produce what a node reads, and those that read what it produces."""
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None:
            yield producer
    for output in node.outputs:
        yield from (user for user, _ in output.uses())


def _held(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant (whose name onnx_ir's reader would change)."""
    node = value.producer()
    held = node.attributes.get("value") if node is not None and node.op_type == "Constant" else None
    return value.const_value if held is None else held.as_tensor()


def _tell_channels(node: ir.Node) -> bool:
    """A batch norm knows its own number of channels; true where its values did not."""
    gamma = node.inputs[1] if is_batch_norm(node) and len(node.inputs) > 1 else None
    tensor = _held(gamma) if gamma is not None else None
    told = False
    for value in (node.inputs[0], node.outputs[0]) if tensor is not None else ():
        if value is not None and value.shape is not None and len(value.shape) > 1:
            extents = list(value.shape)
            if not isinstance(extents[1], int):
                assert tensor is not None
                extents[1] = int(tensor.shape.numpy()[0])
                value.shape = ir.Shape(extents)
                told = True
    return told


_DECLARED = "bnfold.declared_shape"
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def _values(model: ir.Model) -> list[ir.Value]:
    return [
        value
        for graph in model.graphs()
        for value in (*graph.inputs, *(out for node in graph for out in node.outputs))
    ]


@contextlib.contextmanager
def as_declared(model: ir.Model) -> Iterator[None]:
    """The shapes of the model as its file declares them, for as long as it is written."""
    inferred = {value: value.shape for value in _values(model) if _DECLARED in value.meta}
    for value in inferred:
        value.shape = value.meta[_DECLARED]
    try:
        yield
    finally:
        for value, shape in inferred.items():
            value.shape = shape


def graph_inputs(model: ir.Model) -> dict[str, ir.Value]:
    """The inputs that a caller must give, by name: those without a default value."""
    return {
        str(value.name): value
        for value in model.graph.inputs
        if value.name not in model.graph.initializers
    }


def freeze_inputs(model: ir.Model) -> ir.Model:
    """The same model with every initializer constant: none can be overridden as an input.

    Before IR 4 every initializer must be listed as an input, and none can be overridden.
    """
    if (model.ir_version or 0) < 4:
        return model
    passes.RemoveInitializersFromInputsPass()(model)
    return model


# --- torch ---------------------------------------------------------------------------------------

# A node's metadata: the operator of the exported program that it was made from, by name, and the
# module in whose forward it runs.
OPERATOR, MODULE = "bnfold.operator", "bnfold.module"


@dataclass(frozen=True)
class Exported:
    """A torch network's inference graph, and the exported program that it was converted from.

    `OPERATOR` in the metadata of the model's nodes names the program's node that each came from.
    """

    model: ir.Model
    program: torch.export.ExportedProgram


def export_module(
    module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    opset: int = DEFAULT_OPSET,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
) -> ir.Model:
    """The inference graph of a torch module alone; see `trace_module`."""
    return trace_module(
        module,
        example_inputs,
        opset=opset,
        dynamic_batch=dynamic_batch,
        input_names=input_names,
    ).model


def trace_module(
    module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    opset: int = DEFAULT_OPSET,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
) -> Exported:
    """The inference graph of a torch module, its batch norms still in place.

    example_inputs: a tensor, or a dict or list of tensors, per argument of forward; the first axis
    of each is the batch and is exported as dynamic unless `dynamic_batch` is off or the network
    fixes it. Initializers carry
    the names of the module's parameters and buffers. The module's training flags are as before
    afterwards. Raises InputError if torch cannot export it.
    """
    modes = [(part, part.training) for _, part in parts(module)]
    module.eval()
    try:
        attempts = [dynamic_batch, False] if dynamic_batch else [False]
        for dynamic in attempts:
            try:
                found = _run_exporter(module, tuple(example_inputs), opset, dynamic, input_names)
                break
            except Exception as error:
                failure = error
        else:
            raise InputError(_export_failure(module, failure)) from failure
    finally:
        for part, training in modes:
            part.training = training
    if found.model.opset_imports.get("") != opset:
        raise UsageError(
            f"The exporter could not write opset {opset}: it gave"
            f" {found.model.opset_imports.get('')}. Ask for opset 18 or newer."
        )
    return found


def trace_program(program: torch.export.ExportedProgram, *, opset: int = DEFAULT_OPSET) -> Exported:
    """The inference graph of an exported program (.pt2), its batch norms still in place.

    Initializers carry the names of its state_dict. Raises InputError if torch cannot convert it.
    """
    try:
        return _run_exporter(program, None, opset, False, None)
    except Exception as error:
        raise InputError(_export_failure(program, error)) from error


def _run_exporter(
    module: nn.Module | torch.export.ExportedProgram,
    example_inputs: tuple[Any, ...] | None,
    opset: int,
    dynamic: bool,
    input_names: Sequence[str] | None,
) -> Exported:
    import torch

    shapes: Any = None
    arguments = example_inputs or ()
    if arguments and isinstance(arguments[-1], dict):
        arguments = (*arguments, {})  # torch takes a dictionary at the end for keyword arguments
    if dynamic and example_inputs is not None:
        batch = torch.export.Dim("batch")
        shapes = torch.utils._pytree.tree_map(
            lambda x: {0: batch} if x.dim() else {}, tuple(example_inputs)
        )
    # torch logs a failure, with its traceback, before it raises it
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                # optimize=True already folds part of the batch norms: nothing left to prove
                optimize=False,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=list(input_names) if input_names else None,
                verbose=False,
            )
    finally:
        logging.disable(logging.NOTSET)
    assert program is not None
    assert program.exported_program is not None
    _note_operators(program.model)
    return Exported(_tidy_export(program.model), program.exported_program)


def _note_operators(model: ir.Model) -> None:
    """Remember which node of the program each node was made from, and in which module it runs."""
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        if scopes:
            *modules, node.meta[OPERATOR] = ast.literal_eval(scopes)
            node.meta[MODULE] = modules[-1] if modules else ""


def _export_failure(module: object, error: Exception) -> str:
    """Why torch cannot export, where in the network's code, and what to do."""
    root: BaseException = error
    places = [_place(error)]
    while root.__cause__ is not None:
        root = root.__cause__
        places.append(_place(root))
    where = next((place for place in reversed(places) if place), "")
    subject = f"torch cannot export {type(module).__name__} to ONNX: "
    if "DataDependent" in type(root).__name__ or "data-dependent" in str(root):
        return (
            f"{subject}its forward chooses by the values of a tensor{where}. A graph holds one"
            " way: write the choice with torch.where or torch.cond, or fold the parts before and"
            " behind it on their own."
        )
    overwritten = _overwritten(module)
    if overwritten:
        where += f" {overwritten}"
    text = one_line(root)
    return (
        f"{subject}{type(root).__name__}: {text}.{where}"
        " Check the input shape; what cannot be exported cannot be verified on onnxruntime either."
    )


def _place(error: BaseException) -> str:
    """The last line of the network's own code that an error went through."""
    import torch

    libraries = [Path(torch.__file__).parent, Path(onnx.__file__).parent, Path(__file__).parent]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        standard = "site-packages" not in file.parts and file.is_relative_to(
            Path(os.__file__).parent
        )
        if file.is_file() and not standard and not any(map(file.is_relative_to, libraries)):
            return f" (at {file}:{frame.lineno}: `{(frame.line or '').strip()}`)"
    return ""


# What torch.export reads a module through.
_READ_THROUGH = ("named_parameters", "named_buffers", "named_modules", "state_dict")


def _overwritten(module: object) -> str:
    from torch import nn

    if not isinstance(module, nn.Module):
        return ""
    for name, part in parts(module):
        for method in _READ_THROUGH:
            if getattr(type(part), method) is not getattr(nn.Module, method):
                path = f"'{name}' ({type(part).__name__})" if name else type(part).__name__
                return f"{path} overwrites {method}(), through which torch.export reads it."
    return ""


def _tidy_export(model: ir.Model) -> ir.Model:
    """Clear the exporter's clutter: computed zero biases, source paths, unused constants.

    A constant computed *from a parameter* (a Transpose of a weight) is left as it stands, so that
    the parameter keeps its name.
    """
    from onnxscript import optimizer

    parameters = set(model.graph.initializers)

    def should_fold(node: ir.Node) -> bool | None:
        reads_parameter = any(v is not None and v.name in parameters for v in node.inputs)
        return False if reads_parameter and node.op_type != "Shape" else None

    quiet = logging.getLogger("onnxscript")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        optimizer.fold_constants(model, should_fold=should_fold)
    finally:
        quiet.setLevel(level)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _drop_made_up_biases(model, parameters)
    passes.RemoveUnusedNodesPass()(model)
    # stack traces in the metadata name the exporting machine's folders
    passes.ClearMetadataAndDocStringPass()(model)
    return prepare(model)


def _drop_made_up_biases(model: ir.Model, parameters: set[str]) -> None:
    """Remove the zero bias that the exporter invents for every convolution without one."""
    for node in model.graph:
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3:
            continue
        bias = node.inputs[2]
        if bias is None or bias.const_value is None or bias.name in parameters:
            continue
        if not np.any(bias.const_value.numpy()):
            node.resize_inputs(2)


# --- a checkpoint that carries its graph ---------------------------------------------------------


def detach_weights(model: ir.Model, names: Collection[str]) -> bytes:
    """The graph as ONNX bytes, the initializers of these names left out: data, never code.

    Each of them appears as a graph input of its own name; `attach_weights` puts tensors back.
    """
    bare = model.clone()
    for name in list(bare.graph.initializers):
        if name in names:
            bare.graph.inputs.append(bare.graph.initializers.pop(name))
    for value in bare.graph.inputs:
        value.const_value = None
    return to_bytes(bare)


def attach_weights(graph: bytes, state_dict: Mapping[str, torch.Tensor]) -> ir.Model:
    """The inverse of `detach_weights`. Raises InputError where graph and tensors disagree."""
    model = parse_onnx(graph, "the checkpoint's own graph")
    for value in list(model.graph.inputs):
        tensor = state_dict.get(value.name or "")
        if tensor is None:
            continue
        array = tensor.detach().cpu().numpy()
        if value.shape is not None and tuple(value.shape) != array.shape:
            raise InputError(
                f"The checkpoint's weight '{value.name}' has shape {array.shape}; its graph says"
                f" {tuple(value.shape)}."
            )
        model.graph.inputs.remove(value)
        value.const_value = ir.Tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return model
