"""What a training run's last evaluation found, from its log, as a table."""

from __future__ import annotations

import json
from pathlib import Path


def block(log: Path, source: str) -> str:
    """Markdown: exact answers by length and task. `source` is a link."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    evaluated = {entry["evaluated"]: entry for entry in entries if "evaluated" in entry}
    tasks = list(next(iter(evaluated.values()))["exact_and_token_accuracy"])
    seconds = max(entry["seconds"] for entry in entries if "seconds" in entry)
    lines = [
        f"Exact answers of the dense model after {seconds / 60:.1f} minutes of training ([log]({source})), on made-up "
        "frames with real digits that were held out; every token of an answer must be right:",
        "",
        "| tokens | questions a task | " + " | ".join(tasks) + " |",
        "| ---: |" + " ---: |" * (1 + len(tasks)),
    ]
    for length, entry in sorted(evaluated.items()):
        found = " | ".join(f"{exact:.2f}" for exact, _ in entry["exact_and_token_accuracy"].values())
        lines.append(f"| {length:,} | {entry['documents']} | {found} |")
    return "\n".join(lines)
