"""SVG written by hand: one file, no scripts, no fonts to fetch, readable on light and dark pages.

Every text goes through `escape`; numbers go through `number`, which refuses what is not finite.
"""

from __future__ import annotations

import math
from html import escape

# Told apart by colour-blind readers and on both backgrounds; dashes and labels say the same once more.
COLOURS = ("#7f7f7f", "#0f86c9", "#d9730d", "#3f9b54", "#b5549c", "#b8860b")
STYLE = """
svg { color: #1f2328; font: 13px system-ui, 'DejaVu Sans', sans-serif }
.page { fill: #ffffff } .soft { opacity: .65 } .grid { stroke: currentColor; opacity: .15 }
.one { stroke: currentColor; opacity: .6 } text { fill: currentColor } .title { font-size: 15px; font-weight: 600 }
.bound { stroke-dasharray: 2 4; opacity: .9 }
@media (prefers-color-scheme: dark) { svg { color: #e6edf3 } .page { fill: #0d1117 } }
"""


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from `low` to `high`; at most `most` + 1 of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def path(points: list[tuple[float, float]], colour: str, style: str = "", dash: str = "") -> str:
    """A line through points."""
    route = " ".join(f"{'L' if i else 'M'}{number(x)} {number(y)}" for i, (x, y) in enumerate(points))
    css = f' class="{style}"' if style else ""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="{route}" fill="none" stroke="{colour}" stroke-width="2"{css}{dashes}/>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}" class="{escape(style)}"/>'


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    """One line of text, escaped."""
    css = f' class="{escape(style)}"' if style else ""
    return f'<text x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"{css}>{escape(content)}</text>'


def number(value: float) -> str:
    """A coordinate. Raises ValueError for what is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"cannot draw {value}")
    return f"{value:.1f}"
