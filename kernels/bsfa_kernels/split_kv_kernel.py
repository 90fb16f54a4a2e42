"""The Triton kernels of split_kv.py: attention of packed rows over a run of key tiles, and the sum of such runs."""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import load_span
from .launch import FLOAT32_DOT
from .portable import LOG2E, cap_scores

INTEGERS = [
    "window", "q_offset", "q_rows", "most_rows", "k_rows", "row_blocks", "splits", "q_batch", "q_head", "q_row",
    "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "out_batch", "out_head", "out_row", "table_row",
]  # fmt: skip


@triton.jit
def find_sequence(spans_ptr, packed_ptr, b, q_offset, q_rows, k_rows):
    """Of sequence b: (its first row in q, position of that row, first and end position of queries that are no padding,
    k_offset, key length); see reference.Span.
    """
    q_first, k_offset, length, q_length = load_span(spans_ptr, b, q_offset, k_rows)
    own = 0
    if packed_ptr is not None:
        own = tl.load(packed_ptr + b * 2)
        q_rows = tl.load(packed_ptr + b * 2 + 1)
    return own, q_first, tl.maximum(q_first, 0), tl.minimum(q_length, q_first + q_rows), k_offset, length


@triton.jit
def key_rows(table_ptr, j, k_offset, inside, KEYS: tl.constexpr, PAGE: tl.constexpr):
    """Where the keys of tile j lie: (page of each, 0 where there are none; row in the page or the tensor)."""
    key = j * KEYS + tl.arange(0, KEYS)
    if PAGE == 0:
        return 0, (key - k_offset).to(tl.int64)
    elif PAGE % KEYS == 0:  # one page holds the tile
        return tl.load(table_ptr + j * KEYS // PAGE).to(tl.int64), (key % PAGE).to(tl.int64)
    else:
        return tl.load(table_ptr + key // PAGE, mask=inside, other=0).to(tl.int64), (key % PAGE).to(tl.int64)


@triton.jit
def load_tile(x_ptr, page, row, page_stride, row_stride, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    """[KEYS, WIDTH] of K or V, zero where it is not `inside` and behind column D."""
    column = tl.arange(0, WIDTH)
    pointers = x_ptr + (page * page_stride + row * row_stride)[:, None] + column[None, :]
    return tl.load(pointers, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def add_sink(sinks_ptr, head, maximum, total):
    """One more logit joins the softmax, of value 0: (maximum, total, what the sum of values is to be multiplied by)."""
    logit = tl.load(sinks_ptr + head) * LOG2E
    new_max = tl.maximum(maximum, logit)
    alpha = tl.exp2(maximum - new_max)
    return new_max, total * alpha + tl.exp2(logit - new_max), alpha


@triton.jit(do_not_specialize=INTEGERS)
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, spans_ptr, table_ptr, packed_ptr, sinks_ptr,
    scale, softcap, window, q_offset, q_rows, most_rows, k_rows, row_blocks, splits, q_batch, q_head, q_row,
    k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, V_D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS pairs (query, head of the group) of one KV head, over its part of the key tiles that the sequence sees.

    Strides but `table_row` count 16 bytes each. With partial_ptr (float32 [B, Hq, most_rows, splits, V_D]) a program
    stores its own normalised sum and, in partial_lse_ptr, its log2-sum-exp; without, splits is 1 and it stores the
    output.
    """
    CHUNK: tl.constexpr = 128 // q_ptr.dtype.element_ty.primitive_bitwidth
    row_block = tl.program_id(0) % row_blocks
    b = tl.program_id(0) // row_blocks // KV_HEADS
    kv_head = tl.program_id(0) // row_blocks % KV_HEADS
    split = tl.program_id(1)
    own, q_first, first_position, end_position, k_offset, length = find_sequence(
        spans_ptr, packed_ptr, b, q_offset, q_rows, k_rows
    )
    pair = row_block * ROWS + tl.arange(0, ROWS)
    query = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    position = q_first + query
    valid = (position >= first_position) & (position < end_position)
    # Of this program's rows, the padding among them left out.
    first = tl.maximum(q_first + row_block * ROWS // GROUP, first_position)
    last = tl.minimum(q_first + (row_block * ROWS + ROWS - 1) // GROUP, end_position - 1)
    if (length <= 0) | (last < first):
        return

    # Of all of the sequence's rows: a split is the same tiles to every program.
    k_begin = tl.maximum(k_offset, 0)
    first_key, end_key = k_begin, length
    if WINDOWED:
        first_key = tl.maximum(k_begin, first_position - window + 1)
    if CAUSAL:
        end_key = tl.minimum(length, end_position)
    first_tile = first_key // KEYS
    each = tl.cdiv(tl.maximum(tl.cdiv(end_key, KEYS) - first_tile, 0), splits)
    begin = first_tile + split * each
    end = tl.minimum(begin + each, tl.cdiv(end_key, KEYS))
    if CAUSAL:
        end = tl.minimum(end, last // KEYS + 1)
    # Tiles that every row sees whole.
    whole_begin, whole_end = tl.cdiv(k_begin, KEYS), length // KEYS
    if CAUSAL:
        whole_end = tl.minimum(whole_end, (first + 1) // KEYS)
    if WINDOWED:
        whole_begin = tl.maximum(whole_begin, tl.cdiv(last - window + 1, KEYS))

    q_plane = head * q_head.to(tl.int64)
    if packed_ptr is None:
        q_plane += b * q_batch.to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    pointers = q_ptr + ((q_plane + (own + query) * q_row.to(tl.int64)) * CHUNK)[:, None] + column[None, :]
    q = tl.load(pointers, mask=valid[:, None] & (column < D)[None, :], other=0.0)
    k_page, v_page = k_batch.to(tl.int64) * CHUNK, v_batch.to(tl.int64) * CHUNK
    k_step, v_step = k_row.to(tl.int64) * CHUNK, v_row.to(tl.int64) * CHUNK
    k_ptr += kv_head * k_head.to(tl.int64) * CHUNK
    v_ptr += kv_head * v_head.to(tl.int64) * CHUNK
    if PAGE == 0:
        k_ptr += b * k_page
        v_ptr += b * v_page
    else:
        table_ptr += b * table_row.to(tl.int64)
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for j in tl.range(begin, end, num_stages=STAGES):
        key = j * KEYS + tl.arange(0, KEYS)
        inside = (key >= k_begin) & (key < length)
        page, row = key_rows(table_ptr, j, k_offset, inside, KEYS, PAGE)
        k = load_tile(k_ptr, page, row, k_page, k_step, inside, D, BLOCK_D)
        s = tl.dot(q, k.T, input_precision=FLOAT32_DOT)
        if (j < whole_begin) | (j >= whole_end):
            visible = inside[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= position[:, None])
            if WINDOWED:
                visible = visible & (key[None, :] > (position - window)[:, None])
            s = tl.where(visible, s, float("-inf"))
        unit = scale * LOG2E
        if CAPPED:
            s = cap_scores(s, scale, softcap)
            unit = LOG2E
        new_max = tl.maximum(running_max, tl.max(s, 1) * unit)
        # A row that has seen nothing yet has no maximum to subtract.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s * unit - shift[:, None])
        alpha = tl.exp2(running_max - shift)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        running_max = new_max
        v = load_tile(v_ptr, page, row, v_page, v_step, inside, V_D, BLOCK_V)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=FLOAT32_DOT)

    if sinks_ptr is not None:
        if partial_ptr is None:
            running_max, row_sum, alpha = add_sink(sinks_ptr, head, running_max, row_sum)
            acc = acc * alpha[:, None]
    acc = acc * tl.where(row_sum == 0, 0.0, 1.0 / row_sum)[:, None]
    lse = running_max + tl.log2(row_sum)
    column = tl.arange(0, BLOCK_V)
    if partial_ptr is None:
        plane = head.to(tl.int64)
        out_plane = head * out_head.to(tl.int64)
        if packed_ptr is None:
            plane += b * (KV_HEADS * GROUP)
            out_plane += b * out_batch.to(tl.int64)
        address = (out_plane + (own + query) * out_row.to(tl.int64)) * CHUNK
        store = valid[:, None] & (column < V_D)[None, :]
        tl.store(out_ptr + address[:, None] + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=store)
        tl.store(lse_ptr + plane * q_rows + own + query, lse / LOG2E, mask=valid)
    else:
        row = ((b * (KV_HEADS * GROUP) + head).to(tl.int64) * most_rows + query) * splits + split
        # What a row without a key in this split weighs is nothing, and nobody reads it.
        store = (valid & (row_sum != 0))[:, None] & (column < V_D)[None, :]
        tl.store(partial_ptr + (row * V_D)[:, None] + column[None, :], acc, mask=store)
        tl.store(partial_lse_ptr + row, lse, mask=valid)


@triton.jit(do_not_specialize=INTEGERS)
def combine(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, spans_ptr, packed_ptr, sinks_ptr, q_offset, q_rows, most_rows,
    k_rows, splits, out_batch, out_head, out_row,
    HEADS: tl.constexpr, V_D: tl.constexpr, BLOCK_V: tl.constexpr, MOST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of the output out of its at most MOST splits, WIDTH of which are read at a time."""
    CHUNK: tl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    query = tl.program_id(0) % most_rows
    plane = tl.program_id(0) // most_rows
    b, head = plane // HEADS, plane % HEADS
    own, q_first, first_position, end_position, _, length = find_sequence(
        spans_ptr, packed_ptr, b, q_offset, q_rows, k_rows
    )
    position = q_first + query
    if (length <= 0) | (position < first_position) | (position >= end_position):
        return
    row = tl.program_id(0).to(tl.int64) * splits
    split = tl.arange(0, MOST)
    lse = tl.load(partial_lse_ptr + row + split, mask=split < splits, other=float("-inf"))
    maximum = tl.max(lse, 0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp2(lse - shift), 0)
    column = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, splits, WIDTH):
        part = start + tl.arange(0, WIDTH)
        weight = tl.exp2(tl.load(partial_lse_ptr + row + part, mask=part < splits, other=float("-inf")) - shift)
        pointers = partial_ptr + ((row + part) * V_D)[:, None] + column[None, :]
        x = tl.load(pointers, mask=(weight != 0)[:, None] & (column < V_D)[None, :], other=0.0)
        acc += tl.sum(x * weight[:, None], 0)
    if sinks_ptr is not None:
        maximum, total, alpha = add_sink(sinks_ptr, head, maximum, total)
        acc = acc * alpha
    acc = acc * tl.where(total == 0, 0.0, 1.0 / total)
    plane = head.to(tl.int64)
    out_plane = head * out_head.to(tl.int64)
    if packed_ptr is None:
        plane += b * HEADS
        out_plane += b * out_batch.to(tl.int64)
    address = (out_plane + (own + query) * out_row.to(tl.int64)) * CHUNK
    tl.store(out_ptr + address + column, acc.to(out_ptr.dtype.element_ty), mask=column < V_D)
    tl.store(lse_ptr + plane * q_rows + own + query, (maximum + tl.log2(total)) / LOG2E)
