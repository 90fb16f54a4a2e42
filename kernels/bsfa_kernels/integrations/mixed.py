"""int8 scores in most heads of a call and exact ones in the others: one launch for each, their results put together.

A KV head's keys are rounded for all of its query heads, so those go together: where one of them is to stay exact, all
do. What that costs over one launch: neighbouring heads are views, others are copied, outputs are copied together, and
each launch ends with programs of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..api import Attention, block_sparse_attention
from ..gates import Gate


def attention(q, k, v, gate: Gate, exact_heads: Iterable[int], **options) -> Attention:
    """`block_sparse_attention` with int8 scores but in the groups of query heads that hold one of `exact_heads`.

    Arguments and errors as there; `sinks` are shared out.
    """
    group = q.shape[1] // k.shape[1]
    exact = {head // group for head in exact_heads}
    sinks, out = options.pop("sinks", None), options.pop("out", None)
    parts = []
    for scores, wanted in (("int8", False), ("exact", True)):
        runs = list(_runs(head for head in range(k.shape[1]) if (head in exact) == wanted))
        if not runs:
            continue
        rows = [slice(run.start * group, run.stop * group) for run in runs]
        own = dict(options) if sinks is None else options | {"sinks": _taken(sinks, rows, 0)}
        own_gate = gate.map(lambda x, rows=rows: _taken(x, rows, 0))
        result = block_sparse_attention(
            _taken(q, rows, 1), _taken(k, runs, 1), _taken(v, runs, 1), own_gate, scores=scores, **own
        )
        parts.append((rows, result))
    if len(parts) == 1:
        found = parts[0][1]
    else:
        found = Attention(*(_joined([(rows, result[i]) for rows, result in parts]) for i in range(4)))
    return found if out is None else found._replace(out=out.copy_(found.out))


def _runs(heads: Iterable[int]) -> Iterator[slice]:
    """Heads in order as slices of neighbours."""
    start = end = None
    for head in heads:
        if head != end:
            if start is not None:
                yield slice(start, end)
            start = head
        end = head + 1
    if start is not None:
        yield slice(start, end)


def _taken(x: torch.Tensor, slices: list[slice], axis: int) -> torch.Tensor:
    parts = [x.narrow(axis, each.start, each.stop - each.start) for each in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _joined(parts: list) -> torch.Tensor | None:
    """Results of some heads each, [B, heads, ...], in the order of all heads."""
    if parts[0][1] is None:
        return None
    pieces = []
    for rows, result in parts:
        at = 0
        for each in rows:
            pieces.append((each.start, result.narrow(1, at, each.stop - each.start)))
            at += each.stop - each.start
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda item: item[0])], 1)
