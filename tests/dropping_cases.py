"""drop_costs' Triton kernels against its specification in float64: shared by the interpreter's tests and the GPU's."""

from __future__ import annotations

import pytest
import torch
from bsfa_kernels import TileShape, block_sparse_attention, drop_costs, tile_statistics
from bsfa_kernels.dropping import LEAST_LEFT, MOST
from kernel_cases import Case, attention_sinks

GRIDS = ((-2.0, -0.5, 0.0, 0.5, 1.0, 2.0), tuple(i / 8 - 4 for i in range(70)))  # of gap, of maximum
UNIT = 1 << 40
WIDE, TALL = TileShape(16, 32), TileShape(32, 16)
INTERPRETED = [
    Case(1, 4, 2, 111, 111, 16, WIDE),
    Case(1, 2, 1, 110, 110, 16, TALL, causal=False),
    Case(2, 2, 1, 64, 64, 40, WIDE, causal=False),
    Case(2, 2, 1, 90, 90, 24, TALL, window=40, sinks=True),
    Case(1, 1, 1, 90, 90, 16, WIDE, window=1),
    Case(1, 2, 2, 96, 96, 16, WIDE, softcap=1.5, sinks=True),
    Case(1, 2, 1, 100, 100, 72, WIDE, window=33, softcap=2.0, dtype=torch.float16),
    Case(1, 2, 1, 333, 333, 64, TileShape(64, 128), dtype=torch.float16),
    Case(1, 1, 1, 300, 300, 64, TileShape(128, 64), causal=False, dtype=torch.float16),
    Case(1, 1, 1, 1, 1, 16, WIDE),
]


def check(case: Case, device: str) -> float:
    """Within what float32 explains, entry by entry; returns the share of costs that are neither 0 nor at the most."""
    q, k, v = case.inputs("cpu")
    gradient = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    sinks = attention_sinks(case, "cpu")
    options = {key: value for key, value in case.options("cpu").items() if key not in ("q_offset", "keep_sink")}
    options |= dict(scale=q.shape[3] ** -0.5)
    dense = block_sparse_attention(
        *(x.double() for x in (q, k, v)), return_lse=True, backend="reference", **options, **sinks
    )
    out, lse = dense.out.to(case.dtype), dense.lse.float()
    statistics = tile_statistics(q, k, lse, backend="reference", **options)
    values = zip((statistics.gap, statistics.maximum), GRIDS, strict=True)
    cells = [cells_of(value, statistics.gap, grid) for value, grid in values]
    entries = [len(grid) + 1 for grid in GRIDS]
    exact = [x.double() for x in (q, k, v, out, gradient)]
    expected = drop_costs(*exact, lse.double(), cells, entries, unit=UNIT, backend="torch", **options)

    with poisoned_memory():
        found = drop_costs(
            *(padded(x, device) for x in (q, k, v, out, gradient)), lse.to(device), [x.to(device) for x in cells],
            entries, unit=UNIT, backend="triton", **options,
        )  # fmt: skip
    within = 0.0
    for cell, a, e in zip(cells, found, expected, strict=True):
        a = a.cpu()
        allowed = allowance(case, exact, lse.double(), cell, a.shape[3], options)
        error = (a - e).abs() / (allowed * UNIT + case.tile.rows)
        assert error.max() <= 1, f"a cost is off by {error.max():.2g} times what float32 explains"
        assert not a[..., 0].any()
        within = max(within, ((e > 0) & (e < case.tile.rows * UNIT)).double().mean().item())
    return within


def cells_of(value: torch.Tensor, gap: torch.Tensor, grid: tuple[float, ...]) -> torch.Tensor:
    """As calibration makes them: tiles that no gate drops have the last cell."""
    value = torch.where(gap.isfinite(), value, torch.inf)
    return torch.bucketize(value, torch.tensor(grid), right=True, out_int32=True)


def allowance(case: Case, exact, lse, cell, entries: int, options) -> torch.Tensor:
    """float64 [B, Hq, query tiles, entries]: by how much rounding in float32 can move the sums. A weight is off by some
    eps of the size of its score, g . (out - v) by some of the sizes of its products; both are divided by what is left.
    """
    q, k, v, out, g = exact
    tile, group, length = case.tile, case.heads // case.kv_heads, case.q_rows
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    unseen = torch.zeros(length, length, dtype=torch.bool)
    if case.causal:
        unseen = torch.ones_like(unseen).triu(1)
        if case.window:
            unseen |= torch.ones_like(unseen).tril(-case.window)
    scores = options["scale"] * q @ k.mT
    size = 4 * 2**-23 * (1 + scores.abs().amax() + lse.abs().amax())
    if case.softcap:
        scores = case.softcap * (scores / case.softcap).tanh()
    p = (scores - lse[..., None]).exp().masked_fill(unseen, 0)
    terms = p * ((g * out).sum(-1, keepdim=True) - g @ v.mT)
    sizes = p * ((g * out).abs().sum(-1, keepdim=True) + g.abs() @ v.abs().mT)
    columns, row = torch.arange(length) // tile.keys, torch.arange(length) // tile.rows
    dropped = (cell[:, :, row, :, None] < torch.arange(entries)).double()  # [B, H, T, key tiles, entries]
    of_tiles = (x.new_zeros(*x.shape[:3], cell.shape[3]).index_add_(3, columns, x) for x in (terms, p, sizes))
    moved, mass, sizes = (torch.einsum("bhij,bhije->bhie", x, dropped) for x in of_tiles)
    left = (1 - mass).clamp(min=LEAST_LEFT)
    change = moved / left
    off = (size * sizes + change.abs() * size * mass) / left
    each = (change.abs() * off + off.square() / 2).clamp(max=MOST)
    rows = torch.zeros(*each.shape[:2], cell.shape[2], entries, dtype=torch.float64)
    return rows.index_add_(2, row, each)


def padded(x: torch.Tensor, device: str) -> torch.Tensor:
    """`x` on `device`, inside memory that is NaN all around: more heads, rows and columns."""
    batch, heads, rows, columns = x.shape
    wide = torch.full((batch + 1, rows + 9, heads + 1, columns + 16), torch.nan, dtype=x.dtype, device=device)
    inner = wide[:batch, :rows, :heads, :columns].transpose(1, 2)
    inner.copy_(x)
    return inner


class poisoned_memory:  # noqa: N801 - a context, as the kernel's module sees it
    """While entered, `new_empty` gives memory full of NaN, or of a number that no sum survives."""

    def __enter__(self):
        original, self.patch = torch.Tensor.new_empty, pytest.MonkeyPatch()

        def new_empty(tensor, *shape, **options):
            made = original(tensor, *shape, **options)
            return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).min // 2)

        self.patch.setattr(torch.Tensor, "new_empty", new_empty)

    def __exit__(self, *_):
        self.patch.undo()
