"""FlexPrefill (arXiv 2502.20766): per head, pooled block scores or vertical-slash, whichever can be trusted.

    A = softmax(scale * Q[-block:] K^T), causal                                            block = 128
    true[J] = mean_i sum_{j in J} A[i, j];   estimate = softmax(scale * mean Q[-block:] . mean K_J)
    sqrt(JSD(estimate, true)) < tau = 0.1  ->  query-aware head, otherwise vertical-slash head

    vertical-slash    columns = fewest columns of mean_i A that reach gamma = 0.9;  n = columns // block + 1 blocks,
                      at least min_budget = 1024 tokens; keep the n key blocks with the largest column sums, block 0
                      first. Diagonals alike: block offset o sums i - j in [o block, (o + 1) block), offset 0 first,
                      and keeps the blocks (I, I - o).
    query-aware       the same with the minimal budget, and of softmax(scale * mean Q_I . mean K_J), normalised over
                      the whole head, the fewest largest entries that reach gamma

Where paper and official code differ (block budgets, minimal budget of query-aware heads) this follows the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..tiles import TileShape
from .base import Selector
from .blocks import (
    block_count,
    block_mean,
    block_sum,
    cover,
    grouped_scores,
    largest,
    last_attention,
    pooled_scores,
    slash_sums,
    to_tiles,
)


@dataclass(frozen=True)
class FlexPrefill(Selector):
    """`gamma` is the mass to cover, `tau` the divergence up to which pooled scores are trusted."""

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    block: int = 128

    name: ClassVar[str] = "flexprefill"
    knob: ClassVar[str] = "gamma"
    sweep: ClassVar[tuple[float, ...]] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    directions: ClassVar[tuple[bool, ...]] = (True,)

    def _tiles(self, q, k, scale, causal, tile):
        blocks = TileShape(self.block, self.block)
        attention = last_attention(q, k, scale, self.block)
        columns, diagonals = attention.mean(-2), slash_sums(attention) / attention.shape[-2]
        pooled = pooled_scores(q, k, scale, True, blocks)
        estimate = grouped_scores(
            q[:, :, -self.block :].mean(2, keepdim=True, dtype=pooled.dtype), block_mean(k, self.block), scale
        )
        divergence = root_divergence(estimate.squeeze(2).softmax(-1), block_sum(columns, self.block))
        trusted = (divergence < self.tau)[..., None]

        vertical, slash = self._blocks(columns, trusted), self._blocks(diagonals, trusted)
        index = torch.arange(vertical.shape[-1], device=q.device)
        offset = (index[:, None] - index).clamp(min=0)  # above the diagonal select() drops what is kept
        mask = vertical[..., None, :] | slash[..., offset]
        weights = pooled.softmax(-1).flatten(-2)
        mask = mask | (cover(weights, self.gamma).unflatten(-1, offset.shape) & trusted[..., None])
        return to_tiles(mask, blocks, tile, (q.shape[2], k.shape[2]))

    def _blocks(self, mass, trusted):
        """bool [B, Hq, blocks] of the lines' masses [B, Hq, T]: as many blocks as the budget allows, block 0 first."""
        least = block_count(self.min_budget, self.block)
        count = cover(mass, self.gamma).sum(-1, keepdim=True) // self.block + 1
        count = count.clamp(min=least).masked_fill(trusted, least)
        summed = block_sum(mass, self.block)
        summed[..., 0] = torch.inf
        return largest(summed, count)


def root_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """sqrt of the Jensen-Shannon divergence (nats) of distributions over the last axis."""
    middle = (p + q) / 2
    half = torch.special.xlogy(p, p) + torch.special.xlogy(q, q) - 2 * torch.special.xlogy(middle, middle)
    return (half.sum(-1) / 2).clamp(min=0).sqrt()
