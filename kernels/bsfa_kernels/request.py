"""One validated attention call, as every backend receives it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral

import torch

from .blocks import BlockLists
from .gates import Gate
from .pages import gather_pages
from .reference import Scoring, Span
from .tiles import TileShape, query_tile_count
from .words import short

SCORES = ("exact", "int8")
UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Request:
    """q [B, Hq, Tq, D]; k [B, Hkv, Tk, D]; v [B, Hkv, Tk, Dv], Dv <= D; `spans` int32 [B, 4] or None, where `q_offset`
    serves all sequences; `sinks` float32 [Hq]; `scores` one of SCORES, see quantise.py; `out` [B, Hq, Tq, Dv], with a
    contiguous last axis, where the caller has a place for the output. With `block_table` int32 [B, n], k and v are
    pages [pages, Hkv, page, D] and [pages, Hkv, page, Dv]. With
    `packed` int32 [B, 2] (first row, rows), q is [1, Hq, tokens, D] and no sequence has more than `packed_rows` of it.
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
    block_table: torch.Tensor | None = None
    packed: torch.Tensor | None = None
    packed_rows: int = 0

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.scale, self.causal, self.window, self.softcap)

    @property
    def rows(self) -> int:
        """Queries of the longest sequence, or more."""
        return self.q.shape[2] if self.packed is None else self.packed_rows

    @cached_property
    def query_tiles(self) -> int:
        return query_tiles(self.rows, self.q_offset, self.spans is not None, self.tile)

    @property
    def may_hold_tiles(self) -> bool:
        """Whether some query tile may be whole, for a gate to judge; without spans, whether one is."""
        least = self.tile.rows
        if self.spans is None:
            least += -self.q_offset % self.tile.rows
        return self.rows >= least

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.q.shape[0] if self.packed is None else self.packed.shape[0]

    @property
    def k_rows(self) -> int:
        """Keys of the longest sequence, or more. Of pages, none that all queries of a causal call stand before."""
        if self.block_table is None:
            return self.k.shape[2]
        rows = self.block_table.shape[1] * self.k.shape[2]
        return min(rows, self.q_offset + self.q.shape[2]) if self.causal and self.spans is None else rows

    @property
    def key_tiles(self) -> int:
        return -(-self.k_rows // self.tile.keys)

    @property
    def pages_are_tiles(self) -> bool:
        """Whether a kernel can read K and V where they are: a page is a key tile, and tensor descriptors reach it."""
        plain = self.scores == "exact" and self.blocks is None and self.k.shape[2] == self.tile.keys
        return plain and all(reached_by_descriptors(x) for x in (self.k, self.v))

    def gathered(self) -> Request:
        """The same call with K and V [B, Hkv, k_rows, D or Dv] out of their pages."""
        pairs = [gather_pages(self.k, self.v, row, self.k_rows) for row in self.block_table]
        k, v = (torch.cat(x) if len(x) > 1 else x[0] for x in zip(*pairs, strict=True))
        return replace(self, k=k, v=v, block_table=None)

    @property
    def shifted(self) -> bool:
        """Whether the call sees what is the same for a whole row of scores: softmax and the gap gate do not."""
        return self.want_lse or self.gate.absolute is not None or self.softcap is not None or self.sinks is not None

    def new_output(self) -> torch.Tensor:
        """An output [B, Hq, Tq, Dv], in memory [B, Tq, Hq, Dv]: the layer behind an attention reads it so."""
        batch, heads, rows, _ = self.q.shape
        return self.v.new_empty(batch, rows, heads, self.v.shape[3]).transpose(1, 2)

    def new_outputs(self):
        """(out, lse, kept, candidates) for a kernel to fill, `out` where the caller wants it. Of packed sequences the
        rows in none stay what they are in a given `out`.
        """
        out = self.new_output() if self.out is None else self.out
        lse = self.q.new_empty(self.q.shape[:3], dtype=torch.float32)
        shape = (self.batch, self.q.shape[1], self.query_tiles)
        kept, candidates = (self.q.new_empty(shape, dtype=torch.int32) for _ in range(2))
        if self.spans is not None:
            fill_padding(out if self.out is None or self.packed is None else None, lse, kept, candidates)
        return out, lse, kept, candidates

    def one_by_one(self) -> Iterator[tuple[slice, Request]]:
        """(rows of q, the call) of each packed sequence. Waits for the device."""
        for i, (first, rows) in enumerate(self.packed.tolist()):
            own, rows = slice(i, i + 1), slice(first, first + rows)
            out = None if self.out is None else self.out[:, :, rows]
            yield rows, replace(
                self, q=self.q[:, :, rows], out=out, spans=self.spans[own], block_table=self.block_table[own],
                packed=None, packed_rows=0,
            )  # fmt: skip

    def host_spans(self) -> list[Span]:
        """The spans as Python numbers; the length is 0 where no key is valid. Waits for the device when they live on
        one. Raises ValueError where a query sees positions before a positive k_offset.
        """
        keys = self.k_rows
        if self.spans is None:
            return [Span(self.q_offset, 0, keys, UNBOUNDED)] * self.q.shape[0]
        given = [Span(*numbers) for numbers in self.spans.tolist()]
        for span in given:
            self._refuse_missing_keys(span)
        return [
            span._replace(length=min(span.length, span.k_offset + keys) if span.k_offset < span.length else 0)
            for span in given
        ]

    def _refuse_missing_keys(self, span: Span) -> None:
        first = max(span.q_offset, 0)
        sees = 0 if self.window is None else max(first - self.window + 1, 0)
        if first < min(span.q_offset + self.rows, span.q_length) and sees < min(span.k_offset, span.length):
            raise ValueError(
                f"a query at position {first:,} sees keys from position {sees:,} on, but the first key stands at "
                f"k_offset {span.k_offset:,}: give a window that ends there, or count positions from the first key"
            )


def fill_padding(out, lse, kept, candidates) -> None:
    """Before a kernel fills them: with spans some rows and tiles are padding that no program writes."""
    for x, padding in ((out, 0), (lse, -torch.inf), (kept, 0), (candidates, 0)):
        if x is not None:
            x.fill_(padding)


def shares_memory(out: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether `out` lies in the storage of one of the others."""
    return out.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in others}


def written(out: torch.Tensor) -> None:
    """Tell autograd, as PyTorch's own operators do: it then refuses a backward pass that would read what was there."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def reached_by_descriptors(x: torch.Tensor) -> bool:
    """Whether the base, and the strides of axes longer than 1, keep the 16-byte rule of tensor descriptors."""
    strides = [n for n, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    return not (x.data_ptr() % 16 or any(n * x.element_size() % 16 for n in strides))


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
    many leading rows are left padding, a positive one, with a window, how many keys a cache no longer holds. No query
    may see a position before the first key: refused where a backend reads spans on the host, and not elsewhere.
    Sequences end at `lengths`: positions from there on are padding, and a query tile that ends there is whole. Without
    `lengths` keys end with their tensor, and sequences may go on.

    Raises TypeError for what are no whole numbers, ValueError for numbers that int32 does not hold; what tensors hold
    is not looked at.
    """

    def full(name, value):
        if isinstance(value, float) or (isinstance(value, torch.Tensor) and value.is_floating_point()):
            raise TypeError(f"{name} must be a whole number or a tensor of them, got {short(value)}")
        if not isinstance(value, torch.Tensor):  # no copy from the host: it would not go into a CUDA graph
            return torch.full((batch,), value, dtype=torch.int32, device=device)
        return value.to(device, torch.int32).expand(batch)

    limit = UNBOUNDED if lengths is None else lengths
    try:
        starts, offsets, ends = full("q_offset", q_offset), full("k_offset", k_offset), full("lengths", limit)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        _refuse_numbers(batch, q_offset=q_offset, k_offset=k_offset, lengths=limit)
        raise
    return torch.stack([starts, offsets, ends, ends], dim=1).contiguous()


def _refuse_numbers(batch, **columns) -> None:
    if not isinstance(batch, Integral) or batch < 0:
        raise TypeError(f"batch must be a number of sequences, got {short(batch)}") from None
    for name, value in columns.items():
        if isinstance(value, torch.Tensor):
            if not value.is_floating_point() and value.shape not in ((), (1,), (batch,)):
                raise ValueError(f"{name} must be one number or [{batch}], got {list(value.shape)}") from None
        elif isinstance(value, Integral):
            if not -UNBOUNDED <= value <= UNBOUNDED:
                raise ValueError(f"{name} must lie within {UNBOUNDED:,} of 0, got {short(value)}") from None
        elif not isinstance(value, float):
            raise TypeError(f"{name} must be a whole number or a tensor of them, got {short(value)}") from None
