"""One kernel call against the reference: shared by the interpreter's tests and the GPU's."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from bsfa_kernels import (
    BlockLists,
    Gate,
    TileShape,
    block_sparse_attention,
    make_spans,
    reference,
    reference_backend,
    tile_statistics,
)
from bsfa_kernels.backends import FUSED
from bsfa_kernels.request import query_tiles

SENTINEL = float("nan")


@dataclass(frozen=True)
class Case:
    """A call: batch, query heads, key/value heads, query rows, key rows, head dim, and what is asked of the kernel."""

    batch: int
    heads: int
    kv_heads: int
    q_rows: int
    k_rows: int
    head_dim: int
    tile: TileShape = TileShape()  # noqa: RUF009 - frozen
    causal: bool = True
    gate: str = "gap"  # "", "absolute", "gap" or "both"
    skip: float = 0.5
    q_offset: int = 0
    padded: bool = False
    keep_sink: bool = True
    dtype: torch.dtype = torch.float32
    blocks: str = ""  # "", "ordered" (from a mask) or "shuffled" (any order, repeats, useless entries)
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    v_head_dim: int | None = None  # where V's heads are narrower than Q's and K's

    def __str__(self):
        parts = [
            f"B{self.batch}-H{self.heads}-KV{self.kv_heads}-Tq{self.q_rows}-Tk{self.k_rows}-D{self.head_dim}"
            + (f"-Dv{self.v_head_dim}" if self.v_head_dim else ""),
            str(self.tile),
            "causal" if self.causal else "full",
            f"{self.gate or 'open'}{self.skip if self.gate else ''}",
        ]
        parts += [f"off{self.q_offset}"] * bool(self.q_offset) + ["padded"] * self.padded
        parts += ["nosink"] * (not self.keep_sink) + [str(self.dtype).split(".")[1]] + [self.blocks] * bool(self.blocks)
        parts += [f"window{self.window}"] * bool(self.window) + [f"cap{self.softcap}"] * bool(self.softcap)
        parts += ["sinks"] * self.sinks
        return "-".join(parts)

    def inputs(self, device, seed=0):
        """q, k, v as transformers hands them over: [B, H, T, D] views of [B, T, H, D]."""
        generator = torch.Generator().manual_seed(seed)

        def draw(heads, rows, head_dim):
            x = torch.randn(self.batch, rows, heads, head_dim, generator=generator)
            return x.to(device, self.dtype).transpose(1, 2)

        q, k = draw(self.heads, self.q_rows, self.head_dim), draw(self.kv_heads, self.k_rows, self.head_dim)
        return q, k, draw(self.kv_heads, self.k_rows, self.v_head_dim or self.head_dim)

    def block_lists(self, device, seed=0) -> BlockLists | None:
        """Lists of every length from empty to full; past their counts stand tiles that must not be visited."""
        if not self.blocks:
            return None
        generator = torch.Generator().manual_seed(seed + 1)
        tiles = query_tiles(self.q_rows, self.q_offset, self.padded, self.tile)
        shape = (self.batch, self.heads, tiles, -(-self.k_rows // self.tile.keys))
        share = torch.randint(0, 5, shape[:3], generator=generator) / 4
        mask = torch.rand(shape, generator=generator) < share[..., None] ** 2
        lists = BlockLists.from_mask(mask)
        if self.blocks == "ordered":
            return lists.to(device)
        useless = torch.tensor([-1, shape[3], 2**31 - 1, -(2**31)], dtype=torch.int32).expand(*shape[:3], -1)
        repeats = torch.zeros(*shape[:3], 1, dtype=torch.int32) + shape[3] // 2
        drawn = torch.cat([torch.arange(shape[3], dtype=torch.int32).expand(shape), useless, repeats], -1)
        drawn = drawn.gather(-1, torch.rand(drawn.shape, generator=generator).argsort(-1))
        counts = (share * (drawn.shape[3] + 3)).int() - 1  # some are negative, some exceed the capacity
        return BlockLists(drawn, counts).to(device)

    def options(self, device):
        """Keyword arguments of the call. Padded batches mix left padding, right padding and a cached prefix."""
        options = dict(
            causal=self.causal, tile=self.tile, keep_sink=self.keep_sink, window=self.window, softcap=self.softcap
        )
        if not self.padded:
            return options | dict(q_offset=self.q_offset)
        cached = self.k_rows - self.q_rows
        left = torch.tensor([(b % 3 == 0) * min(7, self.q_rows - 1) for b in range(self.batch)])
        right = torch.tensor([(b % 3 == 1) * min(11, self.q_rows - 1) for b in range(self.batch)])
        return options | dict(
            spans=make_spans(self.batch, cached - left, -left, self.k_rows - left - right, device=device)
        )


@contextmanager
def preparation_of(case: Case, backend: str, device: str, scores: str):
    """While entered, the reference takes Q and K as `backend` prepares them on `device`, so that only what follows is
    compared: its own preparation may differ by a step where a value stands at a half.
    """
    if scores == "exact" or backend not in FUSED:
        yield
        return
    from bsfa_kernels import int8

    def prepare(request):
        q, k = (x.transpose(1, 2).to(device, case.dtype).transpose(1, 2) for x in (request.q, request.k))
        spans = None if request.spans is None else request.spans.to(device)
        prepared = int8.prepare(replace(request, q=q, k=k, spans=spans))
        return type(prepared)(*(None if x is None else x.cpu() for x in prepared))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_backend, "prepare", prepare)
        yield


def attention_sinks(case: Case, device) -> dict:
    """Keyword arguments: logits that weigh little in some heads and nearly all in others."""
    return dict(sinks=torch.linspace(-4, 6, case.heads, device=device)) if case.sinks else {}


def thresholds(case: Case, statistics) -> Gate:
    """A gate that skips about `case.skip`, halfway between two tile values so that rounding decides nothing.

    Per head and query tile, as in calibration. The statistics' query tiles start at the first one that the case's
    first sequence has; thresholds start at position 0.
    """
    first = 0 if case.padded else case.q_offset // case.tile.rows
    if case.padded:
        first = max(case.k_rows - case.q_rows - min(7, case.q_rows - 1), 0) // case.tile.rows
    candidates = statistics.gap.isfinite()

    def cut(values):
        heads, tiles = values.shape[1:3]
        out = torch.full((heads, first + tiles), -torch.inf, device=values.device)
        for h in range(heads):
            for t in range(tiles):
                here = values[0, h, t][candidates[0, h, t]].sort().values
                k = min(int(len(here) * case.skip), len(here) - 1)
                if k > 0:
                    out[h, first + t] = (here[k - 1] + here[k]) / 2
        return out

    return Gate(
        absolute=cut(statistics.maximum) if case.gate in ("absolute", "both") else None,
        gap=cut(statistics.gap) if case.gate in ("gap", "both") else None,
    )


def check(case: Case, backend: str, device: str = "cpu", seed: int = 0, scores: str = "exact") -> float:
    """Run `case` on `backend` against the float64 reference (on the CPU). Returns the share of candidates dropped.

    int8 scores are those of the backend's own preparation, which has tests of its own.
    """
    with preparation_of(case, backend, device, scores):
        return _check(case, backend, device, seed, scores)


def _check(case: Case, backend: str, device: str, seed: int, scores: str) -> float:
    q, k, v = case.inputs("cpu", seed)
    options = case.options("cpu") | dict(scores=scores)
    exact = block_sparse_attention(
        q, k, v, return_lse=True, backend="reference", **options, **attention_sinks(case, "cpu")
    )
    gate = thresholds(case, tile_statistics(q, k, exact.lse, backend="reference", **options))
    expected = block_sparse_attention(
        q.double(), k.double(), v.double(), gate, blocks=case.block_lists("cpu", seed), return_lse=True,
        return_counts=True, backend="reference", **options, **attention_sinks(case, "cpu"),
    )  # fmt: skip
    result = on_device(case, q, k, v, gate, backend, device, seed, scores)

    assert torch.equal(result.candidates, expected.candidates), "candidate tiles"
    assert torch.equal(result.kept, expected.kept), "kept tiles"
    assert result.out.isfinite().all(), "output was not written everywhere, or is not finite"
    within_rounding(result.out, expected.out, rounded_attention(case, q, k, v, gate, seed, scores), scores_range(q, k))
    hidden = expected.lse.isinf()
    assert torch.equal(result.lse.isinf(), hidden), "rows without keys"
    assert not (~hidden).any() or (result.lse - expected.lse)[~hidden].abs().max() < 1e-4, "logsumexp"
    total = expected.candidates.sum().item()
    return 1 - expected.kept.sum().item() / total if total else 0.0


def on_device(case: Case, q, k, v, gate: Gate, backend: str, device: str, seed: int = 0, scores: str = "exact"):
    """The call on `device`, its results back on the CPU."""
    q, k, v = (x.transpose(1, 2).to(device).transpose(1, 2) for x in (q, k, v))
    options = case.options(device) | dict(scores=scores)
    gate, blocks = gate.to(device), case.block_lists(device, seed)

    def call():
        poison(q, v)
        return block_sparse_attention(
            q, k, v, gate, blocks=blocks, return_lse=True, return_counts=True, backend=backend, **options,
            **attention_sinks(case, device),
        )  # fmt: skip

    result = and_by_the_shortcut(call, device)
    return type(result)(*(x.cpu() for x in result))


def and_by_the_shortcut(call, device: str):
    """The result of a call and, on a GPU, of one like it that takes the shortcut: the same bits."""
    result = call()
    if device != "cpu":
        with torch.no_grad():
            call()
            again = call()
        assert all(torch.equal(*pair) for pair in zip(result, again, strict=True)), "by the shortcut"
    return result


# How an output [B, H, T, D] lies in a buffer: (axes in memory order, elements in front, elements that each row has
# besides). Where a base or stride breaks the 16-byte rule, kernels that demand it go by way of a copy.
PLACES = {
    "tokens": ((0, 2, 1, 3), 0, 0),
    "tokens-of-wider-rows": ((0, 2, 1, 3), 16, 24),
    "heads-of-wider-rows": ((0, 1, 2, 3), 8, 8),
    "batch-inside": ((2, 0, 1, 3), 0, 0),
    "base-off-by-one": ((0, 2, 1, 3), 1, 0),
    "odd-rows": ((0, 1, 2, 3), 0, 1),
    "columns-apart": ((0, 2, 3, 1), 0, 0),
}


def check_place(case: Case, backend: str, place: str, device: str = "cpu") -> None:
    """`out=` at a place of PLACES, among NaN: the very output, nothing around it touched."""
    q, k, v = case.inputs(device)
    options = case.options(device) | attention_sinks(case, device) | dict(backend=backend)
    gate = Gate(gap=torch.full((q.shape[1], 1), -0.5, device=device)) if case.gate else Gate()
    expected = block_sparse_attention(q, k, v, gate, blocks=case.block_lists(device), return_lse=True, **options)
    assert expected.out.transpose(1, 2).is_contiguous()
    order, front, more = PLACES[place]
    shape = [q.shape[axis] for axis in order]
    shape[-1] += more
    buffer = torch.full((front + math.prod(shape),), SENTINEL, dtype=q.dtype, device=device)
    rows = buffer[front:].view(shape)[..., : shape[-1] - more]
    out = rows.permute([order.index(axis) for axis in range(4)])
    for _ in range(2 if q.is_cuda else 1):
        rows.fill_(SENTINEL)
        with torch.no_grad():  # the second takes the shortcut of calls like one before
            found = block_sparse_attention(
                q, k, v, gate, blocks=case.block_lists(device), return_lse=True, out=out, **options
            )
        assert found.out is out and torch.equal(found.lse, expected.lse)
        assert out.isfinite().all() and torch.equal(out, expected.out)
    rows.fill_(SENTINEL)
    assert buffer.isnan().all(), "something else was overwritten"


def rounded_attention(case: Case, q, k, v, gate: Gate, seed: int = 0, scores: str = "exact") -> torch.Tensor:
    """The error model: float64 throughout, but weights exp(score - row maximum) and output rounded to the case's dtype,
    as every kernel must round them to feed them to matrix units and to store them.
    """
    rounded = ReferenceRounding(case.dtype)
    with rounded:
        result = block_sparse_attention(
            q.double(), k.double(), v.double(), gate, blocks=case.block_lists("cpu", seed), backend="reference",
            scores=scores, **case.options("cpu"), **attention_sinks(case, "cpu"),
        )  # fmt: skip
    return result.out.to(case.dtype).double()


class ReferenceRounding:
    """While entered, the reference's softmax rounds its weights to `dtype` before it normalises them."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(reference, "weights", self._weights)

    def __exit__(self, *_):
        self.patch.undo()

    def _weights(self, s: torch.Tensor) -> torch.Tensor:
        p = (s - s.amax(-1, keepdim=True).nan_to_num(neginf=0)).exp()
        return p.to(self.dtype).to(s.dtype) / p.sum(-1, keepdim=True)


def scores_range(q, k) -> float:
    """An upper bound on the size of scaled scores: their float32 rounding is relative to it."""
    norms = (x.double().norm(dim=-1).max().item() for x in (q, k))
    return math.prod(norms) * q.shape[-1] ** -0.5


def within_rounding(out, exact, rounded, score_range: float) -> None:
    """Relative L2 error of every row of `out` [..., D] against `exact`: at most three times the error model's, for luck
    and for running maxima, which move a weight's rounding.

    Scores in float32 are off by a few eps of their size, which the weights see as a relative error.
    """
    eps, single = torch.finfo(out.dtype).eps, 2**-23
    size = exact.norm(dim=-1)
    error = (out.double() - exact).norm(dim=-1)
    model = (rounded - exact).norm(dim=-1)
    allowed = 3 * model + size * (0.5 * eps + 16 * single * (1 + score_range)) + 1e-30
    worst = (error / allowed).max()
    assert worst <= 1, f"a row is off by {worst:.2g} times what rounding explains"


def check_statistics(case: Case, backend: str, device: str = "cpu", scores: str = "exact"):
    """tile_statistics of `backend` against the float64 reference; int8 scores as in `check`."""
    with preparation_of(case, backend, device, scores):
        _check_statistics(case, backend, device, scores)


def _check_statistics(case: Case, backend: str, device: str, scores: str):
    q, k, v = case.inputs("cpu")
    options = case.options("cpu") | dict(scores=scores)
    lse = block_sparse_attention(
        q, k, v, return_lse=True, backend="reference", **options, **attention_sinks(case, "cpu")
    ).lse
    expected = tile_statistics(q, k, lse, backend="reference", **options)
    actual = tile_statistics(
        q.to(device), k.to(device), lse.to(device), backend=backend, **case.options(device) | dict(scores=scores)
    )
    for name in expected._fields:
        a, e = getattr(actual, name).cpu(), getattr(expected, name)
        finite = e.isfinite()
        assert torch.equal(a[~finite], e[~finite]), name
        assert torch.allclose(a[finite], e[finite], atol=2e-4, rtol=2e-4), name


def check_sliding(
    backend: str, tile: TileShape, window: int, first: int, device: str = "cpu", dtype=torch.float32, scores="exact"
) -> None:
    """A chunk that begins inside a query tile, behind a cache that holds one window: the tile visits key tiles of which
    no key is held. Beside it, a sequence that ended before the cache begins, and one whose keys did.
    """
    rows, k_offset = 2 * tile.rows, first - window + 1
    assert (first // tile.rows * tile.rows - window + 1) // tile.keys < k_offset // tile.keys
    spans = torch.tensor(
        [[first, k_offset, 2**31 - 1, 2**31 - 1], [first, k_offset, 5, 5], [first, k_offset, 5, 2**31 - 1]]
    )
    case = Case(3, 2, 1, rows, rows + window - 1, 16, tile, gate="", dtype=dtype)
    q, k, v = case.inputs(device)
    options = dict(spans=spans.int(), tile=tile, window=window, scores=scores)
    with preparation_of(case, backend, device, scores):
        expected = block_sparse_attention(
            *(x.cpu().double() for x in (q, k, v)), return_lse=True, return_counts=True, backend="reference", **options
        )
    poison(q, v)
    options["spans"] = options["spans"].to(device)
    found = block_sparse_attention(q, k, v, return_lse=True, return_counts=True, backend=backend, **options)
    assert torch.equal(found.candidates.cpu(), expected.candidates) and torch.equal(found.kept.cpu(), expected.kept)
    assert torch.allclose(found.out.cpu().double(), expected.out, atol=4 * torch.finfo(dtype).eps + 1e-5)
    assert torch.allclose(found.lse.cpu(), expected.lse, atol=1e-4)
    assert not found.out[1:].any() and found.lse[1:].eq(-torch.inf).all() and found.lse[0].isfinite().all()


def poison(q: torch.Tensor, v: torch.Tensor) -> None:
    """Leave NaN in the memory that the next call's outputs, out and lse, are likely to get."""
    outputs = ((*q.shape[:3], v.shape[3]), q.dtype), (q.shape[:3], torch.float32)
    held = [torch.full(shape, SENTINEL, dtype=dtype, device=q.device) for shape, dtype in outputs * 2]
    held.clear()
