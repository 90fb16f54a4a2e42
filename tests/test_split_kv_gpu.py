"""The split_kv backend on a GPU against the float64 reference, and which calls it takes."""

import random

import pytest
import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, explain, make_spans, split_kv
from kernel_cases import PLACES, Case, check, check_place
from paged_attention_cases import Paged, check_packed
from paged_attention_cases import check as check_pages

pytestmark = pytest.mark.gpu

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

ROWS, KEYS = (1, 2, 5, 8, 16, 17, 31, 33, 48, 63), (1, 64, 65, 200, 777, 1024, 1500, 3001)
TALL = TileShape(128, 64)  # so that 64 to 127 rows are no whole query tile either


def draw(rng: random.Random) -> Case:
    kv_heads, padded, causal = rng.choice((1, 2)), rng.random() < 0.3, rng.random() < 0.7
    q_rows, k_rows = rng.choice((*ROWS, 64, 100, 127)), rng.choice(KEYS)
    if padded:
        k_rows = q_rows + rng.choice((0, 65, 200, 1300))
    dtype = rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    head_dim, v_head_dim = rng.choice(((64, 64), (128, 128), (128, 128), (40, 40), (96, 72), (192, 128), (256, 256)))
    if dtype == torch.float32:
        head_dim, v_head_dim = min(head_dim, 128), min(v_head_dim, 128)
    return Case(
        batch=3 if padded else rng.choice((1, 2)), heads=kv_heads * rng.choice((1, 2, 3, 4, 5, 8)), kv_heads=kv_heads,
        q_rows=q_rows, k_rows=k_rows, head_dim=head_dim, tile=TALL, causal=causal, gate=rng.choice(("", "gap", "both")),
        q_offset=0 if padded else max(k_rows - q_rows - rng.choice((0, 0, 3)), 0), padded=padded, dtype=dtype,
        window=rng.choice((1, 50, 128, 400, 2000)) if causal and q_rows <= k_rows and rng.random() < 0.3 else None,
        softcap=2.0 if rng.random() < 0.15 else None, sinks=rng.random() < 0.2, v_head_dim=v_head_dim,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_four_random_calls_are_right(seed):
    rng = random.Random(f"split_kv, {seed}")
    for _ in range(4):
        case = draw(rng)
        try:
            check(case, "split_kv", "cuda", seed)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


SHAPE = dict(heads=8, kv_heads=2, head_dim=128, tile=TileShape(), dtype=torch.bfloat16)


@pytest.mark.parametrize("layout", ["tokens first", "halves", "odd base"])
@pytest.mark.parametrize("page", [16, 48, 128, 256])
def test_pages_of_any_size_are_read_where_they_are(page, layout):
    check_pages(Paged((5,), (1900,), page=page, layout=layout, **SHAPE), "split_kv", "cuda", float("nan"))
    check_pages(Paged((33, 1), (1900, 300), page=page, layout=layout, **SHAPE), "split_kv", "cuda", float("nan"))


@pytest.mark.parametrize("page", [16, 128])
@pytest.mark.parametrize("window", [None, 333])
def test_packed_sequences_are_each_as_alone(page, window, monkeypatch):
    # By itself a call would be divided otherwise, and its sums have another order.
    shape = split_kv.shape_of(160, torch.bfloat16, 128, 128, HOPPER)
    monkeypatch.setattr(split_kv, "shape_of", lambda *_: shape)
    monkeypatch.setattr(split_kv, "fewest_splits", lambda *_: 4)
    case = Paged((5, 1, 40), (900, 2000, 1500), page=page, window=window, **SHAPE)
    check_packed(case, "split_kv", "cuda", float("nan"))


@pytest.mark.parametrize("place", PLACES)
def test_the_output_goes_to_any_place(place):
    check_place(Case(2, 8, 2, 9, 1500, 128, padded=True, dtype=torch.bfloat16), "split_kv", place, "cuda")


def test_a_graph_replays_while_sequences_grow_and_is_deterministic():
    q, k, v = (
        torch.randn(2, h, n, 128, device="cuda", dtype=torch.bfloat16) for h, n in ((8, 3), (2, 4096), (2, 4096))
    )

    def spans(length: int) -> torch.Tensor:
        return make_spans(2, length - 3, 0, torch.tensor([length, length - 500]), device="cuda")

    where = spans(1000)
    options = dict(spans=where, return_lse=True)
    block_sparse_attention(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block_sparse_attention(q, k, v, **options)
    for length in (1000, 1001, 2500, 4096):
        where.copy_(spans(length))
        graph.replay()
        for _ in range(3):
            eager = block_sparse_attention(q, k, v, **options)
            assert torch.equal(captured.out, eager.out) and torch.equal(captured.lse, eager.lse)
        exact = block_sparse_attention(q, k, v, backend="triton", **options)
        assert (captured.lse - exact.lse)[0].abs().max() < 1e-3
        assert (captured.out.float() - exact.out.float()).abs().max() < 1e-2


def test_it_is_chosen_for_few_queries_on_many_keys_and_says_why_not():
    def choice(rows: int, keys: int, gate: Gate = Gate(), heads: int = 32, batch: int = 1):  # noqa: B008 - frozen
        q, k = (torch.empty(batch, n, 1, 64, device="cuda", dtype=torch.bfloat16) for n in (heads, 8))
        q, k = q.expand(-1, -1, rows, -1), k.expand(-1, -1, keys, -1)
        return explain(q, k, k, gate, q_offset=keys - rows)

    gate = Gate(gap=torch.full((32, 1), -3.0, device="cuda"))
    for rows, keys, more in ((1, 8192, {}), (63, 8192, {"gate": gate}), (64, 8192, {}), (16, 8192, {"batch": 64})):
        assert choice(rows, keys, **more)[0] == "split_kv"
    name, passed_over = choice(64, 8192, gate)
    assert name != "split_kv" and "its gate judges query tiles" in passed_over["split_kv"]
    for rows, keys, more in ((2048, 8192, {}), (1, 1000, {}), (64, 8192, {"batch": 8})):
        name, passed_over = choice(rows, keys, **more)
        assert name != "split_kv" and "split_kv" not in passed_over
