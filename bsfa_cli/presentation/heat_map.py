"""Accuracy by length and depth: a panel for the dense model and for every operating point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from . import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, ROW, DEPTHS, ACROSS = 62, 25, 10, 3
LEFT, TOP, BOTTOM, GAP, DOWN = 64, 92, 24, 76, 70
SHADES = ("#b23a2e", "#ffffff", "#2166ac")  # wrong, half, right: told apart by colour-blind readers


@figures.styled
def heat_map(results: list[dict], words: str) -> Figure:
    """`results` are summaries (see `suites.summary`) with a `name`; `words` say what was asked.

    Raises UsageError where no question has a depth.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_hex
    from matplotlib.patches import Rectangle

    lengths = sorted({cell["length"] for result in results for cell in result["by_length_and_depth"]})
    if not lengths:
        raise UsageError("no question was asked at a depth, so there is no heat map")
    across = min(len(results), ACROSS)
    rows, wide, high = -(-len(results) // across), CELL * max(len(lengths), 3), ROW * DEPTHS
    width = LEFT + across * wide + (across - 1) * GAP + 24
    height = TOP + rows * high + (rows - 1) * DOWN + BOTTOM
    figure, panels = figures.new(
        width, height, rows, across, left=LEFT, right=24, top=TOP, bottom=BOTTOM, across=GAP, down=DOWN
    )
    figures.title(figure, words, left=LEFT)
    shades = LinearSegmentedColormap.from_list("answers", SHADES)
    for panel in panels[len(results) :]:
        panel.remove()
    for panel, result in zip(panels, results, strict=False):
        skip = "" if result["skip"] is None else f", {result['skip']:.1%} skipped"
        panel.set_title(f"{result['name']}{skip}", pad=26)
        panel.grid(False)
        panel.spines["bottom"].set_visible(False)
        panel.tick_params(top=False, bottom=False, labeltop=True, labelbottom=False)
        panel.set_xlim(0, max(len(lengths), 3))
        panel.set_ylim(DEPTHS, 0)
        panel.set_xticks([i + 0.5 for i in range(len(lengths))], [f"{length:,}" for length in lengths])
        panel.set_yticks([i + 0.5 for i in range(DEPTHS)], [f"{10 * i} %" for i in range(DEPTHS)])
        for cell in result["by_length_and_depth"]:
            x, y, exact = lengths.index(cell["length"]), cell["depth"], float(cell["exact"])
            box = panel.add_patch(Rectangle((x + 0.02, y + 0.04), 0.96, 0.92, facecolor=to_hex(shades(exact))))
            figures.tip(
                box, [f"{cell['length']:,} tokens, depth {10 * y} %: {exact:.1%} of {cell['questions']}"]
            )  # fmt: skip
            # Inks of their own: the boxes keep their colours on dark pages.
            panel.text(
                x + 0.5, y + 0.52, f"{100 * exact:.0f}", ha="center", va="center",
                color="#fefefe" if abs(exact - 0.5) > 0.3 else "#202428",
            )  # fmt: skip
    return figure
