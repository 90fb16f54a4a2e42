"""Which modules of a transformers model attend, with how many heads, and which of them bsfa can skip in."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache

from torch import nn


@dataclass(frozen=True)
class AttentionModule:
    """One attention module of a model, as its thresholds know it."""

    path: str  # as in model.named_modules()
    layer: int | None  # index in its decoder; vision towers have none
    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    causal: bool
    dense_reason: str | None  # why no tile is ever skipped in it, in words; None where tiles may be


def attention_modules(model: nn.Module) -> dict[str, AttentionModule]:
    """{module path: AttentionModule} of every module of `model` that attends through transformers' AttentionInterface,
    in the model's order. Paths are those of `model.named_modules()`.
    """
    return {path: describe(path, module) for path, module in model.named_modules() if attends(module)}


def attends(module: nn.Module) -> bool:
    return hasattr(module, "config") and "ALL_ATTENTION_FUNCTIONS" in _source(type(module))


@cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def describe(path: str, module: nn.Module) -> AttentionModule:
    config = module.config
    configured = _first(config, "num_attention_heads", "num_heads", "n_heads", "encoder_attention_heads")
    head_dim = _first(module, "head_dim", "qk_head_dim") or _first(config, "head_dim")
    if head_dim is None:
        head_dim = _first(config, "hidden_size", "d_model", "embed_dim") // configured
    query_heads = _first(module, "num_heads", "num_attention_heads") or configured
    kv_heads = _first(module, "num_key_value_heads")
    if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
        query_heads = getattr(module.q_proj, "out_features", query_heads * head_dim) // head_dim
        kv_heads = getattr(module.k_proj, "out_features", (kv_heads or query_heads) * head_dim) // head_dim
    elif kv_heads is None:
        groups = _first(module, "num_key_value_groups")
        kv_heads = query_heads // groups if groups else query_heads
    scale = _first(module, "scaling", "scale", "softmax_scale") or head_dim**-0.5
    return AttentionModule(
        path, getattr(module, "layer_idx", None), query_heads, kv_heads, head_dim, float(scale),
        bool(getattr(module, "is_causal", True)), _dense_reason(module),
    )  # fmt: skip


def _dense_reason(module: nn.Module) -> str | None:
    implementation = module.config._attn_implementation
    if implementation != "bsfa":
        return f"attn_implementation is {implementation!r}"
    if _first(module, "attn_logit_softcapping"):
        return softcap_reason(module.attn_logit_softcapping)
    if getattr(module, "sinks", None) is not None:
        return SINKS
    if getattr(module, "is_cross_attention", False):
        return "cross-attention"
    if _first(module, "v_head_dim") not in (None, _first(module, "qk_head_dim", "head_dim")):
        return HEAD_DIMS
    window = _window(module)
    return window_reason(window) if window else None


def _window(module: nn.Module) -> int | None:
    """The sliding window that the module passes on: its own, or, as Mistral's does, its config's."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return getattr(module.config, "sliding_window", None) if "sliding_window" in _source(type(module)) else None


SINKS = "attention sinks"
HEAD_DIMS = "keys and values differ in head dim"
MASK = "its mask is not plain causal or bidirectional with padding at the ends (custom, packed, chunked or with holes)"


def window_reason(window: int) -> str:
    return f"sliding window of {window} tokens"


def softcap_reason(softcap: float) -> str:
    return f"scores are soft-capped at {softcap:g}"


def _first(holder, *names):
    for name in names:
        value = getattr(holder, name, None)
        if value is not None:
            return value
    return None
