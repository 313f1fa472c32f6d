"""The architecture's import rules, held against the sources."""

import ast
import re
from pathlib import Path

import pytest

import bnfold

ROOT = Path(bnfold.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def imports(path, *, at_top):
    """The modules that a file imports; those at its top level only, if asked."""
    tree = ast.parse(path.read_text())
    found = set()
    nodes = tree.body if at_top else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "bnfold":
                found |= {f"bnfold.{alias.name}" for alias in node.names}
    return found


def inside(folder):
    return [path for path in FILES if path.relative_to(ROOT).parts[0] == folder]


def uses(path, name, *, at_top=False):
    return any(re.match(rf"{name}(\.|$)", found) for found in imports(path, at_top=at_top))


@pytest.mark.parametrize("path", inside("proof"), ids=lambda path: path.name)
def test_the_proof_shares_nothing_with_the_folder(path):
    assert not uses(path, "bnfold.folding")
    assert not uses(path, "bnfold.graph")


@pytest.mark.parametrize(
    "path",
    [p for p in inside("folding") if p.name not in ("module.py", "program.py", "torch_undo.py")]
    + [ROOT / "graph.py"],
    ids=lambda path: path.name,
)
def test_the_algebra_needs_no_torch(path):
    assert not uses(path, "torch", at_top=True)
    assert not uses(path, "bnfold.proof")


@pytest.mark.parametrize("name", ["cli.py", "errors.py", "__init__.py"])
def test_what_help_needs_is_light(name):
    heavy = ("numpy", "onnx", "onnx_ir", "torch", "onnxruntime")
    assert not any(uses(ROOT / name, module, at_top=True) for module in heavy)


def test_onnxruntime_is_used_in_one_place():
    users = [path.name for path in FILES if uses(path, "onnxruntime")]
    assert users == ["runtime.py"]


def test_every_file_opens_with_its_idea():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_page_names_every_file_of_the_house():
    page = (ROOT.parent / "ARCHITECTURE.md").read_text()
    for path in FILES:
        if path.name not in ("__init__.py", "__main__.py"):
            named = re.search(rf"\b{path.stem}\b", page)
            folder = f"{path.parent.relative_to(ROOT)}/" in page
            assert named or folder, path


def rows_of_the_page():
    """The files and folders of each row of the table, from above."""
    page = (ROOT.parent / "ARCHITECTURE.md").read_text()
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    return [re.findall(r"`([a-z_/]+(?:\.py|/))`", cell) for cell in cells]


def row_of(module, rows):
    """The row of a module (bnfold.folding.plan): that of its file, else that of its folder."""
    path = module.removeprefix("bnfold.").replace(".", "/")
    found = [
        (len(name), at)
        for at, names in enumerate(rows)
        for name in names
        if name == f"{path}.py" or (name.endswith("/") and f"{path}/".startswith(name))
    ]
    assert found, f"{module} has no row"
    return max(found)[1]


def imports_from_below(path, rows):
    """The imports at the top of a file that stand in a lower row than the file's own."""
    name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    return [
        module
        for module in imports(path, at_top=True)
        if module.startswith("bnfold.") and row_of(module, rows) > row_of(name, rows)
    ]


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.parent != ROOT or p.name not in ("__init__.py", "__main__.py")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_file_imports_only_from_the_rows_above(path):
    assert not imports_from_below(path, rows_of_the_page())


def test_an_import_from_below_would_be_seen():
    rows = rows_of_the_page()[::-1]
    assert imports_from_below(ROOT / "folding" / "plan.py", rows)


def test_the_public_names_are_what_is_visible():
    assert dir(bnfold) == bnfold.__all__ == sorted(bnfold.__all__)
    for name in bnfold.__all__:
        assert callable(getattr(bnfold, name))


def test_an_import_of_the_folder_in_the_proof_would_be_seen(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from bnfold.folding import plan\nimport bnfold.graph\n")
    assert uses(bad, "bnfold.folding")
    assert uses(bad, "bnfold.graph")
