"""The runtime of bsfa: exact block-sparse attention gated by calibrated thresholds.

Imports neither the command-line tool nor transformers; a serving engine needs only this package. Names are looked up
when they are first used: reading a file of this package's takes neither torch nor Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import Attention, TileStatistics, block_sparse_attention, explain, tile_statistics
    from .backends import BackendUnavailable
    from .blocks import BlockLists
    from .dropping import drop_costs
    from .gates import Gate
    from .packed import Packed, pack
    from .request import make_spans
    from .tiles import TileShape

__all__ = [
    "Attention",
    "BackendUnavailable",
    "BlockLists",
    "Gate",
    "Packed",
    "TileShape",
    "TileStatistics",
    "block_sparse_attention",
    "drop_costs",
    "explain",
    "make_spans",
    "pack",
    "tile_statistics",
]
_PLACES = {
    "BackendUnavailable": ".backends", "BlockLists": ".blocks", "Gate": ".gates", "make_spans": ".request",
    "Packed": ".packed", "TileShape": ".tiles", "drop_costs": ".dropping", "pack": ".packed",
}  # fmt: skip


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_PLACES.get(name, ".api"), __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
