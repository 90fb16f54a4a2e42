"""Launch first, then start the clock: on a GPU, what is timed should not wait for the host to launch it.

A plain PyTorch selection is a hundred small kernels, which the host launches more slowly than the device runs them; a
clock that runs meanwhile measures Python. Between two uses of a Lead the host's own speed is learnt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CYCLES_PER_MS = 2_000_000  # at least a millisecond at clocks of up to 2 GHz
MARGIN = 2.0


class Lead:
    """The lead that one piece of work needs. `launch_ms` is the shortest time the host took to launch it: a longer one
    waited for a full queue, or for the device.
    """

    def __init__(self):
        self.launch_ms: float | None = None

    def hold(self, device: torch.device) -> None:
        """Keep `device` busy for as long as the host will need, with a margin; not at all before the first launch."""
        if self.launch_ms is not None:
            with torch.cuda.device(device):
                torch.cuda._sleep(int(MARGIN * self.launch_ms * CYCLES_PER_MS))

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Around the launch of the work."""
        start = time.perf_counter()
        yield
        spent = (time.perf_counter() - start) * 1e3
        self.launch_ms = spent if self.launch_ms is None else min(spent, self.launch_ms)
