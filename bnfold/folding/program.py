"""A fold written into an exported program: a graph module, for what a class cannot hold.

torch's exporter goes through a program (an aten graph) on its way to ONNX, and every node of the
ONNX graph knows which operator of the program it was made from. So the plan of the one is written
into the other: batch norms are bypassed, and constants change under the names of the parameters
that they are. Unlike a module, a program can give each reader of a shared weight a tensor of its
own, take out one call of a batch norm and leave another, and a bias needs no class to hold it.
"""

from __future__ import annotations

import copy
import io
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from bnfold.errors import InputError
from bnfold.folding.affine import Array
from bnfold.folding.apply import New, changes, constant_of, rounded
from bnfold.folding.constants import constant, readers
from bnfold.folding.module import PROPAGATED, tensor_of
from bnfold.folding.plan import FoldPlan
from bnfold.folding.rules import rewritable_slots
from bnfold.folding.rules.node import layer_name, name_of
from bnfold.folding.rules.relations import Form, Padding
from bnfold.folding.scope import Scope
from bnfold.graph import OPERATOR, Exported, is_batch_norm

_aten: Any = torch.ops.aten
# Where an operator takes its bias, and those that need an addition behind them instead.
_BIAS_AT: dict[Any, int] = dict.fromkeys(
    (
        *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
        *(_aten.conv_transpose1d.default, _aten.conv_transpose2d.input),
        *(_aten.conv_transpose3d.input, _aten.convolution.default, _aten.linear.default),
    ),
    2,
)
_PRODUCTS = (_aten.mm.default, _aten.matmul.default, _aten.bmm.default)
_CONVS = (
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    _aten.convolution.default,
)
_AVERAGES = (*(_aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default),)
# The operators that may take another form, by the ONNX operator that they are.
_FORMED = {
    "Relu": (_aten.relu.default,),
    "Clip": (_aten.hardtanh.default, _aten.clamp.default, _aten.relu6.default),
    "Conv": _CONVS,
    "AveragePool": _AVERAGES,
    "ConvTranspose": (_aten.conv_transpose2d.input, _aten.convolution.default),
}
_PADDING_AT = dict.fromkeys(_CONVS, 4) | dict.fromkeys(_AVERAGES, 3)
_STEPS = {"Max": _aten.maximum.default, "Min": _aten.minimum.default, "Add": _aten.add.Tensor}
_ARITHMETIC = (_aten.sub.Tensor, _aten.div.Tensor)
_NORMS = (_aten._native_batch_norm_legit_no_training.default, _aten.batch_norm.default)
# Operators that only look at a tensor in another way: a copy of them serves a copy of the tensor.
_VIEWS = (
    *(_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.view.default),
    *(_aten.reshape.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims),
    *(_aten.squeeze.default, _aten.flatten.using_ints, _aten.clone.default, _aten.detach.default),
    *(_aten.alias.default, _aten.contiguous.default),
)


class FoldedGraph(fx.GraphModule):
    """A folded network as a graph module: parameters under their own names, in eval mode for good.

    It runs, copies, moves and pickles as any module. `program` is what torch.export.save writes.
    guarded: inputs of sizes that it was not exported for are refused.
    """

    program: ExportedProgram

    def __init__(self, program: ExportedProgram, *, guarded: bool = True) -> None:
        module = program.module()
        super().__init__(module, copy.deepcopy(module.graph), "FoldedGraph")
        for guard in self.graph.find_nodes(op="call_module", target="_guards_fn"):
            if not guarded:
                self.graph.erase_node(guard)
                self.recompile()
        self.program = program
        super().train(False)

    def train(self, mode: bool = True) -> FoldedGraph:
        """Stay in eval mode: an inference graph has no other. Raises InputError if asked for it."""
        if mode:
            raise InputError(
                "A folded graph has no training mode: its batch norms are gone. Train the network"
                " that it was folded from."
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedGraph:
        return _restored(self.program, copy.deepcopy(self.state_dict(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        torch.export.save(self.program, file)
        return _unpickled, (file.getvalue(), self.state_dict())


def _restored(program: ExportedProgram, state: dict[str, Any]) -> FoldedGraph:
    module = FoldedGraph(program)
    module.load_state_dict(state, assign=True)
    return module


def _unpickled(data: bytes, state: dict[str, Any]) -> FoldedGraph:
    return _restored(torch.export.load(io.BytesIO(data)), state)


# --- what a program can take back ----------------------------------------------------------------


def scope_of_program(exported: Exported) -> Scope:
    """What of an exported program a fold may change."""
    program, model = exported.program, exported.model
    calls = {call.name: call for call in program.graph.nodes}
    layers: dict[str, bool] = {}
    norms: dict[str, bool] = {}
    nodes = [node for g in model.graphs() for node in g]
    made_of = Counter(node.meta.get(OPERATOR, "") for node in nodes)
    forms, maps = set(), set()
    for node in nodes:
        call = calls.get(node.meta.get(OPERATOR, ""))
        if call is not None and made_of[call.name] == 1:
            if _can_take_a_form(call, node):
                forms.add(str(node.name))
            if call.target in _ARITHMETIC and _runs_in(call, PROPAGATED):
                maps.add(str(node.name))
        if slots := rewritable_slots(node):
            layer = layer_name(node, slots[0])
            takes = call is not None and (call.target in _BIAS_AT or call.target in _PRODUCTS)
            layers[layer] = layers.get(layer, True) and takes
        if is_batch_norm(node):
            name = name_of(node)
            norms[name] = norms.get(name, True) and call is not None and call.target in _NORMS
    return Scope(
        parameters=frozenset(
            str(name)
            for name, value in model.graph.initializers.items()
            if _is_held(value, calls, _held_by(program, str(name)))
        ),
        layers=frozenset(name for name, takes in layers.items() if takes),
        norms=frozenset(name for name, goes in norms.items() if goes),
        one_value=False,
        maps=frozenset(maps),
        forms=dict.fromkeys(forms, ""),
    )


def _can_take_a_form(call: fx.Node, node: ir.Node) -> bool:
    """True where the operator is what the node is, not a part of it, so that it can be changed."""
    return call.target in _FORMED.get(node.op_type, ())


def _runs_in(call: fx.Node, kind: str) -> bool:
    """Whether an operator stands in the forward of a module of this class."""
    stack = list(call.meta.get("nn_module_stack", {}).values())
    names = [c if isinstance(c, str) else f"{c.__module__}.{c.__qualname__}" for _, c in stack[-1:]]
    return kind in names


def _is_held(value: ir.Value, calls: Mapping[str, fx.Node], placeholder: str) -> bool:
    """True where every reader of a tensor is an operator of its own, with one place for it."""
    using = [node for node, _ in readers(value) if node.op_type != "Shape"]
    names = [node.meta.get(OPERATOR, "") for node in using]
    return (
        placeholder in calls
        and len(set(names)) == len(names)
        and all(
            name in calls and len(_places(calls[name], calls[placeholder])) == 1 for name in names
        )
    )


def _held_by(program: ExportedProgram, target: str) -> str:
    """The placeholder that stands for a parameter, a buffer or a constant, or nothing."""
    for spec in program.graph_signature.input_specs:
        if spec.target == target and isinstance(spec.arg, TensorArgument):
            return spec.arg.name
    return ""


def _places(call: fx.Node, placeholder: fx.Node) -> list[int]:
    """The arguments of an operator that are a placeholder, or views of it."""
    return [
        index
        for index, argument in enumerate(call.args)
        if isinstance(argument, fx.Node) and _views(argument)[-1] is placeholder
    ]


def _views(argument: fx.Node) -> list[fx.Node]:
    """An operand, and what it is a view of, down to the tensor itself."""
    chain = [argument]
    while chain[-1].target in _VIEWS and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    return chain


def _ends(node: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """Every operator and argument that reads a node, through views too; -1 where it is deeper."""
    for user in node.users:
        if user.target in _VIEWS and user.args[0] is node:
            yield from _ends(user)
        else:
            places = [index for index, argument in enumerate(user.args) if argument is node]
            for index in places or [-1]:
                yield user, index


# --- writing -------------------------------------------------------------------------------------


def fold_program(program: ExportedProgram, plan: FoldPlan) -> ExportedProgram:
    """A new program in which the plan's batch norms are gone; the one that came in stays as it was.

    plan: made within `scope_of_program` of the graph that this very program was converted to.
    Raises InputError if the plan asks for what the program cannot hold.
    """
    writer = _Writer(program)
    found = list(changes(plan))
    for node, news, _ in found:
        for new in news if node.op_type != "Clip" else ():  # in a program no tensors, but numbers
            if new.held is None:
                writer.add_bias(node, new)
            elif not np.array_equal(new.array, new.held.array):
                writer.write(node, new)
    writer.flush()
    for node, _, form in found:
        if form is not None:
            writer.reform(node, form)
    for removed in plan.removed:
        writer.bypass(removed.node)
    for removed in plan.absorbed:
        writer.bypass_map(removed.node, removed.slot)
    return writer.finish()


class _Writer:
    """A copy of a program's graph under change, and the tensors that it will read."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.module = copy.deepcopy(program.graph_module)
        self.graph = self.module.graph
        # a copied node may have another name, so all is known by the names in the original
        copies = zip(program.graph.nodes, self.graph.nodes, strict=True)
        self.calls: dict[str, fx.Node] = {call.name: copied for call, copied in copies}
        self.specs: dict[fx.Node, InputSpec] = {
            self.calls[spec.arg.name]: spec for spec in program.graph_signature.input_specs
        }
        self.state: dict[str, Any] = dict(program.state_dict)
        self.constants: dict[str, Any] = dict(program.constants)
        # placeholder -> (operator, argument, the tensor it asks for)
        self.asked: dict[fx.Node, list[tuple[fx.Node, int, torch.Tensor]]] = {}

    def write(self, node: ir.Node, new: New) -> None:
        """Ask for a new value of what one operator reads."""
        assert new.held is not None
        root = str(new.held.root.name)
        placeholder = self.calls.get(_held_by(self.program, root))
        call = self._call(node)
        places = _places(call, placeholder) if placeholder is not None else []
        if len(places) != 1:
            raise _unfit(root)
        tensor = _tensor(new.held.as_root(new.array), new.held.dtype, root, self._value(root))
        assert placeholder is not None
        self.asked.setdefault(placeholder, []).append((call, places[0], tensor))

    def flush(self) -> None:
        """Give every tensor its new value: in place where all readers agree, else as copies."""
        for placeholder, asked in self.asked.items():
            spec, first = self.specs[placeholder], asked[0][2]
            agreed = {(call, index) for call, index, _ in asked} == set(_ends(placeholder))
            if agreed and all(torch.equal(tensor, first) for _, _, tensor in asked):
                self._set(str(spec.target), first)
                continue
            for call, index, tensor in asked:
                copied = self._new(f"{spec.target}_folded", tensor, beside=placeholder)
                for view in reversed(_views(cast(fx.Node, call.args[index]))[:-1]):
                    with self.graph.inserting_before(call):
                        again = self.graph.node_copy(view, lambda n: n)
                    again.update_arg(0, copied)
                    copied = again
                call.update_arg(index, copied)

    def add_bias(self, node: ir.Node, new: New) -> None:
        """A bias for an operator without one."""
        call = self._call(node)
        weight = constant(node.inputs[rewritable_slots(node)[0]])
        root = str(weight.root.name) if weight else ""
        placeholder = self.calls.get(_held_by(self.program, root))
        if placeholder is None or new.array.ndim != 1:
            raise _unfit(root or call.name)
        stem = root.removesuffix(".weight")
        name = f"{stem}.bias" if stem != root else f"{root}_bias"
        assert weight is not None
        tensor = _tensor(new.array, weight.dtype, name, self._value(root))
        bias = self._new(name, tensor, beside=placeholder)
        at = _BIAS_AT.get(call.target)
        if at is not None:
            rest = call.args[at + 1 :]
            call.args = (*call.args[:at], bias, *rest)
        elif call.target in _PRODUCTS:
            with self.graph.inserting_after(call):
                added = self.graph.call_function(_aten.add.Tensor, (call, bias))
            added.meta = dict(call.meta)
            _hand_over(call, added)
        else:
            raise _unfit(root)

    def bypass(self, node: ir.Node) -> None:
        """Let the readers of a batch norm read what it reads."""
        call = self._call(node)
        if call.target not in _NORMS:
            raise _unfit(name_of(node))
        source = cast(fx.Node, call.args[0])
        outputs = [call]
        if call.target is _NORMS[0]:
            outputs = [user for user in call.users if user.target is operator.getitem]
        for output in outputs:
            replacement = source
            if any(user.op == "output" for user in output.users):
                # an output of its own, lest two outputs, or an input and an output, be one tensor
                with self.graph.inserting_before(output):
                    replacement = self.graph.call_function(_aten.clone.default, (source,))
                replacement.meta = dict(output.meta)
            output.replace_all_uses_with(replacement)
            self.graph.erase_node(output)
        if call not in outputs:
            self.graph.erase_node(call)

    def bypass_map(self, node: ir.Node, slot: int) -> None:
        """Let the readers of an operator with a constant read its other operand."""
        call = self._call(node)
        if call.target not in _ARITHMETIC:
            raise _unfit(str(node.name))
        call.replace_all_uses_with(cast(fx.Node, call.args[slot]))
        self.graph.erase_node(call)

    def reform(self, node: ir.Node, form: Form) -> None:
        """Give an operator its other form: a Pad in front, steps behind it or in its place."""
        call = self._call(node)
        if not _can_take_a_form(call, node):
            raise _unfit(str(node.name))
        dtype = node.outputs[0].dtype
        assert dtype is not None
        if form.padding is not None:
            self._put_pad(call, form.padding, dtype)
        last = call
        if node.op_type == "Clip" and form.constants is not None:
            low, high = (form.constants.get(slot) for slot in (1, 2))
            numbers = [
                None if n is None else float(rounded(n, dtype, "").numpy()) for n in (low, high)
            ]
            call.target, call.args = _aten.clamp.default, (call.args[0], *numbers)
        for step in form.steps:
            bound = constant_of(step, dtype, node.name).numpy()
            with self.graph.inserting_after(last):
                if step.op_type == "Clip":
                    floor = float(bound)
                    behind = self.graph.call_function(_aten.clamp.default, (last, floor))
                else:
                    held = self._constant(f"{call.name}_{step.op_type.lower()}", bound, dtype)
                    behind = self.graph.call_function(_STEPS[step.op_type], (last, held))
            behind.meta = dict(call.meta)
            _hand_over(last, behind)
            last = behind
        if form.constants is None:
            call.replace_all_uses_with(cast(fx.Node, call.args[0]))
            self.graph.erase_node(call)

    def _put_pad(self, call: fx.Node, padding: Padding, dtype: ir.DataType) -> None:
        """A Pad of what a convolution or pooling reads, which does not pad any more."""
        x, pairs = (
            cast(fx.Node, call.args[0]),
            list(zip(padding.before, padding.after, strict=True)),
        )
        counts = [count for pair in reversed(pairs) for count in pair]  # torch: the last axis first
        number = float(rounded(np.asarray(padding.number), dtype, call.name).numpy())
        with self.graph.inserting_before(call):
            padded = self.graph.call_function(_aten.constant_pad_nd.default, (x, counts, number))
        value = x.meta["val"]
        sizes = [n + b + a for n, (b, a) in zip(value.shape[2:], pairs, strict=True)]
        with value.fake_mode:  # by its sizes: to run the Pad would tie the batch to the example's
            padded.meta = {**call.meta, "val": value.new_empty([*value.shape[:2], *sizes])}
        call.args = _with_arguments(call, {0: padded, _PADDING_AT[call.target]: [0] * len(pairs)})

    def _constant(self, name: str, array: np.ndarray[Any, Any], dtype: ir.DataType) -> fx.Node:
        """A placeholder for a constant that the network did not have."""
        beside = next(call for call, spec in self.specs.items() if str(spec.target) in self.state)
        like = self._value(str(self.specs[beside].target))
        held = ir.Tensor(array, dtype=dtype)
        return self._new(name, tensor_of(held, like), beside=beside)

    def finish(self) -> ExportedProgram:
        """The new program, without what nothing reads any more."""
        self.graph.eliminate_dead_code()
        specs = []
        for call in [call for call in self.graph.nodes if call.op == "placeholder"]:
            spec = self.specs[call]
            if spec.kind is not InputKind.USER_INPUT and not call.users:
                self.graph.erase_node(call)
            else:
                specs.append(replace(spec, arg=_named(spec.arg, call)))
        for call in self.graph.nodes:
            call.meta.pop("stack_trace", None)  # it names the folders of this machine
        held = [str(spec.target) for spec in specs]
        self.graph.lint()
        self.module.recompile()
        old = self.program
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(specs, self._output_specs()),
            state_dict={name: _own(self.state[name]) for name in held if name in self.state},
            range_constraints=old.range_constraints,
            module_call_graph=old.module_call_graph,
            example_inputs=old.example_inputs,
            constants={n: _own(self.constants[n]) for n in held if n in self.constants},
            verifiers=old.verifiers,
        )

    def _output_specs(self) -> list[Any]:
        """The outputs as before, under the names of the nodes that give them now."""
        results = cast(tuple[Any, ...], self.graph.output_node().args[0])
        specs = self.program.graph_signature.output_specs
        return [
            replace(spec, arg=_named(spec.arg, result))
            for spec, result in zip(specs, results, strict=True)
        ]

    def _call(self, node: ir.Node) -> fx.Node:
        name = node.meta.get(OPERATOR, "")
        if name not in self.calls:
            raise _unfit(name_of(node) if is_batch_norm(node) else str(node.name))
        return self.calls[name]

    def _value(self, target: str) -> torch.Tensor:
        held = self.state if target in self.state else self.constants
        return cast(torch.Tensor, held[target])

    def _set(self, target: str, tensor: torch.Tensor) -> None:
        holder = self.state if target in self.state else self.constants
        parameter = isinstance(holder[target], torch.nn.Parameter)
        holder[target] = torch.nn.Parameter(tensor) if parameter else tensor

    def _new(self, wanted: str, tensor: torch.Tensor, *, beside: fx.Node) -> fx.Node:
        """A placeholder for a new tensor, of the same kind as one that is there."""
        target, count = wanted, 0
        while target in self.state or target in self.constants:
            count += 1
            target = f"{wanted}_{count}"
        like = self.specs[beside]
        with self.graph.inserting_after(beside):
            fresh: fx.Node = self.graph.placeholder(f"{beside.name[:2]}{target.replace('.', '_')}")
        fresh.meta = dict(beside.meta)
        fresh.meta["val"] = beside.meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
        self.specs[fresh] = InputSpec(
            like.kind, TensorArgument(fresh.name), target, like.persistent
        )
        holder = self.state if str(like.target) in self.state else self.constants
        parameter = like.kind is InputKind.PARAMETER
        holder[target] = torch.nn.Parameter(tensor) if parameter else tensor
        return fresh


def _with_arguments(call: fx.Node, new: Mapping[int, Any]) -> tuple[Any, ...]:
    """The arguments of an operator with some of them new; those not given are its defaults."""
    target: Any = call.target
    defaults = [argument.default_value for argument in target._schema.arguments]
    given = [*call.args, *defaults[len(call.args) :]]
    return tuple(new.get(at, argument) for at, argument in enumerate(given))


def _hand_over(call: fx.Node, behind: fx.Node) -> None:
    """Let all that read an operator read the one behind it."""
    call.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)


def _tensor(array: Array, dtype: ir.DataType, name: str, like: torch.Tensor) -> torch.Tensor:
    """The array rounded once, as the ONNX graph holds it."""
    return tensor_of(rounded(array, dtype, name), like)


def _named(argument: Any, node: Any) -> Any:
    """What a signature says of an input or an output, under the node's name of now."""
    tensor = isinstance(argument, TensorArgument) and isinstance(node, fx.Node)
    return TensorArgument(node.name) if tensor else argument


def _own(value: Any) -> Any:
    """A tensor that shares no memory with the network that came in."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    fresh = value.detach().clone()
    parameter = isinstance(value, torch.nn.Parameter)
    return torch.nn.Parameter(fresh, value.requires_grad) if parameter else fresh


def _unfit(name: str) -> InputError:
    """What a plan within its scope never asks for; a wrong graph is worse than none."""
    return InputError(f"The fold changes '{name}' in a way that the exported program cannot hold.")
