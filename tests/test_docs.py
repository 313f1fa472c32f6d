"""The README tells the truth: its Python runs, its verbs and options exist."""

import re
from pathlib import Path

from bnfold.parser import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def verbs():
    actions = build_parser()._subparsers._group_actions
    return actions[0].choices


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_commands_of_the_readme_parse():
    lines = re.findall(r"^(?:\$ )?bnfold (.+?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    assert len(lines) > 8
    for line in lines:
        build_parser().parse_args(line.split())


def test_every_verb_is_in_the_readme():
    assert all(f"bnfold {verb}" in README for verb in verbs())


def test_every_option_has_a_help_text():
    for name, parser in verbs().items():
        for action in parser._actions:
            assert action.help, (name, action.dest)
