"""Tables of what `experiments.vision_timing` stores: a prefill of a large model's shape, random weights, time only."""

from __future__ import annotations

from .dense_kernels import named, without_flash_attention_3
from .versions import versions

PARTS = {"left out": "The language model alone", "timed": "The whole first token, vision tower included"}


def block(results: list[tuple[dict, str]]) -> str:
    """A table for each part that was timed, the vision tower left out or not, from the first of the `results` (result,
    link) that has it.
    """
    parts: dict[str, str] = {}
    for result, source in results:
        for entry in result["prefill"]:
            parts.setdefault(entry["vision"], _table(result, entry, source))
    return "\n\n".join(parts[vision] for vision in PARTS if vision in parts)


def _table(result: dict, entry: dict, source: str) -> str:
    lines = [
        f"**{PARTS[entry['vision']]}**: {entry['model']} ({entry['label']}), {entry['length']:,} tokens, "
        f"{entry['visual_tokens']:,} of them visual, {entry['dtype']}, {result['environment']['gpu']}, "
        f"{versions(result['environment'])} ([file]({source})). "
        f"{without_flash_attention_3(result | {'prefill': [entry]})}".rstrip(),
        "",
        "| attention | ms | speedup | skipped |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in entry["contenders"]:
        skip = "-" if row["skip"] is None else f"{row['skip']:.1%}"
        lines.append(f"| {named(row)} | {row['ms_median']:.0f} | {row['speedup']:.2f}x | {skip} |")
    return "\n".join(lines)
