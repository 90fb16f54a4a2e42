"""The tables of `bsfa compare`, on stderr."""

from __future__ import annotations

from ..comparison import matching
from .profile_table import aligned

HEADINGS = (
    "method", "setting", "density", "flops", "select ms", "attend ms", "total ms", "speedup", "recall", "worst row",
    "error", "needle",
)  # fmt: skip
METRICS = {  # path into a row: (words, larger is better)
    "accuracy.mean": ("task accuracy", True),
    "recall.mean": ("recall of softmax mass, mean over rows", True),
    "recall.worst": ("recall of softmax mass, worst row", True),
    "needle.mean": ("recall of the rows that look for the needle", True),
    "error": ("output error, relative L2", False),
}


def show_cell(cell: dict) -> None:
    """One cell: every row, then the methods at equal time and at equal density."""
    from .console import note

    note(f"\n{cell['length']:,} tokens, {cell['label']}, backend {cell['backend']}")
    if cell["fastest_dense"]:
        note(f"  fastest dense: {cell['fastest_dense']}, {cell['fastest_dense_ms']:.3f} ms")
    rows = [(*row_texts(row), row["note"] or "") for row in cell["rows"]]
    for line in aligned([(*HEADINGS, ""), *rows]):
        note(f"  {line}".rstrip())
    for method, reason in cell["left_out"].items():
        note(f"  left out: {method} ({reason})")
    for absent in cell["unavailable"]:
        note(f"  not measured: {absent['name']} ({absent['reason']})")
    for metric in present(cell):
        show_matched(cell, metric)


def present(cell: dict) -> list[str]:
    """The metrics that this cell's rows have."""
    return [metric for metric in METRICS if any(matching.value(row, metric) is not None for row in cell["rows"])]


def show_matched(cell: dict, metric: str) -> None:
    """One metric of every method at equal time and equal density."""
    from .console import note

    for title, headings, table in matched_tables(cell, metric):
        note(f"\n  {title}")
        lines = [(name, *(number(x) for x in values)) for name, values in table.items()]
        for line in aligned([("", *headings), *lines]):
            note(f"    {line}")
        for sentence in matching.verdicts(table, headings, METRICS[metric][1]):
            note(f"    {sentence}")


def matched_tables(cell: dict, metric: str) -> list[tuple[str, list[str], dict[str, list[float | None]]]]:
    """(title, column headings, {method: values}) at equal time and at equal density, where any method has a value."""
    words = METRICS[metric][0]
    found = []
    if cell["fastest_dense_ms"]:
        targets = [share * cell["fastest_dense_ms"] for share in matching.TIMES]
        headings = [f"{share:.0%} of dense" for share in matching.TIMES]
        table = matching.matched(cell["rows"], "total_ms", targets, metric)
        found.append((f"{words}, at equal time (selection and attention)", headings, table))
    headings = [f"density {target:g}" for target in matching.DENSITIES]
    table = matching.matched(cell["rows"], "density", matching.DENSITIES, metric)
    found.append((f"{words}, at equal density", headings, table))
    return [(*titled, table) for *titled, table in found if any(x is not None for row in table.values() for x in row)]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def row_texts(row: dict) -> tuple[str, ...]:
    """One row's fields under HEADINGS."""
    setting = f"{row['knob']} {row['setting']:g}" if row["knob"] else ""
    recall, needle = row["recall"], row["needle"]
    return (
        row["method"],
        setting + (" (published)" if row["published"] else ""),
        f"{row['density']:.3f}",
        f"{row['flop_density']:.3f}",
        f"{row['selection_ms']:.3f}",
        f"{row['attention_ms']:.3f}",
        f"{row['total_ms']:.3f}",
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        number(recall and recall["mean"]),
        number(recall and recall["worst"]),
        number(row["error"]),
        number(needle and needle["mean"]),
    )


def show_break_even(result: dict) -> None:
    """From which length on each method is no slower than the fastest dense kernel, selection included."""
    from .console import note

    rows = break_even_rows(result)
    if rows:
        note("\nlength from which a method is no slower than the fastest dense kernel, selection included")
    for line in aligned(rows) if rows else ():
        note(f"  {line}")


def break_even_rows(result: dict) -> list[tuple[str, str]]:
    """(method, "setting: length" of its settings) for every method; empty where only one length was measured."""
    return [
        (method, "; ".join(f"{setting:g}: {words}" for setting, (_, words) in settings.items()))
        for method, settings in matching.break_evens(result["cells"]).items()
    ]
