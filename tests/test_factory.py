"""Specs become the user's callables, and the user's mistakes become sentences with a line."""

import sys
import types

import pytest
import torch
from torch import nn

from bnfold.errors import InputError, RuntimeUnavailableError, UsageError
from bnfold.reading.factory import build_module, resolve_factory

NETS = """
from torch import nn
from layers import WIDTH

def net():
    return nn.Linear(WIDTH, 2)

def wide(width):
    return nn.Linear(width, width)

def lazy():
    from later import SIZE
    return nn.Linear(SIZE, SIZE)

def broken():
    return {}["no such key"]

def leaves():
    raise SystemExit("bye")

def number():
    return 3

def own_error():
    from bnfold.errors import InputError
    raise InputError("said by the user's code")

class Zoo:
    @staticmethod
    def small():
        return nn.Linear(1, 1).train()

built = nn.Linear(1, 1)
PLAIN = 3
"""


@pytest.fixture
def nets(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "layers.py").write_text("WIDTH = 5\n")
    (tmp_path / "later.py").write_text("SIZE = 7\n")
    yield tmp_path / "nets.py"
    for name in ("layers", "later", "mine", "mine.nets"):
        sys.modules.pop(name, None)


def test_a_file_finds_its_neighbours_when_imported_and_when_called(nets):
    before = list(sys.path)
    assert build_module(f"{nets}:net").in_features == 5
    assert build_module(f"{nets}:lazy").in_features == 7
    assert sys.path == before


def test_a_dotted_name_reaches_into_a_class(nets):
    module = build_module(f"{nets}:Zoo.small")
    assert module.in_features == 1
    assert module.training


def test_a_module_is_found_in_the_current_folder(nets, monkeypatch):
    package = nets.parent / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text("from torch import nn\ndef net(): return nn.Linear(2, 2)\n")
    monkeypatch.chdir(nets.parent)
    assert build_module("mine.nets:net").in_features == 2
    with pytest.raises(UsageError, match=r"no module mine\.nest in .*; did you mean mine\.nets\?"):
        resolve_factory("mine.nest:net")
    with pytest.raises(UsageError, match=r"no module mien in .*; did you mean mine\?"):
        resolve_factory("mien.nets:net")


def test_arguments_and_signature_pass_through(nets):
    assert resolve_factory(f"{nets}:wide")(4).in_features == 4


def test_a_file_runs_again_when_it_changed(tmp_path):
    path = tmp_path / "net.py"
    path.write_text("def size(): return 1\n")
    assert resolve_factory(f"{path}:size")() == 1
    assert (
        resolve_factory(f"{path}:size").__wrapped__ is resolve_factory(f"{path}:size").__wrapped__
    )
    path.write_text("def size(): return 22\n")
    assert resolve_factory(f"{path}:size")() == 22


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("resnet20", "names no factory; write pkg.mod:factory"),
        ("{folder}/nets.py", "names no factory"),
        (":net", "names no factory"),
        ("{folder}/ntes.py:net", "nets.py?"),
        ("{folder}/nets.py:nte", "has no 'nte'; did you mean net?"),
        ("{folder}/nets.py:PLAIN", "is a int, which cannot be called"),
        (".a:net", "is no module name"),
        ("{folder}/nets.py:wide", "(it needs width)"),
        ("{folder}/nets.py:number", "returned a int; it must return an nn.Module"),
        ("{folder}/nets.py:built", "name a function that builds and returns it"),
        ("{folder}/nets.py:broken", "failed with KeyError: 'no such key', at {folder}/nets.py"),
        ("{folder}/nets.py:leaves", "failed with SystemExit: bye, at {folder}/nets.py"),
    ],
)
def test_a_wrong_spec_is_one_sentence(nets, spec, sentence):
    with pytest.raises(UsageError) as caught:
        build_module(spec.format(folder=nets.parent))
    assert caught.value.exit_code == 2
    assert sentence.format(folder=nets.parent) in str(caught.value)


def test_an_error_names_the_users_line_and_keeps_its_cause(nets):
    with pytest.raises(UsageError) as caught:
        build_module(f"{nets}:broken")
    line = NETS.splitlines().index('    return {}["no such key"]') + 1
    assert f"{nets}, line {line}" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_inside_a_library_names_the_users_line(tmp_path):
    path = tmp_path / "net.py"
    path.write_text("from torch import nn\ndef net():\n    return nn.Conv2d(3, 4, 3, groups=2)\n")
    with pytest.raises(
        UsageError, match=r"ValueError: .*divisible by groups, at .*net\.py, line 3"
    ):
        build_module(f"{path}:net")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def net(:\n", "SyntaxError"),
        ("x = 1\nimport no_such_package\n", "No module named 'no_such_package', at {path}, line 2"),
        ("from . import layers\n", "Name the file as part of its package instead"),
        ("raise ValueError\n", "failed with ValueError, at {path}, line 1"),
    ],
)
def test_a_file_that_does_not_import_says_where(tmp_path, text, sentence):
    path = tmp_path / "net.py"
    path.write_text(text)
    before = set(sys.modules)
    with pytest.raises(UsageError) as caught:
        resolve_factory(f"{path}:net")
    assert sentence.format(path=path) in str(caught.value)
    assert str(path) in str(caught.value)
    assert not {name for name in set(sys.modules) - before if name.startswith("net_")}


def test_bnfolds_own_errors_pass_unchanged(nets):
    with pytest.raises(InputError, match="said by the user's code"):
        build_module(f"{nets}:own_error")


def test_torchscript_is_no_module_to_fold(tmp_path):
    (tmp_path / "net.py").write_text(
        "import warnings, torch\n"
        "def net():\n"
        "    with warnings.catch_warnings():\n"
        "        warnings.simplefilter('ignore')\n"
        "        return torch.jit.script(torch.nn.Linear(1, 1))\n"
    )
    with pytest.raises(UsageError, match="returned TorchScript"):
        build_module(f"{tmp_path / 'net.py'}:net")


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_missing_collection_says_how_to_install_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeUnavailableError, match=f"pip install {name}") as caught:
        build_module(f"{name}:resnet18")
    assert caught.value.exit_code == 4


def test_collections_build_without_downloads(monkeypatch):
    """Stand-ins with the functions that the two packages document."""

    def fcn(*, weights="downloaded", weights_backbone="downloaded"):
        assert weights is None
        assert weights_backbone is None
        return nn.Linear(1, 1)

    def net(*, weights="downloaded"):
        assert weights is None
        return nn.Linear(2, 2)

    builders = {"fcn": fcn, "net": net}
    models = types.ModuleType("torchvision.models")
    models.list_models = lambda: list(builders)
    models.get_model_builder = builders.__getitem__
    models.get_model = lambda name, **options: builders[name](**options)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    assert build_module("torchvision:fcn").in_features == 1
    assert build_module("torchvision:net").in_features == 2
    with pytest.raises(UsageError, match=r"no model 'nett'; did you mean net\?"):
        build_module("torchvision:nett")

    timm = types.ModuleType("timm")
    timm.list_models = lambda: ["resnet18"]
    timm.create_model = lambda _, pretrained: None if pretrained else nn.Linear(3, 3)
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert isinstance(build_module("timm:resnet18"), torch.nn.Linear)
    with pytest.raises(UsageError, match=r"did you mean resnet18\?"):
        build_module("timm:resnet81")
