"""python -m bsfa_cli.experiments.host_time --out FILE.json

What a call costs the host: CPU time of this process per enqueued call, with and without a gate and with block lists,
beside the dense kernels of the libraries. The GPU is given time to finish between samples, so that its queue never
fills and nobody waits for it in a sample.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bsfa_kernels import BlockLists, Gate, TileShape, block_sparse_attention

from ..environment import describe, resolve_device
from ..errors import MachineError
from ..files import check_writable, write_json
from ..timing import baselines, plan, sweep
from ..timing.interleave import first_call
from . import end

LENGTH, CALLS, SAMPLES = 2048, 50, 40
TILE = TileShape()
ASKED = ("cuDNN", "FlashAttention-2", plan.FA3, "FlashAttention-4")


def calls(shape: plan.Shape, device: torch.device) -> dict[str, Callable | str]:
    """{name: call, or why there is none}."""
    q, k, v = sweep.tensors("normal", shape, LENGTH, device, torch.bfloat16, 0)
    rows, keys = LENGTH // TILE.rows, LENGTH // TILE.keys
    gate = Gate(gap=torch.full((shape.heads, rows), -4.0, device=device))
    mask = torch.ones(1, shape.heads, rows, keys, dtype=torch.bool, device=device)
    mask[..., ::2] = False
    lists = BlockLists.from_mask(mask)
    found = {
        "bsfa, no gate": lambda: block_sparse_attention(q, k, v).out,
        "bsfa, gap gate": lambda: block_sparse_attention(q, k, v, gate).out,
        "bsfa, gap gate, counted": lambda: block_sparse_attention(q, k, v, gate, return_counts=True).out,
        "bsfa, block lists": lambda: block_sparse_attention(q, k, v, blocks=lists).out,
        "bsfa, gap gate, int8 scores": lambda: block_sparse_attention(q, k, v, gate, scores="int8").out,
    }
    dense = baselines.dense(q, k, v, shape.causal, ASKED)
    return found | {name: call for name, call in dense.items() if name in ASKED}


def cpu_us(call: Callable, device: torch.device) -> list[float]:
    """Microseconds of CPU time per call, one number a sample."""
    found = []
    for _ in range(SAMPLES):
        began = time.process_time_ns()
        for _ in range(CALLS):
            call()
        found.append((time.process_time_ns() - began) / CALLS / 1e3)
        torch.cuda.synchronize(device)
    return found


@torch.inference_mode()
def measure(shape: plan.Shape, device: torch.device) -> dict:
    """{"contenders": rows, "unavailable": reasons}, printed as they come."""
    rows, unavailable = [], []
    for name, call in calls(shape, device).items():
        reason = call if isinstance(call, str) else first_call(call, device)[1]
        if reason is not None:
            unavailable.append({"name": name, "reason": reason})
            print(f"{name:28} -  {reason}")
            continue
        cpu_us(call, device)
        samples = cpu_us(call, device)
        rows.append({"name": name, "cpu_us_median": statistics.median(samples), "samples_us": samples})
        if hasattr(call, "library"):
            rows[-1]["library"] = call.library
        print(f"{name:28} {rows[-1]['cpu_us_median']:7.1f} us of CPU time a call, best {min(samples):.1f}")
    return {"contenders": rows, "unavailable": unavailable}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.host_time", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--v-head-dim", type=int, help="of V, where it is narrower")
    options = parser.parse_args()
    shape = plan.Shape(
        "text", options.heads, options.kv_heads, options.head_dim, v_head_dim=options.v_head_dim
    )  # fmt: skip
    check_writable(options.out)
    device = resolve_device("auto")
    if device.type != "cuda":
        raise MachineError("host time is that of launches on a GPU, and there is none here")
    result = {"environment": describe(device), "shape": shape.describe(), "length": LENGTH, "calls": CALLS}
    write_json(options.out, result | measure(shape, device))
    return 0


if __name__ == "__main__":
    end("host_time", main)
