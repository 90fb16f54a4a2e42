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

from . import backends, checks, shortcut
from .blocks import BlockLists
from .gates import Gate
from .packed import Packed
from .request import Request, shares_memory, written
from .tiles import TileShape

OPEN = Gate()


class Attention(NamedTuple):
    """`kept` and `candidates` count tiles a gate may drop; forced tiles (diagonal, sink, and all of a query tile that
    the call does not hold whole) are in neither.
    """

    out: torch.Tensor  # [B, Hq, Tq, Dv], the dtype of q; `out` where it was given
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

    q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv], Hq a multiple of Hkv, Dv at most D; float16, bfloat16,
    float32 or float64; any strides with a contiguous last axis. `scale` defaults to D ** -0.5. `q_offset` is the
    absolute position of query row 0 while key row 0 stands at 0; batches whose sequences differ give `spans` (see
    `make_spans`) instead.
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
    can serve the call, a name demands that one. `out` [B, Hq, Tq, Dv], dtype of q: where the output goes, such as a
    view of an engine's [tokens, Hq, Dv]. Kernels write there by its strides; where it shares memory with q, k or v, or
    16-byte stores do not reach its rows, the output is copied there. Without it the output lies in memory as
    [B, Tq, Hq, Dv].

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

    Raises TypeError for arguments of a wrong type, ValueError for those out of range or that do not fit together,
    BackendUnavailable when `backend` cannot serve them.
    """
    arguments = (
        q, k, v, gate, blocks, scale, causal, q_offset, spans, tile, keep_sink, window, softcap, sinks, scores,
        return_lse, return_counts, backend, out, block_table, packed,
    )  # fmt: skip
    if torch.compiler.is_compiling() or not shortcut.is_open():
        return _long_way(*arguments)
    options = (scale, causal, q_offset, keep_sink, window, softcap, scores, return_lse, return_counts, backend)
    signature, tensors, plan = shortcut.find(
        q, k, v, gate, blocks, spans, sinks, out, block_table, packed, tile, options
    )  # fmt: skip
    result = plan and plan(*tensors)
    if result:
        return Attention(*result)
    result = _long_way(*arguments)
    if signature is not None and plan is None:
        shortcut.remember(signature, _as_request(*arguments), backend)
    return result


@checks.explained
def _long_way(
    q, k, v, gate, blocks, scale, causal, q_offset, spans, tile, keep_sink, window, softcap, sinks, scores, return_lse,
    return_counts, backend, out, block_table, packed,
) -> Attention:  # fmt: skip
    """Arguments checked, and the operator called."""
    if packed is not None:
        checks.check_packed(packed, q, k, q_offset, spans, blocks, block_table)
    sequences, packed_rows, spans = _sequences(packed, spans)
    checks.check(q, k, v, scale, q_offset, spans, block_table, sequences)
    gate = gate.expanded(q.shape[1], q.device)
    checks.check_gate(q, gate)
    keys = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[2]
    checks.check_scoring(q, keys, causal, q_offset, spans, window, softcap, sinks, scores)
    if not type(causal) is type(keep_sink) is type(return_lse) is type(return_counts) is bool:
        raise TypeError  # None would be taken for False; `explained` finds the words
    if out is not None:
        checks.check_out(out, q, k, v)
    if blocks is not None:
        checks.check_blocks(blocks, q, q_offset, spans, tile)
    indices, counts = (None, None) if blocks is None else (blocks.indices, blocks.counts)
    call = (
        q, k, v, gate.absolute, gate.gap, spans, indices, counts, _sinks(sinks), q_offset, _scale(q, scale), window,
        softcap, causal, tile.rows, tile.keys, keep_sink, return_lse, return_counts, scores, backend, block_table,
        sequences, packed_rows,
    )  # fmt: skip
    if out is None:
        differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        attend = _NoBackward.apply if differentiable else torch.ops.bsfa.attend.default
        out, lse, kept, candidates = attend(*call)
    else:
        lse, kept, candidates = torch.ops.bsfa.attend_into.default(out, *call)
    return Attention(
        out, lse if return_lse else None, kept if return_counts else None, candidates if return_counts else None
    )


@checks.explained
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
    checks.check(q, k, k, scale, q_offset, spans)
    checks.check_scoring(q, k.shape[2], causal, q_offset, spans, window, softcap, None, scores)
    if not type(causal) is type(keep_sink) is bool:
        raise TypeError
    checks.check_tensor("lse", lse)
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
    """(backend that "auto" takes for this call, {faster backend: why it cannot}). Raises TypeError for an option that
    `block_sparse_attention` has not, and for arguments of a wrong type, ValueError where q, k or v lacks an axis;
    whether they fit together it does not ask.
    """
    defaults = block_sparse_attention.__kwdefaults__
    checks.refuse_types(dict(q=q, k=k, v=v, gate=gate) | options)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_axes(name, x)
    unknown = sorted(options.keys() - defaults.keys())
    if unknown:
        raise TypeError(f"block_sparse_attention has no argument {unknown[0]!r}")
    request = _as_request(**dict(q=q, k=k, v=v, gate=gate) | defaults | options)
    name, _, passed_over = backends.choose(request)
    return name, passed_over


def _as_request(
    q, k, v, gate, blocks, scale, causal, q_offset, spans, tile, keep_sink, window, softcap, sinks, scores, return_lse,
    return_counts, backend, out, block_table, packed,
) -> Request:  # fmt: skip
    """The call as backends see it."""
    sequences, packed_rows, spans = _sequences(packed, spans)
    softcap = softcap if softcap is None else float(softcap)  # as an operator makes it
    return Request(
        q, k, v, gate.expanded(q.shape[1], q.device), _scale(q, scale), causal, tile, keep_sink, q_offset, spans,
        return_lse, return_counts, blocks, window, softcap, sinks, scores, out, block_table, sequences, packed_rows,
    )  # fmt: skip


def _sequences(packed: Packed | None, spans: torch.Tensor | None) -> tuple:
    """(table of packed sequences, rows of the longest, spans) of a call."""
    return (None, 0, spans) if packed is None else (packed.table, packed.rows, packed.spans)


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _sinks(sinks: torch.Tensor | None) -> torch.Tensor | None:
    return None if sinks is None else sinks.detach().float().contiguous()


_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? absolute, Tensor? gap, Tensor? spans, Tensor? block_indices, "
    "Tensor? block_counts, Tensor? sinks, SymInt q_offset, float scale, SymInt? window, float? softcap, bool causal, "
    "SymInt tile_rows, SymInt tile_keys, bool keep_sink, bool want_lse, bool want_counts, str scores, str backend, "
    "Tensor? block_table, Tensor? packed, SymInt packed_rows"
)


_LIBRARY = torch.library.Library("bsfa", "FRAGMENT")


def _operator(schema: str):
    """Registers an operator by hand: what torch.library.custom_op wraps around one took a fifth of a call's host time
    (NOTES.md, Host).
    """

    def register(function):
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        # torch.compile must not look into it where a frame that it gave up calls it.
        hidden = getattr(torch, "_disable_dynamo", lambda f: f)(function)
        _LIBRARY.impl(schema.partition("(")[0], hidden, "CompositeExplicitAutograd")
        return function

    return register


@_operator(f"attend({_CALL}) -> (Tensor, Tensor, Tensor, Tensor)")
def _attend(*call):
    """(out, lse, kept, candidates); what is not wanted means nothing."""
    return _run(*_request(*call))


class _NoBackward(torch.autograd.Function):
    """The operator for tensors that require gradients, which it has none of: said where they are asked for."""

    @staticmethod
    def forward(ctx, *call):
        return torch.ops.bsfa.attend.default(*call)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("block_sparse_attention has no backward pass")


@torch.library.register_fake("bsfa::attend", lib=_LIBRARY)
def _(*call):
    request, _ = _request(*call)
    return request.new_output(), *_fake_rest(request)


@_operator(f"attend_into(Tensor(a!) out, {_CALL}) -> (Tensor, Tensor, Tensor)")
def _attend_into(out, *call):
    """The same with the output's place given."""
    request, backend = _request(*call)
    direct = out.stride(-1) == 1 and not shares_memory(out, request.q, request.k, request.v)
    place = out if direct else out.clone(memory_format=torch.contiguous_format)  # packed, some of it stays as it is
    _, *rest = _run(replace(request, out=place), backend)
    if not direct:
        out.copy_(place)
    written(out)
    return tuple(rest)


@torch.library.register_fake("bsfa::attend_into", lib=_LIBRARY)
def _(out, *call):
    return _fake_rest(_request(*call)[0])


def _request(
    q, k, v, absolute, gap, spans, block_indices, block_counts, sinks, q_offset, scale, window, softcap, causal,
    tile_rows, tile_keys, keep_sink, want_lse, want_counts, scores, backend, block_table,
    packed, packed_rows,
) -> tuple[Request, str]:  # fmt: skip
    """An operator's arguments, in the order of _CALL, as (request, backend that is demanded)."""
    blocks = None if block_indices is None else BlockLists(block_indices, block_counts)
    spans, packed = (x if x is None else x.contiguous() for x in (spans, packed))
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
        if not request.block_table.is_cuda:
            used = -(-request.k_rows // request.k.shape[2])
            checks.check_pages(request.block_table[:, :used], request.k.shape[0])
        reads_pages = getattr(module, "reads_pages", None)
        if reads_pages is None or not reads_pages(request):
            if request.packed is not None:
                return _run_one_by_one(request, backend)
            request = request.gathered()
    return module.attention(request)


def _run_one_by_one(request: Request, backend: str) -> tuple[torch.Tensor, ...]:
    """Packed sequences, each in a call of its own."""
    out, lse, kept, candidates = request.new_outputs()
    for i, (rows, own) in enumerate(replace(request, out=out).one_by_one()):
        _, own_lse, *counts = _run(own, backend)
        lse[:, :, rows] = own_lse
        for total, count in zip((kept, candidates), counts, strict=True):
            total[i, :, : count.shape[2]] = count[0]
    return out, lse, kept, candidates


def _fake_rest(request: Request) -> tuple[torch.Tensor, ...]:
    """(lse, kept, candidates) without values."""
    q = request.q
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tiles = (request.batch, q.shape[1], request.query_tiles)
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
    spans = spans if spans is None else spans.contiguous()
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
