"""What packing makes: samples and their images in one sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..texts import Sample

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A sample within a pack: tokens `start` to `stop`, its answer included where it has one.

    `whole`: nothing of it was cut. `repeat` counts from 0 how often the sample came before in the same pack.
    """

    id: str
    source: str
    start: int
    stop: int
    whole: bool = True
    repeat: int = 0


@dataclass(frozen=True)
class Packed(Sample):
    """Multimodal samples in one sequence of T tokens.

    `extra` is what the processor gave besides the tokens, on the CPU: the images' tensors ("pixel_values", ...), and
    "mm_token_type_ids" or "token_type_ids" [1, T] where it makes them. `parts` are the samples and `images` the
    (start, stop) of every image's tokens, in order.
    """

    parts: tuple[Part, ...] = ()
    images: tuple[tuple[int, int], ...] = ()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's `forward`, input_ids int64 [1, T] among them."""
        import torch

        return {"input_ids": torch.tensor([self.tokens]), **(self.extra or {})}
