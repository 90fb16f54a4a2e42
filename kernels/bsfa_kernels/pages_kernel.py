"""The Triton kernel of pages.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather(
    keys_ptr, values_ptr, block_table_ptr, k_ptr, v_ptr, key_scale_ptr, value_scale_ptr, length, page,
    key_page, key_head, key_row, value_page, value_head, value_row,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """POSITIONS positions of one head: k and v [heads, length, HEAD_DIM], contiguous, from pages by their strides."""
    head = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    column = tl.arange(0, WIDTH)
    inside = (position < length)[:, None] & (column < HEAD_DIM)[None, :]
    block = tl.load(block_table_ptr + position // page, mask=position < length, other=0).to(tl.int64)
    row = (position % page).to(tl.int64)
    target = (head * length + position)[:, None] * HEAD_DIM + column
    source = (block * key_page + head * key_head + row * key_row)[:, None] + column
    copy(keys_ptr + source, k_ptr + target, key_scale_ptr, inside)
    source = (block * value_page + head * value_head + row * value_row)[:, None] + column
    copy(values_ptr + source, v_ptr + target, value_scale_ptr, inside)


@triton.jit
def copy(source, target, scale_ptr, inside):
    """One tile, times the scale where there is one."""
    x = tl.load(source, mask=inside)
    if scale_ptr is not None:
        x = x.to(tl.float32) * tl.load(scale_ptr)
    tl.store(target, x.to(target.dtype.element_ty), mask=inside)
