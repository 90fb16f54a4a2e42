"""The standard streams, where they are closed or their reader is gone."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from .errors import UsageError


def open_closed_streams() -> None:
    """Give streams that were closed (`>&-`) the null device, before a file that is opened takes their numbers."""
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers: the lowest free one is taken
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))


def is_closed(name: str) -> bool:
    """Whether the stream `name` of sys was closed when the process began."""
    return getattr(sys, f"__{name}__") is None


def write(stream: TextIO, text: str = "") -> None:
    """Write and flush; raises BrokenPipeError where the reader is gone, UsageError where nothing can be written.

    What could not be written is then dropped, so that the interpreter does not fail again at its end.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        if isinstance(error, BrokenPipeError):
            raise
        raise UsageError(f"cannot write to {stream.name.strip('<>')}: {error.strerror}") from error
