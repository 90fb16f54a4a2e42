"""SpargeAttention, stage 1 (arXiv 2502.18137): top-CDF on pooled scores of blocks that a mean can stand for.

    sim(X) = mean over all pairs of rows of the block of their cosine;    X is self-similar iff sim(X) > 0.6
    S = scale * mean(q block) . mean(k block), -inf for key blocks that are not self-similar;  P = softmax(S)
    per row, in descending order: keep entries while their cumulative sum is <= 0.98, and at least one
    query blocks (whole row) and key blocks (whole column) that are not self-similar stay dense

Blocks of 128 queries x 64 keys. The entry that crosses the CDF is not kept: the paper's pseudocode and its code agree
in that. The official code first subtracts from K its mean over the sequence (`smooth_keys`), which changes sim but no
softmax. Stage 2, the skipping inside the kernel, is not a block mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..tiles import TileShape
from .base import Selector
from .blocks import accumulator, block_mean, pooled_scores, to_tiles


@dataclass(frozen=True)
class SpargeAttention(Selector):
    """`coverage` is the CDF to reach, `similarity` the mean cosine above which a block is pooled."""

    coverage: float = 0.98
    similarity: float = 0.6
    block_rows: int = 128
    block_keys: int = 64
    smooth_keys: bool = True

    name: ClassVar[str] = "spargeattention"
    knob: ClassVar[str] = "coverage"
    sweep: ClassVar[tuple[float, ...]] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    limits: ClassVar[dict] = {"similarity": (-1, 1)}

    def _tiles(self, q, k, scale, causal, tile):
        blocks = TileShape(self.block_rows, self.block_keys)
        if self.smooth_keys:
            k = k - k.mean(2, keepdim=True, dtype=accumulator(k)).to(k.dtype)
        groups = q.shape[1] // k.shape[1]
        dense_rows = self_similarity(q, self.block_rows) <= self.similarity
        dense_columns = (self_similarity(k, self.block_keys) <= self.similarity).repeat_interleave(groups, dim=1)
        scores = pooled_scores(q, k, scale, causal, blocks).masked_fill(dense_columns[..., None, :], -torch.inf)
        # A row without a self-similar key block has no softmax; its visible blocks are dense already.
        keep = top_cdf(scores.softmax(-1).nan_to_num(0.0), self.coverage)
        keep = keep | dense_rows[..., None] | dense_columns[..., None, :]
        return to_tiles(keep, blocks, tile, (q.shape[2], k.shape[2]))


def self_similarity(x: torch.Tensor, size: int) -> torch.Tensor:
    """Mean cosine of all pairs of rows in each block, [B, H, T, D] -> [B, H, blocks]: |mean of unit rows|^2."""
    return block_mean(F.normalize(x.to(accumulator(x)), dim=-1), size).square().sum(-1)


def top_cdf(weights: torch.Tensor, share: float) -> torch.Tensor:
    """bool like weights: the largest entries of each row whose cumulative sum is <= share, and always the largest."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    chosen = weights.gather(-1, order).cumsum(-1) <= share
    chosen[..., 0] = True
    return torch.zeros_like(chosen).scatter(-1, order, chosen)
