"""Static shapes with a period: strided (Sparse Transformer, arXiv 1904.10509) and dilated.

Token rule, a tile is kept when it holds one allowed and visible pair (i, j):

    strided    |i - j| < window  or  (i - j) mod stride == 0      the same place in every frame, as seen from the query
    dilated    |i - j| < window  or  j mod stride == 0            every stride-th key, the same ones for all queries

For video, stride = tokens per frame. A stride below tile rows + tile keys (strided) or tile keys (dilated) touches
nearly every tile: the density says so. Window and stride have no published value at tile granularity; these are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Selector
from .blocks import bounds
from .sliding_window import within_window


@dataclass(frozen=True)
class Strided(Selector):
    """A local window and every stride-th diagonal."""

    window: int = 1024
    stride: int = 1024

    name: ClassVar[str] = "strided"
    knob: ClassVar[str] = "stride"
    sweep: ClassVar[tuple[int, ...]] = (8192, 4096, 2048, 1024, 512)

    def _tiles(self, q, k, scale, causal, tile):
        first_query, last_query = (x[:, None] for x in bounds(q.shape[2], tile.rows, q.device))
        first_key, last_key = bounds(k.shape[2], tile.keys, q.device)
        nearest, farthest = first_query - last_key, last_query - first_key
        touched = farthest.div(self.stride, rounding_mode="floor") * self.stride >= nearest
        return within_window(q, k, self.window, tile) | touched


@dataclass(frozen=True)
class Dilated(Strided):
    """A local window and every stride-th key."""

    name: ClassVar[str] = "dilated"

    def _tiles(self, q, k, scale, causal, tile):
        first_key, last_key = bounds(k.shape[2], tile.keys, q.device)
        return within_window(q, k, self.window, tile) | (last_key // self.stride * self.stride >= first_key)
