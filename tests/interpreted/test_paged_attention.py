"""The portable kernel on pages, in the interpreter."""

import pytest
import torch
from bsfa_kernels import TileShape, portable
from paged_attention_cases import Paged, check, check_packed

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


@pytest.mark.parametrize(
    "case",
    [
        Paged((40, 7, 70), (70, 100, 160), heads=4, kv_heads=2),
        Paged((5, 60), (5, 150), gate="absolute", layout="halves", window=90, dtype=torch.float16),
    ],
    ids=str,
)
def test_packed_sequences_are_each_as_alone(case, gathered):
    skipped = check_packed(case, "triton", beyond=float("nan"))
    assert gathered == [True] * (1 + len(case.rows)) and 0.1 < skipped < 1


def test_packed_sequences_on_other_pages_are_served_one_by_one(gathered):
    check_packed(Paged((20, 3), (20, 40), page=16), "triton")
    assert gathered[:3] == [False] * 3
