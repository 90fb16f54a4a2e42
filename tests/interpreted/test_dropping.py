"""drop_costs' Triton kernels in the interpreter; see tests/dropping_cases.py."""

import dropping_cases
import pytest
import torch
from bsfa_kernels import drop_costs, dropping_kernel
from kernel_cases import Case


@pytest.mark.parametrize("case", dropping_cases.INTERPRETED, ids=str)
def test_costs(case):
    between = dropping_cases.check(case, "cpu")
    assert between > 0 or case.q_rows == 1 or case.window == 1


def test_little_scratch_gives_the_same_numbers(monkeypatch):
    q, k, v = Case(1, 2, 1, 300, 300, 16).inputs("cpu")
    cells = torch.randint(0, 3, (1, 2, 5, 3), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    given = q, k, v, v.repeat(1, 2, 1, 1), q, torch.full(q.shape[:3], 6.0), [cells], [3]
    found = []
    for blocks in (1 << 20, 4):  # of 128 rows at once; there are three for each of two heads
        monkeypatch.setattr(dropping_kernel, "SCRATCH", blocks * 2 * 4 * 128 * 3)
        found += drop_costs(*given, unit=1 << 40, scale=1, backend="triton")
    assert found[0].any() and torch.equal(*found)
