"""KL divergence and perplexity against the share of tiles skipped, a line a recipe."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import figures
from .recipes_plot import DASHES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, LEFT, RIGHT, TOP, DOWN, BOTTOM = 860, 720, 72, 230, 96, 56, 56
LABEL = 36  # pixels of a recipe's label, of which each panel has all
HIGHEST_KL, LEAST_KL, HIGHEST_INCREASE = 0.3, 1e-4, 0.06  # what lies above is not drawn
METRICS = (
    ("kl", HIGHEST_KL, "KL divergence from the dense model, nats a position"),
    ("perplexity_increase", HIGHEST_INCREASE, "change of perplexity"),
)


@figures.styled
def real_plot(result: dict, calibration: str = "mixed") -> Figure:
    """What `experiments.real` stores, of one calibration (the first where there is none of that name). Bars: 95 %
    intervals over texts.
    """
    name = calibration if calibration in result["calibrations"] else next(iter(result["calibrations"]))
    recipes, floor = result["calibrations"][name], result["floor"]
    machine = result["environment"].get("gpu") or "a CPU"
    height = max(HEIGHT, TOP + DOWN + BOTTOM + 2 * LABEL * len(recipes))
    figure, panels = figures.new(WIDTH, height, rows=2, left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM, down=DOWN)
    figures.title(
        figure,
        f"What skipping costs {result['model']['id']}, {result['length']:,} tokens, {machine}",
        f"thresholds from {result['calibration']['samples']} texts ({name}), judged on "
        f"{result['evaluation']['texts']} others; dense perplexity {floor['perplexity_dense']:.3f}",
        left=LEFT,
    )
    for panel, (metric, highest, words) in zip(panels, METRICS, strict=True):
        panel.set_title(words, loc="left", fontsize=11)
        panel.set_xlim(0, 1)
        panel.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        panel.axhline(floor[metric], color=figures.INK, alpha=0.6, linewidth=1)
        ends = []
        for i, (recipe, entry) in enumerate(recipes.items()):
            end = _curve(panel, entry["points"], metric, highest, recipe, i)
            ends.append((*end, _reached(recipe, entry, result["limits"]) if metric == "kl" else recipe, f"C{i}"))
        if metric == "kl":
            panel.set_yscale("log")
            panel.set_ylim(10 ** math.floor(math.log10(max(floor["kl"], LEAST_KL))), highest)
            panel.yaxis.set_major_formatter(lambda nats, _: f"{nats:g}")
            panel.annotate(
                f"nothing skipped: {floor['kl']:.2g}", (1, floor["kl"]), (-4, 6), textcoords="offset points",
                alpha=0.75, ha="right",
            )  # fmt: skip
        else:
            panel.set_ylim(min(-0.002, *(p[metric] - 0.002 for e in recipes.values() for p in e["points"])), highest)
            panel.yaxis.set_major_formatter(lambda share, _: f"{100 * share:+.0f} %")
            panel.set_xlabel("tiles skipped")
        figures.end_labels(panel, [(1.0, y, words, colour) for _, y, words, colour in ends], gap=LABEL)
    return figure


def _reached(recipe: str, entry: dict, limits: dict) -> str:
    reached, limit = entry["furthest"]["kl_over_floor"], f"{limits['kl_over_floor']:g} above it"
    return f"{recipe}\n{limit} at {reached:.0%}" if reached is not None else f"{recipe}\nnever within {limit}"


def _curve(panel, points: list[dict], metric: str, highest: float, recipe: str, index: int) -> tuple[float, float]:
    """The line of one recipe, up to the first point that is not drawn; (x, y) of its last one."""
    drawn = []
    for point in sorted(points, key=lambda point: point["skip"]):
        if not point[metric] <= highest:
            break
        drawn.append(point)
    where = figures.finite(point["skip"] for point in drawn)
    height = figures.finite(point[metric] for point in drawn)
    lows, highs = zip(*(point["intervals"][metric] or (point[metric],) * 2 for point in drawn), strict=True)
    panel.vlines(where, lows, highs, color=f"C{index}", alpha=0.4, linewidth=1.5)
    (line,) = panel.plot(where, height, "o", linestyle=DASHES[index % len(DASHES)], color=f"C{index}")
    figures.tip(
        line,
        [
            f"{recipe}, {p['name']}: {metric.replace('_', ' ')} {p[metric]:.3g} at {p['skip']:.1%} skipped"
            for p in drawn
        ],
    )
    return where[-1], height[-1]
