"""`--prefill-attention-backend bsfa` for SGLang, read against 0.5.23.

    pip install bsfa        # SGLang finds the plug-in by its entry point, sglang.srt.plugins
    SGLANG_BSFA_THRESHOLDS=thresholds.safetensors SGLANG_BSFA_POINT=skip-50 \\
        python -m sglang.launch_server --model-path MODEL \\
        --prefill-attention-backend bsfa --decode-attention-backend fa3

The backend is SGLang's own (SGLANG_BSFA_STOCK, by default the one that decodes) with another `forward_extend`: keys and
values are written to the pool, gathered for each sequence and judged by the thresholds of the layer's heads. A batch or
layer that is not known here goes to the stock backend's `forward_extend`, with one line in the log for each reason.

SGLang fuses QKV and shards it, so thresholds are matched to the model by its configuration; weights are not compared.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

import torch

from ..request import make_spans
from ..thresholds import Thresholds
from .plan import FEW, Call, Route, few_queries, plan
from .sparse import SparseAttention

NAME = "bsfa"
THRESHOLDS, POINT, STOCK = "SGLANG_BSFA_THRESHOLDS", "SGLANG_BSFA_POINT", "SGLANG_BSFA_STOCK"
# What a batch may carry that changes who attends to whom, where keys lie or what is returned.
UNKNOWN_IN_BATCH = (
    "encoder_lens", "token_type_ids", "multi_item_delimiter_indices", "cross_attention_custom_mask", "spec_info",
    "out_cache_loc_virtual", "attn_cp_metadata", "mha_return_lse", "_attn_output", "attn_attend_prefix_cache",
    "llada_image_conditioning_text_lens_cpu",
)  # fmt: skip
logger = logging.getLogger(__name__)


def register() -> None:
    """The plug-in: make the backend's name known to SGLang."""
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(create)


def create(runner):
    """The stock backend of a ModelRunner with bsfa's `forward_extend`. Raises ValueError for settings that cannot be
    meant, ThresholdsError for a bad file or one for another model.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    path = os.environ.get(THRESHOLDS)
    if not path:
        raise ValueError(f"--prefill-attention-backend {NAME} needs {THRESHOLDS}, the file of `bsfa export`")
    stock = os.environ.get(STOCK) or getattr(runner, "decode_attention_backend_str", None)
    if not os.environ.get(STOCK) and stock in (None, NAME):
        stock = "triton"
    if stock == NAME or stock not in ATTENTION_BACKENDS:
        raise ValueError(f"{STOCK} is {stock!r}; it must be one of {', '.join(sorted({*ATTENTION_BACKENDS} - {NAME}))}")
    thresholds = Thresholds.read(path)
    thresholds.check_model(identity(runner.model_config.hf_config))
    handlers = Layers(thresholds, os.environ.get(POINT), runner.model_config.context_len)
    backend = ATTENTION_BACKENDS[stock](runner)
    # A subclass of the stock backend's own class: SGLang asks backends for their type and flags.
    backend.__class__ = type(f"Bsfa{type(backend).__name__}", (Extend, type(backend)), {})
    backend.bsfa_layers, backend.bsfa_runner, backend.bsfa_said = handlers, runner, set()
    logger.info(
        "bsfa: point %s of %s on top of %s; matched by configuration, weights were not compared",
        handlers.point, path, stock,
    )  # fmt: skip
    return backend


def identity(config) -> dict[str, object]:
    """Of thresholds.MODEL_KEYS, what a transformers configuration says. Unknown ones are left out."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    found = {
        "architecture": (getattr(config, "architectures", None) or [None])[0],
        "layers": getattr(text, "num_hidden_layers", None),
        "query_heads": heads,
        "key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
    }
    return {key: value for key, value in found.items() if value is not None}


class Layers:
    """The handlers of a model's layers, made when they are first asked for."""

    def __init__(self, thresholds: Thresholds, point: str | None, longest: int | None):
        """Raises ThresholdsError for an unknown point, ValueError where modules are not one for each layer number."""
        self.point = thresholds.points[thresholds.index(point)].name
        self._thresholds, self._longest, self._paths = thresholds, longest, layer_paths(thresholds.tensors)
        self._handlers: dict[int, SparseAttention] = {}

    def handler(self, layer: int, heads: int, rank: int, ranks: int, device) -> SparseAttention | str:
        """The handler for the run of `heads` query heads of process `rank`, or why there is none."""
        if layer not in self._paths:
            return f"layer {layer} has no thresholds"
        if layer not in self._handlers:
            path = self._paths[layer]
            whole = self._thresholds.tensors[path].shape[1]
            if heads * ranks != whole:
                return f"{heads} query heads on each of {ranks} processes are not the {whole} of the thresholds"
            self._handlers[layer] = SparseAttention(
                self._thresholds, self.point, path, longest=self._longest, device=device,
                heads=slice(rank * heads, (rank + 1) * heads),
            )  # fmt: skip
        return self._handlers[layer]


def layer_paths(modules: Mapping[str, object]) -> dict[int, str]:
    """{number of the layer: module path}. Raises ValueError where two modules have the same number, or one has none."""
    paths: dict[int, str] = {}
    for path in modules:
        number = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{path}.")
        if number is None or int(number[1]) in paths:
            raise ValueError(f"module {path!r} of the thresholds is not the only one of a numbered decoder layer")
        paths[int(number[1])] = path
    return paths


class Extend:
    """`forward_extend` in front of the stock backend's; the rest is the stock backend."""

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **options):
        """q [tokens, Hq * D], k and v [tokens, Hkv, D] of all sequences; returns [tokens, Hq * D]."""
        handler = self._bsfa_handler(q, k, v, layer, forward_batch, save_kv_cache, options)
        if isinstance(handler, str):
            if handler not in self.bsfa_said:
                self.bsfa_said.add(handler)
                logger.info("bsfa: some calls run SGLang's own attention: %s", handler)
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **options)
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        pool = self.bsfa_runner.token_to_kv_pool
        pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k, v)
        keys, values = pool.get_kv_buffer(layer.layer_id)
        table = self.bsfa_runner.req_to_token_pool.req_to_token
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out, start = torch.empty_like(q), 0
        lengths = zip(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True)
        for sequence, (prefix, rows) in enumerate(lengths):
            if not rows:
                continue
            end = start + rows
            at = table[forward_batch.req_pool_indices[sequence], : prefix + rows]
            arguments = (x[None].transpose(1, 2) for x in (q[start:end], keys[at], values[at]))
            spans = make_spans(1, prefix, device=q.device)
            place = out[start:end].transpose(0, 1)[None]
            handler(*arguments, scale=layer.scaling, causal=True, spans=spans, out=place)
            start = end
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _bsfa_handler(self, q, k, v, layer, batch, save_kv_cache, options) -> SparseAttention | str:
        """The handler of a call, or why the stock backend runs it."""
        reason = _unknown_layer(layer) or _unknown_batch(batch) or _unknown_call(q, k, v, save_kv_cache, options)
        reason = reason or _unknown_pool(self.bsfa_runner, q)
        if reason:
            return reason
        if sum(batch.extend_seq_lens_cpu) != q.shape[0]:
            return "rows of no sequence (padding)"
        processes = _head_processes()
        if isinstance(processes, str):
            return processes
        handler = self.bsfa_layers.handler(layer.layer_id, layer.tp_q_head_num, *processes, q.device)
        if isinstance(handler, str):
            return handler
        prefixes, heads = batch.extend_prefix_lens_cpu, layer.tp_q_head_num
        if all(
            few_queries(rows, prefix + rows, heads, q.device)
            for prefix, rows in zip(prefixes, batch.extend_seq_lens_cpu, strict=True)
        ):
            return FEW
        rows = max(batch.extend_seq_lens_cpu)
        keys, values = (x[None, :rows].transpose(1, 2) for x in (k, v))  # a sequence's, not all tokens' of the batch
        call = Call(
            q.view(1, -1, layer.tp_q_head_num, layer.qk_head_dim).transpose(1, 2)[:, :, :rows], keys, values, True,
            True, False, None, None, False,
        )  # fmt: skip
        step = plan(call, handler)
        return handler if step.route is Route.GATED else step.reason


def _unknown_layer(layer) -> str | None:
    if layer.is_cross_attention:
        return "cross-attention"
    if getattr(layer.attn_type, "value", layer.attn_type) != "decoder":
        return f"attention of type {getattr(layer.attn_type, 'value', layer.attn_type)}"
    if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
        return f"sliding window of {layer.sliding_window_size} tokens"
    if layer.logit_cap:
        return f"scores are soft-capped at {layer.logit_cap:g}"
    if layer.qk_head_dim != layer.v_head_dim:
        return "keys and values differ in head dim"
    for name, plain in (("k_scale", None), ("v_scale", None), ("use_irope", False), ("pos_encoding_mode", "NONE")):
        if getattr(layer, name, plain) != plain:
            return f"the layer has {name}"
    return "temperature by length" if getattr(layer, "xai_temperature_len", -1) > 0 else None


def _unknown_batch(batch) -> str | None:
    if batch.forward_mode.name != "EXTEND":
        return f"batches of mode {batch.forward_mode.name}"
    for name in UNKNOWN_IN_BATCH:
        found = getattr(batch, name, None)
        if found is not None and found is not False:
            return f"the batch has {name}"
    if not batch.extend_seq_lens_cpu or not batch.extend_prefix_lens_cpu:
        return "the batch does not say its lengths on the host"
    return None


def _unknown_call(q, k, v, save_kv_cache, options) -> str | None:
    if k is None or v is None or not save_kv_cache:
        return "keys and values that are in the pool already"
    for name, value in options.items():
        if value is not None and value is not False:
            return f"the call has {name}"
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return "prefill that is captured in a CUDA graph"
    return None


def _unknown_pool(runner, q) -> str | None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = runner.token_to_kv_pool
    if type(pool) is not MHATokenToKVPool:
        return f"a key-value pool of type {type(pool).__name__}"
    if pool.dtype != q.dtype or getattr(pool, "store_dtype", pool.dtype) != q.dtype:
        return f"a key-value cache of {pool.dtype}"
    if getattr(getattr(runner, "kv_index_translator", None), "is_translating", False):
        return "a unified key-value pool"
    return None


def _head_processes() -> tuple[int, int] | str:
    """(rank, size) of the processes that share a layer's heads, or why a sequence is not whole on them."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.attn_cp_size > 1 or parallel.attn_dcp_size > 1:
        return "sequences are divided over processes (context parallel)"
    return parallel.attn_tp_rank, parallel.attn_tp_size
