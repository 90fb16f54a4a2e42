"""python -m bsfa_cli.experiments.gates --out FILE.json

What the gap gate costs over the absolute one at equal skip rates: both in turns in one run, beside the fastest dense
kernel. The gap gate compares a tile with maxima that only the kernel knows, so it may not cost much more.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from bsfa_kernels import TileShape, block_sparse_attention

from ..environment import describe, resolve_device
from ..errors import MachineError
from ..files import check_writable, write_json
from ..options import numbers
from ..timing import baselines, plan, sweep
from ..timing.interleave import Contender, first_call, measure
from . import end

TILE = TileShape()


def cell(asked: plan.Plan, shape: plan.Shape, length: int, device: torch.device, seconds: float) -> dict:
    """One length: contenders as in `bsfa profile`, each with its `gate`, and `cost`, {skip rate asked for: time of the
    gap gate over that of the absolute one, less 1}. Raises MachineError where thresholds cannot be fitted.
    """
    dtype, data = sweep.resolve_dtype(asked.dtype, device), asked.data_of(shape)
    q, k, v = sweep.tensors(data, shape, length, device, dtype, asked.seed)
    contenders, rows, missing = [], [], []
    for name, call in baselines.dense(q, k, v, shape.causal, asked.baselines).items():
        if not isinstance(call, str) and first_call(call, device)[1] is None:
            contenders.append(Contender(name, call))
            rows.append({"name": name, "kind": "dense", "skip_target": None})
    for kind in plan.GATES:
        for name, skip, gate in sweep.gates(replace(asked, gate=kind), shape, q, k, v, TILE, asked.backend, missing):
            if skip is None:  # without a gate
                continue
            call = partial(block_sparse_attention, q, k, v, gate, causal=shape.causal, tile=TILE, return_counts=True)
            name = f"{name}, {kind} gate"
            contenders.append(Contender(name, call))
            rows.append({"name": name, "kind": "bsfa", "gate": kind, "skip_target": skip})
            rows[-1] |= sweep.skipped(call(), shape.causal, length, TILE)
    if missing:
        raise MachineError(f"{missing[0]['name']}: {missing[0]['reason']}")
    timings = measure(contenders, device, seconds=seconds, seed=asked.seed)
    found = sweep.summarise(rows, timings, sweep.dense_flops(shape, length))
    ms = {(row.get("gate"), row["skip_target"]): row["ms_median"] for row in found["contenders"]}
    return {
        "length": length, "shape": shape.describe(), "data": sweep.LABELS[data],
        "fastest_dense": found["fastest_dense"], "contenders": found["contenders"],
        "cost": {f"{skip:g}": ms["gap", skip] / ms["absolute", skip] - 1 for skip in (0.0, *asked.skip)},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.gates", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--skip", default="0.5,0.75,0.9", help="beside 0")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--data", choices=plan.DATA, default="normal")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring, for each length")
    options = parser.parse_args()
    asked = plan.Plan(
        "gates", (plan.Shape("text", options.heads, options.kv_heads, options.head_dim),),
        numbers(options.lengths, int, "--lengths takes whole numbers of tokens"),
        numbers(options.skip, float, "--skip takes shares of the candidate tiles"), data=options.data,
    )  # fmt: skip
    check_writable(options.out)
    device, cells = resolve_device("auto"), []
    for shape, length in asked.cells():
        cells.append(cell(asked, shape, length, device, options.seconds))
        for row in cells[-1]["contenders"]:
            skip = f"{row['skip']:7.1%}" if "skip" in row else "      -"
            spread = f"{row['ms_p20']:.3f}-{row['ms_p80']:.3f}"
            print(f"{length:8,} {row['name']:34} {row['ms_median']:9.3f} ms {spread:>17} {skip} {row['speedup']:.2f}x")
        print(f"{length:8,} gap over absolute: " + ", ".join(f"{c:+.1%} at {s}" for s, c in cells[-1]["cost"].items()))
    write_json(options.out, {"environment": describe(device), "tile": str(TILE), "cells": cells})
    return 0


if __name__ == "__main__":
    end("gates", main)
