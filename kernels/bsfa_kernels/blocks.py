"""Block lists: which key tiles each query tile may visit, chosen by any selection method before the kernel runs.

    from bsfa_kernels import BlockLists, block_sparse_attention
    result = block_sparse_attention(q, k, v, blocks=BlockLists.from_mask(mask))

What a kernel does with them: reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockLists:
    """One list of key tiles per sequence, query head and query tile.

    `indices` int32 [B, Hq, query tiles, capacity] holds key tile indices, counted from position 0; `counts` int32
    [B, Hq, query tiles] says how many leading entries of each list are valid (0 .. capacity). The query tiles are
    those of `Attention.kept`: a sequence's first query tile comes first. A list is a set: tiles are visited from right
    to left in any case, once. Forced tiles need not be listed, and indices that do not exist or are not visible are
    ignored.

    Contents are run-time data: no backend that runs in a CUDA graph reads them on the host.

    Raises TypeError for what is no tensor, ValueError for tensors of other types or shapes, or on two devices.
    """

    indices: torch.Tensor
    counts: torch.Tensor

    def __post_init__(self):
        for name, value, axes in (
            ("indices", self.indices, "[batch, query heads, query tiles, capacity]"),
            ("counts", self.counts, "[batch, query heads, query tiles]"),
        ):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"block lists' '{name}' must be a torch.Tensor {axes}, got {type(value).__name__}")
            if value.dtype != torch.int32 or value.dim() != axes.count(",") + 1:
                raise ValueError(
                    f"block lists' '{name}' must be an int32 tensor {axes}, got {value.dtype} {list(value.shape)}"
                )
        if self.counts.shape != self.indices.shape[:3] or self.counts.device != self.indices.device:
            raise ValueError(
                f"block lists need one count a list: counts {list(self.counts.shape)} on {self.counts.device} do not "
                f"fit indices {list(self.indices.shape)} on {self.indices.device}"
            )

    @staticmethod
    def from_mask(mask: torch.Tensor) -> BlockLists:
        """The tiles set in `mask`, bool [B, Hq, query tiles, key tiles].

        One entry a key tile, -1 where it is not set: nothing has to be sorted, and what selects tiles on the device
        pays one pass. Runs on the mask's device without waiting for it.

        Raises TypeError for what is no tensor, ValueError for a mask of another type or number of axes.
        """
        if not isinstance(mask, torch.Tensor):
            raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise ValueError(
                "mask must be a bool tensor [batch, query heads, query tiles, key tiles], "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        tile = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
        counts = torch.full(mask.shape[:3], mask.shape[-1], dtype=torch.int32, device=mask.device)
        return BlockLists(torch.where(mask, tile, -1), counts)

    def to(self, device: torch.device | str) -> BlockLists:
        return BlockLists(self.indices.to(device), self.counts.to(device))
