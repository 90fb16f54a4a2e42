"""How messages quote what they are about. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping


def short(value) -> str:
    """`value` as a message can quote it: text as it is, else as JSON; on one line, at most 80 characters."""
    text = one_line((value if isinstance(value, str) else _json(value))[:81])
    return text if len(text) <= 80 else text[:77] + "..."


def quoted(value) -> str:
    """As `short`, with text in quotes."""
    return f"'{short(value)}'" if isinstance(value, str) else short(value)


def _json(value) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return repr(value)


def one_line(text: str) -> str:
    """`text` with whatever does not print (line ends, control characters, half surrogate pairs) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def kind(value) -> str:
    """What `value`, read from JSON or YAML, is: "a list", "text"; the name of its class for what neither holds."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {Mapping: "an object", (list, tuple): "a list", str: "text", (int, float): "a number"}
    return next((name for each, name in kinds.items() if isinstance(value, each)), type(value).__name__)
