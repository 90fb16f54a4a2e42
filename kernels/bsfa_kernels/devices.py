"""What the host wants to know of a GPU, without Triton."""

from __future__ import annotations

from functools import cache

import torch

TILE_ROWS, TILES = 64, 3  # query tiles that a multiprocessor works on at a time, but in split_kv


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return _processors(device)


# As in backends.fused: torch.compile need not look into it. It does look into what is cached, with a warning.
processors._dynamo_marked_constant = True


def tiles_at_once(device: torch.device) -> int:
    """Query tiles of TILE_ROWS that a CUDA device works on at a time."""
    return TILES * processors(device)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
