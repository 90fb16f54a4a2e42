"""python -m bsfa_cli.training.curves LOG.jsonl

Writes LOG.svg: the share of last questions answered exactly against training time, a panel a task, over the whole mix
of lengths that was trained at the time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_whole
from ..presentation import figures
from .curriculum import REPEATS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOW = 10.0  # seconds that one point of a curve averages over
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP, DOWN, ACROSS = 250, 110, 52, 76, 64, 66, 3


def curves(entries: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """{task: [(seconds, share right)]} of a training log."""
    sums: dict[str, dict[int, list[float]]] = {}
    for entry in entries:
        for name, (_, _, right) in entry.get("kinds", {}).items():
            if name != REPEATS:
                sums.setdefault(name, {}).setdefault(int(entry["seconds"] / WINDOW), []).append(right)
    return {
        name: [((window + 0.5) * WINDOW, sum(found) / len(found)) for window, found in sorted(windows.items())]
        for name, windows in sums.items()
    }


@figures.styled
def draw(entries: list[dict]) -> Figure:
    """The plot."""
    found, last = curves(entries), max(entry["seconds"] for entry in entries if "kinds" in entry)
    rows = -(-len(found) // ACROSS)
    width = LEFT + ACROSS * PANEL_WIDTH + (ACROSS - 1) * GAP + 24
    height = TOP + rows * PANEL_HEIGHT + (rows - 1) * DOWN + 40
    figure, panels = figures.new(
        width, height, rows, ACROSS, left=LEFT, right=24, top=TOP, bottom=40, across=GAP, down=DOWN
    )
    figures.title(
        figure, f"Training: last question answered exactly, {WINDOW:g} s means, against seconds", left=LEFT
    )  # fmt: skip
    for panel in panels[len(found) :]:
        panel.remove()
    for panel, (name, points) in zip(panels, found.items(), strict=False):
        panel.set_title(name)
        panel.set_xlim(0, last)
        panel.set_ylim(0, 1.02)
        panel.set_xticks((0, last / 2, last), [f"{second:.0f}" for second in (0, last / 2, last)])
        panel.set_yticks((0, 0.5, 1))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.plot(*zip(*points, strict=True), linewidth=1.5)
    return figure


def main() -> None:
    log = Path(sys.argv[1])
    entries = [json.loads(entry) for entry in log.read_text().splitlines()]
    write_whole(log.with_suffix(".svg"), figures.svg(draw(entries)).encode())


if __name__ == "__main__":
    main()
