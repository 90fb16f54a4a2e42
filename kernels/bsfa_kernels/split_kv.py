"""The split_kv backend: calls of few queries on many keys, of which no gate judges a tile.

Decoding, drafts, ends of chunks. The other kernels give a program a query tile of one head: such a call would be 64
rows of work for each of a few programs, each of which reads all keys. Here a program's rows are pairs (query, head of a
KV group), so that a group reads its keys once, and its keys a part of the sequence's, so that all multiprocessors read;
a second kernel sums the parts by their log-sum-exp. Exact: nothing is dropped. Splits depend on the call's shape and on
the GPU, so bits are those of the call, not of its rows.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from .devices import TILE_ROWS, processors, tiles_at_once
from .launch import Launches, aligned, device_guard, int32, wide_products
from .portable import columns, unreachable
from .request import Request, reached_by_descriptors
from .split_kv_kernel import attend, combine

LEAST_KEYS, KEYS_OF_ROW = 1024, 16  # fewer, or fewer to a query than were measured, are left to the other kernels
SHARE = 0.5  # of the GPU that another kernel would have use for, up to which this one is faster (kernels/NOTES.md)
KEYS_OF_SPLIT = 256  # at least
MOST_SPLITS = 128
PROCESSORS = 132  # of a GPU that is none: Triton's interpreter
first, second = Launches(attend), Launches(combine)


class Shape(NamedTuple):
    """Of a program: pairs (query, head), keys of a tile, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int
    together: int  # programs that a multiprocessor is given


class Division(NamedTuple):
    """Of a call into programs."""

    row_blocks: int
    splits: int


def unsupported(request: Request) -> str | None:
    reason = unreachable(request)
    if reason is not None:
        return reason
    if request.blocks is not None:
        return "block lists say what is visited"
    if request.may_hold_tiles:
        if not (request.gate.absolute is None and request.gate.gap is None):
            return "its gate judges query tiles, each against what was kept of the keys before"
        if request.want_counts:
            return "tiles that a gate may drop are to be counted"
    return None


def suits(request: Request) -> bool:
    """Whether a call is of the kind that this backend is there for."""
    if request.k_rows < max(LEAST_KEYS, KEYS_OF_ROW * request.rows) or not request.q.is_cuda:
        return False
    tiles = request.batch * request.q.shape[1] * request.query_tiles
    busy = min(1.0, tiles / tiles_at_once(request.q.device))
    return busy * request.rows / (request.query_tiles * TILE_ROWS) < SHARE


def reads_pages(request: Request) -> bool:
    return all(reached_by_descriptors(x) for x in (request.k, request.v))


def attention(request: Request):
    q, k, v = aligned(request.q), aligned(request.k), aligned(request.v)
    heads, kv_heads, head_dim, v_head_dim = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    group, rows, table = heads // kv_heads, request.rows, request.block_table
    shape = shape_of(rows * group, q.dtype, head_dim, v_head_dim, wide_products(q.device))
    seen = request.k_rows if request.window is None else min(request.k_rows, request.window + rows)
    available = processors(q.device) if q.is_cuda else PROCESSORS
    blocks, splits = divide(rows * group, kv_heads * request.batch, seen, shape, available)
    out, lse, kept, candidates = request.new_outputs()
    if request.want_counts:  # of no whole query tile
        kept.zero_(), candidates.zero_()
    written = aligned(out)
    partial = partial_lse = None
    if splits > 1:
        sums = request.batch * heads * rows * splits
        partial = q.new_empty(sums, v_head_dim, dtype=torch.float32)
        partial_lse = q.new_empty(sums, dtype=torch.float32)
    chunk = 16 // q.element_size()
    strides = [stride // chunk for x in (q, k, v) for stride in x.stride()[:3]]
    out_strides = [stride // chunk for stride in written.stride()[:3]]
    table_row = 0 if table is None else table.stride(0)
    v_wide = columns(v_head_dim, v.dtype)
    constants = (
        kv_heads, group, head_dim, v_head_dim, columns(head_dim, q.dtype), v_wide, shape.rows, shape.keys,
        0 if table is None else k.shape[2], request.causal, request.window is not None, request.softcap is not None,
        shape.stages,
    )  # fmt: skip
    optional = (partial, partial_lse, request.spans, table, request.packed, request.sinks)
    kinds = (q.dtype, q.device, *(x is None for x in optional))
    keyed = int32((*strides, *out_strides, table_row))
    with device_guard(q):
        launch = first.of((constants, kinds, shape.warps) if keyed else None, (q, k, v, written, lse, *optional))
        launch(
            (blocks * kv_heads * request.batch, splits, 1),
            q, k, v, written, lse, *optional,
            request.scale, request.softcap or 0.0, request.window or 0, request.q_offset, q.shape[2], rows,
            request.k_rows, blocks, splits, *strides, *out_strides, table_row, *constants, num_warps=shape.warps,
        )  # fmt: skip
        if splits > 1:
            constants = (heads, v_head_dim, v_wide, MOST_SPLITS, 8 if splits <= 8 else 32)
            optional = (request.spans, request.packed, request.sinks)
            launch = second.of((constants, kinds) if keyed else None, (partial, partial_lse, written, lse, *optional))
            launch(
                (request.batch * heads * rows, 1, 1),
                partial, partial_lse, written, lse, *optional, request.q_offset, q.shape[2], rows, request.k_rows,
                splits, *out_strides, *constants, num_warps=4,
            )  # fmt: skip
    if written.data_ptr() != out.data_ptr():
        out.copy_(written)
    return out, lse, kept, candidates


@cache
def shape_of(pairs: int, dtype: torch.dtype, head_dim: int, v_head_dim: int, wide: bool) -> Shape:
    """For `pairs` rows of a KV head. `wide`: products take operands from shared memory."""
    if dtype == torch.float32:  # three tf32 products for one take registers
        return Shape(16, 32, 4, 2, 1)
    if max(head_dim, v_head_dim) > 128:
        return Shape(16 if pairs <= 16 else 64, 32, 4, 2, 1)
    if pairs <= 64:
        return Shape(64 if wide or pairs > 16 else 16, 64, 4, 3, 1)
    return Shape(128, 64, 8, 3 if wide else 2, 1)


def divide(pairs: int, planes: int, keys: int, shape: Shape, processors: int) -> Division:
    """Of `pairs` rows of each of `planes` KV heads, `keys` keys each: as many splits as fill the GPU, as few as do so
    to nearly the same degree (FlashAttention's heuristic).
    """
    blocks = -(-pairs // shape.rows)
    most = max(1, min(MOST_SPLITS, keys // KEYS_OF_SPLIT))
    return Division(blocks, fewest_splits(blocks * planes, most, processors * shape.together))


@cache
def fewest_splits(programs: int, most: int, at_once: int) -> int:
    def filled(splits: int) -> float:
        waves = programs * splits / at_once
        return waves / -(-programs * splits // at_once)

    best = max(filled(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if filled(splits) >= 0.85 * best)
