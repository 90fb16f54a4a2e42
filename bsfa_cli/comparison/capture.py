"""Queries, keys and values as a model's own layers make them, after the rotary embedding, from one prompt."""

from __future__ import annotations

import torch
from bsfa_kernels import block_sparse_attention
from bsfa_kernels.integrations.transformers import AttentionModule, attach, notes

from ..models.load import LoadedModel
from ..models.prompts import Prompt
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
def capture(loaded: LoadedModel, modules: dict[str, AttentionModule], sample) -> dict[str, Captured]:
    """{module path: its call} of one prefill of `sample` (see Prompt.of), on the CPU; modules that were not called are
    missing.
    """
    handlers = {path: CapturingAttention() for path in modules}
    prompt = Prompt.of(sample, loaded.model)
    with attach(loaded.model, handlers):
        loaded.model(**prompt.inputs, use_cache=False, logits_to_keep=1)
    return {path: handler.seen for path, handler in handlers.items() if handler.seen is not None}


def why_dense(model) -> str:
    """Why no handler of the chosen modules of `model` was called, in words."""
    reasons = sorted({note.reason for note in notes(model) if not note.expected})
    return "; ".join(reasons) or "none of the chosen modules attends through bsfa in this model"
