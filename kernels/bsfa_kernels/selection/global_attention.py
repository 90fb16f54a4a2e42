"""Block-sparse global attention for VGGT and pi3 (arXiv 2509.07120): not causal, over the patches of many images.

    the first `special` of every `frame` tokens are special (camera, registers); P = the other tokens, in their order
    A = softmax(scale * mean128(Q_P) . mean64(K_P))                        blocks of 128 x 64 of the patch sequence
    n = max(smallest n whose n largest entries of the row sum to 0.97, n_k * (1 - sparse_ratio));  keep the n largest
    queries of special tokens see everything, keys of special tokens are seen by all

The method removes special tokens before it forms blocks, so its blocks and the tiles of the whole sequence do not
line up: a tile is kept when it holds a special token or meets a kept block. That is a superset of the method's own
mask; the density says what it costs. `frame` is 1374 for VGGT at 518 x 518 (37 x 37 patches and 5 special tokens).
The sparse ratio 0.75 is the paper's operating point of about 2x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..tiles import TileShape
from .base import Selector
from .blocks import block_count, bounds, cover, largest, pooled_scores


@dataclass(frozen=True)
class GlobalAttention(Selector):
    """`special` of every `frame` tokens stay dense; the patches keep at least the larger of two shares."""

    sparse_ratio: float = 0.75
    coverage: float = 0.97
    special: int = 5
    frame: int = 1374
    block_rows: int = 128
    block_keys: int = 64

    name: ClassVar[str] = "global_attention"
    knob: ClassVar[str] = "coverage"
    sweep: ClassVar[tuple[float, ...]] = (0.5, 0.7, 0.9, 0.97, 0.99)
    directions: ClassVar[tuple[bool, ...]] = (False,)
    limits: ClassVar[dict] = {"special": (0, float("inf"))}

    def __post_init__(self):
        super().__post_init__()
        if self.special >= self.frame:
            raise ValueError(f"global_attention: special ({self.special}) must be below frame ({self.frame})")

    def _tiles(self, q, k, scale, causal, tile):
        blocks = TileShape(self.block_rows, self.block_keys)
        patch_q, patch_k = self._patches(q), self._patches(k)
        dense_rows, rows = self._touched(q.shape[2], tile.rows, blocks.rows, patch_q.shape[2], q.device)
        dense_columns, columns = self._touched(k.shape[2], tile.keys, blocks.keys, patch_k.shape[2], q.device)
        dense = dense_rows[:, None] | dense_columns
        if not patch_q.shape[2] or not patch_k.shape[2]:
            return dense
        weights = pooled_scores(patch_q, patch_k, scale, False, blocks).softmax(-1)
        keep = cover(weights, self.coverage) | largest(weights, round(weights.shape[-1] * (1 - self.sparse_ratio)))
        # Counts of kept blocks a tile meets; small whole numbers, exact in float32.
        return dense | (rows.float() @ keep.float() @ columns.float().T > 0)

    def _patches(self, x):
        per_frame = self.frame - self.special
        count = x.shape[2] // self.frame * per_frame + max(x.shape[2] % self.frame - self.special, 0)
        patch = torch.arange(count, device=x.device)
        return x[:, :, patch // per_frame * self.frame + self.special + patch % per_frame]

    def _touched(self, length, tile, block, patches, device):
        """(bool [tiles]: holds a special token; bool [tiles, blocks]: holds a patch of the block)."""
        first, last = bounds(length, tile, device)
        position = torch.arange(length + 1, device=device)
        before = position // self.frame * (self.frame - self.special) + (position % self.frame - self.special).clamp(0)
        special = last + 1 - first > before[last + 1] - before[first]
        index = torch.arange(block_count(patches, block), device=device)
        meets = (index * block < before[last + 1][:, None]) & ((index + 1) * block > before[first][:, None])
        return special, meets
