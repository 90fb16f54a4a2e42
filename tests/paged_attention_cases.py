"""Attention that reads K and V out of pages against the same call on gathered ones, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, make_spans, pack
from kernel_cases import and_by_the_shortcut


@dataclass(frozen=True)
class Paged:
    """A call: per sequence query rows and keys (the queries are the last), and how the cache lies in memory."""

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    tile: TileShape = TileShape(16, 32)  # noqa: RUF009 - frozen
    page: int = 32
    layout: str = "tokens first"  # or "heads first", "halves" (K and V of a position side by side), "odd base"
    gate: str = "gap"
    causal: bool = True
    window: int | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self):
        parts = [f"Tq{self.rows}-Tk{self.keys}-H{self.heads}-KV{self.kv_heads}-D{self.head_dim}-page{self.page}"]
        parts += [self.layout.replace(" ", "-"), str(self.dtype).split(".")[1], self.gate or "open"]
        parts += ["full"] * (not self.causal) + [f"window{self.window}"] * bool(self.window)
        return "-".join(parts).replace(" ", "")

    def cache(self, device, beyond: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(K pages, V pages, block table). What no sequence's position is in holds `beyond`."""
        generator = torch.Generator().manual_seed(sum(self.keys))
        most = -(-max(self.keys) // self.page)
        pages = len(self.keys) * most + 3
        shape = (2, pages, self.page, self.kv_heads, self.head_dim)
        drawn = torch.randn(shape, generator=generator)
        table = torch.randperm(pages, generator=generator)[: len(self.keys) * most].view(len(self.keys), most)
        used = torch.zeros(pages, self.page, dtype=torch.bool)
        for row, keys in zip(table.tolist(), self.keys, strict=True):
            for position in range(keys):
                used[row[position // self.page], position % self.page] = True
        drawn = drawn.where(used[None, :, :, None, None], beyond).to(self.dtype)
        if self.layout == "heads first":
            k, v = (x.transpose(1, 2).contiguous() for x in drawn.to(device))
        elif self.layout == "halves":
            k, v = (x.transpose(1, 2) for x in torch.cat([*drawn], -1).to(device).split(self.head_dim, -1))
        else:
            flat = torch.empty(drawn.numel() + 1, dtype=self.dtype, device=device)
            flat = flat[1:] if self.layout == "odd base" else flat[:-1]
            k, v = (x.transpose(1, 2) for x in flat.view(shape).copy_(drawn))
        return k, v, table.to(device, torch.int32)

    def queries(self, device) -> torch.Tensor:
        """[B, H, the most rows, D]."""
        generator = torch.Generator().manual_seed(sum(self.rows) + 1)
        x = torch.randn(len(self.rows), max(self.rows), self.heads, self.head_dim, generator=generator)
        return x.to(device, self.dtype).transpose(1, 2)

    def gates(self, device) -> Gate:
        gap, absolute = (torch.full((self.heads, 1), value, device=device) for value in (0.9, 3.0))
        return Gate(gap=gap if "gap" in self.gate else None, absolute=absolute if "absolute" in self.gate else None)

    def gathered(self, x: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
        return torch.stack([x[row.long()].transpose(0, 1).flatten(1, 2)[:, :length] for row in table])


def check(case: Paged, backend: str, device: str = "cpu", beyond: float = 1e3) -> float:
    """Returns the share of candidates dropped."""
    k, v, table = case.cache(device, beyond)
    q, gate, batch = case.queries(device), case.gates(device), len(case.rows)
    options = dict(causal=case.causal, tile=case.tile, window=case.window, backend=backend)
    options |= dict(return_lse=True, return_counts=True)
    one = batch == 1
    if one:  # queries stand at the end, as q_offset says
        where, length = dict(q_offset=case.keys[0] - case.rows[0]), case.keys[0]
        if not case.causal:
            where = dict(spans=make_spans(1, case.keys[0] - case.rows[0], 0, case.keys[0], device=device))
    else:
        rows, keys = (torch.tensor(x) for x in (case.rows, case.keys))
        where, length = dict(spans=make_spans(batch, keys - rows, 0, keys, device=device)), max(case.keys)
    clean = [case.gathered(x, table, length) for x in (k, v)]
    expected = block_sparse_attention(q, *(x.nan_to_num(0.0) for x in clean), gate, **options, **where)
    found = and_by_the_shortcut(
        lambda: block_sparse_attention(q, k, v, gate, block_table=table, **options, **where), device
    )
    for name, got, wanted in zip(found._fields, found, expected, strict=True):
        assert torch.equal(got, wanted), name
    assert found.out.isfinite().all()
    return 1 - found.kept.sum().item() / max(found.candidates.sum().item(), 1)


def check_packed(case: Paged, backend: str, device: str = "cpu", beyond: float = 1e3) -> float:
    """Sequences in one call against a call for each, among rows that are none's. Returns the share of candidates
    dropped.
    """
    k, v, table = case.cache(device, beyond)
    q, gate, between = case.queries(device), case.gates(device), 3
    starts = [between + sum(case.rows[:i]) + between * i for i in range(len(case.rows))]
    tokens = starts[-1] + case.rows[-1] + between
    place = (tokens, case.heads, case.head_dim)
    queries, out = (torch.full(place, torch.nan, dtype=case.dtype, device=device) for _ in range(2))
    for row, start, count in zip(q, starts, case.rows, strict=True):
        queries[start : start + count] = row[:, :count].transpose(0, 1)
    options = dict(causal=case.causal, tile=case.tile, window=case.window, backend=backend)
    options |= dict(return_lse=True, return_counts=True)
    packed = pack(starts, case.rows, case.keys, device)
    q, view = (x.transpose(0, 1)[None] for x in (queries, out))

    def call():
        out.fill_(torch.nan)
        found = block_sparse_attention(q, k, v, gate, block_table=table, packed=packed, out=view, **options)
        assert found.out is view
        return found._replace(out=view[:, :, starts[0] : starts[0] + case.rows[0]].clone())

    found = and_by_the_shortcut(call, device)
    for i, (start, count, keys) in enumerate(zip(starts, case.rows, case.keys, strict=True)):
        own = slice(start, start + count)
        pages = table[i : i + 1, : -(-keys // case.page)]
        expected = block_sparse_attention(
            q[:, :, own], k, v, gate, block_table=pages, q_offset=keys - count, **options
        )  # fmt: skip
        assert torch.equal(view[:, :, own], expected.out) and expected.out.isfinite().all()
        assert torch.equal(found.lse[:, :, own], expected.lse)
        tiles = expected.kept.shape[2]
        for got, wanted in ((found.kept, expected.kept), (found.candidates, expected.candidates)):
            assert torch.equal(got[i, :, :tiles], wanted[0]) and not got[i, :, tiles:].any()
        out[own] = torch.nan
    assert out.isnan().all(), "rows of no sequence were overwritten"
    return 1 - found.kept.sum().item() / max(found.candidates.sum().item(), 1)
