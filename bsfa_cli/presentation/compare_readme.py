"""A stored comparison in README.md: who is best at equal time, where bsfa stands, from which length a method pays."""

from __future__ import annotations

from pathlib import Path

from ..comparison import matching
from .compare_table import METRICS, break_even_rows, matched_tables, number, present
from .pareto import pareto_plot
from .versions import versions


def block(result: dict, source: str, plot: Path) -> str:
    """Markdown for one stored comparison; `plot` is where the longest cell's plot lies."""
    facts = result["environment"]
    lines = [f"### Methods compared on {facts.get('gpu') or 'a CPU'}", ""]
    lines.append(f"{versions(facts)}. Raw samples: [`{source}`]({source}); `bsfa report {source} -o report.html`.")
    if not result.get("complete"):
        lines[-1] += " **This run was cut short.**"
    for cell in result["cells"]:
        lines += ["", *_cell(cell)]
    longest = max(result["cells"], key=lambda cell: cell["length"], default=None)
    if longest is not None:
        lines += ["", f"**All methods, {longest['length']:,} tokens**", "", *_tables(longest)]
        lines += ["", f"![Quality against time]({plot.as_posix()})"]
    rows = break_even_rows(result)
    if rows:
        lines += ["", "Length from which a method is no slower than the fastest dense kernel, by setting:", ""]
        lines += ["| method | tokens |", "| --- | --- |", *(f"| {method} | {words} |" for method, words in rows)]
    return "\n".join(lines)


def plot_of(result: dict) -> str:
    """The SVG of the longest cell: its first metric against time."""
    longest = max(result["cells"], key=lambda cell: cell["length"])
    metric = present(longest)[0]
    return pareto_plot(longest, "total_ms", metric, METRICS[metric][0])


def _cell(cell: dict) -> list[str]:
    metric = present(cell)[0]
    title, headings, table = matched_tables(cell, metric)[0]
    lines = [f"**{cell['length']:,} tokens, {cell['label']}: {title}**", ""]
    return lines + [f"- {sentence}" for sentence in matching.verdicts(table, headings, METRICS[metric][1])]


def _tables(cell: dict) -> list[str]:
    """One table of a cell's first metric: a row a method, columns at equal times and densities, the best in bold."""
    metric = present(cell)[0]
    largest = METRICS[metric][1]
    found = {title.rpartition("at equal ")[2]: rest for title, *rest in matched_tables(cell, metric)}
    columns = []
    for kind in ("time (selection and attention)", "density"):
        headings, table = found.get(kind, ([], {}))
        columns += [(heading, table, i, matching.best(table, i, largest)) for i, heading in enumerate(headings)]
    lines = [
        f"| {METRICS[metric][0]} | " + " | ".join(heading for heading, *_ in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for method in matching.by_method(cell["rows"]):
        fields = [number(table[method][i]) for _, table, i, _ in columns]
        fields = [f"**{text}**" if method in best else text for text, (*_, best) in zip(fields, columns, strict=True)]
        lines.append(f"| {method} | " + " | ".join(fields) + " |")
    return lines
