"""Text, images, or both: what the positions of a tile hold, and names for it.

A tile is `text` where none of its positions is a token of an image or video, `image` where all are, else `mixed`.
"""

from __future__ import annotations

import torch

MODALITIES = ("text", "image", "mixed")
TEXT, IMAGE, MIXED = range(len(MODALITIES))


def tile_modality(
    visual: torch.Tensor,
    size: int,
    tiles: int,
    first: torch.Tensor | int = 0,
    end: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """int64 [tiles], indices into MODALITIES: of tile t, which holds positions t * size .. (t + 1) * size.

    visual bool [T]: whether row i, at position `first` + i, is a token of an image. Rows at negative positions or from
    `end` on are padding and have no say; a tile without rows counts as text. Never waits for the device.
    """
    position = torch.arange(len(visual), device=visual.device) + first
    valid = position >= 0
    if end is not None:
        valid = valid & (position < end)
    tile = (position // size).clamp(0, tiles - 1)
    rows, images = (
        torch.zeros(tiles, dtype=torch.int64, device=visual.device).index_add_(0, tile, counted.long())
        for counted in (valid, valid & visual)
    )
    return torch.where(images == 0, TEXT, torch.where(images == rows, IMAGE, MIXED))
