"""A compiled kernel, launched again without the Python in front of Triton's launcher.

That Python looks at every argument for tensor descriptors, encodes those field by field, and prepares what hooks could
ask for: 10 of the 14 us of a launch (kernels/NOTES.md, Host). Behind it is a function in C, private and of two forms in
the versions of KNOWN. With another version or another launcher, and while a hook is set (Proton), a kernel is launched
as in Triton's tutorials, by `kernel[grid](...)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

KNOWN = ("3.6", "3.7", "3.9")


class Relaunch:
    """Launches of a kernel. Its first arguments are descriptors, of class `kind`, of `slabs`: (shape, strides, block,
    layout) each.
    """

    def __init__(self, kernel, slabs: tuple[tuple, ...] = (), kind: type | None = None):
        self.kernel, self.slabs, self.kind = kernel, slabs, kind
        self.bare = _bare(kernel, slabs)

    def __call__(self, grid: tuple[int, int, int], bases: tuple[torch.Tensor, ...], *arguments) -> None:
        """`bases` are the descriptors' tensors. Addresses serve as pointers among the other arguments."""
        if self.bare is not None and not _hooked():
            self.bare(grid, bases, arguments)
        else:
            descriptors = (self.kind(x, *slab) for x, slab in zip(bases, self.slabs, strict=True))
            self.kernel[grid](*descriptors, *arguments)


def _hooked() -> bool:
    knobs = triton.knobs.runtime
    return bool(
        getattr(knobs.launch_enter_hook, "calls", knobs.launch_enter_hook)
        or getattr(knobs.launch_exit_hook, "calls", knobs.launch_exit_hook)
    )


def _bare(kernel, slabs: tuple[tuple, ...]) -> Callable | None:
    """`launch(grid, bases, arguments)`, or None where Triton is not as it is known here."""
    version, run = triton.__version__.rpartition(".")[0], getattr(kernel, "run", None)
    if version not in KNOWN or type(run).__module__ != "triton.backends.nvidia.driver":
        return None
    kinds = getattr(kernel.metadata, "tensordesc_meta", None) or ()
    if len(kinds) != len(slabs) or any(x is None or x["fp4_padded"] or x.get("is_im2col") for x in kinds):
        return None
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    driver = triton.runtime.driver.active
    # What a descriptor is encoded from but for its base, and what the kernel is given besides.
    fields = [
        (
            (kind["swizzle"], kind["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[kind["elem_type"]], kind["block_size"],
             list(shape), list(strides), 0),
            (*shape, *strides),
        )
        for kind, (shape, strides, *_) in zip(kinds, slabs, strict=True)
    ]  # fmt: skip
    first = (kernel.function, run.launch_cooperative_grid, run.launch_pdl)
    if version == "3.6":  # a function for each kernel, which takes its arguments one by one
        launch = _closed_over(run.launch, "launcher") if slabs else run.launch
        encode = driver.utils.fill_tma_descriptor
        middle, last = (None, None, kernel.packed_metadata, None, None, None), None
    else:  # one for all
        launch, encode = driver.utils.launch, driver.utils.fill_tma_descriptor_tiled
        middle = (kernel.packed_metadata, None, None, None, None, None)
        last = (run.arg_annotations, run.kernel_signature)

    def bare(grid, bases, arguments):
        stream = driver.get_current_stream(driver.get_current_device())
        given = []
        for x, (encoded, numbers) in zip(bases, fields, strict=True):
            given += (encode(x.data_ptr(), *encoded), *numbers)
        if last is None:
            launch(*grid, stream, *first, *middle, *given, *arguments)
        else:
            launch(*grid, stream, *first, *middle, *last, (*given, *arguments))

    return bare


def _closed_over(function: Callable, name: str):
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
