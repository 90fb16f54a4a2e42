"""What the Triton backends share on the host's side of a launch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

# float32 is for tests: three tf32 products come close to it without unrolling thousands of FMAs.
FLOAT32_DOT = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "tf32x3")
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def interpreted() -> bool:
    """True when kernels run in Triton's interpreter (TRITON_INTERPRET=1) and so on CPU tensors."""
    return triton.knobs.runtime.interpret


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a contiguous copy where its base or strides break the 16-byte rule of tensor descriptors.

    The strides of axes of size 1 address nothing, but are held to the rule all the same: those are replaced.
    """
    size = x.element_size()
    odd = [axis for axis, n in enumerate(x.stride()[:-1]) if n * size % 16]
    if x.data_ptr() % 16 or any(x.shape[axis] > 1 for axis in odd):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    return x.as_strided(x.shape, [16 if axis in odd else n for axis, n in enumerate(x.stride())]) if odd else x


def device_guard(x: torch.Tensor):
    """Make the tensor's GPU current while a kernel is launched."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
