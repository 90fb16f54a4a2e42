"""The Hopper kernel played through on the CPU: its own lines, with PyTorch for Gluon and a thread for each partition.

Gluon does not run in Triton's interpreter. Here every name that the kernel's modules take from Gluon stands for the
same in PyTorch: tensors without layouts, shared memory that begins as NaN, TMA that fills with zeros, products as soon
as they are asked for, mbarriers and hardware barriers that threads wait at. So it finds what is wrong in the kernel's
arithmetic, positions, masks, counts and waits, but not what layouts, asynchronous products or ptxas do: those are for
a GPU (make gpu-test) and for compiling (sass.py).
"""

from __future__ import annotations

import functools
import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from bsfa_kernels import hopper, hopper_kernel, hopper_pipeline, hopper_stream
from played_program import Barrier, Barriers, Program, running
from triton.experimental.gluon import language as gluon_language

MODULES = (hopper_kernel, hopper_pipeline, hopper_stream)


class Whole(int):
    """A scalar integer with C's division."""

    def __floordiv__(self, other):
        quotient = abs(int(self)) // abs(int(other))
        return Whole(quotient if (self < 0) == (other < 0) else -quotient)

    def __mod__(self, other):
        return Whole(int(self) - int(other) * int(self.__floordiv__(other)))

    def __rfloordiv__(self, other):
        return Whole(other) // self

    def __rmod__(self, other):
        return Whole(other) % self

    def to(self, dtype):
        return self


def _whole(name):
    plain = getattr(int, name)

    def operator(self, *others):
        found = plain(self, *others)
        return Whole(found) if type(found) is int else found

    return operator


for _name in "add sub mul radd rsub rmul neg and or xor rand ror lshift rshift rlshift rrshift".split():
    setattr(Whole, f"__{_name}__", _whole(f"__{_name}__"))


class Value(torch.Tensor):
    """A tensor in registers. What is added to a product is added before that is rounded, as ptxas does (FMA)."""

    type = SimpleNamespace(layout=None)
    factors = None

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else super().to(dtype)

    def __mul__(self, other):
        product = super().__mul__(other)
        if product.dtype == torch.float32:
            product.factors = (self, other)
        return product

    __rmul__ = __mul__

    def __add__(self, other):
        product, term = (self, other) if self.factors else (other, self)
        if getattr(product, "factors", None) is None:
            return super().__add__(other)
        a, b = (x.double() if isinstance(x, torch.Tensor) else x for x in product.factors)
        return (a * b + term).float()

    def __sub__(self, other):
        return self + -other if self.factors else super().__sub__(other)


def value(x) -> Value | Whole:
    """A scalar where x has no axes and is an integer."""
    if x.ndim == 0 and not x.is_floating_point():
        return Whole(x.item())
    return x.as_subclass(Value)


class Pointer:
    """To elements of a tensor's storage; `at` counts them from its begin."""

    def __init__(self, flat: torch.Tensor, at):
        self.flat, self.at = flat, at
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    @classmethod
    def of(cls, x: torch.Tensor) -> Pointer:
        return cls(x.new_empty(0).set_(x.untyped_storage()), Whole(x.storage_offset()))

    def __add__(self, step):
        return Pointer(self.flat, self.at + step)


def load(pointer: Pointer, mask=None, other=None):
    at = torch.as_tensor(pointer.at)
    if mask is None:
        return value(elements(pointer, at))
    found = elements(pointer, torch.where(mask, at, 0))
    return value(torch.where(mask, found, torch.tensor(other, dtype=found.dtype)))


def elements(pointer: Pointer, at: torch.Tensor) -> torch.Tensor:
    assert (at >= 0).all(), "read in front of memory"
    return pointer.flat[at]


def store(pointer: Pointer, x, mask=None) -> None:
    at, x = torch.as_tensor(pointer.at), torch.as_tensor(x)
    if mask is not None:
        at, x = at.expand(mask.shape)[mask], x.expand(mask.shape)[mask]
    assert (at >= 0).all(), "written in front of memory"
    pointer.flat[at] = x.as_subclass(torch.Tensor).to(pointer.flat.dtype)


class Shared:
    """Shared memory."""

    def __init__(self, x: torch.Tensor):
        self.x, self.dtype, self.shape = x, x.dtype, x.shape

    def index(self, i):
        return Shared(self.x[int(i)])

    def slice(self, start, length):
        return Shared(self.x[int(start) : int(start) + length])

    def reshape(self, shape):
        return Shared(self.x.view(shape))

    def permute(self, order):
        return Shared(self.x.permute(order))

    def load(self, layout):
        return self.x.clone().as_subclass(Value)

    def store(self, x):
        self.x.copy_(torch.as_tensor(x))


class Descriptor:
    """What TMA knows of Q, K or V."""

    def __init__(self, described):
        self.base, self.block, self.layout = described.base, described.block_shape, None
        self.dtype = self.base.dtype
        size = self.block[2] * self.block[3] * self.base.element_size()
        self.block_type = SimpleNamespace(nbytes=size)

    def read(self, at) -> torch.Tensor:
        batch, head, row, column = map(int, at)
        found = torch.zeros(self.block[2:], dtype=self.dtype)
        rows, columns = self.base.shape[2:]
        first, end, right = max(row, 0), min(row + self.block[2], rows), min(column + self.block[3], columns)
        if 0 <= batch < self.base.shape[0] and 0 <= head < self.base.shape[1] and first < end and column < right:
            found[first - row : end - row, : right - column] = self.base[batch, head, first:end, column:right]
        return found


def tma_load(descriptor, at, barrier, to: Shared) -> None:
    def load() -> int:
        to.x.copy_(descriptor.read(at).view(to.x.shape))
        return descriptor.block_type.nbytes

    running.program.bring(barrier, load)


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    a, b = (x.x if isinstance(x, Shared) else x.as_subclass(torch.Tensor) for x in (a, b))
    product = a.to(acc.dtype) @ b.to(acc.dtype)
    return (product + acc if use_acc else product).as_subclass(Value)


def select(condition, yes, no):
    if any(isinstance(x, torch.Tensor) for x in (condition, yes, no)):
        return torch.where(*map(torch.as_tensor, (condition, yes, no))).as_subclass(Value)
    return yes if condition else no


def extreme(of_scalars, of_numbers, of_all):
    """A smaller or larger one. Unless NaN is to come through, a number wins over it."""

    def choose(a, b, propagate_nan=None):
        if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
            return of_scalars(a, b)
        a, b = (torch.as_tensor(x, dtype=(a if isinstance(a, torch.Tensor) else b).dtype) for x in (a, b))
        return (of_numbers if propagate_nan is None else of_all)(a, b).as_subclass(Value)

    return choose


def allocate(dtype, shape, layout):
    if layout == "barriers":
        return Barriers(shape[0]) if len(shape) == 2 else Barrier()
    x = torch.empty(shape, dtype=dtype)
    return Shared(x.fill_(float("nan") if x.is_floating_point() else 77))


GLUON = SimpleNamespace(
    float32=torch.float32, int32=torch.int32, int64=torch.int64,
    program_id=lambda axis: Whole(running.program.number[axis]),
    num_programs=lambda axis: Whole(running.program.count[axis]), load=load, store=store,
    arange=lambda begin, end, layout: torch.arange(begin, end, dtype=torch.int32).as_subclass(Value),
    full=lambda shape, x, dtype, layout: torch.full(shape, x, dtype=dtype).as_subclass(Value),
    where=select, minimum=extreme(min, torch.fmin, torch.minimum), maximum=extreme(max, torch.fmax, torch.maximum),
    max=lambda x, axis: value(x.amax(axis)), sum=lambda x, axis: value(x.sum(axis, dtype=x.dtype)),
    reduce=lambda x, axis, combine: functools.reduce(combine, x.unbind(axis)), split=lambda x: (x[..., 0], x[..., 1]),
    exp2=torch.exp2, log2=torch.log2, convert_layout=lambda x, layout, assert_trivial=False: x, static_range=range,
    to_tensor=lambda x: Whole(x) if isinstance(x, int) else x, multiple_of=lambda pointer, n: pointer,
    allocate_shared_memory=allocate, warp_specialize=lambda *given: running.program.specialize(*given),
    SliceLayout=lambda *_: None, DotOperandLayout=lambda *_: None, BlockedLayout=lambda *_: None,
    DistributedLinearLayout=lambda *_: None, NVMMADistributedLayout=lambda *_: None,
    SwizzledSharedLayout=lambda *_: None, NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *_: None),
)  # fmt: skip
INSTRUCTIONS = dict(
    mbarrier=SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=lambda barrier, count: setattr(barrier, "count", count),
        expect=lambda barrier, size: running.program.arrive(barrier, size),
        arrive=lambda barrier: running.program.arrive(barrier),
        wait=lambda barrier, phase: running.program.await_phase(barrier, phase),
    ),
    warpgroup_mma=warpgroup_mma,
    warpgroup_mma_wait=lambda pending, deps: deps[0] if len(deps) == 1 else tuple(deps),
    fence_async_shared=lambda: None,
    tma_load=tma_load,
    reinterpret=lambda memory, dtype, shape, layout: Shared(memory.x.view(-1).view(dtype).view(shape)),
    give_back=lambda slot, variant: running.program.give_back(slot, variant),
    wait_returned=lambda slot, variant: running.program.wait_returned(slot, variant),
    anyone=lambda flags, consumer: bool(flags.any()),
    declare_vote=lambda x: None,
)  # fmt: skip


@contextmanager
def played(monkeypatch, late: bool = False):
    """The hopper backend computes on tensors of the CPU, within. What TMA brings lands at once or, `late`, only when
    somebody waits for it: one finds slots that are filled too early, the other waits that are missing.
    """
    with monkeypatch.context() as patch:
        for module in MODULES:
            for name, x in list(vars(module).items()):
                if x is gluon_language:
                    patch.setattr(module, name, GLUON)
                elif name in INSTRUCTIONS:
                    patch.setattr(module, name, INSTRUCTIONS[name])
                elif isinstance(x, gluon_language.constexpr):
                    patch.setattr(module, name, x.value)
                elif hasattr(x, "fn") and getattr(x.fn, "__module__", "").startswith("bsfa_kernels"):
                    patch.setattr(module, name, x.fn)
        patch.setattr(hopper, "launches", SimpleNamespace(of=lambda key, pointers: Launch(late), kernels={}))
        patch.setattr(hopper, "unsupported", lambda request: None)
        yield


class Launch:
    compiled = None

    def __init__(self, late: bool):
        self.late = late

    def __call__(self, grid, q, k, v, *arguments, num_warps, maxnreg) -> None:
        pointers = [Pointer.of(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        numbers = [Whole(x) if type(x) is int else x for x in pointers]
        for number in itertools.product(*map(range, reversed(grid))):
            running.program = Program(number[::-1], grid, self.late)
            hopper_kernel.forward(*map(Descriptor, (q, k, v)), *numbers)
