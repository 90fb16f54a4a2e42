"""python -m bsfa_cli.training.curves LOG.jsonl

Writes LOG.svg: the share of last questions answered exactly against training time, a panel a task, over the whole mix
of lengths that was trained at the time.
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path

from ..files import write_whole
from ..presentation.svg import COLOURS, STYLE, line, path, text
from .curriculum import REPEATS

WINDOW = 10.0  # seconds that one point of a curve averages over
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP, TITLE, ACROSS = 250, 110, 52, 26, 22, 40, 3


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


def draw(entries: list[dict]) -> str:
    """The SVG."""
    found, last = curves(entries), max(entry["seconds"] for entry in entries if "kinds" in entry)
    width = ACROSS * (LEFT + PANEL_WIDTH + GAP)
    height = TITLE + -(-len(found) // ACROSS) * (TOP + PANEL_HEIGHT + GAP + 16)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">',
        f"<title>{escape('Training: exact answers against seconds')}</title>",
        f"<style>{STYLE}</style>",
        '<rect width="100%" height="100%" class="page"/>',
        text(LEFT, 24, f"Training: last question answered exactly, {WINDOW:g} s means, against seconds", "title"),
    ]
    for index, (name, points) in enumerate(found.items()):
        left = LEFT + index % ACROSS * (LEFT + PANEL_WIDTH + GAP)
        top = TITLE + TOP + index // ACROSS * (TOP + PANEL_HEIGHT + GAP + 16)
        parts.append(text(left, top - 8, name))
        for share in (0.0, 0.5, 1.0):
            y = top + PANEL_HEIGHT * (1 - share)
            parts += [line(left, y, left + PANEL_WIDTH, y, "grid"), text(left - 6, y + 4, f"{share:g}", "soft", "end")]
        for second in (0, last / 2, last):
            x = left + PANEL_WIDTH * second / last
            parts.append(text(x, top + PANEL_HEIGHT + 16, f"{second:.0f}", "soft", "middle"))
        places = [(left + PANEL_WIDTH * min(1.0, x / last), top + PANEL_HEIGHT * (1 - y)) for x, y in points]
        parts.append(path(places, COLOURS[1]))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    log = Path(sys.argv[1])
    entries = [json.loads(entry) for entry in log.read_text().splitlines()]
    write_whole(log.with_suffix(".svg"), draw(entries).encode())


if __name__ == "__main__":
    main()
