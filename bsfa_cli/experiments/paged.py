"""python -m bsfa_cli.experiments.paged --out FILE.json

What a prefill costs out of a paged cache, as a serving engine's layer runs it, with the output written in its place:
keys and values gathered and attended to ("layer"), both alone, attention that reads pages where they are ("paged"), and
FlashAttention-3 on the same pages. Random data: timing only. A gate of one value for all heads is set to skip what was
asked for. Ends with an error where pages and gathered keys do not give the same bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bsfa_kernels import Gate, block_sparse_attention
from bsfa_kernels.pages import gather_pages

from ..environment import describe, resolve_device
from ..errors import UsageError
from ..files import check_writable, write_json
from ..timing import flash_attention
from ..timing.interleave import Contender, first_call, measure
from . import end

PAGE = 128
BISECTIONS = 12


def tensors(rows: int, keys: int, heads: int, kv_heads: int, head_dim: int, device, dtype):
    """(queries [rows, Hq, D], cache [pages, Hkv, PAGE, 2 D] with tokens before heads in memory, block table)."""
    generator = torch.Generator(device).manual_seed(0)
    pages = -(-keys // PAGE)
    query = torch.randn(rows, heads, head_dim, generator=generator, device=device).to(dtype)
    cache = torch.randn(pages, PAGE, kv_heads, 2 * head_dim, generator=generator, device=device).to(dtype)
    table = torch.randperm(pages, generator=generator, device=device).to(torch.int32)
    return query, cache.transpose(1, 2), table


def gap_that_skips(attend: Callable, rate: float) -> tuple[Gate, float]:
    """(gate, skip rate counted): the gap of one value whose skip rate is nearest to `rate`."""

    def skipped(gap: float) -> float:
        result = attend(Gate(gap=gap), return_counts=True)
        return 1 - int(result.kept.sum()) / max(int(result.candidates.sum()), 1)

    low, high = -40.0, 40.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if skipped(middle) < rate else (low, middle)
    return Gate(gap=middle), skipped(middle)


@torch.inference_mode()
def cell(rows: int, keys: int, shape: tuple[int, int, int], rate: float, device: torch.device, seconds: float) -> dict:
    """The last `rows` queries of `keys` positions: {rows, keys, skip, contenders, unavailable}."""
    heads, kv_heads, head_dim = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, cache, table = tensors(rows, keys, heads, kv_heads, head_dim, device, dtype)
    halves = cache.split(head_dim, -1)
    gather = partial(gather_pages, *halves, table, keys)
    k, v = gather()
    q = query.transpose(0, 1)[None]
    tokens = torch.empty_like(query)
    out = tokens.transpose(0, 1)[None]
    attend = partial(block_sparse_attention, q, k, v, q_offset=keys - rows)
    gate, skip = gap_that_skips(attend, rate)
    gate = gate.expanded(heads, device)

    def layer(gate: Gate) -> torch.Tensor:
        return block_sparse_attention(q, *gather(), gate, q_offset=keys - rows, out=out).out

    def paged(gate: Gate) -> torch.Tensor:
        return block_sparse_attention(q, *halves, gate, q_offset=keys - rows, out=out, block_table=table[None]).out

    if not torch.equal(layer(gate).clone(), paged(gate)):
        raise RuntimeError(f"{rows} queries of {keys} keys: pages do not give the bits of gathered keys")
    plans = {
        "gather": lambda: gather()[0],
        "attention, no gate": lambda: attend().out,
        "attention": lambda: attend(gate).out,
        "layer, no gate": lambda: layer(Gate()),
        "layer": lambda: layer(gate),
        "paged, no gate": lambda: paged(Gate()),
        "paged": lambda: paged(gate),
    }
    library, unavailable = flash_attention.find(flash_attention.FA3), []
    if isinstance(library, str):
        unavailable.append({"name": flash_attention.FA3, "reason": library})
    else:
        plans[f"{library.version}, paged"] = _flash_attention(library.module, query, halves, table, keys)
    contenders = []
    for name, call in plans.items():
        _, reason = first_call(call, device)
        if reason:
            unavailable.append({"name": name, "reason": reason})
        else:
            contenders.append(Contender(name, call))
    timings = measure(contenders, device, seconds=seconds)
    found = [{"name": name} | timing.as_dict() for name, timing in timings.items()]
    return {"rows": rows, "keys": keys, "skip": skip, "contenders": found, "unavailable": unavailable}


def _flash_attention(module, query, halves, table, keys: int) -> Callable[[], torch.Tensor]:
    """FlashAttention-3 on the same pages, [pages, PAGE, Hkv, D] to it."""
    pages = [half.transpose(1, 2) for half in halves]
    lengths = torch.full((1,), keys, dtype=torch.int32, device=query.device)

    def call() -> torch.Tensor:
        out = module.flash_attn_with_kvcache(
            query[None], *pages, cache_seqlens=lengths, page_table=table[None], causal=True
        )
        return out[0] if isinstance(out, tuple) else out

    return call


def _cells(text: str) -> list[tuple[int, int]]:
    try:
        found = [tuple(int(part) for part in cell.split("/")) for cell in text.split(",")]
        if all(len(cell) == 2 and 0 < cell[0] <= cell[1] for cell in found):
            return found
    except ValueError:
        pass
    raise UsageError(f"--cells takes QUERIES/KEYS,..., queries not more than keys; got {text!r}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.paged", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--cells", default="8192/8192,32768/32768,8192/131072", help="queries/keys of a prefill chunk")
    parser.add_argument("--skip", type=float, default=0.5)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, for each cell")
    options = parser.parse_args()
    wanted = _cells(options.cells)
    check_writable(options.out)
    device, cells = resolve_device("auto"), []
    shape = options.heads, options.kv_heads, options.head_dim
    for rows, keys in wanted:
        cells.append(cell(rows, keys, shape, options.skip, device, options.seconds))
        print(f"{rows:,} queries of {keys:,} keys, {cells[-1]['skip']:.1%} skipped", flush=True)
        for row in cells[-1]["contenders"]:
            print(f"    {row['name']:28} {row['ms_median']:9.3f} ms", flush=True)
        for absent in cells[-1]["unavailable"]:
            print(f"    {absent['name']:28} {absent['reason'][:90]}", flush=True)
        write_json(options.out, {"environment": describe(device), "shape": shape, "page": PAGE, "cells": cells})
    return 0


if __name__ == "__main__":
    end("paged", main)
