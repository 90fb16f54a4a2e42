"""The report: self-contained, escaped, rendered from JSON alone, and looked at in a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bsfa_cli.presentation import figures, pareto, readme
from bsfa_cli.presentation.compare_table import break_even_rows

STORED = Path(__file__).parent.parent / "profiles" / "results" / "llama-3.1-8b.nvidia-h200.json"


def row(method: str, setting: float, ms: float, recall: float, **changes) -> dict:
    return {
        "method": method, "knob": "kn<o>b", "setting": setting, "published": setting == 2, "selection_ms": ms / 4,
        "attention_ms": 3 * ms / 4, "total_ms": ms, "speedup": 10 / ms, "density": ms / 10, "visited": 1.0,
        "flop_density": 0.5, "error": 1 - recall, "needle": {"mean": recall, "worst": recall / 2}, "finite": True,
        "recall": {"mean": recall, "p1": recall, "worst": recall / 3}, "note": None, "samples_ms": {}, "layers": [],
    } | changes  # fmt: skip


def cell(length: int, factor: float) -> dict:
    return {
        "level": "tensors", "label": "synthetic, <structured>", "source": {}, "calibrated_on": "an & other",
        "length": length, "left_out": {"pbs": "not <here>"}, "backend": "hopper", "fastest_dense": "cuDNN",
        "fastest_dense_ms": 10.0, "dense": [], "unavailable": [{"name": "x", "reason": "o<o>m"}],
        "rows": [
            row("dense", 1, 10.5, 1.0, knob="", note="selects everything"),
            *(row("bsfa", s, s * factor, 0.9 + s / 100) for s in (2, 4, 6)),
            *(row("xattention", s, s * factor, 0.8 + s / 100) for s in (2, 4, 7)),
        ],
    }  # fmt: skip


@pytest.fixture
def stored(tmp_path):
    """Made-up numbers in the form that `bsfa compare` stores; for layout only."""
    path = tmp_path / "made<up>.json"
    result = {
        "kind": "bsfa compare", "format": 1, "complete": False, "device": "cuda", "tile": "64x128", "seed": 3,
        "environment": {"gpu": "<Some> & GPU", "torch": "2.11"}, "cells": [cell(8192, 2.0), cell(32768, 0.8)],
    }  # fmt: skip
    path.write_text(json.dumps(result))
    return path


class Page(HTMLParser):
    VOID = {"meta", "br"}

    def __init__(self, content: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_page_is_self_contained_and_every_string_is_escaped(run, stored, tmp_path):
    done = run("report", stored, STORED, "-o", tmp_path / "report.html", "--json")
    assert done.code == 0 and json.loads(done.out)["results"] == [str(stored), str(STORED)]
    content = (tmp_path / "report.html").read_text()
    page = Page(content)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    links = [
        v for _, attributes in page.tags for name, v in attributes.items() if name in ("src", "href", "xlink:href")
    ]
    assert {"#result-1", "#result-2"} <= set(links) and all(link.startswith("#") for link in links)
    assert not re.search(r"https?://(?!www\.w3\.org/(2000/svg|1999/xlink)\b)|@import|url\((?!#)", content)
    text = " ".join(page.texts)
    for words in ("<Some> & GPU", "synthetic, <structured>", "an & other", "o<o>m", "made<up>.json", "cut short"):
        assert words in text and (words == "cut short" or words not in content)
    assert "prefers-color-scheme: dark" in content


def test_page_says_who_wins_and_what_is_lost(run, stored, tmp_path):
    assert run("report", stored, "-o", tmp_path / "report.html").code == 0
    text = " ".join(Page((tmp_path / "report.html").read_text()).texts)
    assert "50% of dense: bsfa (0.9250)" in text and "Asked: which of 3 methods keeps most, on <Some> & GPU" in text
    assert "xattention is number" not in text
    assert "at equal density" in text and "at equal time" in text
    assert "All 7 settings" in text and "2 not measured" in text


def test_readme_has_a_block_for_a_comparison(stored, tmp_path):
    folder = tmp_path / "profiles" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for page in (tmp_path / "README.md", tmp_path / "docs" / "results.md"):
        page.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    (folder / "methods.json").write_bytes(stored.read_bytes())
    files = readme.rendered(tmp_path)
    text = files[tmp_path / "docs" / "results.md"]
    assert "### Methods compared (methods) on <Some> & GPU" in text and "This run was cut short" in text
    assert "- 50% of dense: bsfa (0.9250)" in text
    assert f"| bsfa |{' **0.9600** |' * 6} **0.9313** | - |" in text
    assert "| bsfa | 2: 8,192 or less |" in text and "](../profiles/results/methods.svg)" in text
    ElementTree.fromstring(files[folder / "methods.svg"])


def test_settings_that_break_even_alike_are_one_entry(stored):
    result = json.loads(stored.read_text())
    for each in result["cells"]:
        each["rows"] = [row("bsfa", setting, 2.0, 0.9, published=False) for setting in (1.0, 2.0)]
    assert break_even_rows(result) == [("bsfa", "all settings: 8,192 or less")]
    result["cells"][1]["rows"][0]["total_ms"] = 50.0
    assert break_even_rows(result) == [("bsfa", "1: slower up to 32,768; 2: 8,192 or less")]


def test_pareto_plot_names_the_front_and_has_a_tooltip_for_every_point(stored):
    measured = cell(8192, 2.0)
    measured["rows"] += [row("slower", s, s * 3, 0.8 + s / 100) for s in (2, 4, 6)] + [row("useless", 1, 1.0, 0.1)]
    drawn = figures.svg(pareto.pareto_plot(measured, "total_ms", "recall.mean"))
    root, name = ElementTree.fromstring(drawn), "{http://www.w3.org/2000/svg}"
    said = [title.text for title in root.iter(f"{name}title")]
    assert len(said) == 10 and "xattention kn<o>b 7: 0.87 at 0.71x, 14 ms, density 1.400" in said
    texts = [element.text for element in root.iter(f"{name}text")]
    assert {"bsfa", "every tile kept"} <= set(texts) and "xattention" not in texts
    assert "grey, beaten everywhere in this picture: xattention, slower" in texts
    assert any("speedup over cuDNN" in text for text in texts)
    assert pareto.pareto_plot(cell(8192, 2.0), "ttft_ms", "recall.mean") is None


def test_a_report_without_matplotlib_has_tables_and_says_what_is_missing(run, stored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("report", stored, STORED, "-o", tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text()
    assert done.code == 0 and "pip install 'bsfa[plots]'" in done.err
    assert "<svg" not in content and "without plots" in content.lower() and "<table>" in content


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot read"), ("{", "is not JSON"), ("[]", "not a result of `bsfa profile` or `bsfa compare` or"),
        ('{"kind": {}}', "not a result of"), ('{"kind": NaN}', "it holds NaN, which no result does"),
        ('{"kind": "bsfa compare", "format": 9}', "has format 9"),
        ('{"kind": "bsfa compare", "format": 1, "environment": {}, "cells": [{}]}', "lacks or breaks"),
        ('{"kind": "bsfa compare", "format": 1, "environment": {}, "cells": [3]}', "lacks or breaks"),
        ('{"kind": "bsfa verify", "format": 1, "environment": {}, "points": [{}]}', "lacks or breaks"),
    ],
)  # fmt: skip
def test_a_damaged_result_writes_nothing(run, one_sentence, tmp_path, content, words):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    one_sentence(run("report", path, "-o", tmp_path / "report.html"), 4, words)
    assert not (tmp_path / "report.html").exists()


def test_control_characters_in_a_result_command_no_terminal_and_break_no_plot(run, stored, tmp_path):
    result = json.loads(stored.read_text())
    result["cells"][0]["label"] = "\x1b[31m\ud800red"
    result["environment"]["gpu"] = "\x1b]0;title\x07"
    stored.write_text(json.dumps(result))
    assert run("report", stored, "-o", tmp_path / "r.html").code == 0
    page, seen = (tmp_path / "r.html").read_text(), run("inspect", stored)
    assert seen.code == 0 and "[31m" in page and "[31m" in seen.err
    assert not [c for c in page + seen.err if c in "\x1b\x07\ud800"]


def test_a_page_replaces_no_result(run, one_sentence, stored, tmp_path):
    before = stored.read_bytes()  # as `bsfa report -o *.json` would
    one_sentence(run("report", "-o", stored, stored), 2, "is a stored result and would be replaced by a page")
    assert stored.read_bytes() == before
    assert [run("report", stored, "-o", tmp_path / "r.html").code for _ in "again"][-1] == 0


def test_arguments(run, one_sentence, stored):
    one_sentence(run("report", "-o", "a.html"), 2, "which results")
    one_sentence(run("report", stored), 2, "-o report.html")


def test_report_needs_no_torch(tmp_path):
    script = (
        "import sys; from pathlib import Path; from bsfa_cli.commands.report import report\n"
        f"report([Path({str(STORED)!r})], Path({str(tmp_path / 'report.html')!r}))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(run, stored, tmp_path, scheme):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed here")
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    assert run("report", stored, STORED, "-o", page).code == 0
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1600", *dark]
    subprocess.run(
        [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", page.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels, width = decoded(picture.read_bytes())
    corner = pixels[0]
    assert (sum(corner) > 700) if scheme == "light" else (sum(corner) < 120)
    assert width == 1200 and len(set(pixels)) > 20  # text, rules, and lines of several colours


def decoded(png: bytes) -> tuple[list[tuple[int, ...]], int]:
    """(pixels as RGB, every 7th row; width) of an 8-bit PNG without interlacing, as browsers write them."""
    import struct
    import zlib

    at, data, header = 8, b"", None
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", png[at + 8 : at + 8 + size])
        elif kind == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += size + 12
    width, height, depth, colour, _, _, interlaced = header
    assert depth == 8 and not interlaced
    channels = {2: 3, 6: 4}[colour]
    raw, stride, before, pixels = zlib.decompress(data), width * channels, bytearray(width * channels), []
    for y in range(height):
        kind = raw[y * (stride + 1)]
        line = bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        for x in range(stride):
            a = line[x - channels] if x >= channels else 0
            b, c = before[x], before[x - channels] if x >= channels else 0
            if kind == 4:
                near = min((abs(b - c), 0), (abs(a - c), 1), (abs(a + b - 2 * c), 2))[1]
                line[x] = (line[x] + (a, b, c)[near]) & 255
            elif kind:
                line[x] = (line[x] + (a, b, (a + b) // 2)[kind - 1]) & 255
        before = line
        if y % 7 == 0:
            pixels += [tuple(line[x : x + 3]) for x in range(0, stride, channels)]
    return pixels, width
