"""The tables of `bsfa compare`, on stderr."""

from __future__ import annotations

from ..comparison import matching
from .columns import aligned, chosen
from .dense_kernels import fastest

# What a terminal of 80 characters has room for, beside method and setting.
BRIEF = ("density", "total ms", "speedup", "recall", "worst row")
BRIEF_MODEL = ("density", "TTFT ms", "speedup", "recall", "top-1")
BRIEF_TASKS = ("density", "TTFT ms", "speedup", "top-1", "accuracy")
HEADINGS = (
    "method", "setting", "density", "flops", "select ms", "attend ms", "total ms", "speedup", "recall", "worst row",
    "error", "needle",
)  # fmt: skip
MODEL_HEADINGS = ("TTFT ms", "top-1", "accuracy")
METRICS = {  # path into a row: (words, larger is better)
    matching.ACCURACY: ("task accuracy", True),
    "agreement.top1": ("top-1 agreement with the dense model", True),
    "agreement.kl": ("KL divergence from the dense model, nats a token", False),
    "recall.mean": ("recall of softmax mass, mean over rows", True),
    "recall.worst": ("recall of softmax mass, worst row", True),
    "needle.mean": ("recall of the rows that look for the needle", True),
    "error": ("output error, relative L2", False),
}


def show_cell(cell: dict, details: bool = False) -> None:
    """One cell: every row, then the methods' first metric at equal time and at equal density. With `details` every
    column.
    """
    from ..console import note, note_wrapped, width

    note("")
    note_wrapped(f"{cell['length']:,} tokens, {cell['label']}, backend {cell['backend']}")
    if cell["fastest_dense"]:
        note(f"  fastest dense: {fastest(cell)}, {cell['fastest_dense_ms']:.3f} ms")
    for line in aligned(rows_table(cell)) if details else aligned(brief_table(cell), width() - 2):
        note(f"  {line}".rstrip())
    if not details:
        if any(row["published"] for row in cell["rows"]):
            note("  *: the setting that the method's authors publish")
        note("  --details shows every column, -o FILE.json keeps them")
    for method, reason in cell["left_out"].items():
        note_wrapped(f"left out: {method} ({reason})", 2)
    for absent in cell["unavailable"]:
        note_wrapped(f"not measured: {absent['name']} ({absent['reason']})", 2)
    for metric in present(cell)[:1]:  # the report has the others
        show_matched(cell, metric)


def present(cell: dict) -> list[str]:
    """The metrics that this cell's rows have."""
    return [metric for metric in METRICS if any(matching.value(row, metric) is not None for row in cell["rows"])]


def show_matched(cell: dict, metric: str) -> None:
    """One metric of every method at equal time and equal density."""
    from ..console import note, note_wrapped, width

    for title, headings, table in matched_tables(cell, metric):
        note("")
        note_wrapped(title, 2)
        lines = [(name, *(number(x) for x in values)) for name, values in table.items()]
        short = [heading.rpartition("density ")[2] for heading in headings]  # the title names the axis
        for line in aligned([("", *short), *lines], width() - 4):
            note(f"    {line}")
        for sentence in matching.verdicts(table, headings, METRICS[metric][1], matching.questions(cell, metric)):
            note_wrapped(sentence, 4)


def matched_tables(cell: dict, metric: str) -> list[tuple[str, list[str], dict[str, list[float | None]]]]:
    """(title, column headings, {method: values}) at equal time and at equal density, where any method has a value."""
    words = METRICS[metric][0]
    found = []
    if cell["fastest_dense_ms"]:
        targets = [share * cell["fastest_dense_ms"] for share in matching.TIMES]
        headings = [f"{share:.0%} of dense" for share in matching.TIMES]
        for axis, name in (("total_ms", "selection and attention"), ("attention_ms", "were selection free")):
            table = matching.matched(cell["rows"], axis, targets, metric)
            found.append((f"{words}, at equal time ({name})", headings, table))
    if cell.get("fastest_ttft_ms"):
        targets = [share * cell["fastest_ttft_ms"] for share in matching.TTFTS]
        headings = [f"{share:.0%} of dense" for share in matching.TTFTS]
        table = matching.matched(cell["rows"], "ttft_ms", targets, metric)
        found.append((f"{words}, at equal time to the first logits", headings, table))
    for axis, name in (("density", "density"), ("flop_density", "FLOP density")):
        headings = [f"{name} {target:g}" for target in matching.DENSITIES]
        table = matching.matched(cell["rows"], axis, matching.DENSITIES, metric)
        found.append((f"{words}, at equal {name}", headings, table))
    return [(*titled, table) for *titled, table in found if any(x is not None for row in table.values() for x in row)]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def rows_table(cell: dict) -> list[tuple[str, ...]]:
    """Headings and one line a row; inside a model with TTFT, top-1 agreement and task accuracy."""
    model = cell["level"] == "model"
    lines = [(*HEADINGS, *(MODEL_HEADINGS if model else ()), "")]
    for row in cell["rows"]:
        inside = ()
        if model:
            inside = (f"{row['ttft_ms']:.2f}", number(row["agreement"]["top1"]), _accuracy(row["accuracy"]))
        lines.append((*row_texts(row), *inside, row["note"] or ""))
    return lines


def brief_table(cell: dict) -> list[tuple[str, ...]]:
    """As rows_table with the columns that a terminal of 80 characters has room for, and none of the notes."""
    brief = BRIEF
    if cell["level"] == "model":
        brief = BRIEF_TASKS if any(row["accuracy"] for row in cell["rows"]) else BRIEF_MODEL
    names = ["method"] + [
        f"{row['method']} {_setting(row)}".strip() + ("*" if row["published"] else "") for row in cell["rows"]
    ]
    table = chosen(rows_table(cell), brief)
    return [(name, *(field.partition(" [")[0] for field in fields)) for name, fields in zip(names, table, strict=True)]


def _setting(row: dict) -> str:
    return f"{row['knob']} {row['setting']:g}" if row["knob"] else ""


def _accuracy(found: dict | None) -> str:
    if found is None:
        return "-"
    worst = found["tasks"][found["worst"]]["accuracy"]
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}], worst {found['worst']} {worst:.3f}"


def row_texts(row: dict) -> tuple[str, ...]:
    """One row's fields under HEADINGS."""
    recall, needle = row["recall"], row["needle"]
    return (
        row["method"],
        _setting(row) + (" (published)" if row["published"] else ""),
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
    from ..console import note, note_wrapped

    rows = break_even_rows(result)
    if rows:
        note("\nno slower than the fastest dense kernel, selection included, from this length on")
    for method, words in rows:
        note_wrapped(f"{method}  {words}", 2)


def break_even_rows(result: dict) -> list[tuple[str, str]]:
    """(method, "setting: length" of its settings) for every method; empty where only one length was measured."""
    rows = []
    for method, settings in matching.break_evens(result["cells"]).items():
        said = {f"{setting:g}": words for setting, (_, words) in settings.items()}
        alike = len(said) > 1 and len(set(said.values())) == 1
        shown = {"all settings": next(iter(said.values()))} if alike else said
        rows.append((method, "; ".join(f"{setting}: {words}" for setting, words in shown.items())))
    return rows
