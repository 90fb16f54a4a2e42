"""README.md's plot and its table: the figures that decide, from three stored results."""

from __future__ import annotations

from ..timing.plan import EXACT, INT8, OURS
from .real_plot import ROUNDED
from .real_table import at_skip, skip_at

SPEED = "rivals.nvidia-h200.json"  # everybody in one run
QUALITY, QUALITY_PAPERS = "smollm2-8k-by-kl.nvidia-h200.json", "smollm2-8k.nvidia-h200.json"
NEEDED = (SPEED, QUALITY, QUALITY_PAPERS)
LENGTHS = (32768, 131072)
NVIDIAS, OTHER_DENSE = "skip-softmax", "FlashAttention-4"
PLOT = f"profiles/results/real/{QUALITY.removesuffix('json')}svg"
RECIPE, PAPERS, CALIBRATION = "shared by KL, gap", "top-k, absolute", "mixed"
LIMIT = 0.01  # change of perplexity at which recipes are compared


def block(stored: dict[str, dict]) -> str | None:
    """Markdown from {file name: stored result}; None where one of NEEDED is missing, "-" for figures that lack in one.

    Speed and quality meet at the same share of tiles skipped; quality is read between a recipe's own points.
    """
    if any(name not in stored for name in NEEDED) or not stored[SPEED]["cells"]:
        return None
    speed, quality, papers = (stored[name] for name in NEEDED)
    recipes, floors = quality["calibrations"][CALIBRATION], {EXACT: quality["floor"]}
    floors[INT8] = quality["unskipped"]["int8 scores"]
    points = {EXACT: recipes[RECIPE]["points"], INT8: recipes[RECIPE + ROUNDED]["points"]}
    cells, shape = _cells(speed)
    lines = [
        f"![What skipping costs a real model, by recipe]({PLOT})",
        "",
        "| tiles skipped | " + " | ".join(f"attention, {length // 1024}k tokens" for length in LENGTHS)
        + " | with int8 scores: "
        + " | ".join(f"{length // 1024}k" for length in LENGTHS)
        + " | NVIDIA's skip-softmax: "
        + " | ".join(f"{length // 1024}k" for length in LENGTHS)
        + " | change of perplexity | KL from dense | KL, int8 scores |",
        "| ---: |" + " ---: |" * (3 * len(LENGTHS) + 3),
    ]  # fmt: skip
    kinds = (OURS[EXACT], OURS[INT8], NVIDIAS)
    speedups = [_speedups(cells[length], kind) if length in cells else {} for kind in kinds for length in LENGTHS]
    for target in sorted(set().union(*speedups)):
        found = [f"{by_target[target]:.2f}x" if target in by_target else "-" for by_target in speedups]
        for metric, scores, form in (
            ("perplexity_increase", EXACT, "+.2%"), ("kl", EXACT, ".4f"), ("kl", INT8, ".4f"),
        ):  # fmt: skip
            value = floors[scores][metric] if target == 0 else at_skip(points[scores], metric, target)
            found.append("-" if value is None else format(value, form))
        lines.append(f"| {target:.0%} | " + " | ".join(found) + " |")
    reach = [
        skip_at(result["calibrations"][CALIBRATION][recipe]["points"], "perplexity_increase", LIMIT)
        for result, recipe in ((quality, RECIPE), (papers, PAPERS))
    ]
    first = cells.get(LENGTHS[0]) or next(iter(cells.values()))
    others = [row for row in first["contenders"] if row["name"] == OTHER_DENSE and row["speedup"]]
    fp8 = quality["unskipped"].get("FlashAttention-3 FP8")
    lines += [
        "",
        f"Speed: over {first['fastest_dense']}, the fastest dense kernel there"
        + "".join(f" ({OTHER_DENSE}: {other['speedup']:.2f}x)" for other in others)
        + f", {shape['heads']}/{shape['kv_heads']} heads of {shape['head_dim']}, "
        f"{first['dtype']}, {speed['environment']['gpu']}, all in one run; skip rates imposed on synthetic data. "
        f"Quality: {quality['model']['id']} "
        f"({quality['model']['architecture']}, {quality['model']['layers']} layers), {quality['length']:,} tokens of "
        f"prose and code, at the same share of tiles skipped; the row of 0% is the noise floor: two kernels, nothing "
        f"skipped"
        + (f" (FlashAttention-3 in FP8, dense: KL {fp8['kl']:.4f})" if fp8 else "")
        + f". For {LIMIT:.0%} of perplexity bsfa's recipe skips {reach[0]:.0%} of the tiles, the paper's top-k "
        f"{reach[1]:.0%}.",
    ]
    return "\n".join(lines)


def _cells(result: dict) -> tuple[dict[int, dict], dict]:
    """({length: cell} of a profile's first shape, that shape)."""
    shape = result["cells"][0]["shape"]
    return {cell["length"]: cell for cell in result["cells"] if cell["shape"] == shape}, shape


def _speedups(cell: dict, kind: str) -> dict[float, float]:
    """{skip rate asked for: speedup} of contenders of a kind."""
    rows = (row for row in cell["contenders"] if row["kind"] == kind)
    return {row["skip_target"]: row["speedup"] for row in rows if row["skip_target"] is not None and row["speedup"]}
