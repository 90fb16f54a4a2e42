"""What NVIDIA's skip-softmax kernel skips, computed by its rule: FlashInfer's build of it does not count.

Read from fmha_v2 (fmha/warpspec/compute.h and epilogue.h): 64 query rows meet key tiles from left to right. The first
is always kept; another is dropped, and leaves the running maxima as they were, when for every row

    exp(row maximum in the tile - running maximum of the row) < threshold

Rows past the end of the sequence are zero queries and vote like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

ROWS = 64
MAXIMA = 2**29  # row maxima kept at a time; with more, only every n-th query tile is looked at
SCORES = 2**26
HALVINGS, SPAN = 16, 30.0  # of the search for a threshold, whose logarithm lies within the span


@dataclass(frozen=True)
class Skipped:
    """`skip`: share of the visible tiles but the first of each row of tiles; `kept_share`: of all visible tiles."""

    skip: float
    kept_share: float


class Rule:
    """The rule on the first sequence of q [B, Hq, T, D] and k [B, Hkv, T, D], with key tiles of `keys`.

    `stride`: every how manieth query tile was looked at.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, *, causal: bool, keys: int):
        q, k = q[0], k[0]
        heads, length, head_dim = q.shape
        group, key_tiles = heads // k.shape[0], -(-length // keys)
        query_tiles = -(-length // ROWS)
        self.stride = max(1, -(-query_tiles * heads * ROWS * key_tiles // MAXIMA))
        tiles = torch.arange(self.stride // 2, query_tiles, self.stride, device=q.device)
        rows = (tiles[:, None] * ROWS + torch.arange(ROWS, device=q.device)).flatten()
        queries = q[:, rows.clamp(max=length - 1)] * (rows < length)[:, None]  # [Hq, rows, D]
        column = torch.arange(length, device=q.device)
        self.maxima = torch.empty(key_tiles, heads, len(rows), device=q.device)
        step = max(1, SCORES // (group * length))
        for i in range(0, len(rows), step):
            part = slice(i, i + step)
            hidden = (column > rows[part, None]) if causal else None
            for head in range(0, heads, group):
                scores = queries[head : head + group, part].float() @ k[head // group].float().T  # [group, rows, T]
                scores *= head_dim**-0.5
                if causal:
                    scores.masked_fill_(hidden, -torch.inf)
                scores = pad(scores, (0, key_tiles * keys - length), value=-torch.inf)
                maxima = scores.unflatten(-1, (key_tiles, keys)).amax(-1)  # [group, rows, key tiles]
                self.maxima[:, head : head + group, part] = maxima.permute(2, 0, 1)
        self.maxima = self.maxima.unflatten(2, (-1, ROWS))  # [key tiles, Hq, query tiles, ROWS]
        self.visible = self.maxima.amax(-1) > -torch.inf

    def at(self, gap: float) -> Skipped:
        """What is dropped at the threshold exp(gap)."""
        running, dropped = self.maxima[0], torch.zeros((), dtype=torch.int64, device=self.maxima.device)
        for maxima, visible in zip(self.maxima[1:], self.visible[1:], strict=True):
            skipped = (maxima - running < gap).all(-1)
            dropped += (skipped & visible).sum()
            running = torch.where(skipped[..., None], running, torch.maximum(running, maxima))
        visited = int(self.visible.sum())
        candidates = visited - self.visible[0].numel()
        return Skipped(int(dropped) / candidates if candidates else 0.0, 1 - int(dropped) / visited)

    def reach(self, skip: float) -> float:
        """The gap at which a share of about `skip` is dropped."""
        low, high = -SPAN, SPAN
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(middle).skip < skip else (low, middle)
        return (low + high) / 2
