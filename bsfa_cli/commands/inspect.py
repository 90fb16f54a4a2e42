"""bsfa inspect: what a file of bsfa's holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from ..errors import UsageError
from ..options import Config, Json


def inspect(
    path: Annotated[
        Path | None,
        Argument(
            metavar="FILE",
            help="Thresholds, a run directory, captured layers, or a result of compare, profile or verify.",
        ),
    ] = None,
    json: Json = False,
    config: Config = None,
) -> None:
    """Show what a file holds: model, points, samples, versions. Loads no model."""
    if path is None:
        raise UsageError("which file? give thresholds, a run directory, captured layers or a stored result")

    from ..console import note, print_json, width
    from ..inspection import inspect as look
    from ..presentation.columns import aligned

    found = look(path)
    if json:
        print_json(found.data)
        return
    widest = max(len(name) for name, _ in found.facts)
    for name, words in found.facts:
        note(f"{name:{widest}}  {words}")
    note("")
    for line in aligned(found.table, width() - 2):
        note(f"  {line}".rstrip())
