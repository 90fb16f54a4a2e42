"""scores="int8", as specified: what attention computes its scores from, in plain PyTorch on any device.

For each sequence b and KV head g, with keys and queries in float32 and their position as in reference.Span:

    mean = mean of k over the call's valid keys, leaving out values that are not finite
    y    = (k - mean) R, x = q R                                     R: `rotation`, orthogonal
    k_scale = max |y| / 127 of each key tile's valid keys,  k8 = round(y / k_scale)       half to even
    q_scale = max |x| / 127 of each query row,              q8 = round(x / q_scale)
    score   = scale * (q8 . k8 * q_scale * k_scale + q . mean)

q8 . k8 is an exact integer; all else about attention, gates and softmax included, is as for exact scores, from `score`.
The rotation changes no product, and no softmax and no gap sees the shift q . mean, the same for a whole row: `Prepared`
holds it only where something does (`Request.shifted`). Rounding is all that is lost.

The mean is one call's: of a prompt that comes in chunks every chunk subtracts that of the keys so far, and the scale of
a tile that a chunk ends in is that of its keys so far. Chunks and the whole prompt so have the same error, not the same
bits; and a score depends, within that error, on keys behind its query.

Where a row of q holds a value that is not finite, or a key tile does among its valid keys, its scale and so all its
scores are NaN, which no gate hides; keys that are masked stay masked. A row of zeros has scale 0 and scores of 0. Rows
of padding have no defined value.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from .request import Request

LEVELS = 127  # int8 without -128
WIDEST_BLOCK = 128  # of the rotation: wider heads are rotated in blocks, each by itself
NARROWEST = 32  # columns of an int8 product
TINY = 2.0**-100  # rows whose rotated values are all smaller count as zero: 127 over them might not be finite


class Prepared(NamedTuple):
    """q8 . k8 * q_scale * k_scale + q_shift is the score before `Request.scale`. C is `columns(D)`."""

    q8: torch.Tensor  # int8 [B, Hq, Tq, C], contiguous
    q_scale: torch.Tensor  # float32 [B, Hq, Tq]
    k8: torch.Tensor  # int8 [B, Hkv, Tk, C], contiguous; row j is key row j
    k_scale: torch.Tensor  # float32 [B, Hkv, key_tiles(request)]; see `first_key_tile`
    mean: torch.Tensor  # float32 [B, Hkv, D]
    q_shift: torch.Tensor | None  # float32 [B, Hq, Tq]: q . mean, None where nothing sees it


def columns(head_dim: int) -> int:
    """Columns of q8 and k8: the head dim, zeros added up to a power of two or, above 128, a multiple of 128."""
    block = rotation_block(head_dim)
    return -(-head_dim // block) * block


def rotation_block(head_dim: int) -> int:
    return min(max(NARROWEST, 1 << (head_dim - 1).bit_length()), WIDEST_BLOCK)


def key_tiles(request: Request) -> int:
    """Scales of a KV head. With spans, an upper bound: a sequence's keys may start within a tile."""
    return request.key_tiles + (request.spans is not None)


def first_key_tile(k_offset: int, keys: int) -> int:
    """The key tile, counted from the sequence's own position 0, that k_scale[..., 0] belongs to: 0 unless a sliding
    cache holds later keys only.
    """
    return max(k_offset, 0) // keys


def rotation(columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """float64 [columns, columns] of +1 and -1: sqrt(columns) times a Hadamard matrix whose rows have signs.

    The sign of row i is that of a quadratic form whose own transform is flat (a bent function), so that no pattern that
    repeats in powers of two is gathered in one column.
    """
    bits = columns.bit_length() - 1
    i = torch.arange(columns, device=device)
    x = i[:, None] & (i[None, :] ^ (i[:, None] >> bits // 2))
    for shift in (8, 4, 2, 1):
        x = x ^ (x >> shift)
    return (1 - 2 * (x & 1)).double()


def unit(block: int) -> float:
    """A scale is the largest absolute value, rotated by `rotation` without its root, times this."""
    return 1 / (LEVELS * math.sqrt(block))


def prepare(request: Request) -> Prepared:
    """Q and K of the request as int8, per the module docstring."""
    q, k = request.q.float(), request.k.float()
    block, wide = rotation_block(q.shape[3]), columns(q.shape[3])
    matrix = rotation(block, q.device)

    def rotate(x):
        x = torch.nn.functional.pad(x, (0, wide - x.shape[-1])).double()
        return (x.unflatten(-1, (-1, block)) @ matrix).flatten(-2).float()

    batch, kv_heads, keys, head_dim = k.shape
    q8, q_scale = _round(rotate(q), unit(block))
    k8 = torch.zeros(batch, kv_heads, keys, wide, dtype=torch.int8, device=q.device)
    k_scale = torch.zeros(batch, kv_heads, key_tiles(request), device=q.device)
    mean = torch.zeros(batch, kv_heads, head_dim, device=q.device)
    for b, span in enumerate(request.host_spans()):
        first, end = max(span.k_offset, 0), span.length
        if end <= first:
            continue
        valid = k[b, :, first - span.k_offset : end - span.k_offset]
        mean[b] = valid.double().where(valid.isfinite(), 0).mean(1).float()
        y = rotate(valid - mean[b][:, None])
        size, own = request.tile.keys, first_key_tile(span.k_offset, request.tile.keys)
        for j in range(own, -(-end // size)):
            at = slice(max(j * size, first), min((j + 1) * size, end))
            tile = y[:, at.start - first : at.stop - first]
            rounded, scale = _round(tile.flatten(1), unit(block))
            k8[b, :, at.start - span.k_offset : at.stop - span.k_offset] = rounded.view(tile.shape)
            k_scale[b, :, j - own] = scale
    shift = None
    if request.shifted:
        grouped = q.unflatten(1, (kv_heads, -1)).double()
        shift = (grouped @ mean.double()[:, :, None, :, None]).flatten(1, 2)[..., 0].float()
    return Prepared(q8, q_scale, k8, k_scale, mean, shift)


def dequantised(request: Request, prepared: Prepared, dtype: torch.dtype = torch.float64) -> Request:
    """The same call with exact scores: attention over this Q and K in `dtype`, one column wider, has int8 scores."""
    q = prepared.q8.to(dtype) * prepared.q_scale.to(dtype)[..., None]
    k = prepared.k8.to(dtype)
    for b, span in enumerate(request.host_spans()):
        position = torch.arange(k.shape[2], device=k.device) + span.k_offset
        index = (position.clamp(min=0) // request.tile.keys) - first_key_tile(span.k_offset, request.tile.keys)
        k[b] *= prepared.k_scale[b, :, index.clamp(max=prepared.k_scale.shape[2] - 1)].to(dtype)[..., None]
    shift = q.new_zeros(q.shape[:3]) if prepared.q_shift is None else prepared.q_shift.to(dtype)
    return replace(
        request,
        q=torch.cat([q, shift[..., None]], -1),
        k=torch.cat([k, torch.ones_like(k[..., :1])], -1),
        scores="exact",
    )


def _round(x: torch.Tensor, unit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8, float32 scale) of the rows x [..., N], one scale a row."""
    largest = x.abs().amax(-1)
    largest = largest.where(largest < torch.inf, torch.nan)
    inverse = torch.full_like(largest, LEVELS).div(largest).where(largest > TINY, 0)  # 127 / x would round twice
    scaled = x * inverse[..., None]
    return scaled.where(scaled.isfinite(), 0).round().to(torch.int8), largest * torch.tensor(unit)
