"""Questions with options: asked with letters, answered by one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .records import Record, shown

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASK_LETTER = "Answer with the letter of the right option."
_LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s*")


def plain(record: Record, options: Sequence[str]) -> list[str]:
    """Options without the letters that all of them, in order, begin with ("A. red"). Raises InputError for too many."""
    if not 2 <= len(options) <= len(LETTERS):
        raise record.refuse(f"needs 2 to {len(LETTERS)} options to choose from, got {len(options)}")
    found = [_LETTERED.match(option) for option in options]
    if all(match and match[1] == letter for match, letter in zip(found, LETTERS, strict=False)):
        options = [option[match.end() :] for option, match in zip(options, found, strict=True)]
    if not all(option.strip() for option in options):
        raise record.refuse("an option is empty")
    return list(options)


def asked(question: str, options: Sequence[str]) -> str:
    """The question, its options by letter, and what to answer with."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, ASK_LETTER])


def letter(record: Record, key: str, count: int, required: bool = True) -> tuple[str, ...] | None:
    """The letter that a field names, by itself or as a number from 0; None where it is missing, null or -1."""
    value = record.fields.get(key)
    if not required and value in (None, -1, "-1"):
        return None
    if isinstance(value, str) and value.strip().upper() in list(LETTERS[:count]):
        return (value.strip().upper(),)
    if isinstance(value, int | str) and not isinstance(value, bool) and str(value).strip().isdecimal():
        return (LETTERS[record.number(key, count)],)
    raise record.refuse(
        f"{key!r} must name one of {count} options, as {LETTERS[0]} to {LETTERS[count - 1]} or 0 to {count - 1}; got "
        f"{shown(value)}"
    )
