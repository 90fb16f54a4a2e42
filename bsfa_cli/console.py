"""The two streams: data to stdout, everything a person reads to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable
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
    """Lines for the person at the terminal. What a file's names hold cannot command it: escapes are shown as such."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in message)
    console().print(shown, markup=False, highlight=False, soft_wrap=True)


def note_wrapped(message: str, indent: int = 0) -> None:
    """A sentence, or a list of names, over as many lines as it needs, all but the first set in by two more."""
    import textwrap

    left = " " * indent
    lines = textwrap.wrap(
        message, max(width(), 40), initial_indent=left, subsequent_indent=left + "  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    note("\n".join(lines))


def width() -> int:
    """Characters of a line; 80 where stderr is no terminal and COLUMNS does not say otherwise."""
    return console().width


def note_speeds(device) -> None:
    """A warning before times that a CPU takes."""
    if device.type == "cpu":
        note("times of a CPU: they say nothing about the speed on a GPU")


def progress():
    """A progress display for long work: a Rich Progress on a terminal, or else Lines. Use it as a context manager."""
    if not console().is_terminal:
        return Lines()
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
    )


def beginner(display, prefix: str):
    """A `timing.interleave.Begin` that shows each kind of work as one task of `display`, of `prefix`."""
    tasks: dict[str, list[int]] = {}

    def begin(total: int, what: str):
        if what in tasks:
            tasks[what][1] += total
            display.update(tasks[what][0], total=tasks[what][1])
        else:
            tasks[what] = [display.add_task(f"{prefix}: {what}", total=total), total]
        return lambda count=1: display.advance(tasks[what][0], count)

    return begin


class Lines:
    """What a Rich Progress is used for here, in a log: a line with the time left, at most one in EVERY seconds."""

    EVERY = 15.0

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._tasks = clock, []
        self._said = clock()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_) -> None:
        pass

    def add_task(self, description: str, total: int | None = None, completed: int = 0) -> int:
        task = {"description": description, "total": total, "completed": completed, "before": completed}
        self._tasks.append(task | {"begun": self._clock()})
        return len(self._tasks) - 1

    def update(self, task: int, total: int) -> None:
        self._tasks[task]["total"] = total

    def advance(self, task: int, count: int = 1) -> None:
        found, now = self._tasks[task], self._clock()
        found["completed"] += count
        if now - self._said < self.EVERY:
            return
        self._said = now
        done, total, gone = found["completed"], found["total"], now - found["begun"]
        text = (
            f"{found['description']}: {done:,}"
            + ("" if total is None else f" of {total:,}")
            + f", {duration(gone)} gone"
        )
        if total is not None and done > found["before"]:
            text += f", about {duration(gone * max(total - done, 0) / (done - found['before']))} left"
        note(text)


def duration(seconds: float) -> str:
    """As 1:05:00 or 0:35."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def print_json(data) -> None:
    """`data` as JSON on stdout, and nothing else. NaN and infinities are refused: JSON has none.

    Raises as `streams.write`.
    """
    import json
    import sys

    from .order import ordered
    from .streams import write

    write(sys.stdout, json.dumps(ordered(data), indent=2, allow_nan=False) + "\n")
