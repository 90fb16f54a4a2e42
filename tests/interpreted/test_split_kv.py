"""Calls of few queries on many keys, in the interpreter: pairs (query, head) as rows, keys in several parts."""

import itertools

import pytest
import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, split_kv
from bsfa_kernels.request import Request
from kernel_cases import PLACES, Case, check, check_place
from paged_attention_cases import Paged
from paged_attention_cases import check as check_pages
from paged_attention_cases import check_packed

TILE = TileShape()  # whose 64 rows no call here has: gates judge nothing


@pytest.fixture(params=[1, 3, 9], ids=lambda n: f"{n}-splits", autouse=True)
def splits(request, monkeypatch):
    """As many parts of the keys; of some sequences more than they have tiles."""
    monkeypatch.setattr(split_kv, "fewest_splits", lambda *_: request.param)
    return request.param


def cases():
    for causal, (heads, kv_heads) in itertools.product((True, False), ((4, 1), (6, 2), (5, 1))):
        yield Case(1, heads, kv_heads, 8, 200, 16, TILE, causal, q_offset=192)
        yield Case(3, heads, kv_heads, 13, 150, 24, TILE, causal, padded=True)
    yield Case(2, 4, 2, 1, 300, 16, TILE, causal=False)
    yield Case(1, 3, 1, 63, 300, 16, TILE, gate="both", q_offset=200)
    yield Case(1, 2, 2, 40, 20, 16, TILE)  # queries behind the keys
    yield Case(1, 2, 1, 1, 1, 16, TILE)
    for window in (1, 40, 100):
        yield Case(1, 4, 2, 20, 260, 16, TILE, q_offset=240, window=window, sinks=True)
    yield Case(3, 2, 1, 20, 150, 16, TILE, padded=True, window=30, softcap=2.0, sinks=True)
    yield Case(1, 4, 2, 30, 150, 96, TILE, q_offset=120, v_head_dim=64, sinks=True, dtype=torch.float16)
    yield Case(1, 4, 1, 33, 200, 64, TILE, False, softcap=1.5, q_offset=100, dtype=torch.float16)
    yield Case(1, 2, 1, 9, 100, 192, TILE, q_offset=91, v_head_dim=128, dtype=torch.float16)
    yield Case(1, 2, 1, 70, 200, 16, TileShape(128, 64), q_offset=130)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_attention(case):
    check(case, "split_kv")


@pytest.mark.parametrize("place", PLACES)
def test_the_output_goes_to_any_place(place):
    check_place(Case(2, 4, 2, 20, 90, 24, TILE, padded=True), "split_kv", place)


SHAPE = dict(heads=4, kv_heads=2, tile=TILE)


@pytest.mark.parametrize("layout", ["tokens first", "halves", "heads first", "odd base"])
@pytest.mark.parametrize("page", [16, 48, 64, 128])
def test_pages_of_any_size_are_read_where_they_are(page, layout, monkeypatch):
    gathered, gather = [], Request.gathered
    monkeypatch.setattr(Request, "gathered", lambda self: gathered.append(self) or gather(self))
    check_pages(Paged((5,), (200,), page=page, layout=layout, **SHAPE), "split_kv", beyond=float("nan"))
    check_pages(Paged((7, 2), (200, 100), page=page, layout=layout, **SHAPE), "split_kv", beyond=float("nan"))
    assert len(gathered) == (2 if layout == "odd base" else 0)


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("window", [None, 50])
def test_packed_sequences_are_each_as_alone(page, window):
    check_packed(Paged((5, 1, 20), (90, 200, 150), page=page, window=window, **SHAPE), "split_kv", beyond=float("nan"))


def test_nan_and_infinity_are_handed_on():
    q, k, v = (torch.randn(1, heads, rows, 16) for heads, rows in ((2, 3), (1, 300), (1, 300)))
    q[0, 0, 1, 3] = torch.nan
    result = block_sparse_attention(q, k, v, q_offset=297, return_lse=True, backend="split_kv")
    expected = torch.zeros(1, 2, 3, dtype=torch.bool)
    expected[0, 0, 1] = True
    assert torch.equal(result.out.isnan().all(-1), expected) and torch.equal(result.lse.isnan(), expected)


def test_keys_that_a_cache_no_longer_holds():
    """A positive k_offset that is no multiple of a tile, without a window."""
    q, k, v = (torch.randn(1, heads, rows, 16) for heads, rows in ((2, 5), (1, 130), (1, 130)))
    spans = torch.tensor([[195, 70, 200, 200]], dtype=torch.int32)
    options = dict(spans=spans, return_lse=True)
    found, expected = (block_sparse_attention(q, k, v, backend=name, **options) for name in ("split_kv", "reference"))
    assert torch.allclose(found.out, expected.out, atol=1e-5) and torch.allclose(found.lse, expected.lse, atol=1e-5)


def test_gates_on_short_calls_change_no_bit():
    q, k, v = (torch.randn(1, heads, rows, 16) for heads, rows in ((4, 20), (1, 300), (1, 300)))
    options = dict(q_offset=280, backend="split_kv")
    gated = block_sparse_attention(q, k, v, Gate(gap=10.0, absolute=10.0), return_counts=True, **options)
    assert torch.equal(gated.out, block_sparse_attention(q, k, v, **options).out)
    assert not gated.kept.any() and not gated.candidates.any()
