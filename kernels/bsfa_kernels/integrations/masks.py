"""The mask function behind attn_implementation="bsfa": where each sequence stands, instead of who sees whom.

transformers asks for a mask once per forward pass and hands it to every layer. Where the mask is causal,
bidirectional or a causal sliding window, with padding at either end and any cache, four numbers per sequence say the
same as a [B, 1, Tq, Tk] buffer: the spans of `bsfa_kernels.make_spans`. They travel as a SpanMask, an int32 tensor
[B, plain, pattern, 4] of a type of its own (four axes, so that transformers passes it on as a prepared mask). Two of
its axes have stride 0 and only say something by their size, without a look at the device:

    plain    1: read the spans
             2: queries and keys start at position 0, there are equally many, and none is padding
    pattern  1      causal
             2      bidirectional
             2 + w  causal, a query sees the last w keys including its own; queries end where the keys end

Where groups of neighbouring rows see one another both ways besides, as the tokens of one image do in Gemma 3, their
first rows and lengths stand behind the spans, [B, plain, pattern, 4 + 2 * groups], and twice the rows of the longest
group is added to the axis `plain`.

Everything else is the additive mask of transformers' own `eager_mask`: where the pattern is another one, where padding
has holes, and where a model asks for a mask that it can take apart (`allow_is_causal_skip=False`). Not the boolean one
of `sdpa_mask`: models that add masks to scores of their own, or put more columns behind them, take any mask for an
additive one, and only additive ones are right in all of them. None is never the answer to a prefill, so that it means
one thing: nobody asked for a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask

from ..request import UNBOUNDED, make_spans
from .groups import Groups, find

CAUSAL, BIDIRECTIONAL = 1, 2
READ, PLAIN = 1, 2


class Pattern(NamedTuple):
    causal: bool
    window: int | None  # keys a query sees, its own included; None for all


class Positions(NamedTuple):
    """A decoded SpanMask. `spans` int32 [B, 4] as for `block_sparse_attention`; None where they say nothing."""

    spans: torch.Tensor | None
    pattern: Pattern
    groups: Groups | None = None  # rows that see one another besides


class SpanMask(torch.Tensor):
    """Spans on their way to the layers: moved and copied like any tensor, and nothing else done with."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = function.__name__
        if name in _CARRIED:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {})).as_subclass(cls)
        if name in _READ or name.startswith("is_") or (name[0] == "_" and name[1] != "_"):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise ValueError(  # a TypeError would become "unsupported operand"
            "attn_implementation='bsfa' hands layers the positions of sequences for a mask, and this model computes "
            f"with it ({name}); run it with 'eager' or 'sdpa'"
        )


_CARRIED = frozenset({"to", "cuda", "cpu", "clone", "detach", "contiguous"})
# Besides what begins with `is_` or `_`: torch.compile asks those of whatever goes into a graph.
_READ = frozenset({
    "__get__", "dim", "ndimension", "size", "stride", "numel", "nelement", "element_size", "get_device", "as_subclass",
    "__repr__", "__len__", "__hash__", "data_ptr", "storage_offset", "untyped_storage", "__format__", "__reduce_ex__",
})  # fmt: skip


def encode(spans: torch.Tensor, pattern: Pattern, plain: bool = False, groups: Groups | None = None) -> SpanMask:
    """Spans [B, 4], their pattern and groups as the tensor [B, plain, pattern, 4 + 2 * groups] that layers receive."""
    size = CAUSAL if pattern.causal else BIDIRECTIONAL
    if pattern.window is not None:
        size = BIDIRECTIONAL + pattern.window
    said = PLAIN if plain else READ
    if groups is not None:
        spans, said = torch.cat([spans, groups.table.flatten(1)], 1), said + 2 * groups.longest
    return spans[:, None, None, :].expand(-1, said, size, -1).as_subclass(SpanMask)


def decode(mask: SpanMask) -> Positions:
    """The spans, the pattern and the groups in `mask`."""
    with torch._C.DisableTorchFunctionSubclass():
        _, said, size, numbers = mask.shape
        plain, groups = said % 2 == 0, None
        spans = None if plain else mask[:, 0, 0, :4]
        if numbers > 4:
            groups = Groups(mask[:, 0, 0, 4:].unflatten(1, (-1, 2)), (said - 1) // 2)
    window = size - BIDIRECTIONAL if size > BIDIRECTIONAL else None
    return Positions(spans, Pattern(size != BIDIRECTIONAL, window), groups)


def visible(mask: torch.Tensor) -> torch.Tensor:
    """An ordinary mask, boolean or additive, [B or 1, Hq or 1, Tq or 1, Tk], as a plain tensor. Raises ValueError."""
    with torch._C.DisableTorchFunctionSubclass():
        if mask.dim() != 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise ValueError(
                f"attention_mask must be [batch, length], a 4-axis bool or floating-point mask, or None; "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        return mask[:]


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs,
) -> torch.Tensor | None:
    """Registered with transformers' AttentionMaskInterface; its signature and calls are transformers'.

    `attention_mask` bool [B, keys seen so far] or None. A padding mask is read once here, on the host, to refuse
    holes; under torch.compile and in a CUDA graph it is asserted on the device instead.
    """
    pattern = _pattern(mask_function)
    # A model that allows no skip takes the mask apart.
    plain = pattern is not None and (allow_is_causal_skip if pattern.causal else allow_is_bidirectional_skip)
    groups = None
    if pattern is None and q_length > 1:
        pattern, ids = _blocks(mask_function)
        if ids is not None:  # of these transformers never allows a skip
            groups = _groups(ids, batch_size, q_length, q_offset, kv_offset, attention_mask)
            plain = groups is not None
    if plain and q_length > 1:
        if pattern.window is not None and kv_offset == 0 and kv_length <= pattern.window:
            pattern = Pattern(True, None)
        encoded = _encoded(
            pattern, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device, groups
        )
        if encoded is not None:
            return encoded
    geometry = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, device=device,
    )  # fmt: skip
    if q_length == 1:  # what decoding sees needs no mask where nothing is padded
        flags = dict(allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip)
        if sdpa_mask(**geometry, **flags, **kwargs) is None:
            return None
    return eager_mask(**geometry, allow_is_bidirectional_skip=False, **kwargs)


def _pattern(function: Callable) -> Pattern | None:
    """What a transformers mask function shows, or None where it is none of the patterns spans can bound."""
    if function is causal_mask_function:
        return Pattern(True, None)
    if function is bidirectional_mask_function:
        return Pattern(False, None)
    parts = _closure(function, "and_masks.<locals>.and_mask").get("mask_functions", ())
    if len(parts) == 2 and parts[1] is causal_mask_function:
        window = _closure(parts[0], "sliding_window_overlay.<locals>.inner_mask").get("sliding_window")
        if isinstance(window, int) and window > 0:
            return Pattern(True, window)
    return None


def _blocks(function: Callable) -> tuple[Pattern | None, torch.Tensor | None]:
    """(causal or windowed, ids [B, T]) of a mask that besides lets rows of the same id >= 0 see one another; (None,
    None) for any other.
    """
    window = None
    parts = _closure(function, "and_masks.<locals>.and_mask").get("mask_functions", ())
    if len(parts) == 2:
        window = _closure(parts[1], "sliding_window_overlay.<locals>.inner_mask").get("sliding_window")
        if not isinstance(window, int) or window < 1:
            return None, None
        function = parts[0]
    parts = _closure(function, "or_masks.<locals>.or_mask").get("mask_functions", ())
    if len(parts) != 2 or parts[0] is not causal_mask_function:
        return None, None
    ids = _closure(parts[1], "blockwise_overlay.<locals>.inner_mask").get("block_sequence_ids")
    return (Pattern(True, window), ids) if isinstance(ids, torch.Tensor) else (None, None)


def _groups(ids, batch: int, q_length: int, q_offset, kv_offset, attention_mask) -> Groups | None:
    """The groups of one whole prefill, read on the host; None where they cannot be said."""
    whole = isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    if not whole or torch.compiler.is_compiling() or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    if ids.dim() != 2 or ids.shape[0] != batch or ids.shape[1] < q_length:
        return None
    ids = ids[:, :q_length]
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[1] < q_length:
            return None
        ids = ids.masked_fill(attention_mask[:, :q_length].to(ids.device) == 0, -1)
    return find(ids)


def _closure(function: Callable, qualified_name: str) -> dict:
    if getattr(function, "__qualname__", "") != qualified_name or not function.__closure__:
        return {}
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))


def _encoded(
    pattern, batch, q_length, kv_length, q_offset, kv_offset, attention_mask, device, groups
) -> SpanMask | None:
    """The SpanMask, or None where spans cannot say it."""
    if pattern.window is not None:
        # The windowed computation slices keys by row number, so queries must end where the keys end.
        if not isinstance(q_offset, int) or q_offset - kv_offset != kv_length - q_length:
            return None
    elif kv_offset:
        return None
    padded = attention_mask is not None
    if not padded:
        lengths, left = q_offset + q_length if pattern.causal else kv_length + kv_offset, 0
    else:
        if attention_mask.dim() != 2:
            return None
        valid = attention_mask.to(device=device, dtype=torch.bool)
        lengths = valid.sum(-1, dtype=torch.int32)
        left = (valid.cumsum(-1) == 0).sum(-1, dtype=torch.int32)
        index = torch.arange(valid.shape[-1], device=device)
        contiguous = (valid == ((index >= left[:, None]) & (index < (left + lengths)[:, None]))).all()
        if not pattern.causal:
            # Whether these queries are padded like the keys is not known here (cross-attention), so none is.
            contiguous = contiguous & (left == 0).all()
        if torch.compiler.is_compiling() or (valid.is_cuda and torch.cuda.is_current_stream_capturing()):
            torch._assert_async(contiguous, "bsfa under torch.compile needs an attention_mask without holes")
        else:
            expressible, full = torch.stack([contiguous, valid.all()]).tolist()  # one wait for the device
            if not expressible:
                return None
            padded = not full or valid.shape[-1] != kv_length
    spans = make_spans(batch, q_offset - left, kv_offset - left, lengths, device)
    if not pattern.causal:
        spans[:, 0] = 0
    # A sequence ends in this call where rows behind its end are padding; at the call's last row it may go on.
    spans[:, 3].masked_fill_((spans[:, 3] >= spans[:, 0] + q_length) | (not pattern.causal), UNBOUNDED)
    at_start = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    groups = None if groups is None or not groups.table.numel() else Groups(groups.table.to(device), groups.longest)
    plain = not padded and pattern.window is None and (at_start or not pattern.causal)
    return encode(spans, pattern, plain, groups)
