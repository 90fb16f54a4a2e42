"""One validated attention call, as every backend receives it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .blocks import BlockLists
from .gates import Gate
from .reference import Scoring, Span
from .tiles import TileShape, query_tile_count

SCORES = ("exact", "int8")
UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Request:
    """q [B, Hq, Tq, D]; k, v [B, Hkv, Tk, D]; `spans` int32 [B, 4] or None, where `q_offset` serves all sequences;
    `sinks` float32 [Hq]; `scores` one of SCORES, see quantise.py; `out` like q, with a contiguous last axis, where the
    caller has a place for the output.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gate: Gate
    scale: float
    causal: bool
    tile: TileShape
    keep_sink: bool
    q_offset: int
    spans: torch.Tensor | None
    want_lse: bool
    want_counts: bool
    blocks: BlockLists | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    scores: str = "exact"
    out: torch.Tensor | None = None

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.scale, self.causal, self.window, self.softcap)

    @property
    def query_tiles(self) -> int:
        return query_tiles(self.q.shape[2], self.q_offset, self.spans is not None, self.tile)

    @property
    def key_tiles(self) -> int:
        return -(-self.k.shape[2] // self.tile.keys)

    @property
    def shifted(self) -> bool:
        """Whether the call sees what is the same for a whole row of scores: softmax and the gap gate do not."""
        return self.want_lse or self.gate.absolute is not None or self.softcap is not None or self.sinks is not None

    def new_output(self) -> torch.Tensor:
        """An output [B, Hq, Tq, D] that lies in memory as [B, Tq, Hq, D]: the layer behind an attention reads it so."""
        batch, heads, rows, _ = self.q.shape
        return self.v.new_empty(batch, rows, heads, self.v.shape[3]).transpose(1, 2)

    def new_outputs(self):
        """(out, lse, kept, candidates) for a kernel to fill, `out` where the caller wants it. With spans some rows and
        tiles are padding that no program writes: they are zero from the start, and their lse is -inf.
        """
        batch, heads, rows, _ = self.q.shape
        out = self.new_output() if self.out is None else self.out
        new = self.q.new_empty if self.spans is None else self.q.new_zeros
        lse = self.q.new_empty((batch, heads, rows), dtype=torch.float32)
        if self.spans is not None:
            out.zero_()
            lse.fill_(-torch.inf)
        kept, candidates = (new((batch, heads, self.query_tiles), dtype=torch.int32) for _ in range(2))
        return out, lse, kept, candidates

    def host_spans(self) -> list[Span]:
        """The spans as Python numbers. Waits for the device when they live on one."""
        keys = self.k.shape[2]
        if self.spans is None:
            return [Span(self.q_offset, 0, keys, UNBOUNDED)] * self.q.shape[0]
        return [Span(q0, k0, min(n, k0 + keys), nq) for q0, k0, n, nq in self.spans.tolist()]


def query_tiles(q_rows: int, q_offset: int, spans: bool, tile: TileShape) -> int:
    """Query tiles in per-tile inputs and outputs. With spans, an upper bound: a sequence's first tile comes first."""
    return -(-q_rows // tile.rows) + 1 if spans else query_tile_count(q_offset, q_rows, tile)[1]


def make_spans(
    batch: int,
    q_offset: int | torch.Tensor = 0,
    k_offset: int | torch.Tensor = 0,
    lengths: int | torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Spans int32 [B, 4] for `block_sparse_attention`, one row (q_offset, k_offset, key length, query length) each.

    Query row i of a sequence stands at position q_offset + i, key row j at k_offset + j: a negative k_offset says how
    many leading rows are left padding, a positive one, with a window, how many keys a cache no longer holds. Sequences
    end at `lengths`: positions from there on are padding, and a query tile that ends there is whole. Without `lengths`
    keys end with their tensor, and sequences may go on.
    """

    def full(value):
        if not isinstance(value, torch.Tensor):  # no copy from the host: it would not go into a CUDA graph
            return torch.full((batch,), value, dtype=torch.int32, device=device)
        return value.to(device, torch.int32).expand(batch)

    limit = UNBOUNDED if lengths is None else lengths
    return torch.stack([full(q_offset), full(k_offset), full(limit), full(limit)], dim=1).contiguous()
