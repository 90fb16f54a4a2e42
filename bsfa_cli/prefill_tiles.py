"""What the attention modules that no gate judges add to a whole model's tiles: all of theirs are kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from bsfa_kernels.integrations.transformers import Handler, attention_modules


class Attending:
    """Which attention modules of `model` attend in its prefills, while this is entered.

        with attach(model, handlers), Attending(model) as attending:
            model(tokens)
        kept, candidates = attending.read_counts(handlers)    # SparseAttention with count=True

    Which tiles a gate may drop is a matter of positions: they are as many in every head of every module of the language
    model. A sliding window counts like full attention. Modules of a vision tower count where they are judged only.
    """

    def __init__(self, model: torch.nn.Module):
        self._model, self._hooks = model, []
        self._heads: dict[str, int] = {}  # by the path of a module that attended
        self._language = {path for path, module in attention_modules(model).items() if not module.tower}

    def unjudged(self, judged: Mapping[str, int]) -> dict[str, int]:
        """{module path: its tiles that a gate might have dropped} of the modules that attended and are not among
        `judged` {module path: such tiles in one of its heads}.
        """
        of_a_head = max((tiles for path, tiles in judged.items() if path in self._language), default=0)
        return {path: heads * of_a_head for path, heads in self._heads.items() if path not in judged}

    def read_counts(self, handlers: Mapping[str, Handler]) -> tuple[int, int]:
        """(kept, candidates): the whole model's tiles since the counters of `handlers`, {module path: handler}, were
        reset, as they now are again; (0, 0) where nothing was counted.
        """
        kept, candidates, judged = 0, 0, {}
        for path, handler in handlers.items():
            counts = getattr(handler, "counts", None)
            if counts is not None and int(counts.candidates.sum()):
                kept, candidates = kept + int(counts.kept.sum()), candidates + int(counts.candidates.sum())
                judged[path] = int(counts.candidates.max())
                handler.reset()
        rest = sum(self.unjudged(judged).values())
        return kept + rest, candidates + rest

    def __enter__(self) -> Attending:
        for path, module in attention_modules(self._model).items():
            if path not in self._language:
                continue
            hook = self._noting(path, module.query_heads)
            target = self._model.get_submodule(path)
            self._hooks.append(target.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _noting(self, path: str, heads: int):
        def note(_, arguments, options) -> None:
            tensors = (x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor) and x.dim() == 3)
            hidden = next(tensors, None)  # [batch, queries, width]
            if hidden is not None and hidden.shape[1] > 1:
                self._heads[path] = heads

        return note
