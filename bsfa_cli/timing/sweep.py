"""One cell of a profile: dense baselines, rivals and our kernel at every skip rate, timed in one interleaved run.

Data are synthetic, unit-normal or structured (../structured.py), and thresholds are fitted to them (thresholds.py).
What a real model skips is for `bsfa verify` to say.
"""

from __future__ import annotations

import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, explain
from bsfa_kernels.backends import FUSED
from bsfa_kernels.request import Request
from bsfa_kernels.tiles import tile_counts

from .. import structured
from ..errors import UsageError
from . import baselines, skip_softmax, thresholds
from .entrants import Entrants
from .flash_attention import TokensFirst
from .interleave import Begin, Contender, Timing, first_call, measure, unseen
from .plan import INT8, OURS, Plan, Shape, with_scores

NOT_FOR_GPU = ("torch", "reference")
APPROXIMATE = "dense, approximate"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
PREPARATION = "int8 preparation"
OPEN, ZERO = "bsfa, skipping compiled out", "bsfa, 0 % skipped"
LABELS = {
    "normal": "synthetic, unit normal; thresholds fitted to it",
    "structured": "synthetic, structured; one threshold for all heads and positions fitted to it",
}
CEILING = {"cuda": (8192, torch.bfloat16), "cpu": (768, torch.float32)}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """torch dtype of a plan's `dtype`: auto is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def ceiling(device: torch.device, seconds: float) -> dict:
    """What a square matrix product reaches here: {size, dtype, tflops, ms_median, samples_ms, ...}."""
    size, dtype = CEILING[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = measure([Contender("matmul", lambda: a @ b)], device, seconds=seconds)["matmul"]
    tflops = 2 * size**3 / timing.median / 1e9
    return {"size": size, "dtype": str(dtype).removeprefix("torch."), "tflops": tflops, **timing.as_dict()}


def cell(plan: Plan, shape: Shape, length: int, device: torch.device, seconds: float, begin: Begin = unseen) -> dict:
    """Measure one (shape, length); `seconds` bounds the timed part. The keys are described in profiles/README.md."""
    dtype, tile = resolve_dtype(plan.dtype, device), TileShape(*map(int, plan.tile.split("x")))
    data = plan.data_of(shape)
    q, k, v = tensors(data, shape, length, device, dtype, plan.seed)
    backend, passed_over = plan.backend, {}
    if backend == "auto":
        gate = thresholds.inert(plan.gate, shape.heads, 1, device)
        backend, passed_over = explain(q, k, v, gate, causal=shape.causal, tile=tile)
    tolerance = TOLERANCE[dtype]
    entrants = Entrants(device, tolerance)
    if device.type == "cuda" and plan.backend == "auto" and backend in NOT_FOR_GPU:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        entrants.leave_out("bsfa", f"no GPU kernel serves this shape ({reasons})")
    laid = TokensFirst(q, k, v)
    for name, call in baselines.dense(q, k, v, shape.causal, plan.baselines, laid).items():
        entrants.enter_dense(name, call)
    for name, call in baselines.approximate(laid, shape.causal, plan.baselines).items():
        entrants.enter_inexact(name, call, kind=APPROXIMATE, skip_target=None)
    for name, call, facts in rivals(plan, laid, shape.causal):
        if not entrants.enter_inexact(name, call, **facts):
            break  # the others would fail alike, after minutes of compiling
    error, wanted = None, {scores: backend for scores in plan.scores}
    if INT8 in wanted:
        wanted[INT8] = int8_backend(plan, shape, q, k, v, tile, entrants)
    for name, skip, gate in gates(plan, shape, q, k, v, tile, backend, entrants.unavailable):
        for scores, served in wanted.items():
            if served is None:
                continue

            def run(gate=gate, scores=scores, served=served, counts=False):
                result = block_sparse_attention(
                    q, k, v, gate, causal=shape.causal, tile=tile, scores=scores, backend=served, return_counts=counts
                )
                return result if counts else result.out

            out = entrants.enter(with_scores(name, scores), run, kind=OURS[scores], skip_target=skip)
            if out is None:
                continue
            entrants.rows[-1] |= skipped(run(counts=True), shape.causal, length, tile)
            entrants.rows[-1]["finite"] = bool(out.isfinite().all())
            if scores == INT8:
                entrants.rows[-1] |= {"skip_from": "counted", "backend": served, "error": entrants.error(out)}
            elif name == ZERO:
                error = entrants.error(out)
            del out
    contenders = entrants.contenders
    timings = measure(contenders, device, seconds=seconds, seed=plan.seed, begin=begin) if contenders else {}
    flops = dense_flops(shape, length)
    result = {
        "shape": shape.describe(),
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "tile": plan.tile,
        "gate": plan.gate,
        "backend": backend,
        "passed_over": passed_over,
        "data": LABELS[data],
        "flops_dense": flops,
        "error_at_zero": error,
        "error_tolerance": tolerance,
        "unavailable": entrants.unavailable,
    }
    return result | summarise(entrants.rows, timings, flops, shape.head_dim / (shape.head_dim + shape.values))


def int8_backend(plan: Plan, shape: Shape, q, k, v, tile: TileShape, entrants: Entrants) -> str | None:
    """The backend that int8 scores run on, its preparation entered beside it (it is part of every call that is timed);
    None where there is none, and then the reason is entered.
    """
    served, passed_over = plan.backend, {}
    gate = thresholds.inert(plan.gate, shape.heads, 1, q.device)
    if served == "auto":
        served, passed_over = explain(q, k, v, gate, causal=shape.causal, tile=tile, scores=INT8)
    if q.is_cuda and plan.backend == "auto" and served in NOT_FOR_GPU:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        entrants.leave_out("bsfa int8", f"no GPU kernel with int8 scores serves this shape ({reasons})")
        return None
    request = Request(
        q, k, v, gate, q.shape[-1] ** -0.5, shape.causal, tile, True, 0, None, False, False, scores=INT8
    )  # fmt: skip
    if served in FUSED:
        from bsfa_kernels.int8 import prepare
    else:
        from bsfa_kernels.quantise import prepare
    entrants.enter(PREPARATION, lambda: prepare(request).q8, kind=PREPARATION, skip_target=None)
    return served


def tensors(data: str, shape: Shape, length: int, device: torch.device, dtype: torch.dtype, seed: int):
    """q [batch, heads, length, head_dim], k and v [batch, kv_heads, length, head_dim] of the kind `data`; V's own head
    dim where the shape has one.
    """
    if data == "structured":
        if shape.values != shape.head_dim:
            raise UsageError(f"shape {shape.name}: structured data have no v_head_dim of their own")
        try:
            return structured.generate(
                heads=shape.heads, kv_heads=shape.kv_heads, length=length, head_dim=shape.head_dim, batch=shape.batch,
                device=device, dtype=dtype, seed=seed,
            )[:3]  # fmt: skip
        except ValueError as error:
            raise UsageError(f"shape {shape.name}: {error}") from error
    generator = torch.Generator(device=device).manual_seed(seed)
    return tuple(
        torch.randn(shape.batch, heads, length, head_dim, generator=generator, device=device, dtype=dtype)
        for heads, head_dim in (
            (shape.heads, shape.head_dim),
            (shape.kv_heads, shape.head_dim),
            (shape.kv_heads, shape.values),
        )
    )


def rivals(plan: Plan, laid: TokensFirst, causal: bool):
    """(contender name, call or reason, facts of its row) of NVIDIA's skip-softmax at the plan's skip rates."""
    if laid.given[0].device.type == "cpu":
        return
    reason = baselines.asked(skip_softmax.NAME, plan.baselines)
    if reason:
        yield skip_softmax.NAME, reason, {}
    else:
        yield from skip_softmax.contenders(laid, causal, plan.skip)


def gates(plan: Plan, shape: Shape, q, k, v, tile: TileShape, backend: str, unavailable: list):
    """(contender name, target skip rate, gate) of each of our kernel's runs; what cannot be fitted is reported."""
    if any(absent["name"] == "bsfa" for absent in unavailable):
        return
    yield OPEN, None, Gate()
    yield ZERO, 0.0, thresholds.inert(plan.gate, shape.heads, -(-q.shape[2] // tile.rows), q.device)

    def start():
        return thresholds.Fit(
            plan.gate, q, k, v, causal=shape.causal, tile=tile, backend=backend, seed=plan.seed,
            shared=plan.data_of(shape) == "structured",
        )  # fmt: skip

    fit, reason = first_call(start, q.device) if plan.skip else (None, None)
    for skip in plan.skip:
        name = f"bsfa, {skip:.0%} skipped".replace("%", " %")
        gate = None
        if fit is not None:
            gate, reason = first_call(lambda skip=skip: fit.reach(skip), q.device)
        if gate is None:
            unavailable.append({"name": name, "reason": f"no thresholds for it: {reason}"})
        else:
            yield name, skip, gate


def summarise(rows: list[dict], timings: dict[str, Timing], flops: int, qk_share: float = 0.5) -> dict:
    """Times, rates, speedups and bounds of one cell from its contenders' facts and samples; `qk_share` of the flops are
    QK^T's.
    """
    dense = [row["name"] for row in rows if row["kind"] == "dense"]
    fastest = min(dense, key=lambda name: timings[name].median, default=None)
    fastest_ms = timings[fastest].median if fastest else None
    contenders = []
    for row in rows:
        timing = timings[row["name"]]
        kept, whole = row.get("kept_share", 1.0), row["kind"] != PREPARATION
        # QK^T of every tile and PV of those kept; int8 products run at twice the rate.
        pv = (1 - qk_share) * kept
        bound = 1 / ((0.5 if row["kind"] == OURS[INT8] else 1) * qk_share + pv)
        speedup = fastest_ms / timing.median if fastest and whole else None
        contenders.append(
            row
            | {
                "tflops_dense_equivalent": flops / timing.median / 1e9 if whole else None,
                "tflops_executed": flops * (qk_share + pv) / timing.median / 1e9 if whole else None,
                "speedup": speedup,
                "bound": bound,
                "suspect": row["kind"] in OURS.values() and speedup is not None and speedup > bound,
            }
            | timing.as_dict()
        )
    by_name = {row["name"]: row for row in contenders}
    zero, closed = by_name.get(ZERO), by_name.get(OPEN)
    return {
        "contenders": contenders,
        "fastest_dense": fastest,
        "overhead_at_zero": zero["ms_median"] / fastest_ms - 1 if zero and fastest else None,
        "gate_overhead": zero["ms_median"] / closed["ms_median"] - 1 if zero and closed else None,
        "break_even_skip": break_even(
            [
                (row["skip"], row["ms_median"])
                for row in contenders
                if row["kind"] == "bsfa" and row["skip_target"] is not None
            ],
            fastest_ms,
        ),
    }


def break_even(points: list[tuple[float, float]], dense_ms: float | None) -> float | None:
    """Skip rate from which our time is at or below `dense_ms`, linear between (skip, ms) points; None if never."""
    if dense_ms is None:
        return None
    points = sorted(points)
    for i, (skip, ms) in enumerate(points):
        if ms <= dense_ms:
            if i == 0:
                return skip
            skip_before, ms_before = points[i - 1]
            return skip_before + (ms_before - dense_ms) / (ms_before - ms) * (skip - skip_before)
    return None


def dense_flops(shape: Shape, length: int) -> int:
    """Of dense attention: two for each product's multiply and add, over the pairs of positions that see each other."""
    pairs = length * (length + 1) // 2 if shape.causal else length * length
    return 2 * shape.batch * shape.heads * (shape.head_dim + shape.values) * pairs


def skipped(result, causal: bool, length: int, tile: TileShape) -> dict:
    """Reached skip rate over candidate tiles, and the share of all visited tiles (forced ones included) kept."""
    candidates = int(result.candidates.sum(dtype=torch.int64))
    dropped = candidates - int(result.kept.sum(dtype=torch.int64))
    visited = tile_counts(length, causal, True, tile)[0] * result.kept.shape[0] * result.kept.shape[1]
    return {
        "skip": dropped / candidates if candidates else 0.0,
        "kept_share": 1 - dropped / visited,
        "candidates": candidates,
    }
