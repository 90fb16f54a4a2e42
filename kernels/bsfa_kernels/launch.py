"""What the Triton backends share on the host's side of a launch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from .relaunch import Relaunch
from .request import reached_by_descriptors

# float32 is for tests: three tf32 products come close to it without unrolling thousands of FMAs.
FLOAT32_DOT = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "tf32x3")
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def interpreted() -> bool:
    """True when kernels run in Triton's interpreter (TRITON_INTERPRET=1) and so on CPU tensors."""
    return triton.knobs.runtime.interpret


def wide_products(device: torch.device) -> bool:
    """Whether products take operands from shared memory, as those of wgmma and of its successor do: others need
    registers for them.
    """
    return interpreted() or torch.cuda.get_device_capability(device)[0] in (9, 10)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a contiguous copy where its base or strides break the 16-byte rule of tensor descriptors.

    The strides of axes of size 1 address nothing, but are held to the rule all the same: those are replaced.
    """
    size = x.element_size()
    bits = x.data_ptr()
    for n in x.stride()[:-1]:
        bits |= n * size
    if bits % 16 == 0:
        return x
    if not reached_by_descriptors(x):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    return x.as_strided(x.shape, [16 if n * size % 16 else n for n in x.stride()[:-1]] + [x.stride(-1)])


def int32(integers: Iterable[int]) -> bool:
    """Whether Triton takes all of them as int32. For others it makes another kernel; one that was compiled for int32
    is given their low half, by Triton 3.7's launcher as its source has it.
    """
    return max(integers) < 1 << 31


def device_guard(x: torch.Tensor) -> AbstractContextManager:
    """Make the tensor's GPU current while a kernel is launched."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


class Launches:
    """Launches of a JIT function without Triton's front end, where it compiled for the like before.

    The front end looks at every argument anew: a fifth of a call's host time or more. Here the caller says by `key`
    what it would have found: all constants, dtypes, options and the device; integers have to be among the function's
    do_not_specialize, and int32. What is left are addresses: the front end tells multiples of 16 from others, which it
    serves itself, as it does all of a call without a key.
    """

    def __init__(self, function):
        self.function = function
        self.kernels: dict[Hashable, Relaunch] = {}

    def of(self, key: Hashable | None, pointers: Iterable[torch.Tensor | None]) -> Launch:
        """The launch of such a call."""
        address = 0
        for x in pointers:
            if x is not None:
                address |= x.data_ptr()
        return Launch(self, None if address % 16 else key)


class Launch:
    """Of a call: `launch(grid, *arguments, **options)`, all arguments in order; `compiled` where the front end is not
    asked, nor the options.
    """

    def __init__(self, launches: Launches, key: Hashable | None):
        self.launches, self.key = launches, key
        self.compiled = launches.kernels.get(key)

    def __call__(self, grid: tuple[int, int, int], *arguments, **options) -> None:
        if self.compiled is not None:
            self.compiled(grid, (), *arguments)
            return
        kernel = self.launches.function[grid](*arguments, **options)
        if self.key is not None and hasattr(kernel, "__getitem__"):
            self.launches.kernels[self.key] = Relaunch(kernel)
