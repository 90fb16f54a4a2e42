"""Every method that is compared, behind one interface: choose tiles, a gate or an order of keys, then attend.

    method = available(calibration=None)["xattention"]
    choice = method.choose("layer", q, k, v, setting=0.9, **options)   # options: scale, causal, tile; timed: selection
    attend(q, choice, **options)                                       # timed: attention

All run through the same kernel, `block_sparse_attention`, and every layer and head is treated alike. A method has one
knob and at least five settings of it, from sparse to dense; `published` is the one its authors give, if any.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields

import torch
from bsfa_kernels import Attention, BlockLists, Gate, TileShape, block_sparse_attention
from bsfa_kernels.selection import METHODS, PBS

from ..errors import UsageError
from .calibration import Calibration, Exported

ON_TOP = ("flexprefill", "xattention", "pooled_top_p", "pbs")
GATE = "+bsfa"
CALIBRATED = ("bsfa", "bsfa_top_k", *(name + GATE for name in ON_TOP))  # those that need thresholds
ALL = "all"
# Factors lambda = factor / length of skip-softmax, from sparse to dense.
FACTORS = (32000.0, 16000.0, 8000.0, 4000.0, 2000.0, 500.0)
TOP_K = (8, 16, 32, 64, 96, 128)


@dataclass(frozen=True)
class Choice:
    """What a method decided on: keys and values in their order, a gate, and further arguments of the kernel."""

    k: torch.Tensor
    v: torch.Tensor
    gate: Gate = Gate()  # noqa: B008 - frozen
    options: dict = field(default_factory=dict)


def attend(q: torch.Tensor, choice: Choice, **options) -> Attention:
    """The kernel on a choice; `options` as for `block_sparse_attention`."""
    return block_sparse_attention(q, choice.k, choice.v, choice.gate, **choice.options, **options)


class Method(ABC):
    """`name`, `knob`, `sweep` (settings from sparse to dense), `published` (None where there is no such setting)."""

    name: str
    knob: str
    sweep: tuple[float, ...]
    published: float | None = None
    selects = True  # whether choosing costs time on the device

    def defined(self, causal: bool) -> bool:
        return True

    @abstractmethod
    def choose(self, layer: str, q, k, v, *, scale: float, causal: bool, tile: TileShape, setting) -> Choice:
        """q [B, Hq, T, D], k and v [B, Hkv, T, D]. `layer` names the attention module for calibrated thresholds.

        Raises ValueError for tensors or a setting the method cannot be used with, UsageError for a skip rate that its
        thresholds cannot reach.
        """


class Dense(Method):
    """Every tile, through the same kernel."""

    name, knob, sweep, selects = "dense", "", (1.0,), False

    def choose(self, layer, q, k, v, *, scale, causal, tile, setting):
        return Choice(k, v)


class Mask(Method):
    """A selection method whose choice is a block mask."""

    def __init__(self, kind):
        self.kind, self.name, self.knob, self.sweep = kind, kind.name, kind.knob, kind.sweep
        self.published = {each.name: each.default for each in fields(kind)}[kind.knob]

    def defined(self, causal):
        return causal in self.kind.directions

    def choose(self, layer, q, k, v, *, scale, causal, tile, setting):
        mask = self.kind(**{self.knob: setting}).select(q, k, scale=scale, causal=causal, tile=tile)
        return Choice(k, v, options={"blocks": BlockLists.from_mask(mask)})


class Permuted(Mask):
    """PBS-Attn: keys permuted inside segments."""

    def choose(self, layer, q, k, v, *, scale, causal, tile, setting):
        arranged = self.kind(**{self.knob: setting}).arrange(q, k, v, scale=scale, causal=causal, tile=tile)
        return Choice(arranged.k, arranged.v, options=arranged.options)


class Blasst(Method):
    """Skip-softmax (arXiv 2512.12087): a gap gate, one lambda = factor / length for the whole model."""

    name, knob, sweep, selects = "blasst", "factor", FACTORS, False

    def choose(self, layer, q, k, v, *, scale, causal, tile, setting):
        if not setting > 0:
            raise ValueError(f"blasst: factor must be positive, got {setting}")
        gap = math.log(setting / k.shape[2])
        return Choice(k, v, Gate(gap=torch.full((q.shape[1], 1), gap, device=q.device)))


class Calibrated(Method):
    """Thresholds that were calibrated on other data: bsfa's own recipe, or the BSFA paper's top-k."""

    selects = False

    def __init__(self, name: str, recipe: str, knob: str, sweep, calibration: Calibration | Exported):
        self.name, self.recipe, self.knob, self.sweep, self.calibration = name, recipe, knob, sweep, calibration

    def choose(self, layer, q, k, v, *, scale, causal, tile, setting):
        tiles = -(-q.shape[2] // tile.rows)
        return Choice(k, v, self.calibration.gate(layer, self.recipe, setting, tiles, q.device))


class OnTop(Method):
    """bsfa's gate over the tiles that a selection method lists at its densest setting; the knob is the gate's."""

    def __init__(self, base: Method, gate: Calibrated):
        self.base, self.gate = base, gate
        self.name, self.knob, self.sweep = base.name + GATE, gate.knob, gate.sweep

    def defined(self, causal):
        return self.base.defined(causal)

    def choose(self, layer, q, k, v, *, scale, causal, tile, setting):
        same = dict(scale=scale, causal=causal, tile=tile)
        listed = self.base.choose(layer, q, k, v, setting=self.base.sweep[-1], **same)
        gate = self.gate.choose(layer, q, k, v, setting=setting, **same).gate
        return Choice(listed.k, listed.v, gate, listed.options)


def available(calibration: Calibration | Exported | None) -> dict[str, Method]:
    """{name: method}, dense first. Without a calibration, those that need thresholds are missing."""
    methods: list[Method] = [Dense(), *map(Mask, METHODS.values()), Permuted(PBS), Blasst()]
    if calibration is not None:
        bsfa = Calibrated("bsfa", "target-skip", "skip", calibration.skips, calibration)
        methods += [bsfa, Calibrated("bsfa_top_k", "top-k", "k", calibration.top_k, calibration)]
        selections = {method.name: method for method in methods}
        methods += [OnTop(selections[name], bsfa) for name in ON_TOP]
    return {method.name: method for method in methods}


def chosen(names: str, calibration: Calibration | Exported | None, causal: bool) -> tuple[list[Method], dict[str, str]]:
    """(methods to run, {method: why it is left out}) for "all" or names separated by commas; dense is always there.

    Raises UsageError for a name that is none, and for a method that was asked for by name and cannot take part.
    """
    known, wanted = available(calibration), named(names)
    methods, left_out = [], {}
    for name in wanted:
        if name not in known:
            left_out[name] = "no calibration for its thresholds"
        elif not known[name].defined(causal):
            left_out[name] = f"not defined for {'causal' if causal else 'non-causal'} attention"
        elif not known[name].sweep:
            left_out[name] = f"{calibration.source} holds no {known[name].knob} for it"
        else:
            methods.append(known[name])
    if names != ALL:
        for name, reason in left_out.items():
            raise UsageError(f"--methods {name}: {reason}")
    return methods, left_out


def named(names: str) -> list[str]:
    """The methods that `names` stands for, dense first. Raises UsageError for a name that is none."""
    everything = list(dict.fromkeys([*available(None), *CALIBRATED]))
    wanted = everything if names == ALL else ["dense", *(name.strip() for name in names.split(","))]
    for name in wanted:
        if name not in everything:
            raise UsageError(f"--methods: there is no method {name!r}; there is {ALL} or {', '.join(everything)}")
    return list(dict.fromkeys(wanted))
