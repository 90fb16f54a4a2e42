"""block_sparse_attention() and tile_statistics(): validate, dispatch, return.

    from bsfa_kernels import Gate, block_sparse_attention
    result = block_sparse_attention(q, k, v, Gate(gap=-4.0), causal=True, return_counts=True)
    result.out, result.kept.sum() / result.candidates.sum()

Semantics: reference.py. Registered with torch.library as bsfa::attend, bsfa::attend_into and
bsfa::tile_statistics, so torch.compile and fake tensors see through them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from . import backends
from .blocks import BlockLists
from .gates import Gate
from .packed import Packed
from .request import SCORES, Request, query_tiles
from .tiles import TileShape

OPEN = Gate()


class Attention(NamedTuple):
    """`kept` and `candidates` count tiles a gate may drop; forced tiles (diagonal, sink, and all of a query tile that
    the call does not hold whole) are in neither.
    """

    out: torch.Tensor  # [B, Hq, Tq, D], the dtype of q; `out` where it was given
    lse: torch.Tensor | None  # float32 [B, Hq, Tq], natural log, -inf where a query saw nothing
    kept: torch.Tensor | None  # int32 [B, Hq, query tiles]
    candidates: torch.Tensor | None  # int32 [B, Hq, query tiles]


class TileStatistics(NamedTuple):
    """Per tile of the dense attention, float32 [B, Hq, query tiles, key tiles]."""

    maximum: torch.Tensor  # largest score, natural units; -inf where nothing is visible
    gap: torch.Tensor  # largest row_max - running_max in visiting order; +inf if no gate drops it, -inf if invisible
    mass_mean: torch.Tensor  # softmax mass in the tile, mean over the query tile's valid rows
    mass_worst: torch.Tensor  # the same, largest over those rows


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: Gate = OPEN,
    *,
    blocks: BlockLists | None = None,
    scale: float | None = None,
    causal: bool = True,
    q_offset: int = 0,
    spans: torch.Tensor | None = None,
    tile: TileShape = TileShape(),  # noqa: B008 - frozen
    keep_sink: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scores: str = "exact",
    return_lse: bool = False,
    return_counts: bool = False,
    backend: str = "auto",
    out: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    packed: Packed | None = None,
) -> Attention:
    """Exact scores, softmax and PV only for the tiles that `gate` keeps (BSFA, arXiv 2512.07011).

    q [B, Hq, Tq, D], k and v [B, Hkv, Tk, D], Hq a multiple of Hkv; float16, bfloat16, float32 or float64; any
    strides with a contiguous last axis. `scale` defaults to D ** -0.5. `q_offset` is the absolute position of query
    row 0 while key row 0 stands at 0; batches whose sequences differ give `spans` (see `make_spans`) instead.
    Gates judge query tiles that the call holds whole, by absolute position: of a first or last tile that lacks rows,
    and in a call of fewer than `tile.rows` rows, every tile is kept, but for a last tile behind whose rows the
    sequence ends, which only the lengths of `make_spans` can say.
    `keep_sink` exempts key tile 0 from the gate. `blocks` restricts each query tile to the key tiles on its list, and
    `gate` then judges only those; forced tiles (diagonal, sink) are visited whether listed or not. It holds one list
    per batch, query head and query tile: ceil((q_offset + Tq) / rows) - q_offset // rows tiles, with `spans`
    ceil(Tq / rows) + 1. `window`: a query sees its last `window` keys, its own included (causal only; tiles before it
    are not visited). `softcap` c: scores become c * tanh(scores / c). `sinks` [Hq]: attention sinks, one more logit a
    head in the softmax, of value 0. `scores`: "exact", or "int8", from Q and K rounded to 8 bits, so no longer BSFA's
    exact scores (quantise.py says how, and what of it depends on the call). `backend`: "auto" takes the fastest that
    can serve the call, a name demands that one. `out` [B, Hq, Tq, D], dtype of q: where the output goes, such as a view
    of an engine's [tokens, Hq, D]. Kernels write there by its strides; where it shares memory with q, k or v, or
    16-byte stores do not reach its rows, the output is copied there. Without it the output lies in memory as
    [B, Tq, Hq, D].

    `block_table` int32 [B, n]: k and v are pages [pages, Hkv, page, D] of a cache, and position p of sequence b is row
    p % page of page block_table[b, p // page]; every entry must be a page of the cache, and the k_offset of `spans` 0.
    Kernels read pages where they are if a page is a key tile (`tile.keys`), scores are exact, there are no `blocks`,
    and base and strides are multiples of 16 bytes; else K and V are gathered first.

    `packed` (see `pack`): several sequences in one launch, each as a call of its own would serve it. q and `out` are
    [1, Hq, tokens, D], rows of no sequence are left alone in `out`, zero without it; `block_table` has a row for each
    sequence, and so have the counts. Where pages cannot be read in place, sequences are served one by one, which waits
    for the device.

    Padding rows of k and v inside a tensor may hold any finite value: the Hopper kernel weighs them with 0, and 0 * NaN
    is NaN.

    Raises ValueError for arguments that do not fit together, BackendUnavailable when `backend` cannot serve them.
    """
    sequences, packed_rows = None, 0
    if packed is not None:
        _check_packed(packed, q, q_offset, spans, blocks, block_table)
        sequences, packed_rows, spans = packed.table, packed.rows, packed.spans
    _check(q, k, v, scale, q_offset, spans, block_table, q.shape[0] if packed is None else len(sequences))
    gate = gate.expanded(q.shape[1], q.device)
    _check_gate(q, gate)
    keys = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[2]
    _check_scoring(q, keys, causal, q_offset, spans, window, softcap, sinks, scores)
    if out is not None:
        _check_out(out, q, k, v)
    if blocks is not None:
        _check_blocks(blocks, q, q_offset, spans, tile)
    indices, counts = (None, None) if blocks is None else (blocks.indices, blocks.counts)
    call = (
        q, k, v, gate.absolute, gate.gap, spans, indices, counts, _sinks(sinks), q_offset, _scale(q, scale), window,
        softcap, causal, tile.rows, tile.keys, keep_sink, return_lse, return_counts, scores, backend, block_table,
        sequences, packed_rows,
    )  # fmt: skip
    if out is None:
        out, lse, kept, candidates = torch.ops.bsfa.attend(*call)
    else:
        lse, kept, candidates = torch.ops.bsfa.attend_into(out, *call)
    return Attention(
        out, lse if return_lse else None, kept if return_counts else None, candidates if return_counts else None
    )


def tile_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    q_offset: int = 0,
    spans: torch.Tensor | None = None,
    tile: TileShape = TileShape(),  # noqa: B008 - frozen
    keep_sink: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scores: str = "exact",
    backend: str = "auto",
) -> TileStatistics:
    """What each tile of the dense attention holds: all a threshold is ever chosen from.

    `lse` float32 [B, Hq, Tq] comes from `block_sparse_attention(..., return_lse=True)` with an open gate. Memory is
    the four results; scores are streamed. Other arguments and errors as in `block_sparse_attention`; attention sinks
    count by way of `lse`.
    """
    _check(q, k, k, scale, q_offset, spans)
    _check_scoring(q, k.shape[2], causal, q_offset, spans, window, softcap, None, scores)
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32:
        raise ValueError(f"lse must be float32 {list(q.shape[:3])}, got {lse.dtype} {list(lse.shape)}")
    return TileStatistics(
        *torch.ops.bsfa.tile_statistics(
            q,
            k,
            lse,
            spans,
            q_offset,
            _scale(q, scale),
            window,
            softcap,
            causal,
            tile.rows,
            tile.keys,
            keep_sink,
            scores,
            backend,
        )  # fmt: skip
    )


def explain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: Gate = OPEN, **options) -> tuple[str, dict]:
    """(backend that "auto" takes for this call, {faster backend: why it cannot})."""
    tile, spans = options.get("tile", TileShape()), options.get("spans")
    gate = gate.expanded(q.shape[1], q.device)
    request = Request(
        q, k, v, gate, _scale(q, options.get("scale")), options.get("causal", True), tile,
        options.get("keep_sink", True), options.get("q_offset", 0), spans, False, False,
        options.get("blocks"), options.get("window"), options.get("softcap"), options.get("sinks"),
        options.get("scores", "exact"), block_table=options.get("block_table"),
    )  # fmt: skip
    name, _, passed_over = backends.choose(request)
    return name, passed_over


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _check(q, k, v, scale, q_offset, spans, block_table=None, batch=None):
    batch = q.shape[0] if batch is None and q.dim() else batch
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 axes [batch, heads, length, head dim], got shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous along its last axis, got strides {list(x.stride())}")
    if not q.dtype.is_floating_point or q.dtype.itemsize < 2:
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {list(k.shape)} and {list(v.shape)}")
    if block_table is not None:
        _check_table(q, block_table, batch)
        if q.shape[3] != k.shape[3]:
            raise ValueError(f"q {list(q.shape)} and pages {list(k.shape)} must agree in head dim")
    elif q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must agree in batch size and head dim")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads ({q.shape[1]}) must be a multiple of key/value heads ({k.shape[1]})")
    if min(q.shape) < 1 or min(k.shape) < 1:
        raise ValueError(f"empty input: q {list(q.shape)}, k {list(k.shape)}")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if spans is None and q_offset < 0:
        raise ValueError(f"q_offset must not be negative, got {q_offset}; left padding is described by spans")
    if spans is not None:
        if q_offset:
            raise ValueError("give either q_offset or spans, not both")
        if spans.shape != (batch, 4) or spans.dtype != torch.int32 or spans.device != q.device:
            raise ValueError(
                f"spans must be int32 [{batch}, 4] on {q.device}, "
                f"got {spans.dtype} {list(spans.shape)} on {spans.device}"
            )


def _check_packed(packed, q, q_offset, spans, blocks, block_table):
    if q_offset or spans is not None:
        raise ValueError("packed sequences say where they stand: give neither q_offset nor spans")
    if block_table is None or blocks is not None:
        raise ValueError("packed sequences need a block_table and take no block lists")
    if q.dim() != 4 or q.shape[0] != 1 or packed.end > q.shape[2]:
        raise ValueError(
            f"packed sequences end at row {packed.end} of q [1, heads, tokens, head dim], got q {list(q.shape)}"
        )
    if packed.table.device != q.device:
        raise ValueError(f"packed sequences are on {packed.table.device}, but q is on {q.device}")


def _check_table(q, block_table, batch):
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.shape[1] < 1:
        raise ValueError(f"block_table must be [{batch}, pages], got {list(block_table.shape)}")
    if block_table.dtype != torch.int32 or block_table.device != q.device or block_table.stride(1) != 1:
        raise ValueError(
            f"block_table must be int32 on {q.device}, contiguous along its last axis, got {block_table.dtype} on "
            f"{block_table.device}, strides {list(block_table.stride())}"
        )


def _check_out(out, q, k, v):
    if (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        raise ValueError(
            f"out must be {q.dtype} {list(q.shape)} on {q.device}, got {out.dtype} {list(out.shape)} on {out.device}"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(f"out has more than one element in one place: shape {list(out.shape)}, strides {out.stride()}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, out)):
        raise ValueError("out= does not support gradients: call it under torch.no_grad(), or leave it out")


def _check_gate(q, gate):
    for name, thresholds in (("absolute", gate.absolute), ("gap", gate.gap)):
        if thresholds is None:
            continue
        if thresholds.shape[0] != q.shape[1]:
            raise ValueError(f"gate '{name}' has {thresholds.shape[0]} heads, but q has {q.shape[1]}")
        if thresholds.device != q.device:
            raise ValueError(f"gate '{name}' is on {thresholds.device}, but q is on {q.device}")


def _check_scoring(q, keys, causal, q_offset, spans, window, softcap, sinks, scores):
    if scores not in SCORES:
        raise ValueError(f"scores must be one of {', '.join(SCORES)}, got {scores!r}")
    if window is not None:
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a positive number of keys, got {window!r}")
        if not causal:
            raise ValueError("window needs causal=True: a query sees its last keys")
        if spans is None and q_offset + q.shape[2] > keys:
            raise ValueError(
                f"with a window queries may not pass the keys: they end at position {q_offset + q.shape[2]}, the keys "
                f"at {keys}"
            )
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.device != q.device):
        raise ValueError(f"sinks must be [{q.shape[1]}] on {q.device}, got {list(sinks.shape)} on {sinks.device}")


def _sinks(sinks: torch.Tensor | None) -> torch.Tensor | None:
    return None if sinks is None else sinks.detach().float().contiguous()


def _check_blocks(blocks, q, q_offset, spans, tile):
    if blocks.counts.device != q.device:
        raise ValueError(f"block lists are on {blocks.counts.device}, but q is on {q.device}")
    tiles = query_tiles(q.shape[2], q_offset, spans is not None, tile)
    if blocks.counts.shape != (*q.shape[:2], tiles):
        raise ValueError(
            f"block lists must be given for [batch, query heads, query tiles] = {[*q.shape[:2], tiles]}, "
            f"got {list(blocks.counts.shape)}"
        )


_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? absolute, Tensor? gap, Tensor? spans, Tensor? block_indices, "
    "Tensor? block_counts, Tensor? sinks, SymInt q_offset, float scale, SymInt? window, float? softcap, bool causal, "
    "SymInt tile_rows, SymInt tile_keys, bool keep_sink, bool want_lse, bool want_counts, str scores, str backend, "
    "Tensor? block_table, Tensor? packed, SymInt packed_rows"
)


@torch.library.custom_op("bsfa::attend", mutates_args=(), schema=f"({_CALL}) -> (Tensor, Tensor, Tensor, Tensor)")
def _attend(*call):
    """(out, lse, kept, candidates); what is not wanted is empty."""
    return _run(*_request(*call))


@_attend.register_fake
def _(*call):
    request, _ = _request(*call)
    return request.new_output(), *_fake_rest(request)


@torch.library.custom_op(
    "bsfa::attend_into", mutates_args=("out",), schema=f"(Tensor(a!) out, {_CALL}) -> (Tensor, Tensor, Tensor)"
)
def _attend_into(out, *call):
    """The same with the output's place given."""
    request, backend = _request(*call)
    storages = {x.untyped_storage().data_ptr() for x in (request.q, request.k, request.v)}
    if out.stride(-1) == 1 and out.untyped_storage().data_ptr() not in storages:
        _, *rest = _run(replace(request, out=out), backend)
    else:
        result, *rest = _run(request, backend)
        out.copy_(result)
    return tuple(rest)


@_attend_into.register_fake
def _(out, *call):
    return _fake_rest(_request(*call)[0])


def _request(
    q, k, v, absolute, gap, spans, block_indices, block_counts, sinks, q_offset, scale, window, softcap, causal,
    tile_rows, tile_keys, keep_sink, want_lse, want_counts, scores, backend, block_table,
    packed, packed_rows,
) -> tuple[Request, str]:  # fmt: skip
    """An operator's arguments, in the order of _CALL, as (request, backend that is demanded)."""
    blocks = None if block_indices is None else BlockLists(block_indices, block_counts)
    return Request(
        q, k, v, Gate(absolute, gap), scale, causal, TileShape(tile_rows, tile_keys), keep_sink, q_offset, spans,
        want_lse, want_counts, blocks, window, softcap, sinks, scores, None, block_table,
        packed, packed_rows,
    ), backend  # fmt: skip


def _run(request: Request, backend: str) -> tuple[torch.Tensor, ...]:
    _, module, _ = backends.choose(request, backend)
    if request.block_table is not None:
        # On a GPU it would have to be waited for.
        if request.spans is not None and not request.spans.is_cuda and request.spans[:, 1].any():
            raise ValueError("pages begin at position 0: with block_table the k_offset of spans must be 0")
        reads_pages = getattr(module, "reads_pages", None)
        if reads_pages is None or not reads_pages(request):
            if request.packed is not None:
                return _run_one_by_one(request, backend)
            request = request.gathered()
    out, lse, kept, candidates = module.attention(request)
    if not request.want_lse:
        lse = request.q.new_empty(0, dtype=torch.float32)
    if not request.want_counts:
        kept, candidates = (request.q.new_empty(0, dtype=torch.int32) for _ in range(2))
    return out, lse, kept, candidates


def _run_one_by_one(request: Request, backend: str) -> tuple[torch.Tensor, ...]:
    """Packed sequences, each in a call of its own."""
    out, lse, kept, candidates = request.new_outputs()
    for i, (rows, own) in enumerate(replace(request, out=out).one_by_one()):
        _, own_lse, *counts = _run(own, backend)
        if request.want_lse:
            lse[:, :, rows] = own_lse
        for total, count in zip((kept, candidates), counts, strict=True):
            if request.want_counts:
                total[i, :, : count.shape[2]] = count[0]
    empty = request.q.new_empty
    if not request.want_lse:
        lse = empty(0, dtype=torch.float32)
    if not request.want_counts:
        kept, candidates = (empty(0, dtype=torch.int32) for _ in range(2))
    return out, lse, kept, candidates


def _fake_rest(request: Request) -> tuple[torch.Tensor, ...]:
    """(lse, kept, candidates) without values."""
    q = request.q
    lse = q.new_empty(q.shape[:3] if request.want_lse else (0,), dtype=torch.float32)
    tiles = (request.batch, q.shape[1], request.query_tiles) if request.want_counts else (0,)
    return lse, *(q.new_empty(tiles, dtype=torch.int32) for _ in range(2))


@torch.library.custom_op("bsfa::tile_statistics", mutates_args=())
def _tile_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    spans: torch.Tensor | None,
    q_offset: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    causal: bool,
    tile_rows: int,
    tile_keys: int,
    keep_sink: bool,
    scores: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    request = Request(
        q, k, k, OPEN, scale, causal, TileShape(tile_rows, tile_keys), keep_sink, q_offset, spans, True, False,
        window=window, softcap=softcap, scores=scores,
    )  # fmt: skip
    _, module, _ = backends.choose(request, backend, backends.STATISTICS)
    maximum, gap, mass_mean, mass_worst = module.tile_statistics(request, lse)
    return maximum.float(), gap.float(), mass_mean.float(), mass_worst.float()


@_tile_statistics.register_fake
def _(q, k, lse, spans, q_offset, scale, window, softcap, causal, tile_rows, tile_keys, keep_sink, scores, backend):
    request = Request(
        q, k, k, OPEN, scale, causal, TileShape(tile_rows, tile_keys), keep_sink, q_offset, spans, False, False
    )
    shape = (*q.shape[:2], request.query_tiles, request.key_tiles)
    return tuple(q.new_empty(shape, dtype=torch.float32) for _ in range(4))
