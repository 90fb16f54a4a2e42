"""XAttention: blocks scored by their antidiagonals (arXiv 2503.16428).

    K'[u] = cat_s K[u S + s];   Q'[t] = cat_s Q[t S + S - 1 - s]           s = 0 .. S - 1, stride S = 8 (or 16)
    A' = softmax(scale / S * Q' K'^T), causal over t >= u                  each entry sums one antidiagonal of S x S
    score[I, J] = sum of A' over the block                                 blocks of 128 x 128
    keep the first column and the diagonal, then the largest scores until the row's kept sum reaches 0.9 of its sum

Without causality nothing is forced. The sequence is padded with zeros to a multiple of S, as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..tiles import TileShape
from .base import Selector
from .blocks import block_count, block_sum, cover, diagonal, grouped_scores, to_tiles


@dataclass(frozen=True)
class XAttention(Selector):
    """`chunk` is the number of query blocks whose strided scores [Hq, chunk * block / stride, Tk / stride] are held."""

    coverage: float = 0.9
    stride: int = 8
    block: int = 128
    chunk: int = 16

    name: ClassVar[str] = "xattention"
    knob: ClassVar[str] = "coverage"
    sweep: ClassVar[tuple[float, ...]] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)

    def __post_init__(self):
        super().__post_init__()
        if self.block % self.stride:
            raise ValueError(f"xattention: block ({self.block}) must be a multiple of stride ({self.stride})")

    def _tiles(self, q, k, scale, causal, tile):
        scores = self._scores(q, k, scale, causal)
        blocks = TileShape(self.block, self.block)
        forced = None
        if causal:
            forced = diagonal(*scores.shape[-2:], blocks, q.device)
            forced[:, 0] = True
            forced = forced.expand_as(scores)
        return to_tiles(cover(scores, self.coverage, forced), blocks, tile, (q.shape[2], k.shape[2]))

    def _scores(self, q, k, scale, causal):
        strided_q, strided_k = self._strided(q, reverse=True), self._strided(k, reverse=False)
        per_block = self.block // self.stride
        rows, keys = strided_q.shape[2], strided_k.shape[2]
        scores = []
        for start in range(0, rows, self.chunk * per_block):
            end = min(start + self.chunk * per_block, rows)
            seen = min(end, keys) if causal else keys
            strided = grouped_scores(strided_q[:, :, start:end], strided_k[:, :, :seen], scale / self.stride)
            if causal:
                row = torch.arange(start, end, device=q.device)[:, None]
                strided.masked_fill_(torch.arange(seen, device=q.device) > row, -torch.inf)
            summed = block_sum(block_sum(strided.softmax(-1), per_block).transpose(-1, -2), per_block)
            summed = summed.transpose(-1, -2)
            scores.append(F.pad(summed, (0, block_count(keys, per_block) - summed.shape[-1])))
        return torch.cat(scores, dim=2)

    def _strided(self, x, reverse):
        groups = block_count(x.shape[2], self.stride)
        x = F.pad(x, (0, 0, 0, groups * self.stride - x.shape[2])).unflatten(2, (groups, self.stride))
        return (x.flip(3) if reverse else x).flatten(3)
