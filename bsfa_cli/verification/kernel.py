"""The kernel against the specification, on queries, keys and values that a real layer made."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from bsfa_kernels import block_sparse_attention, explain, reference
from bsfa_kernels.integrations.sparse import SparseAttention
from bsfa_kernels.quantise import dequantised, prepare
from bsfa_kernels.reference import Scoring, Span
from bsfa_kernels.request import UNBOUNDED, Request
from bsfa_kernels.tiles import query_tile_count

QUERY_TILES = 2
# A tile whose value lies within rounding of its threshold may be decided either way.
BORDERLINE = 0.01


@dataclass(frozen=True)
class KernelCheck:
    """Relative L2 errors against the float64 reference, on the last query tiles of the first and last KV head."""

    path: str
    backend: str
    error: float  # of the backend, over the query tiles that both decided alike
    plain_error: float  # of plain attention in the same dtype, nothing dropped
    allowed: float
    decided_differently: int  # candidate tiles
    candidates: int

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed and self.decided_differently <= max(1, BORDERLINE * self.candidates)

    def to_json(self) -> dict:
        return {**asdict(self), "passed": self.passed}


def check_kernel(handler: SparseAttention, q, k, v, scoring: Scoring, sinks: torch.Tensor | None = None) -> KernelCheck:
    """Compare what `handler` runs with reference.py. q [B, Hq, T, D], k and v [B, Hkv, T, D], sinks [Hq]; sequence 0 is
    used. Heads that stay exact beside int8 ones are checked with int8 scores too.

    The backend may err as much as plain attention in the dtype of q does, times two, plus four roundings.
    """
    tile, length = handler.thresholds.tile, q.shape[2]
    group = q.shape[1] // k.shape[1]
    kv_heads = sorted({0, k.shape[1] - 1})
    heads = [kv * group + member for kv in kv_heads for member in range(group)]
    start = max(0, length // tile.rows - QUERY_TILES) * tile.rows  # whole tiles: those that gates judge
    q, k, v = q[:1, heads, start:], k[:1, kv_heads], v[:1, kv_heads]
    gate = handler.gate(length, q.device).map(lambda thresholds: thresholds[heads])
    sinks = None if sinks is None else sinks[heads]
    options = dict(tile=tile, keep_sink=handler.thresholds.keep_sink, sinks=sinks)
    call = dict(q_offset=start, **scoring._asdict(), **options)
    scores = handler.scores_of(q, v)
    kernel = block_sparse_attention(q, k, v, gate, scores=scores, return_counts=True, backend=handler.backend, **call)
    backend = handler.backend
    if backend == "auto":
        backend, _ = explain(q, k, v, gate, scores=scores, **call)
    scored = Request(
        q, k, v, gate, scoring.scale, scoring.causal, tile, handler.thresholds.keep_sink, start, None, True, True,
        window=scoring.window, softcap=scoring.softcap, sinks=sinks, scores=scores,
    )  # fmt: skip
    if scores != "exact":
        scored = dequantised(scored, prepare(scored))
    exact = reference.attention(
        scored.q, scored.k, v, gate, scoring=scoring, spans=[Span(start, 0, k.shape[2], UNBOUNDED)],
        query_tiles=query_tile_count(start, q.shape[2], tile)[1], **options,
    )  # fmt: skip
    difference = (kernel.kept - exact.kept).abs()
    alike = (difference == 0).repeat_interleave(tile.rows, -1)
    alike = alike[..., : q.shape[2]]
    plain_error = _plain_error(q, k, v, scoring, sinks, start)
    return KernelCheck(
        handler.path,
        backend,
        _relative(kernel.out[alike], exact.out[alike]),
        plain_error,
        2 * plain_error + 4 * torch.finfo(q.dtype).eps,
        int(difference.sum()),
        int(exact.candidates.sum()),
    )


def _plain_error(q, k, v, scoring: Scoring, sinks, start: int) -> float:
    def attend(q, k, v):
        scores = scoring.scale * (q @ k.mT)
        if scoring.softcap is not None:
            scores = scoring.softcap * (scores / scoring.softcap).tanh()
        if scoring.causal:
            row = torch.arange(q.shape[2], device=q.device)[:, None] + start
            key = torch.arange(k.shape[2], device=q.device)
            hidden = key > row if scoring.window is None else (key > row) | (key <= row - scoring.window)
            scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
        return scores.softmax(-1)[..., : k.shape[2]] @ v

    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return _relative(attend(q, k, v), attend(q.double(), k.double(), v.double()))


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300))
