"""Q, K and V with the attention patterns of real models, where no model is at hand. Synthetic, and labelled so.

    data = generate(heads=32, kv_heads=8, length=32768, head_dim=128, device="cuda", dtype=torch.bfloat16)
    data.q, data.k, data.v, data.plan.needle

Every pattern has columns of its own in Q and K, scaled so that it adds its query head's strength to a score, in natural
units, where it fits best:

    sink      the first 4 keys, for all queries
    vertical  a few key positions of the key head, for all queries
    local     near keys, falling with the logarithm of the distance up to the key head's width
    modality  the segment [start, end) is "visual"; a query prefers keys of its own kind, and the boundary shows
    slash     keys at one distance, the query head's
    grid      visual queries: visual keys at the same place of every frame (stride: tokens per frame)
    content   unit-normal noise
    needle    the last rows ("the question"): one key, `margin` above every other score of those rows, in all heads

Strengths are skewed: of every pattern few heads have much and most have little. A seed makes the heads, a sample the
text they read: vertical positions and noise. What is planted comes from generators on the CPU, so it is the same on
every device; noise comes from the device's own generator.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

SHORTEST, NARROWEST = 64, 16  # tokens; head dim
SINK_KEYS = 4
SAMPLE_STRIDE = 1_000_003
# Columns of the patterns that need one each; the rotating patterns share most of the rest, content has what remains.
SINK, VERTICAL, MODALITY, NEEDLE, FIRST_ROTATING = range(5)
STRONGEST = {"sink": 8.0, "vertical": 8.0, "modality": 3.0, "local": 14.0, "slash": 12.0, "grid": 12.0}  # natural units
CONTENT = 1.0  # standard deviation of a score from content, natural units


@dataclass(frozen=True)
class Plan:
    """What was planted, in tokens from position 0: `question` is the first row that looks for the `needle`."""

    needle: int
    question: int
    margin: float  # natural units
    visual: tuple[int, int]
    frame: int

    def describe(self) -> dict:
        return asdict(self)


class Structured(NamedTuple):
    q: torch.Tensor  # [batch, heads, length, head_dim]
    k: torch.Tensor  # [batch, kv_heads, length, head_dim]
    v: torch.Tensor
    plan: Plan


def generate(
    *,
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sample: int = 0,
    depth: float = 0.3,
    margin: float = 6.0,
    frame: int | None = None,
) -> Structured:
    """Structured Q, K, V for attention with scale head_dim ** -0.5, causal or not; built one head at a time.

    `depth` places the needle, as a share of the positions before the question; `frame` is the number of tokens per
    frame (None: a sixteenth of the length, 64 to 1,024). The middle half is visual. Equal arguments give equal tensors
    on one kind of device.

    Raises ValueError for fewer than 64 tokens, a head dim below 16, heads that are no multiple of kv_heads, and a depth
    outside 0 .. 1.
    """
    if length < SHORTEST or head_dim < NARROWEST:
        raise ValueError(
            f"structured data need at least {SHORTEST} tokens and a head dim of at least {NARROWEST}, "
            f"got {length} and {head_dim}"
        )
    if heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie between 0 and 1, got {depth}")
    question = length - min(64, length // 16)
    plan = Plan(
        needle=SINK_KEYS + int(depth * (question - SINK_KEYS - 1)),
        question=question,
        margin=margin,
        visual=(length // 4, length * 3 // 4),
        frame=frame or max(64, min(1024, length // 16)),
    )
    planted = torch.Generator().manual_seed(seed)
    text = torch.Generator().manual_seed(seed + (sample + 1) * SAMPLE_STRIDE)
    noise = torch.Generator(device).manual_seed(seed + (sample + 1) * SAMPLE_STRIDE)
    q, k, v = (torch.empty(batch, n, length, head_dim, device=device, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    group = heads // kv_heads
    for b in range(batch):
        for h in range(kv_heads):
            keys = _Keys(plan, length, head_dim, torch.device(device), planted, text, noise)
            for member in range(h * group, (h + 1) * group):
                q[b, member] = keys.queries(planted, noise)
            k[b, h] = keys.columns
            v[b, h].normal_(generator=noise)
            _raise_needle(q[b, h * group : (h + 1) * group], k[b, h], plan)
    return Structured(q, k, v, plan)


class _Keys:
    """One key head: its columns, float32 [T, D], and the query heads that fit them."""

    def __init__(self, plan: Plan, length: int, head_dim: int, device, planted, text, noise):
        self.plan, self.length, self.head_dim, self.device = plan, length, head_dim, device
        self.pairs = head_dim // 8
        self.position = torch.arange(length, device=device, dtype=torch.float64)
        self.visual = (self.position >= plan.visual[0]) & (self.position < plan.visual[1])
        width = 32 * 16 ** _uniform(planted)
        steps = torch.arange(self.pairs, dtype=torch.float64)
        self.rates = {
            "local": width ** (-steps / max(self.pairs - 1, 1)),
            "slash": torch.rand(self.pairs, generator=planted, dtype=torch.float64) * math.pi / 4,
            "grid": 2 * math.pi * (steps + 1) / plan.frame,
        }
        columns = torch.zeros(length, head_dim, device=device)
        columns[:SINK_KEYS, SINK] = 1
        verticals = torch.randint(length, (max(2, length // 512),), generator=text)
        columns[verticals.to(device), VERTICAL] = 1
        columns[:, MODALITY] = self.visual.float() * 2 - 1
        for name, part in self._rotating():
            columns[:, part] = self._rotated(name, 0.0)
        columns[:, self.content] = torch.randn(length, self.content_size, generator=noise, device=device)
        self.columns = columns

    @property
    def content(self) -> slice:
        return slice(FIRST_ROTATING + 6 * self.pairs, None)

    @property
    def content_size(self) -> int:
        return self.head_dim - FIRST_ROTATING - 6 * self.pairs

    def queries(self, planted, noise) -> torch.Tensor:
        """float32 [T, D] of one query head, strengths drawn for it."""
        strength = {name: most * _uniform(planted) ** 2 for name, most in STRONGEST.items()}
        distance = 64 * (self.length / 128) ** _uniform(planted)
        scaled = self.head_dim**0.5
        columns = torch.zeros(self.length, self.head_dim, device=self.device)
        columns[:, SINK], columns[:, VERTICAL] = strength["sink"] * scaled, strength["vertical"] * scaled
        columns[:, MODALITY] = self.columns[:, MODALITY] * strength["modality"] * scaled
        for name, part in self._rotating():
            rotated = self._rotated(name, distance if name == "slash" else 0.0)
            columns[:, part] = rotated * (strength[name] * scaled / self.pairs)
        columns[self.plan.question :, NEEDLE] = scaled
        if self.content_size:
            content = torch.randn(self.length, self.content_size, generator=noise, device=self.device)
            columns[:, self.content] = content * (CONTENT * scaled / self.content_size**0.5)
        return columns

    def _rotating(self):
        for i, name in enumerate(self.rates):
            start = FIRST_ROTATING + 2 * self.pairs * i
            yield name, slice(start, start + 2 * self.pairs)

    def _rotated(self, name: str, back: float) -> torch.Tensor:
        """cos and sin of rate * (position - back), the grid's 0 outside the visual part: [T, 2 * pairs]."""
        angle = (self.position - back)[:, None] * self.rates[name].to(self.device)
        rotated = torch.cat([angle.cos(), angle.sin()], 1).float()
        return rotated * self.visual[:, None] if name == "grid" else rotated


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _raise_needle(q: torch.Tensor, k: torch.Tensor, plan: Plan) -> None:
    """Lift the needle's score `margin` above all others of the question's rows. q [group, T, D]; k [T, D], changed."""
    rows = q[:, plan.question :].float()
    scores = rows @ k.float().T * k.shape[1] ** -0.5
    needed = scores.amax(-1) + plan.margin - scores[..., plan.needle]
    # A unit of this column is a unit of the score.
    k[plan.needle, NEEDLE] = needed.max().clamp(min=0)
