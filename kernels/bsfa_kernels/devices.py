"""What the host wants to know of a GPU, without Triton."""

from __future__ import annotations

from functools import cache

import torch


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return _processors(device)


# As backends.fused: torch.compile need not look into it. It does look into what is cached, with a warning.
processors._dynamo_marked_constant = True


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
