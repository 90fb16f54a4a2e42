"""Plain tables for the terminal: columns that fit it, no digit ever cut."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

NARROWEST = 16  # of a first column that is wrapped


def aligned(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Rows as lines: first column to the left, the others to the right. Where they take more than `width` characters,
    names in the first column are wrapped, their row's numbers beside the last line; nothing is ever cut.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        left = width - sum(each + 2 for each in widths[1:])
        widths[0] = min(widths[0], max(left, NARROWEST))
    lines = []
    for name, *fields in rows:
        *above, last = textwrap.wrap(name, widths[0], break_long_words=False) or [""]
        right = [field.rjust(each) for field, each in zip(fields, widths[1:], strict=True)]
        lines += [*above, "  ".join((last.ljust(widths[0]), *right))]
    return lines


def chosen(rows: Sequence[Sequence[str]], headings: Sequence[str]) -> list[tuple[str, ...]]:
    """The columns of `rows`, whose first is their headings, that stand under `headings`, in that order."""
    places = [rows[0].index(heading) for heading in headings]
    return [tuple(row[place] for place in places) for row in rows]
