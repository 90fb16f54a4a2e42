"""Vertical-slash (MInference, arXiv 2407.02490).

    A = softmax(scale * Q[-last:] K^T), causal                       last = 64
    column[j] = sum_i A[i, j];        the first 30 forced;           the 1000 largest are kept
    diagonal[o] = sum_i A[i, i - o];  offsets below 100 forced;      the 6096 largest are kept
    a tile is kept when a kept column or a kept diagonal passes through it

Published budgets differ by head (they come from an offline search); these are its most used ones, for every head.
MInference gathers single columns, here the whole tile around a column is computed. `budget` multiplies both counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from .base import Selector
from .blocks import block_sum, bounds, largest, last_attention, slash_sums


@dataclass(frozen=True)
class VerticalSlash(Selector):
    """Columns and diagonals that matter to the last queries."""

    columns: int = 1000
    diagonals: int = 6096
    budget: float = 1.0
    last: int = 64
    forced_columns: int = 30
    forced_diagonals: int = 100

    name: ClassVar[str] = "vertical_slash"
    knob: ClassVar[str] = "budget"
    sweep: ClassVar[tuple[float, ...]] = (0.05, 0.125, 0.25, 0.5, 1.0, 2.0)
    directions: ClassVar[tuple[bool, ...]] = (True,)
    limits: ClassVar[dict] = {"budget": (0, 1000), "forced_columns": (0, 1e9), "forced_diagonals": (0, 1e9)}

    def _tiles(self, q, k, scale, causal, tile):
        attention = last_attention(q, k, scale, self.last)
        vertical, slash = attention.sum(-2), slash_sums(attention)
        vertical[..., : self.forced_columns] = float("inf")
        slash[..., : self.forced_diagonals] = float("inf")
        columns = largest(vertical, round(self.columns * self.budget))
        diagonals = largest(slash, round(self.diagonals * self.budget))
        touched = block_sum(columns.int(), tile.keys) > 0
        return touched[..., None, :] | through_tiles(diagonals, q.shape[2], tile)


def through_tiles(diagonals, length: int, tile):
    """bool [..., query tiles, key tiles]: a kept diagonal, bool [..., T] indexed by i - j, passes through the tile."""
    first_query, last_query = (x[:, None] for x in bounds(length, tile.rows, diagonals.device))
    first_key, last_key = bounds(length, tile.keys, diagonals.device)
    nearest, farthest = (first_query - last_key).clamp(min=0), last_query - first_key
    below = F.pad(diagonals.int().cumsum(-1), (1, 0))
    return below[..., (farthest + 1).clamp(min=0)] > below[..., nearest]
