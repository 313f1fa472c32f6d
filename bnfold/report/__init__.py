"""One report, many faces: a dictionary of plain values, and what is made of it.

A verb fills the dictionary (schema.json says with what); a face shows it: `text` in the terminal,
JSON for programs, `markdown` for a pull request, `junit` for a CI server, `html` for people.
"""

from __future__ import annotations

from bnfold.jsonable import plain
from bnfold.report.faces import SUFFIXES, check_face, pictured, render
from bnfold.report.facts import SCHEMA, printable, sha256, to_json, versions
from bnfold.report.markdown import to_markdown
from bnfold.report.publishing import Reports, write_text
from bnfold.report.text import to_text

__all__ = [
    "SCHEMA",
    "SUFFIXES",
    "Reports",
    "check_face",
    "pictured",
    "plain",
    "printable",
    "render",
    "sha256",
    "to_json",
    "to_markdown",
    "to_text",
    "versions",
    "write_text",
]
