"""The handler that runs an attention module at an operating point of a thresholds artifact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..api import Attention, block_sparse_attention
from ..gates import Gate
from .modules import AttentionModule

if TYPE_CHECKING:
    from ..thresholds import Thresholds


class Counts(NamedTuple):
    """Tiles a gate might have dropped, summed over calls and sequences, by query head."""

    kept: torch.Tensor  # int64 [Hq]
    candidates: torch.Tensor  # int64 [Hq]


class SparseAttention:
    """Attends with the thresholds of one module at one operating point; see `transformers.Handler`.

    The gate is interpolated again only when a longer sequence or another device comes. With `count`, `counts` sums
    kept and candidate tiles on the device, without waiting for it; None before the first call.
    """

    def __init__(
        self, thresholds: Thresholds, point: str | None, path: str, *, count: bool = False, backend: str = "auto"
    ):
        self.path = path
        self.counts: Counts | None = None
        self.thresholds, self.point, self.backend, self._count = thresholds, point, backend, count
        self._gate, self._gate_tiles, self._device = Gate(), 0, None

    @classmethod
    def for_model(
        cls, thresholds: Thresholds, modules: Mapping[str, AttentionModule], point: str | None = None, **options
    ) -> dict[str, SparseAttention]:
        """{module path: handler} for every module that `thresholds` holds. Raises ThresholdsError for an unknown
        point, module or number of heads.
        """
        thresholds.index(point)
        thresholds.check_model({}, {path: module.query_heads for path, module in modules.items()})
        return {path: cls(thresholds, point, path, **options) for path in modules if path in thresholds.tensors}

    def gate(self, positions: int, device: torch.device) -> Gate:
        """The gate for queries at absolute positions below `positions`."""
        tiles = -(-positions // self.thresholds.tile.rows)
        if tiles > self._gate_tiles or self._device != device:
            # Rounded up, so that a prompt that comes in chunks does not interpolate for each of them.
            tiles = max(64, 1 << (tiles - 1).bit_length())
            self._gate = self.thresholds.gate(self.path, self.point, tiles, device)
            self._gate_tiles, self._device = tiles, device
        return self._gate

    def attend(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, **options) -> Attention:
        """The module's attention, with what `options` of `block_sparse_attention` ask for on top of its output."""
        return block_sparse_attention(
            q, k, v, self.gate(max(q.shape[2], k.shape[2]), q.device), scale=scale, causal=causal, spans=spans,
            tile=self.thresholds.tile, keep_sink=self.thresholds.keep_sink, backend=self.backend, **options,
        )  # fmt: skip

    def __call__(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None) -> torch.Tensor:
        result = self.attend(q, k, v, scale=scale, causal=causal, spans=spans, return_counts=self._count)
        if self._count:
            kept, candidates = (x.sum((0, 2), dtype=torch.int64) for x in (result.kept, result.candidates))
            if self.counts is not None:
                kept, candidates = kept + self.counts.kept, candidates + self.counts.candidates
            self.counts = Counts(kept, candidates)
        return result.out
