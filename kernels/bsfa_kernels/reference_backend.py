"""The specification, callable like any backend (float32 or float64 inside, output in the input's dtype)."""

from __future__ import annotations

import torch

from . import reference
from .quantise import dequantised, prepare
from .request import SCORES as SCORES
from .request import Request


def unsupported(request: Request) -> str | None:
    return None


def attention(request: Request):
    request = _scored(request)
    result = reference.attention(
        request.q,
        request.k,
        request.v,
        request.gate,
        scoring=request.scoring,
        spans=request.host_spans(),
        tile=request.tile,
        keep_sink=request.keep_sink,
        query_tiles=request.query_tiles,
        blocks=request.blocks,
        sinks=request.sinks,
        dtype=torch.float64,
    )
    out, *_ = request.new_outputs()
    return out.copy_(result.out), result.lse.float(), result.kept, result.candidates


def tile_statistics(request: Request, lse: torch.Tensor):
    request = _scored(request)
    return reference.statistics(
        request.q,
        request.k,
        scoring=request.scoring,
        spans=request.host_spans(),
        tile=request.tile,
        keep_sink=request.keep_sink,
        query_tiles=request.query_tiles,
        key_tiles=request.key_tiles,
        lse=lse,
    )


def _scored(request: Request) -> Request:
    """The call whose exact scores are the scores that `request` asks for."""
    return request if request.scores == "exact" else dequantised(request, prepare(request))
