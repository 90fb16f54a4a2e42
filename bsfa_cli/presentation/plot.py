"""The plot of a profile: speedup against length. Pareto plots of a comparison are in pareto.py."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from ..errors import UsageError
from .profile_table import head_shape
from .svg import COLOURS, STYLE, line, number, path, text

WIDTH, PLOT_HEIGHT, LEFT, RIGHT, TOP, BOTTOM, TITLE = 820, 280, 64, 190, 56, 52, 34


def speedup_plot(result: dict) -> str:
    """Speedup over the fastest dense baseline against length, a line a skip rate, one panel a head shape.

    `result` is what `bsfa profile` stores. Dotted marks are the tensor-pipe bound 2 / (1 + kept) of the tiles that
    were really kept. Raises UsageError when there is nothing to plot.
    """
    panels = [(title, series) for title, series in _panels(result["cells"]) if series]
    if not panels:
        raise UsageError("there is no speedup over a dense baseline to plot")
    height = TITLE + len(panels) * (TOP + PLOT_HEIGHT + BOTTOM)
    environment = result["environment"]
    machine = environment.get("gpu") or "a CPU (says nothing about a GPU)"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img">',
        f"<title>{escape(f'Speedup against sequence length on {machine}')}</title>",
        f"<style>{STYLE}</style>",
        '<rect width="100%" height="100%" class="page"/>',
        text(LEFT, 26, f"Speedup over the fastest dense attention, {machine}", "title"),
    ]
    for i, (title, series) in enumerate(panels):
        parts += _panel(TITLE + i * (TOP + PLOT_HEIGHT + BOTTOM), title, series)
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _panels(cells: Iterable[dict]):
    """(title, {(target skip, label): [(length, speedup, bound), ...]}) for each head shape, in the order measured."""
    found: dict[str, dict] = {}
    for cell in cells:
        series = found.setdefault(f"{head_shape(cell)}, {cell['backend']}", {})
        for row in cell["contenders"]:
            if row["kind"] == "bsfa" and row["skip_target"] is not None and row["speedup"] is not None:
                points = series.setdefault(row["skip_target"], [])
                points.append((cell["length"], row["speedup"], row["bound"]))
    return [(title, {skip: sorted(series[skip]) for skip in sorted(series)}) for title, series in found.items()]


def _panel(top: float, title: str, series: dict) -> list[str]:
    lengths = sorted({length for points in series.values() for length, _, _ in points})
    highest = max(max(speedup, bound) for points in series.values() for _, speedup, bound in points)
    step = next(step for step in (0.1, 0.25, 0.5, 1, 2, 5, 10, 100) if highest / step <= 9)
    limit = math.ceil(highest / step + 0.2) * step
    low, high = math.log2(lengths[0]), math.log2(lengths[-1])
    inner = WIDTH - LEFT - RIGHT

    def x(length: float) -> float:
        return LEFT + inner * (0.5 if high == low else (math.log2(length) - low) / (high - low))

    def y(value: float) -> float:
        return top + TOP + PLOT_HEIGHT * (1 - value / limit)

    parts = [text(LEFT, top + TOP - 16, title)]
    for i in range(round(limit / step) + 1):
        value = i * step
        parts.append(line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid"))
        parts.append(text(LEFT - 8, y(value) + 4, f"{value:g}x", "soft", "end"))
    parts.append(line(LEFT, y(1), WIDTH - RIGHT, y(1), "one"))
    for length in lengths:
        parts.append(text(x(length), top + TOP + PLOT_HEIGHT + 20, _tokens(length), "soft", "middle"))
    parts.append(text(LEFT + inner / 2, top + TOP + PLOT_HEIGHT + 40, "tokens", "soft", "middle"))
    ends = []
    for i, (skip, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        if skip:
            parts.append(path([(x(n), y(bound)) for n, _, bound in points], colour, "bound"))
        parts.append(path([(x(n), y(speedup)) for n, speedup, _ in points], colour))
        for n, speedup, bound in points:
            label = f"{skip:.0%} skipped, {n:,} tokens: {speedup:.2f}x (bound {bound:.2f}x)"
            parts.append(
                f'<circle cx="{number(x(n))}" cy="{number(y(speedup))}" r="4" fill="{colour}">'
                f"<title>{escape(label)}</title></circle>"
            )
        ends.append((y(points[-1][1]), f"{skip:.0%} skipped: {points[-1][1]:.2f}x", colour))
    parts += _end_labels(ends, top)
    parts.append(text(WIDTH - RIGHT + 14, top + TOP + PLOT_HEIGHT + 40, "dotted: bound 2/(1+kept)", "soft"))
    return parts


def _end_labels(ends: list[tuple[float, str, str]], top: float) -> list[str]:
    """Labels right of the last points, pushed apart where they would overlap and never out of the panel."""
    gap, parts = 18, []
    placed: list[float] = []
    for wanted, _, _ in sorted(ends):
        placed.append(max(wanted, placed[-1] + gap if placed else wanted))
    overflow = max(0.0, placed[-1] - (top + TOP + PLOT_HEIGHT))
    for position, (_, label, colour) in zip(placed, sorted(ends), strict=True):
        at = position - overflow
        parts.append(
            f'<rect x="{WIDTH - RIGHT + 14}" y="{number(at - 5)}" width="10" height="10" rx="2" fill="{colour}"/>'
        )
        parts.append(text(WIDTH - RIGHT + 30, at + 4, label))
    return parts


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"
