"""One self-contained HTML page from stored results of compare, profile and verify: no network, no scripts.

A summary and a table of contents first, details folded. Rendered from JSON alone, so that it can be made again on a
machine without a GPU. Every string goes through `escape`.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from .. import verification
from ..comparison import matching
from ..errors import UsageError, unlike_its_format
from . import figures, summary, verify_report
from .compare_table import METRICS, break_even_rows, matched_tables, number, present, rows_table
from .dense_kernels import fastest, without_flash_attention_3
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
figure svg { max-width: 100%; height: auto } figure { margin: 16px 0 }
details { margin: 10px 0 } summary { cursor: pointer } summary:hover { text-decoration: underline }
a { color: #0969da } .contents > li { margin-bottom: 10px } .contents ul { margin: 2px 0 }
@media (prefers-color-scheme: dark) { a { color: #4493f8 } }
@media (max-width: 600px) { body { padding: 12px 12px 60px } figure { overflow-x: auto }
  figure svg { max-width: none; width: 640px } ul, ol { padding-left: 20px } }
"""
AXES = ("total_ms", "attention_ms", "ttft_ms", "density")
MAIN = ("accuracy.mean", "agreement.top1", "needle.mean", "recall.mean", "error")  # metrics that get plots


def page(results: list[tuple[Path, dict]]) -> str:
    """The page for (file, stored result) pairs, in their order. Raises InputError for a result that lacks what its
    format promises.
    """
    parts, heads = [], []
    for place, (path, result) in enumerate(results, 1):
        kind, told, section = SECTIONS.get(result["kind"], SECTIONS[None])
        name = f"result-{place}"
        try:
            sentences, content = told(result), section(path, result)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise unlike_its_format(path, error) from error
        cut = "" if result.get("complete") else " This run was cut short."
        heads.append(f'<li><a href="#{name}">{escape(f"{kind}: {path.name}")}</a>{escape(cut)}{_list(sentences)}</li>')
        parts.append(f'<section id="{name}">{content}</section>')
    plots = "" if figures.available() else _aside(f"Without plots: {figures.MISSING}.")
    return "\n".join(
        ['<!DOCTYPE html>', '<html lang="en"><head><meta charset="utf-8">',
         '<meta name="viewport" content="width=device-width, initial-scale=1">', "<title>bsfa report</title>",
         f"<style>{STYLE}</style></head><body>", "<h1>bsfa report</h1>",
         f'<nav><ol class="contents">{"".join(heads)}</ol></nav>', plots, *parts, "</body></html>", ""]
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
        title = "Length from which a method is no slower than the fastest dense kernel"
        parts.append(_folded(title, _list(f"{method} at {words}" for method, words in rows)))
    for cell in result["cells"]:
        parts.append(_cell(cell))
    return "\n".join(parts)


def _cell(cell: dict) -> str:
    parts = [f"<h3>{cell['length']:,} tokens, {escape(cell['label'])}</h3>"]
    facts = [f"kernel: {cell['backend']}"]
    if cell["fastest_dense"]:
        facts.append(f"fastest dense: {fastest(cell)}, {cell['fastest_dense_ms']:.3f} ms")
    if cell["calibrated_on"]:
        facts.append(f"bsfa's thresholds were fitted to {cell['calibrated_on']}")
    parts.append(_aside("; ".join(facts) + "."))
    metrics = present(cell)
    first = next((metric for metric in summary.TELLING if metric in metrics), metrics[0] if metrics else None)
    for metric in sorted(metrics, key=lambda each: each != first):
        shown = [_metric_table(cell, metric, *found) for found in matched_tables(cell, metric)]
        axes = AXES if metric == first else AXES[:1] if metric in MAIN else ()
        plots = [plot for axis in axes if (plot := _plot(cell, axis, metric))]
        if metric == first:
            parts += [*plots[:1], *shown[:1]]
            plots, shown = plots[1:], shown[1:]
        if shown or plots:
            parts.append(_folded(METRICS[metric][0] + (", in other ways" if metric == first else ""), *shown, *plots))
    headings, *rows = rows_table(cell)
    parts.append(_folded(f"All {len(rows)} settings", _table(headings, rows)))
    absent = [f"{entry['name']}: {entry['reason']}" for entry in cell["unavailable"]]
    absent += [f"{name}: {reason}" for name, reason in cell["left_out"].items()]
    if absent:
        parts.append(_folded(f"{len(absent)} not measured", _list(absent)))
    return "\n".join(parts)


def _metric_table(cell: dict, metric: str, title: str, headings: list[str], table: dict) -> str:
    largest, asked = METRICS[metric][1], matching.questions(cell, metric)
    told = _list(matching.verdicts(table, headings, largest, asked))
    return f"<h4>{escape(title)}</h4>{_matched(headings, table, largest, asked)}{told}"


def _plot(cell: dict, axis: str, metric: str) -> str:
    if not figures.available():
        return ""
    figure = pareto_plot(cell, axis, metric)
    return f"<figure>{figures.svg(figure)}</figure>" if figure else ""


def _profile(path: Path, result: dict) -> str:
    parts = [_heading("Profile", path, result)]
    if result["cells"] and figures.available():
        parts.append(f"<figure>{figures.svg(speedup_plot(result))}</figure>")
    for cell in result["cells"]:
        title = f"{cell['length']:,} tokens, {head_shape(cell)}"
        parts.append(
            _folded(title, _aside(cell["data"]), _table(PROFILE_HEADINGS, cell_rows(cell)), _aside(verdict(cell)))
        )
    return "\n".join(parts)


def _verification(path: Path, result: dict) -> str:
    parts = [_heading("Verification", path, result)]
    for kind, *content in verify_report.parts(result):
        parts.append(DRAWN[kind](*content))
    return "\n".join(parts)


def _folded(title: str, *content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{''.join(content)}</details>"


def _heading(kind: str, path: Path, result: dict) -> str:
    facts = result["environment"]
    cut = "" if result.get("complete") else " This run was cut short."
    lacking = without_flash_attention_3(result)
    machine = facts.get("gpu") or "a CPU (its times say nothing about a GPU)"
    return f"<h2>{kind} on {escape(machine)}</h2>" + _aside(
        f"{path.name}; {versions(facts)}; seed {result['seed']}.{cut}" + (f" {lacking}" if lacking else "")
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
    "details": lambda title, headings, rows: _folded(title, _table(headings, rows)),
}  # fmt: skip
# {kind of result: (its name, its summary, its section)}; None: a profile
SECTIONS = {
    matching.KIND: ("Comparison", summary.comparison, _comparison),
    verification.KIND: ("Verification", summary.verification, _verification),
    None: ("Profile", summary.profile, _profile),
}
