"""Gates: the tests that may drop a tile.

absolute  keep a tile iff its largest score reaches `absolute[head, query tile]`  (BSFA, arXiv 2512.07011)
gap       keep a tile iff some row's largest score in it, minus that row's running maximum over the tiles kept so far,
          reaches `gap[head, query tile]`  (skip-softmax, arXiv 2512.12087, here with one value per head and position)

Scores are scale * q.k in float32, natural units. Both gates given: a tile must pass both. -inf keeps every tile, and
equality keeps. Past the last query tile the last column repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gate:
    """Thresholds of one attention module, each float32 [Hq, query tiles] in natural units, or None for no such gate.

    Column i belongs to the query tile at absolute positions i * rows .. (i + 1) * rows. Values are run-time data:
    changing them never recompiles a kernel, and no backend reads them on the host.
    """

    absolute: torch.Tensor | None = None
    gap: torch.Tensor | None = None

    def __post_init__(self):
        for name, value in (("absolute", self.absolute), ("gap", self.gap)):
            if value is None:
                continue
            if value.dtype != torch.float32 or value.dim() != 2 or value.shape[1] < 1:
                raise ValueError(
                    f"gate '{name}' must be a float32 tensor [query heads, query tiles], "
                    f"got {value.dtype} {list(value.shape)}"
                )

    @property
    def open(self) -> bool:
        """True when no gate is set: every tile is kept."""
        return self.absolute is None and self.gap is None

    def to(self, device: torch.device | str) -> Gate:
        return self.map(lambda thresholds: thresholds.to(device))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Gate:
        """The gate with `change` applied to the thresholds it has."""
        return Gate(*(None if thresholds is None else change(thresholds) for thresholds in (self.absolute, self.gap)))


def column(thresholds: torch.Tensor, query_tile: int) -> torch.Tensor:
    """Thresholds [Hq] of one query tile; past the end the last column repeats."""
    return thresholds[:, min(query_tile, thresholds.shape[1] - 1)]
