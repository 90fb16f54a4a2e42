"""The handler that runs an attention module at an operating point of a thresholds artifact."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..api import Attention, block_sparse_attention
from ..gates import Gate
from ..modality import IMAGE
from ..request import SCORES
from . import mixed
from .groups import Groups, attend
from .modules import AttentionModule
from .plan import no_kernel
from .visual_tokens import VisualTokens

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

    Thresholds by modality are chosen for every query tile by what `visual` knows of the pass that runs; `tower`: all
    tokens of this module are visual. Where it is not known, the lowest of a tile's thresholds are taken.
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
        visual: VisualTokens | None = None,
        tower: bool = False,
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
        self.visual, self._tower = visual, tower
        modal = thresholds.modal_values(path, point, min(flat, most))
        self._modal = None if modal is None else modal[:, heads].to(device, copy=True)
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
        shards, visual = shards or {}, VisualTokens() if thresholds.modal else None
        options |= dict(visual=visual)
        return {
            path: cls(
                thresholds,
                point,
                path,
                device=module.device,
                tower=module.tower,
                heads=shards.get(path, slice(None)),
                **options,
            )  # fmt: skip
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

    def modal_gate(self, sequence: int, batch: int, rows: int, positions: int, spans, device: torch.device) -> Gate:
        """The gate for one sequence of a call of [batch, rows] queries below `positions`: of every query tile, the
        thresholds of its modality.
        """
        gate, tile = self.gate(positions, device), self.thresholds.tile
        if self._modal is None:
            return gate
        if self._modal.device != device:
            self._modal = self._modal.to(device)
        tiles = -(-positions // tile.rows)
        if self._tower:
            modality = torch.full((tiles,), IMAGE, device=device)
        else:
            modality = self.visual and self.visual.tiles(sequence, batch, rows, tile.rows, tiles, spans, device)
        if modality is None:
            return gate
        columns = torch.arange(tiles, device=device).clamp(max=self._modal.shape[2] - 1)
        chosen = self._modal[modality, :, columns].T.contiguous()  # [Hq, tiles]
        return Gate(absolute=chosen) if gate.gap is None else Gate(gap=chosen)

    @property
    def counts(self) -> Counts | None:
        """Sums since `reset`, on the device; None without `count`."""
        return None if self._totals is None else Counts(*self._totals.view(2, -1).unbind())

    def reset(self) -> None:
        """Start counting anew, in place."""
        if self._totals is not None:
            self._totals.zero_()

    def attend(
        self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, groups: Groups | None = None,
        return_lse: bool = False, **options,
    ) -> Attention:  # fmt: skip
        """The module's attention, with what `options` of `block_sparse_attention` ask for on top of its output."""
        table, packed = options.get("block_table"), options.get("packed")
        if packed is not None:
            positions = packed.keys
        else:
            positions = max(q.shape[2] + options.get("q_offset", 0), k.shape[2] if table is None else 0)
        options |= dict(scale=scale, causal=causal, return_lse=return_lse)
        if self._modal is None or packed is not None:  # packed tokens are known by position alone
            return self.run(q, k, v, self.gate(positions, q.device), spans=spans, groups=groups, **options)
        # A gate is one for all sequences of a call, and each has images of its own.
        batch, parts, out = q.shape[0], [], options.get("out")
        for i in range(batch):
            gate = self.modal_gate(i, batch, q.shape[2], positions, spans, q.device)
            own = slice(i, i + 1)
            where = dict(spans=None if spans is None else spans[own], groups=None if groups is None else groups.of(i))
            keys = (k[own], v[own])
            if table is not None:  # pages are no sequence's own
                keys = (k, v)
                where |= dict(block_table=table[own])
            if out is not None:
                where |= dict(out=out[own])
            parts.append(self.run(q[own], *keys, gate, **options | where))
        if batch == 1:
            return parts[0]
        found = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
        return Attention(*found) if out is None else Attention(*found)._replace(out=out)

    def run(
        self, q, k, v, gate: Gate, *, scale: float, groups: Groups | None = None, return_lse: bool = False, **options
    ) -> Attention:
        """`block_sparse_attention` with this handler's tile and scores, and the gate given, of rows that may stand in
        groups.
        """
        scores = self.scores_of(q, v)
        options |= dict(
            scale=scale, tile=self.thresholds.tile, keep_sink=self.thresholds.keep_sink, backend=self.backend
        )

        def part(lse: bool) -> Attention:
            if scores == "int8" and self.exact_heads:
                return mixed.attention(q, k, v, gate, self.exact_heads, return_lse=lse, **options)
            return block_sparse_attention(q, k, v, gate, scores=scores, return_lse=lse, **options)

        return attend(part, q, k, v, groups, scale=scale, softcap=options.get("softcap"), want_lse=return_lse)

    def scores_of(self, q: torch.Tensor, v: torch.Tensor) -> str:
        """What a call with such Q and V runs: exact scores where a GPU has no kernel with others, see plan.py."""
        if self.scores == "exact" or not q.is_cuda or self.fused_tile is None:
            return self.scores
        return self.scores if no_kernel(q, v, self.fused_tile, self.scores) is None else "exact"

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
