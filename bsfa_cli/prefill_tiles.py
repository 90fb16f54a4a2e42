"""How many tiles a whole model has to skip, whichever of its attention modules have thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from bsfa_kernels.integrations.transformers import Handler, SparseAttention, attention_modules
from bsfa_kernels.tiles import tile_counts


class PrefillTiles:
    """Counts, while it is entered, the tiles of every attention module that attends in a prefill of `model`.

        with attach(model, handlers), PrefillTiles(model, handlers) as every:
            model(tokens)
        every.total      # what handlers dropped is a share of this

    Those are tiles that a gate might drop, by the number of queries and in the shape that the thresholds of `handlers`
    have; without a SparseAttention among them nothing is counted. A sliding window counts like full attention.
    """

    def __init__(self, model: torch.nn.Module, handlers: Mapping[str, Handler]):
        self.tiles: dict[str, int] = {}  # by module path
        self._model, self._hooks = model, []
        sparse = [handler for handler in handlers.values() if isinstance(handler, SparseAttention)]
        self._thresholds = sparse[0].thresholds if sparse else None

    @property
    def total(self) -> int:
        return sum(self.tiles.values())

    def __enter__(self) -> PrefillTiles:
        for path, module in attention_modules(self._model).items() if self._thresholds else ():
            target = self._model.get_submodule(path)
            self._hooks.append(target.register_forward_pre_hook(self._counting(path, module), with_kwargs=True))
        return self

    def __exit__(self, *_) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _counting(self, path, module):
        @cache
        def candidates(length: int) -> int:
            thresholds = self._thresholds
            visible, forced = tile_counts(length, module.causal, thresholds.keep_sink, thresholds.tile)
            return module.query_heads * (visible - forced)

        def count(_, arguments, options) -> None:
            tensors = (x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor) and x.dim() == 3)
            hidden = next(tensors, None)  # [batch, queries, width]
            if hidden is not None and hidden.shape[1] > 1:
                self.tiles[path] = self.tiles.get(path, 0) + hidden.shape[0] * candidates(hidden.shape[1])

        return count
