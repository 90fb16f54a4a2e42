"""What --tasks asks for: questions about text, or about frames."""

from __future__ import annotations

from . import frame_tasks
from .amount import check_amount
from .frame_questions import FramePlan
from .questions import Plan, parse_names

FRAMES = "frames"


def names_of(spec: str) -> tuple[str, ...]:
    """The tasks of "all" (those about text), "frames" (those about frames) or names; `plan` refuses unknown ones."""
    return frame_tasks.NAMES if spec == FRAMES else parse_names(spec)


def plan(
    spec: str, lengths: tuple[int, ...], questions: int, seed: int = 0, *, held_out: bool = True, ask_at: float = 1.0
) -> Plan:
    """The plan of what `names_of` reads: tasks of one of the two kinds.

    Raises UsageError for more questions than are made, and as `Plan` and `FramePlan`.
    """
    names = names_of(spec)
    check_amount(questions * len(names) * len(lengths), max(lengths), "--questions")
    kind = FramePlan if set(names) & set(frame_tasks.NAMES) else Plan
    return kind(names, lengths, questions, seed, held_out, ask_at)
