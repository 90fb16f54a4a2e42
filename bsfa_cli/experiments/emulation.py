"""What a kernel that rounds P and V to 8 bits would compute, in PyTorch on any device: causal prompts, tiles of 64x128.

An online softmax as the kernels run it: diagonal tile, sink, then right to left, and the gap gate before P. All query
rows take a step together, each with one key tile, so that memory is linear in the length. Scores and sums are float32;
Q, K, V and the output are bfloat16.

For the scores s of a tile and its `reference` r, the running row maximum after the tile or the row's own in the tile:

    p = exp(s - r), rounded;  v - mean, rotated, rounded with a scale
    accumulator = accumulator * exp(old maximum - maximum) + (p @ v) * scale * exp(r - maximum)

Products of integers are exact here as they are in hardware: 128 * 255 * 127 < 2^24. FP8 products can be added as Hopper
is reported to add them (DeepSeek-V3, arXiv 2412.19437; SageAttention2, 2411.10958): 32 at a time, and
of the accumulator 14 significant bits are kept, the rest cut off. NVIDIA documents neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from bsfa_kernels import Gate, TileShape, quantise
from bsfa_kernels.gates import column
from bsfa_kernels.request import Request

TILE = TileShape(64, 128)
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
ADDS = ("float32", "tile", "always", "aligned")
CHOICES = {
    "scores": ("exact", "int8", "e4m3"), "p": ("bf16", "e4m3", "u8", "s8"), "reference": ("running", "tile", "final"),
    "v": ("bf16", "e4m3", "int8"), "scale": ("head", "tile", "channel"), "mean": ("kept", "head", "tile"),
    "divisor": ("exact", "rounded"), "adds": ADDS,
}  # fmt: skip
LEVELS = {"u8": 255, "s8": 127}  # of P
PRODUCT = 32  # FP8 values of one step of a tensor core
DROPPED_BITS = 10  # of float32's 23 behind the point


@dataclass(frozen=True)
class Rounding:
    """How one contender rounds. Raises ValueError for what is none of CHOICES, and for what does not go together."""

    scores: str = "exact"  # int8: quantise.py; e4m3: a scale a KV head, as FlashAttention-3 is called
    p: str = "bf16"
    reference: str = "running"  # the maximum at which p is 1; final: the row's, known beforehand
    top: float = LARGEST  # what e4m3 has for p = 1
    v: str = "bf16"
    scale: str = "channel"  # of V: one a head, a tile (128 keys), or a channel of a tile
    mean: str = "kept"  # or taken off V before rounding: of the head, of the tile
    rotated: bool = False  # V's channels, by quantise.rotation
    divisor: str = "exact"  # the softmax's denominator sums p before rounding, or rounded
    adds: str = "float32"  # tile: FP8's 14 bits within a tile; always: throughout; aligned: see `_cut_products`

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.adds == "always" and (self.scale, self.reference, self.mean) != ("head", "running", "kept"):
            raise ValueError("an accumulator that stays FP8's has one scale and no mean")


class Values:
    """V [Hkv, T, D] float32, rounded: `tiles` [n, Hkv, 128, D] times `scale` [n or 1, Hkv or 1, 1, D or 1]. `mean`
    [n or 1, Hkv, 1, D] is what was taken off, or None. All of it is rotated where V is.
    """

    def __init__(self, v: torch.Tensor, rounding: Rounding):
        self.rotation = None
        if rounding.rotated:
            self.rotation = quantise.rotation(v.shape[-1], v.device).float() / v.shape[-1] ** 0.5
            v = v @ self.rotation
        tiles, self.mean = _tiles(v), None
        if rounding.mean != "kept":
            self.mean = v.mean(1)[None, :, None] if rounding.mean == "head" else tiles.mean(2, keepdim=True)
            tiles = tiles - self.mean
            if short := -v.shape[1] % TILE.keys:
                tiles[-1, :, TILE.keys - short :] = 0
        if rounding.v == "bf16":
            self.tiles, self.scale = tiles.bfloat16().float(), tiles.new_ones(1, 1, 1, 1)
            return
        over = {"head": (0, 2, 3), "tile": (2, 3), "channel": (2,)}[rounding.scale]
        most = LARGEST if rounding.v == "e4m3" else quantise.LEVELS
        self.scale = tiles.abs().amax(over, keepdim=True).clamp(min=quantise.TINY) / most
        scaled = tiles / self.scale
        self.tiles = scaled.clamp(-most, most).to(E4M3).float() if rounding.v == "e4m3" else scaled.round()

    def restored(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.rotation is None else out @ self.rotation.T


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rounding: Rounding, *, scale: float, gate: Gate | None = None
) -> tuple[torch.Tensor, int, int]:
    """(out [1, Hq, T, D] in the dtype of q, tiles kept, tiles that the gap gate might have dropped).

    q [1, Hq, T, D], k and v [1, Hkv, T, D], causal. Raises ValueError for other shapes and gates.
    """
    if q.shape[0] != 1 or k.shape[2] != q.shape[2]:
        raise ValueError(f"emulated for one whole prompt, got q {list(q.shape)} and k {list(k.shape)}")
    if gate is not None and (gate.absolute is not None or rounding.reference == "final"):
        raise ValueError("emulated with the gap gate, and with maxima that are not known beforehand")
    q32, k32 = _scored(*(x.bfloat16() for x in (q, k, v)), rounding.scores)
    rows, heads = q.shape[2], k.shape[1]
    group = q.shape[1] // heads
    queries, keys = _grouped(q32 * scale, group), _tiles(k32).flatten(0, 1)
    gap = None if gate is None else _gaps(gate.expanded(q.shape[1], q.device).gap, heads, rows)
    values = Values(v[0].bfloat16().float(), rounding)
    state = _State(queries, values, rounding)
    if rounding.reference == "final":
        for here, _, s in _stream(queries, keys, heads):
            torch.maximum(state.final[here], s.amax(-1, keepdim=True), out=state.final[here])
    kept = candidates = 0
    for step, (here, tile, s) in enumerate(_stream(queries, keys, heads)):
        largest = s.amax(-1, keepdim=True)
        if gap is not None and step > 1:  # neither diagonal nor sink
            least, judged = (x[here] for x in gap)
            dropped = _dropped(largest, state.maximum[here], least) & judged
            candidates, kept = candidates + judged.sum(), kept + (judged & ~dropped).sum()
            hidden = dropped[..., None].expand(-1, -1, -1, TILE.rows).reshape(largest.shape)
            s.masked_fill_(hidden, -torch.inf)
            largest.masked_fill_(hidden, -torch.inf)
        state.add(here, tile, s, largest)
    return _ungrouped(state.out(), heads, group, rows)[None].bfloat16().to(q.dtype), int(kept), int(candidates)


class _State:
    """Running maxima and sums of all rows [n * Hkv, rows, 1], accumulators [n * Hkv, rows, D]."""

    def __init__(self, queries: torch.Tensor, values: Values, rounding: Rounding):
        self.rounding, self.values = rounding, values
        self.unit = 1 / {"bf16": 1, "e4m3": rounding.top, **LEVELS}[rounding.p]
        full = values.tiles.shape
        self.factor = (values.scale * self.unit).expand(*full[:2], 1, -1).flatten(0, 1)
        self.v = values.tiles.flatten(0, 1)
        if rounding.adds == "float32":
            self.v = self.v * self.factor  # here rather than on every product: all the same but for float32's last bits
        self.mean = None if values.mean is None else values.mean.expand(*full[:2], 1, full[3]).flatten(0, 1)
        self.maximum = queries.new_full((*queries.shape[:2], 1), -torch.inf)
        self.final = self.maximum.clone()
        self.sum = torch.zeros_like(self.maximum)
        self.accumulator = queries.new_zeros(*queries.shape[:2], full[3])

    def add(self, here: slice, tile: slice, s: torch.Tensor, largest: torch.Tensor) -> None:
        """Scores s [rows here, rows, 128], one key tile for each, and the `largest` in a row."""
        rounding, unit = self.rounding, self.unit
        maximum = torch.maximum(self.maximum[here], largest)
        old = (self.maximum[here] - maximum).exp_()
        self.maximum[here] = maximum
        running = rounding.reference == "running"
        reference = {"running": maximum, "tile": largest, "final": self.final[here]}[rounding.reference]
        # A row that drops the tile has -inf for all scores: they weigh 0.
        shift = reference.clamp(min=torch.finfo(s.dtype).min) + math.log(unit)
        p = s.sub_(shift).exp_()  # in units of what it is rounded to
        weight = None if running else (reference - maximum).exp_()
        total = p.sum(-1, keepdim=True)
        p = _round_p(p, rounding.p)
        rounded = p.sum(-1, keepdim=True) if rounding.divisor == "rounded" or rounding.mean == "tile" else total
        total = (rounded if rounding.divisor == "rounded" else total) * unit
        self.sum[here].mul_(old).add_(total if running else total * weight)
        accumulator, v = self.accumulator[here], self.v[tile]
        if rounding.adds == "always":
            accumulator.copy_(_fp8_product(p, v, _cut(accumulator * old), rounding.adds))
            return
        if rounding.adds == "float32":
            product = p @ v
        else:
            product = _fp8_product(p, v, torch.zeros_like(accumulator), rounding.adds) * self.factor[tile]
        if rounding.mean == "tile":
            product += rounded * unit * self.mean[tile]
        accumulator.mul_(old)
        accumulator.add_(product) if running else accumulator.addcmul_(product, weight)

    def out(self) -> torch.Tensor:
        out = self.accumulator / self.sum
        if self.rounding.adds == "always":
            out = out * self.factor
        if self.rounding.mean == "head":
            out = out + self.mean
        return self.values.restored(out)


def _stream(queries: torch.Tensor, keys: torch.Tensor, heads: int):
    """(rows, key tiles, scores [of them, rows, 128]), slices of n * Hkv: diagonal, sink, then right to left.

    At step i the row tiles from i on have a tile each: row tile n sees key tiles 0 .. n.
    """
    count = len(keys) // heads
    later = torch.ones(TILE.keys, TILE.keys, dtype=torch.bool, device=keys.device).triu(1)
    for step in range(count):
        here, first = slice(step * heads, None), max(0, step - 1) and 1
        tile = list(range(heads)) * (count - 1) if step == 1 else slice(first * heads, (first + count - step) * heads)
        s = torch.bmm(queries[here], keys[tile].transpose(-1, -2))
        if not step:
            s.unflatten(1, (-1, TILE.keys)).masked_fill_(later, -torch.inf)
        yield here, tile, s


def _dropped(largest: torch.Tensor, maximum: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """bool [tiles, group, query tiles]: every row has its maximum, less the running one, below `gap`, of that shape."""
    return ((largest - maximum).view(*gap.shape, TILE.rows) < gap[..., None]).all(-1)


def _gaps(gap: torch.Tensor, heads: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n * Hkv, group, query tiles of a row tile] of thresholds [Hq, columns], and bool: whether `rows` fill the query
    tile, which is kept and not counted otherwise.
    """
    each, count = TILE.keys // TILE.rows, -(-rows // TILE.keys)
    columns = torch.stack([column(gap, i) for i in range(count * each)], -1)
    tiles = columns.unflatten(-1, (count, each)).unflatten(0, (heads, -1)).permute(2, 0, 1, 3).flatten(0, 1)
    ends = torch.arange(1, count * each + 1, device=gap.device).view(count, 1, each) * TILE.rows
    return tiles, (ends <= rows).repeat_interleave(heads, 0).expand(tiles.shape)


def _scored(q, k, v, scores: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (q [Hq, T, C], k [Hkv, T, C]) whose products are the scores."""
    if scores == "int8":
        request = Request(q, k, v, Gate(), 1.0, True, TILE, True, 0, None, False, False, scores=scores)
        request = quantise.dequantised(request, quantise.prepare(request), torch.float32)
        return request.q[0], request.k[0]
    q, k = q[0].float(), k[0].float()
    if scores == "e4m3":
        return _e4m3_by_head(q.unflatten(0, (k.shape[0], -1))).flatten(0, 1), _e4m3_by_head(k)
    return q, k


def _e4m3_by_head(x: torch.Tensor) -> torch.Tensor:
    scale = x.flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, *[1] * (x.dim() - 1)) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(E4M3).float() * scale


def _round_p(p: torch.Tensor, kind: str) -> torch.Tensor:
    if kind in LEVELS:
        return p.round_()
    return p.to({"bf16": torch.bfloat16, "e4m3": E4M3}[kind]).float()


def _fp8_product(p: torch.Tensor, v: torch.Tensor, accumulator: torch.Tensor, adds: str) -> torch.Tensor:
    """accumulator + p @ v, 32 keys at a time. p [tiles, rows, 128], v [tiles, 128, D]."""
    for start in range(0, TILE.keys, PRODUCT):
        part = slice(start, start + PRODUCT)
        if adds == "aligned":
            accumulator = _cut_products(accumulator, p[..., part], v[:, part])
        else:
            accumulator = _cut(accumulator + p[..., part] @ v[:, part])
    return accumulator


def _cut(x: torch.Tensor) -> torch.Tensor:
    """float32 without its last bits."""
    return (x.view(torch.int32) >> DROPPED_BITS << DROPPED_BITS).view(torch.float32)


def _cut_products(accumulator: torch.Tensor, p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The strictest reading of the reports: every product, and the accumulator, is cut to what 14 bits of the largest
    of them can hold before they are added. Needs a number for every product.
    """
    terms = torch.cat([p[..., None] * v[:, None], accumulator[..., None, :]], -2)
    _, exponent = torch.frexp(terms.abs().amax(-2, keepdim=True))
    unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - (24 - DROPPED_BITS))
    return (terms / unit).trunc_().mul_(unit).sum(-2)


def _tiles(x: torch.Tensor) -> torch.Tensor:
    """[n, H, 128, D] of x [H, T, D], zeros behind."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % TILE.keys)).unflatten(1, (-1, TILE.keys)).transpose(0, 1)


def _grouped(q: torch.Tensor, group: int) -> torch.Tensor:
    """[n * Hkv, group * 128, D] of q [Hq, T, D]."""
    return _tiles(q).unflatten(1, (-1, group)).flatten(2, 3).flatten(0, 1)


def _ungrouped(out: torch.Tensor, heads: int, group: int, rows: int) -> torch.Tensor:
    """[Hq, T, D], the inverse."""
    tiles = out.unflatten(0, (-1, heads)).unflatten(2, (group, -1))  # [n, Hkv, group, 128, D]
    return tiles.permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)[:, :rows]
