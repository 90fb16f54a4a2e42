"""The kernels of int8.py.

Rotations are matrix products of the inputs as they are, so exact but for the order of float32 sums; the mean is taken
off behind its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import load_span
from .launch import FLOAT32_DOT, Launches
from .quantise import LEVELS, TINY

# Added and taken off again it would round a float32 half to even; taken as bits, the low ones are the integer.
ROUNDING = tl.constexpr(1.5 * 2**23)
LARGEST = tl.constexpr(float(LEVELS))
SMALLEST = tl.constexpr(TINY)


@triton.jit
def rotation_matrix(BLOCK: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr):
    """quantise.rotation [BLOCK, BLOCK]."""
    i = tl.arange(0, BLOCK)[:, None]
    x = i & (tl.arange(0, BLOCK)[None, :] ^ (i >> HALF))
    x = x ^ (x >> 4)
    x = x ^ (x >> 2)
    x = x ^ (x >> 1)
    return (1 - 2 * (x & 1)).to(dtype)


@triton.jit
def load_blocks(x_ptr, first, begin, end, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                BLOCKS: tl.constexpr):  # fmt: skip
    """(rows `first` .. + ROWS as [ROWS * BLOCKS, BLOCK], which of those lie in `begin` .. `end`); all else is 0."""
    part = tl.arange(0, ROWS * BLOCKS)
    row = first + part // BLOCKS
    inside = (row >= begin) & (row < end)
    column = (part % BLOCKS * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    at = x_ptr + row.to(tl.int64)[:, None] * stride + column
    read = inside[:, None]
    if D != BLOCK * BLOCKS:
        read = read & (column < D)
    return tl.load(at, mask=read, other=0.0), inside


@triton.jit
def store_blocks(out_ptr, x, first, begin, end, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Rows [ROWS * BLOCKS, BLOCK] to a contiguous tensor."""
    part = first.to(tl.int64) * BLOCKS + tl.arange(0, ROWS * BLOCKS)
    inside = (part >= begin * BLOCKS) & (part < end * BLOCKS)
    tl.store(out_ptr + part[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], x, mask=inside[:, None])


@triton.jit
def each_row(x, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """x [BLOCKS, BLOCK], the same for every row, as [ROWS * BLOCKS, BLOCK]."""
    return tl.broadcast_to(x[None, :, :], [ROWS, BLOCKS, BLOCK]).reshape([ROWS * BLOCKS, BLOCK])


@triton.jit
def size(x):
    """|x|, infinite where x is not finite."""
    x = tl.abs(x)
    return tl.where(x < float("inf"), x, float("inf"))


@triton.jit
def scale_of(largest, UNIT: tl.constexpr):
    """(the scale of values up to `largest`, NaN where that is not finite; what to multiply them with)."""
    finite = largest < float("inf")
    rounds = finite & (largest > SMALLEST)
    inverse = tl.where(rounds, tl.div_rn(LARGEST, tl.where(rounds, largest, 1.0)), 0.0)
    return tl.where(finite, largest * UNIT, float("nan")), inverse


@triton.jit
def to_int8(x):
    return (x + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["k_rows", "split"])
def _sum_keys(
    k_ptr, sums_ptr, spans_ptr, batch_stride, head_stride, row_stride, k_rows, split,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    b, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    _, k_offset, length, _ = load_span(spans_ptr, b, 0, k_rows)
    k_ptr += b.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    begin, end = tl.maximum(-k_offset, 0), length - k_offset
    first = tl.program_id(1) * split
    total = tl.zeros([ROWS * BLOCKS, BLOCK], tl.float32)
    for row in tl.range(first, tl.minimum(first + split, end), ROWS):
        x, inside = load_blocks(k_ptr, row, begin, end, row_stride, ROWS, D, BLOCK, BLOCKS)
        x = x.to(tl.float32)
        total += tl.where(tl.abs(x) < float("inf"), x, 0.0)
    total = tl.sum(total.reshape([ROWS, BLOCKS * BLOCK]), 0)
    plane = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_ptr + plane * (BLOCKS * BLOCK) + tl.arange(0, BLOCKS * BLOCK), total)


@triton.jit(do_not_specialize=["k_rows", "splits", "tiles", "steps"])
def _quantise_keys(
    k_ptr, sums_ptr, k8_ptr, k_scale_ptr, mean_ptr, spans_ptr, batch_stride, head_stride, row_stride, k_rows,
    splits, tiles, steps,
    HEADS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    b, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    plane = tl.program_id(0).to(tl.int64)
    _, k_offset, length, _ = load_span(spans_ptr, b, 0, k_rows)
    k_ptr += b.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    begin, end = tl.maximum(-k_offset, 0), length - k_offset

    column = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    part = tl.arange(0, SPLITS)[:, None]
    at = (plane * splits + part) * (BLOCKS * BLOCK) + tl.arange(0, BLOCKS * BLOCK)[None, :]
    mean = tl.sum(tl.load(sums_ptr + at, mask=part < splits, other=0.0), 0).reshape([BLOCKS, BLOCK])
    mean /= tl.maximum(end - begin, 1).to(tl.float32)
    if tl.program_id(1) == 0:
        tl.store(mean_ptr + plane * D + column, mean, mask=column < D)
    half: tl.constexpr = (BLOCK.bit_length() - 1) // 2
    matrix = rotation_matrix(BLOCK, half, k_ptr.dtype.element_ty)
    turned = tl.sum(mean[:, :, None] * matrix.to(tl.float32)[None, :, :], 1)  # [BLOCKS, BLOCK]
    turned = each_row(turned, KEYS, BLOCK, BLOCKS)

    own = tl.maximum(k_offset, 0) // KEYS  # the first tile that has a scale
    for i in tl.range(tl.program_id(1) * steps, tl.minimum((tl.program_id(1) + 1) * steps, tiles)):
        first = (own + i) * KEYS - k_offset
        x, inside = load_blocks(k_ptr, first, begin, end, row_stride, KEYS, D, BLOCK, BLOCKS)
        y = tl.where(inside[:, None], tl.dot(x, matrix, input_precision=FLOAT32_DOT) - turned, 0.0)
        scale, inverse = scale_of(tl.max(size(y)), UNIT)
        store_blocks(k8_ptr + plane * k_rows * (BLOCKS * BLOCK), to_int8(y * inverse), first, 0, k_rows, KEYS, BLOCK,
                     BLOCKS)  # fmt: skip
        tl.store(k_scale_ptr + plane * tiles + i, scale)


@triton.jit(do_not_specialize=["q_rows", "steps"])
def _quantise_queries(
    q_ptr, mean_ptr, q8_ptr, q_scale_ptr, q_shift_ptr, batch_stride, head_stride, row_stride, q_rows, steps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    b, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    plane = tl.program_id(0).to(tl.int64)
    q_ptr += b.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    half: tl.constexpr = (BLOCK.bit_length() - 1) // 2
    matrix = rotation_matrix(BLOCK, half, q_ptr.dtype.element_ty)
    if q_shift_ptr is not None:
        column = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        mean = tl.load(mean_ptr + plane // GROUP * D + column, mask=column < D, other=0.0)
        mean = each_row(mean, ROWS, BLOCK, BLOCKS)
    for i in tl.range(tl.program_id(1) * steps, tl.minimum((tl.program_id(1) + 1) * steps, tl.cdiv(q_rows, ROWS))):
        first = i * ROWS
        x, inside = load_blocks(q_ptr, first, 0, q_rows, row_stride, ROWS, D, BLOCK, BLOCKS)
        y = tl.dot(x, matrix, input_precision=FLOAT32_DOT)
        scale, inverse = scale_of(tl.max(tl.max(size(y), 1).reshape([ROWS, BLOCKS]), 1), UNIT)
        inverse = tl.broadcast_to(inverse[:, None], [ROWS, BLOCKS]).reshape([ROWS * BLOCKS])
        store_blocks(q8_ptr + plane * q_rows * (BLOCKS * BLOCK), to_int8(y * inverse[:, None]), first, 0, q_rows, ROWS,
                     BLOCK, BLOCKS)  # fmt: skip
        row = first + tl.arange(0, ROWS)
        tl.store(q_scale_ptr + plane * q_rows + row, scale, mask=row < q_rows)
        if q_shift_ptr is not None:
            shift = tl.sum(x.to(tl.float32) * mean, 1).reshape([ROWS, BLOCKS])
            tl.store(q_shift_ptr + plane * q_rows + row, tl.sum(shift, 1), mask=row < q_rows)


sum_keys, quantise_keys, quantise_queries = (Launches(f) for f in (_sum_keys, _quantise_keys, _quantise_queries))
