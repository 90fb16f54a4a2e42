"""Calls of few queries on many keys, in the interpreter: pairs (query, head) as rows, keys in several parts."""

import pytest
import torch
from bsfa_kernels import BackendUnavailable, BlockLists, Gate, TileShape, block_sparse_attention, split_kv
from bsfa_kernels.request import Request
from kernel_cases import Case, check, check_place
from paged_attention_cases import Paged, check_packed
from paged_attention_cases import check as check_pages

TILE = TileShape()  # whose 64 rows no call here has: gates judge nothing


@pytest.fixture(autouse=True)
def splits(request, monkeypatch):
    """As many parts of the keys, 3 if a test does not say."""
    number = getattr(request, "param", 3)
    monkeypatch.setattr(split_kv, "fewest_splits", lambda *_: number)
    return number


def cases():
    for causal in (True, False):
        yield Case(1, 4, 2, 8, 200, 16, TILE, causal, q_offset=192)
        yield Case(3, 5, 1, 13, 150, 24, TILE, causal, padded=True)
    yield Case(2, 4, 2, 1, 300, 16, TILE, causal=False)
    yield Case(1, 3, 1, 63, 300, 16, TILE, gate="both", q_offset=200)
    yield Case(1, 2, 2, 40, 20, 16, TILE)  # queries behind the keys
    yield Case(1, 2, 1, 1, 1, 16, TILE)
    for window in (1, 100):
        yield Case(1, 6, 2, 20, 260, 16, TILE, q_offset=240, window=window, sinks=True)
    yield Case(3, 2, 1, 20, 150, 16, TILE, padded=True, window=30, softcap=2.0, sinks=True)
    yield Case(1, 4, 2, 30, 150, 96, TILE, q_offset=120, v_head_dim=64, sinks=True, dtype=torch.float16)
    yield Case(1, 4, 1, 33, 200, 64, TILE, False, softcap=1.5, q_offset=100, dtype=torch.float16)
    yield Case(1, 2, 1, 9, 100, 192, TILE, q_offset=91, v_head_dim=128, dtype=torch.float16)
    yield Case(1, 2, 1, 70, 200, 16, TileShape(128, 64), q_offset=130)


# One part, several, and more than some sequences have tiles.
@pytest.mark.parametrize(
    ("case", "splits"), [(x, (3, 1, 9)[i % 3]) for i, x in enumerate(cases())], ids=str, indirect=["splits"]
)
def test_attention(case, splits):
    check(case, "split_kv")


@pytest.mark.parametrize("place", ["heads-of-wider-rows", "base-off-by-one"])
def test_the_output_goes_to_any_place(place):
    check_place(Case(2, 2, 1, 20, 90, 24, TILE, padded=True), "split_kv", place)


SHAPE = dict(heads=2, kv_heads=1, tile=TILE)


@pytest.mark.parametrize(
    ("page", "layout"), [(16, "tokens first"), (48, "halves"), (64, "heads first"), (128, "halves"), (16, "odd base")]
)
def test_pages_of_any_size_are_read_where_they_are(page, layout, monkeypatch):
    gathered, gather = [], Request.gathered
    monkeypatch.setattr(Request, "gathered", lambda self: gathered.append(self) or gather(self))
    check_pages(Paged((5,), (200,), page=page, layout=layout, **SHAPE), "split_kv", beyond=float("nan"))
    check_pages(Paged((7, 2), (200, 100), page=page, layout=layout, **SHAPE), "split_kv", beyond=float("nan"))
    assert len(gathered) == (2 if layout == "odd base" else 0)


@pytest.mark.parametrize(("page", "window"), [(16, None), (64, 50)])
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
    """A positive k_offset that is no multiple of a tile."""
    q, k, v = (torch.randn(1, heads, rows, 16) for heads, rows in ((2, 5), (1, 130), (1, 130)))
    spans = torch.tensor([[195, 70, 200, 200]], dtype=torch.int32)
    options = dict(spans=spans, window=126, return_lse=True)
    found, expected = (block_sparse_attention(q, k, v, backend=name, **options) for name in ("split_kv", "reference"))
    assert torch.allclose(found.out, expected.out, atol=1e-5) and torch.allclose(found.lse, expected.lse, atol=1e-5)


def test_gates_on_short_calls_change_no_bit():
    q, k, v = (torch.randn(1, heads, rows, 16) for heads, rows in ((4, 20), (1, 300), (1, 300)))
    options = dict(q_offset=280, backend="split_kv")
    gated = block_sparse_attention(q, k, v, Gate(gap=10.0, absolute=10.0), return_counts=True, **options)
    assert torch.equal(gated.out, block_sparse_attention(q, k, v, **options).out)
    assert not gated.kept.any() and not gated.candidates.any()


REFUSED = [
    (dict(gate=Gate(gap=0.0)), "its gate judges query tiles"),
    (dict(return_counts=True), "are to be counted"),
    (dict(scores="int8"), "no int8 scores"),
    (dict(blocks=BlockLists.from_mask(torch.ones(1, 2, 2, 3, dtype=torch.bool))), "block lists"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=[reason.replace(" ", "-") for _, reason in REFUSED])
def test_what_it_cannot_do_is_refused(options, reason):
    q, k, v = (torch.randn(1, 2, rows, 16) for rows in (100, 300, 300))
    with pytest.raises(BackendUnavailable, match=reason):
        block_sparse_attention(q, k, v, q_offset=192, backend="split_kv", **options)


def test_a_gate_is_in_the_way_only_where_a_query_tile_is_whole():
    q, k, v = (torch.randn(1, 2, rows, 16) for rows in (90, 300, 300))
    gate = Gate(gap=torch.full((2, 1), 10.0))
    found, expected = (
        block_sparse_attention(q, k, v, gate, q_offset=160, tile=TileShape(64, 32), backend=name)
        for name in ("split_kv", "triton")
    )
    assert torch.allclose(found.out, expected.out, atol=1e-5)
    with pytest.raises(BackendUnavailable, match="its gate judges"):
        block_sparse_attention(q, k, v, gate, q_offset=192, tile=TileShape(64, 32), backend="split_kv")
