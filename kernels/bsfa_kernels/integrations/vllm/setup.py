"""Thresholds onto the layers of a loaded vLLM model: checked against its configuration, cut to this rank's heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...thresholds import Thresholds, ThresholdsError
from ..identity import configuration
from ..sparse import SparseAttention
from .counters import Counters, logger
from .layer import Serving, SparseLayer, SplittingBuilder
from .options import Options
from .plan import head_slice, module_paths, of_heads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig

NO_THRESHOLDS = "the thresholds file does not hold it"
WRAPPED = "a layer that changes what vLLM's attention sees"


def prepare(builder: SplittingBuilder, vllm_config: VllmConfig, layer_names, device, backend: type) -> None:
    """Give the layers of a cache group their part, and `builder` the number of rows that a prefill must have.

    Called once for each group of layers, before the first batch. Raises ThresholdsError, naming the difference, unless
    the file was made for this model. Weights are not compared: vLLM fuses and shards them, and a fingerprint is of the
    checkpoint's own.
    """
    options = Options.of(vllm_config.additional_config)
    context = vllm_config.compilation_config.static_forward_context
    layers = {name: context[name] for name in layer_names}
    layers = {name: layer for name, layer in layers.items() if isinstance(getattr(layer, "impl", None), SparseLayer)}
    if options is None or not layers:
        return
    thresholds = options.read()
    paths = module_paths(_attention(context), thresholds.tensors)
    parallel = vllm_config.parallel_config
    if not paths or not paths.keys().isdisjoint(layers):  # a drafter's layers come with its own configuration
        _check(thresholds, vllm_config, context, paths)
    rank, ranks = parallel.rank % parallel.tensor_parallel_size, parallel.tensor_parallel_size
    counters = _counters(context, vllm_config, options)
    for name, layer in layers.items():
        impl, handler, reason = layer.impl, None, layer.impl.dense_reason
        if layer.get_attn_backend() is not backend:
            reason = WRAPPED
        elif name not in paths:
            reason = NO_THRESHOLDS
        if reason is None:
            path = paths[name]
            heads = head_slice(thresholds.tensors[path].shape[1], impl.num_heads, rank, ranks)
            handler = SparseAttention(
                of_heads(thresholds, options.point, path, heads), options.point, path, count=True, device=device,
                longest=vllm_config.model_config.max_model_len,
            )  # fmt: skip
            counters.served[name] = handler
        else:
            counters.note(reason, f"{name} and layers like it")
        impl.serving = Serving(name, handler, reason, counters)
    builder.least_rows = thresholds.tile.rows
    builder.served_heads = max(layer.impl.num_heads for layer in layers.values())
    point = thresholds.points[thresholds.index(options.point)]
    logger.info(
        "bsfa: %s, point %s (%s gate, tiles %s): %d of %d attention layers, matched by configuration, the weights not",
        options.thresholds, point.name, point.gate, thresholds.tile, len(counters.served), len(_attention(context)),
    )  # fmt: skip


def _attention(context: Mapping) -> list[str]:
    """Names of the layers that attend through vLLM's attention layer."""
    return [name for name, layer in context.items() if hasattr(getattr(layer, "impl", None), "num_heads")]


def _check(thresholds: Thresholds, vllm_config: VllmConfig, context: Mapping, paths: Mapping[str, str]) -> None:
    config = vllm_config.model_config.hf_config
    impls = [context[name].impl for name in paths]
    identity = {"architecture": (config.architectures or [None])[0], **configuration(config)}
    for key, attribute in (("head_dim", "head_size"), ("scale", "scale")):
        found = {getattr(impl, attribute) for impl in impls}
        if len(found) == 1 and not isinstance(thresholds.model[key], list):
            identity[key] = found.pop()
    thresholds.check_model(identity)
    missing = sorted(set(thresholds.tensors) - set(paths.values()))
    if missing and vllm_config.parallel_config.pipeline_parallel_size == 1:
        raise ThresholdsError(
            f"the thresholds hold module {missing[0]!r}, and none of vLLM's attention layers is it: "
            f"{', '.join(_attention(context)[:3])} ..."
        )


def _counters(context: Mapping, vllm_config: VllmConfig, options: Options) -> Counters:
    """The counters that this model's layers share: those of an earlier group, or new ones."""
    for layer in context.values():
        serving = getattr(getattr(layer, "impl", None), "serving", None)
        if serving is not None:
            return serving.counters
    parallel = vllm_config.parallel_config
    counters = Counters(vllm_config.instance_id, parallel.rank, parallel.world_size, options.log_every)
    counters.start()
    return counters
