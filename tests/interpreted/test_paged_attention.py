"""The portable kernel on pages, in the interpreter."""

import pytest
import torch
from bsfa_kernels import TileShape, portable
from paged_attention_cases import Paged, check

CASES = [
    Paged((70,), (150,)),
    Paged((40, 7), (40, 100), heads=4, kv_heads=2, layout="heads first", gate="absolute"),
    Paged((33,), (90,), layout="halves", gate="absolute", dtype=torch.float16),
    Paged((20,), (77,), gate="", causal=False),
    Paged((50,), (120,), window=40),
]


@pytest.fixture
def gathered(monkeypatch):
    """Whether each call of the kernel read pages where they are."""
    calls, reads = [], portable.reads_pages
    monkeypatch.setattr(portable, "reads_pages", lambda request: calls.append(reads(request)) or calls[-1])
    return calls


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages_are_read_where_they_are(case, gathered):
    # What lies behind a sequence's end may be anything.
    skipped = check(case, "triton", beyond=float("nan"))
    assert gathered == [True] and (0.1 < skipped < 1 or not case.gate)


@pytest.mark.parametrize(
    "case",
    [
        Paged((30,), (70,), page=16),
        Paged((30,), (70,), page=48, tile=TileShape(32, 16)),
        Paged((30,), (70,), layout="odd base"),
    ],
    ids=str,
)
def test_other_pages_are_gathered(case, gathered):
    check(case, "triton")
    assert gathered == [False]
