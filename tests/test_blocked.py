"""The torch backend against the reference, over odd shapes."""

import itertools

import pytest
import torch
from bsfa_kernels import TileShape
from kernel_cases import Case, check, check_statistics

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
