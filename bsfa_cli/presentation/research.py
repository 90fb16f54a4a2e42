"""docs/research-question.md: what the stored comparisons on frames say, as tables, and its plots."""

from __future__ import annotations

import json
from pathlib import Path

from ..comparison import matching
from ..files import read_result
from . import figures, research_global, research_modality, research_timing
from .marked import filled
from .research_plot import research_plot
from .research_tables import MATCHED, METHODS, by_task, interval, matched, settings, short
from .versions import versions

PAGE = "research-question.md"
COMPARISONS = tuple(f"methods-vision-{length}.nvidia-h200.json" for length in ("32k", "64k", "128k"))
MODALITY = ("checks/modality-frames.nvidia-h200.json", "checks/modality-frames-128k.nvidia-h200.json")
TENSORS, SPEED = "methods-frames.nvidia-h200.json", "global-attention.nvidia-h200.json"
TIMING = ("vision-timing.nvidia-h200.json", "vision-timing-ttft.nvidia-h200.json")  # the newer first


def rendered(root: Path) -> dict[Path, str]:
    """{file: its content} of the page and its plots; nothing where a result that it rests on is not stored.

    Raises InputError for a bad file, MachineError where plots cannot be drawn.
    """
    results, page = root / "profiles" / "results", root / "docs" / PAGE
    if (
        not all((results / name).exists() for name in (*COMPARISONS, *MODALITY, TENSORS, SPEED, *TIMING))
        or not page.exists()
    ):
        return {}
    compared = [read_result(results / name, {matching.KIND: matching.FORMAT}) for name in COMPARISONS]
    tensors = read_result(results / TENSORS, {matching.KIND: matching.FORMAT})
    speed, *others = (json.loads((results / name).read_text(encoding="utf-8")) for name in (SPEED, *MODALITY, *TIMING))
    modality, timing = others[: len(MODALITY)], others[len(MODALITY) :]
    cells = [result["cells"][0] for result in compared]
    parts = {
        "short": short(cells),
        "setup": setup(compared),
        **{part: matched(cells, part) for part in MATCHED},
        "tasks": "\n\n".join(by_task(cell) for cell in cells),
        "settings": "\n\n".join(settings(cell) for cell in cells),
        "modality": research_modality.block(modality, [f"../profiles/results/{name}" for name in MODALITY]),
        "timing": research_timing.block(
            [(each, f"../profiles/results/{name}") for each, name in zip(timing, TIMING, strict=True)]
        ),
        "global": research_global.block(speed, f"../profiles/results/{SPEED}", tensors,
                                        f"../profiles/results/{TENSORS}"),
    }  # fmt: skip
    files = {page: filled(page.read_text(encoding="utf-8"), parts, page.name)}
    for name, result in zip(COMPARISONS, compared, strict=True):
        figure = research_plot(result["cells"][0], METHODS, result["environment"]["gpu"])
        files[results / f"{name.partition('.')[0]}.answers.svg"] = figures.svg(figure)
    return files


def setup(compared: list[dict]) -> str:
    """What was measured: length, questions, what the dense model answers, every dense kernel's time, the files."""
    kernels = list(dict.fromkeys(row["name"] for result in compared for row in result["cells"][0]["dense"]))
    lines = [
        f"| tokens | model | questions a point | processes | dense answers | {', ms | '.join(kernels)}, ms "
        "| TTFT with the fastest, ms | file |",
        "| ---: | --- | ---: | ---: | ---: |" + " ---: |" * len(kernels) + " ---: | --- |",
    ]
    machines, commits = {}, {}
    for name, result in zip(COMPARISONS, compared, strict=True):
        cell, facts = result["cells"][0], result["environment"]
        asked, tokens = matching.questions(cell, matching.ACCURACY), f"{cell['length']:,}"
        ms = {row["name"]: f"{row['ms_median']:.2f}" for row in cell["dense"]}
        ms[cell["fastest_dense"]] = f"**{ms[cell['fastest_dense']]}**"
        lines.append(
            f"| {tokens} | {cell['source']['model']['id']} | {asked} | {cell.get('processes', 1)} "
            f"| {interval(cell['dense_accuracy'])} | {' | '.join(ms.get(kernel, '-') for kernel in kernels)} "
            f"| {cell['fastest_ttft_ms']:.2f} | [JSON](../profiles/results/{name}) |"
        )
        machines[f"{facts['gpu']}, {versions(facts | {'commit': None})}"] = None
        commits.setdefault(versions({"commit": facts["commit"]}), []).append(tokens)
    by = "; ".join(f"{commit} ({' and '.join(lengths)} tokens)" for commit, lengths in commits.items())
    return "\n".join([*lines, "", f"{'; '.join(machines)}; {by}."])
