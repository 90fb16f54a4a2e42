"""docs/research-question.md: what the stored comparisons on frames say, as tables, and its plots."""

from __future__ import annotations

import json
from pathlib import Path

from ..comparison import matching
from ..files import read_result
from . import figures, research_global, research_modality, research_timing
from .compare_table import matched_tables
from .marked import filled
from .research_plot import research_plot
from .versions import versions

PAGE = "research-question.md"
COMPARISONS = tuple(f"methods-vision-{length}.nvidia-h200.json" for length in ("32k", "64k", "128k"))
MODALITY = ("checks/modality-frames.nvidia-h200.json", "checks/modality-frames-128k.nvidia-h200.json")
TENSORS, SPEED = "methods-frames.nvidia-h200.json", "global-attention.nvidia-h200.json"
TIMING = "vision-timing.nvidia-h200.json"
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
MATCHED = {  # part of the page: the matched table that it has
    "time": "equal time (selection and attention)", "density": "equal density", "flops": "equal FLOP density",
    "ttft": "equal time to the first logits",
}  # fmt: skip


def rendered(root: Path) -> dict[Path, str]:
    """{file: its content} of the page and its plots; nothing where a result that it rests on is not stored.

    Raises InputError for a bad file, MachineError where plots cannot be drawn.
    """
    results, page = root / "profiles" / "results", root / "docs" / PAGE
    if (
        not all((results / name).exists() for name in (*COMPARISONS, *MODALITY, TENSORS, SPEED, TIMING))
        or not page.exists()
    ):
        return {}
    compared = [read_result(results / name, {matching.KIND: matching.FORMAT}) for name in COMPARISONS]
    tensors = read_result(results / TENSORS, {matching.KIND: matching.FORMAT})
    *modality, speed, timing = (
        json.loads((results / name).read_text(encoding="utf-8")) for name in (*MODALITY, SPEED, TIMING)
    )
    cells = [result["cells"][0] for result in compared]
    parts = {
        "setup": setup(compared),
        **{part: matched(cells, title) for part, title in MATCHED.items()},
        "tasks": "\n\n".join(by_task(cell) for cell in cells),
        "settings": "\n\n".join(settings(cell) for cell in cells),
        "modality": research_modality.block(modality, [f"../profiles/results/{name}" for name in MODALITY]),
        "timing": research_timing.block(timing, f"../profiles/results/{TIMING}"),
        "global": research_global.block(speed, f"../profiles/results/{SPEED}", tensors,
                                        f"../profiles/results/{TENSORS}"),
    }  # fmt: skip
    files = {page: filled(page.read_text(encoding="utf-8"), parts, page.name)}
    for name, result in zip(COMPARISONS, compared, strict=True):
        figure = research_plot(result["cells"][0], METHODS, result["environment"]["gpu"])
        files[results / f"{name.partition('.')[0]}.answers.svg"] = figures.svg(figure)
    return files


def setup(compared: list[dict]) -> str:
    """What was measured: length, questions, the fastest dense kernel, what the dense model answers, the files."""
    lines = [
        "| tokens | model | questions a point | asked at | dense answers | fastest dense | attention | TTFT with it "
        "| file |",
        "| ---: | --- | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for name, result in zip(COMPARISONS, compared, strict=True):
        cell = result["cells"][0]
        asked = matching.questions(cell, matching.ACCURACY)
        lines.append(
            f"| {cell['length']:,} | {cell['source']['model']['id']} | {asked} | {cell['asked_at']:.0%} of the text "
            f"| {interval(cell['dense_accuracy'])} | {cell['fastest_dense']} | {cell['fastest_dense_ms']:.2f} ms "
            f"| {cell['fastest_ttft_ms']:.2f} ms | [{name}](../profiles/results/{name}) |"
        )
    machines = {f"{result['environment']['gpu']}, {versions(result['environment'])}": None for result in compared}
    timed = [
        f"{result['cells'][0]['length']:,} tokens: "
        + ", ".join(f"{row['name']} {row['ms_median']:.2f} ms" for row in result["cells"][0]["dense"])
        for result in compared
    ]
    lines += ["", f"{'; '.join(machines)}. Dense kernels timed: {'; '.join(timed)}."]
    return "\n".join(lines)


def matched(cells: list[dict], title: str) -> str:
    """Answers of every method matched on one axis, a group of columns for each length; the best in bold, with what the
    questions do not tell apart from it. Columns that no method reaches are left out.
    """
    columns = []  # (heading, {method: value}, the best)
    for cell in cells:
        asked = matching.questions(cell, matching.ACCURACY)
        found = {title.rpartition(", at ")[2]: rest for title, *rest in matched_tables(cell, matching.ACCURACY)}
        headings, table = found[title]
        for i, heading in enumerate(headings):
            values = {name: row[i] for name, row in table.items()}
            if any(value is not None for value in values.values()):
                heading = heading.rpartition("density ")[2].removesuffix(" of dense")  # the text above names the axis
                columns.append((f"{_k(cell)}: {heading}", values, matching.best(table, i, True, asked)))
    lines = [
        "| method | scores | " + " | ".join(heading for heading, *_ in columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for method, (name, scores) in METHODS.items():
        fields = []
        for _, values, best in columns:
            value = values.get(method)
            text = "-" if value is None else f"{value:.3f}"
            fields.append("" if method not in values else f"**{text}**" if method in best else text)
        lines.append(f"| {name} | {scores} | " + " | ".join(fields) + " |")
    return "\n".join(lines)


def by_task(cell: dict) -> str:
    """Answers by task of every method at its best setting that is FAST, or where none is at its most accurate one."""
    lines = [
        f"**{cell['length']:,} tokens**",
        "",
        "| method | setting | attention | TTFT | tiles kept | " + " | ".join(TASKS) + " | from images | all |",
        "| --- | --- |" + " ---: |" * (len(TASKS) + 5),
        f"| {cell['fastest_dense']} | dense | 1.00x | 1.00x | 1.000 | {_tasks(cell['dense_accuracy'])} |",
    ]
    rows = matching.by_method(cell["rows"])
    for method, own in rows.items():
        if method == "dense":
            lines.append(f"| bsfa's kernel | nothing skipped | {_gains(cell, own[0])} | {_tasks(own[0]['accuracy'])} |")
    for method, (name, _) in METHODS.items():
        if method in rows:
            row = best_setting(rows[method])
            lines.append(f"| {name} | {setting(row)} | {_gains(cell, row)} | {_tasks(row['accuracy'])} |")
    return "\n".join(lines)


def best_setting(rows: list[dict]) -> dict:
    """Of one method's rows the most accurate that is FAST, of equal ones the fastest; of all rows where none is."""
    fast = [row for row in rows if row["speedup"] >= FAST] or rows
    return max(fast, key=lambda row: (row["accuracy"]["mean"], row["speedup"]))


def from_images(accuracy: dict) -> float:
    """The share answered right of the questions that are answered from images."""
    of = [task for name, task in accuracy["tasks"].items() if name != "subtitles"]
    return sum(task["accuracy"] * task["questions"] for task in of) / sum(task["questions"] for task in of)


def settings(cell: dict) -> str:
    """Every row that was measured."""
    lines = [
        f"<details><summary>Every setting measured, {cell['length']:,} tokens</summary>",
        "",
        "| method | setting | tiles kept | FLOPs kept | selection, ms | attention, ms | speedup | were selection free "
        "| TTFT, ms | TTFT | top-1 | answers | lost, gained |",
        "| --- | --- |" + " ---: |" * 11,
    ]
    for row in cell["rows"]:
        name = METHODS.get(row["method"], ("bsfa's kernel, nothing skipped", ""))[0]
        against = row["accuracy"]["against_dense"]
        fields = [
            name, setting(row), f"{row['density']:.3f}", f"{row['flop_density']:.3f}", f"{row['selection_ms']:.2f}",
            f"{row['attention_ms']:.2f}", f"{row['speedup']:.2f}x",
            f"{cell['fastest_dense_ms'] / row['attention_ms']:.2f}x", f"{row['ttft_ms']:.2f}",
            f"{cell['fastest_ttft_ms'] / row['ttft_ms']:.2f}x", f"{row['agreement']['top1']:.3f}",
            interval(row["accuracy"]), f"{against['lost']}, {against['gained']}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(fields)} |")
    return "\n".join([*lines, "", "</details>"])


def setting(row: dict) -> str:
    return (f"{row['knob']} {row['setting']:g}" if row["knob"] else "-") + (" (published)" if row["published"] else "")


def interval(accuracy: dict) -> str:
    """A share of questions with its 95 % interval."""
    return f"{accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"


def _tasks(accuracy: dict) -> str:
    fields = [f"{accuracy['tasks'][name]['accuracy']:.3f}" for name in TASKS]
    return " | ".join([*fields, f"{from_images(accuracy):.3f}", interval(accuracy)])


def _gains(cell: dict, row: dict) -> str:
    return f"{row['speedup']:.2f}x | {cell['fastest_ttft_ms'] / row['ttft_ms']:.2f}x | {row['density']:.3f}"


def _k(cell: dict) -> str:
    return f"{cell['length'] // 1024}k"
