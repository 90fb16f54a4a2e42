"""From curves to thresholds: choose an operating point on the fitted samples, and say what it does on any samples.

A unit is one query head of one module in one octave of the query position, and by modality in one modality of the query
tile; a head's units are P, octave by octave, modality after modality. A choice is an entry per unit: 0 keeps
every tile, entry i has the threshold grid[i - 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from bsfa_kernels.modality import MODALITIES
from bsfa_kernels.thresholds import Reached, interpolate

from ..errors import OutOfReach
from .curves import FIXED_POINT, GRIDS, LEVELS, Plan, octave

BISECTIONS = 60


@dataclass(frozen=True)
class Table:
    """Curves of every unit for one gate, cumulative by entry; N query heads of all modules, P units of each."""

    gate: str
    modules: Mapping[str, slice]  # {module path: its heads among N}
    values: torch.Tensor  # float64 [entries]: -inf, then the grid
    dropped: torch.Tensor  # int64 [N, P, entries]: tiles dropped
    mass: torch.Tensor  # float64 [N, P, entries]: mass dropped, summed over query tiles
    effect: torch.Tensor  # float64 [N, P, entries]: the same, weighed by what it does to the residual stream
    within: torch.Tensor  # int32 [N, P, levels, entries]: query tiles whose bound stays within the level
    candidates: torch.Tensor  # int64 [N, P]
    tiles: torch.Tensor  # int64 [N, P]: query tiles with a candidate
    kl: torch.Tensor | None = None  # float64 [N, P, entries]: nats that dropping costs predictions, over all rows

    @property
    def reach(self) -> float:
        """The share of candidate tiles that the highest threshold of the grid drops, in four digits rounded down."""
        return math.floor(1e4 * int(self.dropped[..., -1].sum()) / max(1, int(self.candidates.sum()))) / 1e4

    def heads(self, paths: Sequence[str]) -> torch.Tensor:
        """bool [N]: the heads of these modules."""
        found = torch.zeros(len(self.candidates), dtype=torch.bool)
        for path in paths:
            found[self.modules[path]] = True
        return found

    def keeping(self, paths: Sequence[str]) -> Table:
        """The same where no threshold drops a tile of these modules; their tiles stay candidates."""
        if not paths:
            return self
        kept = self.heads(paths)[:, None, None]
        names = ("dropped", "mass", "effect") + (("kl",) if self.kl is not None else ())
        return replace(self, **{name: getattr(self, name).masked_fill(kept, 0) for name in names})

    @classmethod
    def of(cls, curves: Mapping[str, Mapping[str, torch.Tensor]], gate: str, by_modality: bool = False) -> Table:
        """`by_modality` keeps apart what curves by modality hold, which are summed otherwise."""
        modules, first = {}, 0
        for path, tensors in curves.items():
            heads = tensors[f"{gate}.count"].shape[0]
            modules[path] = slice(first, first + heads)
            first += heads
        count, mass, effect, reach = (
            torch.cat([tensors[f"{gate}.{name}"] for tensors in curves.values()])
            for name in ("count", "mass", "effect", "reach")
        )
        kl = [tensors[f"{gate}.kl"] for tensors in curves.values() if f"{gate}.kl" in tensors]
        tiles = torch.cat([t["tiles"].expand(t[f"{gate}.count"].shape[0], -1) for t in curves.values()])
        if not by_modality and any(f"{gate}.keys" in tensors for tensors in curves.values()):
            count, mass, effect, reach, tiles = (
                x.unflatten(1, (len(MODALITIES), -1)).sum(1, dtype=x.dtype) for x in (count, mass, effect, reach, tiles)
            )
        return cls(
            gate,
            modules,
            torch.tensor([-math.inf, *GRIDS[gate]], dtype=torch.float64),
            _from_zero(count),
            _from_zero(mass).double() / FIXED_POINT,
            _from_zero(effect).double() / FIXED_POINT,
            reach.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1),
            count.sum(-1),
            tiles,
            torch.cat(kl).double() / FIXED_POINT if kl else None,
        )

    def tightened(self, choice: torch.Tensor) -> torch.Tensor:
        """The lowest entries [N, P] that drop the same tiles: no claim on gate values that were never seen."""
        at = self.dropped.gather(-1, choice[..., None])
        return torch.searchsorted(self.dropped, at, right=False)[..., 0]


def _from_zero(cells: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(cells[..., :1]), cells[..., :-1].cumsum(-1)], -1)


def target_skip(table: Table, rate: float) -> torch.Tensor:
    """Choice [N, P] that drops `rate` of all candidate tiles, shared out as costs least: by KL, in a run without
    gradients by mass.
    """
    return mass_skip(table, rate) if table.kl is None else kl_skip(table, rate)


def mass_skip(table: Table, rate: float) -> torch.Tensor:
    """The same, shared out so that the mass dropped is least."""
    return _cheapest(table, rate, table.mass)


def effect_skip(table: Table, rate: float) -> torch.Tensor:
    """The same, shared out so that the residual stream moves least."""
    return _cheapest(table, rate, table.effect)


def kl_skip(table: Table, rate: float) -> torch.Tensor:
    """The same, shared out so that the predictions change least. Raises OutOfReach for a run without gradients."""
    if table.kl is None:
        raise OutOfReach("--kl-skip needs a run of calibrate --gradients, and this one has none")
    return _cheapest(table, rate, table.kl)


def _cheapest(table: Table, rate: float, cost: torch.Tensor) -> torch.Tensor:
    """Choice [N, P] that drops `rate` of all candidate tiles for the least `cost` [N, P, entries].

    The cheapest choices for a price per dropped tile trace the lower convex hull; the price is bisected, and units
    go over from the cheaper to the dearer choice one by one until the rate is reached. Raises OutOfReach where even
    the highest threshold of the grid drops too little.
    """
    wanted = _wanted(table, rate)

    def cheapest(price: float) -> torch.Tensor:
        return table.tightened((cost - price * table.dropped.double()).argmin(-1))

    def count(choice: torch.Tensor) -> torch.Tensor:
        return table.dropped.gather(-1, choice[..., None])[..., 0]

    low = torch.zeros_like(table.candidates)
    high = table.tightened(torch.full_like(low, len(table.values) - 1))
    below, above = 0.0, float(cost.max()) + 1  # more than any tile costs, so that it drops all that the grid can
    for _ in range(BISECTIONS):
        price = (below + above) / 2
        choice = cheapest(price)
        if int(count(choice).sum()) >= wanted:
            above, high = price, choice
        else:
            below, low = price, choice
    more = (count(high) - count(low)).flatten()
    dearer = (cost.gather(-1, high[..., None]) - cost.gather(-1, low[..., None])).flatten()
    order = torch.where(more > 0, dearer / more.clamp(min=1), math.inf).argsort(stable=True)
    reached = int(count(low).sum()) + more[order].cumsum(0)
    changed = order[: int(torch.searchsorted(reached, wanted)) + 1]
    result = low.flatten().clone()
    if int(count(low).sum()) < wanted:
        result[changed] = high.flatten()[changed]
    return result.view_as(low)


def _wanted(table: Table, rate: float) -> int:
    """Tiles to drop for `rate` of all candidates. Raises OutOfReach where the grid cannot."""
    wanted = math.ceil(rate * int(table.candidates.sum()) - 1e-6)
    most = int(table.dropped[..., -1].sum())
    if not int(table.candidates.sum()):
        raise OutOfReach(
            "the run's samples are too short: no tile of theirs may be dropped; calibrate with a larger --length"
        )
    if most < wanted:
        raise OutOfReach(
            f"a skip rate of {rate:g} cannot be reached: the highest {table.gate} threshold drops {table.reach:.4f} of "
            f"the candidate tiles; ask for less{', or for --gate absolute' if table.gate == 'gap' else ''}"
        )
    return wanted


def even_skip(table: Table, rate: float) -> torch.Tensor:
    """Choice [N, P] that drops at least `rate` of the candidate tiles in every unit alike, or all that its grid can."""
    wanted = torch.ceil(rate * table.candidates - 1e-6).long()
    enough = torch.searchsorted(table.dropped, wanted[..., None])[..., 0]
    return table.tightened(enough.clamp(max=len(table.values) - 1))


def one_threshold(table: Table, rate: float) -> torch.Tensor:
    """Choice [N, P], the same threshold in every unit: the lowest that drops `rate` of all candidate tiles.

    Raises OutOfReach where even the highest threshold of the grid drops too little.
    """
    wanted = _wanted(table, rate)
    entry = int(torch.searchsorted(table.dropped.sum((0, 1)), wanted))
    return torch.full_like(table.candidates, entry)


def max_dropped_mass(table: Table, most: float, quantile: float) -> torch.Tensor:
    """Choice [N, P]: in every unit the highest threshold at which `quantile` of the query tiles stay within `most`.

    `most` is rounded down to one of LEVELS. Raises OutOfReach below the smallest of them.
    """
    level = sum(value <= most * (1 + 1e-9) for value in LEVELS) - 1
    if level < 0:
        raise OutOfReach(f"--max-dropped-mass {most:g} is below what is counted; the least is {LEVELS[0]:g}")
    needed = torch.ceil(quantile * table.tiles - 1e-9)
    held = (table.within[:, :, level] >= needed[..., None]).sum(-1)  # falls with the entry, and holds for entry 0
    return table.tightened(held - 1)


def top_k(curves: Mapping[str, Mapping[str, torch.Tensor]], plan: Plan, k: int) -> torch.Tensor:
    """float64 [N, knots]: mean over samples of the midpoint between the k-th and k+1-th largest tile maximum.

    It falls with k, so of a k that was not collected it lies between those of its neighbours, and is taken there
    linearly in log k. Raises OutOfReach for a k outside of those collected.
    """
    below, above = neighbours(plan, k)
    low, high = (
        torch.cat([_means(tensors["top_k.sum"][rank], tensors["top_k.samples"]) for tensors in curves.values()])
        for rank in map(plan.ranks.index, (above, below))
    )
    if below == above:
        return low
    return torch.where(low.isfinite(), low.lerp(high, math.log(above / k) / math.log(above / below)), -torch.inf)


def _means(sums: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Means [N, knots] of sums; a knot of no sample, such as one that all end within, has those of the one before."""
    counted = torch.where(samples > 0, torch.arange(len(samples)), 0).cummax(0).values
    return (sums / samples.clamp(min=1))[:, counted]


def neighbours(plan: Plan, k: int) -> tuple[int, int]:
    """The nearest collected values of k, one on each side, or k twice. Raises OutOfReach where there are none."""
    below, above = ([rank for rank in plan.ranks if sign * rank >= sign * k] for sign in (-1, 1))
    if not below or not above:
        kept = ", ".join(map(str, plan.ranks)) or "none"
        raise OutOfReach(f"--top-k {k} lies outside of what was collected: {kept} (calibrate --top-k)")
    return max(below), min(above)


def at_knots(table: Table, plan: Plan, choice: torch.Tensor) -> torch.Tensor:
    """float64 [N, knots]: the thresholds of a choice at the artifact's knots; [N, modalities, knots] by modality."""
    octaves = torch.tensor([octave(tile) for tile in plan.knot_tiles])
    values = table.values[choice].unflatten(1, (-1, plan.octaves))[..., octaves]
    return values[:, 0] if values.shape[1] == 1 else values


def skip_by_modality(
    curves: Mapping[str, Mapping[str, torch.Tensor]], gate: str, choice: torch.Tensor
) -> dict[str, dict[str, dict[str, float]]]:
    """{modality of the query tile: {of the key tile: {"share" of the candidates, "skip"}}} of a choice [N, P], on the
    samples of curves by modality; pairs without a candidate are missing.
    """
    cells = torch.cat([tensors[f"{gate}.keys"] for tensors in curves.values()]).long()  # [N, units, modalities, cells]
    if choice.shape[1] < cells.shape[1]:
        choice = choice.repeat(1, len(MODALITIES))
    dropped = _from_zero(cells).gather(-1, choice[:, :, None, None].expand(*cells.shape[:3], 1))[..., 0]
    dropped, candidates = (x.unflatten(1, (len(MODALITIES), -1)).sum((0, 2)) for x in (dropped, cells.sum(-1)))
    total = max(1, int(candidates.sum()))
    return {
        query: {
            key: {"share": int(candidates[i, j]) / total, "skip": int(dropped[i, j]) / int(candidates[i, j])}
            for j, key in enumerate(MODALITIES)
            if candidates[i, j]
        }
        for i, query in enumerate(MODALITIES)
        if candidates[i].any()
    }


def evaluate(table: Table, choice: torch.Tensor, quantile: float, heads: slice = slice(None)) -> Reached | None:
    """What a choice does on the table's samples, for all units or those of `heads`; None without candidates."""
    at = choice[heads, :, None]
    dropped, mass = (x[heads].gather(-1, at)[..., 0] for x in (table.dropped, table.mass))
    within = table.within[heads].gather(-1, at[..., None].expand(-1, -1, len(LEVELS), 1))[..., 0]
    beyond = _beyond(table.tiles[heads], within, mass)
    return _reached(table, heads, float(dropped.sum()), float(mass.sum()), beyond, quantile)


def predicted_kl(table: Table, choice: torch.Tensor, rows: int) -> float | None:
    """Nats a position that a choice costs the predictions, over positions with something to drop in query tiles of
    `rows`; None for a run without gradients. What heads and layers cost singly is added up.
    """
    positions = rows * int(table.tiles.amax(0).sum())
    if table.kl is None or not positions:
        return None
    return float(table.kl.gather(-1, choice[..., None]).sum()) / positions


def evaluate_positions(
    table: Table, plan: Plan, thresholds: torch.Tensor, quantile: float, heads: slice = slice(None)
) -> Reached | None:
    """The same, estimated, for thresholds [N, knots] that change within an octave.

    Every query tile is given its octave's curve at its own threshold: shares of tiles and mass between grid values
    linearly, tiles' bounds at the next higher grid value.
    """
    tiles = torch.arange(plan.query_tiles)
    values = interpolate(thresholds[heads], plan.knot_tiles, tiles).double()  # [n, query tiles]
    octaves = torch.tensor([octave(tile) for tile in range(plan.query_tiles)])
    grid = table.values[1:]
    above = (torch.searchsorted(grid, values.contiguous()) + 1).clamp(max=len(grid))
    below = (above - 1).clamp(min=1)
    weight = ((values - table.values[below]) / (table.values[above] - table.values[below]).clamp(min=1e-9)).clamp(0, 1)
    above, weight = above * values.isfinite(), torch.where(values.isfinite(), weight, 0.0)
    below = torch.where(above == 0, 0, below)

    candidates = (tiles * plan.tile.rows // plan.tile.keys - 1).clamp(min=0).double()
    active = (candidates > 0).double()
    dropped, mass, beyond = 0.0, 0.0, torch.zeros(len(LEVELS), dtype=torch.float64)
    for p in range(plan.octaves):
        here = octaves == p
        low_at, high_at = below[:, here], above[:, here]

        def between(curve, share, low_at=low_at, high_at=high_at, here=here):
            low, high = curve.gather(-1, low_at), curve.gather(-1, high_at)
            return ((low + weight[:, here] * (high - low)) * share).sum(-1)

        of_tiles, of_rows = (share[here] / share[here].sum().clamp(min=1) for share in (candidates, active))
        dropped += float(between(table.dropped[heads, p].double(), of_tiles).sum())
        lost = between(table.mass[heads, p], of_rows)  # [n]
        index = high_at[:, None].expand(-1, len(LEVELS), -1)
        within = (table.within[heads, p].double().gather(-1, index) * of_rows).sum(-1)  # [n, levels]
        mass, beyond = mass + float(lost.sum()), beyond + _beyond(table.tiles[heads, p], within, lost)
    return _reached(table, heads, dropped, mass, beyond, quantile)


def _beyond(tiles: torch.Tensor, within: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """float64 [levels]: at most so many query tiles' worth of rows drop more than each level, over all units.

    tiles, mass [...] and within [..., levels] by unit. Of a unit's rows at most those of the query tiles whose bound is
    above the level, and at most its dropped mass over the level (Markov's inequality).
    """
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    return torch.minimum((tiles[..., None] - within).double(), mass[..., None] / levels).flatten(0, -2).sum(0)


def _reached(table: Table, heads: slice, dropped: float, mass: float, beyond, quantile: float) -> Reached | None:
    candidates, tiles = int(table.candidates[heads].sum()), int(table.tiles[heads].sum())
    if not candidates:
        return None
    if dropped == 0:
        return Reached(0.0, 0.0, 0.0)
    enough = (beyond <= (1 - quantile * (1 - 1e-9)) * tiles).nonzero()
    bound = LEVELS[int(enough[0])] if len(enough) else 1.0  # no row can drop more than all its mass
    return Reached(dropped / candidates, mass / tiles, bound)
