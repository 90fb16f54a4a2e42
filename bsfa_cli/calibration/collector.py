"""What an attention module runs during calibration: dense attention, and the curves of its tiles on the side.

With int8 scores the curves are of those; the model goes on with exact ones.
"""

from __future__ import annotations

import torch
from bsfa_kernels import TileStatistics, block_sparse_attention, tile_statistics

from . import effect
from .curves import ModuleCurves


class Collector:
    """A handler for `bsfa_kernels.integrations.transformers.attach`. Adds each sequence it sees to `curves`.

    `module` is the attention module and `block` what adds its output to the residual stream; entered, the collector
    looks at the stream that comes in. Without them the effect of a tile is its mass.
    """

    knows_scoring = True

    def __init__(
        self, curves: ModuleCurves, module: torch.nn.Module | None = None, block: torch.nn.Module | None = None
    ):
        self.curves, self._block, self._hook, self._stream = curves, block, None, None
        self._gram = None if module is None or block is None else effect.output_gram(module, curves.heads)

    def __enter__(self) -> Collector:
        if self._gram is not None:
            self._hook = self._block.register_forward_pre_hook(self._look, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _look(self, _, arguments, options) -> None:
        found = (x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor) and x.dim() == 3)
        hidden = next(found, None)  # [1, T, hidden]
        if hidden is not None:
            lengths = hidden[0].float().norm(dim=-1)[None, :, None]
            self._stream = effect.tile_means(lengths, self.curves.plan.tile.rows)[0, :, 0]

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
        dense = seen = block_sparse_attention(q, k, v, return_lse=True, sinks=sinks, **options)
        if self.curves.plan.scores != "exact":
            options |= dict(scores=self.curves.plan.scores)
            seen = block_sparse_attention(q, k, v, return_lse=True, sinks=sinks, **options)
            self.curves.add_error(seen, dense)
        query_tiles = -(-q.shape[2] // tile.rows)  # with spans the statistics may have one more, an empty one
        statistics = tile_statistics(q, k, seen.lse, **options)
        self.curves.add(TileStatistics(*(x[:, :, :query_tiles] for x in statistics)), self._weight(v, dense.out))
        return dense.out

    def _weight(self, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        if self._gram is None or self._stream is None:
            return None
        tile = self.curves.plan.tile
        value, mean = effect.tile_means(v[0], tile.keys), effect.tile_means(out[0], tile.rows)
        return effect.weights(self._gram, value, mean, self._stream)
