"""The error model that kernels are held to: what rounding does passes it, what a broken kernel does does not."""

import pytest
import torch
from bsfa_kernels import Gate, block_sparse_attention
from kernel_cases import Case, rounded_attention, scores_range, within_rounding

CASE = Case(1, 2, 1, 512, 512, 64, gate="", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def call():
    """(q, k, v, exact output, the error model's): late rows of `exact` have an RMS of some 0.07."""
    q, k, v = CASE.inputs("cpu")
    exact = block_sparse_attention(q.double(), k.double(), v.double(), backend="reference").out
    return q, k, v, exact, rounded_attention(CASE, q, k, v, Gate())


def judge(call, out) -> None:
    q, k, _, exact, rounded = call
    within_rounding(out.to(CASE.dtype), exact, rounded, scores_range(q, k))


def test_rounding_passes(call):
    judge(call, call[3])
    judge(call, block_sparse_attention(*call[:3], backend="torch").out)


def without_a_tile(call):
    q, k, v, _, _ = call
    v = v.clone()
    v[:, :, 128:256] = 0
    return block_sparse_attention(q.double(), k.double(), v.double(), backend="reference").out


def noise_on_late_rows(call):
    exact = call[3].clone()
    late = exact[:, :, 400:]
    late += 0.57 * late.pow(2).mean().sqrt() * torch.randn(late.shape, generator=torch.Generator().manual_seed(0))
    return exact


def one_wrong_row(call):
    exact = call[3].clone()
    exact[0, 1, 300] = exact[0, 1, 299]
    return exact


def one_swapped_pair_of_columns(call):
    exact = call[3].clone()
    exact[..., [4, 5]] = exact[..., [5, 4]]
    return exact


def weights_of_six_bits(call):
    q, k, v, _, _ = call
    s = (q.double() @ k.double().transpose(-1, -2)) * q.shape[-1] ** -0.5
    s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -torch.inf)
    p = (s - s.amax(-1, keepdim=True)).exp().mul(64).round() / 64
    return p @ v.double() / p.sum(-1, keepdim=True)


def sums_of_the_row_before(call):
    exact = call[3]
    return exact * torch.linspace(0.98, 1.0, exact.shape[2])[:, None]


@pytest.mark.parametrize(
    "mutation",
    [without_a_tile, noise_on_late_rows, one_wrong_row, one_swapped_pair_of_columns, weights_of_six_bits,
     sums_of_the_row_before],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_broken_result_fails(call, mutation):
    with pytest.raises(AssertionError, match="off by"):
        judge(call, mutation(call))
