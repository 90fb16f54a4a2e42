"""docs/research-question.md: its tables are narrow enough to be read, its plots hold all points and labels apart."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from bsfa_cli.presentation import figures, research, research_tables
from bsfa_cli.presentation.research_plot import research_plot

ROOT = Path(__file__).parents[1]
COLUMNS = 10  # that a page of a repository shows without scrolling


def test_tables_are_narrow():
    page = (ROOT / "docs" / research.PAGE).read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) > 100 and max(line.replace("\\|", "").count("|") - 1 for line in rows) <= COLUMNS


def a_row(method: str, setting: float, answers: float, speedup: float, published: bool = False) -> dict:
    return {
        "method": method, "setting": setting, "knob": "skip", "published": published, "speedup": speedup,
        "ttft_ms": 10 / speedup, "accuracy": {"mean": answers},
    }  # fmt: skip


def test_a_setting_is_starred_where_it_is_published():
    row = a_row("pbs", 0.9, 0.5, 2.0, published=True)
    assert research_tables.named(row) == "PBS-Attn, skip 0.9 \\*"
    assert research_tables.named(row | {"published": False}) == "PBS-Attn, skip 0.9"
    assert research_tables.named(row | {"knob": None}) == "bsfa's kernel, nothing skipped"


def test_the_best_setting_is_the_most_accurate_fast_one_and_of_equal_ones_the_fastest():
    slow, fast, faster = a_row("bsfa", 0.5, 1.0, 1.2), a_row("bsfa", 0.8, 0.9, 1.6), a_row("bsfa", 0.9, 0.9, 1.8)
    assert research_tables.best_setting([slow, fast, faster]) is faster
    assert research_tables.best_setting([slow, a_row("bsfa", 0.6, 0.8, 1.4)]) is slow


def test_the_short_answer_names_a_setting_once_where_all_lengths_have_it():
    cells = [{"fastest_ttft_ms": 10}, {"fastest_ttft_ms": 20}]
    same, other = a_row("bsfa", 0.9, 0.99, 1.75), a_row("strided", 0.9, 0.4, 2.0)
    line = research_tables._answers("", cells, [same, same])
    assert line == "| bsfa, by head, skip 0.9 | 0.990 at 1.75x / 1.75x | 0.990 at 1.75x / 3.50x |"
    line = research_tables._answers("best", cells, [same, other])
    assert line.startswith(
        "| best | 0.990 at 1.75x / 1.75x (bsfa, by head, skip 0.9) | 0.400 at 2.00x / 4.00x (strided"
    )


@pytest.mark.parametrize("name", research.COMPARISONS)
def test_plots_hold_all_points_and_keep_labels_apart(name):
    result = json.loads((ROOT / "profiles" / "results" / name).read_text(encoding="utf-8"))
    figure = research_plot(result["cells"][0], research_tables.METHODS, result["environment"]["gpu"])
    renderer = FigureCanvasAgg(figure).get_renderer()
    methods = {row["method"] for row in result["cells"][0]["rows"]} - {"dense"}
    for panel in figure.axes:
        frame = panel.get_window_extent(renderer)
        marked = [line for line in panel.lines if line.get_marker() != "None"]
        points = [panel.transData.transform(point) for line in marked for point in line.get_xydata()]
        assert len(points) >= len(methods)
        for x, y in points:
            assert frame.x0 - 1 <= x <= frame.x1 + 1 and frame.y0 - 1 <= y <= frame.y1 + 1
        labels = {text.get_text(): text.get_window_extent(renderer) for text in panel.texts}
        assert len(labels) == 1 + 10  # dense, and what the legend does not name
        for one, other in itertools.combinations(labels, 2):
            assert not labels[one].overlaps(labels[other]), (one, other)
        for word, box in labels.items():
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 + 1 and box.y1 <= frame.y1, word
            assert not any(box.contains(x, y) for x, y in points), word


def test_a_label_stands_nearer_to_its_own_points_than_to_anothers():
    figure, (panel,) = figures.new(600, 400)
    panel.set_xlim(0, 10)
    panel.set_ylim(0, 10)
    lines = [([(5, 5)], "one", "C0"), ([(5.6, 5)], "another", "C1")]
    figures.line_labels(panel, lines)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = {text.get_text(): text.get_window_extent(renderer).extents for text in panel.texts}
    places = {words: panel.transData.transform(points[0]) for points, words, _ in lines}
    for own, other in (("one", "another"), ("another", "one")):
        assert figures._away(boxes[own], places[own]) < figures._away(boxes[own], places[other])
