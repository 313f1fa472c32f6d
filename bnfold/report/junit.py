"""The report as JUnit XML, which CI servers list: one test case for each result of a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from bnfold.report.facts import all_printable


def to_junit(runs: Sequence[Mapping[str, Any]]) -> str:
    """A document of one suite for each run, in the form that Ant began and Jenkins reads.

    A run without gates is one case, that it ended well; what ended in an error is an `error`.
    """
    suites = [_suite(all_printable(run)) for run in runs]
    root = ET.Element("testsuites")
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    root.extend(suites)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(run: Mapping[str, Any]) -> ET.Element:
    command = run.get("command") or "bnfold"
    cases = _cases(run, command)
    failures, errors = (sum(case.find(what) is not None for case in cases) for what in _BAD)
    suite = ET.Element("testsuite", name=_name(run, command), tests=str(len(cases)))
    suite.set("failures", str(failures))
    suite.set("errors", str(errors))
    suite.set("skipped", "0")
    suite.set("time", f"{float(run.get('seconds', 0.0)):.3f}")
    if run.get("versions"):
        properties = ET.SubElement(suite, "properties")
        for name, version in run["versions"].items():
            ET.SubElement(properties, "property", name=name, value=version)
    suite.extend(cases)
    said = [run.get("summary", ""), *run.get("notes", ()), *run.get("warnings", ())]
    ET.SubElement(suite, "system-out").text = "\n".join(line for line in said if line)
    return suite


_BAD = ("failure", "error")


def _cases(run: Mapping[str, Any], command: str) -> list[ET.Element]:
    """The gates' results; beside them, or without any, the run itself where it did not end well."""
    cases = [
        _case(
            f"bnfold.{command}.{gate['gate']}",
            f"{gate['subject']}: {gate['name']}",
            None if gate["passed"] else ("failure", f"gate {gate['gate']}", gate["sentence"]),
        )
        for gate in run.get("gates") or ()
    ]
    error = run.get("error")
    told = any(case.find("failure") is not None for case in cases)
    if error and "summary" not in run:
        kind = "failure" if error["exit_code"] == 1 else "error"
        cases.append(_case(f"bnfold.{command}", "run", (kind, error["type"], error["message"])))
    elif not cases or (run["exit_code"] and not told):
        bad = ("failure", "exit code", run["summary"]) if run["exit_code"] else None
        cases.append(_case(f"bnfold.{command}", "run", bad))
    return cases


def _case(group: str, name: str, bad: tuple[str, str, str] | None) -> ET.Element:
    case = ET.Element("testcase", classname=group.replace(" ", "."), name=name, time="0")
    if bad is not None:
        what, kind, sentence = bad
        ET.SubElement(case, what, message=sentence, type=kind).text = sentence
    return case


def _name(run: Mapping[str, Any], command: str) -> str:
    """The command and the file that it was about."""
    files = run.get("files") or ()
    return f"bnfold {command} {Path(files[0]['path']).name}" if files else f"bnfold {command}"
