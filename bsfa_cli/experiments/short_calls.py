"""python -m bsfa_cli.experiments.short_calls --out FILE.json

Calls of few queries on many keys: decoding, drafts, ends of chunks, short chunks. The last `rows` queries of `keys`
positions, of one sequence or several, causal, with nothing dropped and, where there is a whole query tile to judge,
with a gate that skips what was asked for; beside FlashAttention-3 (its own heuristics choose splits and packing) and
PyTorch's attention. Random data: timing only. Ends with an error where outputs differ by more than rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bsfa_kernels import TileShape, block_sparse_attention, explain
from bsfa_kernels.backends import NAMES
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from ..environment import describe, resolve_device
from ..errors import UsageError
from ..files import check_writable, write_json
from ..timing import flash_attention
from ..timing.interleave import Contender, first_call, measure
from . import end
from .calls import add_options, check_options, say
from .paged import gap_that_skips

CELLS = ",".join(f"{rows}/{keys}" for keys in (8192, 32768, 131072) for rows in (1, 8, 16, 32, 64, 128, 192, 256, 512))
TOLERANCE = 2e-2  # of bfloat16 outputs below 1, against each other
TILE = TileShape()


@torch.inference_mode()
def cell(
    rows: int, keys: int, batch: int, shape: tuple[int, int, int], rate: float, backends: list[str],
    device: torch.device, seconds: float,
) -> dict:  # fmt: skip
    """{rows, keys, batch, backend, skip, contenders, unavailable} of a call; `skip` is None where no gate judges."""
    heads, kv_heads, head_dim = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(batch, n, h, head_dim, generator=generator, device=device).to(dtype)
        for n, h in ((rows, heads), (keys, kv_heads), (keys, kv_heads))
    )
    views = [x.transpose(1, 2) for x in (q, k, v)]
    attend = partial(block_sparse_attention, *views, q_offset=keys - rows)
    plans: dict[str, Callable | str] = {"bsfa, no gate": lambda: attend().out}
    for name in backends:
        plans[f"bsfa, no gate, {name}"] = lambda name=name: attend(backend=name).out
    skip = None
    if rows >= TILE.rows:
        gate, skip = gap_that_skips(attend, rate)
        gate = gate.expanded(heads, device)
        plans["bsfa, gate"] = lambda: attend(gate).out
    plans |= {flash_attention.FA3: _flash_attention(q, k, v), "PyTorch": lambda: _library(*views)}
    chosen, _ = explain(*views, q_offset=keys - rows)
    found = {"rows": rows, "keys": keys, "batch": batch, "backend": chosen, "skip": skip}
    return found | _timed(plans, device, seconds)


def _library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention of the last queries, grouped heads as they are."""
    rows, keys = q.shape[2], k.shape[2]
    mask = None if rows == 1 else causal_lower_right(rows, keys)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _flash_attention(q, k, v) -> Callable | str:
    """FlashAttention-3's call for decoding, which chooses splits of the keys itself; or why there is none."""
    library = flash_attention.find(flash_attention.FA3)
    if isinstance(library, str):
        return library

    def call() -> torch.Tensor:
        out = library.module.flash_attn_with_kvcache(q, k, v, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    call.library = library.version
    return call


def _timed(plans: dict[str, Callable | str], device: torch.device, seconds: float) -> dict:
    unavailable, contenders, expected, versions = [], [], None, {}
    for name, call in plans.items():
        out, reason = (None, call) if isinstance(call, str) else first_call(call, device)
        if reason:
            unavailable.append({"name": name, "reason": reason})
            continue
        expected = out if expected is None else expected
        if name != "bsfa, gate" and not (out - expected).abs().max() < TOLERANCE:
            raise RuntimeError(f"{name} differs from {next(iter(plans))} by {(out - expected).abs().max():.2g}")
        contenders.append(Contender(name, call))
        versions[name] = {"library": call.library} if hasattr(call, "library") else {}
    timings = measure(contenders, device, seconds=seconds)
    found = [{"name": name} | versions[name] | timing.as_dict() for name, timing in timings.items()]
    return {"contenders": found, "unavailable": unavailable}


def _cells(text: str) -> list[tuple[int, int, int]]:
    """[(rows, keys, sequences)] of ROWS/KEYS or ROWS/KEYSxSEQUENCES, by commas."""
    try:
        cells = []
        for part in text.split(","):
            rows, rest = part.split("/")
            keys, _, batch = (rest if "x" in rest else f"{rest}x1").partition("x")
            cells.append((int(rows), int(keys), int(batch)))
        if all(0 < rows <= keys and batch > 0 for rows, keys, batch in cells):
            return cells
    except ValueError:
        pass
    raise UsageError(f"--cells takes QUERIES/KEYS[xSEQUENCES],..., queries not more than keys; got {text!r}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.short_calls", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--cells", default=CELLS, help="queries/keys of a call, xN where it has N sequences")
    parser.add_argument("--backends", default="", help="to time besides, with nothing dropped, by commas")
    add_options(parser, skip=0.75, seconds=0.3)
    options = parser.parse_args()
    wanted = _cells(options.cells)
    shape = check_options("short", options)
    backends = [name for name in options.backends.split(",") if name]
    if not set(backends) <= set(NAMES):
        raise UsageError(f"--backends takes {', '.join(NAMES)}; got {options.backends!r}")
    check_writable(options.out)
    device, cells = resolve_device("auto"), []
    for rows, keys, batch in wanted:
        cells.append(cell(rows, keys, batch, shape, options.skip, backends, device, options.seconds))
        skip = "" if cells[-1]["skip"] is None else f", {cells[-1]['skip']:.1%} skipped"
        say(f"{batch} x {rows:,} queries of {keys:,} keys, {cells[-1]['backend']}{skip}", cells[-1], digits=4)
        write_json(options.out, {"environment": describe(device), "shape": shape, "cells": cells})
    return 0


if __name__ == "__main__":
    end("short_calls", main)
