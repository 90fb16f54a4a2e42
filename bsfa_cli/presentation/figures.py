"""Figures in the project's one look (bsfa.mplstyle), as SVG or PNG; matplotlib is an extra.

    @styled
    def draw(...) -> Figure: figure, axes = new(820, 400); ...
    write_whole(path, content(draw(...), path))

An SVG follows the colour scheme of the page it stands on, shows `tip`s where the mouse rests, fetches nothing, and has
the same bytes each time it is made with one version of matplotlib.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ..errors import MachineError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("bsfa.mplstyle")
INK, PAGE, GREY = "#1f2328", "#ffffff", "#8c959f"
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
SCHEMES = (
    f".bsfa {{ color: {INK}; --page: {PAGE} }} .bsfa * {{ stroke-linejoin: round; stroke-linecap: butt }} "
    "@media (prefers-color-scheme: dark) { .bsfa { color: #e6edf3; --page: #0d1117 } }"
)
MARKER = 9  # what it costs a label to cover a marker, or to be nearer to another's; a few pixels of a line cost 1
PNG_DPI = 144  # twice the SVG's pixels
MISSING = "plots need matplotlib, which is not installed: pip install 'bsfa[plots]'"


def available() -> bool:
    """Whether plots can be drawn here."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def check(path: Path) -> None:
    """Refuse a plot that `path` cannot hold or this machine cannot draw, before the work. Raises UsageError and
    MachineError.
    """
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"a plot is an .svg or a .png file, got {path}")
    if not available():
        raise MachineError(MISSING)


def styled(draw: Callable) -> Callable:
    """`draw` with the project's look and nothing of the user's. Raises MachineError where there is no matplotlib."""

    @wraps(draw)
    def inside(*args, **kwargs):
        if not available():
            raise MachineError(MISSING)
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rc_file(STYLE)
            matplotlib.rcParams["svg.hashsalt"] = "bsfa"
            return draw(*args, **kwargs)

    return inside


def new(width: float, height: float, rows: int = 1, columns: int = 1, **margins: float) -> tuple[Figure, list[Axes]]:
    """A figure of this many pixels, and its panels. Margins are pixels: left, right, top, bottom, and across, down
    between panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72))
    left, right = margins.get("left", 64), margins.get("right", 24)
    top, bottom = margins.get("top", 64), margins.get("bottom", 52)
    across, down = margins.get("across", 0), margins.get("down", 0)
    wide = (width - left - right - (columns - 1) * across) / columns
    high = (height - top - bottom - (rows - 1) * down) / rows
    panels = [
        figure.add_axes((
            (left + column * (wide + across)) / width, 1 - (top + row * (high + down) + high) / height,
            wide / width, high / height,
        ))
        for row in range(rows) for column in range(columns)
    ]  # fmt: skip
    figure.bsfa_tips = {}
    return figure, panels


def title(figure: Figure, words: str, *more: str, left: float = 64) -> None:
    """A heading and softer lines below it, in the upper left."""
    width, height = (72 * side for side in figure.get_size_inches())
    figure.text(left / width, 1 - 24 / height, words, fontsize=15, fontweight="bold", va="baseline")
    for i, line in enumerate(more):
        figure.text(left / width, 1 - (44 + 16 * i) / height, line, alpha=0.75, va="baseline")


def tip(artist, words: Sequence[str]) -> None:
    """What an SVG says of each marker of `artist`, or of `artist` itself where it has none."""
    tips = artist.get_figure().bsfa_tips
    gid = f"tip-{len(tips)}"
    artist.set_gid(gid)
    tips[gid] = list(words)


def finite(values: Iterable[float]) -> list[float]:
    """The values. Raises ValueError for what cannot be drawn."""
    values = list(values)
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"cannot draw {value}")
    return values


def content(figure: Figure, path: Path) -> bytes:
    """What to write to `path`, by its ending."""
    return png(figure) if path.suffix == ".png" else svg(figure).encode()


@styled
def png(figure: Figure) -> bytes:
    """The figure on a light page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


@styled
def svg(figure: Figure) -> str:
    """The figure as one `<svg>` element, to be a file or a part of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    width, height = (f"{round(72 * side)}" for side in figure.get_size_inches())
    root.attrib |= {"width": width, "height": height, "class": "bsfa", "role": "img"}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{SVG}}}metadata":
                parent.remove(child)
    for element in root.iter(f"{{{SVG}}}style"):
        element.text = SCHEMES
    for group in root.iter(f"{{{SVG}}}g"):
        words = figure.bsfa_tips.get(group.attrib.pop("id", None))
        if words:
            marks = list(group.iter(f"{{{SVG}}}use")) or [group]
            for mark, word in zip(marks, words, strict=True):
                said = ElementTree.Element(f"{{{SVG}}}title")
                said.text = word
                mark.insert(0, said)
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r"(: ?)" + INK, r"\1currentColor", text.replace(f"fill: {PAGE}", "fill: var(--page)"))
    # ElementTree has no CDATA; a style of this kind needs none, and the scheme's own ink is put back.
    return text.replace("color: currentColor;", f"color: {INK};", 1) + "\n"


def apart(wanted: Sequence[float], gap: float, highest: float) -> list[float]:
    """Heights near the `wanted` ones, in their order, at least `gap` apart, none above `highest`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap if placed else wanted[i]))
    for at in reversed(range(len(placed))):
        most = highest if at == len(placed) - 1 else placed[at + 1] - gap
        placed[at] = min(placed[at], most)
    return [height for _, height in sorted(zip(order, placed, strict=True))]


def end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 17) -> None:
    """(x, y, words, colour) right of the last points of lines, kept apart."""
    pixels = [axes.transData.transform((x, y))[1] for x, y, _, _ in ends]
    places = apart(pixels, gap, axes.bbox.y1)
    for (x, y, words, colour), pixel, place in zip(ends, pixels, places, strict=True):
        axes.annotate(
            words, (x, y), (12, place - pixel), textcoords="offset points", color=colour, va="center",
            fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def line_labels(axes: Axes, lines: Sequence[tuple[Sequence[tuple[float, float]], str, str]], others=()) -> None:
    """A label in its line's colour beside each of the `lines` (points, words, colour), where it covers least of them,
    of the `others` (points) and of the labels before it, and stands nearer to its own points than to theirs.
    """
    routes = [axes.transData.transform(points) for points, _, _ in lines]
    obstacles = [mark for route in routes for mark in [*_along(route), *MARKER * [tuple(point) for point in route]]]
    obstacles += [mark for points in others for mark in _along(axes.transData.transform(points))]
    taken: list = []
    for at, (route, (points, words, colour)) in enumerate(zip(routes, lines, strict=True)):
        rivals = [point for other, marks in enumerate(routes) if other != at for point in marks]
        label = axes.annotate(
            words, points[0], (0, 0), textcoords="offset points", color=colour, fontweight="bold",
            annotation_clip=False,
        )  # fmt: skip
        extent = label.get_window_extent(_renderer(axes.get_figure()))
        best = None
        for i, (x, y) in enumerate(route):
            for dx, dy in _offsets(extent.width, extent.height):
                box = (x + dx, y + dy, x + dx + extent.width, y + dy + extent.height)
                cost = _cost(box, obstacles, taken, axes.bbox)
                if any(_away(box, rival) <= _away(box, (x, y)) for rival in rivals):
                    cost += MARKER
                if best is None or cost < best[0]:
                    best = cost, i, (dx, dy), box
        _, i, offset, box = best
        label.xy, label.xyann = points[i], offset
        taken.append(box)


def _offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Where a label's lower left corner may stand, from its point."""
    gap = 8
    return [
        (gap, -height / 2), (-width - gap, -height / 2), (gap, gap / 2), (-width - gap, gap / 2),
        (gap, -height - gap / 2), (-width - gap, -height - gap / 2), (-width / 2, gap), (-width / 2, -height - gap),
    ]  # fmt: skip


def _along(route) -> list[tuple[float, float]]:
    """Places every few pixels of a way through points."""
    found = [tuple(route[0])] if len(route) else []
    for (x0, y0), (x1, y1) in zip(route, route[1:], strict=False):
        steps = max(1, round(math.hypot(x1 - x0, y1 - y0) / 6))
        found += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(1, steps + 1)]
    return found


def _cost(box, obstacles, taken, frame) -> float:
    left, low, right, high = box
    cost = sum(left - 3 <= x <= right + 3 and low - 2 <= y <= high + 2 for x, y in obstacles)
    cost += 100 * sum(left < b[2] and b[0] < right and low < b[3] and b[1] < high for b in taken)
    outside = max(0, frame.x0 - left) + max(0, right - frame.x1) + max(0, frame.y0 - low) + max(0, high - frame.y1)
    return cost + outside


def _away(box, point) -> float:
    """Pixels from a box to a point."""
    (left, low, right, high), (x, y) = box, point
    return math.hypot(max(left - x, 0, x - right), max(low - y, 0, y - high))


def _renderer(figure: Figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return FigureCanvasAgg(figure).get_renderer()
