"""The report: one dictionary by a shipped schema, and its faces for terminals and for programs."""

import copy
import json
import math
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import onnx_ir as ir
import pytest
from jsonschema import Draft202012Validator
from onnx import TensorProto, helper, numpy_helper
from report_runs import VERBS, made, runs

from bnfold import report
from bnfold.cli import main
from bnfold.report.schema import schema_text
from bnfold.report.verdict import verdict_of
from bnfold.weight_ranges import EMPTY, WeightRange, weight_ranges

__all__ = ["made", "runs"]  # fixtures

SCHEMA = json.loads(schema_text())
VALID = Draft202012Validator(SCHEMA)
OPEN = {("facts",), ("machine",)}  # what a machine is like, in words that differ by machine


@pytest.fixture
def one(runs, made):
    (made / "one.json").write_text(json.dumps(runs["fold"]))
    return made / "one.json"


SLOW = {"doctor", "train"}  # each starts processes, or trains


@pytest.mark.parametrize(
    "verb", [pytest.param(v, marks=pytest.mark.slow) if v in SLOW else v for v in VERBS]
)
@pytest.mark.usefixtures("one")
def test_what_every_verb_prints_is_as_the_schema_says(verb, runs):
    if verb.startswith("pack "):
        assert runs["adapt"], runs["adapt, other"]
    errors = [f"{list(e.absolute_path)}: {e.message}" for e in VALID.iter_errors(runs[verb])]
    assert not errors


def test_every_verb_is_among_them():
    from bnfold.commands import HOMES

    assert set(HOMES) <= {arguments.split()[0] for arguments in VERBS.values()}


def test_the_schema_is_one_and_leaves_nothing_open():
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$defs"]["run"]["properties"]["schema"] == {"const": report.SCHEMA}
    unsaid = [path for path, part in walk(SCHEMA) if loose(part) and path[-1:] not in OPEN]
    assert unsaid == [()]  # the document itself is one of three, each of which says


def walk(part, path=()):
    if isinstance(part, dict):
        yield path, part
        for key, value in part.items():
            yield from walk(value, (*path, key))
    elif isinstance(part, list):
        for value in part:
            yield from walk(value, path)


def loose(part):
    return part.get("type") == "object" and "additionalProperties" not in part


def test_a_misspelt_key_anywhere_is_seen(runs):
    document = runs["verify, wrong"] | {"batch_norms": runs["inspect"]["batch_norms"]}
    document |= {"domains": runs["adapt"]["domains"], "bench": runs["bench"]["bench"]}
    assert VALID.is_valid(document)
    tried = 0
    for path, part in walk(document):
        maps = {"versions", "before", "after", "placed", "machine", "figures"}
        if not part or (path[-1:] and path[-1] in maps | {"noise", "backends"}):
            continue
        if {"backends", "providers", "placed", "machine"} & set(path):
            continue
        spoilt = copy.deepcopy(document)
        held = first_at(spoilt, path)
        key = next(iter(held))
        held[f"{key}s_"] = held.pop(key)
        tried += 1
        assert not VALID.is_valid(spoilt), (path, key)
    assert tried > 12


def first_at(document, path):
    """The first object at a path whose steps leave lists out."""
    for step in path:
        while isinstance(document, list):
            document = document[0]
        document = document[step]
    while isinstance(document, list):
        document = document[0]
    return document


def test_numbers_without_a_word_in_json_are_strings(runs):
    document = copy.deepcopy(runs["verify"])
    document["gates"][0]["value"] = math.inf
    document["proof"]["r"] = np.float32("nan")
    text = report.to_json(document)
    back = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (back["gates"][0]["value"], back["proof"]["r"]) == ("inf", "nan")
    assert VALID.is_valid(back)
    back["proof"]["r"] = "Infinity"
    assert not VALID.is_valid(back)


def test_half_a_surrogate_pair_of_a_file_name_is_written(runs):
    document = copy.deepcopy(runs["verify"])
    document["files"][0]["path"] = "\udce4.onnx"
    assert json.loads(report.to_json(document).encode())["files"][0]["path"] == "\udce4.onnx"
    for suffix in report.SUFFIXES:
        assert report.render(document, Path(f"r{suffix}")).encode()


def test_the_schema_is_printed(capsys):
    assert main(["report", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "kind", "word"),
    [
        ("fold", "good", "PROVED"),
        ("fold, no proof", "plain", "Done"),
        ("verify, wrong", "bad", "NOT the same function"),
        ("fold, not enough", "open", "Not as demanded"),
        ("unreadable", "open", "Ended in an error"),
    ],
)
def test_a_run_comes_to_a_word(verb, kind, word, runs):
    verdict = verdict_of(runs[verb])
    assert (verdict.kind, verdict.word) == (kind, word)


def test_an_original_that_is_no_measure_proves_nothing(runs):
    run = copy.deepcopy(runs["verify"])
    run["gates"][-1] |= {"gate": "B", "name": "original", "passed": False}
    assert verdict_of(run).word == "NOT PROVED"


# --- text and Markdown ----------------------------------------------------------------------------


FULL = {
    "profile": {
        "inputs": "normal",
        "unit": 6e-8,
        "layers": [
            {"norm": f"bn{i}", "value": "v", "original": 1e-7, "folded": 1e-7 * i, "exact": None,
             "ratio": float(i)}
            for i in range(1, 10)
        ],
    },
    "cause": {"norm": "bn7", "sentence": "eps is missing.", "fault": "eps"},
    "runtimes": [{"name": "ort-cuda:tf32", "gate": "C", "ratio": 1500.0, "noise": 0.0,
                  "providers": {"CUDAExecutionProvider": {"Conv": 3}}, "libraries": ["cudnn"]}],
}  # fmt: skip


def test_text_is_short_and_whole_when_asked(runs):
    run = runs["verify"] | FULL
    short, long = report.to_text(run), report.to_text(run, verbose=True)
    assert "CUDAExecutionProvider 3" in short
    assert "eps is missing." in short
    assert "bn9 " in short
    assert "bn1 " not in short
    assert "Error by layer (5 of 9, -v shows all):" in short
    assert "bn1 " in long
    assert short.endswith(run["summary"])


def test_markdown_holds_every_table_and_no_markup_of_a_name(runs):
    run = copy.deepcopy(runs["fold"])
    run["batch_norms"]["folded"][0]["name"] = "a|b`<img src=x>\n# c\u202e_d_"
    text = report.to_markdown(run)
    assert "a\\|b\\`&lt;img src=x&gt; # c\\\\u202e\\_d\\_" in text
    for title in ("Batch norms", "Operators", "Weights", "Proof", "Files"):
        assert f"## {title}" in text
    run["weights"] *= 10
    rows = len(run["weights"])
    assert f"<details><summary>{rows} rows</summary>" in report.to_markdown(run)


def test_github_appends_to_the_jobs_summary(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n")
    for _ in range(2):
        assert main(["inspect", str(made / "net.onnx"), "--github", "-q"]) == 0
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("before\n")
    assert text.count("# bnfold inspect") == 2
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    capsys.readouterr()
    assert main(["inspect", str(made / "net.onnx"), "--github", "--json"]) == 2
    assert "$GITHUB_STEP_SUMMARY" in json.loads(capsys.readouterr().out)["error"]["message"]


# --- JUnit ----------------------------------------------------------------------------------------

COUNTS = ("tests", "failures", "errors", "skipped")


def unlike_junit(text):
    """What is not as Ant began it and Jenkins reads it."""
    root = ET.fromstring(text)
    wrong = [] if root.tag == "testsuites" else [root.tag]
    for suite in root:
        cases = suite.findall("testcase")
        seen = (
            len(cases),
            sum(case.find("failure") is not None for case in cases),
            sum(case.find("error") is not None for case in cases),
            sum(case.find("skipped") is not None for case in cases),
        )
        said = tuple(int(suite.get(name, "-1")) for name in COUNTS)
        order = [child.tag for child in suite]
        wrong += [f"{said} but {seen}"] if said != seen else []
        wrong += [] if suite.tag == "testsuite" and suite.get("name") else ["a suite's name"]
        wrong += [] if float(suite.get("time", "nan")) >= 0 else ["time"]
        wanted = sorted(order, key=["properties", "testcase", "system-out"].index)
        wrong += [] if order == wanted else [f"order {order}"]
        for case in cases:
            wrong += [] if case.get("name") and case.get("classname") else ["a case's name"]
            wrong += [bad.tag for bad in case if not (bad.get("message") and bad.get("type"))]
            wrong += [bad.tag for bad in case if bad.tag not in ("failure", "error", "skipped")]
    sums = tuple(sum(int(s.get(name)) for s in root) for name in COUNTS)
    return wrong + ([] if sums == tuple(int(root.get(n)) for n in COUNTS) else ["sums"])


def test_junit_has_a_case_for_each_gate_result(runs):
    verbs = ("verify", "verify, wrong", "inspect", "unreadable", "fold, not enough")
    text = report.render([runs[verb] for verb in verbs], Path("r.xml"))
    assert unlike_junit(text) == []
    good, wrong, plain, error, demand = ET.fromstring(text)
    assert len(good) - 2 == len(runs["verify"]["gates"])
    failed = [gate["sentence"] for gate in runs["verify, wrong"]["gates"] if not gate["passed"]]
    assert [bad.get("message") for bad in wrong.iter("failure")] == failed
    assert failed
    assert (plain.get("tests"), plain.get("failures")) == ("1", "0")
    assert error.find("testcase/error").get("type") == "InputError"
    assert demand.get("failures") == "1"
    assert unlike_junit(text.replace('failures="0"', 'failures="1"', 1))
    assert unlike_junit(text.replace("<error message", "<error text"))


def test_junit_takes_any_name(runs):
    run = copy.deepcopy(runs["verify, wrong"])
    run["gates"][0] |= {"subject": 'a"<b>\x00\x1b\u202e\ud800', "sentence": "]]>&\x07"}
    text = report.render(run, Path("r.xml"))
    assert unlike_junit(text) == []
    case = ET.fromstring(text).find("testsuite/testcase")
    assert case.get("name").startswith('a"<b>\\x00\\x1b\\u202e\\ud800: ')


# --- files ----------------------------------------------------------------------------------------


def test_several_files_each_in_its_format(made, tmp_path, capsys):
    files = [tmp_path / f"r{suffix}" for suffix in (".html", ".md", ".xml", ".json", ".txt")]
    options = [word for path in files for word in ("--report", str(path))]
    assert main(["inspect", str(made / "net.onnx"), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "r.json").read_text())
    starts = ("<!DOCTYPE html>", "# bnfold", "<?xml", "{", "Batch norms:")
    for path, start in zip(files, starts, strict=True):
        assert path.read_text().startswith(start)


def test_an_error_replaces_the_last_runs_report(made, tmp_path, capsys):
    path, page = tmp_path / "r.xml", tmp_path / "r.html"
    path.write_text("<testsuites/>")
    argv = ["verify", str(made / "net.onnx"), str(tmp_path / "none.onnx"), "--json"]
    assert main([*argv, "--report", str(path), "--report", str(page)]) == 3
    said = json.loads(capsys.readouterr().out)
    assert VALID.is_valid(said)
    assert said["error"]["code"].startswith("E_")
    assert unlike_junit(path.read_text()) == []
    assert ET.parse(path).find("testsuite/testcase/error") is not None
    assert "Ended in an error" in page.read_text()


def test_a_reader_that_goes_away_leaves_the_exit_code_and_the_report(made, tmp_path, monkeypatch):
    class Gone:
        def write(self, _):
            raise BrokenPipeError

    gone = []
    monkeypatch.setattr("bnfold.cli._no_reader", lambda: gone.append(True))
    monkeypatch.setattr("sys.stdout", Gone())
    argv = ["verify", str(made / "net.onnx"), str(made / "wrong.onnx"), "-q"]
    assert main([*argv, "--report", str(tmp_path / "r.json")]) == 1
    assert json.loads((tmp_path / "r.json").read_text())["exit_code"] == 1
    assert gone


# --- several runs ---------------------------------------------------------------------------------


def test_several_runs_on_one_page(runs, tmp_path, capsys):
    verbs = ("fold", "adapt", "adapt, other", "verify, wrong")
    files = []
    for index, verb in enumerate(verbs):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps(runs[verb]))
    pages = [tmp_path / name for name in ("all.html", "all.json", "all.xml", "all.md")]
    options = [word for path in pages for word in ("-o", str(path))]
    assert main(["report", *map(str, files), *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "adapt: PROVED, verify: NOT the same function." in told["summary"]
    assert [file["role"] for file in told["files"]] == ["run"] * 4 + ["page"] * 4
    together = json.loads(pages[1].read_text())
    assert VALID.is_valid(together)
    assert together["runs"] == [runs[verb] for verb in verbs]
    assert len(ET.parse(pages[2]).getroot()) == 4
    assert main(["report", str(pages[1]), "-o", str(tmp_path / "again.xml"), "-q"]) == 0
    assert (tmp_path / "again.xml").read_text() == pages[2].read_text()


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("not json", 3, "it is no JSON"),
        ("[1]", 3, "is no report"),
        ('{"schema": 2, "summary": ""}', 3, "upgrade"),
        ('{"schema": 1, "summary": "", "comand": "fold"}', 3, "is no report"),
        ('{"error": {"type": "x", "message": "<b>", "exit_code": 3}}', 0, ""),
        ("[" * 100_000, 3, "it is no JSON"),
    ],
)
def test_what_is_no_report_is_refused(content, code, words, tmp_path, capsys):
    (tmp_path / "a.json").write_text(content)
    assert main(["report", str(tmp_path / "a.json"), "-o", str(tmp_path / "p.html")]) == code
    assert words in capsys.readouterr().err
    assert (tmp_path / "p.html").exists() == (code == 0)


def test_a_page_needs_runs_a_name_and_replaces_none(one, tmp_path):
    for argv in ([], [str(one)], [str(one), "-o", str(one)], [str(one), "-o", "x.exe"]):
        assert main(["report", *argv]) == 2
    assert main(["report", str(tmp_path / "none.json"), "-o", str(tmp_path / "p.md")]) == 3
    assert json.loads(one.read_text())


# --- weight ranges --------------------------------------------------------------------------------


def test_a_range_is_of_output_channels():
    weight = np.array([[1.0, -8.0], [2.0, 0.5], [4.0, 0.0], [0.0, 8 * EMPTY / 2]], np.float32)
    found = WeightRange.of(weight)
    assert (found.min, found.max, found.smallest, found.spread, found.empty) == (-8, 4, 2, 2, 1)
    assert WeightRange.of(np.zeros((2, 3), np.float32)).spread == 0


def test_weights_of_every_kind_are_read_by_output_channel():
    rng = np.random.default_rng(0)
    peaks = np.array([1.0, 2.0, 4.0, 16.0], np.float32)  # of the output channels; spread 16 / 3
    base = np.sign(rng.normal(size=(4, 6)).astype("f4")) * peaks[:, None]
    weights = {
        "conv": ("Conv", base.reshape(4, 6, 1, 1), {}),
        "deconv": ("ConvTranspose", base.T.reshape(6, 4, 1, 1), {}),
        "grouped": ("ConvTranspose", transposed_groups(base), {"group": 2}),
        "gemm": ("Gemm", base, {"transB": 1}),
        "gemm_t": ("Gemm", base.T, {}),
        "matmul": ("MatMul", base.T, {}),
    }
    nodes = [
        helper.make_node(op, [f"x_{name}", name], [f"y_{name}"], **attributes)
        for name, (op, _, attributes) in weights.items()
    ]
    inputs = [helper.make_tensor_value_info(n.input[0], TensorProto.FLOAT, None) for n in nodes]
    outputs = [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, None) for n in nodes]
    held = [numpy_helper.from_array(np.ascontiguousarray(w), n) for n, (_, w, _) in weights.items()]
    model = ir.from_proto(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, held)))
    rows = weight_ranges(model, model)
    assert [row["name"] for row in rows] == list(weights)
    for row in rows:
        assert row["before"] == row["after"]
        assert row["after"]["spread"] == pytest.approx(16 / 3), row
        assert row["after"]["smallest"] == 1


def transposed_groups(base):
    """A weight (C_in, C_out / 2, 1, 1) of two groups whose output channels have the rows' peaks."""
    first, second = base[:2].T, base[2:].T
    return np.concatenate([first, second]).reshape(12, 2, 1, 1)


def test_a_fold_says_how_the_ranges_moved(runs):
    rows = runs["fold"]["weights"]
    assert all(row["before"] and row["after"] for row in rows)
    assert any(row["before"] != row["after"] for row in rows)
