"""python -m bsfa_cli.experiments.paged --out FILE.json

What a prefill costs out of a paged cache, as a serving engine's layer runs it, with the output written in its place:
keys and values gathered and attended to ("layer"), both alone, attention that reads pages where they are ("paged"), and
FlashAttention-3 on the same pages; of several prefills a launch for each ("one by one") and one for all ("packed").
Random data: timing only. A gate of one value for all heads is set to skip what was asked for. Ends with an error where
what should be the same bits is not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bsfa_kernels import Gate, block_sparse_attention, pack
from bsfa_kernels.pages import gather_pages

from ..environment import describe, resolve_device
from ..errors import UsageError
from ..files import check_writable, write_json
from ..timing import flash_attention
from ..timing.interleave import Contender, first_call, measure
from . import end
from .calls import add_options, check_options, say

PAGE = 128
BISECTIONS = 12
CELLS = (
    "8192/8192,32768/32768,8192/131072,2048/2048+2048/2048+2048/2048+2048/2048,4096/4096+256/8192+1024/1024+2816/9000"
)


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
    starts = torch.tensor([0, rows], dtype=torch.int32, device=device)
    library = _flash_attention(query, halves, table[None], [(rows, keys)], starts)
    return {"rows": rows, "keys": keys, "skip": skip} | _timed(plans, library, device, seconds)


@torch.inference_mode()
def batch(
    sequences: list[tuple[int, int]], shape: tuple[int, int, int], rate: float, device: torch.device, seconds: float
) -> dict:
    """Prefills of (rows, keys) each: {sequences, skip, contenders, unavailable}."""
    heads, kv_heads, head_dim = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, keys = (list(x) for x in zip(*sequences, strict=True))
    pages, most = [-(-n // PAGE) for n in keys], -(-max(keys) // PAGE)
    query, cache, numbers = tensors(sum(rows), sum(pages) * PAGE, heads, kv_heads, head_dim, device, dtype)
    halves = cache.split(head_dim, -1)
    table = torch.zeros(len(rows), most, dtype=torch.int32, device=device)
    for row, own in zip(table, numbers.split(pages), strict=True):
        row[: len(own)] = own
    starts = [sum(rows[:i]) for i in range(len(rows))]
    packed = pack(starts, rows, keys, device)
    q, out, alone = (x.transpose(0, 1)[None] for x in (query, torch.empty_like(query), torch.empty_like(query)))
    attend = partial(block_sparse_attention, q, *halves, block_table=table, packed=packed, out=out)
    gate, skip = gap_that_skips(attend, rate)
    gate = gate.expanded(heads, device)

    def one_by_one(gate: Gate) -> torch.Tensor:
        for i, (start, n, length) in enumerate(zip(starts, rows, keys, strict=True)):
            own = slice(start, start + n)
            block_sparse_attention(
                q[:, :, own], *halves, gate, q_offset=length - n, block_table=table[i : i + 1, : pages[i]],
                out=alone[:, :, own],
            )  # fmt: skip
        return alone

    if not torch.equal(one_by_one(gate), attend(gate).out):
        raise RuntimeError(f"{sequences}: one launch does not give the bits of a launch for each")
    plans = {
        "one by one, no gate": lambda: one_by_one(Gate()),
        "one by one": lambda: one_by_one(gate),
        "packed, no gate": lambda: attend(Gate()).out,
        "packed": lambda: attend(gate).out,
    }
    begins = torch.tensor([*starts, sum(rows)], dtype=torch.int32, device=device)
    library = _flash_attention(query, halves, table, sequences, begins)
    return {"sequences": sequences, "skip": skip} | _timed(plans, library, device, seconds)


def _timed(plans: dict[str, Callable], library: tuple[str, Callable | str], device, seconds: float) -> dict:
    name, call = library
    unavailable, contenders = [], []
    if isinstance(call, str):
        unavailable.append({"name": name, "reason": call})
    else:
        plans = plans | {name: call}
    for name, call in plans.items():
        _, reason = first_call(call, device)
        if reason:
            unavailable.append({"name": name, "reason": reason})
        else:
            contenders.append(Contender(name, call))
    timings = measure(contenders, device, seconds=seconds)
    found = [{"name": name} | timing.as_dict() for name, timing in timings.items()]
    return {"contenders": found, "unavailable": unavailable}


def _flash_attention(query, halves, table, sequences, starts) -> tuple[str, Callable[[], torch.Tensor] | str]:
    """FlashAttention-3 on the same pages, [pages, PAGE, Hkv, D] to it: its name and a call, or why there is none."""
    library = flash_attention.find(flash_attention.FA3)
    if isinstance(library, str):
        return flash_attention.FA3, library
    pages = [half.transpose(1, 2) for half in halves]
    rows, keys = zip(*sequences, strict=True)
    where = dict(cache_seqlens=torch.tensor(keys, dtype=torch.int32, device=query.device), page_table=table)
    q = query[None]
    if len(sequences) > 1:
        q, where = query, where | dict(cu_seqlens_q=starts, max_seqlen_q=max(rows))

    def call() -> torch.Tensor:
        out = library.module.flash_attn_with_kvcache(q, *pages, causal=True, **where)
        return out[0] if isinstance(out, tuple) else out

    return f"{library.version}, paged", call


def _cells(text: str) -> list[list[tuple[int, int]]]:
    try:
        cells = [[tuple(int(n) for n in part.split("/")) for part in cell.split("+")] for cell in text.split(",")]
        if all(len(part) == 2 and 0 < part[0] <= part[1] for cell in cells for part in cell):
            return cells
    except ValueError:
        pass
    raise UsageError(f"--cells takes QUERIES/KEYS+...,..., queries not more than keys; got {text!r}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.paged", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument(
        "--cells", default=CELLS, help="queries/keys of a prefill chunk, of several prefills in a batch joined by +"
    )
    add_options(parser, skip=0.5, seconds=3.0)
    options = parser.parse_args()
    wanted = _cells(options.cells)
    shape = check_options("paged", options)
    check_writable(options.out)
    device, cells = resolve_device("auto"), []
    for sequences in wanted:
        common = shape, options.skip, device, options.seconds
        cells.append(cell(*sequences[0], *common) if len(sequences) == 1 else batch(sequences, *common))
        said = ", ".join(f"{rows:,} queries of {keys:,} keys" for rows, keys in sequences)
        say(f"{said}, {cells[-1]['skip']:.1%} skipped", cells[-1], digits=3)
        write_json(options.out, {"environment": describe(device), "shape": shape, "page": PAGE, "cells": cells})
    return 0


if __name__ == "__main__":
    end("paged", main)
