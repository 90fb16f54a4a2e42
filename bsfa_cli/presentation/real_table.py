"""Markdown of what `experiments.real` stores, and what a recipe costs at a skip rate, read between its points."""

from __future__ import annotations

from .versions import versions

NEAR = 0.015  # how far past the last point a skip rate may lie and still be read from it


def real_table(result: dict, source: str) -> str:
    """A section: every recipe's points of every calibration. `source` is a link to the JSON."""
    floor, machine = result["floor"], result["environment"].get("gpu") or "a CPU"
    lines = [
        f"### A real language model ({result['model']['id']}, {result['length']:,} tokens) on {machine}",
        "",
        f"{versions(result['environment'])}. Raw samples: [`{source.removeprefix('../')}`]({source}). "
        f"{result['evaluation']['texts']} texts that calibration never saw, dense perplexity "
        f"{floor['perplexity_dense']:.3f}. With nothing skipped two bfloat16 kernels differ: KL {floor['kl']:.4f}, "
        f"top-1 agreement {floor['top1']:.3f}, perplexity {floor['perplexity_increase']:+.2%}.",
        "",
        f"![KL and perplexity against tiles skipped]({source.removesuffix('json')}svg)",
    ]
    for calibration, recipes in result["calibrations"].items():
        lines += [
            "",
            f"Calibrated on {calibration}: KL, change of perplexity @ tiles skipped",
            "",
            "| recipe |" + " |" * 8,
        ]
        lines += ["| --- |" + " ---: |" * 8]
        for recipe, entry in recipes.items():
            points = sorted(entry["points"], key=lambda point: point["skip"])
            cells = [f"{p['kl']:.4f}, {p['perplexity_increase']:+.2%} @ {p['skip']:.0%}" for p in points]
            lines.append(f"| {recipe} | " + " | ".join(cells + ["-"] * (8 - len(cells))) + " |")
    return "\n".join(lines)


def at_skip(points: list[dict], metric: str, skip: float) -> float | None:
    """The metric at a skip rate, linear between the points; None beyond them."""
    points = sorted(points, key=lambda point: point["skip"])
    if not points[0]["skip"] <= skip <= points[-1]["skip"] + NEAR:
        return None
    for low, high in zip(points, points[1:], strict=False):
        if skip <= high["skip"]:
            share = (skip - low["skip"]) / (high["skip"] - low["skip"])
            return low[metric] + share * (high[metric] - low[metric])
    return points[-1][metric]


def skip_at(points: list[dict], metric: str, limit: float) -> float:
    """The largest skip rate up to which the metric stays within `limit`, linear between the points."""
    points = sorted(points, key=lambda point: point["skip"])
    reached = 0.0
    for low, high in zip(points, points[1:], strict=False):
        if low[metric] > limit:
            break
        reached = low["skip"]
        if high[metric] > limit:
            share = (limit - low[metric]) / (high[metric] - low[metric])
            return low["skip"] + share * (high["skip"] - low["skip"])
        reached = high["skip"]
    return reached
