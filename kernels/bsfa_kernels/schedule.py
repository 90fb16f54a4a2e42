"""Block lists made ready for a kernel: sets become streams of key tiles that a program walks from front to back.

A program of the hopper backend serves several query tiles from one stream, so their lists are merged, and each entry
says which of its query tiles want the key tile. Streams run from right to left; what a gap gate compares a tile with
depends on that order, so it is the same for every backend (reference.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .geometry import load_span, query_rows, visited
from .launch import Launches
from .request import Request

BLOCK = 256


class Schedule(NamedTuple):
    """Streams of `width` query tiles each: S = ceil(query tiles / width) per sequence and query head.

    An entry is key tile << 2 * width | forced << width | candidate, both with one bit per query tile of the stream.
    """

    entries: torch.Tensor  # int32 [B * Hq, S, room]
    lengths: torch.Tensor  # int32 [B * Hq, S]: valid leading entries
    candidates: torch.Tensor  # int32 [B, Hq, query tiles]: listed tiles that a gate may drop; see reference.py


class Plan(NamedTuple):
    """A launch but for addresses, which lists of the same shapes and options share."""

    key: tuple  # of the compiled kernel
    streams: tuple[int, int, int]  # B * Hq, S, room
    listed: tuple[int, int, int]  # B * Hq, query tiles, key tiles
    numbers: tuple  # the kernel's arguments behind its pointers

    def run(
        self, indices: torch.Tensor, counts: torch.Tensor, spans: torch.Tensor | None, counted: bool = True
    ) -> Schedule:
        """Of contiguous lists; what is not `counted` leaves anything in `candidates`."""
        new = indices.new_empty
        entries, lengths = new(self.streams), new(self.streams[:2])
        candidates = torch.zeros_like(counts) if counted else torch.empty_like(counts)
        listed = torch.zeros(self.listed, dtype=torch.int8, device=indices.device)
        pointers = (indices, counts, spans, listed, entries, lengths, candidates)
        launches.of(self.key, pointers)((*self.streams[:2], 1), *pointers, *self.numbers)
        return Schedule(entries, lengths, candidates)


def schedule(request: Request, width: int, forced: bool) -> Schedule:
    """`request.blocks` as streams, on its device and without waiting for it. With `forced`, streams hold the forced
    tiles too, each before the candidates of the query tile it belongs to; a query tile's diagonal is then one tile.
    """
    blocks = request.blocks
    return plan_of(request, width, forced).run(blocks.indices.contiguous(), blocks.counts.contiguous(), request.spans)


def plan_of(request: Request, width: int, forced: bool) -> Plan:
    batch, heads, tiles, capacity = request.blocks.indices.shape
    planes, keys, shape = batch * heads, request.key_tiles, request.tile
    # Forced tiles beside the listed ones: each query tile's diagonal, and the sink.
    room = max(min(width * capacity, keys) + (width + 1 if forced else 0), 1)
    windowed = request.window is not None
    constants = (heads, shape.rows, shape.keys, request.causal, request.keep_sink, windowed, width, forced, BLOCK)
    numbers = (
        request.q_offset, request.q.shape[2], request.k.shape[2], tiles, keys, capacity, room, request.window or 0
    )  # fmt: skip
    key = (constants, request.spans is None, request.blocks.indices.device)
    return Plan(key, (planes, -(-tiles // width), room), (planes, tiles, keys), (*numbers, *constants))


@triton.jit
def _query_tile(
    t, tiles, q_first, length, q_length, q_rows, window,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, KEEP_SINK: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Whether the t-th query tile computes anything, whether gates judge it, and what geometry.visited says of it."""
    query_tile, _, _, _, _, inhabited, whole = query_rows(t, q_first, length, q_length, q_rows, ROWS)
    first_diagonal, end_diagonal, sink, first_tile, end_tiles = visited(
        query_tile, length, window, ROWS, KEYS, CAUSAL, KEEP_SINK, WINDOWED
    )
    return inhabited & (t < tiles), whole, first_diagonal, end_diagonal, sink, first_tile, end_tiles


@triton.jit
def _mark(
    indices_ptr, counts_ptr, listed_ptr, key_tiles, capacity, first_diagonal, end_diagonal, first, end_tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the listed candidates of one query tile."""
    count = tl.minimum(tl.load(counts_ptr), capacity)
    for start in range(0, count, BLOCK):
        step = start + tl.arange(0, BLOCK)
        j = tl.load(indices_ptr + step, mask=step < count, other=-1)
        wanted = (j >= first) & (j < end_tiles) & ((j < first_diagonal) | (j >= end_diagonal))
        tl.store(listed_ptr + j, tl.full([BLOCK], 1, tl.int8), mask=wanted)


@triton.jit
def _append(entries_ptr, length, value, wanted):
    """Write one entry behind the first `length`, if it is wanted; returns the new length."""
    tl.store(entries_ptr + length, value, mask=wanted)
    return length + tl.where(wanted, 1, 0)


@triton.jit(do_not_specialize=["q_offset", "q_rows", "k_rows", "tiles", "key_tiles", "capacity", "room", "window"])
def _schedule(
    indices_ptr, counts_ptr, spans_ptr, listed_ptr, entries_ptr, lengths_ptr, candidates_ptr,
    q_offset, q_rows, k_rows, tiles, key_tiles, capacity, room, window,
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, KEEP_SINK: tl.constexpr,
    WINDOWED: tl.constexpr, WIDTH: tl.constexpr, FORCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane, stream = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_first, k_offset, length, q_length = load_span(spans_ptr, tl.program_id(0) // HEADS, q_offset, k_rows)
    first = stream * WIDTH
    own_row = plane * tiles + first
    listed_ptr += own_row * key_tiles
    most, least, top, any_sink = 0, key_tiles, 0, 0  # end and start of all diagonals, end of visible tiles
    for w in tl.static_range(WIDTH):
        alive, whole, first_diagonal, end_diagonal, sink, first_tile, end_tiles = _query_tile(
            first + w, tiles, q_first, length, q_length, q_rows, window, ROWS, KEYS, CAUSAL, KEEP_SINK, WINDOWED
        )
        if alive:
            _mark(
                indices_ptr + (own_row + w) * capacity, counts_ptr + own_row + w, listed_ptr + w * key_tiles,
                key_tiles, capacity, first_diagonal, end_diagonal, tl.maximum(sink, first_tile), end_tiles, BLOCK,
            )  # fmt: skip
            most, least = tl.maximum(most, end_diagonal), tl.minimum(least, first_diagonal)
            top, any_sink = tl.maximum(top, end_tiles), tl.maximum(any_sink, sink)
    tl.debug_barrier()  # marks of other threads are read below

    entries_ptr += (plane * tl.num_programs(1) + stream) * room
    count = 0
    if FORCED:
        # Not causal, every diagonal comes first; causal, the scan below meets a diagonal before its candidates.
        for i in range(0, 0 if CAUSAL else tl.maximum(most - least, 0)):
            bits = 0
            for w in tl.static_range(WIDTH):
                alive, whole, first_diagonal, end_diagonal, sink, first_tile, end_tiles = _query_tile(
                    first + w, tiles, q_first, length, q_length, q_rows, window, ROWS, KEYS, CAUSAL, KEEP_SINK, WINDOWED
                )
                bits |= tl.where(alive & (first_diagonal == most - 1 - i), 1 << w, 0)
            count = _append(entries_ptr, count, (most - 1 - i << 2 * WIDTH) | (bits << WIDTH), bits != 0)
        bits = 0
        for w in tl.static_range(WIDTH):
            alive, whole, first_diagonal, end_diagonal, sink, first_tile, end_tiles = _query_tile(
                first + w, tiles, q_first, length, q_length, q_rows, window, ROWS, KEYS, CAUSAL, KEEP_SINK, WINDOWED
            )
            bits |= tl.where(alive & ((sink == 1) | (CAUSAL & (first_diagonal == 0))), 1 << w, 0)
        count = _append(entries_ptr, count, bits << WIDTH, any_sink == 1)

    for start in range(0, top, BLOCK):
        j = top - 1 - start - tl.arange(0, BLOCK)
        wanting = tl.zeros([BLOCK], tl.int32)
        for w in tl.static_range(WIDTH):
            alive, whole, first_diagonal, end_diagonal, sink, first_tile, end_tiles = _query_tile(
                first + w, tiles, q_first, length, q_length, q_rows, window, ROWS, KEYS, CAUSAL, KEEP_SINK, WINDOWED
            )
            marked = tl.load(listed_ptr + w * key_tiles + j, mask=alive & (j >= 0), other=0).to(tl.int32)
            wanting |= marked << w
            if FORCED and CAUSAL:
                own = alive & (j == first_diagonal) & ((j > 0) | (any_sink == 0))
                wanting |= tl.where(own, 1 << WIDTH + w, 0)
            if alive & whole:
                tl.atomic_add(candidates_ptr + own_row + w, tl.sum(marked, 0), sem="relaxed")
        wanted = (wanting != 0).to(tl.int32)
        slot = count + tl.cumsum(wanted, 0) - wanted
        tl.store(entries_ptr + slot, (j << 2 * WIDTH) | wanting, mask=wanted == 1)
        count += tl.sum(wanted, 0)
    tl.store(lengths_ptr + plane * tl.num_programs(1) + stream, count)


launches = Launches(_schedule)
