"""Tables of docs/research-question.md about one stored comparison: methods matched, by task, and every setting."""

from __future__ import annotations

from ..comparison import matching
from .compare_table import matched_tables

FAST = 1.5  # attention's speedup from which a setting counts as fast
TASKS = ("video-needle", "vqa", "retrieval", "captioning", "subtitles")
METHODS = {  # name in results: (name here, where it takes scores from)
    "bsfa": ("bsfa, by head", "exact"),
    "bsfa_top_k": ("BSFA paper's top-k", "exact"),
    "blasst": ("BLASST", "exact"),
    "bsfa_int8": ("bsfa, int8 scores", "8-bit"),
    "pooled_top_p+bsfa": ("pooled top-p, then bsfa", "estimated"),
    "xattention": ("XAttention", "estimated"),
    "pbs": ("PBS-Attn", "estimated"),
    "pooled_top_p": ("pooled top-p", "estimated"),
    "pooled_top_k": ("pooled top-k", "estimated"),
    "vertical_slash": ("vertical-slash", "estimated"),
    "flexprefill": ("FlexPrefill", "estimated"),
    "sliding_window": ("sliding window", "none"),
    "tri_shape": ("Tri-shape", "none"),
    "strided": ("strided", "none"),
}
UNSKIPPED = "bsfa's kernel, nothing skipped"
MATCHED = {  # part of the page: (word for the columns, the matched table that they are from)
    "time": (("time", "equal time (selection and attention)"), ("TTFT", "equal time to the first logits")),
    "density": (("tiles", "equal density"), ("FLOPs", "equal FLOP density")),
}  # fmt: skip


def rows_of(cell: dict, scores: str) -> list[dict]:
    """Rows of the methods that take scores from there."""
    return [row for row in cell["rows"] if METHODS.get(row["method"], ("", ""))[1] == scores]


def short(cells: list[dict]) -> str:
    """The answer: a row for the fastest setting of each gate, of the selection with a gate on top, and for the most
    accurate of the others; a column for each length.
    """
    headings = " | ".join(f"{cell['length']:,} tokens" for cell in cells)
    dense = " | ".join(f"{cell['dense_accuracy']['mean']:.3f} at 1.00x / 1.00x" for cell in cells)
    lines = [
        f"| | {headings} |",
        "| --- |" + " --- |" * len(cells),
        f"| {cells[0]['fastest_dense']}, dense | {dense} |",
    ]
    gates = [method for method, (_, scores) in METHODS.items() if scores in ("exact", "8-bit")]
    for method in (*gates, "pooled_top_p+bsfa"):
        own = [matching.by_method(cell["rows"])[method] for cell in cells]
        lines.append(_answers("", cells, [max(rows, key=lambda row: row["speedup"]) for rows in own]))
    for words, scores, least in (
        ("scores estimated, most accurate", "estimated", 0),
        ("scores estimated, most accurate above 1x", "estimated", 1),
        ("fixed pattern, most accurate", "none", 0),
    ):
        best = [most_accurate([row for row in rows_of(cell, scores) if row["speedup"] > least]) for cell in cells]
        lines.append(_answers(words, cells, best))
    return "\n".join(lines)


def _answers(words: str, cells: list[dict], rows: list[dict]) -> str:
    """`words` and the method, once where it is the same at all lengths, then answers at speedups."""
    fields = [
        f"{row['accuracy']['mean']:.3f} at {gain(row)} / {ttft(cell, row)}"
        for cell, row in zip(cells, rows, strict=True)
    ]
    names = [named(row) for row in rows]
    if len(set(names)) == 1:
        words = f"{words}: {names[0]}" if words else names[0]
    else:
        fields = [f"{field} ({name})" for field, name in zip(fields, names, strict=True)]
    return f"| {' | '.join([words, *fields])} |"


def matched(cells: list[dict], part: str) -> str:
    """A table for each length: answers of every method matched on the axes of this part; the best in bold, with what
    the questions do not tell apart from it. Columns that no method reaches are left out.
    """
    return "\n\n".join(_matched(cell, MATCHED[part]) for cell in cells)


def _matched(cell: dict, axes: tuple[tuple[str, str], ...]) -> str:
    asked = matching.questions(cell, matching.ACCURACY)
    found = {title.rpartition(", at ")[2]: rest for title, *rest in matched_tables(cell, matching.ACCURACY)}
    columns = []  # (heading, {method: value}, the best)
    for word, title in axes:
        headings, table = found[title]
        for i, heading in enumerate(headings):
            values = {name: row[i] for name, row in table.items()}
            if any(value is not None for value in values.values()):
                share = heading.rpartition("density ")[2].removesuffix(" of dense")
                columns.append((f"{word} {share}", values, matching.best(table, i, True, asked)))
    lines = [
        f"**{cell['length']:,} tokens**",
        "",
        "| method | scores | " + " | ".join(heading for heading, *_ in columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    measured = matching.by_method(cell["rows"])
    for method, (name, scores) in METHODS.items():
        if method in measured:
            fields = []
            for _, values, best in columns:
                text = "-" if values[method] is None else f"{values[method]:.3f}"
                fields.append(f"**{text}**" if method in best else text)
            lines.append(f"| {name} | {scores} | " + " | ".join(fields) + " |")
    return "\n".join(lines)


def by_task(cell: dict) -> str:
    """Answers by task of every method at its best setting that is FAST, or where none is at its most accurate one."""
    lines = [
        f"**{cell['length']:,} tokens**",
        "",
        "| method | attention | tiles kept | " + " | ".join(name.replace("-", " ") for name in TASKS)
        + " | from images | all |",
        "| --- |" + " ---: |" * (len(TASKS) + 4),
        f"| {cell['fastest_dense']}, dense | 1.00x | 1.000 | {_tasks(cell['dense_accuracy'])} |",
    ]  # fmt: skip
    rows = matching.by_method(cell["rows"])
    for method in ("dense", *METHODS):
        if method in rows:
            row = best_setting(rows[method])
            lines.append(f"| {named(row)} | {gain(row)} | {row['density']:.3f} | {_tasks(row['accuracy'])} |")
    return "\n".join(lines)


def best_setting(rows: list[dict]) -> dict:
    """Of one method's rows the most accurate that is FAST, of equal ones the fastest; of all rows where none is."""
    return most_accurate([row for row in rows if row["speedup"] >= FAST] or rows)


def most_accurate(rows: list[dict]) -> dict:
    """The most accurate of these rows, of equal ones the fastest."""
    return max(rows, key=lambda row: (row["accuracy"]["mean"], row["speedup"]))


def from_images(accuracy: dict) -> float:
    """The share answered right of the questions that are answered from images."""
    of = [task for name, task in accuracy["tasks"].items() if name != "subtitles"]
    return sum(task["accuracy"] * task["questions"] for task in of) / sum(task["questions"] for task in of)


def settings(cell: dict) -> str:
    """Every row that was measured."""
    lines = [
        f"<details><summary>Every setting measured, {cell['length']:,} tokens</summary>",
        "",
        "| method | tiles kept | selection, ms | attention, ms | speedup | were selection free | TTFT | top-1 "
        "| answers | lost, gained |",
        "| --- |" + " ---: |" * 9,
    ]
    for row in cell["rows"]:
        against = row["accuracy"]["against_dense"]
        fields = [
            named(row), f"{row['density']:.3f}", f"{row['selection_ms']:.2f}",
            f"{row['attention_ms']:.2f}", gain(row), f"{cell['fastest_dense_ms'] / row['attention_ms']:.2f}x",
            ttft(cell, row), f"{row['agreement']['top1']:.3f}", interval(row["accuracy"]),
            f"{against['lost']}, {against['gained']}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(fields)} |")
    return "\n".join([*lines, "", "</details>"])


def named(row: dict) -> str:
    """The method with its setting."""
    return f"{METHODS[row['method']][0]}, {setting(row)}" if row["knob"] else UNSKIPPED


def setting(row: dict) -> str:
    """Its knob and the knob's value, with a star where its authors publish that."""
    return f"{row['knob']} {row['setting']:g}" + (" \\*" if row["published"] else "")


def gain(row: dict) -> str:
    """Speedup of attention with its selection over the fastest dense kernel."""
    return f"{row['speedup']:.2f}x"


def ttft(cell: dict, row: dict) -> str:
    """Speedup of the time to the first token over that with the fastest dense kernel."""
    return f"{cell['fastest_ttft_ms'] / row['ttft_ms']:.2f}x"


def interval(accuracy: dict) -> str:
    """A share of questions with its 95 % interval."""
    return f"{accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"


def _tasks(accuracy: dict) -> str:
    fields = [f"{accuracy['tasks'][name]['accuracy']:.3f}" for name in TASKS]
    return " | ".join([*fields, f"{from_images(accuracy):.3f}", f"{accuracy['mean']:.3f}"])
