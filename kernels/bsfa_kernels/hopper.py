"""The hopper backend: a warp-specialized Gluon kernel for sm_90a (H100, H200), launched.

One program computes 192 query rows of one head, or 128 where V's head dim is over 128: consumer warpgroups of 64 rows,
each deciding for its own 64 x 128 tiles, and one producer warp that streams K and V tiles through shared memory by TMA.
The consumers share one stream and run out of step, so that one's softmax hides behind another's products. V is always
streamed: fetching it after the vote would expose its latency (measured: 10-20 % slower at every skip rate). The kernel
is in hopper_kernel.py, hopper_pipeline.py and hopper_stream.py, what each choice was worth in kernels/NOTES.md.

With block lists a program's stream is their union (schedule.py), and a consumer lets pass what it has not listed; a
section's programs start in the order of their streams' lengths, longest first.

Programs start section by section: a section is as many KV heads of a sequence as L2 holds, with their query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_kernel import CHUNK, forward
from .hopper_stream import KEYS, ROWS, Variant
from .int8 import prepare
from .launch import Launches, aligned, device_guard, int32, interpreted
from .portable import MAX_GRID_Y
from .request import SCORES as SCORES
from .request import Request
from .schedule import schedule
from .tiles import TileShape

SECTION_BYTES = 32 << 20  # of K and V that the programs running at one time stream; L2 holds 50 MB (H200: 60)
launches = Launches(forward)
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8}


@dataclass(frozen=True)
class Shape:
    """How heads fit a multiprocessor: 227 KB of shared memory and 65,536 registers."""

    columns: int  # of a slab of Q or K
    slabs: int  # of a tile of Q or K
    v_columns: int  # of a slab of V, and of the output
    v_slabs: int
    parts: int  # of a tile's keys that are worked on by themselves
    v_parts: int  # of a tile's keys, each of which has a slot of its own for V; they divide `parts`
    consumers: int
    k_stages: int  # slots in flight: of K a slab each, of V all slabs of a part
    v_stages: int
    early: bool = False  # consumers wait early with gates too (hopper_pipeline.py), as measured

    @property
    def registers(self) -> int:
        """That a thread starts with, before they are shared out anew."""
        return 128 if self.consumers == 3 else 168


# By the largest head dims of Q and K, and of V, narrow ones first; TMA fills what is more than the head dim with zeros.
# Rounded to int8, heads of more than 128 have 256 columns (quantise.columns).
SHAPES = {
    (64, 64): Shape(64, 1, 64, 1, 4, 1, 3, 4, 4, early=True),
    (128, 128): Shape(128, 1, 128, 1, 2, 1, 3, 3, 2),
    (192, 128): Shape(64, 3, 128, 1, 2, 1, 3, 5, 2),
    (192, 192): Shape(64, 3, 64, 3, 4, 1, 2, 5, 2),
    (256, 256): Shape(128, 2, 128, 2, 4, 2, 2, 3, 2),
}
INT8_SHAPES = {
    (64, 64): Shape(64, 1, 64, 1, 4, 1, 3, 5, 4),
    (128, 128): Shape(128, 1, 128, 1, 2, 1, 3, 4, 4, early=True),
    (256, 128): Shape(128, 2, 128, 1, 2, 1, 3, 4, 3),
    (256, 192): Shape(128, 2, 64, 3, 4, 1, 2, 4, 2),
    (256, 256): Shape(128, 2, 128, 2, 2, 2, 2, 4, 4),
}


def unsupported(request: Request) -> str | None:
    q, v = request.q, request.v
    capped = request.softcap is not None
    reason = unfit(q.device, q.dtype, q.shape[3], v.shape[3], request.scores, capped, request.tile)
    if reason is not None:
        return reason
    axes = (blocks(request, shape_of(request)), sections(request))
    if max(axes) > MAX_GRID_Y:
        return f"{axes[0]:,} blocks of rows in {axes[1]:,} sections: a launch can have {MAX_GRID_Y:,} of each"
    return None


@cache
def unfit(device, dtype, head_dim: int, v_head_dim: int, scores: str, capped: bool, tile: TileShape) -> str | None:
    """Why such calls, of whatever lengths, are not for the kernel."""
    if device.type != "cuda":
        return f"tensors are on {device.type}; the Hopper kernel needs an H100 or H200"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return f"{torch.cuda.get_device_name(device)} is not a Hopper GPU (compute capability 9.0)"
    if interpreted():
        return "Gluon kernels do not run in Triton's interpreter (TRITON_INTERPRET=1)"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype} is neither float16 nor bfloat16"
    largest = max(shapes(scores))[0]
    for n in (head_dim, v_head_dim):
        if n % 8 or n > largest:
            return f"head dim {n} is not a multiple of 8 up to {largest}"
    if scores == "int8" and capped:
        return "int8 scores lack q . mean(k) here, which softcap would have to see"
    if (tile.rows, tile.keys) != (ROWS.value, KEYS.value):
        return f"tile {tile}: a consumer warpgroup decides for {ROWS.value}x{KEYS.value} tiles"
    return None


def reads_pages(request: Request) -> bool:
    return request.pages_are_tiles


def attention(request: Request):
    v = aligned(request.v)
    if request.scores == "int8":
        rounded = prepare(request)
        q, k, scales = rounded.q8, rounded.k8, (rounded.q_scale, rounded.q_shift, rounded.k_scale)
    else:
        q, k, scales = aligned(request.q), aligned(request.k), (None, None, None)
    absolute, gap = (x if x is None else x.contiguous() for x in (request.gate.absolute, request.gate.gap))
    out, lse, kept, candidates = request.new_outputs()
    written = aligned(out)
    with device_guard(q):
        entries = lengths = order = None
        if request.blocks is not None:
            entries, lengths, candidates = schedule(request, shape_of(request).consumers, forced=True)
            order = longest_first(lengths, sections(request))
        plan = plan_of(request, q, k, v, written, scales, 0 if entries is None else entries.shape[2])
        optional = (
            absolute, gap, request.spans, entries, lengths, order, request.block_table, request.packed, request.sinks,
            *scales,
        )  # fmt: skip
        launch = launches.of(plan.key, (written, lse, *optional))
        launch(
            plan.grid, *plan.descriptors(q, k, v, Aligned if launch.compiled else TensorDescriptor), written, lse, kept,
            candidates, *[lse if x is None else x for x in optional], *plan.numbers, num_warps=4,
            maxnreg=plan.registers,
        )  # fmt: skip
    if written.data_ptr() != out.data_ptr():
        out.copy_(written)
    return out, lse, kept, candidates


class Plan(NamedTuple):
    """A launch but for addresses, which calls of the same shapes, strides and options share."""

    key: tuple | None  # of the compiled kernel, where one is kept
    grid: tuple[int, int, int]
    slabs: tuple[tuple, ...]  # of Q, K and V, for their descriptors
    numbers: tuple  # the kernel's arguments behind its pointers
    registers: int

    def descriptors(self, q, k, v, kind: type[TensorDescriptor]) -> list[TensorDescriptor]:
        return [kind(x, *slab) for x, slab in zip((q, k, v), self.slabs, strict=True)]


def plan_of(request: Request, q, k, v, out, scales: tuple[torch.Tensor | None, ...], room: int) -> Plan:
    """For Q, K, V and the output as the kernel takes them. A stream of block lists has room for so many entries."""
    shape, count, (heads, rows) = shape_of(request), sections(request), q.shape[1:3]
    absolute, gap, table = request.gate.absolute, request.gate.gap, request.block_table
    variant = variant_of(
        shape, request.batch * heads // count, heads, heads // k.shape[1], v.shape[3], request.causal,
        request.keep_sink, *(x is not None for x in (absolute, gap, request.spans, request.blocks, request.window)),
        *(x is not None for x in (request.softcap, request.sinks, *scales[:2], table, request.packed)),
    )  # fmt: skip
    strides = (0 if table is None else table.stride(0), *(stride // CHUNK.value for stride in out.stride()[:3]))
    numbers = (
        request.scale, request.softcap or 0.0, request.window or 0, request.q_offset, rows, request.k_rows,
        request.query_tiles, *(0 if x is None else x.shape[-1] for x in (absolute, gap, scales[2])), room, *strides,
        variant,
    )  # fmt: skip
    q_rows, keys, columns = ROWS.value, KEYS.value, shape.columns
    slabs = slab(q, q_rows, columns), slab(k, keys, columns), slab(v, keys // shape.v_parts, shape.v_columns)
    grid = (variant.section, blocks(request, shape), count)
    key = (variant, v.dtype, v.device) if int32(strides) else None
    return Plan(key, grid, slabs, numbers, shape.registers)


def longest_first(lengths: torch.Tensor, sections: int) -> torch.Tensor:
    """The order in which the streams of each section start."""
    return lengths.view(sections, -1).argsort(descending=True)


def blocks(request: Request, shape: Shape) -> int:
    """Of query tiles, one a program."""
    return -(-request.query_tiles // shape.consumers)


def shapes(scores: str) -> dict[tuple[int, int], Shape]:
    return INT8_SHAPES if scores == "int8" else SHAPES


def shape_of(request: Request) -> Shape:
    return narrowest(request.scores, request.k.shape[3], request.v.shape[3])


@cache
def narrowest(scores: str, head_dim: int, v_head_dim: int) -> Shape:
    return next(shape for (d, v_d), shape in shapes(scores).items() if head_dim <= d and v_head_dim <= v_d)


@cache
def variant_of(shape: Shape, section: int, heads: int, group: int, head_dim: int, *kinds: bool) -> Variant:
    return Variant(
        section, heads, group, head_dim, shape.columns, shape.slabs, shape.v_columns, shape.v_slabs, shape.parts,
        shape.v_parts, shape.consumers, shape.k_stages, shape.v_stages, shape.early, *kinds,
    )  # fmt: skip


class Aligned(TensorDescriptor):
    """A descriptor of what `aligned` returned, not looked at again: three take a tenth of a call's host time."""

    def __post_init__(self):
        pass


def slab(x: torch.Tensor, rows: int, columns: int) -> tuple:
    """A descriptor of a slab of x but for the base: (shape, strides, block, layout)."""
    return x.shape, x.stride(), [1, 1, rows, columns], tile_layout(rows, columns, x.dtype)


@cache
def tile_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Shared memory of a slab of Q, K or V. Computing all three anew took 0.035 ms of a call's host time."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], ELEMENTS[dtype])


def sections(request: Request) -> int:
    """Sections of a call."""
    return request.batch * (request.k.shape[1] // section_kv_heads(request.k, request.v, request.k_rows))


def section_kv_heads(k: torch.Tensor, v: torch.Tensor, keys: int) -> int:
    """KV heads of a section: as many of a sequence's `keys` in K [.., Hkv, .., D] and V [.., Hkv, .., Dv] as L2 holds,
    equally many in each.
    """
    fit = SECTION_BYTES // (keys * (k.shape[3] + v.shape[3]) * v.element_size())
    return largest_divisor(k.shape[1], max(1, min(fit, k.shape[1])))


@cache
def largest_divisor(n: int, most: int) -> int:
    return max(divisor for divisor in range(1, most + 1) if n % divisor == 0)


def section_limits(kv_heads: int, columns: int, itemsize: int) -> set[int]:
    """The longest Tk of each value of `section_kv_heads` but 1, which has none; a key and its value together have
    `columns` elements of `itemsize` bytes.
    """
    return {SECTION_BYTES // (n * columns * itemsize) for n in range(2, kv_heads + 1) if kv_heads % n == 0}
