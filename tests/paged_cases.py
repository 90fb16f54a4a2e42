"""Paged caches for the tests of gather_pages: on the CPU, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import torch
from bsfa_kernels.pages import gather_pages

FP8 = torch.float8_e4m3fn
# name: (positions of a page, length, head dim, layout of the cache, dtype)
CASES = {
    "page-16-ends-inside": (16, 77, 24, "heads first", torch.float32),
    "page-128": (128, 300, 64, "heads first", torch.bfloat16),
    "page-32-tokens-first": (32, 64, 40, "tokens first", torch.float16),
    "one-position": (16, 1, 32, "heads first", torch.float32),
    "fp8": (16, 50, 32, "tokens first", FP8),
}


def check(case: str, device: str, gather=gather_pages) -> None:
    """Every position comes from its page, in its place."""
    page, length, head_dim, layout, dtype = CASES[case]
    heads, pages = 3, 2 * -(-length // page) + 1
    generator = torch.Generator().manual_seed(length)
    cache = torch.randn(pages, heads, page, 2 * head_dim, generator=generator)
    if layout == "tokens first":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    cache = cache.to(dtype).to(device)
    table = torch.randperm(pages, generator=generator)[: -(-length // page) + 1].to(torch.int32)
    scales, options = (1.0, 1.0), {}
    if dtype == FP8:
        scales = (0.5, 3.0)
        options = dict(zip(("key_scale", "value_scale"), (torch.tensor(s, device=device) for s in scales), strict=True))
        options["dtype"] = torch.bfloat16
    found = gather(*cache.split(head_dim, -1), table.to(device), length, **options)
    for x, half, scale in zip(found, cache.cpu().float().split(head_dim, -1), scales, strict=True):
        assert x.shape == (1, heads, length, head_dim) and x.is_contiguous()
        rows = [scale * half[table[p // page], :, p % page] for p in range(length)]
        assert torch.equal(x[0].cpu(), torch.stack(rows, 1).to(x.dtype))
