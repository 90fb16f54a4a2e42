"""int8 scores on a GPU: the preparation against its specification, kernels against the reference given the same one."""

import random
from dataclasses import replace

import pytest
import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, hopper, int8, make_spans, quantise
from bsfa_kernels.request import Request
from kernel_cases import Case, check, check_statistics
from test_kernels_gpu import HOPPER, draw
from whole_tiles import DROP_ALL, Prompt, nan_scores_are_kept

pytestmark = pytest.mark.gpu

KNOWS = HOPPER and "int8" in getattr(hopper, "SCORES", ())
ON_HOPPER = pytest.mark.skipif(not KNOWS, reason="needs an H100 or H200, and a kernel with int8 scores")
BACKENDS = ["triton", pytest.param("hopper", marks=ON_HOPPER)]


def cases(backend: str, count: int) -> list:
    rng = random.Random(f"int8 {backend}")
    drawn = [draw(rng, backend) for _ in range(count)]
    if backend == "hopper":  # that serves no softcap
        drawn = [replace(case, softcap=None) for case in drawn]
    return [
        pytest.param(replace(case, dtype=torch.bfloat16 if case.dtype == torch.float32 else case.dtype), id=f"{i}")
        for i, case in enumerate(drawn)
    ]


@pytest.mark.parametrize("blocks", ("", "shuffled"))
@pytest.mark.parametrize("case", cases("triton", 60))
def test_triton(case, blocks):
    check(replace(case, blocks=blocks), "triton", "cuda", scores="int8")


@ON_HOPPER
@pytest.mark.parametrize("blocks", ("", "shuffled"))
@pytest.mark.parametrize("case", cases("hopper", 240))
def test_hopper(case, blocks):
    check(replace(case, blocks=blocks), "hopper", "cuda", scores="int8")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dims", ((128, 64), (72, 40), (192, 128)), ids=str)
def test_values_narrower_than_keys(head_dims, backend):
    head_dim, v_head_dim = head_dims
    check(
        Case(2, 4, 2, 500, 500, head_dim, gate="both", dtype=torch.bfloat16, v_head_dim=v_head_dim), backend, "cuda",
        scores="int8",
    )  # fmt: skip


@pytest.mark.parametrize("case", cases("triton", 12))
def test_statistics(case):
    check_statistics(case, "triton", "cuda", scores="int8")


def request(q, k, spans=None, keys=128) -> Request:
    tile = TileShape(64, keys)
    return Request(q, k, k, Gate(), 1.0, True, tile, True, 0, spans, True, False, scores="int8")


@pytest.mark.parametrize("layout", ("views", "contiguous", "odd strides"))
@pytest.mark.parametrize("rows, keys, tile", ((1000, 3000, 128), (1, 1, 128), (129, 8200, 64)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("head_dim", (8, 64, 96, 128, 160, 256))
def test_preparation(head_dim, dtype, rows, keys, tile, layout):
    """Scales to float32 rounding; integers to one step, and to none in all but a few of 100,000."""
    q, k = (torch.randn(2, n, h, head_dim, device="cuda") for n, h in ((rows, 6), (keys, 2)))
    q, k = (x.to(dtype).transpose(1, 2) for x in (q, k + 3))
    if layout == "contiguous":
        q, k = q.contiguous(), k.contiguous()
    elif layout == "odd strides":
        q, k = (torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (q, k))
    spans = make_spans(2, 0, torch.tensor([0, -min(7, keys - 1)]), keys - min(5, keys // 2), device="cuda")
    for given in (None, spans):
        made, specified = int8.prepare(request(q, k, given, tile)), quantise.prepare(request(q, k, given, tile))
        for name in ("q_scale", "k_scale", "mean", "q_shift"):
            got, wanted = getattr(made, name), getattr(specified, name)
            # One key is its own mean: what is left of it is nothing, or what float32 rounds.
            rounding = 1e-8 * k.abs().max().item()
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4 * wanted.abs().max().item() + rounding)
        if given is not None:
            specified.k8[1, :, :7] = made.k8[1, :, :7]  # rows of no tile are not written
        for name in ("q8", "k8"):
            apart = (getattr(made, name).int() - getattr(specified, name).int()).abs()
            assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_scores_are_kept(backend):
    prompt = Prompt(backend, TileShape(), 777, 128, "cuda", torch.bfloat16, scores="int8")
    nan_scores_are_kept(prompt, DROP_ALL)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_constant_keys_are_no_trap(backend):
    """Scales of zero: every score is the same, and what is masked stays masked."""
    q, k, v = (torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k[:] = k[:, :, :1]
    q[:, :, 100:200] = 0
    q[:, :, 200:] *= 1e-6
    exact = block_sparse_attention(q, k, v, backend="triton", return_lse=True)
    got = block_sparse_attention(q, k, v, backend=backend, scores="int8", return_lse=True)
    torch.testing.assert_close(got.out, exact.out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(got.lse, exact.lse, atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_replays_and_is_deterministic(backend):
    q, k, v = (torch.randn(1, h, 2048, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    gate = Gate(gap=torch.full((8, 32), -torch.inf, device="cuda"))

    def call():
        return block_sparse_attention(q, k, v, gate, return_counts=True, scores="int8", backend=backend)

    dense = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    gate.gap.fill_(1.0)
    k.copy_(torch.randn_like(k))
    graph.replay()
    eager = call()
    assert eager.kept.sum() < dense.kept.sum()
    assert torch.equal(captured.out, eager.out) and torch.equal(captured.kept, eager.kept)
    assert all(torch.equal(call().out, eager.out) for _ in range(10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_against_exact_scores_stays_in_its_class(backend):
    """About 1 % on unit-normal data, at 4k tokens as at 512."""
    for length in (512, 4096):
        q, k, v = (torch.randn(1, h, length, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
        exact = block_sparse_attention(q, k + 2, v, backend="triton").out.float()
        got = block_sparse_attention(q, k + 2, v, backend=backend, scores="int8").out.float()
        assert ((got - exact).norm() / exact.norm()).item() < 0.02


def test_a_call_that_no_kernel_can_serve_says_so():
    from bsfa_kernels import explain

    q = torch.randn(1, 2, 64, 64, device="cuda")
    _, passed_over = explain(q, q, q, scores="int8")
    assert passed_over["triton"] == "int8 scores are for float16 and bfloat16"


def test_tiles_are_dropped():
    assert check(Case(1, 2, 1, 500, 500, 128, gate="gap", dtype=torch.bfloat16), "triton", "cuda", scores="int8") > 0.1
