"""The Hopper backend's part of the shortcut (shortcut.py): a call of a known signature, launched.

What is left is what calls cannot share: outputs, descriptors of where Q, K and V lie, integers and scales for int8
scores, the schedule of block lists, and the launch. The kernel writes its logsumexp and counts in any case: where
nobody asked for them, all to one piece of memory that nobody reads.
"""

from __future__ import annotations

from functools import reduce
from math import prod
from operator import or_
from typing import NamedTuple

import torch
from torch import empty_strided as empty  # half the time of new_empty

from . import int8, schedule
from .hopper import Aligned, Plan, launches, longest_first, plan_of, reads_pages, sections, shape_of
from .launch import aligned, device_guard
from .relaunch import Relaunch
from .request import Request, fill_padding, shares_memory, written


class Again(NamedTuple):
    """Calls of one signature."""

    launch: Relaunch
    plan: Plan
    rounding: int8.Again | None  # of int8 scores
    lists: schedule.Plan | None
    sections: int
    place: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides of an output
    rows: tuple[tuple[int, ...], tuple[int, ...]]  # of the logsumexp
    tiles: tuple[tuple[int, ...], tuple[int, ...]]  # of the counts
    unread: int  # elements of the largest of these
    want_lse: bool
    want_counts: bool
    keeps_rest: bool  # rows of `out` that belong to no sequence

    def __call__(self, q, k, v, absolute, gap, spans, indices, counts, sinks, out, table, packed):
        """(out, lse, kept, candidates), with None for what is not wanted; None alone where tensors do not lie as the
        compiled kernel takes them.
        """
        logits = sinks if sinks is None else sinks.detach().float().contiguous()
        pointers = [0 if x is None else x.data_ptr() for x in (absolute, gap, spans, table, packed, logits, out)]
        if reduce(or_, pointers, q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
            return None
        if out is not None and shares_memory(out, q, k, v):
            return None
        absolute, gap, span, table, sequences, sinks, place = pointers  # `logits` lives on until the launch
        lse = kept = candidates = None
        unread = entries = lengths = order = 0
        scales = (0, 0, 0)
        with device_guard(q):
            if out is None:
                out = empty(*self.place, dtype=q.dtype, device=q.device)
                place = out.data_ptr()
            else:
                written(out)
            if self.want_lse:
                lse = empty(*self.rows, dtype=torch.float32, device=q.device)
            if self.want_counts:
                kept = empty(*self.tiles, dtype=torch.int32, device=q.device)
                candidates = empty(*self.tiles, dtype=torch.int32, device=q.device)
            if not (self.want_lse and self.want_counts):
                nobodys = empty((self.unread,), (1,), dtype=torch.int32, device=q.device)
                unread = nobodys.data_ptr()
            if spans is not None:
                fill_padding(None if self.keeps_rest else out, lse, kept, candidates)
            if self.rounding is not None:
                q, k, scales, floats = self.rounding(q, k, span or None)  # `floats` live on until the launch
            if self.lists is not None:
                streams = self.lists.run(indices, counts, spans, self.want_counts)
                starts = longest_first(streams.lengths, self.sections)
                entries, lengths, order = (x.data_ptr() for x in (streams.entries, streams.lengths, starts))
                candidates = streams.candidates if self.want_counts else None
            results = [unread if x is None else x.data_ptr() for x in (lse, kept, candidates)]
            optional = (absolute, gap, span, entries, lengths, order, table, sequences, sinks, *scales)
            self.launch(
                self.plan.grid, (q, k, v), place, *results, *[at or place for at in optional], *self.plan.numbers
            )  # fmt: skip
        return out, lse, kept, candidates


def again(request: Request) -> Again | None:
    """For calls like one that was served, or None where they need more than this, or have no compiled kernel."""
    q, k, v, out, blocks = request.q, request.k, request.v, request.out, request.blocks
    if request.block_table is not None and not reads_pages(request):
        return None
    rounding, scales = None, (None, None, None)
    if request.scores == "int8":
        preparation = int8.plan_of(request)
        rounding, (made, _) = preparation.again(), preparation.new("meta")
        q, k, scales = made.q8, made.k8, (made.q_scale, made.q_shift, made.k_scale)
        if rounding is None:
            return None
    place = request.new_output() if out is None else out
    flat = [request.gate.absolute, request.gate.gap, request.spans, request.packed]
    flat += [blocks.indices, blocks.counts] if blocks else []
    as_they_are = all(aligned(x) is x for x in (q, k, v, place)) and all(x is None or x.is_contiguous() for x in flat)
    if place.stride(-1) != 1 or not as_they_are:
        return None
    lists = None if blocks is None else schedule.plan_of(request, shape_of(request).consumers, forced=True)
    plan = plan_of(request, q, k, v, place, scales, 0 if lists is None else lists.streams[2])
    compiled = launches.kernels.get(plan.key)
    rows, tiles = q.shape[:3], (request.batch, q.shape[1], request.query_tiles)
    strides = [(n[1] * n[2], n[2], 1) for n in (rows, tiles)]
    return compiled and Again(
        Relaunch(compiled.kernel, plan.slabs, Aligned), plan, rounding, lists, sections(request),
        (place.shape, place.stride()), (rows, strides[0]), (tiles, strides[1]), max(prod(rows), prod(tiles)),
        request.want_lse, request.want_counts, out is not None and request.packed is not None,
    )  # fmt: skip
