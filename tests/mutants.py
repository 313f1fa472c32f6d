"""Wrong rules, one line each, and a runner that says which law catches them.

A mutant is a replacement in the source of `bnfold.folding`; the package is imported anew with it,
and the laws are checked until one fails. Run as `python -m tests.mutants INDEX...`: prints one JSON
object, index -> the law that fails, null for a mutant that survives. A text that is no longer in
the source is an error: the list follows the code.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent.parent / "bnfold" / "folding"


@dataclass(frozen=True)
class Mutant:
    """`right` in `file` becomes `wrong`; `hint` is in the names of laws that should notice."""

    file: str
    right: str
    wrong: str
    hint: str

    @property
    def source(self) -> str:
        """The mutated file. Raises ValueError where there is nothing to mutate."""
        text = (PACKAGE / self.file).read_text(encoding="utf-8")
        if self.right not in text:
            raise ValueError(f"{self.file} no longer says {self.right!r}")
        return text.replace(self.right, self.wrong)


LINEAR, NORM, WAVE = "rules/linear.py", "rules/normalization.py", "wave.py"
WAYS, TRIAL = "transaction.py", "trial.py"
RELATIONS, JOINING, PASSING = "rules/relations.py", "rules/joining.py", "rules/passing.py"
QUANTIZED, EINSUM = "quantized.py", "rules/einsum.py"
GATING, RECURRENT, EMBEDDING = "rules/gating.py", "rules/recurrent.py", "rules/embedding.py"
MERGING, PARALLEL, CHAINS = "merging.py", "parallel.py", "chains.py"
REPAIR = "rules/repairs.py"
MOVES, LAYOUT, APPLY, CONSTANTS = "rules/moves.py", "layout.py", "apply.py", "constants.py"

# a table is read by its columns
# ruff: noqa: E501
# fmt: off
MUTANTS: list[Mutant] = [
    # linear operators
    Mutant(LINEAR, "bias = bias + (split * shift)", "bias = bias + 0 * (split * shift)", "bn, conv"),
    Mutant(LINEAR, "2: shifted(bias, scale, along(y.origin, outs)),", "2: bias,", "conv"),
    Mutant(LINEAR, 'return string(node, "auto_pad", "NOTSET") != "VALID" and any(', "return any(x != x for x in ", "padded"),
    Mutant(LINEAR, "return any(size != 1 for size in kernel)", "return False", "SAME"),
    Mutant(LINEAR, "return None if _is_pointwise(node) else", "return None if node else", "transposed conv"),
    Mutant(LINEAR, "and not any(zeros)", "", "transposed conv 1x1, padded"),
    Mutant(LINEAR, "*(integers(node, \"strides\") or ())", "", "transposed conv 1x1, stride"),
    Mutant("rules/gating.py", "and drops_nothing(node)", "", "dropout in training mode"),
    Mutant(JOINING, 'if not np.all(np.isfinite(c.array)):', "if False:", "infinity"),
    Mutant(LINEAR, "split = np.swapaxes(split, 1, 2) if transposed else split", "split = split.copy()", "transposed conv"),
    Mutant(LINEAR, 'integer(node, "group", 1)', "1", "groups"),
    Mutant(LINEAR, "split *= read", "split /= read", "bn, conv"),
    Mutant(LINEAR, "split *= scale.reshape(groups, -1, 1, *ones)", "split *= scale.reshape(groups, 1, -1, *ones)", "conv"),
    Mutant(LINEAR, "(x, 0 if integer(node, \"transA\", 0) else 1)", "(x, 1)", "transA"),
    Mutant(LINEAR, 'flip = bool(integer(node, "transB", 0))', "flip = False", "transB"),
    Mutant(LINEAR, "alpha * (along(x.origin, ins) @ weight)", "(along(x.origin, ins) @ weight)", "bn, gemm"),
    Mutant(LINEAR, "2: shifted(bias, scale, origin) / beta}", "2: shifted(bias, scale, origin)}", "gemm"),
    Mutant(LINEAR, "bias = beta * _bias(node, 2, outs)", "bias = _bias(node, 2, outs)", "gemm"),
    Mutant(LINEAR, 'if real(node, "beta", 1.0) == 0:', "if False:", "beta 0"),
    Mutant(LINEAR, "axis = -1 if slot == 1 else -2", "axis = -1", "left"),
    Mutant(LINEAR, "@ weight)[..., None, :]", "@ weight)", "batched"),
    Mutant(LINEAR, "return np.where(scale == 0, origin, scale * (bias - origin))", "return scale * (bias - origin)", "gamma 0"),
    # what passes as one number for all channels
    Mutant(REPAIR, 'return Form((Step("Clip", numbers[0]),))', 'return Form((Step("Clip", -numbers[0]),))', "relu, bn of one shift"),
    Mutant(REPAIR, "fits = fits & (", "fits = fits | (", "several shifts"),
    Mutant(REPAIR, "dict(zip(slots, numbers, strict=True))", "dict(zip(slots, numbers[::-1], strict=True))", "conv, clip, bn of one shift"),
    Mutant(REPAIR, "finite == len(held)", "finite <= len(held)", "infinite bound"),
    Mutant(REPAIR, "opset_of(node) >= _CLIP_WITH_INPUTS and (", "(", "old opset"),
    Mutant(REPAIR, "number = carried(0.0, gauge)", "number = -carried(0.0, gauge)", "with a pad"),
    Mutant(REPAIR, "after.append(total - first)", "after.append(first)", "SAME_UPPER conv, with a pad"),
    Mutant(REPAIR, 'one_number = Demand(x, "origin", _one_number, sentence)', 'one_number = Demand(x, "origin", lambda s, o: s == s, sentence)', "no pad"),
    Mutant(REPAIR, "return padded and not integer", "return padded or not integer", "average pool"),
    Mutant(REPAIR, "if producer is None or producer.op_type not in _MAPS:", "if producer is None:", "bn of one shift, padded conv"),
    Mutant(APPLY, "[0, 0, *padding.before, 0, 0, *padding.after]", "[0, 0, *padding.after, 0, 0, *padding.before]", "padded at one end, with a pad"),
    Mutant(APPLY, 'node.attributes["pads"] = ir.AttrInt64s("pads", [0] * 2 * len(padding.before))', "pass", "with a pad"),
    Mutant(WAYS, "if room is not None and extra > room:", "if False:", "two padded convs"),
    # batch norms: those that go and those that stay
    Mutant(NORM, "spread = np.asarray(var + eps)", "spread = np.asarray(var + eps * eps)", "conv"),
    Mutant(NORM, "scale = gamma / np.sqrt(spread)", "scale = gamma / spread", "conv"),
    Mutant(NORM, "scale = gamma / np.sqrt(spread)", "scale = np.abs(gamma) / np.sqrt(spread)", "conv"),
    Mutant(NORM, "(beta - scale * mean)", "(beta - mean)", "conv"),
    Mutant(NORM, "1: scale * gamma * read,", "1: scale * gamma,", "bn, bn"),
    Mutant(NORM, "forward_scale * (mean - origin)", "forward_scale * mean - origin", "bn, bn"),
    Mutant(NORM, "np.where(known, at_origin, beta)", "beta", "bn, bn"),
    Mutant(NORM, "back = s * scale", "back = np.abs(s) * scale", "stream"),
    Mutant(NORM, "s * origin + t)", "s * origin - t)", "bn, conv"),
    Mutant(NORM, "point = (origin - t) / s", "point = origin - t", "conv"),
    Mutant(NORM, "scale_y * (t - origin))", "scale_y * t - origin)", "gamma 0"),
    Mutant(NORM, "y: np.where(known, m.shift, np.nan)", "y: np.where(known, 0.0, np.nan)", "gamma 0"),
    # what nodes demand
    Mutant(RELATIONS, "lambda scale, _o: scale > 0, sentence", "lambda scale, _o: scale != 0, sentence", "Relu"),
    Mutant(RELATIONS, "lambda scale, _o: scale >= 0, sentence", "lambda scale, _o: scale == scale, sentence", "axpool"),
    Mutant(RELATIONS, "lambda scale, _o: scale != 0, sentence", "lambda scale, _o: scale == scale, sentence", "gamma 0"),
    Mutant(RELATIONS, "lambda scale, _o: np.isfinite(scale), sentence", "lambda scale, _o: scale == scale, sentence", "known constant"),
    Mutant(RELATIONS, "lambda s, o: (o == 0) | (np.isinf(s) if known_constants else False)", "lambda s, o: o == o", "padded"),
    Mutant(RELATIONS, "(np.isinf(s) if known_constants else False)", "np.isinf(s)", "constants through"),
    Mutant(RELATIONS, "fits = all(", "fits = array.size > 0 or all(", "axis"),
    Mutant(RELATIONS, 'Demand(value, "scale", lambda scale, _o: scale == 1, sentence)', 'Demand(value, "scale", lambda scale, _o: scale == scale, sentence)', "clip"),
    Mutant(RELATIONS, 'Demand(value, "origin", lambda _s, origin: origin == 0, sentence)', 'Demand(value, "origin", lambda _s, origin: origin == origin, sentence)', "instance"),
    # sums, factors, concatenation
    Mutant(JOINING, "data = -1 if (slot, sign) == (0, -1) else 1", "data = 1", "constant - "),
    Mutant(JOINING, "(1, -1): -1, (0, -1): 1}", "(1, -1): 1, (0, -1): 1}", "sub"),
    Mutant(JOINING, "new = np.where(y.scale == 0, y.origin - data * origin, regular)", "new = regular", "conv, add"),
    Mutant(JOINING, "if held is None or (divide and held[0] == 0):", "if held is None:", "constant /"),
    Mutant(JOINING, "* x.read_scale", "* x.scale", "mul"),
    Mutant(JOINING, "canonical(m * origin)", "canonical(1 * origin + 0 * m)", "mul"),
    Mutant(JOINING, "if a is b:", "if False:", "itself"),
    Mutant(JOINING, "Term(value, sign, operand(value, y))", "Term(value, 1, operand(value, y))", "sub"),
    Mutant(JOINING, "at += size", "at += 0", "concat"),
    Mutant(PASSING, "if _DIGITS[y.dtype] >= min(", "if True or min(", "cast to float16"),
    Mutant(APPLY, "dtype = node.inputs[weight_slot].dtype or weight.dtype", "dtype = ir.DataType.FLOAT", "float16 without bias"),
    # Einsum
    Mutant(EINSUM, "{p.slot: p.constant * read *", "{p.slot: p.constant *", "bn, einsum"),
    Mutant(EINSUM, "return Relations((), (tie,), (), demands)", "return Relations((), (), (), demands)", "bn, einsum"),
    Mutant(EINSUM, "            *p.only_shared(p.x, p.of_x, node),\n", "", "lacks"),
    Mutant(EINSUM, "total = total * (size", "total = total * (1", "sums the steps"),
    Mutant(EINSUM, "readable(p.y, node),", "", "einsum, add, bn"),
    # weights held as integers
    Mutant(QUANTIZED, "middle + (wide - middle) * np.sign", "(wide - middle) * np.sign", "unsigned"),
    Mutant(QUANTIZED, "if np.any((turned < info.min) | (turned > info.max)):", "if False:", "the least integer"),
    Mutant(QUANTIZED, "if len(readers(held.root)) > 1:", "if False:", "two convs"),
    Mutant(QUANTIZED, "if scale.size == 1 and opset_of(node) < 13:", "if False:", "opset 10"),
    Mutant(QUANTIZED, "[axis] if scale.size > 1 else", "", "each input channel"),
    Mutant(QUANTIZED, "if np.all(np.abs(wanted - found * rows) <= _EQUAL * np.abs(wanted)):", "if True:", "grouped transposed"),
    Mutant(QUANTIZED, "sizes = np.where(factor == 0, 1, np.abs(factor))", "sizes = np.where(factor == 0, 1, factor)", "integers, conv"),
    Mutant(QUANTIZED, "np.broadcast_to(zero.reshape(-1), factor.shape)", "0 * np.broadcast_to(zero.reshape(-1), factor.shape)", "unsigned"),
    Mutant(WAYS, "    check_quantized(trial)\n", "", "integers"),
    Mutant(APPLY, "new.axis is not None", "False", "integers, conv"),
    # constants computed from constants
    Mutant(CONSTANTS, "return self.tensor is not None and all(", "return all(", "read straight and as a product"),
    Mutant(CONSTANTS, "computable = _is_view(node) or", "computable = True or", "computed"),
    Mutant(CONSTANTS, "            if _tensor(place) is None:\n                return False\n", "", "reads a value"),
    # products of computed values
    Mutant(GATING, "*identity_demands(g, kept),", "", "gate"),
    Mutant(GATING, "        no_shift(x, sentence),\n        no_shift(y, sentence),\n", "", "bn, gate"),
    Mutant(GATING, "summed = -1 if gate == 1 else -2", "summed = -2 if gate == 1 else -1", "sums over"),
    Mutant(GATING, "gate = 1 if divide else _gate(node, blocked)", "gate = _gate(node, blocked)", "divided by a bn"),
    Mutant(GATING, "if x is g:", "if False:", "times itself"),
    # recurrent networks, embeddings
    Mutant(RECURRENT, "bias[:, :rows] +=", "bias[:, rows:] +=", "GRU"),
    Mutant(RECURRENT, "weight * along(x.read_scale, ins)", "weight", "RNN"),
    Mutant(RECURRENT, "_FEATURES = 2 ", "_FEATURES = 0 ", "over the steps"),
    Mutant(RECURRENT, "[demand for v in hidden", "[demand for v in []", "LSTM, bn"),
    Mutant(EMBEDDING, "array.reshape(*array.shape[:axis], 1, *array.shape[axis + count :])", "array.reshape(*array.shape[:axis], *array.shape[axis + count :], 1)", "embedding"),
    Mutant(EMBEDDING, "for extent in array.shape[axis : axis + count]", "for extent in array.shape[:0]", "over the indices"),
    Mutant(MOVES, "inner = layout.constant_along(array, [axis])", "inner = array", "chosen at run time"),
    # operators that pass gauges on
    Mutant(PASSING, "new == number)", "new == new)", "pads with 2"),
    Mutant(PASSING, "gauge) if as_input else value, value", "gauge), value", "opset 10"),
    Mutant(PASSING, "origin == value, new", "origin == origin, new", "Pad"),
    Mutant(PASSING, 'string(node, "mode", "constant") != "constant" or', "True or", "pads a shift"),
    Mutant(PASSING, "return {_PAD_VALUE: np.asarray(number)}", "return {}", "pads all"),
    Mutant(PASSING, 'if mode == "zeros"', 'if mode != "zeros"', "grid"),
    Mutant(PASSING, "(*asks.demands, *grid)", "asks.demands", "bn of the grid"),
    Mutant(JOINING, "demands = [not_negative(value, node) for value in (*values, y)]", "demands = []", "Max"),
    Mutant(JOINING, "chosen = choose(chosen,", "(chosen,", "bn of all gammas 0, Max"),
    Mutant(JOINING, "_fitted(y.write(", "_fitted((", "Max"),
    Mutant(JOINING, "demands += [writable(value, node) for value in (*values, y)]", "", "largest of two"),
    Mutant(JOINING, "lambda array, _s: -array, lambda array, _s: -array", "lambda array, _s: array, lambda array, _s: array", "Neg"),
    Mutant(JOINING, "np.full(one, -1.0)", "np.full(one, 1.0)", "neg goes"),
    Mutant(JOINING, "tuple(no_shift(v, sentence) for v in (*values, y))", "()", "mean of two"),
    Mutant(MOVES, "np.concatenate([array] * count, axis=axis)", "np.repeat(array, count, axis=axis)", "Tile"),
    Mutant(PASSING, "for other in node.outputs[1:]", "for other in node.outputs[2:]", "places"),
    Mutant(PASSING, 'np.where(x < 0, real(node, "alpha", 0.01) * x, x)', "x", "LeakyRelu"),
    Mutant(PASSING, "lambda array, _s: canonical(function(node, array))", "lambda array, _s: array", "constants through"),
    Mutant(PASSING, "if x.dtype not in FLOATS or y.dtype not in FLOATS:", "if False:", "cast to integers"),
    Mutant(MOVES, "return back, ahead  # SpaceToDepth", "return ahead, back  # SpaceToDepth", "space to depth"),
    Mutant(MOVES, "axes = range(2, len(dims(x)))", "axes = range(0)", "rows"),
    Mutant(MOVES, "shape[axis] = array.shape[position]", "shape[axis - 1] = array.shape[position]", "mean"),
    # layout
    Mutant(LAYOUT, 'rows = rows if mode == "DCR" else rows.T', "rows = rows if rows.size else rows.T", "CRD"),
    Mutant(LAYOUT, 'np.tile(row, block**2) if mode == "DCR" else np.repeat(row, block**2)', "np.tile(row, block**2)", "CRD"),
    Mutant(LAYOUT, "chosen = np.arange(array.shape[axis])[index]", "chosen = np.arange(array.shape[axis])[index][::-1]", "gather"),
    Mutant(LAYOUT, "return [int(axis) for axis in np.argsort(perm)]", "return [int(axis) for axis in perm]", "nhwc"),
    Mutant(LAYOUT, "moved[chosen[~unset]] = rows[~unset]", "moved[chosen[~unset]] = rows[~unset][::-1]", "slice of channels"),
    Mutant(LAYOUT, "if not np.array_equal(moved[chosen], rows, equal_nan=True):", "if False:", "gather"),
    Mutant(LAYOUT, "return array if all(array.shape[axis] == 1 for axis in axes) else None", "return array", "over channels"),
    # planning
    Mutant(WAYS, 'yield "x", {x: all_x}', 'yield "x", {x: np.abs(all_x)}', "conv"),
    Mutant(WAYS, "told = np.where(zero, np.inf, np.nan)", "told = np.where(zero, np.nan, np.nan)", "gamma 0"),
    Mutant(WAYS, "np.where(zero, np.inf, scale_x / s)", "np.where(zero, np.inf, s * scale_x)", "bn, conv"),
    Mutant(TRIAL, "if added > (1 if", "if added > (9 if", "attention"),
    Mutant(WAVE, "for node in self.network.around(value))", "for node in self.network.around(value) if node is not by)", "second"),
    Mutant(WAVE, "trial._hold(total, position, where, node)", "pass", "stream"),
    Mutant(WAVE, "self._balance(total, node)  # it may", "pass  # it may", "sums of sums"),
    Mutant(WAVE, "if value.producer() is None:", "if False:", "constant"),
    Mutant(WAVE, "if value.is_graph_input() or value.is_graph_output():", "if value.is_graph_input():", "output"),
    Mutant(WAVE, "if value.is_graph_input() or value.is_graph_output():", "if value.is_graph_output():", "bn"),
    Mutant(WAVE, "residue -= term.sign * number", "residue -= number", "sub"),
    Mutant(WAVE, "term.sign * residue", "1 * residue", "sub"),
    Mutant(WAVE, "if not np.all(held):", "if False:", "padded"),
    Mutant(WAVE, "if clash.any():", "if False:", "second consumer"),
    # writing
    Mutant(APPLY, "and len(writes) == len(readers(root))", "and len(writes) > 0", "shared"),
    Mutant(APPLY, "np.array_equal(w.held.as_root(w.array), first)", "first is not None", "shared"),
    Mutant(APPLY, "name = fresh_name(name, self.names)", "name = str(name)", "straight"),
    Mutant(APPLY, "graph.inputs.append(value)", "pass", "opset 7"),
    Mutant(APPLY, "graph = self.model.graph if listed else node.graph", "graph = node.graph", "branch, IR 3"),
    Mutant(APPLY, "    x.name = name", "    x.name = None", "conv"),
    Mutant(APPLY, "y.replace_all_uses_with(x)", "None", "bn, conv"),
    Mutant(APPLY, "root.const_value = tensor\n        return", "return", "conv"),
    Mutant(CONSTANTS, "(value.is_graph_input() and _overridable(value))", "False", "override"),
    Mutant(CONSTANTS, "        if value.is_graph_output():\n            return None\n", "", "view"),
    Mutant(CONSTANTS, "all(view.op_type != \"Cast\" for view in self.views)", "True", "cast"),
    Mutant(CONSTANTS, "array = np.transpose(array, inverse(_perm(view, array.ndim)))", "array = array.reshape(shape)", "transpose"),
    # chains
    Mutant(CHAINS, "pad_value(pad) != 0", "pad_value(pad) != pad_value(pad)", "number"),
    Mutant(CHAINS, 'string(pad, "mode", "constant") != "constant" or', "", "reflected"),
    Mutant(CHAINS, "(*extents[2:rank], *extents[rank + 2 :])", "(*extents[rank + 2 :], *extents[2:rank])", "uneven"),
    Mutant(CHAINS, "tuple(a + b for a, b in zip(own, spatial, strict=True))", "tuple(spatial)", "padded conv"),
    Mutant(CHAINS, "min(extents) < 0", "False", "cut"),
    Mutant(CHAINS, "if any(extents[axis] for axis in (0, 1, rank, rank + 1)):", "if False:", "channels"),
    Mutant(CHAINS, 'or auto_padded(conv.host):', "or False:", "SAME conv"),
    Mutant(CHAINS, "[*only_along(x, 1, self.host), readable(x, self.host), no_shift(x, sentence)]", "[*only_along(x, 1, self.host)]", "bn in front"),
    Mutant(CHAINS, "return chain if chain.shape.cost <= front.shape.cost + point.shape.cost else None", "return chain", "depthwise and dense"),
    Mutant(CHAINS, "any(replace(axis, dilation=1) != POINT for axis in axes)", "any(axis.size != 1 or axis.before for axis in axes)", "strides"),
    Mutant(CHAINS, "any(replace(axis, dilation=1) != POINT for axis in axes)", "any(axis.size != 1 or axis.stride != 1 for axis in axes)", "padded 1x1"),
    Mutant(CHAINS, "scale * m.affine.shift + shift", "shift", "bn, 1x1"),
    Mutant(CHAINS, "bias.reshape(-1) + point[2]", "bias.reshape(-1)", "1x1, 1x1"),
    Mutant(CHAINS, "groups=math.gcd(front.groups, point.groups)", "groups=point.groups", "groups"),
    Mutant(CHAINS, "return None if shared or not held", "return None if not held", "read twice"),
    Mutant(CHAINS, "return None if shared or not held", "return None if shared", "shift in between"),
    Mutant(CHAINS, "Gauge(x.scale * own.scale, own.origin)", "Gauge(x.scale, own.origin)", "pad, bn"),
    # parallel branches
    Mutant(MERGING, "first, rest = divmod(outer.before - inner.before, unit)", "first, rest = divmod(outer.before - inner.before + 1, unit)", "parallel"),
    Mutant(MERGING, "step, uneven = divmod(inner.dilation, unit)", "step, uneven = divmod(unit, unit)", "dilated"),
    Mutant(MERGING, "inner.stride != outer.stride or inner.reach != outer.reach", "inner.stride != outer.stride", "spread"),
    Mutant(MERGING, "inner.stride != outer.stride or inner.reach != outer.reach", "inner.reach != outer.reach", "spread"),
    Mutant(MERGING, "if rest or uneven or first < 0 or last >= outer.size:", "if rest or uneven or last >= outer.size:", "crossed"),
    Mutant(MERGING, "if any(n != 1 for n in (*strides, *dilations)):", "if any(n != 1 for n in dilations):", "SAME"),
    Mutant(MERGING, 'upper = string(conv, "auto_pad", "") == "SAME_UPPER"', "upper = True", "SAME_LOWER"),
    Mutant(MERGING, "[:, :, :, *place] += split[:, part]", "[:, :, :, *place] = split[:, part]", "parallel"),
    Mutant(MERGING, "blocks[:, part, :, part]", "blocks[:, part, :, -1 - part]", "groups"),
    Mutant(MERGING, "bias, border = bias + offset, border + step", "bias, border = offset, border + step", "biases"),
    Mutant(MERGING, "bias, border = bias + offset, border + step", "bias, border = bias + offset, step", "repaired"),
    Mutant(MERGING, "per_channel(scale, border.ndim) * border", "border", "repaired"),
    Mutant(MERGING, "border = border + per_channel(scale, rank) * step.constant", "border = border + step.constant", "repaired"),
    Mutant(MERGING, "scale * form.constants[2] + shift", "scale * form.constants[2]", "parallel"),
    Mutant(MERGING, "scale * form.constants[2] + shift", "form.constants[2] + shift", "x - conv"),
    Mutant(MERGING, "scale * along(x.origin, outs) + shift", "shift", "both sides"),
    Mutant(MERGING, "(scale * along(x.read_scale, outs))", "(scale + 0 * along(x.read_scale, outs))", "both sides"),
    Mutant(MERGING, "if shape.outs != shape.ins:", "if False:", "channels"),
    Mutant(MERGING, "if other.groups % shape.groups or (other", "if (other", "depthwise and dense"),
    Mutant(MERGING, "(other.outs, other.ins) != (shape.outs, shape.ins)", "False", "spreads over one"),
    Mutant(PARALLEL, '"Sub": (1, -1)', '"Sub": (1, 1)', "x - conv"),
    Mutant(PARALLEL, "shift if slot == 0 else np.zeros_like(shift)", "shift", "parallel"),
    Mutant(PARALLEL, "if not is_private(value):", "if False:", "read elsewhere"),
    Mutant(PARALLEL, "if any(n > 1 for a in (scale, shift) for axis, n in enumerate(a.shape) if axis != 1):", "if False:", "columns"),
    Mutant(MERGING, "if conv.inputs[slot] is not None and constant_at(conv, slot).dequantizer is not None:", "if False:", "computed bias"),
    Mutant(PARALLEL, "scale * m.affine.shift + shift", "m.affine.shift + shift", "parallel"),
]
# fmt: on


# --- the runner ----------------------------------------------------------------------------------


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads one file with other text."""

    def __init__(self, name: str, path: str, text: str):
        super().__init__(name, path)
        self.text = text

    def get_data(self, path: str | os.PathLike[str]) -> bytes:
        return self.text.encode() if str(path) == self.path else super().get_data(str(path))

    def path_stats(self, path: str | os.PathLike[str]) -> dict[str, float]:  # noqa: ARG002
        raise OSError("no cached bytecode for a mutant")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the mutated module before anything else does."""

    def __init__(self, mutant: Mutant):
        self.path = PACKAGE / mutant.file
        parts = Path(mutant.file).with_suffix("").parts
        self.name = ".".join(("bnfold.folding", *parts))
        self.text = mutant.source

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the protocol
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        loader = _Loader(fullname, str(self.path), self.text)
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


def _forget() -> None:
    """Let bnfold and the checks be imported anew, and the packages, which hold on to them."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("bnfold", "tests") and name != "tests.mutants":
            del sys.modules[name]


def laws_of(hint: str) -> Iterator[object]:
    """All laws, those that a hint names first."""
    laws = importlib.import_module("tests.laws").LAWS
    return iter(sorted(laws, key=lambda law: hint.lower() not in law.name.lower()))


def caught_by(mutant: Mutant) -> str | None:
    """The name of the first law that fails, None if all hold."""
    finder = _Finder(mutant)
    _forget()
    sys.meta_path.insert(0, finder)
    try:
        rules = importlib.import_module("tests.test_rules")
        for law in laws_of(mutant.hint):
            try:
                rules.check_law(law)
            except Exception:
                return str(law.name)  # type: ignore[attr-defined]
        return None
    except Exception as error:  # a module that cannot even be imported is caught as well
        return f"import: {error}"
    finally:
        sys.meta_path.remove(finder)
        _forget()


if __name__ == "__main__":
    wanted = [int(argument) for argument in sys.argv[1:]] or range(len(MUTANTS))
    print(json.dumps({index: caught_by(MUTANTS[index]) for index in wanted}))
