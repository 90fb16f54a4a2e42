"""KL divergence and perplexity against the share of tiles skipped, a line a recipe."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import figures
from .recipes_plot import DASHES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, LEFT, RIGHT, TOP, DOWN, BOTTOM = 900, 720, 72, 270, 96, 56, 56
LABEL = 36  # pixels of a recipe's label, of which each panel has all
HIGHEST_KL, LEAST_KL, HIGHEST_INCREASE = 0.3, 1e-4, 0.06  # what lies above is not drawn
DOTTED, SOLID = ":", tuple(dash for dash in DASHES if dash != ":")
ROUNDED = ", int8 scores"  # of a recipe at the same thresholds
METRICS = (
    ("kl", HIGHEST_KL, "KL divergence from the dense model, nats a position"),
    ("perplexity_increase", HIGHEST_INCREASE, "change of perplexity"),
)


@figures.styled
def real_plot(result: dict, calibration: str = "mixed") -> Figure:
    """What `experiments.real` stores, of one calibration (the first where there is none of that name). Bars: 95 %
    intervals over texts. int8 scores are dotted, in their recipe's colour.
    """
    name = calibration if calibration in result["calibrations"] else next(iter(result["calibrations"]))
    recipes, floor = result["calibrations"][name], result["floor"]
    machine = result["environment"].get("gpu") or "a CPU"
    exact = [recipe for recipe in recipes if not recipe.endswith(ROUNDED)]
    height = max(HEIGHT, TOP + DOWN + BOTTOM + 2 * LABEL * len(exact))
    figure, panels = figures.new(WIDTH, height, rows=2, left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM, down=DOWN)
    figures.title(
        figure,
        f"What skipping costs {result['model']['id']}, {result['length']:,} tokens, {machine}",
        f"thresholds from {result['calibration']['samples']} texts ({name}), judged on "
        f"{result['evaluation']['texts']} others; dense perplexity {floor['perplexity_dense']:.3f}"
        + ("; dotted: int8 scores" if len(exact) < len(recipes) else ""),
        left=LEFT,
    )
    for panel, (metric, highest, words) in zip(panels, METRICS, strict=True):
        panel.set_title(words, loc="left", fontsize=11)
        panel.set_xlim(0, 1)
        panel.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        panel.axhline(floor[metric], color=figures.INK, alpha=0.6, linewidth=1)
        ends = []
        for i, recipe in enumerate(exact):
            entry, rounded = recipes[recipe], recipes.get(recipe + ROUNDED)
            end = _curve(panel, entry["points"], metric, highest, recipe, i)
            if rounded:
                _curve(panel, rounded["points"], metric, highest, recipe + ROUNDED, i)
            ends.append((*end, _reached(recipe, entry, result["limits"]) if metric == "kl" else recipe, f"C{i}"))
        if metric == "kl":
            panel.set_yscale("log")
            panel.set_ylim(10 ** math.floor(math.log10(max(floor["kl"], LEAST_KL))), highest)
            panel.yaxis.set_major_formatter(lambda nats, _: f"{nats:g}")
            _mark(panel, floor["kl"], f"nothing skipped: {floor['kl']:.2g}", (1, -4, "right"))
            for other, found in result.get("unskipped", {}).items():
                if not other.startswith("int8") and found["kl"] <= highest:
                    panel.axhline(found["kl"], color=figures.INK, alpha=0.35, linewidth=1, linestyle="--")
                    _mark(panel, found["kl"], f"{other}, nothing skipped: {found['kl']:.2g}", (0, 4, "left"))
        else:
            values = [p[metric] for e in recipes.values() for p in e["points"]]
            panel.set_ylim(min(-0.002, min(values) - 0.002), min(highest, 1.3 * max(*values, 0.01)))
            panel.yaxis.set_major_formatter(lambda share, _: f"{100 * share:+.3g} %")
            panel.set_xlabel("tiles skipped")
        figures.end_labels(panel, [(1.0, y, words, colour) for _, y, words, colour in ends], gap=LABEL)
    return figure


def _mark(panel, height: float, words: str, place: tuple[float, float, str]) -> None:
    """`words` above a level; `place`: at which end of it, how many points from there, and the alignment."""
    end, offset, alignment = place
    panel.annotate(words, (end, height), (offset, 6), textcoords="offset points", alpha=0.75, ha=alignment)


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
    style = {"linestyle": SOLID[index % len(SOLID)]}
    if recipe.endswith(ROUNDED):
        style = {"linestyle": DOTTED, "alpha": 0.6, "markersize": 3}
    (line,) = panel.plot(where, height, "o", color=f"C{index}", **style)
    figures.tip(
        line,
        [
            f"{recipe}, {p['name']}: {metric.replace('_', ' ')} {p[metric]:.3g} at {p['skip']:.1%} skipped"
            for p in drawn
        ],
    )
    return where[-1], height[-1]
