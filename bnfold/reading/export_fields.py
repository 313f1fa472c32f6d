"""What each field of an exported graph may hold.

The JSON in a .pt2 is half a program. Operators are looked up by name anywhere in torch
(`torch.os.system` is one), shape expressions go to sympy, which evaluates them as Python, guards
are compiled, names are pasted into generated code, and trees may import modules. Each field that
holds a string has a row here with a test for it; a string in a field without a row is refused.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable
from typing import Any


class RefusedFieldError(Exception):
    """A field holds what it may not; the message is the middle of a sentence."""


_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|")  # goes into generated code
_DOTTED = re.compile(r"[A-Za-z0-9_.\-/: ]*")  # names of parameters and modules
_OPERATORS = re.compile(
    r"_operator\.(add|sub|mul|mod|pow|neg|pos|abs|floordiv|truediv|lshift|rshift|trunc"
    r"|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_[a-z]+|torch\._sym_sqrt"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast)"
)
_TORCH_OPERATOR = re.compile(r"torch\.ops\.(aten|prims|torchvision)\.(\w+)\.(\w+)")


def _matches(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.fullmatch(text) is not None


@functools.cache
def _is_operator(text: str) -> bool:
    """One of torch's own operators on tensors, or of Python's on sizes; none that opens files."""
    import torch

    if _OPERATORS.fullmatch(text):
        return True
    if not (match := _TORCH_OPERATOR.fullmatch(text)):
        return False
    library, name, overload = match.groups()
    found: Any = getattr(getattr(torch.ops, library), name, None)
    found = getattr(found, overload, None)
    if found is None:  # torchvision not imported: torch says so itself
        return True
    if not isinstance(found, torch._ops.OpOverload):
        return False
    arguments = found._schema.arguments
    return not any("file" in argument.name for argument in arguments)


_SHAPE_CALLS = frozenset(
    (
        *("Integer", "Rational", "Add", "Mul", "Mod", "Max", "Min"),
        *("Abs", "floor", "ceiling", "And", "Or", "Not", "Equality", "Unequality", "GreaterThan"),
        *("LessThan", "StrictGreaterThan", "StrictLessThan", "Eq", "Ne", "Ge", "Gt", "Le", "Lt"),
        *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "CeilDiv"),
        *("FloorToInt", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt", "RoundToInt"),
        *("ToFloat", "Identity"),
    )
)
_SHAPE_TEXT = re.compile(r"[A-Za-z0-9_(),.'= +\-*/]{1,20000}")
_SYMBOL = re.compile(r"[a-z]+[0-9]+")
_NUMBER = re.compile(r"[0-9.e+\-]+")
_POWERS = frozenset(
    ("-2", "-1", "2", "3", "4", *(f"Integer({power})" for power in (-2, -1, 2, 3, 4)))
)


@functools.cache
def _is_shape_expression(text: str) -> bool:
    """Whether `text` only calls sympy's arithmetic on numbers and symbols such as s0.

    sympify evaluates it as Python, and evaluates strings inside it again.
    """
    if not _SHAPE_TEXT.fullmatch(text):
        return False
    try:
        return _is_arithmetic(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_arithmetic(node: ast.expr, powers: int = 2) -> bool:
    """`powers` deep only: powers of powers of numbers grow until no memory is left."""
    match node:
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            flags = [keyword.value for keyword in node.keywords]
            plain = all(isinstance(f, ast.Constant) and isinstance(f.value, bool) for f in flags)
            return plain and _SYMBOL.fullmatch(name) is not None
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(digits))]):
            options = [keyword.value for keyword in node.keywords]  # precision=53
            plain = all(isinstance(option, ast.Constant) for option in options)
            return plain and _NUMBER.fullmatch(digits) is not None
        case ast.Call(func=ast.Name(id="Pow"), args=[base, power], keywords=[]):
            small = powers > 0 and ast.unparse(power) in _POWERS
            return small and _is_arithmetic(base, powers - 1)
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            known = name in _SHAPE_CALLS
            return known and all(_is_arithmetic(argument, powers) for argument in node.args)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_arithmetic(operand, powers)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv()):
            return _is_arithmetic(node.left, powers) and _is_arithmetic(node.right, powers)
        case ast.Name(id=name):
            return name in ("true", "false", "oo") or _SYMBOL.fullmatch(name) is not None
        case ast.Constant(value=int() | float() as number):
            return abs(number) < 2**64
    return False


_GUARD_TEXT = re.compile(r"[A-Za-z0-9_ ()\[\]'.,+\-*/%<>=!]{1,20000}")


def _is_guard(text: str) -> bool:
    """Whether `text` only compares sizes and numbers of the inputs, L['x'].size()[0] <= 64."""
    if not _GUARD_TEXT.fullmatch(text):
        return False
    try:
        return _is_comparison(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_comparison(node: ast.expr, powers: int = 2) -> bool:
    match node:
        case ast.Compare():
            return all(_is_comparison(part, powers) for part in (node.left, *node.comparators))
        case ast.BoolOp():
            return all(_is_comparison(part, powers) for part in node.values)
        case ast.UnaryOp():
            return _is_comparison(node.operand, powers)
        case ast.BinOp(op=ast.Pow(), left=base, right=ast.Constant(value=1 | 2 | 3 | 4)):
            return powers > 0 and _is_comparison(base, powers - 1)
        case ast.BinOp(
            op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod()
        ):
            return _is_comparison(node.left, powers) and _is_comparison(node.right, powers)
        case ast.Call(func=ast.Name(id="max" | "min" | "abs"), keywords=[]):
            return all(_is_comparison(argument, powers) for argument in node.args)
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="math"), attr="ceil" | "floor" | "trunc"),
            args=[argument],
            keywords=[],
        ):
            return _is_comparison(argument, powers)
        case ast.Constant(value=int() | float() as number):
            return abs(number) < 2**64
        case ast.Call(func=ast.Attribute(value=tensor, attr="storage_offset"), args=[]):
            return not node.keywords and _is_input(tensor)
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=tensor, attr="size" | "stride"), args=[]),
            slice=ast.Constant(value=int()),
        ):
            return _is_input(tensor)
    return _is_input(node)


def _is_input(node: ast.expr) -> bool:
    """L['x'], or an item of it."""
    match node:
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str(name))):
            return _WORD.fullmatch(name) is not None
        case ast.Subscript(value=inner, slice=ast.Constant(value=str() | int() as key)):
            return _is_key(key) and _is_input(inner)
    return False


def _is_tree(text: str) -> bool:
    """A pytree of tuples, lists and dictionaries; other types import modules to be built."""

    def plain(tree: Any) -> bool:
        context = tree["context"]
        keys = json.loads(context) if context is not None else None
        if tree["type"] not in _TREE_TYPES:
            return False
        if not (keys is None or (isinstance(keys, list) and all(map(_is_key, keys)))):
            return False
        return all(map(plain, tree["children_spec"]))

    try:
        protocol, tree = json.loads(text)
        return protocol == 1 and plain(tree)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


_TREE_TYPES = (
    *(None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"),
    "torch.fx.immutable_collections.immutable_list",
    "torch.fx.immutable_collections.immutable_dict",
)


def _is_key(key: object) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and _DOTTED.fullmatch(key) is not None)


# Field -> whether a string in it is harmless. Those named in no row may hold no string.
_FIELDS: dict[str, Callable[[str], bool]] = {
    "target": _is_operator,
    "as_operator": _is_operator,
    "expr_str": _is_shape_expression,
    "guards_code": _is_guard,
    "in_spec": _is_tree,
    "out_spec": _is_tree,
    "as_string": lambda _: True,  # arguments of operators; generated code quotes them
    "as_strings": lambda _: True,
    "torch_version": _matches(re.compile(r"[\w.+<= -]*")),
    **dict.fromkeys(("name", "as_name", "forward_arg_names", "verifiers"), _matches(_WORD)),
    **dict.fromkeys(
        ("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn"),
        _matches(_DOTTED),
    ),
    "type": _matches(re.compile(r"cpu|cuda|mps|xpu")),
    "path_name": _matches(re.compile(r"weight_\d+|tensor_\d+")),
}
# Dictionaries whose keys are names from the model and not fields of the format.
_NAMED: dict[str, re.Pattern[str]] = {
    **dict.fromkeys(
        (
            *("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"),
            *("range_constraints", "as_string_to_argument"),
        ),
        _WORD,
    ),
    "opset_version": _DOTTED,
    "config": _DOTTED,
}
# Stack traces and other notes that bnfold has no use for: written empty.
_EMPTIED: dict[str, Any] = {"metadata": {}, "treespec_namedtuple_fields": {}}
_FORBIDDEN = ("custom_obj", "as_custom_obj", "custom_obj_values", "class_fqn", "custom_obj_name")


def checked_fields(value: Any, field: str) -> Any:
    """`value`, parsed JSON, again: every string looked up, every device the CPU.

    field: the key that holds it; "program" for models/*.json, "payload" for the configurations
    of weights and constants. Raises RefusedFieldError at the first string that its row refuses.
    """
    if isinstance(value, list):
        return [checked_fields(item, field) for item in value]
    if isinstance(value, dict) and field in ("device", "as_device"):
        return {"type": checked_fields(value["type"], "type") and "cpu", "index": None}
    if isinstance(value, dict) and field not in _FIELDS:
        return {key: _checked_entry(key, item, field) for key, item in value.items()}
    harmless = isinstance(value, str) and field in _FIELDS and _FIELDS[field](value)
    if isinstance(value, str | dict) and not harmless:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        raise RefusedFieldError(f"the field {field} of its graph holds {shown}")
    return value


def _checked_entry(key: str, item: Any, field: str) -> Any:
    if field in _NAMED:
        if not _NAMED[field].fullmatch(key):
            raise RefusedFieldError(f"a name under {field} in its graph is {key!r}")
        return checked_fields(item, f"{field}[]")
    if key in _EMPTIED:
        return _EMPTIED[key]
    if item and (key in _FORBIDDEN or key == "use_pickle"):
        raise RefusedFieldError(f"it has the field {key}: an object that only pickle can load")
    return checked_fields(item, key)
