"""What one attention call of a model runs, decided here for every integration, and the reason when no gate judges it.

    gated     the module's handler: its gate judges the query tiles that the call holds whole
    kept      our kernels without a gate: every tile is kept
    library   PyTorch's scaled_dot_product_attention, without a mask, where ours is not known to be faster
    fallback  dense.attention: exact as well, in chunks, for what neither of them knows

Nothing else is decided anywhere else: a caller carries out the step, and notes the reason.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol

import torch

from ..backends import fused
from ..devices import TILE_ROWS, tiles_at_once
from ..tiles import TileShape

SINKS = "attention sinks"
WIDER = "values are wider than keys"
MASK = "its mask is not plain causal or bidirectional with padding at the ends (custom, packed, chunked or with holes)"
GROUPS = "the tokens of an image see one another both ways"
WIDEST_GAIN = 128  # head dim of Q and K; measured on an H200 at 32k: 16/4 heads of 256, kernels/NOTES.md
INSTEAD = "exact scores instead of"
FEW = "so few queries of so many keys take less time with every tile kept"
FEW_SHARE = 0.33  # of the query tiles that a GPU works on at a time; on an H200 with 75 % skipped, kernels/NOTES.md
FEW_OF_KEYS, FEW_KEYS = 40, 1024  # with at least so many keys to a query, and in all
LONG, MANY_ROWS = 4096, 131_072  # the shortest prompt measured beside PyTorch's attention, and fewest rows of all heads
WIDEST_AHEAD = 192  # head dim of V; at 256 they are level
NO_THRESHOLDS = "no thresholds are attached: every tile is kept"


def window_reason(window: int) -> str:
    return f"sliding window of {window} tokens"


def softcap_reason(softcap: float) -> str:
    return f"scores are soft-capped at {softcap:g}"


class Route(Enum):
    GATED = "gated"
    KEPT = "kept"
    LIBRARY = "library"
    FALLBACK = "fallback"


class Step(NamedTuple):
    """What to run, and why no gate judges the call (None where one does, and where scores are those asked for).

    `expected`: the reason lies in the call (decoding, a short chunk) or in what was asked for (no thresholds), not in
    something that bsfa cannot do.
    """

    route: Route
    reason: str | None
    expected: bool


class Call(NamedTuple):
    """The facts of a call: shapes and what its arguments are, never their contents."""

    q: torch.Tensor  # [B, Hq, Tq, D]
    k: torch.Tensor  # [B, Hkv, Tk, D]
    v: torch.Tensor  # [B, Hkv, Tk, Dv]; a fused kernel takes Dv <= D
    causal: bool
    spans: bool  # sequences stand at places of their own
    masked: bool  # an ordinary mask says who sees whom
    window: int | None
    softcap: float | None
    sinks: bool
    groups: bool = False  # of rows that see one another besides


class Gated(Protocol):
    """What the planner asks of a handler. A handler without these attributes serves every plain prefill itself."""

    least_rows: int  # its gate was calibrated on the vote of so many rows: with fewer queries every tile is kept
    fused_tile: TileShape | None  # on a GPU only a fused kernel of this tile serves it; None: it serves itself
    knows_scoring: bool  # it takes window=, softcap=, sinks= and groups= where a call has them
    scores: str  # it computes, where a kernel has them; "exact" where it does not say


def plan(call: Call, handler: Gated | None) -> Step:
    """The step for `call` in a module with `handler`."""
    rows, scoring = call.q.shape[2], _scoring(call)
    if call.v.shape[-1] > call.k.shape[-1]:
        return Step(Route.FALLBACK, WIDER, expected=False)
    if call.masked and rows > 1:
        return Step(Route.FALLBACK, MASK, expected=False)
    if handler is None:
        reason, expected = NO_THRESHOLDS, True
    elif rows < (least := getattr(handler, "least_rows", 2)):
        reason, expected = f"calls of fewer than {least} queries keep every tile", True
    elif scoring is not None and not getattr(handler, "knows_scoring", False):
        reason, expected = scoring, False
    else:
        tile = getattr(handler, "fused_tile", None)
        reason, expected = no_kernel(call.q, call.v, tile), False
        if reason is None and scoring is None:
            reason = _no_gain(call, tile)
        if reason is None and _few(call, tile):
            reason, expected = FEW, True
        if reason is None:
            return Step(Route.GATED, _other_scores(call, tile, getattr(handler, "scores", "exact")), True)
    if not (call.spans or call.masked or scoring) and (not call.causal or rows == call.k.shape[2]):
        return Step(Route.KEPT if _faster_than_library(call) else Route.LIBRARY, reason, expected)
    if not call.masked and call.q.is_cuda and no_kernel(call.q, call.v, TileShape()) is None:
        return Step(Route.KEPT, reason, expected)
    return Step(Route.FALLBACK, reason, expected)


def _scoring(call: Call) -> str | None:
    """What PyTorch's attention does not know of how scores are made and who sees whom, in words."""
    if call.softcap is not None:
        return softcap_reason(call.softcap)
    if call.sinks:
        return SINKS
    if call.groups:
        return GROUPS
    return None if call.window is None else window_reason(call.window)


def no_kernel(q: torch.Tensor, v: torch.Tensor, tile: TileShape | None, scores: str = "exact") -> str | None:
    """Why no fused kernel of this tile can serve a call on its GPU; None where one can, and where none is needed."""
    if tile is None or not q.is_cuda:
        return None
    backend, reason = fused(q.device, q.dtype, q.shape[-1], v.shape[-1], tile.rows, tile.keys, scores)
    return None if backend else f"no fused kernel: {reason}"


def _other_scores(call: Call, tile: TileShape | None, scores: str) -> str | None:
    """Why a gated call runs exact scores although others were asked for."""
    reason = None if scores == "exact" else no_kernel(call.q, call.v, tile, scores)
    return None if reason is None else f"{INSTEAD} {scores} ones: {reason}"


def _no_gain(call: Call, tile: TileShape | None) -> str | None:
    """Why a gate would cost time: with wide heads the portable kernel, at any skip rate, is behind what PyTorch has."""
    if tile is None or not call.q.is_cuda or call.q.shape[-1] <= WIDEST_GAIN:
        return None
    q, v = call.q, call.v
    backend, _ = fused(q.device, q.dtype, q.shape[-1], v.shape[-1], tile.rows, tile.keys)
    if backend == "hopper":
        return None
    return f"head dim {call.q.shape[-1]}: PyTorch's dense attention is faster than the Triton kernel with any gate"


def _faster_than_library(call: Call) -> bool:
    """Whether our kernel takes less time for a plain call: the Hopper kernel without a gate takes 78 to 94 % of cuDNN's
    wherever both were measured, from LONG tokens on (profiles/results). It has no backward pass.
    """
    q, k, v = call.q, call.k, call.v
    batch, heads, rows, _ = q.shape
    if not q.is_cuda or min(rows, k.shape[2]) < LONG or batch * heads * rows < MANY_ROWS or v.shape[-1] > WIDEST_AHEAD:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return False
    tile = TileShape()
    return fused(q.device, q.dtype, q.shape[-1], v.shape[-1], tile.rows, tile.keys)[0] == "hopper"


def few_queries(rows: int, keys: int, heads: int, device: torch.device) -> bool:
    """Whether a gate would cost time: a call of `rows` queries in each of `heads` heads, all sequences' together, and
    `keys` keys. A gate judges a query tile's keys one after the other and cannot share them out as split_kv.py does.
    """
    if device.type != "cuda" or keys < max(FEW_KEYS, FEW_OF_KEYS * rows):
        return False
    return rows * heads < FEW_SHARE * TILE_ROWS * tiles_at_once(device)


def _few(call: Call, tile: TileShape | None) -> bool:
    (batch, heads, rows, head_dim), keys = call.q.shape, call.k.shape[2]
    if tile is None or not call.q.is_cuda or call.groups or head_dim > WIDEST_GAIN:
        return False
    if call.window is not None:
        keys = min(keys, call.window + rows)
    return few_queries(rows, keys, batch * heads, call.q.device)
