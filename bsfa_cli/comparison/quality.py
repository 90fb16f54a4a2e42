"""What a sparse output has lost against exact attention on the same tensors, and what it computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from bsfa_kernels import Attention, Gate, TileShape, explain
from bsfa_kernels.tiles import tile_counts

from ..metrics.distance import relative, squares
from ..verification.layers import DroppedMass
from .methods import Choice, attend


@dataclass
class Quality:
    """Sums over layers for one setting of one method. Tiles are counted over all heads; masses by row."""

    everything: int = 0  # visible tiles
    least: int = 0  # those that no setting can drop
    visited: int = 0  # scored: QK^T
    kept: int = 0  # weighed as well: exp and PV
    error: float = 0.0
    norm: float = 0.0
    masses: list[DroppedMass] = field(default_factory=list)
    needle: list[torch.Tensor] = field(default_factory=list)  # kept mass of the rows that look for a needle
    finite: bool = True
    backend: str | None = None
    layers: list[dict] = field(default_factory=list)

    def measure(self, layer, choice: Choice, tile: TileShape, exact: Attention | None = None) -> torch.Tensor:
        """Attend with a method's choice on `layer` (tensors.Layer), add what is lost; returns the output.

        `exact`: attention with every tile kept, with its lse, where the caller has it.
        """
        options = dict(scale=layer.scale, causal=layer.causal, tile=tile)
        result = attend(layer.q, choice, return_lse=True, **options)
        self.backend, _ = explain(
            layer.q, choice.k, choice.v, choice.gate, return_counts=True, **choice.options, **options
        )
        if exact is None:
            exact = attend(layer.q, Choice(layer.k, layer.v), return_lse=True, **options)
        whole = exact
        if choice.options.get("scores", "exact") != "exact":  # mass is what a gate drops, of the scores that it sees
            whole = attend(layer.q, replace(choice, gate=Gate()), return_lse=True, **options)
        self.add(layer, result, exact._replace(lse=whole.lse), tile, choice.options.get("keep_sink", True))
        return result.out

    def add(self, layer, result: Attention, exact: Attention, tile: TileShape, keep_sink: bool) -> None:
        """`result` has lse and counts, `exact` its lse; both of `layer`."""
        heads, length = layer.q.shape[1:3]
        everything, forced = (heads * n for n in tile_counts(length, layer.causal, keep_sink, tile))
        candidates, kept = (int(x.sum(dtype=torch.int64)) for x in (result.candidates, result.kept))
        lost = -torch.expm1(result.lse - exact.lse)
        self.finite = self.finite and bool(result.out.isfinite().all()) and bool(lost.isfinite().all())
        lost = lost.nan_to_num(1.0).clamp(0, 1)
        mass = DroppedMass(heads, lost.device)
        mass.add(lost[0])
        error, norm = squares(result.out, exact.out)
        if layer.planted is not None:
            self.needle.append(1 - lost[0, :, layer.planted.question :])
        self.everything, self.least = self.everything + everything, self.least + forced
        self.visited, self.kept = self.visited + forced + candidates, self.kept + forced + kept
        self.error, self.norm = self.error + error, self.norm + norm
        self.masses.append(mass)
        self.layers.append({
            "name": layer.name,
            "density": (forced + kept) / everything,
            "error": relative(error, norm),
            "recall": _recall(DroppedMass.overall([mass])),
        })  # fmt: skip

    def summary(self) -> dict:
        """JSON. density: tiles weighed over visible tiles; visited: tiles scored; flop_density: (visited + kept) / 2;
        recall of softmax mass by row (mean, the 1 % quantile, worst); error: relative L2; needle: recall of the rows
        that look for the needle (mean, worst), None without one; note: settings that select nothing or everything.
        """
        note = None
        if self.kept == self.everything:
            note = "selects everything"
        elif self.kept == self.least:
            note = "selects nothing beyond what is forced"
        needle = None
        if self.needle:
            rows = torch.cat([x.flatten() for x in self.needle]).double()
            needle = {"mean": float(rows.mean()), "worst": float(rows.min())}
        return {
            "density": self.kept / self.everything,
            "visited": self.visited / self.everything,
            "flop_density": (self.visited + self.kept) / (2 * self.everything),
            "recall": _recall(DroppedMass.overall(self.masses)),
            "error": relative(self.error, self.norm),
            "needle": needle,
            "finite": self.finite,
            "backend": self.backend,
            "note": note,
            "layers": self.layers,
        }


def _recall(dropped: dict) -> dict:
    return {"mean": 1 - dropped["mean"], "p1": 1 - dropped["p99"], "worst": 1 - dropped["worst"]}
