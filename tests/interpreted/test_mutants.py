"""Kernels broken on purpose, one line each: the checks that the kernels pass must fail every one of them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
import whole_tiles
from bsfa_kernels import TileShape, portable
from bsfa_kernels.portable import FLOAT32_DOT, larger
from kernel_cases import Case, check
from whole_tiles import Prompt

CASE = Case(1, 1, 1, 112, 112, 16, TileShape(16, 32), gate="both", dtype=torch.float16)
PADDED = Case(2, 1, 1, 70, 70, 16, TileShape(16, 32), causal=False, gate="gap", padded=True)


@triton.jit
def without_rescaling_the_sum(s, row_max, v, running_max, row_sum, acc, scale_log2):
    new_max = larger(running_max, row_max * scale_log2)
    p = tl.exp2(s * scale_log2 - new_max[:, None])
    alpha = tl.exp2(running_max - new_max)
    return new_max, row_sum + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=FLOAT32_DOT)


@triton.jit
def with_weights_of_fewer_bits(s, row_max, v, running_max, row_sum, acc, scale_log2):
    new_max = larger(running_max, row_max * scale_log2)
    p = tl.exp2(s * scale_log2 - new_max[:, None])
    p = (p * 64).to(tl.int32).to(tl.float32) / 64
    alpha = tl.exp2(running_max - new_max)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    return new_max, row_sum, tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=FLOAT32_DOT)


@triton.jit
def with_a_tile_of_v_read_as_zero(
    v_desc, b, kv_head, row, j, length, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr
):
    v = v_desc.load([b, kv_head, row, 0]).reshape([KEYS, BLOCK_D])
    return tl.where(j == 1, 0.0, v).to(v.dtype)


@triton.jit
def with_one_key_too_few(
    s, q_position, first_key, length, window, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    key = first_key + tl.arange(0, KEYS)
    last = length - 1
    if CAUSAL:
        last = tl.minimum(q_position, last)[:, None]
    return tl.where((key[None, :] < last) | (key[None, :] == 0), s, float("-inf"))


@triton.jit
def with_a_neighbours_threshold(thresholds_ptr, head, query_tile, tiles, whole):
    threshold = tl.load(thresholds_ptr + head * tiles + tl.minimum(query_tile + 1, tiles - 1))
    return tl.where(whole, threshold, float("-inf"))


@triton.jit
def with_partial_tiles_judged(thresholds_ptr, head, query_tile, tiles, whole):
    return tl.load(thresholds_ptr + head * tiles + tl.minimum(query_tile, tiles - 1))


@triton.jit
def with_padding_in_the_vote(x, axis: tl.constexpr):
    return tl.sum(x, axis)


MUTANTS = [
    ("online_softmax_update", without_rescaling_the_sum, CASE),
    ("online_softmax_update", with_weights_of_fewer_bits, CASE),
    ("tile_values", with_a_tile_of_v_read_as_zero, CASE),
    ("mask_tile", with_one_key_too_few, CASE),
    ("mask_tile", with_one_key_too_few, PADDED),
    ("load_threshold", with_a_neighbours_threshold, CASE),
    ("largest", with_padding_in_the_vote, CASE),
]


@pytest.mark.parametrize("name, mutant, case", MUTANTS, ids=[f"{f.__name__}-{c.gate}" for _, f, c in MUTANTS])
def test_a_broken_kernel_fails(monkeypatch, name, mutant, case):
    monkeypatch.setattr(portable, name, mutant)
    with pytest.raises(AssertionError, match="off by|kept tiles|logsumexp|not finite"):
        check(case, "triton")


def test_a_kernel_that_judges_partial_tiles_fails(monkeypatch):
    monkeypatch.setattr(portable, "load_threshold", with_partial_tiles_judged)
    with pytest.raises(AssertionError, match="not close"):
        whole_tiles.chunks_keep_more(Prompt("triton", TileShape(16, 32), length=173), [90])
