"""What drop_costs refuses, and its kernels on a GPU; its meaning is tested in test_divergence.py, against the gates."""

import dropping_cases
import pytest
import torch
from bsfa_kernels import BackendUnavailable, TileShape, block_sparse_attention, drop_costs
from kernel_cases import Case

Q, K = torch.zeros(1, 4, 100, 16), torch.zeros(1, 2, 100, 16)
LSE, CELL = torch.zeros(1, 4, 100), torch.zeros(1, 4, 2, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=Q[0]), "q, out and gradient must be alike"),
        (dict(out=Q[:, :2]), "q, out and gradient must be alike"),
        (dict(lse=LSE[..., :99]), "lse [B, Hq, T]"),
        (dict(k=K[:, :, :99], v=K[:, :, :99]), "as long as q"),
        (dict(gradient=Q.bfloat16()), "all must be torch.float32"),
        (dict(v=K[:, :1]), "k and v must be alike"),
        (dict(k=Q[:, :3], v=Q[:, :3]), "a multiple of"),
        (dict(cells=[CELL.long()]), "cells must be int32 [1, 4, 2, 1], got torch.int64"),
        (dict(tile=TileShape(128, 64)), "cells must be int32 [1, 4, 1, 2], got torch.int32 [1, 4, 2, 1]"),
        (dict(window=8, causal=False), "window needs causal=True"),
        (dict(backend="cuda"), "backend must be 'auto' or one of triton, torch"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = dict(q=Q, k=K, v=K, out=Q, gradient=Q, lse=LSE, cells=[CELL], entries=[3], unit=1 << 40, scale=1.0)
    assert not drop_costs(**given)[0].any()
    with pytest.raises(ValueError) as refused:
        drop_costs(**given | change)
    assert message in str(refused.value)


def test_values_narrower_than_keys_cost_what_zeros_beside_them_would():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 300, 24, generator=generator) for heads in (4, 2))
    v = torch.randn(1, 2, 300, 16, generator=generator)
    result = block_sparse_attention(q, k, v, return_lse=True)
    gradient = torch.randn(result.out.shape, generator=generator)
    cells = torch.randint(0, 3, (1, 4, 5, 3), generator=generator, dtype=torch.int32)
    options = dict(lse=result.lse, cells=[cells], entries=[3], unit=1 << 30, scale=24**-0.5)
    narrow = drop_costs(q, k, v, result.out, gradient, **options)[0]
    wide = drop_costs(q, k, *(torch.nn.functional.pad(x, (0, 8)) for x in (v, result.out, gradient)), **options)[0]
    assert narrow.any() and torch.equal(narrow, wide)
    with pytest.raises(ValueError, match="k and v must be alike"):
        drop_costs(q, k, v[..., :8], result.out, gradient, **options)


def test_a_kernel_that_is_demanded_says_why_it_cannot():
    with pytest.raises(BackendUnavailable, match="needs a CUDA device"):
        drop_costs(Q, K, K, Q, Q, LSE, [CELL], [3], unit=1 << 40, scale=1.0, backend="triton")


ON_GPU = [
    Case(1, 9, 3, 1000, 1000, 64, dtype=torch.bfloat16),
    Case(2, 4, 1, 777, 777, 128, dtype=torch.bfloat16),
    Case(1, 2, 2, 650, 650, 256, dtype=torch.bfloat16),
    Case(1, 4, 2, 900, 900, 80, dtype=torch.float16, window=200, sinks=True),
    Case(1, 4, 2, 700, 700, 64, dtype=torch.bfloat16, softcap=2.0),
    Case(1, 4, 2, 640, 640, 128, dtype=torch.bfloat16, causal=False),
    Case(1, 4, 2, 700, 700, 72, TileShape(128, 64), dtype=torch.bfloat16),
    Case(1, 2, 1, 500, 500, 64),
    Case(1, 2, 1, 700, 700, 128),
    Case(1, 1, 1, 1, 1, 64, dtype=torch.bfloat16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_kernels(case):
    between = dropping_cases.check(case, "cuda")
    assert between > 0 or case.q_rows == 1


@pytest.mark.gpu
def test_kernels_give_the_same_bits_each_time():
    q, g = (torch.randn(1, 9, 8192, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(1, 3, 8192, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    cell = torch.randint(0, 90, (1, 9, 128, 64), device="cuda", dtype=torch.int32)
    lse = torch.full((1, 9, 8192), 9.5, device="cuda")
    found = [
        drop_costs(q, k, v, q, g, lse, [cell], [90], unit=1 << 40, scale=0.125, backend="triton")[0] for _ in range(5)
    ]
    assert found[0].any() and all(torch.equal(found[0], each) for each in found)
