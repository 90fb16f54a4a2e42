"""The torch backend against the reference, over odd shapes."""

import itertools

import pytest
import torch
from bsfa_kernels import TileShape, block_sparse_attention, tile_statistics
from kernel_cases import Case, check, check_sliding, check_statistics

TILES = (TileShape(16, 32), TileShape(32, 16))


def grid():
    for tile, causal, gate in itertools.product(TILES, (True, False), ("", "absolute", "gap", "both")):
        yield Case(1, 4, 2, 173, 173, 16, tile, causal, gate)
        yield Case(3, 2, 1, 90, 120, 16, tile, causal, gate, padded=True)
    for tile, causal in itertools.product(TILES, (True, False)):
        yield Case(1, 2, 1, 80, 190, 16, tile, causal, "both", q_offset=101, keep_sink=False)
        yield Case(1, 2, 2, 120, 50, 16, tile, causal, "absolute", keep_sink=False)
        yield Case(1, 1, 1, 1, 1, 16, tile, causal, "gap")
    yield Case(1, 2, 1, 500, 500, 64, gate="gap", skip=0.8)
    yield Case(1, 2, 1, 500, 500, 64, TileShape(128, 64), gate="absolute", skip=0.8)
    for tile, window, gate in itertools.product(TILES, (1, 16, 40, 100), ("gap", "both")):
        yield Case(2, 4, 2, 173, 173, 16, tile, True, gate, window=window)
        yield Case(3, 2, 1, 90, 120, 16, tile, True, gate, padded=True, window=window, sinks=True)
    for tile, causal in itertools.product(TILES, (True, False)):
        yield Case(1, 4, 2, 173, 173, 16, tile, causal, "both", softcap=1.5)
        yield Case(1, 4, 2, 173, 173, 16, tile, causal, "gap", sinks=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        yield Case(1, 4, 1, 200, 200, 40, TILES[0], dtype=dtype)


def listed():
    for tile, causal, gate in itertools.product(TILES, (True, False), ("", "absolute", "gap", "both")):
        yield Case(2, 4, 2, 173, 173, 16, tile, causal, gate, blocks="ordered")
        yield Case(3, 2, 1, 90, 120, 16, tile, causal, gate, padded=True, blocks="shuffled")
    for tile, causal, blocks in itertools.product(TILES, (True, False), ("ordered", "shuffled")):
        yield Case(1, 2, 1, 80, 190, 16, tile, causal, "both", q_offset=101, keep_sink=False, blocks=blocks)
        yield Case(1, 2, 2, 120, 50, 16, tile, causal, "", keep_sink=False, blocks=blocks)
        yield Case(1, 1, 1, 1, 1, 16, tile, causal, "gap", blocks=blocks)
    yield Case(1, 2, 1, 500, 500, 64, gate="gap", skip=0.8, blocks="shuffled")
    yield Case(1, 4, 1, 200, 200, 40, TILES[0], dtype=torch.bfloat16, blocks="ordered")


@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_attention(case):
    skipped = check(case, "torch")
    if case.gate and case.k_rows >= 170 and not case.padded and not case.window:
        assert skipped > 0.1


@pytest.mark.parametrize("case", list(listed()), ids=str)
def test_block_lists(case):
    check(case, "torch")


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_statistics(tile, causal, padded):
    if causal:
        check_statistics(Case(2, 2, 1, 100, 130, 16, tile, padded=padded, window=40, softcap=2.0, sinks=True), "torch")
    check_statistics(Case(2, 2, 1, 100, 130, 16, tile, causal, q_offset=0 if padded else 30, padded=padded), "torch")


@pytest.mark.parametrize(
    ("tile", "first"), [(TILES[0], 121), (TileShape(64, 8), 300), (TileShape(64, 32), 101)], ids=str
)
def test_a_chunk_behind_a_sliding_cache(tile, first):
    check_sliding("torch", tile, 90, first)


UNSEEN = [
    (
        (195, 70, 200, 200),
        None,
        True,
        "a query at position 195 sees keys from position 0 on, but the first key stands at k_offset 70",
    ),
    ((300, 200, 400, 400), 150, True, "a query at position 300 sees keys from position 151 on"),
    ((300, 200, 400, 400), 101, True, ""),
    ((10, 20, 15, 2**31 - 1), None, False, "a query at position 10 sees keys from position 0 on, but"),
    ((10, 20, 0, 2**31 - 1), None, False, ""),  # it has no key
    ((300, 200, 50, 50), None, True, ""),  # all rows are padding
    ((300, 200, 50, 400), 101, True, ""),  # the keys ended before its window
]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("span", "window", "causal", "said"), UNSEEN, ids=str)
def test_positions_before_the_first_key_are_seen_by_no_query(span, window, causal, said, backend):
    """What no kernel masks: a key that a cache no longer holds would have a score of 0."""
    q, k, v = (torch.randn(1, heads, rows, 16) for heads, rows in ((2, 33), (1, 250), (1, 250)))
    options = dict(spans=torch.tensor([span], dtype=torch.int32), window=window, causal=causal, backend=backend)
    if not said:
        assert block_sparse_attention(q, k, v, **options).out.isfinite().all()
        return
    with pytest.raises(ValueError, match=said):
        block_sparse_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="count positions from the first key"):
        tile_statistics(q, k, torch.zeros(1, 2, 33), **options)
