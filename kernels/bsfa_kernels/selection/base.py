"""What every selection method is: a frozen dataclass of published defaults; most have one method, select()."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from math import inf
from typing import ClassVar

import torch

from ..tiles import TileShape
from .blocks import block_count, diagonal, visible


class Settings:
    """Base of all methods. Fields are the method's settings; `knob` names the one that sweeps density.

    `sweep` holds values of the knob from sparse to dense, `directions` the values of `causal` the method is defined
    for, `limits` the closed range of a field (default: [1, inf] for integers, [0, 1] for floats).
    """

    name: ClassVar[str]
    knob: ClassVar[str]
    sweep: ClassVar[tuple[float, ...]]
    directions: ClassVar[tuple[bool, ...]] = (True, False)
    limits: ClassVar[dict[str, tuple[float, float]]] = {}

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                continue
            low, high = self.limits.get(field.name, (1, inf) if field.type == "int" else (0, 1))
            if not low <= value <= high:
                raise ValueError(f"{self.name}: {field.name} must lie in [{low}, {high}], got {value}")

    def _check(self, q, k, causal):
        for name, x in (("q", q), ("k", k)):
            if x.dim() != 4 or min(x.shape) < 1:
                raise ValueError(f"{name} must have 4 axes [batch, heads, length, head dim], got shape {list(x.shape)}")
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
            raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must agree in batch size and head dim")
        if q.shape[1] % k.shape[1]:
            raise ValueError(f"query heads ({q.shape[1]}) must be a multiple of key heads ({k.shape[1]})")
        if causal not in self.directions:
            raise ValueError(f"{self.name} is not defined for {'causal' if causal else 'non-causal'} attention")
        if causal and q.shape[2] != k.shape[2]:
            raise ValueError(f"causal selection needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}")


class Selector(Settings, ABC):
    """A method whose choice is a block mask over positions."""

    def select(self, q: torch.Tensor, k: torch.Tensor, *, scale: float, causal: bool, tile: TileShape) -> torch.Tensor:
        """bool [B, Hq, query tiles, key tiles]: the tiles to compute. q [B, Hq, Tq, D], k [B, Hkv, Tk, D].

        Tiles of the diagonal are always kept, tiles hidden by causality never. Query row i and key row i stand at
        position i. Heads that share a mask may share its memory (stride 0).

        Raises ValueError for shapes that do not fit together, causal attention with Tq != Tk, a direction
        the method is not defined for, and block sizes that do not fit the tile.
        """
        self._check(q, k, causal)
        tiles = block_count(q.shape[2], tile.rows), block_count(k.shape[2], tile.keys)
        mask = self._tiles(q, k, scale, causal, tile)
        if causal:
            mask = mask & visible(*tiles, tile, q.device)
        return (mask | diagonal(*tiles, tile, q.device)).expand(*q.shape[:2], *tiles)

    @abstractmethod
    def _tiles(self, q, k, scale: float, causal: bool, tile: TileShape) -> torch.Tensor:
        """The method itself: bool, broadcastable to [B, Hq, query tiles, key tiles]."""
