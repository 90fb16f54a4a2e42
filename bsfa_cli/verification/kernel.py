"""The kernel against the specification, on queries, keys and values that a real layer made."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from bsfa_kernels import block_sparse_attention, explain, reference
from bsfa_kernels.integrations.transformers import SparseAttention
from bsfa_kernels.reference import Span
from bsfa_kernels.request import UNBOUNDED
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


def check_kernel(handler: SparseAttention, q, k, v, *, scale: float, causal: bool) -> KernelCheck:
    """Compare what `handler` runs with reference.py. q [B, Hq, T, D], k and v [B, Hkv, T, D]; sequence 0 is used.

    The backend may err as much as plain attention in the dtype of q does, times two, plus four roundings.
    """
    tile, length = handler.thresholds.tile, q.shape[2]
    group = q.shape[1] // k.shape[1]
    kv_heads = sorted({0, k.shape[1] - 1})
    heads = [kv * group + member for kv in kv_heads for member in range(group)]
    start = max(0, length - QUERY_TILES * tile.rows)
    q, k, v = q[:1, heads, start:], k[:1, kv_heads], v[:1, kv_heads]
    gate = handler.gate(length, q.device).map(lambda thresholds: thresholds[heads])
    options = dict(scale=scale, causal=causal, tile=tile, keep_sink=handler.thresholds.keep_sink)
    kernel = block_sparse_attention(
        q, k, v, gate, q_offset=start, return_counts=True, backend=handler.backend, **options
    )
    backend = handler.backend
    if backend == "auto":
        backend, _ = explain(q, k, v, gate, q_offset=start, **options)
    spans = [Span(start, 0, k.shape[2], UNBOUNDED)]
    exact = reference.attention(
        q, k, v, gate, spans=spans, query_tiles=query_tile_count(start, q.shape[2], tile)[1], **options
    )
    difference = (kernel.kept - exact.kept).abs()
    alike = (difference == 0).repeat_interleave(tile.rows, -1)
    first_row = start % tile.rows
    alike = alike[..., first_row : first_row + q.shape[2]]
    plain_error = _plain_error(q, k, v, scale, causal, start)
    return KernelCheck(
        handler.path,
        backend,
        _relative(kernel.out[alike], exact.out[alike]),
        plain_error,
        2 * plain_error + 4 * torch.finfo(q.dtype).eps,
        int(difference.sum()),
        int(exact.candidates.sum()),
    )


def _plain_error(q, k, v, scale: float, causal: bool, start: int) -> float:
    def attend(q, k, v):
        scores = scale * (q @ k.mT)
        if causal:
            rows = torch.arange(q.shape[2], device=q.device)[:, None] + start
            scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > rows, -torch.inf)
        return scores.softmax(-1) @ v

    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return _relative(attend(q, k, v), attend(q.double(), k.double(), v.double()))


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300))
