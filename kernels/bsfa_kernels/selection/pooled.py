"""Mean-pooled block selection, top-k (as MoBA, arXiv 2502.13189) and top-p.

    A = softmax(scale * mean(q block) . mean(k block)) over the visible blocks      blocks of 128 x 128
    top-k    the diagonal block, then the largest entries of the row, k in all
    top-p    the fewest largest entries whose sum reaches p of the row; the diagonal block beside them

The mean over the diagonal block includes keys its first queries cannot see; it is kept in any case. MoBA is trained
with its selection and uses larger blocks; here it is applied to a model that never saw it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..tiles import TileShape
from .base import Selector
from .blocks import cover, diagonal, largest, pooled_scores, to_tiles


@dataclass(frozen=True)
class PooledTopK(Selector):
    """A fixed number of blocks per query block."""

    count: int = 32
    block: int = 128

    name: ClassVar[str] = "pooled_top_k"
    knob: ClassVar[str] = "count"
    sweep: ClassVar[tuple[int, ...]] = (4, 8, 16, 32, 64, 128)

    def _tiles(self, q, k, scale, causal, tile):
        blocks = TileShape(self.block, self.block)
        scores = pooled_scores(q, k, scale, causal, blocks)
        scores = scores.masked_fill(diagonal(*scores.shape[-2:], blocks, q.device), torch.inf)
        return to_tiles(largest(scores, self.count), blocks, tile, (q.shape[2], k.shape[2]))


@dataclass(frozen=True)
class PooledTopP(Selector):
    """As many blocks per query block as carry the share `coverage` of the pooled softmax."""

    coverage: float = 0.9
    block: int = 128

    name: ClassVar[str] = "pooled_top_p"
    knob: ClassVar[str] = "coverage"
    sweep: ClassVar[tuple[float, ...]] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)

    def _tiles(self, q, k, scale, causal, tile):
        blocks = TileShape(self.block, self.block)
        scores = pooled_scores(q, k, scale, causal, blocks).softmax(-1)
        return to_tiles(cover(scores, self.coverage), blocks, tile, (q.shape[2], k.shape[2]))
