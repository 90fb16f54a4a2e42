"""tiles.py and the spans of request.py inside a Triton kernel: which rows and key tiles a program has."""

from __future__ import annotations

import triton
import triton.language as tl

from .request import UNBOUNDED

UNBOUNDED_POSITION = tl.constexpr(UNBOUNDED)


@triton.jit
def load_span(spans_ptr, b, q_offset, k_rows):
    """(q_offset, k_offset, key length, query length) of sequence b, the key length not positive where no key is valid;
    see reference.Span.
    """
    if spans_ptr is None:
        return q_offset, 0, k_rows, UNBOUNDED_POSITION
    else:
        q_first = tl.load(spans_ptr + b * 4)
        k_first = tl.load(spans_ptr + b * 4 + 1)
        length = tl.minimum(tl.load(spans_ptr + b * 4 + 2), k_first + k_rows)
        length = tl.where(k_first < length, length, 0)
        return q_first, k_first, length, tl.load(spans_ptr + b * 4 + 3)


@triton.jit
def query_rows(t, q_first, length, q_length, q_rows, ROWS: tl.constexpr):
    """The t-th query tile of a sequence: (its absolute index, its first row in memory, the rows' indices in memory and
    positions, which rows are no padding, whether there is anything to compute, whether gates judge it: Span.whole).
    """
    query_tile = tl.maximum(q_first, 0) // ROWS + t
    first_row = query_tile * ROWS - q_first
    rows = first_row + tl.arange(0, ROWS)
    position = query_tile * ROWS + tl.arange(0, ROWS)
    valid = (rows >= 0) & (rows < q_rows) & (position < q_length)
    first = query_tile * ROWS
    end_row = q_first + q_rows
    inhabited = (length > 0) & (tl.maximum(first, q_first) < tl.minimum(q_length, end_row))
    whole = (q_rows >= ROWS) & (q_first <= first) & (tl.minimum(first + ROWS, q_length) <= end_row)
    return query_tile, first_row, rows, position, valid, inhabited, whole


@triton.jit
def visited(
    query_tile, length, window,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, KEEP_SINK: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """(first and end diagonal key tile, 1 if key tile 0 is forced besides, first and end of the key tiles); see
    tiles.visit.
    """
    last = (length - 1) // KEYS
    first_diagonal = tl.minimum(query_tile * ROWS // KEYS, last)
    end_diagonal = tl.minimum(((query_tile + 1) * ROWS - 1) // KEYS, last) + 1
    first_tile = 0
    if WINDOWED:
        first_tile = tl.minimum(tl.maximum(query_tile * ROWS - window + 1, 0) // KEYS, first_diagonal)
    sink = 0
    if KEEP_SINK:
        sink = tl.where((first_diagonal > 0) & (first_tile == 0), 1, 0)
    return first_diagonal, end_diagonal, sink, first_tile, end_diagonal if CAUSAL else last + 1


@triton.jit
def candidate(i, end_tiles, first_diagonal, end_diagonal):
    """Index of the i-th candidate key tile, right to left, stepping over the diagonal."""
    right = end_tiles - end_diagonal
    return tl.where(i < right, end_tiles - 1 - i, first_diagonal - 1 - (i - right))
