"""Gates: the tests that may drop a tile.

absolute  keep a tile iff its largest score reaches `absolute[head, query tile]`  (BSFA, arXiv 2512.07011)
gap       keep a tile iff some row's largest score in it, minus that row's running maximum over the tiles kept so far,
          reaches `gap[head, query tile]`  (skip-softmax, arXiv 2512.12087, here with one value per head and position)

Scores are scale * q.k in float32, natural units. Both gates given: a tile must pass both. -inf keeps every tile, and
equality keeps. Past the last query tile the last column repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

WANTED = "must be a number or a float32 tensor [query heads] or [query heads, query tiles]"
MOST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Gate:
    """Thresholds of one attention module in natural units, or None for no such gate.

    Each is a number for all heads, or a float32 tensor: [Hq], one value a head, or [Hq, query tiles], whose column i
    belongs to the query tile at absolute positions i * rows .. (i + 1) * rows. Kernels see the last of these, by
    `expanded`. Values are run-time data: changing them never recompiles a kernel, and no backend reads them on the
    host.

    Raises TypeError for what is neither number nor tensor, ValueError for a NaN and for tensors of another dtype or
    shape.
    """

    absolute: torch.Tensor | float | None = None
    gap: torch.Tensor | float | None = None

    def __post_init__(self):
        for name, value in (("absolute", self.absolute), ("gap", self.gap)):
            if value is None:
                continue
            if isinstance(value, torch.Tensor):
                if value.dtype != torch.float32 or value.dim() not in (1, 2) or min(value.shape) < 1:
                    raise ValueError(f"gate '{name}' {WANTED}, got {value.dtype} {list(value.shape)}")
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"gate '{name}' {WANTED}, got {type(value).__name__}")
            elif value != value:
                raise ValueError(f"gate '{name}' {WANTED}, got {value}")
            elif not -MOST <= value <= MOST and value not in (-math.inf, math.inf):
                raise ValueError(f"gate '{name}' {WANTED}, got one that float32 does not hold")

    def expanded(self, heads: int, device: torch.device | str) -> Gate:
        """The same gate as kernels see it: float32 tensors [heads, query tiles], numbers filled in on `device`."""

        def expand(value: torch.Tensor | float) -> torch.Tensor:
            if not isinstance(value, torch.Tensor):
                return torch.full((heads, 1), value, dtype=torch.float32, device=device)
            return value if value.dim() == 2 else value[:, None]

        values = (self.absolute, self.gap)
        if all(value is None or (isinstance(value, torch.Tensor) and value.dim() == 2) for value in values):
            return self
        return Gate(*(None if value is None else expand(value) for value in values))

    @property
    def open(self) -> bool:
        """True when no gate is set: every tile is kept."""
        return self.absolute is None and self.gap is None

    def to(self, device: torch.device | str) -> Gate:
        return self.map(lambda thresholds: thresholds.to(device))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Gate:
        """The gate with `change` applied to the tensors it has; numbers stay."""
        return Gate(
            *(change(value) if isinstance(value, torch.Tensor) else value for value in (self.absolute, self.gap))
        )


def column(thresholds: torch.Tensor, query_tile: int) -> torch.Tensor:
    """Thresholds [Hq] of one query tile; past the end the last column repeats."""
    return thresholds[:, min(query_tile, thresholds.shape[1] - 1)]
