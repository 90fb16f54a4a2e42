"""Accuracy by length and depth as an SVG: a panel for the dense model and for every operating point."""

from __future__ import annotations

from html import escape

from ..errors import UsageError
from .svg import STYLE, number, text

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP, GAP, TITLE, DEPTHS, ACROSS = 58, 24, 64, 66, 26, 40, 10, 3
WRONG, RIGHT = (178, 58, 46), (33, 102, 172)  # told apart by colour-blind readers; white lies between


def heat_map(results: list[dict], words: str) -> str:
    """One SVG. `results` are summaries (see `suites.summary`) with a `name`; `words` say what was asked.

    Raises UsageError where no question has a depth.
    """
    lengths = sorted({cell["length"] for result in results for cell in result["by_length_and_depth"]})
    if not lengths:
        raise UsageError("no question was asked at a depth, so there is no heat map")
    across = min(len(results), ACROSS)
    panel_width = LEFT + CELL_WIDTH * max(len(lengths), 3) + GAP
    panel_height = TOP + CELL_HEIGHT * DEPTHS + GAP
    width, height = across * panel_width, TITLE + -(-len(results) // across) * panel_height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">',
        f"<title>{escape(words)}</title>",
        f"<style>{STYLE} .in {{ font-size: 12px; fill: #1f2328 }} .light {{ fill: #ffffff }}</style>",
        '<rect width="100%" height="100%" class="page"/>',
        text(LEFT, 26, words, "title"),
    ]
    for index, result in enumerate(results):
        left, top = index % across * panel_width, TITLE + index // across * panel_height
        parts += _panel(left + LEFT, top + TOP, result, lengths)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: float, top: float, result: dict, lengths: list[int]) -> list[str]:
    skip = "" if result["skip"] is None else f", {result['skip']:.1%} skipped"
    parts = [text(left, top - 30, f"{result['name']}{skip}")]
    parts += [
        text(left + (i + 0.5) * CELL_WIDTH, top - 8, f"{length:,}", "soft", "middle")
        for i, length in enumerate(lengths)
    ]
    for depth in range(0, DEPTHS):
        parts.append(text(left - 8, top + (depth + 0.7) * CELL_HEIGHT, f"{10 * depth} %", "soft", "end"))
    for cell in result["by_length_and_depth"]:
        x = left + lengths.index(cell["length"]) * CELL_WIDTH
        y = top + cell["depth"] * CELL_HEIGHT
        label = f"{cell['length']:,} tokens, depth {10 * cell['depth']} %: {cell['exact']:.1%} of {cell['questions']}"
        parts.append(
            f'<rect x="{number(x + 1)}" y="{number(y + 1)}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" '
            f'fill="{_colour(cell["exact"])}"><title>{escape(label)}</title></rect>'
        )
        style = "in light" if abs(cell["exact"] - 0.5) > 0.3 else "in"
        parts.append(text(x + CELL_WIDTH / 2, y + 0.7 * CELL_HEIGHT, f"{100 * cell['exact']:.0f}", style, "middle"))
    return parts


def _colour(share: float) -> str:
    """From WRONG at 0 over white at a half to RIGHT at 1."""
    end, strength = (RIGHT, 2 * share - 1) if share >= 0.5 else (WRONG, 1 - 2 * share)
    return "#" + "".join(f"{round(255 + (channel - 255) * strength):02x}" for channel in end)
