"""The report's page looked at: what it is made of, and a headless Chromium that draws it."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)
EMPTY = frozenset({"meta", "link", "br", "img", "hr", "input"})
# what stands outside the window, unless a box of its own scrolls; what the page asked a network for
MEASURE = """<script>
const beyond = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll")
  && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.tagName + "." + e.className);
parent.document.documentElement.dataset.measured = JSON.stringify({
  width: innerWidth, height: document.documentElement.scrollHeight,
  scrolls: document.documentElement.scrollWidth > innerWidth, beyond: beyond.slice(0, 5),
  resources: performance.getEntriesByType("resource").map(e => e.name) });
</script>"""


class Page(HTMLParser):
    """A page's tags, attributes and text; what is left open stands in `open`."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open, self.wrong = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # SVG closes its own
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def said(self):
        return " ".join(" ".join(self.words).split())


def faults(text):
    """What a page must not hold: code, something from elsewhere, tags that do not match."""
    page = Page(text)
    found = [
        f"<{tag}>" for tag in page.tags if tag in ("script", "iframe", "object", "link", "img")
    ]
    for tag, name, value in page.attributes:
        if name.startswith("on"):
            found.append(f"{tag} {name}")
        if name in ("href", "src", "xlink:href", "action") and not str(value).startswith("#"):
            found.append(f"{tag} {name}={value}")
    found += re.findall(r"@import|url\(", text)
    found += [f"control character {ord(c):x}" for c in text if not c.isprintable() and c != "\n"]
    return found + [f"unmatched {tag}" for tag in page.wrong + page.open]


@pytest.fixture(scope="session")
def chromium():
    """A Chromium, or a skip where there is none; BNFOLD_REQUIRE_BROWSER=1 makes that a failure."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        reason = "no Chromium to look at the page with (Debian: apt-get install chromium)"
        if os.environ.get("BNFOLD_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def _run(chromium, path, width, height, *options):
    with tempfile.TemporaryDirectory() as home:
        command = [chromium, *QUIET, f"--user-data-dir={home}", f"--window-size={width},{height}"]
        return subprocess.run(
            [*command, *options, path.resolve().as_uri()],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout


def screenshot(chromium, path, to, *, width, height):
    """The page as a picture of this size."""
    _run(chromium, path, width, height, f"--screenshot={to}")
    return to


def measured(chromium, path, folder, *, width):
    """Measures of the page, taken by a script in a copy of it that may run one.

    The copy stands in a frame of this width: a window is never narrower than 500 pixels.
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    text = escape(text.replace("</body>", f"{MEASURE}</body>"))
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{text}"></iframe>'
    copy = Path(folder) / f"measured{width}.html"
    copy.write_text(f"<!DOCTYPE html><meta charset=utf-8>{frame}")
    dom = _run(chromium, copy, 1500, 1000, "--dump-dom")
    found = re.search(r'data-measured="([^"]*)"', dom)
    assert found, dom[:300]
    return json.loads(unescape(found[1]))
