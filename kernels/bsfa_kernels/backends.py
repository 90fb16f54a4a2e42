"""Which backend serves a call, and the reason, in words, when a faster one cannot.

Fastest first: split_kv (Triton, few queries on many keys), hopper (Gluon, sm_90), triton (any NVIDIA GPU, and Triton's
interpreter), torch (blocked matmuls, any device), reference (the specification). A backend is a module with
`unsupported(request) -> reason | None` and `attention(request) -> (out, lse, kept, candidates)` or
`tile_statistics(request, lse)`, see api.TileStatistics; its `SCORES` are the request's `scores` that it knows, only
"exact" where it has none; `reads_pages(request)` says whether it takes K and V out of their pages itself, which none
does that lacks it; one with `suits(request)` is there for such calls alone, and takes others where it is demanded.
"""

from __future__ import annotations

import importlib
from functools import cache
from operator import index
from types import ModuleType

import torch

from .gates import Gate
from .request import Request
from .tiles import TileShape

ATTENTION = {
    "split_kv": "split_kv",
    "hopper": "hopper",
    "triton": "portable",
    "torch": "blocked",
    "reference": "reference_backend",
}
STATISTICS = {"triton": "statistics", "torch": "blocked", "reference": "reference_backend"}
NAMES = tuple(ATTENTION)
FUSED = ("hopper", "triton")  # the others are for CPUs and for tests


class BackendUnavailable(RuntimeError):
    """The backend that was demanded cannot serve this call; the message says why."""


@cache
def load(module: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot be imported here."""
    try:
        return importlib.import_module(f".{module}", __package__)
    except ImportError as error:
        return f"{error.name or 'a module'} cannot be imported ({error})"


def reason_against(module: str, request: Request) -> str | None:
    """Why the backend in `module` cannot serve `request`, or None when it can."""
    loaded = load(module)
    if isinstance(loaded, str):
        return loaded
    if request.scores not in getattr(loaded, "SCORES", ("exact",)):
        return f"it has no {request.scores} scores"
    return loaded.unsupported(request)


def fused(
    device: torch.device, dtype: torch.dtype, head_dim: int, v_head_dim: int, rows: int, keys: int,
    scores: str = "exact",
) -> tuple[str | None, str]:  # fmt: skip
    """(the fused backend that serves such calls with tiles of rows x keys, ""), or (None, why there is none).

    torch.compile makes a graph for each head dim, also where it takes sizes to be dynamic.
    """
    return _constant(device, dtype, index(head_dim), index(v_head_dim), rows, keys, scores)


def _constant(device, dtype, head_dim, v_head_dim, rows, keys, scores) -> tuple[str | None, str]:
    return _fused(device, dtype, head_dim, v_head_dim, TileShape(rows, keys), scores)


# What torch.compiler.assume_constant_result does, without importing torch._dynamo, which takes seconds. Arguments have
# to be constants.
_constant._dynamo_marked_constant = True


@cache
def _fused(device, dtype, head_dim, v_head_dim, tile, scores) -> tuple[str | None, str]:
    x = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    v = x[..., :v_head_dim]
    request = Request(x, x, v, Gate(), 1.0, True, tile, True, 0, None, False, False, scores=scores)
    for name in FUSED:
        reason = reason_against(ATTENTION[name], request)
        if reason is None:
            return name, ""
    return None, reason


def choose(
    request: Request, demanded: str = "auto", table: dict[str, str] = ATTENTION
) -> tuple[str, ModuleType, dict[str, str]]:
    """(backend, its module, {faster backend: why not}) among `table`, fastest first.

    Raises BackendUnavailable when `demanded` cannot serve the call, ValueError when there is no such backend.
    """
    if demanded != "auto" and demanded not in table:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(table)}; got {demanded!r}")
    passed_over = {}
    for name, module in table.items():
        if demanded not in ("auto", name) or (demanded == "auto" and not _suits(module, request)):
            continue
        reason = reason_against(module, request)
        if reason is None:
            return name, load(module), passed_over
        passed_over[name] = reason
    reasons = "; ".join(f"backend '{name}' cannot serve this call: {reason}" for name, reason in passed_over.items())
    raise BackendUnavailable(reasons)


def _suits(module: str, request: Request) -> bool:
    """False for a backend that is there for other calls than this one."""
    suits = getattr(load(module), "suits", None)
    return suits is None or suits(request)
