"""Pareto plots of a comparison, as SVG: quality against time or density, a line a method."""

from __future__ import annotations

from html import escape
from textwrap import wrap

from ..comparison import matching
from .plot import WIDTH as PLOT_WIDTH
from .svg import COLOURS, STYLE, line, number, path, text, ticks

HEIGHT, LEGEND = 300, 230
WIDTH = PLOT_WIDTH + 40
LEFT, RIGHT, TOP, BOTTOM = 64, LEGEND, 84, 50
LABEL = 110  # characters in a line
METHOD_COLOURS = (*COLOURS[1:], "#2a9d8f", "#c0392b", "#6c5ce7", "#795548", "#9e9d24", "#00838f", "#ad1457")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
AXES = {
    "total_ms": "ms, selection and attention",
    "attention_ms": "ms, attention alone",
    "ttft_ms": "ms to the first logits",
    "density": "share of tiles kept",
}


def pareto_plot(cell: dict, axis: str, metric: str, words: str) -> str:
    """One SVG: `metric` against `axis` (paths into a row) of every method in a cell; "" when nothing can be drawn.

    Every point carries its setting as a tooltip; methods keep their colour from plot to plot. A vertical line marks the
    fastest dense kernel on a time axis.
    """
    lines = _lines(cell, axis, metric)
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _, _ in points]
    dense = cell["fastest_dense_ms"] if axis in ("total_ms", "attention_ms") else None
    right = max(xs + [dense or 0]) * 1.05
    ys = [y for points in lines.values() for _, y, _ in points]
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.06 or 0.05
    low, high = low - margin, high + margin
    inner = WIDTH - LEFT - RIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + inner * x / right, TOP + HEIGHT * (high - y) / (high - low)

    height = TOP + max(HEIGHT, 17 * len(lines)) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" class="chart">',
        f"<title>{escape(words)}</title>",
        f"<style>{STYLE}</style>",
        '<rect width="100%" height="100%" class="page"/>',
        text(LEFT, 24, f"{words}; {cell['length']:,} tokens", "title"),
        *(text(LEFT, 44 + 16 * i, part, "soft") for i, part in enumerate(wrap(cell["label"], LABEL))),
    ]
    for y in ticks(low, high):
        parts.append(line(LEFT, at(0, y)[1], WIDTH - RIGHT, at(0, y)[1], "grid"))
        parts.append(text(LEFT - 8, at(0, y)[1] + 4, f"{y:.6g}", "soft", "end"))
    parts += [text(at(x, low)[0], TOP + HEIGHT + 20, f"{x:.6g}", "soft", "middle") for x in ticks(0, right)]
    parts.append(text(LEFT + inner / 2, TOP + HEIGHT + 40, AXES.get(axis, axis), "soft", "middle"))
    if dense:
        parts.append(line(at(dense, 0)[0], TOP, at(dense, 0)[0], TOP + HEIGHT, "one"))
        parts.append(text(at(dense, 0)[0], TOP - 6, cell["fastest_dense"], "soft", "middle"))
    every = list(matching.by_method(cell["rows"]))
    for row, (method, points) in enumerate(lines.items()):
        rank = every.index(method)
        colour, dash = METHOD_COLOURS[rank % len(METHOD_COLOURS)], DASHES[rank // len(METHOD_COLOURS) % 4]
        parts.append(path([at(x, y) for x, y, _ in points], colour, dash=dash))
        for x, y, label in points:
            cx, cy = (number(value) for value in at(x, y))
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="3.5" fill="{colour}"><title>{escape(label)}</title></circle>')
        legend = TOP + 8 + 17 * row
        parts.append(path([(WIDTH - RIGHT + 16, legend), (WIDTH - RIGHT + 40, legend)], colour, dash=dash))
        parts.append(text(WIDTH - RIGHT + 46, legend + 4, method))
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _lines(cell: dict, axis: str, metric: str) -> dict[str, list[tuple[float, float, str]]]:
    """{method: (x, y, tooltip), by x} of the rows that have both."""
    found: dict[str, list] = {}
    for row in cell["rows"]:
        x, y = matching.value(row, axis), matching.value(row, metric)
        if x is not None and y is not None:
            label = (
                f"{row['method']}, {row['knob']} {row['setting']:g}: {y:.4g} at {x:.4g}, density {row['density']:.3f}"
            )
            if row["note"]:
                label += f" ({row['note']})"
            found.setdefault(row["method"], []).append((x, y, label))
    return {method: sorted(points) for method, points in found.items()}
