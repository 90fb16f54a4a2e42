"""Mergeable statistics of one attention module, from which any operating point can be read later.

Every candidate tile (one that a gate may drop) has a value for each gate: its largest gap, or its largest score. A
threshold drops the tiles whose value lies below it. So, on a fixed grid of gate values, per query head and octave of
the query position, three things are enough:

    count   candidate tiles by grid cell
    mass    the softmax mass they carry, mean over the rows of their query tile, by grid cell
    effect  the same, each tile's mass times how far leaving it out moves the residual stream (see effect.py)
    reach   query tiles by the number of leading grid values whose bound stays within each mass level; a bound is the
            sum, over dropped tiles, of the largest mass that any row gives them: no row of the query tile drops more
    kl      where asked for, by threshold and not by cell: what dropping all tiles below does to the predictions
            (see divergence.py)

A value v lies in cell i where grid[i - 1] <= v < grid[i], so threshold grid[g] drops cells 0 .. g. Mass is kept in
fixed point: sums do not depend on the order of samples, devices or atomics, and an interrupted run ends in the same
bytes. Query tiles without a candidate are in none of the counts.

The gap grid ends at 0: below it a dropped tile never holds a row's running maximum, so the gap measured with nothing
dropped is the gap that the kernel meets, and the skip rate read from the curve is exact for the same scores.

With int8 scores all of this is of those, and `int8.error` sums, by query head, what they do to its output and to the
log-sum-exp of its rows with nothing dropped.

In a run on images all of this is kept apart by the modality of the query tile (text, image, mixed): a unit is then an
octave of one modality, and one more curve is kept,

    keys    candidate tiles by the modality of the key tile and grid cell

For top-k (the BSFA authors' recipe) the midpoint between the k-th and k+1-th largest maximum of the tiles off the
diagonal is summed per query tile at the artifact's knots. Key tile 0 takes part in that ranking, as in the authors'
code, also where the gate exempts it. Query tiles that a sample ends within are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from bsfa_kernels.modality import MODALITIES
from bsfa_kernels.tiles import TileShape

if TYPE_CHECKING:
    from bsfa_kernels import Attention, TileStatistics

FIXED_POINT = 1 << 40
INT8_ERROR = "int8.error"
# Per-row bounds are counted at these levels of dropped softmax mass.
LEVELS = tuple(10 ** (-4 + i / 4) for i in range(16))
# Upper limit of tiles that are binned at once: bounds the temporaries to some 0.6 GB.
TILES_AT_ONCE = 1 << 24


def _steps(low: float, high: float, step: float) -> list[float]:
    return [low + i * step for i in range(round((high - low) / step))]


GRIDS = {
    "gap": (*_steps(-64, -16, 2), *_steps(-16, 0, 0.25), 0.0),
    "absolute": (*_steps(-64, -16, 4), *_steps(-16, 32, 0.5), *_steps(32, 128, 4), 128.0),
}


def octave(query_tile: int) -> int:
    """The position bin of a query tile: tiles 0 and 1, then [2, 4), [4, 8) and so on."""
    return max(query_tile, 1).bit_length() - 1


def int8_errors(curves: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, list[float]]:
    """{module path: relative output error of int8 scores by query head}; empty where a run did not measure it."""
    return _int8(curves, 0)


def int8_score_errors(curves: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, list[float]]:
    """{module path: how far int8 scores move a row's log-sum-exp, root mean square in natural units, by query head}."""
    return _int8(curves, 2)


def _int8(curves, column: int) -> dict[str, list[float]]:
    sums = {path: tensors[INT8_ERROR].double() for path, tensors in curves.items() if INT8_ERROR in tensors}
    return {path: (x[:, column] / x[:, column + 1].clamp(min=1e-300)).sqrt().tolist() for path, x in sums.items()}


def int8_words(errors: dict[str, list[float]]) -> str:
    """{module path: errors by head} of a run in a sentence."""
    ranked = sorted(
        (error, f"{path} head {head}") for path, found in errors.items() for head, error in enumerate(found)
    )
    return (
        f"int8 scores, nothing skipped: a head's output is off by {ranked[len(ranked) // 2][0]:.2%} in the middle, "
        f"{ranked[-1][0]:.2%} at worst ({ranked[-1][1]})"
    )


def knot_tiles(query_tiles: int) -> tuple[int, ...]:
    """Query tiles at whose centres the artifact has knots: all up to 8, four an octave, every octave's last, the last.

    With a knot at the first and at the last tile of an octave, interpolation meets a value per octave exactly.
    """
    tiles, start = {*range(8), query_tiles - 1}, 8
    while start < query_tiles:
        tiles |= {start, start * 5 // 4, start * 6 // 4, start * 7 // 4, 2 * start - 1}
        start *= 2
    return tuple(sorted(t for t in tiles if t < query_tiles))


@dataclass(frozen=True)
class Plan:
    """What is counted: fixed for a run, so that all its samples merge."""

    tile: TileShape
    longest: int  # tokens of the longest sample
    ranks: tuple[int, ...]  # k of the top-k recipe
    scores: str = "exact"  # that statistics are of
    gradients: bool = False  # whether a backward pass adds what skipping does to the predictions
    modal: bool = False  # by modality of the query tile; not with gradients

    @property
    def units(self) -> int:
        """Rows of a head's curves: its octaves, those of every modality one after the other."""
        return self.octaves * (len(MODALITIES) if self.modal else 1)

    @property
    def query_tiles(self) -> int:
        return -(-self.longest // self.tile.rows)

    @property
    def octaves(self) -> int:
        return octave(self.query_tiles - 1) + 1

    @property
    def knot_tiles(self) -> tuple[int, ...]:
        return knot_tiles(self.query_tiles)

    @property
    def most_ranked(self) -> int:
        """Tiles off the diagonal of the last query tile: top-k of as many, or more, drops nothing anywhere."""
        return (self.query_tiles - 1) * self.tile.rows // self.tile.keys

    def bytes_per_head(self) -> int:
        """Size of one query head's curves in memory, on the device."""
        cells = sum(len(grid) + 1 for grid in GRIDS.values())
        cell = 8 * (3 + self.gradients) + 4 * len(LEVELS) + 4 * len(MODALITIES) * self.modal
        tops = 8 * len(self.ranks) * len(self.knot_tiles)
        return self.units * cells * cell + tops + 32 * (self.scores == "int8")


class ModuleCurves:
    """Sums over samples for one attention module, on one device. `tensors` is what a run directory stores."""

    def __init__(self, plan: Plan, heads: int, device: torch.device | str):
        self.plan, self.heads = plan, heads
        self.grids = {gate: torch.tensor(grid, device=device) for gate, grid in GRIDS.items()}
        self._levels = torch.tensor(LEVELS, dtype=torch.float64, device=device)
        self.octaves = torch.tensor([octave(t) for t in range(plan.query_tiles)], device=device)  # of query tiles
        self._knot_tiles = torch.tensor(plan.knot_tiles, device=device)
        self.tensors = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in self.layout(plan, heads).items()
        }

    @staticmethod
    def layout(plan: Plan, heads: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{name: (shape, dtype)} of `tensors`."""
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"tiles": ((plan.units,), torch.int64)}
        for gate, grid in GRIDS.items():
            cells = len(grid) + 1
            for name in ("count", "mass", "effect"):
                layout[f"{gate}.{name}"] = ((heads, plan.units, cells), torch.int64)
            layout[f"{gate}.reach"] = ((heads, plan.units, len(LEVELS), cells), torch.int32)
            if plan.gradients:
                layout[f"{gate}.kl"] = ((heads, plan.octaves, cells), torch.int64)
            if plan.modal:
                layout[f"{gate}.keys"] = ((heads, plan.units, len(MODALITIES), cells), torch.int32)
        layout["top_k.sum"] = ((len(plan.ranks), heads, len(plan.knot_tiles)), torch.float64)
        if plan.scores == "int8":
            layout[INT8_ERROR] = ((heads, 4), torch.float64)
        layout["top_k.samples"] = ((len(plan.knot_tiles),), torch.int64)
        return layout

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from the sums of an earlier process."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    def merge(self, tensors: dict[str, torch.Tensor]) -> None:
        """Add the sums of another process's samples."""
        for name, tensor in tensors.items():
            self.tensors[name] += tensor.to(self.tensors[name].device)

    def add(
        self,
        statistics: TileStatistics,
        weight: torch.Tensor | None = None,
        modality: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Add one sequence that starts at position 0; fields [1, Hq, query tiles, key tiles]. Never waits for the
        device. `weight` [Hq, query tiles, key tiles] makes effect of mass; without it both are the same. `modality`:
        int64 [query tiles] and [key tiles], indices into MODALITIES, where the plan is by modality.
        """
        if (modality is not None) != self.plan.modal:
            raise ValueError("modalities must be given where the plan is by modality, and only there")
        query_tiles, key_tiles = statistics.gap.shape[2:]
        at_once = max(1, TILES_AT_ONCE // (query_tiles * key_tiles))
        for first in range(0, self.heads, at_once):
            heads = slice(first, min(first + at_once, self.heads))
            moved = 1.0 if weight is None else weight[heads]
            self._add_heads(heads, *(x[0, heads] for x in statistics), moved, modality, counted=first == 0)

    def add_error(self, rounded: Attention, exact: Attention) -> None:
        """Add what int8 scores do: the squared distance of the output [1, Hq, T, D] from that of exact ones, its
        squared length, and the squared distance of rows' log-sum-exp, with the number of rows.
        """
        for head in range(self.heads):  # one at a time: float32 copies of a whole layer would be large
            wanted = exact.out[:, head].float()
            seen = exact.lse[:, head] > -torch.inf
            moved = torch.where(seen, rounded.lse[:, head] - exact.lse[:, head], 0.0)
            sums = self.tensors[INT8_ERROR][head]
            sums[0] += (rounded.out[:, head].float() - wanted).square().sum(dtype=torch.float64)
            sums[1] += wanted.square().sum(dtype=torch.float64)
            sums[2] += moved.square().sum(dtype=torch.float64)
            sums[3] += seen.sum()

    def _add_heads(self, heads: slice, maximum, gap, mass_mean, mass_worst, moved, modality, counted: bool) -> None:
        candidate = gap.isfinite()
        units = self.octaves[: gap.shape[1]]
        if modality is not None:
            units = units + modality[0] * self.plan.octaves
        active = candidate[0].any(-1)  # geometry: the same for every head
        if counted:
            self.tensors["tiles"].index_add_(0, units, active.long())
        weights = (
            candidate.long(),
            torch.where(candidate, mass_mean.double() * FIXED_POINT, 0.0).round_().long(),
            torch.where(candidate, (mass_mean * moved).double() * FIXED_POINT, 0.0).round_().long(),
            torch.where(candidate, mass_worst.double() * FIXED_POINT, 0.0).ceil_().long(),
        )
        for gate, value in (("gap", gap), ("absolute", maximum)):
            self._bin(gate, heads, value, gap, candidate, weights, units, active, modality)
        self._rank(heads, maximum, gap, candidate, active, counted)

    def cells(self, gate: str, value: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        """int32: the cell of every tile's `value` on the grid of `gate`; tiles that no gate drops, by their `gap`, are
        in the last one.
        """
        return torch.bucketize(
            torch.where(gap.isfinite(), value, torch.inf), self.grids[gate], right=True, out_int32=True
        )

    def _bin(self, gate: str, heads: slice, value, gap, candidate, weights, units, active, modality) -> None:
        grid = self.grids[gate]
        cell = self.cells(gate, value, gap).long()  # [H, Q, K]
        *sums, worst = (
            torch.zeros(*value.shape[:2], len(grid) + 1, dtype=torch.int64, device=value.device).scatter_add_(
                2, cell, w
            )
            for w in weights
        )
        for name, cells in zip(("count", "mass", "effect"), sums, strict=True):
            self.tensors[f"{gate}.{name}"][heads].index_add_(1, units, cells)
        if modality is not None:
            keys = self.tensors[f"{gate}.keys"][heads]
            by_key = torch.zeros(*value.shape[:2], keys[0, 0].numel(), dtype=torch.int32, device=value.device)
            by_key.scatter_add_(2, cell + modality[1] * keys.shape[3], candidate.int())
            keys.index_add_(1, units, by_key.unflatten(2, keys.shape[2:]))
        bound = worst[..., :-1].cumsum(-1).double() / FIXED_POINT  # [H, Q, grid]
        levels = self._levels.expand(*bound.shape[:2], -1).contiguous()
        within = torch.searchsorted(bound, levels, right=True)  # [H, Q, levels]: grid values whose bound <= level
        reach = self.tensors[f"{gate}.reach"][heads]
        target = units[None, :, None] * reach.shape[2] + torch.arange(reach.shape[2], device=value.device)
        target = (target * reach.shape[3] + within).flatten(1)
        ones = active.int()[None, :, None].expand_as(within).flatten(1)
        reach.view(reach.shape[0], -1).scatter_add_(1, target, ones)

    def _rank(self, heads: slice, maximum, gap, candidate, active, counted: bool) -> None:
        tiles = self._knot_tiles.clamp(max=gap.shape[1] - 1)
        # A query tile that the sequence ends within is judged by no gate, whatever it could choose from.
        judged = active | (self._first_diagonal(gap) <= 1)
        present = (self._knot_tiles < gap.shape[1]) & judged[tiles]
        sink = (gap[..., :1] == torch.inf) & (self._first_diagonal(gap)[None, :, None] > 0)
        voting = candidate.clone()
        voting[..., :1] |= sink
        scores = torch.where(voting[:, tiles], maximum[:, tiles], -torch.inf)  # [H, knots, K]
        deepest = min(max(self.plan.ranks, default=0) + 1, scores.shape[-1])
        ranked = scores.topk(deepest, sorted=True).values.double()
        for i, k in enumerate(self.plan.ranks):
            middle = (
                (ranked[..., k - 1] + ranked[..., k]) / 2
                if k < deepest
                else torch.full_like(scores[..., 0], -torch.inf)
            )
            self.tensors["top_k.sum"][i, heads] += torch.where(present, middle, 0.0)
        if counted:
            self.tensors["top_k.samples"] += present

    def _first_diagonal(self, gap) -> torch.Tensor:
        tiles = torch.arange(gap.shape[1], device=gap.device)
        return (tiles * self.plan.tile.rows // self.plan.tile.keys).clamp(max=gap.shape[2] - 1)
