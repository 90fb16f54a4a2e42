"""Every language model of transformers, built small, with random weights that make attention matter, and its inputs.

`CASES` names them "causal/llama": task and model type. What the general rules of `shrunk` do not fit is in
architectures.yaml.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import torch
import transformers
import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCABULARY, LENGTH, WINDOW, HEADS, LARGEST = 97, 160, 48, 4, 20_000_000
TASKS = {
    "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
# Length, and padding of the second sequence at its left (> 0) or right (< 0).
CALLS = {"whole": (LENGTH, 0), "left": (LENGTH, 37), "right": (LENGTH, -37), "short": (WINDOW - 8, 0)}
DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())

WINDOWED = dict(sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1)
# The first rule that matches a field's whole name gives the largest value it may have.
LIMITS = [
    (r"\w*vocab_size\w*|\w*_group_vocab", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|depth|(num_)?(encoder|decoder)_layers|num_(block|hidden)s?", 2),
    (r"(index|indexer)_(topk|budget)|keep_window_size|index_block_size", 16),
    (r"index_topk_blocks|index_n_heads|n_groups", 2),
    (r"(\w*_)?mamba_(n_heads|num_heads|n_groups|ngroups)|n_mamba_heads", 4),
    (r"\w*(d_state|state_size|chunk_size)|mamba_expand|mamba_dt_rank", 16),
    (r"num_key_value_heads|num_kv_heads|num_global_key_value_heads|swa_num_key_value_heads", 2),
    (r"head_dim|.*_head_dim|d_kv|d_head|attention_head_size|kv_channels", 32),
    (r"(\w*_)?num_(attention_)?heads|n_heads?|num_attention_heads|(encoder|decoder)_attention_heads", 4),
    (r"(\w*_)?hidden_size|d_model|n_embd|(\w*_)?embed_dim|embedding_size|emb_dim|dim", 128),
    (r"\w*intermediate_size|\w*ffn_dim|d_ff|n_inner|ffn_hidden_size|hidden_dim|\w*lora_rank", 64),
    (r"num_experts_per_tok\w*|moe_k|moe_topk|moe_top_?k|top_k_experts|expert_top_k", 2),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
    (r"sliding_window|attention_window|attention_chunk_size|local_attention|window_size", WINDOW),
    (r"num_mel_bins", 16),
]
SHARPENED = r"(^|[._])(q|k|query|key|qkv|in|c_attn|Wqkv|q_[ab]|query_key_value)(_proj|_lin)?\.weight$"
UNSET = {"head_dim": 32, "num_key_value_heads": HEADS}


def _cases() -> dict[str, tuple[str, str]]:
    """Each model class once: under its last task and model type, which is that of the language model itself."""
    last = {model_class: (task, kind) for task, names in TASKS.items() for kind, model_class in names.items()}
    return {f"{task}/{kind}": (kind, model_class) for model_class, (task, kind) in last.items()}


CASES = _cases()


def shrunk(config_class: type, overrides: dict) -> dict:
    """Arguments that make a small configuration, for itself and the configurations inside it."""
    names = {field.name for field in dataclasses.fields(config_class)}
    small = {name: value for name, value in WINDOWED.items() if name in names}
    inner = config_class.sub_configs
    outer_overrides = {name: value for name, value in overrides.items() if name not in inner}
    default = config_class(**small, **{name: dict(overrides[name]) for name in inner if name in overrides})
    values = {name: vars(default).get(name) for name in sorted(names | set(inner))}
    kinds = outer_overrides.get("layer_types", values.get("layer_types"))
    layers = [kinds.index(kind) for kind in dict.fromkeys(kinds)] if isinstance(kinds, list) else [0, 1]
    layers = sorted({*layers, *([0, 1] if len(layers) < 2 else [])})
    depth = values.get("num_hidden_layers")
    for name, value in values.items():
        if name in inner:
            if value is not None:
                small[name] = {"model_type": value.model_type} | shrunk(type(value), overrides.get(name, {}))
        elif isinstance(value, list) and len(value) == depth and depth > len(layers):
            small[name] = [value[layer] for layer in layers]
        elif isinstance(value, int) and not isinstance(value, bool):
            limit = next((limit for pattern, limit in LIMITS if re.fullmatch(pattern, name)), value)
            small[name] = len(layers) if name == "num_hidden_layers" else min(value, limit)
        elif value is None and name in UNSET:
            small[name] = UNSET[name]
        if re.fullmatch(r"(pad|bos|eos|decoder_start|sep|cls|mask|unk)_token_id", name):
            small[name] = {"pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1}.get(name, 2)
    if "kv_lora_rank" in names:
        small["num_key_value_heads"] = HEADS  # latent attention has as many of both
    return small | outer_overrides


def build(case: str, implementation: str) -> torch.nn.Module:
    kind, class_name = CASES[case]
    config_class, model_class = CONFIG_MAPPING[kind], getattr(transformers, class_name)
    config = config_class(**shrunk(config_class, DATA["overrides"].get(kind, {})))
    if not isinstance(config, model_class.config_class):
        config = next(x for x in vars(config).values() if isinstance(x, model_class.config_class))
    if case.startswith("causal/"):
        config.is_decoder = True
    config._attn_implementation = implementation
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > LARGEST:
        raise MemoryError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(3)
    model = model_class(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
            if re.search(SHARPENED, path):
                parameter.mul_(1.7)
            if path.endswith("sinks"):
                parameter.fill_(1.0)
    return model


def inputs(case: str, model: torch.nn.Module, call: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(arguments of the model, bool [2, length]: which of its logits count)."""
    length, pad = CALLS[call]
    ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, slice(0, pad) if pad >= 0 else slice(pad, None)] = False
    arguments = dict(input_ids=ids.masked_fill(~valid, 0))
    if pad:
        arguments["attention_mask"] = valid.long()
    accepted = inspect.signature(model.forward).parameters
    if case.startswith("seq2seq/") and "decoder_input_ids" in accepted:
        arguments["decoder_input_ids"] = ids[:, : length // 2].flip(1)
        valid = torch.ones_like(arguments["decoder_input_ids"], dtype=torch.bool)
    elif pad > 0 and "position_ids" in accepted:
        arguments["position_ids"] = (valid.cumsum(-1) - 1).clamp(min=0)
    return arguments | DATA["arguments"].get(case, {}), valid


def with_another_last_token(arguments: dict) -> dict:
    name = "decoder_input_ids" if "decoder_input_ids" in arguments else "input_ids"
    ids = arguments[name].clone()
    ids[:, -1] = 3 + (ids[:, -1] - 2) % (VOCABULARY - 3)
    return arguments | {name: ids}
