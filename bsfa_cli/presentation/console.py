"""The two streams: data to stdout, everything a person reads to stderr."""

from __future__ import annotations

from functools import cache


@cache
def console():
    """Rich console on stderr; honours NO_COLOR and non-terminals."""
    from rich import console as rich

    class Console(rich.Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # Rich would exit with 1, which says that a gate failed

    return Console(stderr=True)


def note(message: str) -> None:
    """One line for the person at the terminal."""
    console().print(message, markup=False, highlight=False, soft_wrap=True)


def progress():
    """A progress display for long work (a Rich Progress; use it as a context manager)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
        disable=not console().is_terminal,
    )


def print_json(data) -> None:
    """`data` as JSON on stdout, and nothing else. NaN and infinities are refused: JSON has none.

    Raises as `streams.write`.
    """
    import json
    import sys

    from ..streams import write

    write(sys.stdout, json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")
