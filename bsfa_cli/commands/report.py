"""bsfa report: stored results as one page that anyone can open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import UsageError
from ..options import Config, Json


def report(
    results: Annotated[
        list[Path] | None, Argument(metavar="RESULTS...", help="JSON files of bsfa compare, profile and verify.")
    ] = None,
    output: Annotated[Path | None, Option("--output", "-o", metavar="FILE.html", help="The page to write.")] = None,
    json: Json = False,
    config: Config = None,
) -> None:
    """Make one HTML page of stored results.

    It needs no GPU and no network, neither to be made nor to be read.
    """
    if not results:
        raise UsageError("which results? give JSON files that bsfa compare, profile or verify wrote with -o")
    if output is None:
        raise UsageError("where should the page go? give -o report.html")

    from .. import verification
    from ..comparison import matching
    from ..console import note, print_json
    from ..files import PAGE, check_writable, read_result, write_whole
    from ..presentation import figures
    from ..presentation.report import page
    from ..timing import compare

    check_writable(output, PAGE)
    formats = compare.FORMATS | {matching.KIND: matching.FORMAT, verification.KIND: verification.FORMAT}
    found = [(path, read_result(path, formats)) for path in results]
    content = page(found).encode()
    write_whole(output, content)
    if not figures.available():
        note(f"without plots: {figures.MISSING}")
    note(f"written: {output} ({len(content):,} bytes)")
    if json:
        print_json({"file": str(output), "bytes": len(content), "results": [str(path) for path in results]})
