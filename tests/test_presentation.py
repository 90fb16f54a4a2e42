"""Tables, plots and the README block: what a person sees of a result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bsfa_cli import console
from bsfa_cli.errors import InputError, UsageError
from bsfa_cli.presentation import columns, figures, plot, profile_table, readme

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def test_progress_is_lines_with_the_time_left_where_there_is_no_terminal(capsys):
    now = [0.0]
    with console.Lines(lambda: now[0]) as lines:
        begin = console.beginner(lines, "8,192 tokens")
        step = begin(10, "timing")
        for _ in range(4):
            now[0] += 5
            step()
        now[0] += 100
        step(2)
        begin(10, "timing")(4)
        now[0] += 4000
        step()
    console.console.cache_clear()
    assert capsys.readouterr().err.splitlines() == [
        "8,192 tokens: timing: 3 of 10, 0:15 gone, about 0:35 left",
        "8,192 tokens: timing: 6 of 10, 2:00 gone, about 1:20 left",
        "8,192 tokens: timing: 11 of 20, 1:08:40 gone, about 56:11 left",
    ]


def row(name: str, kind: str, target=None, speedup=1.0, bound=1.0, ms=2.0) -> dict:
    return {
        "name": name, "kind": kind, "skip_target": target, "speedup": speedup, "bound": bound, "ms_median": ms,
        "ms_p20": ms, "ms_p80": ms, "suspect": kind == "bsfa" and speedup > bound, "tflops_dense_equivalent": 512.0,
        "tflops_executed": 500.0, "samples_ms": [ms] * 5, "finite": True,
    } | ({} if target is None else {"skip": target})  # fmt: skip


def cell(length: int, name: str = "text") -> dict:
    rows = [
        row("cuDNN", "dense"),
        row("bsfa, 0 % skipped", "bsfa", 0.0, 0.98),
        row("bsfa, 50 % skipped", "bsfa", 0.5, 1.4, 1.33),
    ]
    return {
        "shape": {"name": name, "heads": 32, "kv_heads": 8, "head_dim": 128, "causal": True, "batch": 1},
        "length": length, "dtype": "bfloat16", "tile": "64x128", "gate": "gap", "backend": "hopper",
        "passed_over": {}, "data": "synthetic", "error_at_zero": 1e-3, "error_tolerance": 2e-2,
        "fastest_dense": "cuDNN", "overhead_at_zero": 0.02, "gate_overhead": 0.0, "break_even_skip": 0.05,
        "unavailable": [{"name": "FlexAttention", "reason": "out of memory"}], "contenders": rows,
    }  # fmt: skip


@pytest.fixture
def result() -> dict:
    """Made-up numbers in the form that `bsfa profile` stores; for layout only."""
    return {
        "kind": "bsfa profile", "format": 1, "complete": True, "profile": "made-up", "device": "cuda",
        "environment": {"gpu": "<Some> & GPU", "driver": "1.2", "torch": "2.11", "platform": "Linux"},
        "ceiling": {"size": 8192, "dtype": "bfloat16", "tflops": 700.0},
        "cells": [cell(4096), cell(8192), cell(131072), cell(8192, "vis<i>on")], "prefill": [],
    }  # fmt: skip


def texts_of(drawn: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(drawn).iter(f"{SVG}text")]


def test_plot_is_xml_with_every_string_escaped(result):
    drawn = figures.svg(plot.speedup_plot(result))
    texts = texts_of(drawn)
    assert any("<Some> & GPU" in text for text in texts)
    assert any("vis<i>on" in text for text in texts)
    assert {"4k", "8k", "128k"} <= set(texts)
    assert "<script" not in drawn and "prefers-color-scheme: dark" in drawn and figures.PAGE not in drawn[500:]
    assert figures.svg(plot.speedup_plot(result)) == drawn


def test_plot_draws_the_bound_and_a_tooltip_for_every_point(result):
    root = ElementTree.fromstring(figures.svg(plot.speedup_plot(result)))
    said = [title.text for title in root.iter(f"{SVG}title")]
    assert len(said) == 8 and "50% skipped, 4,096 tokens: 1.40x (bound 1.33x)" in said
    assert sum("stroke-dasharray" in path.get("style", "") for path in root.iter(f"{SVG}path")) == 2
    for element in root.iter(f"{SVG}text"):
        assert 0 <= float(element.get("x")) <= plot.WIDTH and 0 <= float(element.get("y")) <= float(root.get("height"))


def test_a_plot_is_a_png_where_the_file_is_one(result):
    drawn = plot.speedup_plot(result)
    assert figures.content(drawn, Path("a.png")).startswith(b"\x89PNG")
    assert figures.content(drawn, Path("a.svg")).startswith(b"<svg")


def test_what_stands_in_a_matplotlibrc_changes_nothing(result):
    import matplotlib

    drawn = figures.svg(plot.speedup_plot(result))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert figures.svg(plot.speedup_plot(result)) == drawn


def test_plot_keeps_labels_apart(result):
    for entry in result["cells"]:
        for contender in entry["contenders"]:
            contender["speedup"] = 1.0
    root = ElementTree.fromstring(figures.svg(plot.speedup_plot(result)))
    labels = [float(text.get("y")) for text in root.iter(f"{SVG}text") if "skipped:" in text.text]
    assert len(labels) == 4 and min(abs(a - b) for i, a in enumerate(labels) for b in labels[:i]) >= 15


def test_labels_that_fit_keep_their_order_and_their_distance():
    assert figures.apart([10, 11, 50], 17, 100) == [10, 27, 50]
    assert figures.apart([99, 98, 10], 17, 100) == [100, 83, 10]


def test_plot_refuses_what_it_cannot_draw(result):
    result["cells"][0]["contenders"][2]["speedup"] = float("nan")
    with pytest.raises(ValueError):
        plot.speedup_plot(result)
    result["cells"] = []
    with pytest.raises(UsageError, match="no speedup"):
        plot.speedup_plot(result)


def test_table_marks_what_exceeds_the_bound_and_names_the_missing(capsys, monkeypatch):
    console.console.cache_clear()
    profile_table.show_cell(cell(4096))
    shown = capsys.readouterr()
    console.console.cache_clear()
    assert shown.out == ""
    assert "1.40x*" in shown.err and "baseline inefficiency" in shown.err
    assert "not timed: FlexAttention (out of memory)" in shown.err
    assert "fastest dense: cuDNN\n" in shown.err
    assert "at 0 % skipped bsfa takes +2.0% time; breaks even at 5% skipped\n" in shown.err
    assert max(map(len, shown.err.splitlines())) <= 80


def test_details_show_every_column(capsys):
    console.console.cache_clear()
    profile_table.show_cell(cell(4096), details=True)
    shown = capsys.readouterr().err
    console.console.cache_clear()
    assert all(heading in shown for heading in profile_table.HEADINGS)


def test_aligned_columns_end_together():
    lines = columns.aligned([("", "ms"), ("long name", "1.5"), ("x", "100.25")])
    assert lines == ["               ms", "long name     1.5", "x          100.25"]


def test_names_too_long_for_the_terminal_are_wrapped_and_no_digit_is_cut():
    lines = columns.aligned([("", "ms"), ("a kernel of a long name (library 1.2.3)", "1.234567"), ("x", "2")], 28)
    assert lines == [
        "                          ms", "a kernel of a long", "name (library", "1.2.3)              1.234567",
        "x                          2",
    ]  # fmt: skip


def test_json_refuses_what_json_cannot_say(capsys):
    console.print_json({"b": 1, "a": [1.5, None]})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None], "b": 1}
    with pytest.raises(ValueError):
        console.print_json({"a": float("nan")})


def test_readme_block_is_made_from_the_results(result, tmp_path):
    (tmp_path / "profiles" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    pages = tmp_path / "README.md", tmp_path / "docs" / "results.md"
    for path in pages:
        path.write_text(f"before\n{readme.BEGIN}\nstale\n{readme.END}\nafter\n")
    files = readme.rendered(tmp_path)
    assert all(readme.NONE in files[path] for path in pages)
    (tmp_path / "profiles" / "results" / "a.json").write_text(json.dumps(result))
    files = readme.rendered(tmp_path)
    text = files[pages[1]]
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| 4,096 | cuDNN, 2.000 ms, 512 TFLOP/s | 0.98x (bound 1.00x) | 1.40x \\* (bound 1.33x) |" in text
    assert "](../profiles/results/a.svg)" in text and tmp_path / "profiles" / "results" / "a.svg" in files
    for path, content in files.items():
        path.write_text(content)
    assert readme.rendered(tmp_path) == files


def test_structured_rows_are_told_apart_and_a_missed_rate_is_shown(result):
    structured = cell(4096)
    structured["data"] = "synthetic, structured; thresholds fitted to it"
    structured["contenders"][2]["skip"] = 0.43
    result["cells"].append(structured)
    text = readme.block(result, "a.json", "a.svg")
    assert "**text: 32/8 heads" in text and "**text: structured data, 32/8 heads" in text
    assert "1.40x \\* at 43% (bound 1.33x)" in text
    titles = texts_of(figures.svg(plot.speedup_plot(result)))
    assert any(title.startswith("text: structured data, ") for title in titles)


def test_readme_needs_its_markers(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text("nothing")
    with pytest.raises(InputError, match="results: begin"):
        readme.rendered(tmp_path)


def test_readme_and_plots_are_in_step_with_the_stored_results():
    for path, content in readme.rendered(ROOT).items():
        assert path.read_text(encoding="utf-8") == content, f"run python -m bsfa_cli.presentation.readme ({path.name})"


def test_people_and_pipes_get_no_colour_codes():
    script = "from bsfa_cli.console import note; note('plain [red]text[/red]')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("", "plain [red]text[/red]\n")
