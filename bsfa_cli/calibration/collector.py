"""What an attention module runs during calibration: dense attention, and the curves of its tiles on the side."""

from __future__ import annotations

import torch
from bsfa_kernels import TileStatistics, block_sparse_attention, tile_statistics

from .curves import ModuleCurves


class Collector:
    """A handler for `bsfa_kernels.integrations.transformers.attach`. Adds each sequence it sees to `curves`."""

    knows_scoring = True

    def __init__(self, curves: ModuleCurves):
        self.curves = curves

    def __call__(
        self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, sinks=None, **scoring
    ) -> torch.Tensor:
        """q [1, Hq, T, D], k and v [1, Hkv, T, D]: one whole sequence. Returns exact attention [1, Hq, T, D].

        Raises ValueError for a batch or for a chunk of a sequence.
        """
        if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
            raise ValueError(
                f"calibration takes one whole sequence at a time, got queries {list(q.shape)} and keys {list(k.shape)}"
            )
        tile = self.curves.plan.tile
        options = dict(scale=scale, causal=causal, spans=spans, tile=tile, **scoring)
        dense = block_sparse_attention(q, k, v, return_lse=True, sinks=sinks, **options)
        query_tiles = -(-q.shape[2] // tile.rows)  # with spans the statistics may have one more, an empty one
        statistics = tile_statistics(q, k, dense.lse, **options)
        self.curves.add(TileStatistics(*(x[:, :, :query_tiles] for x in statistics)))
        return dense.out
