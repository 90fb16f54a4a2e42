"""The torch backend: blocked matmuls on any device, with memory linear in the sequence length.

One query tile of all heads at a time: scores against every visible key, the gate, then exp and PV only over the tiles
that were kept. Keys and values are read once per group of query heads, never repeated. Half precisions are computed
in float32, float64 in float64. Block lists save exp and PV here, not QK.
"""

from __future__ import annotations

import torch

from .gates import column
from .quantise import dequantised, prepare
from .reference import Span
from .request import SCORES as SCORES
from .request import Request
from .tiles import Visit, visit


def unsupported(request: Request) -> str | None:
    return None


def attention(request: Request):
    compute, request = _scored(request)
    q, k, v = request.q, request.k, request.v
    batch, heads, q_rows, _ = q.shape
    out, lse, kept, candidates = (
        x.fill_(empty) for x, empty in zip(request.new_outputs(), (0, -torch.inf, 0, 0), strict=True)
    )
    for b, span in enumerate(request.host_spans()):
        span, k_b, v_b = _from_zero(span, k[b].to(compute), v[b].to(compute))
        for t, query_tile in span.query_tiles(q.shape[2], request.tile):
            plan = visit(query_tile, span.length, request.causal, request.keep_sink, request.tile, request.window)
            scores, rows = _visible_scores(request, q[b], k_b, span, query_tile, plan)
            passed = listed = _listed(request, plan, b, t)
            if span.whole(query_tile, q_rows, request.tile):
                passed = _gate(request, scores, plan, listed, query_tile)
                kept[b, :, t] = passed.sum(1, dtype=torch.int32)
                candidates[b, :, t] = listed.sum(1, dtype=torch.int32)
            keep = _keep(plan, passed)
            values = v_b[:, -span.k_offset :][:, : scores.shape[-1]]
            out[b, :, rows], lse[b, :, rows] = _attend(request, scores, values, keep)
    return out, lse, kept, candidates


def tile_statistics(request: Request, lse: torch.Tensor):
    """(maximum, gap, mass_mean, mass_worst), each float32 [B, Hq, query tiles, key tiles]; see api.TileStatistics."""
    compute, request = _scored(request)
    q, k = request.q, request.k
    shape = (*q.shape[:2], request.query_tiles, request.key_tiles)
    maximum, gap = (torch.full(shape, -torch.inf, device=q.device) for _ in range(2))
    mass_mean, mass_worst = (torch.zeros(shape, device=q.device) for _ in range(2))
    for b, span in enumerate(request.host_spans()):
        span, k_b = _from_zero(span, k[b].to(compute))
        for t, query_tile in span.query_tiles(q.shape[2], request.tile):
            plan = visit(query_tile, span.length, request.causal, request.keep_sink, request.tile, request.window)
            scores, rows = _visible_scores(request, q[b], k_b, span, query_tile, plan)
            tiles = _by_tile(scores, request.tile.keys)
            row_max = tiles.amax(-1)
            order = plan.forced() + plan.candidates()
            running = row_max[..., order].cummax(-1).values
            before = torch.cat([torch.full_like(running[..., :1], -torch.inf), running[..., :-1]], -1)
            mass = tiles.sub_(lse[b, :, rows, None, None].to(compute)).exp_().sum(-1)
            end = row_max.shape[-1]
            maximum[b, :, t, :end] = row_max.amax(1).float()
            gap[b, :, t, order] = (row_max[..., order] - before).amax(1).float()
            judged = span.whole(query_tile, q.shape[2], request.tile)
            gap[b, :, t, plan.forced() if judged else order] = torch.inf
            gap[b, :, t, : plan.first_keys] = -torch.inf
            mass_mean[b, :, t, :end], mass_worst[b, :, t, :end] = mass.mean(1).float(), mass.amax(1).float()
    return maximum, gap, mass_mean, mass_worst


def _scored(request: Request) -> tuple[torch.dtype, Request]:
    """(the dtype to compute in, the call whose exact scores are the scores that `request` asks for)."""
    compute = torch.float64 if request.q.dtype == torch.float64 else torch.float32
    return compute, request if request.scores == "exact" else dequantised(request, prepare(request), compute)


def _from_zero(span: Span, *tensors):
    """The span and [Hkv, Tk, D] tensors with rows for the positions that a sliding cache no longer holds: no window
    reaches them.
    """
    missing = max(span.k_offset, 0)
    if missing:
        tensors = [torch.nn.functional.pad(x, (0, 0, missing, 0)) for x in tensors]
    return (span._replace(k_offset=span.k_offset - missing), *tensors)


def _visible_scores(request: Request, q_b, k_b, span: Span, query_tile: int, plan: Visit):
    """Scores [Hq, rows, visible keys] of one query tile against all it may see, and the slice of query rows."""
    kv_heads, head_dim = k_b.shape[0], k_b.shape[2]
    tile, compute = request.tile, k_b.dtype
    rows = span.rows(query_tile, q_b.shape[1], tile)
    visible = slice(-span.k_offset, min(plan.end_keys * tile.keys, span.length) - span.k_offset)
    count = rows.stop - rows.start
    grouped = q_b[:, rows].to(compute).reshape(kv_heads, -1, head_dim)  # a KV head's query heads share one matmul
    keys = k_b[:, visible].transpose(1, 2)
    products = torch.baddbmm(grouped.new_empty(()), grouped, keys, beta=0, alpha=request.scale)
    scores = products.view(-1, count, visible.stop - visible.start)
    if request.softcap is not None:
        scores.div_(request.softcap).tanh_().mul_(request.softcap)
    if request.causal:
        first_key = 0 if request.window is not None else plan.first_diagonal * tile.keys
        q_position = (torch.arange(rows.start, rows.stop, device=q_b.device) + span.q_offset)[:, None]
        k_position = torch.arange(first_key, scores.shape[-1], device=q_b.device)
        hidden = k_position > q_position
        if request.window is not None:
            hidden |= k_position <= q_position - request.window
        scores[..., first_key:].masked_fill_(hidden, -torch.inf)
    return scores, rows


def _by_tile(scores: torch.Tensor, keys: int) -> torch.Tensor:
    """[Hq, rows, visible keys] as [Hq, rows, key tiles, keys], the tail of the last tile at -inf."""
    tail = -scores.shape[-1] % keys
    if tail:
        scores = torch.nn.functional.pad(scores, (0, tail), value=-torch.inf)
    return scores.unflatten(-1, (-1, keys))


def _listed(request: Request, plan: Visit, b: int, t: int) -> torch.Tensor:
    """bool [Hq, candidates in visiting order]: those on each head's list, all without lists."""
    heads, device = request.q.shape[1], request.q.device
    order = torch.tensor(plan.candidates(), dtype=torch.int64, device=device)
    if request.blocks is None:
        return torch.ones(heads, len(order), dtype=torch.bool, device=device)
    indices, counts = request.blocks.indices[b, :, t].long(), request.blocks.counts[b, :, t]
    named = (torch.arange(indices.shape[1], device=device) < counts[:, None]) & (indices >= 0)
    unused = plan.end_keys
    on_list = torch.zeros(heads, unused + 1, dtype=torch.bool, device=device)
    on_list.scatter_(1, indices.where(named, unused).clamp(max=unused), True)
    return on_list[:, order]


def _gate(request: Request, scores, plan: Visit, listed: torch.Tensor, query_tile: int) -> torch.Tensor:
    """bool [Hq, candidates]: those that each head keeps, in visiting order."""
    gate, passed = request.gate, listed.clone()
    if gate.open:
        return passed
    row_max = _by_tile(scores, request.tile.keys).amax(-1)  # [Hq, rows, key tiles]
    steps = row_max[..., plan.candidates()]
    if gate.absolute is not None:
        passed &= ~(steps.amax(1) < column(gate.absolute, query_tile)[:, None])
    if gate.gap is not None:
        running = row_max[..., plan.forced()].amax(-1)  # [Hq, rows]
        least = column(gate.gap, query_tile)
        for i in range(steps.shape[2]):
            passed[:, i] &= ~((steps[..., i] - running).amax(1) < least)
            running = torch.where(passed[:, i, None], torch.maximum(running, steps[..., i]), running)
    return passed


def _keep(plan: Visit, passed: torch.Tensor) -> torch.Tensor:
    """bool [Hq, key tiles]: the tiles each head keeps, forced ones included."""
    keep = torch.zeros(passed.shape[0], plan.end_keys, dtype=torch.bool, device=passed.device)
    keep[:, plan.candidates()] = passed
    keep[:, plan.forced()] = True
    return keep


def _attend(request: Request, scores, values, keep) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [Hq, rows, Dv] in the dtype of v, lse float32 [Hq, rows]) over the key tiles that each head keeps.

    scores [Hq, rows, keys] are overwritten; values [Hkv, keys, Dv]; keep bool [Hq, key tiles].
    """
    heads, count, visible = scores.shape
    sinks = None if request.sinks is None else request.sinks.to(scores.dtype)[:, None, None]
    if bool(keep.all()):
        # A KV head's query heads share one matmul.
        return _softmax_pv(request, scores, values, sinks)
    out = request.v.new_empty(heads, count, values.shape[-1])
    lse = torch.empty(heads, count, dtype=torch.float32, device=scores.device)
    group = heads // values.shape[0]
    for h in range(heads):
        columns = _columns(keep[h], visible, request.tile.keys)
        one = slice(h, h + 1)
        out[one], lse[one] = _softmax_pv(
            request, scores[one, :, columns], values[h // group, columns][None], None if sinks is None else sinks[one]
        )
    return out, lse


def _softmax_pv(request: Request, s, values, sinks) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [H, rows, Dv] in the dtype of v, lse float32 [H, rows]) of scores [H, rows, keys], overwritten."""
    largest = s.amax(-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    largest.masked_fill_(largest == -torch.inf, 0)  # of a row that sees nothing: it weighs nothing
    p = s.sub_(largest).exp_()
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total += (sinks - largest).exp_()
    out = (p.view(values.shape[0], -1, p.shape[-1]) @ values).view(*p.shape[:2], -1)
    out /= total.masked_fill(total == 0, 1)
    return out.to(request.v.dtype), (total.log() + largest).squeeze(-1).float()


def _columns(keep: torch.Tensor, keys: int, tile_keys: int) -> torch.Tensor:
    """Indices of the keys in kept tiles."""
    tiles = keep.nonzero()[:, 0]
    columns = (tiles[:, None] * tile_keys + torch.arange(tile_keys, device=keep.device)).flatten()
    return columns[columns < keys]
