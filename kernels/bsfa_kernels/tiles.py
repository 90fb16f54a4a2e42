"""Tile geometry: which positions a tile covers, and which tiles no gate may drop.

A tile is `rows` consecutive query positions by `keys` consecutive key positions. Tiles are counted from absolute
position 0, so a chunk of a prompt meets the same tiles as the whole prompt does. The tile shape is part of what
thresholds mean: it is stored with them and never tuned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class TileShape:
    """Query rows x keys of one tile."""

    rows: int = 64
    keys: int = 128

    def __post_init__(self):
        for name, size in (("rows", self.rows), ("keys", self.keys)):
            try:
                fits = 1 <= size < 1 << 31
            except (TypeError, RuntimeError):
                fits = None
            if fits is None or type(size) is float:
                raise TypeError(f"tile {name} must be a whole number, got {type(size).__name__}")
            if not fits:
                raise ValueError(f"tile {name} must be a positive number below 2^31, got {size}")

    def __str__(self) -> str:
        return f"{self.rows}x{self.keys}"


class Visit(NamedTuple):
    """The key tiles of one query tile: half-open ranges of key tile indices.

    Visiting order is `forced` (diagonal tiles, then the sink), then `candidates` from right to left.
    """

    first_diagonal: int
    end_diagonal: int
    sink: bool  # key tile 0 is forced and lies outside the diagonal range
    end_keys: int  # key tiles at or past this one hold nothing this query tile may see
    first_keys: int = 0  # nor do those before this one

    def forced(self) -> list[int]:
        return list(range(self.first_diagonal, self.end_diagonal)) + ([0] if self.sink else [])

    def candidates(self) -> list[int]:
        """Key tiles a gate may drop, in visiting order (right to left)."""
        first = 1 if self.sink else self.first_keys
        right = range(self.end_keys - 1, self.end_diagonal - 1, -1)
        left = range(self.first_diagonal - 1, first - 1, -1)
        return [*right, *left]


def query_tile_count(q_offset: int, q_rows: int, tile: TileShape) -> tuple[int, int]:
    """(index of the first query tile, number of query tiles) for rows at positions q_offset .. q_offset + q_rows.

    Rows at negative positions are padding and belong to no tile; where no row is left, there is no tile.
    """
    first, end = max(q_offset, 0), q_offset + q_rows
    if end <= first:
        return first // tile.rows, 0
    return first // tile.rows, -(-end // tile.rows) - first // tile.rows


def visit(query_tile: int, length: int, causal: bool, sink: bool, tile: TileShape, window: int | None = None) -> Visit:
    """What query tile `query_tile` visits when the sequence holds `length` >= 1 valid key positions.

    The diagonal of a query tile is every key tile that holds one of its positions; where the keys end before its
    first position, the last key tile stands in, so that at least one tile is always kept. Tiles that lie before the
    `window` of its first position are not visited, the sink among them.
    """
    last_tile = (length - 1) // tile.keys
    first_diagonal = min(query_tile * tile.rows // tile.keys, last_tile)
    end_diagonal = min(((query_tile + 1) * tile.rows - 1) // tile.keys, last_tile) + 1
    end_keys = end_diagonal if causal else last_tile + 1
    first_keys = 0 if window is None else min(max(query_tile * tile.rows - window + 1, 0) // tile.keys, first_diagonal)
    return Visit(first_diagonal, end_diagonal, sink and first_diagonal > 0 and first_keys == 0, end_keys, first_keys)


def tile_counts(length: int, causal: bool, sink: bool, tile: TileShape) -> tuple[int, int]:
    """(visible tiles, forced tiles) of one head and one sequence of `length` queries and keys."""
    everything = forced = 0
    for query_tile in range(query_tile_count(0, length, tile)[1]):
        plan = visit(query_tile, length, causal, sink, tile)
        everything += plan.end_keys
        forced += len(plan.forced())
    return everything, forced
