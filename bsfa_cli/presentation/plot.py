"""The plot of a profile: speedup against length. Quality against speed is in pareto.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import UsageError
from . import figures
from .profile_table import head_shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, PANEL, DOWN, TOP, BOTTOM = 820, 280, 84, 92, 56


@figures.styled
def speedup_plot(result: dict) -> Figure:
    """Speedup over the fastest dense baseline against length, a line a skip rate, one panel a head shape.

    `result` is what `bsfa profile` stores. Dotted lines are the tensor-pipe bound 2 / (1 + kept) of the tiles that were
    really kept. Raises UsageError when there is nothing to plot, ValueError for numbers that are none.
    """
    panels = [(name, series) for name, series in _panels(result["cells"]) if series]
    if not panels:
        raise UsageError("there is no speedup over a dense baseline to plot")
    machine = result["environment"].get("gpu") or "a CPU (says nothing about a GPU)"
    height = TOP + len(panels) * (PANEL + DOWN) - DOWN + BOTTOM
    figure, axes = figures.new(WIDTH, height, len(panels), right=190, top=TOP, bottom=BOTTOM, down=DOWN)
    figures.title(
        figure,
        "Speedup over the fastest dense attention",
        f"{machine}; dotted: the bound 2 / (1 + share of tiles kept)",
    )
    for panel, (name, series) in zip(axes, panels, strict=True):
        panel.set_title(name)
        _draw(panel, series)
    return figure


def _panels(cells: Iterable[dict]):
    """(title, {target skip: [(length, speedup, bound), ...]}) for each head shape, in the order measured."""
    found: dict[str, dict] = {}
    for cell in cells:
        series = found.setdefault(f"{head_shape(cell)}, {cell['backend']}", {})
        for row in cell["contenders"]:
            if row["kind"] == "bsfa" and row["skip_target"] is not None and row["speedup"] is not None:
                points = series.setdefault(row["skip_target"], [])
                points.append((cell["length"], row["speedup"], row["bound"]))
    return [(title, {skip: sorted(series[skip]) for skip in sorted(series)}) for title, series in found.items()]


def _draw(axes, series: dict[float, list[tuple[int, float, float]]]) -> None:
    lengths = sorted({length for points in series.values() for length, _, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.06, lengths[-1] * 1.06)
    axes.set_xticks(lengths, [_tokens(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.axhline(1, color=figures.INK, alpha=0.6, linewidth=1)
    ends, highest = [], 0.0
    for i, (skip, points) in enumerate(series.items()):
        colour = f"C{i - 1}" if skip else figures.GREY
        _, speedups, bounds = (figures.finite(column) for column in zip(*points, strict=True))
        highest = max(highest, *speedups, *bounds)
        where = [length for length, _, _ in points]
        if skip:
            axes.plot(where, bounds, ":", color=colour, linewidth=1.5)
        (line,) = axes.plot(where, speedups, "o-", color=colour)
        figures.tip(
            line,
            [f"{skip:.0%} skipped, {n:,} tokens: {speed:.2f}x (bound {bound:.2f}x)" for n, speed, bound in points],
        )
        ends.append((where[-1], speedups[-1], f"{skip:.0%} skipped: {speedups[-1]:.2f}x", colour))
    axes.set_ylim(0, 1.1 * highest)
    figures.end_labels(axes, ends)


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"
