"""RULER's files: one question a line, under `input` and `outputs` (a list), with an `answer_prefix` that ends the text.

Files made by RULER are read as they are; files written here have in addition `task`, `depth` and `new_tokens`, which
RULER's own scripts leave alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError, UsageError
from ..files import write_whole
from . import tasks
from .questions import TextQuestion
from .texts import check_text, read_text, records

# Tokens that RULER lets a model generate, by the beginning of its task names.
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
PART = "qa"  # the tasks in which any one output will do


def read(path: Path) -> list[TextQuestion]:
    """The questions of a .jsonl file. Raises InputError, naming the line.

    A task that the lines do not name is the file's, in RULER's layout the name of its folder.
    """
    name = path.parent.name if path.stem in ("validation", "test") else path.stem
    found = [_question(path, number, record, name) for number, record in records(path, read_text(path))]
    if not found:
        raise InputError(f"{path} holds no question")
    return found


def write(path: Path, questions: Iterable[TextQuestion]) -> None:
    """Write questions whole. Raises UsageError for a path that is not .jsonl or cannot be written."""
    if path.suffix != ".jsonl":
        raise UsageError(f"questions are written as .jsonl, not to {path}")
    lines = []
    for index, question in enumerate(questions):
        lines.append({
            "index": index, "input": question.text.removesuffix(question.lead), "outputs": list(question.outputs),
            "length": question.length, "answer_prefix": question.lead, "task": question.task, "depth": question.depth,
            "new_tokens": question.new_tokens,
        })  # fmt: skip
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _question(path: Path, number: int, record: dict, name: str) -> TextQuestion:
    check_text(path, number, "input", record.get("input"))
    outputs = record.get("outputs")
    if not isinstance(outputs, list) or not outputs:
        raise InputError(f"{path}, line {number}: 'outputs' must be a list of texts and not empty")
    for output in outputs:
        check_text(path, number, "outputs", output)
    task = record.get("task", name)
    check_text(path, number, "task", task)
    lead = record.get("answer_prefix", "")
    if lead != "":
        check_text(path, number, "answer_prefix", lead)
    text = record["input"] if record["input"].endswith(lead) else record["input"] + lead
    kind = next((kind for kind in NEW_TOKENS if task.startswith(kind)), None)
    return TextQuestion(
        task, _integer(path, number, record, "length", 1, 1 << 24) or 0,
        _integer(path, number, record, "depth", 0, tasks.DEPTHS - 1), text, tuple(outputs),
        "part" if kind == PART else "all",
        _integer(path, number, record, "new_tokens", 1, 4096) or NEW_TOKENS.get(kind, 128), lead,
    )  # fmt: skip


def _integer(path: Path, number: int, record: dict, key: str, least: int, most: int) -> int | None:
    value = record.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
        raise InputError(f"{path}, line {number}: {key!r} must be a whole number from {least} to {most}")
    return value
