"""The mask function behind attn_implementation="bsfa": where each sequence stands, instead of who sees whom.

transformers asks for a mask once per forward pass and hands it to every layer. Where the mask is causal,
bidirectional or a causal sliding window, with padding at either end and any cache, four numbers per sequence say the
same as a [B, 1, Tq, Tk] buffer: the spans of `bsfa_kernels.make_spans`. They travel as an int32 tensor
[B, 1, pattern, 4] (four axes, so that transformers passes it on as a prepared mask; no other mask is int32), whose
third axis is a stride-0 axis that only says, without a look at the device, which pattern the spans bound:

    1      causal
    2      bidirectional
    2 + w  causal, a query sees the last w keys including its own; queries end where the keys end

None means: no padding, as many keys as queries, the module's own causality. Everything else is the exact boolean mask
of transformers' own `sdpa_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from ..request import UNBOUNDED, make_spans

CAUSAL, BIDIRECTIONAL = 1, 2


class Pattern(NamedTuple):
    causal: bool
    window: int | None  # keys a query sees, its own included; None for all


class Positions(NamedTuple):
    """A decoded mask. `spans` int32 [B, 4] as for `block_sparse_attention`."""

    spans: torch.Tensor
    pattern: Pattern


def encode(spans: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Spans [B, 4] and their pattern as the tensor [B, 1, pattern, 4] that layers receive."""
    size = CAUSAL if pattern.causal else BIDIRECTIONAL
    if pattern.window is not None:
        size = BIDIRECTIONAL + pattern.window
    return spans[:, None, None, :].expand(-1, 1, size, -1)


def decode(mask: torch.Tensor) -> Positions | None:
    """The spans in `mask`, or None when it is an ordinary mask. Raises ValueError for any other int32 tensor."""
    if mask.dtype != torch.int32:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != 4:
        raise ValueError(
            f"attention_mask must be [batch, length], a 4-axis bool or float mask, or None; "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    size = mask.shape[2]
    window = size - BIDIRECTIONAL if size > BIDIRECTIONAL else None
    return Positions(mask[:, 0, 0, :], Pattern(size != BIDIRECTIONAL, window))


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """Registered with transformers' AttentionMaskInterface; its signature and calls are transformers'.

    `attention_mask` bool [B, keys seen so far] or None. A padding mask is read once here, on the host, to refuse
    holes; under torch.compile it is asserted on the device instead.
    """
    pattern = _pattern(mask_function)
    if pattern is not None and q_length > 1:
        if pattern.window is not None and kv_offset == 0 and kv_length <= pattern.window:
            pattern = Pattern(True, None)
        spans = _spans(pattern, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)
        if spans is not None:
            same = attention_mask is None and isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
            return None if same and pattern.window is None else encode(spans, pattern)
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, device=device, **kwargs,
    )  # fmt: skip


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


def _closure(function: Callable, qualified_name: str) -> dict:
    if getattr(function, "__qualname__", "") != qualified_name or not function.__closure__:
        return {}
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))


def _spans(pattern, batch, q_length, kv_length, q_offset, kv_offset, attention_mask, device) -> torch.Tensor | None:
    """Spans int32 [B, 4], or None where they cannot say it."""
    if pattern.window is not None:
        # The windowed computation slices keys by row number, so queries must end where the keys end.
        if not isinstance(q_offset, int) or q_offset - kv_offset != kv_length - q_length:
            return None
    elif kv_offset:
        return None
    if attention_mask is None:
        if pattern.causal:
            lengths = torch.as_tensor(q_offset + q_length, dtype=torch.int32, device=device)
        else:
            lengths = torch.as_tensor(kv_length + kv_offset, dtype=torch.int32, device=device)
        left = torch.zeros((), dtype=torch.int32, device=device)
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
        if torch.compiler.is_compiling():
            torch._assert_async(contiguous, "bsfa under torch.compile needs an attention_mask without holes")
        elif not contiguous:
            return None
    spans = make_spans(batch, q_offset - left, kv_offset - left, lengths.expand(batch), device)
    if not pattern.causal:
        spans[:, 0], spans[:, 3] = 0, UNBOUNDED
    return spans
