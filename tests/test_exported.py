"""A .pt2 is opened without running what is written in it.

Each hostile file is a real one with one thing changed, and carries a payload that would create a
marker file; the fixture shows first that the payload works.
"""

import contextlib
import io
import json
import os
import pickle
import zipfile

import pytest
import sympy
import torch
from torch import nn

from bnfold.errors import InputError, UnsafeInputError, UsageError
from bnfold.reading.export_fields import RefusedFieldError, checked_fields
from bnfold.reading.exported import load_exported_program
from bnfold.reading.sniff import Kind, sniff

GRAPH = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"


class Net(nn.Module):
    """Two outputs in a dictionary, a size in the graph, and a constant tensor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x, scale):
        y = self.bn(self.conv(x)).relu()
        pooled = torch.cat([y, y], 1).reshape(x.shape[0], 2, 4, -1).mean((1, 3))
        with torch.no_grad():
            constant = torch.tensor([1.0, 2.0])
        return {"out": self.head(pooled) * scale + constant, "maps": [y]}


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'echo run > "{self.marker}"',)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim("h", min=8, max=64)}}
    exported = torch.export.export(
        Net().eval(),
        (torch.randn(2, 3, 16, 16), torch.tensor(2.0)),
        dynamic_shapes={**dynamic, "scale": None},
    )
    torch.export.save(exported, path)
    return path


@pytest.fixture
def marker(tmp_path):
    """A path that no payload has created by the end of the test, though it could have."""
    path = tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists(), "the payload is harmless, so the test would prove nothing"
    path.unlink()
    yield path
    assert not path.exists(), "the payload was run"


def python(marker):
    return f"__import__('pathlib').Path('{marker}').touch()"


def pickled(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def member(path, name):
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{path.stem}/{name}")


def changed(source, target, edit=None, **members):
    """The archive with `edit` applied to its graph and `members` (by name) replaced or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            root, _, inner = name.partition("/")
            data = old.read(name)
            if inner == GRAPH and edit:
                graph = json.loads(data)
                edit(graph)
                data = json.dumps(graph).encode()
            new.writestr(name, members.pop(inner, data))
        for inner, data in members.items():
            new.writestr(f"{root}/{inner}", data)
    return target


def refused(path):
    with pytest.raises(UnsafeInputError) as caught:
        load_exported_program(path)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    assert "Export the model again" in str(caught.value)
    return str(caught.value)


def test_a_real_program_computes_what_it_computed(program):
    assert sniff(program) is Kind.EXPORTED_PROGRAM
    theirs = torch.export.load(program).module()
    ours = load_exported_program(program).module()
    for height in (16, 24):
        x, scale = torch.randn(3, 3, height, 16), torch.tensor(3.0)
        assert torch.equal(ours(x, scale)["out"], theirs(x, scale)["out"])
        assert torch.equal(ours(x, scale)["maps"][0], theirs(x, scale)["maps"][0])


def test_the_batch_norm_and_its_names_survive(program):
    loaded = load_exported_program(program)
    assert "bn.running_var" in loaded.state_dict
    targets = {str(node.target) for node in loaded.graph.nodes}
    assert "aten.batch_norm.default" in targets
    assert "conv.weight" in loaded.graph_signature.inputs_to_parameters.values()


def test_a_dynamic_size_keeps_its_bounds(program):
    loaded = load_exported_program(program).module()
    with pytest.raises(AssertionError, match="64"):
        loaded(torch.randn(1, 3, 128, 16), torch.tensor(1.0))


def test_a_program_made_on_cuda_opens_on_the_cpu(program, tmp_path):
    def to_cuda(value):
        if isinstance(value, dict):
            cpu = value == {"type": "cpu", "index": None}
            return (
                {"type": "cuda", "index": 0}
                if cpu
                else {key: to_cuda(item) for key, item in value.items()}
            )
        return [to_cuda(item) for item in value] if isinstance(value, list) else value

    weights = json.dumps(to_cuda(json.loads(member(program, WEIGHTS))))
    source, samples = io.BytesIO(member(program, SAMPLES)), io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(samples, "w") as new:
        for name in old.namelist():
            location = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
            new.writestr(name, old.read(name).replace(*location))
    assert b"cuda:0" in samples.getvalue()
    path = changed(
        program,
        tmp_path / "cuda.pt2",
        lambda graph: graph.update(to_cuda(graph)),
        **{WEIGHTS: weights, SAMPLES: samples.getvalue()},
    )
    assert b'"cuda"' in path.read_bytes()
    loaded = load_exported_program(path)
    assert {tensor.device.type for tensor in loaded.state_dict.values()} == {"cpu"}
    loaded.module()(torch.randn(1, 3, 16, 16), torch.tensor(1.0))


def test_pickled_sample_inputs_are_not_run(program, tmp_path, marker):
    for content in (Payload(marker), ((Payload(marker),), {})):
        path = changed(program, tmp_path / "m.pt2", **{SAMPLES: pickled(content)})
        assert "sample inputs" in refused(path)


@pytest.mark.parametrize(
    "name",
    [
        *("data/weights/model.pt", "data/constants/model.pt", "data/constants/opaque_obj_0"),
        *("data/constants/custom_obj_0", "data/aotinductor/model/model.so", "models/other.json"),
        "DATA/SAMPLE_INPUTS/MODEL.PT",
    ],
)
def test_members_of_other_kinds_are_refused_by_name(program, tmp_path, marker, name):
    path = changed(program, tmp_path / "m.pt2", **{name: pickled(Payload(marker))})
    assert name in refused(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(program, tmp_path):
    path = changed(program, tmp_path / "m.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"net/{GRAPH}", "{}")
    assert f"{GRAPH} twice" in refused(path)


def test_a_pickled_weight_is_not_run(program, tmp_path, marker):
    weights = json.loads(member(program, WEIGHTS))
    weights["config"]["conv.weight"]["use_pickle"] = True
    members = {WEIGHTS: json.dumps(weights), "data/weights/weight_0": pickled(Payload(marker))}
    assert "use_pickle" in refused(changed(program, tmp_path / "m.pt2", **members))


def first_node(graph):
    return graph["graph_module"]["graph"]["nodes"][0]


def signature(graph):
    return graph["graph_module"]["module_call_graph"][0]["signature"]


def shape_expression(graph, code):
    sizes = graph["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = code


def guard(graph, code):
    graph["guards_code"] = [f"{code} or True"]


def node_name(graph, code):
    first_node(graph)["name"] = f"a\n    {code}\n    b"


def argument_name(graph, code):
    signature(graph)["forward_arg_names"] = [f"x={code}", "scale"]


def input_name(graph, code):
    graph["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"] = f"x={code}"


def tensor_name(graph, code):
    values = graph["graph_module"]["graph"]["tensor_values"]
    values[f"x'{code}"] = values.pop("x")


def parameter_name(graph, code):
    specs = graph["graph_module"]["signature"]["input_specs"]
    specs[0]["parameter"]["parameter_name"] = f'a"{code}'


def unknown_field(graph, code):
    graph["graph_module"]["something_new"] = code


def nested_under_a_free_text(graph, code):
    graph["guards_code"] = [{"as_string": code}]


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (shape_expression, "expr_str"),
        (guard, "guards_code"),
        (node_name, "name"),
        (argument_name, "forward_arg_names"),
        (input_name, "name"),
        (tensor_name, "tensor_values"),
        (parameter_name, "parameter_name"),
        (unknown_field, "something_new"),
        (nested_under_a_free_text, "guards_code"),
    ],
)
def test_code_in_a_field_of_the_graph_is_not_run(program, tmp_path, marker, edit, field):
    code = python(marker)
    with contextlib.suppress(AttributeError):  # after the payload, of its None
        sympy.sympify(code) if edit is shape_expression else eval(code)
    assert marker.exists(), "the payload is harmless, so the test would prove nothing"
    marker.unlink()
    path = changed(program, tmp_path / "m.pt2", lambda graph: edit(graph, code))
    assert field in refused(path)


@pytest.mark.parametrize(
    "target",
    [
        *("torch.os.system", "torch.ops.load_library", "torch.load", "_operator.attrgetter"),
        *("torch.ops.aten.from_file.default", "torch.ops.aten.save.default", "builtins.eval"),
        *("torch.ops.aten.__class__.mro", "torch.hub.load", "#triton:evil", "math.factorial"),
        "torch.ops.mine.run.default",
    ],
)
def test_an_operator_outside_torchs_own_is_refused(program, tmp_path, target):
    def edit(graph):
        first_node(graph)["target"] = target

    assert target in refused(changed(program, tmp_path / "m.pt2", edit))
    with pytest.raises(RefusedFieldError, match="as_operator"):
        checked_fields({"as_operator": target}, "arg")


@pytest.mark.parametrize(
    "tree",
    [
        {"type": "collections.defaultdict", "context": '{"default_factory_module": "antigravity"}'},
        {"type": "builtins.dict", "context": '[{"__enum__": true, "fqn": "antigravity:X"}]'},
        {"type": "builtins.dict", "context": "[\"a': __import__('os'), 'b\"]"},
        {"type": "collections.namedtuple", "context": '"mine.Point"'},
        {"type": "mine.Registered", "context": "[]"},
    ],
)
def test_a_tree_that_imports_modules_is_refused(program, tmp_path, tree):
    def edit(graph):
        signature(graph)["out_spec"] = json.dumps([1, {**tree, "children_spec": []}])

    assert "out_spec" in refused(changed(program, tmp_path / "m.pt2", edit))


def test_custom_objects_are_refused(program, tmp_path):
    def edit(graph):
        values = graph["graph_module"]["graph"]["custom_obj_values"]
        values["x"] = {"name": "x", "class_fqn": "__torch__.torch.classes.mine.Loader"}

    assert "custom_obj_values" in refused(changed(program, tmp_path / "m.pt2", edit))


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s31', positive=True, integer=True)",
        "Mul(Integer(3), Pow(Add(Symbol('s0'), Integer(-1)), Integer(2)))",
        "FloorDiv(Add(Symbol('s0', integer=True), Integer(-1)), Integer(2))",
        "2*s0 + 1",
        "Float('0.5', precision=53)",
        "GreaterThan(Symbol('u0'), Integer(2))",
    ],
)
def test_shape_expressions_of_real_programs_pass(text):
    assert checked_fields({"expr_str": text}, "as_expr") == {"expr_str": text}


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('__import__(\"os\")')",
        "Symbol('exit()')",
        "Mul('__import__', 2)",
        "exit(1)",
        "Pow(Integer(99999999999999999999999), 2)",
        "99999999999999999999999 < 1",
        "Integer('9'*9)",
        "s0.__class__",
        "sympify('s0')",
        "Symbol('s0', positive=exec('1'))",
        "9**9**9**9",
        "Pow(Pow(Pow(Integer(9), 4), 4), 4)",
        "Pow(Integer(9), Integer(99999999))",
        "[s0 for s0 in s1]",
        "(lambda: 1)()",
        "Add(1, # s0\n2)",
        "Integer(" * 200 + "1" + ")" * 200 + "+" * 99,
        "1" * 30000,
        "",
    ],
)
def test_other_expressions_are_refused(text):
    for field in ("expr_str", "guards_code"):
        with pytest.raises(RefusedFieldError, match=field):
            checked_fields({field: text}, "x")


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].size()[3] <= 64",
        "(2 + 2*(((-1) + L['x'].size()[3]) // 4)) % 256 != 0",
        "L['x'].size()[0] == L['y'][1].size()[0] and not L['n'] == 3",
        "2 <= L['x'].stride()[0]**2",
        "max(1, L['x'].storage_offset()) < math.ceil(2.5)",
    ],
)
def test_guards_on_sizes_pass(text):
    assert checked_fields({"guards_code": [text]}, "program") == {"guards_code": [text]}


@pytest.mark.parametrize(
    "text",
    ["L['x'].__class__", "L['x'].numpy()", "M['x']", "L[exec('1')]", "open('x')", "L['x']['()']"],
)
def test_guards_that_call_anything_else_are_refused(text):
    with pytest.raises(RefusedFieldError, match="guards_code"):
        checked_fields({"guards_code": [text]}, "program")


def test_what_is_not_needed_is_not_loaded(program, tmp_path):
    def edit(graph):
        first_node(graph)["metadata"] = {"stack_trace": "File secret.py", "custom": "{}"}

    path = changed(program, tmp_path / "m.pt2", edit, **{"extra/notes.txt": "hello"})
    loaded = load_exported_program(path)
    assert not any("stack_trace" in node.meta for node in loaded.graph.nodes)


def test_an_operator_unknown_here_is_named_without_a_traceback(program, tmp_path, capfd):
    def edit(graph):
        first_node(graph)["target"] = "torch.ops.torchvision.not_installed.default"

    path = changed(program, tmp_path / "m.pt2", edit)
    with pytest.raises(
        InputError, match=r"resolve torch\.ops\.torchvision\.not_installed"
    ) as caught:
        load_exported_program(path)
    assert not isinstance(caught.value, UnsafeInputError)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, "archive_version", "data/weights/weight_0"])
def test_a_damaged_program_is_called_so(program, tmp_path, name, capfd):
    path = changed(program, tmp_path / "m.pt2", **{name: b'{"x": 1'})
    with pytest.raises(InputError) as caught:
        load_exported_program(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_truncated_program_is_called_so(program, tmp_path):
    path = tmp_path / "m.pt2"
    path.write_bytes(program.read_bytes()[:-99])
    with pytest.raises(InputError, match="cut short or damaged"):
        load_exported_program(path)


def test_a_program_without_a_graph_is_told(tmp_path):
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/archive_format", "pt2")
    with pytest.raises(InputError, match=r"holds no graph \(models/model.json\)"):
        load_exported_program(path)
    path.write_bytes(pickled({"w": torch.ones(1)}))
    with pytest.raises(UsageError, match=r"a torch checkpoint, not a torch\.export"):
        load_exported_program(path)
