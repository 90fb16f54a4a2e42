"""attn_implementation="bsfa" for Hugging Face transformers 5.

    import bsfa_kernels.integrations.transformers as bsfa      # registers the name
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="bsfa")
    bsfa.apply(model, "thresholds.safetensors")                # without it every tile is kept: exact attention

Prefill goes through `block_sparse_attention`; decode steps (one query) and what the kernels do not know (sliding
windows shorter than the sequence, softcap, sinks, arbitrary masks) run dense and exact, and `notes(model)` says where
and why. What a module does is kept on that module: `attach` puts a handler on it, and its `detach` takes it off.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..api import block_sparse_attention
from . import dense
from .identity import model_identity
from .masks import decode, mask_function
from .modules import (
    HEAD_DIMS,
    MASK,
    SINKS,
    AttentionModule,
    attends,
    attention_modules,
    softcap_reason,
    window_reason,
)
from .sparse import SparseAttention

if TYPE_CHECKING:
    from ..thresholds import Thresholds

__all__ = [
    "AttentionModule",
    "DenseFallback",
    "Handler",
    "Note",
    "SparseAttention",
    "apply",
    "attach",
    "attention_modules",
    "model_identity",
    "notes",
]

NAME = "bsfa"


class Handler(Protocol):
    """What an attention module calls on prefill instead of attending with every tile kept."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float,
        causal: bool,
        spans: torch.Tensor | None,
    ) -> torch.Tensor:
        """q [B, Hq, Tq, D], k and v [B, Hkv, Tk, D], spans as in `block_sparse_attention` (None: both start at
        position 0, no padding); returns [B, Hq, Tq, D] in the dtype of q.
        """
        ...


class Note(NamedTuple):
    """A module that ran dense in a prefill, and why."""

    path: str
    reason: str


class DenseFallback(UserWarning):
    """Raised as a warning, once per reason, when a module asked to run bsfa runs dense."""


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool | None = False,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Registered with transformers' AttentionInterface; its signature and calls are transformers'.

    query [B, Hq, Tq, D], key and value [B, Hkv, Tk, D]; `attention_mask` from `masks.mask_function` or the user's own
    [B, 1, Tq, Tk]. Returns [B, Tq, Hq, D] and no attention weights. Raises ValueError for training, dropout,
    position biases and output_attentions.
    """
    _refuse(dropout, position_bias, output_attentions)
    if module.training and query.requires_grad:
        raise ValueError("attn_implementation='bsfa' has no backward pass: train with 'sdpa', or call model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    spans = mask = window = None
    positions = None if attention_mask is None else decode(attention_mask)
    if positions is not None:
        spans = positions.spans.to(query.device).contiguous()
        causal, window = positions.pattern
    elif attention_mask is not None:
        mask = attention_mask
    elif query.shape[2] == 1:
        causal = False
    elif causal and key.shape[2] > query.shape[2]:
        # Without a mask transformers means: queries start at position 0, later keys are an empty static cache.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]

    reason = _dense_reason(key, value, mask, window, softcap, s_aux)
    if reason is None and query.shape[2] > 1:
        handler = getattr(module, "bsfa_handler", None) or keep_every_tile
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        out = handler(query, key, value, scale=scale, causal=causal, spans=spans)
    else:
        if query.shape[2] > 1:
            _note(module, reason)
        out = dense.attention(
            query, key, value, scale=scale, causal=causal, spans=spans, window=window, softcap=softcap, sinks=s_aux,
            mask=mask,
        )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def keep_every_tile(q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None) -> torch.Tensor:
    """The handler of a module that has none: exact attention."""
    return block_sparse_attention(q, k, v, scale=scale, causal=causal, spans=spans).out


def _refuse(dropout, position_bias, output_attentions) -> None:
    if dropout:
        raise ValueError(
            f"attn_implementation='bsfa' has no attention dropout (got {dropout}); call model.eval() or set "
            "attention_dropout to 0"
        )
    if position_bias is not None:
        raise ValueError("attn_implementation='bsfa' does not support position biases; use 'sdpa' for this model")
    if output_attentions:
        raise ValueError("attn_implementation='bsfa' never forms attention weights; use 'eager' for output_attentions")


def _dense_reason(key, value, mask, window, softcap, sinks) -> str | None:
    if softcap is not None:
        return softcap_reason(softcap)
    if sinks is not None:
        return SINKS
    if key.shape[-1] != value.shape[-1]:
        return HEAD_DIMS
    if window is not None:
        return window_reason(window)
    return MASK if mask is not None else None


def _note(module: nn.Module, reason: str) -> None:
    if torch.compiler.is_compiling():
        return
    vars(module).setdefault("bsfa_notes", {})[reason] = None
    warnings.warn(f"bsfa: some layers run dense: {reason}", DenseFallback, stacklevel=4)


def notes(model: nn.Module) -> list[Note]:
    """Every module of `model` that ran dense in a prefill so far, and why. Compiled forward passes leave no notes."""
    return [Note(path, why) for path, module in model.named_modules() for why in vars(module).get("bsfa_notes", ())]


class Attachment:
    """Handlers in place on a model's modules; `detach()`, or leaving the `with` block, restores what was there."""

    def __init__(self, previous: dict[nn.Module, Handler | None]):
        self._previous = previous

    def detach(self) -> None:
        for module, handler in self._previous.items():
            if handler is None:
                vars(module).pop("bsfa_handler", None)
            else:
                vars(module)["bsfa_handler"] = handler
        self._previous = {}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_) -> None:
        self.detach()


def attach(model: nn.Module, handlers: Mapping[str, Handler]) -> Attachment:
    """Put `handlers` {module path: handler} on the attention modules of `model`, at once.

    Raises ValueError for a path that is no attention module, or one that would never call its handler because it runs
    another attention implementation.
    """
    modules = dict(model.named_modules())
    for path in handlers:
        if path not in modules or not attends(modules[path]):
            raise ValueError(f"{type(model).__name__} has no attention module {path!r}")
        implementation = modules[path].config._attn_implementation
        if implementation != NAME:
            raise ValueError(f"module {path!r} runs attn_implementation={implementation!r}, not 'bsfa'")
    previous = {modules[path]: getattr(modules[path], "bsfa_handler", None) for path in handlers}
    for path, handler in handlers.items():
        vars(modules[path])["bsfa_handler"] = handler
    return Attachment(previous)


def apply(
    model: nn.Module, thresholds: str | os.PathLike | Thresholds, point: str | None = None, *, count: bool = False
) -> Attachment:
    """Run `model` with the operating point `point` of a thresholds file (None: its only or default point).

    Sets attn_implementation="bsfa" where the model runs another. `count` keeps kept/candidate tile counts on each
    handler. Raises ThresholdsError for a bad file, an unknown point, and, naming the field, a file made for another
    model: configuration and weights are compared, the weights by `identity.fingerprint` and only where it can be taken
    (not of sharded or quantised parameters).
    """
    from ..thresholds import Thresholds

    if not isinstance(thresholds, Thresholds):
        thresholds = Thresholds.read(thresholds)
    thresholds.check_model(model_identity(model))
    modules = attention_modules(model)
    handlers = SparseAttention.for_model(thresholds, modules, point, count=count)
    if all(model.get_submodule(path).config._attn_implementation != NAME for path in modules):
        model.set_attn_implementation(NAME)
    return attach(model, handlers)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_function)
