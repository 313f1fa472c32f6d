"""Applying a plan: every new constant once, from the original one and the gauges around it.

One formula and one rounding for each constant, so there is no order of edits: the batch norms that
the plan removes are bypassed, the operators that hold constants get new ones in their own type, and
what nothing reads any more goes. The model that came in stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.errors import InputError
from bnfold.folding.affine import Array
from bnfold.folding.constants import FLOATS, Constant, constant, readers
from bnfold.folding.merging import Merge
from bnfold.folding.plan import FoldPlan
from bnfold.folding.quantized import requantized
from bnfold.folding.rules import RULES, rewritten
from bnfold.folding.rules.node import label, optional_input
from bnfold.folding.rules.relations import Form, Padding, Step
from bnfold.folding.rules.repairs import repair_of
from bnfold.graph import fresh_name, names_in

# the largest number of each type: a bound where there is none
_LARGEST = {
    ir.DataType.FLOAT: float(np.finfo(np.float32).max),
    ir.DataType.DOUBLE: float(np.finfo(np.float64).max),
    ir.DataType.FLOAT16: float(np.finfo(np.float16).max),
    ir.DataType.BFLOAT16: (2 - 2**-7) * 2.0**127,
}


@dataclass(frozen=True)
class Folded:
    """The folded model, and where the values of the original are in it.

    aliases: original value name -> name of the tensor that carries it now, where they differ.
    biases: weight name -> names of the biases that had to be added beside it.
    written: constant's name -> names of the initializers that hold its new values.
    """

    model: ir.Model
    aliases: Mapping[str, str]
    biases: Mapping[str, tuple[str, ...]]
    written: Mapping[str, tuple[str, ...]]


def apply(plan: FoldPlan) -> Folded:
    """A new model in which the plan's batch norms are gone; the plan's model is not changed.

    Raises InputError where a new constant does not fit its own type (an overflow in float16).
    """
    model = plan.model.clone()
    nodes = correspondence(plan.model, model)
    writer = _Writer(model)
    gone = {removed.node: removed.slot for removed in (*plan.removed, *plan.absorbed)}
    inner = {node for merge in plan.merges for node in merge.inner}
    forms = {merge.host: merge.form(plan.gauge) for merge in plan.merges}
    touched = _touched(plan) - inner
    for node in nodes:
        if node in forms:
            writer.rewrite(nodes[node], _news(node, forms[node].constants or {}))
        if node in touched:
            form = form_of(plan, node)
            if form is not None:
                writer.rewrite(nodes[node], _news(node, form.constants or {}))
                if form.padding is not None:
                    writer.put_in_front(nodes[node], form.padding)
                writer.add_steps(nodes[node], form.steps, in_place=form.constants is None)
            else:
                writer.rewrite(nodes[node], _news(node, rewritten(node, plan.gauge)))
    writer.flush()
    bypassed = [(nodes[node], slot) for node, slot in gone.items() if node not in inner]
    aliases = _bypass_all(bypassed, writer)
    for merge in plan.merges:
        _merge(merge, nodes, writer)
        writer.add_steps(nodes[merge.host], forms[merge.host].steps, in_place=False)
    writer.forget_unread()
    return Folded(model, aliases, writer.biases, writer.written)


def changes(plan: FoldPlan) -> Iterator[tuple[ir.Node, list[New], Form | None]]:
    """The nodes of the plan's own model that change, in its order: new constants, another form.

    That is all of a plan without merges, besides what it takes out.
    """
    touched = _touched(plan)
    for node in (node for graph in plan.model.graphs() for node in graph if node in touched):
        form = form_of(plan, node)
        constants = rewritten(node, plan.gauge) if form is None else form.constants or {}
        if (news := _news(node, constants)) or form is not None:
            yield node, news, form


def form_of(plan: FoldPlan, node: ir.Node) -> Form | None:
    """The other form that a node takes by a plan, if it takes one."""
    repair = repair_of(node, plan.repairs)
    return repair.form(plan.gauge) if repair is not None else None


def correspondence(before: ir.Model, after: ir.Model) -> dict[ir.Node, ir.Node]:
    """The nodes of a model and of its clone, which lists them in the same order."""
    return {
        old: new
        for old_graph, new_graph in zip(before.graphs(), after.graphs(), strict=True)
        for old, new in zip(old_graph, new_graph, strict=True)
    }


def _touched(plan: FoldPlan) -> set[ir.Node]:
    """The nodes that stay and produce or read a value with a gauge."""
    producers = {value.producer() for value in plan.gauges} - {None}
    readers_ = {user for value in plan.gauges for user, _ in value.uses()}
    gone = {removed.node for removed in (*plan.removed, *plan.absorbed)}
    return {node for node in (*producers, *readers_) if node is not None} - gone


@dataclass(frozen=True)
class New:
    """A new constant for one slot; `held` is None where the slot was empty."""

    slot: int
    array: Array
    held: Constant | None


def _news(node: ir.Node, constants: Mapping[int, Array]) -> list[New]:
    """The new constants of one node of the original model."""
    news = []
    for slot, array in constants.items():
        value = node.inputs[slot] if slot < len(node.inputs) else None
        held = constant(value) if value is not None else None
        if held is None and not np.any(array):
            continue  # a bias of zeros need not appear
        news.append(New(slot, array, held))
    return news


@dataclass
class _Write:
    node: ir.Node
    slot: int
    held: Constant
    root: ir.Value
    array: Array


class _Writer:
    """Writes new constants into a model: in place where all readers agree, else as a copy."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.writes: list[_Write] = []
        self.biases: dict[str, tuple[str, ...]] = {}
        self.written: dict[str, tuple[str, ...]] = {}
        self.names = names_in(model)
        self.suspects: dict[ir.Value, None] = {}

    def rewrite(self, node: ir.Node, news: list[New]) -> None:
        for new in news:
            if new.held is None:
                self._add_bias(node, new)
            else:
                held = constant(node.inputs[new.slot])
                assert held is not None
                self.writes.append(_Write(node, new.slot, held, held.root, new.array))

    def flush(self) -> None:
        """Write all constants asked for, grouped by the tensor that holds them."""
        by_root: dict[ir.Value, list[_Write]] = {}
        for write in self.writes:
            by_root.setdefault(write.root, []).append(write)
        for root, writes in by_root.items():
            first = writes[0].held.as_root(writes[0].array) if _same_shape(writes[0]) else None
            agreed = (
                first is not None
                and writes[0].held.in_place
                and len(writes) == len(readers(root))
                and not root.is_graph_output()
                and all(
                    _same_shape(w) and np.array_equal(w.held.as_root(w.array), first)
                    for w in writes[1:]
                )
            )
            if agreed and first is not None:
                set_root(root, rounded(first, writes[0].held.dtype, root.name))
                self.written[str(root.name)] = (str(root.name),)
            else:
                for write in writes:
                    dequantizer = write.held.dequantizer
                    if dequantizer is None:
                        self._copy(write)
                    else:
                        self._requantize(write, dequantizer)

    def _requantize(self, write: _Write, node: ir.Node) -> None:
        """Give a DequantizeLinear, which only this reader reads, new integers and scales."""
        new = requantized(write.held, write.array)
        if new.axis is not None:
            node.attributes["axis"] = ir.AttrInt64("axis", new.axis)
        for slot, array in enumerate((new.integers, new.scale, new.zero_point)):
            old = optional_input(node, slot)
            if old is None or np.array_equal(_elements(old), array):
                continue
            assert old.dtype is not None
            if old.dtype in FLOATS:
                tensor = rounded(array, old.dtype, old.name)
            else:
                tensor = ir.Tensor(np.ascontiguousarray(array), dtype=old.dtype)
            value = self._initializer(node, f"{old.name}_folded", tensor)
            node.replace_input_with(slot, value)
            self.suspects[old] = None
            self.written[str(old.name)] = (str(value.name),)

    def _copy(self, write: _Write) -> None:
        """Give this reader a tensor of its own, already in the layout that it reads."""
        tensor = rounded(write.array, write.held.dtype, write.root.name)
        old = write.node.inputs[write.slot]
        assert old is not None
        assert old.dtype is not None
        if old.dtype != tensor.dtype:
            tensor = ir.Tensor(tensor.numpy().astype(old.dtype.numpy()), dtype=old.dtype)
        value = self._initializer(write.node, f"{write.root.name}_folded", tensor)
        write.node.replace_input_with(write.slot, value)
        self.suspects[old] = None
        known = self.written.get(str(write.root.name), ())
        self.written[str(write.root.name)] = (*known, str(value.name))

    def _initializer(self, node: ir.Node, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        name = fresh_name(name, self.names)
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.numpy().shape),
            type=ir.TensorType(tensor.dtype),
            const_value=ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name),
        )
        # IR 3 lists every initializer among the inputs, which a body cannot have more of
        listed = (self.model.ir_version or 0) < 4
        graph = self.model.graph if listed else node.graph
        assert isinstance(graph, ir.Graph)
        graph.register_initializer(value)
        if listed:
            graph.inputs.append(value)
        return value

    def _add_bias(self, node: ir.Node, new: New) -> None:
        """A bias where there was none: an input of Conv and Gemm, an Add behind a MatMul."""
        weight_slot = RULES[node.op_type].constants(node)[0]
        weight = constant(optional_input(node, weight_slot))
        if weight is None:  # the operator has no other constant, as a Pad of zeros
            self._add_constant(node, new)
            return
        stem = (weight.root.name or label(node)).removesuffix(".weight")
        name = f"{stem}.bias" if stem != weight.root.name else f"{stem}_bias"
        dtype = node.inputs[weight_slot].dtype or weight.dtype  # type: ignore[union-attr]
        value = self._initializer(node, name, rounded(new.array, dtype, name))
        if weight.root.name:
            known = self.biases.get(weight.root.name, ())
            self.biases[weight.root.name] = (*known, value.name or name)
        if node.op_type == "MatMul":
            self._put_behind(node.outputs[0], "Add", value)
            return
        node.resize_inputs(max(len(node.inputs), new.slot + 1))
        node.replace_input_with(new.slot, value)

    def _add_constant(self, node: ir.Node, new: New) -> None:
        """An optional operand where there was none."""
        output = node.outputs[0]
        assert output.dtype is not None
        name = f"{node.name or output.name}_constant"
        value = self._initializer(node, name, rounded(new.array, output.dtype, name))
        node.resize_inputs(max(len(node.inputs), new.slot + 1))
        node.replace_input_with(new.slot, value)

    def add_steps(self, node: ir.Node, steps: Sequence[Step], *, in_place: bool) -> None:
        """Put operators with a constant behind a node, or in its place."""
        value = node.outputs[0]
        stem = node.name or value.name
        for step in steps:
            assert value.dtype is not None
            name = f"{stem}_{step.op_type.lower()}"
            held = self._initializer(node, name, constant_of(step, value.dtype, name))
            value = self._put_behind(value, step.op_type, held)
        if in_place:
            x, inner = node.inputs[0], node.outputs[0]
            assert x is not None
            assert isinstance(node.graph, ir.Graph)
            self.suspects.update(dict.fromkeys(v for v in node.inputs[1:] if v is not None))
            inner.replace_all_uses_with(x)
            node.graph.remove(node, safe=True)

    def put_in_front(self, node: ir.Node, padding: Padding) -> None:
        """A Pad of what a node reads, which does not pad any more."""
        x, graph = node.inputs[0], node.graph
        assert x is not None
        assert x.dtype is not None
        assert isinstance(graph, ir.Graph)
        name = f"{node.name or node.outputs[0].name}_pad"
        counts = np.array([0, 0, *padding.before, 0, 0, *padding.after], np.int64)
        pads = self._initializer(node, f"{name}_pads", ir.Tensor(counts))
        number = rounded(np.asarray(padding.number), x.dtype, name)
        held = self._initializer(node, f"{name}_constant", number)
        value = ir.Value(name=fresh_name(name, self.names), type=x.type)
        made = ir.node("Pad", inputs=[x, pads, held], name=name, outputs=[value])
        graph.insert_before(node, made)
        node.replace_input_with(0, value)
        node.attributes.pop("auto_pad", None)
        node.attributes["pads"] = ir.AttrInt64s("pads", [0] * 2 * len(padding.before))

    def _put_behind(self, value: ir.Value, op_type: str, held: ir.Value) -> ir.Value:
        """An operator behind a value, whose name and readers its result takes over."""
        node = value.producer()
        assert node is not None
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        name = f"{node.name or value.name}_{op_type.lower()}"
        result = ir.Value(name=value.name, shape=value.shape, type=value.type)
        behind = ir.node(op_type, inputs=[value, held], name=name, outputs=[result])
        graph.insert_after(node, behind)
        result.meta.update(value.meta)
        ir.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
        behind.replace_input_with(0, value)
        value.name = fresh_name(f"{value.name}_before_{op_type.lower()}", self.names)
        return result

    def forget_unread(self) -> None:
        """Drop the suspects that nothing reads any more, and what only they read."""
        queue = list(self.suspects)
        while queue:
            value = queue.pop()
            if value.uses() or value.is_graph_output():
                continue
            node = value.producer()
            if node is not None:
                read = any(out.uses() or out.is_graph_output() for out in node.outputs)
                if read or node.graph is None:
                    continue
                queue.extend(v for v in node.inputs if v is not None)
                node.graph.remove(node, safe=True)
            elif value.is_initializer() and isinstance(value.graph, ir.Graph):
                graph = value.graph
                if value.is_graph_input():
                    if (self.model.ir_version or 0) >= 4:
                        continue
                    graph.inputs.remove(value)
                graph.initializers.pop(value.name or "")


def _elements(value: ir.Value) -> Any:
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _same_shape(write: _Write) -> bool:
    return write.array.shape == write.held.shape


def constant_of(step: Step, dtype: ir.DataType, name: str | None) -> ir.Tensor[Any]:
    """The constant of a step in its own type, of which the largest number stands for infinity."""
    bound = np.clip(step.constant, -_LARGEST[dtype], _LARGEST[dtype])
    return rounded(bound, dtype, name)


def rounded(array: Array, dtype: ir.DataType, name: str | None) -> ir.Tensor[Any]:
    """The array rounded once to its own type. Raises InputError if it overflows there."""
    with np.errstate(over="ignore"):
        stored = array.astype(dtype.numpy(), order="C")
    if np.all(np.isfinite(stored)):
        return ir.Tensor(stored, dtype=dtype, name=name)
    if not np.all(np.isfinite(array)):
        raise InputError(f"The weight '{name}' or what is folded into it holds NaN or infinity.")
    raise InputError(
        f"Folding makes the weight '{name}' too large for {dtype.name}: its largest magnitude"
        f" would be {np.max(np.abs(array)):.3g}. Fold the model in float32."
    )


def set_root(root: ir.Value, tensor: ir.Tensor[Any]) -> None:
    """Give a constant new elements where it stands: an initializer or a Constant node."""
    node = root.producer()
    if node is None:
        root.const_value = tensor
        return
    node.attributes.clear()  # a Constant node, in whichever of its forms
    node.attributes["value"] = ir.AttrTensor("value", tensor)
    root.const_value = tensor


def _bypass_all(nodes: list[tuple[ir.Node, int]], writer: _Writer) -> dict[str, str]:
    """Let the readers of each removed node read the operand in this slot; where values went."""
    merged: dict[str, str] = {}
    for node, slot in nodes:
        x, y = node.inputs[slot], node.outputs[0]
        assert x is not None
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        x_name, y_name = x.name or "", y.name or ""
        others = [v for at, v in enumerate(node.inputs) if at != slot and v is not None]
        writer.suspects.update(dict.fromkeys(others))
        if y.is_graph_output():
            _hand_over_output(graph, node, x, y)
            if x.name == y_name:
                merged[x_name] = y_name
        else:
            y.replace_all_uses_with(x)
            merged[y_name] = x_name
            graph.remove(node, safe=True)
    return {name: _end_of(merged, name) for name in merged}


def _hand_over_output(graph: ir.Graph, node: ir.Node, x: ir.Value, y: ir.Value) -> None:
    """The batch norm's output is an output of the graph: its input takes over place and name."""
    name = y.name
    if x.is_graph_output() or x.is_graph_input() or x.is_initializer() or x.graph is not graph:
        identity = ir.node("Identity", inputs=[x], outputs=[ir.Value(type=y.type, shape=y.shape)])
        graph.insert_after(node, identity)
        x = identity.outputs[0]
    x.shape = y.shape
    x.meta.update(y.meta)
    ir.convenience.replace_all_uses_with(y, x, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    y.name = None
    x.name = name


def _merge(merge: Merge, nodes: Mapping[ir.Node, ir.Node], writer: _Writer) -> None:
    """Let the host write the result, under its own name, and take out what lies in between."""
    host, result = nodes[merge.host], nodes[merge.root].outputs[0]
    host.replace_input_with(0, nodes[merge.entry].inputs[0])
    for name, numbers in merge.attributes.items():
        host.attributes[name] = ir.convenience.convert_attribute(name, numbers)
    if merge.root is not merge.host:
        _take_over(host.outputs[0], result)
    going = [new for old, new in nodes.items() if old in merge.inner and new is not host]
    given = (value for node in going for value in node.inputs if value is not None)
    writer.suspects.update({value: None for value in given if value.producer() not in going})
    graph = host.graph
    assert isinstance(graph, ir.Graph)
    graph.remove(going, safe=True)


def _take_over(value: ir.Value, other: ir.Value) -> None:
    """Give a value the readers, the place among the outputs and the name of another one."""
    name, other.name = other.name, None
    value.shape, value.type = other.shape, other.type
    value.meta.update(other.meta)
    ir.convenience.replace_all_uses_with(other, value, replace_graph_outputs=True)
    value.name = name


def _end_of(merged: Mapping[str, str], name: str) -> str:
    while name in merged and merged[name] != name:
        name = merged[name]
    return name
