"""What the CPU's and the GPU's backend share: an attention layer that serves prefills itself, a metadata builder that
finds them. Both stand in front of vLLM's own class, which does everything else.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ...packed import Packed, pack
from ..plan import Call, Route, few_queries, plan
from ..sparse import SparseAttention
from . import plan as vllm_plan
from .counters import Counters
from .plan import Batch, LayerFacts, Prefill, layer_reason, take_apart, token_rows


class Others(NamedTuple):
    """The requests of a batch that stay with vLLM's kernel, as a batch of their own."""

    rows: slice | torch.Tensor  # their rows in the batch
    metadata: object  # what vLLM's kernel takes


class Together(NamedTuple):
    """Several prefills for one launch."""

    packed: Packed
    requests: slice | torch.Tensor  # their rows in the block table


class Split(NamedTuple):
    """A batch that holds prefills. `reason`: why vLLM's kernel has to serve it as it is."""

    batch: Batch
    others: Others | None
    reason: str | None = None
    together: Together | None = None


class Keys(NamedTuple):
    """Keys and values of a sequence, in the output's dtype: k and v [1, Hkv, keys, D]; or, with `block_table` int32
    [sequences, n], pages [pages, Hkv, page, D].
    """

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor | None = None


class Serving(NamedTuple):
    """One layer's part in serving: its module's handler (None: `reason` says why there is none) and who counts."""

    layer: str
    handler: SparseAttention | None
    reason: str | None
    counters: Counters


class SparseLayer:
    """Before vLLM's implementation of an attention layer in the order of bases; vLLM gives both the same arguments.

    A subclass says `reads_fp8` and how `read_pages` and `dequantised` work.
    """

    reads_fp8 = False
    serving: Serving | None = None  # set before the first batch, by `setup.prepare`

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None,
        kv_cache_dtype="auto", logits_soft_cap=None, attn_type="decoder", kv_sharing_target_layer_name=None, **others,
    ):  # fmt: skip
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name, **others,
        )  # fmt: skip
        known = LayerFacts(
            getattr(attn_type, "value", attn_type), sliding_window, logits_soft_cap, alibi_slopes, kv_cache_dtype,
            others.get("sinks") is not None, {name: value for name, value in others.items() if name != "sinks"},
        )  # fmt: skip
        self.dense_reason = layer_reason(known, self.reads_fp8)

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        """vLLM's call: query [tokens, Hq, D], key and value [tokens, Hkv, D] or None, `kv_cache` with this batch's keys
        and values in it, output [tokens, Hq, D] written in place.
        """

        split = getattr(attn_metadata, "bsfa", None)
        reason = None
        if split is not None and self.serving is not None:
            reason = split.reason or self.serving.reason
            if output_scale is not None or output_block_scale is not None:
                reason = vllm_plan.QUANTISED_OUTPUT
            reason = reason or self.reason_against(layer, query, output)
            if reason is not None:
                self.serving.counters.passed_over(self.serving.layer, reason, len(split.batch.prefills))
        if split is None or self.serving is None or reason is not None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        together = split.together if self.reads_in_place(kv_cache, output) else None
        if together is not None:
            packed, requests = together
            keys = self.read_pages(layer, kv_cache, attn_metadata.block_table[requests], packed.keys, output)
            self.attend(query[: packed.end], keys, output[: packed.end], packed=packed)
        for prefill in split.batch.prefills if together is None else ():
            rows = slice(prefill.start, prefill.start + prefill.rows)
            own = attn_metadata.block_table[prefill.request : prefill.request + 1]
            keys = self.read_pages(layer, kv_cache, own, prefill.keys, output)
            q = self.dequantised(layer, query[rows], output)
            self.attend(q, keys, output[rows], q_offset=prefill.q_offset)
        if split.others is not None:
            rows, metadata = split.others
            part = output[rows]
            parts = (None if x is None else x[rows] for x in (query, key, value))
            super().forward(layer, *parts, kv_cache, metadata, part)
            if not isinstance(rows, slice):  # an index made a copy
                output[rows] = part
        self.serving.counters.came()
        return output

    def reason_against(self, layer, query: torch.Tensor, output: torch.Tensor) -> str | None:
        """Why no gate would judge a prefill of this layer, as `integrations/plan.py` sees it."""
        q = output.transpose(0, 1)[None]  # the query's shape, and the dtype that it is computed in
        step = plan(Call(q, q, q, True, True, False, None, None, False), self.serving.handler)
        return None if step.route is Route.GATED else step.reason

    def attend(self, q, keys: Keys, out: torch.Tensor, **where) -> None:
        """q and out [rows, Hq, D]; `where` they stand as in `block_sparse_attention`: q_offset or packed."""
        q, out = (x.transpose(0, 1)[None] for x in (q, out))
        if keys.block_table is not None:
            where |= dict(block_table=keys.block_table)
        self.serving.handler(q, keys.k, keys.v, scale=self.scale, causal=True, spans=None, out=out, **where)

    def reads_in_place(self, kv_cache: torch.Tensor, output: torch.Tensor) -> bool:
        """Whether kernels can read the cache's pages where they are."""
        return False

    def dequantised(self, layer, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The queries in the output's dtype."""
        return query

    def read_pages(self, layer, kv_cache, block_table: torch.Tensor, length: int, output: torch.Tensor) -> Keys:
        """The first `length` keys and values of a sequence, `block_table` [1, n]; where pages are read in place, of
        several.
        """
        raise NotImplementedError


class SplittingBuilder:
    """Before vLLM's metadata builder in the order of bases: what it builds gets an attribute `bsfa`, Split or None."""

    # Set by `setup.prepare`.
    least_rows: int | None = None  # of a prefill; None where no layer of the group is ours
    served_heads = 0  # of a layer, on this rank

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.bsfa = self._split(common_attn_metadata)
        return metadata

    def _split(self, common) -> Split | None:
        if self.least_rows is None or common.max_query_len < self.least_rows:
            return None
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        lengths = self.host_lengths(common)
        reason = self.batch_reason(common)
        queries = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        if lengths is None or any(rows > keys for rows, keys in zip(queries, lengths, strict=True)):
            lengths, reason = queries, vllm_plan.UNKNOWN_LENGTHS  # the latter in batches that only warm up
        device = common.block_table_tensor.device
        few = partial(few_queries, heads=self.served_heads, device=device)
        batch = take_apart(starts, lengths, self.least_rows, few)
        if not batch.prefills:
            return None
        others = None
        if reason is None and batch.others:
            others = self._others(common, batch.others, starts, lengths)
        together = None
        if reason is None and len(batch.prefills) > 1:
            together = self._together(batch.prefills, device)
        return Split(batch, others, reason, together)

    def _together(self, prefills: tuple[Prefill, ...], device) -> Together:
        requests = [prefill.request for prefill in prefills]
        packed = pack(
            [prefill.start for prefill in prefills], [prefill.rows for prefill in prefills],
            [prefill.keys for prefill in prefills], device,
        )  # fmt: skip
        if requests[-1] - requests[0] + 1 == len(requests):
            return Together(packed, slice(requests[0], requests[-1] + 1))
        return Together(packed, torch.tensor(requests, device=device))

    def host_lengths(self, common) -> list[int] | None:
        """Keys of each request, exact where it has a tile's queries or more, without waiting for the device."""
        lengths = common.seq_lens_cpu_upper_bound
        return None if lengths is None else lengths[: common.num_reqs].tolist()

    def batch_reason(self, common) -> str | None:
        """Why vLLM's kernel has to serve the whole batch."""
        parallel, model = self.vllm_config.parallel_config, self.vllm_config.model_config
        if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
            return vllm_plan.CONTEXT_PARALLEL
        if model.rswa_window is not None:
            return vllm_plan.REFERENCE_WINDOW
        if common.causal is not True or any((common.mm_req_doc_ranges or {}).values()):
            return vllm_plan.BIDIRECTIONAL
        return vllm_plan.CROSS if common.encoder_seq_lens is not None else None

    def _others(self, common, requests, starts, lengths) -> Others:
        rows = token_rows(starts, requests)
        device, host = common.query_start_loc.device, common.query_start_loc_cpu
        if not isinstance(rows, slice):
            rows = torch.tensor(rows, device=device)
        index = torch.tensor(requests, device=device)
        queries = [starts[request + 1] - starts[request] for request in requests]
        begins = torch.tensor([0, *queries]).cumsum(0).to(host.dtype)
        part = type(common)(
            query_start_loc=begins.to(device), query_start_loc_cpu=begins, seq_lens=common.seq_lens[index],
            num_reqs=len(requests), num_actual_tokens=sum(queries), max_query_len=max(queries),
            max_seq_len=max(lengths[request] for request in requests),
            block_table_tensor=common.block_table_tensor[index], slot_mapping=common.slot_mapping[rows], causal=True,
            seq_lens_cpu_upper_bound=torch.tensor([lengths[request] for request in requests]),
        )  # fmt: skip
        # A quick build: no schedule in buffers that the batch's own metadata lives in.
        return Others(rows, super().build(0, part, fast_build=True))
