"""Pages of which parts are generated: each part stands between a line that begins it and one that ends it."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import InputError


def marks(name: str) -> tuple[str, str]:
    """The lines that begin and end the part of this name."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def filled(page: str, parts: Mapping[str, str], where: str) -> str:
    """`page` with each of the `parts` {name: content} between its marks. Raises InputError, naming the page by `where`,
    unless each has both of them once.
    """
    for name, content in parts.items():
        begin, end = marks(name)
        if page.count(begin) != 1 or page.count(end) != 1:
            raise InputError(f"{where} needs one line '{begin}' and one line '{end}'")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    return page
