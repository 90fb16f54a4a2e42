"""The Triton kernel behind tile_statistics(): every tile's scores, streamed once, leave four numbers a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .geometry import candidate, load_span, query_rows, visited
from .portable import (
    LOG2E,
    cap_scores,
    columns,
    device_guard,
    larger,
    largest,
    load_rows,
    mask_tile,
    operands,
    tile_scores,
    unsupported,
)
from .request import SCORES, Request

__all__ = ["SCORES", "tile_statistics", "unsupported"]


def tile_statistics(request: Request, lse: torch.Tensor):
    """(maximum, gap, mass_mean, mass_worst), each float32 [B, Hq, query tiles, key tiles]; see api.TileStatistics."""
    q, k, q_scale, k_scale, q_shift = operands(request)
    batch, heads, q_rows, head_dim = request.q.shape
    rows, keys = request.tile.rows, request.tile.keys
    shape = (batch, heads, request.query_tiles, request.key_tiles)
    maximum, gap = (torch.full(shape, -torch.inf, device=q.device) for _ in range(2))
    mass_mean, mass_worst = (torch.zeros(shape, device=q.device) for _ in range(2))
    block_d = columns(head_dim, q.dtype)
    stages = 3 if q.element_size() * block_d <= 256 else 1
    with device_guard(q):
        _statistics[(batch * heads, request.query_tiles)](
            TensorDescriptor.from_tensor(q, [1, 1, rows, block_d]),
            TensorDescriptor.from_tensor(k, [1, 1, keys, block_d]),
            lse.contiguous(), maximum, gap, mass_mean, mass_worst, request.spans, q_scale, k_scale, q_shift,
            request.scale, request.softcap or 0.0, request.window or 0, request.q_offset, q_rows, k.shape[2],
            request.query_tiles, request.key_tiles, 0 if k_scale is None else k_scale.shape[2],
            HEADS=heads, GROUP=heads // k.shape[1], BLOCK_D=block_d, ROWS=rows, KEYS=keys,
            CAUSAL=request.causal, KEEP_SINK=request.keep_sink, WINDOWED=request.window is not None,
            CAPPED=request.softcap is not None, num_warps=8 if rows >= 128 else 4, num_stages=stages,
        )  # fmt: skip
    return maximum, gap, mass_mean, mass_worst


@triton.jit
def _visit(
    q, q_scale, q_shift, k_desc, k_scale_ptr, b, kv_head, j, k_offset, length, q_position, valid, whole, row_count,
    lse_log2, running_max, scale, softcap, window, maximum_ptr, gap_ptr, mass_mean_ptr, mass_worst_ptr,
    FORCED: tl.constexpr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Write one tile's four numbers; returns the running maximum in log2 units."""
    s = tile_scores(q, q_scale, q_shift, k_desc, k_scale_ptr, b, kv_head, j, k_offset, BLOCK_D, KEYS, WINDOWED)
    if MASKED:
        s = mask_tile(s, q_position, j * KEYS, length, window, KEYS, CAUSAL, WINDOWED)
    unit = scale
    if CAPPED:
        s = cap_scores(s, scale, softcap)
        unit = 1.0
    scale_log2 = unit * LOG2E
    row_max = largest(s, 1) * scale_log2
    vote = tl.where(valid, row_max, float("-inf"))
    mass = tl.sum(tl.exp2(s * scale_log2 - lse_log2[:, None]), 1)
    tl.store(maximum_ptr + j, largest(vote, 0) / LOG2E)
    if FORCED:
        tl.store(gap_ptr + j, float("inf"))
    else:
        tl.store(gap_ptr + j, tl.where(whole, largest(vote - running_max, 0) / LOG2E, float("inf")))
    tl.store(mass_mean_ptr + j, tl.sum(mass, 0) / row_count)
    tl.store(mass_worst_ptr + j, tl.max(mass, 0))
    return larger(running_max, row_max)


@triton.jit(do_not_specialize=["q_offset", "q_rows", "k_rows", "tiles", "key_tiles", "k_scales", "window"])
def _statistics(
    q_desc, k_desc, lse_ptr, maximum_ptr, gap_ptr, mass_mean_ptr, mass_worst_ptr, spans_ptr,
    q_scale_ptr, k_scale_ptr, q_shift_ptr,
    scale, softcap, window, q_offset, q_rows, k_rows, tiles, key_tiles, k_scales,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, KEEP_SINK: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    kv_head = head // GROUP
    t = tl.num_programs(1) - 1 - tl.program_id(1)  # longest first
    q_first, k_offset, length, q_length = load_span(spans_ptr, b, q_offset, k_rows)
    query_tile, first_row, rows, q_position, valid, inhabited, whole = query_rows(
        t, q_first, length, q_length, q_rows, ROWS
    )
    if not inhabited:
        return

    row_count = tl.sum(valid.to(tl.float32), 0)
    plane = tl.program_id(0).to(tl.int64)
    # +inf leaves padding rows without mass
    lse_log2 = tl.load(lse_ptr + plane * q_rows + rows, mask=valid, other=float("inf")) * LOG2E
    q = q_desc.load([b, head, first_row, 0]).reshape([ROWS, BLOCK_D])
    q_scale, q_shift = None, None  # not from functions: in Triton 3.6 none of those can return None
    if q_scale_ptr is not None:
        q_scale = load_rows(q_scale_ptr, plane, q_rows, rows, valid)
        k_scale_ptr += plane // GROUP * k_scales
    if q_shift_ptr is not None:
        q_shift = load_rows(q_shift_ptr, plane, q_rows, rows, valid)
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    first_tile = (plane * tiles + t) * key_tiles
    maximum_ptr += first_tile
    gap_ptr += first_tile
    mass_mean_ptr += first_tile
    mass_worst_ptr += first_tile

    first_diagonal, end_diagonal, sink, first_tile, end_tiles = visited(
        query_tile, length, window, ROWS, KEYS, CAUSAL, KEEP_SINK, WINDOWED
    )
    diagonals = end_diagonal - first_diagonal
    for i in range(0, diagonals + sink):
        j = tl.where(i < diagonals, first_diagonal + i, 0)
        running_max = _visit(
            q, q_scale, q_shift, k_desc, k_scale_ptr, b, kv_head, j, k_offset, length, q_position, valid, whole,
            row_count, lse_log2, running_max, scale, softcap, window, maximum_ptr, gap_ptr, mass_mean_ptr,
            mass_worst_ptr, True, True, BLOCK_D, KEYS, CAUSAL, WINDOWED, CAPPED,
        )  # fmt: skip
    for i in tl.range(0, end_tiles - first_tile - diagonals - sink):
        j = candidate(i, end_tiles, first_diagonal, end_diagonal)
        running_max = _visit(
            q, q_scale, q_shift, k_desc, k_scale_ptr, b, kv_head, j, k_offset, length, q_position, valid, whole,
            row_count, lse_log2, running_max, scale, softcap, window, maximum_ptr, gap_ptr, mass_mean_ptr,
            mass_worst_ptr, False, WINDOWED or not CAUSAL, BLOCK_D, KEYS, CAUSAL and WINDOWED, WINDOWED, CAPPED,
        )  # fmt: skip
