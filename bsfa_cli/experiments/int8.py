"""python -m bsfa_cli.experiments.int8 --out FILE.json

What int8 scores do to attention's output: on unit-normal and structured data and with outlier channels planted in Q
and K, at several skip rates, with the same thresholds as exact scores; beside FlashAttention-3 in FP8 if installed.
Errors are relative L2 distances from dense attention in float32 on the same 16-bit tensors; skip rates are counted.
Synthetic throughout: what a model makes of it is for `bsfa verify --scores int8` and `experiments.real --scores`. Times
are `bsfa profile --profile int8`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from bsfa_kernels import TileShape, block_sparse_attention, explain

from ..environment import describe, resolve_device
from ..files import check_writable, write_json
from ..metrics.distance import relative, squares
from ..options import numbers
from ..timing import flash_attention, sweep
from ..timing.flash_attention import FA3_FP8, TokensFirst
from ..timing.plan import EXACT, INT8, Shape
from ..timing.thresholds import Fit, inert
from . import end

TILE = TileShape()
OFFSET, SCALED, SHARED = "offset in K", "scaled channels in Q and K", "shared outlier channels"
DATA = ("normal", "structured", OFFSET, SCALED, SHARED)


def tensors(data: str, shape: Shape, length: int, device: torch.device, dtype: torch.dtype):
    """q [1, heads, length, head_dim], k and v [1, kv_heads, length, head_dim]; one of DATA.

    Outlier channels are like those that models have: K far from zero in some, Q and K large in some, alike or not.
    """
    plain = "structured" if data == "structured" else "normal"
    q, k, v = sweep.tensors(plain, shape, length, device, dtype, 0)
    if data == OFFSET:
        k[..., 3] += 30
        k[..., shape.head_dim // 2] -= 18
    elif data == SCALED:
        k[..., 3] += 30
        q[..., 7] *= 12
        k[..., -5] *= 10
    elif data == SHARED:
        q[..., ::16] *= 8
        k[..., ::16] *= 8
    return q, k, v


def measure(data: str, shape: Shape, length: int, skips: tuple[float, ...], device: torch.device) -> dict:
    """JSON of one kind of data: for each skip rate the counted rate and the error with exact and with int8 scores."""
    dtype = sweep.resolve_dtype("auto", device)
    q, k, v = tensors(data, shape, length, device, dtype)
    wide = block_sparse_attention(q.float(), k.float(), v.float(), causal=shape.causal, backend="torch").out
    gates = [(0.0, inert("gap", shape.heads, -(-length // TILE.rows), device))]
    fit = Fit("gap", q, k, v, causal=shape.causal, tile=TILE, backend="auto", shared=data == "structured")
    gates += [(skip, fit.reach(skip)) for skip in skips]
    rows = []
    for target, gate in gates:
        for scores in (EXACT, INT8):
            found = block_sparse_attention(
                q, k, v, gate, causal=shape.causal, tile=TILE, scores=scores, return_counts=True
            )
            counted = sweep.skipped(found, shape.causal, length, TILE)
            rows.append({
                "scores": scores, "skip_target": target, "skip": counted["skip"],
                "error": relative(*squares(found.out, wide)), "finite": bool(found.out.isfinite().all()),
            })  # fmt: skip
    fp8 = flash_attention.dense_fp8(TokensFirst(q, k, v), shape.causal) if q.is_cuda else "needs a GPU"
    beside = {"reason": fp8} if isinstance(fp8, str) else {
        "error": relative(*squares(fp8(), wide)), "library": fp8.library,
    }  # fmt: skip
    backends = {scores: explain(q, k, v, causal=shape.causal, tile=TILE, scores=scores)[0] for scores in (EXACT, INT8)}
    return {
        "data": data, "shape": shape.describe(), "length": length, "dtype": str(dtype).removeprefix("torch."),
        "backends": backends, "rows": rows, FA3_FP8: beside,
    }  # fmt: skip


def say(cell: dict) -> None:
    """One cell in lines, on stderr."""
    shape = cell["shape"]
    print(f"{cell['data']}, {shape['heads']}/{shape['kv_heads']} heads of {shape['head_dim']}:", file=sys.stderr)
    for row in cell["rows"]:
        print(f"    {row['scores']:6} {row['skip']:6.1%} skipped  error {row['error']:.4f}", file=sys.stderr)
    beside = cell[FA3_FP8]
    words = beside.get("reason") or f"error {beside['error']:.4f}, nothing skipped"
    print(f"    {FA3_FP8}: {words}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.int8", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--head-dims", default="128,64")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--skip", default="0.5,0.75,0.9", help="beside 0")
    options = parser.parse_args()
    skips = numbers(options.skip, float, "--skip takes shares of the candidate tiles")
    dims = numbers(options.head_dims, int, "--head-dims takes whole numbers")
    check_writable(options.out)
    device, cells = resolve_device("auto"), []
    for head_dim in dims:
        shape = Shape("text", options.heads, options.kv_heads, head_dim)
        for data in DATA:
            cells.append(measure(data, shape, options.length, skips, device))
            say(cells[-1])
    write_json(options.out, {"environment": describe(device), "tile": str(TILE), "cells": cells})
    return 0


if __name__ == "__main__":
    end("int8", main)
