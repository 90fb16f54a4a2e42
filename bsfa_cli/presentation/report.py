"""One self-contained HTML page from stored results of compare, profile and verify: no network, no scripts.

Rendered from JSON alone, so that it can be made again on a machine without a GPU. Every string goes through `escape`.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from .. import verification
from ..comparison import matching
from . import verify_report
from .compare_table import METRICS, break_even_rows, matched_tables, number, present, rows_table
from .pareto import pareto_plot
from .plot import speedup_plot
from .profile_table import HEADINGS as PROFILE_HEADINGS
from .profile_table import cell_rows, head_shape, verdict
from .versions import versions

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --soft: #59636e; --rule: #d1d9e0; --best: #dafbe1 }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --ink: #e6edf3; --soft: #9198a1; --rule: #3d444d; --best: #12361f }
}
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, 'DejaVu Sans', sans-serif;
       max-width: 1120px; margin: 0 auto; padding: 24px 20px 80px }
h1 { font-size: 26px } h2 { margin-top: 48px; border-bottom: 1px solid var(--rule); padding-bottom: 6px }
.aside { color: var(--soft) } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: 8px 0 4px }
th, td { padding: 3px 10px; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } td.best { background: var(--best); font-weight: 600 }
svg.chart, figure svg { max-width: 100%; height: auto } figure { margin: 16px 0 } summary { cursor: pointer }
"""
AXES = ("total_ms", "attention_ms", "ttft_ms", "density")
MAIN = ("accuracy.mean", "agreement.top1", "needle.mean", "recall.mean", "error")  # metrics that get plots


def page(results: list[tuple[Path, dict]]) -> str:
    """The page for (file, stored result) pairs, in their order. Raises KeyError, TypeError or ValueError for a result
    that lacks what its format promises.
    """
    section = {matching.KIND: _comparison, verification.KIND: _verification}
    sections = [section.get(found["kind"], _profile)(path, found) for path, found in results]
    return "\n".join(
        ['<!DOCTYPE html>', '<html lang="en"><head><meta charset="utf-8">',
         '<meta name="viewport" content="width=device-width, initial-scale=1">', "<title>bsfa report</title>",
         f"<style>{STYLE}</style></head><body>", "<h1>bsfa report</h1>", *sections, "</body></html>", ""]
    )  # fmt: skip


def _comparison(path: Path, result: dict) -> str:
    parts = [_heading("Comparison", path, result)]
    parts.append(_aside(
        f"Tiles of {result['tile']}. Every method runs through the same kernel on the same inputs, in turns with the "
        "dense baselines; time is selection and attention together. Density is the share of visible tiles that are "
        "weighed; a gate has to score the others too, and FLOP density counts that. Selections are plain PyTorch: a "
        "method's own kernels may select faster, hence the tables and plots of attention alone."
        + (f" Settings asked for: {', '.join(result['settings'])}." if result.get("settings") else "")
    ))  # fmt: skip
    rows = break_even_rows(result)
    if rows:
        parts.append("<h3>Length from which a method is no slower than the fastest dense kernel</h3>")
        parts.append(_list(f"{method} at {words}" for method, words in rows))
    for cell in result["cells"]:
        parts.append(_cell(cell))
    return "\n".join(parts)


def _cell(cell: dict) -> str:
    parts = [f"<h3>{cell['length']:,} tokens, {escape(cell['label'])}</h3>"]
    facts = [f"kernel: {cell['backend']}"]
    if cell["fastest_dense"]:
        facts.append(f"fastest dense: {cell['fastest_dense']}, {cell['fastest_dense_ms']:.3f} ms")
    if cell["calibrated_on"]:
        facts.append(f"bsfa's thresholds were fitted to {cell['calibrated_on']}")
    parts.append(_aside("; ".join(facts) + "."))
    for metric in present(cell):
        words, largest = METRICS[metric]
        asked = matching.questions(cell, metric)
        for title, headings, table in matched_tables(cell, metric):
            parts.append(f"<h4>{escape(title)}</h4>")
            parts.append(_matched(headings, table, largest, asked))
            parts.append(_list(matching.verdicts(table, headings, largest, asked)))
        if metric in MAIN:
            parts += [f"<figure>{plot}</figure>" for axis in AXES if (plot := pareto_plot(cell, axis, metric, words))]
    headings, *rows = rows_table(cell)
    parts.append(f"<details><summary>All {len(rows)} settings</summary>{_table(headings, rows)}</details>")
    absent = [f"{entry['name']}: {entry['reason']}" for entry in cell["unavailable"]]
    absent += [f"{name}: {reason}" for name, reason in cell["left_out"].items()]
    if absent:
        parts.append(f"<details><summary>{len(absent)} not measured</summary>{_list(absent)}</details>")
    return "\n".join(parts)


def _profile(path: Path, result: dict) -> str:
    parts = [_heading("Profile", path, result)]
    if result["cells"]:
        parts.append(f"<figure>{speedup_plot(result)}</figure>")
    for cell in result["cells"]:
        parts.append(f"<h4>{cell['length']:,} tokens, {escape(head_shape(cell))}</h4>")
        parts.append(_aside(cell["data"]))
        parts.append(_table(PROFILE_HEADINGS, cell_rows(cell)))
        parts.append(_aside(verdict(cell)))
    return "\n".join(parts)


def _verification(path: Path, result: dict) -> str:
    parts = [_heading("Verification", path, result)]
    for kind, *content in verify_report.parts(result):
        parts.append(DRAWN[kind](*content))
    return "\n".join(parts)


def _details(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return f"<details><summary>{escape(title)}</summary>{_table(headings, rows)}</details>"


def _heading(kind: str, path: Path, result: dict) -> str:
    facts = result["environment"]
    cut = "" if result.get("complete") else " This run was cut short."
    machine = facts.get("gpu") or "a CPU (its times say nothing about a GPU)"
    return f"<h2>{kind} on {escape(machine)}</h2>" + _aside(
        f"{path.name}; {versions(facts)}; seed {result['seed']}.{cut}"
    )


def _matched(headings: list[str], table: dict[str, list[float | None]], largest: bool, asked: int | None) -> str:
    winners = [matching.best(table, column, largest, asked) for column in range(len(headings))]
    lines = [f"<tr><th></th>{''.join(f'<th>{escape(heading)}</th>' for heading in headings)}</tr>"]
    for method, values in table.items():
        cells = [
            ('<td class="best">' if method in winners[i] else "<td>") + escape(number(value)) + "</td>"
            for i, value in enumerate(values)
        ]
        lines.append(f"<tr><td>{escape(method)}</td>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(field)}</td>" for field in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f'<li class="aside">{escape(sentence)}</li>' for sentence in sentences) + "</ul>"


def _aside(sentence: str) -> str:
    return f'<p class="aside">{escape(sentence)}</p>'


# How the parts of verify_report.py are drawn.
DRAWN = {
    "heading": lambda text: f"<h4>{escape(text)}</h4>", "aside": _aside, "list": _list, "table": _table,
    "details": _details,
}  # fmt: skip
