"""README.md's plot and its table: the figures that decide, from two stored results."""

from __future__ import annotations

from ..comparison import matching
from . import compare_readme

SPEED, QUALITY = "llama-3.1-8b.nvidia-h200.json", "methods-tasks.nvidia-h100.json"
LENGTHS = (32768, 131072)
PLOT = f"profiles/results/{QUALITY.removesuffix('json')}svg"


def block(stored: dict[str, dict]) -> str | None:
    """Markdown from {file name: stored result}; None where one of the two is missing.

    Speed and quality meet at the same share of tiles kept; quality is read between a method's own settings.
    """
    if SPEED not in stored or QUALITY not in stored:
        return None
    speed, quality = stored[SPEED], stored[QUALITY]
    cells = {cell["length"]: cell for cell in speed["cells"]}
    judged = compare_readme.surest(quality)
    rows = [row for row in judged["rows"] if row["method"] in ("bsfa", "dense")]
    dense = judged["dense_accuracy"]["mean"]
    lines = [
        f"![What is lost against measured speedup]({PLOT})",
        "",
        "| tiles skipped | " + " | ".join(f"attention, {length // 1024}k tokens" for length in LENGTHS)
        + " | tokens predicted as densely | answers kept |",
        "| ---: |" + " ---: |" * (len(LENGTHS) + 2),
    ]  # fmt: skip
    first = cells[LENGTHS[0]]
    for contender in first["contenders"]:
        target = contender["skip_target"]
        if target is None:
            continue
        found = [_at(cells[length], target) for length in LENGTHS]
        agreed, answered = (_read(rows, metric, contender["kept_share"]) for metric in READ)
        kept = [f"{agreed:.1%}", f"{answered / dense:.1%}"]
        lines.append(f"| {target:.0%} | " + " | ".join([*(f"{speedup:.2f}x" for speedup in found), *kept]) + " |")
    gpu, other = (result["environment"]["gpu"] for result in (speed, quality))
    shape = first["shape"]
    lines += [
        "",
        f"Speed: over {first['fastest_dense']}, the fastest dense kernel there, "
        f"{shape['heads']}/{shape['kv_heads']} heads of {shape['head_dim']}, {first['dtype']}, "
        f"{gpu}. Quality: at the same share of tiles kept, "
        f"the model in the box ({judged['source']['model']['id']}, {judged['length']:,} tokens, {other}); "
        f"its own rounding moves {1 - _read(rows, READ[0], 1.0):.1%} of the predictions with every tile kept.",
    ]
    return "\n".join(lines)


READ = ("agreement.top1", matching.ACCURACY)


def _at(cell: dict, target: float) -> float:
    return next(row["speedup"] for row in cell["contenders"] if row["skip_target"] == target)


def _read(rows: list[dict], metric: str, kept: float) -> float:
    """The metric at a share of tiles kept."""
    return matching.read_at([(row["density"], matching.value(row, metric)) for row in rows], kept)
