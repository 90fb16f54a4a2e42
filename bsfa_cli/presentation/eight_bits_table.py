"""Markdown of what `experiments.eight_bits` stores: what P and V in 8 bits would cost."""

from __future__ import annotations

import json
from pathlib import Path

from .marked import filled


def rendered(root: Path) -> dict[Path, str]:
    """{docs/int8.md: its content} from what is stored in checks; nothing where that is not."""
    page, tables = root / "docs" / "int8.md", []
    for path in sorted((root / "profiles" / "results" / "checks").glob("eight-bits-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        table = planted_table if "planted" in result else eight_bits_table
        tables.append(table(result, f"../profiles/results/checks/{path.name}"))
    if not tables or not page.exists():
        return {}
    return {page: filled(page.read_text(encoding="utf-8"), {"eight bits": "\n\n".join(tables)}, page.name)}


def eight_bits_table(result: dict, source: str) -> str:
    """A table of the real model's predictions, one contender a row. `source` is a link to the JSON."""
    model = result["model"]
    machine, evaluation = result["environment"].get("gpu") or "a CPU", model["evaluation"]
    rows = model["rows"]
    texts, planned = evaluation["texts"], evaluation["planned"]
    texts = f"{texts} text" + "s" * (texts > 1) + (f" of {planned} planned" if texts < planned else "")
    lines = [
        f"{model['identity']['id']}, {model['length']:,} tokens, {texts}, dense "
        f"perplexity {rows[0]['perplexity_dense']:.3f}; the model in {model['dtype']} on {machine}, attention emulated "
        f"([stored]({source})). Intervals are 95 % over texts, where there are four.",
        "",
        "| skipped | scores, P and V | KL | over int8 scores | top-1 | perplexity |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        over, ends = row["kl_over_int8"]["value"], row["kl_over_int8"]["interval"]
        spread = "" if ends is None else f" [{ends[0]:+.4f}, {ends[1]:+.4f}]"
        skip = f"{row['skip']:.0%}"
        lines.append(
            f"| {skip} | {row['name']} | {row['kl']:.4f} | {over:+.4f}{spread} | {row['top1']:.3f} | "
            f"{row['perplexity_increase']:+.2%} |"
        )
    return "\n".join(lines)


def planted_table(result: dict, source: str) -> str:
    """A table of output errors with exact scores, roundings down and data across."""
    planted, machine = result["planted"], result["environment"].get("gpu") or "a CPU"
    rows = {(row["name"], row["data"]): row["error"] for row in planted["rows"]}
    names, data = (list(dict.fromkeys(each)) for each in zip(*rows, strict=True))
    lines = [
        f"{planted['length']:,} tokens, heads of {planted['shape']['head_dim']}, on {machine} ([stored]({source})):",
        "",
        "| P and V | " + " | ".join(data) + " |",
        "| --- |" + " ---: |" * len(data),
    ]
    lines += [f"| {name} | " + " | ".join(f"{rows[name, each]:.4f}" for each in data) + " |" for name in names]
    return "\n".join(lines)
