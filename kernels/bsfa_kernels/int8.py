"""quantise.prepare as Triton kernels: Q read once, K twice, in three launches; on the CPU in Triton's interpreter.

    _sum_keys           up to SPLITS partial sums of every KV head's valid keys
    _quantise_keys      the mean from those, then key tiles: rotated, one scale, rounded
    _quantise_queries   queries: rotated, a scale a row, rounded, and q . mean where it is asked for

Rotations are matrix products of the inputs as they are, so exact but for the order of float32 sums; the mean is taken
off behind its own. Differs from quantise.prepare where such a sum stands within rounding of a half: by one step.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import triton
from torch import empty_strided as empty

from .int8_kernel import quantise_keys, quantise_queries, sum_keys
from .launch import Launches, device_guard, int32
from .quantise import Prepared, columns, key_tiles, rotation_block, unit
from .relaunch import Relaunch
from .request import Request

SPLITS = 64
ROWS = 64  # of Q in a step
SUMMED = 64  # rows of K in a step
MOST_STEPS = 8  # tiles that one program takes, so that it makes its rotation once for all of them
PROGRAMS = 1024  # enough to fill a GPU
LINE = 32  # floats of a cache line, at whose begin each part of memory lies


class Step(NamedTuple):
    """A launch but for addresses."""

    launches: Launches
    key: tuple  # of the compiled kernel
    grid: tuple[int, int, int]
    numbers: tuple  # the kernel's arguments behind its pointers
    options: dict


class Plan(NamedTuple):
    """A preparation but for addresses, which calls of the same shapes, strides and options share. What it makes besides
    integers lies in one piece of memory.
    """

    steps: tuple[Step, Step, Step]
    integers: tuple[tuple, tuple]  # shape and strides of q8 and of k8
    floats: int  # of that memory
    parts: tuple[tuple | None, ...]  # of it: shape, strides and start of sums, mean, q_scale, k_scale, q_shift or None

    def allocate(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q8, k8, memory of all else)."""
        q8, k8 = (empty(*place, dtype=torch.int8, device=device) for place in self.integers)
        return q8, k8, empty((self.floats,), (1,), dtype=torch.float32, device=device)

    def new(self, device: torch.device | str) -> tuple[Prepared, torch.Tensor]:
        """(what is to be filled, sums of keys)."""
        q8, k8, memory = self.allocate(device)
        sums, mean, q_scale, k_scale, q_shift = (x if x is None else memory.as_strided(*x) for x in self.parts)
        return Prepared(q8, q_scale, k8, k_scale, mean, q_shift), sums

    def run(self, q: torch.Tensor, k: torch.Tensor, spans: torch.Tensor | None) -> Prepared:
        made, sums = self.new(q.device)
        for step, pointers in zip(self.steps, _pointers(q, k, spans, sums, *made), strict=True):
            step.launches.of(step.key, pointers)(step.grid, *pointers, *step.numbers, **step.options)
        return made

    def again(self) -> Again | None:
        """The same for addresses, where all kernels were compiled."""
        compiled = [step.launches.kernels.get(step.key) for step in self.steps]
        return Again(self, tuple(compiled)) if all(compiled) else None


class Again(NamedTuple):
    """The preparation of calls of one signature (shortcut.py). All their addresses are multiples of 16."""

    plan: Plan
    compiled: tuple[Relaunch, Relaunch, Relaunch]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, spans: int | None):
        """(q8, k8, addresses of q_scale, q_shift or None, and k_scale, the memory that these lie in)."""
        q8, k8, memory = self.plan.allocate(q.device)
        begin = memory.data_ptr()
        sums, mean, q_scale, k_scale, q_shift = (x if x is None else begin + 4 * x[2] for x in self.plan.parts)
        pointers = _pointers(
            q.data_ptr(), k.data_ptr(), spans, sums, q8.data_ptr(), q_scale, k8.data_ptr(), k_scale, mean, q_shift
        )
        for launch, step, own in zip(self.compiled, self.plan.steps, pointers, strict=True):
            launch(step.grid, (), *own, *step.numbers)
        return q8, k8, (q_scale, q_shift, k_scale), memory


def _pointers(q, k, spans, sums, q8, q_scale, k8, k_scale, mean, q_shift) -> tuple[tuple, tuple, tuple]:
    """Of each kernel, in its order."""
    return (k, sums, spans), (k, sums, k8, k_scale, mean, spans), (q, mean, q8, q_scale, q_shift)


def prepare(request: Request) -> Prepared:
    """Q and K of the request as int8; any strides with a contiguous last axis."""
    with device_guard(request.q):
        return plan_of(request).run(request.q, request.k, request.spans)


def plan_of(request: Request) -> Plan:
    q, k, keys = request.q, request.k, request.tile.keys
    batch, heads, q_rows, head_dim = q.shape
    kv_heads, k_rows = k.shape[1:3]
    wide, block = columns(head_dim), rotation_block(head_dim)
    tiles, blocks = key_tiles(request), triton.cdiv(q_rows, ROWS)
    split = triton.cdiv(triton.cdiv(k_rows, SPLITS), SUMMED) * SUMMED
    splits = triton.cdiv(k_rows, split)
    k_steps, q_steps = steps(tiles, batch * kv_heads), steps(blocks, batch * heads)
    shape = (head_dim, block, wide // block)
    spanned = request.spans is not None

    def step(launches, x, planes, programs, numbers, constants, given) -> Step:
        strides = x.stride()[:3]
        options = launch_shape(launches.function.__name__, keys, wide)
        key = (x.dtype, x.device, given, tuple(map(specialised, strides)), constants, *options.values())
        return Step(launches, key, (planes, programs, 1), (*strides, *numbers, *constants), options)

    launched = (
        step(sum_keys, k, batch * kv_heads, splits, (k_rows, split), (kv_heads, SUMMED, *shape), spanned),
        step(
            quantise_keys, k, batch * kv_heads, triton.cdiv(tiles, k_steps), (k_rows, splits, tiles, k_steps),
            (kv_heads, keys, SPLITS, *shape, unit(block)), spanned,
        ),
        step(
            quantise_queries, q, batch * heads, triton.cdiv(blocks, q_steps), (q_rows, q_steps),
            (heads, heads // kv_heads, ROWS, *shape, unit(block)), request.shifted,
        ),
    )  # fmt: skip
    rows, planes = (batch, heads, q_rows), (batch, kv_heads)
    sizes = [(*planes, splits, wide), (*planes, head_dim), rows, (*planes, tiles), rows if request.shifted else None]
    parts, floats = [], 0
    for size in sizes:
        parts.append(size and (size, strides_of(size), floats))
        floats += 0 if size is None else -(-prod(size) // LINE) * LINE
    integers = tuple((size, strides_of(size)) for size in ((*rows, wide), (*planes, k_rows, wide)))
    return Plan(launched, integers, floats, tuple(parts))


def specialised(stride: int) -> tuple[bool, bool, bool]:
    """What Triton makes another kernel for."""
    return stride % 16 == 0, stride == 1, int32((stride,))


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def steps(tiles: int, heads: int) -> int:
    """Tiles a program takes."""
    return max(1, min(MOST_STEPS, tiles * heads // PROGRAMS))


def launch_shape(kernel: str, keys: int, columns: int) -> dict:
    """Warps and pipeline stages; shared memory (99 KB) is for tiles up to 128 x 128."""
    if kernel == "_sum_keys":
        return dict(num_warps=4)
    if kernel == "_quantise_keys":
        return dict(num_warps=8 if keys * columns > 128 * 128 else 4, num_stages=2)
    return dict(num_warps=8 if columns > 128 else 4, num_stages=3)
