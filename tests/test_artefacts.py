"""The trained files of models/ are those of its README: their bytes, their accuracy, their fold."""

import importlib.util
import shutil

import pytest
import torch
from conftest import ROOT

spec = importlib.util.spec_from_file_location("train_models", ROOT / "scripts/train_models.py")
train_models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_models)

README = (ROOT / "models" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", train_models.COMMANDS)
def test_a_trained_file_is_the_one_its_row_speaks_of(name):
    """Hash, size and command; folded, proved, and both as accurate as the row says."""
    assert train_models.row(name) in README.splitlines()


def test_the_readme_lists_every_file_and_all_are_small():
    files = sorted((ROOT / "models").glob("*.pt"))
    assert [file.name for file in files] == sorted(train_models.COMMANDS)
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 1e6
    assert sum(sizes) < 4e6
    for path in (ROOT / "models").glob("*.py"):
        assert f"| `{path.name}` |" in README


def test_a_row_tells_another_file(monkeypatch, tmp_path):
    name = "digits_cnn_mean-only.pt"
    file = tmp_path / name
    shutil.copy(ROOT / "models" / name, file)
    monkeypatch.setattr(train_models, "FOLDER", tmp_path)
    assert train_models.row(name) in README.splitlines()
    content = torch.load(file, weights_only=True)
    content["state_dict"]["fc2.bias"][3] += 1000  # everything is a three
    torch.save(content, file)
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    said, found = (line.strip("| ").split(" | ") for line in (row, train_models.row(name)))
    _, _, accuracy, _, digest = range(5)
    assert said[digest] != found[digest]
    assert float(said[accuracy]) > float(found[accuracy]) + 20
