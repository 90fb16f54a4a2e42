"""Block lists: how they are made, and what a call with them means."""

from __future__ import annotations

import pytest
import torch
from bsfa_kernels import BlockLists, Gate, TileShape, block_sparse_attention

TILE = TileShape(16, 32)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])
FULL_OR_CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
SHAPE = (2, 4, 7, 4)  # batch, query heads, query tiles, key tiles


def attention(backend: str, gate: Gate = Gate(), **options):  # noqa: B008 - frozen
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 112, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    return block_sparse_attention(
        q, k, v, gate, tile=TILE, return_lse=True, return_counts=True, backend=backend, **options
    )


def every_tile(order) -> BlockLists:
    indices = torch.tensor(list(order), dtype=torch.int32)
    return BlockLists(indices.expand(*SHAPE[:3], -1), torch.full(SHAPE[:3], len(indices), dtype=torch.int32))


def test_a_mask_becomes_lists_of_what_it_sets():
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4]).view(1, 1, 3, 4)
    lists = BlockLists.from_mask(mask)
    assert lists.counts.tolist() == [[[4, 4, 4]]]
    assert lists.indices.tolist() == [[[[0, -1, 2, 3], [-1] * 4, [0, 1, 2, 3]]]]
    assert lists.indices.dtype == lists.counts.dtype == torch.int32


@BACKENDS
@FULL_OR_CAUSAL
def test_full_lists_without_a_gate_are_dense_attention(backend, causal):
    dense = attention(backend, causal=causal)
    for lists in (every_tile(range(4)), BlockLists.from_mask(torch.ones(SHAPE, dtype=torch.bool))):
        listed = attention(backend, causal=causal, blocks=lists)
        for got, expected in zip(listed, dense, strict=True):
            torch.testing.assert_close(got, expected)


@BACKENDS
@FULL_OR_CAUSAL
@pytest.mark.parametrize("capacity", [0, 4])
def test_empty_lists_leave_the_forced_tiles(backend, causal, capacity):
    nothing = BlockLists(
        torch.zeros(*SHAPE[:3], capacity, dtype=torch.int32), torch.zeros(SHAPE[:3], dtype=torch.int32)
    )
    empty = attention(backend, causal=causal, blocks=nothing)
    forced = attention(backend, Gate(absolute=torch.full((4, 1), torch.inf)), causal=causal)
    torch.testing.assert_close((empty.out, empty.lse), (forced.out, forced.lse))
    assert not empty.kept.any() and not empty.candidates.any()


@BACKENDS
def test_forced_tiles_are_visited_once_and_counted_nowhere(backend):
    forced = torch.zeros(SHAPE, dtype=torch.bool)
    forced[..., 0] = True
    for query_tile in range(SHAPE[2]):
        forced[..., query_tile, query_tile * TILE.rows // TILE.keys] = True
    for keep_sink in (True, False):
        options = dict(causal=True, keep_sink=keep_sink)
        listed = attention(backend, blocks=BlockLists.from_mask(forced), **options)
        expected = torch.zeros(SHAPE[2], dtype=torch.int32)
        if not keep_sink:
            expected[2:] = 1  # where tile 0 is no diagonal it is a candidate like any other
        assert (listed.candidates == expected).all()
        unlisted = attention(backend, blocks=BlockLists.from_mask(forced & False), causal=True)
        torch.testing.assert_close(listed.out, unlisted.out)


@BACKENDS
def test_a_list_is_a_set(backend):
    gate = Gate(gap=torch.full((4, 1), 0.0))
    dense = attention(backend, gate, causal=False)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [3, 3, 0, 2, 1, 1]):
        listed = attention(backend, gate, causal=False, blocks=every_tile(order))
        for got, expected in zip(listed, dense, strict=True):
            assert torch.equal(got, expected)


def test_bad_lists_are_refused():
    indices, counts = torch.zeros(SHAPE, dtype=torch.int32), torch.zeros(SHAPE[:3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"'indices' must be an int32 .* capacity\], got torch.int64 \[2, 4, 7, 4\]"):
        BlockLists(indices.long(), counts)
    with pytest.raises(ValueError, match=r"'counts' must be an int32 .* query tiles\], got torch.int32 \[2, 4\]"):
        BlockLists(indices, counts[..., 0])
    with pytest.raises(ValueError, match=r"counts \[2, 4, 6\] on cpu do not fit indices \[2, 4, 7, 4\] on cpu"):
        BlockLists(indices, counts[..., 1:])
    with pytest.raises(ValueError, match=r"counts \[2, 4, 7\] on meta do not fit"):
        BlockLists(indices, counts.to("meta"))
    with pytest.raises(ValueError, match=r"mask must be a bool tensor .*, got torch.int32 \[2, 4, 7, 4\]"):
        BlockLists.from_mask(indices)
