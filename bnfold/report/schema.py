"""The report's JSON Schema, as shipped, and reports read back from files."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from bnfold.errors import InputError
from bnfold.report.facts import SCHEMA

LARGEST = 256 << 20  # bytes of a report that is read


def schema_text() -> str:
    """The JSON Schema of what `--json` prints."""
    return resources.files(__package__).joinpath("schema.json").read_text("utf-8")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs in a file that `--json` or `--report FILE.json` wrote.

    Raises InputError for a file that is none.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} is larger than any report; is it one?")
        # an integer that no float holds is a number that no report has
        document = json.loads(
            path.read_text("utf-8"), parse_int=lambda s: int(s) if len(s) < 19 else float(s)
        )
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise InputError(f"{path} cannot be read as a report: {reason}.") from error
    version = document.get("schema") if isinstance(document, dict) else None
    if isinstance(version, int) and version > SCHEMA:
        raise InputError(
            f"{path} is a report of schema {version}, and this bnfold reads {SCHEMA}; upgrade it."
        )
    fault = _fault(document)
    if fault:
        raise InputError(f"{path} is no report of bnfold's (`--json` prints one): {fault}.")
    runs: list[dict[str, Any]] = document.get("runs", [document])
    return runs


def _fault(document: Any) -> str | None:
    """What is wrong with a document by the schema, or None."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    found = best_match(Draft202012Validator(json.loads(schema_text())).iter_errors(document))
    if found is None:
        return None
    where = "/".join(str(step) for step in found.absolute_path)
    told = " ".join(str(found.message).split())[:200]
    return f"at '{where}', {told}" if where else told
