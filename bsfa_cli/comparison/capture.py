"""Queries, keys and values as a model's own layers make them, after the rotary embedding, from one prompt."""

from __future__ import annotations

import torch
from bsfa_kernels import block_sparse_attention
from bsfa_kernels.integrations.transformers import AttentionModule, attach

from ..models.load import LoadedModel
from .tensors import Captured


class CapturingAttention:
    """A handler for `attach`: exact attention that keeps what its first call attends with."""

    def __init__(self):
        self.seen: Captured | None = None

    def __call__(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None) -> torch.Tensor:
        if self.seen is None:
            # A view into a fused projection would be saved whole.
            self.seen = Captured(*(x.detach().to("cpu", copy=True).contiguous() for x in (q, k, v)), scale, causal)
        return block_sparse_attention(q, k, v, scale=scale, causal=causal, spans=spans).out


@torch.inference_mode()
def capture(loaded: LoadedModel, modules: dict[str, AttentionModule], tokens: tuple[int, ...]) -> dict[str, Captured]:
    """{module path: its call} of one prefill of `tokens`, on the CPU; modules that were not called are missing."""
    handlers = {path: CapturingAttention() for path in modules}
    ids = torch.tensor([tokens], device=loaded.model.device)
    with attach(loaded.model, handlers):
        loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return {path: handler.seen for path, handler in handlers.items() if handler.seen is not None}
