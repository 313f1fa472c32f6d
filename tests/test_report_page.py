"""The report's page: no name becomes markup, and a browser shows it, wide and narrow."""

import copy
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
from pages import Page, chromium, faults, measured, screenshot
from PIL import Image
from report_runs import made, runs
from test_report import FULL, VALID

from bnfold.cli import main
from bnfold.report import drawing, html, render
from bnfold.report.drawing import LinearAxis, LogAxis, Series

__all__ = ["chromium", "made", "runs"]  # fixtures

WIDE, NARROW = 1400, 390
HOSTILE = (
    "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>"
    "\"' onmouseover='alert(3)' &lt;b&gt;\x00\x1b[31m\u202egnp.exe\n{{ 7 * 7 }}"
)


@pytest.fixture(scope="module")
def rich(runs):
    """A run with every part that a page can show."""
    run = copy.deepcopy(runs["fold"]) | copy.deepcopy(FULL)
    run["batch_norms"] = copy.deepcopy(runs["inspect"]["batch_norms"])
    run["bench"] = copy.deepcopy(runs["bench"]["bench"])
    for part in ("domains", "layers", "diagnostics"):
        run[part] = copy.deepcopy(runs["adapt"][part])
    run["proof"]["decisions"] = [
        {"backend": "ort-cpu", "output": "y", "rows": 9, "flips": 1, "outside": 1}
    ]
    run["merged"] = [{"sum": "add", "into": "conv", "layers": ["branch"]}]
    run |= {"warnings": ["a warning"], "notes": ["a note"], "skipped": []}
    run["skipped"] = [{"name": "bn", "reason": "asked for"}]
    return run


def spoilt(value, key=""):
    """The same report with a hostile text in the place of each name and sentence."""
    if isinstance(value, dict):
        return {k: spoilt(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [spoilt(v, key) for v in value]
    kept = key in ("command", "sha256", "gate", "role") or not isinstance(value, str)
    return value if kept or re.fullmatch(r"-?inf|nan", value) else f"{value}{HOSTILE}"


def test_a_page_says_all_that_a_run_found(rich):
    page = Page(html.to_html([rich]))
    assert page.wrong == page.open == []
    for words in (
        *("PROVED", "Gates", "Runtimes", "Error by layer", "Batch norms", "Operators"),
        *("Weight ranges", "Domains", "Latency", "Layers", "Notes", "a note", "a warning"),
        *("CUDAExecutionProvider", "eps is missing.", "another than in float64 in 1 of 9 rows"),
        *(file["sha256"] for file in rich["files"]),
        *(norm["reason"] for norm in rich["batch_norms"]["kept"]),
        *(norm["name"] for norm in rich["batch_norms"]["folded"]),
        *(row["name"] for row in rich["weights"]),
    ):
        assert " ".join(words.split()) in page.said
    for picture in ("line folded", "bar after", "dot after", "limit", "one"):
        assert any(name == "class" and value == picture for _, name, value in page.attributes)


@pytest.mark.parametrize("several", [1, 2])
def test_no_name_becomes_markup_or_turns_the_text_around(rich, several):
    run = spoilt(rich)
    text = html.to_html([run] * several)
    assert faults(text) == []
    page = Page(text)
    assert "<script>alert(1)</script>" in page.said  # as text
    assert "\\u202egnp.exe" in page.said
    assert "{{ 7 * 7 }}" in page.said
    titles = re.findall(r"<title>(.*?)</title>", text, re.S)
    assert len(titles) > 30  # of the pictures' marks
    assert all("<" not in title for title in titles)


ODD = (
    *("inf", "-inf", "nan", "", "1", 0, -1, 1, 0.0, -0.0, -3.5, 1e308, 5e-324, 1e-300, 10**18),
    *(None, True, [], {}, ["inf", "nan"], [-1, 1e308], "x" * 5000, "\ud800", "\x00\u202e<b>'\""),
)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_whatever_the_schema_lets_through_has_every_face(rich, count):
    rng = random.Random(0)
    tried = 0
    while tried < count:
        run = copy.deepcopy(rich)
        for _ in range(rng.choice((1, 1, 3))):
            spoil(run, rng)
        if not VALID.is_valid(run):
            continue
        tried += 1
        assert faults(html.to_html([run])) == []
        for suffix in (".md", ".xml", ".json", ".txt"):
            assert render(run, Path(f"r{suffix}")).encode()


def spoil(document, rng):
    """Put something odd in the place of any value, however deep."""
    held, key = {"": document}, ""
    while isinstance(held[key], dict | list) and held[key] and (key == "" or rng.random() < 0.85):
        held = held[key]
        key = rng.choice(list(held) if isinstance(held, dict) else range(len(held)))
    if key != "":
        held[key] = copy.deepcopy(rng.choice(ODD))


def test_what_would_be_wrong_with_a_page_is_seen(rich, monkeypatch):
    good = html.to_html([rich])
    assert faults(good) == []
    for bad in (
        good.replace("<h1>", "<h1><b>"),
        good.replace("</main>", "<script>1</script></main>"),
        good.replace("</main>", "<p onclick='1'></p></main>"),
        good.replace("</main>", "<a href='http://example.org'></a></main>"),
        good.replace("</style>", "p { background: url(x) }</style>"),
        good.replace("</main>", "\u202e</main>"),
    ):
        assert faults(bad)
    made = html._template()
    monkeypatch.setattr(html, "_template", lambda: made.environment.overlay(autoescape=False))
    raw = made.environment.overlay(autoescape=False).from_string("{{ x }}").render(x=HOSTILE)
    assert faults(raw)


@pytest.mark.parametrize(
    "verb",
    ["fold", "fold, no proof", "inspect", "unfold", "export", "verify, wrong", "pack diff",
     "pack show", "bench", "unreadable", "usage", "fold, not enough"],
)  # fmt: skip
def test_every_verbs_run_has_a_page(verb, runs):
    if verb.startswith("pack"):
        assert runs["adapt"], runs["adapt, other"]
    run = runs[verb]
    text = html.to_html([run])
    assert faults(text) == []
    said = run.get("summary") or run["error"]["message"]
    said = said.removeprefix("NOT the same function. ")  # the heading says so
    assert " ".join(said.replace("`", " ").split()) in Page(text).said


def test_a_page_of_a_failure_shows_where(runs):
    run = copy.deepcopy(runs["verify, wrong"])
    text = html.to_html([run])
    assert "NOT the same function" in Page(text).said
    assert run["profile"]["layers"]  # a page was asked for
    run |= {"profile": FULL["profile"], "cause": FULL["cause"]}
    assert "first wrong: bn7" in Page(html.to_html([run])).said
    run["profile"] = copy.deepcopy(run["profile"])
    for layer in run["profile"]["layers"]:
        layer["exact"] = 1e-3 if layer["norm"] in ("bn4", "bn5") else 1e-8
    run["cause"] = None
    assert "first wrong: bn4" in Page(html.to_html([run])).said


def test_hundreds_of_rows_are_closed_under_their_reasons(rich):
    run = copy.deepcopy(rich)
    run["batch_norms"]["folded"] = [{"name": f"n{i}", "into": [f"c{i}"]} for i in range(400)]
    run["batch_norms"]["kept"] = [
        {"name": f"k{i}", "reason": f"Relu 'r{i}' takes no shift (channels {i})" if i % 3 else "x"}
        for i in range(300)
    ]
    text = html.to_html([run])
    assert text.count('<details class="group stays">') == 2
    said = Page(text).said
    assert "200 stay: Relu takes no shift" in said
    assert "100 stay: x" in said
    assert '<details class="group" open>' not in text


# --- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [(1e-8, 3e-6), (2.0, 3.0), (1.0,), (1e-300, 1e300), (0.0, -1.0, math.nan, 5.0), (7e-7, 9.9e-7)],
)
def test_a_logarithmic_axis_holds_its_values_between_round_numbers(values):
    axis = LogAxis.of(values)
    known = [v for v in values if v > 0]
    assert axis.low <= min(known) * (1 + 1e-9)
    assert axis.high >= max(known) * (1 - 1e-9)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9
    shares = [axis.share(tick) for tick in ticks]
    assert shares == sorted(shares)
    assert all(0 <= axis.share(v) <= 1 for v in (*known, 0.0, math.inf))
    assert axis.share(math.sqrt(axis.low) * math.sqrt(axis.high)) == pytest.approx(0.5)


def test_an_axis_without_values_is_none():
    assert LogAxis.of([0.0, math.nan, math.inf]) is None
    assert drawing.line_chart(
        ["a"], [Series("a", "a", [math.nan])], hints=["a"], marks={}, about="a"
    ) == ""  # fmt: skip
    assert LinearAxis(1.3).ticks() == pytest.approx([0, 0.5, 1.0])


def test_ticks_are_written_as_people_do():
    assert [drawing.tick_label(v) for v in (0.01, 5, 1e-7, 2e-7, 1e12)] == [
        "0.01", "5", "10⁻⁷", "2·10⁻⁷", "10¹²"
    ]  # fmt: skip
    assert [html._shown(v) for v in (2.784, 31234.5, 5.96e-8, None, "inf", "nan", 0)] == [
        "2.78", "31,200", "5.96·10⁻⁸", "-", "inf", "nan", "0"
    ]  # fmt: skip


def test_words_in_backticks_are_code():
    assert html._coded("run `a <b>` now") == "run <code>a &lt;b&gt;</code> now"
    assert html._coded("one ` alone") == "one ` alone"


def test_layers_are_grouped_by_their_names():
    resnet = ["bn1", *(f"layer{i}.{j}.bn1" for i in (1, 2, 3) for j in range(3))]
    assert drawing.groups(resnet) == [
        ("bn1", 0, 1), ("layer1", 1, 3), ("layer2", 4, 3), ("layer3", 7, 3)
    ]  # fmt: skip
    dense = [f"features.block{i}.layer{j}.norm" for i in (1, 2) for j in range(9)]
    assert drawing.groups(dense) == [("block1", 0, 9), ("block2", 9, 9)]
    numbered = [f"BatchNormalization_{i}" for i in range(42)]
    assert drawing.groups(numbered)[:2] == [("1\u20139", 0, 9), ("10\u201318", 9, 9)]
    assert drawing.groups(["a"]) == [("1", 0, 1)]


def test_a_line_breaks_where_a_value_is_missing():
    values = [1.0, math.nan, 1.0, 10.0]
    drawn = drawing.line_chart(
        list("abcd"), [Series("s", "s", values)], hints=list("abcd"), marks={}, about="x"
    )
    assert drawn.count('class="line s"') == 1
    assert drawn.count('class="dot s"') == 3


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(rich, runs, tmp_path_factory):
    """The page of two runs, one of them with long names."""
    folder = tmp_path_factory.mktemp("page")
    run = copy.deepcopy(rich)
    for norm in run["batch_norms"]["folded"]:
        norm["name"] = norm["into"][0] = "a_very_long_name_without_a_place_to_break" * 6
    run["gates"][0]["sentence"] += "x" * 300
    run["files"][0]["path"] = "/" + "folder" * 40
    (folder / "page.html").write_text(html.to_html([run, runs["adapt, other"]]))
    return folder / "page.html"


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_a_browser_shows_it_without_a_network_and_nothing_stands_outside(
    width, chromium, page, tmp_path
):
    found = measured(chromium, page, tmp_path, width=width)
    assert found["width"] == width
    assert found["beyond"] == []
    assert not found["scrolls"]
    assert found["resources"] == []
    assert found["height"] > 2000


def test_what_stands_outside_or_comes_from_elsewhere_would_be_measured(chromium, page, tmp_path):
    bad = page.read_text().replace(
        "<main>", '<main><div style="width:2000px">x</div><img src="http://127.0.0.1:9/x.png">'
    )
    (tmp_path / "bad.html").write_text(bad)
    found = measured(chromium, tmp_path / "bad.html", tmp_path, width=NARROW)
    assert found["scrolls"]
    assert "DIV." in found["beyond"]
    assert found["resources"] == ["http://127.0.0.1:9/x.png"]


def drawn_share(path):
    """The share of a picture's rows in which something is drawn, and how many colours it has."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(np.int32)
    rows = (np.abs(pixels - pixels[:, :1]).sum(axis=2) > 30).any(axis=1)
    return float(rows.mean()), len(np.unique(pixels @ [65536, 256, 1]))


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_its_picture_is_full(width, chromium, page, tmp_path):
    share, colours = drawn_share(
        screenshot(chromium, page, tmp_path / "page.png", width=width, height=1600)
    )
    assert share > 0.9
    assert colours > 50
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (width, 1600)


def test_an_empty_page_would_be_seen(tmp_path):
    Image.new("RGB", (WIDE, 1600), "white").save(tmp_path / "empty.png")
    assert drawn_share(tmp_path / "empty.png") == (0.0, 1)


REAL = {
    "resnet20": ("cifar10/resnet20-12fca82f.th", "--model", "models/resnet_cifar.py:resnet20",
                 "--input-shape", "1,3,32,32"),
    "mnist_resnet": ("digits/mnist_resnet.pth", "--model", "models/digits.py:resnet",
                     "--input-shape", "1,1,28,28"),
    "pfld": ("onnx/pfld.onnx",),
    "ppocr": ("onnx/ppocr_v2_cls_opset10.onnx",),
    "cgan": ("onnx/cgan_32_1.onnx",),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_page_of_a_real_model(name, shared_data, chromium, tmp_path, capsys):
    path, *options = REAL[name]
    model = tmp_path / path.rpartition("/")[2]
    model.write_bytes((shared_data / path).read_bytes())
    argv = ["fold", str(model), *options, "--json", "--report", str(tmp_path / "page.html")]
    assert main(argv) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["profile"]["layers"]
    assert faults((tmp_path / "page.html").read_text()) == []
    for width in (WIDE, NARROW):
        found = measured(chromium, tmp_path / "page.html", tmp_path, width=width)
        assert (found["beyond"], found["scrolls"], found["resources"]) == ([], False, [])
        picture = tmp_path / f"{width}.png"
        share, _ = drawn_share(
            screenshot(chromium, tmp_path / "page.html", picture, width=width, height=1600)
        )
        assert share > 0.9
