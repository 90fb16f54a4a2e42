"""A stored comparison in docs/results.md: who is best at equal time, where bsfa stands, from which length on a method
pays.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..comparison import matching
from ..errors import UsageError
from .compare_table import METRICS, break_even_rows, matched_tables, number, present
from .dense_kernels import without_flash_attention_3
from .pareto import pareto_plot
from .versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TELLING = "agreement.top1"  # where a model has it: answers are all right or all wrong too often
SHOWN = 2  # metrics of a cell: inside a model with tasks, accuracy and agreement with the dense model


def block(result: dict, source: str, plot: str) -> str:
    """Markdown for one stored comparison: `source` and `plot` are links to it and to `plot_of`."""
    facts = result["environment"]
    name = Path(source).name.partition(".")[0]
    lines = [f"### Methods compared ({name}) on {facts.get('gpu') or 'a CPU'}", ""]
    file = Path(source).name
    lines.append(f"{versions(facts)}. Raw samples: [`{file}`]({source}); `bsfa report {file} -o report.html`.")
    if not result.get("complete"):
        lines[-1] += " **This run was cut short.**"
    lacking = without_flash_attention_3(result)
    if lacking:
        lines[-1] += f" {lacking}"
    for cell in result["cells"]:
        lines += ["", *_cell(cell)]
    if result["cells"]:
        sure = surest(result)
        for metric in present(sure)[:SHOWN]:
            title = f"All methods, {sure['length']:,} tokens: {METRICS[metric][0]}"
            lines += ["", f"<details><summary>{title}</summary>", "", *_table(sure, metric), "", "</details>"]
        lines += ["", f"![What is lost against measured speedup]({plot})"]
    rows = break_even_rows(result)
    if rows:
        lines += ["", "Length from which a method is no slower than the fastest dense kernel, by setting:", ""]
        lines += ["| method | tokens |", "| --- | --- |", *(f"| {method} | {words} |" for method, words in rows)]
    return "\n".join(lines)


def plot_of(result: dict) -> Figure:
    """One cell (see `surest`): the metric that tells methods apart best, against measured speedup.

    Raises UsageError where there is nothing to draw.
    """
    cell = surest(result)
    for metric in sorted(present(cell), key=lambda each: each != TELLING):
        figure = pareto_plot(cell, "total_ms", metric, result["environment"].get("gpu"))
        if figure is not None:
            return figure
    raise UsageError("no method keeps enough to be plotted")


def surest(result: dict) -> dict:
    """The cell with the most questions, the longest of several."""
    return max(result["cells"], key=lambda cell: (matching.questions(cell, matching.ACCURACY) or 0, cell["length"]))


def _cell(cell: dict) -> list[str]:
    """Who is best at equal time, or where there is no such table at equal density, by the first metrics."""
    lines = [f"**{cell['length']:,} tokens, {cell['label']}**"]
    for metric in present(cell)[:SHOWN]:
        title, headings, table = matched_tables(cell, metric)[0]
        told = matching.verdicts(table, headings, METRICS[metric][1], matching.questions(cell, metric))
        lines += ["", f"{title[0].upper()}{title[1:]}:", "", *(f"- {sentence}" for sentence in told)]
    return lines


def _table(cell: dict, metric: str) -> list[str]:
    """One metric of a cell: a row a method, columns at equal times and densities, the best in bold."""
    largest, asked = METRICS[metric][1], matching.questions(cell, metric)
    found = {title.rpartition("at equal ")[2]: rest for title, *rest in matched_tables(cell, metric)}
    columns = []
    for kind in ("time (selection and attention)", "density"):
        headings, table = found.get(kind, ([], {}))
        columns += [(heading, table, i, matching.best(table, i, largest, asked)) for i, heading in enumerate(headings)]
    lines = [
        "| | " + " | ".join(heading for heading, *_ in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for method in matching.by_method(cell["rows"]):
        fields = [number(table[method][i]) for _, table, i, _ in columns]
        fields = [f"**{text}**" if method in best else text for text, (*_, best) in zip(fields, columns, strict=True)]
        lines.append(f"| {method} | " + " | ".join(fields) + " |")
    return lines
