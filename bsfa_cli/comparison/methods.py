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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from bsfa_kernels import Attention, BlockLists, Gate, TileShape, block_sparse_attention
from bsfa_kernels.selection import METHODS, PBS

from ..errors import UsageError
from ..options import numbers
from .calibration import Calibration, Exported

ON_TOP = ("flexprefill", "xattention", "pooled_top_p", "pbs")
GATE = "+bsfa"
INT8 = "bsfa_int8"
CALIBRATED = ("bsfa", INT8, "bsfa_top_k", *(name + GATE for name in ON_TOP))  # those that need thresholds
ALL = "all"
# Factors lambda = factor / length of skip-softmax, from sparse to dense.
FACTORS = (32000.0, 16000.0, 8000.0, 4000.0, 2000.0, 500.0)
TOP_K = (8, 16, 32, 64, 96, 128)


# What the knobs of gates can be; selections check their own.
LIMITS = {
    "bsfa": (lambda rate: 0 < rate < 1, "skip rates between 0 and 1"),
    INT8: (lambda rate: 0 < rate < 1, "skip rates between 0 and 1"),
    "bsfa_top_k": (lambda k: isinstance(k, int) and 1 <= k <= 65536, "whole numbers of tiles from 1 on"),
    "blasst": (lambda factor: 0 < factor < math.inf, "positive factors"),
}


@dataclass(frozen=True)
class Choice:
    """What a method decided on: keys and values in their order, a gate, and further arguments of the kernel."""

    k: torch.Tensor
    v: torch.Tensor
    gate: Gate = Gate()  # noqa: B008 - frozen
    options: dict = field(default_factory=dict)


def attend(q: torch.Tensor, choice: Choice, **options) -> Attention:
    """The kernel on a choice, with counts; `options` as for `block_sparse_attention`.

    Kernels for tiles count them at no cost. Without, "auto" may give a call that has no gate to split_kv, and methods
    would be compared across kernels.
    """
    return block_sparse_attention(q, choice.k, choice.v, choice.gate, return_counts=True, **choice.options, **options)


@dataclass(frozen=True)
class Settings:
    """What `--setting` asks for: other values of a method's knob, and values of its other fields, by method."""

    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    fields: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Settings:
        """Of "xattention=0.9,0.95" and "xattention.stride=16". Raises UsageError for anything else."""
        values, kinds = {}, {kind.name: kind for kind in (*METHODS.values(), PBS)}
        own: dict[str, dict[str, float]] = {}
        for text in texts:
            left, equals, right = text.partition("=")
            method, dot, name = left.strip().partition(".")
            given = numbers(right, float, f"--setting {left.strip()} takes numbers")
            given = tuple(int(value) if value.is_integer() else value for value in given)
            if method not in everything() or method == Dense.name:
                known = ", ".join(name for name in everything() if name != Dense.name)
                raise UsageError(f"--setting: there is no method {method!r} with a setting; there is {known}")
            fits = LIMITS.get(method.rpartition("+")[2])
            if fits and not all(fits[0](value) for value in given):
                raise UsageError(f"--setting {text}: {method} takes {fits[1]}")
            if not dot:
                values[method] = (*values.get(method, ()), *given)
                continue
            known = [each.name for each in fields(kinds[method])] if method in kinds else []
            if name not in known or len(given) != 1:
                fits = f"one of {', '.join(known)}, with one value" if known else "none but its knob"
                raise UsageError(f"--setting {text}: {method} has {fits}")
            own.setdefault(method, {})[name] = given[0]
        for method, kind in kinds.items():
            fixed = own.get(method, {})
            if kind.knob in fixed:
                values[method] = (*values.get(method, ()), fixed.pop(kind.knob))
            for value in values.get(method, ()) or ([None] if fixed else []):
                try:
                    kind(**fixed, **({} if value is None else {kind.knob: value}))
                except ValueError as error:
                    raise UsageError(f"--setting: {error}") from error
        return cls(values, {method: found for method, found in own.items() if found})

    def check(self, wanted: Sequence[str]) -> None:
        """Raise UsageError for a setting of a method that is not among `wanted`."""
        for name in (*self.values, *self.fields):
            if name not in wanted and name + GATE not in wanted:
                raise UsageError(f"--setting is given for {name}, which --methods leaves out")


DEFAULTS = Settings()


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

    def __init__(self, kind, fixed: Mapping[str, float] | None = None):
        self.kind, self.fixed, self.name, self.knob, self.sweep = kind, fixed or {}, kind.name, kind.knob, kind.sweep
        if self.fixed:
            self.name += f"({', '.join(f'{name} {value:g}' for name, value in self.fixed.items())})"
        else:
            self.published = {each.name: each.default for each in fields(kind)}[kind.knob]

    def defined(self, causal):
        return causal in self.kind.directions

    def choose(self, layer, q, k, v, *, scale, causal, tile, setting):
        mask = self.kind(**self.fixed, **{self.knob: setting}).select(q, k, scale=scale, causal=causal, tile=tile)
        return Choice(k, v, options={"blocks": BlockLists.from_mask(mask)})


class Permuted(Mask):
    """PBS-Attn: keys permuted inside segments."""

    def choose(self, layer, q, k, v, *, scale, causal, tile, setting):
        arranged = self.kind(**self.fixed, **{self.knob: setting}).arrange(
            q, k, v, scale=scale, causal=causal, tile=tile
        )
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
    """Thresholds that were calibrated on other data: bsfa's recipe, with exact or int8 scores, or the paper's top-k."""

    selects = False

    def __init__(
        self, name: str, recipe: str, knob: str, sweep, calibration: Calibration | Exported, scores: str = "exact"
    ):
        self.options = {} if scores == "exact" else {"scores": scores}
        self.name, self.recipe, self.knob, self.sweep, self.calibration = name, recipe, knob, sweep, calibration

    def choose(self, layer, q, k, v, *, scale, causal, tile, setting):
        tiles = -(-q.shape[2] // tile.rows)
        gate = self.calibration.gate(layer, self.recipe, setting, tiles, q.device)
        return Choice(k, v, gate, options=self.options)


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


def available(calibration: Calibration | Exported | None, settings: Settings = DEFAULTS) -> dict[str, Method]:
    """{name: method}, dense first. Without a calibration, those that need thresholds are missing."""
    methods: dict[str, Method] = {Dense.name: Dense()}
    for kind in METHODS.values():
        methods[kind.name] = Mask(kind, settings.fields.get(kind.name))
    methods[PBS.name] = Permuted(PBS, settings.fields.get(PBS.name))
    methods[Blasst.name] = Blasst()
    if calibration is not None:
        bsfa = Calibrated("bsfa", "target-skip", "skip", calibration.skips, calibration)
        methods[bsfa.name] = bsfa
        methods[INT8] = Calibrated(INT8, "target-skip", "skip", calibration.skips, calibration, scores="int8")
        methods["bsfa_top_k"] = Calibrated("bsfa_top_k", "top-k", "k", calibration.top_k, calibration)
        methods |= {name + GATE: OnTop(methods[name], bsfa) for name in ON_TOP}
    for name, values in settings.values.items():
        if name in methods:
            rising = len(methods[name].sweep) < 2 or methods[name].sweep[0] < methods[name].sweep[-1]
            methods[name].sweep = tuple(sorted(set(values), reverse=not rising))  # from sparse to dense
    return methods


def everything() -> tuple[str, ...]:
    """The names of all methods, with those that need thresholds."""
    return (*available(None), *CALIBRATED)


def chosen(
    names: str, calibration: Calibration | Exported | None, causal: bool, settings: Settings = DEFAULTS
) -> tuple[list[Method], dict[str, str]]:
    """(methods to run, {method: why it is left out}) for "all" or names separated by commas; dense is always there.

    Raises UsageError for a name that is none, and for a method that was asked for by name and cannot take part.
    """
    known, wanted = available(calibration, settings), named(names)
    settings.check(wanted)
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
    wanted = everything() if names == ALL else ["dense", *(name.strip() for name in names.split(","))]
    for name in wanted:
        if name not in everything():
            raise UsageError(f"--methods: there is no method {name!r}; there is {ALL} or {', '.join(everything())}")
    return list(dict.fromkeys(wanted))
