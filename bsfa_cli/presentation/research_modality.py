"""Tables of what `experiments.modality` stores."""

from __future__ import annotations

from collections.abc import Sequence


def block(results: Sequence[dict], sources: Sequence[str]) -> str:
    """Skip rates by modality of query and key tile, then what thresholds by modality save. `sources` are links."""
    runs = [run for result in results for run in result["runs"]]
    pairs = sorted({
        (query, key) for run in runs for point in run["points"]
        for query, keys in _tiles(point).items() for key in keys
    })  # fmt: skip
    heads = "; ".join(_head(result, source) for result, source in zip(results, sources, strict=True))
    lines = [
        f"{heads}. Skipped of the held-out prompts' tiles with the same thresholds for all modalities, by query tile "
        "and key tile (share of the candidates):",
        "",
        "| tokens | asked for | all | " + " | ".join(f"{query} x {key}" for query, key in pairs) + " |",
        "| ---: | ---: | ---: |" + " ---: |" * len(pairs),
    ]
    for run in runs:
        for point in run["points"]:
            tiles = _tiles(point)
            cells = [tiles.get(query, {}).get(key) for query, key in pairs]
            shown = [f"{cell['skip']:.1%} ({cell['share']:.0%})" if cell else "-" for cell in cells]
            whole = point["shared"]["held_out"]["skip"]
            lines.append(f"| {run['length']:,} | {point['target']:.0%} | {whole:.1%} | " + " | ".join(shown) + " |")
    lines += [
        "",
        "Softmax mass dropped on the held-out prompts, mean over rows, with shared thresholds and with `--by-modality` "
        "ones, both asked for the same skip rate on the fitted ones:",
        "",
        "| tokens | asked for | shared: skipped | mass dropped | by modality: skipped | mass dropped | less mass |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        for point in run["points"]:
            shared, apart = (point[kind]["held_out"] for kind in ("shared", "by_modality"))
            fields = [f"{each['skip']:.2%} | {each['dropped_mass']:.5f}" for each in (shared, apart)]
            saved = f"{saving(point):+.1%}"
            lines.append(f"| {run['length']:,} | {point['target']:.0%} | " + " | ".join([*fields, saved]) + " |")
    return "\n".join(lines)


def _head(result: dict, source: str) -> str:
    counts = ", ".join(
        f"{run['length']:,} tokens: fitted to {run['samples']['fit']} prompts, judged on {run['samples']['heldout']}"
        for run in result["runs"]
    )
    return (
        f"{result['model']['id']} on {result['gpu']}, {result['gate']} gate, tiles of "
        f"{'x'.join(map(str, result['tile']))}, {counts} ([file]({source}))"
    )


def saving(point: dict, role: str = "held_out") -> float:
    """The share of dropped softmax mass that thresholds by modality avoid; negative where they drop more."""
    return 1 - point["by_modality"][role]["dropped_mass"] / point["shared"][role]["dropped_mass"]


def _tiles(point: dict) -> dict[str, dict[str, dict[str, float]]]:
    return point["shared"]["held_out"]["tiles"]
