"""Markdown of what `experiments.eight_bits` stores: what P and V in 8 bits would cost."""

from __future__ import annotations


def eight_bits_table(result: dict, source: str) -> str:
    """A table of the real model's predictions, one contender a row. `source` is a link to the JSON."""
    model = result["model"]
    machine, evaluation = result["environment"].get("gpu") or "a CPU", model["evaluation"]
    rows = model["rows"]
    planned = "" if evaluation["texts"] == evaluation["planned"] else f" of {evaluation['planned']} planned"
    lines = [
        f"[Stored]({source}): {model['identity']['id']}, {model['length']:,} tokens, {evaluation['texts']} texts{planned}, "
        f"model in {model['dtype']} on {machine}, attention emulated; dense perplexity "
        f"{rows[0]['perplexity_dense']:.3f}. KL is to the dense model, with 95 % intervals over texts where there are four.",
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


def planted_table(result: dict, names: dict[str, str]) -> str:
    """A table of output errors, roundings down and data across, of the roundings {name: words for it}."""
    rows = {(row["name"], row["data"]): row["error"] for row in result["planted"]["rows"]}
    data = list(dict.fromkeys(each for _, each in rows))
    lines = ["| | " + " | ".join(data) + " |", "| --- |" + " ---: |" * len(data)]
    for name, words in names.items():
        lines.append(f"| {words} | " + " | ".join(f"{rows[name, each]:.4f}" for each in data) + " |")
    return "\n".join(lines)
