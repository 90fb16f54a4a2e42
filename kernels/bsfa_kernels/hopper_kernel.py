"""The hopper backend's kernel in Gluon, for sm_90a: consumer warpgroups that decide, one producer warp that streams.

A program computes 64 query rows of one head for each of its consumers. What it works on is in hopper_stream.py, how the
warps work together in hopper_pipeline.py; here is what a consumer does with a tile: scores, vote, softmax, product.
What each choice was worth is in NOTES.md.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .hopper_pipeline import (
    allocate_buffers,
    anyone,
    declare_vote,
    give_back_k,
    give_back_v,
    let_k_pass,
    let_v_pass,
    meanwhile,
    producer,
    reinterpret,
    slot_of,
    wait_for,
)
from .hopper_stream import KEYS, ROWS, Call, entry_after, find_positions, find_work, held_whole, stream_tile

LOG2E = gl.constexpr(1.4426950408889634)
UNCOUNTED = gl.constexpr(-(2**30))  # below any number of tiles
PROPAGATE_NAN = gl.constexpr(triton.language.PropagateNan.ALL)
# An integer below 2^22 added to this float's bits is the float plus the integer.
MAGIC = gl.constexpr(0x4B400000)
MAGIC_FLOAT = gl.constexpr(12582912.0)
MASKED_INTEGER = gl.constexpr(0xFF800000 - 2**32 - 0x4B400000)  # becomes -inf
SMALLEST = gl.constexpr(1e-37)
CHUNK = gl.constexpr(8)  # elements of the output that a thread stores at a time, and what its strides are counted in


class Row(NamedTuple):
    """What a consumer holds of its rows: maxima in log2 units, sums by thread."""

    maximum: object
    total: object


@gluon.jit
def larger(a, b):
    """The larger number; NaN where one is NaN, so that no gate hides it."""
    return gl.maximum(a, b, propagate_nan=PROPAGATE_NAN)


@gluon.constexpr_function
def score_layout(keys: int):
    """Of scores [ROWS, keys] and of an output slab with as many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys, 16])


@gluon.constexpr_function
def partial_layout():
    """[ROWS, 4]: what one thread holds of a row, which 4 threads share."""
    return gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )


@gluon.jit
def trivially(x, layout: gl.constexpr):
    """x in a layout in which every thread holds what it held."""
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def largest_per_thread(s):
    """Largest of each thread's own columns of every row: [ROWS, 4], without a shuffle."""
    s = s.reshape([ROWS, s.shape[1] // 8, 4, 2])
    if s.dtype == gl.int32:
        return trivially(gl.max(gl.max(s, 3), 1), partial_layout())
    else:
        return trivially(gl.reduce(gl.reduce(s, 3, larger), 1, larger), partial_layout())


@gluon.jit
def sum_per_thread(p):
    p = p.reshape([ROWS, p.shape[1] // 8, 4, 2])
    return trivially(gl.sum(gl.sum(p, 3), 1), partial_layout())


@gluon.jit
def halves(x):
    """Left and right columns of x [ROWS, N], which each thread holds both of."""
    half: gl.constexpr = x.shape[1] // 2
    left, right = gl.split(x.reshape([ROWS, 2, half]).permute((0, 2, 1)))
    return trivially(left, score_layout(half)), trivially(right, score_layout(half))


@gluon.jit
def in_parts(x, COUNT: gl.constexpr):
    """The columns of x [ROWS, N] in 1, 2 or 4 equal parts."""
    if COUNT == 1:
        return (x,)
    else:
        left, right = halves(x)
        if COUNT == 2:
            return (left, right)
        else:
            a, b = halves(left)
            c, d = halves(right)
            return (a, b, c, d)


@gluon.jit
def start_scores(buffers, i, WG: gl.constexpr, VARIANT: gl.constexpr):
    """Starts QK^T of a tile, unscaled."""
    SLABS: gl.constexpr = VARIANT.slabs
    if not VARIANT.awaits_early:
        wait_for(buffers.k_full, i, VARIANT.slabs, VARIANT.k_stages)
    if VARIANT.int8:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
        s = gl.full([ROWS, KEYS], 0, gl.int32, layout)
    else:
        s = gl.full([ROWS, KEYS], 0.0, gl.float32, score_layout(KEYS))
    for c in gl.static_range(SLABS):
        slot, phase = slot_of(i, c, VARIANT.slabs, VARIANT.k_stages)
        q = buffers.q.index(WG * VARIANT.slabs + c).reshape([ROWS, VARIANT.columns])
        k = buffers.k.index(slot).reshape([KEYS, VARIANT.columns])
        s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def finish_scores(s, i, VARIANT: gl.constexpr):
    """QK^T when it is done; each slab of K goes back as soon as its own products are."""
    SLABS: gl.constexpr = VARIANT.slabs
    for c in gl.static_range(SLABS):
        s = warpgroup_mma_wait(VARIANT.slabs - 1 - c, deps=[s])
        give_back_k(i, c, VARIANT)
    return trivially(s, score_layout(KEYS))


@gluon.jit
def by_row(unit, VARIANT: gl.constexpr):
    """What a score is multiplied with: one number or, of int8 scores, one for each row."""
    if VARIANT.int8:
        return unit[:, None]
    else:
        return unit


@gluon.jit
def vote(largest, valid, maximum, unit, scale, shift, absolute, gap, WG: gl.constexpr, VARIANT: gl.constexpr):
    """Whether the tile passes its gates: each by one row at least. `largest` times `unit` is in log2 units."""
    passes = True
    if VARIANT.absolute:
        if VARIANT.int8:
            natural = largest * by_row(unit / LOG2E, VARIANT)
        elif VARIANT.capped:
            natural = largest
        else:  # not by way of log2 units: a threshold may be a tile's very value
            natural = largest * scale
        if VARIANT.shifted:
            natural += shift[:, None]
        passes = anyone(gl.where((natural < absolute) | ~valid[:, None], 0, 1), WG)
    if VARIANT.gap:
        below = largest * by_row(unit, VARIANT) - maximum[:, None] < gap
        passes = anyone(gl.where(below | ~valid[:, None], 0, 1), WG) & passes
    return passes


@gluon.jit
def cap_scores(s, scale, softcap):
    """softcap * tanh(scale * s / softcap), in natural units; what is masked stays so."""
    x = gl.exp2(s * (scale / softcap * (-2 * LOG2E)))
    return gl.where(s == -float("inf"), s, softcap * (2 / (1 + x) - 1))


@gluon.jit
def accumulate(s, largest, acc, row, unit, buffers, i, VARIANT: gl.constexpr):
    """One tile joins the softmax, its keys in parts: a part's product runs behind the next one's exponentials."""
    SLABS: gl.constexpr = VARIANT.v_slabs
    PARTS: gl.constexpr = VARIANT.parts
    OF_SLOT: gl.constexpr = VARIANT.parts // VARIANT.v_parts
    new_max = larger(row.maximum, gl.reduce(largest * by_row(unit, VARIANT), 1, larger))
    shift = new_max
    if VARIANT.windowed:  # a row whose window begins behind this tile may have seen nothing yet: nothing to subtract
        shift = gl.where(new_max == -float("inf"), 0.0, new_max)
    alpha = gl.exp2(row.maximum - shift)
    total = row.total * alpha[:, None]
    rescaled = ()
    o_rows: gl.constexpr = gl.SliceLayout(1, score_layout(VARIANT.v_columns))
    for c in gl.static_range(SLABS):
        rescaled = rescaled + (acc[c] * trivially(alpha, o_rows)[:, None],)
    acc = rescaled
    PART: gl.constexpr = KEYS // VARIANT.parts
    s_rows: gl.constexpr = gl.SliceLayout(1, score_layout(PART))
    operand: gl.constexpr = gl.DotOperandLayout(0, score_layout(VARIANT.v_columns), 2)
    if VARIANT.int8:
        factor = trivially(unit, s_rows)[:, None]
        subtracted = trivially(shift, s_rows)[:, None] + MAGIC_FLOAT * factor
    else:
        factor = unit
        subtracted = trivially(shift, s_rows)[:, None]
    parts = in_parts(s, VARIANT.parts)
    for h in gl.static_range(PARTS):
        x = parts[h]
        if VARIANT.int8:
            x = (x + MAGIC).to(gl.float32, bitcast=True)
        p = gl.exp2(x * factor - subtracted)
        total += sum_per_thread(p)
        weights = gl.convert_layout(p.to(buffers.v.dtype), operand)
        slot, phase = slot_of(i, h // OF_SLOT, VARIANT.v_parts, VARIANT.v_stages)
        started = ()
        for c in gl.static_range(SLABS):
            v = buffers.v.index(slot * VARIANT.v_slabs + c).reshape([KEYS // VARIANT.v_parts, VARIANT.v_columns])
            v = v.slice(h % OF_SLOT * PART, PART)
            started = started + (warpgroup_mma(weights, v, acc[c], is_async=True),)
        acc = started
    return finished(acc, VARIANT), Row(new_max, total)


@gluon.jit
def finished(acc, VARIANT: gl.constexpr):
    """Products that have run to their end."""
    if VARIANT.v_slabs == 1:
        return (warpgroup_mma_wait(0, deps=[acc[0]]),)
    elif VARIANT.v_slabs == 2:
        return warpgroup_mma_wait(0, deps=[acc[0], acc[1]])
    else:
        return warpgroup_mma_wait(0, deps=[acc[0], acc[1], acc[2]])


@gluon.jit
def hide(s, tile, query_tile, call, span, VARIANT: gl.constexpr):
    """s with what no row may see at -inf."""
    s_rows: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    key = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, s.type.layout))
    last = span.length - 1
    if VARIANT.causal:
        last = gl.minimum(query_tile * ROWS + gl.arange(0, ROWS, layout=s_rows), last)[:, None]
    visible = key[None, :] <= last
    if VARIANT.windowed:
        before = query_tile * ROWS + gl.arange(0, ROWS, layout=s_rows) - call.window
        visible = visible & (key[None, :] > before[:, None])
    return gl.where(visible, s, MASKED_INTEGER if VARIANT.int8 else -float("inf"))


@gluon.jit
def consumer(WG: gl.constexpr, call, buffers, place, span, stream, VARIANT: gl.constexpr):
    SLABS: gl.constexpr = VARIANT.v_slabs
    rows: gl.constexpr = gl.SliceLayout(1, partial_layout())
    query_tile = place.first + WG
    alive = query_tile * ROWS < gl.minimum(span.q_length, span.q_first + span.q_rows)
    # Rows of this tile that are no padding.
    first_valid = span.q_first - query_tile * ROWS
    end_valid = gl.minimum(span.q_rows + span.q_first, span.q_length) - query_tile * ROWS
    row_index = gl.arange(0, ROWS, layout=rows)
    valid = (row_index >= first_valid) & (row_index < end_valid)
    at = find_positions(query_tile, alive, call, span, stream, VARIANT)
    whole = held_whole(query_tile, span, span.q_rows)
    absolute = -float("inf")
    gap = -float("inf")
    if VARIANT.absolute:
        column = gl.minimum(query_tile, call.absolute_tiles - 1)
        absolute = gl.load(call.absolute + place.head * call.absolute_tiles + column)
        absolute = gl.where(whole, absolute, -float("inf"))
    if VARIANT.gap:
        column = gl.minimum(query_tile, call.gap_tiles - 1)
        gap = gl.load(call.gap + place.head * call.gap_tiles + column) * LOG2E
        gap = gl.where(whole, gap, -float("inf"))
    q_scale = call.scale * LOG2E
    k_scale_ptr = call.k_scale
    shift = call.scale
    if VARIANT.int8:
        first_row = place.plane.to(gl.int64) * call.q_rows + query_tile * ROWS - span.q_first
        q_scale = gl.load(call.q_scale + first_row + row_index, mask=valid, other=1.0) * (call.scale * LOG2E)
        kv_plane = place.batch * (VARIANT.heads // VARIANT.group) + place.kv_head
        first_scale = gl.maximum(span.k_offset, 0) // KEYS
        k_scale_ptr += kv_plane * call.k_scales - first_scale
        if VARIANT.shifted:
            shift = gl.load(call.q_shift + first_row + row_index, mask=valid, other=0.0) * call.scale

    row = Row(gl.full([ROWS], -float("inf"), gl.float32, rows), gl.full([ROWS, 4], 0.0, gl.float32, partial_layout()))
    acc = ()
    for _ in gl.static_range(SLABS):
        acc = acc + (gl.full([ROWS, VARIANT.v_columns], 0.0, gl.float32, score_layout(VARIANT.v_columns)),)
    kept = gl.where(whole, 0, UNCOUNTED)  # forced tiles too; a flag of its own would be one more register
    if stream.length > 0:
        mbarrier.wait(buffers.q_full, 0)
        if VARIANT.awaits_early:
            wait_for(buffers.k_full, 0, VARIANT.slabs, VARIANT.k_stages)
    if VARIANT.lists:
        following = gl.load(stream.entries)
    for i in range(stream.length):
        if VARIANT.lists:
            tile = following >> 2 * VARIANT.consumers
            forced = (following >> VARIANT.consumers + WG & 1) == 1
            candidate = (following >> WG & 1) == 1
            masked = forced
        else:
            tile = stream_tile(i, stream, VARIANT)
            forced = (i == at.own_at) | (i == at.sink_at)
            candidate = (i >= at.first_candidate) & (i != at.again)
            # A causal consumer masks all up to its diagonal tile: before it come the sink and what is not its own.
            masked = i <= at.own_at
            if VARIANT.windowed:
                candidate = candidate & (i < at.end_candidate)
                masked = masked | (i >= at.edge_at)
        if VARIANT.lists and VARIANT.windowed:
            masked = masked | (tile * KEYS <= (query_tile + 1) * ROWS - 1 - call.window)
        if not VARIANT.causal:
            masked = (tile + 1) * KEYS > span.length
        if not VARIANT.lists or forced | candidate:
            s = start_scores(buffers, i, WG, VARIANT)
            unit = q_scale
            if VARIANT.int8:  # behind the start: a load in flight holds up products that have not started
                scaled = tile
                if VARIANT.spans and VARIANT.windowed:  # keys that a sliding cache no longer holds have no scale
                    scaled = gl.maximum(tile, first_scale)
                unit = larger(q_scale * gl.load(k_scale_ptr + scaled), SMALLEST)
            if VARIANT.awaits_early:
                meanwhile(buffers, i, stream.length, VARIANT)
            s = finish_scores(s, i, VARIANT)
            if masked:
                s = hide(s, tile, query_tile, call, span, VARIANT)
            largest = largest_per_thread(s)
            if VARIANT.int8:
                largest = (largest + MAGIC).to(gl.float32, bitcast=True) - MAGIC_FLOAT
            if VARIANT.capped:
                largest = cap_scores(largest, call.scale, call.softcap)
                unit = LOG2E
            passes = vote(largest, valid, row.maximum, unit, call.scale, shift, absolute, gap, WG, VARIANT)
            if not VARIANT.awaits_early:
                wait_for(buffers.v_full, i, VARIANT.v_parts, VARIANT.v_stages)
            passes = forced | (candidate & passes)
            if VARIANT.lists:
                following = entry_after(stream.entries, i, stream.length)
            if passes:
                if VARIANT.capped:
                    s = cap_scores(s, call.scale, call.softcap)
                acc, row = accumulate(s, largest, acc, row, unit, buffers, i, VARIANT)
                kept += 1
        else:
            let_k_pass(buffers, i, VARIANT)
            wait_for(buffers.v_full, i, VARIANT.v_parts, VARIANT.v_stages)
            following = entry_after(stream.entries, i, stream.length)
        if not VARIANT.returns_v_late:
            give_back_v(i, VARIANT)
    if VARIANT.returns_v_late:
        if stream.length > 0:
            let_v_pass(buffers, stream.length - 1, VARIANT)

    if alive & (stream.length > 0):
        total = gl.sum(row.total, 1)
        maximum = row.maximum
        inverse = 1.0 / total
        if VARIANT.windowed:
            inverse = gl.where(total > 0, inverse, 0.0)
        if VARIANT.shifted:
            maximum += shift * LOG2E
        if VARIANT.sinks:
            logit = gl.load(call.sinks + place.head) * LOG2E
            new_max = gl.maximum(maximum, logit)
            alpha = gl.exp2(maximum - new_max)
            total = total * alpha + gl.exp2(logit - new_max)
            inverse = alpha / total
            maximum = new_max
        # Computed here, since what is kept alive is a register in the loop.
        row_in_head = query_tile * ROWS - span.q_first
        plane = place.plane
        if VARIANT.packed:
            row_in_head += gl.load(call.packed + place.plane // VARIANT.heads * 2)
            plane = place.head
        first_row = plane.to(gl.int64) * call.q_rows + row_in_head
        first_chunk = place.batch.to(gl.int64) * call.out_batch + place.head.to(gl.int64) * call.out_head
        first_chunk += row_in_head.to(gl.int64) * call.out_row
        for c in gl.static_range(SLABS):
            # Rounded, Q has fewer slabs than the output where V is narrower: one is used again.
            staging = buffers.q.index(WG * VARIANT.slabs + c % VARIANT.slabs)
            store_output(
                acc[c], inverse, staging, call, first_chunk, c * VARIANT.v_columns, first_valid, end_valid, VARIANT
            )
        row_index = gl.arange(0, ROWS, layout=rows)
        valid = (row_index >= first_valid) & (row_index < end_valid)
        gl.store(call.lse + first_row + row_index, (maximum + gl.log2(total)) / LOG2E, mask=valid)
        forced_tiles = gl.where((stream.sink == 1) & (at.own > 0) & (at.own_first == 0), 2, 1)
        counted = kept >= 0
        query_tiles = place.plane * call.tiles + place.tile + WG
        gl.store(call.kept + query_tiles, gl.where(counted, kept - forced_tiles, 0))
        if not VARIANT.lists:
            visible_tiles = at.own + 1 - at.own_first
            if not VARIANT.causal:
                visible_tiles = stream.end_tiles
            gl.store(call.candidates + query_tiles, gl.where(counted, visible_tiles - forced_tiles, 0))


@gluon.jit
def store_output(acc, inverse, staging, call, first_chunk, first_column, first_valid, end_valid, VARIANT: gl.constexpr):
    """A slab of the output, by way of Q's buffer, so that a thread stores 16 bytes at a time. Not by TMA: a store whose
    tile starts before the tensor (an unaligned chunk) is an illegal instruction.
    """
    WIDTH: gl.constexpr = VARIANT.width
    dtype: gl.constexpr = call.out.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], dtype)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    o_rows: gl.constexpr = gl.SliceLayout(1, score_layout(VARIANT.v_columns))
    staging = reinterpret(staging, dtype, [ROWS, WIDTH], layout)
    PARTS: gl.constexpr = VARIANT.v_columns // WIDTH
    parts = in_parts(acc * gl.convert_layout(inverse, o_rows)[:, None], PARTS)
    for part in gl.static_range(PARTS):
        staging.store(parts[part].to(dtype))
        o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
        column = first_column + part * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, wide))
        written = (o_row >= first_valid) & (o_row < end_valid)
        # A partition does not know how its pointers are aligned.
        pointer = gl.multiple_of(call.out + first_chunk * CHUNK, 16)
        address = pointer + o_row[:, None].to(gl.int64) * (call.out_row * CHUNK) + column[None, :]
        gl.store(address, staging.load(wide), mask=written[:, None] & (column < VARIANT.head_dim)[None, :])


@gluon.jit(
    do_not_specialize=["q_offset", "q_rows", "k_rows", "tiles", "absolute_tiles", "gap_tiles", "k_scales", "room",
                       "window", "out_batch", "out_head", "out_row", "table_row"]
)  # fmt: skip
def forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, kept_ptr, candidates_ptr, absolute_ptr, gap_ptr, spans_ptr,
    entries_ptr, lengths_ptr, order_ptr, table_ptr, packed_ptr, sinks_ptr, q_scale_ptr, q_shift_ptr, k_scale_ptr,
    scale, softcap, window, q_offset, q_rows, k_rows, tiles, absolute_tiles, gap_tiles, k_scales, room,
    table_row, out_batch, out_head, out_row, VARIANT: gl.constexpr,
):  # fmt: skip
    declare_vote(tiles)
    place, span, stream = find_work(
        spans_ptr, entries_ptr, lengths_ptr, order_ptr, table_ptr, packed_ptr, window, q_offset, q_rows, k_rows, room,
        table_row, VARIANT,
    )  # fmt: skip
    buffers = allocate_buffers(q_desc, k_desc, v_desc, VARIANT)
    call = Call(
        out_ptr, lse_ptr, kept_ptr, candidates_ptr, absolute_ptr, gap_ptr, packed_ptr, sinks_ptr, q_scale_ptr,
        q_shift_ptr, k_scale_ptr, scale, softcap, window, q_rows, tiles, absolute_tiles, gap_tiles, k_scales,
        out_batch, out_head, out_row,
    )  # fmt: skip
    # Registers of the workers; the first consumer has what they leave.
    if VARIANT.consumers == 3:
        gl.warp_specialize(
            [
                (consumer, (0, call, buffers, place, span, stream, VARIANT)),
                (consumer, (1, call, buffers, place, span, stream, VARIANT)),
                (consumer, (2, call, buffers, place, span, stream, VARIANT)),
                (producer, (q_desc, k_desc, v_desc, buffers, place, span, stream, VARIANT)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (0, call, buffers, place, span, stream, VARIANT)),
                (consumer, (1, call, buffers, place, span, stream, VARIANT)),
                (producer, (q_desc, k_desc, v_desc, buffers, place, span, stream, VARIANT)),
            ],
            [4, 1],
            [240, 24],
        )
