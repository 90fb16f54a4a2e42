"""The shortcut of a call that equals an earlier one but for what its tensors hold and where they lie.

Whether a call is refused, which backend serves it and how a kernel is launched follow from its signature: all that is
no tensor and, of tensors, type, shape, strides, dtype and device. Where a signature was served before, and its backend
has an `again` (hopper_again.py), outputs, addresses and a launch are left. Values and addresses are never remembered.

The shortcut leads past the operator, by which torch.compile, fake tensors, functorch, tracers, profilers and autograd
see a call. So it is open only where none of them can be looking; anybody else's call goes the long way (api.py), as the
first of a signature does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import backends
from .blocks import BlockLists
from .gates import Gate
from .packed import Packed
from .request import Request

try:
    from torch._C import DispatchKey, DispatchKeySet, _dispatch_keys, _dispatch_tls_local_include_set
    from torch._C import _is_torch_function_mode_enabled as _function_mode
    from torch._C._dynamo.eval_frame import get_eval_frame_callback as _compiling_callback
    from torch.autograd import _profiler_enabled
except ImportError:  # a PyTorch that cannot be asked: everything goes the long way
    _dispatch_keys = None

AGAIN = {"hopper": "hopper_again"}  # modules by backend
MOST = 4096  # signatures
TENSORS = 12  # of a call, at most
KINDS = {torch.Tensor, torch.nn.Parameter}
SCALARS = {int, float, bool, str, type(None), type}
HOLDERS = {Gate, BlockLists, Packed, type(None)}  # a class derived from one may give backends other tensors
plans: dict[tuple, Callable] = {}


def _bits(*names: str) -> int:
    bits = 0
    for name in names:
        bits |= DispatchKeySet(getattr(DispatchKey, name)).raw_repr()
    return bits


if _dispatch_keys is not None:
    # Dispatch keys of a thread on which nothing takes operators, and of tensors that are memory and nothing else.
    ORDINARY = _bits("BackendSelect", "ADInplaceOrView")
    PLAIN = _bits("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")


def is_open() -> bool:
    """Whether nobody on this thread looks at operators."""
    return not (
        _dispatch_keys is None
        or torch.is_grad_enabled()
        or _function_mode()
        or _profiler_enabled()
        or _compiling_callback() is not None
        or _dispatch_tls_local_include_set().raw_repr() & ~ORDINARY
    )


def find(
    q, k, v, gate, blocks, spans, sinks, out, block_table, packed, tile, options: tuple
) -> tuple[tuple | None, tuple, Callable | None]:  # fmt: skip
    """(signature, tensors as its plan takes them, plan or None) of a call; no signature where nothing is remembered."""
    try:
        rows, of_packed = q.shape[-2], ()
        sequences = indices = counts = None
        if blocks is not None:
            indices, counts = blocks.indices, blocks.counts
        if packed is not None:
            if spans is not None:
                return None, (), None
            sequences, spans, rows, of_packed = packed.table, packed.spans, packed.rows, (packed.keys, packed.end)
        if rows < tile.rows:  # mostly another backend's, which has no plans, and at each step of other lengths
            return None, (), None
        tensors = (q, k, v, gate.absolute, gate.gap, spans, indices, counts, sinks, out, block_table, sequences)
        options = (*options, tile.rows, tile.keys, rows, *of_packed, type(gate), type(blocks), type(packed))
        signature = (
            *[
                x if x is None else (x.shape, x.stride(), x.dtype, x.device, _dispatch_keys(x).raw_repr(), type(x))
                for x in tensors
            ],
            *map(type, options),
            *options,
        )
        return signature, tensors, plans.get(signature)
    except Exception:  # an argument of another kind: the long way serves it or says what is wrong
        return None, (), None


def remember(signature: tuple, request: Request, demanded: str) -> None:
    """Keep what the next such call can do without. It was served, by the backend that `demanded` leads to."""
    plan, tensors, others = None, signature[:TENSORS], signature[TENSORS:]
    if any(isinstance(x, torch.Tensor) for x in others):  # numbers given as tensors would be kept alive
        return
    if len(plans) >= MOST:
        plans.clear()
    plain = all(x is None or (x[-1] in KINDS and not x[-2] & ~PLAIN) for x in tensors)
    if plain and HOLDERS.issuperset(others[-3:]) and all(type(x) in SCALARS for x in others):
        name, _, _ = backends.choose(request, demanded)
        plan = backends.load(AGAIN[name]).again(request) if name in AGAIN else None
    plans[signature] = plan or nothing


def nothing(*tensors) -> None:
    """The plan of calls that have none."""
