"""vLLM's CPU attention with bsfa in front: it takes CPU_ATTN's place, since the CPU platform allows no other backend.

Without options it is CPU_ATTN. vLLM packs keys into a page in an order that suits the instruction set; which order that
is, one page of numbered entries tells.
"""

from __future__ import annotations

from functools import cache

import torch
import vllm
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from ...pages import join_pages
from .layer import Keys, SparseLayer, SplittingBuilder
from .options import Options
from .setup import prepare

UNREADABLE = "keys lie in this instruction set's pages in an order that is no permutation"


class SparseCPUBackend(CPUAttentionBackend):
    """CPU_ATTN, whose layers serve prefills with thresholds where options ask for it."""

    @staticmethod
    def get_impl_cls():
        options = Options.of(get_current_vllm_config().additional_config)
        if options is None:
            return CPUAttentionBackendImpl
        options.check_version(vllm.__version_tuple__)
        options.read()  # a bad file is refused before weights are loaded
        return SparseCPULayer

    @staticmethod
    def get_builder_cls():
        return SplittingCPUBuilder


class SplittingCPUBuilder(SplittingBuilder, CPUAttentionMetadataBuilder):
    """CPU_ATTN's metadata, and what of the batch is a prefill."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        prepare(self, vllm_config, layer_names, device, SparseCPUBackend)

    def host_lengths(self, common):
        return common.seq_lens[: common.num_reqs].tolist()


class SparseCPULayer(SparseLayer, CPUAttentionBackendImpl):
    """CPU_ATTN's layer. Prefills go through `block_sparse_attention`, the rest of the batch through vLLM's kernel."""

    def reason_against(self, layer, query, output):
        order = packing(layer.isa, layer.kv_cache.shape[2], self.head_size, layer.kv_cache.dtype)
        return UNREADABLE if order is None else super().reason_against(layer, query, output)

    def read_pages(self, layer, kv_cache, block_table, length, output):
        page = kv_cache.shape[2]
        order = packing(layer.isa, page, self.head_size, kv_cache.dtype)
        pages = kv_cache[block_table[0, : -(-length // page)].long()].view(
            -1, self.num_kv_heads, 2, page * self.head_size
        )
        halves = (pages[:, :, i][..., order[i]].unflatten(-1, (page, self.head_size)) for i in range(2))
        return Keys(*(join_pages(half, length)[None].to(output.dtype) for half in halves))


@cache
def packing(isa: str, page: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """int64 [page * head_dim] for keys and for values: where entry (position, column) of a page lies in it. None where
    vLLM stores anything but each entry once.
    """
    number = torch.arange(page * head_dim)
    found = []
    digits = (number % 128, number // 128 % 128, number // 128**2)  # whole numbers to 256 are exact in any dtype
    for digit in digits:
        x = digit.view(page, 1, head_dim).to(dtype)
        keys, values = torch.full((1, 1, 2 * page, head_dim), -1, dtype=dtype).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(x, x, keys, values, torch.arange(page), isa)
        found.append([part.flatten().long() for part in (keys, values)])
    stored = [sum(digit[i] * 128**n for n, digit in enumerate(found)) for i in range(2)]
    if any(not torch.equal(x.sort().values, number) for x in stored):
        return None
    return tuple(x.argsort() for x in stored)
