"""One number for a whole model, as other engines take it: lambda = a * exp(b * target_sparsity) / length.

    curve = fit_curve(table, rate, lengths)
    config = sparse_attention_config("trtllm", curve)

Their kernels (skip-softmax, arXiv 2512.12087) drop a tile where no row's gap to its running maximum reaches ln lambda,
the same everywhere; `length` is that of the keys of the call. a and b are fitted to the curves of a calibration run,
exactly at the rate that was asked for. Rates are shares of the tiles of all calibrated modules that a gate may drop, by
bsfa's order of tiles (the diagonal first); their kernels go from left to right and drop fewer at the same lambda.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import OutOfReach, UsageError
from . import fit

FORMULA = "a * exp(b * target_sparsity)"
RATES = tuple(i / 20 for i in range(1, 20))
MOST_DENSE = 1 / 4  # of the modules may be proposed to be kept dense
GAIN = 0.05  # of the dropped mass that a module kept dense must save


@dataclass(frozen=True)
class Curve:
    """What the engines compute lambda from, and what it was fitted to."""

    a: float
    b: float
    target: float  # the rate at which it is exact
    length: int  # of the samples, in tokens: what lambda times `length` was taken from
    ignore: tuple[str, ...]  # modules that stay dense
    rates: tuple[tuple[float, float], ...]  # (rate, rate reached at its lambda) over the range of the fit

    def gap(self, rate: float, length: int | None = None) -> float:
        """ln lambda for a call of `length` keys."""
        return math.log(self.a) + self.b * rate - math.log(length or self.length)


@dataclass(frozen=True)
class Heads:
    """What thresholds do to each of N query heads."""

    skip: torch.Tensor  # float64 [N], of the head's candidate tiles
    mass: torch.Tensor  # float64 [N], softmax mass dropped, mean over rows
    total_skip: float
    total_mass: float


def fit_curve(table: fit.Table, rate: float, lengths: Sequence[int]) -> Curve:
    """The curve through `rate`, a least-squares line for ln(lambda * length) over the rates that the table reaches.

    Raises OutOfReach where the rate is not reached below lambda = 1, from which on the engines skip nothing.
    """
    length = round(math.exp(sum(n * n * math.log(n) for n in lengths) / sum(n * n for n in lengths)))
    active, ignore = _dense_modules(table, rate)
    totals = _totals(table, active)
    points = [(r, gap) for r in RATES if (gap := _gap_for(table, totals, r)) is not None]
    exact = _gap_for(table, totals, rate)
    if exact is None or len(points) < 2:
        raise OutOfReach(
            f"a skip rate of {rate:g} cannot be reached with one lambda below 1: the curves give at most "
            f"{float(totals[-1]) / max(1, int(table.candidates.sum())):.4f}; ask for less"
        )
    across = [(r - rate, gap - exact) for r, gap in points]
    b = sum(x * y for x, y in across) / sum(x * x for x, _ in across)
    if b <= 0:
        raise UsageError(f"the curves do not rise with the skip rate (b would be {b:g}); calibrate on more samples")
    a = math.exp(exact - b * rate) * length
    curve = Curve(a, b, rate, length, ignore, ())
    candidates = int(table.candidates.sum())
    reached = tuple((r, float(_at(table, totals, curve.gap(r))) / candidates) for r, _ in points)
    return Curve(a, b, rate, length, ignore, reached)


def sparse_attention_config(engine: str, curve: Curve, version: str | None) -> dict:
    """The value of `sparse_attention_config` in a checkpoint's config.json, for "modelopt", "trtllm" or "vllm-omni"."""
    coefficients = {"a": curve.a, "b": curve.b}
    group: dict = {"algorithm": "skip_softmax", "targets": ["Attention"]}
    if curve.ignore:
        group["ignore"] = list(curve.ignore)
    if engine == "vllm-omni":
        group["threshold_scale_factor"] = {"formula": FORMULA, "coefficients": coefficients}
    else:
        # Of prefill alone: decoding was not calibrated, and a number for both would ask for its coefficients.
        group["threshold_scale_factor"] = {"formula": FORMULA, "prefill": coefficients}
        group["target_sparsity"] = {"prefill": curve.target}
    return {"config_groups": {"group_0": group}, "producer": {"name": "bsfa", "version": version}}


def one_number(table: fit.Table, curve: Curve, rate: float) -> Heads:
    """What the curve's lambda for `rate` does on the table's samples, which it takes for `curve.length` long."""
    active = _active(table, curve.ignore)
    dropped, mass = (_at(table, x, curve.gap(rate)) * active for x in (table.dropped.sum(1), table.mass.sum(1)))
    return _heads(table, dropped, mass)


def by_head(table: fit.Table, fitted: fit.Table, rate: float) -> Heads:
    """What thresholds for every head do, fitted by `target_skip` to the same rate on `fitted`."""
    choice = fit.target_skip(fitted, rate)[..., None]
    dropped, mass = (x.gather(-1, choice)[..., 0].double().sum(1) for x in (table.dropped, table.mass))
    return _heads(table, dropped, mass)


def _heads(table: fit.Table, dropped: torch.Tensor, mass: torch.Tensor) -> Heads:
    candidates, tiles = table.candidates.sum(1), table.tiles.sum(1)
    return Heads(
        dropped / candidates.clamp(min=1), mass / tiles.clamp(min=1),
        float(dropped.sum() / candidates.sum().clamp(min=1)), float(mass.sum() / tiles.sum().clamp(min=1)),
    )  # fmt: skip


def _dense_modules(table: fit.Table, rate: float) -> tuple[torch.Tensor, tuple[str, ...]]:
    """(bool [N]: heads that may skip, the other modules): modules that, kept dense, save dropped mass at the same rate
    over all, one by one, as long as each saves GAIN of it.
    """
    paths = list(table.modules)
    dropped, mass = (  # [modules, entries]
        torch.stack([curve[heads].sum((0, 1)).double() for heads in table.modules.values()])
        for curve in (table.dropped, table.mass)
    )

    def lost(active: list[int]) -> float:
        gap = _gap_for(table, dropped[active].sum(0), rate)
        return math.inf if gap is None else float(_at(table, mass[active].sum(0), gap))

    active = list(range(len(paths)))
    least = lost(active)
    while math.isfinite(least) and len(active) > (1 - MOST_DENSE) * len(paths):
        tried = {index: lost([other for other in active if other != index]) for index in active}
        best = min(tried, key=tried.get)
        if tried[best] > (1 - GAIN) * least:
            break
        active.remove(best)
        least = tried[best]
    ignore = tuple(path for index, path in enumerate(paths) if index not in active)
    return _active(table, ignore), ignore


def _active(table: fit.Table, ignore: Sequence[str]) -> torch.Tensor:
    active = torch.ones(len(table.candidates), dtype=torch.bool)
    for path in ignore:
        active[table.modules[path]] = False
    return active


def _totals(table: fit.Table, active: torch.Tensor) -> torch.Tensor:
    """float64 [entries]: tiles that the active heads drop at each threshold of the grid."""
    return table.dropped[active].sum((0, 1)).double()


def _gap_for(table: fit.Table, totals: torch.Tensor, rate: float) -> float | None:
    """The threshold at which `rate` of all candidates is dropped, between those of the grid; None where none below 0
    does.
    """
    wanted = rate * int(table.candidates.sum())
    above = int(torch.searchsorted(totals, wanted))
    if above < 2 or above >= len(totals):  # below the lowest threshold of the grid nothing is known
        return None
    low, high = float(totals[above - 1]), float(totals[above])
    left, right = float(table.values[above - 1]), float(table.values[above])
    gap = left + (wanted - low) / max(high - low, 1e-12) * (right - left)
    return gap if gap < 0 else None


def _at(table: fit.Table, curve: torch.Tensor, gap: float) -> torch.Tensor:
    """float64: cumulative curves [..., entries] at a threshold, linear between those of the grid."""
    values = table.values
    above = int(torch.searchsorted(values, torch.tensor(gap, dtype=values.dtype)).clamp(0, len(values) - 1))
    high = curve[..., above].double()
    if above < 2:
        return torch.zeros_like(high) if above == 0 or gap < float(values[1]) else high
    left, right = float(values[above - 1]), float(values[above])
    weight = min(1.0, (gap - left) / (right - left))
    return curve[..., above - 1].double().lerp(high, weight)


def uncalibrated(modules: Mapping[str, object], layers: int) -> list[str]:
    """Paths of the layers of the model that the run holds no module of, in the pattern of those that it holds.

    Raises UsageError where their names do not differ by the number of a layer alone.
    """
    parts = [path.split(".") for path in modules]
    kinds = {tuple("*" if part.isdigit() else part for part in path) for path in parts}
    if len(kinds) > 1:
        raise UsageError(
            f"the run holds modules of {len(kinds)} kinds ({', '.join(sorted('.'.join(kind) for kind in kinds)[:2])}), "
            "and other engines take one number for a language model's layers"
        )
    if len(modules) >= layers:
        return []
    (kind,) = kinds
    if kind.count("*") != 1:
        raise UsageError(
            f"the run holds {len(modules)} of the model's {layers} layers, and their names do not tell what the others "
            "are called, which would have to be listed as dense; calibrate all layers"
        )
    place = kind.index("*")
    missing = set(range(layers)) - {int(path[place]) for path in parts}
    return [".".join([*kind[:place], str(layer), *kind[place + 1 :]]) for layer in sorted(missing)]
