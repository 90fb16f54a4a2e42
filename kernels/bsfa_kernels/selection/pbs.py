"""PBS-Attn: keys permuted inside segments, so that important ones share blocks (arXiv 2510.21270).

    importance[j] = mean over the last 128 queries of softmax(scale * q_i . K)[j]
    inside every complete segment of 256 keys, K' and V' are K and V sorted by importance, descending
    A = softmax(scale * mean(q block) . mean(K' block)) over the blocks of earlier segments      blocks of 128 x 128
    keep the fewest largest entries whose sum reaches 0.9, the block that holds key 0, and all of the own segment;
    mask inside tiles by original positions

    arranged = PBS().arrange(q, k, v, scale=scale, causal=True, tile=TileShape())
    block_sparse_attention(q, arranged.k, arranged.v, causal=True, **arranged.options)

No kernel needs to know of it. All keys of earlier segments are visible to a query, so their order does not matter; its
own segment is kept whole, so there the original order serves. Hence the keys [K', K]: permuted ones at positions
0 .. P, P the length rounded up to whole segments, the original ones behind them, and queries from position P on.

Under grouped queries the importance is the mean over the query heads of a key head, so that they share one order. A
gate on top judges the own segment's tiles too, except the diagonal's, and has no sink to begin with: the first segment
sees key 0 in its original place only, so no permuted tile may be forced for all queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from ..blocks import BlockLists
from ..tiles import TileShape
from .base import Settings
from .blocks import block_count, cover, last_attention, pooled_scores, to_tiles, visible


class Arranged(NamedTuple):
    """`k` [B, Hkv, P + T, D], `v` [B, Hkv, P + T, Dv] and what `block_sparse_attention` must be told beside them."""

    k: torch.Tensor
    v: torch.Tensor
    options: dict  # blocks, q_offset, keep_sink


@dataclass(frozen=True)
class PBS(Settings):
    """`coverage` is the share of the pooled softmax to keep, `last` the number of queries that rank keys."""

    coverage: float = 0.9
    segment: int = 256
    block: int = 128
    last: int = 128

    name: ClassVar[str] = "pbs"
    knob: ClassVar[str] = "coverage"
    sweep: ClassVar[tuple[float, ...]] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    directions: ClassVar[tuple[bool, ...]] = (True,)

    def __post_init__(self):
        super().__post_init__()
        if self.segment % self.block:
            raise ValueError(f"pbs: segment ({self.segment}) must be a multiple of block ({self.block})")

    def arrange(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, causal: bool, tile: TileShape
    ) -> Arranged:
        """Permuted keys and values and the tiles to compute. q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv].

        Raises ValueError for shapes that do not fit together, non-causal attention, and segments that do not fit the
        tile.
        """
        self._check(q, k, causal)
        for size, name in ((tile.keys, "keys"), (tile.rows, "rows")):
            if self.segment % size:
                raise ValueError(f"pbs: segment ({self.segment}) must be a multiple of the tile's {name} ({size})")
        length = k.shape[2]
        order = self._order(q, k, scale)
        padding = -length % self.segment
        permuted_k, permuted_v = (x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3])) for x in (k, v))
        keys, values = (
            torch.cat([F.pad(permuted, (0, 0, 0, padding)), original], dim=2)
            for permuted, original in ((permuted_k, k), (permuted_v, v))
        )
        earlier, own = self._earlier(q, permuted_k, order, scale, tile), self._own(q, tile)
        unused = (length + padding) // tile.keys - earlier.shape[-1]
        blocks = BlockLists.from_mask(torch.cat([F.pad(earlier, (0, unused)), own.expand_as(earlier)], -1))
        return Arranged(keys, values, {"blocks": blocks, "q_offset": length + padding, "keep_sink": False})

    def _order(self, q, k, scale):
        """int64 [B, Hkv, T]: the original position of every permuted key."""
        importance = last_attention(q, k, scale, self.last).mean(2).unflatten(1, (k.shape[1], -1)).mean(2)
        whole = k.shape[2] // self.segment * self.segment
        position = torch.arange(k.shape[2], device=k.device)
        inside = importance[..., :whole].unflatten(-1, (whole // self.segment, self.segment))
        inside = inside.argsort(dim=-1, descending=True, stable=True)
        first = position[: whole : self.segment, None]
        return torch.cat([(inside + first).flatten(-2), position[whole:].expand(*importance.shape[:2], -1)], dim=-1)

    def _earlier(self, q, permuted_k, order, scale, tile):
        """bool [B, Hq, query tiles, key tiles]: permuted tiles to keep."""
        blocks = TileShape(self.block, self.block)
        scores = pooled_scores(q, permuted_k, scale, True, blocks)
        segment = torch.arange(scores.shape[-1], device=q.device) * self.block // self.segment
        past = segment < segment[:, None]
        weights = scores.masked_fill(~past, -torch.inf).softmax(-1).nan_to_num(0.0)  # the first segment has no past
        group = q.shape[1] // order.shape[1]
        first = (order == 0).int().argmax(-1).repeat_interleave(group, 1)[..., None, None]
        holds_first = torch.arange(scores.shape[-1], device=q.device) == first // self.block
        keep = (cover(weights, self.coverage) | holds_first) & past
        return to_tiles(keep, blocks, tile, (q.shape[2], q.shape[2]))

    def _own(self, q, tile):
        """bool [query tiles, key tiles]: original tiles of the query's own segment."""
        tiles = block_count(q.shape[2], tile.rows), block_count(q.shape[2], tile.keys)
        query, key = (
            torch.arange(count, device=q.device) * size // self.segment
            for count, size in zip(tiles, (tile.rows, tile.keys), strict=True)
        )
        return (query[:, None] == key) & visible(*tiles, tile, q.device)
