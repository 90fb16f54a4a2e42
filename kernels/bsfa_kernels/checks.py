"""What block_sparse_attention() and tile_statistics() refuse, each by one sentence: a ValueError, or a TypeError for
what is of a wrong type.
"""

from __future__ import annotations

import inspect
from functools import wraps
from numbers import Integral, Real

import torch

from .blocks import BlockLists
from .gates import MOST, Gate
from .packed import Packed
from .request import SCORES, UNBOUNDED, query_tiles
from .tiles import TileShape

LEAST = torch.finfo(torch.float32).tiny
TENSOR, OPTIONAL_TENSOR = ((torch.Tensor,), "a torch.Tensor"), ((torch.Tensor, type(None)), "a torch.Tensor")
NUMBER = (Real, type(None)), "a number or None"
FLAG, NAME = ((bool,), "True or False"), ((str,), "a name")
# {argument: (its types, the same in words)}
TYPES = {
    **dict.fromkeys(("q", "k", "v", "lse"), TENSOR),
    **dict.fromkeys(("spans", "sinks", "out", "block_table"), OPTIONAL_TENSOR),
    **dict.fromkeys(("scale", "softcap"), NUMBER),
    **dict.fromkeys(("causal", "keep_sink", "return_lse", "return_counts"), FLAG),
    **dict.fromkeys(("scores", "backend"), NAME),
    "gate": ((Gate,), "a Gate"),
    "blocks": ((BlockLists, type(None)), "BlockLists or None"),
    "q_offset": ((Integral, torch.SymInt), "a whole number"),
    "window": ((Integral, torch.SymInt, type(None)), "a whole number of keys or None"),
    "tile": ((TileShape,), "a TileShape"),
    "packed": ((Packed, type(None)), "what pack() gives"),
}


def explained(function):
    """`function`, which says which argument is of a wrong type where Python and torch would speak of something else.
    Nothing is looked at before they do.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*arguments, **options):
        try:
            return function(*arguments, **options)
        except (AttributeError, TypeError, RuntimeError, OverflowError):
            try:
                given = signature.bind(*arguments, **options).arguments
            except TypeError:
                given = {}
            refuse_types(given)
            raise

    return call


def refuse_types(given: dict) -> None:
    """Raise TypeError for the first argument that is not of its type; tensors of one element are numbers too, of
    integers whole ones.
    """
    for name, value in given.items():
        types, words = TYPES.get(name, ((object,), ""))
        number = types[0] in (Real, Integral) and isinstance(value, torch.Tensor) and value.numel() == 1
        number = number and not (value.is_complex() or (types[0] is Integral and value.is_floating_point()))
        if not number and not isinstance(value, types):
            raise TypeError(f"{name} must be {words}, got {type(value).__name__}") from None


def check_tensor(name, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_axes(name, x):
    check_tensor(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 axes [batch, heads, length, head dim], got shape {list(x.shape)}")


def check(q, k, v, scale, q_offset, spans, block_table=None, sequences=None):
    check_tensor("q", q)
    dtype, device = q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_axes(name, x)
        if x.dtype != dtype or x.device != device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, but q is {dtype} on {device}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous along its last axis, got strides {list(x.stride())}")
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    batch = of_q[0] if sequences is None else len(sequences)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {dtype}")
    if of_k[:3] != of_v[:3]:
        raise ValueError(f"k and v must agree in all but their last axis, got {list(of_k)} and {list(of_v)}")
    if of_v[3] > of_k[3]:
        raise ValueError(f"v must not be wider than k, got head dims {of_v[3]} and {of_k[3]}")
    if block_table is not None:
        check_table(q, block_table, batch)
        if of_v != of_k:
            raise ValueError(f"pages of K and V must be alike, got {list(of_k)} and {list(of_v)}")
        if of_q[3] != of_k[3]:
            raise ValueError(f"q {list(of_q)} and pages {list(of_k)} must agree in head dim")
    elif of_q[0] != of_k[0] or of_q[3] != of_k[3]:
        raise ValueError(f"q {list(of_q)} and k {list(of_k)} must agree in batch size and head dim")
    if of_k[1] < 1 or of_q[1] % of_k[1]:
        raise ValueError(f"query heads ({of_q[1]}) must be a multiple of key/value heads ({of_k[1]})")
    if min(*of_q, *of_k, *of_v) < 1:
        raise ValueError(f"empty input: q {list(of_q)}, k {list(of_k)}, v {list(of_v)}")
    if scale is not None and not LEAST <= scale <= MOST:
        raise ValueError(f"scale must be positive and finite in float32, got {scale}")
    if type(q_offset) is not int:  # an operator would cut off fractions
        refuse_types({"q_offset": q_offset})
    if spans is None and q_offset < 0:
        raise ValueError(f"q_offset must not be negative, got {q_offset}; left padding is described by spans")
    if spans is None and q_offset + of_q[2] > UNBOUNDED:
        raise ValueError(
            f"queries end before position {UNBOUNDED:,}, got q_offset {q_offset:,} and {of_q[2]:,} queries"
        )
    keys = of_k[2] if block_table is None else of_k[2] * block_table.shape[1]
    if keys > UNBOUNDED:
        raise ValueError(f"keys end before position {UNBOUNDED:,}, got {keys:,}")
    if spans is not None:
        check_tensor("spans", spans)
        if q_offset:
            raise ValueError("give either q_offset or spans, not both")
        if spans.shape != (batch, 4) or spans.dtype != torch.int32 or spans.device != q.device:
            raise ValueError(
                f"spans must be int32 [{batch}, 4] on {q.device}, "
                f"got {spans.dtype} {list(spans.shape)} on {spans.device}"
            )


def check_packed(packed, q, k, q_offset, spans, blocks, block_table):
    if not isinstance(packed, Packed):
        raise TypeError(f"packed must be what pack() gives, got {type(packed).__name__}")
    if q_offset or spans is not None:
        raise ValueError("packed sequences say where they stand: give neither q_offset nor spans")
    if block_table is None or blocks is not None:
        raise ValueError("packed sequences need a block_table and take no block lists")
    for name, x in (("q", q), ("k", k), ("block_table", block_table)):
        check_tensor(name, x)
    if k.dim() != 4 or block_table.dim() != 2:
        raise ValueError(
            f"packed sequences need pages [pages, heads, page, head dim] and a block_table [sequences, pages], got "
            f"{list(k.shape)} and {list(block_table.shape)}"
        )
    if q.dim() != 4 or q.shape[0] != 1 or packed.end > q.shape[2]:
        raise ValueError(
            f"packed sequences end at row {packed.end} of q [1, heads, tokens, head dim], got q {list(q.shape)}"
        )
    if packed.keys > block_table.shape[-1] * k.shape[-2]:
        raise ValueError(
            f"packed sequences have up to {packed.keys} keys, but a row of block_table holds "
            f"{block_table.shape[-1]} pages of {k.shape[-2]}"
        )
    if packed.table.device != q.device:
        raise ValueError(f"packed sequences are on {packed.table.device}, but q is on {q.device}")


def check_table(q, block_table, batch):
    check_tensor("block_table", block_table)
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.shape[1] < 1:
        raise ValueError(f"block_table must be [{batch}, pages], got {list(block_table.shape)}")
    if block_table.dtype != torch.int32 or block_table.device != q.device or block_table.stride(1) != 1:
        raise ValueError(
            f"block_table must be int32 on {q.device}, contiguous along its last axis, got {block_table.dtype} on "
            f"{block_table.device}, strides {list(block_table.stride())}"
        )


def check_pages(block_table, pages):
    """Page numbers on a CPU; on a GPU they would have to be waited for."""
    least, most = (int(x) for x in block_table.aminmax())
    if least < 0 or most >= pages:
        raise ValueError(f"block_table must name pages 0 to {pages - 1}, got {least if least < 0 else most}")


def check_out(out, q, k, v):
    check_tensor("out", out)
    wanted = (*q.shape[:3], v.shape[3])
    if (out.shape, out.dtype, out.device) != (wanted, q.dtype, q.device):
        raise ValueError(
            f"out must be {q.dtype} {list(wanted)} on {q.device}, got {out.dtype} {list(out.shape)} on {out.device}"
        )
    if _overlaps_itself(out):
        raise ValueError(f"out has more than one element in one place: shape {list(out.shape)}, strides {out.stride()}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, out)):
        raise ValueError("out= does not support gradients: call it under torch.no_grad(), or leave it out")


def _overlaps_itself(x):
    """Whether an axis steps by less than what the axes of smaller strides reach over."""
    reach = 1
    for stride, size in sorted((n, size) for n, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def check_gate(q, gate):
    for name, thresholds in (("absolute", gate.absolute), ("gap", gate.gap)):
        if thresholds is None:
            continue
        if thresholds.shape[0] != q.shape[1]:
            raise ValueError(f"gate '{name}' has {thresholds.shape[0]} heads, but q has {q.shape[1]}")
        if thresholds.device != q.device:
            raise ValueError(f"gate '{name}' is on {thresholds.device}, but q is on {q.device}")


def check_scoring(q, keys, causal, q_offset, spans, window, softcap, sinks, scores):
    if scores not in SCORES:
        raise ValueError(f"scores must be one of {', '.join(SCORES)}, got {scores!r}")
    if window is not None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(f"window must be a positive number of keys, got {window!r}")
        if window > UNBOUNDED:
            raise ValueError(f"window must be at most {UNBOUNDED:,} keys, got {window:,}; None is for all")
        if not causal:
            raise ValueError("window needs causal=True: a query sees its last keys")
        if spans is None and q_offset + q.shape[2] > keys:
            raise ValueError(
                f"with a window queries may not pass the keys: they end at position {q_offset + q.shape[2]}, the keys "
                f"at {keys}"
            )
    if softcap is not None and not LEAST <= softcap <= MOST:
        raise ValueError(f"softcap must be positive and finite in float32, got {softcap}")
    if sinks is not None:
        check_tensor("sinks", sinks)
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.device != q.device):
        raise ValueError(f"sinks must be [{q.shape[1]}] on {q.device}, got {list(sinks.shape)} on {sinks.device}")


def check_blocks(blocks, q, q_offset, spans, tile):
    if blocks.counts.device != q.device:
        raise ValueError(f"block lists are on {blocks.counts.device}, but q is on {q.device}")
    tiles = query_tiles(q.shape[2], q_offset, spans is not None, tile)
    if blocks.counts.shape != (*q.shape[:2], tiles):
        raise ValueError(
            f"block lists must be given for [batch, query heads, query tiles] = {[*q.shape[:2], tiles]}, "
            f"got {list(blocks.counts.shape)}"
        )
