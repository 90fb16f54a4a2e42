"""Groups of neighbouring positions that see one another both ways inside a causal mask, as Gemma 3's images do.

A query then sees what the causal mask (or window) shows, and besides the later positions of its own group. The first
part is the kernel's, gates and all; the second, a few hundred keys, is computed here and never dropped: the softmax of
both is put together from their log-sum-exps. Gates judge what they always do, and a gap gate, whose running maximum
does not know the later keys, keeps what it might have dropped had it known them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..api import Attention, block_sparse_attention

SCORES_AT_ONCE = 2**26
LONGEST = 4096  # rows of a group: what is computed of it grows with their square


class Groups(NamedTuple):
    """`table` int32 [B, n, 2]: first row and number of rows of every group, 0 rows where a sequence has fewer.
    `longest` is the most rows of one.
    """

    table: torch.Tensor
    longest: int

    def of(self, sequence: int) -> Groups:
        """Those of one sequence of the batch."""
        return Groups(self.table[sequence : sequence + 1], self.longest)

    def of_rows(self, rows: int) -> torch.Tensor:
        """int64 [B, rows]: the number of each row's group, -1 in none."""
        row = torch.arange(rows, device=self.table.device)
        start, length = self.table[..., :1], self.table[..., 1:]
        inside = (row >= start) & (row < start + length)  # [B, n, rows]
        return torch.where(inside.any(1), inside.int().argmax(1), -1)


def find(ids: torch.Tensor) -> Groups | None:
    """The groups of `ids` [B, T], rows of one number >= 0 being one group; None where one has a gap, or more than
    LONGEST rows. Waits for the device.
    """
    found, longest = [], 1
    for row in ids.tolist():
        runs: list[list[int]] = []
        seen = set()
        for i, number in enumerate(row):
            if number < 0:
                continue
            if i and row[i - 1] == number:
                runs[-1][1] += 1
            elif number in seen:
                return None
            else:
                seen.add(number)
                runs.append([i, 1])
        found.append(runs)
        longest = max([longest, *(length for _, length in runs)])
    if longest > LONGEST:
        return None
    most = max(map(len, found))
    table = [runs + [[0, 0]] * (most - len(runs)) for runs in found]
    return Groups(torch.tensor(table, dtype=torch.int32, device=ids.device).view(len(found), most, 2), longest)


def attend(
    run: Callable[[bool], Attention], q, k, v, groups: Groups | None, *, scale: float, softcap: float | None = None,
    want_lse: bool = False,
) -> Attention:  # fmt: skip
    """`run(want lse)` is the causal part, with the first query at the first key; returns it joined with what its rows
    see of their groups. q [B, Hq, Tq, D], k and v [B, Hkv, Tk, D].
    """
    if groups is None:
        return run(want_lse)
    part = run(True)
    later, later_lse = _later_keys(q, k, v, groups, scale, softcap)
    lse = torch.logaddexp(part.lse, later_lse)
    shares = [(x - lse).exp().nan_to_num(0.0)[..., None] for x in (part.lse, later_lse)]  # both -inf: a padding row
    out = (part.out.float() * shares[0] + later * shares[1]).to(part.out.dtype)
    return part._replace(out=out, lse=lse if want_lse else None)


def exact_attention(
    q, k, v, *, scale: float, groups: Groups | None = None, softcap: float | None = None, return_lse: bool = False,
    **options,
) -> Attention:  # fmt: skip
    """`block_sparse_attention` without a gate, on its `options`, of rows that may stand in groups."""

    def run(lse: bool) -> Attention:
        return block_sparse_attention(q, k, v, scale=scale, softcap=softcap, return_lse=lse, **options)

    return attend(run, q, k, v, groups, scale=scale, softcap=softcap, want_lse=return_lse)


def _later_keys(q, k, v, groups: Groups, scale: float, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 [B, Hq, Tq, D], lse [B, Hq, Tq]): attention of every row to the later rows of its group alone."""
    (batch, heads, rows, _), kv_heads, longest = q.shape, k.shape[1], groups.longest
    # One more row takes what lies behind a group's end.
    out = q.new_zeros(batch, heads, rows + 1, v.shape[3], dtype=torch.float32)
    lse = q.new_full((batch, heads, rows + 1), -torch.inf, dtype=torch.float32)
    step = torch.arange(longest, device=q.device)
    at_once = max(1, SCORES_AT_ONCE // (heads * longest * longest))
    for b in range(batch):
        for table in groups.table[b].to(q.device).split(at_once):
            valid = step < table[:, 1:]  # [n, L]
            place = torch.where(valid, table[:, :1] + step, rows)
            read = place.clamp(max=rows - 1)
            grouped_q = q[b][:, read].float().unflatten(0, (kv_heads, -1))  # [Hkv, G, n, L, D]
            keys, values = (x[b][:, read].float()[:, None] for x in (k, v))  # [Hkv, 1, n, L, D]
            with torch.autocast(q.device.type, enabled=False):
                scores = scale * (grouped_q @ keys.mT)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                seen = valid[:, None, :] & (step > step[:, None])
                scores = scores.masked_fill(~seen, -torch.inf)
                found = scores.logsumexp(-1)
                mixed = (scores - found.masked_fill(found == -torch.inf, 0.0)[..., None]).exp() @ values
            out[b].index_copy_(1, place.flatten(), mixed.flatten(0, 1).flatten(1, 2))
            lse[b].index_copy_(1, place.flatten(), found.flatten(0, 1).flatten(1, 2))
    return out[:, :, :rows], lse[:, :, :rows]
