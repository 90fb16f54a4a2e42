"""Both Triton kernels on a GPU against the float64 reference: hundreds of odd shapes."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import paged_attention_cases
import pytest
import torch
import whole_tiles
from bsfa_kernels import BlockLists, Gate, TileShape, block_sparse_attention, explain, hopper, shortcut
from kernel_cases import PLACES, Case, check, check_place, check_sliding, check_statistics
from paged_attention_cases import Paged
from whole_tiles import Prompt

pytestmark = pytest.mark.gpu

TILES = (TileShape(64, 128), TileShape(128, 64))
LENGTHS = (1, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 320, 383, 385, 500, 650, 777)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_HOPPER = pytest.mark.skipif(not HOPPER, reason="needs an H100 or H200")
BACKENDS = ["triton", pytest.param("hopper", marks=ON_HOPPER)]


def draw(rng: random.Random, backend: str) -> Case:
    kv_heads = rng.choice((1, 2))
    padded = rng.random() < 0.25
    q_rows, k_rows = rng.choice(LENGTHS), rng.choice(LENGTHS)
    if padded:
        k_rows = q_rows + rng.choice((0, 0, 65, 200))
    dtypes = [torch.bfloat16, torch.float16] + [torch.float32] * (backend == "triton")
    dtype = rng.choice(dtypes)
    narrow = (8, 40, 64, 72, 80, 96, 112, 128)
    head_dims = narrow if dtype == torch.float32 else (*narrow, 160, 192, 224, 256)
    causal = rng.random() < 0.7
    return Case(
        batch=3 if padded else rng.choice((1, 2)),
        heads=kv_heads * rng.choice((1, 2, 3)),
        kv_heads=kv_heads,
        q_rows=q_rows,
        k_rows=k_rows,
        head_dim=rng.choice(head_dims),
        tile=TILES[0] if backend == "hopper" else rng.choice(TILES),
        causal=causal,
        gate=rng.choice(("", "absolute", "gap", "gap", "both")),
        skip=rng.choice((0.2, 0.5, 0.9)),
        q_offset=0 if padded else min(rng.choice((0, 0, 64, 100, 333)), abs(k_rows - q_rows)),
        padded=padded,
        keep_sink=rng.random() < 0.8,
        dtype=dtype,
        window=rng.choice((1, 50, 128, 200, 400)) if causal and rng.random() < 0.25 and q_rows <= k_rows else None,
        softcap=2.0 if rng.random() < 0.15 else None,
        sinks=rng.random() < 0.2,
    )


def cases(backend: str, count: int) -> list:
    rng = random.Random(backend)
    return [pytest.param(draw(rng, backend), id=f"{i}") for i in range(count)]


@pytest.mark.parametrize("case", cases("triton", 240))
def test_triton(case):
    check(case, "triton", "cuda")


@ON_HOPPER
@pytest.mark.parametrize("case", cases("hopper", 240))
def test_hopper(case):
    check(case, "hopper", "cuda")


@pytest.mark.parametrize("scores", ["exact", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_behind_a_sliding_cache(backend, scores):
    check_sliding(backend, TILES[0], 66, 193, "cuda", torch.bfloat16, scores)


def paged(rows, keys, head_dim=128, dtype=torch.bfloat16, page=128, **options) -> Paged:
    shape = dict(heads=4, kv_heads=2, head_dim=head_dim, tile=TILES[0], page=page, dtype=dtype)
    return Paged(rows, keys, **shape, **options)


ONE, SEVERAL = ((700,), (1900,)), ((300, 64, 129), (300, 1000, 600))
PAGES = [
    paged(*ONE),
    paged(*SEVERAL, layout="halves"),
    paged(*ONE, 64, layout="heads first", gate="gap absolute"),
    paged(*SEVERAL, 96, torch.float16, gate="absolute"),
    paged(*ONE, 256, layout="halves"),
    paged(*ONE, gate="", causal=False),
    paged(*SEVERAL, 64, window=333),
    paged(*ONE, page=64),
    paged(*SEVERAL, page=256),
    paged(*ONE, layout="odd base"),
]
PACKED = ((700, 64, 1, 129, 385), (700, 1000, 77, 600, 2000))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PAGES, ids=str)
def test_pages_give_the_bits_of_gathered_keys(case, backend):
    paged_attention_cases.check(case, backend, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        paged(*PACKED),
        paged(*PACKED, 64, gate="gap absolute", layout="halves"),
        paged(*PACKED, 256, gate="", window=333),
        paged(*PACKED, page=64),
    ],
    ids=str,
)
def test_packed_sequences_are_each_as_alone(case, backend):
    paged_attention_cases.check_packed(case, backend, "cuda")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", (64, 128, 192, 256))
@pytest.mark.parametrize("padded", (False, True))
def test_the_output_goes_to_any_place(padded, head_dim, backend, place):
    dtype, lists = torch.bfloat16, "ordered" if padded and head_dim == 128 else ""
    case = Case(2, 4, 2, 300, 333, head_dim, q_offset=0 if padded else 33, padded=padded, dtype=dtype, blocks=lists)
    check_place(case, backend, place, "cuda")


# Head dims of Q and K, and of V: MLA's, those that share its kernel, and others.
NARROW = ((192, 128), (192, 128), (160, 96), (192, 72), (256, 128), (128, 64), (72, 40))


def narrow(backend: str, count: int) -> list:
    rng = random.Random(f"narrow {backend}")
    drawn = []
    for i in range(count):
        case, (head_dim, v_head_dim) = draw(rng, backend), NARROW[i % len(NARROW)]
        dtype = torch.bfloat16 if case.dtype == torch.float32 and head_dim > 128 else case.dtype
        case = replace(case, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype, blocks=rng.choice(("", "shuffled")))
        drawn.append(pytest.param(case, id=f"{i}-{head_dim}-{v_head_dim}"))
    return drawn


@pytest.mark.parametrize("case", narrow("triton", 63))
def test_triton_with_values_narrower_than_keys(case):
    check(case, "triton", "cuda")


@ON_HOPPER
@pytest.mark.parametrize("case", narrow("hopper", 140))
def test_hopper_with_values_narrower_than_keys(case):
    check(case, "hopper", "cuda")


@pytest.mark.parametrize("blocks", ("ordered", "shuffled"))
@pytest.mark.parametrize("case", cases("triton", 48))
def test_triton_with_block_lists(case, blocks):
    check(replace(case, blocks=blocks), "triton", "cuda")


@ON_HOPPER
@pytest.mark.parametrize("blocks", ("ordered", "shuffled"))
@pytest.mark.parametrize("case", cases("hopper", 96))
def test_hopper_with_block_lists(case, blocks):
    check(replace(case, blocks=blocks), "hopper", "cuda")


@ON_HOPPER
@pytest.mark.parametrize("blocks", ("", "shuffled"))
@pytest.mark.parametrize("kv_heads", (1, 2, 6))
def test_hopper_in_several_sections_gives_the_same_bits(monkeypatch, kv_heads, blocks):
    case = Case(2, 12, 6, 777, 777, 128, gate="gap", dtype=torch.bfloat16, blocks=blocks)
    q, k, v = case.inputs("cuda")
    gate = Gate(gap=torch.full((12, 13), -2.0, device="cuda"))
    calls = []
    for fits in (kv_heads, 6):
        monkeypatch.setattr(hopper, "SECTION_BYTES", fits * 2 * 777 * 128 * 2)
        monkeypatch.setattr(shortcut, "plans", {})
        assert hopper.section_kv_heads(k, v, 777) == fits
        check(case, "hopper", "cuda")
        calls.append(block_sparse_attention(q, k, v, gate, blocks=case.block_lists("cuda"), return_lse=True))
    assert torch.equal(calls[0].out, calls[1].out) and torch.equal(calls[0].lse, calls[1].lse)


@ON_HOPPER
@pytest.mark.parametrize("batch", range(20))
def test_a_thousand_random_calls_end_and_are_right(batch):
    """Fifty a test; a hang is ended, and reported as a failure, by pytest's timeout."""
    rng = random.Random(f"thousand {batch}")
    for seed in range(50):
        case = replace(draw(rng, "hopper"), blocks=rng.choice(("", "", "shuffled")), skip=rng.random())
        try:
            check(case, "hopper", "cuda", seed)
        except AssertionError as error:
            raise AssertionError(f"{case}, seed {seed}: {error}") from error


@pytest.mark.parametrize("case", cases("triton", 24))
def test_statistics(case):
    check_statistics(case, "triton", "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("listed", (False, True), ids=("dense", "lists"))
@pytest.mark.parametrize("grad", (True, False), ids=("operator", "shortcut"))
def test_graph_replays_with_new_thresholds_and_is_deterministic(backend, listed, grad):
    with torch.set_grad_enabled(grad):
        replays_with_new_thresholds(backend, listed)


def replays_with_new_thresholds(backend, listed):
    q, k, v = (torch.randn(1, h, 2048, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    gate = Gate(gap=torch.full((8, 32), -torch.inf, device="cuda"))

    lists = BlockLists.from_mask(torch.rand(1, 8, 32, 16, device="cuda") < 0.8) if listed else None

    def call():
        return block_sparse_attention(q, k, v, gate, blocks=lists, return_counts=True, backend=backend)

    dense = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    gate.gap.fill_(1.0)
    if listed:
        lists.counts.copy_(lists.counts // 2)
    graph.replay()
    eager = call()
    assert eager.kept.sum() < dense.kept.sum()
    assert torch.equal(captured.out, eager.out) and torch.equal(captured.kept, eager.kept)
    for _ in range(10):
        assert torch.equal(call().out, eager.out)


def prompt(backend: str, length: int = 777) -> Prompt:
    return Prompt(backend, TILES[0], length, 128, "cuda", torch.bfloat16, gap=1.5)


@pytest.mark.parametrize("cuts", [[320], [100, 333], [7, 600, 606], [191, 192, 193]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_differ_from_the_whole_prompt_only_in_keeping_more(backend, cuts):
    whole_tiles.chunks_keep_more(prompt(backend), cuts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_sequences_end(backend):
    whole_tiles.a_known_end_is_whole(prompt(backend))
    whole_tiles.right_padded_chunks(prompt(backend, 500), short=190, cut=203)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_scores_are_kept(backend):
    whole_tiles.nan_scores_are_kept(prompt(backend), whole_tiles.DROP_ALL)


@pytest.mark.parametrize("odd", ["base", "axes of size 1", "rows", "shared heads"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_gives_the_same_bits(backend, odd):
    case = prompt(backend)
    q, k, v = case.tensors()
    k = k[:, :1].expand(-1, 2, -1, -1) if odd == "shared heads" else k
    expected = case.attend(q, k.contiguous(), v, case.gate()).out
    if odd == "base":
        q, k, v = (torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v))
    elif odd == "axes of size 1":
        q, k, v = (x.as_strided(x.shape, (x.stride(0) + 3, *x.stride()[1:])) for x in (q, k, v))
    elif odd == "rows":
        q, k, v = (torch.nn.functional.pad(x, (0, 3))[..., :-3] for x in (q, k, v))
    assert torch.equal(case.attend(q, k, v, case.gate()).out, expected)


@ON_HOPPER
def test_a_batch_too_large_for_a_grid_goes_elsewhere():
    q = torch.randn(65_536, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    name, passed_over = explain(q, q, q)
    assert name == "triton" and "65,536 sections: a launch can have 65,535" in passed_over["hopper"]
    out = block_sparse_attention(q, q, q).out
    assert torch.equal(out[-1:], block_sparse_attention(*[q[-1:]] * 3, backend="triton").out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_and_threads_do_not_disturb_each_other(backend):
    case = prompt(backend, 2000)
    q, k, v = case.tensors()
    expected = [case.attend(q, k, v, Gate(gap=torch.full((4, 1), g, device="cuda"))).out for g in (0.5, 1.0, 1.5, 2.0)]
    torch.cuda.synchronize()

    def work(index: int):
        gate = Gate(gap=torch.full((4, 1), 0.5 + index / 2, device="cuda"))
        with torch.cuda.stream(torch.cuda.Stream()):
            outs = [case.attend(q, k, v, gate).out for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(out, expected[index]) for out in outs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_gpu_gives_the_same_bits(backend):
    case = prompt(backend)
    first = case.attend(*case.tensors(), case.gate())
    second = Prompt(backend, TILES[0], 777, 128, "cuda:1", torch.bfloat16, gap=1.5)
    other = second.attend(*second.tensors(), second.gate())
    assert torch.cuda.current_device() == 0 and other.out.device.index == 1
    assert torch.equal(first.out.cpu(), other.out.cpu()) and torch.equal(first.kept.cpu(), other.kept.cpu())


@ON_HOPPER
def test_hopper_is_chosen_and_says_why_not():
    q = torch.randn(1, 2, 256, 128, device="cuda", dtype=torch.bfloat16)
    assert explain(q, q, q)[0] == "hopper"
    name, passed_over = explain(q.float(), q.float(), q.float())
    assert name == "triton" and "float32" in passed_over["hopper"]
