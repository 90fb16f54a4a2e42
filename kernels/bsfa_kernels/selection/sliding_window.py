"""Static shapes: sliding window with sinks, and Tri-shape.

Token rule, a tile is kept when it holds one allowed and visible pair (i, j):

    sliding window + sinks    j < sinks  or  |i - j| < window           StreamingLLM (arXiv 2309.17453), A-shape
    Tri-shape                 the same   or  i >= Tq - last             SCBench (arXiv 2412.10319)

Defaults: 128 sinks and a window of 3968, the A-shape setting of MInference's code; the last 128 queries for Tri-shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Selector
from .blocks import bounds


def within_window(q, k, window: int, tile) -> torch.Tensor:
    """bool [query tiles, key tiles]: the tile holds a pair with |i - j| < window."""
    first_query, last_query = (x[:, None] for x in bounds(q.shape[2], tile.rows, q.device))
    first_key, last_key = bounds(k.shape[2], tile.keys, q.device)
    distance = torch.maximum(first_query - last_key, first_key - last_query)
    return distance.clamp(min=0) < window


@dataclass(frozen=True)
class SlidingWindow(Selector):
    """Sinks and a local window."""

    sinks: int = 128
    window: int = 3968

    name: ClassVar[str] = "sliding_window"
    knob: ClassVar[str] = "window"
    sweep: ClassVar[tuple[int, ...]] = (512, 1024, 2048, 3968, 8192, 16384)
    limits: ClassVar[dict] = {"sinks": (0, float("inf"))}

    def _tiles(self, q, k, scale, causal, tile):
        first_key, _ = bounds(k.shape[2], tile.keys, q.device)
        return within_window(q, k, self.window, tile) | (first_key < self.sinks)


@dataclass(frozen=True)
class TriShape(SlidingWindow):
    """Sinks, a local window, and dense rows for the last queries."""

    last: int = 128

    name: ClassVar[str] = "tri_shape"

    def _tiles(self, q, k, scale, causal, tile):
        _, last_query = bounds(q.shape[2], tile.rows, q.device)
        dense = last_query >= q.shape[2] - self.last
        return super()._tiles(q, k, scale, causal, tile) | dense[:, None]
