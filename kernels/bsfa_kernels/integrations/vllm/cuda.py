"""vLLM's FlashAttention with bsfa in front, for NVIDIA GPUs: `--attention-backend CUSTOM`.

Written against the source of vLLM 0.32 and unit-tested with made-up metadata; it has not run in a vLLM on a GPU.
Decoding, short chunks and what bsfa does not know stay with FlashAttention, in one batch with the prefills or alone.
"""

from __future__ import annotations

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from ...pages import gather_pages
from .layer import Keys, SparseLayer, SplittingBuilder
from .options import Options, OptionsError
from .plan import CONTEXT_PARALLEL, HEAD_SCALES
from .setup import prepare


class SparseCUDABackend(FlashAttentionBackend):
    """FLASH_ATTN under the name CUSTOM, whose layers serve prefills with thresholds."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec=None) -> list:
        """Whole key tiles: then the cached prefix that a request begins with ends at a query tile, too. Where a kernel
        of FlashAttention's demands a size, that one.
        """
        sizes = super().get_supported_kernel_block_sizes(kv_cache_spec)
        free = all(isinstance(size, MultipleOf) and 128 % size.base == 0 for size in sizes)
        return [MultipleOf(128)] if free else sizes

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # batches are taken apart by the lengths on the host

    @staticmethod
    def get_impl_cls():
        options = Options.of(get_current_vllm_config().additional_config)
        if options is None:
            raise OptionsError(
                "attention backend CUSTOM is bsfa's here, and needs --additional-config "
                '\'{"bsfa": {"thresholds": "FILE"}}\''
            )
        options.check_version(vllm.__version_tuple__)
        options.read()  # a bad file is refused before weights are loaded
        return SparseCUDALayer

    @staticmethod
    def get_builder_cls():
        return SplittingCUDABuilder


class SplittingCUDABuilder(SplittingBuilder, FlashAttentionMetadataBuilder):
    """FlashAttention's metadata, and what of the batch is a prefill."""

    # A captured graph replays what the host decided once: only batches of equal, short queries (decoding, with drafts
    # or without) may be captured whole. In others the attention runs between two graphs.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        prepare(self, vllm_config, layer_names, device, SparseCUDABackend)

    def update_block_table(self, metadata, blk_table, slot_mapping):
        """Metadata of another cache group for the same batch: the others' part has its own copy of the block table."""
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        split = metadata.bsfa
        if split is not None and split.others is not None:
            index = torch.tensor(split.batch.others, device=blk_table.device)
            rows, part = split.others
            part = super().update_block_table(part, blk_table[index], slot_mapping[rows])
            updated.bsfa = split._replace(others=split.others._replace(metadata=part))
        return updated


class SparseCUDALayer(SparseLayer, FlashAttentionImpl):
    """FlashAttention's layer. Prefills go through `block_sparse_attention`, the rest of the batch does not."""

    reads_fp8 = True

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.longest = get_current_vllm_config().model_config.max_model_len

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        if attn_metadata is None and self.dense_reason is None:
            # vLLM measures its peak memory in this call: let it see the longest sequence's keys and values side by
            # side, as they are where pages cannot be read in place.
            shape = (2, self.num_kv_heads, self.longest, self.head_size)
            held = torch.empty(shape, dtype=output.dtype, device=output.device)
            del held
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )

    def reason_against(self, layer, query, output):
        if self.dcp_world_size > 1 or self.pcp_world_size > 1:
            return CONTEXT_PARALLEL
        if self.kv_cache_dtype.startswith("fp8") and any(x.numel() > 1 for x in _scales(layer)):
            return HEAD_SCALES
        return super().reason_against(layer, query, output)

    def reads_in_place(self, kv_cache, output):
        tile = self.serving.handler.thresholds.tile
        return kv_cache.dtype == output.dtype and kv_cache.shape[2] == tile.keys

    def read_pages(self, layer, kv_cache, block_table, length, output):
        scales = {}
        if self.kv_cache_dtype.startswith("fp8"):
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
            scales = dict(zip(("key_scale", "value_scale"), _scales(layer)[1:], strict=True))
        if kv_cache.dtype != output.dtype:
            return Keys(*gather_pages(*self._halves(kv_cache), block_table[0], length, dtype=output.dtype, **scales))
        pages = -(-length // kv_cache.shape[2])
        return Keys(*self._halves(kv_cache), block_table[:, :pages].to(torch.int32))

    def dequantised(self, layer, query, output):
        if query.dtype.itemsize > 1:
            return query
        return (query.float() * layer._q_scale).to(output.dtype)

    def _halves(self, kv_cache: torch.Tensor):
        """Keys and values [pages, Hkv, positions, D] of a cache [pages, Hkv, positions, 2 D]."""
        return kv_cache[..., : self.head_size], kv_cache[..., self.head_size :]


def _scales(layer):
    return layer._q_scale, layer._k_scale, layer._v_scale
