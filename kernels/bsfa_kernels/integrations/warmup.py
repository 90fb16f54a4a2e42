"""Compile what a server will meet before it meets it.

    bsfa.apply(model, "thresholds.safetensors")
    warmup(model, 131072)              # some seconds a length; {length: seconds}

A kernel is compiled for what it is launched with: the module's heads and gate, padding or none, and on Hopper for how
many KV heads of a sequence's keys fit into the L2 cache together, which changes with the length: of 8 KV heads of 128
at 8k, 16k and 32k tokens. Each takes seconds. Calls of few queries (split_kv.py) have programs of two or three sizes,
by the queries of a KV head. Beyond that a call of more queries or another offset compiles nothing new.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import DynamicCache

from ..tiles import TileShape
from .modules import AttentionModule, attention_modules, most_positions
from .plan import LONG
from .transformers import active, named_modules
from .visual_tokens import visual_ids

FEWER = TileShape().rows * 3 // 4  # queries of a chunk that keeps every tile; a decode step is compiled otherwise
MOST_CHUNK = TileShape().rows + 1  # queries from which a call's programs are of the largest size, whatever its heads
BEHIND = 16  # of a prompt's tokens one in so many is a chunk of its own behind the others, with a gate still (plan.py)
SHORTEST = 4 * TileShape().keys
FEW_SPLITS = 2048  # keys of a call up to which split_kv.py sums few parts, by another kernel than for many


def lengths(model: nn.Module, longest: int) -> list[int]:
    """One prompt length, up to `longest`, of each kind that compiles anew; the longest of its kind."""
    from ..hopper import section_limits  # not at the top: it needs Triton

    found = {longest, min(longest, FEW_SPLITS)}
    for kv_heads, columns, size in {
        (module.kv_heads, module.head_dim + (module.v_head_dim or module.head_dim), model.dtype.itemsize)
        for module in _gated(model)
    }:
        found |= {most for most in section_limits(kv_heads, columns, size) if SHORTEST <= most < longest}
    return sorted(found)


def chunks(modules: Iterable[AttentionModule], dtype: torch.dtype, wide: bool) -> list[int]:
    """Queries of a prompt's last calls, most first: FEWER, one token, and what else it takes to meet each size of
    split_kv's programs that a call of these modules can have. One token alone is the library's where nothing is padded,
    so it meets none. `wide`: see launch.wide_products.
    """
    from ..split_kv import shape_of

    found = {FEWER, 1}
    for module in modules:
        group, widths = module.query_heads // module.kv_heads, (module.head_dim, module.v_head_dim or module.head_dim)
        of_rows = {rows: shape_of(rows * group, dtype, *widths, wide) for rows in range(2, MOST_CHUNK + 1)}
        for rows, shape in of_rows.items():
            if shape not in {of_rows[met] for met in found if met > 1}:
                found.add(rows)
    return sorted(found, reverse=True)


@torch.inference_mode()
def warmup(
    model: nn.Module, longest: int, *, padded: bool = False, step: Callable[[int, float], None] = lambda *_: None
) -> dict[int, float]:
    """Prefill made-up prompts of every length that compiles anew, up to `longest` tokens, each in one long chunk, one
    behind it that a gate judges too, and those of `chunks`, of which all but one or none are too short for a gate, the
    last of one token. {length: seconds it took}; `step(length, seconds)` is called after each.

    `padded`: prompts with padding too, as batches of unequal prompts have. Vision towers and what other libraries
    compile are not warmed up. Counters of `apply(count=True)` start anew. Raises ValueError for a length
    that the model has no positions for, or is shorter than four tiles.
    """
    positions = most_positions(model.config)
    if longest < SHORTEST or positions is not None and longest > positions:
        raise ValueError(
            f"prompts to warm up with have {SHORTEST} tokens or more"
            + (f", and this model has {positions:,} positions" if positions is not None else "")
            + f"; got {longest:,}"
        )
    token, taken = _plain_token(model), {}
    last = [FEWER, 1]
    if model.device.type == "cuda":
        from ..launch import wide_products  # not at the top: it needs Triton

        last = chunks(_gated(model), model.dtype, wide_products(model.device))
    for length in lengths(model, longest):
        started = time.perf_counter()
        ids = torch.full((1, length), token, device=model.device)
        for padding in (0, 1) if padded else (0,):
            mask = torch.ones_like(ids)
            mask[:, :padding] = 0
            behind = max(length // BEHIND, 2 * TileShape().rows)
            first = length - behind - sum(last)
            if first < LONG <= length:  # as one chunk it may be served otherwise (plan.py)
                model.base_model(input_ids=ids, attention_mask=mask)
            cache = DynamicCache(config=model.config.get_text_config())
            for rows in (first, behind, *last):
                begin = cache.get_seq_length()
                end = begin + rows
                model.base_model(
                    input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
                )
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        taken[length] = time.perf_counter() - started
        step(length, taken[length])
    for _, module in named_modules(model):
        reset = getattr(active(module), "reset", None)
        if reset is not None:
            reset()
    return taken


def _gated(model: nn.Module) -> list[AttentionModule]:
    """Modules of the language model that thresholds may be attached to."""
    modules = attention_modules(model).values()
    return [module for module in modules if not module.tower and module.dense_reason is None]


def _plain_token(model: nn.Module) -> int:
    """The id of a token that stands for itself: neither padding nor an image."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return next(token for token in range(1, 64) if token != padding and token not in visual_ids(model.config))
