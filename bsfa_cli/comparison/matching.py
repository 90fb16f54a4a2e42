"""Methods matched at equal time and equal density, and the length from which each is faster than dense attention.

Pure functions over the rows of a stored result. A method is read between its own two neighbouring settings, linearly;
beyond its densest setting it keeps that setting's value, since it never needs more; below its sparsest it has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, log

from ..metrics.statistics import wilson

KIND, FORMAT = "bsfa compare", 1
TIMES = (0.9, 0.75, 0.6, 0.5)  # of the fastest dense kernel's
TTFTS = (0.98, 0.95, 0.9, 0.8)  # of the model's TTFT with it
DENSITIES = (0.75, 0.5, 0.25, 0.125)
EVERYTHING = "selects everything"
ACCURACY = "accuracy.mean"


def value(row: dict, path: str) -> float | None:
    """row["a"]["b"] for "a.b"; None where a part is missing or None."""
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def by_method(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """{method: its rows, in order}."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def read_at(points: list[tuple[float, float]], target: float) -> float | None:
    """y at `target` of (x, y) points, linear between neighbours in x; the last y beyond them, None before them."""
    points = sorted(points)
    if not points or target < points[0][0]:
        return None
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= target <= x1:
            return y1 if x1 == x0 else y0 + (target - x0) / (x1 - x0) * (y1 - y0)
    return points[-1][1]


def matched(rows: list[dict], axis: str, targets: Iterable[float], metric: str) -> dict[str, list[float | None]]:
    """{method: its metric at each target of the axis}; `axis` and `metric` are paths into a row."""
    table = {}
    for method, own in by_method(rows).items():
        points = [(value(row, axis), value(row, metric)) for row in own]
        points = [(x, y) for x, y in points if x is not None and y is not None]
        table[method] = [read_at(points, target) for target in targets]
    return table


def questions(cell: dict, metric: str) -> int | None:
    """How many questions a metric of this cell is a share of; None where it is no share of questions."""
    if metric != ACCURACY:
        return None
    scored = next((row["accuracy"] for row in cell["rows"] if row.get("accuracy")), None)
    return scored and sum(task["questions"] for task in scored["tasks"].values())


def best(table: dict[str, list[float | None]], column: int, largest: bool, asked: int | None = None) -> list[str]:
    """The methods, mostly one, that have the best value in a column; dense attention takes no part. Where the values
    are shares of `asked` questions, all whose share the best one's 95 % interval (Wilson) reaches down to.
    """
    values = ranked(table, column, largest)
    if not values:
        return []
    top = next(iter(values.values()))
    least = wilson(round(top * asked), asked)[0] if asked else top
    return [name for name, found in values.items() if found == top or asked and found >= least]


def ranked(table: dict[str, list[float | None]], column: int, largest: bool) -> dict[str, float]:
    """{method: value} of a column, the best first, without dense attention."""
    values = {name: row[column] for name, row in table.items() if row[column] is not None and name != "dense"}
    return dict(sorted(values.items(), key=lambda item: item[1], reverse=largest))


def break_even(points: list[tuple[int, float]]) -> tuple[int | None, str]:
    """(length, words) from (length, time over the fastest dense kernel's) points: where the ratio falls to 1 for good.

    Between two measured lengths the ratio is read linearly in the logarithm of the length.
    """
    points = sorted(points)
    if not points:
        return None, "not measured"
    if points[-1][1] > 1:
        return None, f"slower up to {points[-1][0]:,}"
    for (n0, r0), (n1, r1) in reversed(list(zip(points, points[1:], strict=False))):
        if r0 > 1:
            length = round(exp(log(n0) + (r0 - 1) / (r0 - r1) * (log(n1) - log(n0))))
            return length, f"{length:,}"
    return points[0][0], f"{points[0][0]:,} or less"


def break_evens(cells: list[dict]) -> dict[str, dict[float, tuple[int | None, str]]]:
    """{method: {setting: break_even}} over cells of several lengths; the published setting alone where there is one."""
    points: dict[str, dict[float, list]] = {}
    for cell in cells if len({cell["length"] for cell in cells}) > 1 else ():
        for method, rows in by_method(cell["rows"]).items():
            published = [row for row in rows if row["published"]]
            for row in (published or rows) if cell["fastest_dense_ms"] else ():
                ratio = row["total_ms"] / cell["fastest_dense_ms"]
                points.setdefault(method, {}).setdefault(row["setting"], []).append((cell["length"], ratio))
    return {
        method: {setting: break_even(found) for setting, found in sorted(settings.items())}
        for method, settings in points.items()
    }


def verdicts(
    table: dict[str, list[float | None]], headings: list[str], largest: bool, asked: int | None = None,
    own: str = "bsfa",
) -> list[str]:  # fmt: skip
    """A sentence per column: which method is best, and where `own` stands. Dense attention takes no part, and what
    `asked` questions cannot tell apart is named together (see `best`).
    """
    sentences = []
    for column, heading in enumerate(headings):
        values = ranked(table, column, largest)
        if not values:
            sentences.append(f"{heading}: no method gets there")
            continue
        winners = best(table, column, largest, asked)
        top, last = values[winners[0]], values[winners[-1]]
        span = f"{top:.4f}" if top == last else f"{top:.4f} to {last:.4f}, not told apart by {asked} questions"
        sentence = f"{heading}: {' and '.join(winners)} ({span})"
        if own not in values:
            sentence += f"; {own} does not get there"
        elif own not in winners:
            place = list(values.values()).index(values[own]) + 1
            sentence += f"; {own} is number {place} of {len(values)} ({values[own]:.4f})"
        sentences.append(sentence)
    return sentences
