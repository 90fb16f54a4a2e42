"""Several sequences of different lengths in one call: their queries side by side, their keys in pages."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch

from .request import UNBOUNDED
from .words import short


class Packed(NamedTuple):
    """Where sequences lie in queries [1, Hq, tokens, D]; made by `pack`, once for all layers of a batch."""

    table: torch.Tensor  # int32 [S, 2]: first row and number of rows
    spans: torch.Tensor  # int32 [S, 4], as `block_sparse_attention` takes them
    rows: int  # most of one sequence
    keys: int  # most of one sequence
    end: int  # the row behind the last


def pack(
    starts: Sequence[int], rows: Sequence[int], lengths: Sequence[int], device: torch.device | str = "cpu"
) -> Packed:
    """Sequences whose queries begin at rows `starts`, `rows` of them, the last of `lengths` keys each.

    Sequences may go on: a chunk that ends inside a query tile is no whole tile. One copy to the device, which nothing
    waits for. Raises TypeError for what are no whole numbers, ValueError where sequences overlap, are empty, or have
    more queries than keys.
    """
    for name, numbers in (("starts", starts), ("rows", rows), ("lengths", lengths)):
        listed = isinstance(numbers, Sequence) or hasattr(numbers, "__array__")
        if not listed or not all(isinstance(n, Integral) for n in numbers):
            raise TypeError(f"{name} must be a list of whole numbers, got {short(numbers)}")
    if not len(starts) == len(rows) == len(lengths):
        raise ValueError(f"{len(starts)} starts, {len(rows)} rows and {len(lengths)} lengths are not of one batch")
    found = sorted(zip(starts, rows, lengths, strict=True))
    if not found:
        raise ValueError("there is no sequence to pack")
    behind = 0
    for start, count, length in found:
        if not 0 < count <= length:
            raise ValueError(f"a sequence of {count} queries and {length} keys cannot be packed")
        if start < behind:
            raise ValueError(f"a sequence begins at row {start}, before row {behind}, where the one before it ends")
        behind = start + count
    if max(behind, *lengths) >= UNBOUNDED:
        raise ValueError(f"packed sequences end before row and key {UNBOUNDED:,}, got {max(behind, *lengths):,}")
    host = torch.tensor(
        [[n - count, 0, n, UNBOUNDED, start, count] for start, count, n in zip(starts, rows, lengths, strict=True)],
        dtype=torch.int32, pin_memory=torch.device(device).type == "cuda",
    )  # fmt: skip
    table = host.to(device, non_blocking=True)
    return Packed(table[:, 4:].contiguous(), table[:, :4].contiguous(), max(rows), max(lengths), behind)
