"""What the selectors share: geometry of the tile grid, pooling, grouped scores, and choosing the best of a row.

Positions are absolute and both sequences start at 0. Shapes: B sequences, Hq query heads, Hkv key heads (query head h
reads key head h // (Hq // Hkv)), Tq queries, Tk keys, D head dim. Nothing here reads a value back to the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..tiles import TileShape


def block_count(length: int, size: int) -> int:
    """Blocks of `size` that cover `length` positions; the last may be partial."""
    return -(-length // size)


def bounds(length: int, size: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last position of every block, two int64 [blocks]; the last block ends with the sequence."""
    first = torch.arange(0, length, size, device=device)
    return first, (first + size - 1).clamp(max=length - 1)


def visible(q_blocks: int, k_blocks: int, shape: TileShape, device) -> torch.Tensor:
    """bool [query blocks, key blocks]: some query of the block may see some key of the other under a causal mask."""
    last_query = (torch.arange(q_blocks, device=device) + 1) * shape.rows - 1
    return torch.arange(k_blocks, device=device) * shape.keys <= last_query[:, None]


def diagonal(q_blocks: int, k_blocks: int, shape: TileShape, device) -> torch.Tensor:
    """bool [query blocks, key blocks]: the key block holds a position of the query block, as in tiles.visit()."""
    query = torch.arange(q_blocks, device=device)[:, None]
    key = torch.arange(k_blocks, device=device)
    first = (query * shape.rows // shape.keys).clamp(max=k_blocks - 1)
    last = ((query + 1) * shape.rows - 1) // shape.keys
    return (key >= first) & (key <= last)


def accumulator(x: torch.Tensor) -> torch.dtype:
    """float32, or float64 for float64 input."""
    return torch.promote_types(x.dtype, torch.float32)


def block_mean(x: torch.Tensor, size: int) -> torch.Tensor:
    """Mean of every `size` consecutive rows, the last block over the rows it has: [B, H, T, D] -> [B, H, blocks, D]."""
    whole = x.shape[2] // size
    means = x[:, :, : whole * size].unflatten(2, (whole, size)).mean(3, dtype=accumulator(x))
    if whole * size == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole * size :].mean(2, keepdim=True, dtype=accumulator(x))], dim=2)


def block_sum(x: torch.Tensor, size: int) -> torch.Tensor:
    """Sum of every `size` consecutive entries of the last axis, the last block over the entries it has."""
    blocks = block_count(x.shape[-1], size)
    return F.pad(x, (0, blocks * size - x.shape[-1])).unflatten(-1, (blocks, size)).sum(-1)


def grouped_scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * q k^T [B, Hq, n, m] of q [B, Hq, n, D] and k [B, Hkv, m, D], without repeating k; float32 or wider.

    The product runs in the inputs' dtype, as in the methods' own code, so that selection costs what it costs there.
    """
    batch, q_heads, rows, dim = q.shape
    k_heads, keys = k.shape[1:3]
    flat_q = q.reshape(batch * k_heads, q_heads // k_heads * rows, dim)
    flat_k = k.reshape(batch * k_heads, keys, dim).transpose(1, 2)
    scores = torch.baddbmm(q.new_zeros(()), flat_q, flat_k, beta=0, alpha=scale)
    return scores.view(batch, q_heads, rows, keys).to(accumulator(q))


def pooled_scores(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool, shape: TileShape) -> torch.Tensor:
    """scale * mean(q block) . mean(k block) [B, Hq, query blocks, key blocks]; -inf where causality hides the block."""
    scores = grouped_scores(block_mean(q, shape.rows), block_mean(k, shape.keys), scale)
    if causal:
        scores = scores.masked_fill(~visible(*scores.shape[-2:], shape, q.device), -torch.inf)
    return scores


def last_attention(q: torch.Tensor, k: torch.Tensor, scale: float, rows: int) -> torch.Tensor:
    """Causal softmax of the last min(rows, Tq) queries over all keys, [B, Hq, rows, Tk]; needs Tq = Tk."""
    rows = min(rows, q.shape[2])
    scores = grouped_scores(q[:, :, -rows:], k, scale)
    key = torch.arange(k.shape[2], device=q.device)
    return scores.masked_fill_(key > key[-rows:, None], -torch.inf).softmax(-1)


def slash_sums(attention: torch.Tensor) -> torch.Tensor:
    """Sum along every diagonal of the last rows of a causal square, [..., rows, T] -> [..., T] indexed by i - j.

    Row r stands at position T - rows + r. Shears by re-reading a padded buffer, because scatter_add would make the
    sums, and so the selection, differ from run to run on a GPU.
    """
    rows, length = attention.shape[-2:]
    flat = F.pad(attention.flip(-1), (0, rows)).flatten(-2)
    return flat[..., rows - 1 : -1].unflatten(-1, (rows, length + rows - 1))[..., :length].sum(-2)


def cover(scores: torch.Tensor, share: float, forced: torch.Tensor | None = None) -> torch.Tensor:
    """bool like scores: the fewest largest entries of each row whose sum reaches `share` of the row's sum.

    scores >= 0. `forced` entries are taken first and count towards the sum. A row that never reaches its target in
    floating point keeps everything.
    """
    order = scores if forced is None else scores.masked_fill(forced, torch.inf)
    order = order.argsort(dim=-1, descending=True, stable=True)
    running = scores.gather(-1, order).cumsum(-1)
    before = F.pad(running[..., :-1], (1, 0))
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before < share * running[..., -1:])
    return keep if forced is None else keep | forced


def largest(scores: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """bool like scores: the `count` largest entries of each row (all where there are fewer), earlier ones on ties.

    `count` is a number, or a tensor that broadcasts against scores with last axis 1.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = (torch.arange(scores.shape[-1], device=scores.device) < count).expand_as(order)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, chosen)


def to_tiles(mask: torch.Tensor, blocks: TileShape, tile: TileShape, lengths: tuple[int, int]):
    """A mask over blocks, [..., query blocks, key blocks], on the tile grid, [..., query tiles, key tiles].

    Exact where a block is a multiple of the tile; where the tile is a multiple of the block, a tile is kept if any of
    its blocks is (a hidden block only ever lies in a hidden tile or in one of the diagonal). `lengths` is (Tq, Tk).
    Raises ValueError when neither divides the other.
    """
    mask = _resize(mask.transpose(-1, -2), blocks.rows, tile.rows, lengths[0], "rows").transpose(-1, -2)
    return _resize(mask, blocks.keys, tile.keys, lengths[1], "keys")


def _resize(mask, block, tile, length, axis):
    tiles = block_count(length, tile)
    if block % tile == 0:
        return mask.repeat_interleave(block // tile, dim=-1)[..., :tiles]
    if tile % block == 0:
        return F.pad(mask, (0, tiles * (tile // block) - mask.shape[-1])).unflatten(-1, (tiles, tile // block)).any(-1)
    raise ValueError(f"tile {axis} ({tile}) and the method's block {axis} ({block}) must divide one another")
