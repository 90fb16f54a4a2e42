"""The specification: gated block-sparse attention in plain PyTorch, any device, float32 or float64.

Every backend is tested against this file. Written for reading, not for speed: one query tile and one key tile at a
time, nothing fused. For each sequence b, query head h (reading key/value head h // (Hq // Hkv)) and query tile:

    running_max = -inf per row
    for key_tile in diagonal tiles, sink, then the candidates:
        s = softcap(scale * q_tile @ k_tile^T)        masked entries (causal, window, padding) -> -inf
        if key_tile is a candidate and the call holds query_tile whole:
            keep = not max(s over valid rows) < absolute                        absolute gate, if set
               and not all(row_max(s) - running_max < gap over valid rows)      gap gate, if set
        if kept: running_max = max(running_max, row_max(s)); s joins the row's softmax, numerator and denominator
    out = softmax(kept s, attention sink) @ (v, 0);  lse = logsumexp(kept s, attention sink)

Diagonal tiles and (with keep_sink) the sink, key tile 0, are forced: always visited, once. Candidates are all other key
tiles that hold a key visible to the query tile, from right to left; a sliding window leaves out those before it, be it
the sink. An attention sink is something else: one logit a head that joins the softmax as a key of value 0, after the
gates. Softcap c makes scores c * tanh(score / c), before them.

Block lists narrow the candidates to the listed ones; a list is a set, whatever its order and repeats, and listed tiles
that are forced, invisible or nonexistent are passed over. Comparisons keep on equality, and where a score is NaN: what
cannot be judged is not hidden.

A query tile is held whole when the call has all of its rows, up to where the sequence is known to end (q_length), and
a tile's worth of rows at all. Thresholds were calibrated on the vote of all those rows. Of any other query tile every
tile is kept, so that a prompt that comes in chunks, however it is cut, differs from the whole prompt only in keeping
more. Only candidates of whole query tiles are counted.

Positions: query row i of sequence b stands at q_offset[b] + i, key row j at k_offset[b] + j. Rows and keys at
negative positions or at positions >= length[b] are padding: no vote, no share; padding queries give out = 0 and
lse = -inf. So does every query of a sequence with no valid key, of which no tile is visited. A query tile exists where
it has a row that is no padding. Positions before a positive k_offset hold no key, and no query may see one: a window
has to end before. What no backend needs to get right is refused where spans are read on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .blocks import BlockLists
from .gates import Gate, column
from .tiles import TileShape, Visit, query_tile_count, visit


class Span(NamedTuple):
    """Where one sequence's rows stand: position of query row 0, of key row 0, and the number of valid positions.

    `q_length` bounds the queries and `length` the keys. They differ only where the caller does not know where the
    sequence ends: then keys end with the tensor and queries are unbounded.
    """

    q_offset: int
    k_offset: int
    length: int
    q_length: int

    def query_tiles(self, q_rows: int, tile: TileShape) -> Iterator[tuple[int, int]]:
        """(index in per-tile outputs, absolute query tile) of every query tile that holds a valid one of `q_rows`."""
        if self.length < 1:
            return
        first, count = query_tile_count(self.q_offset, min(q_rows, self.q_length - self.q_offset), tile)
        yield from enumerate(range(first, first + count))

    def whole(self, query_tile: int, q_rows: int, tile: TileShape) -> bool:
        """Whether a call of `q_rows` rows holds all of `query_tile`; see the module docstring."""
        first, end = query_tile * tile.rows, min((query_tile + 1) * tile.rows, self.q_length)
        return q_rows >= tile.rows and self.q_offset <= first and end <= self.q_offset + q_rows

    def rows(self, query_tile: int, q_rows: int, tile: TileShape) -> slice:
        """The rows of a query tensor that belong to `query_tile` and are no padding."""
        first, end = query_tile * tile.rows, (query_tile + 1) * tile.rows
        return slice(
            max(first, self.q_offset, 0) - self.q_offset,
            min(end, self.q_offset + q_rows, self.q_length) - self.q_offset,
        )


class ReferenceOutput(NamedTuple):
    out: torch.Tensor  # [B, Hq, Tq, Dv] in the compute dtype
    lse: torch.Tensor  # [B, Hq, Tq], natural log
    kept: torch.Tensor  # int32 [B, Hq, query tiles]: candidate tiles of whole query tiles that passed the gate
    candidates: torch.Tensor  # int32 [B, Hq, query tiles]: candidate tiles of whole query tiles


class ReferenceStatistics(NamedTuple):
    maximum: torch.Tensor  # [B, Hq, query tiles, key tiles]: largest score, -inf where nothing is visible
    gap: torch.Tensor  # largest row_max - running_max on visiting the tile; +inf if no gate drops it, -inf if invisible
    mass_mean: torch.Tensor  # softmax mass the tile carries, mean over the query tile's valid rows
    mass_worst: torch.Tensor  # the same, largest over the rows


class Scoring(NamedTuple):
    """How scores come from queries and keys, and who sees whom."""

    scale: float
    causal: bool
    window: int | None = None  # a query sees its last `window` keys, its own included; causal only
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)


def tile_scores(q, k, span: Span, query_tile: int, key_tile: int, scoring: Scoring, tile: TileShape):
    """Scores [..., rows, keys] of one tile with masked entries at -inf, and the slices they were read from.

    q [..., Tq, D], k [..., Tk, D]. Rows of the tile that are padding are left out, so every row has a vote. Of a tile
    before a positive k_offset, which no query sees, the first key stands in, masked.
    """
    rows = span.rows(query_tile, q.shape[-2], tile)
    start = max(key_tile * tile.keys, span.k_offset, 0) - span.k_offset
    keys = slice(start, max(min((key_tile + 1) * tile.keys, span.length) - span.k_offset, start + 1))
    s = scoring.scale * (q[..., rows, :] @ k[..., keys, :].transpose(-1, -2))
    if scoring.softcap is not None:
        s = scoring.softcap * (s / scoring.softcap).tanh()
    if scoring.causal:
        q_position = (torch.arange(rows.start, rows.stop, device=q.device) + span.q_offset)[:, None]
        k_position = torch.arange(keys.start, keys.stop, device=q.device) + span.k_offset
        hidden = k_position > q_position
        if scoring.window is not None:
            hidden |= k_position <= q_position - scoring.window
        s = s.masked_fill(hidden | (k_position >= (key_tile + 1) * tile.keys), -torch.inf)
    return s, rows, keys


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: Gate,
    *,
    scoring: Scoring,
    spans: list[Span],
    tile: TileShape,
    keep_sink: bool,
    query_tiles: int,
    blocks: BlockLists | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> ReferenceOutput:
    """The module docstring, literally. q [B, Hq, Tq, D]; k [B, Hkv, Tk, D]; v [B, Hkv, Tk, Dv]; computed in `dtype`."""
    batch, heads, q_rows, _ = q.shape
    group = heads // k.shape[1]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out = q.new_zeros(batch, heads, q_rows, v.shape[-1])
    lse = q.new_full((batch, heads, q_rows), -torch.inf)
    kept = torch.zeros(batch, heads, query_tiles, dtype=torch.int32, device=q.device)
    candidates = torch.zeros_like(kept)
    for b, h, t, query_tile in _query_tiles(spans, heads, q_rows, tile):
        span, kb, vb = spans[b], k[b, h // group], v[b, h // group]
        plan = visit(query_tile, span.length, scoring.causal, keep_sink, tile, scoring.window)
        whole = span.whole(query_tile, q_rows, tile)
        allowed = plan.candidates() if blocks is None else _listed(blocks, b, h, t, plan)
        running_max, scores, values = None, [], []
        for key_tile in plan.forced() + allowed:
            s, rows, keys = tile_scores(q[b, h], kb, span, query_tile, key_tile, scoring, tile)
            row_max = s.amax(-1)
            if whole and key_tile not in plan.forced():
                candidates[b, h, t] += 1
                if not _keep(gate, h, query_tile, row_max, running_max):
                    continue
                kept[b, h, t] += 1
            running_max = row_max if running_max is None else torch.maximum(running_max, row_max)
            scores.append(s)
            values.append(vb[keys])
        s = torch.cat(scores, -1)
        if sinks is not None:  # one more key, of no value
            s = torch.cat([s, sinks[h].to(dtype).expand(len(s), 1)], -1)
            values.append(torch.zeros_like(values[0][:1]))
        blind = s.amax(-1) == -torch.inf
        out[b, h, rows] = (weights(s) @ torch.cat(values, 0)).masked_fill(blind[:, None], 0)
        lse[b, h, rows] = s.logsumexp(-1)
    return ReferenceOutput(out, lse, kept, candidates)


def weights(s: torch.Tensor) -> torch.Tensor:
    """What each key weighs, from the scores [rows, keys] of the kept tiles. Tests put a rounded one in its place."""
    return s.softmax(-1)


def statistics(q, k, *, scoring, spans, tile, keep_sink, query_tiles, key_tiles, lse=None, dtype=torch.float64):
    """What every tile holds, with nothing dropped: see ReferenceStatistics. Shapes as in `attention`; `lse`
    [B, Hq, Tq] of the dense attention, of these scores alone where it is not given.
    """
    batch, heads, q_rows, _ = q.shape
    group = heads // k.shape[1]
    q, k = q.to(dtype), k.to(dtype)
    shape = (batch, heads, query_tiles, key_tiles)
    maximum, gap = q.new_full(shape, -torch.inf), q.new_full(shape, -torch.inf)
    mass_mean, mass_worst = q.new_zeros(shape), q.new_zeros(shape)
    for b, h, t, query_tile in _query_tiles(spans, heads, q_rows, tile):
        span = spans[b]
        plan = visit(query_tile, span.length, scoring.causal, keep_sink, tile, scoring.window)
        whole = span.whole(query_tile, q_rows, tile)
        order = plan.forced() + plan.candidates()
        tiles = {j: tile_scores(q[b, h], k[b, h // group], span, query_tile, j, scoring, tile)[0] for j in order}
        if lse is None:
            row_lse = torch.cat([tiles[j] for j in order], -1).logsumexp(-1)
        else:
            row_lse = lse[b, h, span.rows(query_tile, q_rows, tile)].to(dtype)
        running_max = torch.full_like(row_lse, -torch.inf)
        for j in order:
            row_max = tiles[j].amax(-1)
            mass = (tiles[j] - row_lse[:, None]).exp().sum(-1)
            maximum[b, h, t, j] = row_max.amax()
            judged = whole and j not in plan.forced()
            gap[b, h, t, j] = (row_max - running_max).amax() if judged else torch.inf
            mass_mean[b, h, t, j], mass_worst[b, h, t, j] = mass.mean(), mass.amax()
            running_max = torch.maximum(running_max, row_max)
    return ReferenceStatistics(maximum, gap, mass_mean, mass_worst)


def _keep(gate: Gate, head: int, query_tile: int, row_max: torch.Tensor, running_max: torch.Tensor) -> bool:
    keep = True
    if gate.absolute is not None:
        keep = not row_max.amax() < column(gate.absolute, query_tile)[head]
    if gate.gap is not None:
        keep = keep and not ((row_max - running_max) < column(gate.gap, query_tile)[head]).all()
    return keep


def _listed(blocks: BlockLists, b: int, h: int, t: int, plan: Visit) -> list[int]:
    """The candidates on one query tile's list, from right to left."""
    count = max(int(blocks.counts[b, h, t]), 0)
    listed = set(blocks.indices[b, h, t, :count].tolist())
    return [j for j in plan.candidates() if j in listed]


def _query_tiles(spans: list[Span], heads: int, q_rows: int, tile: TileShape):
    """(sequence, head, index in the output, absolute query tile) of every query tile that holds a valid row."""
    for b, span in enumerate(spans):
        for h in range(heads):
            for t, query_tile in span.query_tiles(q_rows, tile):
                yield b, h, t, query_tile
