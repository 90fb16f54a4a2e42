"""Which modules of a transformers model attend, with how many heads, and which of them bsfa can skip in."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import CodeType

import torch
from torch import nn

from .plan import SINKS, WIDER, softcap_reason, window_reason

WRAPPED = "_orig_mod"  # torch.compile's name for what it wraps


@dataclass(frozen=True)
class AttentionModule:
    """One attention module of a model, as its thresholds know it."""

    path: str  # as in model.named_modules()
    layer: int | None  # index in its decoder; vision towers have none
    query_heads: int
    kv_heads: int
    head_dim: int  # of Q and K
    scale: float
    causal: bool
    dense_reason: str | None  # why no tile is ever skipped in it, in words; None where tiles may be
    scoring: str | None = None  # its window, softcap or attention sinks, in words: other methods do not know them
    device: torch.device | str = "cpu"  # of its weights
    tower: bool = False  # in a vision or audio tower, called per image or clip, not in the language model
    v_head_dim: int | None = None  # of V; that of Q and K where it is None
    plain: bool = True  # neither softcap nor attention sinks, which PyTorch's own attention lacks


def most_positions(config) -> int | None:
    """Tokens that a model of this transformers configuration has positions for; None where it sets no end."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def attention_modules(model: nn.Module) -> dict[str, AttentionModule]:
    """{module path: AttentionModule} of every module of `model` that attends through transformers' AttentionInterface,
    in the model's order. Paths are those of the model's `named_modules()` without what torch.compile wraps around it.
    """
    language = _language_config(model)
    return {
        path: replace(describe(path, module), tower=not isinstance(module.config, language))
        for path, module in named_modules(model)
        if attends(module)
    }


def _language_config(model: nn.Module) -> type:
    """The class of configuration that the language model's own modules have; any, where there is no other part."""
    config = getattr(unwrapped(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return object if text is config else type(text)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of `model` as if neither it nor any part of it were wrapped by torch.compile."""
    for path, module in model.named_modules():
        if not _compiled(module):
            yield ".".join(part for part in path.split(".") if part != WRAPPED), module


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or `model`."""
    return getattr(model, WRAPPED) if _compiled(model) else model


def _compiled(module: nn.Module) -> bool:
    """Whether torch.compile wrapped it: nothing did where its machinery, whose import takes seconds, was never used."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def attends(module: nn.Module) -> bool:
    return hasattr(module, "config") and mentions(type(module), "ALL_ATTENTION_FUNCTIONS")


@cache
def mentions(kind: type, word: str) -> bool:
    """Whether the class behind a module's `forward` uses `word` as a name, a keyword or a text.

    A class that inherits `forward`, or calls the one that it overrides, is what its parent is. Read from the code that
    runs, so that classes without a source file count too.
    """
    for parent in kind.__mro__:
        functions = {name: inspect.unwrap(member) for name, member in vars(parent).items() if inspect.isroutine(member)}
        words = {name: set(_words(f.__code__)) for name, f in functions.items() if inspect.isfunction(f)}
        if any(word in found for found in words.values()):
            return True
        if "super" not in words.get("forward", {"super"}):
            return False
    return False


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        elif isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):  # keywords of a call
            yield from (text for text in constant if isinstance(text, str))


def describe(path: str, module: nn.Module) -> AttentionModule:
    config = module.config
    configured = _first(config, "num_attention_heads", "num_heads", "n_heads", "encoder_attention_heads")
    head_dim = _first(module, "head_dim", "qk_head_dim") or _first(config, "head_dim")
    if head_dim is None:
        head_dim = _first(config, "hidden_size", "d_model", "embed_dim") // configured
    v_head_dim = _first(module, "v_head_dim") or head_dim
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
        bool(getattr(module, "is_causal", True)), _dense_reason(module, head_dim, v_head_dim), _scoring(module),
        next((weight.device for weight in module.parameters()), "cpu"),
        plain=not _first(module, "attn_logit_softcapping") and getattr(module, "sinks", None) is None,
        v_head_dim=v_head_dim,
    )  # fmt: skip


def _dense_reason(module: nn.Module, head_dim: int, v_head_dim: int) -> str | None:
    implementation = module.config._attn_implementation
    if implementation != "bsfa":
        return f"attn_implementation is {implementation!r}"
    if getattr(module, "is_cross_attention", False):
        return "cross-attention"
    return WIDER if v_head_dim > head_dim else None


def _scoring(module: nn.Module) -> str | None:
    if _first(module, "attn_logit_softcapping"):
        return softcap_reason(module.attn_logit_softcapping)
    if getattr(module, "sinks", None) is not None:
        return SINKS
    window = _window(module)
    return window_reason(window) if window else None


def _window(module: nn.Module) -> int | None:
    """The sliding window that the module passes on: its own, or, as Mistral's does, its config's."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return getattr(module.config, "sliding_window", None) if mentions(type(module), "sliding_window") else None


def _first(holder, *names):
    for name in names:
        value = getattr(holder, name, None)
        if value is not None:
            return value
    return None
