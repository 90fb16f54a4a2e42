"""What drop_costs hands to the GPU: Triton compiles, and a fake driver takes the calls (see test_hopper_launch.py)."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
import triton
from bsfa_kernels import drop_costs, dropping_kernel
from fake_hopper import Driver


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(dropping_kernel, "unsupported", lambda request: None)
    monkeypatch.setattr(dropping_kernel, "device_guard", lambda x: nullcontext())
    monkeypatch.setattr(dropping_kernel, "wide_products", lambda device: True)
    for kernel in (dropping_kernel._shares, dropping_kernel._costs):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    fake = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    return fake


def test_two_kernels_serve_every_length_and_grid(gpu, monkeypatch):
    monkeypatch.setattr(dropping_kernel, "SCRATCH", 10 * 2 * 4 * 128 * 8)  # ten blocks of 128 rows of 1,000 keys
    for length, entries in ((1000, (90, 134)), (129, (65, 1)), (64, (2, 2))):
        q, k = (torch.zeros(1, heads, length, 64, dtype=torch.bfloat16) for heads in (3, 1))
        cell = torch.zeros(1, 3, -(-length // 64), -(-length // 128), dtype=torch.int32)
        found = drop_costs(
            q, k, k, q, q, torch.zeros(1, 3, length), [cell, cell], entries, unit=1 << 40, scale=0.125, backend="triton"
        )
        assert [each.shape for each in found] == [(1, 3, -(-length // 64), count) for count in entries]
    assert gpu.loaded == ["_shares", "_costs"]
    grids = [(name, grid[:2]) for name, grid, _ in gpu.launched]
    assert grids[:6] == [
        ("_shares", (10, 1)), ("_costs", (20, 2)), ("_costs", (20, 3)),
        ("_shares", (10, 1)), ("_costs", (20, 2)), ("_costs", (20, 3)),
    ]  # fmt: skip
    assert grids[6:9] == [("_shares", (4, 1)), ("_costs", (8, 2)), ("_costs", (8, 3))]
