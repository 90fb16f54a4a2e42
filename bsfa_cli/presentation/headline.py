"""README.md's plot and its table: the figures that decide, from two stored results."""

from __future__ import annotations

from .real_table import at_skip, skip_at

SPEED, QUALITY = "llama-3.1-8b.nvidia-h200.json", "smollm2-8k.nvidia-h200.json"
LENGTHS = (32768, 131072)
PLOT = f"profiles/results/real/{QUALITY.removesuffix('json')}svg"
OURS, PAPERS, CALIBRATION = "shared skip, gap", "top-k, absolute", "mixed"
LIMIT = 0.01  # change of perplexity at which recipes are compared


def block(stored: dict[str, dict]) -> str | None:
    """Markdown from {file name: stored result}; None where one of the two is missing.

    Speed and quality meet at the same share of tiles skipped; quality is read between a recipe's own points.
    """
    if SPEED not in stored or QUALITY not in stored:
        return None
    speed, quality = stored[SPEED], stored[QUALITY]
    cells = {cell["length"]: cell for cell in speed["cells"]}
    recipes, floor = quality["calibrations"][CALIBRATION], quality["floor"]
    points = recipes[OURS]["points"]
    lines = [
        f"![What skipping costs a real model, by recipe]({PLOT})",
        "",
        "| tiles skipped | " + " | ".join(f"attention, {length // 1024}k tokens" for length in LENGTHS)
        + " | change of perplexity | KL from dense |",
        "| ---: |" + " ---: |" * (len(LENGTHS) + 2),
    ]  # fmt: skip
    first = cells[LENGTHS[0]]
    for contender in first["contenders"]:
        target = contender["skip_target"]
        if target is None or contender["kind"] != "bsfa":
            continue
        found = [f"{_at(cells[length], target):.2f}x" for length in LENGTHS]
        change, kl = ((floor[m] if target == 0 else at_skip(points, m, target)) for m in ("perplexity_increase", "kl"))
        kept = ["-" if change is None else f"{change:+.2%}", "-" if kl is None else f"{kl:.4f}"]
        lines.append(f"| {target:.0%} | " + " | ".join([*found, *kept]) + " |")
    shape, reach = first["shape"], [
        skip_at(recipes[recipe]["points"], "perplexity_increase", LIMIT) for recipe in (OURS, PAPERS)
    ]  # fmt: skip
    lines += [
        "",
        f"Speed: over {first['fastest_dense']}, the fastest dense kernel there, {shape['heads']}/{shape['kv_heads']} "
        f"heads of {shape['head_dim']}, {first['dtype']}, {speed['environment']['gpu']}; skip rates imposed on "
        f"synthetic data. Quality: {quality['model']['id']} ({quality['model']['architecture']}, "
        f"{quality['model']['layers']} layers), {quality['length']:,} tokens of prose and code, at the same share of "
        f"tiles skipped; the row of 0% is the noise floor: two kernels, nothing skipped. For {LIMIT:.0%} of perplexity "
        f"bsfa's recipe skips {reach[0]:.0%} of the tiles, the paper's top-k {reach[1]:.0%}.",
    ]
    return "\n".join(lines)


def _at(cell: dict, target: float) -> float:
    return next(row["speedup"] for row in cell["contenders"] if row["kind"] == "bsfa" and row["skip_target"] == target)
