"""Questions answered against attention's speedup, all methods, as measured and were selection free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..comparison import matching
from . import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT, LEFT, RIGHT, TOP, DOWN, BOTTOM = 860, 900, 72, 24, 136, 86, 56
LEGEND = 60  # pixels from the top
COLOURS = {"exact": "C0", "8-bit": "C3", "estimated": "C1", "none": figures.GREY}
SHARED = {"estimated": "scores estimated", "none": "a fixed pattern"}
MARKERS = {"bsfa": "o", "bsfa_top_k": "s", "blasst": "^", "bsfa_int8": "D"}  # close together: named in the legend
PANELS = (("total_ms", "as measured, selection included"), ("attention_ms", "attention alone, were selection free"))
LEAST, MOST, ROOM = 0.5, 8.0, 1.12  # speedups; beyond MOST as far as points lie


@figures.styled
def research_plot(cell: dict, methods: Mapping[str, tuple[str, str]], machine: str) -> Figure:
    """One cell of a comparison that asks questions. `methods`: {method: (name, where its scores are from)}; what is not
    in it is not drawn. Bars: 95 % intervals.
    """
    figure, panels = figures.new(WIDTH, HEIGHT, rows=2, left=LEFT, right=RIGHT, top=TOP, bottom=BOTTOM, down=DOWN)
    figures.title(
        figure,
        f"Questions about frames answered right, {cell['length']:,} tokens",
        f"{cell['source']['model']['id']}, {machine}; {matching.questions(cell, matching.ACCURACY)} questions a point, "
        f"asked at {cell['asked_at']:.0%} of the text; speedup over {cell['fastest_dense']}",
        left=LEFT,
    )
    drawn = [row for row in cell["rows"] if row["method"] in methods]
    most = max(MOST, *(ROOM * cell["fastest_dense_ms"] / row[axis] for row in drawn for axis, _ in PANELS))
    for panel, (axis, words) in zip(panels, PANELS, strict=True):
        handles = _panel(panel, cell, axis, words, methods, most)
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(LEFT / WIDTH, 1 - LEGEND / HEIGHT), ncols=3, frameon=False,
        borderpad=0, borderaxespad=0, handletextpad=0.2, columnspacing=2,
    )  # fmt: skip
    return figure


def _panel(panel, cell: dict, axis: str, words: str, methods: Mapping[str, tuple[str, str]], most: float) -> list:
    """Draws one panel, up to a speedup of `most`; the entries of the legend."""
    panel.set_title(words, fontsize=11)
    panel.set_xscale("log")
    panel.set_xlim(LEAST, most)
    panel.set_yscale("function", functions=(_height, _share))
    panel.set_ylim(0, 1.0005)  # a marker at 100 % is seen whole
    panel.minorticks_off()
    panel.set_xticks([gain for gain in (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16) if gain <= most])
    panel.xaxis.set_major_formatter(lambda gain, _: f"{gain:g}x")
    panel.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1])
    panel.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    panel.set_xlabel(f"attention's speedup over {cell['fastest_dense']}")
    dense = cell["dense_accuracy"]["mean"]
    panel.axvline(1, color=figures.INK, alpha=0.6, linewidth=1)
    panel.axhline(dense, color=figures.INK, alpha=0.6, linewidth=1)
    panel.annotate(f"dense {dense:.1%}", (most, dense), (0, 6), textcoords="offset points", alpha=0.75, ha="right")
    labels, bars, handles = [], [], []
    measured = matching.by_method(cell["rows"])
    for method in (method for method in methods if method in measured):
        (name, scores), rows = methods[method], measured[method]
        points = [(cell["fastest_dense_ms"] / row[axis], row["accuracy"]["mean"], row) for row in rows]
        points.sort(key=lambda point: point[:2])
        gains, shares = (figures.finite(point[i] for point in points) for i in range(2))
        colour = COLOURS[scores]
        lows, highs = zip(*((row["accuracy"]["low"], row["accuracy"]["high"]) for *_, row in points), strict=True)
        panel.vlines(gains, lows, highs, color=colour, alpha=0.4, linewidth=1.5)
        bars += [[(gain, low), (gain, high)] for gain, low, high in zip(gains, lows, highs, strict=True)]
        (line,) = panel.plot(gains, shares, MARKERS.get(method, "o"), linestyle="-", color=colour)
        figures.tip(line, [_words(name, gain, row) for gain, _, row in points])
        if method in MARKERS:
            handles.append(panel.plot([], [], MARKERS[method], color=colour, label=f"{name}: {scores} scores")[0])
        else:
            labels.append((list(zip(gains, shares, strict=True)), name, colour))
    figures.line_labels(panel, labels, bars)
    handles += [panel.plot([], [], "o", color=COLOURS[key], label=words)[0] for key, words in SHARED.items()]
    return handles


def _height(shares):
    """Where shares of right answers stand: by the root of the rest, so that those near 100 % are told apart."""
    rest = 1 - shares
    return (1 - 2 * (rest >= 0)) * abs(rest) ** 0.5


def _share(heights):
    return 1 + heights * abs(heights)


def _words(name: str, gain: float, row: dict) -> str:
    knob = f" {row['knob']} {row['setting']:g}" if row["knob"] else ""
    return f"{name}{knob}: {row['accuracy']['mean']:.1%} at {gain:.2f}x, {row['density']:.0%} of the tiles kept"
