"""Options of which nothing would come: refused where they were given on the command line."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from .errors import UsageError

OF_DATA = ("data", "image_root", "frames", "repeat_data")  # options, as parameters


def refuse_idle(context: typer.Context, idle: Iterable[str], where: str) -> None:
    """Raise UsageError for an option on the command line of which nothing comes `where` ("on captured layers")."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if parameter.name in idle and source is not None and source.name == "COMMANDLINE":
            flag = max((each for each in parameter.opts if each.startswith("--")), key=len)
            raise UsageError(f"{flag} means nothing {where}; drop it")
