"""dropping.py as two Triton kernels: the first streams keys and values, the second sums tiles by threshold.

What dropping one key tile moves a row's output by, along its gradient, and the mass that the row loses stand between
the two, of as many rows at once as fit SCRATCH. Both products of a tile, Q K^T and G V^T, are of the inputs as they are
with float32 sums, so float16 and bfloat16 lose nothing on tensor cores; all behind them is float32. Whether a threshold
drops a tile is 0 or 1: the sums over dropped tiles, for many thresholds at once, are a third product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import dropping
from .geometry import query_rows, visited
from .launch import FLOAT32_DOT, aligned, device_guard, wide_products
from .portable import LOG2E, cap_scores, columns, mask_tile
from .portable import unsupported as unsupported
from .request import Request

SCRATCH = 256 << 20  # bytes
ENTRIES, TILES = 64, 32  # thresholds, and key tiles, of one product of the second kernel
LEAST_LEFT = tl.constexpr(dropping.LEAST_LEFT)


def costs(request: Request, out, gradient, lse, cells, entries, unit: int) -> list[torch.Tensor]:
    """See dropping.costs."""
    q, k, v, out, gradient = (aligned(x) for x in (request.q, request.k, request.v, out, gradient))
    batch, heads, length, head_dim = q.shape
    rows, keys = request.tile.rows, request.tile.keys
    tiles, key_tiles = -(-length // rows), -(-length // keys)
    found = [q.new_empty(batch, heads, tiles, count, dtype=torch.int64) for count in entries]
    together, launch = launch_shape(q.dtype, head_dim, rows, wide_products(q.device))
    blocks = -(-tiles // together)
    total, block = batch * heads * blocks, together * rows
    at_once = min(total, max(1, SCRATCH // (2 * 4 * block * key_tiles)))
    moved, mass = (q.new_empty(at_once, key_tiles, block, dtype=torch.float32) for _ in range(2))
    block_d = columns(head_dim, q.dtype)
    of_rows, of_keys = [1, 1, block, block_d], [1, 1, keys, block_d]
    geometry = dict(KEYS=keys, CAUSAL=request.causal, WINDOWED=request.window is not None)
    lse, window, cells = lse.contiguous(), request.window or 0, [cell.contiguous() for cell in cells]
    with device_guard(q):
        for first in range(0, total, at_once):
            count = min(at_once, total - first)
            _shares[(count,)](
                *(TensorDescriptor.from_tensor(x, of_rows) for x in (q, gradient, out)),
                *(TensorDescriptor.from_tensor(x, of_keys) for x in (k, v)),
                lse, moved, mass, request.scale, request.softcap or 0.0, window, first, length, blocks, key_tiles,
                HEADS=heads, GROUP=heads // k.shape[1], BLOCK_D=block_d, ROWS=block,
                CAPPED=request.softcap is not None, **geometry, **launch,
            )  # fmt: skip
            for cell, each, costs in zip(cells, entries, found, strict=True):
                _costs[(count * together, triton.cdiv(each, ENTRIES))](
                    moved, mass, cell, costs, dropping.MOST, float(unit), window, first, length, blocks,
                    tiles, key_tiles, each, ROWS=rows, TOGETHER=together, ENTRIES=ENTRIES, TILES=TILES, **geometry,
                    num_warps=8 if rows >= 128 else 4,
                )  # fmt: skip
    return found


def launch_shape(dtype: torch.dtype, head_dim: int, rows: int, wide: bool) -> tuple[int, dict]:
    """Query tiles of one program of the first kernel, its warps and pipeline stages.

    A key tile that serves 128 rows asks half as much of the L2 cache as one that serves 64, which is what a program of
    64 rows would wait for.
    """
    narrow = dtype != torch.float32 and head_dim <= 128
    if narrow and wide:
        return max(1, 128 // rows), dict(num_warps=8, num_stages=2)
    return 1, dict(num_warps=4 if narrow and rows < 128 else 8, num_stages=2 if narrow else 1)


@triton.jit
def _visit(
    q, gradient, reach, k_desc, v_desc, b, kv_head, j, length, position, lse_log2, scale, softcap, window, moved_ptr,
    mass_ptr, MASKED: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Store one tile's two numbers a row. `reach` [ROWS]: gradient times output."""
    k = k_desc.load([b, kv_head, j * KEYS, 0]).reshape([KEYS, BLOCK_D])
    v = v_desc.load([b, kv_head, j * KEYS, 0]).reshape([KEYS, BLOCK_D])
    s = tl.dot(q, k.T, input_precision=FLOAT32_DOT)
    along = tl.dot(gradient, v.T, input_precision=FLOAT32_DOT)
    if MASKED:
        s = mask_tile(s, position, j * KEYS, length, window, KEYS, CAUSAL, WINDOWED)
    unit = scale
    if CAPPED:
        s = cap_scores(s, scale, softcap)
        unit = 1.0
    p = tl.exp2(s * (unit * LOG2E) - lse_log2[:, None])
    at = j * ROWS + tl.arange(0, ROWS)
    tl.store(mass_ptr + at, tl.sum(p, 1))
    tl.store(moved_ptr + at, tl.sum(p * (reach[:, None] - along), 1))


@triton.jit(do_not_specialize=["window", "first", "length", "blocks", "key_tiles"])
def _shares(
    q_desc, gradient_desc, out_desc, k_desc, v_desc, lse_ptr, moved_ptr, mass_ptr,
    scale, softcap, window, first, length, blocks, key_tiles,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """ROWS rows: moved and mass [programs, key tiles, ROWS] of dropping._shares, of the key tiles that they see."""
    plane = (first + tl.program_id(0)) // blocks
    block = (first + tl.program_id(0)) % blocks
    b = plane // HEADS
    head = plane % HEADS
    kv_head = head // GROUP
    _, first_row, rows, position, valid, _, _ = query_rows(block, 0, length, length, length, ROWS)
    first_diagonal, _, _, first_tile, end_tiles = visited(block, length, window, ROWS, KEYS, CAUSAL, False, WINDOWED)

    q = q_desc.load([b, head, first_row, 0]).reshape([ROWS, BLOCK_D])
    gradient = gradient_desc.load([b, head, first_row, 0]).reshape([ROWS, BLOCK_D])
    out = out_desc.load([b, head, first_row, 0]).reshape([ROWS, BLOCK_D])
    reach = tl.sum(gradient.to(tl.float32) * out.to(tl.float32), 1)
    # +inf leaves padding rows without mass
    lse_log2 = tl.load(lse_ptr + plane.to(tl.int64) * length + rows, mask=valid, other=float("inf")) * LOG2E
    scratch = tl.program_id(0).to(tl.int64) * key_tiles * ROWS
    moved_ptr += scratch
    mass_ptr += scratch

    # What every row sees whole comes without a mask, unless there is a window.
    first_masked = first_diagonal if CAUSAL else length // KEYS
    for j in tl.range(first_tile, first_masked):
        _visit(
            q, gradient, reach, k_desc, v_desc, b, kv_head, j, length, position, lse_log2, scale, softcap, window,
            moved_ptr, mass_ptr, WINDOWED, BLOCK_D, ROWS, KEYS, CAUSAL, WINDOWED, CAPPED,
        )  # fmt: skip
    for j in tl.range(first_masked, end_tiles, num_stages=1):
        _visit(
            q, gradient, reach, k_desc, v_desc, b, kv_head, j, length, position, lse_log2, scale, softcap, window,
            moved_ptr, mass_ptr, True, BLOCK_D, ROWS, KEYS, CAUSAL, WINDOWED, CAPPED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["window", "first", "length", "blocks", "tiles", "key_tiles", "entries"])
def _costs(
    moved_ptr, mass_ptr, cell_ptr, cost_ptr, most, unit, window, first, length, blocks, tiles, key_tiles, entries,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TOGETHER: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """ENTRIES thresholds of one query tile, of TOGETHER that a program of _shares had: the sums over its rows."""
    block = tl.program_id(0) // TOGETHER
    within = tl.program_id(0) % TOGETHER
    plane = (first + block) // blocks
    t = (first + block) % blocks * TOGETHER + within
    if t >= tiles:
        return
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    row = within * ROWS + tl.arange(0, ROWS)
    query_tile = plane.to(tl.int64) * tiles + t
    _, _, _, first_tile, end_tiles = visited(t, length, window, ROWS, KEYS, CAUSAL, False, WINDOWED)
    scratch = block.to(tl.int64) * key_tiles * (ROWS * TOGETHER)
    moved_ptr += scratch
    mass_ptr += scratch
    cell_ptr += query_tile * key_tiles

    moved = tl.zeros([ROWS, ENTRIES], tl.float32)
    mass = tl.zeros([ROWS, ENTRIES], tl.float32)
    for i in tl.range(first_tile, end_tiles, TILES):
        j = i + tl.arange(0, TILES)
        seen = j < end_tiles
        cell = tl.load(cell_ptr + j, mask=seen, other=0)
        below = (cell[:, None] < entry[None, :]).to(tl.float32)
        at = j[None, :] * (ROWS * TOGETHER) + row[:, None]
        part = tl.load(moved_ptr + at, mask=seen[None, :], other=0.0)
        moved = tl.dot(part, below, moved, input_precision=FLOAT32_DOT)
        part = tl.load(mass_ptr + at, mask=seen[None, :], other=0.0)
        mass = tl.dot(part, below, mass, input_precision=FLOAT32_DOT)
    change = moved / tl.maximum(1.0 - mass, LEAST_LEFT)
    cost = change * change / 2
    cost = tl.where(cost < most, cost, most)  # NaN is not below it
    total = tl.sum(tl.floor(cost * unit + 0.5).to(tl.int64), 0)
    tl.store(cost_ptr + query_tile * entries + entry, total, mask=entry < entries)
