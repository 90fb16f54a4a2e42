"""Table of what `experiments.vision_timing` stores: a prefill of a large model's shape, random weights, time only."""

from __future__ import annotations

from .dense_kernels import without_flash_attention_3
from .versions import versions

PARTS = {"left out": "the language model alone", "timed": "whole first token, vision tower included"}


def block(result: dict, source: str) -> str:
    """A row for every contender, without the vision tower and with it. `source` is a link."""
    first = result["prefill"][0]
    lines = [
        f"{first['model']} ({first['label']}), {first['length']:,} tokens, {first['visual_tokens']:,} of them visual, "
        f"{first['dtype']}, {result['environment']['gpu']}, {versions(result['environment'])} ([file]({source})). "
        f"{without_flash_attention_3(result)}".rstrip(),
        "",
        "| timed | attention | ms | speedup | skipped |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for entry in result["prefill"]:
        for row in entry["contenders"]:
            skip = "-" if row["skip"] is None else f"{row['skip']:.1%}"
            fields = [PARTS[entry["vision"]], row["name"], f"{row['ms_median']:.0f}", f"{row['speedup']:.2f}x", skip]
            lines.append(f"| {' | '.join(fields)} |")
    return "\n".join(lines)
