"""bsfa's thresholds for a comparison: fitted on other data than they are judged on, read at any skip rate or k.

    calibration = Calibration.on_tensors(layers, tile, ranks, source)    # or Calibration.of_run(Run.open("run/"))
    calibration = Exported(Thresholds.read("thresholds.safetensors"), "thresholds.safetensors")
    calibration.gate("model.layers.0.self_attn", "target-skip", 0.5, query_tiles=512, device="cuda")

Both have `source`, `skips` and `top_k` (the arguments of the two recipes to sweep, sparse first) and `gate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import torch
from bsfa_kernels import Gate, TileShape
from bsfa_kernels.thresholds import Thresholds, ThresholdsError, interpolate

from ..calibration import fit
from ..calibration.collector import Collector
from ..calibration.curves import ModuleCurves, Plan
from ..errors import InputError

GATES = {"target-skip": "gap", "top-k": "absolute"}
SHARED = ("mass-skip", "kl-skip", "target-skip")  # an artifact's recipes for a skip rate, the last one first
SKIPS, SWEEP = (0.95, 0.9, 0.8, 0.65, 0.5, 0.3, 0.2, 0.1, 0.05), 6  # the sparsest SWEEP that can be reached


class Calibration:
    """Curves of every attention module, by name, and the thresholds of any operating point read from them."""

    def __init__(self, plan: Plan, curves: Mapping[str, Mapping[str, torch.Tensor]], source: str):
        self.plan, self.curves, self.source = plan, curves, source
        self._table = fit.Table.of(curves, "gap")
        self._thresholds, self._gates = cache(self._fitted), cache(self._gate)

    @classmethod
    def on_tensors(cls, layers: Iterable, tile: TileShape, ranks: tuple[int, ...], source: str) -> Calibration:
        """From tensors.Layer, one at a time; `ranks` are the k that top-k can take. Raises InputError for no layer."""
        plan, curves = None, {}
        for layer in layers:
            plan = plan or Plan(tile, layer.q.shape[2], ranks)
            module = ModuleCurves(plan, layer.q.shape[1], layer.q.device)
            Collector(module)(layer.q, layer.k, layer.v, scale=layer.scale, causal=layer.causal, spans=None)
            curves[layer.name] = {name: tensor.cpu() for name, tensor in module.tensors.items()}
        if plan is None:
            raise InputError(f"{source} holds no layer to calibrate on")
        return cls(plan, curves, source)

    @property
    def skips(self) -> tuple[float, ...]:
        """The sparsest of SKIPS; in place of those that no threshold reaches, what the highest one does reach."""
        return tuple(sorted({min(skip, self._table.reach) for skip in SKIPS}, reverse=True)[:SWEEP])

    @property
    def top_k(self) -> tuple[int, ...]:
        """The values of k that were collected, sparse first."""
        return self.plan.ranks

    @classmethod
    def of_run(cls, run) -> Calibration:
        """From the fitted samples of a `bsfa calibrate` run (calibration.store.Run). Raises InputError as `load`."""
        _, curves = run.load("fit")
        return cls(run.plan, curves, f"the run {run.path.name}")

    def gate(self, layer: str, recipe: str, argument: float, query_tiles: int, device) -> Gate:
        """The same Gate for the same arguments, as a server would keep it.

        Raises UsageError for a point that cannot be reached, InputError for a layer that was not calibrated.
        """
        return self._gates(layer, recipe, argument, query_tiles, torch.device(device))

    def _gate(self, layer, recipe, argument, query_tiles, device) -> Gate:
        if layer not in self._table.modules:
            raise InputError(f"{self.source} holds no thresholds for {layer}")
        values = self._thresholds(recipe, argument)[self._table.modules[layer]]
        at = interpolate(values, self.plan.knot_tiles, torch.arange(query_tiles))
        return Gate(**{GATES[recipe]: at.to(device)})

    def _fitted(self, recipe: str, argument: float) -> torch.Tensor:
        """float64 [heads of all modules, knots]."""
        if recipe == "top-k":
            return fit.top_k(self.curves, self.plan, int(argument))
        return fit.at_knots(self._table, self.plan, fit.target_skip(self._table, argument))


class Exported:
    """The operating points of a thresholds artifact: what a server would load."""

    def __init__(self, thresholds: Thresholds, source: str):
        self.thresholds, self.source = thresholds, source
        ranked = sorted(
            thresholds.points, key=lambda point: SHARED.index(point.recipe) if point.recipe in SHARED else -1
        )
        self.points = {
            ("target-skip" if point.recipe in SHARED else point.recipe, point.argument): point.name for point in ranked
        }
        self.skips = self._arguments("target-skip", sparse_first=-1)
        self.top_k = self._arguments("top-k", sparse_first=1)
        self._gates = cache(self._gate)

    def gate(self, layer: str, recipe: str, argument: float, query_tiles: int, device) -> Gate:
        """The same Gate for the same arguments. Raises InputError for a layer or point that the artifact lacks."""
        return self._gates(layer, recipe, argument, query_tiles, torch.device(device))

    def _gate(self, layer, recipe, argument, query_tiles, device) -> Gate:
        try:
            return self.thresholds.gate(layer, self.points[recipe, argument], query_tiles, device)
        except (KeyError, ThresholdsError) as error:
            raise InputError(f"{self.source}: {error}") from error

    def _arguments(self, recipe: str, sparse_first: int) -> tuple[float, ...]:
        found = [argument for name, argument in self.points if name == recipe]
        return tuple(sorted(found, key=lambda argument: sparse_first * argument))
