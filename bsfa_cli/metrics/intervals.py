"""How far a mean over texts may be off: a paired bootstrap over whole texts.

Positions of one text are alike, so texts are drawn, and what is compared, dense with sparse or sparse with the noise
floor, is drawn together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

RESAMPLES, LEAST_TEXTS, SHARE = 10_000, 4, 0.95


def interval(statistic: Callable[[torch.Tensor], torch.Tensor], texts: torch.Tensor) -> list[float] | None:
    """95 % of what `statistic` gives for texts drawn with replacement; None for fewer than LEAST_TEXTS.

    texts float64 [texts, sums]; `statistic` maps sums [..., sums] to [...]. The same texts give the same interval.
    """
    count = len(texts)
    if count < LEAST_TEXTS:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    times = torch.zeros(RESAMPLES, count, dtype=texts.dtype).scatter_add_(1, drawn, torch.ones(drawn.shape).to(texts))
    found = statistic(times @ texts).sort().values
    outside = (1 - SHARE) / 2
    return [float(found[round(end * (RESAMPLES - 1))]) for end in (outside, 1 - outside)]
