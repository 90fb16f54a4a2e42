"""Streams made from block lists, against a literal transcription of the visiting order."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from bsfa_kernels import Gate, TileShape
from bsfa_kernels.request import Request
from bsfa_kernels.schedule import schedule
from bsfa_kernels.tiles import visit
from kernel_cases import Case

TILE = TileShape(16, 32)
CASES = [
    Case(2, 2, 1, 173, 173, 16, TILE, blocks="shuffled"),
    Case(1, 2, 2, 40, 170, 16, TILE, q_offset=100, blocks="ordered"),
    Case(3, 2, 1, 150, 150, 16, TILE, padded=True, blocks="shuffled"),
    Case(1, 1, 1, 1, 1, 16, TILE, blocks="shuffled"),
]
LONG = Case(1, 1, 1, 16 * 40, 32 * 300, 16, TILE, q_offset=32 * 280, blocks="shuffled")  # several blocks of a scan


def trials():
    """(case, width, forced). The interpreter is slow: what other trials hold is left out."""
    for case in CASES:
        for causal, keep_sink in itertools.product((True, False), repeat=2):
            changed = replace(case, causal=causal, keep_sink=keep_sink)
            yield from ((changed, 1, False), (changed, 3, True))
            if keep_sink:
                yield changed, 2, True
    for causal in (True, False):
        yield from ((replace(LONG, causal=causal), 1, False), (replace(LONG, causal=causal), 3, True))


def request_of(case: Case) -> Request:
    q, k, v = case.inputs("cpu")
    options = case.options("cpu")
    return Request(
        q, k, v, Gate(), 1.0, case.causal, case.tile, case.keep_sink, options.get("q_offset", 0), options.get("spans"),
        False, False, case.block_lists("cpu"),
    )  # fmt: skip


def streams(request: Request, width: int, forced: bool) -> tuple[dict, torch.Tensor]:
    """({(plane, stream): [(key tile, forced bits, candidate bits)]}, candidates a query tile), one by one."""
    found, candidates = {}, torch.zeros_like(request.blocks.counts)
    for b, span in enumerate(request.host_spans()):
        for h in range(request.q.shape[1]):
            wanted: dict[int, list] = {}
            for t, query_tile in span.query_tiles(request.q.shape[2], request.tile):
                plan = visit(query_tile, span.length, request.causal, request.keep_sink, request.tile)
                count = max(int(request.blocks.counts[b, h, t]), 0)
                listed = {*request.blocks.indices[b, h, t, :count].tolist()} & {*plan.candidates()}
                if span.whole(query_tile, request.q.shape[2], request.tile):
                    candidates[b, h, t] = len(listed)
                wanted.setdefault(t // width, []).append((t % width, plan, listed))
            for stream, members in wanted.items():
                plane = b * request.q.shape[1] + h
                found[plane, stream] = _merge(members, request.causal, forced)
    return found, candidates


def _merge(members, causal: bool, forced: bool) -> list:
    """Entries of one stream: the sink (or, not causal, the diagonals and then the sink), then right to left."""
    sink = any(plan.sink for _, plan, _ in members)
    diagonals = sorted({plan.first_diagonal for _, plan, _ in members}, reverse=True)

    def bits(chosen) -> int:
        return sum(1 << w for w, plan, listed in members if chosen(plan, listed))

    entries = []
    if forced and not causal:
        entries += [(j, bits(lambda plan, _, j=j: plan.first_diagonal == j), 0) for j in diagonals]
    if forced and sink:
        entries.append((0, bits(lambda plan, _: plan.sink or (causal and plan.first_diagonal == 0)), 0))
    for j in range(max(plan.end_keys for _, plan, _ in members) - 1, -1, -1):
        own = bits(lambda plan, _, j=j: plan.first_diagonal == j) if forced and causal and not (sink and j == 0) else 0
        listed = bits(lambda _, listed, j=j: j in listed)
        if own or listed:
            entries.append((j, own, listed))
    return entries


@pytest.mark.parametrize("case, width, forced", list(trials()), ids=str)
def test_streams(case, width, forced):
    request = request_of(case)
    made = schedule(request, width, forced)
    expected, candidates = streams(request, width, forced)
    assert torch.equal(made.candidates, candidates)
    for plane in range(made.entries.shape[0]):
        for stream in range(made.entries.shape[1]):
            entries = made.entries[plane, stream, : made.lengths[plane, stream]].tolist()
            low = (1 << width) - 1
            got = [(entry >> 2 * width, entry >> width & low, entry & low) for entry in entries]
            assert got == expected.get((plane, stream), []), (plane, stream)
