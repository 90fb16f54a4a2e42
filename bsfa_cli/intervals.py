"""Confidence intervals of what was counted."""

from __future__ import annotations

from math import sqrt

Z95 = 1.959964  # two-sided 95 %


def wilson(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a share `right` / `total` (Wilson 1927); (0, 1) where nothing was counted."""
    if not total:
        return 0.0, 1.0
    share, square = right / total, z * z
    centre = share + square / (2 * total)
    spread = z * sqrt(share * (1 - share) / total + square / (4 * total * total))
    low, high = (centre - spread) / (1 + square / total), (centre + spread) / (1 + square / total)
    return max(0.0, low), min(1.0, high)
