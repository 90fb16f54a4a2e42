"""All methods at all their settings on the same tensors: quality against exact attention, and interleaved times.

Selection and attention are timed apart, on the device, in the same rounds as the dense baselines; what a method takes
is their sum. One layer is in memory at a time, and times are summed over layers.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import partial

import torch
from bsfa_kernels import TileShape

from ..errors import BsfaError
from ..timing import baselines
from ..timing.flash_attention import FA3, FA4
from ..timing.interleave import Begin, Contender, first_call, measure, unseen
from .methods import Choice, Method, attend
from .quality import Quality
from .tensors import Layer

# Dense kernels to compare with: those with grouped queries. `bsfa profile` times the others too.
GROUPED = ("cuDNN", "FlashAttention-2", FA3, FA4, "PyTorch's CPU flash attention")
SELECTION, ATTENTION = "selection", "attention"


@dataclass
class Entry:
    """One method at one setting; `reason` says why it could not run."""

    method: Method
    setting: float
    quality: Quality = field(default_factory=Quality)
    samples_ms: dict[str, list] = field(default_factory=lambda: {SELECTION: [], ATTENTION: []})  # one list per layer
    medians_ms: dict[str, float] = field(default_factory=lambda: {SELECTION: 0.0, ATTENTION: 0.0})
    reason: str | None = None

    @property
    def name(self) -> str:
        return f"{self.method.name} at {self.method.knob} {self.setting:g}" if self.method.knob else self.method.name


class Bench:
    """Measures layers one after the other and sums up; `seconds` bounds the timed part of each layer."""

    def __init__(self, methods: list[Method], tile: TileShape, device: torch.device, seconds: float, seed: int):
        self.entries = [Entry(method, setting) for method in methods for setting in method.sweep]
        self.tile, self.device, self.seconds, self.seed = tile, device, seconds, seed
        self.dense: dict[str, dict] = {}  # {baseline: {"ms_median", "samples_ms", "library"}} or {"reason"}

    def add(self, layer: Layer, begin: Begin = unseen) -> None:
        """Measure every entry on one layer."""
        exact = attend(
            layer.q, Choice(layer.k, layer.v), scale=layer.scale, causal=layer.causal, tile=self.tile, return_lse=True
        )
        contenders, step = self._dense(layer), begin(len(self.entries), "selections and losses")
        for entry in self.entries:
            if entry.reason is None:
                contenders += self._judge(entry, layer, exact)
            step()
        timings = measure(contenders, self.device, seconds=self.seconds, seed=self.seed, begin=begin)
        for name, timing in timings.items():
            if name in self.dense:
                found = self.dense[name]
                found["ms_median"] = found.get("ms_median", 0.0) + timing.median
                found.setdefault("samples_ms", []).append(timing.as_dict()["samples_ms"])
        for entry in self.entries:
            for part in (SELECTION, ATTENTION):
                timing = timings.get(f"{entry.name}: {part}")
                if timing is not None:
                    entry.medians_ms[part] += timing.median
                    entry.samples_ms[part].append(timing.as_dict()["samples_ms"])
        del contenders, exact
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _dense(self, layer: Layer) -> list[Contender]:
        found = []
        # The baselines scale by head_dim ** -0.5 only; scaled queries give the same scores.
        q = layer.q if layer.scale == layer.q.shape[-1] ** -0.5 else layer.q * (layer.scale * layer.q.shape[-1] ** 0.5)
        for name, call in baselines.dense(q, layer.k, layer.v, layer.causal, GROUPED).items():
            entry = self.dense.setdefault(name, {})
            _, reason = (None, call) if isinstance(call, str) else first_call(call, self.device)
            if reason:
                entry["reason"] = reason
            elif "reason" not in entry:
                if hasattr(call, "library"):
                    entry["library"] = call.library
                found.append(Contender(name, call))
        return found

    def _judge(self, entry: Entry, layer: Layer, exact) -> list[Contender]:
        """Add one layer to an entry's quality; returns what is to be timed."""
        options = dict(scale=layer.scale, causal=layer.causal, tile=self.tile)

        said = []

        def choose() -> Choice:
            try:
                return entry.method.choose(layer.name, layer.q, layer.k, layer.v, setting=entry.setting, **options)
            except (BsfaError, ValueError) as error:
                said.append(str(error).partition(";")[0])
                raise

        choice, entry.reason = first_call(choose, self.device)
        if said:
            entry.reason = said[0]
        if entry.reason is None:
            judge = partial(entry.quality.measure, layer, choice, self.tile, exact)
            _, entry.reason = first_call(judge, self.device)
        if entry.reason is not None:
            return []
        found = [Contender(f"{entry.name}: {ATTENTION}", lambda: attend(layer.q, choice, **options).out)]
        if entry.method.selects:
            found.append(Contender(f"{entry.name}: {SELECTION}", choose))
        return found

    def result(self) -> dict:
        """JSON: dense baselines, the fastest of them, and one row an entry (see profiles/README.md)."""
        timed = {name: found["ms_median"] for name, found in self.dense.items() if "reason" not in found}
        fastest = min(timed, key=timed.get, default=None)
        rows, unavailable = [], []
        for name, found in self.dense.items():
            if "reason" in found:
                unavailable.append({"name": name, "reason": found["reason"]})
        for entry in self.entries:
            if entry.reason is not None:
                unavailable.append({"name": entry.name, "reason": entry.reason})
                continue
            selection, attention = entry.medians_ms[SELECTION], entry.medians_ms[ATTENTION]
            rows.append(
                {
                    "method": entry.method.name,
                    "knob": entry.method.knob,
                    "setting": entry.setting,
                    "published": entry.setting == entry.method.published,
                    "selection_ms": selection,
                    "attention_ms": attention,
                    "total_ms": selection + attention,
                    "speedup": timed[fastest] / (selection + attention) if fastest else None,
                    "samples_ms": entry.samples_ms,
                }
                | entry.quality.summary()
            )
        return {
            "dense": [{"name": name, **found} for name, found in self.dense.items() if "reason" not in found],
            "fastest_dense": fastest,
            "fastest_dense_ms": timed.get(fastest),
            "backend": next((row["backend"] for row in rows), None),
            "unavailable": unavailable,
            "rows": rows,
        }
