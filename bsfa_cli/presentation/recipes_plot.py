"""Accuracy against the share of tiles skipped, a line a recipe, as SVG."""

from __future__ import annotations

import math
from html import escape

from .svg import COLOURS, STYLE, line, number, path, text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 340, 64, 220, 84, 60
DASHES = ("", "7 3", "2 3", "", "7 3", "10 3 2 3")
MOST_HALVINGS = 10


def recipes_plot(result: dict) -> str:
    """One SVG of what `experiments.recipes` stores. A step to the right halves the tiles kept; bars: 95 % intervals."""
    points = [point for entry in result["recipes"].values() for point in entry["points"]]
    right = max(1, math.ceil(max(_halvings(point["skip"]) for point in points)))
    dense, evaluation = result["dense"]["exact"], result["evaluation"]

    def at(skip: float, exact: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - RIGHT) * _halvings(skip) / right, TOP + HEIGHT * (1 - exact)

    height = TOP + HEIGHT + BOTTOM
    lengths = ", ".join(f"{length:,}" for length in evaluation["lengths"])
    machine = result["environment"].get("gpu") or "a CPU"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img">',
        f"<title>{escape('Exact answers against tiles skipped, by recipe')}</title>",
        f"<style>{STYLE}</style>",
        '<rect width="100%" height="100%" class="page"/>',
        text(LEFT, 24, f"Exact answers against tiles skipped: {result['model']['id']}, {machine}", "title"),
        text(
            LEFT, 44, f"asked: {', '.join(evaluation['tasks'])}; {lengths} tokens; {evaluation['questions']} questions"
        ),
        text(LEFT, 62, f"calibrated on {result['calibration']['data']}; {result['calibration']['length']:,} tokens"),
    ]
    for tenth in range(0, 11, 2):
        y = at(0, tenth / 10)[1]
        parts += [line(LEFT, y, WIDTH - RIGHT, y, "grid"), text(LEFT - 8, y + 4, f"{10 * tenth} %", "soft", "end")]
    for halvings in range(right + 1):
        x = at(1 - 0.5**halvings, 0)[0]
        parts.append(text(x, TOP + HEIGHT + 20, f"{100 * (1 - 0.5**halvings):.4g} %", "soft", "middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, TOP + HEIGHT + 42, "tiles skipped", "soft", "middle"))
    parts.append(line(LEFT, at(0, dense)[1], WIDTH - RIGHT, at(0, dense)[1], "one"))
    parts.append(text(LEFT + 4, at(0, dense)[1] - 5, f"dense {dense:.1%}", "soft"))
    for index, (recipe, entry) in enumerate(result["recipes"].items()):
        colour, ordered = COLOURS[index % len(COLOURS)], sorted(entry["points"], key=lambda point: point["skip"])
        parts.append(path([at(p["skip"], p["exact"]) for p in ordered], colour, dash=DASHES[index % len(DASHES)]))
        parts += [mark for point in ordered for mark in _mark(at, recipe, point, colour)]
        y = TOP + 14 + 40 * index
        parts.append(path([(WIDTH - RIGHT + 14, y), (WIDTH - RIGHT + 34, y)], colour, dash=DASHES[index % len(DASHES)]))
        parts.append(text(WIDTH - RIGHT + 42, y + 4, recipe))
        best = entry["furthest"]
        said = f"99 % kept up to {best['skip']:.1%}" if best else "never keeps 99 %"
        parts.append(text(WIDTH - RIGHT + 42, y + 20, said, "soft"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _mark(at, recipe: str, point: dict, colour: str) -> list[str]:
    x, y = at(point["skip"], point["exact"])
    low, high = (at(point["skip"], end)[1] for end in point["exact_interval"])
    words = f"{recipe}, {point['name']}: {point['exact']:.1%} exact at {point['skip']:.1%} skipped"
    return [
        f'<path d="M{number(x)} {number(low)} L{number(x)} {number(high)}" stroke="{colour}" opacity="0.5"/>',
        f'<circle cx="{number(x)}" cy="{number(y)}" r="4" fill="{colour}"><title>{escape(words)}</title></circle>',
    ]


def _halvings(skip: float) -> float:
    return min(MOST_HALVINGS, -math.log2(max(1 - skip, 0.5**MOST_HALVINGS)))
