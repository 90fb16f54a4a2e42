"""Which tokens of a model's forward pass stand for images: what thresholds by modality are chosen from.

    visual = VisualTokens()
    hooks = visual.watch(model)        # looks at the inputs of every forward pass of the model
    ...                                # within one: visual.rows(batch, length), visual.tiles(...)
    for hook in hooks: hook.remove()

A token is visual where its id is one that the configuration reserves for images or videos; where a call has embeddings
and no ids, where its `mm_token_type_ids` or `token_type_ids` say so. Otherwise it is not known which tokens are, nor is
it under torch.compile, and `rows` is None.
"""

from __future__ import annotations

import threading

import torch
from torch import nn

from ..modality import tile_modality

RESERVED = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
TYPES = ("mm_token_type_ids", "token_type_ids")  # 0 is text


def visual_ids(config) -> tuple[int, ...]:
    """The token ids that `config` reserves for images and videos; none for a model of text."""
    found = (getattr(config, name, None) for name in RESERVED)
    return tuple(sorted({value for value in found if isinstance(value, int)}))


def visual_tokens(config, inputs) -> torch.Tensor | None:
    """bool [B, T]: which tokens of a forward pass with keyword arguments `inputs` are visual; None: not known."""
    ids, reserved = inputs.get("input_ids"), visual_ids(config)
    if isinstance(ids, torch.Tensor) and reserved:
        found = ids == reserved[0]
        for token in reserved[1:]:  # numbers, no tensor of them: a copy from the host would not go into a CUDA graph
            found = found | (ids == token)
        return found
    types = next((inputs[name] for name in TYPES if isinstance(inputs.get(name), torch.Tensor)), None)
    return None if types is None or not reserved else types > 0


class VisualTokens:
    """What is known of the forward passes that run, one in each thread."""

    def __init__(self):
        self._running: dict[int, tuple[torch.Tensor, dict]] = {}  # by thread: visual [B, T], and tiles already told

    def watch(self, model: nn.Module) -> list:
        """Hooks on the part of `model` that takes token ids; they stay until `remove()` is called on each."""
        base = getattr(model, "base_model", model)
        return [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def rows(self, batch: int, length: int) -> torch.Tensor | None:
        """bool [batch, length] of the pass that runs in this thread; None where it is not known."""
        if torch.compiler.is_compiling():
            return None
        visual, _ = self._running.get(threading.get_ident(), (None, None))
        return visual if visual is not None and visual.shape == (batch, length) else None

    def tiles(
        self, sequence: int, batch: int, length: int, size: int, tiles: int, spans, device
    ) -> torch.Tensor | None:
        """int64 [tiles], modalities of the query tiles of one sequence of a call of [batch, length] queries, on
        `device`; see `modality.tile_modality`. None where it is not known.
        """
        rows = self.rows(batch, length)
        if rows is None:
            return None
        told, key = self._running[threading.get_ident()][1], (sequence, size, tiles, device)
        if spans is None and key in told:  # every layer asks the same
            return told[key]
        first, end = (0, None) if spans is None else (spans[sequence, 0], spans[sequence, 3])
        found = tile_modality(rows[sequence].to(device), size, tiles, first, end)
        if spans is None:
            told[key] = found
        return found

    def _begin(self, module: nn.Module, arguments: tuple, options: dict) -> None:
        if torch.compiler.is_compiling():
            return
        inputs = {"input_ids": arguments[0]} if arguments else {}
        visual = visual_tokens(module.config, inputs | options)
        if visual is not None:
            self._running[threading.get_ident()] = (visual, {})

    def _end(self, *_) -> None:
        if not torch.compiler.is_compiling():
            self._running.pop(threading.get_ident(), None)
