"""How the producer warp and the consumer warpgroups of the Hopper kernel hand over slabs of Q, K and V, and vote.

The producer brings Q and then, for every key tile of the program's stream, K and V by TMA, in pieces, each in a slot:
of K slabs of 64 or 128 columns, as many as the head dim needs; of V parts of the tile's keys with all their columns.
Barriers, for each of K's and V's slots, i the number of a piece in the stream:

    producer                                          consumer
    returned: all consumers arrived for i - stages    wait full(i), products read the piece
    expect bytes on full(i), start TMA       ------>  returned(i): arrive, when its own products are done

What a consumer does for a tile is one chain, and its length is the kernel's speed. Where that was faster (NOTES.md), it
waits early, while QK^T runs anyway, and without gates it gives V back there too:

    plain       wait K i   QK^T i         return K i   vote   wait V i   softmax, PV of i, if kept   return V i
    early       QK^T i || wait V i, K i + 1                   return K i   vote   softmax, PV of i   return V i
    and late    QK^T i || return V i - 1, wait V i, K i + 1   return K i          softmax, PV of i

`full` are mbarriers in shared memory; `returned` are hardware barriers, one arrival a warp, because Triton puts two
barriers of a whole warpgroup around an mbarrier's arrive. Slabs of K go back one by one, as QK^T is done with each. A
consumer lets a piece pass only after it has landed, so no slot is written twice at a time. A vote is one more hardware
barrier, which hands every warp the OR of all threads.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .hopper_stream import KEYS, ROWS, entry_after, stream_tile

# Of a shared_memory_descriptor; public since Triton 3.9.
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

# Triton 3.9 renamed it.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

# Of the 16 hardware barriers Triton takes the first four.
RETURNED = gl.constexpr(4)  # and as many as K and V have slots
VOTES = gl.constexpr(13)  # and one for each consumer


class Buffers(NamedTuple):
    """Shared memory: slabs, and the mbarriers that say when they have landed."""

    q: object
    k: object
    v: object
    q_full: object
    k_full: object
    v_full: object


@gluon.jit
def run_ptx(PTX: gl.constexpr, x):
    """One instruction in every thread, with x as operand 1."""
    ASM: gl.constexpr = PTX + "; mov.b32 $0, $1;"
    return gl.inline_asm_elementwise(ASM, "=r,r,~{memory}", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def give_back(slot, VARIANT: gl.constexpr):
    """This warp is done with a slot; slots are counted through K's and then V's."""
    PTX: gl.constexpr = "bar.arrive $1, " + threads(VARIANT)
    run_ptx(PTX, RETURNED + slot)


@gluon.jit
def wait_returned(slot, VARIANT: gl.constexpr):
    PTX: gl.constexpr = "bar.sync $1, " + threads(VARIANT)
    run_ptx(PTX, RETURNED + slot)


@gluon.constexpr_function
def threads(variant) -> str:
    """That meet where a slot is returned."""
    return str(variant.consumers * 128 + 32)


@gluon.jit
def slot_of(i, c: gl.constexpr, pieces: gl.constexpr, stages: gl.constexpr):
    """Slot and phase of piece c of the stream's i-th tile of `pieces`: slabs of K, parts of V."""
    piece = i * pieces + c
    return piece % stages, piece // stages & 1


@gluon.jit
def wait_for(full, i, pieces: gl.constexpr, stages: gl.constexpr):
    for c in gl.static_range(pieces):
        slot, phase = slot_of(i, c, pieces, stages)
        mbarrier.wait(full.index(slot), phase)


@gluon.jit
def give_back_k(i, c: gl.constexpr, VARIANT: gl.constexpr):
    slot, phase = slot_of(i, c, VARIANT.slabs, VARIANT.k_stages)
    give_back(slot, VARIANT)


@gluon.jit
def give_back_v(i, VARIANT: gl.constexpr):
    PARTS: gl.constexpr = VARIANT.v_parts
    for h in gl.static_range(PARTS):
        slot, phase = slot_of(i, h, VARIANT.v_parts, VARIANT.v_stages)
        give_back(VARIANT.k_stages + slot, VARIANT)


@gluon.jit
def let_k_pass(buffers, i, VARIANT: gl.constexpr):
    SLABS: gl.constexpr = VARIANT.slabs
    wait_for(buffers.k_full, i, VARIANT.slabs, VARIANT.k_stages)
    for c in gl.static_range(SLABS):
        give_back_k(i, c, VARIANT)


@gluon.jit
def let_v_pass(buffers, i, VARIANT: gl.constexpr):
    """V of a tile is given back, used or not. Behind early waits this one is over long ago, but a part of what was
    measured (NOTES.md).
    """
    wait_for(buffers.v_full, i, VARIANT.v_parts, VARIANT.v_stages)
    give_back_v(i, VARIANT)


@gluon.jit
def meanwhile(buffers, i, length, VARIANT: gl.constexpr):
    """What an early consumer does while QK^T of the i-th tile runs; V goes back first, or K might wait for it."""
    if VARIANT.returns_v_late:
        if i > 0:
            let_v_pass(buffers, i - 1, VARIANT)
    wait_for(buffers.v_full, i, VARIANT.v_parts, VARIANT.v_stages)
    if i + 1 < length:
        wait_for(buffers.k_full, i + 1, VARIANT.slabs, VARIANT.k_stages)


@gluon.jit
def fetch(desc, batch, head, row, column, full, buffers, slot, columns: gl.constexpr, SLABS: gl.constexpr):
    """One slot, of SLABS slabs side by side."""
    mbarrier.expect(full.index(slot), SLABS * desc.block_type.nbytes)
    for c in gl.static_range(SLABS):
        at = [batch, head, row, column + c * columns]
        tma_load(desc, at, full.index(slot), buffers.index(slot * SLABS + c))


@gluon.jit
def producer(q_desc, k_desc, v_desc, buffers, place, span, stream, VARIANT: gl.constexpr):
    CONSUMERS: gl.constexpr = VARIANT.consumers
    SLABS: gl.constexpr = VARIANT.slabs
    V_PARTS: gl.constexpr = VARIANT.v_parts
    if stream.length > 0:
        mbarrier.expect(buffers.q_full, VARIANT.consumers * VARIANT.slabs * q_desc.block_type.nbytes)
        for w in gl.static_range(CONSUMERS):
            for c in gl.static_range(SLABS):
                row = place.row + place.first * ROWS - span.q_first + w * ROWS
                at = [place.batch, place.head, row, c * VARIANT.columns]
                tma_load(q_desc, at, buffers.q_full, buffers.q.index(w * VARIANT.slabs + c))
    if VARIANT.lists:
        following = gl.load(stream.entries)
    for i in range(stream.length):
        if VARIANT.lists:
            tile = following >> 2 * VARIANT.consumers
            following = entry_after(stream.entries, i, stream.length)
        else:
            tile = stream_tile(i, stream, VARIANT)
        sequence = place.batch
        row = tile * KEYS - span.k_offset
        if VARIANT.paged:
            sequence = gl.load(stream.pages + tile)
            row = tile * 0
        for c in gl.static_range(SLABS):
            slab = i * VARIANT.slabs + c
            slot = slab % VARIANT.k_stages
            if slab >= VARIANT.k_stages:
                wait_returned(slot, VARIANT)
            fetch(k_desc, sequence, place.kv_head, row, c * VARIANT.columns, buffers.k_full, buffers.k, slot,
                  VARIANT.columns, 1)  # fmt: skip
        for h in gl.static_range(V_PARTS):
            part = i * VARIANT.v_parts + h
            slot = part % VARIANT.v_stages
            if part >= VARIANT.v_stages:
                wait_returned(VARIANT.k_stages + slot, VARIANT)
            fetch(v_desc, sequence, place.kv_head, row + h * (KEYS // VARIANT.v_parts), 0, buffers.v_full, buffers.v,
                  slot, VARIANT.v_columns, VARIANT.v_slabs)  # fmt: skip
    # A program ends with its barriers as it found them.
    slabs = stream.length * VARIANT.slabs
    for slab in range(gl.maximum(slabs - VARIANT.k_stages, 0), slabs):
        wait_returned(slab % VARIANT.k_stages, VARIANT)
    parts = stream.length * VARIANT.v_parts
    for part in range(gl.maximum(parts - VARIANT.v_stages, 0), parts):
        wait_returned(VARIANT.k_stages + part % VARIANT.v_stages, VARIANT)


@gluon.jit
def either(a, b):
    return a | b


@gluon.jit
def anyone(flags, WG: gl.constexpr):
    """Whether a flag [ROWS, 4] is set in some thread of the consumer: every thread votes for its own, one barrier asks.

    A tensor's values cannot become a scalar without shuffles and shared memory; they do by way of a register that only
    PTX knows (`declare_vote`).
    """
    own = gl.reduce(flags.reshape([4, 2, 8, 4]), 1, either)
    gl.inline_asm_elementwise("mov.b32 bsfa_vote, $1; mov.b32 $0, $1;", "=r,r", [own], gl.int32, False, 1)
    PTX: gl.constexpr = (
        "{.reg .pred mine, all; setp.ne.b32 mine, bsfa_vote, 0; barrier.cta.red.or.pred all, $1, 128, mine; "
        "selp.b32 $0, 1, 0, all;}"
    )
    return gl.inline_asm_elementwise(PTX, "=r,r,~{memory}", [gl.to_tensor(VOTES + WG)], gl.int32, False, 1) == 1


@gluon.jit
def declare_vote(x):
    PTX: gl.constexpr = ".reg .b32 bsfa_vote; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(PTX, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def allocate_buffers(q_desc, k_desc, v_desc, VARIANT: gl.constexpr):
    CONSUMERS: gl.constexpr = VARIANT.consumers
    K_STAGES: gl.constexpr = VARIANT.k_stages
    V_STAGES: gl.constexpr = VARIANT.v_stages
    COLUMNS: gl.constexpr = VARIANT.columns
    V_COLUMNS: gl.constexpr = VARIANT.v_columns
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    buffers = Buffers(
        gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS * VARIANT.slabs, 1, 1, ROWS, COLUMNS], q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [K_STAGES, 1, 1, KEYS, COLUMNS], k_desc.layout),
        gl.allocate_shared_memory(
            v_desc.dtype, [V_STAGES * VARIANT.v_slabs, 1, 1, KEYS // VARIANT.v_parts, V_COLUMNS], v_desc.layout
        ),
        gl.allocate_shared_memory(gl.int64, [1], bars),
        gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], bars),
        gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], bars),
    )
    mbarrier.init(buffers.q_full, count=1)
    for stage in gl.static_range(K_STAGES):
        mbarrier.init(buffers.k_full.index(stage), count=1)
    for stage in gl.static_range(V_STAGES):
        mbarrier.init(buffers.v_full.index(stage), count=1)
    fence_async_shared()
    return buffers
