"""The runtime of bsfa: exact block-sparse attention gated by calibrated thresholds.

Imports neither the command-line tool nor transformers; a serving engine needs only this package.
"""

from .api import Attention, TileStatistics, block_sparse_attention, explain, tile_statistics
from .backends import BackendUnavailable
from .blocks import BlockLists
from .gates import Gate
from .request import make_spans
from .tiles import TileShape

__all__ = [
    "Attention",
    "BackendUnavailable",
    "BlockLists",
    "Gate",
    "TileShape",
    "TileStatistics",
    "block_sparse_attention",
    "explain",
    "make_spans",
    "tile_statistics",
]
