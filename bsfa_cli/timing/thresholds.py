"""Thresholds that reach a chosen skip rate on given tensors.

For speed measurements only: they are fitted to the very data they are used on and say nothing about accuracy.
"""

from __future__ import annotations

import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, tile_statistics

HALVINGS = 10
ENOUGH = 0.0025  # share of the candidates by which a fit may miss its target


def inert(gate: str, heads: int, query_tiles: int, device) -> Gate:
    """A gate that is evaluated and keeps every tile."""
    return Gate(**{gate: torch.full((heads, query_tiles), -torch.inf, device=device)})


class Fit:
    """Gates for any skip rate on q [1 or B, Hq, T, D], k and v [1 or B, Hkv, T, D], fitted to the first sequence.

    One threshold per head and query tile, so that every one of them skips the same share; or, with `shared`, one for
    all, so that what a head or position skips depends on its data.

    Tiles are ranked by the dense statistics, which decide exactly what an absolute gate keeps, and what a gap gate
    keeps at thresholds up to 0: there a dropped tile never held a row's maximum. Above 0 the statistics are a lower
    bound, since later tiles are compared with fewer; from there the kernel's own counters are bisected.
    """

    def __init__(self, gate: str, q, k, v, *, causal: bool, tile: TileShape, backend: str, seed=0, shared=False):
        self.gate, self.seed, self.shared = gate, seed, shared
        self._call = lambda thresholds: block_sparse_attention(
            q, k, v, Gate(gap=thresholds), causal=causal, tile=tile, return_counts=True, backend=backend
        )
        # The softmax masses that need a true log-sum-exp are not used here.
        lse = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
        statistics = tile_statistics(q, k, lse, causal=causal, tile=tile)
        candidate = statistics.gap[0].isfinite()
        values = {"absolute": statistics.maximum, "gap": statistics.gap}[gate][0]
        del statistics
        self.grid = values.shape[:2]
        self.count = self._grouped(candidate.sum(-1))
        groups = len(self.count)
        self.ordered = values.masked_fill_(~candidate, torch.inf).view(groups, -1).sort(-1).values

    def reach(self, skip: float) -> Gate:
        """A gate under which about `skip` of the candidates are dropped; count what it really drops."""
        dropped = torch.minimum(_whole(skip * self.count, self.seed), self.count)
        lowest = self._between(dropped)
        if self.gate == "gap" and bool((lowest > 0).any()):
            lowest = self._bisected(lowest, self.count - dropped)
        return Gate(**{self.gate: self._spread(torch.where(dropped > 0, lowest, -torch.inf))})

    def _between(self, dropped: torch.Tensor) -> torch.Tensor:
        """float32 [groups]: above the `dropped` smallest values of each group, below the next where they differ."""
        last_dropped = self.ordered.gather(-1, (dropped - 1).clamp(min=0)[:, None])[:, 0]
        first_kept = self.ordered.gather(-1, dropped.clamp(max=self.ordered.shape[-1] - 1)[:, None])[:, 0]
        above = torch.nextafter(last_dropped, torch.full_like(last_dropped, torch.inf))
        middle = torch.maximum((last_dropped + first_kept) / 2, above)
        return torch.where(dropped < self.count, middle, above).float()

    def _bisected(self, low: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The largest thresholds from `low` on that keep `wanted` tiles, for the groups whose `low` is above 0."""
        largest = self.ordered.masked_fill(self.ordered == torch.inf, 0).amax(-1)
        open_ = low > 0
        high = torch.where(open_, torch.maximum(2 * largest, low + 1), low)
        kept = self._kept(low)
        total = int(self.count.sum())
        for _ in range(HALVINGS):
            if int((kept - wanted)[open_].sum()) <= ENOUGH * total:
                break
            middle = (low + high) / 2
            there = self._kept(middle)
            enough = there >= wanted
            low, kept = torch.where(enough, middle, low), torch.where(enough, there, kept)
            high = torch.where(enough, high, middle)
        return low

    def _kept(self, thresholds: torch.Tensor) -> torch.Tensor:
        return self._grouped(self._call(self._spread(thresholds)).kept[0])

    def _grouped(self, counts: torch.Tensor) -> torch.Tensor:
        """int64 [groups] of counts [Hq, query tiles]."""
        return counts.sum(dtype=torch.int64)[None] if self.shared else counts.flatten().long()

    def _spread(self, thresholds: torch.Tensor) -> torch.Tensor:
        """float32 [Hq, query tiles] of thresholds [groups]."""
        return (thresholds.expand(self.grid) if self.shared else thresholds.view(self.grid)).contiguous()


def _whole(wanted: torch.Tensor, seed: int) -> torch.Tensor:
    """Fractional tile counts to whole ones, up or down at random, so that their mean is kept."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (wanted + torch.rand(wanted.shape, generator=generator).to(wanted.device)).floor().long()
