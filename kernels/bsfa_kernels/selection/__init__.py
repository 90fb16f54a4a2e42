"""Block-mask policies of other methods: which tiles to compute, decided before the attention kernel runs.

    from bsfa_kernels.selection import METHODS, density, select
    mask = select("xattention", q, k, scale=scale, causal=True, tile=TileShape(), coverage=0.9)
    density(mask, causal=True, tile=TileShape()).mean()

Every method is a frozen dataclass in its own file, which states formula and source: its fields are the published
settings, `knob` names the one that sweeps density and `sweep` gives values from sparse to dense. All are plain
PyTorch, run on any device without reading a value back to the host, and never hold scores of all queries against all
keys. Methods defined on blocks of their own (128 x 128, say) are computed on those and brought to the tile grid: exact
where a block is a multiple of the tile, the union where the tile is a multiple of the block, ValueError otherwise.

PBS-Attn permutes keys before it selects and so is no block mask over positions: `PBS` arranges K and V for the kernels
instead. BLASST and BSFA are gates, not selections: see gates.py.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from ..tiles import TileShape
from .base import Selector
from .blocks import visible
from .flashprefill import FlashPrefill
from .flexprefill import FlexPrefill
from .global_attention import GlobalAttention
from .pbs import PBS
from .pooled import PooledTopK, PooledTopP
from .sliding_window import SlidingWindow, TriShape
from .spargeattention import SpargeAttention
from .strided import Dilated, Strided
from .vertical_slash import VerticalSlash
from .xattention import XAttention

METHODS: dict[str, type[Selector]] = {
    method.name: method
    for method in (
        SlidingWindow,
        TriShape,
        Strided,
        Dilated,
        VerticalSlash,
        FlexPrefill,
        XAttention,
        SpargeAttention,
        PooledTopK,
        PooledTopP,
        FlashPrefill,
        GlobalAttention,
    )
}

__all__ = ["METHODS", "PBS", "Selector", "density", "select", *(method.__name__ for method in METHODS.values())]


def select(
    method: str, q: torch.Tensor, k: torch.Tensor, *, scale: float, causal: bool, tile: TileShape, **knobs
) -> torch.Tensor:
    """bool [B, Hq, query tiles, key tiles] of the named method with its published settings, or `knobs` in their place.

    Arguments and errors as in `Selector.select`; also ValueError for an unknown method or setting, and for PBS-Attn,
    whose choice is no mask over positions.
    """
    if method == PBS.name:
        raise ValueError(
            "pbs permutes keys, so its choice is no mask over positions; use PBS(...).arrange(q, k, v, ...)"
        )
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    settings = [field.name for field in fields(METHODS[method])]
    for name in knobs:
        if name not in settings:
            raise ValueError(f"{method} has no setting {name!r}; it has {', '.join(settings)}")
    return METHODS[method](**knobs).select(q, k, scale=scale, causal=causal, tile=tile)


def density(mask: torch.Tensor, *, causal: bool, tile: TileShape) -> torch.Tensor:
    """Share of tiles that are kept, float32 [B, Hq], over the tiles that causality leaves (all without it)."""
    tiles = mask.shape[-2:]
    seen = visible(*tiles, tile, mask.device) if causal else mask.new_ones(tiles)
    return (mask & seen).sum((-2, -1)) / seen.sum()
