"""The triton backend: one Triton kernel for any NVIDIA GPU, and for Triton's interpreter on the CPU.

One program computes one query tile of one head. Forced tiles come first (which also keeps the masked code ahead of
the main loop: ptxas serializes wgmma when it follows), then the candidates from right to left. A dropped tile costs
its QK product and a vote. V is loaded after the vote: Triton pipelines no load whose only use is inside a branch, so
that loading it earlier would merely wait for tiles that are dropped. With block lists a program walks its query
tile's stream of candidates (schedule.py). With int8 scores Q and K are as int8.py makes them, and a tile's integers
become float32 scores right behind their product: all else is the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .geometry import candidate, load_span, query_rows, visited
from .int8 import prepare
from .launch import FLOAT32_DOT, INTERPRETED, aligned, device_guard, interpreted, wide_products
from .request import SCORES as SCORES
from .request import Request
from .schedule import schedule

LOG2E = tl.constexpr(1.4426950408889634)
MAX_HEAD_DIM = 256
TILE_SIZES = (16, 32, 64, 128)
MAX_GRID_Y = 65_535  # CUDA's limit, of the z axis too
WIDE_BYTES = 112 * 1024  # shared memory of 64x128 tiles at head dim 256; sm_86 and sm_89 give a program 99 KB


def unreachable(request: Request) -> str | None:
    """Why Triton's kernels cannot take the tensors of a call, whatever it asks for."""
    q = request.q
    dtypes = (torch.float16, torch.float32) if interpreted() else (torch.float16, torch.bfloat16, torch.float32)
    if interpreted():
        if q.device.type != "cpu":
            return "Triton's interpreter is on (TRITON_INTERPRET=1) and the tensors are not on the CPU"
    elif q.device.type != "cuda":
        return f"tensors are on {q.device.type}; the Triton kernel needs a CUDA device"
    if q.dtype not in dtypes:
        return f"{q.dtype} is not one of {', '.join(str(d) for d in dtypes)}"
    for head_dim in (q.shape[3], request.v.shape[3]):
        if head_dim % 8 or head_dim > MAX_HEAD_DIM:
            return f"head dim {head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    if q.dtype == torch.float32 and q.shape[3] > 128 and not interpreted():
        return "float32 with head dims above 128 does not fit in shared memory"
    return None


def unsupported(request: Request) -> str | None:
    q, reason = request.q, unreachable(request)
    if reason is not None:
        return reason
    if request.tile.rows not in TILE_SIZES or request.tile.keys not in TILE_SIZES:
        return f"tile {request.tile}: both sides must be one of {', '.join(map(str, TILE_SIZES))}"
    if q.shape[3] > 128 and request.tile.keys >= 128 and not interpreted():
        room = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
        if room < WIDE_BYTES:
            return (
                f"head dim {q.shape[3]} with {request.tile} tiles needs {WIDE_BYTES} bytes of shared memory, not {room}"
            )
    if request.scores == "int8" and not interpreted():
        if q.dtype == torch.float32:
            return "int8 scores are for float16 and bfloat16"
        if torch.cuda.get_device_capability(q.device) < (8, 0):
            return (
                f"{torch.cuda.get_device_name(q.device)} has no int8 tensor cores that Triton uses (8.0 and newer have)"
            )
    if request.query_tiles > MAX_GRID_Y:
        return f"{request.query_tiles:,} query tiles are more than a launch can have ({MAX_GRID_Y:,})"
    return None


def reads_pages(request: Request) -> bool:
    return request.pages_are_tiles


def attention(request: Request):
    q, k, q_scale, k_scale, q_shift = operands(request)
    v = aligned(request.v)
    batch, (heads, q_rows, head_dim) = request.batch, request.q.shape[1:]
    tiles, gate = request.query_tiles, request.gate.map(torch.Tensor.contiguous)
    out, lse, kept, candidates = request.new_outputs()
    block_d, block_v = columns(head_dim, q.dtype), columns(v.shape[3], v.dtype)
    rows, keys = request.tile.rows, request.tile.keys
    with device_guard(q):
        entries = lengths = None
        if request.blocks is not None:
            entries, lengths, candidates = schedule(request, width=1, forced=False)
        _forward[(batch * heads, tiles)](
            TensorDescriptor.from_tensor(q, [1, 1, rows, block_d]),
            TensorDescriptor.from_tensor(k, [1, 1, keys, block_d]),
            TensorDescriptor.from_tensor(v, [1, 1, keys, block_v]),
            out, lse, kept, candidates, gate.absolute, gate.gap, request.spans, entries, lengths, request.block_table,
            request.packed, request.sinks, q_scale, k_scale, q_shift, request.scale, request.softcap or 0.0,
            request.window or 0, request.q_offset, q_rows, request.k_rows, tiles,
            0 if k_scale is None else k_scale.shape[2], *out.stride()[:3],
            *(0 if thresholds is None else thresholds.shape[1] for thresholds in (gate.absolute, gate.gap)),
            0 if entries is None else entries.shape[2],
            0 if request.block_table is None else request.block_table.stride(0),
            HEADS=heads, GROUP=heads // k.shape[1], D=v.shape[3], BLOCK_D=block_d, BLOCK_V=block_v, ROWS=rows,
            KEYS=keys, CAUSAL=request.causal, KEEP_SINK=request.keep_sink, WINDOWED=request.window is not None,
            CAPPED=request.softcap is not None, **launch_shape(v.dtype, head_dim, rows, wide_products(q.device)),
        )  # fmt: skip
    return out, lse, kept, candidates


def operands(request: Request):
    """(q, k, and of int8 scores q_scale, k_scale and q_shift, see quantise.Prepared), fit for tensor descriptors."""
    if request.scores == "exact":
        return aligned(request.q), aligned(request.k), None, None, None
    prepared = prepare(request)
    return prepared.q8, prepared.k8, prepared.q_scale, prepared.k_scale, prepared.q_shift


def columns(head_dim: int, dtype: torch.dtype) -> int:
    """Of a tile of Q and K in `dtype`, and of V; descriptors fill what is more than the head dim with zeros."""
    return max(16, 32 // dtype.itemsize, triton.next_power_of_2(head_dim))


def launch_shape(dtype: torch.dtype, head_dim: int, rows: int, wide: bool) -> dict:
    """Warps, pipeline stages and register cap of one launch.

    Several programs have to share a multiprocessor: one's products hide another's softmax and vote. The caps buy that
    with a few spills (measured on an H200 at 32k tokens, see NOTES.md). Where products are not `wide`, it would be
    kilobytes of them.
    """
    if dtype == torch.float32 or head_dim > 128:
        return dict(num_warps=8, num_stages=1)
    if not wide:
        return dict(num_warps=8, num_stages=2)
    if rows >= 128:
        return dict(num_warps=8, num_stages=2, maxnreg=128)
    return dict(num_warps=4, num_stages=1, maxnreg=168)


@triton.jit
def larger(a, b):
    """The larger number; NaN where one is NaN, so that no gate hides it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr):
    if INTERPRETED:  # it takes functions of ours one element at a time, and only this of its own hands NaN on
        return tl.max(x, axis, return_indices=True)[0]
    else:
        return tl.reduce(x, axis, larger)


@triton.jit
def load_threshold(thresholds_ptr, head, query_tile, tiles, whole):
    """A head's threshold at a query tile, past the last one the last; -inf where the gates do not judge the tile."""
    threshold = tl.load(thresholds_ptr + head * tiles + tl.minimum(query_tile, tiles - 1))
    return tl.where(whole, threshold, float("-inf"))


@triton.jit
def load_rows(x_ptr, plane, q_rows, rows, valid):
    """float32 [ROWS] of a tensor [B, Hq, Tq]."""
    return tl.load(x_ptr + plane * q_rows + rows, mask=valid, other=0.0)


@triton.jit
def load_key_scale(k_scale_ptr, j, k_offset, KEYS: tl.constexpr, WINDOWED: tl.constexpr):
    """Key tile j's scale among a KV head's; that of the first tile that has one (quantise.first_key_tile) for those in
    front, which a sliding cache no longer holds: with a window a query tile may visit them, all their keys masked.
    """
    index = j - tl.maximum(k_offset, 0) // KEYS
    if WINDOWED:
        index = tl.maximum(index, 0)
    return tl.load(k_scale_ptr + index)


@triton.jit
def find_tile(table_ptr, b, j, k_offset, KEYS: tl.constexpr):
    """Where key tile j of sequence b lies in K and V: (sequence or page, position of the first row there)."""
    if table_ptr is None:
        return b, k_offset
    else:
        return tl.load(table_ptr + j), j * KEYS


@triton.jit
def tile_scores(
    q, q_scale, q_shift, k_desc, k_scale_ptr, b, kv_head, j, k_offset,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Scores of key tile j before `scale`, in float32. Those of int8 are the only ones with a q_scale."""
    k = k_desc.load([b, kv_head, j * KEYS - k_offset, 0]).reshape([KEYS, BLOCK_D])
    if q_scale is None:
        return tl.dot(q, k.T, input_precision=FLOAT32_DOT)
    else:
        s = tl.dot(q, k.T, out_dtype=tl.int32).to(tl.float32)
        s *= (q_scale * load_key_scale(k_scale_ptr, j, k_offset, KEYS, WINDOWED))[:, None]
        if q_shift is not None:
            s += q_shift[:, None]
        return s


@triton.jit
def tile_values(v_desc, b, kv_head, row, j, length, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """One tile of V. Rows past the tensor are zero; padding inside it may hold anything, and 0 * NaN is NaN: MASKED
    zeroes it.
    """
    v = v_desc.load([b, kv_head, row, 0]).reshape([KEYS, BLOCK_V])
    if MASKED:
        v = tl.where((j * KEYS + tl.arange(0, KEYS) < length)[:, None], v, 0.0)
    return v


@triton.jit
def mask_tile(
    s, q_position, first_key, length, window, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """-inf (a large finite number would not survive the fused multiply-add) where a row may not look."""
    key = first_key + tl.arange(0, KEYS)
    last = length - 1
    if CAUSAL:
        last = tl.minimum(q_position, last)[:, None]
    visible = key[None, :] <= last
    if WINDOWED:
        visible = visible & (key[None, :] > (q_position - window)[:, None])
    return tl.where(visible, s, float("-inf"))


@triton.jit
def cap_scores(s, scale, softcap):
    """softcap * tanh(scale * s / softcap), in natural units; what is masked stays so."""
    x = tl.exp2(s * (scale / softcap * (-2 * LOG2E)))
    return tl.where(s == float("-inf"), s, softcap * (2 / (1 + x) - 1))


@triton.jit
def online_softmax_update(s, row_max, v, running_max, row_sum, acc, scale_log2):
    """One tile joins the softmax; maxima in log2 units."""
    new_max = larger(running_max, row_max * scale_log2)
    # A row that has seen nothing yet, as the edge of a window leaves some, has no maximum to subtract.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(s * scale_log2 - shift[:, None])
    alpha = tl.exp2(running_max - shift)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=FLOAT32_DOT)
    return new_max, row_sum, acc


@triton.jit
def visit_candidate(
    q, q_scale, q_shift, k_desc, k_scale_ptr, v_desc, table_ptr, b, kv_head, j, k_offset, length, q_position, valid,
    scale, softcap, window, absolute, gap, running_max, row_sum, acc, kept,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, MASK_V: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One candidate: its QK product, its vote, and PV if it is kept. A gate that is None lets every tile pass."""
    b, k_offset = find_tile(table_ptr, b, j, k_offset, KEYS)
    row = j * KEYS - k_offset
    s = tile_scores(q, q_scale, q_shift, k_desc, k_scale_ptr, b, kv_head, j, k_offset, BLOCK_D, KEYS, WINDOWED)
    if WINDOWED:  # the left edge
        s = mask_tile(s, q_position, j * KEYS, length, window, KEYS, CAUSAL, True)
    elif not CAUSAL:  # left of the diagonal every key is visible; right of it lies the sequence's tail
        s = mask_tile(s, q_position, j * KEYS, length, window, KEYS, False, False)
    row_max = largest(s, 1)
    unit = scale
    if CAPPED:
        row_max = cap_scores(row_max, scale, softcap)
        unit = 1.0
    keep = True
    if (absolute is not None) or (gap is not None):
        vote = tl.where(valid, row_max, float("-inf"))
        if absolute is not None:
            keep = not (largest(vote, 0) * unit < absolute)
        if gap is not None:
            keep = keep & (not (largest(vote * (unit * LOG2E) - running_max, 0) < gap))
        if keep:
            v = tile_values(v_desc, b, kv_head, row, j, length, BLOCK_V, KEYS, MASK_V and not CAUSAL)
            if CAPPED:
                s = cap_scores(s, scale, softcap)
            running_max, row_sum, acc = online_softmax_update(s, row_max, v, running_max, row_sum, acc, unit * LOG2E)
            kept += 1
    else:
        v = tile_values(v_desc, b, kv_head, row, j, length, BLOCK_V, KEYS, MASK_V and not CAUSAL)
        if CAPPED:
            s = cap_scores(s, scale, softcap)
        running_max, row_sum, acc = online_softmax_update(s, row_max, v, running_max, row_sum, acc, unit * LOG2E)
        kept += 1
    return running_max, row_sum, acc, kept


@triton.jit(
    do_not_specialize=[
        "q_offset",
        "q_rows",
        "k_rows",
        "tiles",
        "k_scales",
        "absolute_tiles",
        "gap_tiles",
        "room",
        "table_row",
        "window",
    ]
)
def _forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, kept_ptr, candidates_ptr, absolute_ptr, gap_ptr, spans_ptr,
    entries_ptr, lengths_ptr, table_ptr, packed_ptr, sinks_ptr, q_scale_ptr, k_scale_ptr, q_shift_ptr,
    scale, softcap, window, q_offset, q_rows, k_rows, tiles, k_scales, out_batch, out_head, out_row, absolute_tiles,
    gap_tiles, room, table_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, KEEP_SINK: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    kv_head = head // GROUP
    t = tl.num_programs(1) - 1 - tl.program_id(1)  # longest first
    q_first, k_offset, length, q_length = load_span(spans_ptr, b, q_offset, k_rows)
    sequence_rows = q_rows
    if packed_ptr is not None:
        sequence_rows = tl.load(packed_ptr + b * 2 + 1)
    query_tile, first_row, rows, q_position, valid, inhabited, whole = query_rows(
        t, q_first, length, q_length, sequence_rows, ROWS
    )
    if not inhabited:
        return

    unit = scale
    if CAPPED:
        unit = 1.0
    plane = tl.program_id(0).to(tl.int64)
    q_plane, q_batch = plane, b
    if packed_ptr is not None:
        q_plane, q_batch = head.to(tl.int64), 0
        own = tl.load(packed_ptr + b * 2)
        first_row += own
        rows += own
    q = q_desc.load([q_batch, head, first_row, 0]).reshape([ROWS, BLOCK_D])
    q_scale, q_shift = None, None  # not from functions: in Triton 3.6 none of those can return None
    if q_scale_ptr is not None:
        q_scale = load_rows(q_scale_ptr, plane, q_rows, rows, valid)
        k_scale_ptr += plane // GROUP * k_scales
    if q_shift_ptr is not None:
        q_shift = load_rows(q_shift_ptr, plane, q_rows, rows, valid)
    if table_ptr is not None:
        table_ptr += b.to(tl.int64) * table_row
    PADDED: tl.constexpr = (spans_ptr is not None) or (table_ptr is not None)
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)

    # Ascending, so that the first tile already shows every row a key and no maximum stays at -inf.
    first_diagonal, end_diagonal, sink, first_tile, end_tiles = visited(
        query_tile, length, window, ROWS, KEYS, CAUSAL, KEEP_SINK, WINDOWED
    )
    diagonals = end_diagonal - first_diagonal
    for i in tl.range(0, diagonals + sink, num_stages=1):  # shared memory is for the main loop's stages
        j = tl.where(i < diagonals, first_diagonal + i, 0)
        page, offset = find_tile(table_ptr, b, j, k_offset, KEYS)
        s = tile_scores(q, q_scale, q_shift, k_desc, k_scale_ptr, page, kv_head, j, offset, BLOCK_D, KEYS, WINDOWED)
        v = tile_values(v_desc, page, kv_head, j * KEYS - offset, j, length, BLOCK_V, KEYS, PADDED)
        s = mask_tile(s, q_position, j * KEYS, length, window, KEYS, CAUSAL, WINDOWED)
        if CAPPED:
            s = cap_scores(s, scale, softcap)
        row_max = largest(s, 1)
        running_max, row_sum, acc = online_softmax_update(s, row_max, v, running_max, row_sum, acc, unit * LOG2E)

    absolute = None
    if absolute_ptr is not None:
        absolute = load_threshold(absolute_ptr, head, query_tile, absolute_tiles, whole)
    gap = None
    if gap_ptr is not None:
        gap = load_threshold(gap_ptr, head, query_tile, gap_tiles, whole) * LOG2E
    kept = 0
    if entries_ptr is None:
        candidates = end_tiles - first_tile - diagonals - sink
        tl.store(candidates_ptr + plane * tiles + t, tl.where(whole, candidates, 0))
        for i in tl.range(0, candidates):
            j = candidate(i, end_tiles, first_diagonal, end_diagonal)
            running_max, row_sum, acc, kept = visit_candidate(
                q, q_scale, q_shift, k_desc, k_scale_ptr, v_desc, table_ptr, b, kv_head, j, k_offset, length,
                q_position, valid, scale, softcap, window, absolute, gap, running_max, row_sum, acc, kept, BLOCK_D,
                BLOCK_V, KEYS, CAUSAL, PADDED, WINDOWED, CAPPED,
            )  # fmt: skip
    else:
        entries_ptr += (plane * tiles + t) * room
        count = tl.load(lengths_ptr + plane * tiles + t)
        following = tl.load(entries_ptr, mask=count > 0, other=0)
        for i in tl.range(0, count):
            j = following >> 2  # the lowest bits say forced and candidate
            # Read one ahead, so that no product waits for its own index.
            following = tl.load(entries_ptr + i + 1, mask=i + 1 < count, other=0)
            running_max, row_sum, acc, kept = visit_candidate(
                q, q_scale, q_shift, k_desc, k_scale_ptr, v_desc, table_ptr, b, kv_head, j, k_offset, length,
                q_position, valid, scale, softcap, window, absolute, gap, running_max, row_sum, acc, kept, BLOCK_D,
                BLOCK_V, KEYS, CAUSAL, PADDED, WINDOWED, CAPPED,
            )  # fmt: skip

    if sinks_ptr is not None:
        sink_logit = tl.load(sinks_ptr + head) * LOG2E
        new_max = tl.maximum(running_max, sink_logit)
        alpha = tl.exp2(running_max - new_max)
        row_sum = row_sum * alpha + tl.exp2(sink_logit - new_max)
        acc = acc * alpha[:, None]
        running_max = new_max
    acc = acc * tl.where(row_sum > 0, 1.0 / row_sum, 0.0)[:, None]
    row_in_plane = q_plane * q_rows + rows
    columns = tl.arange(0, BLOCK_V)
    inside = valid[:, None] & (columns < D)[None, :]
    if packed_ptr is None:
        out_ptr += b.to(tl.int64) * out_batch
    out_ptr += head.to(tl.int64) * out_head
    address = out_ptr + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
    tl.store(address, acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + row_in_plane, (running_max + tl.log2(row_sum)) / LOG2E, mask=valid)
    tl.store(kept_ptr + plane * tiles + t, tl.where(whole, kept, 0))
