"""One sequence as a model takes it: the one place where samples become what `forward` is called with.

prompt = Prompt.of(sample, model)           # sample: `tokens`, and of a multimodal one what `extra` holds besides
model(**prompt.inputs)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from bsfa_kernels.integrations.visual_tokens import visual_tokens


@dataclass(frozen=True)
class Prompt:
    """`inputs` are keyword arguments of the model's `forward`, on its device: input_ids [1, T], and pixel values, their
    grids and token types where there are images. `visual` bool [T] says which tokens stand for images; None in a model
    that knows no images.
    """

    inputs: dict[str, torch.Tensor]
    visual: torch.Tensor | None

    @classmethod
    def of(cls, sample, model) -> Prompt:
        """Of `sample`, which has `tokens` and perhaps `extra` {name: tensor}; floating-point tensors take the dtype of
        `model`.
        """
        inputs = {"input_ids": torch.tensor([sample.tokens], device=model.device)}
        for name, tensor in (getattr(sample, "extra", None) or {}).items():
            dtype = model.dtype if tensor.is_floating_point() else tensor.dtype
            inputs[name] = tensor.to(model.device, dtype)
        visual = visual_tokens(model.config, inputs)
        return cls(inputs, None if visual is None else visual[0])

    @classmethod
    def wrap(cls, given: Prompt | torch.Tensor) -> Prompt:
        """`given`, or the prompt of its tokens [T], all of them text."""
        return given if isinstance(given, cls) else cls({"input_ids": given[None]}, None)

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [T]"""
        return self.inputs["input_ids"][0]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def predicts(self) -> torch.Tensor:
        """bool [T]: the positions whose prediction is one of a model of language: text comes next, or nothing does.
        What is predicted for the place of an image's token is never used.
        """
        if self.visual is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return torch.nn.functional.pad(~self.visual[1:], (0, 1), value=True)
