"""Exact dense attention for calls that no gate judges: sliding windows, softcap, sinks, arbitrary masks, decoding.

Memory stays linear in the length: queries go in chunks, windowed layers read only the keys a chunk can see, and the
query heads that share a KV head stand side by side as rows, so that keys and values are never repeated. Plain softmax
runs on PyTorch's scaled_dot_product_attention; softcap and sinks, which it lacks, in float32 matmuls.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from .groups import Groups

SCORES_PER_CHUNK = 2**25


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    spans: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T, masked) v, [B, Hq, Tq, Dv] in the dtype of q.

    q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv]. `mask` (bool or additive float, broadcastable to
    [B, 1, Tq, Tk]) replaces `causal`, `spans` and `window`. `spans` int32 [B, 4] as in `block_sparse_attention`;
    without them row i of q and of k stand at position i. `window`: a query sees its last `window` keys; queries then
    end where the keys end. `softcap` c: scores become c * tanh(scores / c). `sinks` [Hq]: one more logit per head in
    the softmax denominator. `groups` (groups.py): rows that see one another besides. Rows that see nothing give 0.
    """
    rows, keys = q.shape[2], k.shape[2]
    plain = softcap is None and sinks is None
    if plain and mask is None and spans is None and window is None and groups is None and (not causal or rows == keys):
        return library(q, k, v, scale=scale, causal=causal)
    if not plain:
        k, v = k.float(), v.float()  # once, not for every chunk
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    seen = keys if window is None else min(keys, window)
    ids = None if groups is None else groups.of_rows(rows).to(q.device)
    reach = 0 if groups is None else groups.longest  # keys behind its own that a row may see
    columns = q.shape[0] * (q.shape[1] // k.shape[1] if plain else q.shape[1]) * seen
    chunk = max(16, min(1024, SCORES_PER_CHUNK // columns))
    for start in range(0, rows, chunk):
        end = min(start + chunk, rows)
        first, last = 0, keys
        if mask is None and window is not None:
            last = min(end + keys - rows + reach, keys)
            first = max(0, start + keys - rows - window + 1)
        elif mask is None and causal and spans is None:
            last = min(end + reach, keys)
        part = slice(first, last)
        if mask is None:
            visible = _visible(slice(start, end), part, rows, keys, causal, spans, window, q.device)
            if ids is not None:
                visible = visible | _same_group(ids, slice(start, end), part)
        else:
            visible = mask if mask.shape[2] == 1 else mask[:, :, start:end]
        arguments = q[:, :, start:end], k[:, :, part], v[:, :, part], scale
        if plain:
            out[:, :, start:end] = _sdpa(*arguments, visible)
        else:
            with torch.autocast(q.device.type, enabled=False):
                out[:, :, start:end] = _explicit(*arguments, visible, softcap, sinks)
    return out


class DenseAttention:
    """`attention` as a handler, for `transformers.attach`: exact, and no kernel of ours has a part in it."""

    knows_scoring = True

    def __call__(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, **scoring) -> torch.Tensor:
        return attention(q, k, v, scale=scale, causal=causal, spans=spans, **scoring)


def library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, causal: bool) -> torch.Tensor:
    """scaled_dot_product_attention without a mask: rows of q and of k start at position 0. Shapes as in `attention`."""
    grouped = k.shape[1] != q.shape[1]
    if grouped and q.is_cuda and (q.dtype.itemsize > 2 or q.shape[-1] > 256):
        # No kernel of PyTorch's takes grouped heads then, and its plain fallback writes out all scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = False
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)


def _visible(rows: slice, part: slice, q_rows, keys, causal, spans, window, device) -> torch.Tensor:
    """bool [B or 1, 1, rows, keys in `part`]: which keys each query of the chunk sees."""
    q_row = torch.arange(rows.start, rows.stop, device=device)
    k_row = torch.arange(part.start, part.stop, device=device)
    if spans is None:
        q_offset = k_offset = torch.zeros(1, dtype=torch.int32, device=device)
        if window is not None:
            q_offset = q_offset + (keys - q_rows)
        length = torch.full_like(q_offset, 2**31 - 1)
    else:
        q_offset, k_offset, length, _ = spans.unbind(1)
    q_position = (q_offset[:, None] + q_row)[:, :, None]
    k_position = (k_offset[:, None] + k_row)[:, None, :]
    visible = ((k_position >= 0) & (k_position < length[:, None, None])).expand(-1, len(q_row), -1)
    if causal:
        visible = visible & (k_position <= q_position)
    if window is not None:
        visible = visible & (k_position > q_position - window)
    return visible[:, None]


def _same_group(ids: torch.Tensor, rows: slice, part: slice) -> torch.Tensor:
    """bool [B, 1, rows, keys in `part`]: whether key and query are of one group; keys behind the last query are not."""
    of_keys = torch.nn.functional.pad(ids, (0, max(0, part.stop - ids.shape[1])), value=-1)[:, None, part]
    of_rows = ids[:, rows, None]
    same = (of_rows == of_keys) & (of_rows >= 0)
    # What lies before a row is the causal mask's or the window's to show.
    later = torch.arange(part.start, part.stop, device=ids.device) > torch.arange(
        rows.start, rows.stop, device=ids.device
    ).unsqueeze(1)
    return (same & later)[:, None]


def _sdpa(q, k, v, scale, visible) -> torch.Tensor:
    batch, heads, rows, _ = q.shape
    group = heads // k.shape[1]
    if group > 1:
        q = q.unflatten(1, (k.shape[1], group)).flatten(2, 3)
        visible = visible.expand(-1, heads if visible.shape[1] > 1 else group, rows, -1)
        visible = visible.unflatten(1, (-1, group)).flatten(2, 3)
    if visible.dtype != torch.bool:
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible.to(q.dtype), scale=scale)
    else:
        blind = ~visible.any(-1, keepdim=True)
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible | blind, scale=scale).masked_fill(blind, 0)
    return out.reshape(batch, heads, rows, -1)


def _explicit(q, k, v, scale, visible, softcap, sinks) -> torch.Tensor:
    batch, heads, rows, _ = q.shape
    group = heads // k.shape[1]
    grouped = q.float().reshape(batch, k.shape[1], group * rows, q.shape[3])
    scores = (scale * (grouped @ k.transpose(-1, -2))).view(batch, heads, rows, k.shape[2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf) if visible.dtype == torch.bool else scores + visible.float()
    largest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks.float()[:, None, None])
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.float()[:, None, None] - largest).exp()
    out = weights.view(batch, k.shape[1], group * rows, k.shape[2]) @ v
    return (out.view(batch, heads, rows, v.shape[3]) / total.masked_fill(total == 0, 1)).to(q.dtype)
