"""What a program of the Hopper kernel works on, and in which order: its place, its stream of key tiles, positions.

The stream of a program with consumers 0, 1, 2, causal, with the sink S, from left to right:

    position    0    1    2    3    4    5   ...
    key tile    S    9    8    7    6    5   ...       S is tile 0; the newest follows, then right to left
    consumer 2  F    D    c    c    c    c             F, D: kept whatever the gates say; D is the diagonal tile
    consumer 1  F    -    D    c    c    c             -: behind the consumer's rows, masked as a whole
    consumer 0  F    -    D    c    c    c             c: candidates, which the gates decide about

Not causal: the diagonal tiles of all consumers, then S, then everything else right to left, where a consumer's own
diagonal tile comes by again and is let pass. With a window the stream ends with the first tile that any row sees. With
block lists (schedule.py) an entry says who wants the tile and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .request import UNBOUNDED

ROWS = gl.constexpr(64)
KEYS = gl.constexpr(128)
UNBOUNDED_POSITION = gl.constexpr(UNBOUNDED)


@dataclass(frozen=True)
class Variant:
    """What a program is compiled for."""

    section: int  # query heads that run at one time
    heads: int
    group: int  # query heads of a KV head
    head_dim: int  # of V and the output
    columns: int  # of a slab of Q or K
    slabs: int  # of a tile of Q or K
    v_columns: int  # of a slab of V, and of the output
    v_slabs: int
    parts: int  # of a tile's keys, each of whose products starts before the next one's exponentials
    v_parts: int  # of a tile's keys, each of which has a slot of its own for V
    consumers: int
    k_stages: int  # slots in flight: of K a slab each, of V all slabs of a part
    v_stages: int
    early: bool  # with gates too
    causal: bool
    keep_sink: bool
    absolute: bool
    gap: bool
    spans: bool
    lists: bool
    windowed: bool
    capped: bool
    sinks: bool
    int8: bool  # Q and K
    shifted: bool  # int8 scores lack a number that is the same for a whole row, and it is seen
    paged: bool  # K and V are pages of a cache, each a key tile
    packed: bool  # queries of several sequences side by side

    @property
    def awaits_early(self) -> bool:
        """Whether V of a tile and K of the next one are awaited while the tile's QK^T runs. K's slots must hold two
        tiles, or the next one may lack a slot of this one, for ever; V's, or it comes late where it goes back late.
        """
        wanted = self.early or not (self.absolute or self.gap)
        return wanted and not self.lists and self.k_stages >= 2 * self.slabs and self.v_stages >= 2 * self.v_parts

    @property
    def returns_v_late(self) -> bool:
        """Whether V goes back while the next tile's QK^T runs."""
        return self.awaits_early and not (self.absolute or self.gap)

    @property
    def width(self) -> int:
        """Columns of the output that fit a slab of Q."""
        return min(self.v_columns, self.columns // 2 if self.int8 else self.columns)


class Call(NamedTuple):
    """Pointers and numbers of a launch."""

    out: object  # [B, Hq, Tq, D], by its strides
    lse: object  # float32 [B, Hq, Tq]
    kept: object  # int32 [B, Hq, query tiles]
    candidates: object
    absolute: object  # float32 [Hq, absolute_tiles]
    gap: object
    packed: object  # int32 [sequences, 2]: first row of its queries and their number
    sinks: object  # float32 [Hq]
    q_scale: object  # float32 [B, Hq, Tq]
    q_shift: object
    k_scale: object  # float32 [B, Hkv, k_scales]
    scale: object
    softcap: object
    window: object
    q_rows: object  # of the tensor
    tiles: object
    absolute_tiles: object
    gap_tiles: object
    k_scales: object
    out_batch: object  # strides of the output, in chunks of 8 elements
    out_head: object
    out_row: object


class Span(NamedTuple):
    """Positions of a sequence; see reference.Span."""

    q_first: object
    k_offset: object
    length: object
    q_length: object
    q_rows: object  # of the sequence


class Stream(NamedTuple):
    """Key tiles that a program's consumers share."""

    entries: object  # int32, where there are block lists
    pages: object  # int32 [key tiles], where K and V are paged
    length: object
    diagonals: object  # not causal: tiles in front that some consumer has its diagonal in
    sink: object  # 1 where it has a place of its own
    end_diagonal: object
    end_tiles: object


class Place(NamedTuple):
    """A program's place in the call."""

    batch: object  # of Q
    head: object
    kv_head: object
    plane: object  # sequence and head in one
    tile: object  # in the call's arrays of query tiles
    first: object  # the same query tile, counted from the sequence's position 0
    row: object  # of Q that the sequence begins with


class Positions(NamedTuple):
    """Where a consumer's tiles are in the stream; `own` and `own_first` are key tiles, the others positions."""

    own: object  # its diagonal tile
    own_first: object  # the first tile in its window
    own_at: object
    sink_at: object
    first_candidate: object
    end_candidate: object
    again: object  # not causal: its diagonal tile comes by a second time
    edge_at: object  # from here on tiles reach over the window's left edge


@gluon.jit
def stream_tile(i, stream, VARIANT: gl.constexpr):
    """Key tile at position i of a program's stream."""
    if VARIANT.causal:
        return gl.where((i == 0) & (stream.sink == 1), 0, stream.end_tiles - 1 - i + stream.sink)
    else:
        rest = i - stream.diagonals - stream.sink
        return gl.where(
            i < stream.diagonals, stream.end_diagonal - 1 - i, gl.where(rest < 0, 0, stream.end_tiles - 1 - rest)
        )


@gluon.jit
def entry_after(entries_ptr, i, length):
    """The entry behind the i-th, if there is one: read one ahead, so that nothing waits for its own."""
    return gl.load(entries_ptr + gl.minimum(i + 1, length - 1))


@gluon.jit
def held_whole(query_tile, span, q_rows):
    """Whether gates judge the query tile; see reference.Span.whole."""
    first = query_tile * ROWS
    end = gl.minimum(first + ROWS, span.q_length)
    return (q_rows >= ROWS) & (span.q_first <= first) & (end <= span.q_first + q_rows)


@gluon.jit
def find_positions(query_tile, alive, call, span, stream, VARIANT: gl.constexpr):
    own = gl.minimum(query_tile * ROWS // KEYS, (span.length - 1) // KEYS)
    own_first = own * 0
    end_candidate = stream.length
    edge_at = stream.length
    if VARIANT.windowed:
        own_first = gl.minimum(gl.maximum(query_tile * ROWS - call.window + 1, 0) // KEYS, own)
        end_candidate = stream.end_tiles - own_first + stream.sink
        last_edge = gl.maximum((query_tile + 1) * ROWS - 1 - call.window, 0) // KEYS
        edge_at = stream.end_tiles - 1 + stream.sink - last_edge
    if VARIANT.causal:
        own_at = stream.end_tiles - 1 - own + stream.sink
        sink_at = stream.sink - 1
        if VARIANT.windowed:
            sink_at = gl.where(own_first == 0, sink_at, -1)
        first_candidate = own_at + 1
        again = own * 0 - 1
        if (stream.sink == 1) & (own == 0):
            own_at = own * 0
            first_candidate = stream.length
    else:
        own_at = stream.end_diagonal - 1 - own
        sink_at = gl.where((stream.sink == 1) & (own > 0), stream.diagonals, -1)
        first_candidate = stream.diagonals + stream.sink
        again = stream.diagonals + stream.sink + stream.end_tiles - 1 - own
    if not alive:
        own_at = own * 0 - 1
        sink_at = own * 0 - 1
        first_candidate = stream.length
    return Positions(own, own_first, own_at, sink_at, first_candidate, end_candidate, again, edge_at)


@gluon.jit
def find_work(
    spans_ptr, entries_ptr, lengths_ptr, order_ptr, table_ptr, packed_ptr, window, q_offset, q_rows, k_rows, room,
    table_row, VARIANT: gl.constexpr,
):  # fmt: skip
    """(Place, Span, Stream) of this program."""
    CONSUMERS: gl.constexpr = VARIANT.consumers
    # Of every section, longest first.
    blocks = gl.num_programs(1)
    plane = gl.program_id(2) * VARIANT.section
    if VARIANT.lists:
        listed = (gl.program_id(2) * blocks + gl.program_id(1)) * VARIANT.section + gl.program_id(0)
        work = gl.load(order_ptr + listed).to(gl.int32)  # in its section
        plane += work // blocks
        block = work % blocks
        stream_row = plane * blocks + block
        entries_ptr += stream_row.to(gl.int64) * room
    else:
        plane += gl.program_id(0)
        block = blocks - 1 - gl.program_id(1)
    tile = block * CONSUMERS
    batch = plane // VARIANT.heads
    head = plane % VARIANT.heads
    if VARIANT.spans:
        q_first = gl.load(spans_ptr + batch * 4)
        k_offset = gl.load(spans_ptr + batch * 4 + 1)
        length = gl.minimum(gl.load(spans_ptr + batch * 4 + 2), k_offset + k_rows)
        q_length = gl.load(spans_ptr + batch * 4 + 3)
    else:
        q_first = q_offset
        k_offset = gl.to_tensor(0)
        length = k_rows
        q_length = gl.to_tensor(UNBOUNDED_POSITION)
    row = gl.to_tensor(0)
    if VARIANT.packed:
        row = gl.load(packed_ptr + batch * 2)
        q_rows = gl.load(packed_ptr + batch * 2 + 1)
    span = Span(q_first, k_offset, length, q_length, q_rows)
    first = gl.maximum(q_first, 0) // ROWS + tile
    end_row = gl.minimum(q_length, q_first + q_rows)
    last = (length - 1) // KEYS
    first_diagonal = gl.minimum(first * ROWS // KEYS, last)
    end_diagonal = gl.minimum((gl.minimum((first + CONSUMERS) * ROWS, end_row) - 1) // KEYS, last) + 1
    end_tiles = end_diagonal
    diagonals = gl.to_tensor(0)
    if not VARIANT.causal:
        end_tiles = last + 1
        diagonals = end_diagonal - first_diagonal
    first_tile = gl.to_tensor(0)
    if VARIANT.windowed:
        first_tile = gl.minimum(gl.maximum(first * ROWS - window + 1, 0) // KEYS, first_diagonal)
    sink = gl.to_tensor(0)
    if VARIANT.keep_sink:
        sink = gl.where((end_tiles > 1) & (first_tile == 0), 1, 0)
    in_stream = end_tiles - first_tile + diagonals
    if (length <= 0) | (gl.maximum(first * ROWS, q_first) >= end_row):
        in_stream = gl.to_tensor(0)
    elif VARIANT.lists:
        in_stream = gl.load(lengths_ptr + stream_row)
    pages_ptr = table_ptr
    if VARIANT.paged:
        pages_ptr += batch.to(gl.int64) * table_row
    if VARIANT.packed:
        batch = batch * 0
    place = Place(batch, head, head // VARIANT.group, plane, tile, first, row)
    return place, span, Stream(entries_ptr, pages_ptr, in_stream, diagonals, sink, end_diagonal, end_tiles)
