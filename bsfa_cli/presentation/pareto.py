"""Pareto plots of a comparison: what is lost against what is gained, a line a method, the best in the upper right."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, NamedTuple

from ..comparison import matching
from . import figures
from .compare_table import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 516, 76, 24, 80, 100
LABEL, GREYS = 110, 125  # characters in a line
COLOURS = 7  # of the style
OWN, PAPER, DENSE = "bsfa", "bsfa_top_k", "dense"
NAMES = {PAPER: "top-k, the BSFA paper's recipe", DENSE: "every tile kept"}
AXES = {  # axis: (what the fastest dense kernel takes of it, words for the quotient, words for the axis itself)
    "total_ms": ("fastest_dense_ms", "attention's speedup over {}, selection included", "ms, selection and attention"),
    "attention_ms": ("fastest_dense_ms", "attention's speedup over {}, were selection free", "ms, attention alone"),
    "ttft_ms": ("fastest_ttft_ms", "speedup of the whole prefill over {}", "ms to the first logits"),
    "density": (None, "", "share of tiles kept"),
}
LOSSES = {
    matching.ACCURACY: "questions answered wrong",
    "agreement.top1": "tokens predicted otherwise than densely",
    "agreement.kl": METRICS["agreement.kl"][0],
    "recall.mean": "softmax mass lost, mean over rows",
    "recall.worst": "softmax mass lost, worst row",
    "needle.mean": "softmax mass lost in the rows that look for the needle",
    "error": METRICS["error"][0],
}
WORST = 0.3  # share beyond which a method is of no use, and out of the picture


class Place(NamedTuple):
    """A row in the plot: `gain` grows to the right; the words are its tooltip."""

    gain: float
    loss: float
    words: str


@figures.styled
def pareto_plot(cell: dict, axis: str, metric: str, machine: str | None = None) -> Figure | None:
    """The loss of a metric, on a logarithmic scale with nothing lost at the top, against `axis` (both paths into a row)
    of every method in a cell; None when nothing can be drawn.

    Methods that are somewhere better than all others have colours and names, as have bsfa and the BSFA paper's recipe;
    those always beaten are grey. Every point carries its setting as a tooltip.
    """
    reference, quotient, plain = AXES[axis]
    base = cell.get(reference) if reference else None
    lines, floor = _lines(cell, axis, base, metric)
    if not lines:
        return None
    share = METRICS[metric][1]
    figure, (panel,) = figures.new(WIDTH, HEIGHT, left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM)
    words, where = LOSSES[metric], "; ".join(filter(None, (machine, cell["label"])))
    figures.title(
        figure, f"{words[0].upper()}{words[1:]}; {cell['length']:,} tokens", *wrap(where, LABEL)[:2], left=LEFT
    )
    gains = figures.finite(abs(place.gain) for places in lines.values() for place in places)
    losses = figures.finite(place.loss for places in lines.values() for place in places)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(min(gains) / 1.06, max(gains) * 1.12)
    panel.set_ylim(max(losses) * 1.25, min(losses) / 1.35)
    if base is None:
        panel.invert_xaxis()
    panel.set_xlabel(quotient.format(cell["fastest_dense"]) if base else plain)
    _ticks(panel, max(gains) / min(gains), "x" if base else "", share, floor)
    if base:
        panel.axvline(1, color=figures.INK, alpha=0.6, linewidth=1)
    _draw(figure, panel, lines)
    return figure


def _draw(figure: Figure, panel, lines: dict[str, list[Place]]) -> None:
    front = _front(lines)
    named = [OWN, PAPER, *(method for method in lines if method in front and method not in (OWN, PAPER, DENSE))]
    grey = [method for method in lines if method not in named and method != DENSE]
    labels, others = [], [[(1, height) for height in panel.get_ylim()]]
    for method in [*grey, *reversed(named), DENSE]:
        if method not in lines:
            continue
        places = lines[method]
        points = [(abs(place.gain), place.loss) for place in places]
        colour, marker = _look(named.index(method)) if method in named else (figures.GREY, "o")
        style = {"marker": marker} | ({"linestyle": "--"} if "+" in method else {})
        if method in grey:
            style |= {"linestyle": "-", "linewidth": 1.2, "markersize": 4, "alpha": 0.6}
        if method == OWN:
            style |= {"linewidth": 3, "markersize": 8}
        if method == DENSE:
            colour, style = figures.INK, {"marker": "D"}
        (line,) = panel.plot(*zip(*points, strict=True), color=colour, **style)
        figures.tip(line, [place.words for place in places])
        if method in grey:
            others.append(points)
        else:
            labels.append((points, NAMES.get(method, method.replace("_", " ")), colour))
    figures.line_labels(panel, labels[::-1], others)
    if grey:
        said = wrap(
            f"grey, beaten everywhere in this picture: {', '.join(name.replace('_', ' ') for name in grey)}", LABEL
        )
        for i, row in enumerate(said[:3]):
            figure.text(LEFT / WIDTH, (44 - 16 * i) / HEIGHT, row, alpha=0.75, fontsize=11)


def _look(rank: int) -> tuple[str, str]:
    """(colour, marker): bsfa's and the paper's colours are nobody else's; where others' begin anew, markers differ."""
    if rank < 2:
        return f"C{rank}", "o"
    lap, colour = divmod(rank - 2, COLOURS - 2)
    return f"C{2 + colour}", "os^Dv"[lap % 5]


def _lines(cell: dict, axis: str, base: float | None, metric: str) -> tuple[dict[str, list[Place]], float | None]:
    """({method: places from left to right} of the rows that have both numbers and lose less than WORST, what stands
    for a loss of nothing where there is one).
    """
    found: dict[str, list] = {}
    share = METRICS[metric][1]
    for row in cell["rows"]:
        x, y = matching.value(row, axis), matching.value(row, metric)
        if x is None or y is None or x <= 0:
            continue
        loss = 1 - y if share else y
        if loss > (WORST if share and metric != "recall.worst" else 1):
            continue
        setting = f" {row['knob']} {row['setting']:g}" if row["knob"] else ""
        told = f"{row['method']}{setting}: {y:.4g} at {base / x:.2f}x" if base else f"{row['method']}{setting}: {y:.4g}"
        told += f", {x:.4g} ms" if axis.endswith("_ms") else ""
        told += f", density {row['density']:.3f}" + (f" ({row['note']})" if row["note"] else "")
        found.setdefault(row["method"], []).append(Place(base / x if base else -x, max(loss, 0.0), told))
    losses = [place.loss for places in found.values() for place in places]
    floor = min((loss for loss in losses if loss > 1e-9), default=1e-3) / 2 if min(losses, default=1) <= 1e-9 else None
    return {
        method: sorted(place if place.loss > 1e-9 else place._replace(loss=floor) for place in places)
        for method, places in found.items()
    }, floor


def _front(lines: dict[str, list[Place]]) -> set[str]:
    """The methods that somewhere lose less than all that gain as much; what our kernel loses by rounding when it keeps
    every tile is no loss.
    """
    noise = max((place.loss for place in lines.get(DENSE, ())), default=0.0)
    ordered = sorted(
        ((place._replace(loss=max(place.loss, noise)), method) for method, places in lines.items() for place in places),
        key=lambda item: (-item[0].gain, item[0].loss),
    )
    best, found = float("inf"), set()
    for place, method in ordered:
        if place.loss < best:
            best = place.loss
            found.add(method)
    return found


def _ticks(panel, span: float, unit: str, share: bool, floor: float | None) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    wide = span > 3
    panel.xaxis.set_major_locator(LogLocator(10, (1, 2, 5) if wide and span > 20 else (1, 1.5, 2, 3, 4, 5, 7)))
    if span < 1.5:
        low, high = panel.get_xlim()
        step = next(step for step in (0.01, 0.02, 0.05, 0.1) if abs(high - low) / step <= 8)
        first = round(min(low, high) / step) + 1
        panel.xaxis.set_major_locator(
            FixedLocator([i * step for i in range(first, first + 9) if i * step <= max(low, high)])
        )
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}{unit}")
    panel.yaxis.set_minor_locator(NullLocator())
    high, low = panel.get_ylim()
    marks = [m * 10.0**power for power in range(-9, 3) for m in (1, 2, 5) if low <= m * 10.0**power <= high]
    if len(marks) > 9:
        marks = [mark for mark in marks if f"{mark:e}".startswith("1")]
    if floor is not None:
        marks = [floor, *(mark for mark in marks if mark > 1.3 * floor)]
    panel.yaxis.set_major_locator(FixedLocator(marks))
    panel.yaxis.set_major_formatter(
        lambda value, _: "0" if value == floor else f"{100 * value:.3g} %" if share else f"{value:.3g}"
    )
