"""What the host wants to know of a GPU, without Triton."""

from __future__ import annotations

from functools import cache

import torch


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


# As backends.fused: torch.compile need not look into it.
processors._dynamo_marked_constant = True
