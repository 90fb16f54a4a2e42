"""Thresholds that reach a chosen skip rate on given tensors, one per head and query tile.

For speed measurements only: they are fitted to the very data they are used on and say nothing about accuracy.
"""

from __future__ import annotations

import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, tile_statistics

# Gap thresholds, natural units: scores of unit-normal data lie well within.
LOWEST, HIGHEST, HALVINGS = -16.0, 16.0, 15


def inert(gate: str, heads: int, query_tiles: int, device) -> Gate:
    """A gate that is evaluated and keeps every tile."""
    return Gate(**{gate: torch.full((heads, query_tiles), -torch.inf, device=device)})


def for_skip(gate: str, skip: float, q, k, v, *, causal: bool, tile: TileShape, backend: str, seed: int = 0) -> Gate:
    """A gate under which about `skip` of every query tile's candidates are dropped. q [1 or B, Hq, T, D]."""
    choose = {"absolute": _absolute, "gap": _gap}[gate]
    return Gate(**{gate: choose(skip, q, k, v, causal, tile, backend, seed)})


def _whole(wanted: torch.Tensor, seed: int) -> torch.Tensor:
    """Fractional tile counts to whole ones, up or down at random, so that their mean is kept."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (wanted + torch.rand(wanted.shape, generator=generator).to(wanted.device)).floor().long()


def _absolute(skip, q, k, v, causal, tile, backend, seed) -> torch.Tensor:
    lse = block_sparse_attention(q, k, v, causal=causal, tile=tile, return_lse=True, backend=backend).lse
    statistics = tile_statistics(q, k, lse, causal=causal, tile=tile)
    candidate = statistics.gap.isfinite()[0]
    maxima = statistics.maximum[0].masked_fill_(~candidate, torch.inf)
    del statistics
    count = candidate.sum(-1)
    ordered = maxima.sort(-1).values
    dropped = torch.minimum(_whole(skip * count, seed), count)
    last_dropped = ordered.gather(-1, (dropped - 1).clamp(min=0)[..., None])[..., 0]
    first_kept = ordered.gather(-1, dropped.clamp(max=ordered.shape[-1] - 1)[..., None])[..., 0]
    above = torch.nextafter(last_dropped, torch.full_like(last_dropped, torch.inf))
    middle = torch.where(dropped < count, torch.maximum((last_dropped + first_kept) / 2, above), above)
    return torch.where(dropped > 0, middle, -torch.inf).float().contiguous()


def _gap(skip, q, k, v, causal, tile, backend, seed) -> torch.Tensor:
    """Bisection on the kernel's own counters: what a tile is compared with depends on the tiles kept before it."""

    def kept(thresholds):
        result = block_sparse_attention(
            q, k, v, Gate(gap=thresholds), causal=causal, tile=tile, return_counts=True, backend=backend
        )
        return result.kept[0], result.candidates[0]

    query_tiles = -(-q.shape[2] // tile.rows)
    low = torch.full((q.shape[1], query_tiles), LOWEST, device=q.device)
    high = torch.full_like(low, HIGHEST)
    _, candidates = kept(low)
    wanted = torch.minimum(_whole((1 - skip) * candidates, seed), candidates)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = kept(middle)[0] >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(wanted < candidates, low, -torch.inf)
