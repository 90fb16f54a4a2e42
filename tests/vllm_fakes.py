"""Just enough of vLLM 0.32 for bsfa_kernels.integrations.vllm.cuda: names, signatures and fields as its source has them
(tests/vllm_engine.py compares them with a real vLLM), and a plain attention over pages in FlashAttention's place.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import sys
from types import ModuleType, SimpleNamespace

import torch


@dataclasses.dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool | torch.Tensor = True
    encoder_seq_lens: torch.Tensor | None = None
    mm_req_doc_ranges: dict | None = None
    seq_lens_cpu_upper_bound: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class MultipleOf:
    base: int


class AttentionCGSupport(enum.Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2


class FlashAttentionMetadataBuilder:
    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.layer_names, self.vllm_config, self.device = layer_names, vllm_config, device

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        return SimpleNamespace(
            block_table=common.block_table_tensor, slot_mapping=common.slot_mapping, fast=fast_build,
            starts=common.query_start_loc.tolist(), lengths=common.seq_lens.tolist(),
        )  # fmt: skip

    def update_block_table(self, metadata, blk_table, slot_mapping):
        updated = copy.copy(metadata)
        updated.block_table, updated.slot_mapping = blk_table, slot_mapping
        return updated


class FlashAttentionImpl:
    """`calls` keeps what each call was given."""

    dcp_world_size = pcp_world_size = 1

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
        logits_soft_cap=None, attn_type="decoder", kv_sharing_target_layer_name=None, sinks=None,
    ):  # fmt: skip
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.kv_cache_dtype, self.calls = kv_cache_dtype, []

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        self.calls.append(SimpleNamespace(metadata=attn_metadata, query=query, key=key))
        cache = kv_cache.view(torch.float8_e4m3fn) if self.kv_cache_dtype != "auto" else kv_cache
        starts = attn_metadata.starts
        for r, (start, end, keys) in enumerate(zip(starts, starts[1:], attn_metadata.lengths, strict=False)):
            pages = cache[attn_metadata.block_table[r]].float().transpose(0, 1).flatten(1, 2)[:, :keys]
            k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, 0) for x in pages.chunk(2, -1))
            scores = self.scale * query[start:end].float().transpose(0, 1) @ k.transpose(1, 2)
            position = torch.arange(keys, device=query.device)
            seen = position <= position[keys - (end - start) :, None]
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            output[start:end] = (weights @ v).transpose(0, 1).to(output.dtype)
        return output


class FlashAttentionBackend:
    sizes = [MultipleOf(16)]

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec=None):
        return cls.sizes

    @staticmethod
    def get_name():
        return "FLASH_ATTN"


class Config:
    """VllmConfig's parts that are read; its layers are put into it by hand."""

    def __init__(self, additional, hf_config, rank=0, ranks=1):
        self.additional_config, self.instance_id = additional, "test"
        self.compilation_config = SimpleNamespace(static_forward_context={})
        self.parallel_config = SimpleNamespace(
            rank=rank, world_size=ranks, tensor_parallel_size=ranks, pipeline_parallel_size=1,
            decode_context_parallel_size=1, prefill_context_parallel_size=1,
        )  # fmt: skip
        self.model_config = SimpleNamespace(hf_config=hf_config, max_model_len=4096, rswa_window=None)


class Layer:
    """vLLM's attention layer around an implementation."""

    def __init__(self, name, impl, backend):
        self.layer_name, self.impl, self.backend = name, impl, backend
        self._q_scale, self._k_scale, self._v_scale = (torch.tensor(x) for x in (0.5, 0.25, 2.0))

    def get_attn_backend(self):
        return self.backend


def install(monkeypatch, config=None, version=(0, 32, 0)) -> None:
    """Put these in vLLM's place; `config` is the current one."""
    modules = {name: ModuleType(name) for name in (
        "vllm", "vllm.config", "vllm.platforms", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backend",
        "vllm.v1.attention.backends", "vllm.v1.attention.backends.flash_attn",
    )}  # fmt: skip
    modules["vllm"].__version_tuple__ = version
    modules["vllm.config"].get_current_vllm_config = lambda: config
    modules["vllm.platforms"].current_platform = SimpleNamespace(fp8_dtype=lambda: torch.float8_e4m3fn)
    modules["vllm.v1.attention.backend"].__dict__.update(AttentionCGSupport=AttentionCGSupport, MultipleOf=MultipleOf)
    modules["vllm.v1.attention.backends.flash_attn"].__dict__.update(
        FlashAttentionBackend=FlashAttentionBackend, FlashAttentionImpl=FlashAttentionImpl,
        FlashAttentionMetadataBuilder=FlashAttentionMetadataBuilder,
    )  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "bsfa_kernels.integrations.vllm.cuda", raising=False)
