"""Verify operating points: dense, then sparse, on the same tokens and weights in the same process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from bsfa_kernels.integrations.transformers import (
    SparseAttention,
    attach,
    attention_modules,
    notes,
)
from bsfa_kernels.integrations.visual_tokens import VisualTokens
from bsfa_kernels.thresholds import Thresholds

from ..errors import InputError
from ..metrics.logits import Head, Predictions
from ..models.prompts import Prompt
from ..prefill_tiles import Attending
from ..suites.run import dense_handlers
from .layers import DroppedMass, MeasuringAttention, by_modality, skip_rate

# Above every score: drops every tile that a gate may drop.
ABSURD = 1e30
# Texts skip as in calibration while the share of tiles kept is within both, absolutely and relatively.
DRIFT, FACTOR = 0.1, 1.5


@torch.no_grad()
def verify_points(
    model, thresholds: Thresholds, points: list[str], samples: list, backend: str, step: Callable[[], None],
    scores: str | None = None,
) -> list[dict]:  # fmt: skip
    """One result per operating point, JSON values only, None for numbers that are not finite.

    Dense is PyTorch's scaled_dot_product_attention in the same modules; no kernel of ours has a part in it.

    Keys: name, kept, candidates, skip, all three of the whole model, calibrated (the same three of the modules that ran
    with thresholds), uncalibrated {path of another one: its tiles}, dropped_mass {mean, p99, worst}, logits (see
    `Predictions.summary`, and kl_over_floor), floor (the same of exact scores with nothing skipped, as no two kernels
    round alike), modules (see `MeasuringAttention.summary`), modalities {of the query tile: kept, candidates, skip,
    dropped_mass} where there are images, kernel (see `KernelCheck`), finite; scores, made_for (the scores of the
    point's thresholds), exact_heads (heads that stay exact beside int8 ones) and unskipped (the logits of int8 scores
    with nothing skipped, None for exact ones). `samples` as `Prompt.of` takes them; `step` is called after every
    forward pass, `passes` times a sample. `scores` override the points' own. The model must run
    attn_implementation="bsfa".
    """
    modules = attention_modules(model)
    exact_handlers = dense_handlers(model)
    head = Head(model)
    options = dict(backend=backend, scores=scores)
    handlers = {point: SparseAttention.for_model(thresholds, modules, point, **options) for point in points}
    checked = _spread(list(handlers[points[0]]), 3)
    visual = VisualTokens()
    measured = {
        point: {
            path: MeasuringAttention(handler, path in checked, None if modules[path].tower else visual)
            for path, handler in handlers[point].items()
        }
        for point in points
    }
    whole = SparseAttention.for_model(everything(thresholds, points[0]), modules, backend=backend, scores="exact")
    unskipped = {
        point: SparseAttention.for_model(everything(thresholds, point), modules, **options)
        for point in points
        if scores_of(thresholds, point, scores) != "exact"
    }
    predictions, floor = {point: Predictions() for point in points}, Predictions()
    rounded = {point: Predictions() for point in unskipped}
    attending = {point: Attending(model) for point in points}
    for sample in samples:
        prompt = Prompt.of(sample, model)
        with attach(model, exact_handlers):
            exact = head.hidden(prompt)
        step()
        with attach(model, whole):
            floor.add(head, exact, head.hidden(prompt), prompt)
        step()
        for point, same in unskipped.items():
            with attach(model, same):
                rounded[point].add(head, exact, head.hidden(prompt), prompt)
            step()
        for point in points:
            with attach(model, measured[point]), attending[point]:
                predictions[point].add(head, exact, head.hidden(prompt), prompt)
            step()
    results = []
    for point in points:
        found = _result(point, measured[point], predictions[point], floor, attending[point])
        own = next(iter(handlers[point].values()))
        found |= {
            "scores": own.scores,
            "made_for": made_for(thresholds, point),
            "exact_heads": sum(len(handler.exact_heads) for handler in handlers[point].values()),
            "unskipped": _finite(rounded[point].summary()) if point in rounded else None,
        }
        results.append(found)
    return results


def scores_of(thresholds: Thresholds, point: str, scores: str | None) -> str:
    """What the point runs: `scores`, or its own."""
    return scores or thresholds.points[thresholds.index(point)].scores


def made_for(thresholds: Thresholds, point: str) -> str:
    """The scores whose statistics the point's thresholds were read from."""
    return "int8" if thresholds.provenance.get("scores") == "int8" else "exact"


def passes(thresholds: Thresholds, points: list[str], scores: str | None = None) -> int:
    """Forward passes of `verify_points` for each sample."""
    return 2 + len(points) + sum(scores_of(thresholds, point, scores) != "exact" for point in points)


def negative_control(
    model, thresholds: Thresholds, point: str, samples: list, backend: str, step: Callable[[], None],
    scores: str | None = None,
) -> dict:  # fmt: skip
    """The result of `verify_points` for thresholds that drop every candidate tile, on the first sample."""
    return verify_points(model, absurd(thresholds, point), [point], samples[:1], backend, step, scores)[0]


def absurd(thresholds: Thresholds, point: str) -> Thresholds:
    """`point` alone, with thresholds that drop every candidate tile."""
    return _filled(thresholds, point, ABSURD)


def everything(thresholds: Thresholds, point: str) -> Thresholds:
    """`point` alone, with thresholds that keep every tile."""
    return _filled(thresholds, point, -math.inf)


def _filled(thresholds: Thresholds, point: str, value: float) -> Thresholds:
    return dataclasses.replace(
        thresholds,
        points=(thresholds.points[thresholds.index(point)],),
        tensors={path: torch.full_like(tensor[:1], value) for path, tensor in thresholds.tensors.items()},
        modal={},
    )


def drift(thresholds: Thresholds, result: dict) -> str | None:
    """A sentence where the texts skip far more or less than the thresholds did in calibration: their kind differs."""
    point = thresholds.points[thresholds.index(result["name"])]
    expected, skip = point.held_out or point.fitted, result["calibrated"]["skip"]
    if expected is None:
        return None
    kept, once = 1 - skip, 1 - expected.skip
    if abs(kept - once) <= DRIFT and kept <= FACTOR * once and once <= FACTOR * kept:
        return None
    longest = thresholds.provenance.get("longest")
    length = f", in samples of up to {longest:,} tokens" if isinstance(longest, int) else ""
    return (
        f"{point.name} skips {skip:.1%} of these texts and skipped {expected.skip:.1%} in calibration{length}: "
        "texts of another kind or length have other thresholds; calibrate on what the model will read"
    )


def dense_notes(model) -> list[dict[str, str]]:
    """Modules that ran dense whatever the thresholds say, and why."""
    return [note._asdict() for note in notes(model) if not note.expected]


def _result(
    point: str, handlers: dict[str, MeasuringAttention], predictions: Predictions, floor: Predictions,
    attending: Attending,
) -> dict:  # fmt: skip
    ran = [handler for handler in handlers.values() if handler.ran]
    if not ran:
        raise InputError("none of the modules that the thresholds hold attends sparsely in this model; see its notes")
    modules = [handler.summary() for handler in ran]
    kept, candidates = (sum(module[key] for module in modules) for key in ("kept", "candidates"))
    unjudged = attending.unjudged({module["path"]: module["candidates"] // len(module["heads"]) for module in modules})
    rest = sum(unjudged.values())
    return _finite({
        "name": point,
        **_skipped(kept + rest, candidates + rest),
        "calibrated": _skipped(kept, candidates),
        "uncalibrated": unjudged,
        "dropped_mass": DroppedMass.overall([handler.dropped for handler in ran]),
        "logits": predictions.summary() | {"kl_over_floor": predictions.kl_over(floor)},
        "floor": floor.summary(),
        "modules": modules,
        "modalities": by_modality(ran),
        "kernel": [handler.kernel.to_json() for handler in ran if handler.kernel],
        "finite": predictions.finite and all(module["finite"] for module in modules),
    })  # fmt: skip


def _skipped(kept: int, candidates: int) -> dict:
    return {"kept": kept, "candidates": candidates, "skip": skip_rate(kept, candidates)}


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _spread(paths: list[str], count: int) -> set[str]:
    """First, last and evenly between."""
    return {paths[round(i * (len(paths) - 1) / max(count - 1, 1))] for i in range(min(count, len(paths)))}
