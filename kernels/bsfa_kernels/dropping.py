"""drop_costs(): what leaving out tiles does to a function of attention's output, to second order in its gradient.

    (costs,) = drop_costs(q, k, v, out, gradient, lse, [cell], [entries], scale=scale, unit=1 << 40)

Without the tiles D the output of a row of a head moves, exactly, by

    d = sum over keys j in D of p[j] (out - v[j]) / (1 - softmax mass in D)

and with its gradient g that row costs min(MOST, (g . d)^2 / 2). Entry e of the result is the sum of this over the rows
of a query tile, where D are the key tiles of that query tile whose cell is below e, as a threshold drops those whose
value lies below it. Costs are rounded, row by row, to multiples of 1 / unit and summed as integers: no sum depends on
the order of rows, programs or devices.

This file is the specification and runs anywhere; dropping_kernel.py is the same as two Triton kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import backends
from .gates import Gate
from .request import Request
from .tiles import TileShape

MOST = 1.0  # what a row counts at most: the second order says nothing of larger changes
LEAST_LEFT = 1e-6  # of a row's softmax mass that is not dropped
SCORES_AT_ONCE = 1 << 25
BACKENDS = {"triton": "dropping_kernel", "torch": "dropping"}


def drop_costs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    gradient: torch.Tensor,
    lse: torch.Tensor,
    cells: Sequence[torch.Tensor],
    entries: Sequence[int],
    *,
    unit: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    tile: TileShape = TileShape(),  # noqa: B008 - frozen
    backend: str = "auto",
) -> list[torch.Tensor]:
    """int64 [B, Hq, query tiles, entries], in units of 1 / unit, for each of `cells`; see the module docstring.

    q [B, Hq, T, D], out and gradient [B, Hq, T, Dv], k [B, Hkv, T, D] and v [B, Hkv, T, Dv], Dv at most D, of one
    dtype: whole sequences that start at position 0, and dense attention's output. `lse` float32 [B, Hq, T] is its
    log-sum-exp; attention sinks count by way of `out` and `lse`. Each of `cells` int32 [B, Hq, query tiles, key tiles],
    values from 0; with its number of `entries`. Tiles of cell entries - 1 and above are never dropped. `scale`,
    `causal`, `window` and `softcap` as in `block_sparse_attention`. Inputs must be finite.

    Raises ValueError for shapes that do not fit together, BackendUnavailable when `backend`, "triton" or "torch",
    cannot serve them.
    """
    alike = q.dim() == k.dim() == out.dim() == 4 and min(q.shape) > 0 and q.shape[:3] == out.shape[:3]
    if not alike or out.shape != gradient.shape or lse.shape != q.shape[:3]:
        shapes = [list(x.shape) for x in (q, out, gradient, lse)]
        raise ValueError(f"q, out and gradient must be alike [B, Hq, T, D] and lse [B, Hq, T], got {shapes}")
    fits = k.shape[:3] == v.shape[:3] and v.shape[3] == out.shape[3] <= k.shape[3]
    if not fits or (k.shape[0], k.shape[2], k.shape[3]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(f"k and v must be alike and as long as q {list(q.shape)}, got {list(k.shape)} {list(v.shape)}")
    if any(x.dtype != q.dtype for x in (k, v, out, gradient)):
        raise ValueError(f"all must be {q.dtype}, got {[str(x.dtype) for x in (k, v, out, gradient)]}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads ({q.shape[1]}) must be a multiple of key/value heads ({k.shape[1]})")
    if window is not None and not causal:
        raise ValueError("window needs causal=True: a query sees its last keys")
    tiles = (*q.shape[:2], -(-q.shape[2] // tile.rows), -(-q.shape[2] // tile.keys))
    for cell in cells:
        if cell.shape != tiles or cell.dtype != torch.int32:
            raise ValueError(f"cells must be int32 {list(tiles)}, got {cell.dtype} {list(cell.shape)}")
    q, k, v, out, gradient = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, out, gradient))
    narrower = q.shape[3] - v.shape[3]
    if narrower:  # columns of zeros change no product
        v, out, gradient = (torch.nn.functional.pad(x, (0, narrower)) for x in (v, out, gradient))
    request = Request(
        q, k, v, Gate(), scale, causal, tile, True, 0, None, True, False, window=window, softcap=softcap
    )  # fmt: skip
    _, module, _ = backends.choose(request, backend, BACKENDS)
    return module.costs(request, out, gradient, lse, cells, entries, unit)


def unsupported(request: Request) -> str | None:
    return None


def costs(request: Request, out, gradient, lse, cells, entries, unit: int) -> list[torch.Tensor]:
    """The specification, in float64 for float64 inputs and in float32 else. Memory: SCORES_AT_ONCE a few times."""
    q, tile = request.q, request.tile
    batch, heads, length, _ = q.shape
    group, query_tiles = heads // request.k.shape[1], -(-length // tile.rows)
    found = [torch.zeros(batch, heads, query_tiles, each, dtype=torch.int64, device=q.device) for each in entries]
    rows = max(1, SCORES_AT_ONCE // (length * tile.rows)) * tile.rows
    for b in range(batch):
        for head in range(heads):
            whole = [x[b, head] for x in (out, gradient, q)] + [x[b, head // group] for x in (request.k, request.v)]
            one = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in whole]
            for start in range(0, length, rows):
                moved, mass = _shares(request, *one, lse[b, head], slice(start, min(start + rows, length)))
                query_tile = torch.arange(start, start + len(moved), device=q.device) // tile.rows
                for cell, count, costs in zip(cells, entries, found, strict=True):
                    at = cell[b, head, query_tile, : moved.shape[1]].long()
                    change = _below(moved, at, count) / (1 - _below(mass, at, count)).clamp(min=LEAST_LEFT)
                    cost = change.square() / 2
                    cost = torch.where(cost < MOST, cost, MOST)  # NaN is not below it
                    costs[b, head].index_add_(0, query_tile, (cost * unit).round_().long())
    return found


def _shares(request: Request, out, gradient, q, k, v, lse, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [rows, key tiles]: (sum of p (g . out - g . v), sum of p) over the keys of each tile. The last key tiles
    are left out where no row sees them. out, gradient, q, k, v [T, D], lse [T].
    """
    end, g = rows.stop if request.causal else len(q), gradient[rows]
    scores = request.scale * (q[rows] @ k[:end].T)
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    p = (scores - lse[rows, None]).exp()
    if request.causal:
        p = p.tril_(rows.start)
    if request.window is not None:
        p = p.triu_(rows.start - request.window + 1)
    moved = p * ((g * out[rows]).sum(-1, keepdim=True) - g @ v[:end].T)
    tiles = -(-end // request.tile.keys)
    columns = (0, tiles * request.tile.keys - end)
    moved, mass = (torch.nn.functional.pad(x, columns).unflatten(1, (tiles, -1)).sum(-1) for x in (moved, p))
    return moved.double(), mass.double()


def _below(x: torch.Tensor, cell: torch.Tensor, entries: int) -> torch.Tensor:
    """[rows, entries]: at entry e the sum of x [rows, key tiles] over the tiles whose cell is below e."""
    sums = x.new_zeros(len(x), entries).scatter_add_(1, cell.clamp(max=entries - 1), x)
    return torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1].cumsum(1)], 1)
