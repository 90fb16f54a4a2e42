"""The hopper backend: a warp-specialized Gluon kernel for sm_90a (H100, H200).

One program computes 192 query rows of one head: three consumer warpgroups of 64 rows, each deciding for its own
64 x 128 tiles, and one producer warp that streams K and V tiles through shared memory by TMA. The three consumers
share one stream and run out of step, so that one's softmax hides behind another's products. V is always streamed:
fetching it after the vote would expose its latency (measured: 10-20 % slower at every skip rate). What each choice
was worth is in kernels/NOTES.md.

Order of the stream: causal, the sink and then right to left, so that every consumer meets its forced tiles before its
candidates; not causal, the diagonal tiles of all three consumers, the sink, then everything else right to left. With
block lists the stream is their union in the same order (schedule.py), and a consumer lets pass what it has not listed;
a section's programs start in the order of their streams' lengths, longest first.

Programs start section by section: a section is as many KV heads of a sequence as L2 holds, with their query heads.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .portable import MAX_GRID_Y, aligned, device_guard
from .request import UNBOUNDED, Request
from .schedule import schedule

# Triton 3.9 renamed it.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

LOG2E = gl.constexpr(1.4426950408889634)
UNCOUNTED = gl.constexpr(-(2**30))  # below any number of tiles
PROPAGATE_NAN = gl.constexpr(triton.language.PropagateNan.ALL)
UNBOUNDED_POSITION = gl.constexpr(UNBOUNDED)
MAX_HEAD_DIM = 128
ROWS = gl.constexpr(64)
KEYS = gl.constexpr(128)
CONSUMERS = gl.constexpr(3)
STAGES = {64: (4, 4), 128: (3, 2)}  # tiles of K and of V in flight, by columns
SECTION_BYTES = 32 << 20  # of K and V that the programs running at one time stream; L2 holds 50 MB (H200: 60)


def unsupported(request: Request) -> str | None:
    q, tile = request.q, request.tile
    if q.device.type != "cuda":
        return f"tensors are on {q.device.type}; the Hopper kernel needs an H100 or H200"
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"{torch.cuda.get_device_name(q.device)} is not a Hopper GPU (compute capability 9.0)"
    if triton.knobs.runtime.interpret:
        return "Gluon kernels do not run in Triton's interpreter (TRITON_INTERPRET=1)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype} is neither float16 nor bfloat16"
    if q.shape[3] % 8 or q.shape[3] > MAX_HEAD_DIM:
        return f"head dim {q.shape[3]} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    if (tile.rows, tile.keys) != (ROWS.value, KEYS.value):
        return f"tile {tile}: a consumer warpgroup decides for {ROWS.value}x{KEYS.value} tiles"
    axes = (triton.cdiv(request.query_tiles, CONSUMERS.value), sections(q, request.k))
    if max(axes) > MAX_GRID_Y:
        return f"{axes[0]:,} blocks of rows in {axes[1]:,} sections: a launch can have {MAX_GRID_Y:,} of each"
    return None


def attention(request: Request):
    q, k, v = (aligned(x) for x in (request.q, request.k, request.v))
    batch, heads, q_rows, head_dim = q.shape
    tiles, block_d = request.query_tiles, columns(head_dim)
    gate = request.gate.map(torch.Tensor.contiguous)
    optional = (gate.absolute, gate.gap, request.spans)
    out, lse, kept, candidates = request.new_outputs()

    def descriptor(x, rows):
        return TensorDescriptor.from_tensor(x, [1, 1, rows, block_d], tile_layout(rows, block_d, x.dtype))

    with device_guard(q):
        count = sections(q, k)
        section = batch * heads // count
        entries = lengths = order = None
        if request.blocks is not None:
            entries, lengths, candidates = schedule(request, CONSUMERS.value, forced=True)
            order = lengths.view(count, -1).argsort(descending=True)
        lists = (entries, lengths, order)
        _forward[(section, triton.cdiv(tiles, CONSUMERS.value), count)](
            *(descriptor(x, n.value) for x, n in ((q, ROWS), (k, KEYS), (v, KEYS))),
            out, lse, kept, candidates, *(lse if x is None else x for x in (*optional, *lists, request.sinks)),
            request.scale, request.softcap or 0.0, request.window or 0, request.q_offset, q_rows, k.shape[2], tiles,
            *(0 if thresholds is None else thresholds.shape[1] for thresholds in (gate.absolute, gate.gap)),
            0 if entries is None else entries.shape[2],
            section, heads, heads // k.shape[1], head_dim, block_d, *STAGES[block_d], request.causal, request.keep_sink,
            *(x is not None for x in (request.window, request.softcap, *optional, entries, request.sinks)),
            num_warps=4, maxnreg=128,
        )  # fmt: skip
    return out, lse, kept, candidates


def columns(head_dim: int) -> int:
    """Of a tile of Q, K or V in shared memory; TMA fills what is more than the head dim with zeros."""
    return 64 if head_dim <= 64 else 128


@cache
def tile_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Shared memory of a tile of Q, K or V. Computing all three anew took 0.035 ms of a call's host time."""
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], element)


def sections(q: torch.Tensor, k: torch.Tensor) -> int:
    """Sections of a call."""
    return q.shape[0] * (k.shape[1] // section_kv_heads(k))


def section_kv_heads(k: torch.Tensor) -> int:
    """KV heads of a section: as many of a sequence's K and V [B, Hkv, Tk, D] as L2 holds, equally many in each."""
    _, heads, keys, head_dim = k.shape
    fit = SECTION_BYTES // (2 * keys * head_dim * k.element_size())
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= max(fit, 1))


@gluon.jit
def stream_tile(i, diagonals, sink, end_diagonal, end_tiles, CAUSAL: gl.constexpr):
    """Key tile at position i of a block's stream."""
    if CAUSAL:
        return gl.where((i == 0) & (sink == 1), 0, end_tiles - 1 - i + sink)
    else:
        rest = i - diagonals - sink
        return gl.where(i < diagonals, end_diagonal - 1 - i, gl.where(rest < 0, 0, end_tiles - 1 - rest))


@gluon.jit
def entry_after(entries_ptr, i, stream):
    """The entry behind the i-th, if there is one: read one ahead, so that nothing waits for its own."""
    return gl.load(entries_ptr + gl.minimum(i + 1, stream - 1))


@gluon.jit
def producer(
    q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, empty,
    b, head, kv_head, first_row, k_offset, entries_ptr, stream, diagonals, sink, end_diagonal, end_tiles,
    CAUSAL: gl.constexpr, LISTS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    if stream > 0:
        mbarrier.expect(q_full, CONSUMERS * q_desc.block_type.nbytes)
        for w in gl.static_range(CONSUMERS):
            tma_load(q_desc, [b, head, first_row + w * ROWS, 0], q_full, q_bufs.index(w))
    if LISTS:
        following = gl.load(entries_ptr)
    for i in range(stream):
        if LISTS:
            tile = following >> 2 * CONSUMERS
            following = entry_after(entries_ptr, i, stream)
        else:
            tile = stream_tile(i, diagonals, sink, end_diagonal, end_tiles, CAUSAL)
        row = tile * KEYS - k_offset
        # Consumers release a tile's K and V together, on barrier i % K_STAGES; V needs the tile V_STAGES before.
        slot = i % K_STAGES
        mbarrier.wait(empty.index(slot), (i // K_STAGES & 1) ^ 1)
        mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
        tma_load(k_desc, [b, kv_head, row, 0], k_full.index(slot), k_bufs.index(slot))
        freed = i + K_STAGES - V_STAGES
        slot = i % V_STAGES
        mbarrier.wait(empty.index(freed % K_STAGES), (freed // K_STAGES & 1) ^ 1)
        mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
        tma_load(v_desc, [b, kv_head, row, 0], v_full.index(slot), v_bufs.index(slot))


@gluon.jit
def either(a, b):
    return a | b


@gluon.jit
def larger(a, b):
    """The larger number; NaN where one is NaN, so that no gate hides it."""
    return gl.maximum(a, b, propagate_nan=PROPAGATE_NAN)


@gluon.jit
def held_whole(query_tile, q_first, q_length, q_rows):
    """Whether gates judge the query tile; see reference.Span.whole."""
    first = query_tile * ROWS
    return (q_rows >= ROWS) & (q_first <= first) & (gl.minimum(first + ROWS, q_length) <= q_first + q_rows)


@gluon.jit
def per_thread(s, partial: gl.constexpr, SUM: gl.constexpr):
    """Largest value (or sum) among each thread's own columns of every row: [ROWS, 4], without a shuffle."""
    s = s.reshape([ROWS, KEYS // 8, 4, 2])
    if SUM:
        return gl.convert_layout(gl.sum(gl.sum(s, 3), 1), partial, assert_trivial=True)
    else:
        return gl.convert_layout(gl.reduce(gl.reduce(s, 3, larger), 1, larger), partial, assert_trivial=True)


@gluon.jit
def scores(q, k_bufs, slot, D: gl.constexpr):
    """Unscaled scores of one tile in float32."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    k = k_bufs.index(slot).reshape([KEYS, D])
    zeros = gl.full([ROWS, KEYS], 0.0, gl.float32, s_layout)
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[s])


@gluon.jit
def vote(largest, valid, running_max, scale, absolute, gap, ballot, ABSOLUTE: gl.constexpr, GAP: gl.constexpr):
    """Whether the tile passes its gates: each warp says which gates one of its rows passes, then all read all four."""
    passes = True
    if ABSOLUTE or GAP:
        votes = gl.full(largest.shape, 0, gl.int32, largest.type.layout)
        if ABSOLUTE:
            votes = gl.where(largest * scale < absolute, 0, 1)
        if GAP:
            votes |= gl.where(largest * (scale * LOG2E) - running_max[:, None] < gap, 0, 2)
        votes = gl.where(valid[:, None], votes, 0)
        ballot.store(gl.reduce(votes.reshape([4, ROWS]), 1, either))
        everyone: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        passes = gl.reduce(ballot.load(everyone), 0, either) == (1 if ABSOLUTE else 0) + (2 if GAP else 0)
    return passes


@gluon.jit
def cap_scores(s, scale, softcap):
    """softcap * tanh(scale * s / softcap), in natural units; what is masked stays so."""
    x = gl.exp2(s * (scale / softcap * (-2 * LOG2E)))
    return gl.where(s == -float("inf"), s, softcap * (2 / (1 + x) - 1))


@gluon.jit
def accumulate(
    s, largest, acc, running_max, row_sum, v_bufs, slot, scale_log2, D: gl.constexpr, WINDOWED: gl.constexpr
):
    """One tile joins the softmax; maxima in log2 units, sums per thread."""
    o_layout: gl.constexpr = acc.type.layout
    s_rows: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    partial: gl.constexpr = largest.type.layout
    new_max = larger(running_max, gl.reduce(largest, 1, larger) * scale_log2)
    shift = new_max
    if WINDOWED:  # a row whose window begins behind this tile may have seen nothing yet, and has nothing to subtract
        shift = gl.where(new_max == -float("inf"), 0.0, new_max)
    p = gl.exp2(s * scale_log2 - gl.convert_layout(shift, s_rows, assert_trivial=True)[:, None])
    alpha = gl.exp2(running_max - shift)
    row_sum = row_sum * alpha[:, None] + per_thread(p, partial, True)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout), assert_trivial=True)[:, None]
    p = gl.convert_layout(p.to(v_bufs.dtype), gl.DotOperandLayout(0, o_layout, 2))
    acc = warpgroup_mma(p, v_bufs.index(slot).reshape([KEYS, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    return acc, new_max, row_sum


@gluon.jit
def consumer(
    WG: gl.constexpr, shared, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr,
    ABSOLUTE: gl.constexpr, GAP: gl.constexpr, LISTS: gl.constexpr, WINDOWED: gl.constexpr, CAPPED: gl.constexpr,
    SINKS: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    (
        q_bufs, k_bufs, v_bufs, ballots, q_full, k_full, v_full, empty,
        out_ptr, lse_ptr, kept_ptr, candidates_ptr, absolute_ptr, gap_ptr, sinks_ptr,
        sequence_head, block_tile, t, q_first, length, q_length, q_rows, tiles, absolute_tiles, gap_tiles, scale,
        softcap, window, entries_ptr, stream, diagonals, sink, end_diagonal, end_tiles,
    ) = shared  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    # What one thread holds of a row: 4 threads share it.
    partial: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [ROWS.value, 4]
    )
    rows: gl.constexpr = gl.SliceLayout(1, partial)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = q_bufs.dtype

    query_tile = block_tile + WG
    alive = query_tile * ROWS < gl.minimum(q_length, q_first + q_rows)
    # Rows of this tile that are no padding.
    first_valid = q_first - query_tile * ROWS
    end_valid = gl.minimum(q_rows + q_first, q_length) - query_tile * ROWS
    row = gl.arange(0, ROWS, layout=rows)
    valid = (row >= first_valid) & (row < end_valid)
    own = gl.minimum(query_tile * ROWS // KEYS, (length - 1) // KEYS)  # this consumer's diagonal key tile
    own_first = 0  # the first key tile in its window
    end_candidate = stream
    edge_at = stream  # from here on tiles reach over the left edge of the window
    if WINDOWED:
        own_first = gl.minimum(gl.maximum(query_tile * ROWS - window + 1, 0) // KEYS, own)
        end_candidate = end_tiles - own_first + sink
        edge_at = end_tiles - 1 + sink - gl.maximum((query_tile + 1) * ROWS - 1 - window, 0) // KEYS
    # Positions in the stream: own_at and sink_at are forced, from first_candidate on the gates decide (but not again).
    if CAUSAL:
        own_at = end_tiles - 1 - own + sink
        sink_at = gl.where(own_first == 0, sink - 1, -1) if WINDOWED else sink - 1
        first_candidate = own_at + 1
        again = -1
        if (sink == 1) & (own == 0):
            own_at = 0
            first_candidate = stream
    else:
        own_at = end_diagonal - 1 - own
        sink_at = gl.where((sink == 1) & (own > 0), diagonals, -1)
        first_candidate = diagonals + sink
        again = diagonals + sink + end_tiles - 1 - own
    if not alive:
        own_at = -1
        sink_at = -1
        first_candidate = stream
    head = sequence_head % HEADS
    whole = held_whole(query_tile, q_first, q_length, q_rows)
    absolute = -float("inf")
    gap = -float("inf")
    if ABSOLUTE:
        absolute = gl.load(absolute_ptr + head * absolute_tiles + gl.minimum(query_tile, absolute_tiles - 1))
        absolute = gl.where(whole, absolute, -float("inf"))
    if GAP:
        gap = gl.load(gap_ptr + head * gap_tiles + gl.minimum(query_tile, gap_tiles - 1)) * LOG2E
        gap = gl.where(whole, gap, -float("inf"))

    running_max = gl.full([ROWS], -float("inf"), gl.float32, rows)  # log2 units
    row_sum = gl.full([ROWS, 4], 0.0, gl.float32, partial)
    acc = gl.full([ROWS, D], 0.0, gl.float32, o_layout)
    kept = gl.where(whole, 0, UNCOUNTED)  # forced tiles too; a flag of its own would be one more register
    q = q_bufs.index(WG).reshape([ROWS, D])
    if stream > 0:
        mbarrier.wait(q_full, 0)
    if LISTS:
        following = gl.load(entries_ptr)
    for i in range(stream):
        slot = i % K_STAGES
        v_slot = i % V_STAGES
        v_parity = i // V_STAGES & 1
        if LISTS:
            tile = following >> 2 * CONSUMERS
            forced = (following >> CONSUMERS + WG & 1) == 1
            candidate = (following >> WG & 1) == 1
            masked = forced
        else:
            tile = stream_tile(i, diagonals, sink, end_diagonal, end_tiles, CAUSAL)
            forced = (i == own_at) | (i == sink_at)
            candidate = (i >= first_candidate) & (i != again)
            # A causal consumer masks all up to its diagonal tile: before it come the sink and what is not its own.
            masked = i <= own_at
            if WINDOWED:
                candidate = candidate & (i < end_candidate)
                masked = masked | (i >= edge_at)
        if LISTS and WINDOWED:
            masked = masked | (tile * KEYS <= (query_tile + 1) * ROWS - 1 - window)
        if not CAUSAL:
            masked = (tile + 1) * KEYS > length
        mbarrier.wait(k_full.index(slot), i // K_STAGES & 1)
        if not LISTS or forced | candidate:
            s = scores(q, k_bufs, slot, D)
            if LISTS:  # a load in flight holds up products that have not started
                following = entry_after(entries_ptr, i, stream)
            if masked:
                key = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, s_layout))
                last = length - 1
                if CAUSAL:
                    last = gl.minimum(query_tile * ROWS + gl.arange(0, ROWS, layout=s_rows), last)[:, None]
                visible = key[None, :] <= last
                if WINDOWED:
                    before = query_tile * ROWS + gl.arange(0, ROWS, layout=s_rows) - window
                    visible = visible & (key[None, :] > before[:, None])
                s = gl.where(visible, s, -float("inf"))
            largest = per_thread(s, partial, False)
            unit = scale
            if CAPPED:
                largest = cap_scores(largest, scale, softcap)
                unit = 1.0
            passes = vote(largest, valid, running_max, unit, absolute, gap, ballots.index(WG), ABSOLUTE, GAP)
            mbarrier.wait(v_full.index(v_slot), v_parity)
            if forced | (candidate & passes):
                if CAPPED:
                    s = cap_scores(s, scale, softcap)
                acc, running_max, row_sum = accumulate(
                    s, largest, acc, running_max, row_sum, v_bufs, v_slot, unit * LOG2E, D, WINDOWED
                )
                kept += 1
        else:
            following = entry_after(entries_ptr, i, stream)
            mbarrier.wait(v_full.index(v_slot), v_parity)
        mbarrier.arrive(empty.index(slot), count=1)

    plane = sequence_head.to(gl.int64)
    if alive & (stream > 0):
        # By way of Q's buffer, so that a thread stores 16 bytes at a time. Not by TMA: a store whose tile starts before
        # the tensor (an unaligned chunk) is an illegal instruction.
        total = gl.sum(row_sum, 1)
        inverse = 1.0 / total
        if WINDOWED:
            inverse = gl.where(total > 0, inverse, 0.0)
        if SINKS:
            logit = gl.load(sinks_ptr + head) * LOG2E
            new_max = gl.maximum(running_max, logit)
            alpha = gl.exp2(running_max - new_max)
            total = total * alpha + gl.exp2(logit - new_max)
            inverse = alpha / total
            running_max = new_max
        q.store((acc * gl.convert_layout(inverse, o_rows)[:, None]).to(dtype))
        wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
        column = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
        written = (o_row >= first_valid) & (o_row < end_valid)
        first_row = plane * q_rows + query_tile * ROWS - q_first
        # A partition does not know how its pointers are aligned.
        address = gl.multiple_of(out_ptr + first_row * HEAD_DIM, 16) + o_row[:, None] * HEAD_DIM + column[None, :]
        gl.store(address, q.load(wide), mask=written[:, None] & (column < HEAD_DIM)[None, :])
        row = gl.arange(0, ROWS, layout=rows)
        valid = (row >= first_valid) & (row < end_valid)
        gl.store(lse_ptr + first_row + row, (running_max + gl.log2(total)) / LOG2E, mask=valid)
        forced_tiles = gl.where((sink == 1) & (own > 0) & (own_first == 0), 2, 1)
        counted = kept >= 0
        gl.store(kept_ptr + plane * tiles + t + WG, gl.where(counted, kept - forced_tiles, 0))
        if not LISTS:
            visible_tiles = own + 1 - own_first
            if not CAUSAL:
                visible_tiles = end_tiles
            gl.store(candidates_ptr + plane * tiles + t + WG, gl.where(counted, visible_tiles - forced_tiles, 0))


@gluon.jit(do_not_specialize=["q_offset", "q_rows", "k_rows", "tiles", "absolute_tiles", "gap_tiles", "room", "window"])
def _forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, kept_ptr, candidates_ptr, absolute_ptr, gap_ptr, spans_ptr,
    entries_ptr, lengths_ptr, order_ptr, sinks_ptr,
    scale, softcap, window, q_offset, q_rows, k_rows, tiles, absolute_tiles, gap_tiles, room,
    SECTION: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, D: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, KEEP_SINK: gl.constexpr, WINDOWED: gl.constexpr, CAPPED: gl.constexpr,
    ABSOLUTE: gl.constexpr, GAP: gl.constexpr, SPANS: gl.constexpr, LISTS: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    # Of every section, longest first.
    blocks = gl.num_programs(1)
    sequence_head = gl.program_id(2) * SECTION
    if LISTS:
        place = (gl.program_id(2) * blocks + gl.program_id(1)) * SECTION + gl.program_id(0)
        work = gl.load(order_ptr + place).to(gl.int32)  # in its section
        sequence_head += work // blocks
        block = work % blocks
        stream_row = sequence_head * blocks + block
        entries_ptr += stream_row.to(gl.int64) * room
    else:
        sequence_head += gl.program_id(0)
        block = blocks - 1 - gl.program_id(1)
    t = block * CONSUMERS
    b = sequence_head // HEADS
    head = sequence_head % HEADS
    kv_head = head // GROUP
    if not SPANS:
        q_first = q_offset
        k_offset = 0
        length = k_rows
        q_length = UNBOUNDED_POSITION
    else:
        q_first = gl.load(spans_ptr + b * 4)
        k_offset = gl.load(spans_ptr + b * 4 + 1)
        length = gl.minimum(gl.load(spans_ptr + b * 4 + 2), k_offset + k_rows)
        q_length = gl.load(spans_ptr + b * 4 + 3)
    block_tile = gl.maximum(q_first, 0) // ROWS + t
    end_row = gl.minimum(q_length, q_first + q_rows)
    last = (length - 1) // KEYS
    first_diagonal = gl.minimum(block_tile * ROWS // KEYS, last)
    end_diagonal = gl.minimum((gl.minimum((block_tile + CONSUMERS) * ROWS, end_row) - 1) // KEYS, last) + 1
    end_tiles = end_diagonal
    diagonals = 0
    if not CAUSAL:
        end_tiles = last + 1
        diagonals = end_diagonal - first_diagonal
    first_tile = 0
    if WINDOWED:
        first_tile = gl.minimum(gl.maximum(block_tile * ROWS - window + 1, 0) // KEYS, first_diagonal)
    sink = 0
    if KEEP_SINK:
        sink = gl.where((end_tiles > 1) & (first_tile == 0), 1, 0)
    stream = end_tiles - first_tile + diagonals
    if (length <= 0) | (gl.maximum(block_tile * ROWS, q_first) >= end_row):
        stream = 0
    elif LISTS:
        stream = gl.load(lengths_ptr + stream_row)

    dtype: gl.constexpr = q_desc.dtype
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [K_STAGES, 1, 1, KEYS, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [V_STAGES, 1, 1, KEYS, D], v_desc.layout)
    ballots = gl.allocate_shared_memory(gl.int32, [CONSUMERS, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], bars)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], bars)
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    for stage in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(stage), count=1)
    fence_async_shared()
    shared = (
        q_bufs, k_bufs, v_bufs, ballots, q_full, k_full, v_full, empty,
        out_ptr, lse_ptr, kept_ptr, candidates_ptr, absolute_ptr, gap_ptr, sinks_ptr,
        sequence_head, block_tile, t, q_first, length, q_length, q_rows, tiles, absolute_tiles, gap_tiles, scale,
        softcap, window, entries_ptr, stream, diagonals, sink, end_diagonal, end_tiles,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consumer, (
                0, shared, HEADS, HEAD_DIM, D, CAUSAL, ABSOLUTE, GAP, LISTS, WINDOWED, CAPPED, SINKS, K_STAGES,
                V_STAGES,
            )),
            (consumer, (
                1, shared, HEADS, HEAD_DIM, D, CAUSAL, ABSOLUTE, GAP, LISTS, WINDOWED, CAPPED, SINKS, K_STAGES,
                V_STAGES,
            )),
            (consumer, (
                2, shared, HEADS, HEAD_DIM, D, CAUSAL, ABSOLUTE, GAP, LISTS, WINDOWED, CAPPED, SINKS, K_STAGES,
                V_STAGES,
            )),
            (producer, (
                q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, empty,
                b, head, kv_head, block_tile * ROWS - q_first, k_offset, entries_ptr, stream, diagonals, sink,
                end_diagonal, end_tiles, CAUSAL, LISTS, K_STAGES, V_STAGES,
            )),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
