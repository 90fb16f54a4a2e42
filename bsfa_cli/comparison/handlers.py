"""What an attention module of a model runs while a method is compared: the method itself, its loss, or its clock."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch
from bsfa_kernels import TileShape
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..timing import flash_attention
from ..timing.lead import Lead
from ..timing.libraries import Library
from .measure import ATTENTION, SELECTION
from .methods import Method, attend
from .quality import Quality
from .tensors import Layer


class Stopwatch:
    """Device time of the phases of forward passes, summed over the calls within each pass.

    On a GPU each call is launched before its clock starts, once earlier calls have told how long that takes; how long
    the device was held for that is read by HELD.
    """

    HELD = "held"

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.leads = {SELECTION: Lead(), ATTENTION: Lead()}
        self.passes: list[dict[str, list]] = []

    def begin(self) -> None:
        """A new forward pass."""
        self.passes.append({SELECTION: [], ATTENTION: [], self.HELD: []})

    @contextmanager
    def lap(self, phase: str):
        """Times its block, once a pass has begun; on a GPU by events, without waiting."""
        if not self.passes:
            yield
            return
        laps, lead = self.passes[-1], self.leads[phase]
        if self.cuda:
            before, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            before.record()
            lead.hold(self.device)
            start.record()
            with lead.launching():
                yield
            end.record()
            laps[self.HELD].append((before, start))
            laps[phase].append((start, end))
        else:
            start = time.perf_counter()
            yield
            laps[phase].append((time.perf_counter() - start) * 1e3)

    def read(self, phase: str, last: int) -> list[float]:
        """Milliseconds of the `last` passes; call after the device has finished them."""

        def length(lap):
            return lap[0].elapsed_time(lap[1]) if self.cuda else lap

        return [sum(map(length, laps[phase])) for laps in self.passes[-last:]]


class DenseAttention:
    """A named backend of PyTorch's scaled_dot_product_attention, on one stopwatch with everything else."""

    def __init__(self, backend: SDPBackend, stopwatch: Stopwatch):
        self.backend, self.stopwatch = backend, stopwatch

    def __call__(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None) -> torch.Tensor:
        with self.stopwatch.lap(ATTENTION), sdpa_kernel(self.backend):
            return scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )


class FlashAttention(flash_attention.Handler):
    """FlashAttention-3 or -4, on the same stopwatch. Modules with windows and the like run what they run for all."""

    knows_scoring = False

    def __init__(self, library: Library, stopwatch: Stopwatch):
        super().__init__(library)
        self.stopwatch = stopwatch

    def __call__(self, q, k, v, **options) -> torch.Tensor:
        with self.stopwatch.lap(ATTENTION):
            return super().__call__(q, k, v, **options)


class MethodAttention:
    """A handler (bsfa_kernels.integrations.transformers.Handler): one method at one setting in one module.

    With `quality`, exact attention runs beside it on the same queries, keys and values, and the loss is added there.

    Raises ValueError for padded, batched, chunked or cached prompts, and for a direction the method is not defined for:
    nothing runs dense without a word.
    """

    def __init__(self, path: str, method: Method, setting: float, tile: TileShape, stopwatch: Stopwatch):
        self.path, self.method, self.setting, self.tile, self.stopwatch = path, method, setting, tile, stopwatch
        self.quality: Quality | None = None

    def __call__(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None) -> torch.Tensor:
        options = dict(scale=scale, causal=causal, tile=self.tile)
        if q.shape[2] != k.shape[2] or (spans is not None and spans.tolist() != [[0, 0, q.shape[2], q.shape[2]]]):
            raise ValueError("methods are compared on whole prompts, one at a time, without padding")
        if not self.method.defined(causal):
            raise ValueError(f"not defined for {'causal' if causal else 'non-causal'} attention")
        with self.stopwatch.lap(SELECTION):
            choice = self.method.choose(self.path, q, k, v, setting=self.setting, **options)
        if self.quality is None:
            with self.stopwatch.lap(ATTENTION):
                return attend(q, choice, **options).out
        return self.quality.measure(Layer(self.path, q, k, v, scale, causal), choice, self.tile)
