"""The Triton kernels in the interpreter against the reference, over odd shapes."""

import itertools

import pytest
import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, make_spans, tile_statistics
from kernel_cases import PLACES, Case, check, check_place, check_sliding, check_statistics

WIDE, TALL = TileShape(16, 32), TileShape(32, 16)


def heads(causal: bool, gate: str) -> tuple[int, int]:
    """Query and KV heads. Grouping is tried at one point of the grid in four: the interpreter is slow."""
    return (4, 2) if causal and gate == "gap" else (2, 1)


def grid():
    for tile, causal, gate in itertools.product((WIDE, TALL), (True, False), ("", "absolute", "gap", "both")):
        yield Case(1, *heads(causal, gate), 141, 141, 16, tile, causal, gate)
    for tile, causal in itertools.product((WIDE, TALL), (True, False)):
        yield Case(3, 2, 1, 100, 100, 32, tile, causal, "gap", padded=True)
        yield Case(3, 2, 2, 40, 170, 16, tile, causal, "absolute", padded=True)
        yield Case(1, 2, 1, 80, 190, 16, tile, causal, "gap", q_offset=110)
        yield Case(1, 2, 1, 80, 190, 16, tile, causal, "both", q_offset=101, keep_sink=False)
        yield Case(1, 2, 2, 120, 50, 16, tile, causal, "absolute", keep_sink=False)
        yield Case(1, 1, 1, 1, 1, 16, tile, causal, "gap")
    for tile in (WIDE, TALL):
        yield Case(1, 2, 1, 110, 110, 16, tile, True, "both", window=40, sinks=True)
        yield Case(3, 2, 1, 60, 90, 16, tile, True, "gap", padded=True, window=20, softcap=2.0)
        yield Case(1, 2, 1, 100, 100, 16, tile, False, "gap", softcap=1.5, sinks=True)
    for head_dim in (8, 40, 72):
        yield Case(1, 2, 1, 90, 90, head_dim, WIDE)
    for head_dim, v_head_dim in ((24, 16), (96, 64), (40, 8)):
        yield Case(1, 2, 1, 90, 90, head_dim, WIDE, v_head_dim=v_head_dim)
    yield Case(3, 2, 1, 60, 90, 48, TALL, True, "both", padded=True, sinks=True, v_head_dim=32)
    yield Case(1, 2, 2, 100, 100, 192, TileShape(64, 128), dtype=torch.float16, v_head_dim=128)
    yield Case(1, 2, 1, 90, 90, 16, WIDE, True, "gap", window=1)
    yield Case(1, 2, 1, 90, 90, 16, WIDE, True, "", window=33, blocks="shuffled")
    yield Case(1, 2, 1, 141, 141, 96, WIDE, dtype=torch.float16)
    yield Case(1, 2, 1, 141, 141, 64, TALL, gate="absolute", dtype=torch.float16)
    yield Case(1, 1, 1, 700, 700, 64, TileShape(64, 128), gate="both", skip=0.7)
    yield Case(1, 1, 1, 500, 500, 64, TileShape(128, 64), gate="both", skip=0.7)


def listed():
    for tile, causal, gate in itertools.product((WIDE, TALL), (True, False), ("", "gap", "both")):
        yield Case(1, *heads(causal, gate), 141, 141, 16, tile, causal, gate, blocks="ordered")
    for tile, causal in itertools.product((WIDE, TALL), (True, False)):
        yield Case(3, 2, 1, 100, 100, 32, tile, causal, "gap", padded=True, blocks="shuffled")
        yield Case(3, 2, 2, 40, 170, 16, tile, causal, "absolute", padded=True, blocks="ordered")
        yield Case(1, 2, 1, 80, 190, 16, tile, causal, "both", q_offset=101, keep_sink=False, blocks="shuffled")
        yield Case(1, 2, 2, 120, 50, 16, tile, causal, "", keep_sink=False, blocks="shuffled")
        yield Case(1, 1, 1, 1, 1, 16, tile, causal, "gap", blocks="shuffled")
    yield Case(1, 2, 1, 141, 141, 96, WIDE, dtype=torch.float16, blocks="shuffled")
    yield Case(1, 2, 1, 100, 100, 48, WIDE, False, "gap", blocks="shuffled", v_head_dim=32)
    yield Case(1, 1, 1, 700, 700, 64, TileShape(64, 128), gate="", blocks="ordered")


@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_attention(case):
    skipped = check(case, "triton")
    if case.gate and case.k_rows >= 141 and not case.padded and not case.window:
        assert skipped > 0.1


@pytest.mark.parametrize("case", list(listed()), ids=str)
def test_block_lists(case):
    check(case, "triton")


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("tile", (WIDE, TALL), ids=str)
def test_statistics(tile, causal, padded):
    check_statistics(Case(2, 2, 1, 100, 130, 16, tile, causal, q_offset=0 if padded else 30, padded=padded), "triton")


@pytest.mark.parametrize(("tile", "first"), [(WIDE, 51), (TALL, 41)], ids=str)
@pytest.mark.parametrize("scores", ["exact", "int8"])
def test_a_chunk_behind_a_sliding_cache(tile, first, scores):
    check_sliding("triton", tile, 20, first, scores=scores)


@pytest.mark.parametrize("place", PLACES)
def test_the_output_goes_to_any_place(place):
    check_place(Case(2, 2, 1, 20, 20, 24, WIDE, padded=True), "triton", place)


@pytest.mark.parametrize("backend", ["triton", "split_kv"])
def test_spans_lie_in_memory_as_they_like(backend):
    q, k = torch.randn(2, 2, 20, 16), torch.randn(2, 1, 90, 16)
    spans = make_spans(2, torch.tensor([60, 70]), torch.tensor([0, -7]), torch.tensor([80, 83]))
    strided = spans.t().contiguous().t()

    def compute(spans):
        options = dict(spans=spans, tile=WIDE if backend == "triton" else TileShape())
        out, lse, *counts = block_sparse_attention(
            q, k, k, Gate(gap=-1.0), return_lse=True, return_counts=True, backend=backend, **options
        )
        if backend == "split_kv":
            return out, lse, *counts
        return out, lse, *counts, *tile_statistics(q, k, lse, backend=backend, **options)

    for one, other in zip(compute(spans), compute(strided), strict=True):
        assert torch.equal(one, other)
