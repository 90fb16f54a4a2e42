"""FlashAttention-4's block-sparse forward pass: lists of 128x128 tiles, as it wants them.

    call = block_sparse(library, laid, tiles, form)   # tiles bool [B, Hq, T / 128, T / 128], causal
    call()                                            # [B, Hq, T, D]

It has two lists a row of tiles, one of tiles to be masked and one of whole ones, and two ways to be causal. "causal":
its flag, which masks every listed tile and starts with the longest rows. "mask_mod": a mask as FlexAttention's, for the
diagonal alone, in the rows' order. Which is faster is for a measurement to say. Lists are made here, before any clock.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch

from .flash_attention import TokensFirst, attention
from .libraries import Library

SIDE = 128  # rows and keys of a listed tile: what its Hopper kernel works on with head dims 64 to 128
FORMS = ("causal", "mask_mod")


def block_sparse(library: Library, laid: TokensFirst, tiles: torch.Tensor, form: str) -> Callable[[], torch.Tensor]:
    """A call on the listed `tiles` alone, with `library` for its version. The diagonal has to be listed, and nothing
    right of it.
    """
    return _Call(library, laid, tiles, form)


class _Call:
    def __init__(self, library: Library, laid: TokensFirst, tiles: torch.Tensor, form: str):
        self.source, self.library, self.laid = library, library.version, laid
        sparsity = import_module(f"{library.module.__name__}.block_sparsity").BlockSparseTensorsTorch
        diagonal = torch.eye(tiles.shape[-1], dtype=torch.bool, device=tiles.device)
        masked, whole = ascending(tiles & diagonal), ascending(tiles & ~diagonal)
        self.options = {
            "block_sparse_tensors": sparsity(
                mask_block_cnt=masked[0], mask_block_idx=masked[1], full_block_cnt=whole[0], full_block_idx=whole[1],
                block_size=(SIDE, SIDE),
            ),
            "pack_gqa": False,  # lists differ by head
            "causal": form == "causal",
        }  # fmt: skip
        if form == "mask_mod":
            self.options["mask_mod"] = _causal_mask()

    def __call__(self) -> torch.Tensor:
        return attention(self.source, *self.laid.tensors, **self.options).transpose(1, 2)


def ascending(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts int32 [B, H, R], indices int32 [B, H, R, K], the set tiles first) of bool [B, H, R, K]."""
    indices = tiles.to(torch.uint8).argsort(stable=True, dim=-1, descending=True).to(torch.int32)
    return tiles.sum(-1, dtype=torch.int32), indices


@cache
def _causal_mask() -> Callable:
    from cutlass import cute

    @cute.jit
    def causal(batch, head, query, key, lengths, tensors):
        return query >= key

    return causal
