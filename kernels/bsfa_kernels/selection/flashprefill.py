"""Block energy with a relative threshold, after FlashPrefill (arXiv 2603.06199).

    score[I, J] = sum_{i in I, i >= end of J} exp(scale * q_i . mean(K_J))          blocks of 128 x 128
    keep score[I, J] >= alpha * max_J score[I, J], key blocks of the first 256 positions (sinks), the 4 nearest
    blocks (512 positions), and everything for the last 2 query blocks (256 positions)

Computed as logarithms, so nothing overflows. Queries past the end of the sequence add nothing (in the official code
zero padding does). `alpha` has no single published value: the function's own default is 0.7 and the selection's 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..tiles import TileShape
from .base import Selector
from .blocks import block_count, block_mean, grouped_scores, to_tiles


@dataclass(frozen=True)
class FlashPrefill(Selector):
    """`chunk` is the number of query blocks whose scores [Hq, chunk * block, key blocks] are held at a time."""

    alpha: float = 0.1
    sinks: int = 256
    window: int = 512
    last: int = 256
    block: int = 128
    chunk: int = 16

    name: ClassVar[str] = "flashprefill"
    knob: ClassVar[str] = "alpha"
    sweep: ClassVar[tuple[float, ...]] = (0.7, 0.4, 0.2, 0.1, 0.05, 0.02)
    directions: ClassVar[tuple[bool, ...]] = (True,)
    limits: ClassVar[dict] = {"alpha": (1e-9, 1), "sinks": (0, 1e9), "window": (0, 1e9), "last": (0, 1e9)}

    def _tiles(self, q, k, scale, causal, tile):
        scores = self._energy(q, k, scale)
        query = torch.arange(scores.shape[-2], device=q.device)[:, None]
        key = torch.arange(scores.shape[-1], device=q.device)
        keep = (scores >= scores.amax(-1, keepdim=True) + log(self.alpha)) & (scores > -torch.inf)
        keep = keep | (key < block_count(self.sinks, self.block))
        keep = keep | (query - key < block_count(self.window, self.block))
        keep = keep | (query >= scores.shape[-2] - block_count(self.last, self.block))
        return to_tiles(keep, TileShape(self.block, self.block), tile, (q.shape[2], k.shape[2]))

    def _energy(self, q, k, scale):
        """log score [B, Hq, query blocks, key blocks]; -inf where no query of the block is past the key block."""
        means = block_mean(k, self.block).to(k.dtype)
        ends = (torch.arange(means.shape[2], device=q.device) + 1) * self.block - 1
        energy = []
        for start in range(0, q.shape[2], self.chunk * self.block):
            rows = q[:, :, start : start + self.chunk * self.block]
            scores = grouped_scores(rows, means, scale)
            position = torch.arange(start, start + rows.shape[2], device=q.device)[:, None]
            scores.masked_fill_(position < ends, -torch.inf)
            blocks = block_count(rows.shape[2], self.block)
            scores = F.pad(scores, (0, 0, 0, blocks * self.block - rows.shape[2]), value=-torch.inf)
            energy.append(scores.unflatten(2, (blocks, self.block)).logsumexp(3))
        return torch.cat(energy, dim=2)
