"""The handler that runs an attention module at an operating point of a thresholds artifact."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..api import Attention, block_sparse_attention
from ..gates import Gate
from ..request import SCORES
from . import mixed
from .modules import AttentionModule
from .plan import no_kernel

if TYPE_CHECKING:
    from ..thresholds import Thresholds

MAX_TILES = 1 << 17  # of a gate without a stated length: 8 million positions of 64-row tiles


class Counts(NamedTuple):
    """Tiles a gate might have dropped, summed over calls and sequences, by query head."""

    kept: torch.Tensor  # int64 [Hq]
    candidates: torch.Tensor  # int64 [Hq]


class SparseAttention:
    """Attends with the thresholds of one module at one operating point; see `transformers.Handler`.

    Its buffers, a gate for every query tile up to `longest` positions and, with `count`, the counters, are made once
    and stay where they are until a call comes on another device: calls can be captured in a CUDA graph and replayed.
    Past the last knot thresholds no longer change, so that a gate rarely needs `longest` columns. `counts` sums kept
    and candidate tiles on the device, without waiting for it, over all threads and streams. `scores` override the
    point's own; those of a call are `scores_of`. `heads` are the module's query heads that calls bring, where a process
    computes only a run of them.
    """

    knows_scoring = True

    def __init__(
        self,
        thresholds: Thresholds,
        point: str | None,
        path: str,
        *,
        count: bool = False,
        scores: str | None = None,
        backend: str = "auto",
        longest: int | None = None,
        device: torch.device | str = "cpu",
        heads: slice = slice(None),
    ):
        tile = thresholds.tile
        self.path, self.point, self.thresholds, self.backend = path, point, thresholds, backend
        own = thresholds.points[thresholds.index(point)]
        if scores not in (None, *SCORES):
            raise ValueError(f"scores must be one of {', '.join(SCORES)}, got {scores!r}")
        self.scores = own.scores if scores is None else scores
        self.override = None  # a note, where the scores are not the point's own
        if self.scores != own.scores:
            self.override = f"{self.scores} scores, with thresholds for {own.scores} ones"
        here = range(thresholds.tensors[path].shape[1])[heads]
        exact = own.exact_heads.get(path, ()) if self.scores == own.scores else ()
        self.exact_heads = tuple(here.index(head) for head in exact if head in here)  # as calls count them
        self.least_rows, self.fused_tile = tile.rows, tile if backend == "auto" else None
        # The column behind whose centre no knot lies holds the value of all that follow.
        flat = max(0, -(-(thresholds.knots[-1] - tile.rows // 2) // tile.rows)) + 1
        most = MAX_TILES if longest is None else -(-longest // tile.rows)
        self.longest = None if flat <= most else most * tile.rows
        gate = thresholds.gate(path, point, min(flat, most))
        self._gate = gate.map(lambda values: values[heads].to(device, copy=True))
        self._totals = torch.zeros(2 * len(here), dtype=torch.int64, device=device) if count else None

    @classmethod
    def for_model(
        cls,
        thresholds: Thresholds,
        modules: Mapping[str, AttentionModule],
        point: str | None = None,
        shards: Mapping[str, slice] | None = None,
        **options,
    ) -> dict[str, SparseAttention]:
        """{module path: handler} for every module that `thresholds` holds, with its buffers on the module's device.
        `shards`: the query heads by module that this process computes (head_shards.py), None for all.

        Raises ThresholdsError for an unknown point, module or number of heads.
        """
        thresholds.index(point)
        thresholds.check_model({}, {path: module.query_heads for path, module in modules.items()})
        shards = shards or {}
        return {
            path: cls(thresholds, point, path, device=module.device, heads=shards.get(path, slice(None)), **options)
            for path, module in modules.items()
            if path in thresholds.tensors
        }

    def gate(self, positions: int, device: torch.device) -> Gate:
        """The gate for queries at absolute positions below `positions`. Raises ValueError where it has no column."""
        if self.longest is not None and positions > self.longest:
            raise ValueError(
                f"{self.path}: a sequence of {positions:,} positions is longer than the {self.longest:,} that its "
                "thresholds were laid out for; give apply() a larger longest="
            )
        thresholds = self._gate.gap if self._gate.absolute is None else self._gate.absolute
        if thresholds.device != device:
            self._gate = self._gate.to(device)
        return self._gate

    @property
    def counts(self) -> Counts | None:
        """Sums since `reset`, on the device; None without `count`."""
        return None if self._totals is None else Counts(*self._totals.view(2, -1).unbind())

    def reset(self) -> None:
        """Start counting anew, in place."""
        if self._totals is not None:
            self._totals.zero_()

    def attend(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, **options) -> Attention:
        """The module's attention, with what `options` of `block_sparse_attention` ask for on top of its output."""
        gate = self.gate(max(q.shape[2], k.shape[2]), q.device)
        return self.run(q, k, v, gate, scale=scale, causal=causal, spans=spans, **options)

    def run(self, q, k, v, gate: Gate, **options) -> Attention:
        """`block_sparse_attention` with this handler's tile and scores, and the gate given."""
        options |= dict(tile=self.thresholds.tile, keep_sink=self.thresholds.keep_sink, backend=self.backend)
        scores = self.scores_of(q)
        if scores == "int8" and self.exact_heads:
            return mixed.attention(q, k, v, gate, self.exact_heads, **options)
        return block_sparse_attention(q, k, v, gate, scores=scores, **options)

    def scores_of(self, q: torch.Tensor) -> str:
        """What a call with these queries runs: exact scores where a GPU has no kernel with others, see plan.py."""
        if self.scores == "exact" or not q.is_cuda or self.fused_tile is None:
            return self.scores
        return self.scores if no_kernel(q, self.fused_tile, self.scores) is None else "exact"

    def __call__(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, **scoring) -> torch.Tensor:
        counting = self._totals is not None
        result = self.attend(q, k, v, scale=scale, causal=causal, spans=spans, return_counts=counting, **scoring)
        if counting:
            if self._totals.device != q.device:
                self._totals = self._totals.to(q.device)
            torch.ops.bsfa.add_counts(self._totals, result.kept, result.candidates)
        return result.out


_COUNTING = threading.Lock()


@torch.library.custom_op("bsfa::add_counts", mutates_args=("totals",))
def _add_counts(totals: torch.Tensor, kept: torch.Tensor, candidates: torch.Tensor) -> None:
    """totals int64 [2 * Hq] += kept and candidates int32 [B, Hq, query tiles], summed.

    Streams and threads may do so at the same time: `index_add_` is atomic on a GPU, the lock makes it so on a CPU.
    """
    found = torch.cat([x.sum((0, 2), dtype=torch.int64) for x in (kept, candidates)])
    index = torch.arange(len(totals), device=totals.device)
    with _COUNTING:
        totals.index_add_(0, index, found)


@_add_counts.register_fake
def _(totals, kept, candidates):
    return None
