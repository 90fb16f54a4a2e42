"""How far an output is from the one it should be: relative L2, from sums that add up over heads and layers."""

from __future__ import annotations

import torch


def squares(out: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(squared L2 distance, squared norm of `expected`) of [B, H, T, D] tensors; no whole float64 copy is made."""
    distance = norm = 0.0
    for ours, theirs in zip(out.flatten(0, 1), expected.flatten(0, 1), strict=True):
        distance += float((ours.double() - theirs.double()).square().sum())
        norm += float(theirs.double().square().sum())
    return distance, norm


def relative(distance: float, norm: float) -> float | None:
    """The relative L2 distance of such sums; 0 where there is nothing to be far from, None when it is not finite."""
    value = (distance / norm) ** 0.5 if norm else 0.0
    return value if value < float("inf") else None
