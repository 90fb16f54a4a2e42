"""What an attention module runs during calibration: dense attention, and the curves of its tiles on the side.

With int8 scores the curves are of those; the model goes on with exact ones.
"""

from __future__ import annotations

import torch
from bsfa_kernels import TileStatistics, tile_statistics
from bsfa_kernels.integrations.groups import exact_attention
from bsfa_kernels.integrations.visual_tokens import VisualTokens
from bsfa_kernels.modality import tile_modality

from ..errors import InputError
from . import effect
from .curves import ModuleCurves


class Collector:
    """A handler for `bsfa_kernels.integrations.transformers.attach`. Adds each sequence it sees to `curves`.

    `module` is the attention module and `block` what adds its output to the residual stream; entered, the collector
    looks at the stream that comes in. Without them the effect of a tile is its mass. `visual` says which tokens stand
    for images, where curves are by modality; in a `tower` all do.
    """

    knows_scoring = True

    def __init__(
        self, curves: ModuleCurves, module: torch.nn.Module | None = None, block: torch.nn.Module | None = None,
        visual: VisualTokens | None = None, tower: bool = False,
    ):  # fmt: skip
        self.curves, self._block, self._hook, self._stream = curves, block, None, None
        self.visual, self._tower = visual, tower
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
        self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, sinks=None, groups=None, **scoring
    ) -> torch.Tensor:
        """q [1, Hq, T, D], k and v [1, Hkv, T, D]: one whole sequence. Returns exact attention [1, Hq, T, D]. A vision
        tower's batch is as many sequences.

        Raises ValueError for any other batch and for a chunk of a sequence, InputError for a tower's sequence that is
        longer than what the curves were laid out for.
        """
        if (q.shape[0] != 1 and not self._tower) or q.shape[2] != k.shape[2]:
            raise ValueError(
                f"calibration takes one whole sequence at a time, got queries {list(q.shape)} and keys {list(k.shape)}"
            )
        if q.shape[2] > self.curves.plan.longest:
            raise InputError(
                f"an image has {q.shape[2]:,} patches, more than the {self.curves.plan.longest:,} tokens of the "
                "longest sample; raise --length"
            )
        tile = self.curves.plan.tile
        options = dict(scale=scale, causal=causal, spans=spans, tile=tile, **scoring)
        dense = seen = exact_attention(q, k, v, return_lse=True, sinks=sinks, groups=groups, **options)
        if self.curves.plan.scores != "exact":
            options |= dict(scores=self.curves.plan.scores)
            seen = exact_attention(q, k, v, return_lse=True, sinks=sinks, groups=groups, **options)
            self.curves.add_error(seen, dense)
        query_tiles = -(-q.shape[2] // tile.rows)  # with spans the statistics may have one more, an empty one
        statistics = tile_statistics(q, k, seen.lse, **options)
        weight, modality = self._weight(v, dense.out), self._modality(q, query_tiles, statistics.gap.shape[3])
        for i in range(len(q)):
            one = TileStatistics(*(x[i : i + 1, :, :query_tiles] for x in statistics))
            self.curves.add(one, weight, modality)
        return dense.out

    def _modality(self, q: torch.Tensor, query_tiles: int, key_tiles: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Modalities of the query and the key tiles. Raises InputError where they are not known and have to be."""
        plan = self.curves.plan
        if not plan.modal:
            return None
        if self._tower:
            visual = torch.ones(q.shape[2], dtype=torch.bool, device=q.device)
        else:
            rows = None if self.visual is None else self.visual.rows(1, q.shape[2])
            if rows is None:
                raise InputError("which tokens stand for images is not known in this model, so there are no modalities")
            visual = rows[0].to(q.device)
        return tile_modality(visual, plan.tile.rows, query_tiles), tile_modality(visual, plan.tile.keys, key_tiles)

    def _weight(self, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        if self._gram is None or self._stream is None:
            return None
        tile = self.curves.plan.tile
        value, mean = effect.tile_means(v[0], tile.keys), effect.tile_means(out[0], tile.rows)
        return effect.weights(self._gram, value, mean, self._stream)
