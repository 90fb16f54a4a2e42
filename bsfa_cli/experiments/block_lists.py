"""python -m bsfa_cli.experiments.block_lists --out FILE.json

Block lists beside FlashAttention-4's block-sparse kernel: the same random lists of 128x128 tiles for both, shared by
128 rows, as fine as FlashAttention-4 takes them, or by more, in one run with the dense kernels. Both are held to exact
attention over the listed tiles first. Lists are made before the clock starts; that bsfa merges them into streams is
part of its time. Random data: timing only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from bsfa_kernels import BlockLists, TileShape, block_sparse_attention
from bsfa_kernels.tiles import tile_counts

from ..environment import describe, resolve_device
from ..errors import GateFailed, UsageError
from ..files import check_writable, write_json
from ..options import numbers
from ..timing import flash_attention, plan, sweep
from ..timing.entrants import Entrants
from ..timing.flash_attention_lists import FORMS, SIDE, block_sparse
from ..timing.interleave import first_call, measure
from . import end

TILE = TileShape()
SAMPLED_ROWS = 64
LARGEST_ERROR = 0.02  # relative L2 of a row; leaving out one tile of a thousand moves a row by 3 %
OURS, THEIRS = "bsfa", f"{flash_attention.FA4} block-sparse"


def drawn(shape: plan.Shape, length: int, left_out: float, sharing: int, device, seed: int) -> torch.Tensor:
    """Tiles to visit, bool [1, heads, length / 128, length / 128]: the diagonal and the first, which bsfa visits in any
    case, and each other visible one with a probability of 1 - `left_out`, drawn once for `sharing` rows.
    """
    side, rows = length // SIDE, sharing // SIDE
    generator = torch.Generator(device).manual_seed(seed)
    kept = torch.rand(1, shape.heads, -(-side // rows), side, generator=generator, device=device) >= left_out
    tiles = kept.repeat_interleave(rows, 2)[:, :, :side]
    tiles[..., 0] = True
    return (tiles | torch.eye(side, dtype=torch.bool, device=device)).tril()


def exact(q, k, v, tiles: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float32 [heads, rows, D]: causal attention of some `rows` over the listed tiles."""
    group, position = q.shape[1] // k.shape[1], torch.arange(k.shape[2], device=q.device)
    found = []
    for head in range(q.shape[1]):
        keys, values = (x[0, head // group].float() for x in (k, v))
        seen = tiles[0, head, rows // SIDE].repeat_interleave(SIDE, -1) & (position <= rows[:, None])
        scores = q[0, head, rows].float() @ keys.T * q.shape[3] ** -0.5
        found.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values)
    return torch.stack(found)


def error_of(out: torch.Tensor, expected: torch.Tensor, rows: torch.Tensor) -> float:
    """The largest relative L2 distance of a row; infinite where anything at all is not finite."""
    apart = (out[0, :, rows].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(apart.max()) if bool(out.isfinite().all()) else float("inf")


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest relative L2 distance of two outputs' rows, over all rows; a head at a time."""
    heads = ((x.float(), y.float()) for x, y in zip(a[0], b[0], strict=True))
    return max(float(((x - y).norm(dim=-1) / y.norm(dim=-1)).max()) for x, y in heads)


def visited(attend: Callable, lists: BlockLists, tiles: torch.Tensor, length: int) -> float:
    """Share of the visible tiles that bsfa visits, as its kernel counts. Raises GateFailed where others are listed."""
    result = attend(blocks=lists, return_counts=True)
    visible, forced = tile_counts(length, True, True, TILE)
    heads, side = tiles.shape[1], tiles.shape[-1]
    counted = (int(result.kept.sum(dtype=torch.int64)) + forced * heads) / (visible * heads)
    listed = int(tiles.sum()) / (heads * side * (side + 1) // 2)
    if abs(counted - listed) > 1e-9:
        raise GateFailed(f"bsfa visited {counted:.4%} of the visible tiles, while {listed:.4%} are listed")
    return counted


def enter_lists(
    entrants: Entrants, name: str, call: Callable | str, expected: torch.Tensor, rows: torch.Tensor, **facts
) -> torch.Tensor | None:
    """Entrants.enter of a call on listed tiles, if `rows` of its output are near the `expected`. Ours have to be."""
    out = entrants.enter(name, call, **facts)
    if out is None:
        return None
    entrants.rows[-1]["largest_row_error"] = error = error_of(out, expected, rows)
    if error <= LARGEST_ERROR:
        return out
    entrants.contenders.pop()
    entrants.rows.pop()
    reason = f"a row is {error:.1%} from exact attention over the listed tiles"
    if facts["kind"] == OURS:
        raise GateFailed(f"{name}: {reason}")
    entrants.leave_out(name, reason)
    return None


@torch.inference_mode()
def cell(shape: plan.Shape, length: int, asked: tuple, sharings: tuple, device: torch.device, seconds: float) -> dict:
    """One length: {length, contenders, unavailable, ratios}; a ratio is FlashAttention-4's time over bsfa's."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = sweep.tensors("normal", shape, length, device, dtype, 0)
    laid, entrants = flash_attention.TokensFirst(q, k, v), Entrants(device, LARGEST_ERROR)
    rows = torch.randint(length, (SAMPLED_ROWS,), generator=torch.Generator().manual_seed(0)).to(device)
    rows[0], rows[1] = 0, length - 1
    attend = partial(block_sparse_attention, q, k, v)
    for name in (flash_attention.FA3, flash_attention.FA4):
        entrants.enter_dense(name, flash_attention.dense(name, laid, True))
    entrants.enter_dense("bsfa, no lists", lambda: attend().out)
    library = flash_attention.find(flash_attention.FA4)
    if isinstance(library, str):
        entrants.leave_out(THEIRS, library)
    for left_out, sharing in product(asked, sharings):
        tiles = drawn(shape, length, left_out, sharing, device, seed=round(1e4 * left_out) + sharing)
        lists = BlockLists.from_mask(tiles.repeat_interleave(SIDE // TILE.rows, 2))
        facts = {"left_out": left_out, "sharing": sharing, "density": visited(attend, lists, tiles, length)}
        label = f"{left_out:.0%} left out, {sharing} rows share a list"
        expected = exact(q, k, v, tiles, rows)
        ours = enter_lists(
            entrants, f"{OURS}, {label}", partial(_out, attend, lists), expected, rows, kind=OURS, **facts
        )
        for form in () if isinstance(library, str) else FORMS:
            name = f"{THEIRS} ({form}), {label}"
            call, reason = first_call(partial(block_sparse, library, laid, tiles, form), device)
            out = enter_lists(entrants, name, call or reason, expected, rows, kind=THEIRS, form=form, **facts)
            if out is not None:
                entrants.rows[-1]["largest_row_distance_from_bsfa"] = apart(out, ours)
    timings = measure(entrants.contenders, device, seconds=seconds)
    for row in entrants.rows:
        row |= timings[row["name"]].as_dict()
    return {
        "length": length, "shape": shape.describe(), "sampled_rows": SAMPLED_ROWS, "contenders": entrants.rows,
        "unavailable": entrants.unavailable, "ratios": ratios(entrants.rows),
    }  # fmt: skip


def _out(attend: Callable, lists: BlockLists) -> torch.Tensor:
    return attend(blocks=lists).out


def ratios(rows: list[dict]) -> list[dict]:
    """FlashAttention-4's faster form over bsfa, for every kind of list that both were timed on."""
    found = []
    for ours in (row for row in rows if row["kind"] == OURS):
        kind = ("left_out", "sharing", "density")
        theirs = [row for row in rows if row["kind"] == THEIRS and all(row[key] == ours[key] for key in kind)]
        if theirs:
            best = min(theirs, key=lambda row: row["ms_median"])
            found.append({key: ours[key] for key in kind} | {
                "form": best["form"], "ratio": best["ms_median"] / ours["ms_median"]})  # fmt: skip
    return found


def show(cell: dict) -> None:
    for row in cell["contenders"]:
        visited = f"{row['density']:7.1%} of tiles" if "density" in row else ""
        error = f"row error {row['largest_row_error']:.4f}" if "largest_row_error" in row else ""
        spread = f"{row['ms_p20']:.3f}-{row['ms_p80']:.3f}"
        print(f"{cell['length']:8,} {row['name']:78} {row['ms_median']:9.3f} ms {spread:>17} {visited:17} {error}")
    for absent in cell["unavailable"]:
        print(f"{cell['length']:8,} {absent['name']:78} {absent['reason']}")
    for row in cell["ratios"]:
        print(f"{cell['length']:8,} {row['density']:.1%} of tiles, {row['sharing']} rows share a list: bsfa at "
              f"{row['ratio']:.2f}x {flash_attention.FA4} ({row['form']})", flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.block_lists", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, after every length")
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--left-out", default="0.5,0.75,0.9", help="shares of the tiles")
    parser.add_argument("--sharing", default="128,384", help="rows that share a list")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring, for each length")
    options = parser.parse_args()
    lengths = numbers(options.lengths, int, "--lengths takes whole numbers of tokens")
    sharings = numbers(options.sharing, int, "--sharing takes whole numbers of rows")
    asked = numbers(options.left_out, float, "--left-out takes shares of the tiles")
    if any(n < SIDE or n % SIDE for n in (*lengths, *sharings)):
        raise UsageError(
            f"--lengths and --sharing must be multiples of {SIDE}, got {options.lengths} and {options.sharing}"
        )
    if not all(0 <= share < 1 for share in asked):
        raise UsageError(f"--left-out must be from 0 to below 1, got {options.left_out}")
    if not 0 < options.seconds < float("inf"):
        raise UsageError(f"--seconds must be above 0, got {options.seconds:g}")
    shape = plan.Shape("lists", options.heads, options.kv_heads, options.head_dim)
    check_writable(options.out)
    device, cells = resolve_device("auto"), []
    for length in sorted(lengths):
        cells.append(cell(shape, length, asked, sharings, device, options.seconds))
        show(cells[-1])
        write_json(options.out, {"environment": describe(device), "tile": str(TILE), "cells": cells})
    return 0


if __name__ == "__main__":
    end("block_lists", main)
