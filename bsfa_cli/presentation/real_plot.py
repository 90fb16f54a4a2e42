"""KL divergence and perplexity against the share of tiles skipped, a line a recipe, as SVG."""

from __future__ import annotations

import math
from html import escape

from .recipes_plot import DASHES
from .svg import COLOURS, STYLE, line, number, path, text, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BETWEEN, BOTTOM = 860, 260, 64, 230, 70, 56, 56
HIGHEST_KL, LEAST_KL, HIGHEST_INCREASE = 0.3, 1e-4, 0.06  # what lies above is not drawn


def real_plot(result: dict) -> str:
    """One SVG of what `experiments.real` stores, of the first calibration. Bars: 95 % intervals over texts."""
    name, recipes = next(iter(result["calibrations"].items()))
    floor, height = result["floor"], TOP + 2 * HEIGHT + BETWEEN + BOTTOM
    machine = result["environment"].get("gpu") or "a CPU"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img">',
        f"<title>{escape('KL divergence and perplexity against tiles skipped, by recipe')}</title>",
        f"<style>{STYLE}</style>",
        '<rect width="100%" height="100%" class="page"/>',
        text(LEFT, 24, f"What skipping costs {result['model']['id']}, {result['length']:,} tokens, {machine}", "title"),
        text(
            LEFT, 44, f"thresholds from {result['calibration']['samples']} texts ({name}), judged on "
            f"{result['evaluation']['texts']} others; dense perplexity {floor['perplexity_dense']:.3f}",
        ),
    ]  # fmt: skip
    least = max(LEAST_KL, 10 ** math.floor(math.log10(max(floor["kl"], LEAST_KL))))

    def kl(value: float) -> float:
        return TOP + HEIGHT * (1 - math.log(max(value, least) / least) / math.log(HIGHEST_KL / least))

    points = [point for entry in recipes.values() for point in entry["points"]]
    lowest = min(0.0, *(point["perplexity_increase"] for point in points)) - 0.002
    top = TOP + HEIGHT + BETWEEN

    def increase(value: float) -> float:
        return top + HEIGHT * (1 - (value - lowest) / (HIGHEST_INCREASE - lowest))

    powers = [10.0**i for i in range(-4, 1) if least <= 10.0**i <= HIGHEST_KL]
    parts.append(text(LEFT, TOP - 8, "KL divergence from the dense model, nats a position", "soft"))
    parts += _grid(kl, [factor * power for power in powers for factor in (1, 3) if factor * power <= HIGHEST_KL], "g")
    parts += [line(LEFT, kl(floor["kl"]), WIDTH - RIGHT, kl(floor["kl"]), "one")]
    parts.append(text(LEFT + 4, kl(floor["kl"]) - 5, f"nothing skipped: {floor['kl']:.2g}", "soft"))
    parts.append(text(LEFT, top - 8, "change of perplexity", "soft"))
    parts += _grid(increase, ticks(lowest, HIGHEST_INCREASE), "+.0%")
    for tenth in range(0, 11, 2):
        parts.append(text(_x(tenth / 10), top + HEIGHT + 20, f"{10 * tenth} %", "soft", "middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, top + HEIGHT + 42, "tiles skipped", "soft", "middle"))
    for index, (recipe, entry) in enumerate(recipes.items()):
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        ordered = sorted(entry["points"], key=lambda point: point["skip"])
        parts += _curve(ordered, "kl", kl, HIGHEST_KL, recipe, colour, dash)
        parts += _curve(ordered, "perplexity_increase", increase, HIGHEST_INCREASE, recipe, colour, dash)
        y, reached = TOP + 14 + 42 * index, entry["furthest"]["kl_over_floor"]
        parts.append(path([(WIDTH - RIGHT + 14, y), (WIDTH - RIGHT + 34, y)], colour, dash=dash))
        parts.append(text(WIDTH - RIGHT + 42, y + 4, recipe))
        limit = f"{result['limits']['kl_over_floor']:g} above it"
        said = f"{limit} at {reached:.0%}" if reached is not None else f"never within {limit}"
        parts.append(text(WIDTH - RIGHT + 42, y + 20, said, "soft"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(skip: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * skip


def _grid(y, values: list[float], style: str) -> list[str]:
    found = []
    for value in values:
        found += [line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid")]
        found += [text(LEFT - 8, y(value) + 4, format(value, style), "soft", "end")]
    return found


def _curve(points: list[dict], metric: str, y, highest: float, recipe: str, colour: str, dash: str) -> list[str]:
    """The line of one recipe, up to the first point that is not drawn."""
    drawn = []
    for point in points:
        if not point[metric] <= highest:
            break
        drawn.append(point)
    if not drawn:
        return []
    found = [path([(_x(point["skip"]), y(point[metric])) for point in drawn], colour, dash=dash)]
    for point in drawn:
        x, (low, high) = _x(point["skip"]), point["intervals"][metric] or (point[metric], point[metric])
        words = (
            f"{recipe}, {point['name']}: {metric.replace('_', ' ')} {point[metric]:.3g} at {point['skip']:.1%} skipped"
        )
        ends = f"M{number(x)} {number(y(low))} L{number(x)} {number(y(min(high, highest)))}"
        found.append(f'<path d="{ends}" stroke="{colour}" opacity="0.5"/>')
        found.append(
            f'<circle cx="{number(x)}" cy="{number(y(point[metric]))}" r="3.5" fill="{colour}">'
            f"<title>{escape(words)}</title></circle>"
        )
    return found
