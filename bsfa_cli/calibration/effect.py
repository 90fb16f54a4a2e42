"""How far leaving out a tile moves the residual stream, per unit of the softmax mass that it carries.

Without key tile j, the output of a row that gives it the mass m moves by m / (1 - m) * (out - value of j). What that
does to the residual stream is its length behind the output projection, W_O, relative to the length of the stream there:
the norm that follows divides by it. Values and outputs are taken as the mean of their tile, so that all pairs of tiles
cost one product of small matrices:

    weight[h, t, j] = |W_O[h] (mean value of key tile j - mean output of query tile t)| / mean |residual stream of t|
"""

from __future__ import annotations

import torch

PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")
LARGEST = 64.0  # of a weight: sums stay in fixed point


def output_gram(module: torch.nn.Module, heads: int) -> torch.Tensor | None:
    """float32 [heads, D, D], W_O^T W_O of every query head; None where no output projection is found."""
    for name in PROJECTIONS:
        weight = getattr(getattr(module, name, None), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.shape[1] % heads == 0:
            parts = weight.detach().float().unflatten(1, (heads, -1)).movedim(1, 0)  # [heads, hidden, D]
            return parts.mT @ parts
    return None


def tile_means(x: torch.Tensor, rows: int) -> torch.Tensor:
    """float32 [H, tiles, D] of x [H, T, D]: means over consecutive `rows` rows, fewer in the last tile."""
    tiles = -(-x.shape[1] // rows)
    sums = torch.nn.functional.pad(x.float(), (0, 0, 0, tiles * rows - x.shape[1])).unflatten(1, (tiles, rows)).sum(2)
    counts = (x.shape[1] - torch.arange(tiles, device=x.device) * rows).clamp(max=rows)
    return sums / counts[:, None]


def weights(gram: torch.Tensor, value: torch.Tensor, out: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """float32 [Hq, query tiles, key tiles] of tile means: value [Hkv, key tiles, D], out [Hq, query tiles, D], and the
    stream's lengths [query tiles].
    """
    value = value.repeat_interleave(gram.shape[0] // value.shape[0], 0)
    squares = [torch.einsum("htd,hde,hte->ht", x, gram, x) for x in (out, value)]
    both = (out @ gram) @ value.mT
    distance = (squares[0][:, :, None] + squares[1][:, None] - 2 * both).clamp(min=0).sqrt()
    return (distance / stream[:, None].clamp(min=1e-20)).clamp(max=LARGEST)
