"""Keys and values of one sequence out of a paged cache, in order and side by side, as the kernels read them.

A gather costs what it moves: at 32k tokens a hundredth of the attention that follows it. Pages of FP8 are dequantised
on the way, value times scale, in float32.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch

POSITIONS = 32  # of one program


def gather_pages(
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    length: int,
    *,
    dtype: torch.dtype | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(k, v) [1, Hkv, length, D], contiguous, for `block_sparse_attention`.

    `keys` and `values` [pages, Hkv, positions of a page, D], any strides with a contiguous last axis: position p of the
    sequence is row p % positions of page block_table[p // positions]. `block_table` int32 or int64 [at least
    ceil(length / positions)], on the cache's device. `dtype` of the result (None: the cache's), with `key_scale` and
    `value_scale` (float32, one element each) for FP8 caches. On a GPU one Triton kernel, elsewhere plain indexing.

    Raises ValueError for shapes, devices or dtypes that do not fit together.
    """
    _check(keys, values, block_table, length, dtype, (key_scale, value_scale))
    dtype = dtype or keys.dtype
    if keys.is_cuda:
        return launch(keys, values, block_table, length, dtype, key_scale, value_scale)
    page = keys.shape[2]
    blocks = block_table[: -(-length // page)].long()
    pairs = ((keys, key_scale), (values, value_scale))
    return tuple(_scaled(join_pages(x[blocks], length), scale, dtype)[None] for x, scale in pairs)


def join_pages(pages: torch.Tensor, length: int) -> torch.Tensor:
    """[Hkv, length, D] from the pages [n, Hkv, positions, D] of one sequence."""
    return pages.transpose(0, 1).flatten(1, 2)[:, :length].contiguous()


def launch(keys, values, block_table, length, dtype, key_scale, value_scale):
    """`gather_pages` by the Triton kernel; arguments as checked there."""
    heads, head_dim = keys.shape[1], keys.shape[3]
    k, v = (torch.empty(1, heads, length, head_dim, dtype=dtype, device=keys.device) for _ in range(2))
    kernels = _kernels()
    with torch.cuda.device_of(keys):
        kernels.gather[-(-length // POSITIONS), heads](
            keys, values, block_table, k, v, key_scale, value_scale, length, keys.shape[2], *keys.stride()[:3],
            *values.stride()[:3], HEAD_DIM=head_dim, WIDTH=kernels.power_of_2(head_dim), POSITIONS=POSITIONS,
        )  # fmt: skip
    return k, v


def _check(keys, values, block_table, length, dtype, scales):
    if keys.dim() != 4 or keys.shape != values.shape:
        raise ValueError(
            f"keys and values must be [pages, heads, positions, head dim] alike, got {list(keys.shape)} and "
            f"{list(values.shape)}"
        )
    if keys.dtype != values.dtype or keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError("keys and values must have one dtype and be contiguous along their last axis")
    if block_table.dim() != 1 or block_table.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"block_table must be int32 or int64 [pages], got {block_table.dtype} {block_table.dim()} axes"
        )
    if length < 1 or -(-length // keys.shape[2]) > len(block_table):
        raise ValueError(f"{length} positions do not fit {len(block_table)} pages of {keys.shape[2]}")
    quantised = keys.dtype.itemsize == 1
    if not keys.dtype.is_floating_point or (quantised and (dtype is None or None in scales)):
        raise ValueError(f"a cache of {keys.dtype} needs dtype, key_scale and value_scale, and must hold floats")
    for name, x in (
        ("values", values),
        ("block_table", block_table),
        ("key_scale", scales[0]),
        ("value_scale", scales[1]),
    ):
        if x is not None and x.device != keys.device:
            raise ValueError(f"{name} is on {x.device}, but keys are on {keys.device}")
    for scale in scales:
        if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
            raise ValueError(f"a scale must be one float32, got {scale.dtype} {list(scale.shape)}")


def _scaled(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if scale is None else (x.float() * scale).to(dtype)


@cache
def _kernels() -> SimpleNamespace:
    """Triton is imported when a kernel is first launched: CPUs need none."""
    import triton

    from .pages_kernel import gather

    return SimpleNamespace(gather=gather, power_of_2=triton.next_power_of_2)
