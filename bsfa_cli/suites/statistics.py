"""How sure an accuracy is: Wilson's interval for a share, a paired bootstrap for two models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054  # two-sided 95 %
RESAMPLES = 4000


def wilson(right: int, questions: int) -> tuple[float, float]:
    """95 % interval of the share right / questions; (0, 1) without questions."""
    if not questions:
        return 0.0, 1.0
    share, spread = right / questions, Z * Z / questions
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / questions + spread / (4 * questions)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired(sparse: Sequence[float], dense: Sequence[float], seed: int = 0) -> dict:
    """JSON of sparse against dense scores of the same questions: `difference` of the means and `retention`, their
    ratio, with 95 % intervals over resampled questions; ratios are None where no dense answer is right.
    """
    import torch  # not at the top: reports need Wilson's interval and no torch

    pair = torch.tensor([sparse, dense], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(pair.shape[1], (RESAMPLES, pair.shape[1]), generator=generator)
    means = pair.mean(1)
    resampled = pair[:, picks].mean(2)
    ratios = resampled[0] / resampled[1]
    ratios = ratios[ratios.isfinite()]
    return {
        "difference": float(means[0] - means[1]),
        "difference_interval": _interval(resampled[0] - resampled[1]),
        "retention": float(means[0] / means[1]) if means[1] else None,
        "retention_interval": _interval(ratios) if len(ratios) and means[1] else None,
    }


def _interval(values) -> list[float]:
    return values.quantile(values.new_tensor([0.025, 0.975])).tolist()
