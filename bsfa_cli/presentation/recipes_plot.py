"""What answers are lost against the share of tiles skipped, a line a recipe."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 500, 64, 230, 96, 56
DASHES = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 3)))
MOST_HALVINGS = 10
TICKS = (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
LEAST = 1e-3  # stands for no wrong answer at all


@figures.styled
def recipes_plot(result: dict) -> Figure:
    """What `experiments.recipes` stores. A step to the right halves the tiles kept, a step down multiplies what is
    answered wrong; bars: 95 % intervals.
    """
    points = [point for entry in result["recipes"].values() for point in entry["points"]]
    right = max(1, math.ceil(max(_halvings(point["skip"]) for point in points)))
    dense, evaluation = result["dense"]["exact"], result["evaluation"]
    lengths = ", ".join(f"{length:,}" for length in evaluation["lengths"])
    machine = result["environment"].get("gpu") or "a CPU"
    figure, (panel,) = figures.new(WIDTH, HEIGHT, left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM)
    figures.title(
        figure,
        f"Wrong answers against tiles skipped: {result['model']['id']}, {machine}",
        f"asked: {', '.join(evaluation['tasks'])}; {lengths} tokens; {evaluation['questions']} questions",
        f"calibrated on {result['calibration']['data']}; {result['calibration']['length']:,} tokens",
    )
    panel.set_xlim(-0.05, right)
    panel.set_yscale("log")
    least = [1 - dense, *(1 - point["exact_interval"][1] for point in points), 0.1]
    panel.set_ylim(1, max(min(least), LEAST) / 1.2)
    panel.minorticks_off()
    panel.set_yticks([share for share in TICKS if share >= panel.get_ylim()[1]])
    panel.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    panel.set_xticks(range(right + 1), [f"{100 * (1 - 0.5**halvings):.4g} %" for halvings in range(right + 1)])
    panel.set_xlabel("tiles skipped")
    panel.axhline(1 - dense, color=figures.INK, alpha=0.6, linewidth=1)
    panel.annotate(f"dense {1 - dense:.1%}", (right, 1 - dense), (0, 6), textcoords="offset points", ha="right")
    ends = []
    for i, (recipe, entry) in enumerate(result["recipes"].items()):
        ordered = sorted(entry["points"], key=lambda point: point["skip"])
        where = [_halvings(point["skip"]) for point in ordered]
        wrong = figures.finite(max(1 - point["exact"], LEAST) for point in ordered)
        best, worst = zip(
            *((max(1 - high, LEAST), 1 - low) for low, high in (p["exact_interval"] for p in ordered)), strict=True
        )
        panel.vlines(where, best, worst, color=f"C{i}", alpha=0.4, linewidth=1.5)
        (line,) = panel.plot(where, wrong, "o", linestyle=DASHES[i % len(DASHES)], color=f"C{i}")
        figures.tip(
            line,
            [f"{recipe}, {p['name']}: {p['exact']:.1%} exact at {p['skip']:.1%} skipped" for p in ordered],
        )
        kept = entry["furthest"]
        said = f"99 % kept up to {kept['skip']:.1%}" if kept else "never keeps 99 %"
        ends.append((right, wrong[-1], f"{recipe}\n{said}", f"C{i}"))
    figures.end_labels(panel, ends, gap=38)
    return figure


def _halvings(skip: float) -> float:
    return min(MOST_HALVINGS, -math.log2(max(1 - skip, 0.5**MOST_HALVINGS)))
